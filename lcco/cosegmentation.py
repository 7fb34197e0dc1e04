"""Co-segment a person's own pictures: masks, cut-outs, overlays, a contact sheet and a gallery.

A folder is a set, and so are files that are listed together. A large set goes through the network
in even parts, but its words are those of all of it. Nothing of the pictures goes into the cache.
"""

from __future__ import annotations

import glob
import json
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from lcco import gallery
from lcco.common import LCCoError, digest, few, file_digest, one_line, progress
from lcco.data import pictures as decoder
from lcco.data.sets import CoSegData
from lcco.experiment.predictor import Predictor, load_model
from lcco.experiment.runs import environment, open_run
from lcco.metrics import resize_map
from lcco.semantics import target_word, vocabulary
from lcco.store import atomic_path, lock, read_json, write_json, write_text

Picture: TypeAlias = "str | Path | Image.Image | np.ndarray"

AT_ONCE = 64  # pictures in one part: ISFC compares every two of them
EMPTY = 0.001  # a mask below this share of the picture is no object
# A set whose pictures agree less is said to share nothing. With the shipped weights on voc_val, in
# sets of 3, 5, 10: 20, 21, 17% of sets without a common class pass, 8, 2, 0% of real ones do not.
COMMON = 0.14
KINDS = {"mask": "masks/{}.png", "cutout": "cutouts/{}.png", "overlay": "overlays/{}.jpg"}
MADE = ("masks", "cutouts", "overlays", "contact_sheet.jpg", "index.html", "result.json")


@dataclass
class Result:
    """What was found in one picture.

    size: (width, height), upright. probability: float32 [S, S] in 0..1, the picture squashed to the
    network's size; None where `error` says why. words: the set's likeliest, with probabilities.
    agreement: how far this picture's words are those of the set's others, in 0..1.
    """

    name: str
    source: Picture = field(repr=False)
    threshold: float = 0.5
    size: tuple[int, int] | None = None
    probability: np.ndarray | None = field(default=None, repr=False)
    words: list[tuple[str, float]] = field(default_factory=list)
    agreement: float = 0.0
    error: str | None = None

    @property
    def mask(self) -> np.ndarray | None:
        """bool [H, W] at the picture's own size."""
        if self.error:
            return None
        return resize_map(self.probability, self.size[::-1]) > self.threshold

    @property
    def confidence(self) -> float:
        """Mean probability inside the mask × agreement, in 0..1; 0 without a mask."""
        inside = () if self.error else self.probability[self.probability > self.threshold]
        return float(np.mean(inside)) * self.agreement if len(inside) else 0.0

    def grey(self, size: tuple[int, int]) -> Image.Image:
        """The probabilities as 0..255 at a size (width, height)."""
        grey = Image.fromarray((255 * self.probability).astype(np.uint8))
        return grey.resize(size, Image.Resampling.BILINEAR)

    def cutout(self, background: str | Path | None = None) -> Image.Image | None:
        """The object alone: RGBA, or before `white`, the blurred picture (`blur`), or a picture."""
        if self.error:
            return None
        picture = _decode(self.source)[0]
        return gallery.cut_out(picture, self.grey(self.size), self.threshold, background)


@dataclass
class Report:
    """What was made: each set's result.json, and of several sets why some were left out."""

    out: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """The pictures that could not be read."""
        return [i["name"] for record in self.records for i in record["images"] if i["error"]]


def cosegment(
    images: Sequence[Picture] | Picture, *, weights: Path | str | Predictor | None = None,
    words: Sequence[str] | Path | str | None = None, cls: str | None = None, threshold: float = 0.5,
) -> list[Result]:  # fmt: skip
    """Find what pictures have in common, and where it is in each of them.

    images: paths, PIL images, arrays ([H, W] or [H, W, 1, 3 or 4]; floats in 0..1), or a folder.
    weights: a model file, a run's name, or what `load_segmenter` gave; default the shipped model.
    words: what it may be, in the model's words (a list, a vocabulary's name, a text file).
    cls: what it is; the nearest of the model's words is looked for. threshold: on probabilities.
    Returns: a `Result` for each picture, in order; an unreadable one has `error` set.
    Raises: LCCoError for no pictures, unknown words, or settings out of range.
    """
    if isinstance(images, (str, Path)) and Path(images).expanduser().is_dir():
        images = decoder.pictures_in(images)
    if isinstance(images, (str, Path, Image.Image)) or getattr(images, "ndim", 4) < 4:
        images = [images]
    if not (sources := list(images)):
        raise LCCoError("no pictures given; a set has 1 or more")
    files = [s if isinstance(s, (str, Path)) else getattr(s, "filename", "") for s in sources]
    names = [Path(f or f"picture {n}").name for n, f in enumerate(files, 1)]
    return Segmenter(weights, words, cls, threshold)(sources, names)


def cosegment_folder(
    sources: Iterable[Path | str] | Path | str, out: Path | str, *, recursive: bool = False,
    manifest: Path | str | None = None, overwrite: bool = False,
    background: Path | str | None = None, weights: Path | str | Predictor | None = None,
    words: Sequence[str] | Path | str | None = None, cls: str | None = None, threshold: float = 0.5,
) -> Report:  # fmt: skip
    """Co-segment the sets that `find_sets` finds into the folder `out`.

    Of each set: `masks/<name>.png` (0 and 255, the picture's own size), `cutouts`, `overlays`,
    `contact_sheet.jpg`, `result.json` and a gallery, `index.html`. Given again after an
    interruption, what is missing is written. background: as of `Result.cutout`; the rest: as of
    `cosegment`.
    Raises: LCCoError for a folder with another set's results (unless `overwrite`) or with files
    that lcco did not make, and as `cosegment` does; of several sets only that one is left out.
    """
    out = Path(out).expanduser()
    listed = [sources] if isinstance(sources, (str, Path)) else sources
    sets, report = find_sets(listed, out, recursive, manifest), Report(out)
    writer = _Writer(Segmenter(weights, words, cls, threshold), background, overwrite)
    for part in sets:
        try:
            with lock(part.out / ".lcco.lock", f"{part.out}: waiting for another process"):
                report.records.append(writer.write(part))
        except LCCoError as error:
            if len(sets) == 1:
                raise
            report.refused.append(str(error))
            _say(f"left out: {error}")
    if failed := report.failed:
        _say(f"{len(failed)} pictures could not be read: {few(failed, 10)}")
    return report


def load_segmenter(weights: Path | str | None = None) -> Predictor:
    """The model of a file or a run (default: the shipped one)."""
    return load_model(open_run(weights or "shipped").weights)


# ---------------------------------------------------------------------------------- which pictures
@dataclass
class PictureSet:
    """The files of a set, by reason the names of what was left out, and the results' folder."""

    files: list[Path]
    left_out: dict[str, list[str]]
    out: Path

    @property
    def names(self) -> list[str]:
        """The files' names as text: disks take bytes that are none."""
        return [os.fsencode(f.name).decode("utf-8", "replace") for f in self.files]

    def stems(self) -> list[str]:
        """A name of its own for each file's results: its stem, numbered where there are more."""
        out: dict[str, str] = {}
        for stem in (Path(name).stem for name in self.names):
            numbered = (f"{stem}-{n}" if n > 1 else stem for n in count(1))
            name = next(name for name in numbered if _fold(name) not in out)
            out[_fold(name)] = name
        return list(out.values())

    def key(self, recipe: Any) -> str:
        """What the results come of: a recipe, and the pictures' names and contents."""
        contents = list(_threaded(_content, self.files, "hashing files"))
        return digest([recipe, self.names, contents], 16)

    def begin(self, key: str, overwrite: bool) -> dict[str, Any]:
        """The folder's record, if it is of the same key; else a new one, in a folder made free."""
        out, old = self.out, _record(self.out)
        ours = [out / name for name in MADE]
        if {f.parent.resolve() for f in self.files} & {p.resolve() for p in (out, *ours)}:
            raise LCCoError(f"{out}: holds the pictures themselves; give another --out")
        if old.get("key") == key:
            return old
        if old and not overwrite:
            what = "holds the results of other pictures, weights or settings"
            raise LCCoError(f"{out}: {what}; give another --out, or --overwrite to replace them")
        if not old and (alien := [p for p in ours if p.exists()]):
            raise LCCoError(f"{alien[0]}: lcco did not make this; give another --out")
        for entry in old.get("images", ()):
            for kind in KINDS.keys() & entry.keys():
                (out / entry[kind]).unlink(missing_ok=True)
        record = {"tool": "lcco cosegment", "key": key, "complete": False, "images": []}
        write_json(out / "result.json", record)  # first: the next start knows whose folder it is
        return record


def find_sets(
    sources: Iterable[Path | str], out: Path = Path(), recursive: bool = False,
    manifest: Path | str | None = None,
) -> list[PictureSet]:  # fmt: skip
    """The sets that are named, each with its place in `out`.

    A folder is a set, and so are all listed files and globs together. recursive: so is each folder
    inside. manifest: a file with a set a line, `{"name": …, "images": […]}`, paths from its folder.
    Raises: LCCoError where there are no pictures, or two sets would have one place.
    """
    paths = list(dict.fromkeys(p for s in sources for p in _expanded(Path(s).expanduser())))
    folders, files = ([p for p in paths if p.is_dir() == is_dir] for is_dir in (True, False))
    sets = list(_manifest(Path(manifest).expanduser(), out)) if manifest else []
    for folder in folders:
        home = out if len(paths) == 1 else out / folder.resolve().name
        for f in (folder, *(_inner(folder, out) if recursive else ())):
            sets.append(PictureSet(*decoder.listing(f), home / f.relative_to(folder)))
    if files:
        good = [p for p in files if p.suffix.lower() in decoder.ENDINGS and p.is_file()]
        others = [str(p) for p in files if p not in good]
        sets.append(PictureSet(good, {"no picture files": others} if others else {}, out))
    sets = [s for s in sets if s.files]
    if not paths and not manifest:
        raise LCCoError("no pictures given; name a folder, files, or --manifest FILE")
    if not sets:
        within = next((f for p in folders for f in _inner(p, out) if decoder.pictures_in(f)), None)
        hint = f"; there are some in {within}: give it, or --recursive" if within else ""
        raise LCCoError(f"{few(paths or [manifest], 2)}: no pictures in it{hint}")
    places = Counter(_fold(str(s.out)) for s in sets)
    for s in sets:
        inside = s.out.name in MADE and _fold(str(s.out.parent)) in places
        if inside or places[_fold(str(s.out))] > 1:
            raise LCCoError(f"{s.out}: two sets would be written there; rename one")
    return sets


def _expanded(path: Path) -> list[Path]:
    if os.path.lexists(path):
        return [path]
    if found := sorted(map(Path, glob.glob(str(path)))):
        return [p for p in found if not decoder.is_system(p.name)]
    raise LCCoError(f"{path}: no such file or folder; give pictures, or a folder with some")


def _inner(folder: Path, out: Path) -> Iterator[Path]:
    """The folders inside, without hidden and system ones and those of results."""
    for inner in sorted(folder.iterdir()):
        results = inner.resolve() == out.resolve() or _record(inner)
        if inner.is_dir() and not results and not decoder.is_system(inner.name):
            yield inner
            yield from _inner(inner, out)


def _manifest(path: Path, out: Path) -> Iterator[PictureSet]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        try:
            entry = json.loads(line)
            name, files = Path(entry["name"]), [path.parent / image for image in entry["images"]]
            if not files or not name.parts or name.is_absolute() or ".." in name.parts:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            what = 'must be {"name": "a folder", "images": ["a file", …]}'
            raise LCCoError(f"{path}: line {number} {what}") from None
        yield PictureSet(files, {}, out / name)


# ----------------------------------------------------------------------------------- segmentation
class _Loose(CoSegData):
    """Decoded pictures of some results, as a set without files, masks or classes."""

    def __init__(self, results: Sequence[Result], pictures: Sequence[Image.Image]) -> None:
        super().__init__("pictures", "loose", map(str, range(len(pictures))), {})
        self.results, self.pictures = results, pictures
        self.contents = [digest(p.tobytes(), 16) for p in pictures]

    def image(self, i: int) -> Image.Image:
        return self.pictures[i]

    def content(self, i: int) -> str:
        return self.contents[i]


@dataclass
class Segmenter:
    """A model, loaded when first used, and what it looks for: all as of `cosegment`."""

    weights: Path | str | Predictor | None = None
    words: Sequence[str] | Path | str | None = None
    cls: str | None = None
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise LCCoError(f"threshold is {self.threshold}; it must be at least 0 and below 1")
        if self.words is not None and self.cls is not None:
            raise LCCoError("give a class or words that it may be, not both")
        if isinstance(self.words, (str, Path)):
            self.words = vocabulary(self.words)
        given = self.words if self.cls is None else [self.cls]
        if given is not None and not (given and all(word.strip() for word in given)):
            raise LCCoError("an empty class or no words; give a name such as `dog`")
        if not isinstance(self.weights, Predictor):
            self.weights = open_run(self.weights or "shipped").weights

    @cached_property
    def predictor(self) -> Predictor:
        """The model, told the word to look for, keeping nothing of the pictures."""
        known = isinstance(self.weights, Predictor)
        out = copy(self.weights) if known else load_model(self.weights)
        model, out.gt, out.keep = out.model, True, False
        if (self.words or self.cls) and not (model.clip_regularization or model.clip_interaction):
            raise LCCoError("these weights are a Baseline's, which takes no words: leave them out")
        return out

    @cached_property
    def among(self) -> list[int]:
        """The places in the vocabulary of the words that it may be.

        A class is the nearest of them. Raises: LCCoError for words that are not among them.
        """
        p, out = self.predictor, []
        for word in [self.cls] if self.cls else self.words or p.vocabulary.words:
            out.append(p.vocabulary.nearest(word, p.features.tower))
            if target_word(word, p.vocabulary.words) is None:
                near = f"the nearest is `{p.vocabulary.words[out[-1]]}`"
                what = f"`{word}` is none of these weights' {len(p.vocabulary.words)} words; {near}"
                if not self.cls:
                    raise LCCoError(what)
                _say(what)
        return out

    def __call__(self, sources: Sequence[Picture], names: Sequence[str]) -> list[Result]:
        """Even parts of at most `AT_ONCE` are segmented; words and agreement are over all."""
        results = [Result(n, s, self.threshold) for n, s in zip(names, sources, strict=True)]
        edges = np.linspace(0, len(results), -(-len(results) // AT_ONCE) + 1).round().astype(int)
        parts = [self._read(results[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
        if not (parts := [data for data in parts if len(data)]):
            return results
        texts = self.predictor.vocabulary.embeddings.cpu()
        found = torch.cat([self._embeddings(data) for data in parts])
        S = normalize(found.to(texts), dim=-1) @ texts.T  # [n, P]
        words, agreements = self._words(S), iter(self._agreements(S))
        word = words[0][0] if self.words or self.cls else None
        for data in parts:
            items = list(range(len(data))) * (2 if len(data) == 1 else 1)  # a lone one: its twin
            logits = self.predictor.output(data, items, word).logits[0]
            for result, own in zip(data.results, logits, strict=False):
                result.words, result.agreement = words[:5], next(agreements)
                result.probability = own.float().sigmoid().cpu().numpy()
        return results

    def _embeddings(self, data: _Loose) -> Tensor:
        return self.predictor.features.embeddings(data, range(len(data)), keep=False)

    def _read(self, part: list[Result]) -> _Loose:
        """Decode and embed a part; then the network's squares are held, not the larger pictures."""
        features = self.predictor.features
        side = max(features.size, getattr(features.tower, "size", 0))
        pictures = list(_threaded(lambda r: _read(r, side), part, "reading pictures"))
        data = _Loose([r for r in part if not r.error], [p for p in pictures if p])
        if len(data):
            self._embeddings(data)
        squares = [decoder.load_square(p, features.size) for p in data.pictures]
        data.pictures = [Image.fromarray(square) for square in squares]
        return data

    def _words(self, S: Tensor) -> list[tuple[str, float]]:
        """Words with their probabilities: the mean of Eq. 7 over parts of the training's size.

        Deviation: Eq. 7 takes a maximum over the images, which over many is some other word's by
        chance: of 128 dogs "person" at 0.98, where the mean over parts of 5 is "dog" at 0.67.
        """
        p, head = self.predictor, self.predictor.model.clip_regularization
        if head is None:
            v = (S.mean(0) * p.features.tower.logit_scale).softmax(-1)
        else:
            n = p.experiment.data.group_size if p.experiment else 5
            sets = [s[None].to(next(head.parameters())) for s in S.tensor_split(-(-len(S) // n))]
            with torch.no_grad():
                logits = [head.class_logits(s, s.new_ones(s.shape[:2]).bool()) for s in sets]
            v = torch.cat(logits).softmax(-1).mean(0)
        total = float(v[self.among].sum())
        scores = [(p.vocabulary.words[i], float(v[i]) / total) for i in self.among]
        return sorted(scores, key=lambda w: -w[1])

    def _agreements(self, S: Tensor) -> list[float]:
        """√(p_i · p̄), p_i a picture's word probabilities and p̄ those of the others on average."""
        p = (S * self.predictor.features.tower.logit_scale).softmax(-1)
        others = (p.sum(0) - p) / (len(p) - 1) if len(p) > 1 else p
        return (p * others).sum(-1).clamp(min=0).sqrt().tolist()


def _decode(source: Picture, side: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """A picture, whose shorter side may shrink by whole factors to `side`, and its own size."""
    if isinstance(source, (str, Path)):
        return decoder.read_picture(source, side), decoder.picture_size(source)
    picture = decoder.to_rgb(source)
    return picture.reduce(max(1, min(picture.size) // (side or 10**9))), picture.size


def _read(result: Result, side: int) -> Image.Image | None:
    """The picture of a result, which notes its size, or why it could not be read."""
    try:
        picture, result.size = _decode(result.source, side)
        return picture
    except (LCCoError, ValueError, OSError) as error:
        result.error = one_line(str(error).removeprefix(f"{result.source}: "))
        return None


# ---------------------------------------------------------------------------------------- writing
@dataclass
class _Writer:
    """Writes the results of sets that one segmenter finds."""

    segmenter: Segmenter
    background: Path | str | None
    overwrite: bool

    @cached_property
    def about(self) -> dict[str, Any]:
        """What result.json says of weights and settings: other ones make other results."""
        s, ground = self.segmenter, self.background
        sha = None if isinstance(s.weights, Predictor) else file_digest(s.weights, 64)
        if ground not in (None, "white", "blur"):
            decoder.read_picture(ground)
            ground = f"{ground} {file_digest(Path(ground))}"
        settings = {"threshold": s.threshold, "class": s.cls, "words": s.words}
        return {"settings": settings | {"background": ground}, "weights": sha}

    def write(self, part: PictureSet) -> dict[str, Any]:
        """Write a set's results. Returns what is in its result.json."""
        for why, names in part.left_out.items():
            _say(f"left out, {why}: {few(names)}")
        record = part.begin(part.key(self.about), self.overwrite)
        if record["complete"]:
            _say(f"{part.out}: made before from the same pictures and settings; nothing to do")
            return record
        results = self.segmenter(part.files, part.names)
        jobs = list(zip(results, part.stems(), strict=True))
        images = list(_threaded(lambda job: self._entry(part.out, *job), jobs, "writing"))
        good = [r for r in results if not r.error]
        agreement = float(np.mean([r.agreement for r in good])) if good else 0.0
        here, words = environment(), good[0].words if good else ()
        record |= self.about | {
            "complete": True, "images": images, "confidence": round(agreement, 3),
            "words": [[word, round(score, 4)] for word, score in words],
            "note": "these share no clear object" if agreement < COMMON and len(good) > 1 else "",
            "versions": {"python": here["python"], **here["versions"]},
        }  # fmt: skip
        said = ", ".join(f"{word} {score:.2f}" for word, score in words[:3])
        many = "1 picture" if len(good) == 1 else f"{len(good)} pictures"
        title = f"{many}: {record['note'] or said or 'none could be read'}"
        if good:
            self._show(part, record, title)
        write_json(part.out / "result.json", record)
        print(f"{title}; look at {part.out / 'index.html'}" if good else title)
        return record

    def _entry(self, out: Path, result: Result, stem: str) -> dict[str, Any]:
        """Mask, cut-out and overlay of a picture, where missing; its entry in result.json."""
        width, height = result.size or (None, None)
        entry = {"name": result.name, "width": width, "height": height, "error": result.error}
        if result.error:
            _say(f"skipped {one_line(result.name)}: {result.error}")
            return entry | {"foreground": None, "confidence": None, "note": ""}
        files = {kind: form.format(stem) for kind, form in KINDS.items()}
        if not all((out / f).is_file() for f in files.values()):
            self._draw(result, *(out / f for f in files.values()))
        share = float((result.probability > result.threshold).mean())
        return entry | files | {
            "foreground": round(share, 4), "confidence": round(result.confidence, 3),
            "note": "no object found" if share < EMPTY else "",
        }  # fmt: skip

    def _draw(self, result: Result, mask: Path, cutout: Path, overlay: Path) -> None:
        picture, grey = _decode(result.source)[0], result.grey(result.size)
        cut = gallery.cut_out(picture, grey, result.threshold, self.background)
        _save(cut, cutout, compress_level=1)
        _save(Image.fromarray(255 * result.mask.astype(np.uint8)), mask, compress_level=3)
        picture.thumbnail((1600, 1600), Image.Resampling.BILINEAR, reducing_gap=2)
        shape = gallery.shape(result.grey(picture.size), result.threshold)
        _save(gallery.overlay(picture, shape), overlay, quality=88)

    def _show(self, part: PictureSet, record: dict[str, Any], title: str) -> None:
        """The contact sheet and the gallery."""
        both = zip(part.files, record["images"], strict=True)
        shown = [(f, i) for f, i in both if not i["error"]][: gallery.ON_SHEET]
        files = [f for source, i in shown for f in (source, part.out / i["overlay"])]
        thumbs = _threaded(lambda f: decoder.read_picture(f, 320), files, "contact sheet")
        labels = [(i["name"], i["note"] or format(i["foreground"], ".0%")) for _, i in shown]
        sheet = gallery.contact_sheet(list(zip(thumbs, thumbs, strict=True)), labels, title)
        _save(sheet, part.out / "contact_sheet.jpg", quality=88)
        write_text(part.out / "index.html", gallery.page(record, title, tuple(KINDS)))


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    with atomic_path(path) as part:
        image.save(part, **options)


def _record(out: Path) -> dict[str, Any]:
    """The result.json that lcco wrote into a folder, or {}."""
    try:
        record = read_json(out / "result.json")
    except (OSError, LCCoError):
        return {}
    return record if isinstance(record, dict) and record.get("tool") == "lcco cosegment" else {}


def _content(file: Path) -> str:
    try:
        return file_digest(file, 64)
    except OSError as error:
        return str(error.strerror)


def _fold(name: str) -> str:
    """What names must differ in: disks may take A for a, and é in one code or two."""
    return unicodedata.normalize("NFC", name).casefold()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _threaded(work: Callable[[Any], Any], items: Sequence[Any], what: str) -> Iterator[Any]:
    """`work` of each item, in order; an interruption drops what has not begun."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 2)) as pool:
        yield from progress(pool.map(work, items), what, len(items))
