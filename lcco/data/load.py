"""Sets by name: known ones under `LCCO_DATA`, and folders in a known layout."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lcco.common import LCCoError, Missing, place
from lcco.data.coco import COCOData
from lcco.data.pictures import bad
from lcco.data.sets import SIDES, CoSegData, FolderData, View, VOCData, read_lines

MSRC7 = ("bird", "car", "cat", "cow", "dog", "plane", "sheep")
ICOSEG8 = ("bear2", "brownbear", "cheetah", "elephant", "helicopter", "hotballoon", "panda1",
           "panda2")  # fmt: skip
_VOC = ["VOCdevkit/VOC2012", "VOC2012"]
_INTERNET = ["Internet_Datasets300", "Internet300", "Internet", "Internet/Data"]
# name → the folders where it may be, and its lists (VOC) or groups if not all
_SETS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    **{f"voc_{fold}": (_VOC, [fold]) for fold in ("train", "val", "trainaug")},
    "voc_trainval": (_VOC, ["train", "val"]),
    "coco_voc20": (["COCO_VOC20"], ["train"]),
    "voc_more": (["VOC_MORE"], ["train"]),
    "msrc7": (["MSRC7", "MSRC"], MSRC7),
    "msrc14": (["MSRC"], []),
    "icoseg8": (["iCoseg8", "iCoseg"], ICOSEG8),
    "icoseg38": (["iCoseg"], []),
    "internet300": (_INTERNET, ["airplane", "car", "horse"]),
    **{f"pascal{part}": (["PASCAL_VOC"], []) for part in ("1037", "_fold_train", "_fold_test")},
    "coco_seg": (["coco", "COCO", "coco2017", "COCO2017"], []),
}
# layout → what is in such a folder
_LAYOUTS = {"voc": ("JPEGImages/", "SegmentationClass*"), "coco": ("annotations/instances_*.json",),
            **SIDES, "rubinstein": ("*/GroundTruth",)}  # fmt: skip
_DRAWN = tuple(f"glyphworld_{f}" for f in ("pretrain", "train", "holdout", "test", "choice"))
KNOWN_SETS = (*_SETS, *_DRAWN)  # the names that `load_data` knows beside folders


def load_data(names: str | Sequence[str], *, counts: Mapping[str, int] | None = None,
              without: Sequence[str] = ()) -> CoSegData:  # fmt: skip
    """The set of a known name (`KNOWN_SETS`) under `LCCO_DATA`, or of a folder in a known layout.

    names: several are joined. counts: how many pictures a drawn set has (of each class, for the
    test fold). without: sets whose pictures are left out, by look. Raises: Missing, LCCoError.
    """
    words = [names] if isinstance(names, str) else list(names)
    if not words or not all(word.strip() for word in words):
        raise LCCoError(f"no data set is named; give a folder or one of {', '.join(KNOWN_SETS)}")
    parts, others = ([_load(w, (counts or {}).get(w)) for w in some] for some in (words, without))
    items = [(part, i) for part in parts for i in range(len(part))]
    data = parts[0] if len(parts) == 1 else View("+".join(words), items)
    if seen := {i for other in others for i, _ in data.overlap(other)}:
        kept = [i for i in range(len(data)) if i not in seen]
        data = data.subset(kept, f"{data.name} without {', '.join(without)}")
        if not kept:
            raise LCCoError(f"{data.name}: no picture is left; change `data.without`")
    return data


def _load(name: str, count: int | None) -> CoSegData:
    if name in _DRAWN:
        from lcco.data.glyphworld import glyphworld

        return glyphworld(name.removeprefix("glyphworld_"), count)
    if count is not None:
        raise LCCoError(f"counts has `{name}`; only drawn sets have a count: {', '.join(_DRAWN)}")
    if name in _SETS:
        return _known(name)
    folders = Path(name).expanduser(), place("data") / name
    path = next((path for path in folders if path.is_dir()), None)
    if path is None:
        what = f"no such folder, also not {folders[1]}, and no known set"
        raise bad(f"data `{name}`", what, f"known are {', '.join(KNOWN_SETS)}")
    return open_folder(path).complete()


def _known(name: str) -> CoSegData:
    places, own = _SETS[name]
    homes = [place("data") / word for word in places]
    home = next((home for home in homes if _layout(home)), None)
    if home is None:
        how = f"looked for {', '.join(map(str, homes))}; set LCCO_DATA to the folder that holds it"
        raise Missing("data", name, how)
    data = open_folder(home, name, own, rule=(100, 4000)).complete()  # COCO-SEG's
    data.exhaustive = data.exhaustive and name != "voc_more"  # some have one vehicle labelled each
    if not name.startswith("pascal_fold"):
        return data
    file = home / f"{name.removeprefix('pascal_')}.txt"  # `class/stem` a line
    keys = read_lines(file)
    if strange := [key for key in keys if key not in data.keys]:
        raise bad(file, f"`{strange[0]}` has no image in {home}", "take it out of the list")
    return data.subset(map(data.keys.index, keys), name)


def open_folder(path: Path, name: str | None = None, own: Sequence[str] = (),
                rule: tuple[int, float] = (1, 0)) -> CoSegData:  # fmt: skip
    """A folder in any layout, not yet checked to be complete. Raises: LCCoError.

    own: its groups, or lists of VOC, if not all. rule: COCO's least number of images and area.
    """
    name, layout = name or path.resolve().name, _layout(path)
    if layout == "coco":
        return COCOData(name, path, *rule)
    if layout == "voc":
        lists = {f.stem for f in (path / "ImageSets" / "Segmentation").glob("*.txt")}
        usual = [word for word in ("train", "val") if word in lists]
        own = own or usual or sorted(lists - {"trainval"}) or ["trainval"]
        return VOCData(name, path, own)
    if layout:
        return FolderData(name, path, layout, own)
    known = "image/<class>/* beside groundtruth/<class>/*, or as VOC, COCO, iCoseg and Internet are"
    raise bad(path, "no folder in a known layout", f"expected {known}")


def _layout(path: Path) -> str | None:
    there = {layout: all(any(path.glob(p)) for p in ps) for layout, ps in _LAYOUTS.items()}
    return next((layout for layout in there if there[layout]), None)
