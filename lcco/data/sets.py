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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
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
LOSSY = (".jpg", ".jpeg")  # their masks are binary only nearly
PICTURES = {*LOSSY, ".png", ".bmp", ".tif", ".tiff", ".webp"}
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
    store = place("cache") / f"{kind}-{digest(sorted({str(d.resolve()) for d in {p.parent for p in paths}}))}.json"
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

    def truth_path(self, i: int) -> Path:
        """Item i's mask file, where each item has one. Raises: LCCoError when a listing shows that there is none."""
        raise NotImplementedError

    def complete(self) -> CoSegData:
        """This set, once each item's files are known to be there. Raises: LCCoError naming the first that is not."""
        for i in range(len(self)):
            for file in (self.path(i), self.truth_path(i)):
                if not file.is_file():
                    raise LCCoError(f"{file}: no such file; put it back or take `{self.keys[i]}` out of the set")
        return self

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
        if type(self).content is not CoSegData.content:  # a set without files
            return [self.content(i) for i in items]
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

    def truth_digest(self) -> str:
        """A hash over every item's mask file; empty for drawn sets, whose keys say what is drawn.

        Raises: LCCoError naming the first item without a mask.
        """
        if "_truth_digest" not in self.__dict__:
            found = self._truth_contents(range(len(self)))
            self._truth_digest = digest(found) if any(found) else ""
        return self._truth_digest

    def _truth_contents(self, items: Sequence[int]) -> list[str]:
        if type(self).truth_path is CoSegData.truth_path:
            return [""] * len(items)
        return file_index("masks", [self.truth_path(i) for i in items], lambda p: file_digest(p, 16), "hashing masks")

    def identity(self) -> str:
        """A hash over pictures and masks: the name of what was made from both, so that edited masks make it anew."""
        if "_identity" not in self.__dict__:
            truths = self.truth_digest()
            self._identity = digest([self.digest(), truths]) if truths else self.digest()
        return self._identity

    def hashes(self) -> list[int]:
        """Every item's `picture_hash`."""
        if "_hashes" not in self.__dict__:
            self._hashes = self._picture_hashes(range(len(self)))
        return self._hashes

    def _picture_hashes(self, items: Sequence[int]) -> list[int]:
        if type(self).image is not CoSegData.image:
            return [picture_hash(self.image(i)) for i in items]
        return file_index(
            LOOKS, [self.path(i) for i in items], lambda p: picture_hash(read_picture(p)), "hashing pictures"
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
        if len(set(keys)) < len(keys):  # and be two folders of one name
            items = Counter((key, _origin(data, i)) for key, (data, i) in zip(keys, self._items, strict=True))
            if twice := next((key for (key, _), n in items.items() if n > 1), ""):
                raise LCCoError(f"data `{name}` holds `{twice}` twice; name each set once")
            keys, labels = [], set()
            for data, own in parts:
                numbered = (f"{data.name}#{n}" for n in range(2, 2 + len(parts)))
                label = next(word for word in (data.name, *numbered) if word not in labels)
                labels.add(label)
                keys += [f"{label}:{data.keys[i]}" for i in own]
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

    def _truth_contents(self, items: Sequence[int]) -> list[str]:
        return self._gather(items, lambda data, own: data._truth_contents(own))

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


def _origin(data: CoSegData, i: int) -> Path | str:
    """Where item i's picture is; of a drawn one, what it is."""
    try:
        return data.path(i).resolve()
    except NotImplementedError:
        return data.content(i)


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
        image, truth, folder, _ = self.pairs[i]
        if truth is None:
            raise LCCoError(f"{image}: no mask `{image.stem}.png` (.bmp, .jpg) in {folder}; add it or move the image")
        return truth

    @cached_property
    def _labels(self) -> list[frozenset[str]]:
        """A picture that sits in two groups (107 of PASCAL1037's do) is known to show both classes."""
        by_content: dict[str, set[str]] = defaultdict(set)
        contents = self._contents(range(len(self)))
        for pair, content in zip(self.pairs, contents, strict=True):
            by_content[content].add(pair[3])
        return [frozenset(by_content[content]) for content in contents]

    def labels_of(self, i: int) -> frozenset[str]:
        return self._labels[i]

    def mask(self, i: int, classes: Sequence[str]) -> np.ndarray:
        width, height = _matching_size(self.path(i), self.truth_path(i))
        if self.pairs[i][3] not in classes:
            return np.zeros((height, width), np.uint8)
        truth = self.truth_path(i)
        grey = _grey_mask(truth)
        if 0 < (top := int(grey.max(initial=0))) < 128 and truth.suffix.lower() not in LOSSY:
            what = "mask of the values 0 and 1" if top == 1 else f"mask without a value above 127, but {top}"
            raise LCCoError(f"{truth}: {what}; save the object as 255 (white)")  # class numbers would read as empty
        return (grey > 127).astype(np.uint8)


def _grey_mask(path: Path) -> np.ndarray:
    """A mask file as grey values. Raises: LCCoError where it hides its object in transparency, as a cut-out does."""
    picture = read_picture(path, None)
    if picture.mode in ("LA", "RGBA") and picture.getchannel("A").getextrema()[0] < 255:
        raise LCCoError(f"{path}: mask with transparency; save it as grey, object 255 and background 0")
    return np.asarray(picture.convert("L"))


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


_SIDES = {"folders": ("image", "groundtruth"), "icoseg": ("images", "ground_truth")}  # pictures, truths


def _class_folders(root: Path, layout: str) -> list[tuple[Path, Path]]:
    """(image folder, truth folder) of every class that has pictures."""
    if layout == "rubinstein":
        pairs = [(d, d / "GroundTruth") for d in _folders(root) if (d / "GroundTruth").is_dir()]
    else:
        images, truths = _SIDES[layout]
        pairs = [(d, root / truths / d.name) for d in _folders(root / images)]
    return [(d, t) for d, t in pairs if _by_stem(d)]


def _folders(root: Path) -> list[Path]:
    return sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith(".")) if root.is_dir() else []


def _class_name(folder: str, layout: str) -> str:
    """A folder's class, in lower case; `Horse100` is Rubinstein's 100 horses, `Dining_Table` VOC's diningtable."""
    word = (re.sub(r"100$", "", folder) if layout == "rubinstein" else folder).strip().lower()
    joined = re.sub(r"[ _-]", "", word)
    return joined if joined in VOC_CLASSES else word


class VOCData(CoSegData):
    """PASCAL VOC: palette masks of class numbers, 255 = void.

    An image belongs to a class's group when the class covers at least `min_share` of its pixels.
    """

    def __init__(self, name: str, root: Path, lists: Sequence[str], min_share: float = VOC_MIN_SHARE) -> None:
        self.root, self.min_share = root, min_share
        self.lists: dict[str, list[str]] = {}
        for word in lists:
            file = root / "ImageSets" / "Segmentation" / f"{word}.txt"
            if not file.is_file():
                raise LCCoError(f"data `{name}`: no list {file}")
            lines = file.read_text().splitlines()  # copies of the augmented list hold paths: "/JPEGImages/a.jpg /…"
            self.lists[word] = [Path(line.split()[0]).stem for line in lines if line.strip()]
        augmented = any("aug" in word for word in lists)
        self.masks = root / ("SegmentationClassAug" if augmented else "SegmentationClass")
        if not self.masks.is_dir():
            raise LCCoError(f"data `{name}`: no folder {self.masks}")
        if not any(self.lists.values()):
            raise LCCoError(f"data `{name}`: {root} lists no picture in {', '.join(f'{w}.txt' for w in lists)}")
        super().__init__(name, "voc", dict.fromkeys(stem for stems in self.lists.values() for stem in stems))

    def path(self, i: int) -> Path:
        return self.root / "JPEGImages" / f"{self.keys[i]}.jpg"

    def truth_path(self, i: int) -> Path:
        return self.masks / f"{self.keys[i]}.png"

    @cached_property
    def areas(self) -> list[dict[str, float]]:
        """Each item's classes and the share of its pixels that they cover; computed once and kept on disk."""
        files = [self.truth_path(i) for i in range(len(self))]
        counts = file_index("labels", files, _label_counts, f"reading {self.name}'s masks")
        return [_areas(c) for c in counts]

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


def _areas(counts: dict[str, int]) -> dict[str, float]:
    """Class → its share of the pixels, from the pixels of each value."""
    total = sum(counts.values())
    return {VOC_CLASSES[int(k) - 1]: n / total for k, n in counts.items() if 0 < int(k) <= len(VOC_CLASSES)}


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
        self.file = file
        self.root = next((d for d in (root / fold, root / "images" / fold) if d.is_dir()), root / fold)
        if not self.root.is_dir():
            raise LCCoError(f"data `{name}`: {file.name} is there, its pictures {self.root} are not")
        from pycocotools.coco import COCO

        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it announces each step
                self.coco = COCO(str(file))
            names = {c: v["name"] for c, v in self.coco.cats.items()}
            pairs = {
                (a["image_id"], a["category_id"])
                for a in self.coco.anns.values() if not a.get("iscrowd") and a["area"] > min_area
            }
        except (ValueError, KeyError, AssertionError) as error:
            raise LCCoError(f"{file}: not a COCO instances file ({_short(error)})") from None
        held = Counter(category for _, category in pairs)
        pairs = {(i, c) for i, c in pairs if held[c] >= min_images}
        if not pairs:
            raise LCCoError(f"{file}: no category has {min_images} images with an instance over {min_area:g} px")
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

    def _truth_contents(self, items: Sequence[int]) -> list[str]:
        return file_index("masks", [self.file], lambda p: file_digest(p, 16), "hashing annotations") * len(items)

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

    `a without b` leaves out of `a` every picture that is also in `b`, by content or look, as test sets demand it.
    `glyphworld_train:40` is a fold drawn with that many pictures (of each class, for the test fold).
    Joined sets have one class list: a class that both have becomes one group. `root` defaults to `$LCCO_DATA`.
    Raises: LCCoError saying where the set was looked for.
    """
    base = Path(root) if root else place("data")
    if not spec.strip():
        raise LCCoError(f"no data set is named; give a folder, or one of {', '.join(NAMES)}")
    if "+" in spec and not Path(spec).exists():
        sets = [load_data(word.strip(), base) for word in spec.split("+")]
        return _View(spec, [(data, range(len(data))) for data in sets])
    if " without " in spec and not Path(spec).exists():
        data, *others = (load_data(word.strip(), base) for word in spec.split(" without "))
        return data.subset(_unseen(data, others), spec)
    fold, colon, n = spec.removeprefix("glyphworld_").partition(":")
    if spec.startswith("glyphworld_") and fold in GLYPH_FOLDS:
        from lcco.glyphworld import glyphworld

        if colon and not (n.isdigit() and int(n)):
            raise LCCoError(f"data `{spec}`: `{n}` must be a number of pictures, as in glyphworld_{fold}:40")
        return glyphworld(fold, int(n) if n else None)
    if spec in _VOC_SETS:
        home = _home(spec, base, _VOC_HOMES, ("voc",))
        lists = [_aug_list(home) if w == "train_aug" else w for w in _VOC_SETS[spec]]
        return VOCData(spec, home, lists).complete()
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


def _unseen(data: CoSegData, others: Sequence[CoSegData]) -> list[int]:
    """The items of a set that are in none of the others; kept on disk, because every picture must be looked at."""
    file = place("cache") / f"without-{digest([LOOKS, data.digest(), *(o.digest() for o in others)], 16)}.json"
    if not file.is_file():
        seen = {i for other in others for i, _ in overlap(data, other)}
        write_text(file, json.dumps([i for i in range(len(data)) if i not in seen]))
    return json.loads(file.read_text())


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


def _open(name: str, path: Path, strict: bool = True, min_images: int = COCO_MIN_IMAGES) -> CoSegData:
    """A folder of any layout as a set: every group, every list; `strict`: with every file there."""
    layout = recognise(path)
    if layout == "voc":
        lists = {f.stem for f in (path / "ImageSets" / "Segmentation").glob("*.txt")}
        words = [w for w in ("train", "val") if w in lists] or sorted(lists - {"trainval"})
        if not words:
            raise LCCoError(f"{path}: no list in ImageSets/Segmentation")
    if layout == "coco":
        return COCOData(name, path, min_images=min_images)
    data = VOCData(name, path, words) if layout == "voc" else FolderData(name, path, layout)
    return data.complete() if strict else data


# ------------------------------------------------------------------------------------------------ picture content
LOOKS = "looks"  # in the name of every cache that hashes decide: change it with `picture_hash` or `near_pairs`
NEAR = 12  # bits of 128: pictures this close are one picture, re-encoded or resized, if their thumbnails agree too
FLAT = 2  # grey levels: a smaller difference of two cells is noise, or a plain ground
CELLS = 24  # a side of the thumbnail
LOOK = CELLS**2 + 16  # bytes of a picture's hash: thumbnail, then difference bits


def picture_hash(image: Image.Image) -> int:
    """What a picture looks like, as one number for `near_pairs`: a grey thumbnail above a 128-bit difference hash.

    A bit tells whether a cell is brighter than its neighbour, along rows and along columns: re-encoding or resizing
    changes few (`NEAR`), another picture about half of them, unless both show something on a plain ground, where most
    bits are 0. There the thumbnail tells them apart.
    """
    grey = image.convert("L")
    rows = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
    columns = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), np.int16)
    bits = np.concatenate([(np.diff(rows, axis=1) > FLAT).ravel(), (np.diff(columns, axis=0) > FLAT).ravel()])
    small = np.asarray(grey.resize((CELLS, CELLS), Image.Resampling.HAMMING))  # of a resized copy nearly the same
    return int.from_bytes(small.tobytes() + np.packbits(bits).tobytes(), "big")


def _looks(hashes: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of `picture_hash`es: bits [n, 2], thumbnails [n, cells] of mean 0 and variance 1, variances, tolerances [n].

    Two thumbnails of one picture are apart by a share of their variance (1 − correlation): 0.002 at most after
    re-encoding and resizing, up to 0.04 after careless resizing or a slight crop of a busy picture. Distinct objects
    of one size on a plain ground may be apart by 0.005 only. So the tolerance grows with the share of the cells that
    hold the picture's detail: a few hundredths of a product photograph's cells, about half of a scene's.
    """
    raw = np.frombuffer(b"".join(h.to_bytes(LOOK, "big") for h in hashes), np.uint8).reshape(-1, LOOK)
    cells = raw[:, :-16].astype(np.float32)
    padded = np.pad(cells.reshape(-1, CELLS, CELLS), ((0, 0), (1, 1), (1, 1)), "edge")
    around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    detail = np.abs(cells - around.reshape(cells.shape) / 4)
    share = detail.sum(1) ** 2 / (detail**2).sum(1).clip(1e-6) / CELLS**2
    cells -= cells.mean(1, keepdims=True)
    cells /= cells.std(1, keepdims=True).clip(3 * FLAT)  # noise must not become a look
    return raw[:, -16:].copy().view(np.uint64), cells, (cells**2).mean(1), 0.0025 + 0.2 * share**2


def near_pairs(a: Sequence[int], b: Sequence[int], near: int = NEAR) -> list[tuple[int, int]]:
    """Index pairs of hashes that differ in at most `near` bits, and whose thumbnails agree."""
    (bits, cells, variance, tolerance), right = _looks(a), _looks(b)
    found = []
    for n, row in enumerate(bits):  # one row against all: memory stays at one row
        m = np.flatnonzero(np.bitwise_count(right[0] ^ row).sum(1) <= near)
        if len(m):
            apart = (right[2][m] + variance[n]) / 2 - right[1][m] @ cells[n] / CELLS**2
            found += [(n, int(k)) for k in m[apart <= np.minimum(right[3][m], tolerance[n])]]
    return found


def overlap(a: CoSegData, b: CoSegData) -> list[tuple[int, int]]:
    """(index in a, index in b) of every picture that both sets hold, by content: equal files or near-equal pictures."""
    return near_pairs(a.hashes(), b.hashes())


# -------------------------------------------------------------------------------------------------- training squares
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as shares of width and height


def _square(picture: Image.Image, size: int, crop: Box | None, flip: bool, how: Image.Resampling) -> np.ndarray:
    width, height = picture.size
    box = tuple(s * n for s, n in zip(crop or (0, 0, 1, 1), (width, height) * 2, strict=True))
    if flip:
        picture = ImageOps.mirror(picture)
        box = (width - box[2], box[1], width - box[0], box[3])
    return np.array(picture.resize((size, size), how, box))


def load_square(data: CoSegData, i: int, size: int, crop: Box | None = None, flip: bool = False) -> np.ndarray:
    """uint8 [size, size, 3]: image i squashed to a square (bilinear, antialiased), of a crop, mirrored if asked."""
    return _square(data.image(i), size, crop, flip, Image.Resampling.BILINEAR)


def mask_square(
    data: CoSegData, i: int, classes: Sequence[str], size: int, crop: Box | None = None, flip: bool = False
) -> np.ndarray:
    """uint8 [size, size] of {0, 1, 255}: the mask that goes with `load_square`, by nearest neighbour."""
    return _square(Image.fromarray(data.mask(i, classes)), size, crop, flip, Image.Resampling.NEAREST)


# ------------------------------------------------------------------------------------------------------ group sampler
@dataclass(frozen=True)
class Draw:
    """One group: its images, the classes they share (their union is the truth), and each image's augmentation."""

    classes: tuple[str, ...]
    items: tuple[int, ...]
    flips: tuple[bool, ...]
    crops: tuple[Box | None, ...]


class GroupSampler:
    """Draws groups: a class, then N distinct images of it (with repeats only if the class has fewer).

    `class_sampling`: P(class) ∝ 1, √count or count. The truth is the union of every class that all N share (COCO-SEG).
    `paired`: the share of groups whose images all hold a second class too, no second class being common to all N, so
    that only the set tells which one counts (classes that allow no such group are left out; with none, a plain group).
    `absent`: the chance that one image of a group is replaced by one without the shared classes.
    `flip`: half of the images are mirrored; `crop` < 1: each is cropped to a random share ≥ `crop` of its sides.
    The groups of a step depend on (seed, step) alone, not on workers or earlier steps.
    """

    def __init__(
        self, data: CoSegData, *, groups: int, group_size: int, seed: int, class_sampling: str = "uniform",
        paired: float = 0.0, absent: float = 0.0, flip: bool = False, crop: float = 1.0,
    ) -> None:  # fmt: skip
        power = {"uniform": 0.0, "sqrt": 0.5, "proportional": 1.0}.get(class_sampling)
        if power is None:
            raise LCCoError(f"class_sampling is `{class_sampling}`; it must be uniform, sqrt or proportional")
        if groups < 1 or group_size < 1 or not 0 < crop <= 1:
            raise LCCoError("groups and group_size must be at least 1, crop in (0, 1]")
        self.data, self.n, self.size, self.seed = data, groups, group_size, seed
        self.paired, self.absent, self.flip, self.crop = paired, absent, flip, crop
        self._members = {c: np.array(items) for c, items in data.groups.items() if items}
        if not self._members:
            raise LCCoError(f"data `{data.name}` has no group to draw from")
        self._weights = {c: len(items) ** power for c, items in self._members.items()}
        pools = {c: np.array([i for i in m if len(data.classes_of(i)) > 1], int) for c, m in self._members.items()}
        self._pools = {
            c: pool for c, pool in pools.items() if len(pool) >= group_size > 1 and self._common(pool) == {c}
        } if paired else {}  # fmt: skip
        self._known = np.flatnonzero([data.knows_all(i) for i in range(len(data))]) if absent else None
        if absent and not len(self._known):
            self._known = np.arange(len(data))

    def _common(self, items: Iterable[int]) -> frozenset[str]:
        return frozenset.intersection(*(self.data.classes_of(i) for i in items))

    def draws(self, step: int) -> list[Draw]:
        """The groups of one step."""
        rng = np.random.default_rng((self.seed, step))
        return [self._draw(rng) for _ in range(self.n)]

    def _pick(self, rng: np.random.Generator, classes: Iterable[str]) -> str:
        names = list(classes)
        weights = np.array([self._weights[c] for c in names])
        return names[rng.choice(len(names), p=weights / weights.sum())]

    def _draw(self, rng: np.random.Generator) -> Draw:
        items = self._draw_paired(rng) if rng.random() < self.paired and self._pools else None
        if items is None:
            members = self._members[self._pick(rng, self._members)]
            items = rng.choice(members, self.size, replace=len(members) < self.size)
        items = [int(i) for i in items]
        shared = self._common(items)
        if rng.random() < self.absent and self.size > 1:
            for _ in range(100):
                other = int(rng.choice(self._known))
                if not shared & self.data.labels_of(other):
                    items[rng.integers(self.size)] = other
                    break
        flips = rng.random(self.size) < 0.5 if self.flip else [False] * self.size
        crops = [self._box(rng) for _ in items]
        return Draw(tuple(sorted(shared)), tuple(items), tuple(bool(f) for f in flips), tuple(crops))

    def _draw_paired(self, rng: np.random.Generator) -> np.ndarray | None:
        c = self._pick(rng, self._pools)
        for _ in range(20):
            items = rng.choice(self._pools[c], self.size, replace=False)
            shared = self._common(items) - {c}
            for d in shared:  # most images may hold the same second class: let one that does not take a place
                others = [i for i in self._pools[c] if d not in self.data.classes_of(i) and i not in items]
                if others:
                    items[rng.integers(self.size)] = rng.choice(others)
            if self._common(items) == {c}:
                return items
        return None

    def _box(self, rng: np.random.Generator) -> Box | None:
        if self.crop >= 1:
            return None
        side = rng.uniform(self.crop, 1)
        x, y = rng.uniform(0, 1 - side, 2)
        return (float(x), float(y), float(x + side), float(y + side))


# ------------------------------------------------------------------------------------------------------------- check
@dataclass(frozen=True)
class _Known:
    """What the literature has of a set: how many groups and images, and images a group (None: no one number)."""

    name: str
    groups: int | None
    images: int | None
    each: int | None = None


@dataclass
class _Seen:
    """One item decoded once: what the check needs of it."""

    content: str = ""
    hash: int | None = None
    problem: tuple[str, str] | None = None  # check, detail: an error
    empty: bool = False
    grey: str = ""  # how the mask is not binary
    labels: dict[str, int] | None = None  # VOC: pixels of each value


def _literature(data: CoSegData) -> tuple[_Known, Sequence[str]] | None:
    """The literature's set that this one is a copy of, and its groups."""
    groups = set(data.groups)
    if data.layout == "coco":
        return _Known("COCO-SEG", 78, 107_132), sorted(groups)
    if data.layout == "voc":
        return None
    if groups >= set(MSRC7):
        return _Known("MSRC7", 7, 70, 10), MSRC7
    if groups == set(INTERNET3):
        return _Known("Internet", 3, 300, 100), INTERNET3
    if groups == set(VOC_CLASSES):
        return _Known("PASCAL1037", 20, 1037), VOC_CLASSES
    if groups == set(ICOSEG8):
        return _Known("iCoseg8", 8, None), ICOSEG8
    if data.layout == "icoseg" or groups > set(ICOSEG8):
        return _Known("iCoseg", 38, 643), sorted(groups)
    return None


def check(
    path: str | Path, training: CoSegData | None = None, *, min_images: int = COCO_MIN_IMAGES, limit: int = 20
) -> pd.DataFrame:
    """What a folder holds and what is wrong with it: one table, columns status, check, item, found, expected, detail.

    `status` is ok, note (an empty or soft mask, a duplicate, a count that differs from the literature) or error (a
    missing pair, a mis-sized or unreadable mask, a corrupt file, a picture that is in `training` too); `.attrs["ok"]`
    is False with any error. At most `limit` items of a kind are listed. Each picture is decoded once.
    """
    import pandas as pd

    path = Path(path)
    data = _open(path.resolve().name, path, strict=False, min_images=min_images)
    with ThreadPoolExecutor(_threads()) as pool:
        seen = list(progress(pool.map(lambda i: _look(data, i), range(len(data))), f"checking {data.name}", len(data)))
    if isinstance(data, VOCData):
        data.areas = [_areas(s.labels or {}) for s in seen]
    rows: list[tuple[str, str, str, str, str, str]] = []
    masks = [s.problem is None or s.problem[0] not in ("missing mask", "corrupt mask") for s in seen]
    _count(rows, data, sum(masks))

    def report(status: str, what: str, found: list[tuple[str, str]]) -> None:
        rows.append((status if found else "ok", what, "", str(len(found)), "0", ""))
        rows.extend((status, what, item, "", "", detail) for item, detail in found[:limit])
        if len(found) > limit:
            rows.append((status, what, f"… {len(found) - limit} more", "", "", ""))

    for what in ("missing image", "missing mask", "size mismatch", "corrupt image", "corrupt mask", "unreadable mask"):
        found = [(data.keys[i], s.problem[1]) for i, s in enumerate(seen) if s.problem and s.problem[0] == what]
        if what == "missing image":
            found += [(t.stem, f"{t} has no image") for t in getattr(data, "unpaired", [])]
        report("error", what, found)
    if isinstance(data, FolderData):
        classes, files = _unread(data)
        bare = [c for c, items in data.groups.items() if all(seen[i].empty for i in items)]
        report("error", "class without a picture", classes)
        report("error", "class without an object", [(c, "every mask of it is empty") for c in bare])
        report("note", "file left out", files)
    report("note", "empty mask", [(data.keys[i], "no object pixel") for i, s in enumerate(seen) if s.empty])
    report("note", "non-binary mask", [(data.keys[i], s.grey) for i, s in enumerate(seen) if s.grey])

    same: dict[str, list[int]] = defaultdict(list)
    for i, s in enumerate(seen):
        if s.content:
            same[s.content].append(i)
    report("note", "duplicate file", [_several(data, items) for items in same.values() if len(items) > 1])
    one = [items[0] for items in same.values() if seen[items[0]].hash is not None]
    hashes = [seen[i].hash for i in one]
    near = [(one[a], one[b]) for a, b in near_pairs(hashes, hashes) if a < b]
    report("note", "near duplicate", [_several(data, pair) for pair in near])
    if training is not None:
        with_hash = [i for i, s in enumerate(seen) if s.hash is not None]
        pairs = near_pairs([seen[i].hash for i in with_hash], training.hashes())
        common = {with_hash[a]: b for a, b in pairs}
        report("error", f"in training set {training.name}", [
            (data.keys[i], f"is {training.keys[b]} there") for i, b in sorted(common.items())
        ])  # fmt: skip
    table = pd.DataFrame(rows, columns=["status", "check", "item", "found", "expected", "detail"])
    table.attrs.update(ok=bool((table["status"] != "error").all()), layout=data.layout, path=str(path))
    return table


def _unread(data: FolderData) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What a reader of folders passes over: classes, and files of those it reads, each with the reason."""
    classes, files = [], []
    if data.layout in _SIDES:
        images, truths = _SIDES[data.layout]
        there = {d.name: d for d in _folders(data.root / images)}
        for d in there.values():
            if not _by_stem(d):
                classes.append((d.name, f"{d} holds no picture ({', '.join(sorted(PICTURES))})"))
        for d in _folders(data.root / truths):
            if d.name not in there:
                classes.append((d.name, f"{d} has no {data.root / images / d.name}"))
    for folder, _ in _class_folders(data.root, data.layout):
        used = set(_by_stem(folder).values())
        for f in sorted(f for f in folder.iterdir() if f.is_file() and f not in used and not f.name.startswith(".")):
            twin = f.suffix.lower() in PICTURES
            files.append((f"{folder.name}/{f.name}", "another file has its name" if twin else "no picture's ending"))
    return classes, files


def _several(data: CoSegData, items: Sequence[int]) -> tuple[str, str]:
    first, *others = (data.keys[i] for i in items)
    return first, "= " + ", ".join(others)


def _count(rows: list[tuple[str, str, str, str, str, str]], data: CoSegData, masks: int) -> None:
    """Rows that count lists, groups, images and masks beside the literature's counts."""

    def row(what: str, item: str, found: int, expected: int | None, detail: str = "") -> None:
        status = "ok" if expected in (None, found) else "note"
        rows.append((status, what, item, str(found), "" if expected is None else str(expected), detail))

    rows.append(("ok", "layout", data.name, data.layout, "", LAYOUTS[data.layout]))
    known, own = _literature(data) or (_Known("", None, None), ())
    about = f"the literature's {known.name}" if known.name else ""
    whole = set(own) == set(data.groups) or known.groups is None
    row("groups", "", len(data.groups), known.groups if whole else None, about if whole else "")
    row("images", "", len(data), known.images if whole else None, about if whole else "")
    row("masks", "", masks, len(data), "" if masks == len(data) else "fewer than images")
    if not whole:
        row("images", known.name, sum(len(data.groups[c]) for c in own), known.images, about)
    if isinstance(data, VOCData):
        for word, items in data.lists.items():
            number = {"train": 1464, "val": 1449, "train_aug": 10_582, "trainaug": 10_582}.get(word)
            row("images", word, len(items), number, "the literature's VOC 2012" if number else "")
    for c, items in data.groups.items():
        row("group", c, len(items), known.each if c in own else None)


def _look(data: CoSegData, i: int) -> _Seen:
    """Decode item i's picture and mask once; never raises for a bad file."""
    seen, path = _Seen(), data.path(i)
    try:
        seen.content = data.content(i)
        picture = read_picture(path)
        seen.hash = picture_hash(picture)
    except (OSError, LCCoError) as error:
        seen.problem = ("corrupt image", str(error)) if path.is_file() else ("missing image", f"no {path}")
        return seen
    try:
        if isinstance(data, COCOData):
            mask, truth = data.mask(i, sorted(data.labels_of(i))), path
        else:
            try:
                truth = data.truth_path(i)
            except LCCoError as error:
                seen.problem = ("missing mask", str(error))
                return seen
            if not truth.is_file():
                seen.problem = ("missing mask", f"no {truth}")
                return seen
            mask = _label_map(truth) if isinstance(data, VOCData) else _grey_mask(truth)
    except LCCoError as error:
        kind = "size mismatch" if isinstance(data, COCOData) else "unreadable mask"
        seen.problem = ("corrupt mask" if "corrupt" in str(error) else kind, str(error))
        return seen
    if mask.shape != picture.size[::-1]:
        detail = f"{truth}: mask {mask.shape[1]}×{mask.shape[0]}, image {picture.width}×{picture.height}"
        seen.problem = ("size mismatch", detail)
        return seen
    counts = np.bincount(mask.ravel(), minlength=256)
    if isinstance(data, VOCData):
        seen.labels = {str(k): int(counts[k]) for k in np.flatnonzero(counts)}
        seen.empty = not counts[1 : len(VOC_CLASSES) + 1].any()
        if counts[len(VOC_CLASSES) + 1 : VOID].any():
            seen.problem = ("unreadable mask", f"{truth}: values beyond {len(VOC_CLASSES)} that are not 255")
    elif isinstance(data, COCOData):
        seen.empty = not counts[1]
    else:
        seen.empty = not counts[128:].any()
        lossy = truth.suffix.lower() in LOSSY
        soft = (counts[32:224] if lossy else counts[1:255]).sum() / mask.size
        if seen.empty and counts[1:128].sum() > 0.001 * mask.size:
            seen.problem = ("unreadable mask", f"{truth}: no value above 127 but {mask.max()}; save it as 0 and 255")
        elif soft > (0.02 if lossy else 0):
            seen.grey = f"{soft:.1%} of pixels are neither 0 nor 255; read as object above 127"
    return seen
