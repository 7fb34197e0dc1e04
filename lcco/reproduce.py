"""Run the paper's notebooks at a profile and bind what they wrote into README.md and one self-contained report.html."""

from __future__ import annotations

import ast
import base64
import dataclasses
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcco.common import LCCoError, duration, place, project_root, write_json, write_text
from lcco.config import Profile, coerce, flat, load_profile, nearest

TYPES = {
    "str": str, "int": int, "float": float, "bool": bool, "dict": dict[str, Any],
    "list[int]": tuple[int, ...], "list[float]": tuple[float, ...], "list[str]": tuple[str, ...],
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- inside the notebooks
def begin(
    profile: str = "embedded", *, seeds: Sequence[int] | None = None, data_root: str | None = None,
    results: str | None = None,
) -> tuple[Profile, Path]:  # fmt: skip
    """A notebook's start: its profile (with `seeds` in the place of the profile's own) and its results folder.

    `data_root` becomes this process's LCCO_DATA. Works from any working directory.
    Raises: LCCoError naming an unknown profile or a mistyped value.
    """
    warnings.filterwarnings("ignore", "IProgress not found")  # tqdm's, in a notebook without widgets
    chosen = load_profile(profile)
    if data_root:
        os.environ["LCCO_DATA"] = str(Path(data_root).expanduser().resolve())
    if seeds is not None:
        numbers = coerce([seeds] if isinstance(seeds, (int, str)) else seeds, tuple[int, ...], "seeds")
        chosen = dataclasses.replace(chosen, seeds=numbers, ablation_seeds=numbers)
    folder = Path(results).expanduser().resolve() if results else project_root() / "results" / chosen.name
    folder.mkdir(parents=True, exist_ok=True)
    return chosen, folder


# --------------------------------------------------------------------------------------------------- running notebooks
SHARED = "trainings and scores that notebooks share"


def notebooks(only: Sequence[str] = ()) -> list[Path]:
    """The paper's notebooks in order; `only` keeps those whose number or name begins so.

    Raises: LCCoError naming the notebooks there are.
    """
    found = sorted((project_root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    for word in only:
        if not any(f.stem.startswith(word) for f in found):
            raise LCCoError(f"no notebook `{word}`; there are: {', '.join(f.stem for f in found)}")
    return [f for f in found if not only or any(f.stem.startswith(word) for word in only)]


def parameters_of(notebook: Path) -> dict[str, tuple[Any, str]]:
    """The parameters that a notebook takes: name → (default, type as written in its `# type:` comment).

    Raises: LCCoError when the notebook does not parse or has no cell tagged `parameters`.
    """
    import papermill

    try:
        found = papermill.inspect_notebook(str(notebook))
    except Exception as error:  # papermill hands on whatever nbformat raised
        raise LCCoError(f"{notebook}: not a notebook ({str(error).splitlines()[0]})") from None
    if not found:
        raise LCCoError(f"{notebook}: has no cell tagged `parameters`")
    return {k: (ast.literal_eval(p["default"]), p["inferred_type_name"] or "str") for k, p in found.items()}


def check_parameters(chosen: Sequence[Path], given: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """What each notebook is given, typed; a name must be a parameter of at least one of them.

    Raises: LCCoError naming an unknown parameter and the nearest known one, or a value of the wrong type.
    """
    known = {path: parameters_of(path) for path in chosen}
    every = sorted({name for own in known.values() for name in own})
    for name in given:
        if name not in every:
            raise LCCoError(f"unknown parameter `{name}`{nearest(name, every)}")
    out: dict[Path, dict[str, Any]] = {}
    for path, own in known.items():
        out[path] = {}
        for name in own.keys() & given.keys():
            written = own[name][1].replace(" ", "")
            kind = TYPES.get(written.removesuffix("|None"))
            if kind is None:
                raise LCCoError(f"{path.name}: parameter `{name}` has the unknown type `{written}`")
            value = coerce(given[name], kind | None if written.endswith("|None") else kind, name)
            out[path][name] = list(value) if isinstance(value, tuple) else value
    return out


def reproduce(
    profile: str = "embedded", only: Sequence[str] = (), *, data_root: str | None = None,
    results: str | None = None, parameters: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Run the notebooks at a profile, then write README.md and report.html of its results folder.

    What was trained and scored before is taken from the run store, so an interrupted run goes on where it stopped.
    Returns: the results folder.
    Raises: LCCoError before anything runs for an unknown profile, notebook or parameter; later naming the notebook,
        the cell and the error.
    """
    from lcco.experiments import ahead

    chosen, folder = begin(profile, data_root=data_root, results=results)
    if os.environ.get("LCCO_DATA"):  # the notebooks' working directory is another
        os.environ["LCCO_DATA"] = str(Path(os.environ["LCCO_DATA"]).expanduser().resolve())
    paths = sorted(notebooks(only), key=lambda p: p.stem.startswith("00"))  # it shows a model that others train faster
    given = {"profile": profile, **({"results": str(folder)} if results else {}), **(parameters or {})}
    values = check_parameters(paths, given)
    # Beside the runs, so that they are of this machine, and begin anew with the trainings that they include.
    log = place("runs") / f"times-{chosen.name}.json"
    times = _read_json(log).get("seconds", {})
    if len(paths) > 1 and not parameters:
        began, known = time.monotonic(), {k: v for p in paths for k, v in parameters_of(p).items()}
        given_by = {k: known[k][0] for k in ("set_sizes", "k_values") if k in known}
        print(f"== {SHARED}", file=sys.stderr, flush=True)
        ahead(chosen, [p.stem[:2] for p in paths], **given_by)
        times[SHARED] = max(round(time.monotonic() - began), times.get(SHARED, 0))
    for n, path in enumerate(paths, 1):
        before = f"; took {duration(times[path.stem])} the first time" if path.stem in times else ""
        print(f"== {path.stem} ({n} of {len(paths)}{before})", file=sys.stderr, flush=True)
        began = time.monotonic()
        _run_notebook(path, folder / "executed" / path.name, values[path])
        seconds = time.monotonic() - began
        print(f"== {path.stem}: {duration(seconds)}", file=sys.stderr, flush=True)
        times[path.stem] = max(round(seconds), times.get(path.stem, 0))  # a later run finds its trainings done
        for file in (log, folder / "reproduce.json"):
            write_json(file, {"seconds": times, "machine": _machine()})
    report = write_report(chosen, folder)
    if not results:
        write_index(folder.parent)
        update_readme(project_root())
    print(f"== {report}", file=sys.stderr, flush=True)
    return folder


def _run_notebook(path: Path, out: Path, values: Mapping[str, Any]) -> None:
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel

    out.parent.mkdir(parents=True, exist_ok=True)
    pressed: list[int] = []

    def interrupt(*_: Any) -> None:
        pressed.append(1)  # the event loop under papermill may swallow what is raised here
        raise KeyboardInterrupt

    of_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, interrupt) if of_main else None
    try:
        papermill.execute_notebook(
            str(path), str(out), dict(values), kernel_name="python3", progress_bar=False, cwd=str(project_root()),
            stdout_file=sys.stdout, stderr_file=sys.stderr, extra_arguments=["--IPKernelApp.log_level=50"],
        )  # fmt: skip
    except NoSuchKernel:
        raise LCCoError("no Jupyter kernel `python3` in this environment: pip install ipykernel") from None
    except papermill.PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from None
        said = (str(error.evalue).strip().splitlines() or [""])[-1]
        what = said if error.ename == "LCCoError" else f"{error.ename}: {said}"
        if not pressed:
            raise LCCoError(f"{path.name}, cell {error.exec_count}: {what} (all of it: {out})") from None
    finally:
        if of_main:
            signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _machine() -> dict[str, Any]:
    from lcco.runs import environment

    return {k: v for k, v in environment().items() if not k.startswith("git")}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# -------------------------------------------------------------------------------------------------------------- report
FIGURES = {
    "fig3_maps": "Figure 3: feature maps", "fig3_norms": "Figure 3: the bars", "fig4": "Figure 4: masks side by side",
    "fig5": "Figure 5: masks as modules are added", "best_worst": "The best and the worst sets",
    "table5_foundation": "Table 5: masks side by side",
}  # fmt: skip


def write_report(profile: Profile, folder: Path) -> Path:
    """Write README.md and report.html over every table and figure in a results folder; give the latter's path.

    Figures with photographs (in `photos/`) are named, not shown: the pictures are third parties'.
    """
    import jinja2

    from lcco.figures import PHOTOS, caption
    from lcco.tables import written_tables

    folder = Path(folder)
    tables = written_tables(folder)
    drawn = {t.name: f"{t.layout.title}, drawn" for t in tables} | FIGURES
    figures = [(f.stem, drawn.get(f.stem, f.stem), caption(f), f) for f in sorted(folder.glob("*.png"))]
    photos = [(f.stem, drawn.get(f.stem, f.stem), caption(f)) for f in sorted((folder / PHOTOS).glob("*.png"))]
    runs = {name: record for table in tables for name, record in table.runs.items()}
    log = _read_json(folder / "reproduce.json")
    machine = log.get("machine", {})
    where = f"{machine.get('platform', '')}, {machine.get('cores', '?')} cores, {machine.get('device', '')}"
    versions = ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items())
    trainings = [r for r in runs.values() if "training" in r]
    trained = duration(sum(r.get("seconds", 0) for r in trainings))
    devices = Counter(r["environment"]["device"] for r in trainings)
    trained += " on " + ", ".join(f"{device} ({n} runs)" for device, n in devices.most_common()) if devices else ""
    times = [(name, duration(seconds)) for name, seconds in log.get("seconds", {}).items()]
    settings = flat(dataclasses.asdict(profile))
    base = flat(dataclasses.asdict(profile.experiment))
    records = [
        {
            "name": name, "changed": ", ".join(
                f"{k} = {v}" for k, v in flat(r.get("experiment", {})).items()
                if k in base and json.dumps(v) != json.dumps(base[k])
            ) or "–",
            "time": duration(r.get("seconds", 0)), "weights": str(r.get("weights_sha256", ""))[:12],
            "commit": _commit(r.get("environment", {})), "device": r.get("environment", {}).get("device", ""),
            "json": json.dumps(r, indent=1, sort_keys=True),
        }
        for name, r in sorted(runs.items())
    ]  # fmt: skip
    inline = [(stem, title, text, base64.b64encode(_small(f)).decode()) for stem, title, text, f in figures]
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True).from_string(template).render(
        profile=profile, tables=[t.html() for t in tables], names=[(t.name, t.layout.title) for t in tables],
        figures=inline, photos=photos, settings=settings, records=records, where=where, versions=versions,
        trained=trained, times=times,
    )  # fmt: skip
    write_text(folder / "report.html", page)

    lines = [f"# Results at profile `{profile.name}`", profile.about.strip()]
    lines.append(
        f"Made by `lcco reproduce --profile {profile.name}`; nothing here is typed by hand. All in one page: "
        "[report.html](report.html). Rows for machines: the csv beside each table; the record of every run behind it: "
        "its `.records.json`."
    )
    for t in tables:
        files = ", ".join(f"[{k}]({t.name}.{k})" for k in ("csv", "md", "tex", "records.json"))
        lines += [re.sub("^# ", "## ", t.markdown().strip()), f"Files: {files}"]
    for stem, title, text, _ in figures:
        lines += [f"## {title}", f"![{stem}]({stem}.png)", f"{text} [pdf]({stem}.pdf)"]
    for stem, title, text in photos:
        kept = f"It shows photographs of third parties, so it stays where it is made: `{PHOTOS}/{stem}.png`."
        lines += [f"## {title}", f"{text} {kept}"]
    lines.append("## Made on")
    lines.append(f"{where}; {versions}. Training behind these tables: {trained}.")
    if times:
        head = ["| notebook | longest time |", "|---|--:|"]
        lines.append("\n".join([*head, *(f"| {name} | {took} |" for name, took in times)]))
    write_text(folder / "README.md", "\n\n".join(line for line in lines if line) + "\n")
    return folder / "report.html"


def _small(file: Path, width: int = 1600) -> bytes:
    """A figure for the page: at most `width` pixels wide, in 256 colours, so that the page stays a few MB."""
    import io

    from PIL import Image

    with Image.open(file) as figure:
        figure = figure.convert("RGB")
        figure.thumbnail((width, 10 * width))
        out = io.BytesIO()
        figure.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def write_index(results: Path) -> Path:
    """Write results/README.md: the paper's tables number by number, and what each profile measured, or why not."""
    from lcco.tables import MEASURED, QUOTED, label, written_tables

    names = [p for p in ("paper", "lite", "finetuned", "shipped", "embedded") if (results / p).is_dir()]
    names += sorted(p.name for p in results.iterdir() if p.is_dir() and p.name not in (*names, "smoke"))
    profiles = {p: load_profile(p).about.strip() for p in names if any((results / p).glob("*.records.json"))}
    titles: dict[str, str] = {}
    lines: dict[tuple[str, str], dict[str, dict[str, list[str]]]] = {}  # (table, row) → profile → what → test sets
    for profile in profiles:
        for table in written_tables(results / profile):
            if "J" not in table.layout.metrics:
                continue
            titles.setdefault(table.name, table.layout.title)
            rows = table.rows[table.rows["status"] != QUOTED]
            rows = rows[rows["protocol"] == rows["protocol"].iloc[0]] if len(rows) else rows  # the headline protocol
            for (row, test), part in rows.groupby(["row", "test_set"], sort=False):
                cells = lines.setdefault((table.name, row), {})
                first, on = part.iloc[0], label(test)
                if first["paper_J"] == first["paper_J"]:
                    said = f"{first['paper_P']:.1f} / {first['paper_J']:.1f}"
                    said = said if table.name != "table1_main" else f"{on} {said}"
                    cells.setdefault("", {})[said] = []
                done = part[part["status"] == MEASURED]
                if len(done):
                    sd = f" ± {done['J'].std(ddof=1):.1f}" if len(done) > 1 else ""
                    said = f"{done['P'].mean():.1f} / {done['J'].mean():.1f}{sd}"
                    if "change_J" in done and done["change_J"].notna().all() and done["change_J"].any():
                        said += f" ({done['change_J'].mean():+.1f})"
                else:
                    said = first["status"]
                cells.setdefault(profile, {}).setdefault(said, []).append(on)
    out = ["# Results", "The paper's tables, number by number: what it prints, and what was measured here, at which "
           "scale. P / J in per cent under the table's first protocol, mean ± standard deviation of J over seeds. The "
           "profiles differ in data, backbone and image–text tower from the paper and from each other, so the "
           "paper's numbers are context, no rivals; in its Tables 2 to 5 they are for iCoseg. “–” is no part of a "
           "profile's run. In brackets: the change of J against the same seeds of "
           "the profile's own reading."]  # fmt: skip
    out += [f"- [`{p}`]({p}/README.md) ([report]({p}/report.html)): {about}" for p, about in profiles.items()]
    for name, title in titles.items():
        links = ", ".join(f"[{p}]({p}/{name}.md)" for p in profiles if (results / p / f"{name}.md").is_file())
        head = ["", "paper", *(f"`{p}`" for p in profiles)]
        body = [
            [row, *("<br>".join(f"{', '.join(on)} {said}".strip() for said, on in cells.get(p, {"–": []}).items())
                    for p in ("", *profiles))]
            for (table, row), cells in lines.items() if table == name
        ]  # fmt: skip
        table = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in line] for line in body)]
        out += [f"## {title}", "\n".join("| " + " | ".join(line) + " |" for line in table), f"Whole table: {links}"]
    path = results / "README.md"
    write_text(path, "\n\n".join(out) + "\n")
    return path


def _commit(environment: Mapping[str, Any]) -> str:
    """The commit that a run was made with; outside a checkout there is none."""
    edited = ", edited" if environment.get("git_dirty") else ""
    return f"{environment.get('git') or 'unknown'}{edited}"


SENTENCE = {
    "lite": "**Real photographs** (`lite`). Trained on {train}, a part of PASCAL VOC 2012, with a frozen "
    "EfficientNet-Lite2 and ConSE in the place of the paper's ResNet-50 and CLIP: its row is context, no rival.",
    "finetuned": "**The same on a GPU** (`finetuned`): 384 px, and the backbone's last two stages are trained too.",
    "shipped": "**What ships** (`shipped`): as `finetuned`, trained on 60% of PASCAL's pictures too; the rest test.",
    "embedded": "**GlyphWorld** (`embedded`, what `make reproduce` makes). Test classes are unseen in training.",
}


def readme_table(results: Path, profile: str) -> str:
    """README.md's table of a profile: LCCo, Baseline and the paper's LCCo, P / J under `ufo`, and the choice test's J.

    Made from the committed rows alone; "" when there are none yet.
    """
    import pandas as pd

    from lcco.tables import MEASURED, label

    file = results / profile / "table1_main.csv"
    if not file.is_file():
        return ""
    rows = pd.read_csv(file)
    ours = rows[rows["row"].isin(["LCCo", "Baseline"]) & (rows["protocol"] == "ufo")]
    tests = list(dict.fromkeys(ours["test_set"]))
    head = ["P / J, %", *(label(t) for t in tests)]
    lines = {name: [name] for name in ("LCCo", "Baseline")}
    paper = ["the paper's LCCo"]
    for test in tests:
        for name, line in lines.items():
            part = ours[(ours["row"] == name) & (ours["test_set"] == test)]
            done = part[part["status"] == MEASURED]
            spread = f" ± {done['J'].std(ddof=1):.1f}" if len(done) > 1 else ""
            value = f"{done['P'].mean():.1f} / {done['J'].mean():.1f}{spread}" if len(done) else part["status"].iloc[0]
            line.append(value)
        quoted = ours[(ours["test_set"] == test) & ours["paper_J"].notna()]
        paper.append(f"{quoted['paper_P'].iloc[0]} / {quoted['paper_J'].iloc[0]}" if len(quoted) else "–")
    choice = results / profile / "choice.csv"
    if choice.is_file():
        frame = pd.read_csv(choice)
        frame = frame[frame["status"] == MEASURED]
        for test in dict.fromkeys(frame["test_set"]):
            head.append(f"group choice, J: {label(test)}")
            for name, line in lines.items():
                line.append(f"{frame[(frame['row'] == name) & (frame['test_set'] == test)]['J'].mean():.1f}")
            paper.append("–")
    body = [*lines.values(), *([paper] if any(c != "–" for c in paper[1:]) else [])]
    seeds = ours["seed"].nunique()
    text = SENTENCE[profile].format(train=f"`{ours['train_set'].iloc[0]}`")
    table = [head, ["---"] * len(head), *body]
    more = f"Protocol `ufo`, sets of {int(ours['group_size'].iloc[0])}, {seeds} seed{'s' if seeds > 1 else ''}. "
    more += f"All rows: [results/{profile}](results/{profile}/README.md)."
    for record in _read_json(file.with_name("table1_main.records.json")).get("runs", {}).values():
        if record.get("note"):
            more += f" Of LCCo's training: {record['note']}."
    return "\n\n".join([text, "\n".join("| " + " | ".join(line) + " |" for line in table), more])


def update_readme(root: Path) -> str:
    """README.md's text with its tables (between `<!-- table NAME -->` and `<!-- end -->`) made anew; also written."""
    path = root / "README.md"
    text = path.read_text(encoding="utf-8")
    for profile in SENTENCE:
        block = readme_table(root / "results", profile)
        new = f"<!-- table {profile} -->\n{block}\n<!-- end -->"
        text = re.sub(rf"<!-- table {profile} -->.*?<!-- end -->", lambda _, new=new: new, text, flags=re.DOTALL)
    if text != path.read_text(encoding="utf-8"):
        write_text(path, text)
    return text
