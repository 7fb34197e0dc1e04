"""Draws training groups from a set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lcco.common import LCCoError
from lcco.data.pictures import Box
from lcco.data.sets import CoSegData


@dataclass(frozen=True)
class Draw:
    """One group: its images, the classes they share (their union is the truth), augmentation."""

    classes: tuple[str, ...]
    items: tuple[int, ...]
    flips: tuple[bool, ...]
    crops: tuple[Box | None, ...]


class GroupSampler:
    """Draws groups: a class, then N distinct images of it (with repeats if the class has fewer).

    `class_sampling`: P(class) ∝ 1, √count or count. The truth is the union of every class that all
    N share (COCO-SEG). `paired`: the share of groups whose images all hold a second class too, none
    common to all N, so that only the set tells which one counts (a plain group where that cannot
    be). `absent`: the chance that one image of a group is replaced by one without the shared
    classes. `flip`: half of the images are mirrored; `crop` < 1: each is cropped to a random share
    ≥ `crop` of its sides. The groups of a step depend on (seed, step) alone.
    Raises: LCCoError for settings that allow no draw.
    """

    def __init__(
        self, data: CoSegData, *, groups: int, group_size: int, seed: int,
        class_sampling: str = "uniform", paired: float = 0.0, absent: float = 0.0,
        flip: bool = False, crop: float = 1.0,
    ) -> None:  # fmt: skip
        power = {"uniform": 0.0, "sqrt": 0.5, "proportional": 1.0}.get(class_sampling)
        if power is None:
            known = "uniform, sqrt or proportional"
            raise LCCoError(f"class_sampling is `{class_sampling}`; it must be {known}")
        if groups < 1 or group_size < 1 or not 0 < crop <= 1:
            raise LCCoError("groups and group_size must be at least 1, crop in (0, 1]")
        self.data, self.n, self.size, self.seed = data, groups, group_size, seed
        self.paired, self.absent, self.flip, self.crop = paired, absent, flip, crop
        self._members = {c: np.array(items) for c, items in data.groups.items() if items}
        if not self._members:
            raise LCCoError(f"data `{data.name}` has no group to draw from")
        self._weights = {c: len(items) ** power for c, items in self._members.items()}
        self._pools = self._paired_pools() if paired and group_size > 1 else {}
        if absent:
            known = np.flatnonzero([data.knows_all(i) for i in range(len(data))])
            self._known = known if len(known) else np.arange(len(data))

    def _paired_pools(self) -> dict[str, np.ndarray]:
        """Class → its images that hold a second class, where these do not all hold the same one."""
        pools = {}
        for c, members in self._members.items():
            pool = np.array([i for i in members if len(self.data.classes_of(i)) > 1], int)
            if len(pool) >= self.size and self._common(pool) == {c}:
                pools[c] = pool
        return pools

    def _common(self, items: Iterable[int]) -> frozenset[str]:
        return frozenset.intersection(*(self.data.classes_of(i) for i in items))

    def draws(self, step: int) -> list[Draw]:
        """The groups of one step."""
        rng = np.random.default_rng((self.seed, step))
        return [self._draw(rng) for _ in range(self.n)]

    def _pick(self, rng: np.random.Generator, pools: dict[str, np.ndarray]) -> str:
        weights = np.array([self._weights[c] for c in pools])
        return list(pools)[rng.choice(len(pools), p=weights / weights.sum())]

    def _draw(self, rng: np.random.Generator) -> Draw:
        items = self._draw_paired(rng) if rng.random() < self.paired and self._pools else None
        if items is None:
            members = self._members[self._pick(rng, self._members)]
            items = rng.choice(members, self.size, replace=len(members) < self.size)
        items = [int(i) for i in items]
        shared = self._common(items)
        if rng.random() < self.absent and self.size > 1:
            for _ in range(100):
                other = int(rng.choice(self._known))
                if not shared & self.data.labels_of(other):
                    items[rng.integers(self.size)] = other
                    break
        flips = (rng.random(self.size) < 0.5).tolist() if self.flip else [False] * self.size
        crops = tuple(self._box(rng) for _ in items)
        return Draw(tuple(sorted(shared)), tuple(items), tuple(flips), crops)

    def _draw_paired(self, rng: np.random.Generator) -> np.ndarray | None:
        c = self._pick(rng, self._pools)
        pool = self._pools[c]
        for _ in range(20):
            items = rng.choice(pool, self.size, replace=False)
            for d in self._common(items) - {c}:  # one that lacks the second class takes a place
                rest = [i for i in pool if i not in items]
                others = [i for i in rest if d not in self.data.classes_of(i)]
                if others:
                    items[rng.integers(self.size)] = rng.choice(others)
            if self._common(items) == {c}:
                return items
        return None

    def _box(self, rng: np.random.Generator) -> Box | None:
        if self.crop >= 1:
            return None
        side = rng.uniform(self.crop, 1)
        x, y = rng.uniform(0, 1 - side, 2)
        return (float(x), float(y), float(x + side), float(y + side))
