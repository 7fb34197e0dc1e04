"""Image sets: one reader a layout, one name a set, the group sampler, and the check of a user's folder.

A set holds items (one picture each) and groups (class → items). Reading is lazy: pictures are decoded when asked for,
and what must be known of every mask (VOC's classes, content hashes, picture hashes) is computed once and kept on disk.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from lcco.common import LCCoError, digest, file_digest, place, progress, write_text

if TYPE_CHECKING:
    import pandas as pd

VOID = 255  # a mask's third value: neither object nor background (VOC's object borders)
VOC_MIN_SHARE = 0.01  # a VOC image belongs to a class's group when at least 1% of its pixels show the class
COCO_MIN_AREA = 4000  # COCO-SEG: an (image, category) pair is kept if one non-crowd instance covers more pixels
COCO_MIN_IMAGES = 100  # COCO-SEG: categories with fewer kept images are dropped
PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
MSRC7 = ("bird", "car", "cat", "cow", "dog", "plane", "sheep")
ICOSEG8 = ("bear2", "brownbear", "cheetah", "elephant", "helicopter", "hotballoon", "panda1", "panda2")
INTERNET3 = ("airplane", "car", "horse")
LAYOUTS = {
    "folders": "image/<class>/* beside groundtruth/<class>/*",
    "icoseg": "images/<group>/* beside ground_truth/<group>/*.png",
    "rubinstein": "<class>/* with <class>/GroundTruth/*",
    "voc": "JPEGImages, SegmentationClass and ImageSets/Segmentation (VOCdevkit/VOC2012)",
    "coco": "train2017 beside annotations/instances_train2017.json",
}


# ---------------------------------------------------------------------------------------------------------- files
def read_picture(path: Path, mode: str | None = "RGB") -> Image.Image:
    """A whole picture, turned as its EXIF says, converted to `mode` (None: as stored).

    Raises: LCCoError naming the file when it is missing or does not decode.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            picture = ImageOps.exif_transpose(picture)
            return picture.convert(mode) if mode else picture.copy()
    except FileNotFoundError:
        raise LCCoError(f"{path}: no such file; put it back or take its image out of the set") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise LCCoError(f"{path}: corrupt picture ({_short(error)}); replace the file") from None


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height as shown (EXIF turned), from the file's header alone."""
    try:
        with Image.open(path) as picture:
            turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return picture.size[::-1] if turned else picture.size
    except (OSError, ValueError, SyntaxError) as error:
        raise LCCoError(f"{path}: corrupt picture ({_short(error)}); replace the file") from None


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0].split("'/")[0].strip()[:80] or type(error).__name__


def _threads() -> int:
    return max(2, min(8, os.cpu_count() or 2))


def file_index(kind: str, paths: Sequence[Path], compute: Callable[[Path], Any], what: str) -> list[Any]:
    """`compute(path)` of every file, in threads, kept in `cache/<kind>-<digest>.json` until size or time changes."""
    if not paths:
        return []
    store = place("cache") / f"{kind}-{digest(sorted({str(p.resolve().parent) for p in paths}))}.json"
    try:
        known = json.loads(store.read_text())
        known = known if isinstance(known, dict) else {}
    except (OSError, ValueError):  # absent or damaged: made again
        known = {}
    stamps = [(s.st_size, s.st_mtime_ns) if (s := _stat(p)) else None for p in paths]
    names = [f"{p.parent.name}/{p.name}" if p.parent.name else p.name for p in paths]
    if len(set(names)) < len(set(paths)):
        names = [str(p.resolve()) for p in paths]
    new = [
        n for n, (name, stamp) in enumerate(zip(names, stamps, strict=True))
        if stamp is None or known.get(name, [None])[:2] != list(stamp)
    ]
    if new:
        with ThreadPoolExecutor(_threads()) as pool:
            found = pool.map(lambda n: compute(paths[n]), new)
            for n, value in zip(new, progress(found, what, len(new)), strict=True):
                known[names[n]] = [*stamps[n], value] if stamps[n] else [None, None, value]
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the run
            write_text(store, json.dumps(known, separators=(",", ":")))
    return [known[name][2] for name in names]


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


# ---------------------------------------------------------------------------------------------------------- sets
class CoSegData:
    """A set of pictures with masks, sorted into groups that share a class. Readers subclass it.

    `keys`: item i's unique name. `groups`: class → items, sorted by name. A reader gives `image`, `truth`, `source`,
    and `groups` (to the constructor, or as its own cached property).
    """

    exhaustive: bool = True  # False: an item's truth knows one class only, others may be in the picture

    def __init__(
        self, name: str, layout: str, keys: Iterable[str], groups: dict[str, Sequence[int]] | None = None
    ) -> None:
        self.name, self.layout, self.keys = name, layout, tuple(keys)
        if groups is not None:
            self.groups = {c: tuple(groups[c]) for c in sorted(groups)}

    @cached_property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Class → items that show it, sorted by name."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {len(self)} images, {self.layout}>"

    def image(self, i: int) -> Image.Image:
        """Item i's picture, RGB, EXIF turned. Raises: LCCoError naming a corrupt file."""
        return read_picture(self.path(i))

    def path(self, i: int) -> Path:
        """Item i's picture file. Sets without files override `image` and `content` instead."""
        raise NotImplementedError

    def mask(self, i: int, classes: Sequence[str]) -> np.ndarray:
        """uint8 [H, W] of {0, 1, 255 = void}: the union of the classes' masks in image i; a class it lacks adds none.

        Raises: LCCoError naming a missing, corrupt or mis-sized mask.
        """
        raise NotImplementedError

    @cached_property
    def _classes(self) -> list[frozenset[str]]:
        found: list[set[str]] = [set() for _ in self.keys]
        for c, items in self.groups.items():
            for i in items:
                found[i].add(c)
        return [frozenset(f) for f in found]

    def classes_of(self, i: int) -> frozenset[str]:
        """The classes whose groups hold image i."""
        return self._classes[i]

    def labels_of(self, i: int) -> frozenset[str]:
        """Every class with any pixel in image i, however few (`classes_of` may ask for a least area)."""
        return self.classes_of(i)

    def knows_all(self, i: int) -> bool:
        """Whether image i's labels are exhaustive, so that a class not among them is truly absent."""
        return self.exhaustive

    def content(self, i: int) -> str:
        """A short sha256 of image i's file: equal pictures in two groups have equal content."""
        return self._contents([i])[0]

    def _contents(self, items: Sequence[int]) -> list[str]:
        known = self.__dict__.setdefault("_content", {})
        new = [i for i in items if i not in known]
        if len(new) == 1:
            known[new[0]] = file_digest(self.path(new[0]), 16)
        elif new:
            found = file_index("content", [self.path(i) for i in new], lambda p: file_digest(p, 16), "hashing files")
            known.update(zip(new, found, strict=True))
        return [known[i] for i in items]

    def digest(self) -> str:
        """The set's manifest hash, over every item's key and content."""
        if "_digest" not in self.__dict__:
            self._digest = digest(list(zip(self.keys, self._contents(range(len(self))), strict=True)))
        return self._digest

    def hashes(self) -> list[int]:
        """Every item's `picture_hash`."""
        if "_hashes" not in self.__dict__:
            self._hashes = self._picture_hashes(range(len(self)))
        return self._hashes

    def _picture_hashes(self, items: Sequence[int]) -> list[int]:
        if type(self).image is not CoSegData.image:
            return [picture_hash(self.image(i)) for i in items]
        return file_index(
            "pictures", [self.path(i) for i in items], lambda p: picture_hash(read_picture(p)), "hashing pictures"
        )

    def subset(self, indices: Iterable[int], name: str) -> CoSegData:
        """The items of these indices, in this order, as a set of its own; groups left empty are dropped."""
        return _View(name, [(self, list(indices))])


class _View(CoSegData):
    """Items of one or several sets, read through them; groups of one class name become one."""

    def __init__(self, name: str, parts: Sequence[tuple[CoSegData, Sequence[int]]]) -> None:
        self._items = [(data, i) for data, items in parts for i in items]
        self._parts = parts
        keys = [data.keys[i] for data, i in self._items]
        if len(set(keys)) < len(keys):  # two sets may use the same names
            keys = [f"{data.name}:{data.keys[i]}" for data, i in self._items]
        if len(set(keys)) < len(keys):
            twice = next(k for k, n in Counter(keys).items() if n > 1)
            raise LCCoError(f"data `{name}` holds `{twice}` twice; name each set once")
        super().__init__(name, "+".join(dict.fromkeys(data.layout for data, _ in parts)), keys)

    @cached_property
    def groups(self) -> dict[str, tuple[int, ...]]:
        groups: dict[str, list[int]] = defaultdict(list)
        for n, (data, i) in enumerate(self._items):
            for c in data.classes_of(i):
                groups[c].append(n)
        return {c: tuple(sorted(groups[c], key=self.keys.__getitem__)) for c in sorted(groups)}

    def image(self, i: int) -> Image.Image:
        data, j = self._items[i]
        return data.image(j)

    def path(self, i: int) -> Path:
        data, j = self._items[i]
        return data.path(j)

    def mask(self, i: int, classes: Sequence[str]) -> np.ndarray:
        data, j = self._items[i]
        return data.mask(j, classes)

    def labels_of(self, i: int) -> frozenset[str]:
        data, j = self._items[i]
        return data.labels_of(j)

    def knows_all(self, i: int) -> bool:
        data, j = self._items[i]
        return data.knows_all(j)

    def content(self, i: int) -> str:
        data, j = self._items[i]
        return data.content(j)

    def _contents(self, items: Sequence[int]) -> list[str]:
        return self._gather(items, lambda data, own: data._contents(own))

    def _picture_hashes(self, items: Sequence[int]) -> list[int]:
        return self._gather(items, lambda data, own: data._picture_hashes(own))

    def _gather(self, items: Sequence[int], ask: Callable[[CoSegData, list[int]], list[Any]]) -> list[Any]:
        """Ask each underlying set once for all its items, then put the answers in order."""
        places: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for n, i in enumerate(items):
            data, j = self._items[i]
            places[id(data)].append((n, j))
        sets, out = {id(data): data for data, _ in self._items}, [None] * len(items)
        for key, pairs in places.items():
            for (n, _), value in zip(pairs, ask(sets[key], [j for _, j in pairs]), strict=True):
                out[n] = value
        return out


class FolderData(CoSegData):
    """A set of one folder a class: layouts `folders` (SSNM, UFO), `icoseg` and `rubinstein`.

    An item sits in one class and its truth, binarised at > 127, knows that class alone.
    """

    exhaustive = False

    def __init__(self, name: str, root: Path, layout: str, classes: Sequence[str] | None = None) -> None:
        self.root, self.pairs, self.unpaired = root, [], []
        known: dict[str, tuple[Path, Path]] = {}
        for image_dir, truth_dir in _class_folders(root, layout):
            c = _class_name(image_dir.name, layout)
            if c in known:
                raise LCCoError(f"{image_dir} and {known[c][0]} are both class `{c}`; rename one")
            known[c] = (image_dir, truth_dir)
        if not known:
            raise LCCoError(f"{root}: no class folder with pictures; expected {LAYOUTS[layout]}")
        if classes is not None and (missing := [c for c in classes if c not in known]):
            raise LCCoError(f"data `{name}`: {root} lacks the group{'s'[: len(missing) > 1]} {', '.join(missing)}")
        keys, groups = [], {}
        for c in sorted(known if classes is None else classes):
            images, truths = (_by_stem(folder) for folder in known[c])
            self.unpaired += [t for stem, t in truths.items() if stem not in images]
            groups[c] = range(len(keys), len(keys) + len(images))
            for stem in sorted(images):
                keys.append(f"{c}/{stem}")
                self.pairs.append((images[stem], truths.get(stem), known[c][1], c))
        super().__init__(name, layout, keys, groups)

    def path(self, i: int) -> Path:
        return self.pairs[i][0]

    def truth_path(self, i: int) -> Path:
        """Item i's mask file. Raises: LCCoError when there is none."""
        image, truth, folder, _ = self.pairs[i]
        if truth is None:
            raise LCCoError(f"{image}: no mask `{image.stem}.png` (.bmp, .jpg) in {folder}; add it or move the image")
        return truth

    def complete(self) -> FolderData:
        """This set, after making sure that every image has a mask file. Raises: LCCoError naming the first without."""
        for i, pair in enumerate(self.pairs):
            if pair[1] is None:
                self.truth_path(i)
        return self

    def mask(self, i: int, classes: Sequence[str]) -> np.ndarray:
        width, height = _matching_size(self.path(i), self.truth_path(i))
        if self.pairs[i][3] not in classes:
            return np.zeros((height, width), np.uint8)
        return (np.asarray(read_picture(self.truth_path(i), "L")) > 127).astype(np.uint8)


def _matching_size(image: Path, truth: Path) -> tuple[int, int]:
    size, mask = picture_size(image), picture_size(truth)
    if size != mask:
        raise LCCoError(f"{truth}: mask is {mask[0]}×{mask[1]}, its image {size[0]}×{size[1]}; make them one size")
    return size


def _by_stem(folder: Path) -> dict[str, Path]:
    """Picture files of a folder by stem; with two of one stem, the later name wins (.png over .jpg)."""
    if not folder.is_dir():
        return {}
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in PICTURES and not f.name.startswith("."))
    return {f.stem: f for f in files}


def _class_folders(root: Path, layout: str) -> list[tuple[Path, Path]]:
    """(image folder, truth folder) of every class that has pictures."""
    if layout == "rubinstein":
        pairs = [(d, d / "GroundTruth") for d in _folders(root) if (d / "GroundTruth").is_dir()]
    else:
        images, truths = ("image", "groundtruth") if layout == "folders" else ("images", "ground_truth")
        pairs = [(d, root / truths / d.name) for d in _folders(root / images)]
    return [(d, t) for d, t in pairs if _by_stem(d)]


def _folders(root: Path) -> list[Path]:
    return sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith(".")) if root.is_dir() else []


def _class_name(folder: str, layout: str) -> str:
    """A folder's class: `Horse100` is Rubinstein's 100 horses; other names stay, but for case and spaces."""
    word = re.sub(r"100$", "", folder) if layout == "rubinstein" else folder
    return word.strip().lower().replace(" ", "").replace("_", "") if layout != "icoseg" else word.strip()


class VOCData(CoSegData):
    """PASCAL VOC: palette masks of class numbers, 255 = void.

    An image belongs to a class's group when the class covers at least `min_share` of its pixels.
    """

    def __init__(self, name: str, root: Path, lists: Sequence[str], min_share: float = VOC_MIN_SHARE) -> None:
        self.root, self.min_share = root, min_share
        stems: list[str] = []
        for word in lists:
            file = root / "ImageSets" / "Segmentation" / f"{word}.txt"
            if not file.is_file():
                raise LCCoError(f"data `{name}`: no list {file}")
            stems += [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
        # augmented lists hold absolute-like paths in some copies: "/JPEGImages/2007_000032.jpg /Segm…"
        stems = [Path(s).stem for s in stems]
        augmented = any("aug" in word for word in lists)
        self.masks = root / ("SegmentationClassAug" if augmented else "SegmentationClass")
        if not self.masks.is_dir():
            raise LCCoError(f"data `{name}`: no folder {self.masks}")
        super().__init__(name, "voc", dict.fromkeys(stems))

    def path(self, i: int) -> Path:
        return self.root / "JPEGImages" / f"{self.keys[i]}.jpg"

    def truth_path(self, i: int) -> Path:
        """Item i's mask file."""
        return self.masks / f"{self.keys[i]}.png"

    @cached_property
    def areas(self) -> list[dict[str, float]]:
        """Each item's classes and the share of its pixels that they cover; computed once and kept on disk."""
        files = [self.truth_path(i) for i in range(len(self))]
        counts = file_index("labels", files, _label_counts, f"reading {self.name}'s masks")
        return [
            {VOC_CLASSES[int(k) - 1]: n / sum(c.values()) for k, n in c.items() if 0 < int(k) <= len(VOC_CLASSES)}
            for c in counts
        ]

    @cached_property
    def groups(self) -> dict[str, tuple[int, ...]]:
        order = sorted(range(len(self)), key=self.keys.__getitem__)
        groups = {c: tuple(i for i in order if self.areas[i].get(c, 0) >= self.min_share) for c in VOC_CLASSES}
        return {c: items for c, items in groups.items() if items}

    def labels_of(self, i: int) -> frozenset[str]:
        return frozenset(self.areas[i])

    def mask(self, i: int, classes: Sequence[str]) -> np.ndarray:
        _matching_size(self.path(i), self.truth_path(i))
        table = np.zeros(256, np.uint8)
        table[[VOC_CLASSES.index(c) + 1 for c in classes if c in VOC_CLASSES]] = 1
        table[VOID] = VOID
        return table[_label_map(self.truth_path(i))]


def _label_map(path: Path) -> np.ndarray:
    picture = read_picture(path, None)
    if picture.mode not in ("P", "L"):
        raise LCCoError(f"{path}: a VOC mask must hold class numbers (palette or grey PNG), not {picture.mode} colours")
    return np.asarray(picture)


def _label_counts(path: Path) -> dict[str, int]:
    counts = np.bincount(_label_map(path).ravel(), minlength=256)
    return {str(k): int(counts[k]) for k in np.flatnonzero(counts)}


class COCOData(CoSegData):
    """COCO by the COCO-SEG rule: an (image, category) pair counts if one non-crowd instance covers > `min_area` px.

    Categories with fewer than `min_images` such images are dropped. A mask is the union of the classes' annotations.
    """

    def __init__(
        self, name: str, root: Path, min_area: float = COCO_MIN_AREA, min_images: int = COCO_MIN_IMAGES
    ) -> None:
        files = sorted(root.glob("annotations/instances_*.json"))
        if not files:
            raise LCCoError(f"data `{name}`: no {root / 'annotations' / 'instances_train2017.json'}")
        file = next((f for f in files if f.stem == "instances_train2017"), files[0])
        fold = file.stem.removeprefix("instances_")
        self.root = next((d for d in (root / fold, root / "images" / fold) if d.is_dir()), root / fold)
        if not self.root.is_dir():
            raise LCCoError(f"data `{name}`: {file.name} is there, its pictures {self.root} are not")
        from pycocotools.coco import COCO

        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it announces each step
                self.coco = COCO(str(file))
        except (ValueError, KeyError, AssertionError) as error:
            raise LCCoError(f"{file}: not a COCO instances file ({_short(error)})") from None
        names = {c: v["name"] for c, v in self.coco.cats.items()}
        pairs = {
            (a["image_id"], a["category_id"])
            for a in self.coco.anns.values() if not a.get("iscrowd") and a["area"] > min_area
        }
        held = Counter(category for _, category in pairs)
        pairs = {(i, c) for i, c in pairs if held[c] >= min_images}
        self.ids = sorted({i for i, _ in pairs}, key=lambda i: self.coco.imgs[i]["file_name"])
        number = {i: n for n, i in enumerate(self.ids)}
        groups: dict[str, list[int]] = defaultdict(list)
        for i, c in pairs:
            groups[names[c]].append(number[i])
        self.category = {v: c for c, v in names.items()}
        super().__init__(
            name, "coco", [Path(self.coco.imgs[i]["file_name"]).stem for i in self.ids],
            {c: sorted(items) for c, items in groups.items()},
        )  # fmt: skip

    def path(self, i: int) -> Path:
        return self.root / self.coco.imgs[self.ids[i]]["file_name"]

    def labels_of(self, i: int) -> frozenset[str]:
        return frozenset(self.coco.cats[a["category_id"]]["name"] for a in self.coco.imgToAnns[self.ids[i]])

    def mask(self, i: int, classes: Sequence[str]) -> np.ndarray:
        entry, path = self.coco.imgs[self.ids[i]], self.path(i)
        if (size := picture_size(path)) != (entry["width"], entry["height"]):
            raise LCCoError(
                f"{path}: image is {size[0]}×{size[1]}, its annotations {entry['width']}×{entry['height']}; "
                "put the original picture back"
            )
        wanted, out = {self.category.get(c) for c in classes}, np.zeros((entry["height"], entry["width"]), np.uint8)
        for annotation in self.coco.imgToAnns[self.ids[i]]:
            if annotation["category_id"] in wanted:
                out |= self.coco.annToMask(annotation).astype(np.uint8)
        return out


# ---------------------------------------------------------------------------------------------------------- names
_VOC_HOMES = ("VOCdevkit/VOC2012", "VOC2012", ".")
_FOLDER_SETS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {  # name -> where it may be, its groups
    "msrc7": (("MSRC7", "MSRC"), MSRC7),
    "msrc14": (("MSRC",), None),
    "icoseg8": (("iCoseg8", "iCoseg"), ICOSEG8),
    "icoseg38": (("iCoseg",), None),
    "internet300": (("Internet_Datasets300", "Internet300", "Internet", "Internet/Data"), INTERNET3),
    "pascal1037": (("PASCAL_VOC",), None),
    "pascal_fold_train": (("PASCAL_VOC",), None),
    "pascal_fold_test": (("PASCAL_VOC",), None),
}
_VOC_SETS = {
    "voc_train": ("train",), "voc_val": ("val",), "voc_trainval": ("train", "val"), "voc_trainaug": ("train_aug",)
}  # fmt: skip
_COCO_HOMES = ("coco", "COCO", "coco2017", "COCO2017", ".")
GLYPH_FOLDS = ("pretrain", "train", "holdout", "test", "choice")
NAMES = (*_VOC_SETS, *_FOLDER_SETS, "coco_seg", *(f"glyphworld_{f}" for f in GLYPH_FOLDS))


def load_data(spec: str, root: Path | None = None) -> CoSegData:
    """The set of a known name (`NAMES`) under `root`, or of a folder in a known layout; `a+b` joins sets.

    Joined sets have one class list: a class that both have becomes one group. `root` defaults to `$LCCO_DATA`.
    Raises: LCCoError saying where the set was looked for.
    """
    base = Path(root) if root else place("data")
    if "+" in spec and not Path(spec).exists():
        sets = [load_data(word.strip(), base) for word in spec.split("+")]
        return _View(spec, [(data, range(len(data))) for data in sets])
    if spec.startswith("glyphworld_") and spec in NAMES:
        from lcco.glyphworld import glyphworld

        return glyphworld(spec.removeprefix("glyphworld_"))
    if spec in _VOC_SETS:
        home = _home(spec, base, _VOC_HOMES, ("voc",))
        return VOCData(spec, home, [_aug_list(home) if w == "train_aug" else w for w in _VOC_SETS[spec]])
    if spec == "coco_seg":
        return COCOData(spec, _home(spec, base, _COCO_HOMES, ("coco",)))
    if spec in _FOLDER_SETS:
        homes, classes = _FOLDER_SETS[spec]
        home = _home(spec, base, homes, ("folders", "rubinstein", "icoseg"))
        data = FolderData(spec, home, recognise(home), classes).complete()
        if spec.startswith("pascal_fold"):
            return _fold(data, home / f"{spec.removeprefix('pascal_')}.txt", spec)
        return data
    for path in (Path(spec).expanduser(), base / spec):
        if path.is_dir():
            return _open(path.name or spec, path)
    raise LCCoError(f"data `{spec}` is neither a folder (also not {base / spec}) nor a known set: {', '.join(NAMES)}")


def _home(name: str, base: Path, places: Sequence[str], layouts: Sequence[str]) -> Path:
    for word in places:
        if _layout(base / word) in layouts:
            return base / word
    looked = ", ".join(str(base / word) for word in places if word != ".")
    raise LCCoError(f"data `{name}` not found: looked for {looked}; set LCCO_DATA or --data-root to its parent")


def _aug_list(root: Path) -> str:
    words = ("train_aug", "trainaug")
    return next((w for w in words if (root / "ImageSets" / "Segmentation" / f"{w}.txt").is_file()), words[0])


def _fold(data: CoSegData, file: Path, name: str) -> CoSegData:
    if not file.is_file():
        raise LCCoError(f"data `{name}`: no list {file} (one `class/stem` a line)")
    place_of = {key: i for i, key in enumerate(data.keys)}
    keys = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    for key in keys:
        if key not in place_of:
            raise LCCoError(f"{file}: `{key}` has no image in {file.parent}")
    return data.subset([place_of[k] for k in keys], name)


def _layout(path: Path) -> str | None:
    if not path.is_dir():
        return None
    if (path / "JPEGImages").is_dir() and any(path.glob("SegmentationClass*")):
        return "voc"
    if any(path.glob("annotations/instances_*.json")):
        return "coco"
    if (path / "image").is_dir() and (path / "groundtruth").is_dir():
        return "folders"
    if (path / "images").is_dir() and (path / "ground_truth").is_dir():
        return "icoseg"
    if any((d / "GroundTruth").is_dir() for d in _folders(path)):
        return "rubinstein"
    return None


def recognise(path: str | Path) -> str:
    """The layout of a folder: one of `LAYOUTS`.

    Raises: LCCoError listing the known layouts.
    """
    path = Path(path)
    if not path.is_dir():
        raise LCCoError(f"{path}: no such folder")
    if layout := _layout(path):
        return layout
    inner = next((p for p in (path / "VOCdevkit" / "VOC2012", path / "VOC2012") if _layout(p)), None)
    mend = f"did you mean {inner}?" if inner else "known: " + "; ".join(f"{k}: {v}" for k, v in LAYOUTS.items())
    raise LCCoError(f"{path}: unknown layout; {mend}")


def _open(name: str, path: Path, strict: bool = True) -> CoSegData:
    """A folder of any layout as a set: every group, every list."""
    layout = recognise(path)
    if layout == "voc":
        lists = {f.stem for f in (path / "ImageSets" / "Segmentation").glob("*.txt")}
        words = [w for w in ("train", "val") if w in lists] or sorted(lists - {"trainval"})
        if not words:
            raise LCCoError(f"{path}: no list in ImageSets/Segmentation")
        return VOCData(name, path, words)
    if layout == "coco":
        return COCOData(name, path)
    data = FolderData(name, path, layout)
    return data.complete() if strict else data


# ------------------------------------------------------------------------------------------------ picture content
NEAR = 10  # bits of 128: pictures this close are one picture, re-encoded or resized


def picture_hash(image: Image.Image) -> int:
    """A 128-bit difference hash: which of two neighbouring cells is brighter, along rows and along columns.

    Re-encoding or resizing a picture changes few bits (`NEAR`), another picture about half of them.
    """
    grey = image.convert("L")
    rows = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
    columns = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), np.int16)
    bits = np.concatenate([(np.diff(rows, axis=1) > 0).ravel(), (np.diff(columns, axis=0) > 0).ravel()])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_pairs(a: Sequence[int], b: Sequence[int], near: int = NEAR) -> list[tuple[int, int]]:
    """Index pairs of hashes that differ in at most `near` bits."""
    left, right = (
        np.frombuffer(b"".join(h.to_bytes(16, "big") for h in side), ">u8").astype(np.uint64).reshape(-1, 2)
        for side in (a, b)
    )
    found = []
    for n, row in enumerate(left):  # one row against all: memory stays at one row
        distance = np.bitwise_count(right ^ row).sum(1)
        found += [(n, int(m)) for m in np.flatnonzero(distance <= near)]
    return found


def overlap(a: CoSegData, b: CoSegData) -> list[tuple[int, int]]:
    """(index in a, index in b) of every picture that both sets hold, by content: equal files or near-equal pictures."""
    return near_pairs(a.hashes(), b.hashes())
