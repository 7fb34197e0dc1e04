"""The peers' own metric code and our protocols give the same scores of the same maps.

peers.json holds what their code gave, run outside this repository on the pictures drawn here.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from lcco.data import CoSegData
from lcco.experiment.evaluate import evaluate_all

PEERS = json.loads(Path(__file__).with_name("peers.json").read_text())
COUNTS = {"a": 8, "b": 6}  # in sets of 5: the last of three pictures, and of one, are filled up


def waves(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """A smooth map of 0 to 1."""
    y, x = np.mgrid[0 : 1 : shape[0] * 1j, 0 : 1 : shape[1] * 1j]
    terms = rng.uniform((-2, -2, 0), (2, 2, 1), (6, 3))
    total = sum(np.cos(2 * np.pi * (a * x + b * y + c)) for a, b, c in terms)
    return (total - total.min()) / np.ptp(total)


def pictures(map_side: int | None, truth_side: int | None) -> dict[str, tuple]:
    """`class/number` → (truth of 0 and 1, map); None: sides of their own, all odd."""
    rng, out = np.random.default_rng(2308), {}
    for key in [f"{c}/{n}" for c, count in COUNTS.items() for n in range(count)]:
        own, seed = tuple(2 * rng.integers(40, 110, 2) + 1), int(rng.integers(2**31))
        shapes = [(side, side) if side else own for side in (truth_side, map_side)]
        object_, shape = (waves(np.random.default_rng(seed), shape) for shape in shapes)
        truth = (object_ > rng.uniform(0.5, 0.7)).astype(np.uint8)
        values = 0.6 * shape + 0.4 * waves(np.random.default_rng(seed + 1), shapes[1])
        if key in ("a/5", "b/1"):  # a flat map and a bright one
            values = 0.7 + 0.3 * values if key == "b/1" else np.full_like(values, 0.4)
        out[key] = (0 * truth if key == "a/3" else truth), values.astype(np.float32)
    return out


def answer(maps: list[np.ndarray]) -> list[np.ndarray]:
    """Masks that depend on the set, if its maps are of one size."""
    return [(0.8 * m + 0.2 * sum(maps) / len(maps)).astype(np.float32) for m in maps]


class Drawn(CoSegData):
    def __init__(self, found: dict[str, tuple]) -> None:
        keys = sorted(found)
        super().__init__("drawn", "drawn", keys, [key[0] for key in keys])
        self.truths, self.maps = zip(*(found[key] for key in keys), strict=True)

    def mask(self, i, classes):
        return self.truths[i]


@pytest.mark.parametrize("peer", PEERS["peers"], ids=lambda peer: peer["protocol"])
def test_the_protocols_score_as_the_peers_code_does(peer):
    sides, depends = peer["sides"], peer["masks_depend_on_the_set"]

    def segment(data, items, cls):
        maps = [data.maps[i] for i in items]
        return answer(maps) if depends else maps

    (found,) = evaluate_all(segment, Drawn(pictures(*sides)), [peer["protocol"]]).values()
    got = {m: found.summary[m] for m in ("P", "J")}
    assert got == pytest.approx(peer["values"], abs=peer["tolerance"])
