"""The jobs of the graph, `python workflow/jobs.py KIND …`: started by the Snakefile.

Each writes what it says into its log; the terminal gets one line when it is done or has failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

if __name__ == "__main__":  # Ctrl-C while the rest is imported ends it without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plan import Job, all_jobs  # noqa: E402

from lcco.common import LCCoError, Missing, duration  # noqa: E402
from lcco.config import Profile, load_profile, nearest, typed  # noqa: E402
from lcco.store import atomic_path, read_json, write_json, write_text  # noqa: E402


# ---------------------------------------------------------------------------------- a job's frame
@contextlib.contextmanager
def logged(name: str, log: Path) -> Iterator[None]:
    """Send all output to the log, and tell the terminal in one line how it ended."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began, terminal = time.monotonic(), os.fdopen(os.dup(2), "w")
    with open(log, "w") as file:
        for fd in (1, 2):
            os.dup2(file.fileno(), fd)
        said, code = "", 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            yield
            said, code = f"done: {name} ({duration(time.monotonic() - began)})", 0
        except KeyboardInterrupt:
            said, code = f"interrupted: {name}", 130
        except LCCoError as error:
            said = f"failed: {name}: {error} (log: {log})"
        except BaseException as error:
            traceback.print_exc()
            last = (str(error).strip().splitlines() or [""])[-1]
            said = f"failed: {name}: {type(error).__name__}: {last} (log: {log})"
        print(said, file=sys.stderr, flush=True)
        print(f"[{_counted(log.parent)}] {said}", file=terminal, flush=True)
    if code:
        sys.exit(code)


def begin(logs: Path, jobs: int) -> None:
    """Start counting the jobs of a graph anew."""
    write_text(logs / "progress.txt", f"{jobs}\n")


def _counted(logs: Path) -> str:
    with open(logs / "progress.txt", "a+") as file:
        file.write("+\n")
        file.seek(0)
        total, *ended = file.read().split()
    return f"{len(ended)}/{total}" if total != "+" else "-"


# ---------------------------------------------------------------------------------- the jobs
def embed(profile: Profile, notebooks: list[str], out: Path) -> None:
    """Compute what trainings and scores share, once: maps and embeddings of every set."""
    from lcco.experiment.features import make_features
    from lcco.experiment.runs import load_tests, training_data
    from lcco.experiment.train import v_gt_source

    jobs = all_jobs(profile, notebooks)
    backgrounds = Counter(job.experiment.loss.mask_background for job in jobs)
    for job in jobs:
        e = job.experiment
        try:
            data, holdout = training_data(e)
            features = make_features(e)
        except Missing as missing:
            print(missing.status, flush=True)
            continue
        background = e.loss.mask_background if v_gt_source(e) == "tower" else None
        if backgrounds[background] < 2:  # of one training alone: done there, beside others
            background = None
        features.prepare(data, flip=e.data.flip, background=background)
        tests = load_tests(profile, dict.fromkeys(s.test for s in job.scores))
        for test in (holdout, *tests.values()):
            if test is not None and not isinstance(test, Missing):
                features.prepare(test)
    write_json(out, {"profile": profile.name})


def train(profile: Profile, run: str, out: Path) -> None:
    """Train one run and score it wherever the notebooks will ask for a score."""
    from lcco.experiment.runs import get_run, load_tests

    job = next(j for j in all_jobs(profile) if j.experiment.run_name == run)
    said = dict.fromkeys(wanted(job))
    tests = load_tests(profile, dict.fromkeys(s.test for s in job.scores))
    try:
        model = get_run(job.experiment)
        for score, key in zip(job.scores, said, strict=True):
            test = tests[score.test]
            if isinstance(test, Missing):
                said[key] = test.status
            elif not model.overlap(test):
                model.evaluate(test, score.protocols, score.group_size)
    except Missing as missing:
        said = dict.fromkeys(said or ["training"], missing.status)
    write_json(out, said)
    for status in dict.fromkeys(filter(None, said.values())):
        print(status, flush=True)


def wanted(job: Job) -> list[str]:
    """Each score of a job as the text that its marker file holds."""
    return [json.dumps([s.test, s.protocols, s.group_size]) for s in job.scores]


def stale(marker: Path, job: Job) -> bool:
    """Whether scores were added since, or something was not run for want of data or weights."""
    with contextlib.suppress(OSError, LCCoError):
        done = read_json(marker)
        return not set(wanted(job)) <= set(done) or any(done.values())
    return marker.exists()


def notebook(source: Path, out: Path, log: Path, given: Mapping[str, Any]) -> None:
    """Run a notebook by papermill, with those of the parameters that it has."""
    import nbformat
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError

    known = papermill.inspect_notebook(str(source))
    values = {k: v for k, v in given.items() if k in known}
    unfinished = log.with_suffix(".ipynb")
    try:
        made = papermill.execute_notebook(
            str(source.relative_to(ROOT)), str(unfinished), values, kernel_name="python3",
            progress_bar=False, cwd=str(ROOT), log_output=False, stdout_file=sys.stdout,
            stderr_file=sys.stderr,
        )  # fmt: skip
    except NoSuchKernel:
        raise LCCoError("no Jupyter kernel `python3` here: pip install ipykernel") from None
    except DeadKernelError:
        what = "its kernel was killed (out of memory?); start it again and it goes on"
        raise LCCoError(what) from None
    except papermill.PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from None
        if error.ename in ("LCCoError", "Missing"):
            raise LCCoError(f"cell {error.exec_count}: {error.evalue}") from None
        raise
    made.metadata.papermill.output_path = out.name  # it is committed: no folder of this machine
    with atomic_path(out) as part:
        nbformat.write(made, part)
    unfinished.unlink()


def report(profile: Profile, folder: Path, logs: Path) -> None:
    """Write the results folder's README.md, the index above it, and the seconds of every job."""
    from report import results_index, results_readme

    from lcco.experiment.runs import environment

    write_json(folder / "seconds.json", {"machine": environment(), "seconds": recorded(logs)})
    results_readme(folder)
    if folder.parent == ROOT / "results":
        results_index(folder.parent)


def html(folder: Path) -> None:
    """The results' README.md and the executed notebooks as pages in `html/`."""
    import nbformat
    from nbconvert import HTMLExporter

    (folder / "html").mkdir(exist_ok=True)
    exporter = HTMLExporter(embed_images=True)
    pages = {p.stem: nbformat.read(p, 4) for p in sorted(folder.glob("notebooks/*.ipynb"))}
    text = (folder / "README.md").read_text(encoding="utf-8")
    for name in pages:
        text = text.replace(f"notebooks/{name}.ipynb", f"{name}.html")
    pages["index"] = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    for name, page in pages.items():
        where = {"metadata": {"path": str(folder), "name": name}}
        body, _ = exporter.from_notebook_node(page, where)
        page = body.replace("</head>", f"{NARROW}</head>")
        (folder / "html" / f"{name}.html").write_text(page, "utf-8")


NARROW = """<style>
body { max-width: 60rem; margin: auto; overflow-wrap: anywhere }
table { display: block; overflow-x: auto; max-width: 100% }
th, td { overflow-wrap: normal; word-break: normal } td { white-space: nowrap !important }
.jp-RenderedText pre { word-break: normal } img, svg { max-width: 100% }
.jp-InputPrompt, .jp-OutputPrompt { display: none }
@media (max-width: 40rem) { body { padding: 0 4px } .jp-Cell { padding: 0 } }
</style>"""


# ---------------------------------------------------------------------------------- what it costs
def recorded(logs: Path) -> dict[str, float]:
    """Seconds of each job that ran here, from Snakemake's benchmark files."""
    lines = {f.stem: f.read_text().splitlines() for f in sorted(logs.glob("*.tsv"))}
    return {name: float(line[1].split("\t")[0]) for name, line in lines.items() if len(line) > 1}


def forecast(jobs: Iterable[Any], folder: Path, logs: Path, cores: int) -> str:
    """What will run and about how long: seconds recorded here before, else those committed."""
    committed = folder / "seconds.json"
    before = read_json(committed)["seconds"] if committed.is_file() else {}
    before |= recorded(logs)
    counts: dict[str, int] = {}
    seconds, unknown = 0.0, 0
    for job in jobs:
        rule = job.rule.name.removesuffix("_long")
        counts[rule] = counts.get(rule, 0) + 1
        name = Path(str(job.benchmark)).stem
        alike = [s for n, s in before.items() if n.split("-")[0] == name.split("-")[0]]
        known = before.get(name, fmean(alike) if alike else None)
        unknown += known is None
        seconds += (known or 0) / max(1, cores // job.threads)
    if not counts:
        return "to do: nothing, all of it is done"
    found = {word: counts[rule] for rule, word in RULES.items() if rule in counts}
    words = [f"{n} {word}{'s' * (n > 1)}" for word, n in found.items()]
    about = f"about {duration(seconds)}" if seconds else "time not known before the first run"
    more = f", and {unknown} more of unknown length" if seconds and unknown else ""
    return f"to do: {', '.join(words)}: {about}{more}"


RULES = {"embed": "embedding", "train": "training", "notebook": "notebook", "report": "report",
         "html": "set of pages"}  # fmt: skip


# ---------------------------------------------------------------------------------- the edges
def settings(config: Mapping[str, Any], caller: Path) -> dict[str, Any]:
    """Snakemake's --config, typed; paths are relative to the folder of the caller.

    Raises: LCCoError naming an unknown setting, or one that is not what it must be.
    """
    plain = {"profile": "embedded", "notebooks": "", "results": None, "parameters": {}}
    for key in config:
        if key not in plain:
            raise LCCoError(f"unknown --config `{key}`{nearest(key, plain)}")
    given = plain | {k: v for k, v in config.items() if v is not None}
    if isinstance(given["notebooks"], int):  # Snakemake reads 01 as a number
        given["notebooks"] = f"{given['notebooks']:02d}"
    for key, value in given.items():
        if key != "parameters" and not isinstance(value, str | None):
            said = f"`{key}` was read as {value!r}, not as text"
            raise LCCoError(f"{said}; write it as a path: --config {key}=./…")
    out = given | {"parameters": typed(given["parameters"], dict, "parameters")}
    if out["profile"].endswith((".yaml", ".yml")):
        out["profile"] = str(caller / Path(out["profile"]).expanduser())
    out["name"] = load_profile(out["profile"]).name
    results = out["results"] and caller / Path(out["results"]).expanduser()
    out["folder"] = results or ROOT / "results" / out["name"]
    stems = {s.split("_")[0]: s for s in sorted(p.stem for p in ROOT.glob("notebooks/*.ipynb"))}
    chosen = [n.strip() for n in out["notebooks"].split(",") if n.strip()] or list(stems)
    for n in chosen:
        if n not in stems:
            raise LCCoError(f"no notebook `{n}`; there are: {', '.join(stems)}")
    out["notebooks"] = {n: stems[n] for n in chosen}
    if out["parameters"]:
        _check_names(out)
    return out


def profile_of(given: Mapping[str, Any]) -> Profile:
    """The profile, with the seeds of the parameters where they name some, as in the notebooks."""
    profile, seeds = load_profile(given["profile"]), given["parameters"].get("seeds")
    if seeds is None:
        return profile
    kinds = ("seeds", "ablation_seeds", "reading_seeds")
    return profile.model_copy(update=dict.fromkeys(kinds, typed(seeds, tuple[int, ...], "seeds")))


def _check_names(chosen: Mapping[str, Any]) -> None:
    import papermill

    books = [ROOT / "notebooks" / f"{stem}.ipynb" for stem in chosen["notebooks"].values()]
    every = {name for book in books for name in papermill.inspect_notebook(str(book))}
    every -= {"profile", "results"}  # the graph's own
    for name in chosen["parameters"]:
        if name not in every:
            raise LCCoError(f"no notebook has a parameter `{name}`{nearest(name, sorted(every))}")


def main(kind: str, given: str, *rest: str) -> None:
    """Run one job. given: the Snakefile's settings as JSON; rest: a run or notebook, and a file."""
    of = json.loads(given)
    folder, logs = Path(of["folder"]), Path(of["logs"])
    what = rest[0] if kind in ("train", "notebook") else of["name"]
    log = logs / f"{kind}-{what}.log"
    with logged(f"{kind} {what}", log):
        profile = profile_of(of)
        if kind == "embed":
            embed(profile, of["notebooks"], Path(rest[0]))
        elif kind == "train":
            train(profile, rest[0], Path(rest[1]))
        elif kind == "notebook":
            values = {"profile": of["profile"], "results": of["results"]} | of["parameters"]
            notebook(ROOT / "notebooks" / f"{what}.ipynb", Path(rest[1]), log, values)
        elif kind == "report":
            report(profile, folder, logs)
        else:
            html(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
