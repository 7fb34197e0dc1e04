"""A segmenter over a data set under named protocols → per-image scores and averages; the choice and absent tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lcco.common import LCCoError, progress, write_json
from lcco.data import CoSegData, near_pairs
from lcco.metrics import Counts, Protocol, consecutive_groups, count, get_protocol, shuffled

# (data, items of one set, the class they are scored for — only "GT semantics" may look at it) → one map an item, in
# 0..1, [h, w] of any size. The same item may stand twice in a set (see `consecutive_groups`).
Segmenter = Callable[[CoSegData, list[int], str], Sequence[np.ndarray]]

CHOICE = {"choice": "native", "choice-ufo": "ufo"}  # the choice test's protocol names → size, threshold, void
LEAST = 0.01  # choice: an object counts from this share of the image on


@dataclass(frozen=True)
class Evaluation:
    """What one segmenter scored on one set under one protocol; shares in 0..1, None where no image counts.

    `rows` (by class, then key): see `Protocol.row`. `summary`: see `Protocol.summarise`, with `groups`, the sets run.
    """

    data: str
    digest: str  # of the data
    protocol: str
    group_size: int  # ignored by the protocols that take a whole class
    seed: int
    summary: dict[str, Any]
    rows: list[dict[str, Any]] = field(repr=False)

    def to_json(self, path: Path) -> None:
        """Write the evaluation, whole or not at all."""
        write_json(Path(path), asdict(self))

    @classmethod
    def from_json(cls, path: Path) -> Evaluation:
        """Read what `to_json` wrote. Raises: LCCoError naming a missing or damaged file."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise LCCoError(f"{path}: no such evaluation") from None
        except (ValueError, TypeError):
            raise LCCoError(f"{path}: damaged evaluation; delete it and evaluate again") from None


def evaluate(
    segment: Segmenter, data: CoSegData, protocol: str, group_size: int = 5, seed: int = 0, what: str = "evaluating"
) -> Evaluation:
    """Score a segmenter on every class of a set under one protocol (see `evaluate_all`)."""
    return evaluate_all(segment, data, [protocol], group_size, seed, what)[protocol]


def evaluate_all(
    segment: Segmenter,
    data: CoSegData,
    protocols: Sequence[str],
    group_size: int = 5,
    seed: int = 0,
    what: str = "evaluating",
) -> dict[str, Evaluation]:
    """Score a segmenter under several protocols at once, with one pass for those that share their groups.

    One truth is decoded once, and the truths of one class alone are held. The order of the listing does not count:
    the images of a class are sorted by key. `seed` draws the groups of `native`; `what` labels the progress.
    Raises: LCCoError for an unknown protocol, a set without images, a group size below 1, or maps that are no
    probabilities.
    """
    chosen = [get_protocol(name) for name in dict.fromkeys(protocols)]
    classes = _classes(data, group_size)
    kinds: dict[str, list[Protocol]] = {}
    for protocol in chosen:
        kinds.setdefault(protocol.grouping, []).append(protocol)
    plan = [
        (label, kind, members, new)
        for label, items in classes.items()
        for kind, sharing in kinds.items()
        for members, new in sharing[0].groups(items, group_size, seed, label)
    ]
    rows: dict[str, list[dict[str, Any]]] = {p.name: [] for p in chosen}
    truths = Truths(data)
    for label, kind, members, new in progress(plan, f"{what} {data.name}"):
        maps = _maps(segment, data, members, label)
        for i, values in list(zip(members, maps, strict=True))[:new]:
            for p in kinds[kind]:
                rows[p.name].append(p.row(data.keys[i], label, _score(p, values, truths(i, label))))
    groups = {kind: sum(k == kind for _, k, _, _ in plan) for kind in kinds}
    return {p.name: _evaluation(data, p, p.name, group_size, seed, rows[p.name], groups[p.grouping]) for p in chosen}


# ------------------------------------------------------------------------------------------------- does the set decide?
def evaluate_choice(
    segment: Segmenter, data: CoSegData, group_size: int = 5, seed: int = 0, what: str = "group choice"
) -> dict[str, Evaluation]:
    """Score pictures that hold two classes, each in a set of either class: only the set tells what is asked for.

    A picture counts when two classes cover at least 1% of it each (its two largest are taken): one image with two
    labels (VOC, COCO, GlyphWorld), or the same file in two classes' folders (PASCAL1037). Its `group_size` − 1 mates
    hold the wanted class, and not the other as long as there are such pictures; at least one must be, or the picture
    is skipped. All is drawn by `seed`.

    Returns: `choice` (native size, threshold 0.5) and `choice-ufo` (224 px, adaptive threshold). A row is one mask:
    beside `Protocol.row`, `other`, `leak` (J of that mask with the other class), `decides` (J > leak), `picture`,
    `mates`, `clean_mates`; and of the picture's two masks together `J_same` (what the better of them scores as the
    answer to both sets) and `agreement` (their IoU). The summary adds the means `leak`, `decides`, `J_same`,
    `agreement`, `gain` = J − J_same, and `pictures`, `skipped`, `clean_mates` (share). Whoever ignores the set gives
    one mask twice: agreement 1, gain 0, and J at most 0.5, because J(M, a) + J(M, b) ≤ 1 for disjoint a and b.
    Raises: LCCoError when no picture offers a choice.
    """
    if group_size < 2:
        raise LCCoError(f"the choice test needs sets of 2 or more, not {group_size}")
    holds, labels, truths = _pictures(data, _classes(data, group_size)), {}, Truths(data)
    for picture, items in holds.items():
        labels[picture] = frozenset(items).union(*(data.labels_of(i) for i in items.values()))
    plan: list[tuple[str, tuple[str, str], list[list[int]], list[int]]] = []
    skipped = 0
    for picture, items in holds.items():
        if len(items) < 2:
            continue
        areas = sorted(((-truths.area(i, c), c) for c, i in items.items()))[:2]
        if areas[1][0] > -LEAST:
            continue
        pair = (areas[0][1], areas[1][1])
        sets, clean = [], []
        for wanted, other in (pair, pair[::-1]):
            mates = shuffled([p for p in holds if wanted in holds[p] and p != picture], seed, f"{picture} {wanted}")
            mates = [p for p in mates if other not in labels[p]] + [p for p in mates if other in labels[p]]
            kept: list[str] = []
            for p in mates:  # a folder may hold images without its object
                if len(kept) < group_size - 1 and truths.area(holds[p][wanted], wanted):
                    kept.append(p)
            sets.append([items[wanted], *(holds[p][wanted] for p in kept)])
            clean.append(sum(other not in labels[p] for p in kept))
        if min(clean):
            plan.append((picture, pair, sets, clean))
        else:
            skipped += 1
    if not plan:
        raise LCCoError(f"data `{data.name}` offers no choice: no picture holds two classes that other pictures show")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in CHOICE}
    for picture, pair, sets, clean in progress(plan, f"{what} {data.name}"):
        maps = [_maps(segment, data, members, c)[0] for members, c in zip(sets, pair, strict=True)]
        truth = [truths(members[0], c) for members, c in zip(sets, pair, strict=True)]
        for name, base in CHOICE.items():
            p = get_protocol(base)
            ready = [p.truth(t) for t in truth]
            masks = [p.binarise(values, ready[0].shape) for values in maps]
            counts = [[count(m, t, p.ignore_void) for t in ready] for m in masks]  # mask of one set, truth of a class
            J = [[c.jaccard(p.empty) for c in line] for line in counts]
            same = max((line[0] + line[1]) / 2 for line in J)
            agreement = count(masks[0], masks[1]).jaccard("one")
            for n, wanted in enumerate(pair):
                rows[name].append(p.row(data.keys[sets[n][0]], wanted, counts[n][n]) | {
                    "other": pair[1 - n], "leak": J[n][1 - n], "decides": J[n][n] > J[n][1 - n], "picture": picture,
                    "mates": len(sets[n]) - 1, "clean_mates": clean[n], "J_same": same, "agreement": agreement,
                })  # fmt: skip
    out = {}
    for name, base in CHOICE.items():
        ev = _evaluation(data, get_protocol(base), name, group_size, seed, rows[name], 2 * len(plan))
        mean = {k: float(np.mean([r[k] for r in rows[name]])) for k in ("leak", "decides", "J_same", "agreement")}
        ev.summary.update(mean, gain=ev.summary["J_image"] - mean["J_same"], pictures=len(plan), skipped=skipped)
        ev.summary["clean_mates"] = sum(r["clean_mates"] for r in ev.rows) / sum(r["mates"] for r in ev.rows)
        out[name] = ev
    return out


# -------------------------------------------------------------------------------------------- images without the object
def evaluate_absent(
    segment: Segmenter,
    data: CoSegData,
    absent: Sequence[int] = (0, 1, 2, 3),
    group_size: int = 5,
    seed: int = 0,
    protocol: str = "native",
    what: str = "mixed sets",
) -> dict[int, Evaluation]:
    """Score mixed sets, in which k images of the set are intruders that lack the object, for each k in `absent`.

    The sets are the seeded groups of `native` among the images that show the class; for k = 1, 2, … ever more of
    their last members give way to intruders (the same ones, plus one), and the order is shuffled. An intruder comes
    from another class and no picture that holds the class, by label or as the same file in its folder, may be one;
    what a folder set does not label cannot be known. At least two images of a set keep the object, or there is
    nothing common: smaller sets are left out for that k.

    Returns: k → Evaluation with protocol `absent-k`, whose rows are the scored images and (`empty`) the intruders.
    The curve is summary `false_alarms` (share of the intruders with more than 1% predicted), `empty_area` (their
    mean predicted share) and `J_nonempty` (of the images with the object) over `absent` = k.
    Raises: LCCoError for a k that leaves fewer than two images, or a class that every picture holds.
    """
    if not absent or min(absent) < 0 or max(absent) > group_size - 2:
        raise LCCoError(f"absent {list(absent)}: a set of {group_size} can lack the object in 0 to {group_size - 2}")
    p, classes, truths = get_protocol(protocol), _classes(data, group_size), Truths(data)
    holds = _pictures(data, classes)
    plan: list[tuple[int, str, list[int], set[int]]] = []
    for label, items in classes.items():
        pool = [
            next(iter(own.values())) for own in holds.values()
            if label not in own and not any(label in data.labels_of(i) for i in own.values())
        ]  # fmt: skip
        if len(pool) < max(absent):
            raise LCCoError(f"data `{data.name}`: {len(pool)} pictures lack `{label}`, {max(absent)} are needed")
        showing = shuffled([i for i in items if truths.area(i, label)], seed, label)
        for n, (members, new) in enumerate(consecutive_groups(showing, group_size, repeat=False)):
            intruders = shuffled(pool, seed, f"{label} {n}")[: max(absent)]
            for k in sorted(set(absent)):
                if len(members) - k < 2:
                    continue
                mixed = members[: len(members) - k] + intruders[:k]
                scored = set(mixed[:new]) | set(intruders[:k])
                plan.append((k, label, shuffled(mixed, seed, f"{label} {n} {k}"), scored))
    if not plan:
        raise LCCoError(f"data `{data.name}`: no class has two images with its object beside {min(absent)} without")
    rows: dict[int, list[dict[str, Any]]] = {k: [] for k in sorted(set(absent))}
    for k, label, members, scored in progress(plan, f"{what} {data.name}"):
        for i, values in zip(members, _maps(segment, data, members, label), strict=True):
            if i in scored:
                rows[k].append(p.row(data.keys[i], label, _score(p, values, truths(i, label))))
    out = {}
    for k, own in rows.items():
        sets = sum(entry[0] == k for entry in plan)
        out[k] = _evaluation(data, p, f"absent-{k}", group_size, seed, own, sets)
        out[k].summary.update(absent=k, share=k / group_size)
    return out


# -------------------------------------------------------------------------------------------- pictures seen in training
def refuse_overlap(training: CoSegData | Collection[int], test: CoSegData, allow_overlap: bool = False) -> int:
    """Count the test images that training has seen (by picture), print it, and refuse a test that holds any.

    training: the set, or the `hashes()` of it that a run recorded. Returns: the number of test images seen.
    Raises: LCCoError with the count, unless `allow_overlap`.
    """
    hashes = training.hashes() if isinstance(training, CoSegData) else list(training)
    seen = len({j for _, j in near_pairs(hashes, test.hashes())}) if hashes and len(test) else 0
    print(f"{test.name}: {seen} of {len(test)} images are in the training data", file=sys.stderr, flush=True)
    if seen and not allow_overlap:
        raise LCCoError(
            f"data `{test.name}`: the model was trained on {seen} of its {len(test)} images; "
            "test on other pictures, or give --allow-overlap"
        )
    return seen


# --------------------------------------------------------------------------------------------------------------- inside
class Truths:
    """The truths of one class at a time, each decoded once while its class lasts, and every area seen so far."""

    def __init__(self, data: CoSegData) -> None:
        self.data, self.label = data, ""
        self.held: dict[int, np.ndarray] = {}
        self.areas: dict[tuple[int, str], float] = {}

    def __call__(self, i: int, label: str) -> np.ndarray:
        """uint8 [H, W] of 0, 1, 255: the truth of item i for a class."""
        if label != self.label:
            self.label, self.held = label, {}
        if i not in self.held:
            self.held[i] = self.data.mask(i, [label])
        return self.held[i]

    def area(self, i: int, label: str) -> float:
        """The share of item i that the class covers."""
        if (i, label) not in self.areas:
            self.areas[i, label] = float(np.mean(self.data.mask(i, [label]) == 1))
        return self.areas[i, label]


def _classes(data: CoSegData, group_size: int) -> dict[str, list[int]]:
    """The classes by name, each with its items sorted by key."""
    if group_size < 1:
        raise LCCoError(f"a group needs at least 1 image, not {group_size}")
    classes = {c: sorted(data.groups[c], key=data.keys.__getitem__) for c in sorted(data.groups) if data.groups[c]}
    if not classes:
        raise LCCoError(f"data `{data.name}` has no images to evaluate")
    return classes


def _pictures(data: CoSegData, classes: dict[str, list[int]]) -> dict[str, dict[str, int]]:
    """Picture (its content hash) → class → the item that shows the picture as that class, in order of first key."""
    data.digest()  # hashes all files at once, in threads
    holds: dict[str, dict[str, int]] = {}
    for i, label in sorted(((i, c) for c, items in classes.items() for i in items), key=lambda x: data.keys[x[0]]):
        holds.setdefault(data.content(i), {}).setdefault(label, i)
    return holds


def _maps(segment: Segmenter, data: CoSegData, members: list[int], label: str) -> list[np.ndarray]:
    """Ask the segmenter; what is not one map of probabilities an image must not become a score."""
    maps = [np.asarray(m, np.float32) for m in segment(data, list(members), label)]
    if len(maps) != len(members) or any(m.ndim != 2 for m in maps):
        raise LCCoError(f"{data.keys[members[0]]}: the segmenter must give one [h, w] map for each of {len(members)}")
    for i, m in zip(members, maps, strict=True):
        low, high = m.min(), m.max()  # NaN passes neither comparison
        if not (low >= -1e-4 and high <= 1 + 1e-4):
            raise LCCoError(f"{data.keys[i]}: the segmenter's map runs from {low} to {high}, not within 0..1")
    return maps


def _score(p: Protocol, values: np.ndarray, truth: np.ndarray) -> Counts:
    ready = p.truth(truth)
    return count(p.binarise(values, ready.shape), ready, p.ignore_void)


def _evaluation(
    data: CoSegData, p: Protocol, name: str, group_size: int, seed: int, rows: list[dict[str, Any]], groups: int
) -> Evaluation:
    rows = sorted(rows, key=lambda r: (r["class"], r["key"]))
    return Evaluation(data.name, data.digest(), name, group_size, seed, p.summarise(rows) | {"groups": groups}, rows)
