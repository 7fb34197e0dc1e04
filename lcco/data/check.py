"""What a folder of pictures and masks holds, and what is wrong with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lcco.common import VOID, LCCoError, few, file_digest, progress
from lcco.data.coco import COCOData
from lcco.data.load import ICOSEG8, INTERNET3, MSRC7, open_folder
from lcco.data.overlap import near_pairs, picture_hash
from lcco.data.pictures import LOSSY, read_labels, read_mask, read_picture
from lcco.data.sets import (
    BARE_CLASSES,
    BARE_MASKS,
    LAYOUTS,
    THREADS,
    VOC_CLASSES,
    CoSegData,
    VOCData,
    class_areas,
)

if TYPE_CHECKING:
    import pandas as pd

_VOC_LISTS = {"train": 1464, "val": 1449, "train_aug": 10_582, "trainaug": 10_582}
_Found = list[tuple[str, str]]  # item, detail


@dataclass
class _Seen:
    """One item decoded once: what the check needs of it."""

    content: str = ""
    hash: str = ""
    kind: str = ""  # of error
    detail: str = ""
    empty: bool = False
    grey: str = ""  # how the mask is not binary
    labels: dict[str, int] | None = None  # VOC: pixels of each value


class _Table:
    """Rows of the check, in the order in which they are added."""

    columns = ("status", "check", "item", "found", "expected", "detail")

    def __init__(self, limit: int) -> None:
        self.rows: list[tuple[str, ...]] = []
        self.limit = limit

    def count(self, what: str, item: str, found: int, expected: int | None, detail="") -> None:
        """A number, beside the one that is expected if there is one."""
        status = "ok" if expected in (None, found) else "note"
        number = "" if expected is None else str(expected)
        self.rows.append((status, what, item, str(found), number, detail if number else ""))

    def report(self, status: str, what: str, found: _Found) -> None:
        """How many items of a kind there are, and the first of them."""
        self.rows.append((status if found else "ok", what, "", str(len(found)), "0", ""))
        self.rows += [(status, what, item, "", "", why) for item, why in found[: self.limit]]
        if len(found) > self.limit:
            more = f"… {len(found) - self.limit} more"
            self.rows.append((status, what, more, "", "", ""))


def check(
    path: str | Path, training: CoSegData | None = None, *, min_images: int = 1,
    min_area: float = 0, limit: int = 20,
) -> pd.DataFrame:  # fmt: skip
    """What a folder holds and what is wrong with it.

    Columns: status, check, item, found, expected, detail. status: ok, note (an empty or soft mask,
    a duplicate, a count that differs from the literature, what the reader leaves out) or error (a
    missing pair, a mis-sized or unreadable mask, a corrupt file, a picture that is in `training`
    too); `.attrs["ok"]` is False with any error. At most `limit` items of a kind are listed.
    min_images, min_area: COCO's thresholds.
    Raises: LCCoError for a folder that is in no layout, or without anything to read.
    """
    import pandas as pd

    data = open_folder(Path(path), min_images=min_images, min_area=min_area)
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda i: _look(data, i), range(len(data)))
        seen = list(progress(found, f"checking {data.name}", len(data)))
    if isinstance(data, VOCData):
        data.areas = [class_areas(s.labels or {}) for s in seen]
    table = _Table(limit)
    _count(table, data, seen)
    _faults(table, data, seen)
    _duplicates(table, data, seen, training)
    out = pd.DataFrame(table.rows, columns=_Table.columns)
    ok = bool((out["status"] != "error").all())
    out.attrs.update(ok=ok, layout=data.layout, path=str(path))
    return out


# ---------------------------------------------------------------------------------------- an item
def _look(data: CoSegData, i: int) -> _Seen:
    """Decode item i's picture and mask once; never raises for a bad file."""
    seen, path = _Seen(), data.path(i)
    try:
        seen.kind = "corrupt image" if path.is_file() else "missing image"
        picture = read_picture(path)
        seen.content, seen.hash = file_digest(path, 16), picture_hash(picture)
        seen.kind = "missing mask"
        truth = data.truth_path(i)
        if not truth.is_file():
            raise LCCoError(f"no {truth}")
        seen.kind = "unreadable mask"
        mask = _truth(data, i, truth)
        seen.kind = "size mismatch"
        if mask.shape != picture.size[::-1]:
            sizes = f"{mask.shape[1]}×{mask.shape[0]}, image {picture.width}×{picture.height}"
            raise LCCoError(f"{truth}: mask {sizes}")
    except (OSError, LCCoError) as error:
        seen.detail = str(error)
        if seen.kind == "unreadable mask" and "corrupt" in seen.detail:
            seen.kind = "corrupt mask"
        elif seen.kind == "unreadable mask" and "its annotations" in seen.detail:
            seen.kind = "size mismatch"
        return seen
    seen.kind = ""
    _judge(data, truth, mask, seen)
    return seen


def _truth(data: CoSegData, i: int, truth: Path) -> np.ndarray:
    if isinstance(data, COCOData):
        return data.mask(i, sorted(data.labels_of(i)))
    return read_labels(truth) if isinstance(data, VOCData) else read_mask(truth)


def _judge(data: CoSegData, truth: Path, mask: np.ndarray, seen: _Seen) -> None:
    """Whether a mask that could be read says something."""
    counts = np.bincount(mask.ravel(), minlength=256)
    if isinstance(data, VOCData):
        last = len(VOC_CLASSES)
        seen.labels = {str(k): int(counts[k]) for k in np.flatnonzero(counts)}
        seen.empty = not counts[1 : last + 1].any()
        if counts[last + 1 : VOID].any():
            seen.kind = "unreadable mask"
            seen.detail = f"{truth}: values beyond {last} that are not {VOID}"
        return
    if isinstance(data, COCOData):
        seen.empty = not counts[1]
        return
    seen.empty = not counts[128:].any()
    lossy = truth.suffix.lower() in LOSSY
    soft = (counts[32:224] if lossy else counts[1:255]).sum() / mask.size
    if seen.empty and counts[1:128].sum() > 0.001 * mask.size:
        seen.kind = "unreadable mask"
        seen.detail = f"{truth}: no value above 127 but {mask.max()}; save it as 0 and 255"
    elif soft > (0.02 if lossy else 0):
        seen.grey = f"{soft:.1%} of pixels are neither 0 nor 255; read as object above 127"


# ---------------------------------------------------------------------------------------- the rows
def _literature(data: CoSegData) -> tuple[str, int | None, int | None, int | None, Sequence[str]]:
    """The literature's set that this is a copy of: name, groups, images, images a group, groups."""
    groups = set(data.groups)
    if data.layout == "coco" and len(groups) > 70:
        return "COCO-SEG", 78, 107_132, None, sorted(groups)
    if data.layout in ("voc", "coco"):
        return "", None, None, None, ()
    if groups >= set(MSRC7):
        return "MSRC7", 7, 70, 10, MSRC7
    if groups == set(INTERNET3):
        return "Internet", 3, 300, 100, INTERNET3
    if groups == set(VOC_CLASSES):
        return "PASCAL1037", 20, 1037, None, VOC_CLASSES
    if groups == set(ICOSEG8):
        return "iCoseg8", 8, None, None, ICOSEG8
    if data.layout == "icoseg" or groups > set(ICOSEG8):
        return "iCoseg", 38, 643, None, sorted(groups)
    return "", None, None, None, ()


def _count(table: _Table, data: CoSegData, seen: Sequence[_Seen]) -> None:
    """Groups, images, masks and lists, beside the literature's counts."""
    name, groups, images, each, own = _literature(data)
    about = f"the literature's {name}"
    whole = set(own) == set(data.groups)
    masks = sum(s.kind not in ("missing mask", "corrupt mask") for s in seen)
    table.rows.append(("ok", "layout", data.name, data.layout, "", LAYOUTS[data.layout]))
    table.count("groups", "", len(data.groups), groups if whole else None, about)
    table.count("images", "", len(data), images if whole else None, about)
    table.count("masks", "", masks, len(data), "" if masks == len(data) else "fewer than images")
    if name and not whole:
        table.count("images", name, sum(len(data.groups[c]) for c in own), images, about)
    for word, items in getattr(data, "lists", {}).items():
        table.count("images", word, len(items), _VOC_LISTS.get(word), "the literature's VOC 2012")
    for c, items in data.groups.items():
        table.count("group", c, len(items), each if c in own else None)


def _faults(table: _Table, data: CoSegData, seen: Sequence[_Seen]) -> None:
    def items(kind: str) -> _Found:
        return [(data.keys[i], s.detail) for i, s in enumerate(seen) if s.kind == kind]

    left_out = dict(data.left_out)
    bare = [(Path(file).stem, f"{file} has no image") for file in left_out.pop(BARE_MASKS, [])]
    table.report("error", "missing image", items("missing image") + bare)
    for what in ("missing mask", "size mismatch", "corrupt image", "corrupt mask"):
        table.report("error", what, items(what))
    table.report("error", "unreadable mask", items("unreadable mask"))
    for what in sorted({fault[0] for fault in data.faults}):
        table.report("error", what, [(item, why) for w, item, why in data.faults if w == what])
    empty = [i for i, s in enumerate(seen) if s.empty]
    if len(empty) > len(data) / 2:
        told = f"{len(empty)} of {len(data)} masks have no object pixel"
        table.report("error", "most masks empty", [(data.keys[empty[0]], told)])
    bare = [(Path(folder).name, folder) for folder in left_out.pop(BARE_CLASSES, [])]
    table.report("error", "class without a picture", bare)
    no_object = [c for c, own in data.groups.items() if all(seen[i].empty for i in own)]
    told = [(c, "every mask of it is empty") for c in no_object]
    table.report("error", "class without an object", told)
    if isinstance(data, COCOData):
        left_out.pop(data.UNUSED, None)
        for status, what in (("error", "entry left out"), ("note", "odd entry")):
            found = [(item, why) for word, item, why in data.problems if word == status]
            table.report(status, what, found)
    files = [(name, why) for why, names in left_out.items() for name in names]
    table.report("note", "file left out", files)
    table.report("note", "empty mask", [(data.keys[i], "no object pixel") for i in empty])
    grey = [(data.keys[i], s.grey) for i, s in enumerate(seen) if s.grey]
    table.report("note", "non-binary mask", grey)


def _duplicates(
    table: _Table, data: CoSegData, seen: Sequence[_Seen], training: CoSegData | None
) -> None:
    def several(items: Sequence[int]) -> tuple[str, str]:
        first, *others = (data.keys[i] for i in items)
        return first, f"= {few(others)}"

    same: dict[str, list[int]] = defaultdict(list)
    for i, s in enumerate(seen):
        if s.content:
            same[s.content].append(i)
    twice = [several(items) for items in same.values() if len(items) > 1]
    table.report("note", "duplicate file", twice)
    one = [items[0] for items in same.values() if seen[items[0]].hash]
    hashes = [seen[i].hash for i in one]
    first: dict[int, int] = {}  # a near duplicate → the first of its kind
    for a, b in near_pairs(hashes, hashes):
        first.setdefault(one[b], first.get(one[a], one[a]))
    near: dict[int, list[int]] = defaultdict(list)
    for i, leader in first.items():
        near[leader].append(i)
    alike = [several(sorted(items)) for items in near.values() if len(items) > 1]
    table.report("note", "near duplicate", alike)
    if training is not None:
        hashed = [i for i, s in enumerate(seen) if s.hash]
        pairs = dict(near_pairs([seen[i].hash for i in hashed], training.hashes()))
        common = [(data.keys[hashed[a]], f"is {training.keys[b]} there") for a, b in pairs.items()]
        table.report("error", f"in training set {training.name}", common)
