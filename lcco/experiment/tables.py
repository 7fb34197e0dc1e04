"""Tidy rows (`ROW_FIELDS`; per cent) to tables: collected from runs; as csv, markdown and LaTeX."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Self

import jinja2
import pandas as pd

from lcco.common import Missing, few
from lcco.config import TRAINING_VERSION, Experiment, Profile
from lcco.experiment import runs as run_store
from lcco.store import write_json, write_text

PRINTED = ["paper_test_set", "paper_P", "paper_J"]
ROW_FIELDS = (
    "table", "row", "profile", "backbone", "tower", "vocabulary", "train_set", "test_set",
    "protocol", "group_size", "seed", "images", "P", "J", *PRINTED, "status", "run")  # fmt: skip
SHARES = ("P", "J", "P_class", "J_class", "J_pooled", "J_nonempty", "leak", "J_same", "gain",
          "decides", "agreement", "false_alarms", "empty_area")  # fmt: skip
CAUTIONS = {  # what a reader should know of a training → whether a run's record says so
    "from an edited checkout": lambda run: run["environment"].get("dirty"),
    "from an unknown commit": lambda run: len(run["environment"].get("commit") or "") < 12,
    "by older training code": lambda run: run.get("training_version", 1) < TRAINING_VERSION,
}
MEASURED, QUOTED = "measured", "not run: quoted from the paper"
PAPER = Path(__file__).parents[1] / "paper"
TEMPLATES = jinja2.Environment(trim_blocks=True, loader=jinja2.FileSystemLoader(PAPER.parent))


def paper_table(name: str) -> pd.DataFrame:
    """A table of the paper as printed, e.g. `table1_main`: every cell is text, "" if empty."""
    return pd.read_csv(PAPER / f"{name}.csv", dtype=str, keep_default_na=False)


LABELS = dict(paper_table("labels").to_numpy())
SYMBOLS = str.maketrans(dict(paper_table("latex").to_numpy()))


def label(name: Any) -> str:
    """A name as people read it: `pascal1037` is PASCAL."""
    return LABELS.get(str(name), str(name))


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
    cells = {k: summary[k] and round(100 * summary[k], 4) for k in SHARES if k in summary}
    return cells | {"images": summary.get("images")}


def collect(
    profile: Profile, table: str, models: Mapping[str, Any], tests: Sequence[str] = (),
    protocols: Sequence[str] = (), group_sizes: Sequence[int] = (), *, seeds: Sequence[int] = (),
    cells: Mapping[str, Callable[[Experiment], Any]] | None = None, **how: Any,
) -> pd.DataFrame:  # fmt: skip
    """Train or load each model for each seed and score it on each test set: a row for every score.

    models: name → Experiment, or a rival. tests, protocols, group_sizes, seeds: by default the
    profile's. cells: further columns, made of the experiment. how: for `Run.evaluate`. Data or
    weights that are not here, and pictures that were trained on, become rows that say so.
    """
    data, found = run_store.load_tests(profile, tests or profile.tests), []
    protocols, sizes = protocols or profile.protocols, group_sizes or (profile.group_size,)

    def by_protocol(get: Callable[[], Any], name: str, size: int) -> dict[str, dict]:
        test, about = data[name], {}
        try:
            if isinstance(test, Missing):
                raise test
            run = get()
            if hasattr(run, "overlap"):
                if (seen := run.overlap(test)) and not how.get("allow_overlap"):
                    why = f"not run: trained on {seen} of its {len(test)} pictures ({name})"
                    return dict.fromkeys(protocols, {"status": why})
                about = {"chose_weights": run.overlap(test, "holdout")}
            done = run.evaluate(test, protocols, size, **how)
            return {p: scores(done[p].summary) | about | {"run": run.path.name} for p in protocols}
        except Missing as error:
            return dict.fromkeys(protocols, {"status": error.status})

    for name, model in models.items():
        own = isinstance(model, Experiment)
        for e in [model.replace(seed=s) for s in seeds or profile.seeds] if own else [None]:
            get = cache(lambda e=e, model=model: run_store.get_run(e) if e else model)
            more = {key: make(e) for key, make in (cells or {}).items() if e}
            for test, size in product(data, sizes):
                more |= {"test_set": test, "group_size": size}
                for p, done in by_protocol(get, test, size).items():
                    found.append(row(table, name, profile, e, protocol=p, **more, **done))
    return with_paper(pd.DataFrame(found))


def with_paper(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the paper's P and J beside them; Table 1's go by test and training set too."""
    table = str(rows["table"].iloc[0]) if len(rows) else ""
    if not (PAPER / f"{table}.csv").is_file():
        return rows
    own, printed, on = rows.drop(columns=PRINTED), paper_table(table).replace("", None), ["row"]
    if table == "table1_main":
        on, kinds = ["row", "test_set", "kind"], {"coco_seg": "COCO", "voc": "PASCAL"}
        own["kind"] = own["train_set"].astype(str).str.extract("(coco_seg|voc)")[0].replace(kinds)
        printed = printed.assign(test_set=printed["paper_test_set"], kind=printed["train_set"])
    out = own.merge(printed[[*on, *PRINTED]], how="left", on=on)
    out.loc[out["protocol"] == "choice", PRINTED] = None
    return out.set_index(rows.index)[rows.columns]


def quoted_rows(profile: Profile) -> pd.DataFrame:
    """The paper's own Table 1 as rows without measured cells, one a method and test set."""
    cells = {"table": "table1_main", "profile": profile.name, "protocol": "as printed"}
    rows = paper_table("table1_main").replace("", None)
    rows = rows.assign(**cells, status=QUOTED, test_set=rows["paper_test_set"])
    return rows.reindex(columns=[*ROW_FIELDS, "uses_class_labels"])


def paired(rows: pd.DataFrame, reference: str = "Baseline", metric: str = "J") -> pd.DataFrame:
    """Each row's difference to a reference row, seed by seed: mean, sd, seeds, and the paper's."""
    on = ["train_set", "test_set", "protocol", "group_size", "seed"]
    done = rows[rows["status"] == MEASURED].dropna(subset=[metric])
    base = done.loc[done["row"] == reference, [*on, metric]]
    both = done[done["row"] != reference].merge(base, on=on, suffixes=("", " of it"))
    change = both.assign(change=both[metric] - both[f"{metric} of it"])
    change = change.groupby([*on[:-1], "row"], sort=False, dropna=False)["change"]
    out = change.agg(mean="mean", sd="std", seeds="count").reset_index()
    printed = rows.dropna(subset=[f"paper_{metric}"]).groupby("row")[f"paper_{metric}"].first()
    printed = printed.astype(float) - float(printed.get(reference, "nan"))
    return out.assign(paper=out["row"].map(printed).where(out["protocol"] != "choice"))


@dataclass
class Table:
    """Rows laid out for people: a part for each `block`, a line for each `index`.

    Columns are the `values` under each of `columns`. Bold is the best of a column if all its lines
    have the same seeds, several, and its mean ± standard deviation does not overlap with the next.
    """

    name: str
    rows: pd.DataFrame = field(repr=False)
    title: str = ""
    index: Sequence[str] = ("row",)
    columns: str = "test_set"
    values: Sequence[str] = ("P", "J")
    block: str = "protocol"
    lower: Sequence[str] = ()  # values of which the lowest is the best
    decimals: int = 1
    unit: str = "In per cent"  # "": no scores, so nothing is best and the notes are `notes` alone
    notes: Sequence[str] = ()
    runs: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        blocks = self.rows.groupby(self.block, sort=False)
        self.parts = {f"{label(self.block)} {label(b)}": self._part(part) for b, part in blocks}

    def _part(self, part: pd.DataFrame) -> pd.DataFrame:
        """The texts of one part, the best in `**`; columns are (group, value)."""
        line = part.groupby(list(self.index), sort=False, dropna=False).ngroup()
        stubs = part[list(self.index)].fillna("").astype(str).map(label).groupby(line).first()
        text = {("", label(name)): stubs[name] for name in self.index}
        part = part.reindex(columns=[*dict.fromkeys([*part, *self.values])]).assign(line=line)
        for group in dict.fromkeys([*part[self.columns], *part["paper_test_set"].dropna()]):
            for value in self.values:
                cells = self._measured(part[part[self.columns] == group], value)
                text[label(group), label(value)] = cells
                if cells.eq("–").all():
                    break  # one column says that nothing was run
            printed = part[part["paper_test_set"] == group].groupby("line").first()
            text |= {(f"paper ({label(group)})", v): printed[f"paper_{v}"] for v in "PJ"}
        out = pd.DataFrame(text).fillna("")
        return out[[head for head in out if not head[0] or out[head].ne("").any()]]

    def _measured(self, rows: pd.DataFrame, value: str) -> pd.Series:
        """Line → mean ± standard deviation, or a dash; the best in `**`, as the class says."""
        known = rows.astype({value: float}).dropna(subset=[value]).groupby("line")
        absent = ~rows.groupby("line")["status"].first().isin([MEASURED, QUOTED])
        text, stat = absent.map({True: "–", False: ""}), known[value].agg(["mean", "std"])
        sign, digits = "+" * value.startswith("change_"), f".{self.decimals}f"
        for line, (mean, sd) in stat.iterrows():
            text[line] = f"{mean:{sign}z,{digits}}" + (f" ± {sd:{digits}}" if sd >= 0 else "")
        rank = stat.dropna().sort_values("mean", ascending=value in self.lower)
        apart = rank["mean"].diff().abs() > rank["std"].rolling(2).sum()  # from the one before
        if self.unit and known["seed"].apply(frozenset).nunique() == 1 and apart.iloc[1:2].any():
            text[rank.index[0]] = f"**{text[rank.index[0]]}**"
        return text

    def markdown(self) -> str:
        """The table as GitHub markdown."""
        out = [f"# {self.title}"]
        for part, text in self.parts.items():
            shown = text.map(lambda cell: cell.replace("|", "\\|"))
            shown.columns = [f"{group} {value}".strip() for group, value in text]
            side = ["right" if group else "left" for group, _ in text]
            table = shown.to_markdown(index=False, disable_numparse=True, colalign=side)
            out += [f"**{part[0].upper()}{part[1:]}**", table]
        return "\n\n".join([*out, *self.all_notes()]) + "\n"

    def _repr_markdown_(self) -> str:
        return "##" + self.markdown()

    def latex(self) -> str:
        r"""A booktabs table for each part, to be `\input`; the notes stand under the last."""
        tabulars = {}
        for part, text in self.parts.items():
            sides = "".join("r" if group else "l" for group, _ in text)
            how = {"index": False, "column_format": sides, "multicolumn_format": "c"}
            tabulars[part] = text.map(_tex).rename(columns=_tex).to_latex(**how)
        page = TEMPLATES.get_template("table.tex.jinja")
        return page.render(table=self, tabulars=tabulars, tex=_tex)

    def all_notes(self) -> list[str]:
        """What stands below: what was not run, how to read it, how it was made, slips in print."""
        done = self.rows[self.rows["status"] == MEASURED]
        trained = {name: run for name, run in self.runs.items() if "training" in run}
        held = {test for run in trained.values() for test in run["experiment"]["data"]["holdout"]}
        chose = done["test_set"].isin(held) | (done.get("chose_weights", 0) > 0)
        per = done.groupby([*self.index, "test_set", "protocol"], dropna=False)["seed"].nunique()
        named = {how: [n for n, r in trained.items() if true(r)] for how, true in CAUTIONS.items()}
        cautions = {how: done["row"][done["run"].isin(names)] for how, names in named.items()}
        slips = paper_table("footnotes").query(f"table == '{self.name}'")
        text = TEMPLATES.get_template("notes.jinja").render(
            table=self, measured=done, done=done if self.unit else done[:0], cautions=cautions,
            absent=self.rows["status"].replace([MEASURED, QUOTED], None).dropna().unique(),
            slips=slips.loc[slips["test_set"].isin(["", *done["test_set"]]), "note"],
            bold=any("**" in part.to_string() for part in self.parts.values()),
            counts=done.groupby("test_set", sort=False)["images"].agg(["min", "max"]).dropna(),
            chose=done["test_set"][chose].unique(), fewest=per.min(), label=label, few=few,
        )  # fmt: skip
        return [line for line in text.splitlines() if line]

    def write(self, folder: Path, runs: Iterable[Any] | None = None) -> Self:
        """Write `<name>.csv`, `.md`, `.tex` and `.records.json`; give the table to be shown.

        runs: those behind the rows, beside the store's. Measured rows outlast unmeasured ones.
        """
        file, measured = Path(folder) / f"{self.name}.csv", (self.rows["status"] == MEASURED).any()
        if not measured and file.is_file() and f",{MEASURED}," in file.read_text(encoding="utf-8"):
            print(f"{file}: kept; here nothing was measured ({self.rows['status'].iloc[0]})")
            return self
        known = {**self.runs}
        for run in runs or ():
            with suppress(Missing):  # a rival without its weights
                known[run.path.name] = run.record
        names = [*known, *self.rows["run"].dropna().unique()]
        self.runs = {n: known[n] if n in known else run_store.open_run(n).record for n in names}
        layout = {k: v for k, v in vars(self).items() if k not in ("name", "rows", "runs", "parts")}
        write_text(file, self.rows.to_csv(index=False, lineterminator="\n"))
        write_text(file.with_suffix(".md"), self.markdown())
        write_text(file.with_suffix(".tex"), self.latex())
        write_json(file.with_suffix(".records.json"), {"layout": layout, "runs": self.runs})
        return self


def _tex(text: Any) -> str:
    """Text for LaTeX: its own characters escaped, bold, symbols, signs and losses."""
    text = re.sub(r"\*\*(.+)\*\*", r"\\textbf{\1}", str(text).translate(SYMBOLS))
    text = re.sub(r"(?<![\w-])-(?=\d)", "$-$", text)
    return re.sub(r"\bL\\_(iou|cs|c)\b", r"$\\mathcal{L}_{\\mathrm{\1}}$", text)
