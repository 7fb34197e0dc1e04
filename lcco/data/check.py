"""What a folder of pictures and masks holds, and what is wrong with it."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from lcco.common import LCCoError
from lcco.data import pictures
from lcco.data.load import open_folder
from lcco.data.overlap import near_pairs, picture_hash
from lcco.data.sets import VOC_CLASSES, CoSegData, VOCData, threaded

_ERRORS = ("missing image", "missing mask", "bad image", "bad mask", "most masks empty",
           "class without a picture", "entry left out", "in training set")  # fmt: skip
_NOTES = ("duplicate", "empty mask", "file left out", "image left out")


def check(path: str | Path, training: CoSegData | None = None, *, limit: int = 20) -> pd.DataFrame:
    """What a folder holds and what is wrong with it.

    Columns: status, check, item, found (how many of the kind), detail. status: ok, note (an empty
    mask, a duplicate, what the reader leaves out) or error (a missing pair, an unusable picture or
    mask, a picture that is in `training` too), with which `.attrs["ok"]` is False. limit: items
    listed of a kind. Raises: LCCoError for a folder that is no set at all.
    """
    data = open_folder(Path(path))
    looks: dict[int, str] = {}
    items = range(len(data))
    seen = threaded(lambda i: list(_look(data, i, looks)), items, f"checking {path}")
    found = [row for rows in seen for row in rows]
    groups: dict[str, Sequence[int]] = {f"all ({data.layout})": items}
    with contextlib.suppress(LCCoError, OSError):  # VOC has no groups while a mask is bad
        groups |= data.groups
    empty = {item for kind, item, _ in found if kind == "empty mask"}
    for c, items in groups.items():
        if (bare := sum(data.keys[i] in empty for i in items)) > len(items) / 2:
            found.append(("most masks empty", c, f"{bare} of {len(items)} have no object pixel"))
    found += data.left_out
    keys, hashes = [data.keys[i] for i in sorted(looks)], [looks[i] for i in sorted(looks)]
    first = {b: a for a, b in reversed(near_pairs(hashes, hashes)) if a < b}
    found += [("duplicate", keys[b], f"of {keys[a]}") for b, a in sorted(first.items())]
    for a, b in dict(near_pairs(hashes, training.hashes())).items() if training else ():
        found.append(("in training set", keys[a], f"as {training.keys[b]} of {training.name}"))
    rows = [("ok", "images", c, len(items), "") for c, items in groups.items()]
    for kind in _ERRORS + _NOTES:
        status = "error" if kind in _ERRORS else "note"
        own = [(item, detail) for other, item, detail in found if other == kind]
        rows += [(status, kind, item, len(own), detail) for item, detail in own[:limit]]
    out = pd.DataFrame(rows, columns=["status", "check", "item", "found", "detail"])
    out.attrs.update(ok="error" not in set(out["status"]), layout=data.layout, path=str(path))
    return out


def _look(data: CoSegData, i: int, looks: dict[int, str]) -> Iterator[tuple[str, str, str]]:
    """What is wrong with item i (check, item, detail); its picture's hash is put into `looks`."""
    key, (path, truth), side = data.keys[i], data.files[i], "image"
    try:
        looks[i] = picture_hash(pictures.read_picture(path))
        path, side = truth, "mask"
        mask = data.mask(i, VOC_CLASSES if isinstance(data, VOCData) else data.classes_of(i))
        if not (mask == 1).any():
            yield "empty mask", key, "no object pixel"
    except LCCoError as error:
        yield f"{'bad' if path.is_file() else 'missing'} {side}", key, str(error)
