"""The command line: what people type works, and every mistake is one line on stderr, exit 2, no stack trace."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

import lcco
from lcco import cli, runs
from lcco.common import LCCoError, file_lock, write_text
from lcco.common import place as where
from lcco.config import profile_names
from tests import drawn

MSRC7 = ("bird", "car", "cat", "cow", "dog", "plane", "sheep")
TOWER = {
    "model_config": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "context_length": 16,
}  # fmt: skip
PROFILE = """
about: Sets that the test drew, parts with random weights.
experiment:
  name: drawn
  data: {{train: [voc_train], holdout: [voc_val], size: 32, groups: 1, group_size: 2}}
  tower: {{model: "{tower}", weights: null, vocabulary: voc20}}
  model: {{backbone: resnet18, weights: null, frozen_stages: 4, width: 8, heads: 2}}
  train: {{steps: 2, eval_every: 2}}
tests: [msrc7, internet300]
seeds: [0]
group_size: 2
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with drawn VOC and MSRC sets (LCCO_DATA) and a tiny profile, `drawn.yaml`."""
    drawn.voc(tmp_path)
    drawn.folders(tmp_path, MSRC7, n=2, name="MSRC", first=5000)
    (tmp_path / "tower.json").write_text(json.dumps(TOWER))
    (tmp_path / "drawn.yaml").write_text(PROFILE.format(tower=tmp_path / "tower.json"))
    monkeypatch.setenv("LCCO_DATA", str(tmp_path))
    return tmp_path


def says(capsys: pytest.CaptureFixture, *words: str) -> str:
    """The one line that a mistaken command prints on stderr."""
    capsys.readouterr()
    assert cli.main(words) == 2
    out = capsys.readouterr()
    assert out.err.startswith("lcco: ") and out.err.count("\n") == 1 and "Traceback" not in out.err, out.err
    return out.err


def test_trains_evaluates_and_refuses_pictures_it_was_trained_on(place: Path, capsys: pytest.CaptureFixture):
    profile = str(place / "drawn.yaml")
    assert cli.main(["train", "--profile", profile, "--set", "model.k=3", "--set", "seed=7"]) == 0
    run = Path(capsys.readouterr().out.split()[0])
    config = json.loads((run / "config.json").read_text())
    assert (config["model"]["k"], config["seed"], config["name"]) == (3, 7, "drawn")
    assert cli.main(["evaluate", run.name, "--data", "msrc7", "--protocol", "ufo,native", "--group-size", "2"]) == 0
    printed = capsys.readouterr()
    assert "msrc7: 0 of 14 pictures are in the training data" in printed.err
    lines = [line for line in printed.out.splitlines() if line.startswith("|")]
    heads = [h.strip() for h in lines[0].strip("|").split("|")]
    rows = [dict(zip(heads, (c.strip() for c in line.strip("|").split("|")), strict=True)) for line in lines[2:]]
    assert [r["protocol"] for r in rows] == ["ufo", "native"] and {r["images"] for r in rows} == {"14"}
    assert all(0 <= float(r["J"]) <= 100 for r in rows)
    assert "voc_train" in says(capsys, "evaluate", run.name, "--data", "voc_train")
    assert cli.main(["evaluate", str(run), "--data", "voc_train", "--allow-overlap"]) == 0
    said = re.search(r"voc_train: (\d+) of (\d+) pictures are in the training data", capsys.readouterr().err)
    seen, of = said.groups()
    assert seen == of != "0"
    record = json.loads((run / "record.json").read_text())  # as `--close` leaves one
    del record["seconds"]
    (run / "record.json").write_text(json.dumps(record | {"note": "stopped after step 1"}))
    assert cli.main(["train", "--profile", profile, "--set", "model.k=3", "--set", "seed=7"]) == 0
    assert "stopped after step 1" in capsys.readouterr().out


def test_dry_run_says_size_and_time_and_trains_nothing(place: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["train", "--profile", str(place / "drawn.yaml"), "--dry-run"]) == 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert (said["steps"], said["images"], said["images a step"]) == ("2", "12", "2")
    assert not list(where("runs").glob("*/record.json"))


def test_bench_sets_lcco_beside_its_baseline(place: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["bench", "--profile", str(place / "drawn.yaml")]) == 0
    out = capsys.readouterr().out
    assert "LCCo" in out and "Baseline" in out
    line = next(line for line in out.splitlines() if "trained parameters" in line)
    full, base = (int(word) for word in line.replace("|", " ").split() if word.isdigit())
    assert full > base > 0


def test_data_check_passes_a_good_folder_and_fails_a_bad_one(place: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["data", "check", str(place / "MSRC")]) == 0
    (place / "MSRC" / "groundtruth" / "cow" / "co_00.png").unlink()
    assert cli.main(["data", "check", str(place / "MSRC")]) == 1
    assert "co_00" in capsys.readouterr().out
    assert "no such folder" in says(capsys, "data", "check", str(place / "none"))


def test_mistakes_are_one_line_that_names_the_key_and_the_mend(place: Path, capsys: pytest.CaptureFixture):
    profile = ["--profile", str(place / "drawn.yaml")]
    assert "`model.k`" in says(capsys, "train", *profile, "--set", "model.kk=3")
    assert "`model.k` is 'five'; it must be int" in says(capsys, "train", *profile, "--set", "model.k=five")
    assert "name=value" in says(capsys, "train", *profile, "--set", "model.k")
    assert "there are: " in says(capsys, "train", "--profile", "embeded")
    assert "no run is called `nothing`" in says(capsys, "evaluate", "nothing", "--data", "msrc7")
    assert "no protocol `uvo`" in says(capsys, "evaluate", "nothing", "--data", "msrc7", "--protocol", "uvo")
    assert "--group-size 0" in says(capsys, "evaluate", "nothing", "--data", "msrc7", "--group-size", "0")
    (place / "bad.yaml").write_text("about: x\nexperiment: {data: {size: 32}, speed: 3}\n")
    assert "bad.yaml: unknown setting `experiment.speed`" in says(capsys, "train", "--profile", str(place / "bad.yaml"))
    (place / "bad.yaml").write_text("about: [x\n")
    assert "not valid YAML at line" in says(capsys, "train", "--profile", str(place / "bad.yaml"))


def test_missing_training_data_is_named_with_where_it_was_looked_for(place: Path, capsys: pytest.CaptureFixture):
    said = says(capsys, "train", "--profile", str(place / "drawn.yaml"), "--data-root", str(place / "elsewhere"))
    assert "data `voc_train` not found" in said and "elsewhere" in said and "--data-root" in said


def test_a_training_that_could_not_begin_leaves_nothing_that_looks_like_a_run(
    place: Path, capsys: pytest.CaptureFixture
):
    profile = ["train", "--profile", str(place / "drawn.yaml")]
    for words in (
        ["--data-root", str(place / "elsewhere")], ["--data-root", str(place), "--set", "data.holdout=nosuch"],
        ["--set", "train.start=nosuch"], ["--set", "tower.weights=nosuch"],
    ):  # fmt: skip
        assert ("elsewhere" if "elsewhere" in words[1] else "nosuch") in says(capsys, *profile, *words)
    for name in ("own.a", "own.b"):  # nor do runs whose names have a dot wait for one another
        says(capsys, *profile, "--set", "train.start=nosuch", "--set", f"name={name}")
        assert len(list(where("runs").glob(f"{name}-*.lock"))) == 1
    assert not [p for p in where("runs").glob("*") if p.is_dir()]


def test_a_run_is_found_beside_begun_ones_and_what_is_none_is_told(place: Path, capsys: pytest.CaptureFixture):
    def record(name: str) -> Path:
        (where("runs") / name).mkdir(parents=True)
        (where("runs") / name / "record.json").write_text('{"experiment": {}}')
        return where("runs") / name

    (where("runs") / "own-aaa").mkdir(parents=True)
    with pytest.raises(LCCoError, match="own-aaa: holds no finished run"):
        runs.open_run("own")
    done = record("own-bbb")
    assert runs.open_run("own").path == done
    record("own-bcc")
    with pytest.raises(LCCoError, match="several runs are called `own`: own-bbb, own-bcc; give more of the name"):
        runs.open_run("own")
    assert runs.open_run("own-bb").path == runs.open_run("own-bbb/").path == runs.open_run(done).path == done
    data = ["--data", "msrc7"]
    for name in (str(place / "none"), "none/none"):
        assert f"{name}: no such run folder" in says(capsys, "evaluate", name, *data)
    (place / "model.safetensors").write_bytes(b"x")
    assert "is a file, but a run is due" in says(capsys, "evaluate", str(place / "model.safetensors"), *data)
    assert "no run is called `[x`; there are: " in says(capsys, "evaluate", "[x", *data)
    (done / "record.json").write_text("[]")
    assert "record.json: damaged" in says(capsys, "evaluate", "own-bb", *data)


def test_a_dry_run_refuses_what_training_would(place: Path, capsys: pytest.CaptureFixture):
    profile = ["--profile", str(place / "drawn.yaml")]
    dry = ["train", "--dry-run", *profile]
    assert "data `nosuch`" in says(capsys, *dry, "--set", "data.holdout=nosuch")
    assert "nosuch: no such model file" in says(capsys, *dry, "--set", "train.start=nosuch")
    assert "`data.crop` needs a live backbone" in says(capsys, *dry, "--set", "data.crop=0.5")
    assert "`data.groups` is 0" in says(capsys, *dry, "--set", "data.groups=0")
    odd = ["--set", "model.heads=3", "--set", "model.width=9"]
    assert "`model.heads` is 3; it must divide the width of the tower's embeddings, which is 16" in says(
        capsys, *dry, *odd
    )
    assert "backbone's maps, which is 128" in says(capsys, *dry, *odd, "--set", "model.placement=encoder")
    assert cli.main(["train", *profile]) == 0
    run = capsys.readouterr().out.split()[0]
    start = ["--set", f"train.start={run}/last.safetensors", "--set", "name=next"]
    assert cli.main([*dry, *start]) == 0
    assert "trained with another vocabulary" in says(capsys, *dry, *start, "--set", "tower.vocabulary=coco80")
    assert "not a model of these settings" in says(capsys, *dry, *start, "--set", "model.width=16")
    assert not list(where("runs").glob("next*/"))


def test_places_that_cannot_be_written_to_are_told_with_their_variable(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (place / "file").touch()
    for name in ("LCCO_RUNS", "LCCO_CACHE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(place / "file" / "in"))
            said = says(capsys, "train", "--profile", str(place / "drawn.yaml"))
            assert str(place / "file" / "in") in said and f"set {name} to a folder" in said
    (where("runs") / "x.lock").mkdir(parents=True)
    told = pytest.raises(OSError, match=r"runs: cannot be written to \(Is a directory\); set LCCO_RUNS")
    with told, file_lock(where("runs") / "x.lock"):  # an OSError still, for what can do without a cache
        pass
    with pytest.raises(FileExistsError):  # not a place of lcco's: no variable would mend it
        write_text(place / "file" / "out.txt", "")
    monkeypatch.setenv("LCCO_CACHE", str(place / "file"))
    with pytest.raises(LCCoError, match=r"file: cannot be written to \(it is a file\); set LCCO_CACHE"):
        write_text(place / "file" / "out.txt", "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/x"), "lcco: /x: Permission denied\n"),
        (OSError(28, "No space left on device"), "lcco: No space left on device\n"),
        (OSError("two\nlines"), "lcco: two lines\n"), (OSError(), "lcco: OSError\n"),
    ],
)  # fmt: skip
def test_errors_of_the_system_are_one_line(error, said, monkeypatch, capsys: pytest.CaptureFixture):
    def fails(args):
        raise error

    monkeypatch.setattr(cli, "_train", fails)
    assert cli.main(["train"]) == 2 and capsys.readouterr().err == said
    error = BrokenPipeError()  # `lcco … | head`: not a mistake to be told of
    with pytest.raises(BrokenPipeError):
        cli.main(["train"])


def test_a_run_on_a_relative_folder_says_where_it_can_be_scored(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    drawn.folders(place / "here", ["cow", "car"], 3, name="good", first=50)
    monkeypatch.chdir(place / "here")
    changes = ["--set", "data.train=good", "--set", "data.holdout=good", "--set", "tower.vocabulary=voc20"]
    assert cli.main(["train", "--profile", str(place / "drawn.yaml"), *changes]) == 0
    out = capsys.readouterr()
    assert "`data.holdout` names good, as `data.train` does: the checkpoint is chosen on pictures" in out.err
    run = Path(out.out.split()[0]).name
    monkeypatch.chdir(place)
    said = says(capsys, "evaluate", run, "--data", "msrc7")
    assert f"{run}: its training set `good` is not found from here; run this where it was trained, or give" in said
    monkeypatch.setenv("LCCO_DATA", str(place / "here"))
    assert cli.main(["evaluate", run, "--data", str(place / "MSRC"), "--protocol", "ufo"]) == 0
    assert "MSRC: 0 of 14 pictures" in capsys.readouterr().err


def test_small_mistakes_are_told(place: Path, capsys: pytest.CaptureFixture):
    close = ["train", "--profile", str(place / "drawn.yaml"), "--close"]
    assert "only a training with `data.holdout`" in says(capsys, *close, "--set", "data.holdout=[]")
    assert "nothing to close" in says(capsys, *close)
    run = ["evaluate", "nothing", "--data", "msrc7", "--protocol"]
    assert "--protocol '': names none; there are: " in says(capsys, *run, "")
    assert re.search("no protocol `uvo`; there are: .*ufo, .*choice, choice-ufo$", says(capsys, *run, "uvo"))
    assert "is a file, not a folder" in says(capsys, "data", "check", str(place / "drawn.yaml"))


def test_help_says_what_every_argument_is(capsys: pytest.CaptureFixture):
    def arguments(parser):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for sub in action.choices.values():
                    yield from arguments(sub)
            else:
                yield parser.prog, action

    silent = [(prog, a.dest) for prog, a in arguments(cli._parser()) if not a.help]
    assert not silent
    for words, said in ((["reproduce", "--help"], profile_names()), (["--version"], [f"lcco {lcco.__version__}"])):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        out = " ".join(capsys.readouterr().out.split())
        assert stop.value.code == 0 and said and all(word in out for word in said)


def test_reproduce_checks_everything_before_anything_runs(place: Path, capsys: pytest.CaptureFixture):
    results = ["--results", str(place / "out")]
    assert "did you mean `seeds`?" in says(capsys, "reproduce", "--profile", "smoke", *results, "-p", "seed=[0]")
    assert "`seeds` is True; it must be a list" in says(capsys, "reproduce", "--profile", "smoke", *results, "-p",
                                                        "seeds=true")  # fmt: skip
    assert "`seeds[1]` is 'x'" in says(capsys, "reproduce", "--profile", "smoke", *results, "-p", "seeds=[0, x]")
    assert "01_main_results" in says(capsys, "reproduce", "--profile", "smoke", *results, "--only", "77")
    assert "there are: " in says(capsys, "reproduce", "--profile", "smok", *results)
    assert "--data-root" in says(capsys, "reproduce", "-p", "data_root=x", *results)
    assert not list((place / "out").rglob("*.ipynb"))


def test_an_interruption_says_that_it_goes_on_and_exits_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_train", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == (
        "lcco: interrupted; give the same command again and it goes on where it stopped\n"
    )


@pytest.mark.parametrize("words", [[], ["train", "--profil"], ["evaluate", "x"], ["data"]])
def test_wrong_usage_exits_2(words: list[str], capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2 and "usage: lcco" in capsys.readouterr().err
