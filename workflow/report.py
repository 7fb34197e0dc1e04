"""The pages of results: a README.md for each profile's folder, and the index above them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

from lcco.common import LCCoError, duration
from lcco.config import load_profile, profile_names
from lcco.experiment.tables import PRINTED, QUOTED, Table, label, paired, paper_table
from lcco.store import read_json, write_text


def results_readme(folder: Path) -> Path:
    """Write a results folder's README.md: its tables with their figures, machines, time."""
    folder, tables = Path(folder), written_tables(Path(folder))
    captions = {png.stem: caption(png) for png in sorted(folder.glob("*.png"))}
    order = {t: figures.split() for t, figures in paper_table("order").to_numpy()}
    beside = {t.name: order.get(t.name, [t.name]) for t in tables}
    own = {figure for figures in beside.values() for figure in figures}
    rest = [c for c in captions if c not in own]
    runs = trainings({name: run for t in tables for name, run in t.runs.items()})
    made = defaultdict(lambda: defaultdict(list))  # run → its weights → the tables they stand in
    for table in tables:
        for name, run in table.runs.items():
            made[name][run.get("weights_sha256")].append(table.title)
    return _page(
        folder / "README.md", "profile.md", name=folder.name, about=_about(folder.name),
        headline=headline(tables), books=sorted(folder.glob("notebooks/*.ipynb")), tables=tables,
        captions=captions, beside=beside, rest=rest, runs=runs,
        again={name: own for name, own in made.items() if len(own) > 1},
        time=duration(runs["seconds"].sum()),
    )  # fmt: skip


def results_index(results: Path) -> Path:
    """Write results/README.md: a part for each profile, by its first protocol, and the paper's."""
    folders = [f for f in sorted(Path(results).iterdir()) if any(f.glob("*.records.json"))]
    profiles = {f.name: _about(f.name) for f in folders if f.name != "smoke"}
    written, tables = [t for p in profiles for t in written_tables(Path(results) / p)], []
    for name in paper_table("order")["table"]:
        if own := [t for t in written if t.name == name and "J" in t.values]:
            printed = own[0].rows[own[0].rows["status"] == QUOTED]
            parts = [t.rows[t.rows["protocol"] == t.rows["protocol"].iloc[0]] for t in own]
            rows = pd.concat(parts, ignore_index=True)
            whose = "of " + rows["profile"]
            if own[0].columns != "test_set":  # its columns are something else
                whose += ", " + rows["test_set"].map(label)
            parts = [rows.assign(numbers=whose), printed.assign(numbers="as printed")]
            rows = pd.concat(parts, ignore_index=True)
            index = [column for column in own[0].index if column != "uses_class_labels"]
            how = {"columns": own[0].columns, "values": ("P", "J"), "block": "numbers"}
            tables.append(Table(name, rows, own[0].title, index, **how))
    return _page(Path(results) / "README.md", "results.md", profiles=profiles, tables=tables)


def read_table(csv: Path) -> Table:
    """A written table again. Raises: LCCoError naming a file that is missing or holds no rows."""
    csv = Path(csv)
    try:
        rows = pd.read_csv(csv, dtype=dict.fromkeys(PRINTED, str))
        stored = read_json(csv.with_suffix(".records.json"))
        return Table(csv.stem, rows, **stored["layout"], runs=stored["runs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LCCoError(f"{csv}: not a written table ({error}); run its notebook again") from None


def written_tables(folder: Path) -> list[Table]:
    """Every table that was written into a folder, Table 1 first."""
    order = list(paper_table("order")["table"])
    names = sorted(f.name.removesuffix(".records.json") for f in folder.glob("*.records.json"))
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    return [read_table(folder / f"{name}.csv") for name in names]


def headline(tables: Sequence[Table]) -> str:
    """What the modules change, under the first protocol of Table 1 and in the group choice."""
    said = []
    for table in (t for t in tables if t.name in ("table1_main", "choice")):
        change = paired(table.rows).query("row == 'LCCo'")
        for r in change[change["protocol"].eq(table.rows["protocol"].iloc[0])].to_dict("records"):
            kind = " in the group choice" if table.name == "choice" else ""
            test = label(r["test_set"]).removesuffix(" choice")
            said.append(f"{r['mean']:+.1f} on {test}{kind}")
    return f"LCCo against its Baseline, in points of J: {', '.join(said)}." if said else ""


def trainings(runs: Mapping[str, Any]) -> pd.DataFrame:
    """On which device and how long each of the runs was trained; a line for each."""
    names = {"environment.device": "device", "seconds": "seconds"}
    trained = [record for record in runs.values() if "training" in record]
    return pd.json_normalize(trained).reindex(columns=list(names)).rename(columns=names)


def caption(png: Path) -> str:
    """The caption that a figure was saved with."""
    with Image.open(png) as image:
        return str(image.info.get("Description", ""))


def _about(profile: str) -> str:
    return load_profile(profile).about.strip() if profile in profile_names() else ""


def _page(readme: Path, template: str, **given: Any) -> Path:
    files = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, loader=files)
    text = pages.get_template(f"{template}.jinja").render(given)
    write_text(readme, re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")
    return readme
