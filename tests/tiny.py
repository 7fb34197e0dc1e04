"""The smallest experiment: six steps on a drawn set of three classes, random glyphnet and CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import drawn
import torch

from lcco.config import Experiment

CLIP = {
    "model_config": {
        "embed_dim": 16,
        "vision_cfg": {
            "layers": 1, "width": 16, "head_width": 8, "image_size": 32, "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1,
        },
    },
    "image_size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "context_length": 77,
}  # fmt: skip


def experiment(tmp: Path, **changes) -> Experiment:
    """Its files lie in `tmp`."""
    folder = drawn.folders(tmp, ["cow", "dog", "car"], 4)
    model, words = tmp / "tiny-clip.json", tmp / "words.txt"
    model.write_text(json.dumps(CLIP))
    words.write_text("cow\ndog\ncar\nboat\n")
    return Experiment().replace({
        "name": "tiny", "data.train": [str(folder)], "data.holdout": [str(folder)],
        "data.size": 64, "data.groups": 2, "data.group_size": 3, "data.flip": True,
        "tower.model": str(model), "tower.weights": None, "tower.vocabulary": str(words),
        "model.backbone": "glyphnet", "model.weights": None, "model.width": 16,
        "model.frozen_stages": 4, "train.steps": 6, "train.eval_every": 3, "train.lr": 1e-3,
        "train.ema": 0.9, "train.clip": 1.0, "train.schedule": "cosine", "train.warmup": 2,
        **changes,
    })  # fmt: skip


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    """The tensors of a model file."""
    from safetensors.torch import load_file

    return load_file(folder / f"{name}.safetensors")


def same(a: dict, b: dict) -> bool:
    """Whether two states are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
