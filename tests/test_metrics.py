"""P, J, thresholds, groups and averages: by hand, against scikit-learn and the peers' way."""

from dataclasses import astuple

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score

from lcco.common import LCCoError
from lcco.metrics import (
    PROTOCOLS,
    Counts,
    consecutive_groups,
    count,
    get_protocol,
    resize_map,
)

torch.set_num_threads(1)
TRUTH = np.array([[1, 1, 0, 0], [1, 1, 0, 255]], np.uint8)
PRED = np.array([[1, 0, 1, 0], [1, 0, 0, 1]], bool)


def test_counts_by_hand():
    # void ignored: 7 pixels count; object 4, predicted 3 (the one on void does not count), both 2
    # union 4 + 3 - 2 = 5; wrong are 2 missed + 1 extra, so 4 of 7 are right
    assert count(PRED, TRUTH) == Counts(inter=2, union=5, correct=4, pixels=7, predicted=3, truth=4)
    assert count(PRED, TRUTH).jaccard() == 2 / 5
    assert count(PRED, TRUTH).accuracy == 4 / 7
    # void as background: the pixel predicted there is one more false one
    background = get_protocol("segswap").truth(TRUTH)
    assert count(PRED, background) == Counts(2, 6, 4, 8, 4, 4)
    assert count(PRED, background).jaccard() == 2 / 6
    assert count(PRED, background).accuracy == 4 / 8


def test_empty_truth_conventions():
    nothing, some = np.zeros((2, 2), bool), np.eye(2, dtype=bool)
    empty = np.zeros((2, 2), np.uint8)
    none, one = count(nothing, empty), count(some, empty)
    assert [none.jaccard(e) for e in ("zero", "one", "skip")] == [0.0, 1.0, None]
    assert [one.jaccard(e) for e in ("zero", "one", "skip")] == [0.0, 0.0, None]
    assert one.accuracy == 0.5
    # an object under void alone is no object, and a truth of void alone gives no P
    assert count(some, np.full((2, 2), 255)).accuracy is None
    rows = [PROTOCOLS["native"].row("k", "c", count(some, np.full((2, 2), 255)))]
    assert PROTOCOLS["native"].summarise(rows)["P"] is None


@pytest.mark.parametrize("void", [False, True])
def test_against_scikit_learn(void):
    rng = np.random.default_rng(3)
    for share in (0.05, 0.5, 0.9):
        truth = (rng.random((31, 17)) < share).astype(np.uint8)
        pred = rng.random((31, 17)) < 0.4
        if void:
            truth[rng.random(truth.shape) < 0.2] = 255
        keep = truth != 255
        J, P = jaccard_score(truth[keep], pred[keep]), accuracy_score(truth[keep], pred[keep])
        assert count(pred, truth).jaccard() == pytest.approx(J, abs=1e-12)
        assert count(pred, truth).accuracy == pytest.approx(P, abs=1e-12)


def test_sizes_must_agree():
    with pytest.raises(ValueError, match="differ in size"):
        count(np.zeros((2, 3), bool), np.zeros((3, 2), np.uint8))


def test_thresholds_by_hand():
    bright = np.array([[0, 0], [0.6, 1]], np.float32)
    # mean .4; deviations -.4 -.4 .2 .6, mean square (.16 + .16 + .04 + .36) / 4 = .18, std .4243
    few = np.array([[0, 0, 0, 0.34, 0.4]], np.float32)
    # mean .148, mean square .05512 - .0219 = .0332, std .1822: .3302; n - 1 would give .3518
    assert PROTOCOLS["ufo"].binarise(few, (1, 5)).sum() == 2
    ssnm, ufo = (PROTOCOLS[name].binarise(bright, (2, 2)).tolist() for name in ("ssnm", "ufo"))
    assert ssnm == [[False, False], [False, True]]  # cap .8
    assert ufo == [[False, False], [True, True]]  # cap .5
    faint = np.array([[0.1, 0.1], [0.1, 0.3]], np.float32)
    # mean .15, mean square (3 · .0025 + .0225) / 4 = .0075, std .0866: .2366 finds what .5 does not
    for name, found in {"ssnm": 1, "ufo": 1, "segswap": 0, "pooled": 0, "native": 0}.items():
        assert PROTOCOLS[name].binarise(faint, (2, 2)).sum() == found, name


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_object_lies_strictly_above_the_threshold(name):
    protocol, size = PROTOCOLS[name], (PROTOCOLS[name].size or 50,) * 2
    for level in (0.0, 0.1, 0.3, 1 / 3, 0.5):
        flat = np.full((37, 53), level, np.float32)
        assert not protocol.binarise(flat, (37, 53)).any(), level
        assert not protocol.binarise(flat, size).any(), level  # no rounding of the resizing counts
    assert protocol.binarise(np.ones((4, 4)), (4, 4)).all()
    edge = protocol.threshold
    values = np.zeros((1, 9), np.float32)
    values[0, :6] = 1.0  # mean + std is above either cap
    values[0, 7:] = np.float32(edge), np.nextafter(np.float32(edge), np.float32(1))
    found = protocol.binarise(values, (1, 9))[0].tolist()
    above = bool(np.nextafter(np.float32(edge), np.float32(1)) > edge)
    assert found == [True] * 6 + [False, bool(np.float32(edge) > edge), above]


def test_resizing_never_leaves_the_range_of_a_map():
    rng = np.random.default_rng(0)
    for shape in ((224, 224), (31, 77), (9, 300)):
        values = 0.2 + 0.5 * rng.random((64, 48)).astype(np.float32)
        resized = resize_map(values, shape)
        assert resized.shape == shape and resized.dtype == np.float32
        assert values.min() <= resized.min() and resized.max() <= values.max()
        assert resized.std() > 0


def test_a_mask_of_0_and_1_passes_every_threshold():
    mask = np.random.default_rng(0).random((9, 9)) < 0.7
    for protocol in PROTOCOLS.values():
        assert np.array_equal(protocol.binarise(mask, (9, 9)), mask), protocol.name


def test_truth_is_squashed_as_the_peers_do():
    from torchvision import transforms

    half = np.zeros((50, 100), np.uint8)
    half[:, :50] = 1
    squash = PROTOCOLS["ufo"].truth
    assert squash(half).sum() == 112 * 224  # aspect ignored: the left half stays it
    peers = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
    rng = np.random.default_rng(1)
    for shape in ((300, 451), (97, 60), (224, 224)):
        blobs = resize_map(rng.random((9, 11), np.float32), shape) > 0.5
        theirs = peers(Image.fromarray((blobs * 255).astype(np.uint8)))[0].numpy() > 0.5
        assert np.array_equal(squash(blobs.astype(np.uint8)), theirs)


def test_a_grey_truth_is_resized_before_its_threshold():
    from torchvision import transforms

    peers = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
    rng = np.random.default_rng(2)
    blobs = resize_map(rng.random((9, 11), np.float32), (300, 451)) > 0.5
    noise = rng.integers(-90, 90, blobs.shape)  # what JPEG does to an edge, only more
    grey = np.clip(np.where(blobs, 255, 0) + noise, 0, 255).astype(np.uint8)
    theirs = peers(Image.fromarray(grey))[0].numpy() > 0.5
    mask = (grey > 127).astype(np.uint8)
    assert np.array_equal(PROTOCOLS["ufo"].truth(mask, grey), theirs)
    assert not np.array_equal(PROTOCOLS["ufo"].truth(mask), theirs)
    for name in ("segswap", "native"):  # at its own size it is the mask
        assert np.array_equal(PROTOCOLS[name].truth(mask, grey), mask)


def test_void_is_background_for_the_peers_alone():
    truth = np.full((8, 8), 255, np.uint8)
    truth[:, :4] = 1
    for name in ("ssnm", "ufo"):
        assert PROTOCOLS[name].truth(truth).sum() == 112 * 224
    assert np.array_equal(PROTOCOLS["segswap"].truth(truth), truth == 1)
    assert PROTOCOLS["native"].truth(truth) is truth
    ones = np.ones((8, 8), bool)
    # predicted everywhere: all counted pixels are right under native, half of them under segswap
    both = [get_protocol(name) for name in ("native", "segswap")]
    native, segswap = (p.row("k", "c", count(ones, p.truth(truth))) for p in both)
    assert (native["P"], native["J"], native["pixels"]) == (1.0, 1.0, 32)
    assert (segswap["P"], segswap["J"], segswap["pixels"]) == (0.5, 0.5, 64)


def test_maps_are_resized_bilinearly():
    ramp = resize_map(np.array([[0.0, 1.0]], np.float32), (1, 4))
    # centres of the four pixels lie at -.25, .25, .75, 1.25 of the two: the ends are held
    assert ramp[0].tolist() == pytest.approx([0, 0.25, 0.75, 1])
    noise = np.random.default_rng(0).random((64, 64), np.float32)  # of deviation .29
    assert resize_map(noise, (8, 8)).std() < 0.06  # antialiased: four pixels alone would leave .14


def test_protocols_are_those_of_the_field():
    """Size, threshold and its kind, void, empty truth, groups and averages: the table by hand."""
    table = {
        "ssnm": (224, 0.8, True, False, "zero", "consecutive", "image"),
        "ufo": (224, 0.5, True, False, "zero", "consecutive", "image"),
        "segswap": (None, 0.5, False, False, "skip", "class", "class"),
        "pooled": (321, 0.5, False, False, "zero", "class", "pooled"),
        "native": (None, 0.5, False, True, "one", "seeded", "image"),
    }
    assert {name: astuple(p)[1:] for name, p in PROTOCOLS.items()} == table
    truth = np.ones((10, 30), np.uint8)
    for name, (size, *_) in table.items():
        assert PROTOCOLS[name].truth(truth).shape == ((size, size) if size else (10, 30))


def test_consecutive_groups_by_hand():
    assert consecutive_groups(range(10), 5) == [([0, 1, 2, 3, 4], 5), ([5, 6, 7, 8, 9], 5)]
    # 12 = 5 + 5 + 2: the last two are completed with the first three, which are not scored again
    assert consecutive_groups(range(12), 5)[-1] == ([10, 11, 0, 1, 2], 2)
    assert consecutive_groups(range(4), 5) == [([0, 1, 2, 3, 0], 4)]
    assert consecutive_groups(range(2), 5) == [([0, 1, 0, 1], 2)]  # the peers' slice has no third
    assert consecutive_groups(range(2), 5, repeat=False) == [([0, 1], 2)]
    assert consecutive_groups(range(3), 1) == [([0], 1), ([1], 1), ([2], 1)]
    assert consecutive_groups([], 5) == []


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_every_image_is_scored_once(name, n):
    for size in range(1, 24):
        groups = PROTOCOLS[name].groups(list(range(100, 100 + size)), n, seed=1, label="cow")
        scored = sorted(i for members, new in groups for i in members[:new])
        assert scored == list(range(100, 100 + size))
        if PROTOCOLS[name].grouping == "class":
            assert [len(members) for members, _ in groups] == [size]
        elif size >= n:
            assert all(len(set(members)) == n for members, _ in groups)


def test_native_groups_depend_on_seed_and_class_alone():
    groups, items = PROTOCOLS["native"].groups, list(range(20))
    (small, new), = groups([7, 8], 5, 0, "cow")
    assert sorted(small) == [7, 8] and new == 2  # no picture stands twice
    assert groups(items, 5, 0, "cow") == groups(items, 5, 0, "cow")
    assert groups(items, 5, 0, "cow") != groups(items, 5, 1, "cow")
    assert groups(items, 5, 0, "cow") != groups(items, 5, 0, "dog")


def rows(name, cases):
    """Rows of (class, inter, predicted, truth) in images of 100 pixels."""
    return [
        PROTOCOLS[name].row(str(n), c, Counts(i, p + t - i, 100 - p - t + 2 * i, 100, p, t))
        for n, (c, i, p, t) in enumerate(cases)
    ]


# class a: J 10/20 = .5 (P .9), J 20/20 = 1 (P 1), no object but 40 predicted (P .6);
# class b: J 30/60 = .5 (P .7)
CASES = [("a", 10, 20, 10), ("a", 20, 20, 20), ("a", 0, 40, 0), ("b", 30, 60, 30)]
EXPECTED = {
    # image means: P (.9 + 1 + .6 + .7) / 4, J (.5 + 1 + 0 + .5) / 4
    "ssnm": (0.8, 0.5),
    "ufo": (0.8, 0.5),
    # class means: P a (.9 + 1 + .6) / 3 = .8333, b .7; J a (.5 + 1) / 2 without the empty one, b .5
    "segswap": ((2.5 / 3 + 0.7) / 2, 0.625),
    # pooled: a (10 + 20 + 0) / (20 + 20 + 40) = .375, b .5
    "pooled": ((2.5 / 3 + 0.7) / 2, 0.4375),
    "native": (0.8, 0.5),  # something is predicted where nothing is: 0 under both conventions
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_averages_by_hand(name):
    got = PROTOCOLS[name].summarise(rows(name, CASES))
    assert (got["P"], got["J"]) == pytest.approx(EXPECTED[name])
    assert got["P_image"] == pytest.approx(0.8)
    assert got["P_class"] == pytest.approx((2.5 / 3 + 0.7) / 2)
    assert got["J_pooled"] == pytest.approx(0.4375)
    assert got["J_nonempty"] == pytest.approx(2 / 3)
    assert (got["false_alarms"], got["empty_area"], got["empty"]) == (1.0, 0.4, 1)
    assert (got["images"], got["classes"]) == (4, 2)
    if name != "segswap":
        assert got["J_class"] == pytest.approx((1.5 / 3 + 0.5) / 2)  # not the image mean


def test_the_conventions_for_an_empty_truth():
    # J 1; without the object, nothing predicted; the same with 1% (not more): no alarm, yet J 0
    cases, names = [("a", 20, 20, 20), ("a", 0, 0, 0), ("a", 0, 1, 0)], ("native", "ufo", "segswap")
    native, ufo, segswap = (PROTOCOLS[n].summarise(rows(n, cases)) for n in names)
    assert (native["J"], native["J_nonempty"]) == pytest.approx((2 / 3, 1))
    assert (ufo["J"], segswap["J"]) == pytest.approx((1 / 3, 1))
    assert native["false_alarms"] == 0 and native["empty_area"] == pytest.approx(0.005)
    assert PROTOCOLS["native"].summarise(rows("native", [("a", 0, 2, 0)]))["false_alarms"] == 1


def test_a_class_without_an_image_that_counts_and_no_rows_at_all():
    # class b has no object: under segswap it has no J, and is left out of the mean over classes
    cases = [("a", 10, 20, 10), ("b", 0, 0, 0), ("b", 0, 5, 0)]
    segswap, ufo = (PROTOCOLS[n].summarise(rows(n, cases)) for n in ("segswap", "ufo"))
    assert (segswap["J"], segswap["J_class"], segswap["classes"]) == (0.5, 0.5, 2)
    assert ufo["J"] == pytest.approx(0.5 / 3) and ufo["J_class"] == pytest.approx(0.25)
    assert ufo["J_pooled"] == pytest.approx((0.5 + 0) / 2)
    nothing = PROTOCOLS["pooled"].summarise(rows("pooled", [("b", 0, 0, 0)]))
    assert nothing["J"] is None and nothing["P"] == 1.0  # no union to divide by
    for p in PROTOCOLS.values():
        none = p.summarise([])
        assert none["P"] is None and none["J"] is None and none["images"] == 0


def test_unknown_protocol_is_named():
    with pytest.raises(LCCoError, match="no protocol `uffo`; there are: ssnm, ufo, segswap"):
        get_protocol("uffo")
