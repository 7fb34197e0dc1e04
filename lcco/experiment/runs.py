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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lcco.backbones import model_file, read_about
from lcco.common import LCCoError, Missing, digest, duration, file_digest, place
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
    threads_of,
    trained_on,
    trained_on_of,
)
from lcco.experiment.train import Trainer, start_from
from lcco.semantics import make_vocabulary
from lcco.store import kept, lock, read_json, write_json

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = ("lcco", "torch", "torchvision", "open_clip_torch", "timm", "accelerate", "numpy")


# ---------------------------------------------------------------------------------- provenance
def environment(root: Path | None = None) -> dict[str, Any]:
    """Where something was computed: commit, machine, threads, versions.

    commit: None where this is not the checkout that the code stands in. dirty: whether its code
    had edits; None = unknown.
    """
    from importlib import metadata

    root = root or Path(__file__).parents[2]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=root, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    ours = git("ls-files", "lcco/common.py")  # an installed package may lie in another repository
    edits = git("status", "--porcelain", "--", "lcco") if ours else None
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "commit": git("rev-parse", "HEAD") if ours else None,
        "dirty": None if edits is None else bool(edits),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "platform": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "versions": versions,
    }  # fmt: skip


def peak_memory_mb() -> int | None:
    """This process's largest resident size; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def _data_record(data: CoSegData | None) -> dict[str, Any] | None:
    if data is None:
        return None
    digests = {"digest": data.digest(), "masks": data.truth_digest()}
    return {"name": data.name, "images": len(data), **digests}


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

    @cached_property
    def _parts(self) -> dict[str, Any]:
        features = make_features(self.experiment)
        vocabulary = make_vocabulary(features.tower, self.experiment.tower)
        return {"features": features, "vocabulary": vocabulary}

    def predictor(self, gt: bool = False, k: int | None = None) -> Predictor:
        """The model ready to segment. Raises: Missing without its weights."""
        if not self.weights.is_file():
            raise Missing("weights", self.path.name, "train it again to use its model")
        predictor = load_model(self.weights, **self._parts)
        predictor.gt, predictor.k = gt, k
        return predictor

    def log(self) -> pd.DataFrame:
        """The training's log: a row each 50 steps, with mean losses and J on the holdout."""
        import pandas as pd

        return pd.read_json(self.path / "metrics.jsonl", lines=True)

    # ------------------------------------------------------------------ what it was trained on
    @cached_property
    def training(self) -> tuple[CoSegData, CoSegData | None] | None:
        """Its training set and holdout as they stand now; None where they are gone.

        Raises: LCCoError where pictures or masks were edited since.
        """
        try:
            sets = training_data(self.experiment)
        except LCCoError:
            return None
        for kind, now in zip(("data", "holdout"), sets, strict=True):
            then, found = self.record.get(kind), _data_record(now)
            for part, what in (("digest", "pictures"), ("masks", "masks")):
                if then and found and then[part] != found[part]:
                    mend = "put them back, remove the run to train again, or name the new one apart"
                    said = f"{what} of {now.name} were edited since it was trained"
                    raise LCCoError(f"{self.path}: {said}; {mend} (--set name=...)")
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
        file = self._file("overlap", test)
        if file.is_file():
            return read_json(file)
        own, *starts = self.record["trained_on"]
        found: dict[str, set[int]] = {"train": set(), "holdout": set()}
        whole = True
        for part in (own, *starts):
            how = {"without": part.get("without", ()), "counts": part.get("counts", {})}
            for kind, pictures in found.items():
                try:
                    sets = load_data(part[kind], **how) if part.get(kind) else None
                except LCCoError as error:
                    if part is own and kind == "train":
                        what = f"so it cannot be told whether it has seen pictures of {test.name}"
                        raise LCCoError(f"{self.path.name}: {error}; {what}") from None
                    what, whole = f"{', '.join(part[kind])} is not here", False
                    print(f"{self.path.name}: {what} to compare with", file=sys.stderr, flush=True)
                else:
                    pictures |= {j for _, j in overlap(sets, test)} if sets else set()
        counts = {kind: len(pictures) for kind, pictures in found.items()}
        if whole:
            write_json(file, counts)
        return counts

    # ------------------------------------------------------------------ what is measured of it
    def evaluate(
        self, test: CoSegData, protocols: str | Sequence[str] = "ufo", group_size: int = 5, *,
        k: int | None = None, gt: bool = False, allow_overlap: bool = False,
    ) -> dict[str, Evaluation]:  # fmt: skip
        """Scores under protocols (`choice`: the group-choice test), each computed once and kept.

        Raises: LCCoError if the model has seen pictures of the set, unless `allow_overlap`.
        """
        protocols = [protocols] if isinstance(protocols, str) else list(protocols)
        if (seen := self.overlap(test)) and not allow_overlap:
            what = f"was trained on {seen} of the {len(test)} pictures of {test.name}"
            mend = "use another test set, or --allow-overlap to see its score all the same"
            raise LCCoError(f"{self.path.name} {what}; {mend}")
        files = {p: self._file(f"{p}-{group_size}", test, gt, k) for p in protocols}
        if missing := [p for p in protocols if not files[p].is_file()]:
            predictor = self.predictor(gt, k)
            predictor.features.prepare(test)
            plain = [p for p in missing if p not in CHOICE]
            found = evaluate_all(predictor, test, plain, group_size) if plain else {}
            if len(plain) < len(missing):
                found |= evaluate_choice(predictor, test, group_size)
            by = {"scored_by": environment(), "scored_on": _data_record(test)}
            for p in missing:
                write_json(files[p], asdict(found[p]) | by)
        names = [f.name for f in fields(Evaluation)]
        stored = {p: read_json(file) for p, file in files.items()}
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
    found: dict[str, CoSegData | Missing] = {}
    for name in names:
        try:
            found[name] = load_data(name, counts=profile.counts)
        except Missing as missing:
            found[name] = missing
    return found


def find_run(experiment: Experiment) -> Run | None:
    """The finished run of an experiment, if there is one."""
    path = place("runs") / experiment.run_name
    return _stored(path) if (path / "record.json").is_file() else None


def get_run(experiment: Experiment) -> Run:
    """The run of an experiment: found, gone on with if it was interrupted, else trained now.

    Processes that ask for the same run train it once; those of one `accelerate launch` together.
    """
    path, team = place("runs") / experiment.run_name, None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        team = PartialState(cpu=not torch.cuda.is_available())
    with contextlib.ExitStack() as held:
        if team is None or team.is_main_process:  # which holds the lock for all
            message = f"waiting for another process that trains {path.name}"
            held.enter_context(lock(path.with_name(f"{path.name}.lock"), message))
        if team:
            team.wait_for_everyone()
        if not (path / "record.json").is_file():
            _train(experiment, path)
        if team:
            team.wait_for_everyone()
    run = _stored(path)
    _ = run.training  # what it was trained on must not be edited since
    return run


def _trainer(experiment: Experiment, path: Path) -> Trainer:
    data, holdout = training_data(experiment)
    if both := set(experiment.data.train) & set(experiment.data.holdout):
        what = f"`data.holdout` names {', '.join(sorted(both))}, as `data.train` does"
        print(f"{what}: weights are chosen on pictures of training", file=sys.stderr, flush=True)
    features = make_features(experiment)
    vocabulary = make_vocabulary(features.tower, experiment.tower)
    return Trainer(experiment, path, features, vocabulary, data, holdout)


def _train(experiment: Experiment, path: Path) -> None:
    began, trainer, here = time.monotonic(), _trainer(experiment, path), environment()
    main, config, machines = trainer.accelerator.is_main_process, path / "config.json", []
    if main:
        if trainer.checkpoint.is_file() and config.is_file():
            machines = [m for m in read_json(config)["machines"] if m != here]
        tree = experiment.model_dump(mode="json")
        write_json(config, {"experiment": tree, "machines": [*machines, here]})
    summary = trainer.fit()
    if not main:
        return
    run = Run(path, experiment)
    write_json(path / "record.json", {
        "experiment": tree, "hash": experiment.hash, "training_version": TRAINING_VERSION,
        "environment": here, "begun_on": machines, "data": _data_record(trainer.data),
        "holdout": _data_record(trainer.holdout), "trained_on": trained_on(experiment),
        "tower": trainer.features.tower.identity, "backbone": trainer.features.backbone.identity,
        "vocabulary_hash": trainer.vocabulary.hash, "weights": run.weights.name,
        "weights_sha256": file_digest(run.weights, 64), "training": summary,
        "seconds": round(time.monotonic() - began + summary.pop("seconds_before"), 1),
        "peak_memory_mb": peak_memory_mb(), "processes": trainer.accelerator.num_processes,
    })  # fmt: skip
    trainer.checkpoint.unlink(missing_ok=True)  # only now: a kill before loses nothing


def _stored(path: Path) -> Run:
    record = read_json(path / "record.json")
    try:
        return Run(path, read_experiment(record["experiment"]), record)
    except (KeyError, TypeError, AttributeError):
        what = f"damaged; remove {path} to train again"
        raise LCCoError(f"{path / 'record.json'}: {what}") from None


def open_run(name: str | Path) -> Run:
    """A finished run by its folder or (the start of) its name, "shipped", or a model file.

    Raises: LCCoError naming what there is where it is not found, or not finished.
    """
    path, store = Path(name).expanduser(), place("runs")
    if str(name) == "shipped" or path.is_file():
        return _from_file(model_file(str(name)))
    if not path.is_dir():
        if path.name != str(name):
            raise LCCoError(f"{path}: no such run folder or model file")
        found = [p.parent for p in sorted(store.glob("*/record.json"))]
        found = [p for p in found if p.name.startswith(path.name)]
        current = [p for p in found if p.name == _stored(p).experiment.run_name] or found
        if len(current) != 1:
            there = ", ".join(p.name for p in current) or ", ".join(
                p.parent.name for p in sorted(store.glob("*/record.json"))
            )
            what = f"several runs are called `{name}`: {there}; give more of the name"
            raise LCCoError(what if current else f"no run is called `{name}`; there are: {there}")
        path = current[0]
    if not (path / "record.json").is_file():
        what = "holds no finished run (no record.json); start its training again and it goes on"
        raise LCCoError(f"{path}: {what}")
    run = _stored(path)
    if run.record.get("training_version") != TRAINING_VERSION:
        print(f"{path.name}: trained by an older version of the code", file=sys.stderr, flush=True)
    return run


def _from_file(file: Path) -> Run:
    """A model file as a run, whose scores are kept in the run store."""
    about, sha = read_about(file), file_digest(file, 64)
    record = {k: v for k, v in about.items() if k != "words"}
    record |= {"weights": str(file), "weights_sha256": sha, "trained_on": trained_on_of(about)}
    experiment = read_experiment(about["experiment"])
    return Run(place("runs") / f"{file.stem}-{sha[:10]}", experiment, record, file)


def estimate(experiment: Experiment, steps: int = 3) -> dict[str, Any]:
    """What a training will be: sizes, and seconds from a few steps timed on random pictures.

    Nothing is kept. Where a run that differs in name or seed alone is done, its record counts.
    Raises: LCCoError for what training would refuse.
    """
    d, t = experiment.data, experiment.train
    trainer = _trainer(experiment, place("runs") / experiment.run_name)
    if t.start:
        start_from(trainer.model, experiment, trainer.vocabulary)
    features, data = trainer.features, trainer.data
    shape, began = (d.groups, d.group_size), time.monotonic()
    features.tower.encode_images(data.image(i) for i in range(min(4, len(data))))
    per_picture = (time.monotonic() - began) / min(4, len(data))
    images, began = torch.rand(d.groups * d.group_size, 3, d.size, d.size), time.monotonic()
    maps = [m.unflatten(0, shape) for m in features.frozen_maps(images)] or None
    per_picture += (time.monotonic() - began) / len(images) * (1 + d.flip)
    batch = Batch(
        None if maps else images.unflatten(0, shape), maps,
        torch.randn(*shape, features.tower.width), (images[:, 0] > 0.7).byte().unflatten(0, shape),
        torch.ones(shape, dtype=torch.bool), torch.zeros(d.groups, dtype=torch.long),
    ).to(trainer.accelerator.device)  # fmt: skip
    with deterministic(threads_of(features)):
        for step in range(steps + 1):  # the first one warms up
            began = began if step > 1 else time.monotonic()
            trainer.step(batch)
        seconds = (time.monotonic() - began) / steps * t.steps
    stored = sum(m[0, 0].numel() for m in maps or ()) * 2 * len(data) * (1 + d.flip)
    stored += (len(data) + len(features.rows(data))) * features.tower.width * 4
    frozen = f"{experiment.model.backbone} ({experiment.model.frozen_stages} of 4 stages frozen)"
    record = _alike(experiment)
    total = record.get("seconds", per_picture * len(data) + seconds)
    return {
        "run": experiment.run_name, "trained before": find_run(experiment) is not None,
        "images": len(data), "classes": len(data.groups), "words": len(trainer.vocabulary.words),
        "trained parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "steps": t.steps, "images a step": len(images), "cache MB": round(stored / 2**20),
        "memory MB": record.get("peak_memory_mb", peak_memory_mb()), "backbone": frozen,
        "embedding seconds": round(per_picture * len(data), 1),
        "training seconds": round(seconds, 2), "estimate": duration(total),
        "estimated from": "a finished run like it" if record else f"{steps} steps on this machine",
    }  # fmt: skip


def _alike(experiment: Experiment) -> dict[str, Any]:
    """The record of a finished run that differs in name or seed alone, if there is one."""
    wanted = experiment.replace(seed=0).hash
    for file in sorted(place("runs").glob("*/record.json")):
        with contextlib.suppress(LCCoError):
            run = _stored(file.parent)
            same = run.record.get("training_version") == TRAINING_VERSION
            if same and run.experiment.replace(seed=0).hash == wanted:
                return run.record
    return {}
