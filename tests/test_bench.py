"""The cost table: parameters and operations by hand, seconds of one run, and what it was run on."""

from __future__ import annotations

import pytest
import torch

from lcco.cli import main
from lcco.config import load_profile
from lcco.experiment import bench as bench_
from lcco.experiment.bench import MODULES, bench, flops, parts
from lcco.experiment.tables import Table, label

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def measured():
    """Works and parameters of the smoke profile, for a set of three."""
    e = load_profile("smoke").experiment.replace({"model.weights": None, "tower.weights": None})
    return parts(e, 3)


def test_each_part_of_a_profiles_network_is_a_row():
    rows = bench(load_profile("smoke"), repeats=2).set_index("row")
    names = [f"Baseline + {label(module)}" for module in MODULES]
    names = ["image tower", "backbone", "Baseline", *names, "LCCo, embeddings cached", "LCCo, all"]
    assert list(rows.index) == names and (rows["table"] == "bench").all()
    assert (rows[["parameters", "flops", "seconds", "ratio"]] > 0).all(axis=None)
    floor = rows.loc[["image tower", "backbone"], "seconds"].sum()
    assert rows.loc["LCCo, all", "ratio"] == pytest.approx(
        rows.loc["LCCo, all", "seconds"] / floor, rel=0.02
    )
    assert rows.loc["Baseline", "flops"] > rows.loc["backbone", "flops"]
    assert rows["threads"].iloc[0] == 1 and rows["torch"].iloc[0] == torch.__version__
    assert rows["test_set"].iloc[0] == "3 × 64 px" and rows["device"].iloc[0]
    table = Table("bench", rows.reset_index(), values=("parameters", "flops", "seconds"), unit="")
    assert "Baseline + ISFC" in table.markdown()


def test_parameters_and_operations_add_up(measured):
    works, size = measured
    for count in (size, {name: flops(work) for name, work in works.items()}):
        added = [count[f"Baseline + {label(m)}"] - count["Baseline"] for m in MODULES]
        assert min(added) > 0
        assert count["LCCo, embeddings cached"] - count["Baseline"] == sum(added)
        assert count["LCCo, all"] == count["LCCo, embeddings cached"] + count["image tower"]


def test_operations_of_a_part_are_worked_by_hand(measured):
    """ISFC's projections, attention, FFN1 and conv on the 4 × 4 maps of three images."""
    N, C, hw, edges = 3, 16, 16, 6
    projections = 3 * N * C * C * hw  # query, key, value
    attention = edges * 2 * hw * hw * C  # scores and their sums, all heads
    merge = edges * C * C * hw
    ffn1 = edges * hw * (2 * C * 2 * C + 2 * C * C)
    conv = N * 9 * C * C * hw
    works, _ = measured
    added = flops(works["Baseline + ISFC"]) - flops(works["Baseline"])
    assert added == 2 * (projections + attention + merge + ffn1 + conv)


def test_the_command_prints_what_fits_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(bench_, "seconds", lambda work: 1.0)
    assert main(["bench", "--profile", "smoke", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 8 and max(map(len, lines)) <= 120
    assert "GFLOPs" in lines[0] and "LCCo, all" in lines[-1] and "3 × 64 px" in lines[-1]


def test_the_least_of_the_rounds_counts_and_the_first_warms_up(monkeypatch):
    took = iter([*[1.0] * 8, *[9.0] * 4, *[3.0] * 4, *[5.0] * 8])  # three rounds of eight works
    monkeypatch.setattr(bench_, "seconds", lambda work: next(took))
    rows = bench(load_profile("smoke"), repeats=2)
    assert rows["seconds"].tolist() == [5.0] * 4 + [3.0] * 4
