"""Sets by name: known ones under `LCCO_DATA`, and folders in a known layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lcco.common import LCCoError, Missing, place
from lcco.data import sets
from lcco.data.coco import COCO_MIN_AREA, COCO_MIN_IMAGES, COCOData
from lcco.data.overlap import overlap
from lcco.data.pictures import bad, same_name
from lcco.data.sets import CoSegData, FolderData, VOCData

MSRC7 = ("bird", "car", "cat", "cow", "dog", "plane", "sheep")
ICOSEG8 = ("bear2", "brownbear", "cheetah", "elephant", "helicopter", "hotballoon", "panda1",
           "panda2")  # fmt: skip
INTERNET3 = ("airplane", "car", "horse")
_VOC_HOMES = ("VOCdevkit/VOC2012", "VOC2012", ".")
_COCO_HOMES = ("coco", "COCO", "coco2017", "COCO2017", ".")
_INTERNET_HOMES = ("Internet_Datasets300", "Internet300", "Internet", "Internet/Data")
_FOLDERS = ("folders", "rubinstein", "icoseg")
# name → where it may be, its layouts, and its lists (VOC) or groups
_SETS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...] | None]] = {
    "voc_train": (_VOC_HOMES, ("voc",), ("train",)),
    "voc_val": (_VOC_HOMES, ("voc",), ("val",)),
    "voc_trainval": (_VOC_HOMES, ("voc",), ("train", "val")),
    "voc_trainaug": (_VOC_HOMES, ("voc",), ("trainaug",)),
    "coco_voc20": (("COCO_VOC20",), ("voc",), ("train",)),
    "voc_more": (("VOC_MORE",), ("voc",), ("train",)),
    "msrc7": (("MSRC7", "MSRC"), _FOLDERS, MSRC7),
    "msrc14": (("MSRC",), _FOLDERS, None),
    "icoseg8": (("iCoseg8", "iCoseg"), _FOLDERS, ICOSEG8),
    "icoseg38": (("iCoseg",), _FOLDERS, None),
    "internet300": (_INTERNET_HOMES, _FOLDERS, INTERNET3),
    "pascal1037": (("PASCAL_VOC",), _FOLDERS, None),
    "pascal_fold_train": (("PASCAL_VOC",), _FOLDERS, None),
    "pascal_fold_test": (("PASCAL_VOC",), _FOLDERS, None),
    "coco_seg": (_COCO_HOMES, ("coco",), None),
}
_DRAWN = tuple(f"glyphworld_{f}" for f in ("pretrain", "train", "holdout", "test", "choice"))


def known_sets() -> tuple[str, ...]:
    """The names that `load_data` knows beside folders."""
    return (*_SETS, *_DRAWN)


def load_data(
    names: str | Sequence[str], *, counts: Mapping[str, int] | None = None,
    without: Sequence[str] = (),
) -> CoSegData:  # fmt: skip
    """The set of a known name (`known_sets`) under `LCCO_DATA`, or of a folder in a known layout.

    names: several are joined; a class that several have becomes one group. counts: how many
    pictures a drawn set has (of each class, for the test fold). without: sets whose pictures are
    left out, by content or look.
    Raises: Missing for a known set that is not there. LCCoError for anything else.
    """
    words, counts = [names] if isinstance(names, str) else list(names), counts or {}
    if not words or not all(word.strip() for word in words):
        known = ", ".join(known_sets())
        raise LCCoError(f"no data set is named; give a folder, or one of {known}")
    parts = [_load(word, counts.get(word)) for word in words]
    data = parts[0] if len(parts) == 1 else sets.joined(parts, "+".join(words))
    others = [_load(word, counts.get(word)) for word in without]
    if seen := {i for other in others for i, _ in overlap(data, other)}:
        kept = [i for i in range(len(data)) if i not in seen]
        data = data.subset(kept, f"{data.name} without {', '.join(without)}")
    return data


def _load(name: str, count: int | None) -> CoSegData:
    if name in _DRAWN:
        from lcco.data.glyphworld import glyphworld

        return glyphworld(name.removeprefix("glyphworld_"), count)
    if count is not None:
        raise LCCoError(f"counts has `{name}`; only drawn sets have a count: {', '.join(_DRAWN)}")
    if name in _SETS:
        data = _known(name).complete()
        return _fold(data, name) if name.startswith("pascal_fold") else data
    folders = Path(name).expanduser(), place("data") / name
    for path in folders:
        if path.is_dir():
            return open_folder(path).complete()
    known = ", ".join(known_sets())
    what = f"data `{name}` is neither a folder (also not {folders[1]}) nor a known set"
    raise LCCoError(f"{what}: {known}")


def _known(name: str) -> CoSegData:
    base, (places, layouts, own) = place("data"), _SETS[name]
    home = next((base / p for p in places if _layout(base / p) in layouts), None)
    if home is None:
        looked = ", ".join(str(base / word) for word in places if word != ".")
        how = f"looked for {looked}; set LCCO_DATA to the folder that holds it"
        raise Missing("data", name, how)
    if layouts == ("voc",):
        if (home / "ImageSets/Segmentation/train_aug.txt").is_file() and name == "voc_trainaug":
            own = ("train_aug",)
        partial = "coco_" if name == "voc_more" else None  # these have one vehicle labelled each
        return VOCData(name, home, own, partial=partial)
    if layouts == ("coco",):
        return COCOData(name, home, min_area=COCO_MIN_AREA, min_images=COCO_MIN_IMAGES)
    return FolderData(name, home, recognise(home), own)


def _fold(data: CoSegData, name: str) -> CoSegData:
    """The pictures of PASCAL1037 that a list names, one `class/stem` a line."""
    file = place("data") / "PASCAL_VOC" / f"{name.removeprefix('pascal_')}.txt"
    if not file.is_file():
        raise LCCoError(f"data `{name}`: no list {file} (one `class/stem` a line)")
    number = {key: i for i, key in enumerate(data.keys)}
    keys = [same_name(line.strip()) for line in sets.read_lines(file)]
    if strange := next((key for key in keys if key not in number), None):
        raise bad(file, f"`{strange}` has no image in {file.parent}", "take it out of the list")
    return data.subset([number[key] for key in keys], name)


def open_folder(path: Path, *, min_images: int = 1, min_area: float = 0) -> CoSegData:
    """A folder of any layout, with every group and list, not yet checked to be complete."""
    layout, name = recognise(path), path.resolve().name
    if layout == "coco":
        return COCOData(name, path, min_images=min_images, min_area=min_area)
    if layout != "voc":
        return FolderData(name, path, layout)
    lists = {f.stem for f in (path / "ImageSets" / "Segmentation").glob("*.txt")}
    words = [w for w in ("train", "val") if w in lists] or sorted(lists - {"trainval"})
    if not words:
        raise LCCoError(f"{path}: no list in ImageSets/Segmentation")
    return VOCData(name, path, words)


def _layout(path: Path) -> str | None:
    if (path / "JPEGImages").is_dir() and any(path.glob("SegmentationClass*")):
        return "voc"
    if any(path.glob("annotations/instances_*.json")):
        return "coco"
    for layout, sides in sets.SIDES.items():
        if all((path / side).is_dir() for side in sides):
            return layout
    truths = [d / "GroundTruth" for d in sets.folders_in(path)]
    return "rubinstein" if any(d.is_dir() for d in truths) else None


def recognise(path: str | Path) -> str:
    """The layout of a folder: one of `LAYOUTS`. Raises: LCCoError listing the known layouts."""
    path = Path(path)
    if not path.is_dir():
        raise LCCoError(f"{path}: no such folder")
    if layout := _layout(path):
        return layout
    inner = next((p for p in (path / "VOCdevkit/VOC2012", path / "VOC2012") if _layout(p)), None)
    known = "known: " + "; ".join(f"{k}: {v}" for k, v in sets.LAYOUTS.items())
    raise LCCoError(f"{path}: unknown layout; {f'did you mean {inner}?' if inner else known}")
