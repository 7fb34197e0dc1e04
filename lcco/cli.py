"""The command `lcco`: data check, train, evaluate, cosegment, bench. Heavy imports are inside."""

import contextlib
import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

import lcco
from lcco.common import LCCoError, duration, one_line

plain: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}
plain |= {"add_completion": False, "pretty_exceptions_enable": False}
app = typer.Typer(help="LCCo: lending CLIP to co-segmentation.", **plain)
data_app = typer.Typer(help="Check a data folder.", **plain)
app.add_typer(data_app, name="data")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on stderr and exit 2, an interruption 130."""
    for stream in (sys.stdout, sys.stderr):  # not every terminal can print every file name
        stream.reconfigure(errors="backslashreplace")
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        # Freed memory is kept, in one arena: giving it back to ask anew is a quarter of the time.
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(-3, 2**30):  # M_MMAP_THRESHOLD; an old glibc refuses
            mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
            mallopt(-8, 1)  # M_ARENA_MAX
    code = 2
    try:
        typer.main.get_command(app).main(argv, "lcco")
    except SystemExit as end:
        if end.code != 130:
            return end.code
        code, said = 130, "interrupted; give the same command again and it goes on"
    except (LCCoError, OSError) as error:
        said = str(error) or type(error).__name__
    print(f"lcco: {one_line(said)}", file=sys.stderr)
    return code


@app.callback(invoke_without_command=True)
def _lcco(version: Annotated[bool, Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"lcco {lcco.__version__}")
        raise typer.Exit


@data_app.command("check")
def data_check(
    folder: Annotated[Path, Argument(help="A data set's folder, in any of the known layouts.")],
    training: Annotated[list[str] | None, Option(
        metavar="NAME", help="A training set that must not share pictures; repeatable.")] = None,
) -> None:  # fmt: skip
    """Recognise a data folder, count it, and list everything wrong in it."""
    from lcco.data import check, load_data

    found = check(folder, load_data(training) if training else None)
    print(found.to_markdown(index=False))
    ok = found.attrs["ok"]
    print("nothing wrong" if ok else "something is wrong: see the table", file=sys.stderr)
    raise typer.Exit(not ok)


@app.command()
def train(
    profile: Annotated[str, Option(metavar="P", help="A profile's name or file.")] = "embedded",
    settings: Annotated[list[str] | None, Option(
        "--set", metavar="KEY=VALUE", help="For example model.k=3; may be repeated.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Say size and time; train nothing.")] = False,
) -> None:  # fmt: skip
    """Train the experiment of a profile; an interrupted training goes on."""
    from lcco.config import from_text, load_profile
    from lcco.experiment.runs import estimate, get_run

    pairs = [(text, *text.partition("=")) for text in settings or ()]
    if wrong := [text for text, _, equals, _ in pairs if not equals]:
        raise LCCoError(f"--set {wrong[0]}: must be key=value")
    changes = {key: from_text(value) for _, key, _, value in pairs}
    experiment = load_profile(profile).experiment.replace(changes)
    if dry_run:
        print("\n".join(f"{key}: {value}" for key, value in estimate(experiment).items()))
    else:
        run = get_run(experiment)
        print(f"{run.path} ({duration(run.record['seconds'])})")


@app.command()
def evaluate(
    run: Annotated[str, Argument(help="A run's folder or name, a model file, or `shipped`.")],
    data: Annotated[str, Option(metavar="NAME", help="A known set (msrc7, …) or a folder.")],
    protocol: Annotated[str, Option(
        metavar="A,B", help="How it is scored; choice: the group-choice test.")] = "ufo,native",
    group_size: Annotated[int, Option(min=1, metavar="N", help="Pictures a set.")] = 5,
    allow_overlap: Annotated[bool, Option(
        "--allow-overlap", help="Score pictures it was trained on.")] = False,
) -> None:  # fmt: skip
    """Score a trained model on a data set under named protocols."""
    import pandas as pd

    from lcco.data import load_data
    from lcco.experiment.runs import open_run
    from lcco.experiment.tables import scores

    protocols = [p.strip() for p in protocol.split(",")]
    model, test = open_run(run), load_data(data)
    found = model.evaluate(test, protocols, group_size, allow_overlap=allow_overlap)
    with contextlib.suppress(LCCoError):  # with --allow-overlap its training set may be gone
        what = f"{model.overlap(test)} of {len(test)} pictures are in the training data"
        print(f"{test.name}: {what}", file=sys.stderr)
    rows = [{"data": e.data, "protocol": name, "set size": e.group_size} | scores(e.summary)
            for name, e in found.items()]  # fmt: skip
    print(pd.DataFrame(rows).dropna(axis=1, how="all").to_markdown(index=False, floatfmt=".1f"))


@app.command()
def cosegment(
    out: Annotated[Path, Option(metavar="DIR", help="For masks, cut-outs, overlays, a gallery.")],
    sources: Annotated[list[str] | None, Argument(
        help="Folders (a set each), files (one set together), globs.")] = None,
    recursive: Annotated[bool, Option("--recursive", help="Folders inside are sets too.")] = False,
    manifest: Annotated[Path | None, Option(
        metavar="FILE", help='A set a line: {"name": …, "images": […]}.')] = None,
    background: Annotated[str | None, Option(
        metavar="white|blur|FILE", help="Behind the cut-outs; else transparent.")] = None,
    cls: Annotated[str | None, Option("--class", metavar="NAME",
        help="What to look for; a picture where it is improbable gets no mask.")] = None,
    weights: Annotated[str | None, Option(metavar="FILE|RUN", help="Another model.")] = None,
    threshold: Annotated[float, Option(metavar="T", help="0 to 1; lower: larger masks.")] = 0.5,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace lcco's results there.")] = False,
    keep_all: Annotated[bool, Option("--keep-all", help="Keep masks of what lacks it.")] = False,
) -> None:  # fmt: skip
    """Find what photos have in common, and cut it out of each."""
    settings = locals()  # its options are those of the function
    from lcco.cosegmentation import cosegment_folder

    records = cosegment_folder(settings.pop("sources") or (), **settings)
    raise typer.Exit(any(image["error"] for record in records for image in record["images"]))


@app.command()
def bench(
    profile: Annotated[str, Option(metavar="P", help="A profile's name or file.")] = "embedded",
    repeats: Annotated[int, Option(min=1, metavar="N", help="Times that each is measured.")] = 5,
) -> None:
    """Time LCCo, its Baseline and its parts on this machine."""
    from lcco.config import load_profile
    from lcco.experiment.bench import bench as measure
    from lcco.experiment.tables import label
    rows = measure(load_profile(profile), repeats).rename(columns=label)
    shown = ["row", "test_set", "device", "threads", "parameters", "flops", "seconds", "ratio"]
    print(rows[list(map(label, shown))].to_markdown(index=False, floatfmt=".3f"))
