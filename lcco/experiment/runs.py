"""The run store: a training is done once, named by its experiment's hash, and found again.

`runs/<name>-<hash>/` holds config.json, metrics.jsonl, best.safetensors and last.safetensors,
record.json once it is done, and in evaluations/ what was measured of it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lcco import __version__
from lcco.backbones import model_file, read_about
from lcco.common import LCCoError, Missing, digest, file_digest, place
from lcco.config import TRAINING_VERSION, Experiment, Profile
from lcco.data import CoSegData, load_data
from lcco.data.overlap import overlap
from lcco.experiment.evaluate import CHOICE, Evaluation, evaluate_all, evaluate_choice
from lcco.experiment.features import Batch, make_features
from lcco.experiment.predictor import (
    Predictor,
    deterministic,
    load_model,
    read_experiment,
    trained_on,
    trained_on_of,
)
from lcco.experiment.train import Trainer
from lcco.semantics import make_vocabulary
from lcco.store import kept, lock, read_json, write_json

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "accelerate", "numpy")


# ---------------------------------------------------------------------------------- provenance
def environment(root: Path | None = None) -> dict[str, Any]:
    """Where something was computed: commit, whether the code had edits (dirty), machine, versions.

    commit and dirty are None where the code does not stand in its own checkout.
    """
    from importlib import metadata

    def git(*words: str) -> str | None:
        how = {"cwd": root or Path(__file__).parents[2], "capture_output": True, "text": True}
        try:
            return subprocess.run(["git", *words], timeout=10, check=True, **how).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    ours = git("ls-files", "lcco/common.py")  # an installed package may lie in another repository
    return {
        "commit": git("rev-parse", "HEAD") if ours else None,
        "dirty": bool(git("status", "--porcelain", "--", "lcco")) if ours else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "platform": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES} | {"lcco": __version__},
    }  # fmt: skip


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def peak_memory_mb() -> int | None:
    """This process's largest resident size; None where the system does not tell (Windows)."""
    with contextlib.suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak / (2**20 if sys.platform == "darwin" else 2**10))
    return None


def _described(data: CoSegData | None) -> dict[str, Any] | None:
    return None if data is None else {
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

    @property
    def sha(self) -> str:
        """A short hash of the weights, from the record: a run may come without its weights."""
        return self.record["weights_sha256"][:12]

    def predictor(self, gt: bool = False, k: int | None = None) -> Predictor:
        """The model ready to segment. Raises: Missing without its weights."""
        if not self.weights.is_file():
            raise Missing("weights", self.path.name, "train it again to use its model")
        predictor = load_model(self.weights)
        predictor.gt, predictor.k = gt, k
        return predictor

    def log(self) -> pd.DataFrame:
        """The training's log: a row each 50 steps, with mean losses and J on the holdout."""
        import pandas as pd

        return pd.read_json(self.path / "metrics.jsonl", lines=True)

    @cached_property
    def training(self) -> tuple[CoSegData, CoSegData | None] | None:
        """Its training set and holdout as they stand now; None where they are gone.

        Raises: LCCoError where pictures or masks were edited since.
        """
        try:
            sets = training_data(self.experiment)
        except LCCoError:
            return None
        for kind, now in zip(("data", "holdout"), map(_described, sets), strict=True):
            then = self.record.get(kind) or now
            if now and then != now:
                what = "masks" if then["digest"] == now["digest"] else "pictures"
                said = f"{what} of {now['name']} were edited since it was trained; put them back"
                raise LCCoError(f"{self.path}: {said}, or remove the run to train anew")
        return sets

    def overlap(self, test: CoSegData) -> int:
        """How many pictures of a set the model, or what it started from, was trained on.

        Raises: LCCoError where its training set is gone and was not compared with this one before.
        """
        return self._seen(test)["train"]

    def holdout_overlap(self, test: CoSegData) -> int:
        """How many pictures of a set helped to choose the model's weights."""
        return self._seen(test)["holdout"]

    def _seen(self, test: CoSegData) -> dict[str, int]:
        _ = self.training  # must not be edited
        file, seen, unknown = self._file("overlap", test), {"train": set(), "holdout": set()}, ""
        if file.is_file():
            return read_json(file)
        for part, kind in product(self.record["trained_on"], seen):
            how = {"without": part.get("without", ()), "counts": part.get("counts")}
            try:
                if part.get(kind):
                    seen[kind] |= {j for _, j in overlap(load_data(part[kind], **how), test)}
            except LCCoError as error:
                unknown = f"whether {self.path.name} has seen {test.name} is unknown: {error}"
                if part is self.record["trained_on"][0] and not self.file:
                    raise LCCoError(unknown) from None
                _say(unknown)
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
            predictor, by = self.predictor(gt, k), environment()
            predictor.features.prepare(test)
            plain = [p for p in missing if p not in CHOICE]
            found = evaluate_all(predictor, test, plain, group_size) if plain else {}
            if len(plain) < len(missing):
                found |= evaluate_choice(predictor, test, group_size)
            about = {"scored_by": by, "scored_on": _described(test)}
            for p in missing:
                write_json(files[p], asdict(found[p]) | about)
        stored = {p: read_json(file) for p, file in files.items()}
        names = [f.name for f in fields(Evaluation)]
        return {p: Evaluation(**{n: value[n] for n in names}) for p, value in stored.items()}

    def measure(self, name: str, data: CoSegData, recipe: Any, make: Callable[[], Any]) -> Any:
        """Any JSON value that `make()` measures of the model on a set, kept with the run."""
        return kept(self._file(name, data, recipe), make)

    def _file(self, name: str, data: CoSegData, *recipe: Any) -> Path:
        key = digest([data.identity(), self.sha, TRAINING_VERSION, *recipe], 10)
        return self.path / "evaluations" / f"{data.name}-{name}-{key}.json".replace("/", "_")


# ---------------------------------------------------------------------------------- the run store
def training_data(experiment: Experiment) -> tuple[CoSegData, CoSegData | None]:
    """The training set and the holdout; what `data.without` names is left out of both."""
    d = experiment.data
    how = {"counts": d.counts, "without": d.without}
    return load_data(d.train, **how), load_data(d.holdout, **how) if d.holdout else None


def load_tests(profile: Profile, names: Sequence[str]) -> dict[str, CoSegData | Missing]:
    """Test sets by name; where one is not on this machine, what is missing."""

    def load(name: str) -> CoSegData | Missing:
        try:
            return load_data(name, counts=profile.counts)
        except Missing as missing:
            return missing

    return {name: load(name) for name in names}


def find_run(experiment: Experiment) -> Run | None:
    """The finished run of an experiment, if there is one."""
    path = place("runs") / experiment.run_name
    return _stored(path) if (path / "record.json").is_file() else None


def get_run(experiment: Experiment) -> Run:
    """The run of an experiment: found, gone on with if it was interrupted, else trained now.

    Processes that ask for the same run train it once; those of one `accelerate launch` together.
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
    _ = run.training  # what it was trained on must not be edited since
    return run


def _trainer(experiment: Experiment) -> Trainer:
    data, holdout = training_data(experiment)
    if both := set(experiment.data.train) & set(experiment.data.holdout):
        said = f"`data.holdout` names {', '.join(sorted(both))}, as `data.train` does"
        _say(f"{said}: weights are chosen on pictures of training")
    features, path = make_features(experiment), place("runs") / experiment.run_name
    vocabulary = make_vocabulary(features.tower, experiment.tower)
    return Trainer(experiment, path, features, vocabulary, data, holdout)


def _train(experiment: Experiment, path: Path) -> None:
    began, trainer, here = time.monotonic(), _trainer(experiment), environment()
    main, config, before = trainer.accelerator.is_main_process, path / "config.json", []
    tree = experiment.model_dump(mode="json")
    if main:
        if trainer.checkpoint.is_file() and config.is_file():
            before = [m for m in read_json(config)["machines"] if m != here]
        write_json(config, {"experiment": tree, "machines": [*before, here]})
    summary, run = trainer.fit(), Run(path, experiment)
    if not main:
        return
    write_json(path / "record.json", {
        "experiment": tree, "hash": experiment.hash, "training_version": TRAINING_VERSION,
        "environment": here, "begun_on": before, "data": _described(trainer.data),
        "holdout": _described(trainer.holdout), "trained_on": trained_on(experiment),
        "tower": trainer.features.tower.identity, "backbone": trainer.features.backbone.identity,
        "vocabulary_hash": trainer.vocabulary.hash, "weights": run.weights.name,
        "weights_sha256": file_digest(run.weights, 64),
        "seconds": round(time.monotonic() - began + summary.pop("seconds_before"), 1),
        "peak_memory_mb": peak_memory_mb(), "processes": trainer.accelerator.num_processes,
        "training": summary,
    })  # fmt: skip
    trainer.checkpoint.unlink(missing_ok=True)  # only now: a kill before this loses nothing


def _stored(path: Path) -> Run:
    record = read_json(path / "record.json")
    try:
        return Run(path, read_experiment(record["experiment"]), record)
    except (KeyError, TypeError, AttributeError):
        raise LCCoError(f"{path / 'record.json'}: damaged; remove {path} to train again") from None


def open_run(name: str | Path) -> Run:
    """A finished run by its folder or (the start of) its name, "shipped", or a model file.

    Raises: LCCoError naming what there is where it is not found, or not finished.
    """
    path = Path(name).expanduser()
    if str(name) == "shipped" or path.is_file():
        return _from_file(model_file(str(name)))
    path = path if path.is_dir() else _by_name(str(name))
    if not (path / "record.json").is_file():
        what = "holds no finished run (no record.json); start its training again and it goes on"
        raise LCCoError(f"{path}: {what}")
    run = _stored(path)
    if run.record.get("training_version") != TRAINING_VERSION:
        _say(f"{path.name}: trained by an older version of the code")
    return run


def _by_name(name: str) -> Path:
    done = [file.parent for file in sorted(place("runs").glob("*/record.json"))]
    found = [p for p in done if p.name.startswith(name)]
    # A run of older code stands back behind one of the same name made by this code.
    found = [p for p in found if _stored(p).experiment.run_name == p.name] or found
    if len(found) == 1:
        return found[0]
    names = ", ".join(p.name for p in found or done) or "none"
    if found:
        raise LCCoError(f"several runs are called `{name}`: {names}; give more of the name")
    raise LCCoError(f"no run, folder or model file is called `{name}`; runs there are: {names}")


def _from_file(file: Path) -> Run:
    """A model file as a run, whose scores are kept in the run store."""
    about, sha = read_about(file), file_digest(file, 64)
    record = {k: v for k, v in about.items() if k != "words"}
    record |= {"weights": file.name, "weights_sha256": sha, "trained_on": trained_on_of(about)}
    experiment = read_experiment(about["experiment"])
    return Run(place("runs") / f"{file.stem}-{sha[:10]}", experiment, record, file)


# ---------------------------------------------------------------------------------- what it costs
def estimate(experiment: Experiment, steps: int = 3) -> dict[str, Any]:
    """What a training will be: its sizes, and its seconds.

    They are those of a finished run of the same name that differs in its seed alone, else of a few
    steps on noise, timed here, to which embedding the pictures once comes; nothing is kept.
    Raises: LCCoError for what training would refuse.
    """
    trainer, seconds, source = _trainer(experiment), None, "a finished run like it"
    for file in place("runs").glob(f"{experiment.name}-*/record.json"):
        run = _stored(file.parent)
        if run.experiment.replace(seed=experiment.seed).hash == experiment.hash:
            seconds = run.record["seconds"]
    if seconds is None:
        seconds, source = _timed(trainer, steps), f"{steps} steps on this machine"
    d, images = experiment.data, len(trainer.data)
    stored = trainer.features.row.itemsize * images * (1 + d.flip)
    return {
        "run": experiment.run_name, "images": images, "trained parameters": trainer.learned,
        "steps": experiment.train.steps, "images a step": d.groups * d.group_size,
        "cache MB": round(stored / 2**20), "training seconds": round(seconds, 2),
        "estimated from": source,
    }  # fmt: skip


def _timed(trainer: Trainer, steps: int) -> float:
    """Seconds of every step, from some with a batch of noise."""
    d, features = trainer.experiment.data, trainer.features
    shape = d.groups, d.group_size
    noise = torch.rand(d.groups * d.group_size, 3, d.size, d.size)
    maps = [x.unflatten(0, shape) for x in features.frozen_maps(noise)]
    batch = Batch(
        None if maps else noise.unflatten(0, shape), maps or None,
        torch.randn(*shape, features.tower.width), (noise[:, 0] > 0.7).byte().unflatten(0, shape),
        torch.ones(shape, dtype=torch.bool), torch.zeros(d.groups, dtype=torch.long),
    ).to(trainer.accelerator.device)  # fmt: skip
    with deterministic(features):
        trainer.step(batch)  # warms up
        began = time.monotonic()
        for _ in range(steps):
            trainer.step(batch)
    return (time.monotonic() - began) / steps * trainer.experiment.train.steps
