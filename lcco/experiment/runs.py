"""The run store: a training is done once, keyed by its experiment's hash, and found again by whoever needs it."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lcco.backbones import read_about, read_tensors
from lcco.common import (
    LCCoError,
    digest,
    duration,
    file_digest,
    file_lock,
    place,
    progress,
    project_root,
    write_json,
    write_text,
)
from lcco.config import Experiment, build
from lcco.data import LOOKS, CoSegData, load_data, overlap
from lcco.evaluate import CHOICE, Evaluation, evaluate_all, evaluate_choice, refuse_overlap
from lcco.inputs import Inputs, save_tensors
from lcco.losses import total_loss
from lcco.train import (
    Predictor,
    _begin_from,
    build_model,
    deterministic,
    load_model,
    prepare,
    same_data,
    train,
    trained_on,
    training_threads,
)

if TYPE_CHECKING:
    from accelerate import PartialState

_SHARED: dict[str, Inputs] = {}  # one set of frozen parts a process and setting: towers and caches load once


def environment() -> dict[str, Any]:
    """What a record says of where it was made: versions, machine, git commit."""
    from importlib import metadata

    packages = ("lcco", "torch", "torchvision", "open_clip_torch", "timm", "accelerate", "numpy", "pillow")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"

    def git(*words: str) -> str | None:
        try:
            return subprocess.run(
                ["git", *words], cwd=project_root(), capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    dirty = git("status", "--porcelain", "--", "lcco", "notebooks")
    return {
        "python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "versions": versions,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "git": git("rev-parse", "--short=12", "HEAD"),
        "git_dirty": None if dirty is None else bool(dirty),
    }  # fmt: skip


def _peak_memory_mb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def run_path(experiment: Experiment) -> Path:
    """`runs/<name>-<hash>`: where an experiment's files are, or will be."""
    return place("runs") / f"{experiment.name}-{experiment.hash}"


def _inputs_key(experiment: Experiment, device: str = "cpu") -> str:
    e = asdict(experiment)
    stage = min(experiment.model.frozen_stages, 1 if experiment.model.placement == "encoder" else 4)
    same = [e["tower"], e["model"]["backbone"], e["model"]["weights"], e["model"]["frozen_stages"], stage]
    same += [e["data"]["size"], e["loss"]["mask_background"], device, e["model"]["weights"] or experiment.seed]
    return digest(same)


def shared_inputs(experiment: Experiment, device: str | None = None) -> Inputs:
    """The frozen parts for an experiment, loaded once a process for all experiments that agree on them."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    key = _inputs_key(experiment, device)
    if experiment.model.frozen_stages < 4:  # the live stages belong to one model
        return Inputs(experiment, device=device)
    if key not in _SHARED:
        _SHARED[key] = Inputs(experiment, device=device)
    inputs = _SHARED[key]
    inputs.experiment = experiment
    return inputs


@dataclass
class Run:
    """A finished training: its folder, settings and record."""

    path: Path
    experiment: Experiment
    record: dict[str, Any] = field(default_factory=dict)
    data_root: Path | None = None
    _inputs: Inputs | None = None

    @property
    def weights(self) -> Path:
        """The model file that is evaluated: the best on the held-out fold, or the last, as the settings say."""
        best = self.path / "best.safetensors"
        use_best = self.experiment.train.checkpoint == "best" and best.is_file()
        return best if use_best else self.path / "last.safetensors"

    @property
    def sha(self) -> str:
        """A short hash of the model file; from the record where a run came without its weights, for its scores."""
        known = self.record.get("weights_sha256", "")[:12]
        return known if known and not self.weights.is_file() else file_digest(self.weights)

    def predictor(self, *, gt: bool = False, k: int | None = None, flip: bool = False) -> Predictor:
        """The model ready to segment; see `Predictor` for the settings. Raises: LCCoError without its weights."""
        if not self.weights.is_file():
            raise LCCoError(f"{self.path.name}: the run came without its weights; train it again to use its model")
        if self._inputs is None:
            self._inputs = shared_inputs(self.experiment)
        predictor = load_model(self.weights, inputs=self._inputs)
        return Predictor(predictor.model, self._inputs, gt=gt, k=k, flip=flip, experiment=self.experiment)

    @cached_property
    def own_data(self) -> CoSegData | None:
        """What its settings train on, as it stands now; None where it is gone (the run still tells its scores).

        Raises: LCCoError where it was edited since: the run would be taken for one on what the folder holds now.
        """
        try:
            data = load_data("+".join(self.experiment.data.train), self.data_root)
        except LCCoError:
            return None
        known = self.record.get("data", {})
        mend = "remove it to train again, or give the new run another name (`--set name=…`)"
        if known.get("digest", data.digest()) != data.digest():
            held = f"({known['images']}) than {data.name} holds now ({len(data)})"
            raise LCCoError(f"{self.path}: was trained on other pictures {held}; {mend}")
        if "masks" in known and known["masks"] != data.truth_digest():
            raise LCCoError(f"{self.path}: masks of {data.name} were edited since it was trained; {mend}")
        return data

    @cached_property
    def training_data(self) -> CoSegData:
        """Every picture that the model, or what it started from, was trained on.

        Of a start's own sets those that are not on this machine are named, and left out.
        """
        if set(self.record.get("trained_on", ())) <= set(self.experiment.data.train) and self.own_data:
            return self.own_data
        there = list(self.experiment.data.train)
        for name in self.record.get("trained_on", ()):
            try:
                if name not in there:
                    load_data(name, self.data_root)
                    there.append(name)
            except LCCoError:
                what = f"{self.path.name}: what it started from was trained on {name} as well, which is not here"
                print(f"{what}; pictures of it cannot be told", file=sys.stderr, flush=True)
        try:
            return load_data("+".join(there), self.data_root)
        except LCCoError as error:  # a relative path is looked for from where one stands
            own = " + ".join(f"`{name}`" for name in self.experiment.data.train)
            what = f"{self.path.name}: its training set {own} is not found from here"
            raise LCCoError(f"{what}; run this where it was trained, or give --data-root ({error})") from None

    def overlap(self, test: CoSegData) -> int:
        """How many pictures of `test`, by content or look, the model was trained on.

        Raises: LCCoError where what it was trained on was edited, or is gone and was not compared with `test` before.
        """
        training, gone = self.own_data, ""
        try:
            training = self.training_data
        except LCCoError as error:
            if "data" not in self.record:
                raise
            gone = str(error)
        seen = training.digest() if training else self.record["data"]["digest"]
        file = place("cache") / f"overlap-{digest([LOOKS, seen, test.digest()], 16)}.json"
        if not file.is_file():  # once a pair of sets: every picture of both must be looked at
            if not training:
                raise LCCoError(f"{gone}; else it cannot be told whether it was trained on pictures of {test.name}")
            write_json(file, {"test": test.name, "pictures": len({b for _, b in overlap(training, test)})})
        return json.loads(file.read_text())["pictures"]

    def _score_file(self, data: CoSegData, protocol: str, group_size: int, *settings: Any) -> Path:
        key = digest([data.identity(), protocol, group_size, *settings, self.sha], 10)
        return self.path / "evaluations" / f"{data.name}-{protocol}-{group_size}-{key}.json".replace("/", "_")

    def scored(self, test: str | CoSegData, protocols: Sequence[str], group_size: int = 5) -> bool:
        """Whether `evaluate` has this in store (at its default settings)."""
        data = load_data(test, self.data_root) if isinstance(test, str) else test
        return all(self._score_file(data, p, group_size, 0, False, None, False).is_file() for p in protocols)

    def evaluate(
        self, test: str | CoSegData, protocols: str | Sequence[str] = "ufo", group_size: int = 5, *, seed: int = 0,
        gt: bool = False, k: int | None = None, flip: bool = False, allow_overlap: bool = False,
    ) -> dict[str, Evaluation]:  # fmt: skip
        """Scores on a test set under protocols (`choice`: the group-choice test), kept in the run's `evaluations/`.

        Raises: LCCoError if the model was trained on pictures of the test set, unless `allow_overlap`.
        """
        protocols = [protocols] if isinstance(protocols, str) else list(protocols)
        data = load_data(test, self.data_root) if isinstance(test, str) else test
        seen = self.overlap(data)
        if seen and not allow_overlap:
            raise LCCoError(
                f"{self.path.name} was trained on {seen} of the {len(data)} pictures of {data.name}; its score there "
                "would mean nothing. Use another test set, or --allow-overlap to see it all the same"
            )
        files = {p: self._score_file(data, p, group_size, seed, gt, k, flip) for p in protocols}
        missing = [p for p in protocols if not files[p].is_file()]
        if missing:
            predictor = self.predictor(gt=gt, k=k, flip=flip)
            predictor.inputs.prepare(data)
            what = f"{self.experiment.name} on"
            plain = [p for p in missing if p not in CHOICE]
            found = evaluate_all(predictor, data, plain, group_size, seed, what) if plain else {}
            if len(plain) < len(missing):
                found |= evaluate_choice(predictor, data, group_size, seed, what)
            for p in missing:
                found[p].to_json(files[p])
        return {p: Evaluation.from_json(files[p]) for p in protocols}


def _team() -> PartialState | None:
    """The processes of one training that `accelerate launch` (or torchrun) started; None where there is one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def get_run(
    experiment: Experiment, *, inputs: Inputs | None = None, tensorboard: bool = False, data_root: Path | None = None
) -> Run:
    """The run of an experiment: loaded if it was trained before, gone on with if interrupted, else trained now.

    Two processes that ask for the same run train it once: the second waits.
    """
    path, team = run_path(experiment), _team()
    record_file, main = path / "record.json", team is None or team.is_main_process
    with contextlib.ExitStack() as held:
        if main:  # of several processes of one training one holds the lock for all
            held.enter_context(
                file_lock(path.with_name(f"{path.name}.lock"), f"waiting for another process that trains {path.name}")
            )
        if team:
            team.wait_for_everyone()
        if not record_file.is_file():
            data, inputs = _ready(experiment, inputs, data_root)
            earlier = _begin(experiment, path) if main else []
            began = time.monotonic()
            summary = train(experiment, path, inputs=inputs, tensorboard=tensorboard, data_root=data_root)
            seconds = round(time.monotonic() - began + summary.pop("seconds_before"), 1)
            more = {"training": summary, "seconds": seconds, "peak_memory_mb": _peak_memory_mb()}
            more |= {"processes": team.num_processes} if team else {}
            more |= {"begun_on": earlier} if earlier else {}
            if main:
                _write_record(Run(path, experiment, data_root=data_root), environment(), inputs, data, more)
        if team:
            team.wait_for_everyone()
    run = _run(path, record_file, data_root, inputs)
    _ = run.own_data  # it must be what the run was trained on
    return run


def _ready(
    experiment: Experiment, inputs: Inputs | None = None, data_root: Path | None = None
) -> tuple[CoSegData, Inputs]:  # fmt: skip
    """The training set and frozen parts of an experiment; whatever its training would refuse is refused here.

    Before anything is written: a first try that failed leaves no folder behind that looks like a run.
    """
    experiment.check()
    data = load_data("+".join(experiment.data.train), data_root)
    if experiment.data.holdout:
        load_data("+".join(experiment.data.holdout), data_root)
    inputs, m = inputs or shared_inputs(experiment), experiment.model
    parts = {"the backbone's maps": inputs.backbone.channels[1]} if m.isfc and m.placement == "encoder" else {}
    parts |= {"the tower's embeddings": inputs.tower.width} if m.clip_interaction else {}
    for what, width in parts.items():
        if width % m.heads:
            raise LCCoError(f"`model.heads` is {m.heads}; it must divide the width of {what}, which is {width}")
    if experiment.train.start and not (run_path(experiment) / "checkpoint.pt").is_file():
        _begin_from(build_model(experiment, inputs), experiment, inputs)
    return data, inputs


def _begin(experiment: Experiment, path: Path) -> list[dict[str, Any]]:
    """Write what will be trained, and where, into the run's folder; returns where it was trained until now, if begun.

    Machines are told once: an interruption on one and the same changes nothing.
    """
    path.mkdir(parents=True, exist_ok=True)
    here, config = environment(), path / "config.json"
    begun: list[dict[str, Any]] = []
    if (path / "checkpoint.pt").is_file() and config.is_file():
        known = json.loads(config.read_text())
        begun = [e for e in (*known.get("begun_on", []), known.get("environment")) if e and e != here]
    write_json(config, {"hash": experiment.hash, "environment": here, "begun_on": begun, **asdict(experiment)})
    return begun


def _write_record(run: Run, made: dict[str, Any], inputs: Inputs, data: CoSegData, more: dict[str, Any]) -> None:
    write_json(
        run.path / "record.json",
        {
            "experiment": asdict(run.experiment), "hash": run.experiment.hash, "environment": made,
            "data": {"name": data.name, "images": len(data), "digest": data.digest(), "masks": data.truth_digest()},
            "tower": inputs.tower.identity, "backbone": inputs.backbone.identity,
            "vocabulary_hash": inputs.vocabulary_hash, "weights": run.weights.name,
            "weights_sha256": file_digest(run.weights, 64), "trained_on": trained_on(run.experiment), **more,
        },
    )  # fmt: skip


def close_run(experiment: Experiment, why: str = "", *, data_root: Path | None = None) -> Run:
    """Take an interrupted training as it stands: its best weights so far become the run's, and its record says so.

    For a machine that was lent and is gone. why: a reason for the record. What the training wrote decides everything;
    only its optimiser is not needed any more. Raises: LCCoError where no weights were saved yet, or the run is done.
    """
    path = run_path(experiment)
    best, log = path / "best.safetensors", path / "metrics.jsonl"
    if (path / "record.json").is_file():
        raise LCCoError(f"{path}: this run is done already")
    if not experiment.data.holdout:
        raise LCCoError(f"{path}: only a training with `data.holdout`, which chooses its weights, can be closed")
    if not best.is_file() or not log.is_file():
        raise LCCoError(f"{path}: no training was interrupted here after its first evaluation; nothing to close")
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    step, kept = lines[-1]["step"], read_about(best)
    data = load_data("+".join(experiment.data.train), data_root)
    if (path / "checkpoint.pt").is_file():
        same_data(path / "checkpoint.pt", data)
    inputs = shared_inputs(experiment)
    model = load_model(best, inputs=inputs).model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    note = f"stopped after step {step} of {experiment.train.steps}{f' ({why})' if why else ''}; weights of step "
    note += f"{kept['step']}, the best on the held-out pictures until then"
    summary = {"step": step, "best": kept["holdout_J"], "best_step": kept["step"], "parameters": trained}
    config = json.loads((path / "config.json").read_text())
    run = Run(path, experiment, data_root=data_root)
    _write_record(run, config.get("environment", environment()), inputs, data, {"training": summary, "note": note})
    return _run(path, path / "record.json", data_root)


def will_have_seen(experiment: Experiment, test: CoSegData) -> int:
    """How many pictures of a test set an experiment trains on, before it does; 0 where its data are not here."""
    try:
        return Run(run_path(experiment), experiment, {"trained_on": trained_on(experiment)}).overlap(test)
    except LCCoError:
        return 0


Score = tuple[str, tuple[str, ...], int]  # a test set, protocols, group size: what `Run.evaluate` takes


def train_ahead(
    jobs: Sequence[tuple[Experiment, Sequence[Score]]], *, data_root: Path | None = None
) -> None:  # fmt: skip
    """Train, and score, those of the experiments that were not before, one a core at a time.

    jobs: experiments, each with the scores that will be asked of it; one that comes twice is done once.
    Trainings on cached features use one thread each, so on a CPU several side by side finish sooner; with a GPU, a
    live backbone, or one core, nothing happens here and `get_run` trains each when it is asked for.
    """
    wanted: dict[str, tuple[Experiment, list[Score]]] = {}
    for e, scores in jobs:
        known = wanted.setdefault(e.hash, (e, []))[1]
        known += [score for score in scores if score not in known]
    tests = lru_cache(lambda name: load_data(name, data_root))  # each is asked for by many runs
    waiting = [job for job in wanted.values() if job[0].model.frozen_stages == 4 and not _finished(*job, tests)]
    workers = side_by_side([e for e, _ in waiting])
    if workers < 2:
        return
    # The longest first, so that no worker is left alone with it; then by what they share.
    waiting.sort(key=lambda job: (job[0].model.placement != "encoder", _inputs_key(job[0])))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # with all cores, in a process whose memory goes with it
        pool.submit(_fill_caches, waiting, data_root).result()
    print(f"training and scoring {len(waiting)} models, {workers} at a time", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        started = [pool.submit(_train_alone, *job, data_root) for job in waiting]
        for job in progress(as_completed(started), "models done", len(started)):
            job.result()


def _fill_caches(jobs: Sequence[tuple[Experiment, Sequence[Score]]], data_root: Path | None) -> None:
    ready: set[tuple[str, str]] = set()
    for e, scores in jobs:
        key = _inputs_key(e)
        if (key, "") not in ready:
            prepare(e, shared_inputs(e), data_root)
            ready.add((key, ""))
        for test, _, _ in scores:
            if (key, test) not in ready:
                shared_inputs(e).prepare(load_data(test, data_root))
                ready.add((key, test))


def side_by_side(experiments: Sequence[Experiment]) -> int:
    """How many of these trainings run at once: one a core where frozen features are cached, else one after another."""
    frozen = sum(e.model.frozen_stages == 4 for e in experiments)
    return 1 if torch.cuda.is_available() else max(1, min(frozen, os.cpu_count() or 1))


def _finished(experiment: Experiment, scores: Sequence[Score], tests: Callable[[str], CoSegData]) -> bool:
    record = run_path(experiment) / "record.json"
    if not record.is_file():
        return False
    run = _run(record.parent, record, None)
    return all(run.scored(tests(test), *how) for test, *how in scores)


def _train_alone(experiment: Experiment, scores: Sequence[Score], data_root: Path | None) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # the parent tells how far all are
        for key in [k for k in _SHARED if k != _inputs_key(experiment)]:
            del _SHARED[key]  # one set of frozen parts and memos a worker is enough
        run = get_run(experiment, data_root=data_root)
        for test, protocols, group_size in scores:
            with contextlib.suppress(LCCoError):  # its notebook will say why there is no score
                run.evaluate(test, protocols, group_size)


def open_run(name: str | Path, data_root: Path | None = None) -> Run:
    """A finished run by its folder, or by (the start of) its name in the run store.

    Raises: LCCoError naming what there is when it is not found, or not finished.
    """
    path, store = Path(name).expanduser(), place("runs")
    if not path.is_dir():
        if path.is_file():
            what = f"a run is due: its folder, or (the start of) its name in {store}"
            raise LCCoError(f"{path}: is a file, but {what}; a model file is for `lcco cosegment --weights`")
        if path.name != str(Path(name)):
            raise LCCoError(f"{path}: no such run folder")
        there = sorted(p for p in store.glob("*") if p.is_dir())
        found = [p for p in there if p.name.startswith(path.name)]
        found = [p for p in found if (p / "record.json").is_file()] or found  # what was only begun is in nobody's way
        if len(found) != 1:
            known = ", ".join(p.name for p in found or store.glob("*-*/")) or "none"
            if found:
                raise LCCoError(f"several runs are called `{name}`: {known}; give more of the name")
            raise LCCoError(f"no run is called `{name}`; there are: {known}")
        path = found[0]
    if not (path / "record.json").is_file():
        raise LCCoError(f"{path}: holds no finished run (no record.json); start its training again and it goes on")
    return _run(path, path / "record.json", data_root)


def _run(path: Path, record_file: Path, data_root: Path | None, inputs: Inputs | None = None) -> Run:
    try:
        record = json.loads(record_file.read_text())
        return Run(path, build(Experiment, record["experiment"]), record, data_root, inputs)
    except (ValueError, KeyError, TypeError):
        raise LCCoError(f"{record_file}: damaged; remove {path} to train again") from None


def estimate(experiment: Experiment, data_root: Path | None = None, steps: int = 3) -> dict[str, Any]:
    """What a training will be: images, parameters and seconds, from a few steps timed on random numbers.

    Nothing is embedded or written. Seconds: `embedding` (frozen parts, once a machine) and `training`.
    Raises: LCCoError for what training would refuse.
    """
    data, inputs = _ready(experiment, None, data_root)
    with deterministic(training_threads(inputs)):
        return _timed(experiment, data, inputs, steps)


def _timed(experiment: Experiment, data: CoSegData, inputs: Inputs, steps: int) -> dict[str, Any]:
    model = build_model(experiment, inputs)
    d, m = experiment.data, experiment.model
    B, N, S = d.groups, d.group_size, d.size
    images = torch.rand(B * N, 3, S, S)
    began = time.monotonic()
    maps = inputs.frozen_maps(images) if inputs.cached_stages else []
    per_image = (time.monotonic() - began) / (B * N)
    maps = [x.unflatten(0, (B, N)) for x in maps]
    truth, present = (torch.rand(B, N, S, S) > 0.7).byte(), torch.ones(B, N, dtype=torch.bool)
    true = torch.zeros(B, dtype=torch.long)
    model.train()
    for step in range(steps + 1):
        if step == 1:
            began = time.monotonic()  # the first step warms up
        out = model(
            None if maps else images.unflatten(0, (B, N)), torch.randn(B, N, inputs.tower.width), inputs.prompts,
            maps=maps or None,
        )  # fmt: skip
        total_loss(out, truth, present, true)[0].backward()
    per_step = (time.monotonic() - began) / steps
    model.zero_grad(set_to_none=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = sum(x[0, 0].numel() for x in maps) * 2 * len(data) * (1 + d.flip)
    return {
        "run": run_path(experiment).name, "trained before": (run_path(experiment) / "record.json").is_file(),
        "images": len(data), "classes": len(data.groups), "words": len(inputs.words),
        "trained parameters": trained, "steps": experiment.train.steps, "images a step": B * N,
        "cache MB": round(stored / 2**20), "embedding seconds": round(per_image * len(data) * (1 + d.flip), 1),
        "training seconds": round(per_step * experiment.train.steps, 2),
        "estimate": duration(per_image * len(data) * (1 + d.flip) + per_step * experiment.train.steps),
        "backbone": f"{m.backbone} ({m.frozen_stages} of 4 stages frozen)",
    }  # fmt: skip


def release(
    run: Run, out: Path, tests: Sequence[str], baseline: Run | None = None, choice: Sequence[str] = ()
) -> Path:  # fmt: skip
    """Write a run's model in half precision to `out`, and beside it a card (.md) of what it is and what it scored.

    tests: the sets whose scores the card holds, all computed here from the file that is released. choice: those of the
    group-choice test. baseline: the run whose scores stand beside them. Returns the card's path.
    Raises: LCCoError for a test set with pictures of the training set.
    """
    about, state = read_about(run.weights), read_tensors(run.weights)
    if run.experiment.model.weights not in (None, "imagenet", "package"):
        # A file of this machine: the model brings its whole backbone along instead.
        state |= {f"backbone.{k}": v for k, v in run.predictor().model.backbone.state_dict().items()}
        about["experiment"]["model"] |= {"weights": None, "frozen_stages": 0}
        about["experiment"]["train"]["start"] = None  # what it saw stands in `trained_on`
    # What belongs to a channel (normalisation's variances above all) may be too large for half precision, and is small.
    half = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in state.items()}
    save_tensors(out, half, about)
    e, r = run.experiment, run.record
    inputs = shared_inputs(build(Experiment, about["experiment"]))
    predictor, rows = load_model(out, inputs=inputs), []
    for test in dict.fromkeys((*tests, *choice)):
        data = load_data(test, run.data_root)
        refuse_overlap(run.training_data, data)
        inputs.prepare(data)
        protocols = ["ufo", "native"] * (test in tests)
        ours = evaluate_all(predictor, data, protocols, what="released model on") if protocols else {}
        if test in choice:
            ours["choice"] = evaluate_choice(predictor, data, what="released model on")["choice"]
        theirs = baseline.evaluate(data, list(ours)) if baseline else {}
        for protocol, found in ours.items():
            cells = [f"{100 * found.summary[m]:.1f}" for m in "PJ"]
            cells += [f"{100 * theirs[protocol].summary[m]:.1f}" if theirs else "–" for m in "PJ"]
            rows.append(f"| {data.name} ({found.summary['images']}) | {protocol} | {' | '.join(cells)} |")
    import jinja2

    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    card = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(template).render(
        file=out.name, sha256=file_digest(out, 64), run=run.path.name, e=e, about=about, record=r, rows=rows,
        seconds=duration(r["seconds"]) if "seconds" in r else "",
    )  # fmt: skip
    write_text(out.with_suffix(".md"), card + "\n")
    return out.with_suffix(".md")
