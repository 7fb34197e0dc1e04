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
PROBED = 200  # annotations that are decoded at once, to see that they are not all empty


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
    """An instances file, read entry by entry; what cannot be used is a row of `problems`."""

    def __init__(self, file: Path) -> None:
        self.file, self.problems, self.faults = file, [], []
        self.images: dict[str, _Image] = {}
        self.objects: dict[str, list[_Object]] = defaultdict(list)
        try:
            document = json.loads(file.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise self._refuse(str(error)[:80]) from None
        for part in ("images", "categories", "annotations"):
            if not (isinstance(document, dict) and isinstance(document.get(part), list)):
                raise self._refuse(f"no list `{part}`")
        for entry in document["images"]:
            self._image(entry)
        self.categories = {
            str(c["id"]): str(c["name"]).strip()
            for c in document["categories"]
            if isinstance(c, dict) and "id" in c and c.get("name")
        }
        if not self.categories:
            raise self._refuse("no category with an id and a name")
        ids: dict[str, str] = {}
        for n, entry in enumerate(document["annotations"]):
            self._annotation(n, entry, ids)

    def _refuse(self, why: str) -> LCCoError:
        return LCCoError(f"{self.file}: not a COCO instances file ({why}); export it again")

    def _problem(self, item: str, why: str, status: str = "error") -> None:
        self.problems.append((status, item, why))

    def _image(self, entry: Any) -> None:
        entry = entry if isinstance(entry, dict) else {}
        key, name = str(entry.get("id")), entry.get("file_name")
        size = [entry.get("width"), entry.get("height")]
        if entry.get("id") is None or not isinstance(name, str) or not name:
            self._problem(f"image {key}", f"no {'file_name' if 'id' in entry else 'id'}")
        elif not all(isinstance(v, (int, float)) and v >= 1 and v == int(v) for v in size):
            self._problem(f"image {key}", f"{name}: no width and height in whole pixels")
        elif key in self.images:
            self._fault("image", key, self.images[key].name, name)
        else:
            self.images[key] = _Image(same_name(name.replace("\\", "/")), *map(int, size))

    def _fault(self, what: str, key: str, one: str, other: str) -> None:
        told = f"{self.file}: {what} id {key} twice ({one} and {other}); export it again"
        self.faults.append(("id twice", f"{what} {key}", told))

    def _annotation(self, n: int, entry: Any, ids: dict[str, str]) -> None:
        entry = entry if isinstance(entry, dict) else {}
        number = entry.get("id")
        item = f"annotation {f'no. {n + 1} of the list' if number is None else number}"
        image, category = str(entry.get("image_id")), str(entry.get("category_id"))
        if image not in self.images:
            return self._problem(item, f"image {image} is not in the file")
        picture = self.images[image]
        if number is not None and str(number) in ids:
            return self._fault("annotation", str(number), ids[str(number)], picture.name)
        ids[str(number)] = picture.name
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
        area, crowd = entry.get("area"), bool(entry.get("iscrowd"))
        found = _Object(item, self.categories[category], outline, area, crowd)
        if not isinstance(area, (int, float)) or not area > 0:
            try:
                size = int(found.mask(picture).sum())
            except LCCoError as error:
                return self._problem(item, f"{picture.name}: {error}")
            self._problem(item, f"{picture.name}: area is {area!r}, its mask's {size} px", "note")
            found = replace(found, area=size)
        return self.objects[image].append(found)


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
    return good or None, f"{bad} polygon{'s'[: bad > 1]} of fewer than 3 points" if bad else ""


def _is_polygon(points: Any) -> bool:
    try:
        return len(points) >= 6 and len(points) % 2 == 0 and math.isfinite(sum(points))
    except TypeError:
        return False


class COCOData(CoSegData):
    """COCO's instances; an image is in a category's group by one (no crowd) of > `min_area` px.

    Categories of one name are one; those with fewer than `min_images` such images are dropped. The
    key is `file_name`. A mask is the union of all of the classes' annotations, crowds too.
    """

    UNUSED = "entries of the file that cannot be used (`lcco data check` names each)"
    STATUSES = {"error": "entry left out", "note": "odd entry"}  # of `problems`

    def __init__(
        self, name: str, root: Path, *, min_area: float = COCO_MIN_AREA,
        min_images: int = COCO_MIN_IMAGES,
    ) -> None:  # fmt: skip
        self.file, self.root = _files(name, root)
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
        self._probe()
        self.left_out = {
            self.UNUSED: [item for status, item, _ in self.problems if status == "error"],
            "images without a category's instance that is large enough":
                [image.name for key, image in self._images.items() if key not in used],
            f"categories with fewer than {min_images} images": sorted(small),
        }  # fmt: skip
        self.left_out = {why: names for why, names in self.left_out.items() if names}

    def _probe(self) -> None:
        """Outlines may all be empty, in shares of the width for instance: look at some."""
        items = range(0, len(self), -(-len(self) // PROBED))
        empty = []
        for i in items:
            image, objects = self._images[self.ids[i]], self._objects[self.ids[i]]
            try:
                if not any(found.mask(image).any() for found in objects):
                    empty.append(self.keys[i])
            except LCCoError:
                empty.append(self.keys[i])
        if len(empty) > len(items) / 2:
            told = f"{len(empty)} of {len(items)} pictures looked at have no object pixel"
            mend = "are the outlines in pixels?"
            self.faults.append(("empty truth", empty[0], f"{self.file}: {told}; {mend}"))

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


def _files(name: str, root: Path) -> tuple[Path, Path]:
    """The annotations, and the folder that file names in them are relative to."""
    files = sorted(root.glob("annotations/instances_*.json"))
    if not files:
        raise LCCoError(f"data `{name}`: no {root / 'annotations' / 'instances_train2017.json'}")
    file = next((f for f in files if f.stem == "instances_train2017"), files[0])
    fold = file.stem.removeprefix("instances_")
    for folder in (root / fold, root / "images" / fold):
        if folder.is_dir():
            return file, folder
    raise LCCoError(f"data `{name}`: {file.name} is there, its pictures {root / fold} are not")
