"""The run store: a training is done once, named by its experiment's hash, and found again.

`runs/<name>-<hash>/` holds metrics.jsonl, best.safetensors and last.safetensors, record.json once
it is done, and in evaluations/ what was measured of it.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState

from lcco.backbones import model_file, read_about, reading
from lcco.common import LCCoError, Missing, digest, file_digest, place
from lcco.config import TRAINING_VERSION, Experiment, Profile, typed
from lcco.data import LOOKS, CoSegData, load_data
from lcco.experiment.evaluate import SCORING_VERSION, Evaluation, evaluate_all
from lcco.experiment.predictor import Predictor, load_model
from lcco.experiment.train import Trainer, environment, training_data
from lcco.store import lock, read_json, write_json


@dataclass
class Run:
    """A finished training: its folder, settings and record, and what was measured of it.

    weights: the best on the holdout, or without one the last; of a model file by its path that.
    """

    path: Path
    experiment: Experiment
    record: dict[str, Any]
    weights: Path

    def predictor(self, gt: bool = False, k: int | None = None) -> Predictor:
        """The model ready to segment. Raises: Missing without its weights."""
        return load_model(self.weights, gt=gt, k=k)

    def log(self) -> pd.DataFrame:
        """The training's log: a row each 50 steps, with mean losses and J on the holdout."""
        return pd.read_json(self.path / "metrics.jsonl", lines=True)

    def check(self) -> None:
        """Raises: LCCoError where what it was trained on was edited since; it may be gone."""
        try:
            sets = training_data(self.experiment)
        except LCCoError:
            return
        for kind, data in zip(("data", "holdout"), sets, strict=True):
            if data and self.record.get(kind) not in (None, _described(data)):
                said = f"pictures or masks of {data.name} were edited since it was trained"
                raise LCCoError(f"{self.path}: {said}; put them back, or remove the run")

    def overlap(self, test: CoSegData, kind: str = "train") -> int:
        """How many pictures of a set the model, or what it started from, was trained on.

        kind: "holdout" counts those that helped to choose its weights.
        Raises: LCCoError where its training set is gone and was not compared with this one before.
        """
        if (file := self._file(f"overlap-{kind}", test, LOOKS)).is_file():
            return read_json(file)
        self.check()
        seen, unknown, (own, *_) = set(), "", self.record["trained_on"]
        for part in [part for part in self.record["trained_on"] if part[kind]]:
            how = {"without": part.get("without", ()), "counts": part.get("counts")}
            try:
                seen |= {j for _, j in load_data(part[kind], **how).overlap(test)}
            except LCCoError as error:
                unknown = f"whether {self.path.name} has seen {test.name} is unknown: {error}"
                if part is own and self.weights.parent == self.path:  # no file from elsewhere
                    raise LCCoError(unknown) from None
                print(unknown, file=sys.stderr)
        if not unknown:
            write_json(file, len(seen))
        return len(seen)

    def evaluate(self, test: CoSegData, protocols: str | Sequence[str] = "ufo", group_size: int = 5,
                 *, k: int | None = None, gt: bool = False,
                 allow_overlap: bool = False) -> dict[str, Evaluation]:  # fmt: skip
        """Scores under protocols (`choice`: the group-choice test), each computed once and kept.

        Raises: LCCoError if the model has seen pictures of the set, unless `allow_overlap`.
        """
        protocols = [protocols] if isinstance(protocols, str) else list(protocols)
        if not allow_overlap and (seen := self.overlap(test)):
            what = f"was trained on {seen} of the {len(test)} pictures of {test.name}"
            mend = "use another test set, or --allow-overlap to see its score all the same"
            raise LCCoError(f"{self.path.name} {what}; {mend}")
        files = {p: self._file(f"{p}-{group_size}", test, gt, k) for p in protocols}
        if missing := [p for p in protocols if not files[p].is_file()]:
            predictor = self.predictor(gt, k)
            predictor.features.prepare(test)
            found = evaluate_all(predictor, test, missing, group_size)
            about = {"scored_by": environment(), "scored_on": _described(test)}
            for p in missing:
                write_json(files[p], about | {"evaluation": asdict(found[p])})
        return {p: Evaluation(**read_json(file)["evaluation"]) for p, file in files.items()}

    def _file(self, name: str, data: CoSegData, *recipe: Any) -> Path:
        sha = self.record["weights_sha256"]  # a run may come without its weights
        key = digest([sha, data.identity(), SCORING_VERSION, *recipe], 10)
        return self.path / "evaluations" / f"{data.name}-{name}-{key}.json".replace("/", "_")


def _described(data: CoSegData | None) -> dict[str, Any] | None:
    return data and {"name": data.name, "images": len(data), "digest": data.digest(),
                     "masks": data.truth_digest()}  # fmt: skip


def load_tests(profile: Profile, names: Sequence[str]) -> dict[str, CoSegData | Missing]:
    """Test sets by name; where one is not on this machine, what is missing."""
    found: dict[str, CoSegData | Missing] = {}
    for name in names:
        try:
            found[name] = load_data(name, counts=profile.counts)
        except Missing as missing:
            found[name] = missing
    return found


def get_run(experiment: Experiment) -> Run:
    """The run of an experiment: found, gone on with if it was interrupted, else trained now.

    Processes that ask for the same run train it once; those of one `accelerate launch` together.
    Raises: LCCoError also where what it was trained on was edited since; Missing, instead of
    training, where the variable `LCCO_TRAIN` is "no".
    """
    path = place("runs") / experiment.run_name
    team = PartialState(cpu=not torch.cuda.is_available())
    held = lock(path.with_name(f"{path.name}.lock"), f"waiting for another that trains {path.name}")
    with held if team.is_main_process else contextlib.nullcontext():  # one holds it for all
        team.wait_for_everyone()
        if not (path / "record.json").is_file():
            if os.environ.get("LCCO_TRAIN") == "no":
                raise Missing("training", path.name, "LCCO_TRAIN=no leaves trainings out")
            trainer = Trainer(experiment, path)
            summary = trainer.fit()
            if team.is_main_process:
                *before, here = summary.pop("machines")
                best, last = path / "best.safetensors", path / "last.safetensors"
                write_json(path / "record.json", _about(best if best.is_file() else last) | {
                    "environment": here, "begun_on": before, "data": _described(trainer.data),
                    "seconds": round(summary["seconds"], 1), "processes": team.num_processes,
                    "holdout": _described(trainer.holdout), "training": summary})  # fmt: skip
                # only now: a kill before this loses nothing
                trainer.checkpoint.unlink(missing_ok=True)
        team.wait_for_everyone()
    run = _stored(path)
    run.check()
    return run


def _about(file: Path) -> dict[str, Any]:
    """What a record takes from a model file: settings, training sets, the frozen parts' hashes."""
    about = read_about(file)
    with reading(file, "a model of lcco"):
        del about["words"]
    return about | {"weights": file.name, "weights_sha256": file_digest(file, 64)}


def estimate(experiment: Experiment) -> dict[str, Any]:
    """What a training will be: its sizes, and the seconds of its steps, from three on few pictures.

    Raises: LCCoError for what training would refuse.
    """
    e, images = experiment, len(training_data(experiment)[0])
    with TemporaryDirectory() as folder:
        short = Trainer(e, Path(folder), few=20)
        first, last = short.fit(stop_at=1), short.fit(stop_at=4)  # the first step warms up
    each = (last["seconds"] - first["seconds"]) / max(1, last["step"] - 1)
    return {"run": e.run_name, "images": images, "trained parameters": short.learned,
            "steps": e.train.steps, "images a step": e.data.groups * e.data.group_size,
            "training seconds": round(each * e.train.steps, 2)}  # fmt: skip


def find_run(experiment: Experiment) -> Run | None:
    """The finished run of an experiment, if there is one."""
    path = place("runs") / experiment.run_name
    return _stored(path) if (path / "record.json").is_file() else None


def _stored(path: Path) -> Run:
    record = read_json(path / "record.json")
    with reading(path / "record.json", "the record of a finished run"):
        return Run(path, typed(record["experiment"], Experiment), record, path / record["weights"])


def open_run(name: str | Path) -> Run:
    """A finished run by its folder or (the start of) its name, "shipped", or a model file.

    Raises: LCCoError naming what there is where it is not found, or not finished.
    """
    path = Path(name).expanduser()
    if str(name) == "shipped" or path.is_file():  # its scores are kept in the run store
        record = _about(file := model_file(str(name)))
        path = place("runs") / f"{file.stem}-{record['weights_sha256'][:10]}"
        with reading(file, "a model of this version of lcco"):
            return Run(path, typed(record["experiment"], Experiment), record, file)
    if not path.is_dir():
        done = sorted(record.parent for record in place("runs").glob("*/record.json"))
        found = [p for p in done if p.name.startswith(str(name))]
        if len(found) != 1:
            what = "several runs are" if found else "no run, folder or model file is"
            names = ", ".join(p.name for p in found or done) or "none"
            raise LCCoError(f"{what} called `{name}`; runs there are: {names}")
        path = found[0]
    if not (path / "record.json").is_file():
        what = "holds no finished run (no record.json); start its training again and it goes on"
        raise LCCoError(f"{path}: {what}")
    run = _stored(path)
    if run.record.get("training_version") != TRAINING_VERSION:
        print(f"{path.name}: trained by an older version of the code", file=sys.stderr)
    return run
