"""Pictures of results: masks in a grid, curves, bars. PNG and PDF, colour-blind safe, readable at column width.

A figure keeps its caption inside the PNG (`caption`), so a report needs no list of figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcco.common import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lcco.config import Profile
    from lcco.data import CoSegData
    from lcco.tables import Results

COLUMN, PAGE = 3.35, 6.9  # inches: one column, and the text width of a two-column page
PHOTOS = "photos"  # figures that show photographs go here; git ignores it, because the pictures are third parties'
ORANGE = (0.835, 0.369, 0.0)  # Okabe and Ito's vermilion: the object in every overlay


def new_figure(width: float = COLUMN, height: float = 2.4, **grid: Any) -> tuple[Figure, Any]:
    """A figure outside pyplot (so none stays open) with seaborn's colour-blind palette, and its axes."""
    import seaborn as sns
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sns.set_theme("paper", "ticks", "colorblind", font_scale=0.9)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**grid)


def save(figure: Figure, folder: Path, name: str, caption: str = "", photos: bool = False) -> Path:
    """Write `<name>.png` and `.pdf`; `photos` says that it shows photographs, which then stay out of the repository.

    Returns: the PNG, which carries the caption.
    """
    folder = Path(folder) / PHOTOS if photos else Path(folder)
    for suffix, meta in (("pdf", {"CreationDate": None}), ("png", {"Software": None, "Description": caption})):
        with atomic_path(folder / f"{name}.{suffix}") as part:
            figure.savefig(part, format=suffix, dpi=200, metadata=meta)
    return folder / f"{name}.png"


def caption(png: Path) -> str:
    """The caption that `save` put into a PNG."""
    from PIL import Image

    with Image.open(png) as image:
        return str(image.info.get("Description", ""))


def overlay(image: np.ndarray, mask: np.ndarray, colour: Sequence[float] = ORANGE) -> np.ndarray:
    """The picture [H, W, 3] (0..1) greyed, the object tinted and outlined: legible in print and without colour vision.

    mask: [H, W], object where > 0.5; brought to the picture's size.
    """
    from PIL import Image, ImageFilter

    height, width = image.shape[:2]
    scaled = Image.fromarray(np.asarray(mask, np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    on = np.asarray(scaled) > 0.5
    grey = np.repeat(image.mean(-1, keepdims=True), 3, -1)
    out = np.where(on[..., None], 0.45 * image + 0.55 * np.asarray(colour), 0.35 + 0.4 * grey)
    inner = Image.fromarray(on.astype(np.uint8) * 255).filter(ImageFilter.MinFilter(2 * round(max(on.shape) / 180) + 3))
    out[on & (np.asarray(inner) == 0)] = 0.15
    return out


@dataclass
class Panel:
    """One image set of a qualitative figure: pictures [H, W, 3] in 0..1, and a row of masks for each name."""

    title: str
    images: Sequence[np.ndarray]
    masks: Mapping[str, Sequence[np.ndarray]]


def qualitative(panels: Sequence[Panel], across: int = 2) -> Figure:
    """Fig. 4's grid: for each set its inputs, then a row of masks a name (truth, then models), `across` sets abreast.

    Pictures are squashed to squares, as the networks see them.
    """
    from PIL import Image

    across = min(across, len(panels))
    names = ["input", *panels[0].masks]
    width = max(len(p.images) for p in panels)
    down = -(-len(panels) // across)
    cell = PAGE / (across * (width + 0.25) + 0.5)
    figure, _ = new_figure(PAGE, down * (len(names) * cell + 0.25), nrows=1, ncols=1)
    figure.clear()
    figure.set_layout_engine("none")
    side, head = 0.5 * cell / PAGE, 0.25  # room for the names; inches above each row of sets
    full = down * (len(names) * cell + head)
    for n, panel in enumerate(panels):
        left = side + (n % across) * (width + 0.25) * cell / PAGE
        top = 1 - (n // across) * (len(names) * cell + head) / full
        middle = left + len(panel.images) * cell / PAGE / 2
        figure.text(middle, top - 0.6 * head / full, panel.title, ha="center", va="center", fontsize=8)
        for r, name in enumerate(names):
            y = top - (head + (r + 1) * cell) / full
            if n % across == 0:
                figure.text(side * 0.8, y + cell / full / 2, name, rotation=90, ha="right", va="center", fontsize=7)
            for c, image in enumerate(panel.images):
                axes = figure.add_axes((left + c * cell / PAGE, y, 0.96 * cell / PAGE, 0.96 * cell / full))
                shown = image if r == 0 else overlay(image, panel.masks[name][c])
                shown = Image.fromarray((np.clip(shown, 0, 1) * 255).astype(np.uint8)).resize((160, 160))
                axes.imshow(shown)
                axes.set_axis_off()
    return figure


def curve(rows: Any, x: str, y: str = "J", by: str = "row", xlabel: str = "", width: float = COLUMN) -> Figure:
    """Mean and ± one standard deviation over seeds of `y` (per cent) along `x`, a line and marker for each `by`."""
    import pandas as pd
    import seaborn as sns

    figure, axes = new_figure(width)
    frame = pd.DataFrame(rows).dropna(subset=[y])
    style = {"errorbar": "sd", "style": by, "markers": True, "dashes": True}
    sns.lineplot(frame, x=x, y=y, hue=by, ax=axes, **style)
    axes.set(xlabel=xlabel or x, ylabel=f"{y} (%)")
    axes.set_xticks(sorted(frame[x].unique()))
    _tidy(axes)
    return figure


def bars(rows: Any, x: str, y: str = "J", by: str | None = None, ylabel: str = "", width: float = COLUMN) -> Figure:
    """Bars of mean `y` with ± one standard deviation over seeds, grouped by `x`, side by side for each `by`."""
    import pandas as pd
    import seaborn as sns

    figure, axes = new_figure(width)
    frame = pd.DataFrame(rows).dropna(subset=[y])
    sns.barplot(frame, x=x, y=y, hue=by, ax=axes, errorbar="sd", edgecolor="0.2", linewidth=0.6, capsize=0.2)
    for container, hatch in zip(axes.containers, ("", "//", "..", "xx", "\\\\") * 9, strict=False):
        for bar in getattr(container, "patches", []):
            bar.set_hatch(hatch)
    axes.set(xlabel="", ylabel=ylabel or f"{y} (%)")
    _tidy(axes)
    return figure


def _tidy(axes: Axes) -> None:
    import seaborn as sns

    sns.despine(ax=axes)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    if axes.get_legend():
        axes.legend(title=None, frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def is_drawn(data: CoSegData) -> bool:
    """Whether a set's pictures are this project's own drawings; all others are photographs of third parties."""
    return data.layout == "glyphworld"


def main_figure(
    profile: Profile, results: Results, folder: Path, protocol: str = "ufo", images: int = 5
) -> Path | None:
    """Fig. 4 from Table 1's first seed: inputs, truth, Baseline, LCCo; None if no model could be run.

    Not picked by eye: of each test set the class with LCCo's median J (of a single test set the classes at the
    12th, 38th, 62nd and 88th percentile), and its first images by name. Masks at threshold 0.5.
    """
    from lcco.data import load_data

    runs: dict[str, Any] = {}
    for (row, _), run in results.runs.items():
        runs.setdefault(row, run)
    tests = list(dict.fromkeys(r["test_set"] for r in results.rows if r["run"] and r["row"] == "LCCo"))
    if not tests:
        return None
    models = {row: runs[row].predictor() for row in ("Baseline", "LCCo") if row in runs}
    panels, drawn = [], True
    for test in tests:
        data = load_data(test)
        drawn &= is_drawn(data)
        scores: dict[str, list[float]] = {}
        for line in runs["LCCo"].evaluate(test, protocol, profile.group_size)[protocol].rows:
            scores.setdefault(line["class"], []).append(line["J"])
        order = sorted(scores, key=lambda c: float(np.mean(scores[c])))
        shares = (0.5,) if len(tests) > 1 else (0.125, 0.375, 0.625, 0.875)
        for cls in dict.fromkeys(order[int(share * len(order))] for share in shares):
            items = list(data.groups[cls][:images])
            truth = [(data.mask(i, [cls]) == 1).astype(np.float32) for i in items]
            masks = {"truth": truth, **{row: list(model(data, items, cls)) for row, model in models.items()}}
            title = f"{cls} (J {100 * np.mean(scores[cls]):.0f}), {test}"
            panels.append(Panel(title, [np.asarray(data.image(i)) / 255 for i in items], masks))
    text = (
        "Fig. 4. Inputs, truth, Baseline and LCCo (first seed). Sets chosen by rule: of each test set the class with "
        "LCCo's median J, of a single test set the classes at four percentiles (J is the class mean over all its "
        "images); the first images by name."
    )
    return save(qualitative(panels), folder, "fig4", text, photos=not drawn)
