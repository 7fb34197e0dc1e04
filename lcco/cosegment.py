"""Co-segment a person's own pictures: any number, size and mode; masks, overlays, a contact sheet and a record.

A folder is one set (of `AT_ONCE` pictures at most; a larger one is cut into even sets). Pictures are decoded small for
the network, in threads, and never pile up at full size; nothing of them goes into the cache on disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from lcco import __version__
from lcco.common import LCCoError, atomic_path, digest, duration, few, file_digest, one_line, progress, write_json
from lcco.data import PICTURES, CoSegData
from lcco.metrics import resize_map

if TYPE_CHECKING:
    import pandas as pd

    from lcco.config import Profile
    from lcco.train import Predictor

T, R = TypeVar("T"), TypeVar("R")
Picture: TypeAlias = "str | Path | Image.Image | np.ndarray"

SHIPPED = Path(__file__).parent / "weights" / "lite.safetensors"
AT_ONCE = 64  # pictures in one set: ISFC compares every two of them, 64 at 320 px with a live backbone peak at 3 GB
LONGEST = 1600  # pixels along the longer side of an overlay
ON_SHEET = 200  # pictures on the contact sheet
ENDINGS = PICTURES | {
    ".jpe", ".jfif", ".gif", ".avif", ".heic", ".heif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"
}  # fmt: skip
_TURNS = {  # EXIF orientation → what sets the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_TINT = (213, 94, 0)  # figures.ORANGE: safe for colour-blind eyes


@dataclass
class Result:
    """What was found in one picture of a set.

    probability: float32 [S, S] in 0..1, the picture squashed to the network's size; None where `error` says why.
    size: (width, height) as shown, turned as EXIF says. words: the set's most likely words with their scores.
    set: the number of the picture's set, from 1.
    """

    name: str
    size: tuple[int, int] | None = None
    probability: np.ndarray | None = None
    words: list[tuple[str, float]] = field(default_factory=list)
    threshold: float = 0.5
    set: int = 1
    error: str | None = None

    @property
    def mask(self) -> np.ndarray | None:
        """bool [H, W] at the picture's own size, made from `probability` at each call; None for an unreadable one."""
        return None if self.probability is None or self.size is None else self.mask_at(self.size)

    def mask_at(self, size: tuple[int, int]) -> np.ndarray:
        """The mask at another size (width, height)."""
        return resize_map(self.probability, size[::-1]) > self.threshold


@dataclass
class Report:
    """What `cosegment_folder` made: `record` is result.json, `out` the folder that it is in."""

    out: Path
    record: dict[str, Any]

    @property
    def failed(self) -> list[str]:
        """The files that could not be read."""
        return [i["name"] for i in self.record["images"] if i["error"]]

    def table(self) -> pd.DataFrame:
        """A row for each picture: its size, how much of it the object takes, or why it could not be read."""
        import pandas as pd

        rows = [
            {
                "picture": i["name"], "width": i.get("width"), "height": i.get("height"),
                "object (%)": None if i["error"] else round(100 * i["foreground"], 1), "problem": i["error"] or "",
            }
            for i in self.record["images"]
        ]  # fmt: skip
        return pd.DataFrame(rows).set_index("picture")

    def say_failed(self) -> None:
        """Name the files that could not be read, on stderr."""
        if names := self.failed:
            _say(f"{len(names)} of {len(self.record['images'])} pictures could not be read: {few(names, 10)}")

    @property
    def words(self) -> list[tuple[str, float]]:
        """The first set's most likely words with their scores."""
        return [(w["word"], w["score"]) for w in self.record["sets"][0]["words"]]


def cosegment(
    images: Sequence[Picture] | Picture, *, weights: Path | str | Predictor | None = None,
    words: Sequence[str] | Path | str | None = None, cls: str | None = None, threshold: float = 0.5,
    at_once: int = AT_ONCE,
) -> list[Result]:  # fmt: skip
    """Find what pictures have in common, and where it is in each of them.

    images: paths, PIL images or arrays ([H, W], [H, W, 1], 3 or 4 channels; bool, integer, or float in 0..1), or a
    folder. weights: a model file, a run, or what `load_segmenter` gave (to load it once for many calls); default the
    shipped model. words: what it may be, as words of the model's vocabulary (a list, a vocabulary's name or a text
    file); the likeliest is then looked for. cls: what it is; the nearest word of the vocabulary is looked for.
    threshold: on the probabilities. at_once: the largest set; more pictures are cut into even sets.
    Returns: a `Result` for each picture, in order; an unreadable one has `error` set.
    Raises: LCCoError for no pictures, unknown words, or settings out of range.
    """
    sources = _sources(images)
    predictor, query = _ask(weights, words, cls, threshold, at_once)
    found: list[Result] = []
    for number, part in enumerate(_sets(sources, at_once), 1):
        names = [_name(s, len(found) + n) for n, s in enumerate(part, 1)]
        found += _segment(predictor, query, part, names, threshold, number)
    return found


def cosegment_folder(
    folder: Path | str, out: Path | str, *, weights: Path | str | Predictor | None = None,
    words: Sequence[str] | Path | str | None = None, cls: str | None = None, threshold: float = 0.5,
    at_once: int = AT_ONCE,
) -> Report:  # fmt: skip
    """Co-segment the pictures of a folder (not of folders in it) into another; settings as `cosegment` takes them.

    Writes `masks/<stem>.png` (0 and 255, the picture's own size, upright), `overlays/<stem>.jpg` (at most 1600 px),
    `contact_sheet.jpg` and `result.json`. Unreadable pictures are named, skipped and listed in `Report.failed`. Given
    again after an interruption it makes only what is missing; with other pictures or settings, all of it: what an
    earlier start made and this one does not is removed, a mask changed by hand since is kept as `<stem>.edited.png`.
    Raises: LCCoError for a folder without pictures, a place that cannot be written or that holds what lcco did not
    make, and as `cosegment` does.
    """
    began = time.monotonic()
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    files, others = _listing(folder)
    old = _earlier(folder, out)
    model = weights if hasattr(weights, "inputs") else _weights_file(weights)
    stamps = [(f.name, (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
    settings = {"threshold": threshold, "class": cls, "words": _word_list(words), "at_once": at_once}
    sha = file_digest(model, 64) if isinstance(model, Path) else "in memory"
    made_by = sha if isinstance(model, Path) else time.time_ns()  # a model in memory has no lasting name
    key = digest([settings, made_by, __version__, stamps], 16)
    for why, names in others.items():
        _say(f"left out, {why}: {few(names, 2)}")
    before = old if old.get("key") == key else {}
    done, sheet = _done(folder, out, before, list(_sets(files, at_once))), out / "contact_sheet.jpg"
    if before.get("complete") and len(done) == len(files):
        record = before | {"images": [done[f.name] for f in files]}
        with _writable(out):
            if record != before:  # what is wrong with a picture may have changed
                write_json(out / "result.json", record)
            if sheet.is_file() or all(i["error"] for i in done.values()):
                _say(f"{out}: made before from the same pictures and settings; nothing to do")
            else:
                _save_sheet(folder, out, record, {})
                print(f"to look at: {sheet}, made again; the masks are there as before")
        report = Report(out, record)
        report.say_failed()
        return report

    predictor, query = _ask(model, words, cls, threshold, at_once)
    if query.word and cls and query.word.casefold() != cls.casefold():
        _say(_word_for(cls, query.word, predictor))
    stems = _stems(files)
    known = _made(old)
    kept: list[str] = []
    record: dict[str, Any] = {
        "key": key, "complete": False, "folder": folder.resolve().name,
        "settings": settings | {"looked_for": query.word}, "versions": _versions(),
        "weights": {
            "file": model.name if isinstance(model, Path) else None, "sha256": sha,
            "experiment": predictor.experiment.name, "hash": predictor.experiment.hash,
            "tower": predictor.inputs.tower.identity, "backbone": predictor.inputs.backbone.identity,
            "vocabulary": Path(predictor.experiment.tower.vocabulary).stem,
            "vocabulary_hash": predictor.inputs.vocabulary_hash,
        },
        "sets": before.get("sets") or [{"images": 0, "words": []} for _ in _sets(files, at_once)],
        "images": [done[f.name] for f in files if f.name in done], "seconds": 0.0,
    }  # fmt: skip
    thumbs: dict[str, _Thumbs] = {}
    with _writable(out):
        out.mkdir(parents=True, exist_ok=True)
        _save(out, record, known)  # first, so that whatever ends this start, the next knows whose folder it is
        try:
            for number, part in enumerate(_sets(files, at_once), 1):
                todo = [f for f in part if f.name not in done]
                if not todo:
                    continue
                found = _segment(predictor, query, part, [f.name for f in part], threshold, number)
                shown = next((r.words for r in found if not r.error), [])
                scores = [{"word": w, "score": round(s, 4)} for w, s in shown]
                record["sets"][number - 1] = {"images": sum(not r.error for r in found), "words": scores}
                jobs = [(f, r, stems[f.name]) for f, r in zip(part, found, strict=True) if f in todo]
                for image, pair in _threaded(lambda job: _write(out, known, kept, *job), jobs, "writing masks"):
                    record["images"].append(image)
                    if pair and len(thumbs) < ON_SHEET:
                        thumbs[image["name"]] = pair
                    if image["error"]:
                        _say(f"skipped {one_line(image['name'])}: {image['error']}")
        finally:  # an interruption loses nothing that was made
            order = {f.name: n for n, f in enumerate(files)}
            record["images"].sort(key=lambda i: order[i["name"]])
            record["seconds"] = round(before.get("seconds", 0) + time.monotonic() - began, 3)
            _save(out, record, known)
            if kept:
                _say(f"{out / 'masks'}: changed since lcco made them, so kept beside the new ones: {few(kept)}")
        good = [i for i in record["images"] if not i["error"]]
        if good:
            _save_sheet(folder, out, record, thumbs)
        elif known:
            sheet.unlink(missing_ok=True)
        _remove_old(out, record, known)
        record = {k: v for k, v in record.items() if k != "earlier"} | {"complete": True}
        write_json(out / "result.json", record)
    report = Report(out, record)
    said = ", ".join(f"{w} {s:.2f}" for w, s in report.words[:3])
    print(f"{len(good)} masks in {out / 'masks'}" + (f"; in common: {said}" if good and said else ""))
    if good:
        print(f"to look at: {sheet} ({duration(time.monotonic() - began)})")
    report.say_failed()
    return report


def load_segmenter(weights: Path | str | None = None) -> Predictor:
    """The model of a file or a run (default: the shipped one), ready for pictures that are seen once."""
    import torch

    from lcco.train import load_model

    return load_model(_weights_file(weights), device="cuda" if torch.cuda.is_available() else "cpu")


def first_pictures(profile: Profile, folder: Path, weights: str | None = None, images: int = 6) -> tuple[Path, Path]:
    """Pictures and a model for a first try: (folder of pictures, model file).

    The first class, by name, of the profile's first test set, written into `folder` as PNG. Drawings go with the
    profile's own model (taken from the run store, trained if need be), photographs with the shipped one; `weights` goes
    before either. Where the photographs are not on this machine, drawings and the model of `embedded` stand in.
    """
    from lcco.config import load_profile
    from lcco.data import load_data
    from lcco.figures import is_drawn
    from lcco.glyphworld import glyphworld

    try:
        data = load_data(profile.tests[0])
    except LCCoError:
        profile = load_profile("embedded")
        data = load_data(profile.tests[0])
    if drawn := is_drawn(data):
        data = glyphworld("test", images, size=384)  # the same scenes, larger than the network needs
    cls, items = next(iter(data.groups.items()))
    place = Path(folder) / f"{data.name}-{cls}"
    for n, i in enumerate(items[:images], 1):
        if not (file := place / f"{cls}-{n}.png").is_file():
            with atomic_path(file) as part:
                data.image(i).save(part, "PNG")
    if weights is None and drawn:
        from lcco.runs import get_run

        return place, get_run(profile.experiment.replace(seed=profile.seeds[0])).weights
    return place, _weights_file(weights)


def pictures_in(folder: Path | str) -> list[Path]:
    """The picture files of a folder, by name; folders in it and hidden files are left alone.

    Raises: LCCoError for a missing or unreadable folder or one without pictures.
    """
    return _listing(Path(folder).expanduser())[0]


def _listing(folder: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """The pictures of a folder, and by reason the names of the files beside them that are not taken."""
    try:
        if not folder.is_dir():
            what = "not a folder" if folder.exists() else "no such folder"
            raise LCCoError(f"{folder}: {what}; give one with pictures")
        entries = sorted((e for e in folder.iterdir() if e.name[0] != "."), key=lambda e: (e.name.casefold(), e.name))
        if _read_record(folder / "result.json"):  # a folder that lcco wrote: its sheet is no picture of a set
            entries = [e for e in entries if e.name not in ("contact_sheet.jpg", "result.json")]
        found = [e for e in entries if e.suffix.lower() in ENDINGS and e.is_file()]
        ending = [e.name for e in entries if e.suffix.lower() not in ENDINGS and not e.is_dir()]
        broken = [e.name for e in entries if e.suffix.lower() in ENDINGS and not e.exists()]
    except OSError as error:
        raise LCCoError(f"{folder}: {error.strerror or error}; give a folder that can be read") from None
    if not found:
        inner = next((e for e in entries if _has_pictures(e)), None)
        hint = f"; there are some in {inner}: give that folder" if inner else f" ({', '.join(sorted(ENDINGS))})"
        raise LCCoError(f"{folder}: no pictures in it{hint}")
    return found, {why: n for why, n in (("by their ending", ending), ("as broken links", broken)) if n}


def _has_pictures(folder: Path) -> bool:
    try:
        return any(f.suffix.lower() in ENDINGS and f.name[0] != "." for f in folder.iterdir())
    except OSError:  # no folder, or one of somebody else: no hint
        return False


# ------------------------------------------------------------------------------------------------------- the question
@dataclass
class _Query:
    """What is looked for: a `word`, the likeliest of the vocabulary indices `among`, or (both None) anything."""

    word: str | None = None
    among: list[int] | None = None


def _ask(
    weights: Path | str | Predictor | None, words: Any, cls: str | None, threshold: float, at_once: int
) -> tuple[Predictor, _Query]:
    if not 0 <= threshold < 1:
        raise LCCoError(f"threshold is {threshold}; it must be at least 0 and below 1")
    if at_once < 1:
        raise LCCoError(f"at_once is {at_once}; a set has 1 picture or more")
    if words is not None and cls is not None:
        raise LCCoError("give a class or words that it may be, not both")
    asked = _word_list(words)
    from lcco.train import Predictor

    given = weights if hasattr(weights, "inputs") else load_segmenter(weights)
    model, inputs = given.model, given.inputs
    predictor = Predictor(model, inputs, gt=True, k=given.k, cached=False)
    if (asked or cls) and model.clip_regularization is None and model.clip_interaction is None:
        raise LCCoError("these weights are a Baseline's, which takes no words: leave out the class or words")
    if cls is not None:
        if not cls.strip():
            raise LCCoError("the class is empty; give a name such as `dog`")
        return predictor, _Query(inputs.words[inputs.nearest_word(cls)])
    if not asked or list(asked) == inputs.words:
        return predictor, _Query()
    from lcco.semantics import target_word

    among = []
    for word in asked:
        index = target_word(word, inputs.words)
        if index is None:
            near = inputs.words[inputs.nearest_word(word)]
            raise LCCoError(
                f"`{word}` is not one of the {len(inputs.words)} words that these weights were trained with "
                f"(`{inputs.experiment.tower.vocabulary}`), to which MLP3 is tied; the nearest is `{near}`. Give words "
                "of that vocabulary, or train with yours: lcco train --set tower.vocabulary=FILE"
            )
        among.append(index)
    return predictor, _Query(among=sorted(set(among)))


def _word_list(words: Any) -> list[str] | None:
    if words is None:
        return None
    if isinstance(words, (str, Path)):
        from lcco.semantics import vocabulary

        return vocabulary(words)
    if not (listed := [one_line(word) for word in words]) or not all(listed):
        raise LCCoError("words: an empty list or an empty word; give words of the model's vocabulary")
    return listed


def _weights_file(weights: Path | str | None) -> Path:
    path = SHIPPED if weights is None else Path(weights).expanduser()
    try:
        if path.is_file():
            path.open("rb").close()
            return path
        folder = path.is_dir()
    except OSError as error:
        raise LCCoError(f"{path}: {error.strerror or error}; give a model file or a run that can be read") from None
    if weights is None:
        raise LCCoError(f"{path}: the shipped weights are not here; give weights: a model file, or a trained run")
    if path.suffix == ".safetensors" and not folder:
        raise LCCoError(f"{path}: no such model file")
    if path.is_absolute() and not folder:
        raise LCCoError(f"{path}: no such model file or run; give a file, a run's folder or the start of its name")
    from lcco.runs import open_run

    return open_run(path if folder else weights).weights


def _word_for(cls: str, word: str, predictor: Predictor) -> str:
    """What is looked for in place of a class that is not itself in the vocabulary."""
    from lcco.semantics import VOCABULARIES, target_word

    if target_word(cls, predictor.inputs.words) is not None:
        return f"looking for `{word}`, the vocabulary's word for `{cls}`"
    name = predictor.experiment.tower.vocabulary
    file = Path(__file__).parent / "vocab" / f"{name}.txt" if name in VOCABULARIES else Path(name).expanduser()
    listed = file if file.is_file() else f"lcco.semantics.vocabulary({name!r})" if name in VOCABULARIES else None
    near = f"looking for `{word}`, the nearest, which may mean nothing"
    return f"`{one_line(cls)}` is not a word of the vocabulary; {near}" + (f"; its words: {listed}" if listed else "")


# ------------------------------------------------------------------------------------------------------------ one set
class _Loose(CoSegData):
    """Decoded pictures as a set without files, masks or classes."""

    def __init__(self, pictures: Sequence[Image.Image], names: Sequence[str]) -> None:
        super().__init__("pictures", "loose", names, {})
        self._pictures = pictures

    def image(self, i: int) -> Image.Image:
        return self._pictures[i]

    def content(self, i: int) -> str:
        picture = self._pictures[i]
        return digest(repr(picture.size).encode() + picture.tobytes(), 16)


def _segment(
    predictor: Predictor, query: _Query, sources: Sequence[Picture], names: Sequence[str], threshold: float, number: int
) -> list[Result]:
    """One set, from files to probabilities."""
    # Twice what the network and the tower take, so that the second reduction is the one that decides.
    side = 2 * max(predictor.inputs.size, getattr(predictor.inputs.tower, "size", 0))
    found = [Result(name, threshold=threshold, set=number) for name in names]
    pictures: list[Image.Image] = []
    for result, got in zip(found, _threaded(lambda s: _try(read, s, side), sources, "reading pictures"), strict=True):
        if isinstance(got, str):
            result.error = got
        else:
            picture, result.size = got
            pictures.append(picture)
    good = [r for r in found if not r.error]
    if not good:
        return found
    data, items = _Loose(pictures, [r.name for r in good]), list(range(len(good)))
    if len(items) == 1:  # trained on sets, the network does not know what to do without a neighbour: its twin
        items *= 2
    predictor.inputs.embed_once(data)
    out = predictor.output(data, items, query.word)
    words = predictor.words(out)
    if query.among is not None:
        scores = dict(predictor.words(out, len(predictor.inputs.words)))
        asked = [predictor.inputs.words[i] for i in query.among]
        total = sum(scores[word] for word in asked) or 1.0
        words = sorted(((word, scores[word] / total) for word in asked), key=lambda pair: -pair[1])[:5]
        out = predictor.output(data, items, words[0][0])
    for result, logits in zip(good, out.logits[0][: len(good)], strict=True):
        result.probability, result.words = logits.sigmoid().cpu().numpy(), words
    return found


def read(source: Picture, side: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """A picture as RGB, upright, and its own (width, height) as shown.

    side: the shorter side may shrink by whole factors down to this many pixels, which makes large files cheap.
    Transparent parts become white; 16-bit and float values are scaled to 8 bits; of an animation the first frame.
    """
    if isinstance(source, np.ndarray):
        image = _from_array(source)
        return _reduced(image, side), image.size
    with contextlib.nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
        size = image.size
        if side and image is not source:
            image.draft(None, (side, side))  # JPEG decodes at 1/2, 1/4 or 1/8
        image.load()
        try:
            turn = image.getexif().get(0x0112, 1)
        except Exception:  # broken EXIF says nothing; the picture itself is whole
            turn = 1
        image = _reduced(_rgb(image), side)
    if turn in _TURNS:
        image = image.transpose(_TURNS[turn])
    return image, size[::-1] if turn in (5, 6, 7, 8) else size


def _reduced(image: Image.Image, side: int | None) -> Image.Image:
    factor = min(image.size) // side if side else 1
    return image.reduce(factor) if factor > 1 else image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _from_array(np.asarray(image), scale=True)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _from_array(values: np.ndarray, scale: bool = False) -> Image.Image:
    """RGB of an array. scale: the values' range is unknown, as in 16-bit and float files."""
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or 0 in values.shape or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise ValueError(f"an array of shape {list(values.shape)} is no picture; it must be [H, W] or [H, W, 3 or 4]")
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    elif values.dtype != np.uint8:
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        if values.dtype.kind == "f" and low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        elif values.dtype.kind == "f" and not scale:
            raise ValueError(f"an array of floats must be in 0..1; it holds {low:g} to {high:g}")
        elif values.dtype.kind in "iu" and low >= 0:  # 8, 10, 12, 14 or 16 bits, whichever holds them
            low, high = 0.0, float(next((2**b - 1 for b in (8, 10, 12, 14, 16) if high < 2**b), high))
        values = (np.nan_to_num(values.astype(np.float32)) - low) * (255 / max(high - low, 1e-12))
        values = np.clip(np.round(values), 0, 255).astype(np.uint8)
    return _rgb(Image.fromarray(values)) if values.ndim == 3 else Image.fromarray(values).convert("RGB")


# ------------------------------------------------------------------------------------------------------------ writing
_Thumbs: TypeAlias = "tuple[Image.Image, Image.Image]"


def _write(
    out: Path, known: dict[str, str | None], kept: list[str], file: Path, result: Result, stem: str
) -> tuple[dict[str, Any], _Thumbs | None]:
    """Mask and overlay of one picture; its entry in result.json, and small copies for the contact sheet.

    A mask in its place that is neither `known` nor the same is renamed, and its new name added to `kept`.
    """
    entry: dict[str, Any] = {"name": file.name, "set": result.set, "error": result.error}
    if result.error:
        return entry, None
    picture = _try(read, file, LONGEST // 2)  # again: sharper than what the network saw
    if isinstance(picture, str):
        return entry | {"error": picture}, None
    picture, mask = picture[0], result.mask
    picture.thumbnail((LONGEST, LONGEST), Image.Resampling.BILINEAR)
    entry |= {
        "mask": f"masks/{stem}.png", "overlay": f"overlays/{stem}.jpg", "width": result.size[0],
        "height": result.size[1], "foreground": round(float(mask.mean()), 6),
    }  # fmt: skip
    with atomic_path(out / entry["mask"]) as part:
        Image.fromarray(mask.astype(np.uint8) * 255).save(part, "PNG", compress_level=3)
        entry["mask_sha256"] = file_digest(part, 64)
        ours = (entry["mask_sha256"], known.get(entry["mask"], ""))
        mask_file = out / entry["mask"]
        if mask_file.is_file() and None not in ours and file_digest(mask_file, 64) not in ours:
            kept.append(_set_aside(mask_file))
    over = overlay(picture, Image.fromarray(result.mask_at(picture.size)))
    with atomic_path(out / entry["overlay"]) as part:
        over.save(part, "JPEG", quality=88)
    return entry, (_thumb(picture), _thumb(over))


def _set_aside(file: Path) -> str:
    """Rename a file to a free name beside it."""
    n, new = 1, file.with_name(f"{file.stem}.edited{file.suffix}")
    while new.exists():
        n, new = n + 1, file.with_name(f"{file.stem}.edited-{n + 1}{file.suffix}")
    return file.rename(new).name


def overlay(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture greyed where the mask (mode 1 or L, the same size) is 0; the object tinted and outlined."""
    mask = mask.convert("L")
    grey = picture.convert("L").point(lambda v: 64 + 0.45 * v).convert("RGB")
    out = Image.composite(Image.blend(picture, Image.new("RGB", picture.size, _TINT), 0.4), grey, mask)
    width = max(1, round(max(picture.size) / 400))
    inner = mask.filter(ImageFilter.BoxBlur(width)).point(lambda v: 255 * (v < 255))
    out.paste((30, 30, 30), mask=Image.composite(inner, Image.new("L", mask.size), mask))
    return out


def _thumb(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((320, 320), Image.Resampling.LANCZOS, reducing_gap=2)
    return small


def _save_sheet(folder: Path, out: Path, record: dict[str, Any], thumbs: dict[str, _Thumbs]) -> None:
    with atomic_path(out / "contact_sheet.jpg") as part:
        _sheet(folder, out, record, thumbs).save(part, "JPEG", quality=90)


def _sheet(folder: Path, out: Path, record: dict[str, Any], thumbs: dict[str, _Thumbs]) -> Image.Image:
    """Each picture over its overlay, named, with the share that the object takes."""
    good = [i for i in record["images"] if not i["error"]]
    images, gap, line = good[:ON_SHEET], 12, 22
    box = 320 if len(images) <= 12 else 240 if len(images) <= 40 else 180
    rows_needed = -(-len(images) // (4 if box == 320 else 6 if box == 240 else 10))
    columns = -(-len(images) // rows_needed)  # no row much shorter than the others
    rows = []
    for start in range(0, len(images), columns):
        row = []
        for image in images[start : start + columns]:
            pair = thumbs.get(image["name"])
            if pair is None:
                pair = _thumb(read(folder / image["name"], box)[0]), _thumb(read(out / image["overlay"], box)[0])
            for small in pair:
                small.thumbnail((box, box))
            row.append((image, pair))
        rows.append((row, max(small.height for _, pair in row for small in pair)))
    title = "; ".join(", ".join(f"{w['word']} {w['score']:.2f}" for w in s["words"][:3]) for s in record["sets"][:3])
    title = f"{len(good)} pictures" + (f", first {ON_SHEET} shown" if len(good) > ON_SHEET else "") + (
        f"; most likely in common: {title}" if title else "")  # fmt: skip
    sheet_width = max(columns * (box + gap) + gap, 480)
    sheet = Image.new("RGB", (sheet_width, sum(2 * h + line + 2 * gap for _, h in rows) + 40), "white")
    text, head, small_font = ImageDraw.Draw(sheet), _font(17), _font(13)
    text.text((gap, 10), _cut(text, title, head, sheet_width - 2 * gap), "black", head)
    y = 40
    for row, height in rows:
        for n, (image, pair) in enumerate(row):
            x = gap + n * (box + gap)
            for k, small in enumerate(pair):
                sheet.paste(small, (x + (box - small.width) // 2, y + k * (height + 4) + (height - small.height) // 2))
            share = f"  {image['foreground']:.0%}" if image["foreground"] else "  nothing"
            room = box - text.textlength(share, small_font)
            label = _cut(text, one_line(image["name"]), small_font, room) + share
            text.text((x + box / 2, y + 2 * height + 8), label, (40, 40, 40), small_font, anchor="ma")
        y += 2 * height + line + 2 * gap
    return sheet


def _font(size: int) -> Any:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _cut(draw: ImageDraw.ImageDraw, text: str, font: Any, room: float) -> str:
    while draw.textlength(text, font) > room and len(text) > 4:
        middle = len(text) // 2
        text = f"{text[: middle - 1].rstrip('…')}…{text[middle + 1 :].lstrip('…')}"
    return text


# ------------------------------------------------------------------------------------------------------------- inside
def _sources(images: Any) -> list[Picture]:
    if isinstance(images, (str, Path)):
        path = Path(images).expanduser()
        return pictures_in(path) if path.is_dir() else [path]
    if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
        return [images]
    sources = list(images)
    if not sources:
        raise LCCoError("no pictures given; a set has 1 or more")
    return sources


def _name(source: Picture, n: int) -> str:
    if isinstance(source, (str, Path)):
        return Path(source).name
    return Path(getattr(source, "filename", "") or f"picture {n}").name


def _sets(sources: Sequence[T], at_once: int) -> Iterator[list[T]]:
    """Even parts of at most `at_once`, in order."""
    count = -(-len(sources) // at_once)
    edges = [round(k * len(sources) / count) for k in range(count + 1)]
    for start, end in zip(edges, edges[1:], strict=False):
        yield list(sources[start:end])


def _stems(files: Sequence[Path]) -> dict[str, str]:
    """File name → a stem of its own, also where a disk takes a.png and A.png for one file."""
    twice = [f.stem.casefold() for f in files]
    taken = {s for s in twice if twice.count(s) == 1}
    out = {}
    for file in files:
        stem = file.stem
        if twice.count(stem.casefold()) > 1:
            stem = base = f"{file.stem}_{file.suffix[1:]}"
            n = 2
            while stem.casefold() in taken:
                stem, n = f"{base}_{n}", n + 1
            taken.add(stem.casefold())
        out[file.name] = stem
    return out


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _try(work: Callable[..., R], *values: Any) -> R | str:
    """What `work` gives, or in a line why it could not: decoders raise many kinds of errors on damaged files."""
    try:
        return work(*values)
    except FileNotFoundError:
        return "no such file"
    except Image.UnidentifiedImageError:
        heif = str(values[0]).lower().endswith((".heic", ".heif"))
        return "HEIC is not supported; export it as JPEG" if heif else "not a picture, or of an unknown format"
    except Image.DecompressionBombError as error:
        return f"too many pixels ({str(error).split(',')[0]}); make it smaller"
    except MemoryError:
        return "too large for this machine's memory; make it smaller"
    except Exception as error:
        return f"cannot be read ({(str(error).splitlines() or [''])[0][:100] or type(error).__name__})"


def _threaded(work: Callable[[T], R], items: Sequence[T], what: str) -> Iterator[R]:
    """`work` of each item, in order; an interruption drops what has not begun."""
    with warnings.catch_warnings(), ThreadPoolExecutor(max(2, min(4, os.cpu_count() or 2))) as pool:
        warnings.simplefilter("ignore")  # large pictures and odd metadata are no news to their owner
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in progress(futures, what):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


@contextlib.contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where, why = error.filename or out, error.strerror or error
        raise LCCoError(f"{where}: {why}; give a folder that can be written") from None


def _read_record(path: Path) -> dict[str, Any]:
    """result.json of an earlier start of lcco, else nothing."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        whole = all(i["name"] and (i["error"] or {"mask", "overlay"} <= i.keys()) for i in record["images"])
        return record if whole and isinstance(record["key"], str) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _earlier(folder: Path, out: Path) -> dict[str, Any]:
    """The record of what is in `out`, which must be free for lcco to write into: nothing that it did not make."""
    with _writable(out):
        for place in (out, out / "masks", out / "overlays"):
            if place.exists() and place.samefile(folder):
                raise LCCoError(f"{place}: is the folder of the pictures; give another --out")
        if record := _read_record(out / "result.json"):
            return record
        for name in ("result.json", "contact_sheet.jpg", "masks", "overlays"):
            if (out / name).is_file() or ((out / name).is_dir() and any((out / name).iterdir())):
                raise LCCoError(
                    f"{out}: holds files that lcco did not make ({name}); give another --out or remove them"
                )
    return {}


def _made(record: dict[str, Any]) -> dict[str, str | None]:
    """The masks and overlays that a result lists → their digests, None where unknown."""
    out = dict(record.get("earlier", {}))
    for i in record.get("images", ()):
        if not i["error"]:
            out |= {i["mask"]: i.get("mask_sha256"), i["overlay"]: None}
    return {f: d for f, d in out.items() if f in (f"masks/{Path(f).name}", f"overlays/{Path(f).name}")}  # no others


def _done(folder: Path, out: Path, before: dict[str, Any], sets: Sequence[Sequence[Path]]) -> dict[str, dict[str, Any]]:
    """The pictures that need no work, by name, as result.json has them.

    One that could not be read is tried again, as mended permissions do not change a file's date. If it opens now, its
    whole set is to be made: each mask depends on the others.
    """
    made = {i["name"]: i for i in before.get("images", ())}
    bad = [f for part in sets for f in part if made.get(f.name, {}).get("error")]
    why = _threaded(lambda f: _try(read, f, LONGEST // 2), bad, "reading pictures")
    still = {f.name: w for f, w in zip(bad, why, strict=True) if isinstance(w, str)}
    done = {}
    for part in sets:
        if all(f.name in still or f not in bad for f in part):
            for i in (made[f.name] for f in part if f.name in made):
                if i["error"]:
                    done[i["name"]] = i | {"error": still[i["name"]]}
                elif (out / i["mask"]).is_file() and (out / i["overlay"]).is_file():
                    done[i["name"]] = i
    return done


def _save(out: Path, record: dict[str, Any], known: dict[str, str | None]) -> None:
    """result.json of an unfinished start: what it made, and what `earlier` ones did that is not made anew yet."""
    record["earlier"] = {f: d for f, d in known.items() if f not in _made({"images": record["images"]})}
    write_json(out / "result.json", record)


def _remove_old(out: Path, record: dict[str, Any], known: dict[str, str | None]) -> None:
    """Remove the masks and overlays of earlier starts that this one does not list, but for those changed since."""
    new = {(out / f).stat().st_ino for f in _made({"images": record["images"]})}  # a.png may be A.png on this disk
    old = [out / f for f in record["earlier"]]
    old = [f for f in old if f.is_file() and f.stat().st_ino not in new]
    names = {f: f"{f.parent.name}/{f.name}" for f in old}
    changed = [f for f in old if (sha := known[names[f]]) and sha != file_digest(f, 64)]
    for file in (gone := [f for f in old if f not in changed]):
        file.unlink()
    if gone:
        _say(f"{out}: removed, as made before from what is not among these pictures: {few([names[f] for f in gone])}")
    if changed:
        _say(f"{out}: changed since lcco made them, so left: {few([names[f] for f in changed])}")


def _versions() -> dict[str, str]:
    from lcco.runs import environment

    made = environment()
    return {"python": made["python"], "platform": made["platform"], **made["versions"]}
