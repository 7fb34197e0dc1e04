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
    out = np.where(on[..., None], 0.5 * grey + 0.6 * np.asarray(colour), 0.35 + 0.4 * grey).clip(0, 1)
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
    text = "Fig. 4. Inputs, truth, Baseline and LCCo (first seed)."
    return masks_figure(profile, results, folder, "fig4", ("Baseline", "LCCo"), text, protocol, images)


def masks_figure(
    profile: Profile, results: Results, folder: Path, name: str, models: Sequence[str] | Mapping[str, str], text: str,
    protocol: str = "ufo", images: int = 5, sets: Sequence[ChosenSet] | None = None,
) -> Path | None:  # fmt: skip
    """Inputs, truth and the masks of some rows of a table, first seed; None if no model could be run.

    models: rows of the table in order, `LCCo` among them; a mapping gives them other names. sets: those to show, as
    `text` says; None: see `chosen_sets`.
    """
    runs = first_runs(results)
    names = models if isinstance(models, Mapping) else {m: m for m in models}
    if sets is None:
        sets, text = chosen_sets(profile, results, protocol, images), f"{text} {SETS_BY_RULE}"
    if not sets:
        return None
    kept = {row: label for row, label in names.items() if row in runs and runs[row].weights.is_file()}
    if gone := [label for row, label in names.items() if row in runs and row not in kept]:
        text += f" Not drawn, because their weights were not kept: {', '.join(gone)}."
    predictors = {label: runs[row].predictor() for row, label in kept.items()}
    panels = []
    for one in sets:
        pictures = [np.asarray(one.data.image(i)) / 255 for i in one.items]
        truth = [(one.data.mask(i, [one.cls]) == 1).astype(np.float32) for i in one.items]
        masks = {label: list(model(one.data, one.items, one.cls)) for label, model in predictors.items()}
        panels.append(Panel(one.title, pictures, {"truth": truth, **masks}))
    drawn = all(is_drawn(one.data) for one in sets)
    return save(qualitative(panels), folder, name, text, photos=not drawn)


# ------------------------------------------------------------------------------------------------- sets chosen by rule
SETS_BY_RULE = (
    "Sets chosen by rule: of each test set the class with LCCo's median J, of a single test set the classes at four "
    "percentiles (J is the class mean over all its images); the first images by name."
)


@dataclass
class ChosenSet:
    """One image set of a figure: items of one class of a test set."""

    title: str
    data: CoSegData
    cls: str
    items: list[int]


def first_runs(results: Results) -> dict[str, Any]:
    """Each row's run with the first seed."""
    runs: dict[str, Any] = {}
    for (row, _), run in results.runs.items():
        runs.setdefault(row, run)
    return runs


def chosen_sets(profile: Profile, results: Results, protocol: str = "ufo", images: int = 5) -> list[ChosenSet]:
    """Not picked by eye: the sets that `SETS_BY_RULE` says, of the test sets on which the run `LCCo` was scored."""
    from lcco.data import load_data

    run = first_runs(results).get("LCCo")
    own = [r for r in results.rows if run and r["run"] == run.path.name and r["protocol"] != "choice"]
    tests = list(dict.fromkeys(r["test_set"] for r in own))
    out = []
    for test in tests:
        data, scores = load_data(test), {}
        for line in run.evaluate(test, protocol, profile.group_size)[protocol].rows:
            scores.setdefault(line["class"], []).append(line["J"])
        order = sorted(scores, key=lambda c: float(np.mean(scores[c])))
        shares = (0.5,) if len(tests) > 1 else (0.125, 0.375, 0.625, 0.875)
        for cls in dict.fromkeys(order[int(share * len(order))] for share in shares):
            title = f"{cls} (J {100 * np.mean(scores[cls]):.0f}), {test}"
            out.append(ChosenSet(title, data, cls, list(data.groups[cls][:images])))
    return out


def extreme_sets(profile: Profile, results: Results, protocol: str = "ufo", images: int = 5) -> list[ChosenSet]:
    """LCCo's two best sets on the last test set on which it was scored, of different classes, and its two worst."""
    from lcco.data import load_data
    from lcco.metrics import get_protocol

    run = first_runs(results).get("LCCo")
    own = [r for r in results.rows if run and r["run"] == run.path.name and r["protocol"] == protocol]
    if not own:
        return []
    test, size = own[-1]["test_set"], own[-1]["group_size"]
    data, by_class = load_data(test), {}
    scored = {(r["class"], r["key"]): r["J"] for r in run.evaluate(test, protocol, size)[protocol].rows}
    for cls, items in data.groups.items():
        ordered = sorted(items, key=data.keys.__getitem__)
        for members, new in get_protocol(protocol).groups(ordered, size, 0, cls):
            J = [scored[cls, data.keys[i]] for i in members[:new] if scored[cls, data.keys[i]] is not None]
            by_class.setdefault(cls, []).extend([(float(np.mean(J)), cls, members)] * bool(J))
    best = sorted((max(sets) for sets in by_class.values() if sets), reverse=True)[:2]
    worst = sorted(min(sets) for sets in by_class.values() if sets)[:2]
    chosen = [*best, *(one for one in worst if one not in best)]
    return [ChosenSet(f"{cls} (J {100 * J:.0f}), {test}", data, cls, list(m[:images])) for J, cls, m in chosen]


def extremes_figure(profile: Profile, results: Results, folder: Path, protocol: str = "ufo") -> Path | None:
    """The best and the worst sets in Fig. 4's form (`extreme_sets`); None if no model could be run."""
    text = (
        "Inputs, truth, Baseline and LCCo (first seed) on LCCo's two best sets and its two worst, each two of "
        "different classes; J is the mean over the set's images, masks are drawn at threshold 0.5."
    )
    sets = extreme_sets(profile, results, protocol)
    return masks_figure(profile, results, folder, "best_worst", ("Baseline", "LCCo"), text, protocol, sets=sets)


def feature_figure(profile: Profile, results: Results, folder: Path, images: int = 5) -> Path | None:
    """Fig. 3, top: for each chosen set its pictures and F³ before and after CLIP regularization; None without a run.

    A map is shown as Fig. 3's bars see it: softmax over the positions, mean over the channels, times their number (1 =
    no preference); one colour scale for both maps of a set.
    """
    import torch
    from PIL import Image

    run = first_runs(results).get("LCCo")
    sets = chosen_sets(profile, results, profile.protocols[0], images)[:2] if run else []
    if not sets:
        return None
    predictor, names = run.predictor(), ("input", "before", "after")
    width = max(len(one.items) for one in sets)
    cell = PAGE / (2 * width + 1.4)
    figure, axes = new_figure(PAGE, 3 * cell + 0.45, nrows=3, ncols=len(sets) * width, squeeze=False)
    for one_axes in axes.flat:
        one_axes.set(xticks=[], yticks=[])
        one_axes.set_frame_on(False)
    for n, one in enumerate(sets):
        with torch.no_grad():
            kept = predictor.output(one.data, one.items, return_maps=True).maps["clip_regularization"]
        shares = [m[0].float().cpu().flatten(2).softmax(-1).mean(1) * m[0, 0, 0].numel() for m in kept]
        side = kept[0].shape[-2:]
        top = max(float(s.quantile(0.995)) for s in shares)
        for c, i in enumerate(one.items):
            column = axes[:, n * width + c]
            column[0].imshow(one.data.image(i).resize((160, 160), Image.Resampling.BILINEAR))
            for r, s in enumerate(shares, 1):
                shown = column[r].imshow(s[c].view(side).numpy(), cmap="viridis", vmin=0, vmax=top)
        axes[0, n * width + len(one.items) // 2].set_title(one.title, fontsize=7)
        right = axes[1:, n * width : (n + 1) * width].ravel().tolist()
        bar = figure.colorbar(shown, ax=right, fraction=0.03, pad=0.01, aspect=30)
        bar.ax.tick_params(labelsize=6)
    for one_axes, name in zip(axes[:, 0], names, strict=True):
        one_axes.set_ylabel(name, fontsize=7)
    text = (
        "Fig. 3, top. Pictures and the feature map before and after CLIP regularization: softmax over the positions of "
        f"each channel, mean over channels, times the number of positions (1: no preference). {SETS_BY_RULE}"
    )
    return save(figure, folder, "fig3_maps", text, photos=not all(is_drawn(one.data) for one in sets))


def show(figure: Figure | None, folder: Path, name: str, text: str, width: int = 500) -> Any:
    """Save a figure and give it to be shown in a notebook; a line says so where there is none."""
    if figure is None:
        print("nothing could be run here, so there is no figure")
        return None
    from IPython.display import Image

    return Image(filename=str(save(figure, folder, name, text)), width=width)


def lines(
    rows: Any, x: str = "J", y: str = "row", by: str = "test", xlabel: str = "", width: float = COLUMN
) -> Figure | None:
    """A line a row: mean `x` with ± one standard deviation over seeds, a marker for each `by`. Long names fit.

    by: `test` tells rows apart by test set and protocol. None if no row was measured.
    """
    import pandas as pd
    import seaborn as sns

    from lcco.tables import label

    frame = pd.DataFrame(rows).dropna(subset=[x])
    if frame.empty:
        return None
    if by == "test":
        frame["test"] = [
            label(t) + ("" if p in label(t) else f", {p}")
            for t, p in zip(frame["test_set"], frame["protocol"], strict=True)
        ]
    figure, axes = new_figure(width, 1.0 + 0.26 * frame[y].nunique())
    kinds = frame[by].nunique()
    style = {"errorbar": "sd", "linestyle": "none", "dodge": 0.5 if kinds > 1 else False, "err_kws": {"linewidth": 1}}
    sns.pointplot(frame, x=x, y=y, hue=by, ax=axes, markers=["o", "s", "^", "D", "v", "P", "X", "*"][:kinds],
                  markersize=4, palette=sns.color_palette("colorblind", kinds), **style)  # fmt: skip
    axes.set(xlabel=xlabel or f"{x} (%)", ylabel="")
    sns.despine(ax=axes)
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.legend(title=None, frameon=False, fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure


def sweep(series: Mapping[str, Any], x: str, xlabel: str = "", y: str = "J", width: float = PAGE) -> Figure | None:
    """Curves of several sweeps over the same `x`, a panel for each test set and protocol; mean ± sd over seeds.

    None if no row was measured.
    """
    import pandas as pd
    import seaborn as sns

    from lcco.tables import label

    frame = pd.concat([pd.DataFrame(rows).assign(sweep=name) for name, rows in series.items()])
    frame = frame.dropna(subset=[y])
    if frame.empty:
        return None
    panels = list(dict.fromkeys(zip(frame["test_set"], frame["protocol"], strict=True)))
    figure, axes = new_figure(width, 2.3, nrows=1, ncols=len(panels), squeeze=False)
    for n, (one, (test, protocol)) in enumerate(zip(axes[0], panels, strict=True)):
        own = frame[(frame["test_set"] == test) & (frame["protocol"] == protocol)]
        sns.lineplot(own, x=x, y=y, hue="sweep", style="sweep", markers=True, errorbar="sd", ax=one, legend=n == 0)
        one.set(xlabel=xlabel or x, ylabel=f"{label(y)} (%)", xticks=sorted(own[x].unique()))
        one.set_title(f"{label(test)}, {protocol}", fontsize=8)
        _tidy(one)
    shown = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].get_legend().remove()
    figure.legend(*shown, loc="outside upper center", ncols=len(series), frameon=False, fontsize=7)
    return figure


def norm_bars(rows: Any, softmax: str = "over positions") -> Figure | None:
    """Fig. 3's bars: the norm on each test set before and after the module, and of a flat map; None if not measured."""
    from lcco.tables import label

    own = [{**r, "test_set": label(r["test_set"])} for r in rows if r["softmax"] == softmax]
    if all(r["norm"] is None for r in own):
        return None
    return bars(own, "test_set", "norm", "row", "norm of M * softmax(F)")


def cost_figure(rows: Any, width: float = PAGE) -> Figure:
    """Seconds for one set, part by part, a panel for each network (logarithmic)."""
    import pandas as pd
    import seaborn as sns

    frame = pd.DataFrame(rows)
    networks = list(dict.fromkeys(frame["network"]))
    figure, axes = new_figure(width, 2.4, nrows=1, ncols=len(networks), squeeze=False, sharey=True)
    for one, name in zip(axes[0], networks, strict=True):
        own = frame[frame["network"] == name]
        shown = own.assign(seconds=own["seconds"].clip(lower=1e-4))
        sns.barplot(shown, x="seconds", y="row", ax=one, color="C0", edgecolor="0.2", linewidth=0.6)
        one.set(xscale="log", xlabel="seconds a set", ylabel="", title=name)
        sns.despine(ax=one)
        one.grid(axis="x", linewidth=0.4, alpha=0.6)
    return figure
