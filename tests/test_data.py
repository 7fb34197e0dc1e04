"""Readers, sampler and check, against sets drawn on disk with masks known by hand."""

from __future__ import annotations

import io
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import drawn
import numpy as np
import pytest
from PIL import Image

from lcco import data as d
from lcco.common import LCCoError, digest
from lcco.data import Draw, GroupSampler, check, load_data, near_pairs, overlap, picture_hash, recognise


# ------------------------------------------------------------------------------------------------------------ readers
@pytest.mark.parametrize("truth", [".png", ".bmp", ".jpg"])
def test_folders_read_back_exactly(tmp_path: Path, truth: str) -> None:
    data = load_data(str(drawn.folders(tmp_path, ("cow", "car"), 3, truth=truth)))
    assert data.layout == "folders" and len(data) == 6
    assert list(data.groups) == ["car", "cow"]
    assert data.keys[data.groups["cow"][1]] == "cow/co_01"
    i = data.groups["cow"][0]
    assert np.array_equal(data.mask(i, ["cow"]), drawn.rectangle())
    assert np.array_equal(data.mask(i, ["car", "cow"]), drawn.rectangle())
    assert not data.mask(i, ["car"]).any() and data.mask(i, ["car"]).shape == (32, 48)
    assert data.classes_of(i) == {"cow"}
    assert data.image(i).size == drawn.SIZE and data.image(i).mode == "RGB"


def test_folder_truth_is_object_above_127(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow",), 1)
    grey = np.array([[0, 127], [128, 255]], np.uint8)
    Image.fromarray(grey).save(root / "groundtruth/cow/co_00.png")
    drawn.picture(0, (0, 0, 1, 1), (2, 2)).save(root / "image/cow/co_00.jpg")
    assert load_data(str(root)).mask(0, ["cow"]).tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_folder_truth_of_0_and_1_is_refused(tmp_path: Path, suffix: str) -> None:
    root = drawn.folders(tmp_path, ("cow",), 4, truth=suffix)
    truth = root / "groundtruth/cow"
    Image.fromarray(drawn.rectangle(value=1)).save(truth / f"co_00{suffix}")
    Image.fromarray(drawn.rectangle(value=1).astype(bool)).save(truth / f"co_01{suffix}")  # 1 bit a pixel: white
    Image.fromarray(drawn.rectangle(None)).save(truth / f"co_02{suffix}")
    data = load_data(str(root))
    with pytest.raises(LCCoError, match=f"co_00{suffix}: mask of the values 0 and 1; save the object as 255") as caught:
        data.mask(0, ["cow"])
    assert "\n" not in str(caught.value)
    assert not data.mask(0, ["dog"]).any()
    assert np.array_equal(data.mask(1, ["cow"]), drawn.rectangle()) and not data.mask(2, ["cow"]).any()
    assert _rows(check(root), "unreadable mask") == ["cow/co_00"]  # a table, as ever


def test_masks_that_would_read_as_empty_are_refused(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow",), 4)
    truth = root / "groundtruth/cow"
    Image.fromarray(drawn.rectangle(value=38)).save(truth / "co_00.png")  # VOC's palette as grey
    clear = Image.new("L", (48, 32))
    for n, alpha in enumerate((drawn.rectangle(value=255), drawn.rectangle(None, value=255) + 255), 1):
        size = alpha.shape[::-1]
        cut = Image.merge("LA", (clear.resize(size), Image.fromarray(alpha.astype(np.uint8))))
        cut.save(truth / f"co_0{n}.png")
    data = load_data(str(root))
    with pytest.raises(LCCoError, match="co_00.png: mask without a value above 127, but 38; save the object as 255"):
        data.mask(0, ["cow"])
    with pytest.raises(LCCoError, match="co_01.png: mask with transparency; save it as grey"):
        data.mask(1, ["cow"])
    assert not data.mask(2, ["cow"]).any()  # all opaque: its grey counts
    assert data.mask(3, ["cow"]).any()
    assert _rows(check(root), "unreadable mask") == ["cow/co_00", "cow/co_01"]


def test_check_names_what_readers_pass_over(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow", "dog", "car", "bus"), 2)
    for f in (root / "image/dog").iterdir():
        f.rename(f.with_suffix(".gif"))
    shutil.rmtree(root / "image/car")
    for f in (root / "groundtruth/bus").iterdir():
        Image.new("L", Image.open(f).size).save(f)
    shutil.copy(root / "image/cow/co_00.jpg", root / "image/cow/notes.txt")
    Image.open(root / "image/cow/co_00.jpg").save(root / "image/cow/co_00.png")
    table = check(root)
    assert not table.attrs["ok"] and _rows(table, "class without a picture") == ["car", "dog"]
    assert _rows(table, "class without an object") == ["bus"]
    assert _rows(table, "file left out") == ["cow/co_00.jpg", "cow/notes.txt"]


def test_no_set_an_empty_list_and_annotations_without_areas_are_named(tmp_path: Path) -> None:
    for spec in ("", " "):
        with pytest.raises(LCCoError, match="no data set is named"):
            load_data(spec, tmp_path)
    drawn.voc(tmp_path)
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").write_text("\n")
    with pytest.raises(LCCoError, match=r"lists no picture in train.txt"):
        load_data("voc_train", tmp_path)
    root = drawn.coco(tmp_path)
    file = next(root.rglob("instances_*.json"))
    file.write_text(file.read_text().replace('"area"', '"size"'))
    with pytest.raises(LCCoError, match="not a COCO instances file"):
        d.COCOData("coco", root, min_images=1)


def test_folder_truth_of_a_jpeg_may_be_nearly_black(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow",), 1, truth=".jpg")
    Image.new("L", drawn.SIZE, 1).save(root / "groundtruth/cow/co_00.jpg")
    assert not load_data(str(root)).mask(0, ["cow"]).any()


def test_class_names(tmp_path: Path) -> None:
    data = load_data(str(drawn.folders(tmp_path, ("Dining_Table", "TV monitor", "Hot dog"), 1)))
    assert list(data.groups) == ["diningtable", "hot dog", "tvmonitor"]


def test_icoseg_and_rubinstein(tmp_path: Path) -> None:
    own = load_data(str(drawn.icoseg(tmp_path)))
    assert own.layout == "icoseg" and list(own.groups) == ["cheetah", "panda1"] and len(own) == 6
    internet = load_data(str(drawn.rubinstein(tmp_path)))
    assert internet.layout == "rubinstein" and list(internet.groups) == ["airplane", "car", "horse"]
    assert load_data("internet300", tmp_path).digest() == internet.digest()
    for data in (own, internet):
        for c, items in data.groups.items():
            assert len(items) == 3 and all(np.array_equal(data.mask(i, [c]), drawn.rectangle()) for i in items)
    with pytest.raises(LCCoError, match="icoseg8.*lacks the groups bear2, brownbear"):
        load_data("icoseg8", tmp_path)
    assert len(load_data("icoseg38", tmp_path)) == 6


def test_voc_masks_void_and_labels(tmp_path: Path) -> None:
    drawn.voc(tmp_path)  # classes dog (12), person (15), horse (13) in turn; odd images also a person
    data = load_data("voc_train", tmp_path)
    assert data.keys[0] == "2007_000000" and len(data) == 12
    assert [data.classes_of(i) for i in (0, 1, 3)] == [{"dog"}, {"person"}, {"dog", "person"}]
    x0, y0, x1, y1 = drawn.BOX
    truth = drawn.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), value=255)
    truth[y0:y1, x0:x1] = 0
    with_dog = truth.copy()
    with_dog[y0:y1, x0:x1] = 1
    assert np.array_equal(data.mask(3, ["dog"]), with_dog)
    both = np.maximum(with_dog, drawn.rectangle(drawn.SECOND))
    assert np.array_equal(data.mask(3, ["dog", "person"]), both)
    assert np.array_equal(data.mask(3, ["aeroplane"]), truth)  # absent: background, void stays void
    assert data.groups["dog"] == (0, 3, 6, 9)
    assert len(load_data("voc_trainval", tmp_path)) == 16


def test_voc_group_needs_a_share_of_the_pixels(tmp_path: Path) -> None:
    root = drawn.voc(tmp_path, classes=(12,), second=15)
    mask = drawn.rectangle(value=12)
    mask[:3, :5] = 8  # 15 of 1,536 px: 0.98% of cat
    Image.fromarray(mask).save(root / "SegmentationClass/2007_000000.png")  # a grey PNG of class numbers reads as well
    mask[0, 5] = 8  # 16 px: 1.04%
    Image.fromarray(mask).save(root / "SegmentationClass/2007_000002.png")
    data = load_data("voc_train", tmp_path)
    assert data.groups["cat"] == (2,)
    assert data.labels_of(0) == {"dog", "cat"} and data.classes_of(0) == {"dog"}


def test_voc_augmented_list(tmp_path: Path) -> None:
    root = drawn.voc(tmp_path, train=3, val=1)
    os.rename(root / "SegmentationClass", root / "SegmentationClassAug")
    lists = root / "ImageSets/Segmentation"
    lines = [f"/JPEGImages/{s}.jpg /SegmentationClassAug/{s}.png" for s in (lists / "train.txt").read_text().split()]
    (lists / "trainaug.txt").write_text("\n".join(lines))
    assert load_data("voc_trainaug", tmp_path).keys == ("2007_000000", "2007_000001", "2007_000002")
    with pytest.raises(LCCoError, match="no folder .*SegmentationClass"):
        load_data("voc_train", tmp_path)


def test_voc_label_index_follows_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = drawn.voc(tmp_path)
    assert load_data("voc_train", tmp_path).classes_of(0) == {"dog"}
    calls = []
    counts = d._label_counts
    monkeypatch.setattr(d, "_label_counts", lambda p: calls.append(p.stem) or counts(p))
    assert load_data("voc_train", tmp_path).classes_of(0) == {"dog"} and not calls  # from disk
    Image.fromarray(drawn.rectangle(value=8)).save(root / "SegmentationClass/2007_000000.png")
    assert load_data("voc_train", tmp_path).classes_of(0) == {"cat"} and calls == ["2007_000000"]
    for file in Path(os.environ["LCCO_CACHE"]).glob("labels-*.json"):
        file.write_text(file.read_text()[:40])
    assert load_data("voc_train", tmp_path).classes_of(0) == {"cat"} and len(calls) == 13  # damaged: rebuilt


def test_coco_seg_rule_by_hand(tmp_path: Path) -> None:
    root = drawn.coco(tmp_path)
    data = d.COCOData("coco", root, min_images=1)
    # kept: cat in 0 and 1, dog in 1 and 2. A small cat (2), a crowd of cats (3) and a small dog (3) do not count
    assert data.keys == ("000000000000", "000000000001", "000000000002")
    assert data.groups == {"cat": (0, 1), "dog": (1, 2)}
    assert data.classes_of(2) == {"dog"} and data.labels_of(2) == {"cat", "dog"}
    size = (120, 90)
    assert np.array_equal(data.mask(1, ["cat"]), drawn.rectangle((10, 5, 80, 85), size))
    union = drawn.rectangle((10, 5, 80, 85), size) | drawn.rectangle((40, 10, 110, 80), size)
    assert np.array_equal(data.mask(1, ["cat", "dog"]), union)
    assert data.mask(2, ["cat"]).sum() == 400  # every annotation of a category counts in its mask


def test_coco_seg_thresholds(tmp_path: Path) -> None:
    exact, above = (0, 0, 80, 50), (0, 0, 89, 45)  # 4,000 and 4,005 px
    annotations = [drawn.coco_box(0, 1, exact), drawn.coco_box(1, 1, above), drawn.coco_box(2, 2, above),
                   drawn.coco_box(3, 2, above)]  # fmt: skip
    root = drawn.coco(tmp_path, annotations)
    assert d.COCOData("c", root, min_images=1).groups == {"cat": (0,), "dog": (1, 2)}
    assert d.COCOData("c", root, min_images=2).groups == {"dog": (0, 1)}
    with pytest.raises(LCCoError, match="no category has 100 images"):
        load_data("coco_seg", tmp_path)


# --------------------------------------------------------------------------------------------------- names and joining
def test_joined_sets_merge_groups_of_one_name(tmp_path: Path) -> None:
    drawn.voc(tmp_path)
    drawn.folders(tmp_path, d.VOC_CLASSES, 2, name="PASCAL_VOC")
    (tmp_path / "PASCAL_VOC/fold_train.txt").write_text("dog/do_01\nsheep/sh_00\n")
    data = load_data("voc_train+pascal_fold_train", tmp_path)
    assert len(data) == 14 and data.name == "voc_train+pascal_fold_train" and data.layout == "voc+folders"
    assert list(data.groups) == ["dog", "horse", "person", "sheep"]
    assert [data.keys[i] for i in data.groups["dog"]] == [
        "2007_000000", "2007_000003", "2007_000006", "2007_000009", "dog/do_01"
    ]  # fmt: skip
    dog = data.keys.index("dog/do_01")
    assert np.array_equal(data.mask(dog, ["dog"]), drawn.rectangle()) and not data.mask(dog, ["person"]).any()
    assert data.knows_all(0) and not data.knows_all(dog)
    whole = load_data("pascal1037", tmp_path)
    assert data.content(dog) == whole.content(whole.keys.index("dog/do_01"))
    parts = [load_data(n, tmp_path) for n in ("voc_train", "pascal_fold_train")]
    assert data.digest() == digest([(p.keys[i], p.content(i)) for p in parts for i in range(len(p))])


def test_joined_sets_keep_keys_apart(tmp_path: Path) -> None:
    drawn.folders(tmp_path, ("cow",), 2, name="one")
    drawn.folders(tmp_path, ("cow",), 2, name="two", first=50)
    data = load_data("one+two", tmp_path)
    assert data.keys == ("one:cow/co_00", "one:cow/co_01", "two:cow/co_00", "two:cow/co_01")
    assert data.groups == {"cow": (0, 1, 2, 3)}
    with pytest.raises(LCCoError, match="twice"):
        load_data("one+one", tmp_path)


def test_a_set_without_the_pictures_of_another(tmp_path: Path) -> None:
    drawn.folders(tmp_path, ("cow", "dog"), 3, name="mine")
    drawn.folders(tmp_path, ("horse",), 2, name="test", first=40)
    shutil.copy(tmp_path / "mine/image/cow/co_01.jpg", tmp_path / "test/image/horse/ho_00.jpg")
    again = Image.open(tmp_path / "mine/image/dog/do_02.jpg").resize((60, 45))  # by look
    again.save(tmp_path / "test/image/horse/ho_01.jpg")
    for _ in range(2):  # computed, then read
        data = load_data("mine without test", tmp_path)
        assert data.name == "mine without test" and len(data) == 4
        assert set(data.keys) == {"cow/co_00", "cow/co_02", "dog/do_00", "dog/do_01"}
    drawn.folders(tmp_path, ("car",), 2, name="more", first=70)
    joined = load_data("mine without test without more+more", tmp_path)
    assert len(joined) == 6 and d.overlap(joined, load_data("test", tmp_path)) == []


def test_joined_folders_of_one_name_are_numbered(tmp_path: Path) -> None:
    for n, folder in enumerate("xyz"):
        drawn.folders(tmp_path / folder, ("cow",), 2, name="photos", first=50 * n)
    data = load_data("x/photos+y/photos+z/photos", tmp_path)
    assert data.keys == tuple(f"{name}:cow/co_0{i}" for name in ("photos", "photos#2", "photos#3") for i in (0, 1))
    assert data.groups == {"cow": (2, 3, 4, 5, 0, 1)} and len(set(data.hashes())) == 6  # by key, as ever
    assert data.path(2) == tmp_path / "y/photos/image/cow/co_00.jpg"
    drawn.folders(tmp_path / "w", ("dog",), 1, name="photos", first=300)  # no key in common: no number, as ever
    assert load_data("x/photos+w/photos", tmp_path).keys == ("cow/co_00", "cow/co_01", "dog/do_00")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    for spec in ("x/photos+y/photos+x/photos", f"x/photos+{tmp_path}/x/photos", "x/photos+link/photos"):
        with pytest.raises(LCCoError, match="holds `photos:cow/co_00` twice; name each set once"):
            load_data(spec, tmp_path)
    with pytest.raises(LCCoError, match="twice"):
        load_data("glyphworld_test:2+glyphworld_test:2")
    with pytest.raises(LCCoError, match="twice"):
        data.subset([0, 0], "part")


def test_subset_keeps_order_content_and_hash(tmp_path: Path) -> None:
    data = load_data(str(drawn.folders(tmp_path)))
    part = data.subset([7, 2, 3], "part")
    assert part.name == "part" and part.keys == tuple(data.keys[i] for i in (7, 2, 3))
    assert part.groups == {"car": (1, 2), "cow": (0,)}
    assert part.content(0) == data.content(7) and part.hashes() == [data.hashes()[i] for i in (7, 2, 3)]
    assert part.digest() == digest([(k, part.content(i)) for i, k in enumerate(part.keys)]) != data.digest()
    assert part.subset([2], "less").keys == (data.keys[3],)


def test_digest_and_content_follow_the_bytes(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path)
    before = load_data(str(root))
    assert before.digest() == load_data(str(root)).digest()
    drawn.picture(999).save(root / "image/cow/co_00.jpg")
    after = load_data(str(root))
    assert after.digest() != before.digest()
    assert sum(before.content(i) != after.content(i) for i in range(len(after))) == 1


def test_identity_follows_the_masks_too(tmp_path: Path) -> None:
    drawn.voc(tmp_path)
    coco = drawn.coco(tmp_path)
    mine = drawn.folders(tmp_path, ("cow", "dog"), 2, name="mine") / "groundtruth/cow/co_00.png"
    sets = {
        load_data("voc_train", tmp_path).truth_path(0): lambda: load_data("voc_train", tmp_path),
        next(coco.rglob("instances_*.json")): lambda: d.COCOData("coco", coco, min_images=1),
        mine: lambda: load_data("voc_train+mine", tmp_path).subset([13, 12, 3], "part"),
    }
    for file, load in sets.items():
        before, content = load(), file.read_bytes()
        assert (before.truth_digest(), before.identity()) == (load().truth_digest(), load().identity())
        assert len({before.digest(), before.truth_digest(), before.identity(), ""}) == 4
        file.write_bytes(content + b" ")
        after = load()
        assert after.digest() == before.digest()
        assert after.truth_digest() != before.truth_digest() and after.identity() != before.identity(), file
        file.write_bytes(content)
        assert load().identity() == before.identity()
    glyphs = load_data("glyphworld_test:2")
    assert glyphs.truth_digest() == "" and glyphs.identity() == glyphs.digest()


def test_construction_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn.voc(tmp_path)
    drawn.folders(tmp_path, d.VOC_CLASSES, 1, name="PASCAL_VOC")
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("a picture was opened"))
    data = load_data("pascal1037", tmp_path)
    assert len(data.groups) == 20
    load_data("voc_train", tmp_path)


def test_exif_turned_image_and_its_mask(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow",), 1)
    upright = drawn.picture(5)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90° clockwise
    (root / "image/cow/co_00.jpg").unlink()
    upright.rotate(90, expand=True).save(root / "image/cow/co_00.png", exif=exif)
    data = load_data(str(root))
    assert np.array_equal(np.asarray(data.image(0)), np.asarray(upright))
    assert np.array_equal(data.mask(0, ["cow"]), drawn.rectangle())


# ------------------------------------------------------------------------------------------------------------ mistakes
def _fault_missing_mask(root: Path) -> None:
    (root / "groundtruth/cow/co_01.png").unlink()


def _fault_size(root: Path) -> None:
    Image.fromarray(drawn.rectangle(size=(40, 32), value=255)).save(root / "groundtruth/cow/co_01.png")


def _fault_image(root: Path) -> None:
    file = root / "image/cow/co_01.jpg"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _fault_mask(root: Path) -> None:
    (root / "groundtruth/cow/co_01.png").write_bytes(b"not a picture")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_fault_missing_mask, "co_01.jpg: no mask `co_01.png`.*groundtruth/cow; add it"),
        (_fault_size, "co_01.png: mask is 40×32, its image 48×32; make them one size"),
        (_fault_image, "co_01.jpg: corrupt picture .*replace the file"),
        (_fault_mask, "co_01.png: corrupt picture .*replace the file"),
    ],
)
def test_faults_are_one_line_naming_the_file(tmp_path: Path, fault, words: str) -> None:
    root = drawn.folders(tmp_path, ("cow",), 3)
    fault(root)
    with pytest.raises(LCCoError, match=words) as caught:
        data = load_data(str(root))
        data.image(1)
        data.mask(1, ["cow"])
    assert "\n" not in str(caught.value)


def test_unknown_names_and_layouts(tmp_path: Path) -> None:
    with pytest.raises(LCCoError, match="data `msrc7` not found: looked for .*MSRC7.*LCCO_DATA or --data-root"):
        load_data("msrc7", tmp_path)
    with pytest.raises(LCCoError, match="`nonesuch` is neither a folder .* nor a known set: voc_train, .*msrc7"):
        load_data("nonesuch", tmp_path)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(LCCoError, match="unknown layout; known: folders: image/<class>.*voc.*coco"):
        load_data("pictures", tmp_path)
    with pytest.raises(LCCoError, match="no such folder"):
        recognise(tmp_path / "nothing")
    drawn.voc(tmp_path)
    with pytest.raises(LCCoError, match="did you mean .*VOC2012"):
        recognise(tmp_path)
    drawn.folders(tmp_path, ("bird", "car"), 1, name="MSRC")
    with pytest.raises(LCCoError, match="lacks the groups cat, cow, dog, plane, sheep"):
        load_data("msrc7", tmp_path)
    drawn.folders(tmp_path, ("bird", "car"), 1, name="PASCAL_VOC")
    with pytest.raises(LCCoError, match="no list .*fold_train.txt"):
        load_data("pascal_fold_train", tmp_path)
    (tmp_path / "PASCAL_VOC/fold_train.txt").write_text("bird/bi_00\nbird/bi_77\n")
    with pytest.raises(LCCoError, match="fold_train.txt: `bird/bi_77` has no image"):
        load_data("pascal_fold_train", tmp_path)


def test_voc_faults(tmp_path: Path) -> None:
    root = drawn.voc(tmp_path)
    Image.fromarray(drawn.rectangle()).convert("RGB").save(root / "SegmentationClass/2007_000001.png")
    with pytest.raises(LCCoError, match="2007_000001.png: a VOC mask must hold class numbers"):
        _ = load_data("voc_train", tmp_path).groups
    (root / "JPEGImages/2007_000002.jpg").unlink()
    with pytest.raises(LCCoError, match="2007_000002.jpg: no such file"):
        load_data("voc_train", tmp_path)


# ------------------------------------------------------------------------------------------------------------- squares
def test_squares_move_mask_with_image(tmp_path: Path) -> None:
    data = load_data(str(drawn.folders(tmp_path, ("cow",), 1)))
    image, mask = d.load_square(data, 0, 24), d.mask_square(data, 0, ["cow"], 24)
    assert image.shape == (24, 24, 3) and image.dtype == mask.dtype == np.uint8
    expected = np.asarray(data.image(0).resize((24, 24), Image.Resampling.BILINEAR))
    assert np.array_equal(image, expected)
    flipped = d.load_square(data, 0, 24, flip=True), d.mask_square(data, 0, ["cow"], 24, flip=True)
    assert np.array_equal(flipped[1], mask[:, ::-1])
    assert np.abs(flipped[0].astype(int) - image[:, ::-1].astype(int)).max() <= 1
    x0, y0, x1, y1 = (v / n for v, n in zip(drawn.BOX, (48, 32, 48, 32), strict=True))
    assert d.mask_square(data, 0, ["cow"], 16, crop=(x0, y0, x1, y1)).all()  # cropped to the object itself
    left = d.mask_square(data, 0, ["cow"], 16, crop=(0, 0, x0, 1), flip=True)
    assert not left.any()


# ------------------------------------------------------------------------------------------------------------- sampler
class Toy(d.CoSegData):
    """Labels alone: what the sampler needs."""

    def __init__(self, labels: list[str]) -> None:
        groups = {c: [i for i, held in enumerate(labels) if c in held] for c in sorted(set("".join(labels)))}
        super().__init__("toy", "toy", [f"{i:03d}" for i in range(len(labels))], groups)


TOY = Toy(["a"] * 64 + ["b"] * 16 + ["c"] * 4 + ["ab"] * 6 + ["ac"] * 6)


def _sampler(data: d.CoSegData = TOY, **settings) -> GroupSampler:
    return GroupSampler(data, **{"groups": 3, "group_size": 4, "seed": 0} | settings)


def test_sampler_depends_on_seed_and_step_alone() -> None:
    one, other = (_sampler(paired=0.3, absent=0.3, flip=True, crop=0.7) for _ in range(2))
    forward = [one.draws(s) for s in range(20)]
    backward = [other.draws(s) for s in reversed(range(20))][::-1]
    assert forward == backward
    assert len({tuple(f) for f in forward}) == 20
    assert _sampler(seed=1).draws(0) != _sampler().draws(0)


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
            assert set(draw.classes) == frozenset.intersection(*(sampler.data.classes_of(i) for i in draw.items))
            unions[draw.classes] += 1
    assert set(unions) == {("a", "b"), ("a", "b", "c")}


def test_paired_groups_are_decided_by_the_set_alone() -> None:
    data = Toy(["ab"] * 8 + ["ac"] * 3 + ["bc"] * 4 + ["a"] * 50 + ["d"] * 20)
    sampler = _sampler(data, paired=1.0)
    seen = Counter()
    for s in range(200):
        for draw in sampler.draws(s):
            assert len(draw.classes) == 1
            assert all(len(data.classes_of(i)) > 1 for i in draw.items) and len(set(draw.items)) == 4
            seen[draw.classes[0]] += 1
    assert set(seen) == {"a", "b", "c"} and min(seen.values()) > 120
    half = _sampler(data, paired=0.5)
    share = np.mean([all(len(data.classes_of(i)) > 1 for i in g.items) for s in range(300) for g in half.draws(s)])
    assert 0.5 < share < 0.8  # the half, and plain groups of b and c that happen to be so
    plain = _sampler(Toy(["a"] * 5 + ["b"] * 5), paired=1.0).draws(0)
    assert all(len(draw.classes) == 1 for draw in plain)  # no pair anywhere: plain groups


def test_absent_replaces_one_image_by_one_without_the_class() -> None:
    sampler = _sampler(absent=0.5)
    draws = [draw for s in range(300) for draw in sampler.draws(s)]
    lacking = [sum(not set(draw.classes) & TOY.labels_of(i) for i in draw.items) for draw in draws]
    assert set(lacking) == {0, 1} and 0.42 < np.mean(lacking) < 0.58
    assert all(draw.classes for draw in draws)
    assert all(len(draw.items) == 1 for draw in _sampler(absent=1.0, group_size=1).draws(0))


def test_absent_image_comes_from_exhaustive_labels(tmp_path: Path) -> None:
    drawn.voc(tmp_path)
    drawn.folders(tmp_path, ("dog", "sheep"), 20, name="more")
    data = load_data("voc_train+more", tmp_path)
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
    assert np.allclose(sides[:, 0], sides[:, 1]) and 0.6 <= sides.min() < 0.62 and 0.98 < sides.max() <= 1


def test_sampler_refuses_nonsense() -> None:
    with pytest.raises(LCCoError, match="class_sampling is `cube`"):
        _sampler(class_sampling="cube")
    with pytest.raises(LCCoError, match="crop in"):
        _sampler(crop=0.0)


# --------------------------------------------------------------------------------------------------------------- check
def _rows(table, what: str) -> list[str]:
    return sorted(r.item for r in table.itertuples() if r.check == what and r.item)


def test_check_of_a_clean_folder(tmp_path: Path) -> None:
    table = check(drawn.folders(tmp_path, d.MSRC7, 10, name="MSRC7"))
    assert table.attrs["ok"] and (table.status == "ok").all()
    counts = {(r.check, r.item): (r.found, r.expected) for r in table.itertuples()}
    assert counts["groups", ""] == ("7", "7") and counts["images", ""] == ("70", "70")
    assert counts["group", "cow"] == ("10", "10") and counts["masks", ""] == ("70", "70")


def test_check_finds_every_planted_fault(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, d.MSRC7, 10, name="MSRC7")
    image, truth = root / "image", root / "groundtruth"
    (truth / "bird/bi_00.png").unlink()
    (image / "car/ca_01.jpg").unlink()
    Image.fromarray(drawn.rectangle(size=(40, 32), value=255)).save(truth / "cat/ca_02.png")
    Image.fromarray(drawn.rectangle(None)).save(truth / "cow/co_03.png")
    soft = drawn.rectangle(value=255)
    soft[0, :8] = 100
    Image.fromarray(soft).save(truth / "dog/do_04.png")
    broken = image / "plane/pl_05.jpg"
    broken.write_bytes(broken.read_bytes()[:900])
    (truth / "sheep/sh_06.png").write_bytes(b"?")
    (image / "bird/bi_08.jpg").write_bytes((image / "bird/bi_07.jpg").read_bytes())
    with Image.open(image / "car/ca_08.jpg") as picture:
        picture.save(image / "car/ca_09.jpg", quality=70)
    Image.fromarray(drawn.rectangle(value=1)).save(truth / "dog/do_09.png")
    table = check(root)
    assert not table.attrs["ok"] and table.attrs["layout"] == "folders"
    assert _rows(table, "missing mask") == ["bird/bi_00"]
    assert _rows(table, "missing image") == ["ca_01"]
    assert _rows(table, "size mismatch") == ["cat/ca_02"]
    assert _rows(table, "empty mask") == ["cow/co_03", "dog/do_09"]
    assert _rows(table, "non-binary mask") == ["dog/do_04"]
    assert _rows(table, "corrupt image") == ["plane/pl_05"]
    assert _rows(table, "corrupt mask") == ["sheep/sh_06"]
    assert _rows(table, "unreadable mask") == ["dog/do_09"]
    assert _rows(table, "duplicate file") == ["bird/bi_07"]
    assert _rows(table, "near duplicate") == ["car/ca_08"]
    assert set(table.status[table.check == "images"]) == {"note"}  # 69 where the literature has 70
    assert len(_rows(check(root, limit=1), "empty mask")) == 2  # one, and "… 1 more"


def test_check_notes_alone_are_fine(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow",), 3)
    Image.fromarray(drawn.rectangle(None)).save(root / "groundtruth/cow/co_00.png")
    table = check(root)
    assert table.attrs["ok"] and "note" in set(table.status)


def test_check_finds_overlap_with_training_by_content(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow",), 4)
    training = load_data(str(drawn.folders(tmp_path, ("dog",), 4, name="train", first=500)))
    assert check(root, training).attrs["ok"]
    with Image.open(root / "image/cow/co_02.jpg") as picture:  # another size and compression
        picture.resize((96, 64), Image.Resampling.BICUBIC).save(tmp_path / "train/image/dog/do_01.jpg", quality=80)
    training = load_data(str(tmp_path / "train"))
    assert overlap(load_data(str(root)), training) == [(2, 1)]
    table = check(root, training)
    assert not table.attrs["ok"] and _rows(table, "in training set train") == ["cow/co_02"]


def test_check_voc_and_coco(tmp_path: Path) -> None:
    root = drawn.voc(tmp_path)
    table = check(root)
    assert table.attrs["ok"] and table.attrs["layout"] == "voc"
    counts = {(r.check, r.item): (r.found, r.expected) for r in table.itertuples()}
    assert counts["images", "train"] == ("12", "1464") and counts["images", "val"] == ("4", "1449")
    assert counts["group", "dog"] == ("6", "")
    Image.fromarray(drawn.rectangle(value=77)).save(root / "SegmentationClass/2007_000000.png")
    (root / "SegmentationClass/2007_000001.png").unlink()
    (root / "JPEGImages/2007_000002.jpg").unlink()
    table = check(root)
    assert _rows(table, "unreadable mask") == ["2007_000000"] and _rows(table, "missing mask") == ["2007_000001"]
    assert _rows(table, "missing image") == ["2007_000002"]

    root = drawn.coco(tmp_path)
    table = check(root, min_images=1)
    assert table.attrs["ok"] and table.attrs["layout"] == "coco"
    drawn.picture(1, size=(100, 90)).save(root / "train2017/000000000001.jpg")
    (root / "train2017/000000000002.jpg").unlink()
    table = check(root, min_images=1)
    assert _rows(table, "size mismatch") == ["000000000001"] and _rows(table, "missing image") == ["000000000002"]


def _product(seed: int, side: int, ground: str = "white") -> Image.Image:
    """A textured object of about `side` px in the middle of a plain ground of 320 × 240 px."""
    rng = np.random.default_rng((seed, side))
    out = np.full((240, 320, 3), 255, np.uint8)
    if ground == "shaded":
        out -= np.linspace(0, 60, 240).astype(np.uint8)[:, None, None]
    elif ground == "noisy":
        out = rng.normal(240, 4, out.shape).clip(0, 255).astype(np.uint8)
    h, w = (side * rng.uniform(0.8, 1.2, 2)).astype(int)
    y, x = (240 - h) // 2 + int(rng.integers(-8, 9)), (320 - w) // 2 + int(rng.integers(-8, 9))
    texture = Image.fromarray(rng.integers(0, 230, (4, 4, 3), np.uint8))
    out[y : y + h, x : x + w] = np.array(texture.resize((w, h), Image.Resampling.BICUBIC))
    return Image.fromarray(out)


def _copies(image: Image.Image) -> list[Image.Image]:
    def coded(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=60)
        return Image.open(file)

    half, double = (
        image.resize((round(s * image.width), round(s * image.height)), Image.Resampling.BICUBIC) for s in (0.5, 2)
    )
    return [coded(image), half, double, coded(half), coded(double)]


def _pairs(a: Sequence[Image.Image], b: Sequence[Image.Image]) -> list[tuple[int, int]]:
    return near_pairs([picture_hash(i) for i in a], [picture_hash(i) for i in b])


@pytest.mark.parametrize("ground", ["white", "shaded", "noisy"])
def test_pictures_on_a_plain_ground_are_told_apart(ground: str) -> None:
    for side in (40, 60, 90, 120):
        pictures = [_product(seed, side, ground) for seed in range(20)]
        assert _pairs(pictures, pictures) == [(n, n) for n in range(20)]
        for n, copies in enumerate(map(_copies, pictures[:6])):
            assert _pairs(copies, pictures) == [(k, n) for k in range(len(copies))]


def test_copies_of_busy_pictures_are_found() -> None:
    pictures = [drawn.picture(seed, size=size) for seed, size in enumerate([(320, 240), (240, 320), (96, 64)] * 4)]
    for n, copies in enumerate(map(_copies, pictures)):
        assert _pairs(copies, pictures) == [(k, n) for k in range(len(copies))]
    bits = [picture_hash(i) & ((1 << 128) - 1) for i in pictures]  # here the difference bits alone would tell
    assert min((a ^ b).bit_count() for a in bits for b in bits if a != b) > 2 * d.NEAR


def test_near_pairs_of_nothing_and_of_blank_pictures() -> None:
    blank, product = picture_hash(Image.new("RGB", (60, 40), "white")), picture_hash(_product(1, 40))
    assert near_pairs([], []) == near_pairs([], [blank]) == near_pairs([product], []) == []
    assert near_pairs([blank, product], [product, blank]) == [(0, 1), (1, 0)]


def test_check_of_plain_grounds_reports_no_duplicate(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow",), 6)
    for n, file in enumerate(sorted((root / "image/cow").iterdir())):
        _product(n, 60).save(file)
        Image.fromarray(drawn.rectangle((140, 100, 180, 140), (320, 240), 255)).save(
            root / "groundtruth/cow" / f"{file.stem}.png"
        )
    table = check(root)
    assert table.attrs["ok"] and not _rows(table, "near duplicate")
    with Image.open(root / "image/cow/co_03.jpg") as picture:
        picture.save(root / "image/cow/co_00.jpg", quality=60)
    assert _rows(check(root), "near duplicate") == ["cow/co_00"]


# ------------------------------------------------------------------------------------------------------- real pictures
@pytest.mark.parametrize(
    ("name", "images", "groups"),
    [("msrc14", 420, 14), ("msrc7", 208, 7), ("pascal1037", 1037, 20), ("pascal_fold_train", 623, 20),
     ("pascal_fold_test", 414, 20), ("voc_train", 2992, 18), ("voc_val", 314, 15)],
)  # fmt: skip
def test_real_counts(real: Path, name: str, images: int, groups: int) -> None:
    data = load_data(name, real)
    assert (len(data), len(data.groups)) == (images, groups)
    i = len(data) // 2
    assert data.mask(i, sorted(data.classes_of(i))).shape == data.image(i).size[::-1]


def test_real_sets_share_no_picture(real: Path) -> None:
    voc, pascal = load_data("voc_train", real), load_data("pascal1037", real)
    assert overlap(voc, pascal) == []
    train, test = load_data("pascal_fold_train", real), load_data("pascal_fold_test", real)
    assert overlap(train, test) == []
    assert len(overlap(pascal, load_data("pascal_fold_train", real))) > 623  # and finds those that are shared


def test_real_copies_are_found(real: Path) -> None:
    data = load_data("msrc14", real)
    pictures = [data.image(i) for i in range(0, len(data), 14)]
    for n, copies in enumerate(map(_copies, pictures)):
        assert _pairs(copies, pictures) == [(k, n) for k in range(len(copies))]


def test_real_paired_groups(real: Path) -> None:
    data = load_data("voc_train", real)
    sampler = GroupSampler(data, groups=4, group_size=5, seed=0, paired=1.0, class_sampling="sqrt")
    draws = [draw for s in range(50) for draw in sampler.draws(s)]
    good = [len(g.classes) == 1 and all(len(data.classes_of(i)) > 1 for i in g.items) for g in draws]
    assert np.mean(good) > 0.97 and len({g.classes for g in draws}) > 8
