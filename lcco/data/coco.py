"""COCO's layout: pictures beside annotations/instances_*.json, also as other tools write it."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lcco.common import LCCoError, file_digest
from lcco.data.pictures import picture_size, same_name
from lcco.data.sets import CoSegData, facts

COCO_MIN_AREA = 4000  # COCO-SEG: an image counts for a category by one instance of more pixels
COCO_MIN_IMAGES = 100  # COCO-SEG: categories with fewer such images are dropped
FAR = 100_000  # pixels: no picture is as wide, and no outline goes there
_ONE = {"images": "image", "categories": "category", "annotations": "annotation"}


@dataclass(frozen=True)
class _Image:
    """A picture that the file lists."""

    name: str
    width: int
    height: int


@dataclass(frozen=True)
class _Object:
    """An annotation that can be used: its outline as polygons or run lengths."""

    item: str
    category: str
    outline: Any
    area: float
    crowd: bool

    def mask(self, image: _Image) -> np.ndarray:
        """uint8 [H, W] of {0, 1}. Raises: LCCoError naming the annotation."""
        from pycocotools import mask as coco

        try:
            runs = self.outline
            if isinstance(runs, list):
                runs = coco.merge(coco.frPyObjects(runs, image.height, image.width))
            elif isinstance(runs["counts"], list):
                runs = coco.frPyObjects(runs, image.height, image.width)
            return coco.decode(runs).astype(np.uint8)
        except Exception as error:
            why = f"its outline does not decode ({error or type(error).__name__})"
            raise LCCoError(f"{self.item}: {why}; take it out of the file") from None


class _Document:
    """An instances file, read entry by entry.

    problems: (status, entry, why) of what cannot be used or is odd; faults: as of `CoSegData`.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.problems, self.faults = file, [], []
        self.images: dict[str, _Image] = {}
        self.categories: dict[str, str] = {}
        self.objects: dict[str, list[_Object]] = defaultdict(list)
        self._pictures: dict[str, str] = {}  # annotation → its picture
        try:
            document = json.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise self._refused(str(error)[:80]) from None
        parts = {"images": self._image, "categories": self._category, "annotations": self._object}
        for part, read in parts.items():
            entries = document.get(part) if isinstance(document, dict) else None
            if not isinstance(entries, list):
                raise self._refused(f"no list `{part}`")
            for n, entry in enumerate(entries, 1):
                entry = entry if isinstance(entry, dict) else {}
                key = _key(entry.get("id"))
                read(entry, key, f"{_ONE[part]} {f'no. {n} of the list' if key is None else key}")
        if not self.categories:
            raise self._refused("no category with an id and a name")

    def _refused(self, why: str) -> LCCoError:
        return LCCoError(f"{self.file}: not a COCO instances file ({why}); export it again")

    def _problem(self, item: str, why: str, status: str = "error") -> None:
        self.problems.append((status, item, why))

    def _twice(self, item: str, one: str, other: str) -> None:
        told = f"{item.replace(' ', ' id ', 1)} twice ({one} and {other}); export it again"
        self.faults.append(("id twice", item, f"{self.file}: {told}"))

    def _image(self, entry: dict, key: str | None, item: str) -> None:
        name, size = entry.get("file_name"), [entry.get("width"), entry.get("height")]
        if key is None or not isinstance(name, str) or not name:
            self._problem(item, "no id" if key is None else "no file_name")
        elif not all(isinstance(v, (int, float)) and 1 <= v < FAR and v == int(v) for v in size):
            self._problem(item, f"{name}: no width and height in whole pixels")
        elif key in self.images:
            self._twice(item, self.images[key].name, name)
        else:
            self.images[key] = _Image(same_name(name.replace("\\", "/")), *map(int, size))

    def _category(self, entry: dict, key: str | None, item: str) -> None:
        name = str(entry.get("name") or "").strip()
        if key is None or not name:
            self._problem(item, "no id" if key is None else "no name")
        elif self.categories.setdefault(key, name) != name:
            self._twice(item, self.categories[key], name)

    def _object(self, entry: dict, key: str | None, item: str) -> None:
        image, category = _key(entry.get("image_id")), _key(entry.get("category_id"))
        if image not in self.images:
            return self._problem(item, f"image {image} is not in the file, or cannot be used")
        picture = self.images[image]
        if key is not None and key in self._pictures:
            return self._twice(item, self._pictures[key], picture.name)
        self._pictures[key or item] = picture.name
        if category not in self.categories:
            return self._problem(item, f"{picture.name}: category {category} is not in the file")
        outline, why = _outline(entry.get("segmentation"), picture)
        if why:
            rest, status = ("; its others are read", "note") if outline else ("", "error")
            self._problem(item, f"{picture.name}: {why}{rest}", status)
        if not outline:
            return None
        if any(isinstance(entry.get(k), str) for k in ("id", "image_id", "category_id")):
            self._problem(item, f"{picture.name}: ids are text; read as they stand", "note")
        area, crowd = entry.get("area"), entry.get("iscrowd") in (1, "1")
        found = _Object(item, self.categories[category], outline, area, crowd)
        if not isinstance(area, (int, float)) or not area > 0:
            try:
                size = int(found.mask(picture).sum())
            except LCCoError as error:
                return self._problem(item, f"{picture.name}: {error}")
            self._problem(item, f"{picture.name}: area is {area!r}, its mask's {size} px", "note")
            found = replace(found, area=size)
        return self.objects[image].append(found)


def _key(value: Any) -> str | None:
    """An id by which entries find each other: 7, 7.0 and "7" are one."""
    whole = isinstance(value, float) and value.is_integer()
    return None if value is None else str(int(value) if whole else value)


def _outline(found: Any, image: _Image) -> tuple[Any, str]:
    """What of a segmentation can be used (else None), and what is wrong with it (else "")."""
    if not found:
        return None, "no segmentation"
    if isinstance(found, dict):
        size, counts = found.get("size"), found.get("counts")
        if size != [image.height, image.width]:
            return None, f"run lengths of size {size}, the image is {[image.height, image.width]}"
        if isinstance(counts, list):
            whole = all(isinstance(n, int) and n >= 0 for n in counts)
            if not whole or sum(counts) != image.width * image.height:
                return None, "run lengths that do not fill the image"
        usable = isinstance(counts, (list, str)) and counts
        return (found, "") if usable else (None, "no run lengths")
    if not isinstance(found, list):
        return None, f"a segmentation of kind {type(found).__name__}"
    if not isinstance(found[0], list):
        return None, "a flat segmentation; it must be a list of polygons"
    good = [p for p in found if _is_polygon(p)]
    bad = len(found) - len(good)
    return good or None, f"{bad} of its polygons without 3 points in the image" if bad else ""


def _is_polygon(points: Any) -> bool:
    try:
        near = math.isfinite(sum(points)) and -FAR < min(points) <= max(points) < FAR
        return near and len(points) >= 6 and len(points) % 2 == 0
    except (TypeError, ValueError):
        return False


class COCOData(CoSegData):
    """COCO's instances; an image is in a category's group by one (no crowd) of > `min_area` px.

    Categories of one name are one; those with fewer than `min_images` such images are dropped. The
    key is `file_name`. A mask is the union of all of the classes' annotations, crowds too.
    """

    UNUSED = "entries of the file that cannot be used (`lcco data check` names each)"

    def __init__(
        self, name: str, root: Path, *, min_area: float = COCO_MIN_AREA,
        min_images: int = COCO_MIN_IMAGES,
    ) -> None:  # fmt: skip
        self.file, self.root, others = _files(name, root)
        document = _Document(self.file)
        self._images, self._objects = document.images, document.objects
        groups: dict[str, set[str]] = defaultdict(set)
        for key, objects in document.objects.items():
            for found in objects:
                if not found.crowd and found.area > min_area:
                    groups[found.category].add(key)
        small = [c for c, found in groups.items() if len(found) < min_images]
        groups = {c: found for c, found in groups.items() if c not in small}
        if not groups:
            rule = f"no category has {min_images} images with an instance over {min_area:g} px"
            first = f"; {': '.join(document.problems[0][1:])}" if document.problems else ""
            raise LCCoError(f"{self.file}: {rule}{first}")
        used = set().union(*groups.values())
        self.ids = sorted(used, key=lambda k: (self._images[k].name, k))
        number = {key: n for n, key in enumerate(self.ids)}
        super().__init__(
            name, "coco", [self._images[k].name for k in self.ids],
            {c: sorted(number[k] for k in found) for c, found in groups.items()},
        )  # fmt: skip
        self.problems, self.faults = document.problems, document.faults
        for key, n in Counter(self.keys).items():
            if n > 1:
                two = " and ".join(f"image {k}" for k in self.ids if self._images[k].name == key)
                told = f"{self.file}: {two} are both {key}; export it again"
                self.faults.append(("id twice", key, told))
        self.left_out = {
            self.UNUSED: [item for status, item, _ in self.problems if status == "error"],
            "images without a category's instance that is large enough":
                [image.name for key, image in self._images.items() if key not in used],
            f"categories with fewer than {min_images} images": sorted(small),
            f"other annotations than {self.file.name}": others,
        }  # fmt: skip
        self.left_out = {why: names for why, names in self.left_out.items() if names}

    def path(self, i: int) -> Path:
        return self._paths[i]

    @cached_property
    def _paths(self) -> list[Path]:
        """The files; where a disk spells a name in another way, as it does."""
        found, folders = [], {}
        for key in self.keys:
            path = self.root / key
            if not key.isascii() and not path.exists() and path.parent.is_dir():
                if path.parent not in folders:
                    folders[path.parent] = {same_name(f.name): f for f in path.parent.iterdir()}
                path = folders[path.parent].get(path.name, path)
            found.append(path)
        return found

    def truth_path(self, i: int) -> Path:
        return self.file

    @cached_property
    def truth_contents(self) -> list[str]:
        return facts("masks", [self.file], lambda p: file_digest(p, 16), "hashing") * len(self)

    def labels_of(self, i: int) -> frozenset[str]:
        return frozenset(found.category for found in self._objects[self.ids[i]])

    def mask(self, i: int, classes: Sequence[str]) -> np.ndarray:
        image, path = self._images[self.ids[i]], self.path(i)
        if (size := picture_size(path)) != (image.width, image.height):
            sizes = f"image is {size[0]}×{size[1]}, its annotations {image.width}×{image.height}"
            raise LCCoError(f"{path}: {sizes}; put the original picture back")
        out = np.zeros((image.height, image.width), np.uint8)
        try:
            for found in self._objects[self.ids[i]]:
                if found.category in classes:
                    out |= found.mask(image)
        except LCCoError as error:
            raise LCCoError(f"{self.file}: {error}") from None
        return out


def _files(name: str, root: Path) -> tuple[Path, Path, list[str]]:
    """The annotations, the folder that file names in them are relative to, other annotations."""
    files = sorted(root.glob("annotations/instances_*.json"))
    if not files:
        raise LCCoError(f"data `{name}`: no {root / 'annotations' / 'instances_train2017.json'}")
    file = next((f for f in files if f.stem == "instances_train2017"), files[0])
    fold = file.stem.removeprefix("instances_")
    others = [] if fold == "train2017" else [f.name for f in files[1:]]
    for folder in (root / fold, root / "images" / fold):
        if folder.is_dir():
            return file, folder, others
    raise LCCoError(f"data `{name}`: {file.name} is there, its pictures {root / fold} are not")
