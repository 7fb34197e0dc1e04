"""The training loop: the same bits every time, resumed or not; what it refuses; what it leaves on disk."""

import gc
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import drawn
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lcco import reproduce, runs
from lcco.backbones import model_file, read_tensors
from lcco.common import LCCoError, file_digest
from lcco.config import Experiment
from lcco.data import load_data
from lcco.evaluate import evaluate_all
from lcco.inputs import Inputs
from lcco.semantics import OpenClipTower
from lcco.train import build_model, learning_rate, load_model, read_about, train, trained_on, trained_state

TINY_CLIP = {
    "model_config": {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "image_size": 32, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    },
    "image_size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "context_length": 77,
}  # fmt: skip


@pytest.fixture
def base(tmp_path) -> Experiment:
    """Six steps on a drawn set of three classes: random glyphnet, random CLIP."""
    folder = drawn.folders(tmp_path, ["cow", "dog", "car"], 4)
    model = tmp_path / "tiny-clip.json"
    model.write_text(json.dumps(TINY_CLIP))
    (tmp_path / "words.txt").write_text("cow\ndog\ncar\nboat\n")
    return Experiment().replace({
        "name": "tiny", "data.train": [str(folder)], "data.holdout": [str(folder)], "data.size": 64, "data.groups": 2,
        "data.group_size": 3, "data.flip": True, "tower.model": str(model), "tower.weights": None,
        "tower.vocabulary": str(tmp_path / "words.txt"), "model.backbone": "glyphnet", "model.weights": None,
        "model.width": 16, "model.frozen_stages": 4, "train.steps": 6, "train.eval_every": 3, "train.lr": 1e-3,
        "train.ema": 0.9, "train.clip": 1.0, "train.schedule": "cosine", "train.warmup": 2,
    })  # fmt: skip


def weights(folder: Path, name: str = "last.safetensors") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / name)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("frozen", [4, 0])
def test_resumed_training_gives_the_same_bits(base, tmp_path, frozen):
    experiment = base.replace({"model.frozen_stages": frozen})

    def inputs():
        return Inputs(experiment)

    train(experiment, tmp_path / "whole", inputs=inputs())
    train(experiment, tmp_path / "parts", inputs=inputs(), stop_at=3)
    assert (tmp_path / "parts" / "checkpoint.pt").is_file() and not (tmp_path / "parts" / "last.safetensors").exists()
    summary = train(experiment, tmp_path / "parts", inputs=inputs())
    assert summary["step"] == 6
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert same(weights(tmp_path / "whole", "best.safetensors"), weights(tmp_path / "parts", "best.safetensors"))
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "parts" / "metrics.jsonl").read_text()
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()
    other = experiment.replace(seed=1)
    train(other, tmp_path / "other", inputs=inputs())
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "other"))


def test_cached_maps_are_the_backbones(base):
    inputs = Inputs(base)
    data = load_data(base.data.train[0])
    _, cached = inputs.visual(data, [1, 5], [False, True])
    _, fresh = inputs.visual(data, [1, 5], [False, True], cached=False)
    assert [m.shape[1:] for m in cached] == [(32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2)]
    for a, b in zip(cached, fresh, strict=True):
        torch.testing.assert_close(a.float(), b, atol=2e-3, rtol=2e-3)  # half precision
    plain, _ = Inputs(base.replace({"model.frozen_stages": 0})).visual(data, [5], [True])
    assert torch.equal(plain[0].flip(-1), Inputs(base)._tensor(data, [5])[0])


def test_a_batch_is_what_the_draws_say(base):
    from lcco.data import Draw

    inputs, data = Inputs(base), load_data(base.data.train[0])
    cow, dog = data.groups["cow"], data.groups["dog"]
    draws = [
        Draw(("cow",), tuple(cow[:3]), (False,) * 3, (None,) * 3),
        Draw(("dog",), tuple(dog[:2]), (True, False), (None,) * 2),
    ]
    batch = inputs.batch(data, draws)
    assert batch.present.tolist() == [[True] * 3, [True, True, False]]
    assert batch.truth.shape == (2, 3, 64, 64) and (batch.truth[1, 2] == 255).all()
    plain = inputs.batch(data, [Draw(("dog",), tuple(dog[:2]), (False, False), (None,) * 2)])
    assert torch.equal(batch.truth[1, 0].flip(-1), plain.truth[0, 0])
    assert torch.equal(batch.embeddings[0, 1], inputs.embeddings(data, [cow[1]])[0])
    # v^gt by hand: the masked pictures through the tower, summed over the group
    masked = []
    for i in cow[:3]:
        pixels = np.array(data.image(i))
        pixels[data.mask(i, ["cow"]) != 1] = 0
        masked.append(Image.fromarray(pixels))
    expected = (inputs.tower.encode_images(masked) @ inputs.prompts.T).sum(0).argmax()
    assert batch.true[0] == expected
    # or by name: the class's own word; unknown where the images share several, or the vocabulary has no such word
    named = Inputs(base.replace({"loss.v_gt": "name"}))
    both = Draw(("cow", "dog"), tuple(cow[:2]), (False,) * 2, (None,) * 2)
    assert named.batch(data, [*draws, both]).true.tolist() == [
        named.words.index("cow"), named.words.index("dog"), -1,
    ]  # fmt: skip
    assert named._own_word(("unicorn",)) == -1
    assert Inputs(base.replace({"loss.v_gt": "name", "loss.lambda_c": 0.0})).batch(data, draws).true is None


def test_frozen_stages_stay_and_are_not_saved(base, tmp_path):
    experiment = base.replace({"model.frozen_stages": 2})
    inputs = Inputs(experiment)
    before = {k: v.clone() for k, v in inputs.backbone.state_dict().items()}
    train(experiment, tmp_path, inputs=inputs)
    after = inputs.backbone.state_dict()
    for k in before:
        if k.startswith(("stages.0.", "stages.1.")):
            assert torch.equal(before[k], after[k]), k
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("stages.3.") and "weight" in k)
    saved = weights(tmp_path)
    assert not any(k.startswith(("backbone.stages.0.", "backbone.stages.1.")) for k in saved)
    assert any(k.startswith("backbone.stages.2.") for k in saved)


def test_learning_rate_schedules():
    e = Experiment().replace({"train.steps": 100, "train.halve_every": 30})
    assert [learning_rate(e, s) for s in (0, 29, 30, 60, 99)] == [1, 1, 0.5, 0.25, 0.125]
    e = e.replace({"train.schedule": "cosine", "train.warmup": 10})
    assert learning_rate(e, 0) == 0.1 and learning_rate(e, 10) == 1
    assert learning_rate(e, 55) == pytest.approx(0.5) and learning_rate(e, 100) == pytest.approx(0)


def test_a_model_file_builds_itself_and_checks_its_vocabulary(base, tmp_path):
    run = runs.get_run(base)
    again = runs.open_run("tiny").predictor()
    data = load_data(base.data.train[0])
    items = list(data.groups["cow"])[:3]
    assert (run.predictor()(data, items, "cow") == again(data, items, "cow")).all()
    assert read_about(run.weights)["experiment"]["train"]["steps"] == 6
    (tmp_path / "words.txt").write_text("dog\ncow\ncar\nboat\n")  # the same words in another order
    with pytest.raises(LCCoError, match="trained with another vocabulary"):
        load_model(run.weights)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(run.weights.read_bytes()[:5000])
    with pytest.raises(LCCoError, match=r"broken.safetensors: not readable"):
        load_model(broken)
    with pytest.raises(LCCoError, match="no such model file"):
        load_model(tmp_path / "absent.safetensors")


def test_the_run_store_trains_once_and_resumes(base, tmp_path):
    path = runs.run_path(base)
    train(base, path, stop_at=3)  # as if interrupted
    run = runs.get_run(base)
    stamp = (path / "last.safetensors").stat().st_mtime_ns
    assert runs.get_run(base).record == run.record and (path / "last.safetensors").stat().st_mtime_ns == stamp
    record = run.record
    assert record["hash"] == base.hash and torch.__version__.startswith(record["environment"]["versions"]["torch"])
    assert len(record["weights_sha256"]) == 64 and record["data"]["images"] == 12 and record["training"]["step"] == 6
    with pytest.raises(LCCoError, match="no run is called `nothing`; there are: tiny-"):
        runs.open_run("nothing")
    (path / "record.json").write_text("{")
    with pytest.raises(LCCoError, match="damaged; remove"):
        runs.get_run(base)


def test_a_training_on_several_machines_names_them_and_adds_up_its_seconds(base, monkeypatch):
    real, here = runs.train, runs.environment()
    checkpoint = runs.run_path(base) / "checkpoint.pt"
    for device, stop in (("gpu a", 3), ("gpu b", 5)):
        monkeypatch.setattr(runs, "environment", lambda device=device: here | {"device": device})

        def stopped(*args, stop=stop, **how):
            real(*args, stop_at=stop, **how)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(runs, "train", stopped)
            runs.get_run(base)
        saved = torch.load(checkpoint, weights_only=False)
        saved["state"]["seconds"] += 1000  # as if it had been long
        torch.save(saved, checkpoint)
    record = runs.get_run(base).record
    assert [e["device"] for e in record["begun_on"]] == ["gpu a"] and record["environment"]["device"] == "gpu b"
    assert 2000 < record["training"]["seconds"] < 2100 and 2000 < record["seconds"] < 2100


def test_a_copy_without_git_is_not_called_clean(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "project_root", lambda: tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    made = runs.environment()
    assert made["git"] is None and made["git_dirty"] is None
    said = [reproduce._commit(e) for e in (made, {}, {"git": "abc", "git_dirty": True}, {"git": "abc"})]
    assert said == ["unknown", "unknown", "abc, edited", "abc"]


def _ask(experiment: Experiment) -> None:
    torch.set_num_threads(1)
    runs.get_run(experiment)


def test_two_processes_train_a_run_once(base):
    asked = [multiprocessing.get_context("spawn").Process(target=_ask, args=(base,)) for _ in range(2)]
    for p in asked:
        p.start()
    for p in asked:
        p.join(120)
        assert p.exitcode == 0
    lines = [json.loads(line) for line in (runs.run_path(base) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]  # one training's log


def test_runs_are_trained_and_scored_ahead_side_by_side(base, tmp_path, monkeypatch):
    other = drawn.folders(tmp_path, ["cow", "dog"], 3, name="other", first=500)
    both = [base, base.replace(seed=1), base.replace({"model.placement": "encoder"})]
    assert runs.side_by_side(both) == min(3, runs.os.cpu_count())
    monkeypatch.setattr(runs.os, "cpu_count", lambda: 2)
    jobs = [(e, [(str(other), ("ufo",), 3)]) for e in both]
    runs.train_ahead(jobs)
    monkeypatch.setattr(runs, "train", None)  # nothing is left to train or to score
    monkeypatch.setattr(runs, "evaluate_all", None)
    for e in both:
        run = runs.get_run(e)
        assert run.scored(str(other), ["ufo"], 3) and not run.scored(str(other), ["ufo"], 2)
        assert run.evaluate(str(other), "ufo", 3)["ufo"].summary["images"] == 6
    monkeypatch.setattr(runs, "ProcessPoolExecutor", None)
    runs.train_ahead(jobs)  # all there: no process is started


def test_an_interrupted_training_can_be_taken_as_it_stands(base, tmp_path):
    with pytest.raises(LCCoError, match="nothing to close"):
        runs.close_run(base)
    path = runs.run_path(base)
    train(base, path, stop_at=4)  # past the evaluation at step 3
    (path / "config.json").write_text('{"environment": {"device": "lent"}}')
    kept = file_digest(path / "best.safetensors", 64)
    run = runs.close_run(base, "the lease ended")
    assert run.record["weights_sha256"] == kept and run.record["environment"] == {"device": "lent"}
    assert run.record["note"].startswith("stopped after step 3 of 6 (the lease ended); weights of step 3")
    assert run.record["training"]["best"] == read_about(path / "best.safetensors")["holdout_J"]
    assert runs.get_run(base).record == run.record  # it is done: nothing trains
    assert run.evaluate(base.data.train[0], "ufo", 3, allow_overlap=True)["ufo"].summary["images"] == 12
    with pytest.raises(LCCoError, match="done already"):
        runs.close_run(base)


def test_a_training_of_data_that_were_edited_since_is_not_taken_as_it_stands(base):
    train(base, runs.run_path(base), stop_at=4)
    file = load_data(base.data.train[0]).truth_path(0)
    ImageOps.invert(Image.open(file).convert("L")).save(file)
    with pytest.raises(LCCoError, match="was edited since"):
        runs.close_run(base)


def test_a_start_from_nothing_leaves_nothing_of_one_before(base, tmp_path):
    train(base, tmp_path, stop_at=4)
    (tmp_path / "checkpoint.pt").unlink()
    longer = base.replace({"train.eval_every": 6})
    train(longer, tmp_path, stop_at=4)
    assert (tmp_path / "metrics.jsonl").read_text() == "" and not (tmp_path / "best.safetensors").exists()
    train(longer, tmp_path)
    assert [json.loads(n)["step"] for n in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [6]


def test_logged_losses_are_means_over_the_steps_since_the_line_before(base, tmp_path):
    """Without learning every step's loss stands; lines after 2, 4 and 6 steps must average to the line after all 6."""
    still = base.replace({"train.lr": 0.0, "train.weight_decay": 0.0, "train.ema": 0.0, "data.holdout": []})

    def losses(every: int) -> list[float]:
        train(still.replace({"train.eval_every": every}), tmp_path / str(every))
        return [json.loads(n)["loss"] for n in (tmp_path / str(every) / "metrics.jsonl").read_text().splitlines()]

    often, once = losses(2), losses(6)
    assert len(often) == 3 and len(once) == 1 and np.mean(often) == pytest.approx(once[0], abs=1e-5)


def test_a_run_to_go_on_from_gives_the_weights_that_its_settings_evaluate(base):
    for kind in ("best", "last"):
        run = runs.get_run(base.replace({"train.checkpoint": kind}))
        assert run.weights.name == f"{kind}.safetensors" == model_file(f"run:{run.path.name}", "train.start").name


def test_a_model_is_not_used_with_another_tower_or_backbone(base, tmp_path):
    run = runs.get_run(base)
    run.evaluate(base.data.train[0], "ufo", 3, allow_overlap=True)
    card = Path(base.tower.model)
    card.write_text(card.read_text().replace('"mean": [0.5, 0.5, 0.5]', '"mean": [0.4, 0.5, 0.5]'))
    runs._SHARED.clear()
    with pytest.raises(LCCoError, match="trained with another tower .*put that tower's files back"):
        runs.open_run(run.path).evaluate(base.data.train[0], "native", 3, allow_overlap=True)
    asked = load_model(run.weights, **{"tower.model": str(card)})
    assert asked.inputs.tower.identity != read_about(run.weights)["tower"]


def test_what_it_was_trained_on_must_be_known_to_score_it(base, tmp_path):
    mine, run = Path(base.data.train[0]), runs.get_run(base)
    test, other = (drawn.folders(tmp_path, ["cow"], 3, name=n, first=f) for n, f in (("test", 60), ("other", 80)))
    picture = next((mine / "image/cow").iterdir())
    shutil.copy(picture, next((test / "image/cow").iterdir()))
    with pytest.raises(LCCoError, match="was trained on 1 of the"):
        run.evaluate(str(test), "ufo", 3)
    clean = run.evaluate(str(other), "ufo", 3)
    picture.rename(tmp_path / "moved.jpg")  # moved away, it still was trained on
    with pytest.raises(LCCoError, match="was trained on other pictures"):
        runs.open_run(run.path).evaluate(str(test), "ufo", 3)
    shutil.rmtree(mine)  # gone: what was compared before is known
    again = runs.open_run(run.path)
    assert again.evaluate(str(other), "ufo", 3) == clean
    with pytest.raises(LCCoError, match="was trained on 1 of the"):
        again.evaluate(str(test), "ufo", 3)
    with pytest.raises(LCCoError, match="its training set .* is not found from here; .* it cannot be told whether"):
        again.evaluate(str(drawn.folders(tmp_path, ["dog"], 3, name="new", first=70)), "ufo", 3)


def test_two_processes_train_one_model_together(tmp_path):
    """As `accelerate launch` does it: one lock, one record, one set of weights; the groups of a step are shared out."""
    here = {**os.environ, "LCCO_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    words = ["-m", "lcco", "train", "--profile", "smoke", "--set", "train.steps=3", "--set", "loss.lambda_c=0"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    for _ in range(2):  # trained, then found
        done = subprocess.run(launch, env=here, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (tmp_path / "runs").glob("*-*/")
    record = json.loads((run / "record.json").read_text())
    assert record["processes"] == 2 and record["training"]["step"] == 3
    assert [json.loads(n)["step"] for n in (run / "metrics.jsonl").read_text().splitlines()][-1] == 3


def test_a_run_without_its_weights_still_tells_its_scores(base, tmp_path):
    run = runs.get_run(base)
    once = run.evaluate(base.data.train[0], "ufo", 3, allow_overlap=True)
    for file in run.path.glob("*.safetensors"):
        file.unlink()
    again = runs.open_run(run.path)
    assert again.evaluate(base.data.train[0], "ufo", 3, allow_overlap=True) == once
    with pytest.raises(LCCoError, match="came without its weights"):
        again.evaluate(base.data.train[0], "native", 3, allow_overlap=True)


def test_the_memo_of_truths_holds_one_object_a_set(base):
    inputs, name = Inputs(base), base.data.train[0]
    first, second = load_data(name), load_data(name)
    known = inputs.truth(first, 0, ("car",))
    assert inputs.truth(second, 0, ("car",)) is known
    gone = weakref.ref(second)
    del second
    gc.collect()
    assert gone() is None


def test_a_second_stage_stands_on_the_backbone_of_a_run_and_its_release_brings_it_along(base, tmp_path):
    other = drawn.folders(tmp_path, ["cow", "dog"], 3, name="other", first=50)
    first = runs.get_run(base.replace({"model.weights": "package", "model.frozen_stages": 2}))
    start = first.predictor().model.backbone.state_dict()
    second = runs.get_run(base.replace({"model.weights": f"run:{first.path.name}"}))
    own = second.predictor()
    assert same(own.model.backbone.state_dict(), start)
    assert not same(start, Inputs(base.replace({"model.weights": "package"})).backbone.state_dict())
    assert not any(k.startswith("backbone.") for k in weights(second.path))  # frozen: the first run's file holds it
    # and, if asked, on all of it: what it starts from, and its first step, are the run's
    on = second.experiment.replace({"train.start": f"run:{first.path.name}", "train.steps": 1, "train.lr": 0.0})
    assert on.hash != second.experiment.replace({"train.steps": 1, "train.lr": 0.0}).hash
    trained = dict(own.model.named_parameters())
    heads = {k: v for k, v in weights(first.path, "best.safetensors").items() if k in trained and "backbone" not in k}
    got = weights(runs.get_run(on).path)
    assert heads and all(torch.allclose(got[k], v) for k, v in heads.items())
    with pytest.raises(LCCoError, match="not a model of these settings"):
        runs.get_run(on.replace({"model.width": 8}))
    again = Inputs(base.replace({"model.weights": f"run:{second.path.name}"}))  # what it has from its own start
    assert same(again.backbone.state_dict(), start)
    out = tmp_path / "two.safetensors"
    assert f"as\n`run:{first.path.name}` had it" in runs.release(second, out, [str(other)]).read_text()
    data = load_data(str(other))
    items = list(data.groups["cow"])[:3]
    ours = own(data, items, "cow")
    shutil.rmtree(first.path)
    assert np.abs(load_model(out)(data, items, "cow") - ours).max() < 0.02
    third = base.replace({"model.weights": str(out)})  # a released model is a start as well
    half = Inputs(third).backbone.state_dict()
    assert half.keys() == start.keys() and all(torch.allclose(half[k], v, atol=2e-3) for k, v in start.items())
    with pytest.raises(LCCoError, match="holds no trained model; train that run first"):
        Inputs(second.experiment)
    with pytest.raises(LCCoError, match="the backbone glyphnet, not resnet18"):
        Inputs(third.replace({"model.backbone": "resnet18"}))
    random = runs.get_run(base)
    with pytest.raises(LCCoError, match="random and is not in it"):
        Inputs(base.replace({"model.weights": f"run:{random.path.name}"}))


def test_what_a_start_was_trained_on_counts_as_trained_on(base, tmp_path, capsys):
    first = runs.get_run(base.replace({"model.weights": "package", "model.frozen_stages": 2}))
    mine = str(drawn.folders(tmp_path, ["cow", "dog"], 3, name="mine", first=50))
    for changes in ({"model.weights": f"run:{first.path.name}"}, {"train.start": f"run:{first.path.name}"}):
        run = runs.get_run(base.replace({"data.train": [mine], "data.holdout": [], **changes}))
        assert run.record["trained_on"] == [mine, *base.data.train] == read_about(run.weights)["trained_on"]
        with pytest.raises(LCCoError, match="was trained on 12 of the 12 pictures"):
            run.evaluate(base.data.train[0], "ufo", 3)
    out = tmp_path / "mine.safetensors"
    with pytest.raises(LCCoError, match="12 of its 12"):
        runs.release(run, out, [base.data.train[0]])
    next_one = base.replace({"data.train": ["elsewhere"], "train.start": str(out)})
    assert trained_on(next_one) == ["elsewhere", mine, *base.data.train]
    shutil.rmtree(base.data.train[0])  # on another machine it cannot be looked at, and says so
    other = load_data(str(drawn.folders(tmp_path, ["cow"], 3, name="other", first=90)))
    assert runs.open_run(run.path).overlap(other) == 0
    assert "which is not here; pictures of it cannot be told" in capsys.readouterr().err


def test_a_start_with_other_words_is_refused(base, tmp_path):
    first = runs.get_run(base)
    (tmp_path / "others.txt").write_text("boat\ncar\ndog\ncow\n")
    changes = {"tower.vocabulary": str(tmp_path / "others.txt"), "train.start": f"run:{first.path.name}"}
    with pytest.raises(LCCoError, match="trained with another vocabulary"):
        runs.get_run(base.replace(changes))


def test_a_run_on_a_folder_that_was_added_to_is_not_taken_for_a_new_one(base):
    run = runs.get_run(base)
    assert runs.get_run(base).path == run.path
    picture = next(p for p in sorted((Path(base.data.train[0]) / "image").rglob("*")) if p.is_file())
    picture.unlink()
    with pytest.raises(LCCoError, match=r"trained on other pictures \(12\) than .* holds now \(11\).*--set name"):
        runs.get_run(base)
    shutil.rmtree(base.data.train[0])
    assert runs.get_run(base).path == run.path  # gone: it still tells its scores


def test_edited_masks_are_noticed_by_scores_caches_and_trainings(base, tmp_path):
    run = runs.get_run(base)
    other = drawn.folders(tmp_path, ["cow"], 3, name="other", first=90)
    before = run.evaluate(str(other), "native", 3)["native"]
    assert run.evaluate(str(other), "native", 3)["native"] == before
    for file in (other / "groundtruth").rglob("*.png"):
        ImageOps.invert(Image.open(file).convert("L")).save(file)
    edited = load_data(str(other))
    after = run.evaluate(str(other), "native", 3)["native"]
    assert after.digest == before.digest and after.rows != before.rows
    (again,) = evaluate_all(run.predictor(), edited, ["native"], 3).values()
    assert after.rows == again.rows

    mine = load_data(base.data.train[0])
    file = mine.truth_path(0)
    inputs = runs.shared_inputs(base)
    inputs.prepare(mine, truth=True)
    pair = (0, tuple(mine.classes_of(0)))
    seen, true = inputs.truth(mine, *pair), inputs._masked[(mine.identity(), *pair)]
    train(base, tmp_path / "half", inputs=inputs, stop_at=3)
    ImageOps.invert(Image.open(file).convert("L")).save(file)
    with pytest.raises(LCCoError, match="checkpoint.pt: .* was edited since; remove it"):
        train(base, tmp_path / "half", inputs=inputs)
    mine = load_data(base.data.train[0])
    inputs.prepare(mine, truth=True)
    np.testing.assert_array_equal(inputs.truth(mine, *pair), 1 - seen)
    assert not torch.equal(inputs._masked[(mine.identity(), *pair)], true)
    with pytest.raises(LCCoError, match="masks of .* were edited since it was trained; remove it"):
        runs.get_run(base)


def test_bad_trainings_say_what_to_mend(base, tmp_path):
    with pytest.raises(LCCoError, match="data.crop` needs a live backbone"):
        train(base.replace({"data.crop": 0.7}), tmp_path / "a")
    train(base, tmp_path / "b", stop_at=3)
    checkpoint = tmp_path / "b" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(LCCoError, match=r"checkpoint.pt: damaged .* remove it"):
        train(base, tmp_path / "b")
    train(base, tmp_path / "c", stop_at=3)
    with pytest.raises(LCCoError, match="from other settings"):
        train(base.replace({"model.width": 32}), tmp_path / "c")


def test_evaluation_is_kept_and_overlap_is_refused(base, tmp_path):
    run = runs.get_run(base)
    with pytest.raises(LCCoError, match="trained on 12 of the 12 pictures"):
        run.evaluate(base.data.train[0])
    once = run.evaluate(base.data.train[0], ("ufo", "native"), 3, allow_overlap=True)
    files = sorted((run.path / "evaluations").glob("*-ufo-*.json"))
    stamp = files[0].stat().st_mtime_ns
    again = run.evaluate(base.data.train[0], "ufo", 3, allow_overlap=True)
    assert again["ufo"] == once["ufo"] and files[0].stat().st_mtime_ns == stamp
    assert run.evaluate(base.data.train[0], "ufo", 2, allow_overlap=True)["ufo"].group_size == 2


def test_estimate_is_of_the_right_order_and_writes_no_run(base):
    found = runs.estimate(base)
    assert found["images"] == 12 and found["steps"] == 6 and not found["trained before"]
    inputs = Inputs(base)
    trained = [p.numel() for n, p in build_model(base, inputs).named_parameters() if not n.startswith("backbone.")]
    assert found["trained parameters"] == sum(trained)
    assert not runs.run_path(base).exists() and 0 < found["training seconds"] < 60


def test_moving_average_of_weights_by_hand(base, tmp_path):
    """The saved average after 3 steps against one kept by hand beside a run without it."""
    experiment = base.replace({"train.steps": 3, "train.eval_every": 100, "train.ema": 0.5, "data.holdout": []})

    def inputs():
        return Inputs(experiment)

    train(experiment, tmp_path / "ema", inputs=inputs())
    key = "head.1.weight"
    expected = dict(trained_state(build_model(experiment, inputs())))[key].clone()
    for n in (1, 2, 3):  # the plain run's weights after n steps; the schedule does not depend on where it stops
        folder = tmp_path / f"plain{n}"
        train(experiment, folder, inputs=inputs(), stop_at=n)
        if n < 3:
            now = torch.load(folder / "checkpoint.pt", weights_only=True)["model"][key]
        else:
            train(experiment.replace({"train.ema": 0.0}), tmp_path / "none", inputs=inputs())
            now = weights(tmp_path / "none")[key]
        decay = min(0.5, n / (9 + n))
        expected = decay * expected + (1 - decay) * now
    torch.testing.assert_close(weights(tmp_path / "ema")[key], expected)
    shutil.rmtree(tmp_path / "ema")


def test_tower_is_untouched_by_training(base, tmp_path):
    inputs = Inputs(base)
    assert isinstance(inputs.tower, OpenClipTower)
    before = inputs.tower.encode_prompts(["a photo of a cow."]).clone()
    train(base, tmp_path, inputs=inputs)
    assert torch.equal(before, inputs.tower.encode_prompts(["a photo of a cow."]))


def test_a_released_model_is_half_as_large_and_its_card_says_what_it_scored(base, tmp_path):
    run = runs.get_run(base)
    other = drawn.folders(tmp_path, ["cow", "dog"], 3, name="other", first=50)
    out = tmp_path / "small.safetensors"
    card = runs.release(run, out, [str(other)], run).read_text()
    assert out.stat().st_size < 0.6 * run.weights.stat().st_size + 4000
    stored = [v for v in read_tensors(out).values() if v.is_floating_point()]  # a variance may exceed half precision
    assert all(v.dtype == (torch.float16 if v.ndim > 1 else torch.float32) for v in stored)
    data = load_data(str(other))
    items = list(data.groups["cow"])[:3]
    ours, theirs = load_model(out)(data, items, "cow"), run.predictor()(data, items, "cow")
    assert np.abs(ours - theirs).max() < 0.02
    scored = evaluate_all(load_model(out), data, ["ufo", "native"])
    for protocol, found in scored.items():
        assert f"| other (6) | {protocol} | {100 * found.summary['P']:.1f} | {100 * found.summary['J']:.1f} |" in card
    assert file_digest(out, 64) in card and run.path.name in card and f"Step {read_about(out)['step']} was kept" in card
    with pytest.raises(LCCoError, match="12"):  # never scored on what it was trained on
        runs.release(run, out, [base.data.train[0]])


@pytest.mark.parametrize("how", ["best", "last", "nothing held out"])
def test_a_card_says_which_step_was_kept_and_why(base, tmp_path, how):
    held = base.data.holdout[0]
    changes = {"best": {}, "last": {"train.checkpoint": "last"}, "nothing held out": {"data.holdout": []}}[how]
    run = runs.get_run(base.replace({"train.steps": 2, "train.eval_every": 1, "train.lr": 0.0, **changes}))
    other = drawn.folders(tmp_path, ["cow", "dog"], 3, name="other", first=50)
    card = runs.release(run, tmp_path / "small.safetensors", [str(other)]).read_text()
    said = {
        "best": f"Step 1 was kept, the best on\n`{held}`. All settings",
        "last": f"The last step, 2, was kept:\n`{held}` was held out, but chose none. All settings",
        "nothing held out": "The last step, 2, was kept:\nnothing was held out to choose one. All settings",
    }
    assert [text in card for text in said.values()] == [name == how for name in said]
    assert ("the step was chosen" in card) == (how == "best") and "cannot pass 50." in card
    assert "\n\n| test set (images) |" in card  # a table needs the line above it
