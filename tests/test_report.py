"""The pages of results: written tables read again, and what a profile's page and the index say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import report
from test_tables import LITE, main, measured, runs_of

from lcco.common import LCCoError
from lcco.config import load_profile
from lcco.experiment.tables import MEASURED, ROW_FIELDS, Table, quoted_rows, with_paper

ROOT = Path(__file__).parents[1]


def test_a_written_table_is_read_again_the_same(tmp_path: Path):
    rows = pd.concat([main().rows, quoted_rows(LITE)], ignore_index=True)
    table = Table("table1_main", rows, title="Table 1", index=("row", "train_set"))
    table.write(tmp_path, runs_of(table))
    again = report.read_table(tmp_path / "table1_main.csv")
    assert again.runs == table.runs and len(again.runs) == 6
    assert again.markdown() == table.markdown() and again.latex() == table.latex()
    assert (tmp_path / "table1_main.md").read_text(encoding="utf-8") == table.markdown()
    header = (tmp_path / "table1_main.csv").read_text().splitlines()[0].split(",")
    assert tuple(header[: len(ROW_FIELDS)]) == ROW_FIELDS
    (tmp_path / "table1_main.records.json").unlink()
    with pytest.raises(LCCoError, match=r"table1_main.csv: not a written table"):
        report.read_table(tmp_path / "table1_main.csv")


@pytest.mark.parametrize(
    "folder", sorted(p.parent for p in (ROOT / "results").glob("*/table1_main.csv"))
)
def test_every_committed_table_is_what_its_rows_make(folder: Path):
    for table in report.written_tables(folder):
        file = folder / f"{table.name}.md"
        assert file.read_text(encoding="utf-8").split() == table.markdown().split(), file
        tex = file.with_suffix(".tex").read_text(encoding="utf-8")
        assert tex.split() == table.latex().split(), table.name
        done = table.rows[table.rows["status"] == MEASURED]
        assert set(done["run"].dropna()) <= set(table.runs)  # costs and classes name none
        assert folder.name in set(table.rows["profile"])
        assert table.name == "bench" or table.rows["profile"].nunique() == 1  # costs compare them
        others = table.rows["status"].drop(done.index)
        assert others.str.startswith("not run: ").all()


def test_a_profiles_page(tmp_path: Path):
    folder = tmp_path / "lite"
    table = main(index=("row",))
    table.write(folder, runs_of(table))
    rows = measured("SAM", [60.0], table="table5_foundation")
    Table("table5_foundation", with_paper(pd.DataFrame(rows)), title="Table 5").write(
        folder, [SimpleNamespace(path=Path("SAM-0"), record={"rival": "SAM"})]
    )
    records = folder / "table1_main.records.json"
    records.write_text(records.read_text().replace('"seconds": 60.0', '"seconds": 0', 1))
    (folder / "notebooks").mkdir()
    (folder / "notebooks" / "01_main_results.ipynb").write_text("{}")
    text = report.results_readme(folder).read_text(encoding="utf-8")
    headline = "LCCo against its Baseline, in points of J: +10.5 on MSRC7."
    about = load_profile("lite").about.strip()
    assert text.startswith(f"# Results at profile `lite`\n\n{headline}\n\n{about}\n\n")
    assert "[01_main_results](notebooks/01_main_results.ipynb)" in text
    assert "6 on cpu; 5 min 00 s if done one after another; of 1 the time was not recorded." in text
    assert text.index("## Table 1") < text.index("## Table 5") < text.index("## Made on")
    assert "**61.0 ± 1.0**" in text and "– not run: data not found (internet300);" in text
    assert "[csv](table1_main.csv), [tex](table1_main.tex)" in text and "\n\n\n" not in text


def test_a_page_says_which_tables_hold_other_weights_of_one_name(tmp_path: Path):
    for name, title in (("table1_main", "One"), ("choice", "Two"), ("words", "Three")):
        rows = pd.DataFrame(measured("LCCo", [60.0], table=name))
        table = Table(name, with_paper(rows), title=title)
        table.write(tmp_path / "lite", runs_of(table))
    assert "was trained" not in report.results_readme(tmp_path / "lite").read_text()
    file = tmp_path / "lite" / "choice.records.json"
    stored = json.loads(file.read_text())
    stored["runs"]["LCCo-0"]["weights_sha256"] = "other"
    file.write_text(json.dumps(stored))
    text = report.results_readme(tmp_path / "lite").read_text()
    assert "`LCCo-0` was trained 2 times" in text
    assert "one training stands in One, Three; another in Two." in text


def test_the_index_never_averages_over_test_sets(tmp_path: Path):
    rows = []
    for test, J in (("msrc7", 80.0), ("pascal1037", 60.0)):
        for size in (2, 5):
            (row,) = measured("LCCo", [J + size], table="more_images", test_set=test)
            rows.append(row | {"group_size": size})
    how = {"index": ("group_size",), "columns": "row", "block": "test_set"}
    table = Table("more_images", pd.DataFrame(rows), title="More", **how)
    table.write(tmp_path / "lite", runs_of(table))
    text = report.results_index(tmp_path).read_text(encoding="utf-8")
    assert "Numbers of lite, MSRC7" in text and "Numbers of lite, PASCAL" in text
    assert all(f"{J:.1f} |" in text for J in (82, 85, 62, 65)) and " ± " not in text.split("##")[-1]


def test_the_index_shows_profiles_beside_each_other_and_the_paper(tmp_path: Path):
    for profile, J in (("lite", 60.0), ("embedded", 40.0)):
        rows = pd.DataFrame(measured("SAM", [J], table="table5_foundation"))
        rows = with_paper(rows.assign(profile=profile))
        table = Table("table5_foundation", rows, title="Table 5")
        table.write(tmp_path / profile, runs_of(table))
    text = report.results_index(tmp_path).read_text(encoding="utf-8")
    assert "## Table 5" in text and load_profile("lite").about.strip() in text
    assert text.index("Numbers of embedded") < text.index("Numbers of lite")
    assert "MSRC7 J" in text and "paper (iCoseg) J" in text
    lines = [line for line in text.splitlines() if line.startswith("| SAM")]
    assert [re.findall(r"[\d.]+", line)[-3:] for line in lines] == [
        [J, "69.17", "35.30"] for J in ("40.0", "60.0")
    ]
