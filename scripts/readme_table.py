"""Write README's numbers anew from the rows in results/: `python scripts/readme_table.py`."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from lcco.common import project_root
from lcco.experiment.tables import MEASURED, label
from lcco.store import write_text

ROOT = project_root(Path(__file__).parent)
LINES = (
    ("lite", "msrc7"), ("lite", "pascal1037"), ("lite", "voc_val"),
    ("shipped", "msrc7"), ("shipped", "pascal_fold_test"), ("shipped", "voc_val"),
    ("embedded", "glyphworld_test"), ("embedded", "glyphworld_choice"),
)  # fmt: skip
HEAD = "| test set | profile | LCCo | Baseline | the paper's LCCo |\n|---|---|--:|--:|--:|"


def rows_of(profile: str, test: str) -> pd.DataFrame:
    """A profile's measured rows on a test set: under `ufo`, or of the group-choice test."""
    folder = ROOT / "results" / profile
    files = [f for f in (folder / "table1_main.csv", folder / "choice.csv") if f.is_file()]
    if not files:
        return pd.DataFrame(columns=["row", "P", "J", "protocol", "paper_P", "paper_J"])
    rows = pd.concat([pd.read_csv(f, dtype={"paper_P": str, "paper_J": str}) for f in files])
    wanted = rows["protocol"].isin(["ufo", "choice"]) & (rows["test_set"] == test)
    return rows[wanted & (rows["status"] == MEASURED)]


def cell(rows: pd.DataFrame) -> str:
    """`95.3 / 78.3 ± 0.2`: means over seeds, and J's standard deviation."""
    if rows.empty:
        return "–"
    spread = f" ± {rows['J'].std():.1f}" if len(rows) > 1 else ""
    return f"{rows['P'].mean():.1f} / {rows['J'].mean():.1f}{spread}"


def table() -> str:
    """The headline table: P / J in per cent."""
    out = [HEAD]
    for profile, test in LINES:
        rows = rows_of(profile, test)
        ours, base = (rows[rows["row"] == name] for name in ("LCCo", "Baseline"))
        choice = (rows["protocol"] == "choice").any() and "choice" not in test
        paper = ours[["paper_P", "paper_J"]].dropna()
        printed = " / ".join(paper.iloc[0]) if len(paper) else "–"
        cells = [label(test) + ", group choice" * choice, f"`{profile}`", cell(ours), cell(base)]
        out.append(f"| {' | '.join([*cells, printed])} |")
    return "\n".join(out)


def gain(profile: str, test: str) -> str:
    """LCCo's J minus the Baseline's."""
    J = rows_of(profile, test).groupby("row")["J"].mean()
    return f"{J['LCCo'] - J['Baseline']:+z.1f}" if {"LCCo", "Baseline"} <= set(J.index) else "–"


def summary() -> str:
    """What the three modules bring, in J."""
    return (
        f"**What the modules bring**, in J over the Baseline: {gain('lite', 'msrc7')} on MSRC7 and "
        f"{gain('lite', 'pascal1037')} on PASCAL (`lite`), where most photographs show one salient "
        f"object and the set is hardly needed; {gain('lite', 'voc_val')} in the group choice, and "
        f"{gain('embedded', 'glyphworld_test')} on GlyphWorld, where only the set tells which "
        "object is meant."
    )


def filled(text: str) -> str:
    """README's text with what stands between its markers made anew."""
    for name, block in (("table", table()), ("summary", summary())):
        pattern, new = rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{block}\n\g<2>"
        text = re.sub(pattern, new, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    write_text(readme, filled(readme.read_text(encoding="utf-8")))
