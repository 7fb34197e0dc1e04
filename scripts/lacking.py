"""Measure `cosegment` where a picture lacks the object, nothing is shared, or two things are.

    python scripts/lacking.py [--data voc_val] [--sets 100] [--size 5] [--seed 0] [--weights FILE]

Prints, with the second look and without it (`keep_all`), asked for the class or not: how many of
the pictures without the object get a mask (false alarms), the mean J of those that have it, and how
many of these get no mask; then of how many sets it is said that they share no clear object; then,
on single pictures that hold two classes, the mean J of each of the two, asked for it or not. This
is what the thresholds COMMON, LACKS and LACKS_CLASS of `lcco.cosegmentation` and the setting
`data.given` are judged by.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import numpy as np
import pandas as pd

from lcco.common import LCCoError, progress
from lcco.cosegmentation import COMMON, EMPTY, cosegment, load_segmenter
from lcco.data import CoSegData, load_data
from lcco.experiment.evaluate import LEAST
from lcco.metrics import count


def mixed_sets(data: CoSegData, sets: int, size: int, seed: int) -> Iterator[tuple[str, list[int]]]:
    """A class and `size` items in turn: all but the last show it, the last has no pixel of it."""
    rng = np.random.default_rng(seed)
    classes = [c for c, items in data.groups.items() if len(items) >= size]
    for n in range(sets):
        c = classes[n % len(classes)]
        lacking = [i for i in range(len(data)) if data.knows_all(i) and c not in data.labels_of(i)]
        chosen = rng.choice(data.groups[c], size - 1, replace=False).tolist()
        yield c, [*chosen, int(rng.choice(lacking))]


def strangers(data: CoSegData, sets: int, size: int, seed: int) -> Iterator[list[int]]:
    """`size` items that have no class in common, two and two."""
    rng = np.random.default_rng((seed, 1))
    for _ in range(sets):
        chosen, taken = [], set()
        for i in rng.permutation(len(data)).tolist():
            if not taken & data.labels_of(i):
                chosen.append(i)
                taken |= data.labels_of(i)
        yield chosen[:size]


def measure(data: CoSegData, sets: int, size: int, seed: int, weights: str | None) -> pd.DataFrame:
    """A row for each way to call `cosegment`: false alarms and J, in percent and points."""
    model, rows = load_segmenter(weights), []
    mixed = list(mixed_sets(data, sets, size, seed))
    for c, items in progress(mixed, "sets with a stranger", len(mixed)):
        for asked in (None, c):
            for second_look in (False, True):
                how = {"weights": model, "cls": asked, "keep_all": not second_look}
                results = cosegment([data.image(i) for i in items], **how)
                *masks, alarm = [r.mask & (r.mask.mean() >= EMPTY) for r in results]
                truths = [data.mask(i, [c]) for i in items[:-1]]
                J = [count(m, t).jaccard("one") for m, t in zip(masks, truths, strict=True)]
                none = np.mean([not m.any() for m in masks])
                rows.append((asked is not None, second_look, alarm.any(), np.mean(J), none))
    names = ["class given", "second look", "false alarms", "J of the others", "without a mask"]
    return (100 * pd.DataFrame(rows, columns=names).groupby(names[:2]).mean()).round(1)


def shares(data: CoSegData, sets: int, size: int, seed: int, weights: str | None) -> pd.Series:
    """Of how many sets it is said that they share no clear object, in percent."""
    model, found = load_segmenter(weights), {}
    real = [items for _, items in mixed_sets(data, sets, size + 1, seed)]
    kinds = {
        "sets of one class": [items[:-1] for items in real],
        "sets that share nothing": list(strangers(data, sets, size, seed)),
    }
    for kind, groups in kinds.items():
        said = []
        for items in progress(groups, kind, len(groups)):
            results = cosegment([data.image(i) for i in items], weights=model, keep_all=True)
            said.append(np.mean([r.agreement for r in results]) < COMMON)
        found[kind] = round(100 * float(np.mean(said)), 1)
    return pd.Series(found)


def within(data: CoSegData, sets: int, size: int, seed: int, weights: str | None) -> pd.Series:
    """Mean J of two objects of one picture, each asked for or not; `sets` pictures."""
    model, rows = load_segmenter(weights), []
    shown = [{c for c in data.classes_of(i) if (data.mask(i, [c]) == 1).mean() >= LEAST}
             for i in range(len(data))]  # fmt: skip
    pictures = [i for i, classes in enumerate(shown) if len(classes) == 2]
    rng = np.random.default_rng((seed, 2))
    for i in progress(rng.permutation(pictures)[:sets].tolist(), "pictures of two classes"):
        (free,) = cosegment(data.image(i), weights=model)
        for c in sorted(shown[i]):
            (asked,) = cosegment(data.image(i), weights=model, cls=c, keep_all=True)
            truth = data.mask(i, [c])
            rows.append([count(r.mask, truth).jaccard("one") for r in (asked, free)])
    return (100 * pd.DataFrame(rows, columns=["asked for", "not asked for"]).mean()).round(1)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="voc_val", help="a set that knows all classes")
    parser.add_argument("--sets", type=int, default=100)
    parser.add_argument("--size", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", help="default: the shipped model")
    options = vars(parser.parse_args())
    try:
        options["data"] = load_data(options["data"])
        print(measure(**options).to_string())
        print("\nsaid to share no clear object, %:")
        print(shares(**options).to_string())
        print("\nJ of each of two objects in one picture:")
        print(within(**options).to_string())
    except LCCoError as error:
        print(f"lacking: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
