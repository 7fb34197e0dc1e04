"""Draws training groups from a set."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from lcco.common import LCCoError
from lcco.data.pictures import Box
from lcco.data.sets import CoSegData


class Draw(NamedTuple):
    """One group: its images, the classes that are their truth (as a union), augmentation."""

    classes: tuple[str, ...]
    items: tuple[int, ...]
    flips: tuple[bool, ...]
    crops: tuple[Box | None, ...]
    given: bool = False  # the network is told the class


class GroupSampler:
    """Draws groups: a class, then N distinct images of it (with repeats if the class has fewer).

    They depend on (seed, step) alone; the truth is every class that all N share (COCO-SEG).
    `class_sampling`: P(class) ∝ 1 (uniform), √count (sqrt) or count (proportional). `paired`: the
    share of groups whose images all hold a second class, none common to all N. `absent`: the chance
    that one image is replaced by one without the shared classes. `given`: the share of groups whose
    images all hold the same two classes, of which one is the truth, and told. `flip`: half of the
    images are mirrored. `crop` < 1: each is cropped to a random share ≥ `crop` of its sides.
    """

    def __init__(self, data: CoSegData, *, groups: int, group_size: int, seed: int,
                 class_sampling: str = "uniform", paired: float = 0.0, absent: float = 0.0,
                 given: float = 0.0, flip: bool = False, crop: float = 1.0) -> None:  # fmt: skip
        self.data, self.n, self.size, self.seed, self.flip = data, groups, group_size, seed, flip
        self.paired, self.absent, self.given, self.crop = paired, absent, given, crop
        self._members = {c: np.array(items) for c, items in data.groups.items() if items}
        if not self._members:
            raise LCCoError(f"data `{data.name}` has no group to draw from")
        self._power = {"uniform": 0.0, "sqrt": 0.5, "proportional": 1.0}[class_sampling]
        self._two = {c: np.array(two) for c, items in self._members.items()
                     if (two := [i for i in items if len(data.classes_of(i)) > 1])}  # fmt: skip
        self._pools = {c: items for c, items in self._two.items()  # unless all have the same one
                       if 1 < group_size <= len(items) and self._common(items) == {c}}  # fmt: skip
        self._known = [i for i in range(len(data)) if data.knows_all(i)]
        if absent and not self._known:
            raise LCCoError("data.absent needs a set whose masks show every class, such as VOC")
        if given and not self._two:
            raise LCCoError("data.given needs a set with pictures of two classes, such as VOC")

    def _common(self, items: Iterable[int]) -> frozenset[str]:
        return frozenset.intersection(*(self.data.classes_of(i) for i in items))

    def draws(self, step: int) -> list[Draw]:
        """The groups of one step."""
        rng = np.random.default_rng((self.seed, step))
        return [self._draw(rng) for _ in range(self.n)]

    def _draw(self, rng: np.random.Generator) -> Draw:
        if given := bool(self.given and rng.random() < self.given):
            shared, items = self._draw_given(rng)
        else:
            items = self._draw_paired(rng) if rng.random() < self.paired and self._pools else []
            if not items:
                members = self._members[self._pick(rng, self._members)]
                items = rng.choice(members, self.size, replace=len(members) < self.size)
            shared = self._common(items)
        items = [int(i) for i in items]
        if rng.random() < self.absent and self.size > 1:
            for _ in range(100):
                other = int(rng.choice(self._known))
                if not shared & self.data.labels_of(other):
                    items[rng.integers(self.size)] = other
                    break
        flips = (rng.random(self.size) < 0.5).tolist() if self.flip else [False] * self.size
        crops = tuple(self._box(rng) if self.crop < 1 else None for _ in items)
        return Draw(tuple(sorted(shared)), tuple(items), tuple(flips), crops, given)

    def _pick(self, rng: np.random.Generator, pools: dict[str, np.ndarray]) -> str:
        weights = np.array([len(self._members[c]) ** self._power for c in pools])
        return list(pools)[rng.choice(len(pools), p=weights / weights.sum())]

    def _draw_given(self, rng: np.random.Generator) -> tuple[set[str], np.ndarray]:
        """A class, and images that all hold it and the same other one."""
        c, classes_of = self._pick(rng, self._two), self.data.classes_of
        other = rng.choice(sorted(classes_of(rng.choice(self._two[c])) - {c}))
        both = [i for i in self._two[c] if other in classes_of(i)]
        return {c}, rng.choice(both, self.size, replace=len(both) < self.size)

    def _draw_paired(self, rng: np.random.Generator) -> list[int]:
        """Images with a second class, which not all share; none where 20 draws find no such."""
        c, classes_of = self._pick(rng, self._pools), self.data.classes_of
        for _ in range(20):
            items = list(rng.choice(self._pools[c], self.size, replace=False))
            for d in sorted(self._common(items) - {c}):  # one that lacks it takes a place
                if rest := [i for i in self._pools[c] if i not in items and d not in classes_of(i)]:
                    items[rng.integers(self.size)] = rng.choice(rest)
            if self._common(items) == {c}:
                return items
        return []

    def _box(self, rng: np.random.Generator) -> Box:
        side = rng.uniform(self.crop, 1)
        x, y = rng.uniform(0, 1 - side, 2).tolist()
        return x, y, x + side, y + side
