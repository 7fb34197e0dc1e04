"""Figures of results, as wide as a page: masks over pictures, maps, curves and dots."""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from textwrap import fill, shorten
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

from lcco.experiment.tables import label, paired
from lcco.metrics import resize_map
from lcco.store import atomic_path

PAGE = 6.9  # inches: the text width of a two-column page
OPEN = {"axes.spines.top": False, "axes.spines.right": False}
LOOK = ["seaborn-v0_8-paper", "tableau-colorblind10", OPEN]  # styles of matplotlib
LINES = ("o-", "s--", "D-.", "^:", "v-", "P--", "o-.", "s:")
ORANGE = (0.835, 0.369, 0.0)  # Okabe and Ito's vermilion


@style.context(LOOK)
def new_figure(width: float = PAGE, height: float = 2.4, **grid: Any) -> tuple[Figure, Any]:
    """A figure outside pyplot, so that none stays open, and its axes (`Figure.subplots`)."""
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(**grid)


def show(figure: Figure, folder: Path, name: str, text: str, photos: bool = False) -> None:
    """Write `<name>.png`, which carries the caption, and `.pdf`; show both in a notebook.

    The notebook holds pictures as JPEG, a quarter as large. photos: it shows photographs of third
    parties; it goes to `photos/`, which git ignores.
    """
    from IPython import display

    folder = Path(folder) / "photos" if photos else Path(folder)
    png = {"Software": None, "Description": text}
    for suffix, about in (("pdf", {"CreationDate": None}), ("png", png)):
        with atomic_path(folder / f"{name}.{suffix}") as part:
            figure.savefig(part, format=suffix, dpi=200, metadata=about)
    shown, width = BytesIO(), round(110 * figure.get_figwidth())
    kind = "JPEG" if any(axes.images for axes in figure.axes) else "PNG"
    Image.open(folder / f"{name}.png").convert("RGB").save(shown, kind, quality=85)
    display.display(display.Image(shown.getvalue(), width=width), display.Markdown(text))


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture [H, W, 3] (0..1) greyed, its object (mask [h, w] > 0.5) tinted and outlined."""
    on = resize_map(np.asarray(mask, np.float32), image.shape[:2]) > 0.5
    grey, wide = image.mean(-1, keepdims=True), round(max(image.shape) / 180) + 1
    out = np.where(on[..., None], 0.5 * grey + 0.55 * np.array(ORANGE), 0.3 + 0.4 * grey).clip(0, 1)
    out[on & ~binary_erosion(on, iterations=wide, border_value=1)] = 1.0
    out[binary_dilation(on, iterations=wide) & ~on] = 0.0
    return out


def masks_grid(rows: Mapping, title: str = "", across: int = 2) -> Figure:
    """Fig. 4's grid: a line of pictures, then lines of masks drawn over them.

    rows: name → pictures [H, W, 3] in 0..1 (the first line), then name → masks [h, w]; or title →
    such rows, for several sets, `across` of them abreast. All are shown as squares.
    """
    sets = rows if isinstance(next(iter(rows.values())), Mapping) else {title: rows}
    n = max(len(images) for lines in sets.values() for images in lines.values())
    across, most = min(across, len(sets)), max(map(len, sets.values()))
    down, wide = -(-len(sets) // across), across * (n + 0.3)
    side = min(1.2, PAGE / wide)
    figure = Figure((wide * side, down * (most * side + 0.25)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    parts = figure.subfigures(down, across, squeeze=False).flat
    for part, (name, lines) in zip(parts, sets.items(), strict=False):
        part.suptitle(shorten(name, int(n * side / 0.065)), fontsize=8)
        pictures = next(iter(lines.values()))
        grid = part.subplots(most, n, squeeze=False)
        for axes, (line, images) in zip(grid, lines.items(), strict=False):
            axes[0].set_ylabel(fill(line, max(6, int(side / 0.065))), fontsize=7)
            for x, image in enumerate(images):
                shown = image if image.ndim == 3 else overlay(pictures[x], image)
                axes[x].imshow(shown, aspect="auto")
        for axis in part.axes:
            axis.set(xticks=[], yticks=[], frame_on=False)
    return figure


@style.context(LOOK)
def maps_grid(pictures: Sequence[np.ndarray], maps: Mapping[str, Sequence[np.ndarray]], what: str,
              title: str = "") -> Figure:  # fmt: skip
    """Pictures, and lines of maps [h, w] ≥ 0 over them; one colour scale, whose bar says `what`."""
    top = max(float(m.max()) for own in maps.values() for m in own)

    def over(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
        heat = colormaps["viridis"](resize_map(values / top, picture.shape[:2]))[..., :3]
        return 0.7 * heat + 0.3 * picture.mean(-1, keepdims=True)

    coloured = {name: list(map(over, pictures, own)) for name, own in maps.items()}
    figure = masks_grid({"input": pictures, **coloured}, title)
    scale = ScalarMappable(Normalize(0, top), "viridis")
    figure.colorbar(scale, ax=figure.axes, aspect=30, pad=0.01).set_label(what, size=7)
    return figure


@style.context(LOOK)
def heatmap(S: np.ndarray, words: Sequence[str], k: int = 0, top: int = 15) -> Figure:
    """S [N, P] of a set: the words with the largest column sums, the distilled K above a line."""
    import seaborn  # a second of import that `lcco cosegment` need not pay
    best = np.argsort(-S.sum(0))[:top]
    figure, axes = new_figure(5.2, 0.5 + 0.21 * len(best))
    names = [shorten(words[i], 24, placeholder="…") for i in best]
    cells = pd.DataFrame(S[:, best].T, names, range(1, len(S) + 1))
    bar = {"label": "cosine similarity", "aspect": 30}
    seaborn.heatmap(cells, cmap="viridis", ax=axes, cbar_kws=bar, yticklabels=True)
    axes.set_xlabel("picture of the set")
    axes.axhline(k, color="white", linewidth=1.5)
    return figure


@style.context(LOOK)
def _panels(rows: pd.DataFrame, draw: Callable[[Axes, pd.DataFrame], None], height: float,
            **grid: Any) -> Figure:  # fmt: skip
    """A panel for each test set and protocol, filled by `draw`; one legend above them all."""
    parts = list(rows.groupby(["test_set", "protocol"], sort=False))
    across = 2 if len(parts) in (2, 4) else min(3, len(parts))
    grid |= {"nrows": -(-len(parts) // across), "ncols": across, "squeeze": False}
    figure, panels = new_figure(PAGE, 0.3 + grid["nrows"] * height, **grid)
    for axes, ((test, protocol), own) in zip(panels.flat, parts, strict=False):
        axes.locator_params(axis="x", nbins=5)
        draw(axes, own)
        title = f"{label(test)}, {protocol}".removesuffix(", ")
        axes.set_title(fill(title, 55 // across), fontsize=8)
        axes.grid(linewidth=0.4, alpha=0.6)
    for axes in panels.flat[len(parts) :]:
        axes.remove()
    keys = {h.get_label(): h for a in figure.axes for h in a.get_legend_handles_labels()[0]}
    if len(keys) > 1:
        figure.legend(handles=[*keys.values()], loc="outside upper center", frameon=False, ncols=3)
    return figure


def dots(rows: pd.DataFrame, reference: str = "Baseline", metric: str = "J") -> Figure:
    """Change against a reference row, seed by seed: sorted, mean ± sd, the paper's beside it."""
    change = paired(rows, reference, metric)
    order = list(change.groupby("row")["mean"].mean().sort_values().index)

    def draw(axes: Axes, own: pd.DataFrame) -> None:
        own, y = own.set_index("row").reindex(order), range(len(order))
        axes.axvline(0, color="0.4", linewidth=0.8)
        axes.errorbar(own["mean"], y, xerr=own["sd"].fillna(0), fmt="o", label="here")
        if own["paper"].notna().any():
            axes.plot(own["paper"], y, "D", color="0.45", mfc="none", mew=1, label="paper")
        axes.set_yticks(y, order, fontsize=7)
        axes.set(ylim=(-0.6, len(order) - 0.4), xlabel=f"{metric} − {metric} of {reference}")

    return _panels(change, draw, 0.75 + 0.27 * len(order), sharey=True)


def curve(rows: pd.DataFrame, x: str, metric: str = "J", by: str = "row",
          xlabel: str = "") -> Figure:  # fmt: skip
    """Mean ± sd over seeds of a metric (per cent) along `x`, a line for each `by`.

    The y axis spans 5 points at least, so that no small change looks large.
    """

    def draw(axes: Axes, own: pd.DataFrame) -> None:
        for line, (name, part) in zip(cycle(LINES), own.groupby(by, sort=False)):
            found = part.dropna(subset=[metric]).groupby(x)[metric].agg(["mean", "std"])
            text = str(name) if len(found) else f"{name} (not measured)"
            axes.errorbar(found.index, found["mean"], found["std"].fillna(0), fmt=line, label=text)
        middle, half = np.mean(axes.get_ylim()), max(np.ptp(axes.get_ylim()), 5) / 2
        axes.set(ylim=(middle - half, middle + half), xticks=sorted(own[x].dropna().unique()))
        axes.set(xlabel=xlabel or label(x), ylabel=f"{label(metric)}, %")

    return _panels(rows, draw, 2.2)


def learning_curves(runs: Mapping[str, Any]) -> Figure:
    """Loss, and J on the held-out pictures, over the steps of each run (`Run.log`)."""
    logs = pd.concat([run.log().assign(line=name) for name, run in runs.items()])
    logs["held-out J, %"] = 100 * logs.get("holdout_J", float("nan"))
    logs = logs.melt(["step", "line"], ["loss", "held-out J, %"], "test_set").assign(protocol="")

    def draw(axes: Axes, own: pd.DataFrame) -> None:
        for line, (name, part) in zip(cycle(LINES), own.dropna().groupby("line", sort=False)):
            axes.plot(part["step"], part["value"], "k-" if name == "LCCo" else line[1:], label=name)
        axes.set_xlabel("step")

    return _panels(logs, draw, 2.7)
