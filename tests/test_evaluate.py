"""The evaluator on small sets with scripted answers: every score can be worked out by hand."""

import hashlib
import os

import numpy as np
import pytest
import torch
from PIL import Image

from lcco.common import LCCoError
from lcco.data import CoSegData, load_data
from lcco.experiment.evaluate import evaluate_all, evaluate_choice
from lcco.metrics import PROTOCOLS

torch.set_num_threads(1)
SIDE = 12
CLASSES = "abcd"  # a label map holds 1 + the position of a class here


def bar(start: float, stop: float, side: int = SIDE) -> np.ndarray:
    """A mask of full height from `start` to `stop` of the width."""
    mask = np.zeros((side, side), np.uint8)
    mask[:, round(start * side) : round(stop * side)] = 1
    return mask


class Toy(CoSegData):
    """Pictures given by label maps; `groups` as listed, or by label."""

    def __init__(
        self, labels: dict[str, np.ndarray], groups: dict[str, list[str]] | None = None
    ) -> None:
        keys = list(labels)
        self.labels, self.decoded = list(labels.values()), []
        if groups is None:
            groups = {
                c: [k for k in keys if (labels[k] == n).any()] for n, c in enumerate(CLASSES, 1)
            }
        super().__init__(
            "toy", "toy", keys, [{c for c, v in groups.items() if k in v} for k in keys]
        )

    def image(self, i):
        seed = int(hashlib.sha256(self.keys[i].encode()).hexdigest()[:8], 16)
        return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8))

    def content(self, i):
        return hashlib.sha256(self.keys[i].encode()).hexdigest()[:16]

    def mask(self, i, classes):
        self.decoded.append((i, *classes))
        out = np.isin(self.labels[i], [CLASSES.index(c) + 1 for c in classes]).astype(np.uint8)
        out[self.labels[i] == 255] = 255
        return out


def evaluate(segment, data, protocol, group_size=5, seed=0):
    return evaluate_all(segment, data, [protocol], group_size, seed)[protocol]


def relisted(toy: Toy) -> Toy:
    """The same set with its files listed in another order."""
    order = np.random.default_rng(5).permutation(len(toy))
    groups = {
        c: [toy.keys[i] for i in sorted(items, key=lambda i: -i)] for c, items in toy.groups.items()
    }
    return Toy({toy.keys[i]: toy.labels[i] for i in order}, groups)


# ------------------------------------------------------------------------------- the five protocols
def five() -> tuple[Toy, dict[str, np.ndarray]]:
    """Class a: three images, one without it; class b: one. And the scripted answers, at 224 px."""
    labels = {
        "a/1": bar(0, 1 / 2),
        "a/2": bar(0, 1 / 3),
        "a/3": bar(0, 0),
        "b/1": 2 * bar(0, 1 / 3),
    }
    answers = {
        "a/1": bar(0, 1 / 2, 224),
        "a/2": bar(0, 1, 224),
        "a/3": bar(0, 1 / 2, 224),
        "b/1": bar(0, 1 / 2, 224),
    }
    return Toy(labels, {"a": ["a/1", "a/2", "a/3"], "b": ["b/1"]}), answers


# of 144 pixels: a/1 right: J 1, P 1; a/2 all predicted, 48 true: J 1/3, P 1/3; a/3 72 predicted,
# none true: J 0, P 1/2
#                b/1: inter 48, union 72: J 2/3, P 1 - 24/144 = 5/6
IMAGE = ((1 + 1 / 3 + 1 / 2 + 5 / 6) / 4, (1 + 1 / 3 + 0 + 2 / 3) / 4)
HAND = {
    "ssnm": IMAGE,
    "ufo": IMAGE,
    # P: a (1 + 1/3 + 1/2) / 3 = 11/18, b 5/6; J: a (1 + 1/3) / 2 = 2/3 over non-empty truth, b 2/3
    "segswap": ((11 / 18 + 5 / 6) / 2, 2 / 3),
    # J: a (72 + 48 + 0) / (72 + 144 + 72) = 5/12, b 2/3; the images are of one size, so
    # pooled P is the class mean
    "pooled": ((11 / 18 + 5 / 6) / 2, (5 / 12 + 2 / 3) / 2),
    "native": IMAGE,
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_by_hand(name):
    toy, answers = five()
    got = evaluate(lambda data, items, cls: [answers[data.keys[i]] for i in items], toy, name)
    tolerance = (
        1e-9 if PROTOCOLS[name].size is None else 0.01
    )  # a third of 224 or 321 is no whole pixel
    assert (got.summary["P"], got.summary["J"]) == pytest.approx(HAND[name], abs=tolerance)
    assert [r["key"] for r in got.rows] == ["a/1", "a/2", "a/3", "b/1"]
    assert [r["empty"] for r in got.rows] == [False, False, True, False]
    assert got.rows[2]["J"] == (None if name == "segswap" else 0)
    assert got.rows[2]["predicted"] == pytest.approx(0.5, abs=tolerance)
    assert got.summary["J_nonempty"] == pytest.approx(2 / 3, abs=tolerance)
    assert (got.summary["images"], got.summary["false_alarms"], got.summary["groups"]) == (
        4,
        1.0,
        2,
    )
    if name != "segswap":
        assert got.summary["J_class"] == pytest.approx((4 / 9 + 2 / 3) / 2, abs=tolerance)


def test_protocols_that_share_groups_share_a_pass():
    toy, answers = five()
    calls = []

    def segment(data, items, cls):
        calls.append((cls, items))
        return [answers[data.keys[i]] for i in items]

    together = evaluate_all(segment, toy, ["ufo", "ssnm"])
    assert len(calls) == 2  # one set a class
    assert sorted(toy.decoded) == [(0, "a"), (1, "a"), (2, "a"), (3, "b")]  # every truth once
    toy.decoded.clear()
    everything = evaluate_all(segment, toy, list(PROTOCOLS))
    assert len(calls) == 2 + 2 * 3  # consecutive, seeded, whole class
    assert sorted(toy.decoded) == [(0, "a"), (1, "a"), (2, "a"), (3, "b")]
    assert everything["ufo"] == together["ufo"] == evaluate(segment, toy, "ufo")
    assert everything["ssnm"].summary == together["ssnm"].summary


def test_remainder_is_completed_and_only_the_new_count():
    toy = Toy({f"a/{n}": bar(0, 1 / 2) for n in range(7)})
    calls = []

    def segment(data, items, cls):
        calls.append(items)
        return [bar(0, 1 / 2) if n < 2 or len(calls) == 1 else bar(0, 0) for n in range(len(items))]

    # the second set is images 5, 6 and, again, 0, 1, 2, whose second masks are empty: they
    # must not count
    got = evaluate(segment, toy, "ufo")
    assert calls == [[0, 1, 2, 3, 4], [5, 6, 0, 1, 2]]
    assert (
        got.summary["J"] == pytest.approx(1)
        and got.summary["images"] == 7
        and got.summary["groups"] == 2
    )
    calls.clear()
    evaluate(segment, toy, "pooled")
    assert calls == [[0, 1, 2, 3, 4, 5, 6]]


def test_order_of_the_listing_changes_nothing():
    rng = np.random.default_rng(0)
    kinds = ([0, 1], [0, 2], [0, 1, 2])  # pictures with an a, with a b, with both
    toy = Toy({
        f"{'xyz'[n % 3]}/{n}": np.tile(rng.choice(kinds[n % 3], SIDE), (SIDE, 1)).astype("uint8")
        for n in range(17)
    })  # fmt: skip

    def segment(data, items, cls):  # each mask depends on the whole set and on the place in it
        mixed = np.mean([data.labels[i] == CLASSES.index(cls) + 1 for i in items], axis=0)
        return [mixed / (n + 1) for n in range(len(items))]

    other = relisted(toy)
    assert toy.keys != other.keys
    for run in (
        lambda data: evaluate_all(segment, data, list(PROTOCOLS), 4, seed=3),
        lambda data: evaluate_choice(segment, data, 4, seed=3),
    ):
        mine, theirs = run(toy), run(other)
        assert {k: v.rows for k, v in mine.items()} == {k: v.rows for k, v in theirs.items()}
        assert {k: v.summary for k, v in mine.items()} == {k: v.summary for k, v in theirs.items()}


def test_images_without_their_object():
    labels = {"a/1": bar(0, 0), "a/2": bar(0, 0), "b/1": 2 * bar(0, 1 / 2)}
    toy = Toy(labels, {"a": ["a/1", "a/2"], "b": ["b/1"]})

    def segment(data, items, cls):
        return [bar(0, 1 / 2 if cls == "b" or i else 0) for i in items]

    got = evaluate_all(segment, toy, list(PROTOCOLS))
    J = {name: [r["J"] for r in e.rows] for name, e in got.items()}  # nothing, half and the object
    assert J["native"] == [1, 0, 1] and J["segswap"] == [None, None, 1]
    for name in ("ufo", "ssnm", "pooled"):  # 12 px do not become 224 px exactly
        assert J[name] == pytest.approx([0, 0, 1], abs=0.06)
    assert got["segswap"].summary["J"] == 1  # the mean over the classes that have a score
    assert got["pooled"].summary["J"] == pytest.approx(0.5, abs=0.03)
    assert got["pooled"].summary["classes"] == 2
    assert got["native"].summary["false_alarms"] == 0.5 and got["native"].summary["empty"] == 2


def test_set_sizes_at_the_edge():
    toy = Toy({f"a/{n}": bar(0, 1 / 2) for n in range(3)})
    calls = []

    def segment(data, items, cls):
        calls.append(list(items))
        return [bar(0, 1 / 2)] * len(items)

    for size, sets in ((1, [[0], [1], [2]]), (3, [[0, 1, 2]]), (5, [[0, 1, 2, 0, 1]])):
        calls.clear()
        got = evaluate(segment, toy, "ufo", size)
        assert calls == sets and got.summary["images"] == 3 and got.group_size == size


def test_seed_draws_the_groups_of_native():
    toy = Toy({f"a/{n:02}": bar(0, 1 / 2) for n in range(12)})
    seen = {}
    for seed in (0, 0, 1):
        calls = []
        evaluate(
            lambda d, items, c, calls=calls: [calls.append(i) or bar(0, 1) for i in items],
            toy,
            "native",
            5,
            seed,
        )
        assert seen.setdefault(seed, calls) == calls
        assert len(calls) == 15  # 5 + 5 + 2 completed with 3
    assert seen[0] != seen[1] and seen[0] != list(range(12))


def test_void_is_ignored_by_native_and_background_for_the_peers():
    label = bar(0, 1 / 4)
    label[:, 3:6] = 255
    toy = Toy({"a/1": label})
    got = evaluate_all(lambda d, items, c: [bar(0, 1 / 2, 224)] * len(items), toy, list(PROTOCOLS))
    # predicted: the object (a quarter) and the void beside it (a quarter)
    assert (got["native"].summary["P"], got["native"].summary["J"]) == (1, 1)
    for name in ("ssnm", "ufo", "segswap", "pooled"):
        assert (got[name].summary["P"], got[name].summary["J"]) == pytest.approx(
            (0.75, 0.5), abs=0.01
        )


def folders(root, pictures):
    """A set in the peers' layout: (class, stem, colour seed, mask, ending of the truth)."""
    for cls, stem, seed, mask, ending in pictures:
        for kind in ("image", "groundtruth"):
            (root / kind / cls).mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
        size = mask.shape[::-1]
        Image.fromarray(noise).resize(size).save(root / "image" / cls / f"{stem}.png")
        Image.fromarray(mask * 255).save(root / "groundtruth" / cls / f"{stem}{ending}", quality=40)
    return load_data(str(root))


def test_jpeg_truth(tmp_path, monkeypatch):
    monkeypatch.setenv("LCCO_CACHE", str(tmp_path / "cache"))
    y, x = np.mgrid[:150, :200]
    disc = ((y - 70) ** 2 + (x - 90) ** 2 < 50**2).astype(np.uint8)
    data = folders(tmp_path / "set", [("cow", "1", 0, disc, ".jpg")])
    grey = Image.open(tmp_path / "set" / "groundtruth" / "cow" / "1.jpg").convert("L")
    assert len(set(np.asarray(grey).ravel().tolist())) > 20  # the file is noisy
    got = evaluate_all(lambda d, items, c: [disc] * len(items), data, ["native", "ufo"])
    assert got["native"].summary["J"] > 0.985 and got["native"].summary["P"] > 0.995
    assert got["ufo"].summary["J"] > 0.985
    theirs = np.asarray(grey.resize((224, 224), Image.Resampling.BILINEAR)) > 127  # as the peers do
    assert evaluate(lambda d, items, c: [theirs] * len(items), data, "ufo").summary["J"] == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda items: [bar(0, 1) * 7.5 for _ in items], "a/1: .* 7.5 to 7.5, not 0..1"),
        (lambda items: [bar(0, 1) * 1.01 for _ in items], "not 0..1"),
        (lambda items: [np.full((2, 2), np.nan) for _ in items], "nan"),
        (lambda items: [bar(0, 1)], "one .* map an image"),
        (lambda items: [np.zeros((1, 2, 2)) for _ in items], "one .* map an image"),
    ],
)
def test_what_is_no_probability_is_refused(answer, message):
    with pytest.raises(LCCoError, match=message):
        evaluate(lambda d, items, c: answer(items), five()[0], "ufo", 3)


def test_bad_requests_are_named():
    toy, _ = five()
    with pytest.raises(LCCoError, match="no protocol `uf`"):
        evaluate(lambda *_: [], toy, "uf")
    with pytest.raises(LCCoError, match="at least 1"):
        evaluate(lambda *_: [], toy, "ufo", 0)
    with pytest.raises(LCCoError, match="no images"):
        evaluate(lambda *_: [], Toy({}), "ufo")


# ----------------------------------------------------------------------------- does the set decide?
def two_classes(extra: int = 4) -> Toy:
    """Two pictures with an `a` (left third) and a `b` (right quarter), others with one of them."""
    both = bar(0, 1 / 3) + 2 * bar(3 / 4, 1)
    labels = {"p/1": both, "p/2": both.copy()}
    for n in range(extra):
        labels |= {f"q/a{n}": bar(0, 1 / 2), f"q/b{n}": 2 * bar(1 / 2, 1)}
    return Toy(labels)


def common(data, items, cls):
    """Co-segmentation: the classes that all images of the set hold, from the set alone."""
    shared = frozenset.intersection(*(data.labels_of(i) for i in items))
    return [data.mask(i, sorted(shared)) for i in items]


def salient(data, items, cls):
    """Everything that stands out, whatever the set is about."""
    return [data.mask(i, list(CLASSES)) for i in items]


def nothing(data, items, cls):
    return [data.mask(i, []) for i in items]


def contrary(data, items, cls):
    return [data.mask(i, ["b" if cls == "a" else "a"]) for i in items]


# disjoint objects of 48 and 36 px: both together score 48/84 and 36/84, 1/2 in the mean; one of
# them alone 1 and 0
@pytest.mark.parametrize(
    ("segment", "J", "leak", "decides", "same", "agreement"),
    [
        (common, 1, 0, 1, 1 / 2, 0),
        (salient, 1 / 2, 1 / 2, 1 / 2, 1 / 2, 1),  # asked for a it leaks less, asked for b more
        (contrary, 0, 1, 0, 1 / 2, 0),
        (nothing, 0, 0, 0, 0, 1),
    ],
)
def test_choice_by_hand(segment, J, leak, decides, same, agreement):
    got = evaluate_choice(segment, two_classes())
    assert set(got) == {"choice"} and got["choice"].protocol == "choice"
    s = got["choice"].summary
    measured = (s["J"], s["leak"], s["J_same"], s["agreement"])
    assert measured == pytest.approx((J, leak, same, agreement), abs=1e-9)
    assert s["gain"] == pytest.approx(J - same, abs=1e-9)
    assert s["decides"] == decides
    counts = [s[k] for k in ("images", "pictures", "groups", "skipped", "clean_mates")]
    assert counts == [4, 2, 4, 0, 1]
    assert [(r["class"], r["other"], r["key"]) for r in got["choice"].rows] == [
        ("a", "b", "p/1"), ("a", "b", "p/2"), ("b", "a", "p/1"), ("b", "a", "p/2"),
    ]  # fmt: skip


def test_one_mask_for_both_sets_scores_half_at_most():
    rng = np.random.default_rng(2)
    for share in (0.2, 0.5, 0.9):
        mask = rng.random((SIDE, SIDE)) < share
        s = evaluate_choice(lambda d, items, c, m=mask: [m] * len(items), two_classes())[
            "choice"
        ].summary
        assert s["J"] <= 0.5 and s["gain"] == pytest.approx(0) and s["agreement"] == 1


def test_the_better_of_two_different_masks_is_j_same():
    """Asked for a: a alone. Asked for b: b and half of a. Masks, areas and scores all differ."""

    def segment(data, items, cls):
        mask = bar(0, 1 / 3) if cls == "a" else bar(0, 1 / 6) + bar(3 / 4, 1)
        return [mask] * len(items)

    got = evaluate_choice(segment, two_classes())["choice"]
    # a 48 px, b 36 px. Mask for a: J(a) 1, J(b) 0. Mask for b, 24 + 36 px: J(a) 24 / 84, J(b)
    # 36 / 60
    by_class = {r["class"]: r for r in got.rows}
    assert (by_class["a"]["J"], by_class["a"]["leak"]) == (1, 0)
    assert (by_class["b"]["J"], by_class["b"]["leak"]) == pytest.approx((36 / 60, 24 / 84))
    same = max((1 + 0) / 2, (36 / 60 + 24 / 84) / 2)
    assert {r["J_same"] for r in got.rows} == {same} == {0.5}
    assert got.summary["gain"] == pytest.approx((1 + 36 / 60) / 2 - same)
    assert got.summary["agreement"] == pytest.approx(24 / 84)

    def other(data, items, cls):  # now the mask for b serves both sets better than the one for a
        mask = bar(0, 1 / 4) if cls == "a" else bar(0, 1 / 3) + bar(3 / 4, 1)
        return [mask] * len(items)

    got = evaluate_choice(other, two_classes())["choice"]
    assert {r["J_same"] for r in got.rows} == {(48 / 84 + 36 / 84) / 2}
    wins = {r["class"]: r["decides"] for r in got.rows}
    assert wins == {"a": True, "b": False}  # 36 / 84 for b is less than 48 / 84 for a


def test_a_mask_that_suits_both_classes_alike_does_not_decide():
    both = bar(0, 1 / 4) + 2 * bar(3 / 4, 1)
    labels = {"p/1": both} | {f"q/{c}": v * bar(0, 1 / 2) for c, v in (("a", 1), ("b", 2))}
    got = evaluate_choice(lambda d, items, c: [np.ones((2, 2))] * len(items), Toy(labels))["choice"]
    assert [(r["J"], r["leak"], r["decides"]) for r in got.rows] == [(1 / 4, 1 / 4, False)] * 2


def test_choice_takes_the_two_largest_of_three_objects_and_counts_from_a_hundredth():
    side = 20  # 400 px: 4 px are a hundredth
    three = bar(0, 1 / 2, side) + 2 * bar(1 / 2, 3 / 4, side)
    three[:4, 19] = 3
    labels = {"p/1": three} | {
        f"q/{c}": v * bar(0, 1, side) for c, v in zip("abc", (1, 2, 3), strict=True)
    }
    got = evaluate_choice(common, Toy(labels))["choice"]
    assert {(r["class"], r["other"]) for r in got.rows} == {("a", "b"), ("b", "a")}
    three[three == 2] = 0
    pairs = evaluate_choice(common, Toy(labels))["choice"].rows  # c's 4 px are just enough
    assert {(r["class"], r["other"]) for r in pairs} == {("a", "c"), ("c", "a")}
    three[0, 19] = 0
    with pytest.raises(LCCoError, match="no picture of two classes"):
        evaluate_choice(common, Toy(labels))


def test_a_mate_without_its_object_is_passed_over_and_the_picture_skipped_if_none_is_left():
    toy = Toy(
        {"a/p": bar(0, 1 / 3) + 2 * bar(3 / 4, 1), "a/empty": bar(0, 0), "b/q": 2 * bar(0, 1 / 2)},
        {"a": ["a/p", "a/empty"], "b": ["a/p", "b/q"]},
    )
    with pytest.raises(LCCoError, match="no picture of two classes"):
        evaluate_choice(common, toy)
    toy.labels[1][:] = bar(0, 1 / 2)
    assert evaluate_choice(common, toy)["choice"].summary["skipped"] == 0


def test_choice_mates():
    toy, calls = two_classes(extra=2), []

    def segment(data, items, cls):
        calls.append(([data.keys[i] for i in items], cls))
        return common(data, items, cls)

    got = evaluate_choice(segment, toy, group_size=4)["choice"]
    assert len(calls) == 4
    for (
        keys,
        cls,
    ) in calls:  # two clean mates there are; the fourth place goes to the other picture with both
        assert keys[0].startswith("p/") and len(set(keys)) == 4
        assert sorted(keys[1:]) == sorted(
            [f"q/{cls}0", f"q/{cls}1", "p/1" if keys[0] == "p/2" else "p/2"]
        )
    assert got.summary["clean_mates"] == pytest.approx(2 / 3) and got.summary["J"] == 1
    first = list(calls)
    calls.clear()
    evaluate_choice(segment, toy, group_size=4)
    assert calls == first  # drawn by the seed
    evaluate_choice(segment, two_classes(extra=9), 4, seed=1)
    evaluate_choice(segment, two_classes(extra=9), 4, seed=2)
    assert calls[4:8] != calls[8:]


def test_choice_needs_a_choice():
    with pytest.raises(
        LCCoError, match="no picture of two classes"
    ):  # nothing else shows b, so no set could ask for it
        evaluate_choice(
            common, Toy({"p/1": bar(0, 1 / 3) + 2 * bar(3 / 4, 1), "q/a": bar(0, 1 / 2)})
        )
    with pytest.raises(LCCoError, match="2 or more"):
        evaluate_choice(common, two_classes(), group_size=1)
    speck = two_classes()
    for label in speck.labels[:2]:
        label[label == 2] = 0
        label[0, 11] = 2  # 1 of 144 pixels is less than 1%
    with pytest.raises(LCCoError, match="no picture of two classes"):
        evaluate_choice(common, speck)
    speck.labels[1][:] = bar(0, 1 / 3) + 2 * bar(3 / 4, 1)
    assert evaluate_choice(common, speck)["choice"].summary["pictures"] == 1


def test_choice_in_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("LCCO_CACHE", str(tmp_path / "cache"))
    man, horse = bar(0, 1 / 4, 64), bar(1 / 2, 1, 64)
    pictures = [
        ("person", "5", 1, man, ".png"),
        ("horse", "17", 1, horse, ".png"),
    ]  # seed 1 twice: the same picture
    pictures += [
        (c, f"{n}0", s + n, bar(0, 1, 64), ".png")
        for c, s in (("person", 10), ("horse", 20))
        for n in (1, 2)
    ]
    data = folders(tmp_path / "set", pictures)
    got = evaluate_choice(lambda d, items, c: [d.mask(i, [c]) for i in items], data, 3)["choice"]
    assert [(r["key"], r["class"], r["other"], r["J"], r["leak"]) for r in got.rows] == [
        ("horse/17", "horse", "person", 1, 0), ("person/5", "person", "horse", 1, 0),
    ]  # fmt: skip
    # the whole picture: J 1/2 and 1/4 for the horse and the man
    got = evaluate_choice(lambda d, items, c: [np.ones((9, 9))] * len(items), data, 3)["choice"]
    assert [(r["J"], r["leak"], r["decides"]) for r in got.rows] == [
        (1 / 2, 1 / 4, True),
        (1 / 4, 1 / 2, False),
    ]


@pytest.mark.skipif(
    "LCCO_DATA" not in os.environ, reason="LCCO_DATA is not set: no real photographs"
)
def test_choice_on_photographs():
    data = load_data("pascal1037")
    got = evaluate_choice(lambda d, items, c: [d.mask(i, [c]) for i in items], data)["choice"]
    assert (
        got.summary["pictures"] == 107 and got.summary["skipped"] == 0
    )  # counted by hashing the files by hand
    assert got.summary["J"] == 1 and got.summary["leak"] < 0.01 and got.summary["decides"] == 1
    assert got.summary["clean_mates"] > 0.9
