"""Tidy rows to tables: collected from runs; written as csv, markdown and LaTeX; shown as HTML.

Every number is a row (`ROW_FIELDS`), in per cent. The paper's numbers are read from
`lcco/paper/*.csv` as text, so that they keep the decimals they were printed with.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache, lru_cache
from html import escape
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lcco.common import LCCoError, Missing, duration, few
from lcco.config import TRAINING_VERSION, Experiment, Profile, load_profile, profile_names
from lcco.store import read_json, write_json, write_text

if TYPE_CHECKING:
    import pandas as pd
    from pandas.io.formats.style import Styler

ROW_FIELDS = (
    "table", "row", "profile", "backbone", "tower", "vocabulary", "train_set", "test_set",
    "protocol", "group_size", "seed", "images", "P", "J", "paper_test_set", "paper_P", "paper_J",
    "status", "run",
)  # fmt: skip
SHARES = (
    "P", "J", "P_class", "J_class", "J_pooled", "J_nonempty", "leak", "J_same", "gain", "decides",
    "agreement", "false_alarms", "empty_area",
)  # fmt: skip
MEASURED, QUOTED = "measured", "not run: quoted from the paper"
PAPER = Path(__file__).parents[1] / "paper"
PAPER_SETS = dict(msrc7="MSRC", internet300="Internet", icoseg8="iCoseg", pascal1037="PASCAL")
LABELS = {
    "msrc7": "MSRC7", "msrc14": "MSRC (14)", "internet300": "Internet", "icoseg8": "iCoseg",
    "icoseg38": "iCoseg (38)", "pascal1037": "PASCAL", "pascal_fold_train": "PASCAL (60%)",
    "pascal_fold_test": "PASCAL (40%)", "voc_train": "VOC train", "voc_val": "VOC val",
    "coco_seg": "COCO", "glyphworld_test": "GlyphWorld", "glyphworld_choice": "GlyphWorld choice",
    "row": "", "test_set": "test set", "train_set": "trained on", "trained_on": "trained on",
    "uses_class_labels": "class labels", "group_size": "set size", "change_P": "P change",
    "change_J": "J change", "J_Baseline": "Baseline J", "J_LCCo": "LCCo J", "top_1": "top-1",
    "top_k": "top-K", "i_star": "i*", "false_alarms": "false alarms", "empty_area": "area there",
    "J_nonempty": "J elsewhere", "absent": "images without the object:", "True": "✓", "False": "",
    "isfc": "ISFC", "clip_interaction": "CLIP inter.", "clip_regularization": "CLIP reg.",
    "as printed": "Printed in the paper", "protocol": "protocol",
}  # fmt: skip
ORDER = (
    "table1_main", "choice", "per_class", "per_class_choice", "words", "mixed_sets",
    "table2_components", "table3_losses", "table4_k", "table4_k_test_time", "more_images",
    "table5_foundation", "fig3_norms", "cost", "interpretations",
)  # fmt: skip
BESIDE = dict(fig4="table1_main", best_worst="words", fig5="table2_components")


def label(name: Any) -> str:
    """A name as people read it: `pascal1037` is PASCAL."""
    return LABELS.get(str(name), LABELS.get(str(name).partition(":")[0], str(name)))


@lru_cache
def paper_table(name: str) -> pd.DataFrame:
    """A table of the paper as printed, e.g. `table1_main`: every cell is text, "" if empty."""
    import pandas as pd

    return pd.read_csv(PAPER / f"{name}.csv", dtype=str, keep_default_na=False)


# -------------------------------------------------------------------------------------------- rows
def row(table: str, name: str, profile: Profile, e: Experiment | None = None, **cells: Any) -> dict:
    """A row of the schema; the experiment names backbone, tower, vocabulary, data and seed."""
    out = dict.fromkeys(ROW_FIELDS) | {"table": table, "row": name, "profile": profile.name}
    if e:  # a tower that stands in for CLIP is called what it is
        kind = "random" if e.tower.weights is None else Path(e.tower.weights).name
        clip = f"{Path(e.tower.model).stem} ({kind})"
        out |= {"backbone": e.model.backbone, "tower": "ConSE" if e.tower.kind == "conse" else clip}
        out |= {"vocabulary": e.tower.vocabulary, "train_set": "+".join(e.data.train)}
        out |= {"seed": e.seed, "uses_class_labels": "yes" if e.loss.v_gt == "name" else "no"}
    return out | {"status": MEASURED} | cells


def scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation's summary as cells: its shares times 100, and the number of images."""
    shares = {k: summary[k] for k in SHARES if k in summary}
    cells = {k: None if v is None else round(100 * v, 4) for k, v in shares.items()}
    return cells | {"images": summary.get("images")}


def collect(
    profile: Profile, table: str, models: Mapping[str, Any], tests: Sequence[str] = (),
    protocols: Sequence[str] = (), group_sizes: Sequence[int] = (), *, seeds: Sequence[int] = (),
    cells: Mapping[str, Callable[[Experiment], Any]] | None = None, **how: Any,
) -> pd.DataFrame:  # fmt: skip
    """Train or load each model for each seed and score it on each test set: a row for every score.

    models: name → Experiment, or what has a Run's `evaluate` and `path` (Table 5's rivals).
    tests, protocols, group_sizes, seeds: by default the profile's. cells: further columns, made of
    the experiment. how: for `Run.evaluate`. Data or weights that are not here, and test pictures
    that were trained on, become rows whose status says so.
    """
    import pandas as pd

    from lcco.experiment.runs import get_run, load_tests

    data, found = load_tests(profile, tests or profile.tests), []
    protocols, sizes = protocols or profile.protocols, group_sizes or (profile.group_size,)
    for name, model in models.items():
        one = isinstance(model, Experiment)
        for seed in (seeds or profile.seeds) if one else (None,):
            e = model.replace(seed=seed) if one else None
            get = cache(lambda e=e, model=model: get_run(e) if e else model)
            more = {key: make(e) for key, make in (cells or {}).items()} if e else {}
            for test, size in product(data, sizes):
                done = _scored(get, data[test], protocols, size, how)
                more |= {"test_set": test, "group_size": size}
                found += [row(table, name, profile, e, protocol=p, **more, **done[p]) for p in done]
    return with_paper(pd.DataFrame(found))


def _scored(get: Callable, test: Any, protocols: Sequence[str], size: int, how: Mapping) -> dict:
    """Protocol → cells of a row: what was measured, or the status that says why nothing was."""
    try:
        if isinstance(test, Missing):
            raise test
        run, about = get(), {}
        if hasattr(run, "overlap"):
            if (seen := run.overlap(test)) and not how.get("allow_overlap"):
                why = f"not run: trained on {seen} of its {len(test)} pictures"
                return dict.fromkeys(protocols, {"status": why})
            about = {"chose_weights": run.holdout_overlap(test)}
        done = run.evaluate(test, protocols, size, **how)
        return {p: scores(done[p].summary) | about | {"run": run.path.name} for p in protocols}
    except Missing as error:
        return dict.fromkeys(protocols, {"status": error.status})


def with_paper(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the paper's P and J of the row of that name, and the set they are printed for.

    Table 1 has them by test set, for LCCo and the kind of its training set; the others on iCoseg.
    """
    table = str(rows["table"].iloc[0]) if len(rows) else ""
    paper = paper_table(table) if (PAPER / f"{table}.csv").is_file() else {}
    rows = rows.copy()
    for at, r in rows[rows["protocol"] != "choice"].iterrows() if len(paper) else ():
        lines, test, on = paper[paper.iloc[:, 0] == r["row"]], "icoseg8", ""
        if table == "table1_main":
            kinds = {"coco": "COCO", "voc": "PASCAL", "pascal": "PASCAL"}
            kind = next((k for name, k in kinds.items() if name in str(r["train_set"])), "")
            test, lines = r["test_set"], lines[lines["train_set"] == kind]
            on = f"{PAPER_SETS.get(test)}_"
        if len(lines) and f"{on}J" in paper:
            printed = lines[[f"{on}P", f"{on}J"]].iloc[0]
            rows.loc[at, ["paper_test_set", "paper_P", "paper_J"]] = [test, *printed]
    return rows


def quoted_rows(profile: Profile) -> pd.DataFrame:
    """The paper's own Table 1 as rows without measured cells, one a method and test set."""
    import pandas as pd

    rows, paper = [], paper_table("table1_main").replace("", None)
    for line, (test, on) in product(paper.to_dict("records"), PAPER_SETS.items()):
        cells = {k: line[k] for k in ("train_set", "uses_class_labels")}
        cells |= {"paper_P": line[f"{on}_P"], "paper_J": line[f"{on}_J"], "status": QUOTED}
        cells |= {"test_set": test, "paper_test_set": test, "protocol": "as printed"}
        name = line["citation"] + (" (LCCo)" if line["method"] == "LCCo" else "")
        if cells["paper_P"] or cells["paper_J"]:
            rows.append(row("table1_main", name, profile, **cells))
    return pd.DataFrame(rows)


# -------------------------------------------------------------------------- what the numbers say
def effects(rows: pd.DataFrame, factors: Sequence[str], metric: str = "J") -> pd.DataFrame:
    """What each factor adds alone, and what two of them add beyond that; mean and sd over seeds.

    Least squares on the factors (columns that are true or false) and their products, fitted to each
    test set, protocol and seed.
    """
    import numpy as np
    import pandas as pd

    on, found = ["test_set", "protocol", "seed"], []
    for key, part in rows[rows["status"] == MEASURED].groupby(on, sort=False):
        terms = {f: part[f].astype(float) for f in factors}
        terms |= {f"{a} × {b}": terms[a] * terms[b] for a, b in combinations(factors, 2)}
        if len(part) > len(terms):
            table = np.column_stack([np.ones(len(part)), *terms.values()])
            fit = np.linalg.lstsq(table, part[metric], rcond=None)[0][1:]
            found += [(*key, name, value) for name, value in zip(terms, fit, strict=True)]
    frame = pd.DataFrame(found, columns=[*on, "effect", "value"])
    return _over_seeds(frame, ["test_set", "protocol", "effect"])


def paired(rows: pd.DataFrame, reference: str = "Baseline", metric: str = "J") -> pd.DataFrame:
    """Each row's difference to a reference row, seed by seed: mean, sd, seeds, and the paper's."""
    on = ["test_set", "protocol", "group_size", "seed"]
    done = rows[rows["status"] == MEASURED].dropna(subset=[metric])
    base = done.loc[done["row"] == reference, [*on, metric]]
    both = done[done["row"] != reference].merge(base, on=on, suffixes=("", " of it"))
    both["value"] = both[metric] - both[f"{metric} of it"]
    printed = rows.dropna(subset=[f"paper_{metric}"]).groupby("row")[f"paper_{metric}"].first()
    printed = printed.astype(float) - float(printed.get(reference, "nan"))
    out = _over_seeds(both, [*on[:-1], "row"])
    return out.assign(paper=out["row"].map(printed))


def _over_seeds(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    grouped = frame.groupby(by, sort=False, dropna=False)["value"]
    return grouped.agg(mean="mean", sd="std", seeds="count").reset_index()


# ------------------------------------------------------------------------------ tables for people
class Cell(NamedTuple):
    text: str = ""
    mean: float | None = None
    sd: float | None = None
    seeds: tuple[Any, ...] = ()


@dataclass
class Table:
    """Rows laid out for people: a part for each `block`, a line for each `index`.

    Columns are the `values` under each of `columns`. Bold is the best of a column whose mean ±
    standard deviation does not overlap with the next one's. runs: the records behind the rows.
    """

    name: str
    rows: pd.DataFrame
    title: str = ""
    index: Sequence[str] = ("row",)
    columns: str = "test_set"
    values: Sequence[str] = ("P", "J")
    block: str = "protocol"
    lower: Sequence[str] = ()  # values of which the lowest is the best
    decimals: int = 1
    unit: str = "In per cent"  # "": no scores, so nothing is best and the notes are `notes` alone
    notes: Sequence[str] = ()
    runs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.footnotes: dict[str, list[str]] = {}  # text → names for its brackets
        slips = paper_table("footnotes").query(f"table == '{self.name}'").to_dict("records")
        self.slips = {(s["row"], s["test_set"]): s["note"] for s in slips}
        self.parts = {
            f"{label(self.block)} {label(b)}" if b != "as printed" else label(b): self._part(part)
            for b, part in self.rows.groupby(self.block, sort=False)
        }

    def _mark(self, text: str, name: str = "") -> str:
        names = self.footnotes.setdefault(text, [])
        names += [name] if name and name not in names else []
        return str(list(self.footnotes).index(text) + 1).translate(RAISED)

    def _cell(self, rows: pd.DataFrame, value: str) -> Cell:
        """The one place where the rows of a line and a column become what is printed."""
        found = rows[value].dropna() if value in rows else ()
        if len(found) and value.startswith("paper_"):
            name, test = rows.loc[found.index[0], ["row", "paper_test_set"]]
            slips = self.slips.items() if value == "paper_J" else ()
            marks = [self._mark(note) for (r, t), note in slips if r and r in name and t == test]
            return Cell("".join([found.iloc[0], *marks]))
        if len(found):
            mean, sd, several = found.mean(), found.std(), len(found) > 1
            sign, d = "+" * value.startswith("change_"), self.decimals
            text = f"{mean:{sign}z,.{d}f}" + (f" ± {sd:.{d}f}" if several else "")
            seeds = tuple(sorted(rows["seed"][found.index]))
            return Cell(text, mean, sd if several else None, seeds)
        status = rows["status"].iloc[0] if len(rows) else MEASURED
        why, _, name = status.partition(" (")
        silent = status in (MEASURED, QUOTED)
        return Cell() if silent else Cell("–" + self._mark(f"N{why[1:]}", name.rstrip(")")))

    def _part(self, part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The texts of one part, and which are best; columns are (group, value)."""
        import pandas as pd

        stubs = part[list(self.index)].fillna("").astype(str).map(label)
        names, printed = stubs.agg("\0".join, axis=1), part["paper_test_set"]
        lines = list(dict.fromkeys(names))
        text = {("", label(f)): [x.split("\0")[n] for x in lines] for n, f in enumerate(self.index)}
        bold = {head: [False] * len(lines) for head in text}
        groups = list(dict.fromkeys(part[self.columns]))
        rest = [p for p in printed.dropna().unique() if p not in groups]
        for group in [*groups, *rest]:
            own = part[(part[self.columns] == group) | ((printed == group) & (group in rest))]
            on = PAPER_SETS.get(group, label(group))
            on = on if (part["status"] == QUOTED).all() else f"paper ({on})"
            heads = [(label(group), v, v) for v in self.values] if group in groups else []
            heads += [(on, v, f"paper_{v}") for v in "PJ"] if (printed == group).any() else []
            by, none = dict(list(own.groupby(names, sort=False))), own.iloc[:0]
            for head, value, source in heads:
                cells = [self._cell(by.get(line, none), source) for line in lines]
                before = text.get((head, self.values[0]), [""])
                if any(c.text for c in cells) and not all(t.startswith("–") for t in before):
                    text[head, label(value)] = [c.text for c in cells]
                    bold[head, label(value)] = self._best(cells, value in self.lower)
        return pd.DataFrame(text), pd.DataFrame(bold)

    def _best(self, cells: Sequence[Cell], lowest: bool) -> list[bool]:
        """Which cell is best beyond doubt: several seeds, the same for all, and no overlap."""
        known = sorted((c for c in cells if c.sd is not None), key=lambda c: c.mean)
        alike = len({c.seeds for c in cells if c.mean is not None}) == 1
        if not self.unit or not alike or len(known) < 2:
            return [False] * len(cells)
        first, second = (known if lowest else known[::-1])[:2]
        clear = abs(first.mean - second.mean) > first.sd + second.sd
        return [bool(clear and c is first) for c in cells]

    def styler(self, part: str = "") -> Styler:
        """One part (the first by default) as a pandas Styler."""
        text, bold = self.parts[part or next(iter(self.parts))]
        weights = bold.replace({True: "font-weight: bold", False: ""})
        return text.style.apply(lambda _: weights, axis=None).hide(axis="index")

    def _repr_html_(self) -> str:
        out = [f"<h3>{escape(self.title)}</h3>"]
        for part in self.parts:
            styled = self.styler(part).format(escape="html").set_caption(escape(part))
            out.append(f'<div style="overflow-x: auto">{styled.to_html()}</div>')
        return "".join([*out, *(f"<p>{escape(note)}</p>" for note in self.all_notes())])

    def markdown(self) -> str:
        """The table as GitHub markdown."""
        out = [f"# {self.title}"]
        for part, (text, bold) in self.parts.items():
            shown = text.mask(bold, "**" + text + "**").map(lambda t: t.replace("|", "\\|"))
            shown.columns = [f"{group} {value}".strip() for group, value in text]
            side = ["right" if group else "left" for group, _ in text]
            table = shown.to_markdown(index=False, disable_numparse=True, colalign=side)
            out += [f"**{part[0].upper()}{part[1:]}**", table]
        return "\n\n".join([*out, *self.all_notes()]) + "\n"

    def latex(self) -> str:
        r"""A booktabs table for each part, to be `\input`; the notes stand under the last."""
        out = []
        for n, (part, (text, _)) in enumerate(self.parts.items(), 1):
            tex = self.styler(part).format(_tex).format_index(_tex, axis=1).to_latex(
                column_format="".join("r" if group else "l" for group, _ in text), hrules=True,
                multicol_align="c", position_float="centering", convert_css=True,
                caption=_tex(f"{self.title}, {part}."), label=f"tab:{self.name}-{n}",
            )
            if text.shape[1] > 9:  # as wide as the page
                tex = tex.replace(r"\begin{tabular}", r"\resizebox{\linewidth}{!}{\begin{tabular}")
                tex = tex.replace(r"\end{tabular}", r"\end{tabular}}")
            out.append(tex)
        notes = [rf"\par\smallskip\footnotesize {_tex(note)}" for note in self.all_notes()]
        body = "\n".join(out).removesuffix("\\end{table}\n")
        return body + "\n".join([*notes, "\\end{table}", ""])

    # -------------------------------------------------------------------------------------- notes
    def all_notes(self) -> list[str]:
        """What stands below: footnotes, how to read it, what it was made with, slips in print."""
        out = []
        for n, (text, names) in enumerate(self.footnotes.items(), 1):
            brackets = f" ({few(names, 9)})" if names else ""
            out.append(f"{str(n).translate(RAISED)} {text.rstrip('.')}{brackets}.")
        done = self.rows[self.rows["status"] == MEASURED]
        if len(done) and self.unit:
            out += [*self._made_with(done), *self._provenance(done)]
        if printed := [PAPER_SETS.get(p, p) for p in self.rows["paper_test_set"].dropna().unique()]:
            on = few(printed, 9)
            out.append(f"“paper”: as printed there for {on}, at its own data and backbone.")
        tests = {"", *self.rows["test_set"]}
        slips = [note for (name, test), note in self.slips.items() if not name and test in tests]
        return [*out, *slips, *self.notes]

    def _made_with(self, done: pd.DataFrame) -> list[str]:
        per = done.groupby([*self.index, "test_set", "protocol"], dropna=False)["seed"].nunique()
        seeds = sorted({int(s) for s in done["seed"].dropna()})
        spread = f"one seed ({few(seeds)})"
        if len(seeds) > 1:
            most = f"{'up to ' if per.min() < len(seeds) else ''}{len(seeds)} seeds"
            spread = f"mean ± standard deviation over {most}"
        if any(bold.any(axis=None) for _, bold in self.parts.values()):
            spread += "; bold: best, where mean ± deviation does not overlap with the next best's"
        sizes = few(done["group_size"].dropna().astype(int).unique(), 9)
        whole = done[done["absent"] == 0] if "absent" in done else done  # no intruders
        images = whole.groupby("test_set", sort=False)["images"].max().dropna()
        counts = ", ".join(f"{label(test)} {n:,.0f}" for test, n in images.items())
        known = ("profile", "backbone", "tower", "vocabulary", "train_set")
        what = [f"{label(k)} {few([*map(label, done[k].dropna().unique())])}" for k in known]
        made = f"{self.unit}; {spread}; sets of {sizes} images; scored: {counts}."
        return [made, f"{'; '.join(what)}."]

    def _provenance(self, done: pd.DataFrame) -> list[str]:
        """What a reader should know of how the models behind the rows were trained."""
        records = {n: r for n, r in self.runs.items() if "training" in r and n in set(done["run"])}
        usual = next(iter(_devices(records)), "")
        told: dict[str, list[str]] = {}
        for n, r in records.items():
            here = {"commit": None, "dirty": None, "device": None} | r.get("environment", {})
            commit, dirty = here.get("git", here["commit"]), here.get("git_dirty", here["dirty"])
            for how, true in {
                "from an edited checkout": dirty,
                "from an unknown commit": dirty is None or len(commit or "") < 12,
                "by older training code": r.get("training_version", 1) < TRAINING_VERSION,
                f"on {here['device']}, unlike the others": here["device"] != usual,
            }.items():
                told |= {how: [*told.get(how, []), n]} if true else {}
        out = [f"Trained {how}: {self._lines(done, own, records)}." for how, own in told.items()]
        held = {t for r in records.values() for t in r["experiment"]["data"]["holdout"]}
        chose = done["chose_weights"].fillna(0) > 0 if "chose_weights" in done else False
        for test in done.loc[done["test_set"].isin(held) | chose, "test_set"].unique():
            what = "was not trained on, but pictures of it chose the weights: no clean test"
            out.append(f"{label(test)} {what}.")
        return out

    def _lines(self, done: pd.DataFrame, names: list[str], of: Mapping[str, Any]) -> str:
        """`LCCo (seed 0), ISFC (seed 0, 1)`: the rows of these runs, or all but a few."""
        most = len(names) > len(of) / 2
        own = done[done["run"].isin([n for n in of if (n in names) != most])]
        seeds = own.groupby("row", sort=False)["seed"].unique()
        said = few([f"{r} (seed {few(sorted(map(int, s)), 9)})" for r, s in seeds.items()], 9)
        return f"all{' but ' if said else ''}{said}" if most else said

    def write(self, folder: Path, runs: Iterable[Any] | None = None) -> Table:
        """Write `<name>.csv`, `.md`, `.tex` and `.records.json`; give the table to be shown.

        runs: what the rows were measured with (`path`, `record`); None: the run store's. A table
        with measured rows is not replaced by one without.
        """
        from lcco.experiment.runs import open_run

        file, measured = Path(folder) / f"{self.name}.csv", (self.rows["status"] == MEASURED).any()
        if not measured and file.is_file() and f",{MEASURED}," in file.read_text(encoding="utf-8"):
            print(f"{file}: kept; here nothing was measured ({self.rows['status'].iloc[0]})")
            return self
        known = {**self.runs}
        for run in runs or ():
            with suppress(Missing):  # a rival without its weights
                known[run.path.name] = run.record
        names = self.rows["run"].dropna().unique()
        self.runs = {n: known[n] if n in known else open_run(n).record for n in names}
        layout = {f.name: getattr(self, f.name) for f in fields(self)}
        del layout["rows"], layout["runs"]
        write_text(file, self.rows.to_csv(index=False, lineterminator="\n"))
        write_text(file.with_suffix(".md"), self.markdown())
        write_text(file.with_suffix(".tex"), self.latex())
        write_json(file.with_suffix(".records.json"), {"layout": layout, "runs": self.runs})
        return self


def read_table(csv: Path) -> Table:
    """A written table again. Raises: LCCoError naming a file that is missing or holds no rows."""
    import pandas as pd

    csv = Path(csv)
    try:
        rows = pd.read_csv(csv, dtype=dict.fromkeys(("paper_test_set", "paper_P", "paper_J"), str))
        stored = read_json(csv.with_suffix(".records.json"))
    except (OSError, ValueError) as error:
        raise LCCoError(f"{csv}: not a written table ({error}); run its notebook again") from None
    if "paper_test_set" not in rows:  # written before there was this column
        on = rows["test_set"] if csv.stem == "table1_main" else pd.Series("icoseg8", rows.index)
        rows["paper_test_set"] = on.where(rows[["paper_P", "paper_J"]].notna().any(axis=1))
    old = {"stub": "index", "across": "columns", "metrics": "values"}
    layout = {old.get(key, key): value for key, value in stored["layout"].items()}
    return Table(**{"name": csv.stem, **layout}, rows=rows, runs=stored["runs"])


RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_TEX = str.maketrans(
    {c: "\\" + c for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"–": "--", "“": "``", "”": "''", "±": r"$\pm$", "×": r"$\times$", "✓": r"\checkmark{}"}
    | {"λ": r"$\lambda$", "→": r"$\to$", "≥": r"$\ge$", "⊙": r"$\odot$"}
    | {chr(raised): rf"\textsuperscript{{{chr(plain)}}}" for plain, raised in RAISED.items()}
)


def _tex(text: Any) -> str:
    """Text for LaTeX: its own characters escaped, symbols and losses as mathematics."""
    return re.sub(r"\bL\\_(iou|cs|c)\b", r"$\\mathcal{L}_{\1}$", str(text).translate(_TEX))


# ------------------------------------------------------------------------------- pages of results
def _written(folder: Path) -> list[Table]:
    """Every table that was written into a folder, Table 1 first."""
    names = sorted(f.name.removesuffix(".records.json") for f in folder.glob("*.records.json"))
    names.sort(key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    return [read_table(folder / f"{name}.csv") for name in names]


def _said(table: Table) -> dict[str, list[str]]:
    """Line → [`MSRC7 95.3 / 78.3 ± 0.2`, …]: P / J in a table's first part."""
    (text, _), out = next(iter(table.parts.values())), {}
    for _, line in text.iterrows():
        groups = dict.fromkeys(g for g, _ in text if g and not g.startswith("paper ("))
        pairs = {g: " / ".join(line.get((g, v), "") or "–" for v in "PJ") for g in groups}
        name = f"{label(table.index[0])} {line.iloc[0]}".strip()
        out[name] = [f"{g} {'not run' if p[0] == '–' else p}" for g, p in pairs.items()]
    return out


def _printed(name: str) -> dict[str, list[str]]:
    """Line → [P / J] of a table of the paper; of Table 1 the paper's own method alone."""
    out = {}
    for x in paper_table(name).to_dict("records") if (PAPER / f"{name}.csv").is_file() else ():
        if name == "more_images":
            line = f"{x['method']}, from {x['images_from']} to {x['images_to']} images"
            out[line] = [f"P {float(x['delta_P']):+}", f"J {float(x['delta_J']):+}"]
        elif name != "table1_main":
            out[x.get("row") or x["method"]] = [f"{x['P']} / {x['J']}"]
        elif x["method"] == "LCCo":
            pairs = [f"{on} {x[on + '_P']} / {x[on + '_J']}" for on in PAPER_SETS.values()]
            out[f"LCCo, trained on {x['train_set']}"] = pairs
    return out


def _about(profile: str) -> str:
    return load_profile(profile).about.strip() if profile in profile_names() else ""


def _devices(runs: Mapping[str, Any]) -> dict[str, int]:
    """Device → how many runs were trained on it, the most first."""
    found = Counter(r.get("environment", {}).get("device") for r in runs.values())
    return dict(found.most_common())


def _made_on(runs: Mapping[str, Any]) -> str:
    timed = [r["seconds"] for r in runs.values() if r.get("seconds")]
    where = ", ".join(f"{n} on {device}" for device, n in _devices(runs).items()) or "none"
    untimed = len(runs) - len(timed)
    lack = f"; of {untimed} the time was not recorded" if untimed else ""
    return f"Trainings behind these tables: {where}; {duration(sum(timed))} in all{lack}."


def results_readme(folder: Path) -> Path:
    """Write a results folder's README.md: headline, tables with their figures, machines, time."""
    from lcco.experiment.figures import caption

    folder, tables = Path(folder), _written(Path(folder))
    out = [f"# Results at profile `{folder.name}`"]
    for table in tables[:1]:
        lines = "; ".join(f"{line}: {', '.join(said)}" for line, said in _said(table).items())
        out.append(f"**{lines}** (P / J in per cent, {next(iter(table.parts))}).")
    books = [f"[{b.stem}](notebooks/{b.name})" for b in sorted(folder.glob("notebooks/*.ipynb"))]
    out += [_about(folder.name), f"The notebooks as they ran: {', '.join(books) or 'not kept'}."]
    left = sorted(folder.glob("*.png"))
    for name, table in [*((t.name, t) for t in tables), ("", None)]:
        if table:
            out += ["#" + table.markdown().strip(), f"Files: [csv]({name}.csv), [tex]({name}.tex)"]
        for png in [f for f in left if not table or name in (f.stem, BESIDE.get(f.stem))]:
            out += [f"![{png.stem}]({png.name})", f"{caption(png)} [pdf]({png.stem}.pdf)"]
            left.remove(png)
    runs = {n: r for t in tables for n, r in t.runs.items() if "training" in r}
    out += ["## Made on", _made_on(runs)]
    write_text(folder / "README.md", "\n\n".join(filter(None, out)) + "\n")
    return folder / "README.md"


INDEX = (
    "The paper's tables beside what was measured here: P / J in per cent under a table's first "
    "protocol, mean ± standard deviation over seeds. The profiles differ in data, backbone and "
    "image–text tower from the paper and from each other, so their numbers do not compare with "
    "the paper's, which in Tables 2 to 5 are for iCoseg. “–”: not part of it."
)


def results_index(results: Path) -> Path:
    """Write results/README.md: the paper's tables, and what each profile measured beside them."""
    folders = [f for f in sorted(Path(results).iterdir()) if any(f.glob("*.records.json"))]
    profiles = {f.name: {t.name: t for t in _written(f)} for f in folders if f.name != "smoke"}
    out = ["# Results", INDEX, *(f"- [`{p}`]({p}/README.md): {_about(p)}" for p in profiles)]
    for name in ORDER:
        own = {p: t[name] for p, t in profiles.items() if name in t and "J" in t[name].values}
        columns = {"paper": _printed(name), **{p: _said(table) for p, table in own.items()}}
        body = [["", *columns], ["---"] * (len(columns) + 1)]
        for line in dict.fromkeys(line for said in columns.values() for line in said):
            body.append([line, *("<br>".join(said.get(line, "–")) for said in columns.values())])
        if own:
            lines = "\n".join(f"| {' | '.join(cells)} |" for cells in body)
            out += [f"## {next(iter(own.values())).title}", lines]
    write_text(Path(results) / "README.md", "\n\n".join(out) + "\n")
    return Path(results) / "README.md"
