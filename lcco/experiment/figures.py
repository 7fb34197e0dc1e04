"""Pictures of results: masks over pictures, maps, curves and dots, as PNG and PDF.

Safe for the colour-blind, readable at a page's width: one panel a test, legends above the axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill, shorten
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

from lcco.experiment.tables import label, paired
from lcco.metrics import resize_map
from lcco.store import atomic_path

COLUMN, PAGE = 3.35, 6.9  # inches: one column, and the text width of a two-column page
ORANGE = (0.835, 0.369, 0.0)  # Okabe and Ito's vermilion
SIDE, GAP = 160, 4  # pixels: a picture in a grid, and the white beside it


def new_figure(width: float = COLUMN, height: float = 2.4, **grid: Any) -> tuple[Figure, Any]:
    """A figure outside pyplot, so that none stays open, and its axes (`Figure.subplots`)."""
    context = sns.plotting_context("paper", font_scale=0.85)
    with sns.axes_style("ticks"), context, sns.color_palette("colorblind"):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(**grid)


def save(figure: Figure, folder: Path, name: str, caption: str = "", photos: bool = False) -> Path:
    """Write `<name>.png`, which carries the caption, and `.pdf`; give the PNG.

    photos: it shows photographs of third parties; it goes to `photos/`, which git ignores.
    """
    folder = Path(folder) / "photos" if photos else Path(folder)
    png = {"Software": None, "Description": caption}
    for suffix, about in (("pdf", {"CreationDate": None}), ("png", png)):
        with atomic_path(folder / f"{name}.{suffix}") as part:
            figure.savefig(part, format=suffix, dpi=200, metadata=about)
    return folder / f"{name}.png"


def show(figure: Figure, folder: Path, name: str, text: str, photos: bool = False) -> None:
    """Save a figure and show it in a notebook, with its caption under it."""
    from IPython import display

    png = save(figure, folder, name, text, photos)
    drawn = display.Image(filename=str(png), width=round(110 * figure.get_figwidth()))
    display.display(drawn, display.Markdown(text))


# --------------------------------------------------------------------------------------- pictures
def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture [H, W, 3] (0..1) greyed, the object tinted, with a white and a black outline.

    mask: [h, w], object where > 0.5. It is seen on any object, in print, without colour vision.
    """
    on = resize_map(np.asarray(mask, np.float32), image.shape[:2]) > 0.5
    grey, wide = image.mean(-1, keepdims=True), round(max(image.shape) / 180) + 1
    out = np.where(on[..., None], 0.5 * grey + 0.55 * np.array(ORANGE), 0.3 + 0.4 * grey).clip(0, 1)
    out[on & ~binary_erosion(on, iterations=wide, border_value=1)] = 1.0
    out[binary_dilation(on, iterations=wide) & ~on] = 0.0
    return out


def masks_grid(rows: Mapping, title: str = "", across: int = 2) -> Figure:
    """Fig. 4's grid: a line of pictures, then lines of masks drawn over them.

    rows: name → pictures [H, W, 3] in 0..1 (the first line), then name → masks [h, w]; or title →
    such rows, for several sets, `across` of them abreast.
    """
    sets = rows if isinstance(next(iter(rows.values())), Mapping) else {title: rows}
    n = max(len(images) for lines in sets.values() for images in lines.values())
    across, most = min(across, len(sets)), max(map(len, sets.values()))
    down, cell = -(-len(sets) // across), min(1.2, PAGE / (across * (n + 0.6)))
    size = cell * across * (n + 0.6), down * (most * cell + 0.25)
    figure, grid = new_figure(*size, nrows=down, ncols=across, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0.02, hspace=0.02)
    for axes, (name, lines) in zip(grid.flat, sets.items(), strict=False):
        axes.imshow(_sheet(lines, n))
        axes.set_title(shorten(name, int(n * cell / 0.065)), fontsize=8)
        names = [fill(line, max(6, int(cell / 0.065))) for line in lines]
        middles = np.arange(len(lines)) * (SIDE + GAP) + SIDE / 2
        axes.set_yticks(middles, names, fontsize=7, rotation=90, ha="center", va="center")
        axes.tick_params(length=0, pad=8)
        axes.set(xticks=[], frame_on=False)
    for axes in grid.flat[len(sets) :]:
        axes.remove()
    return figure


def _sheet(lines: Mapping[str, Sequence[np.ndarray]], n: int) -> np.ndarray:
    """Lines of `n` pictures as one; masks are drawn over the pictures of the first line."""
    pictures, step = next(iter(lines.values())), SIDE + GAP
    sheet = np.ones((len(lines) * step, n * step, 3))
    for y, images in enumerate(lines.values()):
        for x, (picture, image) in enumerate(zip(pictures, images, strict=True)):
            shown = image if image.ndim == 3 else overlay(picture, image)
            sheet[y * step :, x * step :][:SIDE, :SIDE] = _square(shown)
    return sheet


def _square(image: np.ndarray) -> np.ndarray:
    """A picture or map squashed to a square, as the networks see it."""
    whole = Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8))
    return np.asarray(whole.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) / 255


def maps_grid(pictures: Sequence[np.ndarray], maps: Mapping[str, Sequence[np.ndarray]], what: str,
              title: str = "") -> Figure:  # fmt: skip
    """Pictures over lines of maps [h, w] ≥ 0, laid over them in grey, on one colour scale.

    what: the label of the scale's bar.
    """
    top = max(float(m.max()) for own in maps.values() for m in own)
    grey, lines = [_square(p).mean(-1, keepdims=True) for p in pictures], {"input": pictures}
    for name, own in maps.items():
        heat = [colormaps["viridis"](_square(m / top))[..., :3] for m in own]
        lines[name] = [0.7 * h + 0.3 * g for h, g in zip(heat, grey, strict=True)]
    figure = masks_grid(lines, title)
    scale = ScalarMappable(Normalize(0, top), "viridis")
    figure.colorbar(scale, ax=figure.axes, aspect=30, pad=0.01).set_label(what, size=7)
    return figure


def heatmap(S: np.ndarray, words: Sequence[str], k: int = 0, top: int = 15) -> Figure:
    """S [N, P] of a set: the words with the largest column sums, the distilled K above a line."""
    best = np.argsort(-S.sum(0))[:top]
    names = [shorten(words[i], 24, placeholder="…") for i in best]
    shown = pd.DataFrame(S[:, best].T, names, range(1, len(S) + 1))
    figure, axes = new_figure(5, 0.5 + 0.21 * len(best))
    bar = {"label": "cosine similarity", "aspect": 30, "pad": 0.02}
    sns.heatmap(shown, cmap="viridis", cbar_kws=bar, ax=axes)
    axes.axhline(k, color="white", linewidth=1.5)
    axes.set(xlabel="picture of the set")
    return figure


# ------------------------------------------------------------------------------ curves and dots
def _panels(parts: Mapping[str, pd.DataFrame], draw: Callable[[Axes, pd.DataFrame], None],
            height: float, width: float = PAGE, **grid: Any) -> Figure:  # fmt: skip
    """A panel for each part (title → rows), filled by `draw`; one legend above them all."""
    across, entries = 2 if len(parts) in (2, 4) else min(3, len(parts)), {}
    grid |= {"nrows": -(-len(parts) // across), "ncols": across, "squeeze": False}
    figure, panels = new_figure(width, 0.3 + grid["nrows"] * height, **grid)
    for axes, (title, rows) in zip(panels.flat, parts.items(), strict=False):
        draw(axes, rows)
        axes.set_title(fill(title, int(8 * width / across)), fontsize=8)
        axes.grid(linewidth=0.4, alpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        handles, texts = axes.get_legend_handles_labels()
        entries |= dict(zip(texts, handles, strict=True))
        axes.legend().remove()
    for axes in panels.flat[len(parts) :]:
        axes.remove()
    if len(entries) > 1:
        fit = int(width / (0.065 * max(map(len, entries)) + 0.5))
        how = {"loc": "outside upper center", "frameon": False, "fontsize": 7}
        figure.legend(entries.values(), entries.keys(), ncols=max(1, min(4, fit)), **how)
    return figure


def _by_test(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    groups = rows.groupby(["test_set", "protocol"], sort=False)
    return {f"{label(test)}, {protocol}": own for (test, protocol), own in groups}


def dots(rows: pd.DataFrame, reference: str = "Baseline", metric: str = "J") -> Figure:
    """Change against a reference row, seed by seed: sorted, mean ± sd, the paper's beside it."""
    change = paired(rows, reference, metric)
    order = list(change.groupby("row")["mean"].mean().sort_values().index)

    def draw(axes: Axes, own: pd.DataFrame) -> None:
        own, y = own.set_index("row").reindex(order), range(len(order))
        axes.axvline(0, color="0.4", linewidth=0.8)
        how = {"fmt": "o", "markersize": 4, "elinewidth": 1, "label": "here"}
        axes.errorbar(own["mean"], y, xerr=own["sd"].fillna(0), **how)
        if own["paper"].notna().any():
            axes.plot(own["paper"], y, "D", color="0.45", mfc="none", markersize=4, label="paper")
        axes.set_yticks(y, order, fontsize=7)
        axes.set(ylim=(-0.6, len(order) - 0.4), xlabel=f"{metric} − {metric} of {reference}")
        axes.locator_params(axis="x", nbins=5)

    return _panels(_by_test(change), draw, 0.75 + 0.27 * len(order), sharey=True)


def curve(rows: pd.DataFrame, x: str, metric: str = "J", by: str = "row",
          xlabel: str = "") -> Figure:  # fmt: skip
    """Mean ± sd over seeds of a metric (per cent) along `x`, a line for each `by`.

    The first lines are the widest, so that lines that lie on each other stay visible. The y axis
    spans 5 points at least, so that no small change looks large.
    """

    def draw(axes: Axes, own: pd.DataFrame) -> None:
        known = own.groupby(by)[metric].transform("count") > 0
        own = own.assign(line=own[by].where(known, own[by] + " (not measured)")).reset_index()
        names, ticks = own["line"].unique(), sorted(own[x].dropna().unique())
        widths = dict(zip(names, range(len(names), 0, -1), strict=True))
        how = {"style": "line", "size": "line", "sizes": widths, "markers": True}
        how |= {"errorbar": "sd", "err_style": "bars", "palette": "colorblind"}
        sns.lineplot(own, x=x, y=metric, hue="line", ax=axes, **how)
        low, high = axes.get_ylim()
        middle, half = (low + high) / 2, max(high - low, 5) / 2
        axes.set(ylim=(middle - half, middle + half), xticks=ticks[:: -(-len(ticks) // 7)])
        axes.set(xlabel=xlabel or label(x), ylabel=f"{label(metric)}, %")

    parts = _by_test(rows)
    return _panels(parts, draw, 2.2, COLUMN if len(parts) == 1 else PAGE)


def learning_curves(runs: Mapping[str, Any]) -> Figure:
    """Loss, and J on the held-out pictures, over the steps of each run (`Run.log`)."""
    logs = pd.concat([run.log().assign(line=name) for name, run in runs.items()])
    held = 100 * logs.get("holdout_J", pd.Series(float("nan"), logs.index))
    parts = {"loss": logs.assign(value=logs["loss"]), "held-out J, %": logs.assign(value=held)}

    def draw(axes: Axes, own: pd.DataFrame) -> None:
        how = {"hue": "line", "style": "line", "errorbar": None, "palette": "colorblind"}
        sns.lineplot(own.reset_index(), x="step", y="value", ax=axes, **how)
        axes.set(ylabel="")
        axes.locator_params(axis="x", nbins=5)

    return _panels(parts, draw, 2.4)
