"""Tidy rows to tables: collected from runs; written as csv, markdown and LaTeX; shown as HTML.

Every number is a row (`ROW_FIELDS`), in per cent. The paper's numbers are read from
`lcco/paper/*.csv` as text, so that they keep the decimals they were printed with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from html import escape
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
PRINTED = ["paper_test_set", "paper_P", "paper_J"]


@cache
def raised(number: int) -> str:
    """A footnote's number, raised."""
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def paper_table(name: str) -> pd.DataFrame:
    """A table of the paper as printed, e.g. `table1_main`: every cell is text, "" if empty."""
    import pandas as pd

    return pd.read_csv(PAPER / f"{name}.csv", dtype=str, keep_default_na=False)


@cache
def _labels() -> dict[str, str]:
    return dict(paper_table("labels").to_numpy())


def label(name: Any) -> str:
    """A name as people read it: `pascal1037` is PASCAL."""
    return _labels().get(str(name), str(name))


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


def _printed(table: str) -> pd.DataFrame:
    """A table of the paper with a line for each test set it is printed for: iCoseg, but Table 1."""
    import pandas as pd

    wide = paper_table(table)
    where = [(test, f"{on}_") for test, on in PAPER_SETS.items()]
    where = where if table == "table1_main" else [("icoseg8", "")]
    long = [wide.assign(paper_test_set=t, paper_P=wide[f"{on}P"], paper_J=wide[f"{on}J"])
            for t, on in where]  # fmt: skip
    long = pd.concat(long).sort_index(kind="stable")
    empty = dict.fromkeys(PRINTED[1:], {"": None})
    return long.replace(empty).dropna(subset=PRINTED[1:], how="all")


def with_paper(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the paper's P and J of the row of that name, and the set they are printed for.

    Table 1's depend on the test set and on the kind of training set.
    """
    table = str(rows["table"].iloc[0]) if len(rows) else ""
    if not (PAPER / f"{table}.csv").is_file():
        return rows
    own, on = rows.drop(columns=PRINTED), ["row"]
    printed = _printed(table).rename(columns={"train_set": "kind"})
    if table == "table1_main":
        on, kinds = ["row", "test_set", "kind"], {"coco_seg": "COCO", "voc": "PASCAL"}
        trained = own["train_set"].astype(str).str.extract("(coco_seg|voc|pascal)")[0]
        own["kind"] = trained.replace(kinds | {"pascal": "PASCAL"})
        printed["test_set"] = printed["paper_test_set"]
    out = own.merge(printed[[*dict.fromkeys([*on, *PRINTED])]], how="left", on=on)
    out.loc[out["protocol"] == "choice", PRINTED] = None
    return out.set_index(rows.index)[rows.columns]


def quoted_rows(profile: Profile) -> pd.DataFrame:
    """The paper's own Table 1 as rows without measured cells, one a method and test set."""
    import pandas as pd

    rows, kept = [], [*PRINTED, "train_set", "uses_class_labels"]
    for line in _printed("table1_main").to_dict("records"):
        name = line["citation"] + (" (LCCo)" if line["row"] == "LCCo" else "")
        cells = {k: line[k] for k in kept} | {"test_set": line["paper_test_set"]}
        cells |= {"protocol": "as printed", "status": QUOTED}
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
    return out.assign(paper=out["row"].map(printed).where(out["protocol"] != "choice"))


def _over_seeds(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    grouped = frame.groupby(by, sort=False, dropna=False)["value"]
    return grouped.agg(mean="mean", sd="std", seeds="count").reset_index()


# ------------------------------------------------------------------------------ tables for people
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

    def __repr__(self) -> str:
        return f"<Table {self.name}: {len(self.rows)} rows>"

    def __post_init__(self) -> None:
        self.footnotes: dict[str, list[str]] = {}  # text → names for its brackets
        self.parts = {
            f"{label(self.block)} {label(b)}" if b != "as printed" else label(b): self._part(part)
            for b, part in self.rows.groupby(self.block, sort=False)
        }

    def _part(self, part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The texts of one part, and which are best; columns are (group, value)."""
        import pandas as pd

        names = part[list(self.index)].fillna("").astype(str).map(label)
        part = part.assign(line=names.agg("\0".join, axis=1))
        stubs = names.groupby(part["line"], sort=False).first()
        text, best = {("", label(f)): stubs[f] for f in self.index}, {}
        quoted = (part["status"] == QUOTED).all()
        for group in dict.fromkeys([*part[self.columns], *part["paper_test_set"].dropna()]):
            own, printed = (part[part[c] == group] for c in (self.columns, "paper_test_set"))
            for value in self.values:
                head = label(group), label(value)
                text[head], best[head] = self._measured(own, value)
                if text[head].str.startswith("–").all():
                    break  # one column says that nothing was run
            for value in "PJ":
                head = label(group) if quoted else f"paper ({label(group)})", value
                text[head] = printed.groupby("line", sort=False)[f"paper_{value}"].first()
        text = pd.DataFrame(text, index=stubs.index).fillna("")
        text = text[[head for head in text if not head[0] or text[head].ne("").any()]]
        bold = pd.DataFrame({head: text.index == best.get(head) for head in text})
        return text.reset_index(drop=True), bold

    def _measured(self, rows: pd.DataFrame, value: str) -> tuple[pd.Series, str | None]:
        """Line → what is printed; and the line that is best beyond doubt.

        That is: over several seeds, the same in all lines, and with no overlap with the next one.
        """
        import pandas as pd

        known = rows.dropna(subset=[value]) if value in rows else rows[:0]
        others = rows[~rows["line"].isin(known["line"])].groupby("line", sort=False)
        why = others["status"].first().map(self._status)
        if known.empty:
            return why, None
        by = known.astype({value: float}).groupby("line", sort=False)
        stat, sign = by[value].agg(["mean", "std"]), "+" * value.startswith("change_")
        text = stat["mean"].map(f"{{:{sign}z,.{self.decimals}f}}".format)
        text += stat["std"].map(f" ± {{:.{self.decimals}f}}".format).where(stat["std"].notna(), "")
        rank = stat.dropna().sort_values("mean", ascending=value in self.lower)
        if self.unit and len(rank) > 1 and by["seed"].apply(frozenset).nunique() == 1:
            first, second = rank.iloc[0], rank.iloc[1]
            if abs(first["mean"] - second["mean"]) > first["std"] + second["std"]:
                return pd.concat([text, why]), first.name
        return pd.concat([text, why]), None

    def _status(self, status: str) -> str:
        """A dash with its footnote's number; names (`(msrc7)`) that share a reason share it."""
        if status in (MEASURED, QUOTED):
            return ""
        why, _, name = status.partition(" (")
        names = self.footnotes.setdefault(f"N{why[1:]}", [])
        names += [name.rstrip(")")] if name and name.rstrip(")") not in names else []
        return "–" + raised(list(self.footnotes).index(f"N{why[1:]}") + 1)

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
        tabulars, how = {}, {"hrules": True, "multicol_align": "c", "convert_css": True}
        for part, (text, _) in self.parts.items():
            sides = "".join("r" if group else "l" for group, _ in text)
            shown = self.styler(part).format(_tex).format_index(_tex, axis=1)
            tabulars[part] = shown.to_latex(column_format=sides, **how)
        return _render("table.tex", table=self, tabulars=tabulars, tex=_tex)

    def all_notes(self) -> list[str]:
        """What stands below: footnotes, how to read it, what it was made with, slips in print."""
        done = self.rows[self.rows["status"] == MEASURED]
        slips = paper_table("footnotes").query(f"table == '{self.name}'")
        slips = slips[slips["test_set"].isin(["", *self.rows["test_set"]])]["note"]
        counts = done[done["absent"] == 0] if "absent" in done else done  # no intruders
        per = done.groupby([*self.index, "test_set", "protocol"], dropna=False)["seed"].nunique()
        given = {
            "done": done if self.unit else done[:0],
            "seeds": sorted(done["seed"].dropna().astype(int).unique()), "fewest": per.min(),
            "trained": self._trained(done), "chose": self._chose(),
            "bold": any(bold.any(axis=None) for _, bold in self.parts.values()),
            "counts": counts.groupby("test_set", sort=False)["images"].max().dropna().to_dict(),
        }  # fmt: skip
        text = _render("notes", table=self, slips=slips, **given)
        return [line for line in text.splitlines() if line]

    def _trained(self, done: pd.DataFrame) -> dict[str, list[str]]:
        """What a reader should know of how the models behind the rows were trained → which ones."""
        runs = _trainings(self.runs)
        runs = runs[runs.index.isin(done["run"])]
        told = {
            "from an edited checkout": runs["dirty"].eq(True),
            "from an unknown commit": runs["dirty"].isna() | ~runs["commit"].str.len().ge(12),
            "by older training code": runs["version"].fillna(1) < TRAINING_VERSION,
        }
        for device in runs["device"].value_counts().index[1:]:
            told[f"on {device}, unlike the others"] = runs["device"] == device
        out = {}
        for how, true in told.items():
            seeds = done[done["run"].isin(runs.index[true])].groupby("row", sort=False)["seed"]
            which = [f"{r} (seed {few(sorted(s.astype(int).unique()), 9)})" for r, s in seeds]
            out |= {how: ["all"] if true.all() else which} if which else {}
        return out

    def _chose(self) -> list[str]:
        """The test sets whose pictures chose weights of the models behind the rows."""
        held = self.rows["test_set"].isin(_trainings(self.runs)["holdout"].dropna().explode())
        if "chose_weights" in self.rows:
            held |= self.rows["chose_weights"] > 0
        return list(self.rows.loc[held, "test_set"].unique())

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
        layout = {f.name: getattr(self, f.name) for f in fields(self)[2:-1]}
        write_text(file, self.rows.to_csv(index=False, lineterminator="\n"))
        write_text(file.with_suffix(".md"), self.markdown())
        write_text(file.with_suffix(".tex"), self.latex())
        write_json(file.with_suffix(".records.json"), {"layout": layout, "runs": self.runs})
        return self


def read_table(csv: Path) -> Table:
    """A written table again. Raises: LCCoError naming a file that is missing or holds no rows."""
    import pandas as pd

    csv, old = Path(csv), {"stub": "index", "across": "columns", "metrics": "values"}
    try:
        rows = pd.read_csv(csv, dtype=dict.fromkeys(PRINTED, str))
        stored = read_json(csv.with_suffix(".records.json"))
    except (OSError, ValueError) as error:
        raise LCCoError(f"{csv}: not a written table ({error}); run its notebook again") from None
    layout = {old.get(key, key): value for key, value in stored["layout"].items()}
    rows = rows.reindex(columns=[*dict.fromkeys([*ROW_FIELDS, *rows])])
    return Table(csv.stem, rows, **layout, runs=stored["runs"])


@cache
def _templates() -> Any:
    import jinja2

    how = {"trim_blocks": True, "lstrip_blocks": True, "loader": jinja2.PackageLoader("lcco", ".")}
    return jinja2.Environment(**how)


def _render(template: str, **given: Any) -> str:
    tools = {"label": label, "few": few, "raised": raised}
    tools |= {"names": lambda s: few([*map(label, s)], 9)}
    return _templates().get_template(f"{template}.jinja").render(tools | given)


def _tex(text: Any) -> str:
    """Text for LaTeX: its own characters escaped, symbols, signs and losses as mathematics."""
    symbols = str.maketrans(dict(paper_table("latex").to_numpy()))
    text = re.sub(r"(?<![\w-])-(?=\d)", "$-$", str(text).translate(symbols))
    return re.sub(r"\bL\\_(iou|cs|c)\b", r"$\\mathcal{L}_{\\mathrm{\1}}$", text)


# ------------------------------------------------------------------------------- pages of results
def _trainings(runs: Mapping[str, Any]) -> pd.DataFrame:
    """Where, how long and by which code each of the runs was trained; a line for each."""
    import pandas as pd

    names = {"environment.device": "device", "environment.commit": "commit",
             "environment.dirty": "dirty", "training_version": "version", "seconds": "seconds",
             "experiment.data.holdout": "holdout"}  # fmt: skip
    trained = {n: r for n, r in runs.items() if "training" in r}
    facts = pd.json_normalize(list(trained.values())).reindex(columns=list(names))
    return facts.rename(columns=names).set_axis(list(trained)).astype({"commit": "string"})


def _written(folder: Path) -> list[Table]:
    """Every table that was written into a folder, Table 1 first."""
    order = list(paper_table("order")["table"])
    names = sorted(f.name.removesuffix(".records.json") for f in folder.glob("*.records.json"))
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    return [read_table(folder / f"{name}.csv") for name in names]


def _page(readme: Path, template: str, **given: Any) -> Path:
    text = _render(template, **given)
    write_text(readme, re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")
    return readme


def _about(profile: str) -> str:
    return load_profile(profile).about.strip() if profile in profile_names() else ""


def caption(png: Path) -> str:
    """The caption that a figure was saved with."""
    from PIL import Image

    with Image.open(png) as image:
        return str(image.info.get("Description", ""))


def _headline(tables: Sequence[Table]) -> str:
    """What the modules change, under the first protocol of Table 1 and in the group choice."""
    said = []
    for table in (t for t in tables if t.name in ("table1_main", "choice")):
        change = paired(table.rows).query("row == 'LCCo'")
        for r in change[change["protocol"].eq(table.rows["protocol"].iloc[0])].to_dict("records"):
            kind = " in the group choice" if table.name == "choice" else ""
            said.append(f"{r['mean']:+.1f} on {label(r['test_set'])}{kind}")
    return f"LCCo against its Baseline, in points of J: {', '.join(said)}." if said else ""


def results_readme(folder: Path) -> Path:
    """Write a results folder's README.md: its tables with their figures, machines, time."""
    folder, tables = Path(folder), _written(Path(folder))
    captions = {png.stem: caption(png) for png in sorted(folder.glob("*.png"))}
    order = {t: figures.split() for t, figures in paper_table("order").to_numpy()}
    beside = {t.name: order.get(t.name, [t.name]) for t in tables}
    rest = [c for c in captions if not any(c in own for own in beside.values())]
    runs = _trainings({name: run for t in tables for name, run in t.runs.items()})
    return _page(
        folder / "README.md", "profile.md", name=folder.name, about=_about(folder.name),
        headline=_headline(tables),
        books=sorted(folder.glob("notebooks/*.ipynb")), tables=tables, captions=captions,
        beside=beside, rest=rest, runs=runs, time=duration(runs["seconds"].sum()),
    )  # fmt: skip


def results_index(results: Path) -> Path:
    """Write results/README.md: J of all profiles beside each other, and what the paper prints."""
    import pandas as pd

    folders = [f for f in sorted(Path(results).iterdir()) if any(f.glob("*.records.json"))]
    profiles = {f.name: _about(f.name) for f in folders if f.name != "smoke"}
    written, tables = [t for p in profiles for t in _written(Path(results) / p)], []
    for name in paper_table("order")["table"]:
        if own := [t for t in written if t.name == name and "J" in t.values]:
            rows = pd.concat([t.rows for t in own], ignore_index=True)
            where = rows["profile"] + ", " + rows[own[0].columns].map(label)
            first = own[0].title, own[0].index, "where", ("J",), own[0].block
            tables.append(Table(name, rows.assign(where=where), *first))
    return _page(Path(results) / "README.md", "results.md", profiles=profiles, tables=tables)
