"""What is kept of sets is what the frozen parts say."""

import shutil

import drawn
import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageOps

from lcco.common import place
from lcco.config import Experiment
from lcco.data import load_data
from lcco.experiment.features import Features, deterministic, make_features
from lcco.semantics import Tower


@pytest.fixture
def base(tmp_path) -> Experiment:
    return tiny.experiment(tmp_path)


def fresh(like: Features, **how) -> Features:
    """As after a restart: the same parts, nothing in memory."""
    return Features(like.tower, like.backbone, like.size, **how)


def plain(data, i, size, flip=False):
    """Picture and true mask as squares, decoded naively."""
    image = data.image(i).resize((size, size), Image.Resampling.BILINEAR)
    mask = Image.fromarray(data.mask(i, list(data.classes_of(i)))).resize((size, size), 0)
    both = (ImageOps.mirror(image), ImageOps.mirror(mask)) if flip else (image, mask)
    return [np.array(x) for x in both]


def test_kept_maps_are_the_backbones_to_half_precision(base):
    features, data = make_features(base, "cpu"), load_data(base.data.train)
    items, flips = [1, 5, 7], [False, True, False]
    _, kept = features.visual(data, items, flips)
    squares = np.stack([plain(data, i, 64, f)[0] for i, f in zip(items, flips, strict=True)])
    with torch.no_grad():
        images = torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255
        maps = features.backbone.eval()(images)
    for a, b in zip(kept, maps, strict=True):
        assert a.dtype == torch.float16 and a.shape == b.shape
        torch.testing.assert_close(a.float(), b, atol=2e-3, rtol=2e-3)
    _, again = fresh(features).visual(data, items, flips)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    _, first = fresh(features, stages=1).visual(data, items)  # placement `encoder` keeps one
    assert len(first) == 1 and torch.equal(first[0][0], kept[0][0])


def test_a_live_backbone_gets_the_pictures(base):
    e = base.replace({"model.frozen_stages": 0})
    features, data = make_features(e, "cpu"), load_data(e.data.train)
    images, maps = features.visual(data, [5, 2], [True, False], [None, (0.25, 0, 0.75, 0.5)])
    assert maps is None and images.shape == (2, 3, 64, 64)
    expected = torch.from_numpy(plain(data, 5, 64, True)[0]).permute(2, 0, 1) / 255
    torch.testing.assert_close(images[0], expected)
    box = data.image(2).resize((64, 64), Image.Resampling.BILINEAR, (12, 0, 36, 16))
    torch.testing.assert_close(images[1], torch.from_numpy(np.array(box)).permute(2, 0, 1) / 255)
    cut = features.truth(data, 2, ("cow",), (0.25, 0, 0.75, 0.5))
    mask = Image.fromarray(data.mask(2, ["cow"])).resize((64, 64), 0, (12, 0, 36, 16))
    np.testing.assert_array_equal(cut, np.array(mask))


def test_masked_embeddings_of_what_a_group_seldom_asks_for(base):
    features, data = make_features(base, "cpu"), load_data(base.data.train)
    cow = data.groups["cow"][0]
    one, lacks, two = features.masked(
        data, [(cow, ("cow",)), (cow, ("car",)), (cow, ("car", "cow"))], "mean"
    )
    assert one.norm() == pytest.approx(1, abs=1e-5)
    assert not lacks.any()  # the picture shows no car
    torch.testing.assert_close(one, two)
    assert not torch.allclose(one, features.masked(data, [(cow, ("cow",))], "zero")[0])


def test_the_tower_sees_a_picture_once(base, tmp_path, monkeypatch):
    features, data = make_features(base, "cpu"), load_data(base.data.train)
    seen, pixels = [], Tower._pixels
    monkeypatch.setattr(Tower, "_pixels", lambda self, x: seen.append(x) or pixels(self, x))
    features.prepare(data, flip=True, background="zero")
    assert len(seen) == 2 * len(data)  # whole and masked
    again = fresh(features)
    again.prepare(data, flip=True, background="zero")
    again.embeddings(data, [3, 0])
    assert len(seen) == 2 * len(data)
    twice = drawn.folders(tmp_path, ["cow", "dog"], 2, name="twice", first=50)
    one, other = (sorted((twice / "image" / c).iterdir())[0] for c in ("cow", "dog"))
    shutil.copy(one, other)  # a picture that stands in two classes
    found = load_data(str(twice))
    e = features.embeddings(found, range(4))
    assert torch.equal(e[found.keys.index("cow/co_00")], e[found.keys.index("dog/do_00")])
    assert len(seen) == 2 * len(data) + 3
    kinds = sorted(p.name.partition("-")[0] for p in place("cache").glob("*.npy"))
    assert kinds == ["embeddings", "embeddings", "maps", "maps", "masked"]


def test_pictures_seen_once_leave_nothing_on_disk(base):
    features, data = fresh(make_features(base, "cpu")), load_data(base.data.train)
    features.embeddings(data, [0], keep=False)
    _, maps = features.visual(data, [0, 1], keep=False)
    assert maps[0].dtype == torch.float32 and not list(place("cache").glob("*.npy"))


def test_edited_masks_are_read_anew(base):
    features, data = make_features(base, "cpu"), load_data(base.data.train)
    pair = (0, tuple(data.classes_of(0)))
    seen, said = features.truth(data, *pair), features.masked(data, [pair], "zero")
    file = data.files[0][1]
    ImageOps.invert(Image.open(file).convert("L")).save(file)
    data = load_data(base.data.train)
    np.testing.assert_array_equal(features.truth(data, *pair), 1 - seen)
    assert not torch.equal(features.masked(data, [pair], "zero"), said)


def test_maps_of_large_sets_lie_in_several_files(base, monkeypatch):
    whole, data = make_features(base, "cpu"), load_data(base.data.train)
    items = [11, 0, 4, 5]
    expected = whole.visual(data, items)[1]
    monkeypatch.setattr("lcco.experiment.features.IN_A_FILE", 5)
    parts = fresh(whole)
    shutil.rmtree(place("cache"))
    parts.prepare(data)
    assert len(list(place("cache").glob("maps-*.npy"))) == 3
    for a, b in zip(parts.visual(data, items)[1], expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


def test_a_tower_is_loaded_once_and_a_live_backbone_belongs_to_one_model(base):
    live = base.replace({"model.frozen_stages": 2})
    one, two = make_features(live, "cpu"), make_features(live, "cpu")
    assert two.tower is one.tower and two.backbone is not one.backbone
    assert two.backbone.identity == one.backbone.identity
    other = make_features(live.replace(seed=1), "cpu")  # random weights are the seed's
    assert other.backbone.identity != one.backbone.identity


def test_deterministic_is_set_and_taken_back(base):
    features, before = make_features(base, "cpu"), torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError), deterministic(features):
        assert torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 2
    torch.set_num_threads(before)
