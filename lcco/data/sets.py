"""Image sets: items (one picture each) and groups (class → items), one reader for each layout.

Pictures are decoded when asked for. What must be known of every file (content hashes, picture
hashes, the pixels of each VOC class) is computed once and kept on disk.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lcco.common import VOID, LCCoError, digest, few, file_digest, place, progress
from lcco.data.overlap import LOOKS, picture_hash
from lcco.data.pictures import (
    LOSSY,
    is_system,
    listing,
    picture_size,
    read_labels,
    read_mask,
    read_picture,
    same_name,
)  # fmt: skip
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


def facts(kind: str, paths: Sequence[Path], compute: Callable[[Path], Any], what: str) -> list[Any]:
    """`compute(path)` of each file, kept on disk until a file's size or time changes."""

    def make() -> list[Any]:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(progress(pool.map(compute, paths), what, len(paths)))

    try:
        stats = [(str(p.absolute()), p.stat()) for p in paths]
    except OSError as error:
        mend = "put it back or take its image out of the set"
        raise LCCoError(f"{error.filename}: {error.strerror}; {mend}") from None
    stamp = digest([[name, s.st_size, s.st_mtime_ns] for name, s in stats], 16)
    return kept(place("cache") / f"{kind}-{stamp}.json", make) if paths else []


def read_lines(file: Path) -> list[str]:
    """The lines of a list that are not blank. Raises: LCCoError for a file that is no UTF-8."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # names may hold other separators
    except (OSError, UnicodeDecodeError) as error:
        raise LCCoError(f"{file}: cannot be read ({error}); save it as UTF-8") from None
    return [line for line in lines if line.strip()]


# ------------------------------------------------------------------------------------------- sets
class CoSegData:
    """A set of pictures with masks, sorted into groups that share a class. Readers subclass it.

    keys: item i's unique name. groups: class → items, sorted by name. left_out: names of what the
    reader passed over, by reason; faults: (check, item, detail) of what it must not pass over.
    """

    exhaustive = True  # False: an item's truth knows one class only, others may be in the picture

    def __init__(
        self, name: str, layout: str, keys: Iterable[str],
        groups: Mapping[str, Sequence[int]] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.layout, self.keys = name, layout, tuple(keys)
        self.left_out: dict[str, list[str]] = {}
        self.faults: list[tuple[str, str, str]] = []
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

    def path(self, i: int) -> Path:
        """Item i's picture file. A set without files has its own `image` and `content` instead."""
        raise NotImplementedError

    def truth_path(self, i: int) -> Path | None:
        """Item i's mask file. Raises: LCCoError where it has none."""
        return None

    def image(self, i: int) -> Image.Image:
        """Item i's picture, RGB, upright. Raises: LCCoError naming a corrupt file."""
        return read_picture(self.path(i))

    def mask(self, i: int, classes: Sequence[str]) -> np.ndarray:
        """uint8 [H, W] of {0, 1, 255 = void}: the union of the classes' masks in image i.

        Raises: LCCoError naming a missing, corrupt or mis-sized mask.
        """
        raise NotImplementedError

    def grey_truth(self, i: int) -> np.ndarray | None:
        """uint8 [H, W]: the truth before its threshold, where its file is lossy (JPEG)."""
        return None

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
        """Every class with any pixel in image i (`classes_of` may ask for a least area)."""
        return self.classes_of(i)

    def knows_all(self, i: int) -> bool:
        """Whether a class that is not among image i's labels is truly absent."""
        return self.exhaustive

    @cached_property
    def contents(self) -> list[str]:
        """Every item's `content`."""
        if type(self).content is not CoSegData.content:
            return [self.content(i) for i in range(len(self))]
        paths = [self.path(i) for i in range(len(self))]
        return facts("content", paths, lambda p: file_digest(p, 16), "hashing files")

    def content(self, i: int) -> str:
        """A short sha256 of image i's file: equal pictures in two groups have equal content."""
        return self.contents[i]

    @cached_property
    def truth_contents(self) -> list[str]:
        paths = [self.truth_path(i) for i in range(len(self))]
        if None in paths:  # drawn: the keys say what is drawn
            return [""] * len(self)
        return facts("masks", paths, lambda p: file_digest(p, 16), "hashing masks")

    def hashes(self) -> list[str]:
        """Every item's `picture_hash`."""
        return self._hashes

    @cached_property
    def _hashes(self) -> list[str]:
        if type(self).image is not CoSegData.image:
            return [picture_hash(self.image(i)) for i in range(len(self))]
        paths = [self.path(i) for i in range(len(self))]
        return facts(LOOKS, paths, lambda p: picture_hash(read_picture(p)), "hashing pictures")

    @cached_property
    def _digests(self) -> tuple[str, str]:
        return digest(list(zip(self.keys, self.contents, strict=True))), (
            digest(self.truth_contents) if any(self.truth_contents) else "")  # fmt: skip

    def digest(self) -> str:
        """A hash over every item's key and picture file."""
        return self._digests[0]

    def truth_digest(self) -> str:
        """A hash over every item's mask file; empty for drawn sets."""
        return self._digests[1]

    def identity(self) -> str:
        """A hash over pictures and masks."""
        return digest(list(self._digests)) if self.truth_digest() else self.digest()

    def _two(self, item: str, files: Sequence[Path], why: str) -> None:
        told = f"{files[0]} and {files[1].name}: {why}"
        self.faults.append(("two of one name", item, told))

    def subset(self, indices: Iterable[int], name: str) -> CoSegData:
        """The items of these indices, in this order, as a set; groups left empty are dropped."""
        return _View(name, [(self, list(indices))])

    def complete(self) -> CoSegData:
        """This set, if its files are all there; what was left out is counted on stderr.

        Raises: LCCoError naming the first fault.
        """
        if self.faults:
            raise LCCoError(self.faults[0][2])
        for i in range(len(self)):
            for file in (self.path(i), self.truth_path(i)):
                if file is not None and not file.is_file():
                    mend = f"put it back or take `{self.keys[i]}` out of the set"
                    raise LCCoError(f"{file}: no such file; {mend}")
        self._probe()
        for why, names in self.left_out.items():
            told = f"{self.name}: left out {len(names)}, {why}: {few(names, 3)}"
            print(told, file=sys.stderr, flush=True)
        return self


    def _probe(self) -> None:
        """Refuse a set whose masks are empty: empty predictions would score well on it."""
        items = range(0, len(self), max(1, len(self) // PROBED))
        if len(empty := [i for i in items if self._is_empty(i)]) > len(items) / 2:
            told = f"{len(empty)} of {len(items)} masks looked at have no object pixel"
            where, mend = self.truth_path(empty[0]), "save the object as 255, outlines in pixels"
            raise LCCoError(f"{where}: `{self.keys[empty[0]]}` is empty, as {told}; {mend}")

    def _is_empty(self, i: int) -> bool:
        try:
            return not (self.mask(i, list(self.classes_of(i))) == 1).any()
        except LCCoError:  # named when it is used
            return False


def _through(name: str) -> Callable[..., Any]:
    """A method of a set, asked of the set that an item of a view comes from."""

    def ask(self: _View, i: int, *more: Any) -> Any:
        data, j = self._items[i]
        return getattr(data, name)(j, *more)

    return ask


class _View(CoSegData):
    """Items of one or several sets, read through them; groups of one class name become one."""

    def __init__(self, name: str, parts: Sequence[tuple[CoSegData, Sequence[int]]]) -> None:
        self._items = [(data, i) for data, items in parts for i in items]
        keys = [data.keys[i] for data, i in self._items]
        if len(set(keys)) < len(keys):  # two sets may use the same names, and be of one name
            if len({_origin(data, i) for data, i in self._items}) < len(keys):
                twice = next(k for k, n in Counter(keys).items() if n > 1)
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

    path, truth_path, image, mask, grey_truth, labels_of, knows_all = map(
        _through, ["path", "truth_path", "image", "mask", "grey_truth", "labels_of", "knows_all"]
    )

    @cached_property
    def contents(self) -> list[str]:
        return [data.contents[j] for data, j in self._items]

    @cached_property
    def truth_contents(self) -> list[str]:
        return [data.truth_contents[j] for data, j in self._items]

    @cached_property
    def _hashes(self) -> list[str]:
        return [data.hashes()[j] for data, j in self._items]


def joined(parts: Sequence[CoSegData], name: str) -> CoSegData:
    """Sets as one; a class that several have becomes one group."""
    return _View(name, [(data, range(len(data))) for data in parts])


def _origin(data: CoSegData, i: int) -> Path | str:
    """Where item i's picture is; of a drawn one, what it is."""
    try:
        return data.path(i).resolve()
    except NotImplementedError:
        return data.content(i)


# ------------------------------------------------------------------------------- a folder a class
BARE_CLASSES, BARE_MASKS = "classes without a picture", "masks without a picture"
SIDES = {"folders": ("image", "groundtruth"), "icoseg": ("images", "ground_truth")}


def folders_in(root: Path) -> list[Path]:
    """The folders in a folder, without hidden and system ones."""
    found = root.iterdir() if root.is_dir() else ()
    return sorted(d for d in found if d.is_dir() and not is_system(d.name))


def class_folders(root: Path, layout: str) -> list[tuple[Path, Path]]:
    """(picture folder, mask folder) of every class."""
    if layout == "rubinstein":
        pairs = [(d, d / "GroundTruth") for d in folders_in(root)]
        return [(images, truths) for images, truths in pairs if truths.is_dir()]
    images, truths = (root / side for side in SIDES[layout])
    there = {same_name(d.name): d for d in folders_in(truths)}
    return [(d, there.get(same_name(d.name), truths / d.name)) for d in folders_in(images)]


def by_stem(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Files by their name without its ending, in the one spelling."""
    found: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(files):
        found[same_name(file.stem)].append(file)
    return found


def _class_name(folder: str, layout: str) -> str:
    """A folder's class in lower case; `Horse100` is Rubinstein's 100 horses."""
    word = same_name(re.sub(r"100$", "", folder) if layout == "rubinstein" else folder)
    word = word.strip().lower()
    closed = re.sub(r"[ _-]", "", word)
    return closed if closed in VOC_CLASSES else word


class FolderData(CoSegData):
    """A set of one folder a class: layouts `folders` (SSNM, UFO), `icoseg` and `rubinstein`.

    An item sits in one class, and its truth, an object above 127, knows that class alone. Pictures
    of one stem (`a.jpg`, `a.png`) need masks of their full names (`a_jpg.png` or `a.jpg.png`).
    """

    exhaustive = False

    def __init__(
        self, name: str, root: Path, layout: str, classes: Sequence[str] | None = None
    ) -> None:
        self.root = root
        self.pairs: list[tuple[Path, Path | None, Path, str]] = []
        known: dict[str, tuple[Path, Path]] = {}
        for images, truths in class_folders(root, layout):
            c = _class_name(images.name, layout)
            if c in known:
                raise LCCoError(f"{images} and {known[c][0]} are both class `{c}`; rename one")
            known[c] = images, truths
        if classes is not None and (missing := [c for c in classes if c not in known]):
            words = f"group{'s'[: len(missing) > 1]} {', '.join(missing)}"
            raise LCCoError(f"data `{name}`: {root} lacks the {words}")
        super().__init__(name, layout, ())
        keys, groups = [], {}
        for c in sorted(known if classes is None else classes):
            found = self._read_class(c, *known[c])
            if found:
                groups[c] = range(len(keys), len(keys) + len(found))
                keys += found
            else:
                self.left_out.setdefault(BARE_CLASSES, []).append(str(known[c][0]))
        if not keys:
            raise LCCoError(f"{root}: no class folder with pictures; expected {LAYOUTS[layout]}")
        self.keys, self.groups = tuple(keys), {c: tuple(g) for c, g in groups.items()}
        if layout in SIDES and classes is None:
            there = {truths for _, truths in known.values()}
            bare = [str(d) for d in folders_in(root / SIDES[layout][1]) if d not in there]
            if bare:
                self.left_out.setdefault(BARE_CLASSES, []).extend(bare)

    def _read_class(self, c: str, images: Path, truths: Path) -> list[str]:
        """Pair a class's pictures with its masks. Returns: the keys."""
        files, others = listing(images)
        stems, masks = by_stem(files), by_stem(listing(truths)[0] if truths.is_dir() else ())
        for why, names in others.items():
            self.left_out.setdefault(why, []).extend(f"{images.name}/{n}" for n in names)
        keys, used = [], set()
        for stem in sorted(stems):
            for image in stems[stem]:
                alone, name = len(stems[stem]) == 1, same_name(image.name)
                words = [stem] if alone else []
                words += [w for w in (name, f"{stem}_{image.suffix[1:]}") if w not in stems]
                truth = next((masks[w] for w in words if w in masks), [])
                used.update(truth)
                if not alone and not truth:
                    why = f"one name; give each a mask of its full name ({name}.png)"
                    self._two(f"{c}/{stem}", stems[stem], why)
                if len(truth) > 1:
                    self._two(f"{c}/{stem}", truth, "two masks of one picture; move one out")
                keys.append(f"{c}/{stem if alone else name}")
                self.pairs.append((image, truth[0] if truth else None, truths, c))
        spare = [str(f) for found in masks.values() for f in found if f not in used]
        if spare:
            self.left_out.setdefault(BARE_MASKS, []).extend(spare)
        return keys

    def path(self, i: int) -> Path:
        return self.pairs[i][0]

    def truth_path(self, i: int) -> Path:
        image, truth, folder, _ = self.pairs[i]
        if truth is None:
            mend = "add it or move the image"
            raise LCCoError(f"{image}: no mask `{image.stem}.png` (.bmp, .jpg) in {folder}; {mend}")
        return truth

    @cached_property
    def _labels(self) -> list[frozenset[str]]:
        """A picture that sits in two groups (107 of PASCAL1037's do) shows both classes."""
        found: dict[str, set[str]] = defaultdict(set)
        for pair, content in zip(self.pairs, self.contents, strict=True):
            found[content].add(pair[3])
        return [frozenset(found[content]) for content in self.contents]

    def labels_of(self, i: int) -> frozenset[str]:
        return self._labels[i]

    def mask(self, i: int, classes: Sequence[str]) -> np.ndarray:
        grey = _of_size(self.truth_path(i), read_mask(self.truth_path(i)), self.path(i))
        if self.pairs[i][3] not in classes:
            return np.zeros_like(grey)
        truth, top = self.truth_path(i), int(grey.max(initial=0))
        if 0 < top < 128 and truth.suffix.lower() not in LOSSY:  # class numbers would read as empty
            what = "of the values 0 and 1" if top == 1 else f"without a value above 127, but {top}"
            raise LCCoError(f"{truth}: mask {what}; save the object as 255 (white)")
        return (grey > 127).astype(np.uint8)

    def grey_truth(self, i: int) -> np.ndarray | None:
        truth = self.truth_path(i)
        return read_mask(truth) if truth.suffix.lower() in LOSSY else None


def _of_size(truth: Path, mask: np.ndarray, image: Path) -> np.ndarray:
    (width, height), (rows, columns) = picture_size(image), mask.shape
    if (columns, rows) != (width, height):
        sizes = f"mask is {columns}×{rows}, its image {width}×{height}"
        raise LCCoError(f"{truth}: {sizes}; make them one size")
    return mask


# -------------------------------------------------------------------------------------------- VOC
class VOCData(CoSegData):
    """PASCAL VOC: masks of class numbers, 255 = void; a line of a list is a picture's name.

    An image belongs to a class's group when the class covers at least 1% of its pixels.
    partial: pictures whose names begin so have one class labelled only.
    """

    def __init__(
        self, name: str, root: Path, lists: Sequence[str], *, partial: str | None = None
    ) -> None:
        self.root, self.partial = root, partial
        augmented = any("aug" in word for word in lists)
        masks = root / ("SegmentationClassAug" if augmented else "SegmentationClass")
        for folder in (root / "JPEGImages", masks):
            if not folder.is_dir():
                raise LCCoError(f"data `{name}`: no folder {folder}")
        super().__init__(name, "voc", ())
        self._images, self._masks = (by_stem(listing(d)[0]) for d in (root / "JPEGImages", masks))
        self._folders = root / "JPEGImages", masks
        self.lists = {word: self._read_list(word) for word in lists}
        self.keys = tuple(dict.fromkeys(key for keys in self.lists.values() for key in keys))
        if not self.keys:
            words = ", ".join(f"{w}.txt" for w in lists)
            raise LCCoError(f"data `{name}`: {root} lists no picture in {words}")
        for key in self.keys:
            for found in (self._images.get(key, ()), self._masks.get(key, ())):
                if len(found) > 1:
                    self._two(key, found, "one name; move one out")

    def _read_list(self, word: str) -> list[str]:
        file = self.root / "ImageSets" / "Segmentation" / f"{word}.txt"
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
        pair = re.fullmatch(r"\s*/?JPEGImages/(.+)\.\w+\s+/?\w+/\1\.\w+\s*", line)  # the augmented
        words = [pair[1]] if pair else [line, line.strip()]
        for word in map(same_name, words):
            if word in self._images:
                return word
            stem, dot, _ = word.rpartition(".")
            if dot and any(same_name(f.name) == word for f in self._images.get(stem, ())):
                return stem
        return same_name(words[-1])

    def path(self, i: int) -> Path:
        found = self._images.get(self.keys[i])
        return found[0] if found else self._folders[0] / f"{self.keys[i]}.jpg"

    def truth_path(self, i: int) -> Path:
        found = self._masks.get(self.keys[i])
        return found[0] if found else self._folders[1] / f"{self.keys[i]}.png"

    @cached_property
    def areas(self) -> list[dict[str, float]]:
        """Each item's classes and the share of its pixels that they cover."""
        files = [self.truth_path(i) for i in range(len(self))]
        counts = facts("labels", files, label_counts, f"reading {self.name}'s masks")
        return [class_areas(c) for c in counts]

    @cached_property
    def groups(self) -> dict[str, tuple[int, ...]]:
        order = sorted(range(len(self)), key=self.keys.__getitem__)
        found = {
            c: tuple(i for i in order if self.areas[i].get(c, 0) >= VOC_MIN_SHARE)
            for c in VOC_CLASSES
        }
        return {c: items for c, items in found.items() if items}

    def labels_of(self, i: int) -> frozenset[str]:
        return frozenset(self.areas[i])

    def _is_empty(self, i: int) -> bool:
        return False  # its groups are made of what the masks show

    def knows_all(self, i: int) -> bool:
        return not (self.partial and self.keys[i].startswith(self.partial))

    def mask(self, i: int, classes: Sequence[str]) -> np.ndarray:
        table = np.zeros(256, np.uint8)
        table[[VOC_CLASSES.index(c) + 1 for c in classes if c in VOC_CLASSES]] = 1
        table[VOID] = VOID
        truth = self.truth_path(i)
        return table[_of_size(truth, read_labels(truth), self.path(i))]


def label_counts(path: Path) -> dict[str, int]:
    """The pixels of each class number in a VOC mask."""
    counts = np.bincount(read_labels(path).ravel(), minlength=256)
    return {str(k): int(counts[k]) for k in np.flatnonzero(counts)}


def class_areas(counts: Mapping[str, int]) -> dict[str, float]:
    """Class → its share of the pixels, from the pixels of each class number."""
    total = sum(counts.values())
    numbers = {int(k): n for k, n in counts.items() if 0 < int(k) <= len(VOC_CLASSES)}
    return {VOC_CLASSES[k - 1]: n / total for k, n in numbers.items()}
