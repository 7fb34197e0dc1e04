"""What a folder of pictures and masks holds, and what is wrong with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcco.common import VOID, LCCoError, few, file_digest, progress
from lcco.data import sets
from lcco.data.coco import COCOData
from lcco.data.load import ICOSEG8, INTERNET3, MSRC7, open_folder
from lcco.data.overlap import near_pairs, picture_hash
from lcco.data.pictures import bad, is_lossy, read_picture
from lcco.data.sets import BARE_CLASSES, BARE_MASKS, VOC_CLASSES, CoSegData, FolderData, VOCData

if TYPE_CHECKING:
    import pandas as pd

_VOC_LISTS = {"train": 1464, "val": 1449, "train_aug": 10_582, "trainaug": 10_582}
_LITERATURE = (  # set, its groups, their number, images, images a group
    ("MSRC7", MSRC7, 7, 70, 10), ("Internet", INTERNET3, 3, 300, 100),
    ("PASCAL1037", VOC_CLASSES, 20, 1037, None), ("iCoseg8", ICOSEG8, 8, None, None),
)  # fmt: skip
_ERRORS = (
    "missing image", "missing mask", "size mismatch", "corrupt image", "unreadable mask",
    "two of one name", "id twice", "most masks empty", "class without a picture",
    "class without an object", "entry left out",
)  # fmt: skip
_NOTES = ("odd entry", "file left out", "empty mask", "non-binary mask")


@dataclass
class _Seen:
    """One item decoded once: what the check needs of it."""

    kind: str  # of error
    detail: str = ""
    content: str = ""
    hash: str = ""
    empty: bool = False
    grey: str = ""  # how the mask is not binary
    areas: dict[str, float] = field(default_factory=dict)  # VOC: of each class


class _Table:
    """Rows of the check, in the order in which they are added."""

    columns = ("status", "check", "item", "found", "expected", "detail")

    def __init__(self, limit: int) -> None:
        self.rows: list[tuple[str, ...]] = []
        self.limit = limit

    def count(self, what: str, item: str, found: int, expected: int | None, detail="") -> None:
        """A number, beside the one that is expected if there is one."""
        if expected is None:
            self.rows.append(("ok", what, item, str(found), "", ""))
        else:
            status = "ok" if found == expected else "note"
            self.rows.append((status, what, item, str(found), str(expected), detail))

    def report(self, status: str, what: str, items: Iterable[tuple[str, str]]) -> None:
        """How many items of a kind there are, and the first of them."""
        found = list(items)
        self.rows.append((status if found else "ok", what, "", str(len(found)), "0", ""))
        self.rows += [(status, what, item, "", "", why) for item, why in found[: self.limit]]
        if len(found) > self.limit:
            self.rows.append((status, what, f"… {len(found) - self.limit} more", "", "", ""))


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
    with ThreadPoolExecutor(sets.THREADS) as pool:
        found = pool.map(lambda i: _look(data, i), range(len(data)))
        seen = list(progress(found, f"checking {data.name}", len(data)))
    data.facts["areas"] = [s.areas for s in seen]
    table = _Table(limit)
    _count(table, data, seen)
    _faults(table, data, seen)
    _duplicates(table, data, seen)
    if training is not None:
        hashed = [i for i, s in enumerate(seen) if s.hash]
        pairs = dict(near_pairs([seen[i].hash for i in hashed], training.hashes()))
        common = [(data.keys[hashed[a]], f"is {training.keys[b]} there") for a, b in pairs.items()]
        table.report("error", f"in training set {training.name}", common)
    out = pd.DataFrame(table.rows, columns=_Table.columns)
    ok = bool((out["status"] != "error").all())
    out.attrs.update(ok=ok, layout=data.layout, path=str(path))
    return out


def _look(data: CoSegData, i: int) -> _Seen:
    """Decode item i's picture and mask once; never raises for a bad file."""
    path, truth = data.path(i), data.truth_path(i)
    seen = _Seen("corrupt image" if path.is_file() else "missing image")
    try:
        picture = read_picture(path)
        seen.content, seen.hash = file_digest(path, 16), picture_hash(picture)
        seen.kind = "unreadable mask" if truth.is_file() else "missing mask"
        stored = data.stored_mask(i)
        seen.kind = "size mismatch"
        data.sized(i, stored)
        seen.kind = "unreadable mask"
        if isinstance(data, VOCData):
            seen.areas, last = sets.class_areas(stored), len(VOC_CLASSES)
            seen.empty = not seen.areas
            if ((stored > last) & (stored < VOID)).any():
                raise bad(truth, f"values beyond {last} that are not {VOID}", "save it again")
        else:
            seen.empty = not data.mask(i, data.classes_of(i)).any()
        if isinstance(data, FolderData):
            low, high, share = (32, 224, 0.02) if is_lossy(truth) else (1, 255, 0)
            soft = ((stored >= low) & (stored < high)).mean()
            told = f"{soft:.1%} of pixels are neither 0 nor 255; read as object above 127"
            seen.grey = told if soft > share else ""
        seen.kind = ""
    except (OSError, LCCoError) as error:
        seen.detail = str(error)
    return seen


# ---------------------------------------------------------------------------------------- the rows
def _literature(data: CoSegData) -> tuple[str, Sequence[str], int | None, int | None, int | None]:
    """The literature's set that this is a copy of: as a row of `_LITERATURE`."""
    groups = sorted(data.groups)
    if data.layout == "coco" and len(groups) > 70:
        return "COCO-SEG", groups, 78, 107_132, None
    if data.layout not in ("voc", "coco"):
        for row in _LITERATURE:
            if set(groups) == set(row[1]) or (row[0] == "MSRC7" and set(groups) > set(MSRC7)):
                return row
        if data.layout == "icoseg" or set(groups) > set(ICOSEG8):
            return "iCoseg", groups, 38, 643, None
    return "", (), None, None, None


def _count(table: _Table, data: CoSegData, seen: Sequence[_Seen]) -> None:
    """Groups, images, masks and lists, beside the literature's counts."""
    name, own, groups, images, each = _literature(data)
    about, whole = f"the literature's {name}", set(own) == set(data.groups)
    masks = sum(s.kind != "missing mask" for s in seen)
    table.rows.append(("ok", "layout", data.name, data.layout, "", sets.LAYOUTS[data.layout]))
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
    """What is wrong: with files, names, classes; then what is odd."""
    left_out = dict(data.left_out)
    found = [(s.kind, data.keys[i], s.detail) for i, s in enumerate(seen)] + data.faults
    bare = left_out.pop(BARE_MASKS, [])
    found += [("missing image", Path(file).stem, f"{file} has no image") for file in bare]
    bare = left_out.pop(BARE_CLASSES, [])
    found += [("class without a picture", Path(folder).name, folder) for folder in bare]
    empty = [i for i, s in enumerate(seen) if s.empty]
    if len(empty) > len(data) / 2:
        told = f"{len(empty)} of {len(data)} masks have no object pixel"
        found.append(("most masks empty", data.keys[empty[0]], told))
    no_object = [c for c, own in data.groups.items() if all(seen[i].empty for i in own)]
    found += [("class without an object", c, "every mask of it is empty") for c in no_object]
    if isinstance(data, COCOData):
        left_out.pop(data.UNUSED, None)
        names = {"error": "entry left out", "note": "odd entry"}
        found += [(names[status], item, why) for status, item, why in data.problems]
    found += [("file left out", name, why) for why, names in left_out.items() for name in names]
    found += [("empty mask", data.keys[i], "no object pixel") for i in empty]
    found += [("non-binary mask", data.keys[i], s.grey) for i, s in enumerate(seen) if s.grey]
    for what in _ERRORS + _NOTES:
        status = "error" if what in _ERRORS else "note"
        table.report(status, what, [(item, why) for kind, item, why in found if kind == what])


def _duplicates(table: _Table, data: CoSegData, seen: Sequence[_Seen]) -> None:
    def report(what: str, leader: dict[int, Any]) -> None:
        """Items that have one leader are of one kind."""
        kinds: dict[Any, list[str]] = defaultdict(list)
        for i in sorted(leader):
            kinds[leader[i]].append(data.keys[i])
        several = [keys for keys in kinds.values() if len(keys) > 1]
        table.report("note", what, [(first, f"= {few(others)}") for first, *others in several])

    same = {i: s.content for i, s in enumerate(seen) if s.content}
    report("duplicate file", same)
    one = sorted({content: i for i, content in reversed(same.items())}.values())
    hashes = [seen[i].hash for i in one]
    near: dict[int, int] = {}  # a near duplicate → the first of its kind
    for a, b in near_pairs(hashes, hashes):
        near.setdefault(one[b], near.get(one[a], one[a]))
    report("near duplicate", near)
