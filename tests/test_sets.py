"""Readers, against sets drawn on disk with masks known by hand."""

from __future__ import annotations

import json
import os
import tempfile
import unicodedata
from pathlib import Path

import drawn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lcco.common import LCCoError, Missing, digest
from lcco.data import load_data
from lcco.data import sets as d
from lcco.data.coco import COCOData
from lcco.data.load import KNOWN_SETS, open_folder


@pytest.fixture(autouse=True)
def _data_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request) -> None:
    if "real" not in request.fixturenames:
        monkeypatch.setenv("LCCO_DATA", str(tmp_path))


def _refused(match: str):
    return pytest.raises(LCCoError, match=match)


# -------------------------------------------------------------------------------- folders a class
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
    assert data.classes_of(i) == {"cow"} and not data.knows_all(i)
    assert data.image(i).size == drawn.SIZE and data.image(i).mode == "RGB"


def test_a_jpeg_truth_can_be_had_before_its_threshold(tmp_path: Path) -> None:
    data = load_data(str(drawn.folders(tmp_path, ("cow",), 1, truth=".jpg")))
    drawn.folders(tmp_path, ("cow",), 1, name="png", first=9)
    grey = data.grey_truth(0)
    assert grey.dtype == np.uint8 and len(np.unique(grey)) > 2
    assert np.array_equal(grey > 127, data.mask(0, ["cow"]) == 1)
    both = load_data(["set", "png"])
    assert np.array_equal(both.grey_truth(0), grey) and both.grey_truth(1) is None


def test_folder_truth_is_object_above_127(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow",), 1)
    Image.fromarray(np.array([[0, 127], [128, 255]], np.uint8)).save(
        root / "groundtruth/cow/co_00.png"
    )
    drawn.picture(0, (0, 0, 1, 1), (2, 2)).save(root / "image/cow/co_00.jpg")
    assert load_data(str(root)).mask(0, ["cow"]).tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_folder_truth_of_0_and_1_is_refused(tmp_path: Path, suffix: str) -> None:
    root = drawn.folders(tmp_path, ("cow",), 4, truth=suffix)
    truth = root / "groundtruth/cow"
    Image.fromarray(drawn.rectangle(value=1)).save(truth / f"co_00{suffix}")
    Image.fromarray(drawn.rectangle(value=1).astype(bool)).save(truth / f"co_01{suffix}")  # white
    Image.fromarray(drawn.rectangle(None)).save(truth / f"co_02{suffix}")
    with _refused(f"co_00{suffix}: mask has no value above 1; save the object as 255") as caught:
        load_data(str(root))
    assert "\n" not in str(caught.value)
    data = open_folder(root)
    assert not data.mask(0, ["dog"]).any()
    assert np.array_equal(data.mask(1, ["cow"]), drawn.rectangle())
    assert not data.mask(2, ["cow"]).any()


def test_masks_that_would_read_as_empty_are_refused(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow",), 4)
    truth = root / "groundtruth/cow"
    Image.fromarray(drawn.rectangle(value=38)).save(truth / "co_00.png")  # VOC's palette as grey
    clear = Image.new("L", (48, 32))
    for n, alpha in enumerate((drawn.rectangle(value=255), np.full((32, 48), 255, np.uint8)), 1):
        Image.merge("LA", (clear, Image.fromarray(alpha))).save(truth / f"co_0{n}.png")
    data = open_folder(root)
    with _refused("co_00.png: mask has no value above 38; save the object as 255"):
        data.mask(0, ["cow"])
    with _refused("co_01.png: mask with transparency; save it as grey"):
        data.mask(1, ["cow"])
    assert not data.mask(2, ["cow"]).any()  # all opaque: its grey counts
    assert data.mask(3, ["cow"]).any()


def test_folder_truth_of_a_jpeg_may_be_nearly_black(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow",), 2, truth=".jpg")
    Image.new("L", drawn.SIZE, 1).save(root / "groundtruth/cow/co_00.jpg")
    assert not load_data(str(root)).mask(0, ["cow"]).any()


def test_class_names(tmp_path: Path) -> None:
    classes = ("Dining_Table", "TV monitor", "Hot dog")
    data = load_data(str(drawn.folders(tmp_path, classes, 1)))
    assert list(data.groups) == ["diningtable", "hot dog", "tvmonitor"]
    for side in ("image", "groundtruth"):
        (tmp_path / "set" / side / "hot dog").mkdir()
    with _refused("both class `hot dog`; rename one"):
        load_data("set")


def test_icoseg_and_rubinstein(tmp_path: Path) -> None:
    own = load_data(str(drawn.icoseg(tmp_path)))
    assert own.layout == "icoseg" and list(own.groups) == ["cheetah", "panda1"] and len(own) == 6
    internet = load_data(str(drawn.rubinstein(tmp_path)))
    assert internet.layout == "rubinstein" and list(internet.groups) == ["airplane", "car", "horse"]
    assert load_data("internet300").digest() == internet.digest()
    for data in (own, internet):
        for c, items in data.groups.items():
            assert len(items) == 3
            assert all(np.array_equal(data.mask(i, [c]), drawn.rectangle()) for i in items)
    with _refused("icoseg8.*lacks the groups bear2, brownbear"):
        load_data("icoseg8")
    assert len(load_data("icoseg38")) == 6
    (tmp_path / "Internet" / "notes").mkdir()  # no class: it has no pictures
    (tmp_path / "Internet/Car100/GroundTruth").rename(tmp_path / "Internet/Car100/groundtruth")
    with _refused("Car100/GroundTruth/.*: no such file"):
        load_data("internet300")


# ---------------------------------------------------------------------------------- names of files
def test_twins_are_refused_by_name(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow",), 2)
    drawn.picture(9).save(root / "image/cow/co_01.png")
    with _refused(r"co_01.jpg and co_01.png: one name; rename or move one"):
        load_data(str(root))
    root = drawn.folders(tmp_path, ("cow",), 2, name="masks")
    Image.fromarray(drawn.rectangle()).save(root / "groundtruth/cow/co_01.bmp")
    with _refused("co_01.bmp and co_01.png: one name; rename or move one"):
        load_data(str(root))


def test_a_mask_belongs_to_the_picture_of_its_own_name(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow",), 1)
    mask = root / "groundtruth/cow/co_00.png"
    for name in ("co_00_jpg.png", "co_00.jpg.png"):
        mask = mask.rename(mask.with_name(name))
        with _refused("co_00.png: no such file"):
            load_data(str(root))


@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_match_however_a_disk_spells_them(tmp_path: Path, forms: tuple[str, str]) -> None:
    root = tmp_path / "set"
    for side, form, ending in (("image", forms[0], ".jpg"), ("groundtruth", forms[1], ".png")):
        folder = root / side / unicodedata.normalize(form, "Löwe")
        folder.mkdir(parents=True)
        file = folder / unicodedata.normalize(form, f"Äpfel é{ending}")
        (
            drawn.picture(1) if ending == ".jpg" else Image.fromarray(drawn.rectangle(value=255))
        ).save(file)
    data = load_data(str(root))
    assert data.keys == (unicodedata.normalize("NFC", "löwe/Äpfel é"),)
    assert np.array_equal(data.mask(0, ["löwe"]), drawn.rectangle())


def test_system_folders_and_what_is_no_file(tmp_path: Path, capsys) -> None:
    root = drawn.folders(tmp_path, ("cow",), 2)
    plain = load_data(str(root))
    for place in ("image/@eaDir/co_00.jpg", "image/cow/@eaDir", "image/__MACOSX", "image/.git"):
        (root / place).mkdir(parents=True)
        drawn.picture(9).save(root / place / "thumb.jpg")
    (root / "image/cow/co_05.jpg").mkdir()
    for name in ("._co_00.jpg", "Thumbs.db", "notes.txt"):
        (root / "image/cow" / name).write_text("?")
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "image/cow/pipe.jpg")
    data = load_data(str(root))
    assert data.keys == plain.keys and data.digest() == plain.digest()
    told = capsys.readouterr().err
    assert "cow/co_05.jpg (no picture file)" in told and "cow/notes.txt" in told
    assert not hasattr(os, "mkfifo") or "cow/pipe.jpg" in told
    assert "Thumbs" not in told and "eaDir" not in told


def test_what_is_left_out_is_counted_aloud(tmp_path: Path, capsys) -> None:
    root = drawn.folders(tmp_path, ("cow",), 3)
    load_data("set")
    assert capsys.readouterr().err == ""
    (root / "image/cow/co_01.jpg").unlink()
    assert len(load_data("set")) == 2
    told = capsys.readouterr().err
    assert "set: 1 × missing image: cow/co_01 (for " in told and "co_01.png" in told
    (root / "image/empty").mkdir()
    (root / "groundtruth/dog").mkdir()
    load_data("set")
    told = capsys.readouterr().err
    assert "set: 2 × class without a picture: " in told
    assert "image/empty" in told and "image/dog" in told


def test_every_picture_ending_is_read(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for side in ("image", "groundtruth"):
        (root / side / "cow").mkdir(parents=True)
    for n, ending in enumerate((".gif", ".avif", ".JP2", ".TIF", ".jpe", ".webp", ".PNG")):
        drawn.picture(n).save(root / "image/cow" / f"p{n}{ending}")
        Image.fromarray(drawn.rectangle(value=255)).save(root / f"groundtruth/cow/p{n}.gif")
    data = load_data("set")
    assert len(data) == 7
    for i in range(7):
        assert np.array_equal(data.mask(i, ["cow"]), drawn.rectangle())
        wrong = np.asarray(data.image(i)).astype(int) - np.asarray(drawn.picture(i))
        assert np.abs(wrong).mean() < 25


@pytest.mark.parametrize("name", ["cats + dogs", "cats without dogs", "a:40", "Ünï [1]"])
def test_any_folder_name_is_a_name(tmp_path: Path, name: str) -> None:
    drawn.folders(tmp_path, ("cow",), 2, name=name)
    assert len(load_data(name)) == 2 and load_data(name).name == name
    assert load_data([name]).digest() == load_data(str(tmp_path / name)).digest()


# -------------------------------------------------------------------------------------------- VOC
def test_voc_masks_void_and_labels(tmp_path: Path) -> None:
    drawn.voc(tmp_path)  # classes dog, person, horse in turn; odd images also a person
    data = load_data("voc_train")
    assert data.keys[0] == "2007_000000" and len(data) == 12 and data.knows_all(0)
    assert [data.classes_of(i) for i in (0, 1, 3)] == [{"dog"}, {"person"}, {"dog", "person"}]
    x0, y0, x1, y1 = drawn.BOX
    truth = drawn.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), value=255)
    truth[y0:y1, x0:x1] = 0
    with_dog = truth.copy()
    with_dog[y0:y1, x0:x1] = 1
    assert np.array_equal(data.mask(3, ["dog"]), with_dog)
    both = np.maximum(with_dog, drawn.rectangle(drawn.SECOND))
    assert np.array_equal(data.mask(3, ["dog", "person"]), both)
    assert np.array_equal(data.mask(3, ["aeroplane"]), truth)  # absent: void stays void
    assert data.groups["dog"] == (0, 3, 6, 9)
    assert len(load_data("voc_trainval")) == 16


def test_voc_group_needs_a_share_of_the_pixels(tmp_path: Path) -> None:
    root = drawn.voc(tmp_path, classes=(12,), second=15)
    mask = drawn.rectangle(value=12)
    mask[:3, :5] = 8  # 15 of 1,536 px: 0.98% of cat
    Image.fromarray(mask).save(root / "SegmentationClass/2007_000000.png")  # grey reads as well
    mask[0, 5] = 8  # 16 px: 1.04%
    Image.fromarray(mask).save(root / "SegmentationClass/2007_000002.png")
    data = load_data("voc_train")
    assert data.groups["cat"] == (2,)
    assert data.labels_of(0) == {"dog", "cat"} and data.classes_of(0) == {"dog"}


def test_voc_augmented_list(tmp_path: Path) -> None:
    root = drawn.voc(tmp_path, train=3, val=1)
    os.rename(root / "SegmentationClass", root / "SegmentationClassAug")
    lists = root / "ImageSets/Segmentation"
    stems = (lists / "train.txt").read_text().split()
    for slash in ("/", ""):
        lines = [f"{slash}JPEGImages/{s}.jpg {slash}SegmentationClassAug/{s}.png" for s in stems]
        (lists / "trainaug.txt").write_text("\n".join(lines))
        data = load_data("voc_trainaug")
        assert data.keys == ("2007_000000", "2007_000001", "2007_000002")
    with _refused("SegmentationClass/2007_000000.png: no such file"):
        load_data("voc_train")


def _voc_of(root: Path, names: dict[str, str], lines: list[str], start: str = "") -> Path:
    """A VOC folder of pictures `name + ending`, all of a dog, that one list names."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for n, (name, ending) in enumerate(names.items()):
        drawn.picture(n).save(root / "JPEGImages" / f"{name}{ending}")
        mask = drawn.rectangle((n, 0, n + 20, 10), value=12)
        Image.fromarray(mask).save(root / "SegmentationClass" / f"{name}.png")
    text = start + "\r\n".join(lines) + "\n\n"
    (root / "ImageSets/Segmentation/val.txt").write_bytes(text.encode())
    return root


def test_voc_names_are_whole_lines(tmp_path: Path) -> None:
    names = {"photo": ".jpg", "photo (2)": ".png", "photo - Copy": ".JPG", "scan": ".jpg",
             "scan.v1": ".jpg", "é [x]": ".jpeg"}  # fmt: skip
    data = load_data(str(_voc_of(tmp_path / "voc", names, list(names), "\ufeff")))
    assert data.keys == tuple(names) and len(data.groups["dog"]) == 6
    for n in range(6):
        assert np.array_equal(data.mask(n, ["dog"]), drawn.rectangle((n, 0, n + 20, 10)))
    lines = ["a.png", " b ", "b"]  # with the ending, or space around it
    named = _voc_of(tmp_path / "named", {"a": ".png", "b": ".jpg"}, lines)
    assert load_data(str(named)).keys == ("a", "b")


def test_voc_names_that_collapse_are_refused(tmp_path: Path) -> None:
    root = _voc_of(tmp_path / "one", {"a": ".jpg", "b": ".jpg"}, ["a", "b", "a.jpg"])
    with _refused("val.txt: `a` and `a.jpg` are one picture; take one out"):
        load_data(str(root))
    root = _voc_of(tmp_path / "twins", {"a": ".jpg", "b": ".jpg"}, ["a", "b"])
    drawn.picture(9).save(root / "JPEGImages/a.png")
    with _refused("a.jpg and a.png: one name; rename or move one"):
        load_data(str(root))
    root = _voc_of(tmp_path / "latin", {"Löwe": ".jpg"}, [])
    (root / "ImageSets/Segmentation/val.txt").write_bytes("Löwe".encode("latin-1"))
    with _refused("L\ufffdwe.jpg: no such file"):
        load_data(str(root))


def test_voc_labels_follow_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = drawn.voc(tmp_path)
    assert load_data("voc_train").classes_of(0) == {"dog"}
    calls, read = [], d.pictures.read_labels
    monkeypatch.setattr(d.pictures, "read_labels", lambda p, n: calls.append(p.stem) or read(p, n))
    assert load_data("voc_train").classes_of(0) == {"dog"} and not calls  # from disk
    Image.fromarray(drawn.rectangle(value=8)).save(root / "SegmentationClass/2007_000000.png")
    assert load_data("voc_train").classes_of(0) == {"cat"} and "2007_000000" in calls
    for file in Path(os.environ["LCCO_CACHE"]).glob("areas-*.json"):
        file.write_text(file.read_text()[:40])
    assert load_data("voc_train").classes_of(0) == {"cat"}  # damaged: made again


def test_voc_faults(tmp_path: Path) -> None:
    root = drawn.voc(tmp_path)
    colours = Image.fromarray(drawn.rectangle()).convert("RGB")
    colours.save(root / "SegmentationClass/2007_000001.png")
    with _refused("2007_000001.png: a mask of classes must hold class numbers"):
        _ = load_data("voc_train").groups
    (root / "JPEGImages/2007_000002.jpg").unlink()
    with _refused("2007_000002.jpg: no such file"):
        load_data("voc_train")
    lists = root / "ImageSets/Segmentation/train.txt"
    lists.write_text("\n")
    with _refused("its lists .train. are empty"):
        load_data("voc_train")
    lists.unlink()
    with _refused("train.txt: no such list"):
        load_data("voc_train")


def test_more_voc_layout_sets_by_name(tmp_path: Path) -> None:
    with pytest.raises(Missing) as caught:
        load_data("coco_voc20")
    assert caught.value.status == "not run: data not found (coco_voc20)"
    assert "COCO_VOC20" in str(caught.value)
    _voc_of(tmp_path / "VOC_MORE", {"2008_1": ".jpg", "coco_1": ".jpg"}, ["2008_1", "coco_1"])
    lists = tmp_path / "VOC_MORE/ImageSets/Segmentation"
    (lists / "val.txt").rename(lists / "train.txt")
    data = load_data("voc_more")
    assert not any(data.knows_all(i) for i in (0, 1))  # some have one vehicle labelled each


# ------------------------------------------------------------------------------------------- COCO
def _document(root: Path) -> tuple[Path, dict]:
    file = root / "annotations/instances_train2017.json"
    return file, json.loads(file.read_text())


def _with(root: Path, change) -> Path:
    file, document = _document(root)
    change(document)
    file.write_text(json.dumps(document))
    return root


def test_coco_seg_rule_by_hand(tmp_path: Path, capsys) -> None:
    root = drawn.coco(tmp_path)
    data = COCOData("coco", root, 1, 4000)
    # cat in 0 and 1, dog in 1 and 2; a small cat (2), a crowd of cats, a small dog (3) do not count
    assert data.keys == ("000000000000.jpg", "000000000001.jpg", "000000000002.jpg")
    assert data.groups == {"cat": (0, 1), "dog": (1, 2)}
    assert data.classes_of(2) == {"dog"} and data.labels_of(2) == {"cat", "dog"}
    size = (120, 90)
    assert np.array_equal(data.mask(1, ["cat"]), drawn.rectangle((10, 5, 80, 85), size))
    union = drawn.rectangle((10, 5, 80, 85), size) | drawn.rectangle((40, 10, 110, 80), size)
    assert np.array_equal(data.mask(1, ["cat", "dog"]), union)
    assert data.mask(2, ["cat"]).sum() == 400  # every annotation of a category counts in its mask
    data.complete()
    told = "coco: 1 × image left out: 000000000003.jpg (no large instance)"
    assert told in capsys.readouterr().err


def test_crowds_are_in_the_mask_but_make_no_group(tmp_path: Path) -> None:
    crowd = drawn.coco_box(0, 1, (0, 0, 100, 90), crowd=True)
    data = COCOData("c", drawn.coco(tmp_path, [crowd, drawn.coco_box(0, 1, (0, 0, 80, 80))]),
                    1, 4000)  # fmt: skip
    assert np.array_equal(data.mask(0, ["cat"]), drawn.rectangle((0, 0, 100, 90), (120, 90)))
    with _refused("no category has 1 images"):
        COCOData("c", drawn.coco(tmp_path, [crowd]), 1, 4000)


def test_coco_seg_thresholds_and_small_sets(tmp_path: Path) -> None:
    exact, above = (0, 0, 80, 50), (0, 0, 89, 45)  # 4,000 and 4,005 px
    boxes = [(0, 1, exact), (1, 1, above), (2, 2, above), (3, 2, above)]
    root = drawn.coco(tmp_path, [drawn.coco_box(*box) for box in boxes])
    assert COCOData("c", root, 1, 4000).groups == {"cat": (0,), "dog": (1, 2)}
    assert COCOData("c", root, 2, 4000).groups == {"dog": (0, 1)}
    with _refused("no category has 100 images with an instance over 4000 px"):
        load_data("coco_seg")
    assert load_data(str(root)).groups == {"cat": (0, 1), "dog": (2, 3)}  # by path: all there is


def test_coco_categories_of_one_name_are_one(tmp_path: Path) -> None:
    large = (10, 5, 80, 85)
    boxes = [drawn.coco_box(i, i % 2, large) for i in range(4)]

    def change(document: dict) -> None:
        document["categories"] = [{"id": 0, "name": "cell"}, {"id": 1, "name": "cell",
                                  "supercategory": "cell"}]  # fmt: skip

    data = load_data(str(_with(drawn.coco(tmp_path, boxes), change)))
    assert data.groups == {"cell": (0, 1, 2, 3)}
    right = drawn.rectangle(large, (120, 90))
    assert all(np.array_equal(data.mask(i, ["cell"]), right) for i in range(4))


def test_coco_pictures_of_one_stem_in_two_folders(tmp_path: Path) -> None:
    boxes = [(0, 0, 90, 90), (30, 0, 120, 90)]
    root = drawn.coco(tmp_path, [drawn.coco_box(i, 1, box) for i, box in enumerate(boxes)], 2)
    for n, folder in enumerate("ab"):
        (root / "train2017" / folder).mkdir()
        drawn.picture(n, size=(120, 90)).save(root / "train2017" / folder / "x.png")

    def change(document: dict) -> None:
        for entry, name in zip(document["images"], ("a/x.png", "b\\x.png"), strict=True):
            entry["file_name"] = name

    data = load_data(str(_with(root, change)))
    assert data.keys == ("a/x.png", "b/x.png")
    for n, box in enumerate(boxes):
        assert np.array_equal(data.mask(n, ["cat"]), drawn.rectangle(box, (120, 90)))
        assert np.array_equal(data.image(n), drawn.picture(n, size=(120, 90)))


def _same_image_id(document: dict) -> None:
    document["images"][1]["id"] = 0


def _same_annotation_id(document: dict) -> None:
    document["annotations"][1]["id"] = 1


def _same_category_id(document: dict) -> None:
    document["categories"][1]["id"] = 1


def _same_file(document: dict) -> None:
    document["images"][1]["file_name"] = document["images"][0]["file_name"]


def _outlines_in_shares(document: dict) -> None:
    for entry in document["annotations"]:
        entry["segmentation"] = [[0.1, 0.1, 0.4, 0.1, 0.4, 0.4]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_same_image_id, r"two entries of one id: .*000000000000.jpg.*000000000001.jpg"),
        (_same_annotation_id, r"two entries of one id: .*image_id=0.*image_id=1"),
        (_same_file, r"two entries of one file_name: .*id=0.*id=1"),
        (_outlines_in_shares, "no object pixel, as in 4 of 4 masks looked at"),
        (_same_category_id, r"two entries of one id: .*cat.*dog"),
        (lambda x: x.pop("categories"), "not a COCO instances file .categories: Field required"),
        (lambda x: x.update(categories=[]), "no category has 1.*category 1 is not in the file"),
        (lambda x: x.update(annotations={}), "annotations: Input should be a valid list"),
        (lambda x: x["images"][2].pop("file_name"), "images: 2: file_name: Field required"),
        (lambda x: x["images"][2].pop("width"), "images: 2: width: Field required"),
        (lambda x: [a.pop("segmentation") for a in x["annotations"]], "no category has 1.*segment"),
    ],
)  # fmt: skip
def test_coco_files_that_are_refused_in_one_line(tmp_path: Path, change, words: str) -> None:
    root = _with(drawn.coco(tmp_path), change)
    with _refused(f"instances_train2017.json: .*({words})") as caught:
        load_data(str(root))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"segmentation": []}, "no outlines"), ({"segmentation": None}, "segmentation"),
        ({"segmentation": [10, 5, 80, 5, 80, 85]}, "segmentation"),
        ({"segmentation": [[10, 5, 80, 5]]}, "no outlines of 3 or more points"),
        ({"segmentation": [[10, 5, 80, 5, 80, 85, 9]]}, "no outlines of 3 or more points"),
        ({"segmentation": [["a"] * 6]}, "unsupported operand"),
        ({"segmentation": [[0, 0, 5, float("nan"), 5, 5]]}, "no outlines"),
        ({"segmentation": "x"}, "segmentation"),
        ({"segmentation": [[0, 0, 1e12, 0, 1e12, 1e12]]}, "no outlines"),
        ({"segmentation": {"size": [9, 12], "counts": [108]}}, "do not fill the image"),
        ({"segmentation": {"size": [90, 120], "counts": [5]}}, "do not fill the image"),
        ({"segmentation": {"size": [90, 120], "counts": "???" * 40}}, "Invalid RLE"),
        ({"segmentation": {"size": [90, 120]}}, "counts: Field required"),
        ({"image_id": 77}, "image 77 is not in the file"), ({"image_id": None}, "image_id"),
        ({"category_id": 555}, "category 555 is not in the file"), ({"area": "much"}, "area"),
    ],
)  # fmt: skip
def test_odd_annotations_are_left_out_aloud(tmp_path: Path, capsys, entry: dict, why: str) -> None:
    root = drawn.coco(tmp_path)
    plain = load_data(str(root))
    capsys.readouterr()
    odd = drawn.coco_box(0, 1, (0, 0, 120, 90)) | {"id": 900} | entry
    data = load_data(str(_with(root, lambda x: x["annotations"].append(odd))))
    assert data.groups == plain.groups
    for i in range(len(data)):
        assert np.array_equal(data.mask(i, ["cat", "dog"]), plain.mask(i, ["cat", "dog"]))
    assert "1 × entry left out: annotation 900" in capsys.readouterr().err
    left_out = [(item, why in text) for kind, item, text in data.left_out if "entry" in kind]
    assert left_out == [("annotation 900", True)]


def test_odd_entries_that_can_be_read_are(tmp_path: Path) -> None:
    root = drawn.coco(tmp_path)
    plain = load_data(str(root))

    def change(document: dict) -> None:
        first, second, third = document["annotations"][:3]
        first["area"], second["area"] = "5600", 0
        del third["area"]
        first["segmentation"].append([1, 2, 3, 4])
        for entry in document["annotations"]:
            entry["image_id"] = str(entry["image_id"])
            entry["category_id"] = float(entry["category_id"])
            entry["iscrowd"] = str(entry["iscrowd"])

    file, _ = _document(_with(root, change))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # a byte order mark
    data = load_data(str(root))
    assert data.groups == plain.groups
    assert all(np.array_equal(data.mask(i, ["cat"]), plain.mask(i, ["cat"])) for i in range(3))
    assert data.left_out == plain.left_out


def test_coco_run_lengths_read_as_polygons_do(tmp_path: Path) -> None:
    from pycocotools import mask as coco

    right = drawn.rectangle((10, 5, 80, 85), (120, 90))
    runs = coco.encode(np.asfortranarray(right))
    entry = drawn.coco_box(0, 1, (10, 5, 80, 85)) | {
        "segmentation": {"size": [90, 120], "counts": runs["counts"].decode()}
    }
    data = load_data(str(drawn.coco(tmp_path, [entry])))
    assert np.array_equal(data.mask(0, ["cat"]), right)


# ------------------------------------------------------------------------------- names and joining
def test_joined_sets_merge_groups_of_one_name(tmp_path: Path) -> None:
    drawn.voc(tmp_path)
    drawn.folders(tmp_path, d.VOC_CLASSES, 2, name="PASCAL_VOC")
    (tmp_path / "PASCAL_VOC/fold_train.txt").write_text("dog/do_01\nsheep/sh_00\n")
    names = ["voc_train", "pascal_fold_train"]
    data = load_data(names)
    assert len(data) == 14 and data.name == "voc_train+pascal_fold_train"
    assert data.layout == "voc+folders" and list(data.groups) == ["dog", "horse", "person", "sheep"]
    assert [data.keys[i] for i in data.groups["dog"]] == [
        "2007_000000", "2007_000003", "2007_000006", "2007_000009", "dog/do_01"
    ]  # fmt: skip
    dog = data.keys.index("dog/do_01")
    assert np.array_equal(data.mask(dog, ["dog"]), drawn.rectangle())
    assert not data.mask(dog, ["person"]).any()
    assert data.knows_all(0) and not data.knows_all(dog)
    whole = load_data("pascal1037")
    assert data.content(dog) == whole.content(whole.keys.index("dog/do_01"))
    parts = [load_data(n) for n in names]
    assert data.digest() == digest(
        [(p.keys[i], p.content(i)) for p in parts for i in range(len(p))]
    )


def test_joined_sets_keep_keys_apart(tmp_path: Path) -> None:
    drawn.folders(tmp_path, ("cow",), 2, name="one")
    drawn.folders(tmp_path, ("cow",), 2, name="two", first=50)
    data = load_data(["one", "two"])
    assert data.keys == ("one:cow/co_00", "one:cow/co_01", "two:cow/co_00", "two:cow/co_01")
    assert data.groups == {"cow": (0, 1, 2, 3)}
    with _refused("twice"):
        load_data(["one", "one"])


def test_a_set_without_the_pictures_of_another(tmp_path: Path, monkeypatch) -> None:
    drawn.folders(tmp_path, ("cow", "dog"), 3, name="mine")
    drawn.folders(tmp_path, ("horse",), 2, name="test", first=40)
    same = (tmp_path / "mine/image/cow/co_01.jpg").read_bytes()
    (tmp_path / "test/image/horse/ho_00.jpg").write_bytes(same)
    again = Image.open(tmp_path / "mine/image/dog/do_02.jpg").resize((60, 45))  # by look
    again.save(tmp_path / "test/image/horse/ho_01.jpg")
    mask = Image.fromarray(drawn.rectangle(value=255)).resize((60, 45))
    mask.save(tmp_path / "test/groundtruth/horse/ho_01.png")
    for _ in range(2):  # computed, then read
        data = load_data("mine", without=["test"])
        assert data.name == "mine without test" and len(data) == 4
        assert set(data.keys) == {"cow/co_00", "cow/co_02", "dog/do_00", "dog/do_01"}
        monkeypatch.setattr("lcco.data.sets.near_pairs", lambda *a: pytest.fail("not kept"))
    monkeypatch.undo()
    monkeypatch.setenv("LCCO_DATA", str(tmp_path))
    drawn.folders(tmp_path, ("car",), 2, name="more", first=70)
    with _refused("mine without mine: no picture is left; change `data.without`"):
        load_data("mine", without=["mine"])
    joined = load_data(["mine", "more"], without=["test", "more"])
    assert len(joined) == 4 and joined.overlap(load_data("test")) == []


def test_joined_folders_of_one_name_and_one_key_are_refused(tmp_path: Path) -> None:
    for n, folder in enumerate("xy"):
        drawn.folders(tmp_path / folder, ("cow",), 2, name="photos", first=50 * n)
    (tmp_path / "link").symlink_to(tmp_path / "x")
    for last in ("x/photos", f"{tmp_path}/x/photos", "link/photos", "y/photos"):
        with _refused("holds `photos:cow/co_00` twice; name each set once, and equal folders"):
            load_data(["x/photos", last])
    drawn.folders(tmp_path / "w", ("dog",), 1, name="photos", first=300)  # no key in common
    keys = load_data(["x/photos", "w/photos"]).keys
    assert keys == ("cow/co_00", "cow/co_01", "dog/do_00")
    with _refused("twice"):
        load_data(["glyphworld_test"] * 2, counts={"glyphworld_test": 2})
    with _refused("twice"):
        load_data("x/photos").subset([0, 0], "part")


def test_subset_keeps_order_content_and_hash(tmp_path: Path) -> None:
    data = load_data(str(drawn.folders(tmp_path)))
    part = data.subset([7, 2, 3], "part")
    assert part.name == "part" and part.keys == tuple(data.keys[i] for i in (7, 2, 3))
    assert part.groups == {"car": (1, 2), "cow": (0,)}
    assert part.content(0) == data.content(7)
    assert part.hashes() == [data.hashes()[i] for i in (7, 2, 3)]
    keyed = [(k, part.content(i)) for i, k in enumerate(part.keys)]
    assert part.digest() == digest(keyed) != data.digest()
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
        load_data("voc_train").files[0][1]: lambda: load_data("voc_train"),
        next(coco.rglob("instances_*.json")): lambda: load_data("coco"),
        mine: lambda: load_data(["voc_train", "mine"]).subset([13, 12, 3], "part"),
    }
    for file, load in sets.items():
        before, content = load(), file.read_bytes()
        assert (before.truth_digest(), before.identity()) == (
            load().truth_digest(),
            load().identity(),
        )
        assert len({before.digest(), before.truth_digest(), before.identity(), ""}) == 4
        file.write_bytes(content + b" ")
        after = load()
        assert after.digest() == before.digest()
        assert after.truth_digest() != before.truth_digest()
        assert after.identity() != before.identity(), file
        file.write_bytes(content)
        assert load().identity() == before.identity()
    glyphs = load_data("glyphworld_test", counts={"glyphworld_test": 2})
    assert (
        len(glyphs) == 24 and glyphs.truth_digest() == "" and glyphs.identity() == glyphs.digest()
    )


def test_most_masks_empty_is_refused(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow", "dog"), 40, truth=".jpg")
    for n, f in enumerate(sorted((root / "groundtruth").rglob("*.jpg"))):
        if n % 3:
            Image.new("L", drawn.SIZE, 1).save(f)  # 0 and 1 in a JPEG
    with _refused("co_04.jpg: no object pixel, as in 13 of 20 masks looked at; save the object"):
        load_data(str(root))


def test_construction_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn.voc(tmp_path)
    drawn.folders(tmp_path, d.VOC_CLASSES, 1, name="PASCAL_VOC")
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("a picture was opened"))
    assert len(open_folder(tmp_path / "PASCAL_VOC").groups) == 20
    load_data("voc_train")


# ---------------------------------------------------------------------------------------- mistakes
def _fault_missing_mask(root: Path) -> None:
    (root / "groundtruth/cow/co_01.png").unlink()


def _fault_size(root: Path) -> None:
    mask = drawn.rectangle(size=(40, 32), value=255)
    Image.fromarray(mask).save(root / "groundtruth/cow/co_01.png")


def _fault_image(root: Path) -> None:
    file = root / "image/cow/co_01.jpg"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _fault_mask(root: Path) -> None:
    (root / "groundtruth/cow/co_01.png").write_bytes(b"not a picture")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_fault_missing_mask, "cow/co_01.png: no such file; put it back or take its picture out"),
        (_fault_size, r"mask of .40, 32. pixels for image cow/co_01 of .48, 32.; make them one"),
        (_fault_image, "co_01.jpg: corrupt picture or unknown kind .*put back a sound PNG or JPEG"),
        (_fault_mask, "co_01.png: corrupt picture or unknown kind .*put back a sound PNG or JPEG"),
    ],
)
def test_faults_are_one_line_naming_the_file(tmp_path: Path, fault, words: str) -> None:
    root = drawn.folders(tmp_path, ("cow",), 3)
    fault(root)
    with _refused(words) as caught:
        data = load_data(str(root))
        data.image(1)
        data.mask(1, ["cow"])
    assert "\n" not in str(caught.value)


def test_unknown_names_and_layouts(tmp_path: Path) -> None:
    for nothing in ("", " ", [], ["msrc7", ""]):
        with _refused("no data set is named; give a folder or one of voc_train"):
            load_data(nothing)
    with pytest.raises(Missing, match="data `msrc7` not found: looked for .*MSRC7.*LCCO_DATA") as e:
        load_data(["msrc7"])
    assert e.value.status == "not run: data not found (msrc7)"
    with _refused("`nonesuch`: no such folder, .* and no known set; known are voc_train, .*msrc7"):
        load_data("nonesuch")
    with _refused("counts has `nonesuch`; only drawn sets have a count"):
        load_data("nonesuch", counts={"nonesuch": 3})
    (tmp_path / "pictures").mkdir()
    for folder in ("pictures", "nothing"):
        with _refused("no folder in a known layout; expected image/<class>.*VOC, COCO"):
            open_folder(tmp_path / folder)
    drawn.folders(tmp_path, ("bird", "car"), 1, name="MSRC")
    with _refused("lacks the groups cat, cow, dog, plane, sheep"):
        load_data("msrc7")
    drawn.folders(tmp_path, ("bird", "car"), 1, name="PASCAL_VOC")
    with _refused("fold_train.txt: no such list"):
        load_data("pascal_fold_train")
    (tmp_path / "PASCAL_VOC/fold_train.txt").write_text("bird/bi_00\nbird/bi_77\n")
    with _refused("fold_train.txt: `bird/bi_77` has no image"):
        load_data("pascal_fold_train")
    assert {"voc_more", "coco_voc20", "glyphworld_choice", "coco_seg"} < set(KNOWN_SETS)


# --------------------------------------------------------------------- any names, any modes
ODD = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\"),
    min_size=1, max_size=12,
)  # fmt: skip
ODD = st.one_of(
    ODD, st.sampled_from(["a", "a.b", "a (2)", "é", "e\u0301", "a + b", "a without b", "ﬁ"])
)
MODES = {"L": ".png", "RGB": ".jpg", "P": ".gif", "RGBA": ".webp", "I;16": ".tif", "1": ".bmp"}


def _item(folder: Path, masks: Path, name: str, mode: str, n: int, value: int = 255) -> bool:
    """A picture of one grey level and its mask, a box of its own size; False if it has no place."""
    grey = Image.new("L", (24, 16), 255 if mode == "1" else 20 * (n + 1))
    ending, image = MODES[mode], grey.convert(mode) if mode != "I;16" else None
    if mode == "I;16":
        image = Image.fromarray(np.full((16, 24), 257 * 20 * (n + 1), np.uint16))
        image.putpixel((0, 0), 65535)
    if len(f"{name}{ending}".encode()) > 200 or (folder / f"{name}{ending}").exists():
        return False
    image.save(folder / f"{name}{ending}", **({"lossless": True} if ending == ".webp" else {}))
    Image.fromarray(drawn.rectangle((0, 0, n + 1, 5), (24, 16), value)).save(masks / f"{name}.png")
    return True


def _is_right(data: d.CoSegData, i: int, c: str, items: list[tuple[str, str]]) -> None:
    """The picture at `i` is the one of its name, with the mask of its name."""
    grey = np.asarray(data.image(i))[8, 12]
    n = int(data.mask(i, [c]).sum()) // 5 - 1
    name, mode = items[n]
    assert unicodedata.normalize("NFC", name) in data.keys[i]
    level = 255 if mode == "1" else 20 * (n + 1)
    assert np.abs(grey.astype(int) - level).max() <= 2


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(items=st.lists(st.tuples(ODD, st.sampled_from(sorted(MODES))), min_size=1, max_size=6))
def test_any_folder_is_read_pixel_right_or_named(items: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as base:
        folder, masks = Path(base) / "set/image/cow", Path(base) / "set/groundtruth/cow"
        folder.mkdir(parents=True)
        masks.mkdir(parents=True)
        made = [_item(folder, masks, name, mode, n) for n, (name, mode) in enumerate(items)]
        try:
            data = load_data(str(Path(base) / "set"))
        except LCCoError as error:
            hidden = all(name[0] == "." for name, _ in items)
            assert hidden or any(name in str(error) for name, _ in items), error
            return
        shown = [name for (name, _), there in zip(items, made, strict=True) if there]
        shown = [name for name in shown if name[0] != "."]
        assert len(data) == len(shown)
        for i in range(len(data)):
            _is_right(data, i, "cow", items)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(items=st.lists(st.tuples(ODD, st.sampled_from(sorted(MODES))), min_size=1, max_size=6))
def test_any_voc_list_is_read_pixel_right_or_named(items: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as base:
        root = Path(base) / "voc"
        for place in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (root / place).mkdir(parents=True)
        for n, (name, mode) in enumerate(items):
            _item(root / "JPEGImages", root / "SegmentationClass", name, mode, n, 12)
        lines = list(dict.fromkeys(name for name, _ in items))
        (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(lines), encoding="utf-8")
        try:
            data = load_data(str(root))
            assert len(data) == len([line for line in lines if line.strip()])
            for i in range(len(data)):
                _is_right(data, i, "dog", items)
        except LCCoError as error:
            blank = not any(name.strip() for name, _ in items)
            named = any(name.strip() and name.strip() in str(error) for name, _ in items)
            assert blank or named, error


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 130), st.floats(), st.text(max_size=3)),
    lambda part: (
        st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=3), part, max_size=2)
    ),
    max_leaves=6,
)
FIELDS = {"images": ["id", "file_name", "width", "height"], "categories": ["id", "name"],
          "annotations": [
              "id", "image_id", "category_id", "segmentation", "area", "iscrowd"]}  # fmt: skip


@pytest.fixture(scope="module")
def one_coco(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = drawn.coco(tmp_path_factory.mktemp("coco"))
    return root, _document(root)[0].read_text()


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_odd_entry_of_a_coco_file_is_read_or_named(one_coco, data: st.DataObject) -> None:
    """No entry ends in a traceback; an annotation that is read has the mask that it had."""
    root, text = one_coco
    document = json.loads(text)
    right = [drawn.rectangle(box, (120, 90)) for box in ((10, 5, 80, 85), (40, 10, 110, 80))]
    part = data.draw(st.sampled_from(sorted(FIELDS)))
    field, value = data.draw(st.sampled_from(FIELDS[part])), data.draw(JSON)
    document[part][1][field] = value
    _document(root)[0].write_text(json.dumps(document))
    try:
        found = open_folder(root).complete()
    except LCCoError as error:
        assert "\n" not in str(error)
        assert any(word in str(error) for word in ("instances_train2017.json", "no such file"))
        return
    for i, key in enumerate(found.keys):
        try:
            masks = [found.mask(i, [c]) for c in ("cat", "dog")]
        except LCCoError as error:
            assert key in str(error) or "annotation" in str(error)
            continue
        if part == "annotations" and key == "000000000001.jpg" and field != "segmentation":
            named = any(kind == "entry left out" for kind, _, _ in found.left_out)
            moved = field in ("image_id", "category_id")
            assert named or moved or all(map(np.array_equal, masks, right))


# ----------------------------------------------------------------------------------- real pictures
@pytest.mark.parametrize(
    ("name", "images", "groups"),
    [("msrc14", 420, 14), ("msrc7", 208, 7), ("pascal1037", 1037, 20),
     ("pascal_fold_train", 623, 20), ("pascal_fold_test", 414, 20), ("voc_train", 3246, 20),
     ("voc_val", 377, 20), ("coco_voc20", 400, 20), ("voc_more", 209, 20)],
)  # fmt: skip
def test_real_counts(real: Path, name: str, images: int, groups: int, capsys) -> None:
    data = load_data(name)
    assert len(data) == images and len(data.groups) <= groups
    assert "×" not in capsys.readouterr().err  # nothing is left out
    i = len(data) // 2
    assert data.mask(i, sorted(data.classes_of(i))).shape == data.image(i).size[::-1]


def test_real_sets_share_no_picture(real: Path) -> None:
    voc, pascal = load_data("voc_train"), load_data("pascal1037")
    assert voc.overlap(pascal) == []
    train, test = load_data("pascal_fold_train"), load_data("pascal_fold_test")
    assert train.overlap(test) == []
    assert len(pascal.overlap(train)) > 623  # and finds those that are shared
