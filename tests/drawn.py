"""Tiny image sets drawn on disk in every layout; the masks are known rectangles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (48, 32)  # width, height
BOX = (8, 6, 28, 22)  # x0, y0, x1, y1 of the object: 20 × 16 px, 20.8% of the picture
SECOND = (30, 4, 44, 20)  # a second object beside it: 14 × 16 px
VOC_PALETTE = [v for k in range(256) for v in (k, (k * 37) % 256, (k * 91) % 256)]


def picture(
    seed: int, box: tuple[int, int, int, int] = BOX, size: tuple[int, int] = SIZE
) -> Image.Image:
    """A textured picture, different for every seed, with a bright rectangle."""
    rng = np.random.default_rng(seed)
    ground = Image.fromarray(rng.integers(0, 200, (8, 12, 3), np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    out = np.array(ground)
    x0, y0, x1, y1 = box
    out[y0:y1, x0:x1] = (
        out[y0:y1, x0:x1] // 4 + np.array([170, 60 + seed % 100, 30], np.uint8)
    ).astype(np.uint8)
    return Image.fromarray(out)


def rectangle(
    box: tuple[int, int, int, int] | None = BOX, size: tuple[int, int] = SIZE, value: int = 1
) -> np.ndarray:
    """uint8 [H, W]: `value` inside the box, 0 elsewhere (None: nowhere)."""
    out = np.zeros(size[::-1], np.uint8)
    if box:
        out[box[1] : box[3], box[0] : box[2]] = value
    return out


def _pairs(
    root: Path,
    classes: Sequence[str],
    n: int,
    image: str,
    truth: str,
    truth_suffix: str,
    first: int,
) -> Path:
    for k, c in enumerate(classes):
        for i in range(n):
            stem = f"{c[:2]}_{i:02d}"
            for template, suffix in ((image, ".jpg"), (truth, truth_suffix)):
                file = root / template.format(c) / f"{stem}{suffix}"
                file.parent.mkdir(parents=True, exist_ok=True)
                if template == image:
                    picture(first + 100 * k + i).save(file, quality=95)
                else:
                    Image.fromarray(rectangle(value=255)).save(file)
    return root


def folders(
    tmp: Path, classes: Sequence[str] = ("cow", "car"), n: int = 6, name: str = "set",
    truth: str = ".png", first: int = 0,
) -> Path:  # fmt: skip
    """`tmp/name` in the SSNM/UFO layout: n images a class, each with object BOX.

    `first` seeds the pictures."""
    return _pairs(Path(tmp) / name, classes, n, "image/{}", "groundtruth/{}", truth, first)


def icoseg(tmp: Path, classes: Sequence[str] = ("cheetah", "panda1"), n: int = 3) -> Path:
    """`tmp/iCoseg` in iCoseg's own layout."""
    return _pairs(Path(tmp) / "iCoseg", classes, n, "images/{}", "ground_truth/{}", ".png", 1000)


def rubinstein(
    tmp: Path, classes: Sequence[str] = ("Airplane100", "Car100", "Horse100"), n: int = 3
) -> Path:
    """`tmp/Internet` in Rubinstein's layout."""
    return _pairs(Path(tmp) / "Internet", classes, n, "{}", "{}/GroundTruth", ".png", 2000)


def voc(
    tmp: Path,
    train: int = 12,
    val: int = 4,
    classes: Sequence[int] = (12, 15, 13),
    second: int = 15,
) -> Path:
    """`tmp/VOCdevkit/VOC2012`: image k shows class `classes[k % len]` at BOX.

    Each odd image also shows class `second` at SECOND, where it is not that class already. A frame
    of void, 1 px wide, surrounds BOX."""
    root = Path(tmp) / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    stems = [f"2007_{k:06d}" for k in range(train + val)]
    for k, stem in enumerate(stems):
        x0, y0, x1, y1 = BOX
        mask = rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), value=255)
        mask[y0:y1, x0:x1] = classes[k % len(classes)]
        if k % 2:
            mask[SECOND[1] : SECOND[3], SECOND[0] : SECOND[2]] = second
        picture(3000 + k).save(root / "JPEGImages" / f"{stem}.jpg", quality=95)
        truth = Image.fromarray(mask).convert("P")
        truth.putpalette(VOC_PALETTE)
        truth.putdata(mask.ravel().tolist())
        truth.save(root / "SegmentationClass" / f"{stem}.png")
    lists = root / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("\n".join(stems[:train]) + "\n")
    (lists / "val.txt").write_text("\n".join(stems[train:]) + "\n")
    return root


def coco_box(
    image: int, category: int, box: tuple[int, int, int, int], crowd: bool = False
) -> dict:
    """One COCO annotation of a rectangle (x0, y0, x1, y1); `id` is filled in by `coco`."""
    x0, y0, x1, y1 = box
    area = (x1 - x0) * (y1 - y0)
    entry = {
        "image_id": image,
        "category_id": category,
        "area": area,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
    }
    if crowd:
        counts = [90 * x0, 90 * (x1 - x0), 90 * (120 - x1)]
        return entry | {"iscrowd": 1, "segmentation": {"size": [90, 120], "counts": counts}}
    return entry | {"iscrowd": 0, "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]]}


def coco(tmp: Path, annotations: Sequence[dict] | None = None, images: int = 4) -> Path:
    """`tmp/coco` of 120 × 90 px pictures, by default of the categories cat (1) and dog (2).

    Image 0: a large cat. 1: a large cat and a large dog. 2: a large dog and a small cat. 3: a large
    crowd of cats and a small dog."""
    root = Path(tmp) / "coco"
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "train2017").mkdir(exist_ok=True)
    large, other, small = (10, 5, 80, 85), (40, 10, 110, 80), (0, 0, 20, 20)
    if annotations is None:
        annotations = [
            coco_box(0, 1, large), coco_box(1, 1, large), coco_box(1, 2, other),
            coco_box(2, 2, large), coco_box(2, 1, small),
            coco_box(3, 1, (0, 0, 100, 90), crowd=True), coco_box(3, 2, small),
        ]  # fmt: skip
    entries = []
    for k in range(images):
        name = f"{k:012d}.jpg"
        picture(4000 + k, size=(120, 90)).save(root / "train2017" / name, quality=95)
        entries.append({"id": k, "file_name": name, "width": 120, "height": 90})
    document = {
        "images": entries,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [a | {"id": n + 1} for n, a in enumerate(annotations)],
    }
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(document))
    return root
