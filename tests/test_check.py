"""`check`: every fault that is planted is named; clean folders are clean. And the overlap check."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import drawn
import numpy as np
import pytest
from PIL import Image

from lcco.common import LCCoError
from lcco.data import check, load_data
from lcco.data.load import MSRC7
from lcco.data.overlap import NEAR, near_pairs, picture_hash


def _rows(table, what: str) -> list[str]:
    return sorted(r.item for r in table.itertuples() if r.check == what and r.item)


def _counts(table) -> dict[str, int]:
    return {r.item: r.found for r in table.itertuples() if r.check == "images"}


def test_check_of_a_clean_folder(tmp_path: Path) -> None:
    table = check(drawn.folders(tmp_path, MSRC7, 10, name="MSRC7"))
    assert table.attrs["ok"] and (table.status == "ok").all()
    assert _counts(table) == {"all (folders)": 70} | dict.fromkeys(MSRC7, 10)
    assert list(table.columns) == ["status", "check", "item", "found", "detail"]


def test_check_finds_every_planted_fault(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, MSRC7, 10, name="MSRC7")
    image, truth = root / "image", root / "groundtruth"
    (truth / "bird/bi_00.png").unlink()
    (image / "car/ca_01.jpg").unlink()
    wide = drawn.rectangle(size=(40, 32), value=255)
    Image.fromarray(wide).save(truth / "cat/ca_02.png")
    Image.fromarray(drawn.rectangle(None)).save(truth / "cow/co_03.png")
    broken = image / "plane/pl_05.jpg"
    broken.write_bytes(broken.read_bytes()[:900])
    (truth / "sheep/sh_06.png").write_bytes(b"?")
    shutil.copy(image / "bird/bi_07.jpg", image / "bird/bi_08.jpg")
    with Image.open(image / "car/ca_08.jpg") as picture:
        picture.save(image / "car/ca_09.jpg", quality=70)
    Image.fromarray(drawn.rectangle(value=1)).save(truth / "dog/do_09.png")
    table = check(root)
    assert not table.attrs["ok"] and table.attrs["layout"] == "folders"
    found = {
        "missing mask": ["bird/bi_00"], "missing image": ["car/ca_01"],
        "empty mask": ["cow/co_03"], "bad image": ["plane/pl_05"],
        "bad mask": ["cat/ca_02", "dog/do_09", "sheep/sh_06"],
        "duplicate": ["bird/bi_08", "car/ca_09"], "most masks empty": [],
    }  # fmt: skip
    assert {what: _rows(table, what) for what in found} == found
    few = check(root, limit=1)
    assert list(few.found[few.check == "bad mask"]) == [3]  # one line of three


def test_check_names_what_readers_pass_over(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow", "dog", "car", "bus"), 2)
    for f in (root / "image/dog").iterdir():
        f.rename(f.with_suffix(".xyz"))
    shutil.rmtree(root / "image/car")
    for f in (root / "groundtruth/bus").iterdir():
        Image.new("L", Image.open(f).size).save(f)
    shutil.copy(root / "image/cow/co_00.jpg", root / "image/cow/notes.txt")
    (root / "image/cow/folder.jpg").mkdir()
    shutil.copy(root / "image/cow/co_00.jpg", root / "image/loose.jpg")
    table = check(root)
    assert not table.attrs["ok"] and _rows(table, "class without a picture") == ["car", "dog"]
    assert _rows(table, "most masks empty") == ["bus"]
    left_out = ["cow/folder.jpg", "cow/notes.txt", "dog/do_00.xyz", "dog/do_01.xyz", "loose.jpg"]
    assert _rows(table, "file left out") == left_out
    shutil.copy(root / "image/cow/co_00.jpg", root / "image/cow/co_00.png")
    with pytest.raises(LCCoError, match="co_00.jpg and co_00.png: one name; rename or move one"):
        check(root)


def test_most_masks_empty_is_an_error(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow", "dog"), 3, truth=".jpg")
    for f in list((root / "groundtruth").rglob("*.jpg"))[:4]:
        Image.new("L", Image.open(f).size, 1).save(f)  # 0 and 1 in a JPEG: seen by this alone
    table = check(root)
    assert not table.attrs["ok"] and "4 of 6" in " ".join(table.detail)
    assert "all (folders)" in _rows(table, "most masks empty")


def test_check_notes_alone_are_fine(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow",), 3)
    Image.fromarray(drawn.rectangle(None)).save(root / "groundtruth/cow/co_00.png")
    table = check(root)
    assert table.attrs["ok"] and "note" in set(table.status)


def test_turned_and_16_bit_pictures_are_no_fault(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow",), 3)
    for n, file in enumerate(sorted((root / "image/cow").iterdir())):
        exif = Image.Exif()
        exif[0x0112] = 5 + n
        grey = np.asarray(drawn.picture(n, size=(32, 48)).convert("L")).astype(np.uint16) * 257
        Image.fromarray(grey).save(file.with_suffix(".tif"), exif=exif)
        file.unlink()
    table = check(root)
    assert table.attrs["ok"] and not _rows(table, "bad mask")


def test_check_finds_overlap_with_training_by_content(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow",), 4)
    training = load_data(str(drawn.folders(tmp_path, ("dog",), 4, name="train", first=500)))
    assert check(root, training).attrs["ok"]
    with Image.open(root / "image/cow/co_02.jpg") as picture:  # another size and compression
        small = picture.resize((96, 64), Image.Resampling.BICUBIC)
        small.save(tmp_path / "train/image/dog/do_01.jpg", quality=80)
    mask = Image.fromarray(drawn.rectangle(value=255)).resize((96, 64))
    mask.save(tmp_path / "train/groundtruth/dog/do_01.png")
    training = load_data(str(tmp_path / "train"))
    assert load_data(str(root)).overlap(training) == [(2, 1)]
    table = check(root, training)
    assert not table.attrs["ok"] and _rows(table, "in training set") == ["cow/co_02"]


def test_check_of_voc(tmp_path: Path) -> None:
    root = drawn.voc(tmp_path)
    table = check(root)
    assert table.attrs["ok"] and table.attrs["layout"] == "voc"
    assert _counts(table) == {"all (voc)": 16, "dog": 6, "horse": 5, "person": 10}
    Image.fromarray(drawn.rectangle(value=77)).save(root / "SegmentationClass/2007_000000.png")
    (root / "SegmentationClass/2007_000001.png").unlink()
    (root / "JPEGImages/2007_000002.jpg").unlink()
    table = check(root)
    assert _rows(table, "bad mask") == ["2007_000000"]
    assert _rows(table, "missing mask") == ["2007_000001"]
    assert _rows(table, "missing image") == ["2007_000002"]
    lists = root / "ImageSets/Segmentation"
    (lists / "train.txt").rename(lists / "trainval.txt")
    (lists / "val.txt").unlink()
    assert _counts(check(root))["all (voc)"] == 12


def test_check_of_coco(tmp_path: Path) -> None:
    root = drawn.coco(tmp_path)
    table = check(root)
    assert table.attrs["ok"] and table.attrs["layout"] == "coco"
    assert _counts(table) == {"all (coco)": 4, "cat": 3, "dog": 3}  # small objects count
    drawn.picture(1, size=(100, 90)).save(root / "train2017/000000000001.jpg")
    (root / "train2017/000000000002.jpg").unlink()
    notes = root / "annotations"
    shutil.copy(notes / "instances_train2017.json", notes / "instances_b.json")
    table = check(root)
    assert _rows(table, "file left out") == ["instances_b.json"]
    assert _rows(table, "bad mask") == ["000000000001.jpg"]
    assert _rows(table, "missing image") == ["000000000002.jpg"]


def test_check_names_odd_annotations(tmp_path: Path) -> None:
    root = drawn.coco(tmp_path)
    file = root / "annotations/instances_train2017.json"
    document = json.loads(file.read_text())
    box, counts = drawn.coco_box(0, 1, (0, 0, 90, 90)), [5]
    odd = [
        {"segmentation": []}, {"segmentation": [1, 2, 3, 4, 5, 6]},
        {"segmentation": [[1, 2, 3, 4]]}, {"image_id": 99}, {"category_id": 99},
        {"segmentation": {"size": [90, 120], "counts": counts}},
        {"segmentation": {"size": [9, 9], "counts": counts}}, {"id": "x"}, {"area": "8100"},
        {"segmentation": {"size": [90, 120], "counts": "???" * 40}},
        {"segmentation": {"size": [90, 120], "counts": [10**12]}},
    ]  # fmt: skip
    for n, change in enumerate(odd):
        document["annotations"].append(box | {"id": 900 + n} | change)
    del document["annotations"][-4]["iscrowd"]
    file.write_text(json.dumps(document))
    table = check(root)
    assert not table.attrs["ok"]
    left_out = [f"annotation {n}" for n in (900, 901, 902, 903, 904, 905, 906, 909, 910)]
    assert _rows(table, "entry left out") == left_out
    document["annotations"].append(box | {"id": 0})
    document["annotations"].append(box | {"id": 0})
    file.write_text(json.dumps(document))
    with pytest.raises(LCCoError, match="two entries of one id"):
        check(root)


# ----------------------------------------------------------------------------------------- overlap
def _product(seed: int, side: int, ground: str = "white") -> Image.Image:
    """A textured object of about `side` px in the middle of a plain ground of 320 × 240 px."""
    rng = np.random.default_rng((seed, side))
    out = np.full((240, 320, 3), 255, np.uint8)
    if ground == "shaded":
        out -= np.linspace(0, 60, 240).astype(np.uint8)[:, None, None]
    elif ground == "noisy":
        out = rng.normal(240, 4, out.shape).clip(0, 255).astype(np.uint8)
    h, w = (side * rng.uniform(0.8, 1.2, 2)).astype(int)
    y = (240 - h) // 2 + int(rng.integers(-8, 9))
    x = (320 - w) // 2 + int(rng.integers(-8, 9))
    texture = Image.fromarray(rng.integers(0, 230, (4, 4, 3), np.uint8))
    out[y : y + h, x : x + w] = np.array(texture.resize((w, h), Image.Resampling.BICUBIC))
    return Image.fromarray(out)


def _copies(image: Image.Image) -> list[Image.Image]:
    def coded(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=60)
        return Image.open(file)

    sizes = [(round(s * image.width), round(s * image.height)) for s in (0.5, 2)]
    half, double = (image.resize(size, Image.Resampling.BICUBIC) for size in sizes)
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
    sizes = [(320, 240), (240, 320), (96, 64)] * 4
    pictures = [drawn.picture(seed, size=size) for seed, size in enumerate(sizes)]
    for n, copies in enumerate(map(_copies, pictures)):
        assert _pairs(copies, pictures) == [(k, n) for k in range(len(copies))]
    bits = [int(picture_hash(i)[-32:], 16) for i in pictures]  # the difference bits alone tell
    assert min((a ^ b).bit_count() for a in bits for b in bits if a != b) > 2 * NEAR


def test_near_pairs_of_nothing_and_of_blank_pictures() -> None:
    blank, product = (
        picture_hash(i) for i in (Image.new("RGB", (60, 40), "white"), _product(1, 40))
    )
    assert near_pairs([], []) == near_pairs([], [blank]) == near_pairs([product], []) == []
    assert near_pairs([blank, product], [product, blank]) == [(0, 1), (1, 0)]


def test_check_of_plain_grounds_reports_no_duplicate(tmp_path: Path) -> None:
    root = drawn.folders(tmp_path, ("cow",), 6)
    for n, file in enumerate(sorted((root / "image/cow").iterdir())):
        _product(n, 60).save(file)
        mask = drawn.rectangle((140, 100, 180, 140), (320, 240), 255)
        Image.fromarray(mask).save(root / "groundtruth/cow" / f"{file.stem}.png")
    table = check(root)
    assert table.attrs["ok"] and not _rows(table, "duplicate")
    for n in (0, 5):
        with Image.open(root / "image/cow/co_03.jpg") as picture:
            picture.save(root / f"image/cow/co_0{n}.jpg", quality=60 + n)
    assert _rows(check(root), "duplicate") == ["cow/co_03", "cow/co_05"]  # of co_00


def test_real_copies_are_found(real: Path) -> None:
    data = load_data("msrc14")
    pictures = [data.image(i) for i in range(0, len(data), 14)]
    for n, copies in enumerate(map(_copies, pictures)):
        assert _pairs(copies, pictures) == [(k, n) for k in range(len(copies))]
