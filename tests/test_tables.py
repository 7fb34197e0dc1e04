"""Tables come from rows keyed by names, the paper's numbers from its csv, notes from records."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

from lcco.common import LCCoError, Missing
from lcco.config import TRAINING_VERSION, Experiment, Profile
from lcco.experiment import tables
from lcco.experiment.tables import (
    MEASURED,
    QUOTED,
    ROW_FIELDS,
    Table,
    collect,
    paired,
    quoted_rows,
    row,
    with_paper,
)

ROOT = Path(__file__).parents[1]
LITE = Profile(
    name="lite",
    experiment=Experiment(name="lite").replace(
        {"tower.kind": "conse", "model.backbone": "efficientnet_lite2"}
    ),
    tests=("msrc7", "internet300", "icoseg8"),
    seeds=(0, 1, 2),
)


def measured(name: str, J: list[float], test: str = "msrc7", table: str = "table1_main", **cells):
    """One row a seed, with P 90."""
    more = {"protocol": "ufo", "group_size": 5, "test_set": test, "images": 208, "P": 90.0} | cells
    return [
        row(table, name, LITE, LITE.experiment.replace(seed=s), J=j, run=f"{name}-{s}", **more)
        for s, j in enumerate(J)
    ]


def absent(name: str, test: str, why: str = "data not found", table: str = "table1_main"):
    how = {
        "protocol": "ufo",
        "group_size": 5,
        "test_set": test,
        "status": f"not run: {why} ({test})",
    }
    return [row(table, name, LITE, LITE.experiment.replace(seed=s), **how) for s in range(3)]


def main(lcco=(60.0, 61.0, 62.0), baseline=(50.0, 50.5, 51.0), **how) -> Table:
    """Table 1: two rows on MSRC7; two sets are not here."""
    rows = measured("LCCo", list(lcco)) + measured("Baseline", list(baseline))
    for name in ("LCCo", "Baseline"):
        rows += absent(name, "internet300") + absent(name, "icoseg8")
    return Table("table1_main", with_paper(pd.DataFrame(rows)), title="Table 1", **how)


def cell(table: Table, line: str, *column: str, part: int = 0) -> str:
    text = list(table.parts.values())[part]
    return text.loc[text.index[text.iloc[:, 0] == line][0], column]


# ------------------------------------------------------------------------------ the paper's numbers
def test_the_papers_numbers_keep_their_decimals_and_stand_under_their_own_set():
    k = measured("K = 5", [60.0], table="table4_k") + measured("K = 2", [59.0], table="table4_k")
    table = Table("table4_k", with_paper(pd.DataFrame(k)), decimals=2)
    assert cell(table, "K = 5", "paper (iCoseg)", "J") == "91.74"
    assert cell(table, "K = 5", "paper (iCoseg)", "P") == "97.83"
    assert cell(table, "K = 2", "paper (iCoseg)", "J") == ""
    rivals = Table("table5_foundation", with_paper(pd.DataFrame(
        measured("SAM GT", [60.0], table="table5_foundation")
        + measured("SAM", [60.0], table="table5_foundation")
        + measured("SAM", [60.0], "pascal1037", "table5_foundation")
    )))  # fmt: skip
    text = next(iter(rivals.parts.values()))
    assert [g for g, _ in text if g.startswith("paper")] == ["paper (iCoseg)"] * 2  # one pair
    assert cell(rivals, "SAM", "paper (iCoseg)", "J") == "35.30"


def test_table_1_has_the_paper_beside_each_set_for_its_kind_of_training():
    table = main()  # trained on `voc_train`
    assert cell(table, "LCCo", "paper (MSRC7)", "J") == "88.4"
    coco = LITE.experiment.replace({"data.train": ["coco_seg"]})
    drawn = LITE.experiment.replace({"data.train": ["glyphworld_train"]})
    for e, printed in ((LITE.experiment, "88.4"), (coco, "89.8"), (drawn, None)):
        one = pd.DataFrame([row("table1_main", "LCCo", LITE, e, test_set="msrc7", J=50.0)])
        assert with_paper(one)["paper_J"].dropna().tolist() == ([printed] if printed else [])
    assert with_paper(pd.DataFrame(measured("Baseline", [50.0])))["paper_J"].isna().all()
    choice = measured("LCCo", [50.0], protocol="choice", table="table2_components")
    assert with_paper(pd.DataFrame(choice))["paper_J"].isna().all()  # the paper has no such test


def test_quoted_rows_hold_every_number_of_the_papers_table_1_and_measure_nothing():
    rows, paper = quoted_rows(LITE), tables.paper_table("table1_main")
    for m in ("paper_P", "paper_J"):
        assert sorted(rows[m].dropna()) == sorted(v for v in paper[m] if v)
    assert len(rows) == len(paper) == 54 and (rows["test_set"] == rows["paper_test_set"]).all()
    assert rows["J"].isna().all() and set(rows["status"]) == {QUOTED}
    index = ("row", "train_set", "uses_class_labels")
    table = Table("table1_main", rows, index=index)
    assert list(table.parts) == ["protocol as printed in the paper"]
    assert cell(table, "Su et al. 2023 (UFO)", "", "class names used") == "yes"
    assert cell(table, "Chen et al. 2018", "paper (Internet)", "J") == "73.1"
    assert cell(table, "Zhang et al. 2020b (SSNM)", "paper (Internet)", "J") == "74.1"
    assert any("SSNM's J of 74.1" in note and "71.2" in note for note in table.all_notes())


# -------------------------------------------------------------------------------------------- rows
def test_rows_follow_the_schema_and_name_a_stand_in_for_what_it_is():
    one = measured("LCCo", [60.0])[0]
    assert tuple(one)[: len(ROW_FIELDS)] == ROW_FIELDS and one["status"] == MEASURED
    assert (one["tower"], one["uses_class_labels"]) == ("ConSE", "no")
    clip = row("t", "LCCo", LITE, Experiment())
    assert clip["tower"] == "ViT-B-16-quickgelu (openai)"
    named = Experiment().replace({"tower.weights": None, "loss.v_gt": "name"})
    random = row("t", "LCCo", LITE, named)
    assert random["tower"].endswith("(random)") and random["uses_class_labels"] == "yes"


def test_summaries_become_per_cent():
    cells = tables.scores({"P": 0.9, "J": 1 / 3, "J_class": None, "images": 7, "pictures": 3})
    assert cells == {"P": 90.0, "J": 33.3333, "J_class": None, "images": 7}


class FakeRun:
    """A run whose J is its seed; it has seen one picture of `seen`."""

    asked: list = []

    def __init__(self, experiment):
        self.experiment, self.path = experiment, Path(f"runs/{experiment.run_name}")
        self.record = {"training": {}, "experiment": experiment.model_dump(mode="json")}

    def overlap(self, test, kind="train"):
        return int(test == ["seen"]) if kind == "train" else 2

    def evaluate(self, test, protocols, size, k=None):
        self.asked.append((self.experiment.seed, test, tuple(protocols), size, k))
        summary = {"P": 0.9, "J": self.experiment.seed / 100, "images": 3}
        return {p: SimpleNamespace(summary=summary) for p in protocols}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    runs = pytest.importorskip("lcco.experiment.runs")
    FakeRun.asked = []
    gone = Missing("data", "icoseg8", "set LCCO_DATA")
    known = {"icoseg8": gone, "seen": ["seen"], "msrc7": ["a", "b"]}
    monkeypatch.setattr(runs, "load_tests", lambda profile, names: {n: known[n] for n in names})
    monkeypatch.setattr(runs, "get_run", FakeRun)
    return runs


def test_collect_gives_a_row_for_each_model_seed_test_size_and_protocol(fake):
    models = {f"K = {k}": LITE.experiment.replace({"model.k": k}) for k in (3, 5)}
    rows = collect(
        LITE, "table4_k", models, ["msrc7", "seen", "icoseg8"], ["ufo", "native"], [2, 5],
        seeds=[4, 7], cells={"K": lambda e: e.model.k}, k=1,
    )  # fmt: skip
    assert len(rows) == 2 * 2 * 3 * 2 * 2
    done = rows[rows["status"] == MEASURED]
    assert (done["J"] == done["seed"]).all() and set(done["test_set"]) == {"msrc7"}
    assert set(done["run"]) == {m.replace(seed=s).run_name for m in models.values() for s in (4, 7)}
    assert (done["K"] == done["row"].str[4:].astype(int)).all() and (
        done["chose_weights"] == 2
    ).all()
    assert set(done["paper_J"]) == {"91.67", "91.74"} and set(done["paper_test_set"]) == {"icoseg8"}
    told = rows.groupby("test_set")["status"].unique().map(list)
    assert told["icoseg8"] == ["not run: data not found (icoseg8)"]
    assert told["seen"] == ["not run: trained on 1 of its 1 pictures (seen)"]
    assert all(k == 1 and test == ["a", "b"] for _, test, _, _, k in FakeRun.asked)
    assert {size for *_, size, _ in FakeRun.asked} == {2, 5}


def test_collect_says_what_is_missing_and_lets_mistakes_through(fake, monkeypatch):
    def no_weights(experiment):
        raise Missing("weights", "resnet50", "download it")

    monkeypatch.setattr(fake, "get_run", no_weights)
    rows = collect(LITE, "t", {"LCCo": LITE.experiment}, ["msrc7"])
    assert set(rows["status"]) == {"not run: weights not found (resnet50)"} and len(rows) == 6

    def mistake(experiment):
        raise LCCoError("masks were edited")

    monkeypatch.setattr(fake, "get_run", mistake)
    with pytest.raises(LCCoError, match="masks were edited"):
        collect(LITE, "t", {"LCCo": LITE.experiment}, ["msrc7"])


def test_collect_takes_rivals_as_they_are(fake):
    rival = FakeRun(Experiment(seed=9))
    rows = collect(LITE, "table5_foundation", {"SAM": rival}, ["msrc7"], ["ufo"])
    assert len(rows) == 1 and rows["J"].iloc[0] == 9 and rows["run"].iloc[0] == rival.path.name
    assert rows["paper_J"].iloc[0] == "35.30"


# ---------------------------------------------------------------------------- what the numbers say
@pytest.fixture
def effects():
    """The function that notebook 02 defines in a cell."""
    modules = {"isfc": "ISFC", "clip_interaction": "inter.", "clip_regularization": "reg."}
    notebook = nbformat.read(ROOT / "notebooks" / "02_component_ablation.ipynb", 4)
    known = {"MODULES": modules, "pd": pd}
    exec(next(c.source for c in notebook.cells if "def effects" in c.source), known)
    return known["effects"]


def test_effects_of_the_modules_on_the_papers_table_2(effects):
    rows = tables.paper_table("table2_components").astype({"paper_J": float})
    rows = rows.astype(dict.fromkeys(("isfc", "clip_interaction", "clip_regularization"), int))
    got = effects(rows.assign(J=rows["paper_J"])).round(1).T.to_dict("list")
    # alone and last by hand: 88.3 − 86.6 and 91.7 − 90.8 for ISFC
    assert got == {"ISFC": [1.7, 0.9, 0.9], "inter.": [3.4, 2.0, 1.4], "reg.": [3.2, 1.8, 1.1]}


def test_effects_recover_a_model_that_is_known(effects):
    rows = []
    for a, b, c in product((0, 1), repeat=3):
        J = 30 + 10 * a + 4 * c - 6 * a * c
        rows.append({"J": J, "isfc": bool(a), "clip_interaction": b, "clip_regularization": c})
    got = effects(pd.DataFrame(rows)).T.to_dict("list")
    assert got == {"ISFC": [10, 7, 4], "inter.": [0, 0, 0], "reg.": [4, 1, -2]}
    assert effects(pd.DataFrame(rows[:7])).empty


def test_paired_differences_are_taken_seed_by_seed_beside_the_papers():
    cells = {"table": "table2_components"}
    rows = measured("Baseline", [50.0, 60.0, 70.0], **cells) + measured(
        "LCCo", [51.0, 62.0, 73.0], **cells
    )
    rows += measured("ISFC", [49.0], **cells)
    got = paired(with_paper(pd.DataFrame(rows))).set_index("row")
    assert got.loc["LCCo", ["mean", "sd", "seeds"]].tolist() == [2.0, 1.0, 3]
    assert got.loc["ISFC", "seeds"] == 1 and got.loc["ISFC", "mean"] == -1
    assert got["paper"].round(1).to_dict() == {"LCCo": 5.1, "ISFC": 1.7}
    rows += measured("LCCo", [99.0], **cells, train_set="coco_seg")  # there is no such Baseline
    assert paired(with_paper(pd.DataFrame(rows))).set_index("row").loc["LCCo", "mean"] == 2


# ------------------------------------------------------------------------------------------- cells
def test_a_cell_is_mean_and_sample_deviation_whatever_the_order_of_rows():
    table = main()
    assert cell(table, "LCCo", "MSRC7", "J") == "**61.0 ± 1.0**"
    back = Table("table1_main", table.rows[::-1].reset_index(drop=True))
    assert cell(back, "LCCo", "MSRC7", "J") == "**61.0 ± 1.0**"
    negative = Table("t", pd.DataFrame(measured("LCCo", [-0.04, -0.01])), values=("J",))
    assert cell(negative, "LCCo", "MSRC7", "J") == "0.0 ± 0.0"


@pytest.mark.parametrize(
    ("lcco", "baseline", "bold"),
    [
        ((60, 61, 62), (50, 50.5, 51), True),
        ((60, 61, 62), (59, 60, 61), False),  # 61 ± 1 and 60 ± 1 overlap
        ((61,), (50,), False),  # one seed has no spread
        ((60, 61), (50, 50.5, 51), False),  # means over other seeds do not compare
        ((61, 61, 61), (61, 61, 61), False),
    ],
)
def test_bold_is_beyond_the_spread_over_seeds(lcco, baseline, bold):
    table = main(lcco, baseline)
    assert cell(table, "LCCo", "MSRC7", "J").startswith("**") == bold
    assert not cell(table, "Baseline", "MSRC7", "J").startswith("**")
    assert not cell(table, "LCCo", "MSRC7", "P").startswith("**")
    assert any("bold" in note for note in table.all_notes()) == bold
    low = main(lcco, baseline, lower=("J",))
    assert cell(low, "Baseline", "MSRC7", "J").startswith("**") == bold


def test_what_was_not_run_shrinks_to_a_dash_with_one_footnote():
    table = main()
    text = next(iter(table.parts.values()))
    assert [value for group, value in text if group == "Internet"] == ["P"]  # one column, not two
    assert cell(table, "LCCo", "Internet", "P") == cell(table, "Baseline", "iCoseg", "P") == "–"
    said = "– not run: data not found (internet300); data not found (icoseg8)."
    assert table.all_notes()[0] == said
    assert sum(note[0] == "–" for note in table.all_notes()) == 1


def test_ticks_for_modules_and_mathematics_for_losses():
    rows = measured("L_iou", [60.0], table="table3_losses", L_cs=False, L_c=False)
    rows += measured("L_iou + L_cs", [61.0], table="table3_losses", L_cs=True, L_c=False)
    table = Table("table3_losses", with_paper(pd.DataFrame(rows)), index=("row", "L_cs", "L_c"))
    assert cell(table, "L_iou + L_cs", "", "L_cs") == "✓" and cell(table, "L_iou", "", "L_cs") == ""
    tex = table.latex()
    assert r"$\mathcal{L}_{\mathrm{iou}}$ + $\mathcal{L}_{\mathrm{cs}}$ & \checkmark{} &" in tex
    assert r"\mathcal{L}_{\mathrm{c}}$ & \multicolumn" not in tex and tex.isascii()


def test_plain_tables_have_their_own_notes_alone():
    rows = measured("backbone", [1.23456], images=None, seconds=0.0123)
    table = Table(
        "cost", pd.DataFrame(rows), values=("seconds",), decimals=3, unit="", notes=["ms"]
    )
    assert cell(table, "backbone", "MSRC7", "seconds") == "0.012" and table.all_notes() == ["ms"]


# ------------------------------------------------------------------------------------------- notes
def record(seed=0, holdout=(), version=TRAINING_VERSION, **environment) -> dict:
    here = {"commit": "c" * 40, "dirty": False, "device": "cpu"} | environment
    e = {"seed": seed, "data": {"holdout": list(holdout)}}
    about = {"training": {}, "experiment": e, "environment": here, "seconds": 60.0}
    return about | {"training_version": version}


def notes_with(changed: dict[str, dict]) -> str:
    names = [f"{m}-{s}" for m in ("LCCo", "Baseline") for s in range(3)]
    return "\n".join(main(runs={n: record() for n in names} | changed).all_notes())


def test_notes_say_how_models_were_trained():
    clean = notes_with({})
    assert "Trained" not in clean and "clean test" not in clean
    assert "mean ± standard deviation over 3 seeds" in clean and "scored: MSRC7 208" in clean
    assert "from an edited checkout: LCCo." in notes_with({"LCCo-1": record(dirty=True)})
    for unknown in ({"commit": None, "dirty": None}, {"commit": "b38786b"}):
        text = notes_with({"LCCo-1": record(**unknown), "LCCo-0": record(**unknown)})
        assert "from an unknown commit: LCCo." in text
    old = {f"{m}-{s}": record(version=1) for m in ("LCCo", "Baseline") for s in range(3)}
    assert "by older training code: all." in notes_with(old)
    del old["LCCo-0"]
    assert "by older training code: LCCo, Baseline." in notes_with(old)
    words = pd.DataFrame(measured("LCCo", [60.0]))  # also of tables that are no scores
    plain = Table("words", words.assign(run="a"), unit="", runs={"a": record(version=1)})
    assert "Trained by older training code: all." in plain.all_notes()


def test_runs_that_are_given_stand_beside_the_table(tmp_path: Path):
    table = main()
    runs = runs_of(table)
    other = type(runs[0])(path=Path("other"), record={"seed": 7})
    table.write(tmp_path, [*runs, other])
    stored = json.loads((tmp_path / "table1_main.records.json").read_text(encoding="utf-8"))
    assert stored["runs"]["other"] == {"seed": 7}


def test_notes_say_whose_pictures_chose_the_weights():
    assert "MSRC7 was not trained on, but" in notes_with({"LCCo-0": record(holdout=["msrc7"])})
    assert "not trained on, but" not in notes_with({"LCCo-0": record(holdout=["voc_val"])})
    rows = pd.DataFrame(measured("LCCo", [60.0, 61.0], chose_weights=3))
    assert any("MSRC7 was not trained on, but" in n for n in Table("t", rows).all_notes())


def test_counts_of_images_that_differ_are_a_range():
    rows = measured("LCCo", [60.0]) + measured("LCCo", [50.0], protocol="choice", images=90)
    assert "scored: MSRC7 90–208." in "\n".join(Table("t", pd.DataFrame(rows)).all_notes())


def test_slips_in_print_stand_below():
    text = main().markdown()
    assert "mixes protocols" in text and "ten images a class" in text
    assert "PASCAL's 1,037" not in text  # it is not scored there


# ------------------------------------------------------------------------------------------- files
def runs_of(table: Table) -> list:
    return [
        SimpleNamespace(path=Path(n), record=record()) for n in table.rows["run"].dropna().unique()
    ]


def test_a_measured_table_is_not_replaced_by_one_that_measured_nothing(tmp_path: Path, capsys):
    table = main()
    table.write(tmp_path, runs_of(table))
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    nothing = Table("table1_main", pd.DataFrame(absent("LCCo", "msrc7")))
    nothing.write(tmp_path, ())
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    assert "kept; here nothing was measured (not run: data not found" in capsys.readouterr().out
    nothing.write(tmp_path / "new", ())
    assert "– |" in (tmp_path / "new" / "table1_main.md").read_text(encoding="utf-8")


def test_latex_is_whole_and_every_line_has_its_columns():
    text = hard_names().latex()
    for word in ("table", "tabular"):
        assert text.count(rf"\begin{{{word}}}") == text.count(rf"\end{{{word}}}") == 2
    assert text.count(r"\caption{") == 2 and r"\label{tab:table1_main-1}" in text
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert text.rstrip().endswith(r"\end{table}") and "documentclass" not in text
    for part in text.split(r"\begin{tabular}")[1:]:
        columns = len(re.match(r"\{([lr]+)\}", part)[1])
        for line in part.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines():
            assert len(re.findall(r"(?<!\\)&", line)) == columns - 1
    assert text.isascii(), [c for c in text if not c.isascii()]


def hard_names() -> Table:
    rows = main().rows.replace({"row": {"LCCo": "50% & $x_1$ #1 {a}\\b ~^ ≥ 3 × λ “q” L_iou"}})
    rows = pd.concat([rows, quoted_rows(LITE)], ignore_index=True)
    return Table("table1_main", rows, title="Table 1: L_c & more")


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_latex_is_input_by_a_document(tmp_path: Path):
    packages = r"\usepackage[utf8]{inputenc}\usepackage{booktabs,graphicx,amssymb}"
    page = rf"\documentclass{{article}}{packages}\begin{{document}}\input{{t}}\end{{document}}"
    (tmp_path / "t.tex").write_text(hard_names().latex())
    (tmp_path / "page.tex").write_text(page)
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]


def test_markdown_keeps_its_columns_when_a_name_holds_a_bar():
    rows = pd.DataFrame(measured("a|b", [60.0]))
    lines = [x for x in Table("t", rows).markdown().splitlines() if x.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_what_the_paper_says_of_more_images_stands_below():
    rows = pd.DataFrame(measured("LCCo", [60.0], table="more_images"))
    notes = Table("more_images", rows, index=("group_size",), columns="row").all_notes()
    assert any("LCCo by P +0.3 and J +0.2" in note for note in notes)
