"""The training loop: the same bits every time, resumed or not; what it learns, logs and refuses."""

import json
from pathlib import Path

import drawn
import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageOps
from tiny import same, trainer, weights

from lcco.backbones import model_file, read_about
from lcco.common import LCCoError
from lcco.config import Experiment
from lcco.data import load_data
from lcco.experiment.features import make_features
from lcco.experiment.predictor import (
    load_model,
    read_experiment,
    save_model,
    trained_on,
    trained_state,
)
from lcco.experiment.train import holdout_score, learning_rate


@pytest.fixture
def base(tmp_path) -> Experiment:
    return tiny.experiment(tmp_path)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------ going on
@pytest.mark.parametrize("frozen", [4, 0])
def test_resumed_training_gives_the_same_bits(base, tmp_path, frozen):
    e = base.replace({"model.frozen_stages": frozen, "data.given": 0.5})
    trainer(e, tmp_path / "whole").fit()
    trainer(e, tmp_path / "parts").fit(stop_at=3)
    assert not (tmp_path / "parts" / "last.safetensors").exists()
    assert trainer(e, tmp_path / "parts").fit()["step"] == 6
    for name in ("last", "best"):
        assert same(weights(tmp_path / "whole", name), weights(tmp_path / "parts", name))
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    trainer(e.replace(seed=1), tmp_path / "other").fit()
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "other"))


@pytest.mark.parametrize("when", ["step", "save"])
def test_stopped_anywhere_and_started_again_it_ends_in_the_same_bits(base, tmp_path, when):
    """Between a checkpoint and the next, or when the log and the best weights are further."""
    e = base.replace({"train.steps": 6, "train.eval_every": 2})
    trainer(e, tmp_path / "whole").fit()
    one = trainer(e, tmp_path / "cut")
    real, calls = getattr(one, when), []

    def cut(*how):
        calls.append(how)
        if len(calls) == (4 if when == "step" else 2):
            raise KeyboardInterrupt
        return real(*how)

    setattr(one, when, cut)
    with pytest.raises(KeyboardInterrupt):
        one.fit()
    assert [line["step"] for line in lines(tmp_path / "cut")] == ([2] if when == "step" else [2, 4])
    again = trainer(e, tmp_path / "cut")
    again.restore()
    assert again.state["step"] == 2
    again.fit()
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_a_start_from_nothing_leaves_nothing_of_one_before(base, tmp_path):
    trainer(base, tmp_path / "a").fit(stop_at=4)
    (tmp_path / "a" / "checkpoint.pt").unlink()
    longer = base.replace({"train.eval_every": 6})
    trainer(longer, tmp_path / "a").fit(stop_at=4)
    assert lines(tmp_path / "a") == [] and not (tmp_path / "a" / "best.safetensors").exists()
    trainer(longer, tmp_path / "a").fit()
    assert [line["step"] for line in lines(tmp_path / "a")] == [6]


# ------------------------------------------------------------------------------------ learning
def test_learning_rate_schedules():
    e = Experiment().replace({"train.steps": 80_000})
    at = (0, 19_999, 20_000, 40_000, 79_999)
    assert [learning_rate(e, s) for s in at] == [1, 1, 0.5, 0.25, 0.125]
    e = e.replace({"train.steps": 100, "train.schedule": "cosine", "train.warmup": 10})
    assert learning_rate(e, 0) == 0.1 and learning_rate(e, 9) == learning_rate(e, 10) == 1
    assert learning_rate(e, 55) == pytest.approx(0.5) and learning_rate(e, 100) == pytest.approx(0)


@pytest.mark.parametrize("learns", ["backbone", "the rest"])
def test_the_backbone_has_its_own_learning_rate(base, tmp_path, learns):
    rates = {"train.lr": 0.0, "train.backbone_lr": 0.0}
    rates["train.backbone_lr" if learns == "backbone" else "train.lr"] = 1e-3
    one = trainer(base.replace({"model.frozen_stages": 2, **rates}), tmp_path / "a")
    before = {k: p.detach().clone() for k, p in one.model.named_parameters()}
    one.step(one.batch(0).to("cpu"))
    moved = {k for k, p in one.model.named_parameters() if not torch.equal(p, before[k])}
    assert moved and {k.startswith("backbone.stages.") for k in moved} == {learns == "backbone"}
    assert not any(k.startswith(("backbone.stages.0.", "backbone.stages.1.")) for k in moved)


def test_a_step_takes_the_scheduled_rate_and_clips_the_gradient(base, tmp_path):
    norms, rates = {}, []
    for clip in (0.0, 0.01):
        one = trainer(base.replace({"train.clip": clip}), tmp_path / str(clip))
        inner = one.optimizer.step

        def step(one=one, clip=clip, inner=inner):
            squares = [float(p.grad.square().sum()) for p in one.model.parameters()
                       if p.grad is not None]  # fmt: skip
            norms[clip] = sum(squares) ** 0.5
            rates.append(one.optimizer.param_groups[0]["lr"])
            inner()

        one.optimizer.step = step
        one.step(one.batch(0).to("cpu"))
    assert norms[0.0] > 0.1 and norms[0.01] == pytest.approx(0.01, rel=1e-3)
    assert rates == [1e-3 * 0.5] * 2  # the first of two steps of warm-up


def test_moving_average_of_weights_by_a_naive_loop(base, tmp_path):
    e = base.replace({"train.ema": 0.5, "data.holdout": []})
    averaged, plain = (trainer(x, tmp_path / "a") for x in (e, e.replace({"train.ema": 0.0})))
    averaged.restore()
    key, expected = "head.1.weight", plain.model.state_dict()["head.1.weight"].clone()
    for n in range(1, 5):
        for one in (averaged, plain):
            one.step(one.batch(n - 1).to("cpu"))
        decay = min(0.5, n / (9 + n))
        expected = decay * expected + (1 - decay) * plain.model.state_dict()[key]
        torch.testing.assert_close(averaged.ema[key], expected)
    counts = [k for k in averaged.ema if k.endswith("num_batches_tracked")]
    assert all(averaged.ema[k] == 4 for k in counts if "head" in k)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_averaged_weights_choose_the_checkpoint_as_they_are_scored_later(base, tmp_path, precision):
    """One path for choosing and scoring: full precision, the averaged weights, the same sets."""
    e = base.replace({"train.precision": precision, "train.ema": 0.99, "train.lr": 1e-2})
    one = trainer(e, tmp_path / "a")
    summary = one.fit()
    best = max(line["holdout_J"] for line in lines(tmp_path / "a"))
    model = load_model(tmp_path / "a" / "best.safetensors", device="cpu")
    assert holdout_score(model, one.holdout, 3) == summary["best"] == pytest.approx(best, abs=1e-6)
    assert read_about(tmp_path / "a" / "best.safetensors")["holdout_J"] == summary["best"]
    for name, value in one.ema.items():
        assert torch.equal(value, weights(tmp_path / "a")[name]), name
    own = trained_state(one.model)
    assert not torch.equal(own["head.1.weight"], one.ema["head.1.weight"])


def test_half_precision_is_for_the_steps_alone(base, tmp_path):
    losses = []
    for precision in ("no", "bf16"):
        one = trainer(base.replace({"train.precision": precision}), tmp_path / precision)
        types: list[torch.dtype] = []
        one.model.head.register_forward_hook(lambda *how, t=types: t.append(how[-1].dtype))
        losses.append(float(one.step(one.batch(0).to("cpu"))["loss"]))
        one.validate()
        assert types[0] == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert set(types[1:]) == {torch.float32}
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.05)


def test_the_class_is_given_to_a_share_of_the_groups(base, tmp_path):
    """And what is drawn stays what it was without."""
    told = []
    e = base.replace({"data.given": 0.3, "data.groups": 8, "loss.v_gt": "name"})
    one, other = trainer(e, tmp_path / "a"), trainer(e.replace({"data.given": 0.0}), tmp_path / "b")
    hook = lambda net, args, kwargs: told.append(kwargs["target"])  # noqa: E731
    one.model.register_forward_pre_hook(hook, with_kwargs=True)
    for step in range(12):
        batch = one.batch(step).to("cpu")
        assert torch.equal(batch.embeddings, other.batch(step).embeddings)
        one.step(batch)
        given = told[-1] >= 0
        assert torch.equal(told[-1][given], batch.true[given])
    share = torch.stack(told).ge(0).float().mean()
    assert 0.15 < share < 0.45
    other.model.register_forward_pre_hook(hook, with_kwargs=True)
    other.step(other.batch(0).to("cpu"))
    assert told[-1] is None


def test_logged_losses_are_means_since_the_line_before(base, tmp_path):
    """Without learning every step's loss stands: lines after 2, 4, 6 steps average to one of 6."""
    still = {"train.lr": 0.0, "train.weight_decay": 0.0, "train.ema": 0.0, "data.holdout": []}

    def losses(every: int) -> list[float]:
        e = base.replace({**still, "train.eval_every": every})
        trainer(e, tmp_path / str(every)).fit()
        return [line["loss"] for line in lines(tmp_path / str(every))]

    often, once = losses(2), losses(6)
    assert len(often) == 3 and len(once) == 1
    assert np.mean(often) == pytest.approx(once[0], abs=1e-5)


def test_frozen_stages_stay_and_are_not_saved(base, tmp_path):
    one = trainer(base.replace({"model.frozen_stages": 2}), tmp_path / "a")
    before = {k: v.clone() for k, v in one.features.backbone.state_dict().items()}
    one.fit()
    after = one.features.backbone.state_dict()
    frozen = [k for k in before if k.startswith(("stages.0.", "stages.1."))]
    assert all(torch.equal(before[k], after[k]) for k in frozen)
    assert any(not torch.equal(before[k], after[k]) for k in before if k not in frozen)
    saved = weights(tmp_path / "a")
    assert not any(k.removeprefix("backbone.") in frozen for k in saved)
    assert any(k.startswith("backbone.stages.2.") for k in saved)


# ------------------------------------------------------------------------------------ refusals
def test_bad_trainings_say_what_to_mend(base, tmp_path):
    wild = base.replace({"train.lr": 1e30, "train.clip": 0.0, "train.ema": 0.0})
    with pytest.raises(LCCoError, match=r"^wild: the loss is (nan|inf) at step \d; lower `train"):
        trainer(wild, tmp_path / "wild").fit()
    trainer(base, tmp_path / "b").fit(stop_at=3)
    checkpoint = tmp_path / "b" / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:1000])
    with pytest.raises(LCCoError, match=r"checkpoint.pt: damaged, .* remove it"):
        trainer(base, tmp_path / "b").fit()
    checkpoint.write_bytes(whole)
    with pytest.raises(LCCoError, match="from other settings"):
        trainer(base.replace({"model.width": 32}), tmp_path / "b").fit()
    file = load_data(base.data.train).truth_path(0)
    ImageOps.invert(Image.open(file).convert("L")).save(file)
    with pytest.raises(LCCoError, match="checkpoint.pt: .* was edited since; remove it"):
        trainer(base, tmp_path / "b").fit()


# ------------------------------------------------------------------------------------ model files
def saved(e: Experiment, path: Path) -> Path:
    one = trainer(e, path.parent)
    save_model(path, trained_state(one.model), e, one.features, one.vocabulary)
    return path


def test_a_model_file_builds_itself_and_checks_what_it_is_tied_to(base, tmp_path):
    file, data = saved(base, tmp_path / "m.safetensors"), load_data(base.data.train)
    one, again = load_model(file, device="cpu"), load_model(file, device="cpu")
    items = list(data.groups["cow"])[:3]
    masks = one(data, items)
    assert masks.shape == (3, 64, 64) and (masks == again(data, items)).all()
    assert one.experiment == base
    words = one.words(one.output(data, items), 2)
    assert len(words) == 2 and words[0][1] >= words[1][1] and words[0][0] in one.vocabulary.words
    given = [one.vocabulary.words.index("car")]
    one.gt = True
    assert one.output(data, items, "car").best.tolist() == given
    assert one.output(data, items, "car").distilled[0].tolist() == given * 4

    (tmp_path / "words.txt").write_text("dog\ncow\ncar\nboat\n")  # the same words, another order
    with pytest.raises(LCCoError, match="trained with another vocabulary"):
        load_model(file)
    load_model(saved(base.replace({"model.mlp3": "shared"}), tmp_path / "shared.safetensors"))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(tiny.CLIP | {"mean": [0.4, 0.5, 0.5]}))
    (tmp_path / "words.txt").write_text("cow\ndog\ncar\nboat\n")
    Path(base.tower.model).write_text(other.read_text())
    moved = make_features(base.replace({"tower.model": str(other)}), "cpu")
    with pytest.raises(LCCoError, match="trained with another tower .*put that tower's files back"):
        load_model(file, features=moved)
    asked = load_model(file, changes={"tower.model": str(other)})
    assert asked.features.tower.identity != read_about(file)["tower"]
    with pytest.raises(LCCoError, match="trained with another backbone"):
        load_model(file, features=make_features(base.replace(seed=1), "cpu"))
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:5000])
    with pytest.raises(LCCoError, match="cut.safetensors: not a model"):
        load_model(tmp_path / "cut.safetensors")


def test_the_shipped_file_is_read_although_its_settings_are_older():
    about = read_about(model_file("shipped"))
    e = read_experiment(about["experiment"])
    assert (e.name, e.model.width, e.train.steps) == ("shipped", 64, 1500)
    with pytest.raises(LCCoError, match="unknown setting `model.headz`"):
        read_experiment(about["experiment"] | {"model": {"headz": 4}})


def test_a_training_goes_on_from_a_model_file(base, tmp_path):
    file = saved(base.replace(seed=5), tmp_path / "m.safetensors")
    e = base.replace({"train.start": str(file), "model.weights": None, "seed": 1})
    one = trainer(e, tmp_path / "on")
    one.restore()
    for key, value in weights(tmp_path, "m").items():
        if not key.startswith("backbone."):
            assert torch.equal(one.model.state_dict()[key], value), key
    assert [p["train"] for p in trained_on(e)] == [list(base.data.train)] * 2
    mine = drawn.folders(tmp_path, ["cow"], 3, "mine", first=50)
    elsewhere = e.replace({"data.train": str(mine)})
    assert [p["train"] for p in trained_on(elsewhere)][1] == list(base.data.train)
    with pytest.raises(LCCoError, match="not a model of these settings: `.*` differs$"):
        trainer(e.replace({"model.width": 8}), tmp_path / "w").restore()
    (tmp_path / "others.txt").write_text("boat\ncar\ndog\ncow\n")
    with pytest.raises(LCCoError, match="trained with another vocabulary"):
        words = {"tower.vocabulary": str(tmp_path / "others.txt")}
        trainer(e.replace(words), tmp_path / "v").restore()
