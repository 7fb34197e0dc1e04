"""Every notebook runs at `smoke`, as people start them, from two folders; tables, README and report come out whole."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lcco import reproduce
from lcco.common import LCCoError
from lcco.tables import MEASURED, read_table

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
WITH_SET = {  # what each notebook must write; figures below
    "01_main_results": ["table1_main", "choice", "per_class", "per_class_choice", "words", "mixed_sets"],
    "02_component_ablation": ["table2_components"],
    "03_loss_ablation": ["table3_losses"], "04_k_sweep": ["table4_k", "table4_k_test_time"],
    "05_more_images": ["more_images"], "06_foundation_models": ["table5_foundation"],
    "07_feature_regularization": ["fig3_norms"], "08_cost": ["cost"], "09_interpretations": ["interpretations"],
}  # fmt: skip
FIGURES = {
    "01_main_results": ["fig4", "mixed_sets", "best_worst"], "02_component_ablation": ["fig5"],
    "04_k_sweep": ["table4_k"], "05_more_images": ["more_images"],
    "07_feature_regularization": ["fig3_maps", "fig3_norms"],
}  # fmt: skip
TIMED = {"cost"}  # tables of seconds, which no two runs share
pytestmark = pytest.mark.timeout(1500)  # the first test runs all ten notebooks


def environment(base: Path) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if k != "LCCO_DATA"}
    path = os.pathsep.join([str(ROOT), *filter(None, [keep.get("PYTHONPATH")])])
    stores = {"LCCO_RUNS": str(base / "runs"), "LCCO_CACHE": str(base / "cache")}
    return {**keep, **stores, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def lcco(base: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    words = (sys.executable, "-m", "lcco", *words)
    return subprocess.run(words, cwd=folder, env=environment(base), capture_output=True, text=True, timeout=1400)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, results) after `lcco reproduce --profile smoke`, started in a folder outside the repository."""
    base = tmp_path_factory.mktemp("smoke")
    done = lcco(base, base / "a", "reproduce", "--profile", "smoke", "--results", "out")
    assert done.returncode == 0, done.stderr[-3000:]
    return base, base / "a" / "out"


def test_reproduce_says_what_it_does_and_writes_what_it_promises(made: tuple[Path, Path]):
    _, out = made
    for notebook in NOTEBOOKS:
        assert (out / "executed" / notebook.name).is_file()
        for name in WITH_SET.get(notebook.stem, []):
            for suffix in ("csv", "md", "tex", "records.json"):
                assert (out / f"{name}.{suffix}").stat().st_size > 100
        for name in FIGURES.get(notebook.stem, []):
            assert (out / f"{name}.png").stat().st_size > 5000 and (out / f"{name}.pdf").is_file()
    log = json.loads((out / "reproduce.json").read_text())
    assert set(log["seconds"]) == {reproduce.SHARED, *(n.stem for n in NOTEBOOKS)}
    assert log["machine"]["versions"]["torch"]


def test_table1_has_measured_rows_with_their_records_and_the_papers_rows(made: tuple[Path, Path]):
    base, out = made
    table = read_table(out / "table1_main.csv")
    done = table.rows[table.rows["status"] == MEASURED]
    assert set(done["row"]) == {"LCCo", "Baseline"} and set(done["protocol"]) == {"ufo", "native"}
    assert done[["P", "J", "P_class", "J_class", "J_pooled"]].notna().all(axis=None)
    assert done["J"].between(0, 100).all() and (done["images"] > 0).all()
    assert set(done["run"]) == set(table.runs) <= {p.parent.name for p in (base / "runs").glob("*/record.json")}
    assert (table.rows["status"] != MEASURED).sum() == 54  # the paper's (method, set) pairs


class Links(HTMLParser):
    """Everything a page loads, and its anchors."""

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.ids, self.inner = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        got = dict(attrs)
        self.ids.add(got.get("id"))
        if tag in ("img", "script", "iframe", "link"):
            self.loads.append(got.get("src") or got.get("href"))
        elif tag == "a":
            self.inner.append(got["href"])


def test_report_is_one_self_contained_page_with_everything(made: tuple[Path, Path]):
    _, out = made
    text = (out / "report.html").read_text()
    page = Links(text)
    assert page.loads and all(src.startswith("data:image/png;base64,") for src in page.loads)
    assert all(href.startswith("#") and href[1:] in page.ids for href in page.inner)
    assert "width=device-width" in text and "@media print" in text and "url(" not in text
    for word in ("Table 1: main results", "experiment.model.backbone", "glyphnet", "Whole record".lower()):
        assert word in text, word
    for run in read_table(out / "table1_main.csv").runs:
        assert run in text


def test_readme_of_the_results_links_what_is_there(made: tuple[Path, Path]):
    _, out = made
    text = (out / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert {"report.html", "table1_main.csv", "table1_main.tex", "fig4.png", "fig4.pdf"} <= set(links)
    assert all((out / link).is_file() for link in links)
    assert "01_main_results" in text and "torch" in text


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_papermill_from_another_folder_finds_all_trainings_done(made: tuple[Path, Path], notebook: Path):
    base, out = made
    folder = base / "b"
    folder.mkdir(exist_ok=True)
    before = {p: p.stat().st_mtime_ns for p in (base / "runs").glob("*/record.json")}
    words = [sys.executable, "-m", "papermill", str(notebook), "out.ipynb", "--no-progress-bar"]
    words += ["-y", "{profile: smoke, results: results}"]
    done = subprocess.run(words, cwd=folder, env=environment(base), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p: p.stat().st_mtime_ns for p in (base / "runs").glob("*/record.json")} == before
    for name in WITH_SET.get(notebook.stem, []):
        again, first = folder / "results" / f"{name}.csv", out / f"{name}.csv"
        assert name in TIMED or again.read_bytes() == first.read_bytes()
    shown = json.loads((folder / "out.ipynb").read_text())
    outputs = [o for c in shown["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    assert any("text/html" in o.get("data", {}) for o in outputs), "no table is shown"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_interrupted_and_started_again_it_goes_on(tmp_path: Path):
    words = [sys.executable, "-m", "lcco", "reproduce", "--profile", "smoke", "--results", "out", "--only", "01"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen(words, cwd=tmp_path, env=environment(tmp_path), start_new_session=True, **pipes)
    seen = ""
    while "training runs" not in seen:  # the notebook is at work
        line = run.stdout.readline()
        assert line, seen
        seen += line
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does on Ctrl-C: to the kernel as well
    rest, _ = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in seen + rest, seen + rest
    assert rest.strip().splitlines()[-1].startswith("lcco: interrupted; give the same command again")
    for _ in range(50):  # no kernel stays behind
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.2)
    else:
        pytest.fail("a kernel outlived the command")
    assert lcco(tmp_path, tmp_path, *words[3:]).returncode == 0


# ----------------------------------------------------------------------------------------------------------- the runner
def write(path: Path, *cells: str) -> Path:
    code = [
        {"cell_type": "code", "id": f"c{n}", "execution_count": None, "outputs": [], "source": text,
         "metadata": {"tags": ["parameters"]} if n == 0 else {}}
        for n, text in enumerate(cells)
    ]  # fmt: skip
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = {"cells": code, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(book))
    return path


CELL = 'a = 1  # type: int  a number\nb = None  # type: list[int]|None  numbers\nc = "x"  # type: str  a word\n'
CELL += "d = False  # type: bool  a flag\n"


def test_parameters_are_read_typed_and_checked(tmp_path: Path):
    book = write(tmp_path / "01_x.ipynb", CELL)
    assert reproduce.parameters_of(book) == {
        "a": (1, "int"), "b": (None, "list[int]|None"), "c": ("x", "str"), "d": (False, "bool")
    }  # fmt: skip
    given = {"a": "7", "b": [1, "2"], "c": 3, "d": "true"}  # what papermill's -p makes of them
    assert reproduce.check_parameters([book], given) == {book: {"a": 7, "b": [1, 2], "c": "3", "d": True}}
    assert reproduce.check_parameters([book], {"b": None}) == {book: {"b": None}}
    for wrong, said in (({"a": "x"}, "`a` is 'x'"), ({"d": "yes"}, "true or false"), ({"b": 5}, "must be a list")):
        with pytest.raises(LCCoError, match=said):
            reproduce.check_parameters([book], wrong)
    with pytest.raises(LCCoError, match="unknown parameter `e`"):
        reproduce.check_parameters([book], {"e": 1})


def test_a_parameter_goes_to_the_notebooks_that_know_it(tmp_path: Path):
    one, two = write(tmp_path / "1.ipynb", CELL), write(tmp_path / "2.ipynb", "k = 5  # type: int  prompts\n")
    assert reproduce.check_parameters([one, two], {"k": 3, "a": 2}) == {one: {"a": 2}, two: {"k": 3}}


def test_what_is_no_notebook_or_has_no_parameters_is_named(tmp_path: Path):
    (tmp_path / "bad.ipynb").write_text("{")
    with pytest.raises(LCCoError, match=r"bad.ipynb: not a notebook"):
        reproduce.parameters_of(tmp_path / "bad.ipynb")
    book = write(tmp_path / "02_y.ipynb", "x = 1")
    text = json.loads(book.read_text())
    text["cells"][0]["metadata"] = {}
    book.write_text(json.dumps(text))
    with pytest.raises(LCCoError, match="no cell tagged `parameters`"):
        reproduce.parameters_of(book)


def test_a_failing_notebook_is_one_line_with_cell_and_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    fails = "from lcco.common import LCCoError\nraise LCCoError('data `q` is wrong: mend it')"
    book = write(tmp_path / "01_x.ipynb", CELL, "1 + 1", fails)
    with pytest.raises(LCCoError) as error:
        reproduce._run_notebook(book, tmp_path / "executed" / "01_x.ipynb", {"a": 3})
    said = str(error.value)
    assert said.startswith("01_x.ipynb, cell 4: data `q` is wrong: mend it") and "\n" not in said
    assert (tmp_path / "executed" / "01_x.ipynb").is_file()


def test_begin_sets_seeds_data_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LCCO_DATA", "elsewhere")
    chosen, folder = reproduce.begin("smoke", seeds=[3, 4], data_root=str(tmp_path), results=str(tmp_path / "r"))
    assert chosen.seeds == chosen.ablation_seeds == (3, 4) and folder == tmp_path / "r" and folder.is_dir()
    assert os.environ["LCCO_DATA"] == str(tmp_path)
    assert reproduce.begin("smoke", seeds="5", results=str(tmp_path))[0].seeds == (5,)
    with pytest.raises(LCCoError, match=r"seeds\[0\]"):
        reproduce.begin("smoke", seeds=["x"], results=str(tmp_path))


def test_index_sets_what_each_profile_measured_beside_the_paper(tmp_path: Path):
    from lcco.config import load_profile
    from lcco.tables import Layout, make_row, write_table

    for name, test, J in (("embedded", "glyphworld_test", 70.0), ("lite", "msrc7", None)):
        chosen = load_profile(name)
        rows = []
        for seed in (0, 1):
            e = chosen.experiment.replace(seed=seed)
            cells = {"test_set": test, "protocol": "ufo", "paper_P": 97.0, "paper_J": 88.4, "group_size": 5}
            cells |= {"P": 90.0, "J": J + seed, "run": "r"} if J else {"status": "not run: data not found (msrc7)"}
            rows.append(make_row("table1_main", "LCCo", chosen, e, **cells))
        write_table(rows, tmp_path / name, "table1_main", Layout("Table 1"))
    text = reproduce.write_index(tmp_path).read_text()
    line = next(line for line in text.splitlines() if line.startswith("| LCCo"))
    assert "GlyphWorld 90.0 / 70.5 ± 0.7" in line and "MSRC7 not run: data not found (msrc7)" in line
    assert "MSRC7 97.0 / 88.4" in line and "[lite](lite/table1_main.md)" in text
    cells |= {"status": "not run: x"}
    more = [make_row("t2", "LCCo", chosen, e, **cells | {"test_set": t}) for t in ("msrc7", "pascal1037")]
    write_table(more, tmp_path / "lite", "table2_components", Layout("Table 2"))
    assert "| MSRC7, PASCAL not run: x |" in reproduce.write_index(tmp_path).read_text()
