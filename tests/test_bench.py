"""The cost table: parameters and operations by hand, seconds of one run, and what it was run on."""

from __future__ import annotations

import pytest
import torch

from lcco.common import LCCoError
from lcco.config import load_profile
from lcco.experiment import bench as bench_
from lcco.experiment.bench import PARTS, bench
from lcco.experiment.tables import Table

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def network():
    e = load_profile("smoke").experiment.replace({"model.weights": None, "tower.weights": None})
    return bench_._Network(e, 3)


def test_each_part_of_a_profiles_network_is_a_row(monkeypatch):
    rows = bench(load_profile("smoke"), repeats=2).set_index("row")
    assert tuple(rows.index) == PARTS and (rows["table"] == "cost").all()
    assert (rows[["parameters", "flops", "seconds", "ratio"]] > 0).all(axis=None)
    floor = rows.loc[["image tower", "backbone"], "seconds"].sum()
    assert rows.loc["LCCo, all", "ratio"] == pytest.approx(
        rows.loc["LCCo, all", "seconds"] / floor, rel=0.02
    )
    for kind in ("flops", "seconds"):
        assert rows.loc["Baseline, all", kind] > rows.loc["top-down path", kind]
        assert rows.loc["LCCo, all", kind] > rows.loc["LCCo, embeddings cached", kind]
    assert rows["threads"].iloc[0] == 1 and rows["torch"].iloc[0] == torch.__version__
    assert rows["test_set"].iloc[0] == "a set of 3 at 64 px" and rows["device"].iloc[0]
    table = Table("cost", rows.reset_index(), values=("parameters", "flops", "seconds"), unit="")
    assert "top-down path" in table.markdown()
    with pytest.raises(LCCoError, match="`repeats` is 0"):
        bench(load_profile("smoke"), repeats=0)


def test_parameters_and_operations_add_up(network):
    size, flops = network.parameters(), network.flops()
    modules = ("ISFC", "CLIP interaction", "CLIP regularization")
    full, base = "LCCo, embeddings cached", "Baseline, all"
    assert size[full] - size[base] == sum(size[m] for m in modules)
    assert flops[full] - flops[base] == sum(flops[m] for m in modules)
    cosines = 2 * 3 * network.features.tower.width * 40  # S of three images and 40 words
    assert flops[base] == flops["backbone"] + flops["top-down path"] + cosines
    assert flops["LCCo, all"] == flops[full] + flops["image tower"]


def test_operations_of_a_part_are_worked_by_hand(network):
    """ISFC's projections, attention, FFN1 and conv on the 4 × 4 maps of three images."""
    N, C, hw, edges = 3, 16, 16, 6
    projections = 3 * N * C * C * hw  # query, key, value
    attention = edges * 2 * hw * hw * C  # scores and their sums, all heads
    merge = edges * C * C * hw
    ffn1 = edges * hw * (2 * C * 2 * C + 2 * C * C)
    conv = N * 9 * C * C * hw
    assert network.flops()["ISFC"] == 2 * (projections + attention + merge + ffn1 + conv)


def test_the_least_of_the_rounds_counts_and_the_first_warms_up(network, monkeypatch):
    rounds = iter([{"a": 1.0}, {"a": 5.0}, {"a": 3.0}])
    monkeypatch.setattr(network, "measure", lambda read: next(rounds))
    assert network.seconds(2) == {"a": 3.0}
