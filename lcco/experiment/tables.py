"""Rows to tables: tidy rows keyed by names, collected from runs, written as csv, markdown, LaTeX and HTML.

Every number is a row (`ROW_FIELDS`). Rows are for machines; a table is for people and is derived from its rows.
The paper's numbers are read from `lcco/paper/*.csv`, never typed. Shares of 0..1 become per cent here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcco.common import LCCoError, duration, few, write_json, write_text
from lcco.config import Experiment, Profile

if TYPE_CHECKING:
    import pandas as pd

    from lcco.data import CoSegData
    from lcco.runs import Run

ROW_FIELDS = (
    "table", "row", "profile", "backbone", "tower", "vocabulary", "train_set", "test_set", "protocol", "group_size",
    "seed", "images", "P", "J", "paper_P", "paper_J", "status", "run",
    "P_class", "J_class", "J_pooled", "J_nonempty",
)  # fmt: skip
_KEY = ("test_set", "protocol", "group_size", "seed")  # with `row`: what a measured row is of
MEASURED, QUOTED = "measured", "not run: quoted from the paper"
LABELS = {
    "msrc7": "MSRC7", "msrc14": "MSRC (14)", "internet300": "Internet", "icoseg8": "iCoseg", "pascal1037": "PASCAL",
    "glyphworld_test": "GlyphWorld", "glyphworld_choice": "GlyphWorld choice", "voc_train": "VOC train",
    "voc_val": "VOC val", "coco_seg": "COCO", "pascal_fold_train": "PASCAL (60%)", "pascal_fold_test": "PASCAL (40%)",
    "paper_P": "paper P", "paper_J": "paper J", "row": "", "test_set": "test set", "train_set": "trained on",
    "group_size": "set size", "change_P": "P change", "change_J": "J change",
    "trained_on": "trained on", "J_Baseline": "Baseline J", "J_LCCo": "LCCo J", "scored": "", "top_1": "top-1",
    "top_k": "top-K", "i_star": "i*", "false_alarms": "false alarms", "empty_area": "area there",
    "J_nonempty": "J elsewhere", "absent": "images without the object:",
}  # fmt: skip
PAPER_SETS = {"msrc7": "MSRC", "internet300": "Internet", "icoseg8": "iCoseg", "pascal1037": "PASCAL"}
BASELINE = {"model.isfc": False, "model.clip_interaction": False, "model.clip_regularization": False}


# ------------------------------------------------------------------------------------------------ the paper's numbers
@lru_cache
def paper_table(name: str) -> pd.DataFrame:
    """A table of the paper as it is printed, e.g. `table1_main`; empty cells are NaN."""
    import pandas as pd

    return pd.read_csv(Path(__file__).parent / "paper" / f"{name}.csv")


def paper_number(table: str, on: str = "", **match: Any) -> tuple[float | None, float | None]:
    """The paper's (P, J) in per cent of the one row whose cells match; `on` is a column prefix such as `MSRC`.

    Raises: LCCoError when no row, or more than one, matches.
    """
    frame = paper_table(table)
    for column, value in match.items():
        frame = frame[frame[column] == value]
    if len(frame) != 1:
        raise LCCoError(f"paper/{table}.csv: {len(frame)} rows with {match}; there must be one")
    cells = [float(frame.iloc[0][f"{on}_{m}" if on else m]) for m in "PJ"]
    return tuple(None if value != value else value for value in cells)


# ----------------------------------------------------------------------------------------------------- collecting rows
@dataclass(frozen=True)
class Variant:
    """One line of a table: its name, what it changes in the profile's experiment, and the paper's numbers for it.

    `paper`: test set → (P, J); the key "" stands for every test set. `rest`: further cells of its rows.
    """

    row: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    rest: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Results:
    """What `collect` found: rows, the trained runs behind them by (row, seed), each test set by name or why not."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    runs: dict[tuple[str, int], Run] = field(default_factory=dict)
    tests: dict[str, CoSegData | str] = field(default_factory=dict)


def make_row(table: str, name: str, profile: Profile, experiment: Experiment | None = None, **cells: Any) -> dict:
    """A row of the schema; the experiment names backbone, tower, vocabulary, training set and seed."""
    known: dict[str, Any] = {"table": table, "row": name, "profile": profile.name, "status": MEASURED}
    if experiment:
        e = experiment
        known |= {"backbone": e.model.backbone, "tower": tower_name(e), "vocabulary": e.tower.vocabulary}
        known |= {"train_set": "+".join(e.data.train), "seed": e.seed}
    return dict.fromkeys(ROW_FIELDS) | known | cells


def tower_name(experiment: Experiment) -> str:
    """The tower by what it is, so that no table takes a stand-in for CLIP."""
    t = experiment.tower
    if t.kind == "conse":
        return "ConSE"
    return f"{Path(t.model).stem} ({'random' if t.weights is None else Path(t.weights).name})"


def per_cent(summary: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation's summary as cells of a row: shares times 100, the number of images as it is."""
    shares = ("P", "J", "P_class", "J_class", "J_pooled", "J_nonempty")
    cells = {k: None if summary.get(k) is None else round(100 * summary[k], 4) for k in shares}
    return cells | {"images": summary.get("images")}


def absence(error: LCCoError) -> str:
    """`not run: data not found (msrc7)`: the status for an error that says data or weights are not on this machine.

    Raises: `error` itself when it says anything else, because then the user has a mistake to mend.
    """
    found = re.match(r"(data|weights) [`']?([^\s`':]+)[`']?.* (?:not found|not here)", str(error).split(": ")[0])
    if not found:
        raise error
    return f"not run: {found[1]} not found ({found[2]})"


def refusal(profile: Profile, test: CoSegData) -> str:
    """`not run: trained on 3 of its 20 pictures …`: the status of a test set that a profile's models have seen."""
    from lcco.runs import will_have_seen

    seen = will_have_seen(profile.experiment, test)
    mend = f"leave them out of training with `data.train: [… without {test.name}]`"
    return f"not run: trained on {seen} of its {len(test)} pictures; {mend}" if seen else ""


def collect(
    profile: Profile,
    table: str,
    variants: Sequence[Variant],
    *,
    tests: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    protocols: Sequence[str] | None = None,
    group_sizes: Sequence[int] | None = None,
    choice: Sequence[str] = (),
) -> Results:
    """Train (or load) each variant for each seed, and score it on each test set under each protocol and set size.

    choice: sets whose group-choice scores will be asked for next: they are made ready with the others.
    What cannot be run because data or weights are absent becomes rows that say so; other mistakes are raised.
    """
    from lcco.data import load_data
    from lcco.runs import get_run, train_ahead

    out = Results()
    protocols, sizes = protocols or profile.protocols, group_sizes or (profile.group_size,)
    for test in dict.fromkeys((*(tests or profile.tests), *choice)):
        try:
            data = load_data(test)
            out.tests[test] = refusal(profile, data) or data
        except LCCoError as error:
            out.tests[test] = absence(error)
    why = {test: said for test, said in out.tests.items() if isinstance(said, str)}
    scores = [(t, tuple(protocols), n) for t in tests or profile.tests if t not in why for n in sizes]
    scores += [(t, ("choice",), profile.group_size) for t in choice if t not in why]
    missing = ""  # training data or weights: the same for every run of a profile
    wanted = [
        profile.experiment.replace(dict(v.changes), seed=seed)
        for v in variants for seed in (seeds if seeds is not None else profile.seeds)
    ]  # fmt: skip
    with contextlib.suppress(LCCoError):  # what is absent shows below, row by row
        if scores:
            train_ahead([(e, scores) for e in wanted])
    for variant in variants:
        for seed in seeds if seeds is not None else profile.seeds:
            experiment, run = profile.experiment.replace(dict(variant.changes), seed=seed), None
            if not missing and scores:
                try:
                    run = out.runs[variant.row, seed] = get_run(experiment)
                except LCCoError as error:
                    missing = absence(error)
            for test in tests or profile.tests:
                paper = variant.paper.get(test, variant.paper.get("", (None, None)))
                cells = {"test_set": test, "paper_P": paper[0], "paper_J": paper[1], **variant.rest}
                for size in sizes:
                    found = run.evaluate(out.tests[test], protocols, size) if run and test not in why else None
                    for protocol in protocols:
                        row = make_row(table, variant.row, profile, experiment, **cells)
                        row |= {"protocol": protocol, "group_size": size}
                        if found:
                            row |= per_cent(found[protocol].summary) | {"run": run.path.name}
                        else:
                            row["status"] = why.get(test, missing)
                        out.rows.append(row)
    return out


def main_variants(profile: Profile) -> list[Variant]:
    """Table 1's two models: LCCo with the paper's numbers for the kind of training set, and the Baseline."""
    train = "+".join(profile.experiment.data.train)
    kind = "COCO" if "coco" in train else "PASCAL" if "voc" in train or "pascal" in train else ""
    paper = {}
    if kind:
        paper = {k: paper_number("table1_main", on, method="LCCo", train_set=kind) for k, on in PAPER_SETS.items()}
    return [Variant("LCCo", paper=paper), Variant("Baseline", BASELINE | profile.baseline)]


def quoted_rows(profile: Profile) -> list[dict[str, Any]]:
    """The paper's own Table 1 as rows whose measured cells are empty: one for each method and test set it reports."""
    rows = []
    for _, line in paper_table("table1_main").iterrows():
        for test, on in PAPER_SETS.items():
            p, j = (None if value != value else value for value in (line[f"{on}_P"], line[f"{on}_J"]))
            if p is not None or j is not None:
                cells = {"train_set": "" if line["train_set"] != line["train_set"] else line["train_set"]}
                cells |= {"test_set": test, "protocol": "as printed", "paper_P": p, "paper_J": j, "status": QUOTED}
                ours = f" ({line['method']})" if line["method"] == "LCCo" else ""
                rows.append(make_row("table1_main", line["citation"] + ours, profile, **cells))
    return rows


def main_results(profile: Profile) -> Results:
    """Table 1: LCCo and Baseline for every seed, test set and protocol, and the paper's rows."""
    out = collect(profile, "table1_main", main_variants(profile), choice=profile.choice_test)
    out.rows += quoted_rows(profile)
    return out


def cost(profile: Profile, variants: Sequence[Variant], seeds: Sequence[int] | None = None) -> str:
    """What a notebook's trainings will cost, as a sentence: how many, how many are done already, how long."""
    from lcco.runs import estimate, run_path, side_by_side

    seeds = profile.seeds if seeds is None else seeds
    wanted = {e.hash: e for v in variants for s in seeds for e in [profile.experiment.replace(dict(v.changes), seed=s)]}
    todo = [e for e in wanted.values() if not (run_path(e) / "record.json").is_file()]
    said = f"{len(variants)} models, {len(seeds)} seed{'s' * (len(seeds) != 1)}: {len(wanted)} training runs, "
    if not todo:
        return said + "all of them there already; what is left is scoring, and that is kept too."
    like: dict[str, dict[str, Any]] = {}  # seeds of one model cost the same
    try:
        for e in todo:
            key = e.replace(seed=0).hash
            like[key] = like.get(key) or estimate(e)
    except LCCoError as error:
        return f"{said}none of which can be done here ({absence(error)})."
    seconds = sum(like[e.replace(seed=0).hash]["training seconds"] for e in todo) / side_by_side(todo)
    seconds += max(one["embedding seconds"] for one in like.values())
    return f"{said}{len(todo)} still to do: about {duration(seconds)} on this machine, then the scoring."


# ---------------------------------------------------------------------------------------------------- tables for people
@dataclass(frozen=True)
class Layout:
    """How rows become a table: `stub` fields name a line, `across` a group of columns, `block` a part of the table."""

    title: str
    stub: tuple[str, ...] = ("row",)
    across: str = "test_set"
    block: str = "protocol"
    decimals: int = 1
    metrics: tuple[str, ...] = ("P", "J")
    notes: tuple[str, ...] = ()
    lower: tuple[str, ...] = ()  # metrics of which the lowest is the best
    unit: str = "In per cent"  # "": no scores, so nothing is best and the notes are `notes` alone


@dataclass
class Cell:
    """One printed number: mean, standard deviation over seeds, difference to the paper, marks."""

    mean: float | None = None
    sd: float | None = None
    delta: float | None = None
    best: bool = False
    text: str = ""  # instead of a number
    note: int = 0
    seeds: tuple[int, ...] = ()

    def show(self, decimals: int, bold: str, note: str, plus_minus: str = " ± ") -> str:
        """The cell as text; `bold` and `note` are format strings of the target language."""
        out = self.text
        if self.mean is not None:
            out = f"{self.mean:.{decimals}f}" + (f"{plus_minus}{self.sd:.{decimals}f}" if self.sd is not None else "")
            out = bold.format(out) if self.best else out
            out += f" ({self.delta:+.{decimals}f})" if self.delta is not None else ""
        return out + (note.format(self.note) if self.note else "")


@dataclass
class Block:
    """A part of a table with columns of its own: `columns` are (group, metric), `lines` are (stub, cells)."""

    title: str
    columns: list[tuple[str, str]]
    lines: list[tuple[tuple[str, ...], list[Cell]]]


class Table:
    """Rows laid out for people; shown as HTML in a notebook.

    `runs`: the record of every run behind the rows, by its name.
    """

    def __init__(self, name: str, rows: Any, layout: Layout, runs: Mapping[str, Any] | None = None) -> None:
        import pandas as pd

        frame = pd.DataFrame(rows)
        extra = [c for c in frame.columns if c not in ROW_FIELDS]
        self.name, self.layout, self.runs = name, layout, dict(runs or {})
        self.rows = frame.reindex(columns=[*ROW_FIELDS, *extra])
        self.footnotes: list[str] = []
        self.blocks = [self._block(str(b), part) for b, part in self.rows.groupby(layout.block, sort=False)]

    def _note(self, text: str) -> int:
        if text not in self.footnotes:
            self.footnotes.append(text)
        return self.footnotes.index(text) + 1

    def _block(self, title: str, part: pd.DataFrame) -> Block:
        stub = list(self.layout.stub)
        names = part[stub].fillna("").astype(str)
        lines = list(dict.fromkeys(names.itertuples(index=False, name=None)))
        columns, cells = [], []
        for group in dict.fromkeys(part[self.layout.across]):
            for metric in (*self.layout.metrics, *(f"paper_{m}" for m in self.layout.metrics)):
                mine = part[part[self.layout.across] == group]
                column = [self._cell(mine[(names.loc[mine.index] == line).all(axis=1)], metric) for line in lines]
                if any(c.mean is not None or c.note for c in column):  # a metric that no line has needs no column
                    if self.layout.unit:
                        _mark_best(column, self.layout.decimals, min if metric in self.layout.lower else max)
                    columns.append((group, metric))
                    cells.append(column)
        return Block(title, columns, [(line, [c[n] for c in cells]) for n, line in enumerate(lines)])

    def _cell(self, rows: pd.DataFrame, metric: str) -> Cell:
        if rows.empty:
            return Cell()
        first, cell = rows.iloc[0], Cell()
        paper = metric.startswith("paper_")
        values = rows[metric].dropna() if metric in rows else rows["P"].iloc[:0]
        if paper:
            values = values.iloc[:1]
        if len(values):
            cell.mean = float(values.mean())
            cell.sd = float(values.std(ddof=1)) if len(values) > 1 else None
            if not paper and not metric.startswith("change_"):  # a change is taken seed by seed: any two compare
                cell.seeds = tuple(sorted(rows.loc[values.index, "seed"].dropna().astype(int)))
            printed = first.get(f"paper_{metric}")
            if not paper and first["profile"] == "paper" and printed == printed and printed is not None:
                cell.delta = cell.mean - float(printed)
            if paper:
                for _, slip in _slips(self.name).iterrows():
                    mine = slip["row"] and slip["row"] in str(first["row"]) and slip["test_set"] == first["test_set"]
                    cell.note = self._note(slip["note"]) if mine and metric == "paper_J" else cell.note
        elif metric in self.layout.metrics[:2] and first["status"] != QUOTED:
            cell.text = "not run" if first["status"] != MEASURED else "–"
            cell.note = self._note(first["status"]) if first["status"] != MEASURED else 0
        return cell

    def notes(self) -> list[str]:
        """What stands below the table, unnumbered: how to read it, what it was made with, the slips in the record."""
        done = self.rows[self.rows["status"] == MEASURED]
        out = []
        if len(done) and self.layout.unit:
            seeds = done.groupby([*self.layout.stub, "test_set", "protocol"], sort=False)["seed"].nunique()
            least, most = seeds.min(), seeds.max()
            spread = f"one seed ({_listed(done['seed'])})"
            if most > 1:
                spread = f"mean ± standard deviation over {most if least == most else f'up to {most}'} seeds"
            out.append(f"{self.layout.unit}; {spread}; best in bold; sets of {_listed(done['group_size'])} images.")
            what = [f"{k.replace('_', ' ')} {_listed(done[k])}" for k in ("profile", "backbone", "tower", "vocabulary")]
            out.append(", ".join(what) + f"; trained on {_listed(done['train_set'])}.")
            plain = done[done["absent"] == 0] if "absent" in done else done  # intruders are not images of the set
            counts = plain.groupby("test_set", sort=False)["images"].max()
            out.append("Images scored: " + ", ".join(f"{label(k)} {n:,.0f}" for k, n in counts.items()) + ".")
            out += self._chosen_on(done)
        if self.rows[["paper_P", "paper_J"]].notna().any(axis=None):
            delta = "; in brackets the difference to it" if set(self.rows["profile"]) == {"paper"} else ""
            on = "" if self.name == "table1_main" else ", on iCoseg"
            out.append(f"“paper”: the number printed in the paper{on}, at its own data and backbone{delta}.")
        for name, record in self.runs.items():
            if record.get("note"):
                out.append(f"Run {name}, seed {record['experiment']['seed']}: {record['note']}.")
        slips = _slips(self.name).query("row == ''")
        return [*out, *slips[slips["test_set"].isin(["", *done["test_set"]])]["note"], *self.layout.notes]

    def _chosen_on(self, done: pd.DataFrame) -> list[str]:
        """Where a table scores pictures that were held out from training to choose the weights that are scored."""
        made = [r["experiment"] for r in self.runs.values() if "experiment" in r]
        on = {e["train"]["checkpoint"]: e["data"]["holdout"] for e in made}
        return [
            f"{label(test)} was not trained on, but the step whose weights are scored was chosen by J on all its "
            "pictures: for LCCo and Baseline alike, its numbers are no clean test."
            for test in dict.fromkeys(done["test_set"]) if test in on.get("best", ())
        ]  # fmt: skip

    def metric_heads(self, block: Block) -> list[str]:
        """A heading for each column; “paper” is said where not every column is the paper's."""
        plain = all(m.startswith("paper_") for _, m in block.columns)
        return [m.removeprefix("paper_") if plain else label(m) for _, m in block.columns]

    def heads(self, block: Block) -> list[str]:
        """One line of column headings: the test set is left out where it is the only one."""
        metrics, single = self.metric_heads(block), len({g for g, _ in block.columns}) == 1
        heads = [m if single else f"{label(g)} {m}" for (g, _), m in zip(block.columns, metrics, strict=True)]
        return [*(label(s) for s in self.layout.stub), *heads]

    def block_title(self, block: Block) -> str:
        """What a part is called."""
        what = {"as printed": "As printed in the paper"}.get(block.title, "")
        what = what or f"{label(self.layout.block)} {label(block.title)}"
        what, groups = what[0].upper() + what[1:], {g for g, _ in block.columns}
        return what if len(groups) != 1 else f"{what}, {label(groups.pop())}"

    def markdown(self) -> str:
        """The table as GitHub markdown."""
        from tabulate import tabulate

        out = [f"# {self.layout.title}"]
        for block in self.blocks:
            body = [
                [*line, *(c.show(self.layout.decimals, "**{}**", " <sup>{}</sup>") for c in cells)]
                for line, cells in block.lines
            ]
            body = [[label(text).replace("|", "\\|") for text in line] for line in body]
            align = ["left"] * len(self.layout.stub) + ["right"] * len(block.columns)
            table = tabulate(body, self.heads(block), "pipe", disable_numparse=True, colalign=align)
            out += [f"**{self.block_title(block)}**", table]
        out += [f"<sup>{n}</sup> {text}" for n, text in enumerate(self.footnotes, 1)]
        return "\n\n".join([*out, *self.notes()]) + "\n"

    def html(self) -> str:
        """The table as an HTML fragment: one table a part, headings in two rows, in a box that scrolls sideways."""
        e, out = html.escape, [f'<section class="lcco-table" id="{html.escape(self.name)}">']
        out.append(f"<h3>{e(self.layout.title)}</h3>")
        for block in self.blocks:
            out.append(f'<div class="scroll"><table><caption>{e(self.block_title(block))}</caption><thead><tr>')
            out += [f'<th rowspan="2">{e(label(s))}</th>' for s in self.layout.stub]
            for group in dict.fromkeys(g for g, _ in block.columns):
                span = sum(g == group for g, _ in block.columns)
                out.append(f'<th colspan="{span}" class="group">{e(label(group))}</th>')
            out += ["</tr><tr>", *(f"<th>{e(m)}</th>" for m in self.metric_heads(block)), "</tr></thead><tbody>"]
            for line, cells in block.lines:
                shown = [c.show(self.layout.decimals, "<b>{}</b>", "<sup>{}</sup>") for c in cells]
                kinds = ['class="paper"' if m.startswith("paper_") else "" for _, m in block.columns]
                out.append("<tr>" + "".join(f"<th>{e(label(s))}</th>" for s in line))
                out.append("".join(f"<td {k}>{s}</td>" for k, s in zip(kinds, shown, strict=True)) + "</tr>")
            out.append("</tbody></table></div>")
        notes = [f"<sup>{n}</sup> {e(text)}" for n, text in enumerate(self.footnotes, 1)] + [e(n) for n in self.notes()]
        return "".join(out) + "".join(f'<p class="note">{n}</p>' for n in notes) + "</section>"

    _repr_html_ = html

    def latex(self) -> str:
        """The table as a LaTeX document of its own (booktabs), which pdflatex compiles; wide parts are scaled down."""
        out = [_LATEX_HEAD, r"\section*{" + _tex(self.layout.title) + "}"]
        for block in self.blocks:
            groups = list(dict.fromkeys(g for g, _ in block.columns))
            spans = [sum(g == group for g, _ in block.columns) for group in groups]
            n = len(self.layout.stub)
            out.append(r"\subsection*{" + _tex(self.block_title(block)) + "}")
            out.append(r"\fit{\begin{tabular}{" + "l" * n + "".join("r" * s for s in spans) + r"}\toprule")
            over = [rf"\multicolumn{{{s}}}{{c}}{{{_tex(label(g))}}}" for g, s in zip(groups, spans, strict=True)]
            out.append(" & ".join([*[""] * n, *over]) + r" \\")
            start, rules = n + 1, []
            for span in spans:
                rules.append(rf"\cmidrule(lr){{{start}-{start + span - 1}}}")
                start += span
            heads = [*(label(s) for s in self.layout.stub), *self.metric_heads(block)]
            out += ["".join(rules), " & ".join(_tex(h) for h in heads) + r" \\ \midrule"]
            for line, cells in block.lines:
                marks = (r"\textbf{{{}}}", r"\textsuperscript{{{}}}", r" $\pm$ ")
                shown = [c.show(self.layout.decimals, *marks).replace("–", "--") for c in cells]
                out.append(" & ".join([*(_tex(label(s)) for s in line), *shown]) + r" \\")
            out.append(r"\bottomrule\end{tabular}}")
        notes = [rf"\textsuperscript{{{n}}} {_tex(text)}" for n, text in enumerate(self.footnotes, 1)]
        out += [rf"\par\smallskip {note}" for note in [*notes, *map(_tex, self.notes())]]
        return "\n".join([*out, r"\end{document}"]) + "\n"

    def write(self, folder: Path) -> Table:
        """Write `<name>.csv`, `.md`, `.tex` and `.records.json` into the folder.

        A table with measured rows is not replaced by one without any; rows that a new table lacks are told.
        """
        folder = Path(folder)
        if not self._may_replace(folder / f"{self.name}.csv"):
            return self
        csv = self.rows.to_csv(index=False, lineterminator="\n")
        for suffix, text in (("csv", csv), ("md", self.markdown()), ("tex", self.latex())):
            write_text(folder / f"{self.name}.{suffix}", text)
        write_json(folder / f"{self.name}.records.json", {"layout": dataclasses.asdict(self.layout), "runs": self.runs})
        return self

    def _may_replace(self, csv: Path) -> bool:
        if not csv.is_file():
            return True
        try:
            before = read_table(csv)
        except LCCoError:  # damaged: nothing to lose
            return True

        def measured(table: Table) -> set[tuple[str, ...]]:
            rows = table.rows[table.rows["status"] == MEASURED].reindex(columns=["row", *_KEY]).fillna("")
            told = rows.map(lambda v: str(int(v)) if isinstance(v, float) else str(v))  # a csv may give 5 as 5.0
            return set(told.itertuples(index=False, name=None))

        lost, mine = measured(before), measured(self)
        if lost and not mine:
            why = self.rows["status"].iloc[0] if len(self.rows) else "no rows"
            said = f"kept, with its {len(lost)} measured rows; here nothing was measured ({why})"
            print(f"{csv}: {said}", file=sys.stderr)
            return False
        if gone := sorted({row for row, *_ in lost - mine}):
            said = f"no longer holds what was measured of {few(gone, 4)}; `results: FOLDER` writes elsewhere"
            print(f"{csv}: {said}", file=sys.stderr)
        return True


def write_table(rows: Any, folder: Path, name: str, layout: Layout, runs: Iterable[Run] = ()) -> Table:
    """Lay the rows out, write the table and the record of each run behind it into the folder; give it to be shown."""
    return Table(name, rows, layout, {run.path.name: run.record for run in runs}).write(folder)


def read_table(csv: Path) -> Table:
    """A written table again, from its rows and the records beside them.

    Raises: LCCoError naming a file that is missing or does not hold rows.
    """
    import pandas as pd

    csv = Path(csv)
    beside = csv.with_name(f"{csv.stem}.records.json")
    try:
        rows = pd.read_csv(csv, keep_default_na=True)
        stored = json.loads(beside.read_text(encoding="utf-8"))
        kinds = {f.name: f.default for f in dataclasses.fields(Layout)}
        values = {k: tuple(v) if isinstance(kinds[k], tuple) else v for k, v in stored["layout"].items()}
    except (OSError, ValueError, KeyError) as error:
        raise LCCoError(f"{csv}: not a written table ({error}); run its notebook again") from None
    return Table(csv.stem, rows, Layout(**values), stored["runs"])


# What a reader looks for first; the rest follows by name.
ORDER = (
    "table1_main", "choice", "per_class", "per_class_choice", "words", "mixed_sets",
    "table2_components", "table3_losses", "table4_k", "table4_k_test_time",
    "more_images", "table5_foundation", "fig3_norms", "cost", "interpretations",
)  # fmt: skip


def written_tables(folder: Path) -> list[Table]:
    """Every table that was written into a folder, Table 1 first."""
    names = {f.name.replace(".records.json", ""): f for f in Path(folder).glob("*.records.json")}
    found = [names[n] for n in sorted(names, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))]
    return [read_table(f.parent / f.name.replace(".records.json", ".csv")) for f in found]


def _slips(table: str) -> pd.DataFrame:
    notes = paper_table("footnotes").fillna("")
    return notes[notes["table"] == table]


def _mark_best(column: list[Cell], decimals: int, best: Callable[[list[float]], float]) -> None:
    shown = [round(c.mean, decimals) for c in column if c.mean is not None]
    alike = len({c.seeds for c in column if c.mean is not None}) == 1  # means over other seeds do not compare
    if len(set(shown)) > 1 and alike:
        for c in column:
            c.best = c.mean is not None and round(c.mean, decimals) == best(shown)


def label(name: Any) -> str:
    """A name as people read it; `glyphworld_test:5`, a set's first pictures, is `GlyphWorld (5 pictures)`."""
    base, colon, n = str(name).partition(":")
    return LABELS.get(base, base) + (f" ({n} pictures)" if colon and n.isdigit() else colon + n)


def _listed(values: Any) -> str:
    found = [f"{v:.0f}" if isinstance(v, float) else str(v) for v in dict.fromkeys(values.dropna())]
    return ", ".join(LABELS.get(f, f) for f in found)


def _tex(text: str) -> str:
    """Text with LaTeX's own characters escaped and the few others it prints here translated."""
    table = {c: "\\" + c for c in "&%$#_{}"} | {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
        "–": "--", "“": "``", "”": "''", "±": r"$\pm$", "×": r"$\times$", "λ": r"$\lambda$", "→": r"$\to$",
        "≥": r"$\ge$", "⊙": r"$\odot$", "✓": "+",
    }  # fmt: skip
    return "".join(table.get(c, c) for c in text)


_LATEX_HEAD = r"""\documentclass{article}
\usepackage[utf8]{inputenc}
\usepackage[a4paper,landscape,margin=15mm]{geometry}
\usepackage{booktabs,graphicx}
\setlength{\parindent}{0pt}
\pagestyle{empty}
\newsavebox{\tablebox}
\newcommand{\fit}[1]{\sbox{\tablebox}{#1}\ifdim\wd\tablebox>\linewidth
  \resizebox{\linewidth}{!}{\usebox{\tablebox}}\else\usebox{\tablebox}\fi\par\medskip}
\begin{document}\small"""
