"""Write README's numbers anew from the rows in results/: `python scripts/readme_table.py`."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from lcco.experiment.tables import MEASURED, label
from lcco.store import write_text

ROOT = Path(__file__).resolve().parents[1]
LINES = (  # profile, test set, protocol
    ("lite", "msrc7", "ufo"), ("lite", "msrc14", "ufo"), ("lite", "pascal1037", "ufo"),
    ("lite", "voc_val", "choice"), ("lite", "pascal1037", "choice"), ("shipped", "msrc7", "ufo"),
    ("shipped", "pascal_fold_test", "ufo"), ("shipped", "pascal_fold_test", "choice"),
    ("embedded", "glyphworld_test", "ufo"), ("embedded", "glyphworld_choice", "choice"),
)  # fmt: skip
HEAD = "| P / J, % | profile | LCCo | Baseline | the paper's LCCo |\n|---|---|--:|--:|--:|"


def rows_of(profile: str, test: str, protocol: str = "ufo", table: str = "") -> pd.DataFrame:
    """A profile's measured rows on a test set under a protocol; table: by default 1 or choice."""
    name = table or ("choice" if protocol == "choice" else "table1_main")
    file = ROOT / "results" / profile / f"{name}.csv"
    if not file.is_file():
        return pd.DataFrame(columns=["row", "P", "J", "paper_P", "paper_J"])
    rows = pd.read_csv(file, dtype={"paper_P": str, "paper_J": str})
    on = rows["test_set"].str.partition(":")[0] == test
    return rows[on & (rows["protocol"] == protocol) & (rows["status"] == MEASURED)]


def cell(rows: pd.DataFrame) -> str:
    """`95.3 / 78.3 ± 0.2`: means over seeds, and J's standard deviation."""
    if rows.empty:
        return "–"
    spread = f"\u00a0±\u00a0{rows['J'].std():.1f}" if len(rows) > 1 else ""  # no line break
    return f"{rows['P'].mean():.1f} / {rows['J'].mean():.1f}{spread}"


def table() -> str:
    """The headline table: P / J in per cent."""
    out = [HEAD]
    for profile, test, protocol in LINES:
        rows = rows_of(profile, test, protocol)
        ours, base = (rows[rows["row"] == name] for name in ("LCCo", "Baseline"))
        paper = ours[["paper_P", "paper_J"]].dropna()
        printed = " / ".join(paper.iloc[0]) if len(paper) else "–"
        name = label(test).removesuffix(" choice")
        name += ", group choice" if protocol == "choice" else ""
        out.append(f"| {name} | `{profile}` | {cell(ours)} | {cell(base)} | {printed} |")
    return "\n".join(out)


def gain(*where: str) -> str:
    """LCCo's J minus the Baseline's."""
    J = rows_of(*where).groupby("row")["J"].mean()
    known = {"LCCo", "Baseline"} <= set(J.index)
    return f"{J['LCCo'] - J['Baseline']:+z.1f}".replace("-", "−") if known else "–"


def summary() -> str:
    """What the three modules bring, in J."""
    msrc7, msrc14, pascal = (gain("lite", test) for test in ("msrc7", "msrc14", "pascal1037"))
    own, held = (gain("lite", test, "choice") for test in ("pascal1037", "voc_val"))
    drawn = gain("embedded", "glyphworld_test")
    return (
        f"The three modules change J by {msrc7} on MSRC7, {msrc14} on MSRC (14) and {pascal} on "
        "PASCAL (`lite`), where most photographs show one salient object, and by "
        f"{own} (PASCAL) and {held} (VOC val) in the group choice and {drawn} on GlyphWorld, where "
        "only the set tells which object is meant."
    )


def limits() -> str:
    """What pictures without the object do to J."""
    rows = rows_of("lite", "pascal1037", "native", "mixed_sets")
    J = rows.groupby(["row", "absent"])["J_nonempty"].mean().map("{:.0f}".format)
    return (
        "The network alone (`lite`, PASCAL): if three of five pictures lack the object, J of the "
        f"others is {J['LCCo', 3]} ({J['LCCo', 0]} without such; Baseline {J['Baseline', 3]})."
    )


def filled(text: str) -> str:
    """README's text with what stands between its markers made anew."""
    for name, block in (("table", table()), ("summary", summary()), ("limits", limits())):
        pattern, new = rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{block}\n\g<2>"
        text = re.sub(pattern, new, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    write_text(readme, filled(readme.read_text(encoding="utf-8")))
