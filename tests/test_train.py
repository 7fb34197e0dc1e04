"""The training loop: the same bits every time, resumed or not; what it learns, logs and refuses."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import drawn
import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from tiny import same, weights

from lcco.backbones import model_file, read_about, read_tensors
from lcco.common import LCCoError
from lcco.config import Experiment, load_profile
from lcco.data import Draw, load_data
from lcco.experiment import train
from lcco.experiment.predictor import (
    Predictor,
    load_model,
    save_model,
    trained_on,
    trained_state,
)
from lcco.experiment.runs import open_run
from lcco.experiment.train import Trainer, holdout_score, learning_rate
from lcco.experiment.variants import BASELINE


@pytest.fixture
def base(tmp_path) -> Experiment:
    return tiny.experiment(tmp_path)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_batch_is_what_the_draws_say(base, tmp_path):
    one = Trainer(base, tmp_path / "a")
    features, data, words = one.features, one.data, one.vocabulary.words
    cow, dog = data.groups["cow"], data.groups["dog"]
    draws = [
        Draw(("cow",), tuple(cow[:2]), (False,) * 2, (None,) * 2),
        Draw(("dog",), tuple(dog[:2]), (True, False), (None,) * 2),
    ]
    one.sampler.draws = lambda step: draws
    made = one.batch(0)
    for b, n, i, flip in ((0, 1, cow[1], False), (1, 0, dog[0], True)):
        mask = Image.fromarray(data.mask(i, data.classes_of(i))).resize((64, 64), 0)
        mask = ImageOps.mirror(mask) if flip else mask
        np.testing.assert_array_equal(made["truth"][b, n], np.array(mask))
        embedding = features.tower.encode_images([data.image(i)])[0]
        torch.testing.assert_close(made["embeddings"][b, n], embedding)
        _, maps = features.visual(data, [i], [flip])
        assert all(torch.equal(m[b, n], x[0]) for m, x in zip(made["maps"], maps, strict=True))
    # v^gt by hand: the masked pictures through the tower, summed over the group
    masked = []
    for i in cow[:2]:
        pixels = np.array(data.image(i))
        pixels[data.mask(i, ["cow"]) != 1] = 0
        masked.append(Image.fromarray(pixels))
    sums = (features.tower.encode_images(masked) @ one.vocabulary.embeddings.T).sum(0)
    assert made["true"][0] == sums.argmax()
    grey, asked = Trainer(base.replace({"loss.mask_background": "mean"}), tmp_path / "g"), []
    grey.features.masked = lambda *how: asked.append(how[-1]) or features.masked(*how)
    grey.batch(0)
    assert asked == ["mean"]
    # or by name: unknown where the images share several, or the vocabulary has no such word
    named = Trainer(base.replace({"loss.v_gt": "name"}), tmp_path / "b")
    both = Draw(("cow", "dog"), tuple(cow[:2]), (False,) * 2, (None,) * 2)
    named.sampler.draws = lambda step: [*draws, both]
    assert named.batch(0)["true"].tolist() == [words.index("cow"), words.index("dog"), -1]
    named.vocabulary = replace(named.vocabulary, words=("dog", "boat", "car", "hat"))
    assert named.batch(0)["true"].tolist() == [-1, 0, -1]
    free = Trainer(base.replace({"loss.lambda_c": 0.0}), tmp_path / "c")
    assert free.batch(0)["true"] is None


# ------------------------------------------------------------------------------------ going on
@pytest.mark.parametrize("frozen", [4, 0])
def test_resumed_training_gives_the_same_bits(base, tmp_path, frozen):
    e = base.replace({"model.frozen_stages": frozen})
    Trainer(e, tmp_path / "whole").fit()
    Trainer(e, tmp_path / "parts").fit(stop_at=3)
    assert not (tmp_path / "parts" / "last.safetensors").exists()
    assert Trainer(e, tmp_path / "parts").fit()["step"] == 6
    for name in ("last", "best"):
        assert same(weights(tmp_path / "whole", name), weights(tmp_path / "parts", name))
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    Trainer(e.replace(seed=1), tmp_path / "other").fit()
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "other"))


@pytest.mark.parametrize("when", ["step", "save"])
def test_stopped_anywhere_and_started_again_it_ends_in_the_same_bits(base, tmp_path, when):
    """Between a checkpoint and the next, or when the best weights are further."""
    e = base.replace({"train.steps": 6, "train.eval_every": 2})
    Trainer(e, tmp_path / "whole").fit()
    one = Trainer(e, tmp_path / "cut")
    real, calls = getattr(one, when), []

    def cut(*how):
        calls.append(how)
        if len(calls) == (4 if when == "step" else 2):
            raise KeyboardInterrupt
        return real(*how)

    setattr(one, when, cut)
    with pytest.raises(KeyboardInterrupt):
        one.fit()
    assert [line["step"] for line in lines(tmp_path / "cut")] == [2]
    again = Trainer(e, tmp_path / "cut")
    again.restore()
    assert again.state["step"] == 2
    again.fit()
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_a_kill_beside_the_log_leaves_a_whole_log(base, tmp_path, monkeypatch):
    """The last checkpoint says that nothing is left to do, so the log must be there before it."""
    e, real, calls = base.replace({"train.steps": 6, "train.eval_every": 2}), train.write_text, []
    Trainer(e, tmp_path / "whole").fit()

    def cut(*how):
        calls.append(how)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*how)

    monkeypatch.setattr(train, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        Trainer(e, tmp_path / "cut").fit()
    assert [line["step"] for line in lines(tmp_path / "cut")] == [2, 4]
    Trainer(e, tmp_path / "cut").fit()
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_a_start_from_nothing_leaves_nothing_of_one_before(base, tmp_path):
    Trainer(base, tmp_path / "a").fit(stop_at=4)
    (tmp_path / "a" / "checkpoint.pt").unlink()
    longer = base.replace({"train.eval_every": 6})
    Trainer(longer, tmp_path / "a").fit(stop_at=4)
    assert lines(tmp_path / "a") == []
    Trainer(longer, tmp_path / "a").fit()
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
    one = Trainer(base.replace({"model.frozen_stages": 2, **rates}), tmp_path / "a")
    before = {k: p.detach().clone() for k, p in one.model.named_parameters()}
    one.step(one.batch(0))
    moved = {k for k, p in one.model.named_parameters() if not torch.equal(p, before[k])}
    assert moved and {k.startswith("backbone.stages.") for k in moved} == {learns == "backbone"}
    assert not any(k.startswith(("backbone.stages.0.", "backbone.stages.1.")) for k in moved)


def test_mlp3_has_a_factor_on_its_learning_rate(base, tmp_path):
    e = base.replace({"train.clip": 0.0, "train.weight_decay": 0.0})
    one, ten = (Trainer(e.replace({"train.mlp3_lr": f}), tmp_path / str(f)) for f in (1, 10))
    before = {k: p.detach().clone() for k, p in one.model.named_parameters()}
    for each in (one, ten):
        each.step(each.batch(0))
    for (key, a), b in zip(one.model.named_parameters(), ten.model.parameters(), strict=True):
        if key.startswith("clip_regularization.mlp3."):
            step = a - before[key]
            assert step.any()
            torch.testing.assert_close(b - before[key], 10 * step, atol=1e-6, rtol=1e-3)
        else:
            assert torch.equal(a, b), key


def test_weights_decay(base, tmp_path):
    """AdamW takes rate × decay × weight off, beside its own step."""
    after = []
    for decay in (0.0, 0.5):
        rates = {"train.weight_decay": decay, "train.lr": 0.01, "train.clip": 0.0}
        one = Trainer(base.replace(rates), tmp_path)
        before = {k: p.detach().clone() for k, p in one.model.named_parameters()}
        one.step(one.batch(0))
        after.append(dict(one.model.named_parameters()))
        rate = one.optimizer.param_groups[-1]["lr"]
    moved = [k for k, p in after[0].items() if not torch.equal(p, before[k])]
    assert rate > 1e-3 and len(moved) > 20
    for k in moved:
        torch.testing.assert_close(after[0][k] - after[1][k], rate * 0.5 * before[k])


def test_a_step_takes_the_scheduled_rate_and_clips_the_gradient(base, tmp_path):
    norms, rates = {}, []
    for clip in (0.0, 0.01):
        one = Trainer(base.replace({"train.clip": clip}), tmp_path / str(clip))
        inner = one.optimizer.step

        def step(one=one, clip=clip, inner=inner):
            squares = [float(p.grad.square().sum()) for p in one.model.parameters()
                       if p.grad is not None]  # fmt: skip
            norms[clip] = sum(squares) ** 0.5
            rates.append(one.optimizer.param_groups[0]["lr"])
            inner()

        one.optimizer.step = step
        one.step(one.batch(0))
    assert norms[0.0] > 0.1 and norms[0.01] == pytest.approx(0.01, rel=1e-3)
    assert rates == [1e-3 * 0.5] * 2  # the first of two steps of warm-up


def test_moving_average_of_weights_by_a_naive_loop(base, tmp_path):
    e = base.replace({"train.ema": 0.15, "data.holdout": []})
    averaged, plain = (Trainer(x, tmp_path / "a") for x in (e, e.replace({"train.ema": 0.0})))
    averaged.restore()
    key, expected = "head.1.weight", plain.model.state_dict()["head.1.weight"].clone()
    for n in range(1, 5):
        for one in (averaged, plain):
            one.step(one.batch(n - 1))
        decay = min(0.15, n / (9 + n))  # the second bound holds for the first step alone
        expected = decay * expected + (1 - decay) * plain.model.state_dict()[key]
        torch.testing.assert_close(averaged.averaged.state_dict()[key], expected)
    mean = averaged.averaged.state_dict()
    assert all(mean[k] == 4 for k in mean if "head" in k and k.endswith("num_batches_tracked"))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_averaged_weights_choose_the_checkpoint_as_they_are_scored_later(base, tmp_path, precision):
    """One path for choosing and scoring: full precision, the averaged weights, the same sets."""
    e = base.replace({"train.precision": precision, "train.ema": 0.99, "train.lr": 1e-2})
    one = Trainer(e, tmp_path / "a")
    summary = one.fit()
    best = max(line["holdout_J"] for line in lines(tmp_path / "a"))
    model = load_model(tmp_path / "a" / "best.safetensors")
    assert holdout_score(model, one.holdout, 3) == summary["best"] == pytest.approx(best, abs=1e-6)
    assert read_about(tmp_path / "a" / "best.safetensors")["holdout_J"] == summary["best"]
    own, mean = trained_state(one.model), trained_state(one.averaged)
    assert same(weights(tmp_path / "a"), mean)
    assert not torch.equal(own["head.1.weight"], mean["head.1.weight"])


def test_the_holdout_score_by_hand():
    """Seven images in sets of five: what completes the second set counts no second time."""
    truths = np.zeros((7, 4, 4), np.uint8)
    truths[:6, 1:3] = 1  # the last one shows nothing, and nothing is found: right

    def predict(data, members, cls):
        return [truths[i] * (i > 4 or 5 not in members) * 1.0 for i in members]

    predict.features = SimpleNamespace(truth=lambda data, i, classes: truths[i])
    assert holdout_score(predict, SimpleNamespace(groups={"a": range(7)}), 5) == 1.0


def test_half_precision_is_for_the_steps_alone(base, tmp_path):
    losses = []
    for precision in ("no", "bf16"):
        one = Trainer(base.replace({"train.precision": precision}), tmp_path / precision)
        types: list[torch.dtype] = []
        for net in (one.model, one.averaged):
            net.head.register_forward_hook(lambda *how, t=types: t.append(how[-1].dtype))
        losses.append(float(one.step(one.batch(0))["loss"]))
        holdout_score(Predictor(one.averaged, one.features, one.vocabulary), one.holdout, 3)
        assert types[0] == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert set(types[1:]) == {torch.float32}
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.05)


def test_given_groups_tell_the_network_their_class(tmp_path):
    """Their truth is that class alone, and L_c leaves them out: the pictures cannot tell it."""
    two = drawn.voc(tmp_path)  # pictures of a dog or a horse, and a person
    told = {"data.train": [str(two)], "data.given": 0.5, "data.groups": 8}
    told |= {"tower.vocabulary": "coco80"}
    seen = []
    hook = lambda net, args, kwargs: seen.append(kwargs["target"])  # noqa: E731
    for v_gt in ("name", "tower"):
        one = Trainer(tiny.experiment(tmp_path, **told, **{"loss.v_gt": v_gt}), tmp_path / v_gt)
        batch, draws = one.batch(0), one.sampler.draws(0)
        given = torch.tensor([draw.given for draw in draws])
        assert 0 < given.sum() < 8
        assert torch.equal(batch["given"] >= 0, given) and (batch["true"][given] == -1).all()
        words = [one.vocabulary.words[i] for i in batch["given"][given]]
        assert words == [draw.classes[0] for draw in draws if draw.given]
        one.model.register_forward_pre_hook(hook, with_kwargs=True)
        one.step(batch)
        assert torch.equal(seen[-1], batch["given"])
    for name, without in (("plain", {"data.given": 0.0}), ("deaf", BASELINE)):
        other = Trainer(tiny.experiment(tmp_path, **told | without), tmp_path / name)
        assert other.batch(0)["given"] is None
        assert not any(draw.given for draw in other.sampler.draws(0))


def test_logged_losses_are_means_since_the_line_before(base, tmp_path):
    """Without learning every step's loss stands: lines after 2, 4, 6 steps average to one of 6."""
    still = {"train.lr": 0.0, "train.weight_decay": 0.0, "train.ema": 0.0, "data.holdout": []}

    def losses(every: int) -> list[float]:
        e = base.replace({**still, "train.eval_every": every})
        Trainer(e, tmp_path / str(every)).fit()
        return [line["loss"] for line in lines(tmp_path / str(every))]

    often, once = losses(2), losses(6)
    assert len(often) == 3 and len(once) == 1
    assert np.mean(often) == pytest.approx(once[0], abs=1e-5)


def test_frozen_stages_stay_and_are_not_saved(base, tmp_path):
    one = Trainer(base.replace({"model.frozen_stages": 2}), tmp_path / "a")
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
        Trainer(wild, tmp_path / "wild").fit()
    Trainer(base, tmp_path / "b").fit(stop_at=3)
    checkpoint = tmp_path / "b" / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:1000])
    with pytest.raises(LCCoError, match="checkpoint.pt: not a checkpoint .* remove it"):
        Trainer(base, tmp_path / "b").fit()
    checkpoint.write_bytes(whole)
    with pytest.raises(LCCoError, match="not a checkpoint of this training: remove it"):
        Trainer(base.replace({"model.width": 32}), tmp_path / "b").fit()
    file = load_data(base.data.train).files[0][1]
    ImageOps.invert(Image.open(file).convert("L")).save(file)
    with pytest.raises(LCCoError, match="checkpoint.pt: .* remove it .*set was edited since"):
        Trainer(base, tmp_path / "b").fit()


# ------------------------------------------------------------------------------------ model files
def saved(e: Experiment, path: Path) -> Path:
    one = Trainer(e, path.parent)
    save_model(path, trained_state(one.model), e, one.features, one.vocabulary)
    return path


def test_a_model_file_builds_itself_and_checks_what_it_is_tied_to(base, tmp_path):
    file, data = saved(base, tmp_path / "m.safetensors"), load_data(base.data.train)
    one, again = load_model(file), load_model(file)
    items = list(data.groups["cow"])[:3]
    masks = one(data, items)
    assert masks.shape == (3, 64, 64) and (masks == again(data, items)).all()
    assert one.experiment == base
    given = [one.vocabulary.words.index("car")]
    one.gt = True
    assert one.output(data, (items, "car")).best.tolist() == given
    assert one.output(data, (items, "car")).distilled[0].tolist() == given * 4
    sets = [(items, "cow"), (items[1:], "car"), (items[::-1], "dog"), (items[:2], None)]
    sets += [(items, c) for c in ("cow", "car", "dog", "boat") * 5]  # more than run at once
    for (members, cls), masks in zip(sets, one.many(data, sets), strict=True):
        np.testing.assert_allclose(masks, one(data, members, cls), atol=1e-5)
    apart = np.abs(one(data, items, "car") - one(data, items, "dog")).max()
    assert apart > 1e-4, f"{apart}: a class that is told changes the masks"
    (tmp_path / "words.txt").write_text("dog\ncow\ncar\nboat\n")  # the same words, another order
    with pytest.raises(LCCoError, match="trained with another vocabulary"):
        load_model(file)
    load_model(saved(base.replace({"model.mlp3": "shared"}), tmp_path / "shared.safetensors"))
    (tmp_path / "words.txt").write_text("cow\ndog\ncar\nboat\n")
    for part in ("tower", "backbone"):
        with pytest.raises(LCCoError, match=f"another {part} .*put that {part}'s files back"):
            load_model(told(file, {part: "other"}))
    with pytest.raises(LCCoError, match="not a model of these settings"):
        load_model(told(file, {"experiment": base.replace({"model.width": 8}).model_dump()}))
    other = told(file, {"experiment": {"model": {"headz": 4}}})
    for read in (load_model, open_run):
        with pytest.raises(LCCoError, match="told.safetensors: .*unknown setting `model.headz`"):
            read(other)
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:5000])
    with pytest.raises(LCCoError, match="cut.safetensors: not a model"):
        load_model(tmp_path / "cut.safetensors")


def told(file: Path, other: dict) -> Path:
    """A model file of the same tensors whose description says something else."""
    out = file.with_name("told.safetensors")
    save_file(read_tensors(file), out, {"lcco": json.dumps(read_about(file) | other)})
    return out


def test_the_profile_own_goes_on_from_the_shipped_model(tmp_path):
    mine = drawn.folders(tmp_path, ["cow"], 3, "mine")
    e = load_profile("own").experiment.replace({"data.train": str(mine)})
    one, shipped = Trainer(e, tmp_path / "on"), read_tensors(model_file("shipped"))
    for key, value in one.model.state_dict().items():
        if not key.startswith("backbone."):
            assert torch.equal(value, shipped[key]), key


def test_a_training_goes_on_from_a_model_file(base, tmp_path):
    file = saved(base.replace(seed=5), tmp_path / "m.safetensors")
    e = base.replace({"train.start": str(file), "model.weights": None, "seed": 1})
    one = Trainer(e, tmp_path / "on")
    one.restore()
    for key, value in weights(tmp_path, "m").items():
        if not key.startswith("backbone."):
            assert torch.equal(one.model.state_dict()[key], value), key
    assert [p["train"] for p in trained_on(e)] == [list(base.data.train)] * 2
    mine = drawn.folders(tmp_path, ["cow"], 3, "mine", first=50)
    elsewhere = e.replace({"data.train": str(mine)})
    assert [p["train"] for p in trained_on(elsewhere)][1] == list(base.data.train)
    with pytest.raises(LCCoError, match="not a model of these settings"):
        Trainer(e.replace({"model.width": 8}), tmp_path / "w").restore()
    (tmp_path / "others.txt").write_text("boat\ncar\ndog\ncow\n")
    with pytest.raises(LCCoError, match="trained with another vocabulary"):
        words = {"tower.vocabulary": str(tmp_path / "others.txt")}
        Trainer(e.replace(words), tmp_path / "v").restore()
