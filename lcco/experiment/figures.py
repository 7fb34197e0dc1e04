"""Pictures of results: masks over pictures, maps, curves and dots, as PNG and PDF.

Safe for the colour-blind, readable at a page's width. The helpers lay out their own labels: legends
stand above the axes, long names at the left, one panel a test; `layout_problems` checks a figure.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any

import numpy as np

from lcco.experiment.tables import label, paired
from lcco.metrics import resize_map
from lcco.store import atomic_path

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.35, 6.9  # inches: one column, and the text width of a two-column page
PHOTOS = "photos"  # where figures of third parties' photographs go, which git ignores
ORANGE = (0.835, 0.369, 0.0)  # Okabe and Ito's vermilion
SIDE = 160  # pixels of a picture in a grid
STYLES = [(marker, line) for line in ("-", "--", ":") for marker in "osD^vP"]


def new_figure(width: float = COLUMN, height: float = 2.4, **grid: Any) -> tuple[Figure, Any]:
    """A figure outside pyplot, so that none stays open, and its axes (`Figure.subplots`)."""
    import seaborn as sns
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    context = sns.plotting_context("paper", font_scale=0.85)
    with sns.axes_style("ticks"), context, sns.color_palette("colorblind"):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(**grid)


def save(figure: Figure, folder: Path, name: str, caption: str = "", photos: bool = False) -> Path:
    """Write `<name>.png`, which carries the caption, and `.pdf`; give the PNG.

    photos: it shows photographs of third parties, which stay out of the repository.
    """
    folder = Path(folder) / PHOTOS if photos else Path(folder)
    png = {"Software": None, "Description": caption}
    for suffix, about in (("pdf", {"CreationDate": None}), ("png", png)):
        with atomic_path(folder / f"{name}.{suffix}") as part:
            figure.savefig(part, format=suffix, dpi=200, metadata=about)
    return folder / f"{name}.png"


def show(figure: Figure, folder: Path, name: str, text: str, photos: bool = False) -> None:
    """Save a figure and show it in a notebook, with its caption under it.

    Pictures are shown as JPEG: a notebook is a quarter as large.
    """
    from io import BytesIO

    from IPython import display
    from PIL import Image

    png, shown = save(figure, folder, name, text, photos), BytesIO()
    kind = "JPEG" if any(axes.images for axes in figure.axes) else "PNG"
    with Image.open(png) as whole:
        whole.convert("RGB").save(shown, kind, quality=85)
    width = round(110 * figure.get_figwidth())
    display.display(display.Image(shown.getvalue(), width=width), display.Markdown(text))


# --------------------------------------------------------------------------------------- pictures
def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture [H, W, 3] (0..1) greyed, the object tinted, with a white and a black outline.

    mask: [h, w], object where > 0.5. It is seen on any object, in print, without colour vision.
    """
    from scipy.ndimage import binary_dilation, binary_erosion

    on = resize_map(np.asarray(mask, np.float32), image.shape[:2]) > 0.5
    grey, wide = image.mean(-1, keepdims=True), round(max(image.shape) / 180) + 1
    out = np.where(on[..., None], 0.5 * grey + 0.55 * np.array(ORANGE), 0.3 + 0.4 * grey).clip(0, 1)
    out[on & ~binary_erosion(on, iterations=wide, border_value=1)] = 1.0
    out[binary_dilation(on, iterations=wide) & ~on] = 0.0
    return out


def _square(image: np.ndarray) -> np.ndarray:
    """A picture or map squashed to a square, as the networks see it."""
    from PIL import Image

    whole = Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8))
    return np.asarray(whole.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) / 255


def masks_grid(rows: Mapping, title: str = "", across: int = 2, width: float = PAGE) -> Figure:
    """Fig. 4's grid: a line of pictures, then lines of masks drawn over them.

    rows: name → pictures [H, W, 3] in 0..1 (the first line), then name → masks [h, w]; or title →
    such rows, for several sets, `across` of them abreast.
    """

    def drawn(lines: Mapping[str, Sequence[np.ndarray]]) -> dict[str, list[np.ndarray]]:
        pictures, *_ = lines.values()
        return {
            line: [x if x.ndim == 3 else overlay(p, x) for p, x in zip(pictures, own, strict=True)]
            for line, own in lines.items()
        }

    several = isinstance(next(iter(rows.values())), Mapping)
    sets = rows if several else {title: rows}
    return _lines({name: drawn(lines) for name, lines in sets.items()}, across, width)


def maps_grid(pictures: Sequence[np.ndarray], maps: Mapping[str, Sequence[np.ndarray]], what: str,
              title: str = "", width: float = PAGE) -> Figure:  # fmt: skip
    """Pictures over lines of maps [h, w] ≥ 0, all on one colour scale whose bar says `what`."""
    top = max(float(m.max()) for own in maps.values() for m in own)
    coloured = {name: [_coloured(m, top) for m in own] for name, own in maps.items()}
    return _lines({title: {"input": pictures, **coloured}}, 1, width, what, top)


def attention_overlay(query: np.ndarray, at: tuple[float, float], others: Sequence[np.ndarray],
                      weights: Sequence[np.ndarray], what: str = "share of the attention",
                      width: float = PAGE) -> Figure:  # fmt: skip
    """Where one place of a picture looks in the others: a cross there, attention [h, w] over them.

    at: (x, y) as shares of the query's width and height.
    """
    top = max(float(w.max()) for w in weights)
    grey = [_square(o).mean(-1, keepdims=True) for o in others]
    over = [0.6 * _coloured(w, top) + 0.4 * g for w, g in zip(weights, grey, strict=True)]
    figure = _lines({"": {"": [query, *over]}}, 1, width, what, top)
    for colour, size in (("white", 4), (ORANGE, 2)):
        x, y = at[0] * SIDE, at[1] * SIDE
        figure.axes[0].plot(x, y, "+", color=colour, markersize=13, markeredgewidth=size)
    return figure


def _coloured(values: np.ndarray, top: float) -> np.ndarray:
    from matplotlib import colormaps

    return colormaps["viridis"](_square(np.asarray(values) / top))[..., :3]


def _lines(sets: Mapping[str, Mapping[str, Sequence[np.ndarray]]], across: int, width: float,
           what: str = "", top: float = 1) -> Figure:  # fmt: skip
    """Named lines of pictures, set by set; what: the label of a colour bar from 0 to `top`."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    across, step = min(across, len(sets)), SIDE + 4
    n = max(len(images) for own in sets.values() for images in own.values())
    down, lines = -(-len(sets) // across), max(map(len, sets.values()))
    wide = across * (n + 0.6) + bool(what)
    cell = min(1.2, width / wide)
    how = {"nrows": down, "ncols": across, "squeeze": False}
    figure, grid = new_figure(cell * wide, down * (lines * cell + 0.25), **how)
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0.02, hspace=0.02)
    for axes, (title, own) in zip(grid.flat, sets.items(), strict=False):
        sheet = np.ones((len(own) * step, n * step, 3))
        for y, images in enumerate(own.values()):
            for x, image in enumerate(images):
                sheet[y * step :, x * step :][:SIDE, :SIDE] = _square(image)
        axes.imshow(sheet)
        axes.set_title(shorten(title, int(n * cell / 0.065)), fontsize=8)
        names = [fill(name, max(6, int(cell / 0.065))) for name in own]
        middles = np.arange(len(own)) * step + SIDE / 2
        axes.set_yticks(middles, names, fontsize=7, rotation=90, ha="center", va="center")
        axes.tick_params(length=0, pad=8, labelbottom=False)
        axes.set(xticks=[], frame_on=False)
    for axes in grid.flat[len(sets) :]:
        axes.remove()
    if what:
        scale = ScalarMappable(Normalize(0, top), "viridis")
        bar = figure.colorbar(scale, ax=grid.ravel().tolist(), aspect=30, pad=0.01)
        bar.set_label(what, size=7)
    return figure


def heatmap(S: np.ndarray, words: Sequence[str], k: int = 0, top: int = 15,
            what: str = "cosine similarity") -> Figure:  # fmt: skip
    """S [N, P] of a set: the words with the largest column sums, the distilled K above a line."""
    best = np.argsort(-S.sum(0))[:top]
    figure, axes = new_figure(4.6, 0.5 + 0.21 * len(best))
    drawn = axes.imshow(S[:, best].T, aspect="auto", cmap="viridis")
    names = [shorten(words[i], 24, placeholder="…") for i in best]
    axes.set_yticks(range(len(best)), names, fontsize=7)
    axes.set_xticks(range(len(S)), range(1, len(S) + 1))
    axes.set_xlabel("picture of the set")
    axes.axhline(k - 0.5, color="white", linewidth=1.5)
    figure.colorbar(drawn, ax=axes, aspect=30).set_label(what, size=7)
    return figure


# ------------------------------------------------------------------------------ curves and dots
def _panels(rows: pd.DataFrame, height: float, width: float) -> tuple[Figure, list]:
    """A figure with a panel a test set and protocol; and [(axes, their rows)]."""
    parts = list(rows.groupby(["test_set", "protocol"], sort=False))
    across = 2 if len(parts) in (2, 4) else min(3, len(parts))
    down = -(-len(parts) // across)
    figure, grid = new_figure(width, 0.3 + down * height, nrows=down, ncols=across, squeeze=False)
    for axes, ((test, protocol), _) in zip(grid.flat, parts, strict=False):
        axes.set_title(fill(f"{label(test)}, {protocol}", int(8 * width / across)), fontsize=8)
    for axes in grid.flat[len(parts) :]:
        axes.remove()
    return figure, [(axes, own) for axes, (_, own) in zip(grid.flat, parts, strict=False)]


def _finish(figure: Figure) -> Figure:
    """Light grids, no frames, and one legend above the axes with every entry once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        axes.grid(linewidth=0.4, alpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        handles, texts = axes.get_legend_handles_labels()
        entries |= dict(zip(texts, handles, strict=True))
    if len(entries) > 1:
        fit = int(figure.get_figwidth() / (0.065 * max(map(len, entries)) + 0.5))
        how = {"loc": "outside upper center", "frameon": False, "fontsize": 7}
        figure.legend(entries.values(), entries.keys(), ncols=max(1, min(4, fit)), **how)
    return figure


def dots(rows: pd.DataFrame, reference: str = "Baseline", metric: str = "J") -> Figure:
    """Change against a reference row, seed by seed: sorted, mean ± sd, the paper's beside it."""
    change = paired(rows, reference, metric)
    order = list(change.groupby("row")["mean"].mean().sort_values().index)
    figure, panels = _panels(change, 0.75 + 0.27 * len(order), PAGE)
    for axes, own in panels:
        own, y = own.set_index("row").reindex(order), range(len(order))
        axes.axvline(0, color="0.4", linewidth=0.8)
        how = {"fmt": "o", "markersize": 4, "elinewidth": 1, "label": "here"}
        axes.errorbar(own["mean"], y, xerr=own["sd"].fillna(0), **how)
        if own["paper"].notna().any():
            axes.plot(own["paper"], y, "D", color="0.45", mfc="none", markersize=4, label="paper")
        first = axes.get_subplotspec().is_first_col()
        axes.set_yticks(y, order if first else [""] * len(order), fontsize=7)
        axes.set(ylim=(-0.6, len(order) - 0.4), xlabel=f"{metric} − {metric} of {reference}")
        axes.locator_params(axis="x", nbins=5)
    return _finish(figure)


def curve(rows: pd.DataFrame, x: str, metric: str = "J", by: str = "row", xlabel: str = "",
          least: float = 5) -> Figure:  # fmt: skip
    """Mean ± sd over seeds of a metric (per cent) along `x`, a line for each `by`.

    Lines that lie on each other stay visible: the first are the widest. least: the smallest range
    of the y axis, so that no small change looks large.
    """
    tests = len(rows[["test_set", "protocol"]].drop_duplicates())
    figure, panels = _panels(rows, 2.2, COLUMN if tests == 1 else PAGE)
    for axes, own in panels:
        lines = list(own.groupby(by, sort=False))
        for n, (name, part) in enumerate(lines):
            found = part.dropna(subset=[metric]).groupby(x)[metric].agg(["mean", "std"])
            (marker, line), under = STYLES[n % len(STYLES)], len(lines) - n
            axes.errorbar(
                found.index, found["mean"], found["std"].fillna(0), marker=marker, linestyle=line,
                markersize=2 + 2 * under, linewidth=under, zorder=2 + n / 100,
                label=str(name) if len(found) else f"{name} (not measured)",
            )  # fmt: skip
        low, high = axes.get_ylim()
        middle, half = (low + high) / 2, max(high - low, least) / 2
        ticks = sorted(own[x].dropna().unique())
        axes.set(ylim=(middle - half, middle + half), xticks=ticks[:: -(-len(ticks) // 7)])
        axes.set(xlabel=xlabel or label(x), ylabel=f"{label(metric)}, %")
    return _finish(figure)


def cost_bars(rows: pd.DataFrame, value: str = "seconds", by: str = "network",
              xlabel: str = "") -> Figure:  # fmt: skip
    """A dot for each row on a logarithmic axis, a marker for each `by`."""
    order = list(dict.fromkeys(rows["row"]))[::-1]
    figure, axes = new_figure(PAGE, 0.9 + 0.22 * len(order))
    for n, (kind, own) in enumerate(rows[rows[value] > 0].groupby(by, sort=False)):
        y = [order.index(name) for name in own["row"]]
        axes.plot(own[value], y, STYLES[n][0], markersize=5, label=label(kind))
    axes.set(xscale="log", xlabel=xlabel or label(value), ylim=(-0.6, len(order) - 0.4))
    axes.set_yticks(range(len(order)), order, fontsize=7)
    return _finish(figure)


def learning_curves(runs: Mapping[str, Any]) -> Figure:
    """Loss, and J on the held-out pictures, over the steps of each run (`Run.log`)."""
    figure, (loss, held) = new_figure(PAGE, 2.4, nrows=1, ncols=2)
    for n, (name, run) in enumerate(runs.items()):
        log, (marker, line) = run.log(), STYLES[n % len(STYLES)]
        loss.plot(log["step"], log["loss"], line, label=name, linewidth=1)
        if "holdout_J" in log:
            known = log.dropna(subset=["holdout_J"])
            held.plot(known["step"], 100 * known["holdout_J"], line, marker=marker, label=name)
    loss.set(xlabel="step", ylabel="loss")
    held.set(xlabel="step", ylabel="J on held-out pictures, %")
    for axes in (loss, held):
        axes.locator_params(axis="x", nbins=5)
    return _finish(figure)


# ------------------------------------------------------------------------------------------ checks
def layout_problems(figure: Figure) -> list[str]:
    """What a reader would stumble over: texts cut or overlapping, small axes, a warning."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.canvas.draw()
    out, unseen = [f"warning: {w.message}" for w in caught], set()
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            unseen |= set() if low <= tick.get_loc() <= high else {tick.label1, tick.label2}
    texts = [t for t in figure.findobj(Text) if t not in unseen and t.get_visible()]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text().strip()]
    page = figure.bbox
    for text, box in boxes:
        if min(box.x0, box.y0) < -1 or box.x1 > page.x1 + 1 or box.y1 > page.y1 + 1:
            out.append(f"`{text}` leaves the canvas")
    for (a, one), (b, two) in combinations(boxes, 2):
        if one.padded(-0.5).overlaps(two.padded(-0.5)):
            out.append(f"`{a}` and `{b}` overlap")
    filled = Bbox.union([axes.get_window_extent() for axes in figure.axes])
    if (share := filled.width * filled.height / (page.width * page.height)) < 0.5:
        out.append(f"axes fill {share:.0%} of the canvas")
    return out
