"""P, J, the thresholds, the groups and the averages, worked by hand and against scikit-learn and the peers' way."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score

from lcco.common import LCCoError
from lcco.metrics import (
    PROTOCOLS,
    Counts,
    adaptive_threshold,
    consecutive_groups,
    count,
    get_protocol,
    jaccard,
    pixel_accuracy,
    resize_map,
    resize_truth,
)

torch.set_num_threads(1)
TRUTH = np.array([[1, 1, 0, 0], [1, 1, 0, 255]], np.uint8)
PRED = np.array([[1, 0, 1, 0], [1, 0, 0, 1]], bool)


def test_counts_by_hand():
    # void ignored: 7 pixels count; object 4, predicted 3 (the one on void does not count), both 2
    # union 4 + 3 - 2 = 5; wrong are 2 missed + 1 extra, so 4 of 7 are right
    assert count(PRED, TRUTH) == Counts(inter=2, union=5, correct=4, pixels=7, predicted=3, truth=4)
    assert jaccard(PRED, TRUTH) == 2 / 5
    assert pixel_accuracy(PRED, TRUTH) == 4 / 7
    # void as background: the pixel predicted there is one more false one
    assert count(PRED, TRUTH, ignore_void=False) == Counts(2, 6, 4, 8, 4, 4)
    assert jaccard(PRED, TRUTH, ignore_void=False) == 2 / 6
    assert pixel_accuracy(PRED, TRUTH, ignore_void=False) == 4 / 8


def test_empty_truth_conventions():
    nothing, some = np.zeros((2, 2), bool), np.eye(2, dtype=bool)
    empty = np.zeros((2, 2), np.uint8)
    assert [jaccard(nothing, empty, empty=e) for e in ("zero", "one", "skip")] == [0.0, 1.0, None]
    assert [jaccard(some, empty, empty=e) for e in ("zero", "one", "skip")] == [0.0, 0.0, None]
    assert pixel_accuracy(some, empty) == 0.5
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
        assert jaccard(pred, truth) == pytest.approx(jaccard_score(truth[keep], pred[keep]), abs=1e-12)
        assert pixel_accuracy(pred, truth) == pytest.approx(accuracy_score(truth[keep], pred[keep]), abs=1e-12)


def test_sizes_must_agree():
    with pytest.raises(ValueError, match="differ in size"):
        count(np.zeros((2, 3), bool), np.zeros((3, 2), np.uint8))


def test_thresholds_by_hand():
    bright = np.array([[0, 0], [0.6, 1]], np.float32)
    # mean 0.4; deviations -.4 -.4 .2 .6, mean square (.16 + .16 + .04 + .36) / 4 = .18, std .4243; sum .8243
    assert adaptive_threshold(bright, 0.9) == pytest.approx(0.8243, abs=1e-4)
    assert PROTOCOLS["ssnm"].binarise(bright, (2, 2)).tolist() == [[False, False], [False, True]]  # cap .8
    assert PROTOCOLS["ufo"].binarise(bright, (2, 2)).tolist() == [[False, False], [True, True]]  # cap .5
    faint = np.array([[0.1, 0.1], [0.1, 0.3]], np.float32)
    # mean .15, mean square (3 · .0025 + .0225) / 4 = .0075, std .0866: threshold .2366 finds what .5 does not
    for name, found in {"ssnm": 1, "ufo": 1, "segswap": 0, "pooled": 0, "native": 0}.items():
        assert PROTOCOLS[name].binarise(faint, (2, 2)).sum() == found, name
    for name in PROTOCOLS:  # strictly above, without rounding noise on a flat map
        flat = np.full((224, 224), 0.3, np.float32)
        assert not PROTOCOLS[name].binarise(flat, (224, 224)).any(), name
        assert not PROTOCOLS[name].binarise(np.zeros((4, 4)), (4, 4)).any(), name
        assert PROTOCOLS[name].binarise(np.ones((4, 4)), (4, 4)).all(), name


def test_a_mask_of_0_and_1_passes_every_threshold():
    mask = np.random.default_rng(0).random((9, 9)) < 0.7
    for protocol in PROTOCOLS.values():
        assert np.array_equal(protocol.binarise(mask, (9, 9)), mask), protocol.name


def test_truth_is_squashed_as_the_peers_do():
    from torchvision import transforms

    half = np.zeros((50, 100), np.uint8)
    half[:, :50] = 1
    assert resize_truth(half, 224).sum() == 112 * 224  # aspect ignored: the left half stays the left half
    peers = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
    rng = np.random.default_rng(1)
    for shape in ((300, 451), (97, 60), (224, 224)):
        blobs = resize_map(rng.random((9, 11), np.float32), shape) > 0.5
        theirs = peers(Image.fromarray((blobs * 255).astype(np.uint8)))[0].numpy() > 0.5
        assert np.array_equal(resize_truth(blobs.astype(np.uint8), 224), theirs)


def test_void_is_background_for_the_peers_alone():
    truth = np.full((8, 8), 255, np.uint8)
    truth[:, :4] = 1
    for name in ("ssnm", "ufo"):
        assert PROTOCOLS[name].truth(truth).sum() == 112 * 224
    assert np.array_equal(PROTOCOLS["segswap"].truth(truth), truth == 1)
    assert PROTOCOLS["native"].truth(truth) is truth
    ones = np.ones((8, 8), bool)
    # predicted everywhere: all counted pixels are right under native, half of them under segswap
    native, segswap = (p.row("k", "c", count(ones, p.truth(truth))) for p in map(get_protocol, ("native", "segswap")))
    assert (native["P"], native["J"], native["pixels"]) == (1.0, 1.0, 32)
    assert (segswap["P"], segswap["J"], segswap["pixels"]) == (0.5, 0.5, 64)


def test_maps_are_resized_bilinearly():
    ramp = resize_map(np.array([[0.0, 1.0]], np.float32), (1, 4))
    # centres of the four pixels lie at -.25, .25, .75, 1.25 of the two: the ends are held
    assert ramp[0].tolist() == pytest.approx([0, 0.25, 0.75, 1])
    checks = np.indices((64, 64)).sum(0) % 2
    assert np.abs(resize_map(checks, (8, 8)) - 0.5).max() < 0.05  # antialiased: no pixel is picked by chance


def test_consecutive_groups_by_hand():
    assert consecutive_groups(range(10), 5) == [([0, 1, 2, 3, 4], 5), ([5, 6, 7, 8, 9], 5)]
    # 12 = 5 + 5 + 2: the last two are completed with the first three, which are not scored again
    assert consecutive_groups(range(12), 5)[-1] == ([10, 11, 0, 1, 2], 2)
    assert consecutive_groups(range(4), 5) == [([0, 1, 2, 3, 0], 4)]
    assert consecutive_groups(range(2), 5) == [([0, 1, 0, 1], 2)]  # the peers' slice has no third image to take
    assert consecutive_groups(range(2), 5, repeat=False) == [([0, 1], 2)]
    assert consecutive_groups(range(3), 1) == [([0], 1), ([1], 1), ([2], 1)]
    assert consecutive_groups([], 5) == []


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_every_image_is_scored_once(name, n):
    for size in range(1, 24):
        groups = PROTOCOLS[name].groups(list(range(100, 100 + size)), n, seed=1, label="cow")
        assert sorted(i for members, new in groups for i in members[:new]) == list(range(100, 100 + size))
        if PROTOCOLS[name].grouping == "class":
            assert [len(members) for members, _ in groups] == [size]
        elif size >= n:
            assert all(len(set(members)) == n for members, _ in groups)


def test_native_groups_depend_on_seed_and_class_alone():
    groups, items = PROTOCOLS["native"].groups, list(range(20))
    assert groups(items, 5, 0, "cow") == groups(items, 5, 0, "cow")
    assert groups(items, 5, 0, "cow") != groups(items, 5, 1, "cow")
    assert groups(items, 5, 0, "cow") != groups(items, 5, 0, "dog")


def rows(name, cases):
    """Rows of (class, inter, predicted, truth) in images of 100 pixels."""
    return [
        PROTOCOLS[name].row(str(n), c, Counts(i, p + t - i, 100 - p - t + 2 * i, 100, p, t))
        for n, (c, i, p, t) in enumerate(cases)
    ]


# class a: J 10/20 = .5 (P .9), J 20/20 = 1 (P 1), no object but 40 predicted (P .6); class b: J 30/60 = .5 (P .7)
CASES = [("a", 10, 20, 10), ("a", 20, 20, 20), ("a", 0, 40, 0), ("b", 30, 60, 30)]
EXPECTED = {
    # image means: P (.9 + 1 + .6 + .7) / 4, J (.5 + 1 + 0 + .5) / 4
    "ssnm": (0.8, 0.5),
    "ufo": (0.8, 0.5),
    # class means: P a (.9 + 1 + .6) / 3 = .8333, b .7; J a (.5 + 1) / 2 = .75 without the empty one, b .5
    "segswap": ((2.5 / 3 + 0.7) / 2, 0.625),
    # pooled: a (10 + 20 + 0) / (20 + 20 + 40) = .375, b .5
    "pooled": ((2.5 / 3 + 0.7) / 2, 0.4375),
    "native": (0.8, 0.5),  # something is predicted where nothing is: 0 under both conventions
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_averages_by_hand(name):
    got = PROTOCOLS[name].summarise(rows(name, CASES))
    assert (got["P"], got["J"]) == pytest.approx(EXPECTED[name])
    assert got["P_image"] == pytest.approx(0.8) and got["P_class"] == pytest.approx((2.5 / 3 + 0.7) / 2)
    assert got["J_pooled"] == pytest.approx(0.4375)
    assert got["J_nonempty"] == pytest.approx(2 / 3)
    assert (got["false_alarms"], got["empty_area"], got["empty"]) == (1.0, 0.4, 1)
    assert (got["images"], got["classes"]) == (4, 2)
    if name != "segswap":
        assert got["J_class"] == pytest.approx((1.5 / 3 + 0.5) / 2)  # unequal classes: not the image mean


def test_both_conventions_of_native():
    # one image of J 1, one without the object in which nothing is predicted, one with 1% (not more): no alarm, yet J 0
    cases = [("a", 20, 20, 20), ("a", 0, 0, 0), ("a", 0, 1, 0)]
    native, ufo, segswap = (PROTOCOLS[n].summarise(rows(n, cases)) for n in ("native", "ufo", "segswap"))
    assert (native["J"], native["J_other"], native["J_nonempty"]) == pytest.approx((2 / 3, 1 / 3, 1))
    assert (ufo["J"], ufo["J_other"]) == pytest.approx((1 / 3, 2 / 3))
    assert (segswap["J"], segswap["J_other"]) == pytest.approx((1, 1 / 3))
    assert native["false_alarms"] == 0


def test_unknown_protocol_is_named():
    with pytest.raises(LCCoError, match="no protocol `uffo`; there are: ssnm, ufo, segswap, pooled, native"):
        get_protocol("uffo")
