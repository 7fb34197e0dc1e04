"""The run store: trained once, found again, honest about what made it and what it has seen."""

import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import drawn
import pytest
import tiny
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from lcco import config
from lcco.common import LCCoError, Missing, file_digest, place
from lcco.config import TRAINING_VERSION, Experiment, load_profile
from lcco.data import load_data
from lcco.experiment import predictor, runs, train
from lcco.experiment.evaluate import evaluate_all
from lcco.experiment.features import deterministic
from lcco.experiment.runs import environment, estimate, find_run, get_run, open_run
from lcco.store import lock, read_json


@pytest.fixture
def base(tmp_path) -> Experiment:
    return tiny.experiment(tmp_path, **{"train.steps": 2, "train.eval_every": 1})


def home(data) -> str:
    """The folder of a drawn set."""
    return str(data.files[0][0].parents[2])


@pytest.fixture
def other(tmp_path):
    """A set of pictures that nothing is trained on."""
    return load_data(str(drawn.folders(tmp_path, ["cow", "dog"], 3, name="other", first=500)))


def invert(file: Path) -> None:
    ImageOps.invert(Image.open(file).convert("L")).save(file)


# --------------------------------------------------------------------------- trained once
def test_a_run_is_trained_once_and_its_record_says_what_made_it(base):
    assert find_run(base) is None
    path = place("runs") / base.run_name
    train.Trainer(base, path).fit(stop_at=1)  # as if interrupted
    run = get_run(base)
    stamp = (path / "last.safetensors").stat().st_mtime_ns
    assert get_run(base).record == run.record == find_run(base).record
    assert (path / "last.safetensors").stat().st_mtime_ns == stamp
    assert not (path / "checkpoint.pt").exists()
    record, data = run.record, load_data(base.data.train)
    assert Experiment(**record["experiment"]) == base
    assert record["training_version"] == TRAINING_VERSION and "words" not in record
    here = record["environment"]
    assert {"commit", "dirty", "device", "threads", "python", "cores"} <= here.keys()
    assert torch.__version__.startswith(here["versions"]["torch"])
    assert record["data"]["digest"] == data.digest() and record["data"]["images"] == 12
    assert record["data"]["masks"] == record["holdout"]["masks"] == data.truth_digest()
    assert record["weights_sha256"] == file_digest(run.weights, 64)
    assert run.weights.name == "best.safetensors"
    assert record["training"]["step"] == 2 and here["threads"] == 1
    assert record["seconds"] > 0 and record["processes"] == 1
    predictor = run.predictor()
    assert record["tower"] == predictor.features.tower.identity
    assert record["vocabulary_hash"] == predictor.vocabulary.hash
    assert list(run.log()["step"]) == [1, 2] and "holdout_J" in run.log()
    last = get_run(base.replace({"data.holdout": []}))
    assert last.weights.name == "last.safetensors" and last.record["holdout"] is None
    (path / "record.json").write_text("{")
    with pytest.raises(LCCoError, match="record.json: damaged; delete it"):
        get_run(base)
    for text in ("{}", "[]"):  # another program's
        (path / "record.json").write_text(text)
        with pytest.raises(LCCoError, match="record.json: not the record of a finished run"):
            open_run(path)
    state = load_file(run.weights)
    for text in ("{}", "[]"):
        save_file(state, path / "strange.safetensors", {"lcco": text})
        with pytest.raises(LCCoError, match="strange.safetensors: not a model of lcco"):
            open_run(path / "strange.safetensors")


def test_a_training_on_several_machines_names_them_and_adds_up_its_seconds(base, monkeypatch):
    real, here = runs.Trainer.fit, environment()
    monkeypatch.setattr(train, "environment", lambda: here | {"device": "gpu a"})

    def stopped(self):
        real(self, stop_at=1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Trainer, "fit", stopped)
        get_run(base)
    checkpoint = place("runs") / base.run_name / "checkpoint.pt"
    saved = torch.load(checkpoint, weights_only=True)
    saved["state"]["seconds"] += 1000  # as if it had been long
    torch.save(saved, checkpoint)
    monkeypatch.setattr(train, "environment", lambda: here | {"device": "gpu b"})
    record = get_run(base).record
    assert [e["device"] for e in record["begun_on"]] == ["gpu a"]
    assert record["environment"]["device"] == "gpu b"
    assert 1000 < record["seconds"] < 1200


def test_a_copy_without_git_is_unknown_not_clean(monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    alone = tmp_path / "alone"
    (alone / "lcco").mkdir(parents=True)
    (alone / "lcco" / "common.py").write_text("")
    assert [environment(alone)[k] for k in ("commit", "dirty")] == [None, None]
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(alone)]
    subprocess.run([*git, "init", "-q"], check=True)
    # the code stands in a repository that does not hold it, such as a user's own project
    assert [environment(alone)[k] for k in ("commit", "dirty")] == [None, None]
    subprocess.run([*git, "add", "lcco"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    made = environment(alone)
    assert len(made["commit"]) == 40 and made["dirty"] is False
    (alone / "lcco" / "common.py").write_text("edited")
    assert environment(alone) == made | {"dirty": True}


def test_who_asks_for_a_run_in_training_waits_for_it(base, monkeypatch, capsys):
    path, made = place("runs") / base.run_name, get_run(base)
    path.rename(path.with_name("elsewhere"))
    monkeypatch.setattr(runs.Trainer, "fit", lambda self: pytest.fail("trained twice"))
    with ThreadPoolExecutor(1) as other, lock(path.with_name(f"{path.name}.lock")):
        asked = other.submit(get_run, base)
        while "waiting for another that trains tiny-" not in capsys.readouterr().err:
            assert not asked.done()
            time.sleep(0.01)
        path.with_name("elsewhere").rename(path)  # as the process that trained it would end
    assert asked.result().record == made.record


TOGETHER = """
import sys
from pathlib import Path
from lcco.config import Experiment
from lcco.experiment.runs import get_run
get_run(Experiment.model_validate_json(Path(sys.argv[1]).read_text()))
"""


def test_two_processes_train_one_model_together(base, tmp_path):
    """As `accelerate launch` does it: each takes its share of a step's groups.

    The curve is that of one process which takes all groups, but for the batch norms, whose
    statistics are of a process's own share, and L_c, whose mean is over the groups told to it.
    """
    base = base.replace({"train.steps": 6})
    (tmp_path / "e.json").write_text(base.model_dump_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        here = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    here |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    here["PYTHONPATH"] = str(Path(__file__).parents[1])
    words = [sys.executable, "-c", TOGETHER, str(tmp_path / "e.json")]
    asked = [
        subprocess.Popen(words, env=here | {"RANK": n, "LOCAL_RANK": n}, stderr=subprocess.PIPE)
        for n in "01"
    ]
    for process in asked:
        said = process.communicate(timeout=280)[1]
        assert process.returncode == 0, said[-3000:].decode()
    run = find_run(base)
    assert run.record["processes"] == 2 and run.record["training"]["step"] == 6
    assert list(run.log()["step"]) == [*range(1, 7)]
    alone, shares = base.replace({"data.groups": 2 * base.data.groups}), []
    for n in (0, 1):  # the first step, before the processes' batch norms part
        whole = train.Trainer(alone, tmp_path / "share")
        b = whole.batch(0)
        share = {k: b[k][n::2] for k in ("embeddings", "truth", "true")}
        share |= {"images": None, "given": None, "maps": [m[n::2] for m in b["maps"]]}
        with deterministic(whole.features):
            shares.append(float(whole.step(share)["loss"]))
    assert run.log()["loss"][0] == pytest.approx(sum(shares) / 2, abs=1e-5)
    whole = train.Trainer(alone, tmp_path / "whole")
    whole.fit()
    curve = [line["loss"] for line in whole.log]
    assert list(run.log()["loss"]) == pytest.approx(curve, rel=0.01)
    assert abs(curve[0] - curve[-1]) > 0.03 * curve[0]  # it moves by more than the tolerance


def test_runs_of_older_code_are_not_taken_for_new_ones(base, monkeypatch, capsys):
    old = get_run(base)
    with monkeypatch.context() as patch:
        for module in (config, predictor, runs):
            patch.setattr(module, "TRAINING_VERSION", TRAINING_VERSION + 1)
        assert find_run(base) is None
        assert open_run("tiny").path == old.path
        assert "trained by an older version of the code" in capsys.readouterr().err
        new = get_run(base)
        assert new.path != old.path
        with pytest.raises(LCCoError, match="several runs are called `tiny`"):
            open_run("tiny")
        assert open_run(new.path.name).path == new.path
    assert "older version" not in capsys.readouterr().err


def test_an_unwritable_store_is_one_line(base, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for name in ("LCCO_RUNS", "LCCO_CACHE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(tmp_path / "file" / "store"))
            with pytest.raises(LCCoError, match=rf"cannot be written to .*set {name}") as error:
                get_run(base)
            assert "\n" not in str(error.value)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 200 KB, and what makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder, lambda: subprocess.run([*mount[:4], "remount,size=99m", *mount[5:]], check=True)
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_loses_nothing(base, small_disk, tmp_path, monkeypatch):
    whole = get_run(base)
    disk, enlarge = small_disk
    monkeypatch.setenv("LCCO_RUNS", str(disk / "runs"))
    with pytest.raises(LCCoError, match="No space left on device.*set LCCO_RUNS to another") as e:
        get_run(base)
    assert "\n" not in str(e.value) and find_run(base) is None
    assert not list(disk.rglob("*.safetensors")) and not list(disk.rglob(".part-*"))
    enlarge()
    assert get_run(base).weights.read_bytes() == whole.weights.read_bytes()


# --------------------------------------------------------------------------- scores
def test_scores_are_kept_and_say_who_scored_what(base, other, monkeypatch):
    run = get_run(base)
    once = run.evaluate(other, ("ufo", "native"), 3)
    (direct,) = evaluate_all(run.predictor(), other, ["native"], 3).values()
    assert once["native"] == direct
    files = sorted((run.path / "evaluations").glob("other-ufo-3-*.json"))
    stored, stamp = read_json(files[0]), files[0].stat().st_mtime_ns
    assert stored["scored_by"]["commit"] == environment()["commit"]
    assert stored["scored_on"]["masks"] == other.truth_digest()
    assert run.evaluate(other, "ufo", 3)["ufo"] == once["ufo"]
    assert files[0].stat().st_mtime_ns == stamp
    assert run.evaluate(other, "ufo", 2)["ufo"].group_size == 2
    told = run.predictor(gt=True, k=1)
    dog = told.vocabulary.words.index("dog")
    assert told.output(other, ([0, 1], "dog")).distilled.tolist() == [[dog]]
    asked, real = [], run.predictor
    monkeypatch.setattr(run, "predictor", lambda *how: asked.append(how) or real(*how))
    run.evaluate(other, "ufo", 3, k=1)
    run.evaluate(other, "ufo", 3, gt=True)
    assert asked == [(False, 1), (True, None)]
    assert len(list((run.path / "evaluations").glob("other-ufo-3-*.json"))) == 3
    for file in Path(home(other)).glob("groundtruth/*/*"):  # edited masks are scored anew
        invert(file)
    edited = load_data(home(other))
    assert run.evaluate(edited, "native", 3)["native"].rows != once["native"].rows


def test_a_run_without_its_weights_still_tells_its_scores(base, other):
    run = get_run(base)
    once = run.evaluate(other, "ufo", 3)
    for file in run.path.glob("*.safetensors"):
        file.unlink()
    again = open_run(run.path)
    assert again.evaluate(other, "ufo", 3) == once
    with pytest.raises(Missing, match="weights `best.safetensors` not found: there is no file"):
        again.evaluate(other, "native", 3)


# --------------------------------------------------------------------------- what it has seen
def test_pictures_of_training_are_refused(base, tmp_path, other):
    run, mine = get_run(base), load_data(base.data.train)
    with pytest.raises(LCCoError, match="was trained on 12 of the 12 pictures of set"):
        run.evaluate(mine, "ufo", 3)
    assert run.evaluate(mine, "ufo", 3, allow_overlap=True)["ufo"].summary["images"] == 12
    assert run.overlap(other) == 0
    shutil.copy(mine.files[0][0], other.files[0][0])  # by content, whatever its name
    changed = load_data(home(other))
    with pytest.raises(LCCoError, match="was trained on 1 of the 6"):
        run.evaluate(changed, "ufo", 3)
    shutil.rmtree(base.data.train[0])  # gone: what was compared before is known
    again = open_run(run.path)
    assert again.evaluate(other, "ufo", 3)["ufo"].summary["images"] == 6
    with pytest.raises(LCCoError, match="was trained on 1 of the 6"):
        again.evaluate(changed, "ufo", 3)
    new = load_data(str(drawn.folders(tmp_path, ["dog"], 3, name="new", first=70)))
    with pytest.raises(LCCoError, match="whether tiny-.* has seen new is unknown: data `"):
        again.evaluate(new, "ufo", 3)


def test_pictures_that_chose_the_weights_are_counted(base, tmp_path, other):
    """They are no pictures of training, so a score is given; its row gets a note."""
    run = get_run(base.replace({"data.holdout": [home(other)]}))
    assert (run.overlap(other), run.overlap(other, "holdout")) == (0, 6)
    assert run.evaluate(other, "ufo", 3)["ufo"].summary["images"] == 6
    more = load_data(str(drawn.folders(tmp_path, ["cow"], 2, name="more", first=900)))
    assert run.overlap(more, "holdout") == 0
    shutil.copy(other.files[0][0], more.files[0][0])
    assert run.overlap(load_data(home(more)), "holdout") == 1


def test_test_pictures_are_left_out_of_training_and_holdout(base, tmp_path):
    mine = load_data(base.data.train)
    test = drawn.folders(tmp_path, ["cow"], 2, name="test", first=700)
    shutil.copy(mine.files[0][0], next((test / "image" / "cow").iterdir()))
    e = base.replace({"data.without": [str(test)]})
    data, holdout = runs.training_data(e)
    assert len(data) == len(holdout) == len(mine) - 1 and mine.keys[0] not in data.keys
    run = get_run(e)
    test = load_data(str(test))
    assert run.overlap(test) == run.overlap(test, "holdout") == 0
    assert run.record["data"]["images"] == 11


def test_what_a_start_was_trained_on_counts(base, tmp_path, capsys):
    first = get_run(base)
    mine = str(drawn.folders(tmp_path, ["cow", "dog"], 3, name="mine", first=50))
    changes = {"data.train": mine, "data.holdout": [], "train.start": str(first.weights)}
    run = get_run(base.replace(changes))
    with pytest.raises(LCCoError, match="was trained on 12 of the 12"):
        run.evaluate(load_data(base.data.train), "ufo", 3)
    assert run.overlap(load_data(base.data.train), "holdout") == 12
    shutil.rmtree(base.data.train[0])  # on another machine it cannot be looked at, and says so
    new = load_data(str(drawn.folders(tmp_path, ["cow"], 3, name="new", first=90)))
    assert open_run(run.path).overlap(new) == 0
    assert "has seen new is unknown: data `" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["masks", "pictures"])
def test_a_training_set_that_was_edited_since_is_noticed(base, other, what):
    run, mine = get_run(base), load_data(base.data.train)
    if what == "masks":
        invert(mine.files[0][1])
    else:
        mine.files[0][0].unlink()
        mine.files[0][1].unlink()
    said = "pictures or masks of set were edited since it was trained; put them back"
    with pytest.raises(LCCoError, match=said):
        get_run(base)
    with pytest.raises(LCCoError, match=said):
        open_run(run.path).evaluate(other, "ufo", 3)
    assert get_run(base.replace(name="anew")).path != run.path


# --------------------------------------------------------------------------- finding
def test_runs_are_opened_by_folder_name_and_file(base, other, tmp_path):
    with pytest.raises(LCCoError, match="no run, folder or model file is called `tiny`.*none"):
        open_run("tiny")
    run = get_run(base)
    assert open_run(run.path).record == open_run("tiny").record == run.record
    get_run(base.replace(seed=1))
    with pytest.raises(LCCoError, match="several runs are called `tiny`; .*: tiny-.*, tiny-"):
        open_run("tiny")
    begun = place("runs") / base.replace(seed=2).run_name
    train.Trainer(base.replace(seed=2), begun).fit(stop_at=1)
    with pytest.raises(LCCoError, match="holds no finished run"):
        open_run(begun)
    file = tmp_path / "mine.safetensors"
    shutil.copy(run.weights, file)
    moved = open_run(file)
    assert moved.evaluate(other, "ufo", 3) == run.evaluate(other, "ufo", 3)
    assert moved.path.parent == place("runs") and moved.path.name.startswith("mine-")
    assert moved.overlap(load_data(base.data.train)) == 12


def test_the_shipped_model_is_a_run_and_is_scored(other, capsys):
    run = open_run("shipped")
    assert run.experiment.name == "shipped" and run.record["trained_on"][0]["train"]
    assert run.evaluate(other, "ufo", 3, allow_overlap=True)["ufo"].summary["images"] == len(other)
    if "LCCO_DATA" not in os.environ:  # what it was trained on is not here, which is said
        assert run.overlap(other) == 0
        assert "has seen other is unknown: data `" in capsys.readouterr().err


# --------------------------------------------------------------------------- before training
def test_an_estimate_is_of_the_right_order_and_keeps_nothing(base):
    rare = base.replace({"data.given": 0.5, "data.absent": 0.1})  # what a few pictures cannot give
    assert estimate(rare)["steps"] == 2
    found = estimate(base)
    assert (found["images"], found["steps"], found["images a step"]) == (12, 2, 6)
    model = train.Trainer(base, Path("unused")).model
    learned = [p.numel() for n, p in model.named_parameters() if not n.startswith("backbone.")]
    assert found["trained parameters"] == sum(learned)
    assert 0 < found["training seconds"] < 60
    assert not list(place("runs").glob("*"))


def test_absent_test_sets_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("LCCO_DATA", str(tmp_path))
    profile = load_profile("smoke")
    found = runs.load_tests(profile, [*profile.tests, "msrc7"])
    assert isinstance(found.pop("msrc7"), Missing)
    assert len(found[profile.tests[0]]) == 12 * profile.counts[profile.tests[0]]


def test_weights_of_a_training_on_its_own_holdout_are_doubted_aloud(base, capsys):
    get_run(base)
    assert "as `data.train` does: weights are chosen on pictures" in capsys.readouterr().err
