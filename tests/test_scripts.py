"""Scripts: README's figures, the release of a run, the embedded profile's weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from layout import layout_problems
from PIL import Image

import lcco
from lcco.common import file_digest
from lcco.config import load_profile
from lcco.cosegmentation import Result
from lcco.data.glyphworld import CLASSES, draw

ROOT = Path(__file__).parents[1]
WEIGHTS = Path(lcco.__file__).parent / "weights"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


# ---------------------------------------------------------------------------------------- figures
@pytest.fixture
def drawn(monkeypatch):
    """draw_figures, whose figures are checked as they are saved."""
    import draw_figures

    def save(figure, folder, name):
        assert layout_problems(figure) == []
        return kept(figure, folder, name)

    kept = draw_figures.save
    monkeypatch.setattr(draw_figures, "save", save)
    return draw_figures


def all_of_it(files, cls=None) -> list[Result]:
    """What the model gives, without the model: the whole picture is the object."""
    sizes = [Image.open(f).size for f in files]
    whole = {"probability": np.ones((32, 32), np.float32)}
    return [Result(f.name, f, size=s, **whole) for f, s in zip(files, sizes, strict=True)]


@pytest.mark.parametrize("name", ["teaser", "architecture", "glyphworld"])
def test_figures_are_drawn_with_their_texts_whole(drawn, tmp_path, monkeypatch, name):
    monkeypatch.setattr(lcco, "cosegment", all_of_it)
    path = getattr(drawn, name)(tmp_path)
    with Image.open(path) as image:
        assert image.size[0] == 1800
        assert np.asarray(image.convert("L")).std() > 20  # something is on it
    assert (ROOT / "figures" / path.name).is_file()


def test_the_square_of_the_teaser_holds_the_object(drawn):
    truth = np.zeros((40, 100), bool)
    truth[10:20, 80:90] = True
    assert drawn.square_around(truth) == (60, 0, 100, 40)


# ---------------------------------------------------------------------------------------- release
def test_a_run_is_released_with_its_scores_and_drawn(drawn, tmp_path, monkeypatch, capsys):
    import release

    from lcco.experiment.predictor import load_model
    from lcco.experiment.runs import find_run, open_run

    smoke = load_profile("smoke")
    monkeypatch.setattr(drawn, "load_profile", lambda name: smoke)
    assert drawn.group_choice(tmp_path) is None  # no run yet

    out = tmp_path / "small.safetensors"
    monkeypatch.setattr(sys, "argv", ["release.py", str(out), "--profile", "smoke"])
    assert release.main() == 0
    run, card = find_run(smoke.experiment), out.with_suffix(".md").read_text()
    assert file_digest(out, 64) in card and run.path.name in card
    assert out.stat().st_size < 0.7 * run.weights.stat().st_size
    for test in ("glyphworld_test (36) | ufo", "glyphworld_choice (12) | choice"):
        assert f"| {test} | " in card

    data = lcco.load_data("glyphworld_test", counts=smoke.counts)
    items = list(data.groups["anchor"])[:3]
    before, after = run.predictor()(data, items), load_model(out)(data, items)
    assert np.abs(before - after).max() < 0.02  # half precision
    score = open_run(out).evaluate(data, "ufo", smoke.group_size)["ufo"].summary
    assert f"| {100 * score['P']:.1f} | {100 * score['J']:.1f} |" in card
    assert drawn.group_choice(tmp_path).is_file()

    monkeypatch.setattr(sys, "argv", ["release.py", str(out), "--profile", "none"])
    assert release.main() == 2
    assert "no profile `none`" in capsys.readouterr().err


# ------------------------------------------------------------------------------ sets that lack it
def test_what_a_set_lacks_is_measured_with_cosegment_itself(monkeypatch, capsys):
    import lacking

    data = lcco.load_data("glyphworld_holdout", counts={"glyphworld_holdout": 60})
    for c, items in lacking.mixed_sets(data, 40, 4, seed=3):
        assert [c in data.labels_of(i) for i in items] == [True, True, True, False]
        assert len(set(items)) == 4
    for items in lacking.strangers(data, 10, 4, seed=3):
        labels = [c for i in items for c in data.labels_of(i)]
        assert len(items) == 4 and len(labels) == len(set(labels))

    def cosegment(images, cls=None, keep_all=False, **_):
        """The whole picture is the object; a second look finds the last one out, if asked."""
        images = images if isinstance(images, list) else [images]
        whole = np.ones((32, 32), np.float32)
        found = [Result("", x, size=x.size, probability=whole, agreement=0.1) for x in images]
        if cls and (len(images) == 1 or not keep_all):
            found[-1].probability = 0 * whole
        return found

    monkeypatch.setattr(lacking, "cosegment", cosegment)
    monkeypatch.setattr(lacking, "load_segmenter", lambda weights: None)
    found = lacking.measure(data, 3, 4, 0, None)
    assert found["false alarms"].to_dict() == {
        (False, False): 100, (False, True): 100, (True, False): 100, (True, True): 0,
    }  # fmt: skip
    sets = lacking.mixed_sets(data, 3, 4, 0)
    J = [np.mean([data.mask(i, [c]).mean() for i in items[:-1]]) for c, items in sets]
    assert found["J of the others"].tolist() == [round(100 * float(np.mean(J)), 1)] * 4
    assert found["without a mask"].tolist() == [0] * 4
    assert lacking.shares(data, 3, 4, 0, None).tolist() == [100, 100]
    asked, free = lacking.within(data, 5, 4, 0, None)
    assert asked == 0 and 0 < free < 50  # asked for, it finds nothing

    monkeypatch.setattr(lacking, "load_data", lambda name: data)
    monkeypatch.setattr(sys, "argv", ["lacking.py", "--sets", "1", "--size", "3"])
    assert lacking.main() == 0
    assert "false alarms" in (out := capsys.readouterr().out) and "share nothing" in out
    assert "not asked for" in out

    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["lacking.py", "--data", "nowhere"])
    assert lacking.main() == 2
    assert "no such folder" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ the weights
@pytest.fixture(scope="module")
def held():
    """Fresh drawings that neither training nor the reported numbers used."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import make_glyph_weights as make

    sys.path.pop(0)
    return make.drawings(40, (1,), 901), make.drawings(160, (2, 3), 902)


def test_short_command_writes_both_networks(tmp_path, monkeypatch, capsys):
    import make_glyph_weights as make

    monkeypatch.setattr(sys, "argv", ["make_glyph_weights.py", "--out", str(tmp_path), "--short"])
    make.main()
    assert "glyph_clip: {" in (said := capsys.readouterr().out) and "glyph_backbone: {" in said
    for name in ("glyph_clip", "glyph_backbone"):
        card = json.loads((tmp_path / f"{name}.json").read_text())
        shipped = json.loads((WEIGHTS / f"{name}.json").read_text())
        assert card["sha256"] == file_digest(tmp_path / f"{name}.safetensors", 64)
        assert card["accuracy"].keys() == shipped["accuracy"].keys()
        assert all(0 <= v <= 1 for v in card["accuracy"].values())
        assert card.keys() == shipped.keys() - {"seconds"}
        assert card["command"] == shipped["command"]

    from lcco.backbones import make_backbone
    from lcco.semantics import OpenClipTower

    net = make_backbone("glyphnet", str(tmp_path / "glyph_backbone.safetensors"))
    assert [m.shape[1] for m in net(torch.zeros(1, 3, 64, 64))] == list(net.channels)
    files = (str(tmp_path / f"glyph_clip.{ending}") for ending in ("json", "safetensors"))
    tower, width = OpenClipTower(*files), make.MODEL_CONFIG["embed_dim"]
    assert tower.encode_prompts(["a drawing of a cat."]).shape == (1, width)


@pytest.mark.parametrize("name", ["glyph_clip", "glyph_backbone"])
def test_shipped_files_are_those_that_the_card_describes(name):
    path, card = WEIGHTS / f"{name}.safetensors", json.loads((WEIGHTS / f"{name}.json").read_text())
    assert file_digest(path, 64) == card["sha256"] and path.stat().st_size <= 5_000_000
    assert card["classes"] == list(CLASSES) and card["recipe"]["scenes"] == 16000


def test_shipped_clip_names_objects_and_what_a_set_shares(held):
    import make_glyph_weights as make
    from open_clip.model import CLIP

    from lcco.semantics import OpenClipTower

    tower = OpenClipTower("glyph-clip", "package")
    words = tower.encode_prompts([make.TEMPLATE.format(c) for c in CLASSES])
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in held[0].images]
    alone = tower.encode_images(pictures) @ words.T
    assert make.top(alone, held[0].holds) >= 0.8
    model = CLIP(**make.MODEL_CONFIG)
    model.load_state_dict(tower.net.state_dict())
    found = make.clip_accuracy(model.eval(), *held)  # read as in training, not as in use
    assert abs(found["one object, top-1"] - make.top(alone, held[0].holds)) <= 0.05
    assert found["set of 5 scenes, top-5"] >= 0.9


def test_shipped_backbone_tells_classes_apart_place_by_place():
    """Mean features at objects' places: the nearest class centre is right, far above 1 in 85."""
    from lcco.backbones import make_backbone

    net = make_backbone("glyphnet", "package", frozen_stages=4).eval()
    names, features, truth = list(CLASSES), [], []
    for n in range(340):
        picture, labels = draw([names[n % 85], names[(n * 7 + 11) % 85]], (55, n))
        with torch.no_grad():
            maps = net(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255)
        at = torch.from_numpy(labels == n % 85 + 1)[None, None].float()
        at = torch.nn.functional.adaptive_avg_pool2d(at, maps[2].shape[-2:])
        features.append((maps[2] * at).sum((0, 2, 3)) / at.sum().clamp(min=1e-6))
        truth.append(n % 85)
    x = torch.nn.functional.normalize(torch.stack(features) - torch.stack(features).mean(0), dim=1)
    y = torch.tensor(truth)
    centres = torch.stack([x[:255][y[:255] == c].mean(0) for c in range(85)])
    assert ((x[255:] @ centres.T).argmax(1) == y[255:]).float().mean() > 0.5


def test_the_accuracies_count_what_they_say():
    import make_glyph_weights as make

    holds = torch.eye(4, dtype=torch.bool)
    assert make.top(holds.float(), holds) == 1 and make.top(-holds.float(), holds) == 0
    two = torch.tensor([[True, True, False]])
    assert make.top(torch.tensor([[0.9, 0.1, 0.5]]), two) == 0.5  # one of its two is in the top two
