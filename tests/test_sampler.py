"""The group sampler: what it draws, how often, and that it draws the same each time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import drawn
import numpy as np
import pytest

from lcco.common import LCCoError, digest
from lcco.data import CoSegData, Draw, GroupSampler, load_data


class Toy(CoSegData):
    """Labels alone: what the sampler needs."""

    def __init__(self, labels: list[str]) -> None:
        super().__init__("toy", "toy", [f"{i:03d}" for i in range(len(labels))], labels)


TOY = Toy(["a"] * 64 + ["b"] * 16 + ["c"] * 4 + ["ab"] * 6 + ["ac"] * 6)


def _sampler(data: CoSegData = TOY, **settings) -> GroupSampler:
    return GroupSampler(data, **{"groups": 3, "group_size": 4, "seed": 0} | settings)


@pytest.mark.parametrize(
    ("settings", "golden"),
    [
        ({}, "0583aa88502d"),
        ({"seed": 7, "class_sampling": "sqrt", "paired": 0.5, "absent": 0.3, "flip": True,
          "crop": 0.6}, "d0263c66e290"),
        ({"seed": 3, "class_sampling": "proportional", "groups": 5, "group_size": 6},
         "c6065a40d2f1"),
    ],
)  # fmt: skip
def test_draws_are_those_of_the_committed_results(settings: dict, golden: str) -> None:
    draws = [_sampler(**settings).draws(step) for step in (0, 1, 2, 99_999)]
    assert not any(draw.given for step in draws for draw in step)
    assert digest([[draw[:4] for draw in step] for step in draws]) == golden


def test_sampler_depends_on_seed_and_step_alone() -> None:
    more = {"paired": 0.3, "absent": 0.3, "flip": True, "crop": 0.7}
    one, other = _sampler(**more), _sampler(**more)
    forward = [one.draws(s) for s in range(20)]
    backward = [other.draws(s) for s in reversed(range(20))][::-1]
    assert forward == backward
    assert len({tuple(f) for f in forward}) == 20


def test_draws_do_not_depend_on_the_order_of_a_set() -> None:
    """Several further classes that all share: Python orders sets of text anew in each process."""
    data = Toy(["abc"] * 8 + ["ab", "ac", "ad"] * 3)
    sampler = _sampler(data, group_size=3, paired=1.0)
    draws = [[draw[:2] for draw in sampler.draws(step)] for step in range(50)]
    assert digest(draws) == "13868bb59080"


def test_seeds_share_no_draws() -> None:
    steps = {seed: [tuple(_sampler(seed=seed).draws(s)) for s in range(30)] for seed in range(4)}
    assert len({draws for found in steps.values() for draws in found}) == 120


@pytest.mark.parametrize(("rule", "power"), [("uniform", 0), ("sqrt", 0.5), ("proportional", 1)])
def test_class_distribution(rule: str, power: float) -> None:
    data = Toy(["a"] * 64 + ["b"] * 16 + ["c"] * 4)
    sampler = _sampler(data, class_sampling=rule, group_size=2)
    seen = Counter(draw.classes[0] for s in range(1000) for draw in sampler.draws(s))
    weights = np.array([64, 16, 4.0]) ** power
    expected = 3000 * weights / weights.sum()
    chi2 = (((np.array([seen[c] for c in "abc"]) - expected) ** 2) / expected).sum()
    assert chi2 < 13.8  # p = 0.001 at 2 degrees of freedom


def test_images_of_a_class_are_uniform_and_distinct() -> None:
    sampler = _sampler(Toy(["a"] * 10), group_size=4)
    draws = [draw for s in range(500) for draw in sampler.draws(s)]
    assert all(len(set(draw.items)) == 4 for draw in draws)
    seen = np.bincount([i for draw in draws for i in draw.items], minlength=10)
    assert (((seen - 600) ** 2) / 600).sum() < 27.9  # p = 0.001 at 9 degrees of freedom
    few = _sampler(Toy(["a"] * 2), group_size=5).draws(0)[0]
    assert len(few.items) == 5 and set(few.items) <= {0, 1}


def test_truth_is_every_class_that_all_share() -> None:
    sampler = _sampler(Toy(["ab"] * 5 + ["abc"] * 5), group_size=3)
    unions = Counter()
    for s in range(100):
        for draw in sampler.draws(s):
            held = (sampler.data.classes_of(i) for i in draw.items)
            assert set(draw.classes) == frozenset.intersection(*held)
            unions[draw.classes] += 1
    assert set(unions) == {("a", "b"), ("a", "b", "c")}


def test_paired_groups_are_decided_by_the_set_alone() -> None:
    data = Toy(["ab"] * 8 + ["ac"] * 3 + ["bc"] * 4 + ["a"] * 50 + ["d"] * 20)
    sampler = _sampler(data, paired=1.0)
    seen = Counter()
    for s in range(200):
        for draw in sampler.draws(s):
            assert len(draw.classes) == 1 and len(set(draw.items)) == 4
            assert all(len(data.classes_of(i)) > 1 for i in draw.items)
            seen[draw.classes[0]] += 1
    assert set(seen) == {"a", "b", "c"} and min(seen.values()) > 120
    half = [g for s in range(300) for g in _sampler(data, paired=0.5).draws(s)]
    share = np.mean([all(len(data.classes_of(i)) > 1 for i in g.items) for g in half])
    assert 0.5 < share < 0.8  # the half, and plain groups of b and c that happen to be so
    plain = _sampler(Toy(["a"] * 5 + ["b"] * 5), paired=1.0).draws(0)
    assert all(len(draw.classes) == 1 for draw in plain)  # no pair anywhere: plain groups


def test_only_what_is_told_decides_a_given_group() -> None:
    sampler = _sampler(given=0.4, absent=0.3)
    draws = [draw for step in range(300) for draw in sampler.draws(step)]
    given = [draw for draw in draws if draw.given]
    assert 0.35 < len(given) / len(draws) < 0.45
    assert {c for draw in given for c in draw.classes} == {"a", "b", "c"}
    for draw in given:
        (c,) = draw.classes
        shown = [TOY.classes_of(i) for i in draw.items if c in TOY.classes_of(i)]
        assert len(shown) >= 3 and len(frozenset.intersection(*shown)) == 2
    assert any(c not in TOY.classes_of(i) for d in given for c in d.classes for i in d.items)
    assert any(len(TOY.classes_of(i)) == 1 for d in draws if not d.given for i in d.items)
    with pytest.raises(LCCoError, match="data.given needs a set with pictures of two classes"):
        _sampler(Toy(["a"] * 5 + ["b"] * 5), given=0.5)


def test_a_pair_that_cannot_be_mended_is_drawn_again() -> None:
    """Two images that share a second class, whose replacement shares another one."""
    data = Toy(["abc"] * 4 + ["abd", "acd", "ae"])
    sampler = _sampler(data, paired=1.0, group_size=2)
    found = [draw for s in range(100) for draw in sampler.draws(s)]
    assert all(len(draw.classes) == 1 for draw in found)


def test_an_absent_image_has_no_pixel_of_the_class() -> None:
    """A class in a corner: too small for its group, and yet not absent."""
    data = Toy(["a"] * 4 + ["b"] * 4)
    shown = {i: data.classes_of(i) | ({"a"} if i < 7 else set()) for i in range(8)}
    data.labels_of = shown.__getitem__
    draws = [d for s in range(50) for d in _sampler(data, absent=1.0).draws(s)]
    odd = {i for d in draws if d.classes == ("a",) for i in d.items if i > 3}
    assert odd == {7}


def test_absent_replaces_one_image_by_one_without_the_class() -> None:
    draws = [draw for s in range(300) for draw in _sampler(absent=0.5).draws(s)]
    lacking = [sum(not set(draw.classes) & TOY.labels_of(i) for i in draw.items) for draw in draws]
    assert set(lacking) == {0, 1} and 0.42 < np.mean(lacking) < 0.58
    assert all(draw.classes for draw in draws)
    assert all(len(draw.items) == 1 for draw in _sampler(absent=1.0, group_size=1).draws(0))


def test_absent_image_comes_from_exhaustive_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCCO_DATA", str(tmp_path))
    drawn.voc(tmp_path)
    drawn.folders(tmp_path, ("dog", "sheep"), 20, name="more")
    data = load_data(["voc_train", "more"])
    for s in range(30):
        for draw in _sampler(data, absent=1.0).draws(s):
            odd = [i for i in draw.items if not set(draw.classes) & data.classes_of(i)]
            assert len(odd) <= 1 and all(data.knows_all(i) for i in odd)


def test_flips_and_crops() -> None:
    plain = _sampler().draws(0)[0]
    assert plain.flips == (False,) * 4 and plain.crops == (None,) * 4 and isinstance(plain, Draw)
    draws = [draw for s in range(200) for draw in _sampler(flip=True, crop=0.6).draws(s)]
    assert 0.45 < np.mean([f for draw in draws for f in draw.flips]) < 0.55
    boxes = np.array([c for draw in draws for c in draw.crops])
    assert boxes.min() >= 0 and boxes.max() <= 1
    sides = boxes[:, 2:] - boxes[:, :2]
    assert np.allclose(sides[:, 0], sides[:, 1])
    assert 0.6 <= sides.min() < 0.62 and 0.98 < sides.max() <= 1


def test_sampler_refuses_a_set_without_groups() -> None:
    with pytest.raises(LCCoError, match="no group to draw from"):
        _sampler(Toy([]))


def test_absent_needs_a_set_whose_masks_show_every_class() -> None:
    data = Toy(["a"] * 4 + ["b"] * 4)
    data.exhaustive = False  # a picture of b may show an a that nobody labelled
    with pytest.raises(LCCoError, match="data.absent needs a set whose masks show every class"):
        _sampler(data, absent=0.5)


def test_real_paired_groups(real: Path) -> None:
    data = load_data("voc_train")
    settings = {"groups": 4, "group_size": 5, "paired": 1.0, "class_sampling": "sqrt"}
    draws = [draw for s in range(50) for draw in _sampler(data, **settings).draws(s)]
    good = [
        len(g.classes) == 1 and all(len(data.classes_of(i)) > 1 for i in g.items) for g in draws
    ]
    assert np.mean(good) > 0.97 and len({g.classes for g in draws}) > 8
