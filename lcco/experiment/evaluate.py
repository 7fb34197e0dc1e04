"""A segmenter on a data set: scores under the named protocols, the choice test and mixed sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice, product
from typing import Any, NamedTuple

import numpy as np

from lcco.common import LCCoError, progress
from lcco.data.sets import CoSegData
from lcco.metrics import Protocol, consecutive_groups, count, get_protocol, shuffled

# (data, items of one set, the class they are scored for, which only "GT semantics" may look at)
# → one map an item in 0..1, [h, w] of any size. An item may stand twice in a set.
Segmenter = Callable[[CoSegData, list[int], str], Sequence[np.ndarray]]
CHOICE = {"choice": "native", "choice-ufo": "ufo"}  # the choice test's size, threshold and void
LEAST = 0.01  # choice: an object counts from this share of the image on


@dataclass(frozen=True)
class Evaluation:
    """What one segmenter scored on one set under one protocol; shares in 0..1, None if no image."""

    data: str
    digest: str  # of the data
    protocol: str
    group_size: int  # ignored by the protocols that take a whole class
    seed: int
    summary: dict[str, Any]  # `Protocol.summarise`, and `groups`, the sets that ran
    rows: list[dict[str, Any]] = field(repr=False)  # `Protocol.row`, by class, then key


def evaluate_all(segment: Segmenter, data: CoSegData, protocols: Sequence[str],
                 group_size: int = 5, seed: int = 0) -> dict[str, Evaluation]:  # fmt: skip
    """Score a segmenter under several protocols, with one pass for those that share their groups.

    Images are taken by key; `seed` draws the groups of `native`. Raises: LCCoError for an unknown
    protocol, a set without images, or maps that are not in 0..1.
    """
    scorer = _Scorer(segment, data, group_size, seed)
    chosen = {name: get_protocol(name) for name in protocols}
    sets, kinds = [], dict.fromkeys(p.grouping for p in chosen.values())
    for label, items in scorer.classes.items():
        for kind in kinds:
            names = [name for name, p in chosen.items() if p.grouping == kind]
            groups = chosen[names[0]].groups(items, group_size, seed, label)
            sets += [_Set(label, members, range(new), names) for members, new in groups]
    return scorer.score(sets, chosen)


def evaluate_choice(segment: Segmenter, data: CoSegData, group_size: int = 5,
                    seed: int = 0) -> dict[str, Evaluation]:  # fmt: skip
    """Score pictures that hold two classes, each in a set of either class: does the set decide?

    A picture counts when two classes cover 1% of it each (its two largest are taken), by its labels
    or as it stands in two classes' folders. Its mates, drawn by `seed`, show the wanted class, and
    not the other while there are such pictures; with none of those the picture is skipped.

    Returns: `choice` (native size, threshold 0.5) and `choice-ufo` (224 px, adaptive threshold). A
    row is one mask: beside `Protocol.row`, `other`, `leak` (its J with the other class), `decides`
    (J > leak) and `picture`; and of the picture's two masks `J_same` (what the better one scores as
    the answer to both sets) and `agreement` (their IoU). The summary has their means, `gain` = J −
    J_same, `pictures`, `skipped`, `clean_mates` (share). A model that ignores the set has agreement
    1, gain 0, and J at most 0.5. Raises: LCCoError when no picture offers a choice.
    """
    if group_size < 2:
        raise LCCoError(f"the choice test needs sets of 2 or more, not {group_size}")
    plan, skipped = (scorer := _Scorer(segment, data, group_size, seed)).choices()
    if not plan:
        raise LCCoError(f"data `{data.name}` has no picture of two classes that others show")
    protocols = {name: get_protocol(base) for name, base in CHOICE.items()}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in CHOICE}
    for one in progress(plan, f"choice test on {data.name}"):
        maps = [scorer.maps(s, c)[0] for s, c in zip(one.sets, one.pair, strict=True)]
        for name, p in protocols.items():
            rows[name] += scorer.choice_rows(p, one, maps)
    clean = sum(sum(one.clean) for one in plan) / sum(len(s) - 1 for one in plan for s in one.sets)
    out = {n: scorer.evaluation(n, p, rows[n], 2 * len(plan)) for n, p in protocols.items()}
    for summary, own in ((e.summary, e.rows) for e in out.values()):
        for key in ("leak", "decides", "J_same", "agreement"):
            summary[key] = float(np.mean([row[key] for row in own]))
        summary |= {"pictures": len(plan), "skipped": skipped, "clean_mates": clean}
        summary["gain"] = summary["J_image"] - summary["J_same"]
    return out


def evaluate_absent(segment: Segmenter, data: CoSegData, absent: Sequence[int] = (0, 1, 2, 3),
                    group_size: int = 5, seed: int = 0,
                    protocol: str = "native") -> dict[int, Evaluation]:  # fmt: skip
    """Score mixed sets, in which k images are intruders that lack the object, for k in `absent`.

    The sets are the seeded groups of `native` among the images that show the class; the last k give
    way to intruders (for k + 1 the same ones, plus one), and the order is shuffled. No label and no
    folder says that an intruder holds the class. Sets of fewer than two others are left out.

    Returns: k → Evaluation `absent-k`, whose rows are the scored images and (`empty`) intruders.
    Raises: LCCoError for a k that leaves no two images, or a class that too few pictures lack.
    """
    if not absent or min(absent) < 0 or max(absent) > group_size - 2:
        raise LCCoError(f"absent {list(absent)}: must be 0 to {group_size - 2} of {group_size}")
    scorer, ks = _Scorer(segment, data, group_size, seed), sorted(set(absent))
    sets = scorer.mixed_sets(ks)
    if not sets:
        raise LCCoError(f"data `{data.name}`: no class has sets of two beside {ks[0]} intruders")
    found = scorer.score(sets, {f"absent-{k}": get_protocol(protocol) for k in ks})
    for k in ks:
        found[f"absent-{k}"].summary.update(absent=k, share=k / group_size)
    return {k: found[f"absent-{k}"] for k in ks}


class _Set(NamedTuple):
    label: str
    members: list[int]
    scored: Sequence[int]  # positions in `members`
    names: Sequence[str]  # of the evaluations that take them


class _Choice(NamedTuple):
    picture: str
    pair: tuple[str, str]
    sets: list[list[int]]  # one that asks for each class of the pair; the picture's item first
    clean: list[int]  # how many mates of each set do not show the other class


class _Scorer:
    """A segmenter and a set; `classes` by name, each with its items sorted by key."""

    def __init__(self, segment: Segmenter, data: CoSegData, group_size: int, seed: int) -> None:
        if group_size < 1:
            raise LCCoError(f"a group needs at least 1 image, not {group_size}")
        self.segment, self.data, self.group_size, self.seed = segment, data, group_size, seed
        own, key = data.groups, data.keys.__getitem__
        self.classes = {c: sorted(own[c], key=key) for c in sorted(own) if own[c]}
        if not self.classes:
            raise LCCoError(f"data `{data.name}` has no images to evaluate")
        self.truth = lru_cache(512)(lambda i, label: data.mask(i, [label]))
        self.area = lambda i, label: float(np.mean(self.truth(i, label) == 1))
        self.grey = lru_cache(512)(data.grey_truth)

    def maps(self, members: list[int], label: str) -> list[np.ndarray]:
        """The segmenter's maps; what is not one map of probabilities an image is refused."""
        maps = [np.asarray(m, np.float32) for m in self.segment(self.data, list(members), label)]
        keys = [self.data.keys[i] for i in members]
        if len(maps) != len(keys) or any(m.ndim != 2 for m in maps):
            raise LCCoError(f"{keys[0]}: the segmenter must give one [h, w] map an image")
        for key, m in zip(keys, maps, strict=True):
            if not (m.min() >= -1e-4 and m.max() <= 1 + 1e-4):  # NaN passes neither comparison
                raise LCCoError(f"{key}: the segmenter's map has {m.min()} to {m.max()}, not 0..1")
        return maps

    def score(self, sets: list[_Set], protocols: Mapping[str, Protocol]) -> dict[str, Evaluation]:
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in protocols}
        for one in progress(sets, f"scoring {self.data.name}"):
            maps = self.maps(one.members, one.label)
            for at, name in product(one.scored, one.names):
                i, p = one.members[at], protocols[name]
                ready = p.truth(self.truth(i, one.label), self.grey(i))
                counts = count(p.binarise(maps[at], ready.shape), ready, p.ignore_void)
                rows[name].append(p.row(self.data.keys[i], one.label, counts))
        ran = {name: sum(name in one.names for one in sets) for name in protocols}
        return {n: self.evaluation(n, p, rows[n], ran[n]) for n, p in protocols.items()}

    def evaluation(self, name: str, p: Protocol, rows: list[dict], sets: int) -> Evaluation:
        rows = sorted(rows, key=lambda r: (r["class"], r["key"]))
        about = self.data.name, self.data.digest(), name, self.group_size, self.seed
        return Evaluation(*about, p.summarise(rows) | {"groups": sets}, rows)

    def pictures(self) -> tuple[dict[str, dict[str, int]], dict[str, set[str]]]:
        """Picture (content hash) → class → the item that shows it as that class; and its labels."""
        self.data.digest()  # hashes all files at once, in threads
        holds: dict[str, dict[str, int]] = {}
        pairs = [(i, c) for c, items in self.classes.items() for i in items]
        for i, label in sorted(pairs, key=lambda pair: self.data.keys[pair[0]]):
            holds.setdefault(self.data.content(i), {}).setdefault(label, i)
        labels = {p: set(o).union(*map(self.data.labels_of, o.values())) for p, o in holds.items()}
        return holds, labels

    def choices(self) -> tuple[list[_Choice], int]:
        """The pictures that offer a choice; and how many are skipped for want of a clean mate."""
        (holds, labels), found = self.pictures(), []
        for picture, own in holds.items():
            areas = sorted((-self.area(i, c), c) for c, i in own.items()) if len(own) > 1 else []
            if not areas or areas[1][0] > -LEAST:
                continue
            pair = (areas[0][1], areas[1][1])
            sets, clean = [], []
            for wanted, other in (pair, pair[::-1]):
                mates = [p for p in holds if wanted in holds[p] and p != picture]
                mates = shuffled(mates, self.seed, f"{picture} {wanted}")
                mates.sort(key=lambda p: other in labels[p])  # stable
                shown = (p for p in mates if self.area(holds[p][wanted], wanted))
                kept = [*islice(shown, self.group_size - 1)]
                sets.append([own[wanted], *(holds[p][wanted] for p in kept)])
                clean.append(sum(other not in labels[p] for p in kept))
            found.append(_Choice(picture, pair, sets, clean))
        plan = [one for one in found if min(one.clean)]
        return plan, len(found) - len(plan)

    def choice_rows(self, p: Protocol, one: _Choice, maps: list[np.ndarray]) -> list[dict]:
        """The two rows of a picture: the mask that each of its sets asked for."""
        asked = list(zip((members[0] for members in one.sets), one.pair, strict=True))
        ready = [p.truth(self.truth(i, c), self.grey(i)) for i, c in asked]
        masks = [p.binarise(values, ready[0].shape) for values in maps]
        counts = [[count(m, t, p.ignore_void) for t in ready] for m in masks]  # a mask, a truth
        J = [[c.jaccard(p.empty) for c in line] for line in counts]
        both = {"picture": one.picture, "J_same": max(sum(line) / 2 for line in J)}
        both["agreement"] = count(masks[0], masks[1]).jaccard("one")
        return [
            p.row(self.data.keys[i], c, counts[n][n])
            | {"other": one.pair[1 - n], "leak": J[n][1 - n], "decides": J[n][n] > J[n][1 - n]}
            | both
            for n, (i, c) in enumerate(asked)
        ]

    def mixed_sets(self, ks: list[int]) -> list[_Set]:
        (holds, labels), sets, name = self.pictures(), [], self.data.name
        for label, items in self.classes.items():
            pool = [next(iter(own.values())) for p, own in holds.items() if label not in labels[p]]
            if len(pool) < ks[-1]:
                raise LCCoError(f"{name}: {len(pool)} pictures lack `{label}`, not {ks[-1]}")
            shown = shuffled([i for i in items if self.area(i, label)], self.seed, label)
            groups = consecutive_groups(shown, self.group_size, repeat=False)
            for n, (members, new) in enumerate(groups):
                intruders = shuffled(pool, self.seed, f"{label} {n}")[: ks[-1]]
                for k in (k for k in ks if len(members) - k >= 2):
                    mixed = members[: len(members) - k] + intruders[:k]
                    scored = {*mixed[:new], *intruders[:k]}
                    mixed = shuffled(mixed, self.seed, f"{label} {n} {k}")
                    places = [at for at, i in enumerate(mixed) if i in scored]
                    sets.append(_Set(label, mixed, places, [f"absent-{k}"]))
        return sets
