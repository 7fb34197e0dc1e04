"""The command `lcco`: data, train, evaluate, cosegment, reproduce, bench. Heavy rooms load only for what they serve."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcco import __version__
from lcco.common import LCCoError, duration, one_line
from lcco.config import Experiment, profile_names


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on stderr and exit code 2, an interruption 130."""
    args = _parser().parse_args(argv)
    if getattr(args, "data_root", None):
        os.environ["LCCO_DATA"] = str(Path(args.data_root).expanduser().resolve())
    try:
        return args.run(args) or 0
    except LCCoError as error:
        print(f"lcco: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        said = [error.filename, error.strerror] if error.strerror else [str(error) or type(error).__name__]
        print(f"lcco: {': '.join(one_line(word) for word in said if word)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lcco: interrupted; give the same command again and it goes on where it stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lcco", description="LCCo: lending CLIP to co-segmentation.")
    parser.add_argument("--version", action="version", version=f"lcco {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Any, about: str, within: Any = None) -> argparse.ArgumentParser:
        sub = (within or commands).add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        return sub

    a_profile = "a profile's name or YAML file"
    data_root = {"metavar": "DIR", "help": "the folder above the data sets (default: $LCCO_DATA)"}
    group = commands.add_parser("data", help="check a data folder").add_subparsers(required=True, metavar="what")
    sub = command("check", _data_check, "Recognise a data folder, count it, and list everything wrong in it.", group)
    sub.add_argument("folder", metavar="DIR", help="a data set's folder, in any of the layouts that are known")
    sub.add_argument("--training", metavar="SPEC", help="a training set: its pictures must not be in the folder")
    sub.add_argument("--data-root", **data_root)

    sub = command("train", _train, "Train the experiment of a profile; an interrupted training goes on.")
    sub.add_argument("--profile", default="embedded", metavar="P", help=f"{a_profile} (default: embedded)")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. model.k=3, seed=1")
    sub.add_argument("--dry-run", action="store_true", help="say what would run, its size and time; train nothing")
    sub.add_argument("--tensorboard", action="store_true", help="log for TensorBoard as well, in the run's folder")
    sub.add_argument("--close", action="store_true", help="take an interrupted training as it stands")
    sub.add_argument("--data-root", **data_root)

    sub = command("evaluate", _evaluate, "Score a trained run on a data set under named protocols.")
    sub.add_argument("name", metavar="RUN", help="a run's folder, or the start of its name in runs/")
    sub.add_argument("--data", required=True, metavar="SPEC", help="a known set (msrc7, …) or a folder")
    sub.add_argument("--protocol", default="ufo,native", metavar="A,B",
                     help="how masks are scored, or choice, choice-ufo: the group-choice test (default: ufo,native)")
    sub.add_argument("--group-size", type=int, default=5, metavar="N", help="pictures a set (default: 5)")
    sub.add_argument("--allow-overlap", action="store_true", help="score pictures that the model was trained on")
    sub.add_argument("--data-root", **data_root)

    sub = command("cosegment", _cosegment, "Find what a folder of photos has in common, and cut it out of each.")
    sub.add_argument("folder", metavar="FOLDER", help="the photos; folders in it are left alone")
    sub.add_argument("--out", required=True, metavar="DIR", help="for masks, overlays, a contact sheet and result.json")
    sub.add_argument("--words", metavar="FILE_OR_NAME",
                     help="what it may be: words of the model's vocabulary, one a line")  # fmt: skip
    sub.add_argument("--class", dest="cls", metavar="NAME", help="say what to look for instead of finding it")
    sub.add_argument("--weights", metavar="FILE_OR_RUN", help="a model file or a trained run, not the shipped one")
    sub.add_argument("--threshold", type=float, default=0.5, metavar="T", help="on the probabilities (default: 0.5)")

    sub = command("reproduce", _reproduce, "Run the paper's notebooks; tables, figures and a report in results/.")
    sub.add_argument("--profile", default="embedded", metavar="P",
                     help=f"{', '.join(profile_names())}, or a YAML file (default: embedded)")
    sub.add_argument("--only", default="", metavar="01,02", help="these notebooks alone")
    sub.add_argument("--results", metavar="DIR", help="instead of results/<profile>")
    sub.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE",
                     help="a notebook parameter, e.g. -p seeds=[0]")  # fmt: skip
    sub.add_argument("--data-root", **data_root)

    sub = command("release", _release, "Write a profile's LCCo as a small file with a card of what it scored.")
    sub.add_argument("out", metavar="FILE.safetensors", help="where to write the model; its card goes beside it (.md)")
    sub.add_argument("--profile", default="shipped", metavar="P", help=f"{a_profile} (default: shipped)")
    sub.add_argument("--seed", type=int, metavar="N", help="the run of this seed (default: the profile's first)")
    sub.add_argument("--data-root", **data_root)

    sub = command("bench", _bench, "Time LCCo and its Baseline on this machine: size, a training step, the whole run.")
    sub.add_argument("--profile", default="embedded", metavar="P", help=f"{a_profile} (default: embedded)")
    sub.add_argument("--data-root", **data_root)
    return parser


def _pairs(texts: Sequence[str], option: str) -> dict[str, Any]:
    """`KEY=VALUE` texts as a mapping; a value is read as YAML, so `[1, 5]`, `true` and `null` mean what they say."""
    import yaml

    out = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise LCCoError(f"{option} {text}: must be name=value")
        try:
            out[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise LCCoError(f"{option} {text}: the value is not valid YAML; put quotes around it") from None
    return out


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _data_check(args: argparse.Namespace) -> int:
    from lcco.data import check, load_data

    if Path(args.folder).is_file():
        raise LCCoError(f"{args.folder}: is a file, not a folder; give the folder of a data set")
    found = check(args.folder, load_data(args.training) if args.training else None)
    print(found.to_markdown(index=False))
    print("nothing wrong" if found.attrs["ok"] else "something is wrong: see the table", file=sys.stderr)
    return 0 if found.attrs["ok"] else 1


def _train(args: argparse.Namespace) -> None:
    from lcco.config import load_profile

    experiment = load_profile(args.profile).experiment.replace(_pairs(args.set, "--set"))
    from lcco.runs import close_run, estimate, get_run

    if not args.close:
        _say_what_chooses(experiment)
    if args.dry_run:
        for key, value in estimate(experiment).items():
            print(f"{key}: {value}")
        return
    if args.close:
        run = close_run(experiment)
        print(f"{run.path}: {run.record['note']}")
        return
    run = get_run(experiment, tensorboard=args.tensorboard)
    print(f"{run.path} ({duration(run.record['seconds']) if 'seconds' in run.record else run.record['note']})")


def _say_what_chooses(experiment: Experiment) -> None:
    data = experiment.data
    trained = {name.strip() for spec in data.train for name in spec.split("+")}
    both = [name for spec in data.holdout for name in map(str.strip, spec.split("+")) if name in trained]
    if both and experiment.train.checkpoint == "best":
        what = "the checkpoint is chosen on pictures that it trains on"
        print(f"`data.holdout` names {', '.join(both)}, as `data.train` does: {what}", file=sys.stderr)


def _evaluate(args: argparse.Namespace) -> None:
    from tabulate import tabulate

    from lcco.data import load_data
    from lcco.evaluate import CHOICE
    from lcco.metrics import PROTOCOLS
    from lcco.runs import open_run
    from lcco.tables import per_cent

    protocols = _words(args.protocol)
    known = ", ".join((*PROTOCOLS, *CHOICE))
    if not protocols:
        raise LCCoError(f"--protocol {args.protocol!r}: names none; there are: {known}")
    for name in protocols:
        if name not in PROTOCOLS and name not in CHOICE:
            raise LCCoError(f"no protocol `{name}`; there are: {known}")
    if args.group_size < 1:
        raise LCCoError(f"--group-size {args.group_size}: must be 1 or more")
    run, data = open_run(args.name), load_data(args.data)
    seen = run.overlap(data)
    if not seen or args.allow_overlap:  # else the refusal says it
        print(f"{data.name}: {seen} of {len(data)} pictures are in the training data", file=sys.stderr)
    found = run.evaluate(data, protocols, args.group_size, allow_overlap=args.allow_overlap)
    rows = [{"data": e.data, "protocol": p, "set size": e.group_size, **per_cent(e.summary)} for p, e in found.items()]
    print(tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".1f"))


def _cosegment(args: argparse.Namespace) -> int:
    from lcco.predict import cosegment_folder

    report = cosegment_folder(
        args.folder, args.out, weights=args.weights, words=args.words, cls=args.cls, threshold=args.threshold
    )
    return 1 if report.failed else 0


def _reproduce(args: argparse.Namespace) -> None:
    from lcco.reproduce import reproduce

    parameters = _pairs(args.parameters, "-p")
    for name in ("profile", "results", "data_root"):
        if name in parameters:
            raise LCCoError(f"-p {name}: give it as --{name.replace('_', '-')}")
    reproduce(args.profile, _words(args.only), results=args.results, parameters=parameters)


def _release(args: argparse.Namespace) -> None:
    from lcco.config import load_profile
    from lcco.runs import get_run, release
    from lcco.tables import main_variants

    profile = load_profile(args.profile)
    seed = profile.seeds[0] if args.seed is None else args.seed
    ours, theirs = (
        get_run(profile.experiment.replace(dict(v.changes), seed=seed)) for v in main_variants(profile)
    )
    print(release(ours, Path(args.out), profile.tests, theirs, profile.choice_test))


def _bench(args: argparse.Namespace) -> None:
    from tabulate import tabulate

    from lcco.config import load_profile
    from lcco.runs import estimate
    from lcco.tables import main_variants

    profile = load_profile(args.profile)
    rows = [{"": v.row, **estimate(profile.experiment.replace(dict(v.changes)))} for v in main_variants(profile)]
    print(tabulate([[k, *(r[k] for r in rows)] for k in rows[0]], headers="firstrow", tablefmt="pipe"))
