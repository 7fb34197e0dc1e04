"""What is wrong with a figure's layout: for tests of figures."""

from __future__ import annotations

import warnings
from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox


def layout_problems(figure: Figure) -> list[str]:
    """What a reader would stumble over: texts cut or overlapping, small axes, a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FigureCanvasAgg(figure).draw()
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
