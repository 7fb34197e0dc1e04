"""The run store: a training is done once, named by its experiment's hash, and found again.

`runs/<name>-<hash>/` holds metrics.jsonl, best.safetensors and last.safetensors, record.json once
it is done, and in evaluations/ what was measured of it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from lcco.backbones import model_file, read_about
from lcco.common import LCCoError, Missing, digest, file_digest, place
from lcco.config import TRAINING_VERSION, Experiment, Profile
from lcco.data import CoSegData, load_data
from lcco.data.overlap import overlap
from lcco.experiment.evaluate import CHOICE, Evaluation, evaluate_all, evaluate_choice
from lcco.experiment.features import make_features
from lcco.experiment.predictor import Predictor, load_model, read_experiment, trained_on
from lcco.experiment.train import Trainer, environment
from lcco.semantics import make_vocabulary
from lcco.store import kept, lock, read_json, write_json

if TYPE_CHECKING:
    import pandas as pd

def _described(data: CoSegData | None) -> dict[str, Any] | None:
    return data and {
        "name": data.name, "images": len(data), "digest": data.digest(),
        "masks": data.truth_digest(),
    }  # fmt: skip


# ---------------------------------------------------------------------------------- a finished run
@dataclass
class Run:
    """A finished training: its folder, settings and record, and what was measured of it.

    file: its weights, where they lie elsewhere (the shipped model, or a file by its path).
    """

    path: Path
    experiment: Experiment
    record: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None

    @property
    def weights(self) -> Path:
        """The model file: the best on the holdout, or without one the last."""
        best = self.path / "best.safetensors"
        return self.file or (best if best.is_file() else self.path / "last.safetensors")

    def predictor(self, gt: bool = False, k: int | None = None) -> Predictor:
        """The model ready to segment. Raises: Missing without its weights."""
        predictor = load_model(self.weights)
        predictor.gt, predictor.k = gt, k
        return predictor

    def log(self) -> pd.DataFrame:
        """The training's log: a row each 50 steps, with mean losses and J on the holdout."""
        import pandas as pd

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

    def overlap(self, test: CoSegData) -> int:
        """How many pictures of a set the model, or what it started from, was trained on.

        Raises: LCCoError where its training set is gone and was not compared with this one before.
        """
        return self._seen(test)["train"]

    def holdout_overlap(self, test: CoSegData) -> int:
        """How many pictures of a set helped to choose the model's weights."""
        return self._seen(test)["holdout"]

    def _seen(self, test: CoSegData) -> dict[str, int]:
        if (file := self._file("overlap", test)).is_file():
            return read_json(file)
        self.check()
        seen, unknown = {"train": set(), "holdout": set()}, ""
        for part in self.record["trained_on"]:
            how = {"without": part.get("without", ()), "counts": part.get("counts")}
            try:
                for kind in [kind for kind in seen if part.get(kind)]:
                    seen[kind] |= {j for _, j in overlap(load_data(part[kind], **how), test)}
            except LCCoError as error:
                unknown = f"whether {self.path.name} has seen {test.name} is unknown: {error}"
                if part is self.record["trained_on"][0] and not self.file:
                    raise LCCoError(unknown) from None
                print(unknown, file=sys.stderr)
        counts = {kind: len(pictures) for kind, pictures in seen.items()}
        if not unknown:
            write_json(file, counts)
        return counts

    def evaluate(
        self, test: CoSegData, protocols: str | Sequence[str] = "ufo", group_size: int = 5, *,
        k: int | None = None, gt: bool = False, allow_overlap: bool = False,
    ) -> dict[str, Evaluation]:  # fmt: skip
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
            predictor, about = self.predictor(gt, k), {"scored_by": environment()}
            about["scored_on"] = _described(test)
            predictor.features.prepare(test)
            plain = [p for p in missing if p not in CHOICE]
            found = evaluate_all(predictor, test, plain, group_size) if plain else {}
            if len(plain) < len(missing):
                found |= evaluate_choice(predictor, test, group_size)
            for p in missing:
                write_json(files[p], about | {"evaluation": asdict(found[p])})
        return {p: Evaluation(**read_json(file)["evaluation"]) for p, file in files.items()}

    def measure(self, name: str, data: CoSegData, recipe: Any, make: Callable[[], Any]) -> Any:
        """Any JSON value that `make()` measures of the model on a set, kept with the run."""
        return kept(self._file(name, data, recipe), make)

    def _file(self, name: str, data: CoSegData, *recipe: Any) -> Path:
        sha = self.record["weights_sha256"]  # a run may come without its weights
        key = digest([sha, data.identity(), TRAINING_VERSION, *recipe], 10)
        return self.path / "evaluations" / f"{data.name}-{name}-{key}.json".replace("/", "_")


# ---------------------------------------------------------------------------------- the run store
def training_data(experiment: Experiment) -> tuple[CoSegData, CoSegData | None]:
    """The training set and the holdout; what `data.without` names is left out of both."""
    d = experiment.data
    how = {"counts": d.counts, "without": d.without}
    return load_data(d.train, **how), load_data(d.holdout, **how) if d.holdout else None


def load_tests(profile: Profile, names: Sequence[str]) -> dict[str, CoSegData | Missing]:
    """Test sets by name; where one is not on this machine, what is missing."""
    out: dict[str, CoSegData | Missing] = {}
    for name in names:
        try:
            out[name] = load_data(name, counts=profile.counts)
        except Missing as missing:
            out[name] = missing
    return out


def get_run(experiment: Experiment) -> Run:
    """The run of an experiment: found, gone on with if it was interrupted, else trained now.

    Processes that ask for the same run train it once; those of one `accelerate launch` together.
    Raises: LCCoError also where what it was trained on was edited since.
    """
    from accelerate import PartialState

    path = place("runs") / experiment.run_name
    team = PartialState(cpu=not torch.cuda.is_available())
    with contextlib.ExitStack() as held:
        if team.is_main_process:  # which holds the lock for all
            message = f"waiting for another process that trains {path.name}"
            held.enter_context(lock(path.with_name(f"{path.name}.lock"), message))
        team.wait_for_everyone()
        if not (path / "record.json").is_file():
            _train(experiment, path)
        team.wait_for_everyone()
    run = _stored(path)
    run.check()
    return run


def _trainer(experiment: Experiment, path: Path) -> Trainer:
    data, holdout = training_data(experiment)
    if both := set(experiment.data.train) & set(experiment.data.holdout):
        said = f"`data.holdout` names {', '.join(sorted(both))}, as `data.train` does"
        print(f"{said}: weights are chosen on pictures of training", file=sys.stderr)
    features = make_features(experiment)
    vocabulary = make_vocabulary(features.tower, experiment.tower)
    return Trainer(experiment, path, features, vocabulary, data, holdout)


def _train(experiment: Experiment, path: Path) -> None:
    trainer = _trainer(experiment, path)
    summary, run = trainer.fit(), Run(path, experiment)
    if not trainer.accelerator.is_main_process:
        return
    *before, here = summary.pop("machines")
    write_json(path / "record.json", {
        "experiment": experiment.model_dump(mode="json"), "hash": experiment.hash,
        "training_version": TRAINING_VERSION, "environment": here, "begun_on": before,
        "data": _described(trainer.data), "holdout": _described(trainer.holdout),
        "trained_on": trained_on(experiment), "tower": trainer.features.tower.identity,
        "backbone": trainer.features.backbone.identity,
        "vocabulary_hash": trainer.vocabulary.hash, "weights": run.weights.name,
        "weights_sha256": file_digest(run.weights, 64), "seconds": round(summary["seconds"], 1),
        "processes": trainer.accelerator.num_processes, "training": summary,
    })  # fmt: skip
    trainer.checkpoint.unlink(missing_ok=True)  # only now: a kill before this loses nothing


def estimate(experiment: Experiment) -> dict[str, Any]:
    """What a training will be: its sizes, and its seconds beside embedding the pictures once.

    They are those of a finished run that differs in its seed alone, else of three steps on a few
    pictures. Raises: LCCoError for what training would refuse.
    """
    e, trainer = experiment, _trainer(experiment, place("runs") / experiment.run_name)
    runs = [_stored(f.parent) for f in place("runs").glob(f"{e.name}-*/record.json")]
    alike = [run for run in runs if run.experiment.replace(seed=e.seed) == e]
    seconds = alike[0].record["seconds"] if alike else _timed(trainer)
    return {
        "run": e.run_name, "images": len(trainer.data), "trained parameters": trainer.learned,
        "steps": e.train.steps, "images a step": e.data.groups * e.data.group_size,
        "training seconds": round(seconds, 2),
        "estimated from": "a finished run like it" if alike else "three steps on this machine",
    }  # fmt: skip


def _timed(t: Trainer) -> float:
    few = t.data.subset(range(min(20, len(t.data))), f"20 pictures of {t.data.name}")
    with TemporaryDirectory() as folder:
        short = Trainer(t.experiment, Path(folder), t.features, t.vocabulary, few, None)
        first, last = short.fit(stop_at=1), short.fit(stop_at=4)  # the first step warms up
    seconds = last["seconds"] - first["seconds"]
    return seconds / max(1, last["step"] - 1) * t.experiment.train.steps


# ---------------------------------------------------------------------------------- finding runs
def _stored(path: Path) -> Run:
    record = read_json(path / "record.json")
    return Run(path, read_experiment(record["experiment"]), record)


def find_run(experiment: Experiment) -> Run | None:
    """The finished run of an experiment, if there is one."""
    path = place("runs") / experiment.run_name
    return _stored(path) if (path / "record.json").is_file() else None


def open_run(name: str | Path) -> Run:
    """A finished run by its folder or (the start of) its name, "shipped", or a model file.

    Raises: LCCoError naming what there is where it is not found, or not finished.
    """
    path = Path(name).expanduser()
    if str(name) == "shipped" or path.is_file():  # its scores are kept in the run store
        about, sha = read_about(model_file(str(name))), file_digest(model_file(str(name)), 64)
        record = {"trained_on": [about["experiment"]["data"]]} | about | {"weights_sha256": sha}
        path = place("runs") / f"{model_file(str(name)).stem}-{sha[:10]}"
        return Run(path, read_experiment(about["experiment"]), record, model_file(str(name)))
    if not path.is_dir():
        done = sorted(file.parent for file in place("runs").glob("*/record.json"))
        found = [p for p in done if p.name.startswith(str(name))]
        # A run of older code stands back behind one of the same name made by this code.
        found = [p for p in found if _stored(p).experiment.run_name == p.name] or found
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
