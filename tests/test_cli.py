"""The command line: what people type works; a mistake is one line on stderr and exit 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import drawn
import pytest
import tiny
from typer.main import get_command

import lcco
from lcco import cli
from lcco.common import place as where

MSRC7 = ("bird", "car", "cat", "cow", "dog", "plane", "sheep")
PROFILE = """
about: Sets that the test drew, parts with random weights.
experiment:
  name: drawn
  data: {{train: [voc_train], holdout: [voc_val], size: 32, groups: 1, group_size: 2}}
  tower: {{model: "{tower}", weights: null, vocabulary: voc20}}
  model: {{backbone: resnet18, weights: null, frozen_stages: 4, width: 8}}
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
    (tmp_path / "tower.json").write_text(json.dumps(tiny.CLIP))
    (tmp_path / "drawn.yaml").write_text(PROFILE.format(tower=tmp_path / "tower.json"))
    monkeypatch.setenv("LCCO_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def says(capsys: pytest.CaptureFixture):
    """The one line that a mistaken command prints on stderr."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert cli.main(list(map(str, words))) == 2
        said = capsys.readouterr().err
        assert said.startswith("lcco: ") and said.count("\n") == 1 and "Traceback" not in said, said
        return said

    return run


def table(text: str) -> list[dict[str, str]]:
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_trains_scores_and_refuses_pictures_it_was_trained_on(place: Path, says, capsys):
    train = ["train", "--profile", str(place / "drawn.yaml"), "--set", "model.k=3"]
    assert cli.main([*train, "--set", "seed=7"]) == 0
    run = Path(capsys.readouterr().out.split()[0])
    config = json.loads((run / "record.json").read_text())["experiment"]
    assert (config["model"]["k"], config["seed"], config["name"]) == (3, 7, "drawn")
    score = ["--protocol", "ufo,native", "--group-size", "2"]
    for name in (run.name, str(run), str(run / "last.safetensors")):
        assert cli.main(["evaluate", name, "--data", "msrc7", *score]) == 0
        printed = capsys.readouterr()
        assert "msrc7: 0 of 14 pictures are in the training data" in printed.err
        rows = table(printed.out)
        assert {r["images"] for r in rows} == {"14"}
        assert all(0 <= float(r["J"]) <= 100 for r in rows) and len(rows) == 2
    both = ["--protocol", "ufo,choice", "--group-size", "2", "--allow-overlap"]
    assert cli.main(["evaluate", run.name, "--data", "voc_train", *both]) == 0
    ufo, choice = table(capsys.readouterr().out)
    assert ufo["leak"] == "nan" and 0 <= float(choice["leak"]) <= 100
    assert "trained on" in says("evaluate", run.name, "--data", "voc_train")
    unknown = says("evaluate", run.name, "--data", "msrc7", "--protocol", "uvo")
    assert "no protocol `uvo`" in unknown and "ufo" in unknown
    assert cli.main(["evaluate", str(run), "--data", "voc_train", "--allow-overlap"]) == 0
    seen, of = re.search(r"voc_train: (\d+) of (\d+)", capsys.readouterr().err).groups()
    assert seen == of != "0"
    picture = next((place / "MSRC" / "image" / "cow").iterdir())
    words = ["cosegment", str(picture), "--out", str(place / "out"), "--weights", run.name]
    assert cli.main(words) == 0 and (place / "out" / "masks" / f"{picture.stem}.png").is_file()


def test_dry_run_says_size_and_time_and_trains_nothing(place: Path, says, capsys):
    dry = ["train", "--profile", str(place / "drawn.yaml"), "--dry-run"]
    assert cli.main(dry) == 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert (said["steps"], said["images"], said["images a step"]) == ("2", "12", "2")
    assert not list(where("runs").glob("*/record.json"))
    assert "`nosuch`" in says(*dry, "--set", "data.holdout=nosuch")
    assert "data.crop needs a live backbone" in says(*dry, "--set", "data.crop=0.5")


def test_settings_are_read_as_their_types(place: Path, says, monkeypatch):
    asked = []
    monkeypatch.setattr("lcco.experiment.runs.estimate", lambda e: asked.append(e) or {})
    pairs = ["data.train=007", "data.holdout=[]", "tower.weights=null", "data.flip=true",
             "model.strides=[16, 16, 8]", "train.lr=1e-3", "name=2024_05", "seed=3",
             "data.without=[a b, c]"]  # fmt: skip
    settings = [word for pair in pairs for word in ("--set", pair)]
    assert cli.main(["train", "--profile", str(place / "drawn.yaml"), "--dry-run", *settings]) == 0
    (e,) = asked
    assert (e.data.train, e.data.holdout, e.data.flip) == (("007",), (), True)
    assert e.tower.weights is None
    assert (e.model.strides, e.train.lr, e.name, e.seed) == ((16, 16, 8), 1e-3, "2024_05", 3)
    assert e.data.without == ("a b", "c")
    train = ["train", "--profile", str(place / "drawn.yaml"), "--set"]
    assert "unknown setting `model.kk`" in says(*train, "model.kk=3")
    assert "`model.k` is 'five'" in says(*train, "model.k=five")
    assert "--set model.k: must be key=value" in says(*train, "model.k")


def test_data_check_passes_a_good_folder_and_fails_a_bad_one(place: Path, says, capsys):
    assert cli.main(["data", "check", str(place / "MSRC")]) == 0
    assert "nothing wrong" in capsys.readouterr().err
    assert cli.main(["data", "check", str(place / "MSRC"), "--training", "msrc7"]) == 1
    capsys.readouterr()
    (place / "MSRC" / "groundtruth" / "cow" / "co_00.png").unlink()
    assert cli.main(["data", "check", str(place / "MSRC")]) == 1
    said = capsys.readouterr()
    assert "co_00" in said.out and "something is wrong" in said.err
    assert "none" in says("data", "check", place / "none")
    assert "drawn.yaml" in says("data", "check", place / "drawn.yaml")


def test_mistakes_are_one_line_that_names_the_mend(place: Path, says):
    assert "there are: " in says("train", "--profile", "embeded")
    assert "called `nothing`" in says("evaluate", "nothing", "--data", "msrc7")
    assert "--manifest" in says("cosegment", "--out", place / "out")
    (place / "bad.yaml").write_text("about: [x\n")
    assert "not valid YAML: " in says("train", "--profile", place / "bad.yaml")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PermissionError(13, "denied", "/x"), 2, "lcco: [Errno 13] denied: '/x'\n"),
        (OSError(28, "No space left on device"), 2, "lcco: [Errno 28] No space left on device\n"),
        (OSError("two\nlines"), 2, "lcco: two lines\n"), (OSError(), 2, "lcco: OSError\n"),
        (KeyboardInterrupt(), 130,
         "lcco: interrupted; give the same command again and it goes on\n"),
        (KeyError("x"), None, ""),
    ],
)  # fmt: skip
def test_errors_of_the_system_and_interruptions(error, code, said, monkeypatch, capsys):
    def fails(*args):
        raise error

    monkeypatch.setattr("lcco.config.load_profile", fails)
    if code is None:  # a bug shows its traceback
        with pytest.raises(type(error)):
            cli.main(["train"])
    else:
        assert cli.main(["train"]) == code
        assert capsys.readouterr().err.strip("\n") == said.strip("\n")


@pytest.mark.parametrize("words", [
    ["train", "--profil"], ["evaluate", "x"], ["nothing"], ["data"],
    ["evaluate", "x", "--data", "y", "--group-size", "0"],
])  # fmt: skip
def test_wrong_usage_exits_2(words: list[str], capsys):
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert "Usage: lcco" in said.err + said.out and "Traceback" not in said.err


def test_help_says_what_every_option_is():
    def options(command, name):
        for param in command.params:
            yield f"{name} {param.name}", getattr(param, "help", None)
        for sub, inner in getattr(command, "commands", {}).items():
            if not inner.hidden:
                yield f"{name} {sub}", inner.help
                yield from options(inner, f"{name} {sub}")

    found = dict(options(get_command(cli.app), "lcco"))
    assert not [name for name, text in found.items() if not text]
    assert {f"lcco {c}" for c in ("train", "evaluate", "cosegment", "data check")} <= set(
        found)  # fmt: skip


def test_the_command_itself():
    def run(*words):
        began = time.monotonic()
        command = [sys.executable, "-m", "lcco", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        return done, time.monotonic() - began

    done, _ = run("--version")
    assert (done.returncode, done.stdout) == (0, f"lcco {lcco.__version__}\n")
    done, seconds = run("--help")
    assert done.returncode == 0 and "cosegment" in done.stdout and seconds < 5
    done, _ = run("train", "--profile", "none")
    assert done.returncode == 2 and done.stderr.startswith("lcco: no profile `none`")
