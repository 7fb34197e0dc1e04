"""GlyphWorld, the embedded data set: pictographs drawn on the fly, with exact masks.

Objects are symbols of DejaVu Sans (the font inside matplotlib), textured, turned, scaled and partly
occluded. Most pictures hold objects of two or three classes: only a set tells which one it shares.
"""

import colorsys
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from PIL import Image, ImageDraw

from lcco.common import digest, place
from lcco.data.sets import CoSegData
from lcco.store import IN_A_FILE, kept

VERSION = 1  # counts up whenever the same classes and seed would draw something else

# The symbols of the names in vocab/glyphs.txt. No picture of a training fold holds a test class.
_TRAIN = (
    "☀☁★☃☘☛☢☯☸☺♔♜♟♠♬♻⚄⚒⚖⚱✂✉✎❄⌂🐵⬅⚡"
    "♨☣☤☥☮♀♂♆♈♉♛♝♣♦♿⚔⚗⚛⚜⚠⚷⛃✌✍✇✔✖✚✠✦✱✹❖❢❦🐭🐮😈⌘⌨⏏⬢🁢🂡😎"
)
_TEST = "☂☎☕☠♞♥⚑⚓⚙✈✿🐱"
_NAMES = (Path(__file__).parents[1] / "vocab/glyphs.txt").read_text(encoding="utf-8").splitlines()
CLASSES: dict[str, str] = dict(zip(_NAMES, _TRAIN + _TEST, strict=True))  # name → symbol
TRAIN_CLASSES, TEST_CLASSES = tuple(_NAMES[: len(_TRAIN)]), tuple(_NAMES[len(_TRAIN) :])
_LABELS = {name: n for n, name in enumerate(CLASSES, 1)}
# The outline is filled and the lines stand on it, darker.
_LINE_ART = "☃☺♔⚄✉✎⌂🐵☕☠🐱☯⚗⚠⛃✌✍🐭🐮😈⌨🂡😎"
# One sees the background through the holes; those of others have a shade.
_OPEN = "☸♻⚖✂❄⚓⚙♬☣☥☮♀♂♉⚷❖⌘"
_GREY = (0.299, 0.587, 0.114)
_Scene = tuple[str, tuple[str, ...], tuple[str, ...]]  # key, classes, groups
_COUNTS = {"pretrain": 4000, "train": 3000, "holdout": 300, "test": 25, "choice": 264}
_GRID = 2  # objects are rasterised this many times finer and averaged down, for smooth edges


@cache
def _contours(name: str) -> list[tuple[np.ndarray, bool]]:
    """A symbol's contours, largest first, in a centred box of longest side 1 (y down).

    Each is its points [n, 2], and whether it adds ink: a font turns inner ones the other way round.
    """
    path = TextPath((0, 0), CLASSES[name], size=100, prop=FontProperties(family="DejaVu Sans"))
    polygons = [np.asarray(p) for p in path.to_polygons(closed_only=True)]
    areas = [float(np.sum(p[:-1, 0] * p[1:, 1] - p[1:, 0] * p[:-1, 1]) / 2) for p in polygons]
    found = sorted(zip(areas, polygons, strict=True), key=lambda pair: -abs(pair[0]))
    found = found[:17] if name == "snowman" else found  # without the snow flakes around it
    points = np.concatenate([p for _, p in found])
    low, high = points.min(0), points.max(0)
    middle, side = (low + high) / 2, (high - low).max()
    return [((p - middle) / side * (1, -1), a * found[0][0] > 0) for a, p in found]


def _raster(name: str, extent: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """What an object covers and where its main colour is: square maps in 0..1 around it."""
    side = int(np.ceil(extent * 1.36)) + 3
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]]) * extent * _GRID
    body, ink = (Image.new("L", (side * _GRID, side * _GRID)) for _ in range(2))
    paint_body, paint_ink = ImageDraw.Draw(body), ImageDraw.Draw(ink)
    stroke = max(1, round(extent * _GRID / 36))  # for thin symbols
    hollow, line_art = CLASSES[name] in _OPEN, CLASSES[name] in _LINE_ART
    for polygon, adds in _contours(name):
        points = [tuple(p) for p in (polygon @ turn + side * _GRID / 2).tolist()]
        paint_ink.polygon(points, fill=255 * adds)
        covers = adds or not hollow
        paint_body.polygon(points, fill=255 * covers)
        if covers:
            paint_body.line(points, fill=255, width=stroke, joint="curve")
        if adds and not line_art:
            paint_ink.line(points, fill=255, width=stroke, joint="curve")
    cover, lines = (np.asarray(m.reduce(_GRID), np.float32) / 255 for m in (body, ink))
    return cover, (1 - lines if line_art else lines)


@cache
def _scale(name: str) -> float:
    """How much larger a thin or flat symbol is drawn, so that classes cover similar areas."""
    cover, _ = _raster(name, 64.0, 0.0)
    return float(np.clip(np.sqrt(0.5 / (cover.sum() / 64**2)), 0.9, 1.25))


def _window(corner: np.ndarray, side: int, size: int) -> tuple[tuple[slice, ...], ...]:
    """Where a patch with its upper left at `corner` (x, y) falls, and which part of it does."""
    there = [slice(max(c, 0), min(c + side, size)) for c in corner[::-1].tolist()]
    part = [slice(t.start - c, t.stop - c) for t, c in zip(there, corner[::-1], strict=True)]
    return tuple(there), tuple(part)


def _texture(rng: np.random.Generator, side: int, size: int, depth: float) -> np.ndarray:
    """A pattern [side, side, 1] around 1: stripes, checks, dots, blotches or a slope."""
    y, x = np.mgrid[:side, :side].astype(np.float32) / size
    kind, angle, period = rng.integers(5), rng.uniform(0, np.pi), rng.uniform(0.05, 0.16)
    u = (x * np.cos(angle) + y * np.sin(angle)) / period
    v = (y * np.cos(angle) - x * np.sin(angle)) / period
    blotches = Image.fromarray((rng.random((6, 6)) * 255).astype(np.uint8))
    if kind == 0:
        wave = np.sin(2 * np.pi * u)
    elif kind == 1:
        wave = np.sign(np.sin(np.pi * u) * np.sin(np.pi * v))
    elif kind == 2:
        wave = 1 - 2 * ((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.08)
    elif kind == 3:
        large = blotches.resize((side, side), Image.Resampling.BICUBIC)
        wave = np.asarray(large, np.float32) / 127.5 - 1
    else:
        wave = 2 * (u - u.min()) / max(float(np.ptp(u)), 1e-6) - 1
    return (1 + depth * wave)[..., None].astype(np.float32)


def _colour(rng: np.random.Generator, away: Sequence[np.ndarray], distance: float,
            saturation: tuple) -> np.ndarray:  # fmt: skip
    """An RGB colour in 0..1, if it can be at least `distance` from those of `away`."""
    tried = []
    for _ in range(40):
        hsv = rng.random(), rng.uniform(*saturation), rng.uniform(0.15, 1)
        rgb = np.array(colorsys.hsv_to_rgb(*hsv))
        gaps = [float(np.linalg.norm(rgb - c)) * (1.6 if n else 1) for n, c in enumerate(away)]
        # equally bright colours are hard to tell apart, whatever their hue
        gaps += [2.2 * abs(float((rgb - c) @ _GREY)) for c in away[:1]]
        tried.append((min(gaps, default=9), rgb))
        if tried[-1][0] >= distance:
            break
    return max(tried, key=lambda one: one[0])[1]


def _layout(rng: np.random.Generator, patches: list[np.ndarray], extents: list[float],
            size: int) -> list[np.ndarray]:  # fmt: skip
    """Each patch's upper left corner: of 40 layouts the first that leaves 80% of each visible."""
    tried = []
    for _ in range(40):
        hidden, shares, corners = np.zeros((size, size), np.float32), [], []
        for patch, extent in zip(patches[::-1], extents[::-1], strict=True):  # the last lies on top
            margin = min(0.44 * extent, size / 2)
            middle = rng.uniform(margin, size - margin, 2)
            corners.append(np.round(middle - len(patch) / 2).astype(int))
            there, part = _window(corners[-1], len(patch), size)
            shares.append(float((patch[part] * (1 - hidden[there])).sum() / patch.sum()))
            hidden[there] = np.maximum(hidden[there], patch[part])
        tried.append((min(shares, default=1.0), corners[::-1]))
        if tried[-1][0] >= 0.8:
            break
    return max(tried, key=lambda one: one[0])[1]


def draw(names: Sequence[str], seed: int | Sequence[int],
         size: int = 128) -> tuple[Image.Image, np.ndarray]:  # fmt: skip
    """Draw a scene of the named objects: an RGB picture and its label map, uint8 [size, size].

    A label is the class's place in `CLASSES` plus 1, 0 background. Equal arguments, equal pixels.
    """
    rng = np.random.default_rng((VERSION, *np.atleast_1d(seed).tolist()))
    ground = _colour(rng, [], 0, (0.0, 0.55))
    picture = np.clip(ground * _texture(rng, size, size, rng.uniform(0.03, 0.12)), 0, 1)
    colours = [ground]
    for _ in names:
        colours.append(_colour(rng, colours, 0.5, (0.35, 1.0)))
    low, high = {1: (56, 96), 2: (52, 72)}.get(len(names), (48, 62))
    extents = [rng.uniform(low, high) * _scale(name) * size / 128 for name in names]
    patches = [_raster(n, e, rng.uniform(-0.45, 0.45)) for n, e in zip(names, extents, strict=True)]
    corners = _layout(rng, [patch for patch, _ in patches], extents, size)
    labels = np.zeros((size, size), np.uint8)
    placed = zip(names, colours[1:], patches, corners, strict=True)
    for name, colour, (cover, main), corner in placed:
        there, part = _window(corner, len(cover), size)
        shade = colour * 0.35 if colour @ _GREY > 0.4 else 0.45 * colour + 0.55
        paint = main[..., None] * colour + (1 - main[..., None]) * shade
        paint = np.clip(paint * _texture(rng, len(cover), size, rng.uniform(0.0, 0.16)), 0, 1)
        picture[there] += cover[part][..., None] * (paint[part] - picture[there])
        labels[there][cover[part] >= 0.5] = _LABELS[name]
    return Image.fromarray((picture * 255 + 0.5).astype(np.uint8)), labels


class GlyphWorld(CoSegData):
    """Scenes of the classes that `scenes` tells, drawn when asked for; masks are exact."""

    def __init__(self, fold: str, found: Sequence[_Scene], size: int) -> None:
        keys, self.scenes, own = zip(*found, strict=True)
        super().__init__(f"glyphworld_{fold}", "glyphworld", keys, self.scenes)
        classes = sorted(set().union(*own))
        self.groups = {c: tuple(i for i, held in enumerate(own) if c in held) for c in classes}
        self.size, self._seed, self._file = size, list(_COUNTS).index(fold), cache(self._draw)

    def _draw(self, start: int) -> np.ndarray:
        """Pictures and label maps [n, size, size, 3 + 1]; kept, as drawing takes its time."""
        items = range(start, min(start + IN_A_FILE, len(self)))
        name = digest([_LABELS, [self.content(i) for i in items]], 16)
        file = place("cache") / f"glyphworld-{name}.npy"
        scenes = [(self.scenes[i], (self._seed, i), self.size) for i in items]
        return kept(file, lambda: np.stack([np.dstack(draw(*scene)) for scene in scenes]))

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self._file(i - i % IN_A_FILE)[i % IN_A_FILE, ..., :3])

    def mask(self, i: int, classes: Collection[str]) -> np.ndarray:
        labels = self._file(i - i % IN_A_FILE)[i % IN_A_FILE, ..., 3]
        return np.isin(labels, [_LABELS.get(c, -1) for c in classes]).astype(np.uint8)

    def content(self, i: int) -> str:
        return digest([VERSION, self._seed, i, self.size, self.scenes[i]], 16)


def glyphworld(fold: str, n: int | None = None, size: int = 128) -> CoSegData:
    """One fold of GlyphWorld; always the same pictures, each in the groups of all its objects.

    `pretrain`: 4,000 scenes of one to three objects of any class. `train` (3,000), `holdout` (300):
    two or three of the training classes. `choice`: 264 of two test classes. `test`: 25 for each
    test class, in its group alone, beside one or two others; every 30th lacks the object.
    n: pictures (`test`: for each class). size: side in pixels.
    """
    rng = np.random.default_rng((VERSION, 1000 + list(_COUNTS).index(fold)))
    found = (_test_scenes if fold == "test" else _scenes)(rng, fold, n or _COUNTS[fold])
    return GlyphWorld(fold, list(found), size)


def _pick(rng: np.random.Generator, among: Sequence, count: int) -> tuple:
    return tuple(among[j] for j in rng.permutation(len(among))[:count])


def _test_scenes(rng: np.random.Generator, fold: str, n: int) -> Iterator[_Scene]:
    for k, c in enumerate(TEST_CLASSES):
        others = [o for o in TEST_CLASSES if o != c]
        for j in range(n):
            absent = j % 5 == 4 and ((k * n + j) // 5) % 6 == 3
            more = _pick(rng, others, int(rng.integers(1, 3)) + absent)
            names = more if absent else (c, *more)
            yield f"{c}/{j:03d}", _pick(rng, names, len(names)), (c,)


def _scenes(rng: np.random.Generator, fold: str, n: int) -> Iterator[_Scene]:
    pool = {"pretrain": tuple(CLASSES), "choice": TEST_CLASSES}.get(fold, TRAIN_CLASSES)
    pairs = list(permutations(pool, 2))
    for j in range(n):
        if fold == "choice":
            names = pairs[j] if j < len(pairs) else _pick(rng, pairs, 1)[0]
        else:
            names = _pick(rng, pool, int(rng.integers(1 if fold == "pretrain" else 2, 4)))
        yield f"{j:05d}", names, names
