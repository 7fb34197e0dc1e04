"""A segmenter on a data set: scores under the named protocols, and in the choice test."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import islice, product
from typing import Any

import numpy as np

from lcco.common import LCCoError, progress
from lcco.data.sets import CoSegData
from lcco.metrics import Counts, Protocol, count, get_protocol, shuffled

# (data, items of one set, the class they are scored for, which only "GT semantics" may look at)
# → one map an item in 0..1, [h, w] of any size. An item may stand twice in a set.
Segmenter = Callable[[CoSegData, list[int], str], Sequence[np.ndarray]]
CHOICE = "choice"  # the choice test; its size, threshold and void are those of `native`
LEAST = 0.01  # choice: an object counts from this share of the image on
SCORING_VERSION = 3  # raised when the same weights would score otherwise. 3: sets of one image


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

    Images are taken by key; `seed` draws the groups of `native`. `choice` gives
    `evaluate_choice`. Raises: LCCoError for an unknown protocol, no images, or maps outside 0..1.
    """
    scorer = _Scorer(segment, data, group_size, seed)
    chosen = {name: get_protocol(name) for name in protocols if name != CHOICE}
    sets, kinds = [], dict.fromkeys(p.grouping for p in chosen.values())
    for (label, items), kind in product(scorer.classes.items(), kinds):
        names = [name for name, p in chosen.items() if p.grouping == kind]
        groups = chosen[names[0]].groups(items, group_size, seed, label)
        sets += [(label, members, new, names) for members, new in groups]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    found = scorer.maps([(members, label) for label, members, *_ in sets])
    for label, members, new, names in progress(sets, f"scoring {data.name}"):
        for i, values in zip(members[:new], next(found)[:new], strict=True):
            for name in names:
                counts, _ = scorer.compare(chosen[name], values, i, label)
                rows[name].append(chosen[name].row(data.keys[i], label, counts))
    ran = {name: sum(name in names for *_, names in sets) for name in chosen}
    out = {name: scorer.evaluation(name, p, rows[name], ran[name]) for name, p in chosen.items()}
    if CHOICE in protocols:
        out |= evaluate_choice(segment, data, group_size, seed)
    return {name: out[name] for name in protocols}


def evaluate_choice(segment: Segmenter, data: CoSegData, group_size: int = 5,
                    seed: int = 0) -> dict[str, Evaluation]:  # fmt: skip
    """Score pictures that hold two classes, each in a set of either class: does the set decide?

    A picture counts when two classes cover 1% of it each (its two largest are taken), by its labels
    or as it stands in two classes' folders. Its mates, drawn by `seed`, show the wanted class, and
    not the other while there are such pictures; with none of those the picture is skipped.

    Returns: `choice` alone. A row is one mask: beside `Protocol.row`, `leak` (its J with the
    `other` class), `decides` (J > leak), and of the picture's two masks `J_same` (what the better
    one scores in both sets) and `agreement` (their IoU). The summary has their means, `gain` = J −
    J_same and `clean_mates` (share). What ignores the set has agreement 1, gain 0, J ≤ 0.5.
    Raises: LCCoError when no picture offers a choice.
    """
    if group_size < 2:
        raise LCCoError(f"the choice test needs sets of 2 or more, not {group_size}")
    plan, about = (scorer := _Scorer(segment, data, group_size, seed)).choices()
    if not plan:
        raise LCCoError(f"data `{data.name}` has no picture of two classes that others show")
    native, rows = get_protocol("native"), []
    found = scorer.maps([(members, c) for sets in plan.values() for c, members in sets.items()])
    for picture, sets in progress(plan.items(), f"choice test on {data.name}"):
        maps = [next(found)[0] for _ in sets]
        rows += scorer.choice_rows(native, picture, sets, maps)
    out = scorer.evaluation(CHOICE, native, rows, 2 * len(plan))
    for key in ("leak", "decides", "J_same", "agreement"):
        out.summary[key] = float(np.mean([row[key] for row in rows]))
    out.summary.update(about, gain=out.summary["J_image"] - out.summary["J_same"])
    return {CHOICE: out}


class _Scorer:
    """A segmenter and a set; `classes` by name, each with its items in the order of their keys."""

    def __init__(self, segment: Segmenter, data: CoSegData, group_size: int, seed: int) -> None:
        if group_size < 1:
            raise LCCoError(f"a group needs at least 1 image, not {group_size}")
        self.segment, self.data, self.group_size, self.seed = segment, data, group_size, seed
        self.classes, self.key = data.groups, data.keys.__getitem__
        if not self.classes:
            raise LCCoError(f"data `{data.name}` has no images to evaluate")
        self.truth = lru_cache(32)(lambda i, label: data.mask(i, [label]))  # 12 MB each, of 12 MP
        self.area = cache(lambda i, label: float(np.mean(self.truth(i, label) == 1)))
        self.grey = lru_cache(32)(data.grey_truth)

    def maps(self, sets: list[tuple[list[int], str]]) -> Iterator[list[np.ndarray]]:
        """The segmenter's maps of each set; what is not one map of probabilities an item stops."""
        found = (self.segment(self.data, list(members), label) for members, label in sets)
        if hasattr(self.segment, "many"):
            found = self.segment.many(self.data, sets)
        for (members, _), each in zip(sets, found, strict=True):
            maps, keys = [np.asarray(m, np.float32) for m in each], [*map(self.key, members)]
            if len(maps) != len(keys) or any(m.ndim != 2 for m in maps):
                raise LCCoError(f"{keys[0]}: the segmenter must give one [h, w] map an image")
            for key, m in zip(keys, maps, strict=True):
                if not -1e-4 <= m.min() <= m.max() <= 1 + 1e-4:  # nor NaN
                    said = f"the segmenter's map has {m.min()} to {m.max()}, not 0..1"
                    raise LCCoError(f"{key}: {said}")
            yield maps

    def compare(self, p: Protocol, values: np.ndarray, i: int, label: str) -> tuple[Counts, Any]:
        """A map against the truth of item i: the counts, and the mask that it became."""
        ready = p.truth(self.truth(i, label), self.grey(i))
        mask = p.binarise(values, ready.shape)
        return count(mask, ready), mask

    def evaluation(self, name: str, p: Protocol, rows: list[dict], sets: int) -> Evaluation:
        rows = sorted(rows, key=lambda r: (r["class"], r["key"]))
        about = self.data.name, self.data.digest(), name, self.group_size, self.seed
        return Evaluation(*about, p.summarise(rows) | {"groups": sets}, rows)

    def choices(self) -> tuple[dict[str, dict[str, list[int]]], dict[str, Any]]:
        """Picture → class → the set that asks for it, the picture first; and what to tell."""
        plan, skipped, clean = {}, 0, []
        shown: dict[str, dict[str, int]] = {}  # picture (content) → class → the item that shows it
        pairs = [(i, c) for c, items in self.classes.items() for i in items]
        for i, label in sorted(pairs, key=lambda pair: self.data.keys[pair[0]]):
            shown.setdefault(self.data.content(i), {}).setdefault(label, i)
        labels = {p: set(o).union(*map(self.data.labels_of, o.values())) for p, o in shown.items()}
        for picture, own in shown.items():
            areas = {c: self.area(i, c) for c, i in own.items()} if len(own) > 1 else {}
            pair = [c for c in sorted(areas, key=lambda c: (-areas[c], c))[:2] if areas[c] >= LEAST]
            if len(pair) < 2:
                continue
            sets, without = {}, []  # of each class's mates, whether they are without the other
            for wanted, other in (pair, pair[::-1]):
                mates = [p for p in shown if wanted in shown[p] and p != picture]
                mates = shuffled(mates, self.seed, f"{picture} {wanted}")
                mates.sort(key=lambda p: other in labels[p])  # stable
                seen = (p for p in mates if self.area(shown[p][wanted], wanted))
                kept = [*islice(seen, self.group_size - 1)]
                sets[wanted] = [own[wanted], *(shown[p][wanted] for p in kept)]
                without.append([other not in labels[p] for p in kept])
            if all(map(any, without)):
                plan[picture], clean = sets, [*clean, *without[0], *without[1]]
            else:
                skipped += 1
        share = sum(clean) / max(len(clean), 1)
        return plan, {"pictures": len(plan), "skipped": skipped, "clean_mates": share}

    def choice_rows(self, p: Protocol, picture: str, sets: Mapping[str, list[int]],
                    maps: list[np.ndarray]) -> Iterator[dict[str, Any]]:  # fmt: skip
        """The two rows of a picture: the mask that each of its sets asked for."""
        asked = [(members[0], c) for c, members in sets.items()]
        both = [[self.compare(p, values, i, c) for i, c in asked] for values in maps]
        J = [[counts.jaccard(p.empty) for counts, _ in line] for line in both]
        shared = {"picture": picture, "J_same": max(sum(line) / 2 for line in J)}
        shared["agreement"] = count(both[0][0][1], both[1][0][1]).jaccard("one")
        for n, (i, c) in enumerate(asked):
            own = {"other": asked[1 - n][1], "leak": J[n][1 - n], "decides": J[n][n] > J[n][1 - n]}
            yield p.row(self.data.keys[i], c, both[n][n][0]) | own | shared
