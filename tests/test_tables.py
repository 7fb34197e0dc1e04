"""Tables come from rows keyed by names, the paper's numbers from its csv; committed tables agree with both."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import drawn
import numpy as np
import pytest

from lcco import figures, tables
from lcco.common import LCCoError
from lcco.config import Profile, load_profile
from lcco.tables import MEASURED, QUOTED, ROW_FIELDS, Layout, Table, Variant, make_row, read_table, write_table

ROOT = Path(__file__).parents[1]


def rows_of(profile: str = "lite", seeds=(0, 1, 2), lcco=(60.0, 61.0, 62.0), baseline=(50.0, 50.0, 50.0)) -> list[dict]:
    """LCCo and Baseline on msrc7 with known J, and Internet's data absent."""
    chosen, out = load_profile(profile), []
    for name, values in (("LCCo", lcco), ("Baseline", baseline)):
        for seed, J in zip(seeds, values, strict=True):
            e = chosen.experiment.replace(seed=seed)
            cells = {"protocol": "ufo", "group_size": 5, "paper_P": 97.0, "paper_J": 88.4}
            found = {"P": 90.0, "J": J, "images": 208, "run": f"run-{name}-{seed}", "test_set": "msrc7"}
            out.append(make_row("table1_main", name, chosen, e, **cells, **found))
            why = {"status": "not run: data not found (internet300)", "test_set": "internet300"}
            out.append(make_row("table1_main", name, chosen, e, **cells, **why))
    return out


LAYOUT = Layout("Table 1: main results", stub=("row", "train_set"))


# ------------------------------------------------------------------------------------------------ the paper's numbers
def test_paper_numbers_are_found_by_name():
    number = tables.paper_number
    assert number("table1_main", "iCoseg", method="LCCo", train_set="COCO") == (98.3, 92.9)
    assert number("table1_main", "MSRC", method="Chen", train_set="PASCAL") == (95.3, 77.7)
    assert number("table1_main", "Internet", method="Chen", train_set="PASCAL") == (None, 73.1)
    assert number("table2_components", isfc=0, clip_interaction=1, clip_regularization=0) == (96.6, 90.0)
    assert number("table4_k", K=7) == (97.83, 91.73)
    with pytest.raises(LCCoError, match="17 rows|must be one"):
        number("table1_main", "MSRC")


def test_main_variants_carry_the_paper_row_of_the_same_kind_of_training_set():
    paper = tables.main_variants(load_profile("paper"))
    assert paper[0].paper["msrc7"] == (97.0, 88.4) and paper[0].paper["pascal1037"] == (96.1, 75.9)
    coco = load_profile("paper").experiment.replace({"data.train": ["coco_seg"]})
    assert tables.main_variants(Profile("x", experiment=coco))[0].paper["msrc7"] == (97.9, 89.8)
    assert tables.main_variants(load_profile("embedded"))[0].paper == {}
    off = paper[1].changes
    assert not any(off[f"model.{m}"] for m in ("isfc", "clip_interaction", "clip_regularization"))


def test_quoted_rows_hold_every_number_of_the_papers_table_and_measure_nothing():
    rows = tables.quoted_rows(load_profile("embedded"))
    frame = tables.paper_table("table1_main")
    for m in "PJ":
        printed = sorted(v for on in tables.PAPER_SETS.values() for v in frame[f"{on}_{m}"].dropna())
        assert sorted(r[f"paper_{m}"] for r in rows if r[f"paper_{m}"] is not None) == printed
    assert all(r["P"] is None and r["J"] is None and r["status"] == QUOTED and not r["run"] for r in rows)


# --------------------------------------------------------------------------------------------------------------- rows
def test_rows_follow_the_schema_and_name_a_stand_in_for_what_it_is():
    row = rows_of()[0]
    assert tuple(row) == ROW_FIELDS and row["status"] == MEASURED
    assert (row["backbone"], row["tower"], row["train_set"]) == ("efficientnet_lite2", "ConSE", "voc_train")
    assert tables.tower_name(load_profile("paper").experiment) == "ViT-B-16-quickgelu (openai)"
    random = load_profile("paper").experiment.replace({"tower.weights": None})
    assert tables.tower_name(random) == "ViT-B-16-quickgelu (random)"


def test_summaries_become_per_cent():
    cells = tables.per_cent({"P": 0.9, "J": 0.5, "J_class": None, "images": 7})
    assert (cells["P"], cells["J"], cells["J_class"], cells["images"]) == (90.0, 50.0, None, 7)


def test_absent_data_and_weights_become_a_status_and_other_mistakes_stay_mistakes(tmp_path: Path):
    from lcco.data import load_data

    for name in ("internet300", "voc_train", "coco_seg"):
        with pytest.raises(LCCoError) as error:
            load_data(name, tmp_path)
        assert tables.absence(error.value) == f"not run: data not found ({name})"
    offline = LCCoError("weights `openai` of ViT-B-16-quickgelu are not here and downloads are off: get https://x")
    assert tables.absence(offline) == "not run: weights not found (openai)"
    offline = LCCoError("weights resnet50-0676ba61.pth are not here and the net does not answer: download https://x")
    assert tables.absence(offline) == "not run: weights not found (resnet50-0676ba61.pth)"
    for text in ("unknown setting `model.q`", "data `x` is neither a folder nor a known set", "w.pth: cut short"):
        with pytest.raises(LCCoError, match=re.escape(text)):
            tables.absence(LCCoError(text))


class FakeRun:
    """A trained run whose scores are its seed."""

    def __init__(self, experiment, calls):
        self.experiment, self.path, self.record, self.calls = experiment, Path(f"runs/x-{experiment.hash}"), {}, calls

    def evaluate(self, test, protocols, size):
        self.calls.append((test, tuple(protocols), size))
        summary = {"P": 0.9, "J": 0.5 + self.experiment.seed / 100, "images": 3}
        return {p: SimpleNamespace(summary=summary) for p in protocols}


def test_collect_gives_a_row_for_each_variant_seed_test_protocol_and_size(monkeypatch: pytest.MonkeyPatch):
    import lcco.data
    import lcco.runs

    calls: list = []
    monkeypatch.setattr(lcco.runs, "train_ahead", lambda *a, **k: None)
    monkeypatch.setattr(lcco.runs, "get_run", lambda e: FakeRun(e, calls))

    def load(name):
        if name == "icoseg8":
            raise LCCoError("data `icoseg8` not found: looked for nothing; set LCCO_DATA")
        return SimpleNamespace(name=name)

    monkeypatch.setattr(lcco.data, "load_data", load)
    monkeypatch.setattr(tables, "refusal", lambda profile, data: "")
    variants = [Variant("A", {"model.k": 3}, {"": (1.0, 2.0)}, {"K": 3}), Variant("B")]
    found = tables.collect(
        load_profile("embedded"), "t", variants, tests=("x", "icoseg8"), seeds=(4, 5), group_sizes=(2, 5)
    )
    assert len(found.rows) == 2 * 2 * 2 * 2 * 2  # variants, seeds, tests, sizes, protocols
    assert set(found.runs) == {("A", 4), ("A", 5), ("B", 4), ("B", 5)}
    assert found.runs["A", 4].experiment.model.k == 3 and found.runs["B", 4].experiment.model.k == 5
    assert {data.name for data, _, _ in calls} == {"x"}
    for row in found.rows:
        if row["test_set"] == "icoseg8":
            assert row["status"] == "not run: data not found (icoseg8)" and row["J"] is None and row["run"] is None
        else:
            assert row["J"] == 50 + row["seed"] and row["run"] and row["status"] == MEASURED
    assert {r["paper_J"] for r in found.rows if r["row"] == "A"} == {2.0}
    assert {r.get("K") for r in found.rows if r["row"] == "A"} == {3}


def test_collect_says_what_is_missing_when_weights_are_absent(monkeypatch: pytest.MonkeyPatch):
    import lcco.data
    import lcco.runs

    def get_run(experiment):
        raise LCCoError("weights resnet50.pth are not here and downloads are off: download it")

    monkeypatch.setattr(lcco.runs, "train_ahead", lambda *a, **k: None)
    monkeypatch.setattr(lcco.runs, "get_run", get_run)
    monkeypatch.setattr(lcco.data, "load_data", lambda name: None)
    monkeypatch.setattr(tables, "refusal", lambda profile, data: "")
    found = tables.collect(load_profile("paper"), "t", [Variant("A"), Variant("B")])
    assert {r["status"] for r in found.rows} == {"not run: weights not found (resnet50.pth)"} and not found.runs


# ------------------------------------------------------------------------------------------------------------- tables
def cell(table: Table, line: str, group: str, metric: str):
    block = table.blocks[0]
    cells = next(cells for stub, cells in block.lines if stub[0] == line)
    return cells[block.columns.index((group, metric))]


def test_cells_are_mean_and_sample_deviation_over_seeds_whatever_the_order_of_rows():
    rows = rows_of()
    for order in (rows, rows[::-1]):
        J = cell(Table("table1_main", order, LAYOUT), "LCCo", "msrc7", "J")
        assert J.mean == 61.0 and math.isclose(J.sd, 1.0) and J.show(1, "{}", "") == "61.0 ± 1.0"
    one = Table("table1_main", rows_of(seeds=(0,), lcco=(61.0,), baseline=(50.0,)), LAYOUT)
    assert cell(one, "LCCo", "msrc7", "J").sd is None
    assert "one seed (0)" in one.markdown() and "over 3 seeds" in Table("t", rows, LAYOUT).markdown()


def test_pictures_seen_in_training_become_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import lcco.runs

    monkeypatch.setenv("LCCO_CACHE", str(tmp_path / "cache"))
    train = drawn.folders(tmp_path, ["cow", "car"], 4, name="train")
    seen, clean = (drawn.folders(tmp_path, ["cow"], 2, name=n, first=f) for n, f in (("seen", 50), ("clean", 90)))
    shutil.copy(train / "image/car/ca_01.jpg", seen / "image/cow/co_00.jpg")
    calls: list = []
    monkeypatch.setattr(lcco.runs, "train_ahead", lambda *a, **k: None)
    monkeypatch.setattr(lcco.runs, "get_run", lambda e: FakeRun(e, calls))
    profile = load_profile("smoke")
    e = profile.experiment.replace({"data.train": [str(train)]})
    tests = (str(seen), str(clean))
    found = tables.collect(dataclasses.replace(profile, experiment=e), "t", [Variant("A")], tests=tests, seeds=[0])
    said = {r["test_set"]: r["status"] for r in found.rows}
    assert said[str(clean)] == MEASURED and said[str(seen)].startswith("not run: trained on 1 of its 2 pictures")
    assert {data.name for data, _, _ in calls} == {"clean"}


def test_means_over_other_seeds_are_not_called_best_but_changes_are():
    lcco = rows_of(seeds=(0, 1), lcco=(60.0, 50.0), baseline=(10.0, 10.0))
    one = rows_of(seeds=(0,), lcco=(58.0,), baseline=(9.0,))
    rows = [r | {"change_J": 0.0} for r in lcco if r["row"] == "LCCo"]
    rows += [r | {"row": "other", "change_J": -2.0} for r in one if r["row"] == "LCCo"]
    both = Table("t", rows, dataclasses.replace(LAYOUT, metrics=("P", "J", "change_J")))
    assert not any(cell(both, row, "msrc7", "J").best for row in ("LCCo", "other"))  # 55.0 against 58.0
    assert cell(both, "LCCo", "msrc7", "change_J").best and not cell(both, "other", "msrc7", "change_J").best


def test_a_set_that_chose_the_weights_is_no_clean_test_and_intruders_are_no_images():
    def said(checkpoint: str, holdout: list[str]) -> str:
        record = {"experiment": {"seed": 0, "train": {"checkpoint": checkpoint}, "data": {"holdout": holdout}}}
        return Table("t", rows_of(), LAYOUT, {"r": record}).markdown()

    assert "MSRC7 was not trained on, but the step" in said("best", ["msrc7"])
    assert "was not trained on" not in said("last", ["msrc7"]) + said("best", ["voc_val"])
    rows = [r | {"absent": k, "images": 20 + 3 * k} for r in rows_of() for k in (0, 1)]
    assert "MSRC7 20." in Table("t", rows, LAYOUT).markdown()


def test_a_measured_table_is_not_replaced_by_an_empty_one_and_lost_rows_are_told(tmp_path: Path, capsys):
    write_table(rows_of(), tmp_path, "t", LAYOUT)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    empty = [r | {"P": None, "J": None, "run": None, "status": "not run: data not found (x)"} for r in rows_of()]
    write_table(empty, tmp_path, "t", LAYOUT)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    assert "t.csv: kept, with its 6 measured rows; here nothing was measured (not run" in capsys.readouterr().err
    write_table([r for r in rows_of() if r["row"] == "LCCo"], tmp_path, "t", LAYOUT)
    assert "no longer holds what was measured of Baseline; `results: FOLDER`" in capsys.readouterr().err
    write_table(rows_of(), tmp_path, "t", LAYOUT)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before and not capsys.readouterr().err


def test_best_is_bold_and_a_tie_of_all_is_not():
    table = Table("table1_main", rows_of(), LAYOUT)
    assert cell(table, "LCCo", "msrc7", "J").best and not cell(table, "Baseline", "msrc7", "J").best
    assert not cell(table, "LCCo", "msrc7", "P").best and not cell(table, "Baseline", "msrc7", "P").best
    assert "**61.0 ± 1.0**" in table.markdown() and "<b>61.0 ± 1.0</b>" in table.html()
    assert r"\textbf{61.0 $\pm$ 1.0}" in table.latex()


def test_difference_to_the_paper_is_shown_at_the_paper_profile_alone():
    assert cell(Table("table1_main", rows_of("lite"), LAYOUT), "LCCo", "msrc7", "J").delta is None
    paper = Table("table1_main", rows_of("paper"), LAYOUT)
    assert math.isclose(cell(paper, "LCCo", "msrc7", "J").delta, 61.0 - 88.4)
    assert "(-27.4)" in paper.markdown() and "difference" in paper.markdown()
    assert cell(paper, "LCCo", "msrc7", "paper_J").show(1, "{}", "") == "88.4"


def test_what_was_not_run_says_why_in_a_footnote():
    for text in (lambda t: t.markdown(), lambda t: t.html(), lambda t: t.latex()):
        shown = text(Table("table1_main", rows_of(), LAYOUT))
        assert "not run" in shown and "data not found (internet300)" in shown


def test_slips_of_the_record_are_footnotes_where_they_belong():
    chosen = load_profile("lite")
    table = Table("table1_main", rows_of() + tables.quoted_rows(chosen), LAYOUT)
    text = table.markdown()
    number = table.footnotes.index(next(n for n in table.footnotes if "71.2" in n)) + 1
    assert text.count(f"74.1 <sup>{number}</sup>") == 1
    assert "mixes protocols" in text and "ten images a class" in text and "VOC 2010" not in text  # PASCAL is not in it
    assert "mixes protocols" not in Table("table2_components", rows_of(), LAYOUT).markdown()


def test_written_tables_are_read_again_the_same(tmp_path: Path):
    runs = [SimpleNamespace(path=Path(f"runs/run-LCCo-{s}"), record={"seconds": s}) for s in range(3)]
    rows = rows_of() + tables.quoted_rows(load_profile("lite"))
    table = write_table(rows, tmp_path, "table1_main", LAYOUT, runs)
    again = read_table(tmp_path / "table1_main.csv")
    assert again.runs == {f"run-LCCo-{s}": {"seconds": s} for s in range(3)} and again.layout == LAYOUT
    for kind in ("markdown", "latex", "html"):
        assert getattr(again, kind)() == getattr(table, kind)()
    assert (tmp_path / "table1_main.md").read_text() == table.markdown()
    header = (tmp_path / "table1_main.csv").read_text().splitlines()[0]
    assert tuple(header.split(",")) == ROW_FIELDS
    (tmp_path / "table1_main.records.json").unlink()
    with pytest.raises(LCCoError, match=r"table1_main.csv: not a written table"):
        read_table(tmp_path / "table1_main.csv")


def test_markdown_rows_have_as_many_cells_as_the_heading():
    text = Table("table1_main", rows_of() + tables.quoted_rows(load_profile("lite")), LAYOUT).markdown()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) > 20
    for block in text.split("**Protocol")[1:]:
        widths = {line.count("|") for line in block.split("**As printed")[0].splitlines() if line.startswith("|")}
        assert len(widths) == 1


def latex_of_hard_names() -> str:
    rows = rows_of()
    for row in rows:
        row["row"] = row["row"].replace("LCCo", "50% & $x_1$ #1 {a}\\b ~^ ≥ 3 × λ “q”")
    return Table("table1_main", rows + tables.quoted_rows(load_profile("lite")), LAYOUT).latex()


def test_latex_is_whole_and_every_line_has_its_columns():
    text = latex_of_hard_names()
    for word in ("document", "tabular"):
        assert text.count(rf"\begin{{{word}}}") == text.count(rf"\end{{{word}}}") > 0
    assert {"booktabs", "graphicx"} <= set(re.search(r"usepackage\{(booktabs.*?)\}", text)[1].split(","))
    for part in text.split(r"\begin{tabular}")[1:]:
        columns = len(re.match(r"\{([lr]+)\}", part)[1])
        for line in part.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines():
            assert len(re.findall(r"(?<!\\)&", line)) == columns - 1
    assert text.isascii(), [c for c in text if not c.isascii()]


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_latex_compiles_with_pdflatex_alone(tmp_path: Path):
    (tmp_path / "t.tex").write_text(latex_of_hard_names())
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "t.pdf").stat().st_size > 1000, done.stdout[-2000:]


@pytest.mark.parametrize("file", sorted((ROOT / "results").glob("*/*.records.json")), ids=lambda p: f"{p.parent.name}")
def test_committed_table_agrees_with_its_rows_and_records(file: Path):
    table = read_table(file.parent / file.name.replace(".records.json", ".csv"))
    assert file.with_name(f"{table.name}.md").read_text() == table.markdown()
    assert file.with_name(f"{table.name}.tex").read_text() == table.latex()
    for _, row in table.rows.iterrows():
        assert row["profile"] == file.parent.name and row["table"] == table.name
        if row["status"] == MEASURED:
            record = table.runs[row["run"]]
            if "baseline" in record:  # Table 5's rivals are not trained here
                assert record["baseline"] and record["environment"]
                continue
            assert record["hash"] in row["run"] and record["experiment"]["seed"] == row["seed"]
            assert "+".join(record["experiment"]["data"]["train"]) == row["train_set"]
        else:
            assert row["status"].startswith("not run: ") and math.isnan(row["J"]) and not isinstance(row["run"], str)


# ------------------------------------------------------------------------------------------------------------ figures
def test_overlay_marks_the_object_and_greys_the_rest():
    image = np.zeros((60, 90, 3)) + (0.9, 0.2, 0.1)
    mask = np.zeros((30, 45))
    mask[10:20, 15:30] = 1
    out = figures.overlay(image, mask)
    assert out.shape == image.shape
    corner, inside, edge = out[2, 2], out[30, 45], out[20, 45]
    assert np.ptp(corner) < 1e-9 and np.ptp(inside) > 0.3 and edge.max() < 0.2


def test_figures_are_written_with_their_caption_and_photographs_go_where_git_ignores_them(tmp_path: Path):
    rows = [{"row": r, "K": k, "J": 50.0 + k + s} for r in "AB" for k in (1, 5) for s in (0, 1)]
    png = figures.save(figures.curve(rows, "K", xlabel="distilled prompts K"), tmp_path, "k", "What it shows.")
    assert figures.caption(png) == "What it shows." and (tmp_path / "k.pdf").stat().st_size > 1000
    axes = figures.curve(rows, "K", xlabel="distilled prompts K").axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("distilled prompts K", "J (%)")
    figures.save(figures.bars(rows, "K", by="row"), tmp_path, "bars")
    images, mask = [np.random.default_rng(0).random((20, 30, 3))] * 2, [np.eye(20, 30)] * 2
    panel = figures.Panel("cow", images, {"truth": mask, "LCCo": mask})
    shown = figures.qualitative([panel, panel, panel])
    assert len(shown.axes) == 3 * 3 * 2  # sets × (input, truth, LCCo) × images
    png = figures.save(shown, tmp_path, "fig4", photos=True)
    assert png == tmp_path / "photos" / "fig4.png"
    assert "/results/*/photos/" in (ROOT / ".gitignore").read_text().split()
