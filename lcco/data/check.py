"""What a folder of pictures and masks holds, and what is wrong with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lcco.common import LCCoError, progress
from lcco.data import pictures
from lcco.data.load import INTERNET3, MSRC7, open_folder
from lcco.data.overlap import near_pairs, picture_hash
from lcco.data.sets import THREADS, VOC_CLASSES, CoSegData, FolderData, VOCData

if TYPE_CHECKING:
    import pandas as pd

Row = tuple[str, str, str]  # check, item, detail

_IMAGES = {"MSRC7": (MSRC7, 70), "Internet": (INTERNET3, 300), "PASCAL1037": (VOC_CLASSES, 1037)}
_STATUS = dict.fromkeys((
    "missing image", "missing mask", "bad image", "bad mask", "most masks empty",
    "class without a picture", "class without an object", "entry left out", "in training set",
), "error") | dict.fromkeys((
    "duplicate", "empty mask", "soft mask", "file left out", "image left out", "category left out",
), "note")  # fmt: skip


def check(
    path: str | Path, training: CoSegData | None = None, *, min_images: int = 1,
    min_area: float = 0, limit: int = 20,
) -> pd.DataFrame:  # fmt: skip
    """What a folder holds and what is wrong with it.

    Columns: status, check, item, found (how many of the kind), expected (in the literature),
    detail. status: ok, note (an empty or soft mask, a duplicate, another count than expected, what
    the reader leaves out) or error (a missing pair, an unusable picture or mask, a picture that is
    in `training` too); `.attrs["ok"]` is False with any error. limit: items listed of a kind.
    min_images, min_area: COCO's thresholds.
    Raises: LCCoError for a folder that is no set, as with two pictures of one name.
    """
    import pandas as pd

    data = open_folder(Path(path), min_images=min_images, min_area=min_area)
    looks: dict[int, str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        seen = pool.map(lambda i: list(_look(data, i, looks)), range(len(data)))
        found = [row for rows in progress(seen, f"checking {path}", len(data)) for row in rows]
    groups: Mapping[str, Sequence[int]] = {}
    with contextlib.suppress(LCCoError, OSError):  # VOC has none while a mask is bad
        groups = data.groups
    found += [*data.left_out, *_of_set(data, groups, found)]
    found += _alike(data, dict(sorted(looks.items())), training)
    table = pd.DataFrame(found, columns=["check", "item", "detail"])
    table["found"] = table.groupby("check")["item"].transform("size")
    table["status"] = table["check"].map(_STATUS)
    table = table.sort_values("check", key=lambda c: c.map([*_STATUS].index), kind="stable")
    names = ["check", "item", "found", "expected"]
    counts = pd.DataFrame(_counts(data, groups), columns=names, dtype=object)
    known = counts["expected"].fillna(counts["found"])
    counts["status"] = (known == counts["found"]).map({True: "ok", False: "note"})
    out = pd.concat([counts, table.groupby("check").head(limit)], ignore_index=True)
    out = out[["status", "check", "item", "found", "expected", "detail"]].fillna("").astype(str)
    out.attrs.update(ok="error" not in set(out["status"]), layout=data.layout, path=str(path))
    return out


def _look(data: CoSegData, i: int, looks: dict[int, str]) -> Iterator[Row]:
    """What is wrong with item i; its picture's hash is put into `looks`."""
    key, (path, truth), side = data.keys[i], data.files[i], "image"
    try:
        looks[i] = picture_hash(pictures.read_picture(path))
        path, side = truth, "mask"
        mask = data.mask(i, VOC_CLASSES if isinstance(data, VOCData) else data.classes_of(i))
        if not (mask == 1).any():
            yield "empty mask", key, "no object pixel"
        if isinstance(data, FolderData) and truth.suffix.lower() not in pictures.LOSSY:
            grey = pictures.read_mask(truth)
            if ((grey > 0) & (grey < 255)).any():
                yield "soft mask", key, "values between 0 and 255; read as object above 127"
    except LCCoError as error:
        yield f"{'bad' if path.is_file() else 'missing'} {side}", key, str(error)


def _of_set(
    data: CoSegData, groups: Mapping[str, Sequence[int]], found: Sequence[Row]
) -> Iterator[Row]:
    empty = {item for kind, item, _ in found if kind == "empty mask"}
    if len(empty) > len(data) / 2:
        yield "most masks empty", min(empty), f"{len(empty)} of {len(data)} have no object pixel"
    for c, items in groups.items():
        if all(data.keys[i] in empty for i in items):
            yield "class without an object", c, "every mask of it is empty"


def _alike(data: CoSegData, looks: Mapping[int, str], training: CoSegData | None) -> Iterator[Row]:
    keys, hashes = [data.keys[i] for i in looks], list(looks.values())
    for a, b in near_pairs(hashes, hashes):
        if a < b:
            yield "duplicate", keys[b], f"of {keys[a]}"
    if training is not None:
        for a, b in near_pairs(hashes, training.hashes()):
            yield "in training set", keys[a], f"as {training.keys[b]} of {training.name}"


def _counts(
    data: CoSegData, groups: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, str, int, int | None]]:
    yield "groups", data.layout, len(groups), None
    yield "images", "", len(data), None
    for name, (own, images) in _IMAGES.items():
        if isinstance(data, FolderData) and groups.keys() >= set(own):
            yield "images", name, sum(len(groups[c]) for c in own), images
    for c, items in groups.items():
        yield "group", c, len(items), None
