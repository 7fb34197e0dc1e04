"""Co-segment a person's own pictures: masks, cut-outs, overlays, a contact sheet and a gallery."""

import contextlib
import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from lcco import __version__
from lcco.backbones import fold_norms, tensors_digest
from lcco.common import LCCoError, digest, few, file_digest, one_line, place
from lcco.data.pictures import is_system, listing, picture_size, pictures_in, read_picture, to_rgb
from lcco.data.sets import CoSegData, threaded
from lcco.experiment.figures import overlay
from lcco.experiment.predictor import Predictor, load_model
from lcco.experiment.runs import open_run
from lcco.metrics import resize_map
from lcco.semantics import Colour, make_tower, painted, target_word
from lcco.store import atomic_path, lock, read_json, write_json, write_text

Picture = str | Path | Image.Image | np.ndarray
Record = dict[str, Any]  # a result.json, or what it says of a picture

AT_ONCE = 64  # pictures in one part of a large set: ISFC compares every two of them
EMPTY = 0.001  # a mask below this share of the picture is no object
# Chosen by scripts/lacking.py, which prints what each costs: a set that agrees less shares nothing;
# a picture of less evidence lacks the object, or the class that was asked for.
COMMON, LACKS, LACKS_CLASS = 0.14, 1.9, 4.3
KINDS = {"mask": "masks/{}.png", "cutout": "cutouts/{}.png", "overlay": "overlays/{}.jpg"}
TOOL, PAGE = "lcco cosegment", Path(__file__).with_name("gallery.html.jinja")
MADE = ("masks", "cutouts", "overlays", "contact_sheet.jpg", "index.html", "result.json")


@dataclass
class Result:
    """What was found in one picture, of `size` (width, height), upright.

    probability: float32 [S, S] in 0..1, the picture squashed to the network's size; None where
    `error` says why. words: the set's likeliest, with probabilities. agreement: how far this
    picture's words are those of the set's others, in 0..1. lacks: it seems not to show what the
    others share; its mask is empty then.
    """

    name: str
    source: Picture = field(repr=False)
    threshold: float = 0.5
    size: tuple[int, int] | None = None
    probability: np.ndarray | None = field(default=None, repr=False)
    words: list[tuple[str, float]] = field(default_factory=list)
    agreement: float = 0.0
    lacks: bool = False
    error: str | None = None

    @property
    def mask(self) -> np.ndarray | None:
        """bool [H, W] at the picture's own size."""
        if self.error:
            return None
        return resize_map(self.probability, self.size[::-1]) > self.threshold

    @property
    def confidence(self) -> float:
        """Mean probability inside the mask, in 0..1; 0 without a mask."""
        inside = () if self.error else self.probability[self.probability > self.threshold]
        return float(np.mean(inside)) if len(inside) else 0.0

    def cutout(self, background: str | Path | None = None) -> Image.Image | None:
        """The object alone: RGBA, or before `white`, the blurred picture (`blur`), or a picture."""
        if self.error or not (picture := self.read()):
            return None
        grey = Image.fromarray((255 * self.probability).astype(np.uint8))
        grey = grey.resize(picture.size, Image.Resampling.BILINEAR)
        t, soft = 255 * self.threshold, 255 * min(0.1, self.threshold, 1 - self.threshold)
        alpha = grey.point(lambda v: 127.5 + 127.5 * (v - t) / soft if soft else 255 * (v > t))
        if background == "blur":
            small = ImageOps.contain(picture, (320, 320)).filter(ImageFilter.GaussianBlur(8))
            ground = small.resize(picture.size)
        elif background in (None, "white"):
            ground = Image.new("RGB", picture.size, background or "black")
        else:
            ground = ImageOps.fit(read_picture(background), picture.size)
        if background is not None:
            return Image.composite(picture, ground, alpha)
        out = Image.composite(picture, ground, alpha.point(lambda v: 255 * (v > 0)))
        out.putalpha(alpha)  # what it hides is black: programs without alpha show it
        return out

    def read(self, side: int | None = None) -> Image.Image | None:
        """The picture as RGB, its shorter side `side` or more; None, and `error`, if unreadable."""
        try:
            file = isinstance(self.source, (str, Path))
            picture = read_picture(self.source, side) if file else to_rgb(self.source)
            self.size = picture_size(self.source) if file else picture.size
            return picture.reduce(max(1, min(picture.size) // side)) if side else picture
        except (LCCoError, ValueError, OSError) as error:
            self.error = one_line(str(error).removeprefix(f"{self.source}: "))
            return None


def cosegment(images: Sequence[Picture] | Picture, *, weights: Path | str | Predictor | None = None,
              cls: str | None = None, threshold: float = 0.5,
              keep_all: bool = False) -> list[Result]:  # fmt: skip
    """Find what pictures have in common, and where it is in each of them.

    images: paths, PIL images, arrays ([H, W] or [H, W, 1, 3 or 4]; floats in 0..1), or a folder.
    weights: a model file, a run's name, or what `load_segmenter` gave; default the shipped model.
    cls: what it is; the nearest of the model's words is looked for. threshold: on probabilities.
    keep_all: also the masks of pictures that seem to lack it.
    Returns: a `Result` each; an unreadable one has `error` set. Raises: LCCoError for no pictures.
    """
    if not 0 <= threshold < 1:
        raise LCCoError(f"threshold is {threshold}; it must be at least 0 and below 1")
    if isinstance(images, (str, Path)) and Path(images).expanduser().is_dir():
        images = pictures_in(images)
    if isinstance(images, (str, Path, Image.Image)) or getattr(images, "ndim", 4) < 4:
        images = [images]
    results = []
    for n, source in enumerate(images, 1):
        file = source if isinstance(source, (str, Path)) else getattr(source, "filename", "")
        results.append(Result(Path(file or f"picture {n}").name, source, threshold))
    if not results:
        raise LCCoError("no pictures given; a set has 1 or more")
    predictor = weights if isinstance(weights, Predictor) else load_segmenter(weights)
    predictor = replace(predictor, gt=True, keep=False)
    model, words = predictor.model, predictor.vocabulary.words
    cls = cls or None  # "": a variable of the shell that is not set
    if cls is not None and not (model.clip_regularization or model.clip_interaction):
        raise LCCoError("these weights are a Baseline's, which takes no class: leave it out")
    if cls is not None and target_word(cls, words) is None:
        near = words[predictor.vocabulary.nearest(cls, predictor.features.tower)]
        what = f"`{cls}` is none of these weights' {len(words)} words; the nearest is `{near}`"
        print(what, file=sys.stderr)
    _segment(predictor, results, cls, keep_all)
    return results


def load_segmenter(weights: Path | str | None = None) -> Predictor:
    """The model of a file or a run (default: the shipped one), to be used, not trained."""
    predictor = load_model(open_run(weights or "shipped").weights)
    f = predictor.features
    f.tower = make_tower(predictor.experiment.tower, f.device)  # its own: norms are folded below
    for net in (f.backbone, f.tower.net):
        fold_norms(net)
    return predictor


def _segment(predictor: Predictor, results: list[Result], cls: str | None, keep: bool) -> None:
    """Fill in results. Pictures that seem to lack the object have no part in the others' masks."""
    f = predictor.features
    side = max(f.size, getattr(f.tower, "size", 0))
    pictures = [p for p in threaded(lambda r: r.read(side), results, "reading") if p]
    if not (good := [r for r in results if not r.error]):
        return
    data = CoSegData("pictures", "decoded", [digest(p.tobytes(), 16) for p in pictures])
    data.image, data.content = pictures.__getitem__, data.keys.__getitem__  # there are no files
    S = _find(predictor, data, np.arange(len(good)), good, cls)
    shown = np.ones(len(good), bool)
    # The evidence is calibrated for ConSE. Of two pictures, nobody knows which one lacks it.
    known = predictor.experiment and predictor.experiment.tower.kind == "conse"
    if known and not keep and (cls is not None or len(good) > 2):
        shown = ~_lacking(predictor, pictures, good, S, cls).numpy()
        # A large set keeps its first masks: to find them again takes a fifth longer.
        if 0 < shown.sum() < len(good) <= AT_ONCE:
            _find(predictor, data, shown.nonzero()[0], good, cls)
    words = _words(predictor, S[shown] if shown.any() else S)
    agreements = _agreement(S * f.tower.logit_scale).tolist()
    for result, agreement, there in zip(good, agreements, shown.tolist(), strict=True):
        result.words, result.agreement, result.lacks = words, agreement, not there
        if result.lacks:
            result.probability = np.zeros_like(result.probability)


def _find(predictor: Predictor, data: CoSegData, items: np.ndarray, results: Sequence[Result],
          cls: str | None) -> torch.Tensor:  # fmt: skip
    """The probabilities of items, in even parts of at most `AT_ONCE`; returns their S [n, P]."""
    similarities = []
    for part in np.array_split(items, -(-len(items) // AT_ONCE)):
        out = predictor.output(data, (part.tolist(), cls))
        similarities.append(out.similarity[0])
        for n, logits in zip(part, out.logits[0], strict=True):
            results[n].probability = logits.float().sigmoid().cpu().numpy()
    return torch.cat(similarities)


def _agreement(logits: torch.Tensor) -> torch.Tensor:
    """√(p_i · p̄ of the others) of each picture's words, from their logits [n, P]: [n] in 0..1."""
    p = logits.softmax(-1)
    others = (p.sum(0) - p) / (len(p) - 1) if len(p) > 1 else p
    return (p * others).sum(-1).clamp(min=1e-9).sqrt()


@torch.no_grad()
def _lacking(predictor, pictures, results, S, cls) -> torch.Tensor:
    """Which pictures [n] seem to lack what the others share, or the class that was asked for.

    Evidence: the words of the picture and of its object; how alike the objects, how sure the masks.
    Its weights were chosen as the thresholds were, on sets of VOC val.
    """
    tower, scale = predictor.features.tower, predictor.features.tower.logit_scale

    def look(ground: Colour | None = None) -> torch.Tensor:
        found = zip(pictures, results, strict=True)
        return tower.encode_images(_object(*one, ground) for one in found)  # [n, D] of unit norm

    E, text = look(), predictor.vocabulary.embeddings.T
    logits = [scale * S.cpu(), scale * E @ text]  # [n, P] each
    sure = torch.tensor([replace(r, threshold=0.5).confidence for r in results])
    if cls is not None:
        logits.append(scale * look(tower.mean) @ text)
        word = predictor.vocabulary.nearest(cls, tower)
        p = torch.stack(logits).softmax(-1)[..., word].amax(0)  # [n]
        return p.log() + 10 * sure < LACKS_CLASS
    alike = (E @ E.sum(0) - 1) / (len(E) - 1)  # [n]
    evidence = sum(_agreement(s).log() for s in logits) + 15 * alike + 10 * sure
    middle = evidence.median()  # a set that agrees asks for more
    return (evidence < middle) & (evidence - 0.75 * middle < LACKS)


def _object(picture: Image.Image, result: Result, ground: Colour | None) -> Image.Image:
    """A picture's object in its box, a tenth larger; before `ground`, if that is given."""
    mask = resize_map(result.probability, picture.size[::-1]) > 0.5
    x, y, x1, y1 = Image.fromarray(mask).getbbox() or (0, 0, *picture.size)
    dx, dy = (x1 - x) // 10, (y1 - y) // 10
    if ground and mask.any():
        picture = painted(picture, mask, "mean", ground)
    return picture.crop(np.clip((x - dx, y - dy, x1 + dx, y1 + dy), 0, picture.size * 2).tolist())


@torch.no_grad()
def _words(predictor: Predictor, S: torch.Tensor) -> list[tuple[str, float]]:
    """A set's five likeliest words, by similarities [n, P]: Eq. 7's mean over parts of the set.

    Deviation: no maximum over all images, as in Eq. 7: over many it is another word's by chance.
    """
    head, scale = predictor.model.clip_regularization, predictor.features.tower.logit_scale
    score = (lambda s, _: scale * s.mean(1)) if head is None else head.class_logits
    n = predictor.experiment.data.group_size if predictor.experiment else 5
    parts = [s[None] for s in S.tensor_split(-(-len(S) // n))]  # [1, ≤ n, P], as it was trained
    v = torch.cat([score(s, s.new_ones(s.shape[:2]).bool()) for s in parts]).softmax(-1).mean(0)
    return [(predictor.vocabulary.words[i], float(v[i])) for i in v.argsort(descending=True)[:5]]


def find_sets(sources: Iterable[Path | str], recursive: bool = False,
              manifest: Path | str | None = None) -> list[tuple[Path, list[Path]]]:  # fmt: skip
    """The sets that are named: the place of each below the results' folder, and its pictures.

    A folder is a set, and so are all listed files and globs together. recursive: so is each folder
    inside. manifest: a file with a set a line, `{"name": …, "images": […]}`, paths from its folder.
    Raises: LCCoError where there are no pictures, or two sets would have one place.
    """
    paths: dict[Path, None] = {}  # each once, in order
    for path in (Path(source).expanduser() for source in sources):
        found = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path)))]
        if not found or not all(p.is_file() or p.is_dir() for p in found):
            raise LCCoError(f"{path}: no such file or folder; give pictures, or a folder with some")
        found = [p for p in found if p == path or not is_system(p.name)]
        paths |= dict.fromkeys(p for p in found if not _record(p))  # results of an earlier start
    sets = list(_manifest(Path(manifest).expanduser())) if manifest else []
    for folder in filter(Path.is_dir, paths):
        spot = Path() if len(paths) == 1 else Path(folder.resolve().name)
        folders = [folder]
        for inner in folders:  # it grows by the folders inside
            files, others = listing(inner)
            inside = sorted(inner.iterdir()) if recursive else ()
            inside = [f for f in inside if f.is_dir() and not (is_system(f.name) or _record(f))]
            folders += [f for f in inside if f.resolve() not in map(Path.resolve, f.parents)]
            sets.append((spot / inner.relative_to(folder), files))
            if others:
                print(f"{inner}: left out, no picture files: {few(others)}", file=sys.stderr)
    sets.append((Path(), [p for p in paths if p.is_file()]))
    if not (sets := [(spot, files) for spot, files in sets if files]):
        what = f"{few(list(paths), 2)}: no pictures in it" if paths else "no pictures given"
        raise LCCoError(f"{what}; give files, a folder with some, --recursive, or --manifest FILE")
    taken = Counter(str(p).casefold() for s, _ in sets for p in (s, *(s / m for m in MADE)))
    if twice := [spot for spot, _ in sets if taken[str(spot).casefold()] > 1]:
        raise LCCoError(f"{twice[0]}: two sets would be written there; rename one")
    return sets


def _manifest(path: Path) -> Iterator[tuple[Path, list[Path]]]:
    for number, line in enumerate(path.read_bytes().rstrip().splitlines(), 1):
        try:
            entry = json.loads(line)
            spot, names = Path(entry["name"]), entry["images"]
            inside = spot.name and not spot.anchor and ".." not in spot.parts
            named = os.fsencode("".join([entry["name"], *names]))
            if not inside or not names or isinstance(names, str) or b"\0" in named:
                raise ValueError
            files = [path.parent / name for name in names]
        except (ValueError, KeyError, TypeError):
            raise LCCoError(f'{path}: line {number} must be {{"name": …, "images": […]}}') from None
        yield spot, files


def cosegment_folder(sources: Iterable[Path | str] | Path | str, out: Path | str, *,
                     recursive: bool = False, manifest: Path | str | None = None,
                     overwrite: bool = False, background: Path | str | None = None,
                     weights: Path | str | Predictor | None = None, cls: str | None = None,
                     threshold: float = 0.5, keep_all: bool = False) -> list[Record]:  # fmt: skip
    """Co-segment the sets that `find_sets` finds into the folder `out`.

    Of each set: masks (0 and 255, the picture's own size), cut-outs, overlays, a contact sheet, a
    gallery and `result.json`, whose contents are returned. What an interruption left is completed.
    background: as of `Result.cutout`; the rest: as of `cosegment`. Raises: LCCoError, once other
    sets are done, for one whose folder holds its pictures or, without `overwrite`, other results.
    """
    file = None if isinstance(weights, Predictor) else open_run(weights or "shipped").weights
    about = {"threshold": threshold, "class": cls, "background": background, "keep_all": keep_all}
    about["weights"] = file_digest(file, 64) if file else tensors_digest(weights.model.state_dict())
    if background not in (None, "white", "blur"):
        about["background"] = f"{background} {digest(read_picture(background).tobytes())}"
    sources = [sources] if isinstance(sources, (str, Path)) else sources
    records, refused = [], []
    for spot, files in find_sets(sources, recursive, manifest):
        folder = Path(out).expanduser() / spot
        held = place("cache") / "locks" / digest(os.fsencode(folder.resolve()), 16)
        with lock(held, f"{folder}: waiting for another process"):  # no lock among pictures
            try:
                record = _allowed(folder, files, about, overwrite)
            except LCCoError as error:
                refused.append(error)
                continue
            if record["complete"]:
                print(f"{folder}: is complete; nothing to do", file=sys.stderr)
            else:
                weights = weights if isinstance(weights, Predictor) else load_segmenter(file)
                how = {"cls": cls, "threshold": threshold, "keep_all": keep_all}
                results = cosegment(files, weights=weights, **how)
                _write(folder, record, results, background)
            records.append(record)
            for i in (i for i in record["images"] if i["error"]):
                print(f"not read: {one_line(spot / i['name'])}: {i['error']}", file=sys.stderr)
    for error in refused[:-1]:
        print(f"refused: {error}", file=sys.stderr)
    if refused:
        raise refused[-1]
    return records


def _allowed(out: Path, files: Sequence[Path], about: Record, overwrite: bool) -> Record:
    """The folder's record, if of these pictures and settings; else a new one, where allowed."""
    old, ours, images, taken = _record(out), [out / name for name in MADE], [], set()
    for file in files:  # results are named by its stem, numbered where that is taken
        name = os.fsencode(file.name).decode("utf-8", "replace")
        short = Path(name).stem.encode()[:246].decode(errors="ignore")  # with all else 255 bytes
        numbered = (f"{short}-{n}".removesuffix("-1") for n in count(1))
        stem = next(s for s in numbered if s.casefold() not in taken)
        taken.add(stem.casefold())
        images.append({"name": name} | {kind: form.format(stem) for kind, form in KINDS.items()})
    contents = [f.is_file() and os.access(f, os.R_OK) and file_digest(f, 64) for f in files]
    record = about | {"key": digest([about, [i["name"] for i in images], contents], 16)}
    made = [i[kind] for i in old.get("images", ()) for kind in KINDS.keys() & i]
    same = old.get("key") == record["key"]
    if same and (not old["complete"] or all((out / name).is_file() for name in made)):
        return old
    if {f.parent.resolve() for f in files} & {p.resolve() for p in (out, *ours)}:
        raise LCCoError(f"{out}: holds the pictures themselves; give another --out")
    if any(p.exists() for p in ours) and not (old and (overwrite or same)):
        what = "results of other pictures or settings" if old else "files that lcco did not make"
        raise LCCoError(f"{out}: holds {what}; give another --out{', or --overwrite' * bool(old)}")
    return record | {"tool": TOOL, "version": __version__, "complete": False, "images": images}


def _write(out: Path, record: Record, results: list[Result], background: Path | str | None) -> None:
    """Write a set's results, and complete its record."""
    old = _record(out)
    for image in old["images"] if old.get("key", record["key"]) != record["key"] else ():
        for kind in KINDS.keys() & image:
            (out / image[kind]).unlink(missing_ok=True)
    write_json(out / "result.json", record)  # first: the next start knows whose folder it is
    pairs = list(zip(results, record["images"], strict=True))
    # Two at once: each of 12 MP takes some 250 MB.
    images = threaded(lambda pair: _draw(out, background, *pair), pairs, "writing", 2)
    good = [(r, i) for r, i in zip(results, images, strict=True) if not r.error]
    agreement = float(np.mean([r.agreement for r, _ in good])) if good else 0.0
    words = good[0][0].words if good else []
    record |= {
        "complete": True, "images": images, "agreement": round(agreement, 3),
        "note": "these share no clear object" if agreement < COMMON and len(good) > 1 else "",
        "words": [[word, round(score, 4)] for word, score in words]}  # fmt: skip
    said = ", ".join(f"{word} {score:.2f}" for word, score in words[:3]) or "none could be read"
    said = f"looked for {record['class']}" if record["class"] else record["note"] or said
    if lacking := sum(r.lacks for r, _ in good):
        said += f"; {lacking} seem{'s' * (lacking == 1)} to lack it (--keep-all keeps the masks)"
    title = f"{len(good)} picture{'s' * (len(good) != 1)}: {said}"
    _save(_contact_sheet(out, good[:120], title), out / "contact_sheet.jpg", quality=88)
    page = jinja2.Template(PAGE.read_text(encoding="utf-8"), autoescape=True)
    write_text(out / "index.html", page.render(title=title, images=images))
    write_json(out / "result.json", record)
    print(f"{title}; look at {out / 'index.html'}")


def _draw(out: Path, background: Path | str | None, result: Result, image: Record) -> Record:
    """Mask, cut-out and overlay of a picture, where missing; its entry in result.json."""
    mask, cutout, over = (out / image[kind] for kind in KINDS)
    here = mask.is_file() and cutout.is_file() and over.is_file()
    cut, picture = (None, None) if here else (result.cutout(background), result.read(800))
    if result.error:
        return {"name": image["name"], "error": result.error}
    if picture:
        _save(cut, cutout, compress_level=1)
        _save(Image.fromarray(255 * result.mask.astype(np.uint8)), mask, compress_level=3)
        picture.thumbnail((1600, 1600))
        shown = overlay(np.asarray(picture) / 255, result.probability - result.threshold + 0.5)
        _save(Image.fromarray((255 * shown).astype(np.uint8)), over, quality=88)
    share = float((result.probability > result.threshold).mean())
    return image | {
        "note": "seems to lack it" if result.lacks else "no object found" if share < EMPTY else "",
        "error": None, "width": result.size[0], "height": result.size[1],
        "foreground": round(share, 4), "confidence": round(result.confidence, 3)}  # fmt: skip


def _contact_sheet(out: Path, found: list[tuple[Result, Record]], title: str) -> Image.Image:
    """Pictures over their overlays, with names (of long ones the end) and notes."""
    font, (w, h) = ImageFont.truetype(findfont("DejaVu Sans"), 13), (240, 180)
    columns = max(2, min(6, len(found)))
    size = 12 + columns * (w + 12), 44 + -(-len(found) // columns) * (2 * h + 52)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((12, 12), title, "black", font)
    for n, (result, image) in enumerate(found):
        x, y = 12 + n % columns * (w + 12), 44 + n // columns * (2 * h + 52)
        for file in (result.source, out / image["overlay"]):
            sheet.paste(ImageOps.pad(read_picture(file, h), (w, h), color="white"), (x, y))
            y += h + 4
        said = image["note"] or f"{image['foreground']:.0%}"
        label = f"{one_line(image['name'])[-30:]}\n{said}"
        draw.text((x + w / 2, y), label, "black", font, anchor="ma", align="center")
    return sheet


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    with atomic_path(path) as part:
        image.save(part, **options)


def _record(out: Path) -> Record:
    """The result.json that lcco wrote into a folder, or {}."""
    with contextlib.suppress(LCCoError, OSError):  # none, or another program's
        if isinstance(record := read_json(out / "result.json"), dict):
            return record if record.get("tool") == TOOL else {}
    return {}
