"""Every kind of figure, with names as long as they come, is laid out without a fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from layout import layout_problems
from PIL import Image

from lcco.config import Experiment, Profile
from lcco.experiment import figures
from lcco.experiment.tables import row, with_paper

PROFILE = Profile(name="lite", experiment=Experiment())
READINGS = ("modulation_residual = false", "isfc_softmax = channels", "vocabulary = imagenet1k",
            "placement = encoder", "mlp3_skip = false", "lc_reduction = mean")  # fmt: skip
MODULES = ("ISFC", "CLIP inter.", "CLIP reg.", "ISFC + CLIP inter.", "ISFC + CLIP reg.",
           "CLIP inter. + CLIP reg.", "LCCo")  # fmt: skip
TESTS = (("glyphworld_choice", "choice"), ("pascal1037", "native"), ("msrc14", "ufo"))


def rows(names, table="t", tests=TESTS, seeds=(0, 1, 2)) -> pd.DataFrame:
    rng, out = np.random.default_rng(0), []
    for n, name in enumerate(names):
        for test, protocol in tests:
            for seed in seeds:
                e = PROFILE.experiment.replace(seed=seed)
                more = {"test_set": test, "protocol": protocol, "group_size": 5, "P": 90.0}
                J = 50 + n + rng.normal()
                out.append(row(table, name, PROFILE, e, J=J, run="r", **more))
    return with_paper(pd.DataFrame(out))


def pictures(n: int, h: int = 90, w: int = 120) -> list[np.ndarray]:
    y, x = np.mgrid[:h, :w]
    base = np.stack([x / w, y / h, 0.5 + 0 * x], -1)
    return [np.roll(base, 17 * k, 1) for k in range(n)]


def discs(n: int, h: int = 45, w: int = 60) -> list[np.ndarray]:
    y, x = np.mgrid[:h, :w]
    return [((y - 22) ** 2 + (x - 20 - 4 * k) ** 2 < 200).astype(np.float32) for k in range(n)]


def shown_set(n: int, *names: str) -> dict:
    return {"input": pictures(n), **{name: discs(n) for name in names}}


class FakeRun:
    def log(self):
        held = [None, 0.31, None, 0.42]
        return pd.DataFrame(
            {"step": [350, 700, 1050, 1400], "loss": [2, 1.4, 1.2, 1.1], "holdout_J": held}
        )


def swept(names, values, column, tests=TESTS) -> pd.DataFrame:
    one = rows(names, tests=tests)
    return pd.concat([one.assign(**{column: v, "J": one["J"] + v}) for v in values])


def four_sets() -> dict:
    names = ("motorbike (J 83)", "potted plant (J 31)", "dining table (J 12)", "cat (J 90)")
    return {f"{name}, PASCAL": shown_set(5, "truth", "Baseline", "LCCo") for name in names}


def similarities() -> tuple[np.ndarray, list[str]]:
    words = [f"word {n} of an imagenet class, with synonyms" for n in range(80)]
    return np.random.default_rng(1).random((5, 80)), words


SWEEP = ["LCCo, trained with each K", "K = 5, others at test time"]
RIVALS = ("truth", "Clustering (no training)", "Baseline", "+ CLIP inter.")
DRAW = {
    "table2": lambda: figures.dots(rows(["Baseline", *MODULES], "table2_components")),
    "readings": lambda: figures.dots(rows(["LCCo", *READINGS], seeds=(0,)), "LCCo"),
    "one_test": lambda: figures.dots(rows(["Baseline", *MODULES], tests=TESTS[1:2])),
    "table4_k": lambda: figures.curve(swept(SWEEP, (1, 3, 5, 7, 9), "K"), "K", xlabel="prompts K"),
    "more_images": lambda: figures.curve(
        swept(["LCCo", "Baseline"], (1, 2, 3, 5, 8, 12, 16), "group_size", TESTS[:1]),
        "group_size", xlabel="images a set",
    ),
    "learning": lambda: figures.learning_curves({m: FakeRun() for m in ("Baseline", *MODULES)}),
    "S": lambda: figures.heatmap(*similarities(), k=5),
    "fig4": lambda: figures.masks_grid(four_sets()),
    "one_set": lambda: figures.masks_grid(shown_set(5, *RIVALS), "motorbike"),
    "many": lambda: figures.masks_grid(shown_set(12, "truth", "LCCo"), "a set of twelve pictures"),
    "fig3": lambda: figures.maps_grid(
        pictures(5), {"before": discs(5), "after": discs(5)}, "attention, 1 = no preference", "cat"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAW)
def test_every_figure_is_laid_out_without_a_fault(name: str, tmp_path: Path):
    figure = DRAW[name]()
    assert layout_problems(figure) == []
    figures.show(figure, tmp_path, name, "What it shows.")
    assert Image.open(tmp_path / f"{name}.png").info["Description"] == "What it shows."
    assert (tmp_path / f"{name}.pdf").stat().st_size > 1000


def test_the_check_sees_each_kind_of_fault():
    figure, axes = figures.new_figure(3, 2)
    figure.set_layout_engine("none")
    axes.set_position((0.1, 0.2, 0.8, 0.7))
    assert layout_problems(figure) == []
    cut = figure.text(0.9, 0.95, "a title that is much too long")
    assert "`a title that is much too long` leaves the canvas" in layout_problems(figure)
    cut.remove()
    labels = [axes.text(x, 0.5, "glyphworld_choice") for x in (0.3, 0.35)]
    assert any("overlap" in p for p in layout_problems(figure))
    for text in labels:
        text.remove()
    axes.set_position((0.1, 0.2, 0.05, 0.7))
    axes.set_xticks([])
    assert layout_problems(figure) == ["axes fill 4% of the canvas"]
    axes.set_title("no such sign: \U0001f9ff")
    assert any(p.startswith("warning:") for p in layout_problems(figure))


def test_an_overlay_marks_the_object_on_any_picture():
    mask = np.zeros((30, 45))
    mask[10:20, 15:30] = 1
    for colour in ((0.9, 0.2, 0.1), figures.ORANGE, (0, 0, 0), (1, 1, 1)):
        image = np.zeros((60, 90, 3)) + colour
        out = figures.overlay(image, mask)
        corner, inside = out[2, 2], out[30, 45]
        assert out.shape == image.shape and np.ptp(corner) < 1e-9 and np.ptp(inside) > 0.3
        edge = out[17:23, 45]  # from outside in: black, then white
        assert edge.min() == 0 and edge.max() == 1


def test_photographs_go_where_git_ignores_them(tmp_path: Path):
    figure = figures.masks_grid(shown_set(2, "LCCo"))
    figures.show(figure, tmp_path, "fig4", "", photos=True)
    assert (tmp_path / "photos" / "fig4.png").is_file()
    assert [axes.get_ylabel() for axes in figure.axes] == ["input", "", "LCCo", ""]
    ignored = (Path(__file__).parents[1] / ".gitignore").read_text().split()
    assert "/results/*/photos/" in ignored


def test_curves_name_what_was_not_measured_and_do_not_enlarge_small_changes():
    K = swept(["LCCo"], (1, 3), "K", TESTS[:1])
    gone = K.assign(row="Baseline", J=float("nan"))
    figure = figures.curve(pd.concat([K, gone]), "K")
    texts = {text.get_text() for text in figure.legends[0].get_texts()}
    assert texts == {"LCCo", "Baseline (not measured)"}
    low, high = figure.axes[0].get_ylim()
    assert high - low >= 5
    assert figure.axes[0].get_xlabel() == "K" and figure.axes[0].get_ylabel() == "J, %"


def test_dots_are_sorted_and_stand_on_the_change_to_the_reference():
    figure = figures.dots(rows(["Baseline", "ISFC", "LCCo"], "table2_components"))
    axes = figure.axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["ISFC", "LCCo"]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"paper", "here"}
    native = figure.axes[1]  # the paper has no group choice, the first panel
    paper = next(line for line in native.lines if line.get_marker() == "D")
    assert np.round(paper.get_xdata(), 1).tolist() == [1.7, 5.1]
    assert axes.lines[0].get_xdata() == [0, 0]  # the zero line


def test_new_figures_change_no_global_setting():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.new_figure()
    assert dict(matplotlib.rcParams) == before
