"""Image sets: items (one picture each), decoded when asked for, and groups (class → items)."""

import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial, partialmethod
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from lcco.common import VOID, LCCoError, digest, few, file_digest, place, progress
from lcco.data import pictures
from lcco.data.overlap import LOOKS, near_pairs, picture_hash
from lcco.data.pictures import LOSSY, bad, same_name
from lcco.store import kept

_NAMES = Path(__file__).parents[1] / "vocab/voc20.txt"  # where it says `dining table`
VOC_CLASSES = tuple(_NAMES.read_text(encoding="utf-8").replace(" ", "").split())
SIDES = {"folders": ("image/", "groundtruth/"), "icoseg": ("images/", "ground_truth/")}
FACTS = {  # of a file, kept on disk: its place in `files`, and what is computed of it
    "content": (0, lambda path: file_digest(path, 16)),
    "masks": (1, lambda path: file_digest(path, 16)),
    LOOKS: (0, lambda path: picture_hash(pictures.read_picture(path))),
    "areas": (1, lambda path: class_areas(path)),
}


class CoSegData:
    """A set of pictures with masks, sorted into groups that share a class. Readers subclass it.

    keys: item i's unique name. classes: those whose groups hold it. files: its picture and mask;
    none if drawn. left_out: (kind, item, why).
    """

    exhaustive = True  # False: an item's truth knows one class only, others may be in the picture

    def __init__(self, name: str, layout: str, keys: Iterable[str] = (),
                 classes: Iterable[Iterable] = ()) -> None:  # fmt: skip
        self.name, self.layout, self.keys = name, layout, tuple(keys)
        self.files: list[tuple[Path, Path]] = []
        self.left_out: list[tuple[str, str, str]] = []
        self.facts: dict[str, list[Any]] = {}
        self.classes = [frozenset(held) for held in classes]

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int) -> Image.Image:
        """Item i's picture, RGB, upright. Raises: LCCoError naming a corrupt file."""
        return pictures.read_picture(self.files[i][0])

    def mask(self, i: int, classes: Collection[str]) -> np.ndarray:
        """uint8 [H, W] of {0, 1, 255 = void}: the union of the classes' masks."""
        raise NotImplementedError

    def sized(self, i: int, mask: np.ndarray) -> np.ndarray:
        """The mask, if it has the size of image i. Raises: LCCoError if it has not."""
        if (size := pictures.picture_size(self.files[i][0])) != mask.shape[::-1]:
            what = f"mask of {mask.shape[::-1]} pixels for image {self.keys[i]} of {size}"
            raise bad(self.files[i][1], what, "make them one size")
        return mask

    def grey_truth(self, i: int) -> np.ndarray | None:
        """uint8 [H, W]: the truth before its threshold, where its file is lossy (JPEG)."""
        lossy = self.files and self.files[i][1].suffix.lower() in LOSSY
        return pictures.read_mask(self.files[i][1]) if lossy else None

    @cached_property
    def groups(self) -> Mapping[str, Sequence[int]]:
        """Class → its items, in the order of their keys."""
        found: dict[str, list[int]] = {}
        for i in sorted(range(len(self)), key=self.keys.__getitem__):
            for c in self.classes_of(i):
                found.setdefault(c, []).append(i)
        return {c: tuple(found[c]) for c in sorted(found)}

    def classes_of(self, i: int) -> frozenset[str]:
        """The classes whose groups hold image i."""
        return self.classes[i]

    def labels_of(self, i: int) -> frozenset[str]:
        """Every class with any pixel in image i (`classes_of` may ask for a least area)."""
        return self.classes_of(i)

    def knows_all(self, i: int) -> bool:
        """Whether a class that is not among image i's labels is truly absent."""
        return self.exhaustive

    def fact(self, i: int, kind: str) -> Any:
        """A value of `FACTS` for item i, kept on disk until a file's size or time changes."""
        if not self.files:
            return picture_hash(self.image(i)) if kind == LOOKS else ""
        if kind not in self.facts:
            side, compute = FACTS[kind]
            files = sorted({pair[side] for pair in self.files})
            stats = [(str(f.absolute()), f.stat()) for f in files]
            stamp = digest([[name, s.st_size, s.st_mtime_ns] for name, s in stats], 16)
            make = partial(threaded, compute, files, f"reading files ({kind})")
            values = kept(place("cache") / f"{kind}-{stamp}.json", make)
            found = dict(zip(files, values, strict=True))
            self.facts[kind] = [found[pair[side]] for pair in self.files]
        return self.facts[kind][i]

    def content(self, i: int) -> str:
        """A short sha256 of image i's file: equal pictures in two groups have equal content."""
        return self.fact(i, "content")

    def hashes(self) -> list[str]:
        """Every item's `picture_hash`."""
        return [self.fact(i, LOOKS) for i in range(len(self))]

    def overlap(self, other: "CoSegData") -> list[tuple[int, int]]:
        """(index here, index there) of every picture that both sets hold; kept on disk."""
        file = place("cache") / f"overlap-{digest([LOOKS, self.digest(), other.digest()], 16)}.json"
        return [(i, j) for i, j in kept(file, lambda: near_pairs(self.hashes(), other.hashes()))]

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

    def subset(self, indices: Iterable[int], name: str) -> "CoSegData":
        """The items of these indices, in this order, as a set; groups left empty are dropped."""
        return View(name, [(self, i) for i in indices])

    def complete(self) -> Self:
        """This set; tells what was left out. Raises: LCCoError for missing or empty masks."""
        if missing := [file for pair in self.files for file in pair if not file.is_file()]:
            raise bad(missing[0], "no such file", "put it back or take its picture out of the set")
        probed = range(0, len(self), max(1, len(self) // 20)) if self.layout != "voc" else ()
        empty = [i for i in probed if not (self.mask(i, self.classes_of(i)) == 1).any()]
        if len(empty) > len(probed) / 2:
            what = f"no object pixel, as in {len(empty)} of {len(probed)} masks looked at"
            raise bad(self.files[empty[0]][1], what, "save the object as 255, outlines in pixels")
        for kind in dict.fromkeys(kind for kind, _, _ in self.left_out):
            found = [f"{item} ({why})" for other, item, why in self.left_out if other == kind]
            print(f"{self.name}: {len(found)} × {kind}: {few(found, 3)}", file=sys.stderr)
        return self


def threaded(compute: Callable, items: Sequence, what: str, workers: int = 4) -> list[Any]:
    """`compute(item)` of each item, in threads, telling how far it is."""
    with ThreadPoolExecutor(workers) as pool:
        return list(progress(pool.map(compute, items), what, len(items)))


class View(CoSegData):
    """Items of one or several sets, read through them; groups of one class name become one."""

    def _ask(self, name: str, i: int, *more: Any) -> Any:
        data, j = self._items[i]
        return getattr(data, name)(j, *more)

    def __init__(self, name: str, items: Sequence[tuple[CoSegData, int]]) -> None:
        self._items, keys = items, [data.keys[i] for data, i in items]
        if len(set(keys)) < len(keys):  # two sets may use the same names
            keys = [f"{data.name}:{data.keys[i]}" for data, i in items]
        if len(set(keys)) < len(keys):
            what = f"holds `{max(keys, key=keys.count)}` twice"
            raise bad(f"data `{name}`", what, "name each set once, and equal folders differently")
        super().__init__(name, "+".join(dict.fromkeys(data.layout for data, _ in items)), keys)


for asked in ("image", "mask", "grey_truth", "fact", "content", "classes_of", "labels_of",
              "knows_all"):  # fmt: skip
    setattr(View, asked, partialmethod(View._ask, asked))


def folders_in(root: Path) -> dict[str, Path]:
    """A folder's folders by class, in small letters. Raises: LCCoError for two of one class."""
    found: dict[str, Path] = {}
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and not pictures.is_system(folder.name):
            c = re.sub(r"(?<=\D)100$", "", same_name(folder.name).strip().lower())  # `Horse100`
            closed = re.sub(r"[ _-]", "", c)  # `Dining_Table`
            c = closed if closed in VOC_CLASSES else c
            if (first := found.setdefault(c, folder)) is not folder:
                raise bad(f"{first} and {folder}", f"both class `{c}`", "rename one")
    return found


def by_stem(folder: Path) -> dict[str, Path]:
    """A folder's pictures by name without ending. Raises: LCCoError for two of one name."""
    found: dict[str, Path] = {}
    for file in pictures.pictures_in(folder) if folder.is_dir() else ():
        if (first := found.setdefault(same_name(file.stem), file)) is not file:
            raise bad(f"{first} and {file.name}", "one name", "rename or move one")
    return found


def read_lines(file: Path) -> list[str]:
    """The lines of a list that are not blank. Raises: LCCoError for a missing file."""
    if not file.is_file():
        raise bad(file, "no such list", "write one, a name a line")
    lines = file.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    return [same_name(line.strip()) for line in lines if line.strip()]


class FolderData(CoSegData):
    """A folder a class (`folders`, `icoseg`, `rubinstein`); masks know that class, above 127."""

    exhaustive = False

    def __init__(self, name: str, root: Path, layout: str, classes: Sequence[str] = ()) -> None:
        super().__init__(name, layout)
        sides = [root / side for side in SIDES.get(layout, (".", "."))]
        images, truths = map(folders_in, sides)
        if layout == "rubinstein":
            images = {c: d for c, d in images.items()
                      if (d / "GroundTruth").is_dir() or pictures.pictures_in(d)}  # fmt: skip
            truths = {c: d / "GroundTruth" for c, d in images.items()}
        known = images.keys() | truths.keys()
        if missing := [c for c in classes if c not in known]:
            raise LCCoError(f"data `{name}`: {root} lacks the groups {', '.join(missing)}")
        for c in sorted(classes or known):
            folder, other = images.get(c, sides[0] / c), truths.get(c, sides[1] / c)
            found, masks = by_stem(folder), by_stem(other)
            self.keys += tuple(f"{c}/{s}" for s in sorted(found))
            self.classes += [frozenset({c})] * len(found)
            self.files += [(found[s], masks.pop(s, other / f"{s}.png")) for s in sorted(found)]
            self.left_out += [("missing image", f"{c}/{s}", f"for {masks[s]}") for s in masks]
            others = pictures.listing(folder)[1] if c in images else ()
            self.left_out += [("file left out", f"{c}/{o}", "no picture file") for o in others]
            if not found:
                self.left_out.append(("class without a picture", c, f"none in {folder}"))
        loose = pictures.pictures_in(sides[0]) if sides[0].is_dir() else ()
        self.left_out += [("file left out", p.name, "in no class's folder") for p in loose]
        if not self.keys:
            raise bad(root, "no class folder with pictures", "put some in")

    def mask(self, i: int, classes: Collection[str]) -> np.ndarray:
        truth = self.files[i][1]
        grey = self.sized(i, pictures.read_mask(truth))
        if not self.classes_of(i).intersection(classes):
            return np.zeros_like(grey)
        top = int(grey.max(initial=0))
        if 0 < top < 128 and truth.suffix.lower() not in LOSSY:  # class numbers would read as empty
            raise bad(truth, f"mask has no value above {top}", "save the object as 255 (white)")
        return (grey > 127).astype(np.uint8)


class VOCData(CoSegData):
    """PASCAL VOC: masks of class numbers, 255 = void; an image is in a class's group from 1% on."""

    def __init__(self, name: str, root: Path, lists: Sequence[str]) -> None:
        super().__init__(name, "voc")
        augmented = "Aug" if any("aug" in word for word in lists) else ""
        sides = root / "JPEGImages", root / f"SegmentationClass{augmented}"
        images, masks = map(by_stem, sides)
        stems = {same_name(f.name): s for s, f in images.items()} | {s: s for s in images}
        found: dict[str, str] = {}
        for file in (root / "ImageSets" / "Segmentation" / f"{word}.txt" for word in lists):
            for line in read_lines(file):  # a name, with its ending, or an image's two paths
                word = re.sub(r"^/?JPEGImages/(.+)\.\w+\s+/?\w+/\1\.\w+$", r"\1", line)
                if (first := found.setdefault(stems.get(word, word), line)) != line:
                    raise bad(file, f"`{first}` and `{line}` are one picture", "take one out")
        if not found:
            raise bad(root, f"its lists ({', '.join(lists)}) are empty", "write one name a line")
        self.keys = tuple(found)
        self.files = [(images.get(key, sides[0] / f"{key}.jpg"),
                       masks.get(key, sides[1] / f"{key}.png")) for key in found]  # fmt: skip

    def classes_of(self, i: int) -> frozenset[str]:
        return frozenset(c for c, n in self.fact(i, "areas").items() if n >= 0.01)

    def labels_of(self, i: int) -> frozenset[str]:
        return frozenset(self.fact(i, "areas"))

    def mask(self, i: int, classes: Collection[str]) -> np.ndarray:
        labels = self.sized(i, pictures.read_labels(self.files[i][1], len(VOC_CLASSES)))
        own = [n for n, c in enumerate(VOC_CLASSES, 1) if c in classes]
        return np.where(labels == VOID, VOID, np.isin(labels, own)).astype(np.uint8)


def class_areas(path: Path) -> dict[str, float]:
    """Class → its share of the pixels of a VOC mask."""
    labels = pictures.read_labels(path, len(VOC_CLASSES))
    counts = np.bincount(labels.ravel(), minlength=256).tolist()
    return {c: n / labels.size for c, n in zip(VOC_CLASSES, counts[1:], strict=False) if n}
