"""Draw the README's figures: `python scripts/draw_figures.py [--out figures] [--only teaser,…]`.

teaser: two sets of examples/ with the shipped weights. architecture: the network, after the
paper's Fig. 2. glyphworld: drawings and truth. group_choice: one drawing in two sets; it needs a
finished run of the `embedded` profile and is left out without one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from lcco.config import load_profile
from lcco.data import CoSegData, load_data
from lcco.experiment.runs import Run, find_run
from lcco.experiment.variants import BASELINE
from lcco.metrics import count, resize_map
from lcco.store import atomic_path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Four of each set, mistakes among them.
TEASER = {
    "motorbike": ("000086", "032533", "128137", "551647"),
    "cat": ("196393", "358083", "416256", "555705"),
}
# Okabe and Ito's colours: ISFC, CLIP interaction, CLIP regularization, losses.
BLUE, GREEN, PURPLE, RED = "#0072B2", "#009E73", "#A0457E", "#D55E00"
INK, SOFT, FROZEN = "#222222", "#8a8f98", "#dbe4ee"
WIDTH = 10.0  # inches; README shows 90 pixels an inch, so that 9 points are 11 pixels


def new_figure(height: float) -> Figure:
    """An empty white figure, outside pyplot."""
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write `<name>.png`."""
    with atomic_path(folder / f"{name}.png") as part:
        figure.savefig(part, format="png", dpi=180, metadata={"Software": None})
    return folder / f"{name}.png"


def show(figure: Figure, box: Sequence[float], image: Any, edge: str = "none") -> Axes:
    """A picture in a box (left, bottom, width, height) in inches, with a coloured edge."""
    w, h = figure.get_size_inches()
    axes = figure.add_axes((box[0] / w, box[1] / h, box[2] / w, box[3] / h))
    axes.imshow(np.asarray(image), aspect="auto", interpolation="lanczos")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=edge, linewidth=2.5, visible=edge != "none")
    return axes


def write(figure: Figure, x: float, y: float, text: str, size: float = 10, **style: Any) -> None:
    """Text at (x, y) in inches, centred."""
    w, h = figure.get_size_inches()
    style = {"ha": "center", "va": "center", "color": INK} | style
    figure.text(x / w, y / h, text, fontsize=size, **style)


def black_white(mask: np.ndarray) -> np.ndarray:
    """A mask as a picture: the object white on nearly black."""
    return np.where(np.asarray(mask, bool)[..., None], 255, 34).astype(np.uint8).repeat(3, -1)


# ----------------------------------------------------------------------------------------- teaser
def square_around(truth: np.ndarray) -> tuple[int, int, int, int]:
    """The largest square of a picture around its object: left, top, right, bottom."""
    h, w = truth.shape
    y, x = (int(np.mean(at)) for at in np.nonzero(truth))
    side = min(h, w)
    left, top = np.clip(x - side // 2, 0, w - side), np.clip(y - side // 2, 0, h - side)
    return int(left), int(top), int(left + side), int(top + side)


def teaser(folder: Path) -> Path:
    """Inputs, masks and cut-outs of two sets, the cats asked for; a set's pictures together."""
    from lcco import cosegment

    figure, cell, gap, top = new_figure(3.95), 1.14, 0.04, 3.62
    for n, (name, chosen) in enumerate(TEASER.items()):
        files = sorted((EXAMPLES / name).glob("*.jpg"))
        left = 0.36 + n * (4 * (cell + gap) + 0.2)
        asked = "cat" if name == "cat" else None  # without it the set is taken for something else
        middle, count = left + 2 * (cell + gap), f"{len(chosen)} of a set of {len(files)}"
        count += f", asked for: {asked}" if asked else ""
        write(figure, middle, 3.8, count, 10.5, color=SOFT)
        found = {Path(r.source).stem: r for r in cosegment(files, cls=asked)}
        for c, stem in enumerate(chosen):
            result = found[stem]
            picture, cut = Image.open(result.source).convert("RGB"), result.cutout()
            ground = Image.new("RGB", cut.size, "#f1f3f5")
            ground.paste(cut, (0, 0), cut)
            truth = Image.open(EXAMPLES / "truth" / name / f"{stem}.png").resize(picture.size)
            crop = square_around(np.asarray(truth.convert("L")) > 127)
            rows = picture, Image.fromarray(black_white(result.mask)), ground
            for r, image in enumerate(rows):
                y = top - (r + 1) * (cell + gap)
                show(figure, (left + c * (cell + gap), y, cell, cell), image.crop(crop))
    for r, name in enumerate(("input", "mask", "cut-out")):
        y = top - (r + 0.5) * (cell + gap) - gap / 2
        write(figure, 0.2, y, name, 10.5, rotation=90)
    return save(figure, folder, "teaser")


# ----------------------------------------------------------------------------------- architecture
class Sketch:
    """Boxes and arrows on a canvas of 100 × 54 units."""

    def __init__(self) -> None:
        self.figure = new_figure(5.4)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, 100), ylim=(0, 54))
        self.axes.set_axis_off()

    def text(self, x: float, y: float, text: str, size: float = 9.5, **style: Any) -> None:
        """Text, centred."""
        style = {"ha": "center", "va": "center", "color": INK} | style
        self.axes.text(x, y, text, fontsize=size, **style)

    def box(
        self, x: float, y: float, w: float, h: float, text: str = "", face: str = "white",
        edge: str = INK, size: float = 9.5, **style: Any,
    ) -> None:  # fmt: skip
        """A box around (x, y), with text in it."""
        at, round_ = (x - w / 2, y - h / 2), "round,pad=0,rounding_size=0.8"
        patch = FancyBboxPatch(at, w, h, round_, fc=face, ec=edge, lw=1.6, zorder=3)
        self.axes.add_patch(patch)
        self.text(x, y, text, size, zorder=4, **style)

    def line(
        self, *points: tuple[float, float], colour: str = INK, head: bool = True,
        dashed: bool = False,
    ) -> None:  # fmt: skip
        """A line over points, with an arrow's head at its end."""
        x, y = zip(*points, strict=True)
        style = {"color": colour, "lw": 1.4, "ls": (0, (3, 2)) if dashed else "-", "zorder": 2}
        self.axes.plot(x, y, solid_joinstyle="round", **style)
        if head:
            arrow = {"arrowstyle": "-|>", "color": colour, "lw": 0, "mutation_scale": 11}
            x, y = np.array(points[-2], float), np.array(points[-1], float)
            start = y - (y - x) / np.linalg.norm(y - x) * 1.5
            self.axes.annotate("", y, start, arrowprops=arrow, zorder=3)

    def plus(self, x: float, y: float) -> None:
        """Where a lateral connection is added."""
        self.axes.plot(x, y, "o", ms=10, mfc="white", mec=INK, mew=1.3, zorder=4)
        self.text(x, y - 0.08, "+", 10, zorder=5)

    def loss(self, x: float, y: float, text: str, w: float) -> None:
        """A loss and what it judges."""
        self.box(x, y, w, 3, text, face="#fdf0e7", edge=RED, size=9, color=RED)


def architecture(folder: Path) -> Path:
    """The network, after the paper's Fig. 2, in our own drawing."""
    s = Sketch()
    draw_visual_path(s)
    draw_semantic_path(s)
    s.box(4.2, 2.6, 3, 2.2, face=FROZEN, edge=SOFT)
    s.text(6.6, 2.6, "frozen", 9, ha="left")
    s.line((14, 2.6), (17.4, 2.6), colour=RED, head=False, dashed=True)
    s.text(18.4, 2.6, "loss, in training", 9, ha="left")
    return save(s.figure, folder, "architecture")


def draw_visual_path(s: Sketch) -> None:
    """Images, backbone, top-down path with the three modules, masks."""
    y, stages = 17.5, {4: (16.5, 13), 8: (21.8, 10), 16: (27.1, 7.5), 32: (32.4, 5)}
    shown = ("555705", "358083", "416256")
    for n, name in enumerate(shown):
        picture = Image.open(EXAMPLES / "cat" / f"{name}.jpg")
        truth = Image.open(EXAMPLES / "truth" / "cat" / f"{name}.png").convert("L")
        crop = square_around(np.asarray(truth) > 127)
        low = 0.1 * y - 0.39 - 0.16 * (n - 1)
        show(s.figure, (0.1 + 0.15 * n, low, 0.78, 0.78), picture.crop(crop), "white").set_zorder(3)
        mask = black_white(np.asarray(truth.crop(crop)) > 127)
        show(s.figure, (8.87 + 0.12 * n, low + 0.08, 0.62, 0.62), mask, "white").set_zorder(3)
    s.text(6, 10, "image set", 10)
    s.text(93.2, 10, "masks", 10)
    s.line((11.2, y), (14.7, y))
    for stride, (x, h) in stages.items():
        s.box(x, y, 3.4, h, str(stride), face="#eceef1", edge=SOFT)
        if stride > 4:
            s.line((x - 3.6, y), (x - 1.7, y))
    s.text(24.4, 27.6, "backbone", 10)
    s.text(24.4, 25.7, "maps at strides 4 to 32", 8.5, color=SOFT)
    s.line((34.1, y), (37.7, y))
    for x, name, at, colour in (
        (43.5, "ISFC", "$F^1$", BLUE), (59.5, "CLIP\ninteraction", "$F^2$", GREEN),
        (75.5, "CLIP\nregularization", "$F^3$", PURPLE),
    ):  # fmt: skip
        white = {"size": 10, "color": "white", "weight": "bold"}
        s.box(x, y, 11.6, 7.6, name, face=colour, edge=colour, **white)
        s.text(x - 7.2, y + 2.3, at, 10.5, color=colour)
    s.text(43.5, 12.8, "attention between\nall images of the set", 8.5, color=BLUE, va="top")
    for x, stride, low in ((51.4, 16, 8), (67.4, 8, 6.6), (83.2, 4, 5.2)):
        at, h = stages[stride]
        s.line((x - 2.1, y), (x + 2.3, y), head=stride > 4)
        s.line((at, y - h / 2), (at, low), (x, low), (x, y - 0.9), colour=SOFT)
        s.plus(x, y)
    s.line((83.2, y), (88.3, y))


def draw_semantic_path(s: Sketch) -> None:
    """CLIP, the similarities, and what they send to the modules."""
    s.box(20.5, 47, 13, 5.2, "CLIP text", face=FROZEN, edge=SOFT, size=10)
    s.box(20.5, 36, 13, 5.2, "CLIP image", face=FROZEN, edge=SOFT, size=10)
    s.text(5.8, 47, "“a photo of\na cat”,\n“… a dog”, …", 9)
    s.line((11.8, 47), (14, 47))
    s.line((6, 23), (6, 36), (14, 36))
    s.line((27, 47), (35, 47))
    s.line((27, 36), (52, 36))
    s.line((31, 36), (31, 44), (35, 44))
    s.text(40.3, 37.6, "image embeddings $h_i$", 8.5, color=SOFT)
    rng = np.random.default_rng(3)
    S = rng.uniform(0, 0.45, (5, 8)) + np.eye(8)[2] * 0.5
    axes = s.figure.add_axes((0.352, 42.4 / 54, 0.106, 6.2 / 54), zorder=3)
    axes.pcolormesh(S, cmap="Greys", vmin=-0.1, vmax=1.1, edgecolors="white", linewidth=1.2)
    axes.set_axis_off()
    s.text(40.5, 50.9, "similarities $S$ of $N$ images, $P$ words", 8.5, color=SOFT)
    s.line((46.1, 45.5), (59.5, 45.5), (59.5, 39.4))
    s.line((59.5, 45.5), (75.5, 45.5), (75.5, 39.4))
    s.text(53, 47, "Top-$K$ words", 8.5, color=GREEN)
    s.text(69, 47, "$v$, all words", 8.5, color=PURPLE)
    s.box(59.5, 36, 15, 6.6, "images and words\nfused by attention", edge=GREEN, size=9)
    s.box(75.5, 36, 13, 6.6, "the set's most\nlikely class $i^*$", edge=PURPLE, size=9)
    s.line((59.5, 32.7), (59.5, 21.4), colour=GREEN)
    s.line((75.5, 32.7), (75.5, 21.4), colour=PURPLE)
    s.text(61.2, 25, "$z_i$", 10.5, color=GREEN, ha="left")
    s.text(77.2, 25, "$h^{txt}_{i^*}$", 10.5, color=PURPLE, ha="left")
    s.line((54.5, 32.7), (54.5, 29), (47.8, 29), colour=RED, head=False, dashed=True)
    s.loss(43.5, 29, "$L_{cs}$: coarse masks", 15)
    s.line((82, 36), (85.2, 36), colour=RED, head=False, dashed=True)
    s.loss(91.2, 36, "$L_c$: class", 11)
    s.line((93.2, 27.8), (93.2, 22.8), colour=RED, head=False, dashed=True)
    s.loss(93.2, 29, "$L_{iou}$: masks", 11)


# ------------------------------------------------------------------------------------- GlyphWorld
def glyphworld(folder: Path) -> Path:
    """Two test sets, their drawings and truth: one drawing does not tell which object counts."""
    data = load_data("glyphworld_test")
    figure, cell, gap, top = new_figure(2.72), 1.14, 0.04, 2.4
    for n, name in enumerate(("umbrella", "teacup")):
        left = 0.36 + n * (4 * (cell + gap) + 0.2)
        write(figure, left + 2 * (cell + gap), 2.55, f"the set “{name}”", 10.5, color=SOFT)
        for c, i in enumerate(data.groups[name][:4]):
            rows = data.image(i), black_white(data.mask(i, [name]))
            for r, image in enumerate(rows):
                x, y = left + c * (cell + gap), top - (r + 1) * (cell + gap)
                show(figure, (x, y, cell, cell), image)
    for r, name in enumerate(("input", "truth")):
        write(figure, 0.2, top - (r + 0.5) * (cell + gap) - gap / 2, name, 10.5, rotation=90)
    return save(figure, folder, "glyphworld")


# ----------------------------------------------------------------------------------- group choice
def clearest(run: Run, data: CoSegData, among: int = 60) -> tuple[int, dict[str, list[int]]]:
    """The drawing whose worse mask of two is the best, and its two sets, itself first in both."""
    found, predictor = [], run.predictor()
    for i in range(min(among, len(data))):
        groups = {c: data.groups[c] for c in sorted(data.classes_of(i))}
        sets = {c: [i, *(j for j in g if j != i)][:5] for c, g in groups.items()}
        truths = [data.mask(i, [c]) for c in sets]
        maps = [resize_map(predictor(data, g)[0], truths[0].shape) for g in sets.values()]
        worse = min(count(m > 0.5, t).jaccard() for m, t in zip(maps, truths, strict=True))
        found.append((worse, i, sets))
    return max(found)[1:]


def group_choice(folder: Path) -> Path | None:
    """One drawing of two objects, in a set of either: LCCo's masks and the Baseline's."""
    profile = load_profile("embedded")
    experiment = profile.experiment
    runs = {"LCCo": find_run(experiment), "Baseline": find_run(experiment.replace(BASELINE))}
    if not runs["LCCo"]:
        return None
    data = load_data("glyphworld_choice", counts=profile.counts)
    i, sets = clearest(runs["LCCo"], data)
    figure, cell, gap = new_figure(3), 1.25, 0.05
    for r, (name, items) in enumerate(sets.items()):
        y = 2.65 - (r + 1) * (cell + gap)
        write(figure, 0.2, y + cell / 2, f"set of\n“{name}”", 9.5, rotation=90)
        for c, item in enumerate(items):
            x = 0.38 + c * (cell + gap) + (c > 0) * 0.2
            show(figure, (x, y, cell, cell), data.image(item), RED if c == 0 else "none")
        for c, (model, run) in enumerate(m for m in runs.items() if m[1]):
            x = 0.38 + (5 + c) * (cell + gap) + 0.4
            mask = run.predictor()(data, items)[0] > 0.5
            show(figure, (x, y, cell, cell), black_white(mask), RED)
            if r == 0:
                write(figure, x + cell / 2, 2.82, model, 10.5)
    write(figure, 0.38 + cell / 2, 2.82, "one drawing …", 10.5)
    write(figure, 0.58 + 3 * (cell + gap), 2.82, "… and the rest of its set", 10.5)
    return save(figure, folder, "group_choice")


def main() -> None:
    """The command line."""
    drawings = {f.__name__: f for f in (teaser, architecture, glyphworld, group_choice)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=EXAMPLES.parent / "figures")
    parser.add_argument("--only", default=",".join(drawings), help="which, with commas")
    options = parser.parse_args()
    for name in options.only.split(","):
        print(drawings[name](options.out) or f"{name}: left out, no finished run of `embedded`")


if __name__ == "__main__":
    main()
