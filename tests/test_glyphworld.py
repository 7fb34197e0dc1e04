"""GlyphWorld: glyphs exist, drawings are the same every time, folds keep their promises."""

import hashlib

import numpy as np
import pytest

from lcco.common import digest
from lcco.data import load_data
from lcco.data.glyphworld import (
    CLASSES,
    TEST_CLASSES,
    TRAIN_CLASSES,
    VERSION,
    draw,
    glyphworld,
)


def test_every_class_is_its_own_glyph_of_the_font():
    from matplotlib import font_manager, ft2font

    font = ft2font.FT2Font(font_manager.findfont("DejaVu Sans"))
    assert all(ord(symbol) in font.get_charmap() for symbol in CLASSES.values())
    assert len(set(CLASSES.values())) == len(CLASSES) == 85
    assert not set(TRAIN_CLASSES) & set(TEST_CLASSES)
    assert [*TRAIN_CLASSES, *TEST_CLASSES] == list(CLASSES)


def test_shapes_of_all_classes_differ():
    shapes = {}
    for name in CLASSES:
        _, labels = draw([name], 3, 64)
        y, x = np.nonzero(labels)
        assert y.size > 64 * 64 * 0.05, f"{name} is hardly there"
        crop = labels[y.min() : y.max() + 1, x.min() : x.max() + 1] > 0
        rows, columns = (np.linspace(0, n - 1, 16).round().astype(int) for n in crop.shape)
        shapes[name] = crop[np.ix_(rows, columns)]
    discs = {"radiation sign", "yin yang", "smiling face", "film reel", "sunglasses"}
    names = list(shapes)
    for i, a in enumerate(names):
        for b in names[:i]:
            differ = (shapes[a] != shapes[b]).mean() > 0.04
            assert differ or {a, b} <= discs, f"{a} and {b} have the same outline"


def test_drawing_depends_on_its_arguments_alone():
    (a, la), (b, lb), (c, lc) = (draw(["heart", "sun"], seed) for seed in ((4, 2), (4, 2), 5))
    assert np.array_equal(a, b) and np.array_equal(la, lb)
    assert not np.array_equal(la, lc) and not np.array_equal(a, c)
    assert (
        a.mode == "RGB" and a.size == (128, 128) and la.dtype == np.uint8 and la.shape == (128, 128)
    )
    names = list(CLASSES)
    assert set(np.unique(la)) == {0, names.index("heart") + 1, names.index("sun") + 1}
    _, small = draw(["heart", "sun"], (4, 2), 64)  # the same scene, half the size
    assert small.shape == (64, 64) and (small != la[::2, ::2]).mean() < 0.06


@pytest.mark.parametrize(
    ("fold", "manifest", "groups", "drawings"),
    [
        ("pretrain", "1cc160a824ac", "e3983826d71f", "2dcfd3d2bbfa"),
        ("train", "cb07bef237ad", "033ee0da94cf", "a2103e9621f5"),
        ("holdout", "742ce7e2b45c", "e1c0ff31ca1c", "4818e84e4c45"),
        ("test", "6909ff73fe7b", "ad464be95a62", "08637d1de605"),
        ("choice", "0d74ed143ed6", "3ee9a4afbefe", "940bce868e76"),
    ],
)
def test_the_drawings_are_those_of_version_1(fold, manifest, groups, drawings):
    """Raise VERSION if the same classes and seed draw something else: results hang on them."""
    data, found = glyphworld(fold), hashlib.sha256()
    for i in range(0, len(data), len(data) // 5):
        labels = sum(n * data.mask(i, [c]) for n, c in enumerate(CLASSES, 1))
        found.update(np.asarray(data.image(i)).tobytes() + labels.astype(np.uint8).tobytes())
    assert VERSION == 1 and data.digest() == manifest
    assert digest({c: list(items) for c, items in data.groups.items()}) == groups
    assert found.hexdigest()[:12] == drawings


def test_objects_stand_off_the_background_and_are_mostly_seen():
    contrast = []
    for seed in range(40):
        picture, labels = draw(["anchor", "cat", "gear"], seed)
        assert len(np.unique(labels)) == 4
        x = np.asarray(picture, float) @ (0.299, 0.587, 0.114)
        contrast += [
            abs(np.median(x[labels == k]) - np.median(x[labels == 0]))
            for k in np.unique(labels)[1:]
        ]
    assert np.quantile(contrast, 0.1) > 35  # of 255


def test_an_empty_scene():
    assert draw([], 1)[1].max() == 0


@pytest.mark.parametrize("fold", ["train", "holdout"])
def test_training_folds_never_show_a_test_class(fold):
    data = glyphworld(fold)
    assert len(data) == {"train": 3000, "holdout": 300}[fold]
    assert {c for scene in data.scenes for c in scene} == set(TRAIN_CLASSES) == set(data.groups)
    assert {len(scene) for scene in data.scenes} == {2, 3}
    for c, items in data.groups.items():
        assert all(c in data.classes_of(i) for i in items)
    assert sum(map(len, data.groups.values())) == sum(map(len, data.scenes))
    assert min(map(len, data.groups.values())) >= {"train": 50, "holdout": 4}[fold]


def test_test_fold_has_one_group_a_class_distractors_and_a_few_empty_masks():
    data = glyphworld("test")
    assert len(data) == 300 and set(data.groups) == set(TEST_CLASSES)
    assert sorted(i for g in data.groups.values() for i in g) == list(range(300))
    lacking = [(c, i) for c, g in data.groups.items() for i in g if c not in data.scenes[i]]
    assert len(lacking) == 10  # one of five pictures in every sixth of the 60 sets
    assert all(data.mask(i, [c]).max() == 0 for c, i in lacking)
    for c, items in data.groups.items():
        for i in items[:3]:
            assert len(data.scenes[i]) >= 2 and set(data.scenes[i]) <= set(TEST_CLASSES)
            assert (data.mask(i, [c]).max() == 1) == (c in data.scenes[i])
    assert len(set(data.keys)) == 300 and data.keys[data.groups["anchor"][0]].startswith("anchor/")


def test_choice_pictures_hold_two_classes_and_sit_in_both_groups():
    data = glyphworld("choice")
    for i, scene in enumerate(data.scenes):
        assert len(set(scene)) == 2 and all(i in data.groups[c] for c in scene)
    for i in (0, 100, 263):
        masks = [data.mask(i, [c]) for c in data.scenes[i]]
        assert all(m.sum() > 300 for m in masks) and (masks[0] & masks[1]).max() == 0
        assert np.array_equal(data.mask(i, data.scenes[i]), masks[0] | masks[1])
        assert data.mask(i, ["sun"]).max() == 0


def test_the_set_interface():
    data = load_data("glyphworld_test")
    assert data.name == "glyphworld_test" and data.layout == "glyphworld"
    assert np.array_equal(data.image(7), glyphworld("test").image(7))
    assert data.digest() == glyphworld("test").digest() != glyphworld("choice").digest()
    assert data.content(3) != data.content(4) and data.content(3) != glyphworld(
        "test", size=64
    ).content(3)
    part = data.subset([5, 30, 31], "part")
    assert np.array_equal(part.image(1), data.image(30)) and part.content(2) == data.content(31)
    picture = data.image(0)
    picture.paste(0, (0, 0, 128, 128))  # a caller may scribble on what it gets
    assert np.asarray(data.image(0)).max() > 0


def test_folds_share_no_picture():
    contents = [
        {d.content(i) for i in range(len(d))}
        for d in map(glyphworld, ("train", "holdout", "pretrain"))
    ]
    assert all(not (a & b) for i, a in enumerate(contents) for b in contents[:i])


def test_vocabulary_lists_the_classes():
    from pathlib import Path

    import lcco

    words = (Path(lcco.__file__).parent / "vocab" / "glyphs.txt").read_text().split("\n")
    assert [w for w in words if w] == list(CLASSES)
