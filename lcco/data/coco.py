"""COCO's layout: pictures beside annotations/instances_*.json, also as other tools write it."""

import json
import math
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from lcco.data.pictures import bad
from lcco.data.sets import CoSegData

Id = Annotated[int | str, Field(union_mode="left_to_right")]  # 7, 7.0 and "7" are one
Pixels = Annotated[int, Field(gt=0, lt=10**5)]


class _Image(BaseModel):
    id: Id
    file_name: Annotated[str, AfterValidator(lambda name: name.replace("\\", "/"))]
    width: Pixels
    height: Pixels


class _Category(BaseModel):
    id: Id
    name: Annotated[str, AfterValidator(str.strip), Field(min_length=1)]


class _Runs(BaseModel):
    size: list[int]  # height, width
    counts: str | list[Annotated[int, Field(ge=0)]]


def _outlines(polygons: list[list]) -> list[list]:
    outlines = [points for points in polygons if len(points) >= 6]  # others have no area
    near = all(math.isfinite(sum(p)) and max(map(abs, p)) < 10**5 for p in outlines)
    if not outlines or not near or any(len(points) % 2 for points in outlines):
        raise ValueError("no outlines of 3 or more points near the image")
    return outlines


class _Annotation(BaseModel):
    id: Id
    image_id: Id
    category_id: Id
    segmentation: _Runs | Annotated[list[list], AfterValidator(_outlines)]
    area: Annotated[float, Field(ge=0)] = 0
    iscrowd: bool = False


class _Document(BaseModel):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[Any]  # each is checked alone: one that cannot be used is left out


class COCOData(CoSegData):
    """COCO's instances; an image is in a category's group by one (no crowd) of > `min_area` px.

    Categories of one name are one; those with fewer than `min_images` such images are dropped. The
    key is `file_name`. A mask is the union of all of the classes' annotations, crowds too.
    """

    def __init__(self, name: str, root: Path, min_images: int, min_area: float) -> None:
        super().__init__(name, "coco")
        files = sorted(root.glob("annotations/instances_*.json"))
        self.file = next((file for file in files if file.stem.endswith("train2017")), files[0])
        fold = self.file.stem.removeprefix("instances_")
        folder = root / "images" / fold if (root / "images" / fold).is_dir() else root / fold
        try:
            document = _Document(**json.loads(self.file.read_text(encoding="utf-8-sig")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            what = f"not a COCO instances file ({_told(error)})"
            raise bad(self.file, what, "export it again") from None
        objects: dict[str, list[tuple[str, _Image, _Annotation]]] = {}
        held: dict[str, set[str]] = {}
        for category, image, found in self._annotations(document):
            objects.setdefault(image.file_name, []).append((category, image, found))
            if not found.iscrowd and found.area > min_area:
                held.setdefault(category, set()).add(image.file_name)
        self._by("id", (found for own in objects.values() for _, _, found in own))
        groups = {c: names for c, names in held.items() if len(names) >= min_images}
        if not groups:
            what = f"no category has {min_images} images with an instance over {min_area:g} px"
            first = ": ".join(self.left_out[0][1:]) if self.left_out else "give another folder"
            raise bad(self.file, what, first)
        others = [file.name for file in files if file != self.file]
        self.left_out += [("file left out", name, f"{self.file.name} is read") for name in others]
        self.keys = tuple(sorted(set().union(*groups.values())))
        self.classes = [frozenset(c for c in groups if key in groups[c]) for key in self.keys]
        self.files = [(folder / key, self.file) for key in self.keys]
        self._objects = [objects[key] for key in self.keys]
        for key in sorted({image.file_name for image in document.images}.difference(self.keys)):
            self.left_out.append(("image left out", key, "no large instance"))

    def _annotations(self, document: _Document) -> Iterator[tuple[str, _Image, _Annotation]]:
        """The annotations that can be used, with their categories' names and their images."""
        self._by("file_name", document.images)
        images, categories = self._by("id", document.images), self._by("id", document.categories)
        for n, entry in enumerate(document.annotations, 1):
            try:
                found = _Annotation.model_validate(entry)
                image, category = images.get(found.image_id), categories.get(found.category_id)
                if not image or not category:
                    what = f"category {found.category_id}" if image else f"image {found.image_id}"
                    raise ValueError(f"{what} is not in the file")
                if isinstance(found.segmentation, _Runs) or not found.area:
                    pixels = float(_decoded(found, image).sum())  # and the runs are looked over
                    found.area = found.area or pixels
                yield category.name, image, found
            except (ValueError, TypeError, OverflowError) as error:
                key = entry.get("id", f"no. {n}") if isinstance(entry, dict) else f"no. {n}"
                self.left_out.append(("entry left out", f"annotation {key}", _told(error)))

    def _by(self, field: str, entries: Iterable[Any]) -> dict[Any, Any]:
        """Entries by a field. Raises: LCCoError for two that are the same there."""
        found: dict[Any, Any] = {}
        for entry in entries:
            if (first := found.setdefault(getattr(entry, field), entry)) is not entry:
                what = f"two entries of one {field}: {first!r:.60}…, {entry!r:.60}…"
                raise bad(self.file, what, "export it again")
        return found

    def labels_of(self, i: int) -> frozenset[str]:
        return frozenset(category for category, _, _ in self._objects[i])

    def mask(self, i: int, classes: Collection[str]) -> np.ndarray:
        image = self._objects[i][0][1]
        out = np.zeros((image.height, image.width), np.uint8)
        for category, _, found in self._objects[i]:
            if category in classes:
                out |= _decoded(found, image)
        return self.sized(i, out)


def _decoded(found: _Annotation, image: _Image) -> np.ndarray:
    """uint8 [H, W] of {0, 1}. Raises: ValueError for run lengths that are not the image's."""
    from pycocotools import mask as coco

    runs, size = found.segmentation, [image.height, image.width]
    if isinstance(runs, list):
        return coco.decode(coco.merge(coco.frPyObjects(runs, *size)))
    whole, coded = runs.size == size, dict(runs)
    if whole and isinstance(runs.counts, list):
        whole, coded = sum(runs.counts) == size[0] * size[1], coco.frPyObjects(coded, *size)
    if not whole or (out := coco.decode(coded)).sum() != coco.area(coded):
        raise ValueError("run lengths that do not fill the image")
    return out


def _told(error: Exception) -> str:
    """An error in one line, of pydantic's the one that is deepest in the entry."""
    errors = error.errors() if isinstance(error, ValidationError) else [{"loc": (), "msg": error}]
    worst = sorted(errors, key=lambda e: len(e["loc"]))[-1]
    return ": ".join([*(str(p) for p in worst["loc"] if "[" not in str(p)), str(worst["msg"])])
