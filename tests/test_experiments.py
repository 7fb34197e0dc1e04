"""Which settings make which rows, what notebooks share, and the measures of Fig. 3 and of cost against hand counts."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import drawn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcco import experiments, figures
from lcco.common import LCCoError
from lcco.config import Profile, load_profile
from lcco.runs import environment, run_path
from lcco.tables import MEASURED, Layout, Table, Variant, main_variants, paper_table

ROOT = Path(__file__).parents[1]
NUMBERS = ("02", "03", "04", "05", "07", "08", "09")
CARD = {
    "model_config": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "image_size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.5, 0.5], "context_length": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(tmp_path: Path) -> Profile:
    """Two steps on a dozen drawn pictures with random parts; the choice test on pictures of two objects."""
    card, words = tmp_path / "tiny.json", tmp_path / "words.txt"
    card.write_text(json.dumps(CARD))
    words.write_text("cow\ncar\ndog\ntable\nhorse\nsheep\n")
    train = drawn.folders(tmp_path, n=4, name="train", first=5000)
    test = drawn.folders(tmp_path, n=4, name="test", first=7000)
    choice = drawn.voc(tmp_path, train=8, val=4)
    base = load_profile("smoke")
    changes = {
        "data.train": [str(train)], "data.holdout": [], "tower.model": str(card), "tower.weights": None,
        "tower.vocabulary": str(words), "model.weights": None, "model.width": 8, "train.steps": 2, "model.k": 3,
        "data.size": 64,
    }  # fmt: skip
    return dataclasses.replace(
        base, name="tiny", experiment=base.experiment.replace(changes), tests=(str(test),), ablation_test=(str(test),),
        choice_test=(str(choice),), protocols=("ufo",), seeds=(0,), ablation_seeds=(0,), group_size=3,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- which rows there are
@pytest.mark.parametrize("name", ["embedded", "lite", "paper"])
def test_what_notebooks_share_is_one_run(name: str):
    profile = load_profile(name)
    e = profile.experiment

    def path(v: Variant) -> Path:
        return run_path(e.replace(dict(v.changes), seed=0))

    by = {v.row: path(v) for v in main_variants(profile)}
    two = {v.row: path(v) for v in experiments.component_variants(profile)}
    three = {v.row: path(v) for v in experiments.loss_variants()}
    four = {v.row: path(v) for v in experiments.k_variants([1, e.model.k])}
    nine = {v.row: path(v) for v in experiments.reading_variants(e)}
    assert two["LCCo"] == three["L_iou + L_cs + L_c"] == four[f"K = {e.model.k}"] == nine["LCCo"] == by["LCCo"]
    assert two["Baseline"] == by["Baseline"]
    every = {*two.values(), *three.values(), *four.values(), *nine.values()}
    assert len(every) == len(two) + len(three) + len(four) + len(nine) - 3  # and nothing else is the same


def test_table2_and_3_have_the_papers_rows_in_its_order():
    profile = load_profile("embedded")
    two = experiments.component_variants(profile)
    assert [v.paper[""] for v in two] == list(paper_table("table2_components")[["P", "J"]].itertuples(False, None))
    for v, line in zip(two, paper_table("table2_components").to_dict("records"), strict=True):
        model = profile.experiment.replace(dict(v.changes)).model
        assert [getattr(model, m) for m in experiments.MODULES] == [bool(line[m]) for m in experiments.MODULES]
    assert [v.row for v in two][:2] == ["Baseline", "ISFC"] and two[-1].row == "LCCo"
    for v, line in zip(experiments.loss_variants(), paper_table("table3_losses").to_dict("records"), strict=True):
        loss = profile.experiment.replace(dict(v.changes)).loss
        assert [bool(loss.lambda_cs), bool(loss.lambda_c)] == [bool(line["L_cs"]), bool(line["L_c"])]
        assert v.paper[""] == (line["P"], line["J"])


def test_k_beyond_the_papers_has_no_paper_number_and_none_is_refused():
    assert [v.paper[""] for v in experiments.k_variants([5, 11])] == [(97.83, 91.74), (None, None)]
    for wrong in ([], [0, 1]):
        with pytest.raises(LCCoError, match="k_values"):
            experiments.k_variants(wrong)
    with pytest.raises(LCCoError, match="set_sizes"):
        experiments.more_images(load_profile("smoke"), [0])


def test_each_reading_turns_over_one_setting_whatever_the_profile_takes():
    for name in ("embedded", "paper"):
        e = load_profile(name).experiment
        for v in experiments.reading_variants(e)[1:]:
            setting, value = v.row.split(" = ")
            key = next(k for k in v.changes if k.endswith(setting))
            node, leaf = key.split(".")
            assert str(getattr(getattr(e, node), leaf)).lower() != value
            assert set(v.changes) - {key} <= {"loss.lambda_c"}
            assert e.replace(dict(v.changes)).hash != e.hash
    words = [v.row for v in experiments.reading_variants(e, ["coco80", "voc20"]) if v.row.startswith("vocabulary")]
    assert words == ["vocabulary = voc20"]  # its own is the first row


def test_differences_are_taken_seed_by_seed_and_say_what_the_paper_says():
    def row(name: str, seed: int, J: float, paper: float) -> dict:
        return {"row": name, "seed": seed, "J": J, "paper_J": paper, "test_set": "msrc7", "protocol": "ufo"}

    rows = [row("Baseline", 0, 50.0, 80.0), row("Baseline", 1, 60.0, 80.0), row("A", 0, 51.0, 82.0)]
    rows += [row("A", 1, 63.0, 82.0), row("B", 1, 58.0, 81.0)]
    said = experiments.against(rows, "Baseline")
    assert said == [
        "MSRC7, ufo: J against Baseline: A +2.0 ± 1.4 (paper +2.0); B -2.0 (paper +1.0, against the paper)."
    ]


def test_growth_of_sets_is_said_beside_the_papers():
    rows = [
        {"model": "LCCo", "group_size": n, "seed": s, "P": 90.0 + n, "J": 50.0 + n * (1 + s)}
        for n in (1, 5, 8) for s in (0, 1)
    ]  # fmt: skip
    said = experiments.growth(rows, 5)
    assert said[0] == "The paper, from 5 to 8 images: P +0.3, J +0.2."
    assert said[1] == "Here, LCCo, from 5 to 8 images: P +3.0 ± 0.0, J +4.5 ± 2.1."


# -------------------------------------------------------------------------------------------------- Fig. 3 and cost
def test_the_norm_of_fig3_equals_its_naive_definition():
    torch.manual_seed(0)
    maps, masks = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.rand(2, 4, 5, dtype=torch.float64)
    for over in ("positions", "channels"):
        norm, inside = experiments.masked_norm(maps, masks, over)
        for n in range(2):
            squares = kept = whole = 0.0
            for c in range(3):
                for y in range(4):
                    for x in range(5):
                        rivals = maps[n, c].flatten() if over == "positions" else maps[n, :, y, x]
                        share = float(maps[n, c, y, x].exp() / rivals.exp().sum())
                        squares += (float(masks[n, y, x]) * share) ** 2
                        kept, whole = kept + float(masks[n, y, x]) * share, whole + share
            assert float(norm[n]) == pytest.approx(squares**0.5) and float(inside[n]) == pytest.approx(kept / whole)
    # A map that looks at the object scores higher than a flat one, which scores the object's share.
    mask = torch.zeros(1, 4, 4)
    mask[0, :2, :2] = 1
    flat, looking = torch.zeros(1, 8, 4, 4), 5 * mask[:, None].repeat(1, 8, 1, 1)
    assert experiments.masked_norm(flat, mask)[1] == pytest.approx(0.25)
    assert experiments.masked_norm(flat, mask)[0] == pytest.approx((8 * 4) ** 0.5 / 16)
    assert experiments.masked_norm(looking, mask)[0] > 3 * experiments.masked_norm(flat, mask)[0]


def test_operations_are_those_counted_by_hand():
    conv, x = nn.Conv2d(3, 8, 3, padding=1), torch.rand(2, 3, 10, 12)
    assert experiments.count_flops(lambda: conv(x)) == 2 * (2 * 10 * 12) * 8 * (3 * 3 * 3)
    q = torch.rand(1, 4, 7, 16)
    assert experiments.count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 4 * 7 * 7 * 16
    attention, t = nn.MultiheadAttention(16, 4, batch_first=True).eval(), torch.rand(1, 7, 16)
    by_hand = 2 * 7 * 16 * 48 + 2 * 2 * 4 * 7 * 7 * 4 + 2 * 7 * 16 * 16  # projections, products, output
    assert experiments.count_flops(lambda: attention(t, t, t, need_weights=False)) == by_hand
    assert torch.backends.mha.get_fastpath_enabled()


def test_costs_of_the_parts_add_up(tiny: Profile, monkeypatch):
    parts = experiments.part_costs(tiny.experiment, images=3, repeats=1)
    for kind in ("parameters", "flops"):
        modules = sum(parts[label][kind] for label in experiments.MODULES.values())
        whole = parts["Baseline, all"][kind] + modules + parts["image tower"][kind]
        assert parts["LCCo, all"][kind] == pytest.approx(whole, rel=1e-6)
        sum_of = parts["backbone"][kind] + parts["top-down path"][kind]
        assert parts["Baseline, all"][kind] == pytest.approx(sum_of, rel=1e-6)
    assert all(cells["seconds"] > 0 for cells in parts.values())
    monkeypatch.setattr(experiments, "part_costs", lambda *a: parts)
    found = experiments.cost_results(tiny, ["tiny"], repeats=1)
    rows = found.rows
    layout = Layout("Cost", block="network", metrics=("parameters", "flops", "seconds"), notes=("n",), unit="")
    table = Table("cost", rows, layout, {run.path.name: run.record for run in found.runs.values()})
    assert table.notes() == ["n"]
    assert not any("**" in line for line in table.markdown().splitlines() if line.startswith("|"))
    assert all(r["status"] == MEASURED and r["J"] is None and r["tower"].endswith("(random)") for r in rows)
    assert {table.runs[r["run"]]["environment"]["platform"] for r in rows} == {environment()["platform"]}
    assert len(figures.cost_figure(rows).axes) == 1


def test_ahead_asks_for_what_the_notebooks_will(tiny: Profile, monkeypatch):
    import lcco.runs

    jobs: list = []
    monkeypatch.setattr(lcco.runs, "train_ahead", jobs.extend)
    experiments.ahead(tiny, ["00", "08"])
    assert not jobs
    experiments.ahead(tiny, ["03"])  # an ablation alone does not train every seed of the main table
    assert len(jobs) == len(experiments.loss_variants()) * len(tiny.ablation_seeds)
    jobs.clear()
    experiments.ahead(tiny, ["02", "05"], [1, 2])
    wanted = [(v, s) for v in main_variants(tiny) for s in tiny.seeds]
    wanted += [(v, s) for v in experiments.component_variants(tiny) for s in tiny.ablation_seeds]
    assert {e.hash for e, _ in jobs} == {tiny.experiment.replace(dict(v.changes), seed=s).hash for v, s in wanted}
    first, last = jobs[0][1], jobs[-1][1]
    for test in tiny.ablation_test:
        assert (test, tiny.protocols[:1], 2) in first and (test, tiny.protocols[:1], 2) not in last
        assert (test, tiny.protocols, tiny.group_size) in last
    assert all((test, ("choice",), tiny.group_size) in first for test in tiny.choice_test)


# --------------------------------------------------------------------------------------- from trainings to the tables
def test_ablations_share_trainings_and_keep_their_scores(tiny: Profile, tmp_path: Path, monkeypatch):
    import lcco.runs
    import lcco.train

    monkeypatch.setattr(lcco.runs, "train_ahead", lambda *a, **k: None)  # its processes would not be counted
    trained, real = [], lcco.train.train
    monkeypatch.setattr(lcco.runs, "train", lambda e, *a, **k: trained.append(e.hash) or real(e, *a, **k))
    lcco_only = [Variant("LCCo")]
    found = experiments.ablate(tiny, "table2_components", [*main_variants(tiny)])
    assert len(trained) == 2
    assert [r["protocol"] for r in found.rows] == ["ufo", "ufo", "choice", "choice"]
    for row in found.rows:
        assert row["status"] == MEASURED and row["run"].startswith(f"{tiny.experiment.name}-")
    chosen = found.rows[-1]
    assert chosen["test_set"] == tiny.choice_test[0] and chosen["J"] - chosen["J_same"] == pytest.approx(chosen["gain"])
    assert chosen["paper_J"] is None and 0 <= chosen["leak"] <= 100

    swept = experiments.k_at_test_time(tiny, [3, 1])
    assert len(trained) == 2
    as_trained = next(r for r in swept.rows if r["K"] == 3 and r["protocol"] == "ufo")
    assert as_trained["J"] == next(r for r in found.rows if r["row"] == "LCCo")["J"]
    assert len(list((found.runs["LCCo", 0].path / "evaluations").glob("*choice*.json"))) == 2  # K = 3 and K = 1
    sizes = experiments.more_images(tiny, [1, 3])
    assert [(r["row"], r["model"]) for r in sizes.rows[:2]] == [("LCCo, 1 image", "LCCo"), ("LCCo, 3 images", "LCCo")]
    table = Table("more_images", sizes.rows, Layout("More images", stub=("group_size",), across="model"))
    assert table.heads(table.blocks[0])[1:] == ["LCCo P", "LCCo J", "Baseline P", "Baseline J"]

    features = experiments.feature_rows(tiny)
    assert len(trained) == 2 and len(features.rows) == 6
    flat = next(r for r in features.rows if r["row"] == "flat")
    assert 0 < flat["inside"] < 100 and all(r["norm"] > 0 for r in features.rows)
    png = figures.feature_figure(tiny, features, tmp_path)
    assert png == tmp_path / "photos" / "fig3_maps.png" and "before and after" in figures.caption(png)
    assert figures.norm_bars(features.rows) is not None

    monkeypatch.setattr(experiments, "reading_variants", lambda e, v=None: [
        Variant("LCCo"), Variant("mlp3_skip = true", {"model.mlp3_skip": True})
    ])  # fmt: skip
    read = experiments.readings(tiny)
    assert len(trained) == 3
    assert {r["change_J"] for r in read.rows if r["row"] == "LCCo"} == {0.0}
    assert all(r["change_J"] is not None for r in read.rows)
    assert experiments.ablate(tiny, "x", lcco_only).rows[0]["J"] == as_trained["J"]
    two = dataclasses.replace(tiny, seeds=(0, 1))
    assert {r["seed"] for r in experiments.ablate(two, "x", main_variants(tiny)).rows} == {0}
    experiments.ablate(two, "x", lcco_only, seeds=[1])
    assert {r["seed"] for r in experiments.ablate(two, "x", main_variants(tiny)).rows} == {0}  # one row lacks it
    assert [r["seed"] for r in experiments.ablate(two, "x", lcco_only).rows] == [0, 1, 0, 1] and len(trained) == 4
    # the evaluations were kept: scoring again needs no model
    monkeypatch.setattr(lcco.runs.Run, "predictor", lambda *a, **k: pytest.fail("scored twice"))
    assert experiments.ablate(tiny, "table2_components", main_variants(tiny)).rows == found.rows


def test_words_are_right_as_often_as_an_oracle_makes_them(tmp_path: Path):
    """Cows: the word is first in one of three sets, third in another; i* is right in two. Cars: always, everywhere."""
    test = str(drawn.folders(tmp_path, classes=("cow", "car", "zebra"), n=5))
    told = iter([([1, 0], 1), ([1, 0], 1), ([1, 0], 1), ([0, 2], 0), ([2, 1], 0), ([2, 0], 2)])  # cars come first
    asked = []

    def output(data, members):
        asked.append([data.keys[i] for i in members])
        distilled, best = next(told)
        return SimpleNamespace(distilled=torch.tensor([distilled]), best=torch.tensor([best]))

    inputs = SimpleNamespace(words=["cow", "car", "dog"], prepare=lambda data: None)
    run = SimpleNamespace(
        path=tmp_path, sha="w", predictor=lambda: SimpleNamespace(inputs=inputs, output=output)
    )  # fmt: skip
    got = experiments.word_accuracy(run, test, group_size=2)
    assert got["classes"]["car"] == {"sets": 3, "top_1": 3, "top_k": 3, "i_star": 3}
    assert got["classes"]["cow"] == {"sets": 3, "top_1": 1, "top_k": 2, "i_star": 2} and got["without"] == ["zebra"]
    assert asked[2] == ["car/ca_04", "car/ca_00"]  # the protocol's sets: the last is filled up from the first
    assert experiments.word_accuracy(run, test, group_size=2) == got and len(asked) == 6


def test_absent_data_become_rows_that_say_so(tiny: Profile, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("LCCO_DATA", str(tmp_path / "nowhere"))
    away = dataclasses.replace(tiny, ablation_test=("msrc7",), tests=("msrc7",), choice_test=("voc_val",))
    for found in (
        experiments.ablate(away, "t", main_variants(away)), experiments.k_at_test_time(away, [1]),
        experiments.more_images(away, [1, 8]), experiments.feature_rows(away), experiments.readings(away),
        experiments.class_results(away), experiments.word_results(away), experiments.absent_results(away),
        experiments.class_results(away, choice=True),
    ):  # fmt: skip
        assert found.rows and not found.runs
        assert all(r["status"].startswith("not run: data not found (") and r["J"] is None for r in found.rows)
        assert figures.lines(found.rows) is None
    assert figures.sweep({"a": experiments.k_at_test_time(away, [1]).rows}, "K") is None
    assert figures.norm_bars(experiments.feature_rows(away).rows) is None
    assert figures.feature_figure(away, experiments.feature_rows(away), tmp_path) is None
    assert figures.extremes_figure(away, experiments.class_results(away), tmp_path) is None
    assert experiments.growth(experiments.more_images(away, [5, 8]).rows) == [
        "The paper, from 5 to 8 images: P +0.3, J +0.2."
    ]


def test_a_choice_test_on_training_pictures_is_refused_and_the_other_rows_stand(tiny: Profile):
    seen = dataclasses.replace(tiny, choice_test=(tiny.experiment.data.train[0],))
    found = experiments.ablate(seen, "t", [Variant("LCCo")])
    assert {r["protocol"]: r["status"].partition(";")[0] for r in found.rows} == {
        "ufo": MEASURED, "choice": "not run: trained on 8 of its 8 pictures"
    }  # fmt: skip
    with pytest.raises(LCCoError, match="was trained on 8 of the 8 pictures"):
        experiments.choice(found.runs["LCCo", 0], tiny.experiment.data.train[0], 3)


# ------------------------------------------------------------------------ what fails: classes, words, images without
def test_classes_words_and_mixed_sets_are_counted_from_the_same_runs(tiny: Profile, tmp_path: Path, monkeypatch):
    import lcco.runs
    from lcco.data import load_data

    monkeypatch.setattr(lcco.runs, "train_ahead", lambda *a, **k: None)  # one process is faster for so little
    train = drawn.folders(tmp_path, classes=("face", "car"), n=4, name="faces", first=5500)  # no cow
    tiny = dataclasses.replace(tiny, experiment=tiny.experiment.replace({"data.train": [str(train)]}))
    test = str(drawn.folders(tmp_path, classes=("cow", "car", "person", "zebra"), n=4, name="many", first=8000))
    tiny = dataclasses.replace(tiny, tests=(test, "msrc7"), ablation_test=(test,))
    monkeypatch.setenv("LCCO_DATA", str(tmp_path / "nowhere"))

    # a class's J is the mean over its images' rows
    found = experiments.class_results(tiny)
    rows = {r["row"] if r["row"] != "mean" else r["training"]: r for r in found.rows if r["test_set"] == test}
    by_hand = {m: {"cow": [], "car": [], "person": [], "zebra": []} for m in ("LCCo", "Baseline")}
    for (model, _), run in found.runs.items():
        for line in run.evaluate(test, "ufo", 3)["ufo"].rows:
            by_hand[model][line["class"]].append(line["J"])
    for cls, values in by_hand["LCCo"].items():
        assert rows[cls]["J_LCCo"] == pytest.approx(100 * sum(values) / 4, abs=1e-3)
        assert rows[cls]["J_Baseline"] == pytest.approx(100 * sum(by_hand["Baseline"][cls]) / 4, abs=1e-3)
        assert rows[cls]["change_J"] == pytest.approx(rows[cls]["J_LCCo"] - rows[cls]["J_Baseline"], abs=1e-3)
        assert (rows[cls]["images"], rows[cls]["scored"]) == (4, "4 images")
    assert [rows[c]["training"] for c in ("cow", "car", "person", "zebra")] == ["new", "seen", "seen", "new"]
    assert [rows[c]["trained_on"] for c in ("cow", "car", "person", "zebra")] == [
        "0 images", "4 images", "4 images", "0 images",  # faces: persons
    ]  # fmt: skip
    assert rows["new"]["J_LCCo"] == pytest.approx((rows["cow"]["J_LCCo"] + rows["zebra"]["J_LCCo"]) / 2, abs=1e-3)
    by_choice = experiments.class_results(tiny, "per_class_choice", choice=True).rows
    (summary,) = [r for r in experiments.choice_results(tiny).rows if r["row"] == "LCCo"]
    classes = [r for r in by_choice if r["row"] != "mean"]
    assert {r["row"] for r in classes} and "leak" not in classes[0]
    mean = sum(r["images"] * r["J_LCCo"] for r in classes) / sum(r["images"] for r in classes)
    assert mean == pytest.approx(summary["J"], abs=1e-3)
    away = found.rows[-1]
    assert away["status"] == "not run: data not found (msrc7)" and away["test_set"] == "msrc7"
    assert away["J_LCCo"] is None

    # words: against the outputs of the same sets
    words = {r["row"]: r for r in experiments.word_results(tiny).rows if r["test_set"] == test}
    assert list(words) == ["car", "cow", "all classes"]  # the vocabulary names neither person nor zebra
    predictor, data = found.runs["LCCo", 0].predictor(), load_data(test)
    names, hits = predictor.inputs.words, []
    for members in (data.groups["cow"][:3], (data.groups["cow"][3], *data.groups["cow"][:2])):
        out = predictor.output(data, members)
        first = [names[i] for i in out.distilled[0].tolist()]
        hits.append((first[0] == "cow", "cow" in first, names[int(out.best[0])] == "cow"))
    shares = [words["cow"][k] for k in ("top_1", "top_k", "i_star")]
    assert shares == [50.0 * sum(column) for column in zip(*hits, strict=True)]
    assert words["cow"]["scored"] == "2 sets"
    assert words["all classes"]["scored"] == "4 sets; 2 of 4 classes have no word"

    # mixed sets: k of 3 images lack the object
    mixed = experiments.absent_results(tiny)
    assert [(r["row"], r["absent"]) for r in mixed.rows] == [(m, k) for m in ("LCCo", "Baseline") for k in (0, 1)]
    none, one = mixed.rows[:2]
    # 4 pictures a class: a set of 3, and the fourth in a second set; with k = 1 each of the 8 sets has an intruder
    kept = experiments.mixed_sets(found.runs["LCCo", 0], test, 3)
    assert kept[0]["empty"] == 0 and kept[0]["images"] == 16 and none["false_alarms"] is None
    assert kept[1]["empty"] == 8 and kept[1]["groups"] == 8 and 0 <= one["false_alarms"] <= 100
    assert one["J_nonempty"] == pytest.approx(100 * kept[1]["J_nonempty"], abs=1e-3) and one["protocol"] == "native"
    layout = Layout("Mixed", block="absent", metrics=("false_alarms", "empty_area", "J_nonempty"))
    table = Table("mixed_sets", mixed.rows, layout)
    assert table.block_title(table.blocks[1]).startswith("Images without the object: 1, ")
    assert [m for _, m in table.blocks[0].columns] == ["J_nonempty"]
    single = str(drawn.folders(tmp_path, classes=("cow",), n=4, name="single", first=9000))
    refused = experiments.absent_results(dataclasses.replace(tiny, ablation_test=(single,)))
    assert all(r["status"].startswith("not run: data `single`: 0 pictures lack `cow`") for r in refused.rows)

    # best and worst: of different classes, by the mean over the set's own images
    sets = figures.extreme_sets(tiny, mixed_like := experiments.collect(tiny, "t", main_variants(tiny)))
    assert len(sets) == 4 and sets[0].cls != sets[1].cls and sets[2].cls != sets[3].cls
    J = {(r["class"], r["key"]): r["J"] for r in found.runs["LCCo", 0].evaluate(test, "ufo", 3)["ufo"].rows}
    parts = [(c, part) for c, items in data.groups.items() for part in (items[:3], items[3:])]
    means = [np.mean([J[c, data.keys[i]] for i in part]) for c, part in parts]
    assert sets[0].title == f"{sets[0].cls} (J {100 * max(means):.0f}), {test}"
    assert f"(J {100 * min(means):.0f})" in sets[2].title
    png = figures.extremes_figure(tiny, mixed_like, tmp_path)
    assert png == tmp_path / "photos" / "best_worst.png" and "two best sets" in figures.caption(png)

    # all of it was kept: once more needs no model
    monkeypatch.setattr(lcco.runs.Run, "predictor", lambda *a, **k: pytest.fail("measured twice"))
    assert experiments.absent_results(tiny).rows == mixed.rows
    assert {r["row"]: r for r in experiments.word_results(tiny).rows if r["test_set"] == test} == words


# ---------------------------------------------------------------------------------------------------------- figures
def test_figures_hold_what_their_axes_say():
    rows = [
        {"row": r, "J": 40.0 + s, "K": k, "test_set": t, "protocol": p, "seed": s}
        for r in ("a rather long name", "B") for s in (0, 1) for k in (1, 5)
        for t, p in (("msrc7", "ufo"), ("voc_val", "choice"))
    ]  # fmt: skip
    figure = figures.lines(rows)
    figure.canvas.draw()
    assert figure.axes[0].get_xlabel() == "J (%)"
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["a rather long name", "B"]
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["MSRC7, ufo", "VOC val, choice"]
    curves = figures.sweep({"one": rows, "two": rows}, "K", "distilled prompts K")
    curves.canvas.draw()
    assert [a.get_title() for a in curves.axes] == ["MSRC7, ufo", "VOC val, choice"]
    assert {a.get_xlabel() for a in curves.axes} == {"distilled prompts K"}
    assert np.allclose(curves.axes[0].get_xticks(), [1, 5])


# -------------------------------------------------------------------------------------------------------- notebooks
@pytest.mark.parametrize("number", NUMBERS)
def test_notebooks_are_thin_and_say_what_they_cost(number: str):
    (file,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    book = json.loads(file.read_text())
    cells = book["cells"]
    first = "".join(cells[0]["source"])
    assert first.startswith("# ") and "*Paper item:" in first and "**What the paper reports.**" in first
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and all(" # type: " in line for line in tagged[0]["source"])
    text = "\n".join("".join(c["source"]) for c in cells)
    assert "## What this run will cost" in text and "Written:" in "".join(cells[-1]["source"])
    assert not any(c.get("outputs") for c in cells) and book["metadata"]["kernelspec"]["name"] == "python3"
    for c in cells:
        if c["cell_type"] == "code":
            tree = ast.parse("".join(c["source"]))
            assert not any(isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.While)) for n in ast.walk(tree))
