"""The command that makes the embedded profile's weights, in its short form, and the weights that it made."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import lcco
from lcco import pretrain
from lcco.common import file_digest
from lcco.glyphworld import CLASSES

WEIGHTS = Path(lcco.__file__).parent / "weights"


@pytest.fixture(scope="module")
def held():
    """Fresh drawings that neither training nor the reported numbers used."""
    return pretrain.drawings(40, (1,), 901), pretrain.drawings(160, (2, 3), 902)


def test_short_command_writes_both_networks(tmp_path, capsys):
    pretrain.main(["--out", str(tmp_path), "--short"])
    assert "glyph_clip" in (said := capsys.readouterr().out) and "glyph_backbone" in said
    for name in ("glyph_clip", "glyph_backbone"):
        card = json.loads((tmp_path / f"{name}.json").read_text())
        assert card["sha256"] == file_digest(tmp_path / f"{name}.safetensors", 64)
        assert all(0 <= v <= 1 for v in card["accuracy"].values())
        shipped = json.loads((WEIGHTS / f"{name}.json").read_text())
        assert set(card) == set(shipped)

    from lcco.backbones import make_backbone
    from lcco.semantics import OpenClipTower

    net = make_backbone("glyphnet", str(tmp_path / "glyph_backbone.safetensors"))
    assert [m.shape[1] for m in net(torch.zeros(1, 3, 64, 64))] == list(net.channels)
    tower = OpenClipTower(str(tmp_path / "glyph_clip.json"), str(tmp_path / "glyph_clip.safetensors"))
    assert tower.encode_prompts(["a drawing of a cat."]).shape == (1, pretrain.MODEL_CONFIG["embed_dim"])


@pytest.mark.parametrize("name", ["glyph_clip", "glyph_backbone"])
def test_shipped_files_are_those_that_the_card_describes(name):
    path, card = WEIGHTS / f"{name}.safetensors", json.loads((WEIGHTS / f"{name}.json").read_text())
    assert file_digest(path, 64) == card["sha256"] and path.stat().st_size <= 5_000_000
    assert card["classes"] == list(CLASSES)
    assert card["command"].startswith("python -m lcco.pretrain") and "--short" not in card["command"]


def test_shipped_clip_names_objects_and_what_a_set_shares(held):
    from PIL import Image

    from lcco.semantics import OpenClipTower

    tower = OpenClipTower("glyph-clip", "package")
    words = tower.encode_prompts([pretrain.TEMPLATE.format(c) for c in CLASSES])

    def scores(data):
        return tower.encode_images([Image.fromarray(x.permute(1, 2, 0).numpy()) for x in data.images]) @ words.T

    alone, scenes = held
    assert pretrain._top1(scores(alone), alone.holds) >= 0.8
    assert pretrain.set_accuracy(scores(scenes), scenes.holds, 5, sets=80) >= 0.9
    model = pretrain.build_clip()
    model.load_state_dict({k: v for k, v in tower._net.state_dict().items()})
    mine, _ = pretrain.clip_embeddings(model.eval(), alone)
    assert (scores(alone) - mine @ words.T).abs().max() < 0.1  # training and use read pictures alike


def test_shipped_backbone_tells_classes_apart_place_by_place(held):
    """Mean features at objects' places: the nearest class centre is the right one, far above chance (1 in 40)."""
    from lcco.backbones import make_backbone
    from lcco.glyphworld import draw

    net = make_backbone("glyphnet", "package", frozen_stages=4).eval()
    names, features, truth = list(CLASSES), [], []
    for n in range(160):
        picture, labels = draw([names[n % 40], names[(n * 7 + 11) % 40]], (55, n))
        with torch.no_grad():
            maps = net(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255)
        at = torch.from_numpy(labels == n % 40 + 1)[None, None].float()
        at = torch.nn.functional.adaptive_avg_pool2d(at, maps[2].shape[-2:])
        features.append((maps[2] * at).sum((0, 2, 3)) / at.sum().clamp(min=1e-6))
        truth.append(n % 40)
    x = torch.nn.functional.normalize(torch.stack(features) - torch.stack(features).mean(0), dim=1)
    y = torch.tensor(truth)
    centres = torch.stack([x[:120][y[:120] == c].mean(0) for c in range(40)])
    assert ((x[120:] @ centres.T).argmax(1) == y[120:]).float().mean() > 0.5


def test_accuracy_of_sets_counts_what_it_says():
    holds = torch.eye(4, dtype=torch.bool).repeat(5, 1)
    assert pretrain.set_accuracy(holds.float(), holds, 1, sets=8) == 1.0
    assert pretrain.set_accuracy(-holds.float(), holds, 1, sets=8) == 0.0
    assert pretrain.set_accuracy(-holds.float(), holds, 4, sets=8) == 1.0
