"""Sets by name: known ones under `LCCO_DATA`, and folders in a known layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lcco.common import LCCoError, Missing, place
from lcco.data.coco import COCO_MIN_AREA, COCO_MIN_IMAGES, COCOData
from lcco.data.overlap import overlap
from lcco.data.pictures import same_name
from lcco.data.sets import (
    LAYOUTS,
    SIDES,
    CoSegData,
    FolderData,
    VOCData,
    folders_in,
    joined,
    read_lines,
)

MSRC7 = ("bird", "car", "cat", "cow", "dog", "plane", "sheep")
ICOSEG8 = (
    "bear2", "brownbear", "cheetah", "elephant", "helicopter", "hotballoon", "panda1", "panda2",
)  # fmt: skip
INTERNET3 = ("airplane", "car", "horse")
_VOC_HOMES = ("VOCdevkit/VOC2012", "VOC2012", ".")
_COCO_HOMES = ("coco", "COCO", "coco2017", "COCO2017", ".")
_VOC_SETS = {  # name → where it may be, its lists
    "voc_train": (_VOC_HOMES, ("train",)),
    "voc_val": (_VOC_HOMES, ("val",)),
    "voc_trainval": (_VOC_HOMES, ("train", "val")),
    "voc_trainaug": (_VOC_HOMES, ("train_aug",)),
    "coco_voc20": (("COCO_VOC20",), ("train",)),
    "voc_more": (("VOC_MORE",), ("train",)),
}
_FOLDER_SETS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {  # …, its groups
    "msrc7": (("MSRC7", "MSRC"), MSRC7),
    "msrc14": (("MSRC",), None),
    "icoseg8": (("iCoseg8", "iCoseg"), ICOSEG8),
    "icoseg38": (("iCoseg",), None),
    "internet300": (
        ("Internet_Datasets300", "Internet300", "Internet", "Internet/Data"), INTERNET3,
    ),
    "pascal1037": (("PASCAL_VOC",), None),
    "pascal_fold_train": (("PASCAL_VOC",), None),
    "pascal_fold_test": (("PASCAL_VOC",), None),
}
_DRAWN = tuple(f"glyphworld_{f}" for f in ("pretrain", "train", "holdout", "test", "choice"))


def known_sets() -> tuple[str, ...]:
    """The names that `load_data` knows beside folders."""
    return (*_VOC_SETS, *_FOLDER_SETS, "coco_seg", *_DRAWN)


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
    words = [names] if isinstance(names, str) else list(names)
    if not words or not all(word.strip() for word in words):
        known = ", ".join(known_sets())
        raise LCCoError(f"no data set is named; give a folder, or one of {known}")
    parts = [_load(word, (counts or {}).get(word)) for word in words]
    data = parts[0] if len(parts) == 1 else joined(parts, "+".join(words))
    others = [_load(word, (counts or {}).get(word)) for word in without]
    if seen := {i for other in others for i, _ in overlap(data, other)}:
        kept = [i for i in range(len(data)) if i not in seen]
        data = data.subset(kept, f"{data.name} without {', '.join(without)}")
    return data


def _load(name: str, count: int | None) -> CoSegData:
    base = place("data")
    if name in _DRAWN:
        from lcco.data.glyphworld import glyphworld

        return glyphworld(name.removeprefix("glyphworld_"), count)
    if count is not None:
        raise LCCoError(f"counts has `{name}`; only drawn sets have a count: {', '.join(_DRAWN)}")
    if name in _VOC_SETS:
        homes, lists = _VOC_SETS[name]
        home = _home(name, homes, ("voc",))
        words = [_augmented(home) if word == "train_aug" else word for word in lists]
        partial = "coco_" if name == "voc_more" else None  # these have one vehicle labelled each
        return VOCData(name, home, words, partial=partial).complete()
    if name == "coco_seg":
        home = _home(name, _COCO_HOMES, ("coco",))
        rule = {"min_area": COCO_MIN_AREA, "min_images": COCO_MIN_IMAGES}
        return COCOData(name, home, **rule).complete()
    if name in _FOLDER_SETS:
        homes, classes = _FOLDER_SETS[name]
        home = _home(name, homes, ("folders", "rubinstein", "icoseg"))
        data = FolderData(name, home, recognise(home), classes).complete()
        if name.startswith("pascal_fold"):
            return _fold(data, home / f"{name.removeprefix('pascal_')}.txt", name)
        return data
    for path in (Path(name).expanduser(), base / name):
        if path.is_dir():
            return open_folder(path).complete()
    known = ", ".join(known_sets())
    raise LCCoError(
        f"data `{name}` is neither a folder (also not {base / name}) nor a known set: {known}"
    )


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


def _home(name: str, places: Sequence[str], layouts: Sequence[str]) -> Path:
    base = place("data")
    for word in places:
        if _layout(base / word) in layouts:
            return base / word
    looked = ", ".join(str(base / word) for word in places if word != ".")
    raise Missing("data", name, f"looked for {looked}; set LCCO_DATA to the folder that holds it")


def _augmented(root: Path) -> str:
    words = ("train_aug", "trainaug")
    lists = root / "ImageSets" / "Segmentation"
    return next((w for w in words if (lists / f"{w}.txt").is_file()), words[0])


def _fold(data: CoSegData, file: Path, name: str) -> CoSegData:
    if not file.is_file():
        raise LCCoError(f"data `{name}`: no list {file} (one `class/stem` a line)")
    number = {key: i for i, key in enumerate(data.keys)}
    keys = [same_name(line.strip()) for line in read_lines(file)]
    for key in keys:
        if key not in number:
            raise LCCoError(f"{file}: `{key}` has no image in {file.parent}")
    return data.subset([number[key] for key in keys], name)


def _layout(path: Path) -> str | None:
    if not path.is_dir():
        return None
    if (path / "JPEGImages").is_dir() and any(path.glob("SegmentationClass*")):
        return "voc"
    if any(path.glob("annotations/instances_*.json")):
        return "coco"
    for layout, sides in SIDES.items():
        if all((path / side).is_dir() for side in sides):
            return layout
    return "rubinstein" if any((d / "GroundTruth").is_dir() for d in folders_in(path)) else None


def recognise(path: str | Path) -> str:
    """The layout of a folder: one of `LAYOUTS`. Raises: LCCoError listing the known layouts."""
    path = Path(path)
    if not path.is_dir():
        raise LCCoError(f"{path}: no such folder")
    if layout := _layout(path):
        return layout
    inner = next((p for p in (path / "VOCdevkit/VOC2012", path / "VOC2012") if _layout(p)), None)
    known = "known: " + "; ".join(f"{k}: {v}" for k, v in LAYOUTS.items())
    raise LCCoError(f"{path}: unknown layout; {f'did you mean {inner}?' if inner else known}")
