"""COCO's layout: pictures beside annotations/instances_*.json, also as other tools write it."""

from __future__ import annotations

import json
import math
import unicodedata
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lcco.common import LCCoError
from lcco.data.pictures import bad, same_name
from lcco.data.sets import LAYOUTS, CoSegData

COCO_MIN_AREA = 4000  # COCO-SEG: an image counts for a category by one instance of more pixels
COCO_MIN_IMAGES = 100  # COCO-SEG: categories with fewer such images are dropped
FAR = 100_000  # pixels: no picture is as wide, and no outline goes there
_ONE = ("image", "category", "annotation")


class _Image(NamedTuple):
    name: str
    width: int
    height: int


class _Object(NamedTuple):
    item: str
    category: str
    outline: Any  # polygons or run lengths
    area: float
    crowd: bool


class COCOData(CoSegData):
    """COCO's instances; an image is in a category's group by one (no crowd) of > `min_area` px.

    Categories of one name are one; those with fewer than `min_images` such images are dropped. The
    key is `file_name`. A mask is the union of all of the classes' annotations, crowds too.
    problems: (status, entry, why) of the file's entries that cannot be used or are odd.
    """

    UNUSED = "entries of the file that cannot be used (`lcco data check` names each)"

    def __init__(
        self, name: str, root: Path, *, min_area: float = COCO_MIN_AREA,
        min_images: int = COCO_MIN_IMAGES,
    ) -> None:  # fmt: skip
        super().__init__(name, "coco")
        self.file, folder = _files(root)
        self.problems: list[tuple[str, str, str]] = []
        self._images: dict[str, _Image] = {}
        self._categories: dict[str, str] = {}
        self._objects: dict[str, list[_Object]] = defaultdict(list)
        self._names: dict[str, str] = {}  # entry → what it names
        self._read()
        held: dict[str, set[str]] = defaultdict(set)
        for key, objects in self._objects.items():
            for found in objects:
                if not found.crowd and found.area > min_area:
                    held[found.category].add(key)
        groups = {c: held[c] for c in sorted(held) if len(held[c]) >= min_images}
        if not groups:
            rule = f"no category has {min_images} images with an instance over {min_area:g} px"
            first = f"; {': '.join(self.problems[0][1:])}" if self.problems else ""
            raise LCCoError(f"{self.file}: {rule}{first}")
        self.ids = sorted(set().union(*groups.values()), key=lambda k: self._images[k].name)
        self.keys = tuple(self._images[k].name for k in self.ids)
        self.files = [(_on_disk(folder, key), self.file) for key in self.keys]
        number = {key: n for n, key in enumerate(self.ids)}
        self.groups = {c: tuple(sorted(map(number.get, keys))) for c, keys in groups.items()}
        reasons = {
            self.UNUSED: [item for status, item, _ in self.problems if status == "error"],
            "images without a category's instance that is large enough":
                [image.name for key, image in self._images.items() if key not in number],
            f"categories with fewer than {min_images} images": sorted(held.keys() - groups.keys()),
        }  # fmt: skip
        self.left_out |= {why: names for why, names in reasons.items() if names}

    def _read(self) -> None:
        try:
            document = json.loads(self.file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise self._refused(str(error)[:80]) from None
        readers = {"images": self._read_image, "categories": self._read_category,
                   "annotations": self._read_object}  # fmt: skip
        for (part, read), one in zip(readers.items(), _ONE, strict=True):
            entries = document.get(part) if isinstance(document, dict) else None
            if not isinstance(entries, list):
                raise self._refused(f"no list `{part}`")
            for n, entry in enumerate(entries, 1):
                key = _key(entry.get("id")) if isinstance(entry, dict) else None
                item = f"{one} {f'no. {n} of the list' if key is None else key}"
                try:
                    read(item, key, entry)
                except KeyError as error:
                    self.problems.append(("error", item, f"no {error.args[0]}"))
                except (ValueError, TypeError, OverflowError, LCCoError) as error:
                    self.problems.append(("error", item, str(error)))
        if not self._categories:
            raise self._refused("no category with an id and a name")

    def _refused(self, why: str) -> LCCoError:
        return bad(self.file, f"not a COCO instances file ({why})", "export it again")

    def _is_first(self, item: str, name: str) -> bool:
        """Whether no entry before was this one: that would be a fault."""
        if first := self._names.get(item):
            told = bad(self.file, f"{item} twice ({first} and {name})", "export it again")
            self.faults.append(("id twice", item, str(told)))
        self._names.setdefault(item, name)
        return not first

    def _read_image(self, item: str, key: str | None, entry: dict) -> None:
        name = same_name(str(entry["file_name"]).replace("\\", "/"))
        image = _Image(name, int(entry["width"]), int(entry["height"]))
        if key is None or not (0 < image.width < FAR and 0 < image.height < FAR):
            raise ValueError(f"{name}: no id, or no size in pixels")
        if self._is_first(item, name) and self._is_first(f"file {name}", item):
            self._images[key] = image

    def _read_category(self, item: str, key: str | None, entry: dict) -> None:
        name = str(entry["name"]).strip()
        if key is None or not name:
            raise ValueError("no id or no name")
        if self._is_first(item, name):
            self._categories[key] = name

    def _read_object(self, item: str, _: str | None, entry: dict) -> None:
        key, category = _key(entry["image_id"]), _key(entry["category_id"])
        if key not in self._images:
            raise ValueError(f"image {key} is not in the file, or cannot be used")
        image = self._images[key]
        if not self._is_first(item, image.name):
            return
        if category not in self._categories:
            raise ValueError(f"{image.name}: category {category} is not in the file")
        outline, why = _outline(entry["segmentation"], image)
        if not outline:
            raise ValueError(f"{image.name}: {why}")
        if why:
            self.problems.append(("note", item, f"{image.name}: {why}; its others are read"))
        area, crowd = entry.get("area"), entry.get("iscrowd") in (1, "1")
        found = _Object(item, self._categories[category], outline, area, crowd)
        if not isinstance(area, (int, float)) or not area > 0:
            found = found._replace(area=int(self._decoded(found, image).sum()))
            told = f"{image.name}: area is {area!r}, its mask's {found.area} px"
            self.problems.append(("note", item, told))
        self._objects[key].append(found)

    def _decoded(self, found: _Object, image: _Image) -> np.ndarray:
        """uint8 [H, W] of {0, 1}. Raises: LCCoError naming the annotation."""
        from pycocotools import mask as coco

        try:
            runs = found.outline
            if isinstance(runs, list):
                runs = coco.merge(coco.frPyObjects(runs, image.height, image.width))
            elif isinstance(runs["counts"], list):
                runs = coco.frPyObjects(runs, image.height, image.width)
            return coco.decode(runs).astype(np.uint8)
        except Exception as error:  # of several kinds
            what = f"{found.item}: its outline does not decode ({error or type(error).__name__})"
            raise bad(self.file, what, "take it out") from None

    def labels_of(self, i: int) -> frozenset[str]:
        return frozenset(found.category for found in self._objects[self.ids[i]])

    def stored_mask(self, i: int, classes: Collection[str] | None = None) -> np.ndarray:
        image = self._images[self.ids[i]]
        out = np.zeros((image.height, image.width), np.uint8)
        for found in self._objects[self.ids[i]]:
            if classes is None or found.category in classes:
                out |= self._decoded(found, image)
        return out

    def mask(self, i: int, classes: Collection[str]) -> np.ndarray:
        return self.sized(i, self.stored_mask(i, classes))


def _key(value: Any) -> str | None:
    """An id by which entries find each other: 7, 7.0 and "7" are one."""
    whole = isinstance(value, float) and value.is_integer()
    return None if value is None else str(int(value) if whole else value)


def _outline(found: Any, image: _Image) -> tuple[Any, str]:
    """What of a segmentation can be used (else nothing), and what is wrong with it (else "")."""
    if isinstance(found, dict):
        counts, fits = found.get("counts"), found.get("size") == [image.height, image.width]
        if isinstance(counts, list):
            whole = all(isinstance(n, int) and n >= 0 for n in counts)
            fits = fits and whole and sum(counts) == image.width * image.height
        usable = fits and counts and isinstance(counts, (list, str))
        return (found, "") if usable else (None, "run lengths that do not fill the image")
    if not found or not isinstance(found, list):
        return None, "no segmentation"
    good = [p for p in found if _is_polygon(p)]
    few = len(found) - len(good)
    return good, f"{few} of its polygons without 3 points in the image" if few else ""


def _is_polygon(points: Any) -> bool:
    try:
        near = math.isfinite(sum(points)) and -FAR < min(points) <= max(points) < FAR
        return near and len(points) >= 6 and len(points) % 2 == 0
    except (TypeError, ValueError):
        return False


def _files(root: Path) -> tuple[Path, Path]:
    """The annotations (train2017's if there), and the folder that holds their pictures."""
    files = root.glob("annotations/instances_*.json")
    for file in sorted(files, key=lambda f: (f.stem != "instances_train2017", f)):
        fold = file.stem.removeprefix("instances_")
        for folder in (root / fold, root / "images" / fold):
            if folder.is_dir():
                return file, folder
    raise bad(root, "no annotations with their pictures", f"expected {LAYOUTS['coco']}")


def _on_disk(folder: Path, key: str) -> Path:
    """A picture's file: disks spell letters with accents in two ways."""
    other = folder / unicodedata.normalize("NFD", key)
    return other if not key.isascii() and other.exists() else folder / key
