"""Write a trained model as a small file, with a card of what it is and what it scored.

    python scripts/release.py lcco/weights/lite.safetensors --profile shipped [--seed N]

Weights are stored in half precision. The card (`.md`, beside the file) holds scores that are
measured here with that very file, on the profile's test sets, beside its Baseline's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jinja2
from safetensors.torch import save_file

from lcco.backbones import read_about, read_tensors
from lcco.common import LCCoError, Missing, duration, file_digest
from lcco.config import Profile, load_profile
from lcco.experiment.runs import Run, get_run, load_tests, open_run
from lcco.experiment.variants import BASELINE
from lcco.store import atomic_path, write_text


def write_model(run: Run, out: Path) -> None:
    """A run's weights in half precision, with the description that `load_model` reads."""
    about, state = read_about(run.weights), read_tensors(run.weights)
    if run.experiment.model.weights not in (None, "imagenet", "package"):
        # Begun from a file of this machine: the whole backbone is brought along instead.
        backbone = run.predictor().model.backbone.state_dict()
        state |= {f"backbone.{k}": v for k, v in backbone.items()}
        about["experiment"]["model"] |= {"weights": None, "frozen_stages": 0}
        about["experiment"]["train"]["start"] = None  # what it saw stands in `trained_on`
    # Vectors (variances of the normalisation) may be too large for half precision, and are small.
    half = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in state.items()}
    with atomic_path(out) as part:
        save_file(half, part, {"lcco": json.dumps(about, sort_keys=True)})


def score_rows(released: Run, baseline: Run | None, profile: Profile) -> Iterator[str]:
    """Lines of the card's table, one a test set and protocol."""
    names = tuple(dict.fromkeys((*profile.tests, *profile.choice_tests)))
    for name, data in load_tests(profile, names).items():
        if isinstance(data, Missing):
            print(f"{name}: {data.status}", file=sys.stderr)
            continue
        protocols = [*profile.protocols] if name in profile.tests else []
        protocols += ["choice"] if name in profile.choice_tests else []
        how = data, protocols, profile.group_size
        found = [run.evaluate(*how) if run else {} for run in (released, baseline)]
        for protocol, ours in found[0].items():
            both = [e[protocol].summary if e else None for e in found]
            cells = [f"{100 * s[m]:.1f}" if s else "–" for s in both for m in "PJ"]
            count = ours.summary["images"]
            yield f"| {data.name} ({count}) | {protocol} | {' | '.join(cells)} |"


def release(out: Path, profile: Profile, seed: int) -> Path:
    """Train (or find) a profile's LCCo and Baseline, and write the model and its card.

    With `LCCO_TRAIN=no` a Baseline that is not there has no scores in the card.

    Raises: LCCoError for a test set with pictures that the model was trained on.
    """
    run = get_run(profile.experiment.replace(seed=seed))
    try:
        baseline = get_run(profile.experiment.replace(BASELINE, seed=seed))
    except Missing as missing:
        print(f"Baseline: {missing.status}", file=sys.stderr)
        baseline = None
    write_model(run, out)
    released = open_run(out)
    text = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(text)
    card = template.render(
        file=out.name, sha256=file_digest(out, 64), run=run.path.name, e=run.experiment,
        about=read_about(out), record=run.record, took=duration(run.record["seconds"]),
        rows=list(score_rows(released, baseline, profile)), group_size=profile.group_size,
    )  # fmt: skip
    write_text(out.with_suffix(".md"), card + "\n")
    return out.with_suffix(".md")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="where to write the model, a .safetensors")
    parser.add_argument("--profile", default="shipped", help="default: shipped")
    parser.add_argument("--seed", type=int, help="default: the profile's first")
    options = parser.parse_args()
    try:
        profile = load_profile(options.profile)
        seed = profile.seeds[0] if options.seed is None else options.seed
        print(release(options.out, profile, seed))
    except LCCoError as error:
        print(f"release: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
