"""Image sets: items (one picture each) and groups (class → items), one reader for each layout.

Pictures are decoded when asked for. What must be known of every file (content hashes, picture
hashes, the areas of VOC's classes) is computed once and kept on disk.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lcco.common import VOID, LCCoError, digest, few, file_digest, place, progress
from lcco.data import pictures
from lcco.data.overlap import LOOKS, picture_hash
from lcco.data.pictures import bad, same_name
from lcco.store import kept

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
LAYOUTS = {
    "folders": "image/<class>/* beside groundtruth/<class>/*",
    "icoseg": "images/<group>/* beside ground_truth/<group>/*.png",
    "rubinstein": "<class>/* with <class>/GroundTruth/*",
    "voc": "JPEGImages, SegmentationClass and ImageSets/Segmentation (VOCdevkit/VOC2012)",
    "coco": "train2017 beside annotations/instances_train2017.json",
}
PROBED = 20  # masks that are looked at when a set is loaded: most may be empty by a mistake
THREADS = max(2, min(8, os.cpu_count() or 2))  # files that are read at once
VOC_MIN_SHARE = 0.01  # an image is in a class's group when at least 1% of its pixels show the class
BARE_CLASSES, BARE_MASKS = "classes without a picture", "masks without a picture"
SIDES = {"folders": ("image", "groundtruth"), "icoseg": ("images", "ground_truth")}
FACTS = {  # of a file, kept on disk: its place in `files`, and what is computed of it
    "content": (0, lambda path: file_digest(path, 16)),
    "masks": (1, lambda path: file_digest(path, 16)),
    LOOKS: (0, lambda path: picture_hash(pictures.read_picture(path))),
    "areas": (1, lambda path: class_areas(pictures.read_labels(path))),
}


# ------------------------------------------------------------------------------------------- sets
class CoSegData:
    """A set of pictures with masks, sorted into groups that share a class. Readers subclass it.

    keys: item i's unique name. files: its picture and its mask; none if both are drawn.
    groups: class → items, sorted by name. left_out: names of what the reader passed over, by
    reason; faults: (check, item, detail) of what it must not pass over.
    """

    exhaustive = True  # False: an item's truth knows one class only, others may be in the picture
    groups: Mapping[str, Sequence[int]]

    def __init__(
        self, name: str, layout: str, keys: Iterable[str] = (),
        groups: Mapping[str, Sequence[int]] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.layout, self.keys = name, layout, tuple(keys)
        self.left_out: dict[str, list[str]] = defaultdict(list)
        self.faults: list[tuple[str, str, str]] = []
        self.files: list[tuple[Path, Path]] = []
        self.facts: dict[str, list[Any]] = {}
        if groups is not None:
            self.groups = {c: tuple(groups[c]) for c in sorted(groups)}

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {len(self)} images, {self.layout}>"

    def path(self, i: int) -> Path:
        """Item i's picture file. A set without files has its own `image` and `content` instead."""
        return self.files[i][0]

    def truth_path(self, i: int) -> Path | None:
        """Item i's mask file; None if its masks are drawn."""
        return self.files[i][1] if self.files else None

    def image(self, i: int) -> Image.Image:
        """Item i's picture, RGB, upright. Raises: LCCoError naming a corrupt file."""
        return pictures.read_picture(self.path(i))

    def mask(self, i: int, classes: Collection[str]) -> np.ndarray:
        """uint8 [H, W] of {0, 1, 255 = void}: the union of the classes' masks in image i.

        Raises: LCCoError naming a missing, corrupt or mis-sized mask.
        """
        raise NotImplementedError

    def stored_mask(self, i: int) -> np.ndarray:
        """uint8 [H, W]: item i's mask as its file has it, perhaps not of the picture's size."""
        raise NotImplementedError

    def sized(self, i: int, mask: np.ndarray) -> np.ndarray:
        """The mask, if it has the size of image i. Raises: LCCoError if it has not."""
        size, (height, width) = pictures.picture_size(self.path(i)), mask.shape
        if size != (width, height):
            what = f"mask is {width}×{height}, its image {self.keys[i]} {size[0]}×{size[1]}"
            raise bad(self.truth_path(i), what, "make them one size")
        return mask

    def grey_truth(self, i: int) -> np.ndarray | None:
        """uint8 [H, W]: the truth before its threshold, where its file is lossy (JPEG)."""
        return None

    @cached_property
    def _classes(self) -> dict[int, set[str]]:
        found: dict[int, set[str]] = defaultdict(set)
        for c, items in self.groups.items():
            for i in items:
                found[i].add(c)
        return found

    def classes_of(self, i: int) -> frozenset[str]:
        """The classes whose groups hold image i."""
        return frozenset(self._classes.get(i, ()))

    def labels_of(self, i: int) -> frozenset[str]:
        """Every class with any pixel in image i (`classes_of` may ask for a least area)."""
        return self.classes_of(i)

    def knows_all(self, i: int) -> bool:
        """Whether a class that is not among image i's labels is truly absent."""
        return self.exhaustive

    def fact(self, i: int, kind: str) -> Any:
        """What `FACTS` say of item i, computed of all items at once and kept on disk."""
        if not self.files:
            return picture_hash(self.image(i)) if kind == LOOKS else ""
        if kind not in self.facts:
            side, compute = FACTS[kind]
            self.facts[kind] = read_facts(kind, [files[side] for files in self.files], compute)
        return self.facts[kind][i]

    def content(self, i: int) -> str:
        """A short sha256 of image i's file: equal pictures in two groups have equal content."""
        return self.fact(i, "content")

    def hashes(self) -> list[str]:
        """Every item's `picture_hash`."""
        return [self.fact(i, LOOKS) for i in range(len(self))]

    @cached_property
    def _digests(self) -> list[str]:
        masks = [self.fact(i, "masks") for i in range(len(self))]
        contents = [(key, self.content(i)) for i, key in enumerate(self.keys)]
        return [digest(contents), digest(masks) if any(masks) else ""]

    def digest(self) -> str:
        """A hash over every item's key and picture file."""
        return self._digests[0]

    def truth_digest(self) -> str:
        """A hash over every item's mask file; empty for drawn sets."""
        return self._digests[1]

    def identity(self) -> str:
        """A hash over pictures and masks."""
        return digest(self._digests) if self.truth_digest() else self.digest()

    def subset(self, indices: Iterable[int], name: str) -> CoSegData:
        """The items of these indices, in this order, as a set; groups left empty are dropped."""
        return _View(name, [(self, list(indices))])

    def only(self, item: str, files: Sequence[Path], why: str) -> Path:
        """The file of an item; that there are two of them is a fault."""
        if len(files) > 1:
            told = f"{files[0]} and {files[1].name}: {why}"
            self.faults.append(("two of one name", item, told))
        return files[0]

    def complete(self) -> CoSegData:
        """This set, if its files are all there; what was left out is counted on stderr.

        Raises: LCCoError naming the first fault.
        """
        if self.faults:
            raise LCCoError(self.faults[0][2])
        for key, files in zip(self.keys, self.files, strict=True):
            for file in files:
                if not file.is_file():
                    raise bad(file, "no such file", f"put it back or take `{key}` out of the set")
        self._probe()
        for why, names in self.left_out.items():
            told = f"{self.name}: left out {len(names)}, {why}: {few(names, 3)}"
            print(told, file=sys.stderr, flush=True)
        return self

    def _probe(self) -> None:
        """Refuse a set whose masks are empty: empty predictions would score well on it."""
        items, empty = range(0, len(self), max(1, len(self) // PROBED)), []
        for i in items:
            with contextlib.suppress(LCCoError):  # a bad mask is named when it is used
                if not (self.mask(i, self.classes_of(i)) == 1).any():
                    empty.append(i)
        if len(empty) > len(items) / 2:
            told = f"{len(empty)} of {len(items)} masks looked at have no object pixel"
            what = f"`{self.keys[empty[0]]}` is empty, as {told}"
            raise bad(self.truth_path(empty[0]), what, "save the object as 255, outlines in pixels")


def read_facts(kind: str, paths: Sequence[Path], compute: Callable[[Path], Any]) -> list[Any]:
    """`compute(path)` of each file, kept on disk until a file's size or time changes."""
    files = sorted(set(paths))

    def make() -> list[Any]:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(progress(pool.map(compute, files), f"reading files ({kind})", len(files)))

    try:
        stats = [(str(p.absolute()), p.stat()) for p in files]
    except OSError as error:
        raise bad(error.filename, error.strerror, "put it back or take its image out") from None
    stamp = digest([[name, s.st_size, s.st_mtime_ns] for name, s in stats], 16)
    found = dict(zip(files, kept(place("cache") / f"{kind}-{stamp}.json", make), strict=True))
    return [found[p] for p in paths]


def _through(name: str) -> Callable[..., Any]:
    """A method of a set, asked of the set that an item of a view comes from."""

    def ask(self: _View, i: int, *more: Any) -> Any:
        data, j = self._items[i]
        return getattr(data, name)(j, *more)

    return ask


class _View(CoSegData):
    """Items of one or several sets, read through them; groups of one class name become one."""

    path, truth_path, image, mask = map(_through, ("path", "truth_path", "image", "mask"))
    grey_truth, labels_of, knows_all = map(_through, ("grey_truth", "labels_of", "knows_all"))
    fact, content = map(_through, ("fact", "content"))

    def __init__(self, name: str, parts: Sequence[tuple[CoSegData, Sequence[int]]]) -> None:
        self._items = [(data, i) for data, items in parts for i in items]
        keys = [data.keys[i] for data, i in self._items]
        if len(set(keys)) < len(keys):  # two sets may use the same names, and be of one name
            if len({(data.keys[i], data.content(i)) for data, i in self._items}) < len(keys):
                twice = Counter(keys).most_common(1)[0][0]
                raise LCCoError(f"data `{name}` holds `{twice}` twice; name each set once")
            names = [data.name for data, _ in parts]
            count = [names[:n].count(word) + 1 for n, word in enumerate(names)]
            labels = [w if n == 1 else f"{w}#{n}" for w, n in zip(names, count, strict=True)]
            keys = [f"{labels[n]}:{d.keys[i]}" for n, (d, own) in enumerate(parts) for i in own]
        super().__init__(name, "+".join(dict.fromkeys(data.layout for data, _ in parts)), keys)

    @cached_property
    def groups(self) -> dict[str, tuple[int, ...]]:
        groups: dict[str, list[int]] = defaultdict(list)
        for n, (data, i) in enumerate(self._items):
            for c in data.classes_of(i):
                groups[c].append(n)
        return {c: tuple(sorted(groups[c], key=self.keys.__getitem__)) for c in sorted(groups)}


def joined(parts: Sequence[CoSegData], name: str) -> CoSegData:
    """Sets as one; a class that several have becomes one group."""
    return _View(name, [(data, range(len(data))) for data in parts])


# ---------------------------------------------------------------------------------- files by name
def folders_in(root: Path) -> list[Path]:
    """The folders in a folder, without hidden and system ones."""
    found = root.iterdir() if root.is_dir() else ()
    return sorted(d for d in found if d.is_dir() and not pictures.is_system(d.name))


def by_stem(folder: Path) -> tuple[dict[str, list[Path]], dict[str, list[str]]]:
    """A folder's pictures by name without ending, in the one spelling; and `listing`'s others."""
    files, others = pictures.listing(folder) if folder.is_dir() else ([], {})
    found: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(files):
        found[same_name(file.stem)].append(file)
    return found, others


def read_lines(file: Path) -> list[str]:
    """The lines of a list that are not blank. Raises: LCCoError for a file that is no UTF-8."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # names may hold other separators
    except (OSError, UnicodeDecodeError) as error:
        raise bad(file, f"cannot be read ({error})", "save it as UTF-8") from None
    return [line for line in lines if line.strip()]


# ------------------------------------------------------------------------------- a folder a class
class FolderData(CoSegData):
    """A set of one folder a class: layouts `folders` (SSNM, UFO), `icoseg` and `rubinstein`.

    An item sits in one class, and its truth, an object above 127, knows that class alone. Pictures
    of one stem (`a.jpg`, `a.png`) need masks of their full names (`a_jpg.png` or `a.jpg.png`).
    """

    exhaustive = False

    def __init__(
        self, name: str, root: Path, layout: str, classes: Sequence[str] | None = None
    ) -> None:
        super().__init__(name, layout)
        known = self._folders(root)
        if missing := [c for c in classes or () if c not in known]:
            raise LCCoError(f"data `{name}`: {root} lacks the groups {', '.join(missing)}")
        self.groups = {}
        for c in sorted(classes or known):
            first = len(self.files)
            self.keys += tuple(self._read_class(c, *known[c]))
            if len(self.files) > first:
                self.groups[c] = tuple(range(first, len(self.files)))
            else:
                self.left_out[BARE_CLASSES].append(str(known[c][0]))
        if not self.files:
            raise LCCoError(f"{root}: no class folder with pictures; expected {LAYOUTS[layout]}")

    def _folders(self, root: Path) -> dict[str, tuple[Path, Path]]:
        """Class → its folders of pictures and of masks; one of them may be missing."""
        if self.layout == "rubinstein":
            pairs = ((d, d / "GroundTruth") for d in folders_in(root))
            found = [pair for pair in pairs if pair[1].is_dir()]
        else:
            sides = [root / side for side in SIDES[self.layout]]
            there = [{same_name(d.name): d for d in folders_in(side)} for side in sides]
            found = [tuple(d.get(c, side / c) for d, side in zip(there, sides, strict=True))
                     for c in sorted(there[0] | there[1])]  # fmt: skip
        known: dict[str, tuple[Path, Path]] = {}
        for pair in found:
            c = same_name(pair[0].name).strip().lower()
            if self.layout == "rubinstein":
                c = c.removesuffix("100")  # `Horse100`: 100 pictures of horses
            if (closed := re.sub(r"[ _-]", "", c)) in VOC_CLASSES:
                c = closed
            if c in known:
                raise LCCoError(f"{pair[0]} and {known[c][0]} are both class `{c}`; rename one")
            known[c] = pair
        return known

    def _read_class(self, c: str, images: Path, truths: Path) -> Iterator[str]:
        """Pair a class's pictures with its masks in `files`. Yields: their keys."""
        (stems, others), (masks, _) = by_stem(images), by_stem(truths)
        for why, names in others.items():
            self.left_out[why] += [f"{images.name}/{name}" for name in names]
        for stem, image in ((word, image) for word in sorted(stems) for image in stems[word]):
            alone, name = len(stems[stem]) == 1, same_name(image.name)
            words = [w for w in (name, f"{stem}_{image.suffix[1:]}") if w not in stems]
            word = next((w for w in [stem] * alone + words if w in masks), None)
            if word is None and not alone:
                why = f"one name; give each a mask of its full name ({name}.png)"
                self.only(f"{c}/{stem}", stems[stem], why)
            found = masks.pop(word, [truths / f"{image.stem}.png"])
            why = "two masks of one picture; move one out"
            self.files.append((image, self.only(f"{c}/{stem}", found, why)))
            yield f"{c}/{stem if alone else name}"
        if masks:
            self.left_out[BARE_MASKS] += [str(file) for found in masks.values() for file in found]

    @cached_property
    def _labels(self) -> dict[str, frozenset[str]]:
        found: dict[str, frozenset[str]] = defaultdict(frozenset)
        for i in range(len(self)):
            found[self.content(i)] |= self.classes_of(i)
        return found

    def labels_of(self, i: int) -> frozenset[str]:
        """A picture that sits in two groups (107 of PASCAL1037's do) shows both classes."""
        return self._labels[self.content(i)]

    def stored_mask(self, i: int) -> np.ndarray:
        return pictures.read_mask(self.truth_path(i))

    def mask(self, i: int, classes: Collection[str]) -> np.ndarray:
        grey, truth = self.sized(i, self.stored_mask(i)), self.truth_path(i)
        if not self.classes_of(i).intersection(classes):
            return np.zeros_like(grey)
        top = int(grey.max(initial=0))
        if 0 < top < 128 and not pictures.is_lossy(truth):  # class numbers would read as empty
            what = "of the values 0 and 1" if top == 1 else f"without a value above 127, but {top}"
            raise bad(truth, f"mask {what}", "save the object as 255 (white)")
        return (grey > 127).astype(np.uint8)

    def grey_truth(self, i: int) -> np.ndarray | None:
        return self.stored_mask(i) if pictures.is_lossy(self.truth_path(i)) else None


# -------------------------------------------------------------------------------------------- VOC
class VOCData(CoSegData):
    """PASCAL VOC: masks of class numbers, 255 = void; a line of a list is a picture's name.

    An image belongs to a class's group when the class covers at least 1% of its pixels.
    partial: pictures whose names begin so have one class labelled only.
    """

    def __init__(
        self, name: str, root: Path, lists: Sequence[str], *, partial: str | None = None
    ) -> None:
        super().__init__(name, "voc")
        augmented = any("aug" in word for word in lists)
        images = root / "JPEGImages"
        truths = root / ("SegmentationClassAug" if augmented else "SegmentationClass")
        for folder in (images, truths):
            if not folder.is_dir():
                raise LCCoError(f"data `{name}`: no folder {folder}")
        self.partial, self._images, masks = partial, by_stem(images)[0], by_stem(truths)[0]
        self.lists = {word: self._read_list(root, word) for word in lists}
        self.keys = tuple(dict.fromkeys(key for keys in self.lists.values() for key in keys))
        if not self.keys:
            words = ", ".join(f"{w}.txt" for w in lists)
            raise LCCoError(f"data `{name}`: {root} lists no picture in {words}")
        for key in self.keys:
            found = self._images.get(key, [images / f"{key}.jpg"])
            truth = masks.get(key, [truths / f"{key}.png"])
            why = "one name; move one out"
            self.files.append((self.only(key, found, why), self.only(key, truth, why)))

    def _read_list(self, root: Path, word: str) -> list[str]:
        file = root / "ImageSets" / "Segmentation" / f"{word}.txt"
        if not file.is_file():
            raise LCCoError(f"data `{self.name}`: no list {file}")
        lines: dict[str, str] = {}
        for line in read_lines(file):
            key = self._key(line)
            if key in lines:
                two = f"`{lines[key].strip()}` and `{line.strip()}` are one picture; take one out"
                self.faults.append(("two of one name", key, f"{file}: {two}"))
            lines[key] = line
        return list(lines)

    def _key(self, line: str) -> str:
        """The picture that a line means: the whole line, with its ending, or as a path."""
        path = re.fullmatch(r"\s*/?JPEGImages/(.+)\.\w+\s+/?\w+/\1\.\w+\s*", line)  # the augmented
        for word in map(same_name, [path[1]] if path else [line, line.strip()]):
            if word in self._images:
                return word
            stem = word.rpartition(".")[0]
            if any(same_name(f.name) == word for f in self._images.get(stem, ())):
                return stem
        return word

    @cached_property
    def groups(self) -> dict[str, tuple[int, ...]]:
        order = sorted(range(len(self)), key=self.keys.__getitem__)
        shares = [self.fact(i, "areas") for i in range(len(self))]
        found = {c: tuple(i for i in order if shares[i].get(c, 0) >= VOC_MIN_SHARE)
                 for c in VOC_CLASSES}  # fmt: skip
        return {c: items for c, items in found.items() if items}

    def labels_of(self, i: int) -> frozenset[str]:
        return frozenset(self.fact(i, "areas"))

    def _probe(self) -> None:
        """Nothing: the groups are made of what the masks show."""

    def knows_all(self, i: int) -> bool:
        return not (self.partial and self.keys[i].startswith(self.partial))

    def stored_mask(self, i: int) -> np.ndarray:
        return pictures.read_labels(self.truth_path(i))

    def mask(self, i: int, classes: Collection[str]) -> np.ndarray:
        table = np.zeros(256, np.uint8)
        table[[VOC_CLASSES.index(c) + 1 for c in classes if c in VOC_CLASSES]] = 1
        table[VOID] = VOID
        return table[self.sized(i, self.stored_mask(i))]


def class_areas(labels: np.ndarray) -> dict[str, float]:
    """Class → its share of the pixels of a VOC mask."""
    counts = np.bincount(labels.ravel(), minlength=256).tolist()
    return {c: n / labels.size for c, n in zip(VOC_CLASSES, counts[1:], strict=False) if n}
