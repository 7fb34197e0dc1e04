"""Notebooks: their sources are clean, and each runs at `smoke` as people start it, by papermill."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
from plan import NOTEBOOKS as NUMBERS
from plan import all_jobs, needs

from lcco.config import load_profile, profile_names
from lcco.experiment.runs import get_run

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb"))
BY_HAND = "08_cost"  # run from the command line, as people do
LONGEST = 12  # lines a cell, but for blank ones and comments
TABLES = {
    "01_main_results": ["table1_main", "choice"], "02_component_ablation": ["table2_components"],
    "03_loss_ablation": ["table3_losses"], "04_k_sweep": ["table4_k", "table4_k_test_time"],
    "05_more_images": ["more_images"], "06_foundation_models": ["table5_foundation"],
    "07_feature_regularization": ["fig3_norms"], "08_cost": ["bench", "large_sets"],
    "09_interpretations": ["interpretations"],
    "10_what_fails": ["per_class", "words", "mixed_sets"],
}  # fmt: skip
FIGURES = {
    "00_quickstart": ["quickstart_motorbike", "quickstart_cat", "quickstart_similarity"],
    "method": ["method_similarity", "method_attention", "method_F3", "method_masks"],
    "01_main_results": ["fig4", "protocols", "curves_01"],
    "02_component_ablation": ["fig5", "table2_components"], "03_loss_ablation": ["table3_losses"],
    "04_k_sweep": ["table4_k"], "05_more_images": ["more_images", "set_05"],
    "06_foundation_models": ["table5_foundation"], "08_cost": ["bench"],
    "07_feature_regularization": ["fig3_maps", "fig3_norms"],
    "09_interpretations": ["interpretations"], "10_what_fails": ["best_worst", "mixed_sets"],
}  # fmt: skip


def source(stem: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", 4)


def code_of(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


# ---------------------------------------------------------------------------------- as committed
def test_every_planned_notebook_is_there():
    assert sorted(stem.split("_")[0] for stem in NOTEBOOKS) == sorted(NUMBERS)


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_sources_are_clean(stem):
    notebook = source(stem)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info.file_extension == ".py"
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            lines = [x for x in cell.source.splitlines() if x.strip() and x.strip()[0] != "#"]
            assert len(lines) <= LONGEST, cell.source


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_headings_do_not_repeat(stem):
    texts = [cell.source for cell in source(stem).cells if cell.cell_type == "markdown"]
    headings = [x for text in texts for x in text.splitlines() if x.startswith("#")]
    assert len(set(headings)) == len(headings) and sum(h.startswith("# ") for h in headings) == 1


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_one_cell_of_typed_parameters(stem):
    tagged = [c for c in source(stem).cells if "parameters" in c.metadata.get("tags", ())]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        value, _, comment = line.partition("  # type: ")
        kind, _, said = comment.partition("  ")
        assert isinstance(ast.parse(value).body[0], ast.Assign) and kind and said, line
        if line.startswith("profile ="):
            assert all(name in said for name in profile_names()), "the comment lists all profiles"
    code = "\n".join(code_of(source(stem)))
    for name in [line.split(" =")[0] for line in tagged[0].source.splitlines()]:
        assert f'"{name}")' in code or f'"{name}"),' in code, f"`{name}` is not checked by `typed`"


@pytest.mark.parametrize("stem", [stem for stem in NOTEBOOKS if stem != "method"])
def test_the_executed_copies_found_every_expected_value(stem):
    """A row that is not there is passed over as they run; in what is committed none may be."""
    executed = nbformat.read(ROOT / "results" / "embedded" / "notebooks" / f"{stem}.ipynb", 4)
    (asked,) = [code for code in code_of(source(stem)) if "EXPECTED = " in code]
    (cell,) = [c for c in executed.cells if c.cell_type == "code" and c.source == asked]
    tree = next(x for x in ast.parse(asked).body if isinstance(x, ast.Assign))
    expected = ast.literal_eval(tree.value)
    values = expected.get("embedded", expected).values()
    said = [line for out in cell.outputs for line in out.get("text", "").splitlines()]
    ends = [f", expected {value} ± {tolerance}" for value, tolerance in values]
    assert len(said) == len(ends) > 0
    assert all(line.endswith(end) for line, end in zip(said, ends, strict=True))


# ---------------------------------------------------------------------------------- as they run
@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers: its run store has locks, so they train each run once."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (base / "notebooks" / "elsewhere").mkdir(parents=True, exist_ok=True)
    return base / "notebooks"


@pytest.fixture
def elsewhere(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside the repository from which notebooks are run, as current folder."""
    monkeypatch.delenv("LCCO_DATA", raising=False)
    given = {"LCCO_RUNS": str(shared / "runs"), "LCCO_CACHE": str(shared / "cache")}
    given |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(shared / "elsewhere")
    return shared / "elsewhere"


def run(stem: str, **given: object) -> None:
    """Run a notebook in the current folder by papermill, within this process to save its start."""
    file = str(ROOT / "notebooks" / f"{stem}.ipynb")
    papermill.execute_notebook(file, f"{stem}.ipynb", given, progress_bar=False)


def run_by_hand(stem: str, *words: str) -> subprocess.CompletedProcess:
    """The same from the command line."""
    file = str(ROOT / "notebooks" / f"{stem}.ipynb")
    command = [sys.executable, "-m", "papermill", file, f"{stem}.ipynb", "--no-progress-bar"]
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=300)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_runs_at_smoke(stem, elsewhere):
    if stem == BY_HAND:
        done = run_by_hand(stem, "-p", "profile", "smoke", "-p", "results", "out")
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        run(stem, results="out", **({} if stem == "method" else {"profile": "smoke"}))
    out, made = elsewhere / "out", nbformat.read(elsewhere / f"{stem}.ipynb", 4)
    red = [o.text for c in made.cells for o in c.get("outputs", ()) if o.get("name") == "stderr"]
    assert not red, red
    for name in TABLES.get(stem, ()):
        assert ",measured," in (out / f"{name}.csv").read_text(encoding="utf-8")
        assert all((out / f"{name}.{k}").stat().st_size for k in ("md", "tex", "records.json"))
    # It trains what the graph plans for it, and nothing else.
    profile = load_profile("smoke")
    known = {f.parent.name for f in (elsewhere.parent / "runs").glob("*/record.json")}
    planned = {job.experiment.run_name for job in needs(stem.split("_")[0], profile)}
    assert planned <= known <= {job.experiment.run_name for job in all_jobs(profile)}
    for name in FIGURES[stem]:
        assert all((out / f"{name}.{kind}").stat().st_size for kind in ("png", "pdf"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stem", ["01_main_results", "10_what_fails"])
def test_without_a_baseline_the_rest_is_shown(stem, elsewhere, tmp_path, monkeypatch):
    """`LCCO_TRAIN=no` trains nothing: a run that is not in the store is a line that says so."""
    profile = load_profile("smoke")
    for seed in profile.seeds:
        path = get_run(profile.experiment.replace(seed=seed)).path
        shutil.copytree(path, tmp_path / "runs" / path.name)
    monkeypatch.setenv("LCCO_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("LCCO_TRAIN", "no")
    run(stem, profile="smoke", results=str(tmp_path / "out"))
    assert len(list((tmp_path / "runs").glob("*/record.json"))) == len(profile.seeds)
    table = pd.read_csv(tmp_path / "out" / f"{TABLES[stem][0]}.csv")
    if stem == "10_what_fails":
        assert table["J_LCCo"].notna().all() and table["J_Baseline"].isna().all()
    else:
        said = table.groupby("row")["status"].unique().map(list)
        assert said["LCCo"][0] == "measured"
        assert said["Baseline"][0].startswith("not run: training not found (smoke-")
    for name in FIGURES[stem]:
        assert (tmp_path / "out" / f"{name}.png").stat().st_size


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stem", ["01_main_results", "07_feature_regularization"])
def test_pictures_that_were_trained_on_are_not_measured(stem, elsewhere, tmp_path):
    """Their rows say so, and the notebook goes on with the other sets."""
    profile = {"base": "smoke", "tests": ["glyphworld_train", "glyphworld_test"]}
    (tmp_path / "mine.yaml").write_text(json.dumps(profile))
    run(stem, profile=str(tmp_path / "mine.yaml"), results=str(tmp_path / "out"))
    table = pd.read_csv(tmp_path / "out" / f"{TABLES[stem][0]}.csv")
    said = table.groupby("test_set")["status"].unique().map(list)
    assert said["glyphworld_test"] == ["measured"]
    (why,) = said["glyphworld_train"]
    assert why.startswith("not run: ") and "trained on" in why


@pytest.mark.timeout(300)
def test_rivals_are_shown_without_lcco(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setenv("LCCO_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("LCCO_TRAIN", "no")
    run("06_foundation_models", profile="smoke", results=str(tmp_path), only=["clustering"])
    said = pd.read_csv(tmp_path / "table5_foundation.csv").groupby("row")["status"].unique()
    assert [*said["Clustering (no training)"]] == ["measured"]
    assert all(s.startswith("not run: training not found") for s in said["LCCo"])


def test_a_mistyped_parameter_is_one_line(elsewhere):
    for name, value in {"threshold": "high", "drawings": "perhaps"}.items():
        with pytest.raises(papermill.PapermillExecutionError, match=f"LCCoError: .*`{name}`"):
            run("00_quickstart", **{name: value})
    done = run_by_hand("00_quickstart", "-p", "cls", "7")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode and last.startswith("LCCoError: ") and "`cls`" in last
