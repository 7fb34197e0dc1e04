"""Training: one loop on Hugging Face Accelerate, from settings to weights, resumable to the bit on a CPU."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcco.backbones import about_start, model_file, read_about, read_tensors
from lcco.common import LCCoError, atomic_path, progress
from lcco.config import Experiment, build
from lcco.data import CoSegData, GroupSampler, load_data
from lcco.inputs import Inputs, save_tensors
from lcco.losses import total_loss
from lcco.metrics import consecutive_groups, jaccard
from lcco.model import LCCo, Output


def build_model(experiment: Experiment, inputs: Inputs) -> LCCo:
    """The network of an experiment, initialised from its seed alone."""
    m = experiment.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        return LCCo(
            backbone=inputs.backbone, embedding_width=inputs.tower.width, prompts=len(inputs.words),
            logit_scale=inputs.tower.logit_scale, width=m.width, isfc=m.isfc, clip_interaction=m.clip_interaction,
            clip_regularization=m.clip_regularization, isfc_softmax=m.isfc_softmax, placement=m.placement,
            strides=m.strides, modulation_residual=m.modulation_residual, mlp3=m.mlp3, mlp3_skip=m.mlp3_skip,
            heads=m.heads, k=m.k,
        ).to(memory_format=torch.channels_last)  # fmt: skip


def _begin_from(model: LCCo, experiment: Experiment, inputs: Inputs) -> None:
    """Fill all but the backbone with the weights of `train.start`. Raises: LCCoError if that model is another."""
    file = model_file(experiment.train.start, "train.start")
    _check_words(file, read_about(file), experiment, inputs)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    state = read_tensors(file)
    if wrong := [k for k, v in own.items() if k not in state or state[k].shape != v.shape]:
        raise LCCoError(f"{file}: not a model of these settings: `{wrong[0]}` differs ({len(wrong)} tensors)")
    model.load_state_dict({k: state[k] for k in own}, strict=False)


def learning_rate(experiment: Experiment, step: int) -> float:
    """The factor on the learning rates at a step (0-based): warm-up, then `halving` or `cosine`."""
    t = experiment.train
    if step < t.warmup:
        return (step + 1) / t.warmup
    if t.schedule == "halving":
        return 0.5 ** (step // t.halve_every)
    return 0.5 * (1 + math.cos(math.pi * (step - t.warmup) / max(1, t.steps - t.warmup)))


class Predictor:
    """A trained network with its frozen parts: gives masks of any set, through the caches.

    gt: "GT semantics", the true class replaces i* and the distilled prompts. k: distilled prompts, if not the
    trained number. flip: mean of the plain and the mirrored picture's masks (a setting, off in headline rows).
    cached: keep frozen maps on disk (right for data sets, wrong for pictures seen once). experiment: what made it.
    """

    def __init__(
        self, model: LCCo, inputs: Inputs, *, gt: bool = False, k: int | None = None, flip: bool = False,
        cached: bool = True, experiment: Experiment | None = None,
    ):  # fmt: skip
        self.model, self.inputs, self.gt, self.k, self.flip, self.cached = model, inputs, gt, k, flip, cached
        self.experiment = experiment or inputs.experiment  # that of `inputs`, which models share, may change

    @torch.no_grad()
    def output(
        self, data: CoSegData, items: Sequence[int], cls: str | None = None, *, return_maps: bool = False,
        flipped: bool = False,
    ) -> Output:  # fmt: skip
        """The network's `Output` for one set of items. cls: the true class, used with `gt` only."""
        device = self.inputs.device
        images, maps = self.inputs.visual(data, items, [flipped] * len(items), cached=self.cached)
        target = None
        if self.gt and cls is not None:
            target = torch.tensor([self.inputs.nearest_word(cls)], device=device)
        mode = self.model.training
        if mode:
            self.model.eval()
        if next(self.model.parameters()).device != torch.device(device):
            self.model.to(device)
        with deterministic(training_threads(self.inputs)):
            out = self.model(
                None if images is None else images[None].to(device),
                self.inputs.embeddings(data, items)[None].to(device),
                self.inputs.prompts.to(device),
                maps=None if maps is None else [m[None].to(device).float() for m in maps],
                target=target, k=self.k, return_maps=return_maps,
            )  # fmt: skip
        if mode:
            self.model.train()
        return out

    def __call__(self, data: CoSegData, items: Sequence[int], cls: str | None = None) -> np.ndarray:
        """Mask probabilities [n, S, S] in 0..1 of one set of items."""
        p = self.output(data, items, cls).logits[0].float().sigmoid()
        if self.flip:
            p = (p + self.output(data, items, cls, flipped=True).logits[0].float().sigmoid().flip(-1)) / 2
        return p.float().cpu().numpy()

    def words(self, out: Output, n: int = 5) -> list[tuple[str, float]]:
        """The set's most likely words with their probabilities: Eq. 7's v, or without it softmax of the summed S."""
        scores = out.v
        if scores is None:
            scores = (out.similarity.mean(dim=1) * self.inputs.tower.logit_scale).softmax(dim=-1)
        top = scores[0].topk(min(n, scores.shape[-1]))
        return [(self.inputs.words[i], float(s)) for s, i in zip(top.values, top.indices.tolist(), strict=True)]


def holdout_score(predict: Predictor, data: CoSegData, group_size: int) -> float:
    """Mean J over the held-out images, at network size and threshold 0.5, sets in sorted order."""
    scores: list[float] = []
    for cls, indices in data.groups.items():
        for members, scored in consecutive_groups(list(indices), group_size, repeat=False):
            for i, p in list(zip(members, predict(data, members, cls), strict=True))[:scored]:
                scores.append(jaccard(p > 0.5, predict.inputs.truth(data, i, (cls,)), empty="one") or 0.0)
    return float(np.mean(scores))


def trained_state(model: LCCo) -> dict[str, Tensor]:
    """What a training changes: everything but the frozen backbone stages, which their own weights file holds."""
    frozen = tuple(f"backbone.stages.{n}." for n in range(model.backbone.frozen_stages))
    return {k: v for k, v in model.state_dict().items() if not (frozen and k.startswith(frozen))}


def save_weights(path: Path, state: dict[str, Tensor], experiment: Experiment, inputs: Inputs, **about: Any) -> None:
    """Write a model file: tensors, and beside them what is needed to build the network again."""
    about = {
        "experiment": asdict(experiment), "vocabulary_hash": inputs.vocabulary_hash, "words": inputs.words,
        "tower": inputs.tower.identity, "backbone": inputs.backbone.identity, **about,
    }  # fmt: skip
    if (seen := trained_on(experiment)) != list(experiment.data.train):
        about["trained_on"] = seen
    save_tensors(path, {k: v.detach().cpu() for k, v in state.items()}, about)


def trained_on(experiment: Experiment) -> list[str]:
    """The names of every set that an experiment's weights have seen: its own, and those of what they start from."""
    names = list(experiment.data.train)
    for name, setting in ((experiment.model.weights, "model.weights"), (experiment.train.start, "train.start")):
        if about := about_start(name, setting):
            names += about.get("trained_on") or about["experiment"]["data"]["train"]
    return list(dict.fromkeys(names))


def load_model(path: Path, *, device: str = "cpu", inputs: Inputs | None = None, **changes: Any) -> Predictor:
    """A predictor from a model file. changes: settings to put over the stored ones, e.g. `{"tower.weights": path}`.

    Raises: LCCoError where the file is damaged, or where the vocabulary is not the one that it was trained with.
    """
    about = read_about(path)
    experiment = build(Experiment, about["experiment"]).replace(changes)
    inputs = inputs or Inputs(experiment, device=device)
    _check_words(path, about, experiment, inputs)
    _check_parts(path, about, inputs, changes)
    model = build_model(experiment, inputs)
    state = {k: v.float() if v.is_floating_point() else v for k, v in read_tensors(path).items()}
    missing = set(trained_state(model)) - set(state)
    if missing:
        raise LCCoError(f"{path}: does not fit its own settings: {len(missing)} tensors missing, {min(missing)} first")
    model.load_state_dict(state, strict=False)
    return Predictor(model.eval(), inputs, experiment=experiment)


def _check_words(path: Path, about: dict[str, Any], experiment: Experiment, inputs: Inputs) -> None:
    tied = experiment.model.clip_regularization and experiment.model.mlp3 == "vocabulary"
    if tied and inputs.vocabulary_hash != about["vocabulary_hash"]:
        raise LCCoError(
            f"{path}: trained with another vocabulary ({len(about['words'])} words, {about['vocabulary_hash']}) than "
            f"`{experiment.tower.vocabulary}` ({len(inputs.words)} words, {inputs.vocabulary_hash}); MLP3's "
            "weights are tied to the words and their order: use that vocabulary, or train again"
        )


def _check_parts(path: Path, about: dict[str, Any], inputs: Inputs, changes: Iterable[str]) -> None:
    """A model goes with the frozen parts that it was trained with; `changes` says which others were asked for."""
    parts = {"tower": inputs.tower.identity}
    if inputs.backbone.frozen_stages:  # a backbone that was trained whole is in the file
        parts["backbone"] = inputs.backbone.identity
    for part, now in parts.items():
        asked = any(c.startswith("tower." if part == "tower" else "model.") for c in changes)
        if not asked and about.get(part, now) != now:
            raise LCCoError(
                f"{path}: trained with another {part} ({about[part]}) than its settings give now ({now}); put that "
                f"{part}'s files back, or train again"
            )


@contextlib.contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Same bits on the same machine's CPU: ordered sums in backward passes, and a fixed number of threads.

    Not on a GPU, where ordered sums (of bilinear upsampling above all) would multiply the time of a step.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    threads_before, fill = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(not torch.cuda.is_available(), warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a check for debugging: a tenth of a step's time
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.set_num_threads(threads_before)


def training_threads(inputs: Inputs) -> int:
    """What is left of a frozen network is small: one thread serves it best, and two trainings fit two cores."""
    return 1 if inputs.backbone.frozen_stages == 4 else torch.get_num_threads()


def prepare(
    experiment: Experiment, inputs: Inputs, data_root: Path | None = None
) -> tuple[CoSegData, CoSegData | None]:
    """The training and held-out sets of an experiment, with everything frozen that training needs of them cached."""
    data, holdout = (
        load_data("+".join(names), data_root) if names else None
        for names in (experiment.data.train, experiment.data.holdout)
    )
    inputs.prepare(data, flip=experiment.data.flip, truth=True)
    if holdout:
        inputs.prepare(holdout)
    return data, holdout


def train(
    experiment: Experiment, folder: Path, *, inputs: Inputs | None = None, stop_at: int | None = None,
    tensorboard: bool = False, data_root: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train an experiment into a folder, going on from its checkpoint if there is one.

    Writes `last.safetensors`, `best.safetensors` (highest J on `data.holdout`), `metrics.jsonl` and, until it is
    done, `checkpoint.pt`. stop_at: leave after that many steps, as an interruption would. Returns a summary.
    Raises: LCCoError for a damaged checkpoint, one of other settings, or one of data that were edited since.
    """
    inputs = inputs or Inputs(experiment, device="cuda" if torch.cuda.is_available() else "cpu")
    data, holdout = prepare(experiment, inputs, data_root)
    with deterministic(training_threads(inputs)):
        return _train(experiment, folder, inputs, data, holdout, stop_at, tensorboard)


def _train(
    experiment: Experiment, folder: Path, inputs: Inputs, data: CoSegData, holdout: CoSegData | None,
    stop_at: int | None, tensorboard: bool,
) -> dict[str, Any]:  # fmt: skip
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    t, d = experiment.train, experiment.data
    AcceleratorState._reset_state()  # it is global, and refuses a second training at another precision
    accelerator = Accelerator(
        mixed_precision=t.precision, log_with="tensorboard" if tensorboard else None, project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )  # fmt: skip
    if tensorboard:
        accelerator.init_trackers("tensorboard")
    model = build_model(experiment, inputs)
    checkpoint = folder / "checkpoint.pt"
    if t.start and not checkpoint.is_file():
        _begin_from(model, experiment, inputs)
    model.to(accelerator.device)
    of_backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("backbone.")]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "lr": t.lr}] + ([{"params": of_backbone, "lr": t.backbone_lr}] if of_backbone else []),
        weight_decay=t.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(experiment, step))
    ema = {k: v.detach().clone() for k, v in trained_state(model).items()} if t.ema else None
    state: dict[str, Any] = {"step": 0, "best": -1.0, "best_step": 0, "seconds": 0.0}
    if checkpoint.is_file():
        saved = _read_checkpoint(checkpoint)
        try:
            model.load_state_dict(saved["model"], strict=False)
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
        except (KeyError, ValueError, RuntimeError):
            raise LCCoError(f"{checkpoint}: from other settings; remove it and start again") from None
        same_data(checkpoint, data, saved)
        ema, state = saved["ema"], saved["state"]
    elif accelerator.is_main_process:  # of a start that was given up
        (folder / "best.safetensors").unlink(missing_ok=True)
    if ema is not None:  # checkpoints are read on the CPU
        ema = {k: v.to(accelerator.device) for k, v in ema.items()}
    before = state["seconds"]
    if accelerator.is_main_process:
        _cut_log(folder / "metrics.jsonl", state["step"])
    net, optimizer = accelerator.prepare(model, optimizer)
    sampler = GroupSampler(
        data, groups=d.groups * accelerator.num_processes, group_size=d.group_size, seed=experiment.seed,
        class_sampling=d.class_sampling, paired=d.paired, absent=d.absent, flip=d.flip, crop=d.crop,
    )  # fmt: skip
    text = inputs.prompts.to(accelerator.device)
    last = min(stop_at or t.steps, t.steps)

    def make(step: int) -> Any:
        return inputs.batch(data, sampler.draws(step)[accelerator.process_index :: accelerator.num_processes])

    def save(name: str, score: float | None) -> None:
        weights = ema if ema is not None else trained_state(model)
        save_weights(folder / name, weights, experiment, inputs, step=state["step"], holdout_J=score)

    def keep() -> None:
        if accelerator.is_main_process:
            with atomic_path(checkpoint) as part:
                torch.save(
                    {
                        "model": trained_state(model), "optimizer": optimizer.state_dict(),
                        "scheduler": scheduler.state_dict(), "ema": ema, "state": state, "data": data.identity(),
                    },
                    part,
                )  # fmt: skip

    folder.mkdir(parents=True, exist_ok=True)
    log = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
    began, since_kept = time.monotonic(), time.monotonic()
    sums, summed = dict[str, Tensor](), 0
    with contextlib.closing(log), ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(make, state["step"]) if state["step"] < last else None
        for step in progress(range(state["step"], last), f"training {experiment.name} (seed {experiment.seed})"):
            batch = coming.result().to(accelerator.device)
            coming = ahead.submit(make, step + 1) if step + 1 < last else None
            net.train()
            with accelerator.autocast():
                out = net(batch.images, batch.embeddings, text, maps=batch.maps, present=batch.present)
            out.logits = out.logits.float()
            loss, parts = total_loss(
                out, batch.truth, batch.present, batch.true, lambda_cs=experiment.loss.lambda_cs,
                lambda_c=experiment.loss.lambda_c, lc_reduction=experiment.loss.lc_reduction, bce=experiment.loss.bce,
            )  # fmt: skip
            if accelerator.num_processes > 1:  # they wait for the gradient of every output, of a loss left out as well
                loss = loss + 0 * sum(o.float().sum() for o in (out.logits, out.coarse, out.v) if o is not None)
            accelerator.backward(loss)
            if t.clip:
                accelerator.clip_grad_norm_(net.parameters(), t.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                # The first steps' average is short, so that it does not drag the initial weights along.
                _average(ema, trained_state(model), min(t.ema, (1 + step) / (10 + step)))
            state["step"] = step + 1
            for name, part in {"loss": loss, **parts}.items():
                sums[name] = sums.get(name, 0) + part.detach()
            summed += 1
            due = state["step"] % t.eval_every == 0 or state["step"] == t.steps
            if state["step"] % 50 == 0 or due:
                line = {k: float(v) / summed for k, v in sums.items()}
                sums, summed = {}, 0
                if not math.isfinite(line["loss"]):
                    raise LCCoError(
                        f"{folder.name}: the loss is {line['loss']} at step {step + 1}; lower `train.lr`, or set "
                        "`train.clip`. Weights saved before are kept"
                    )
                line |= {"step": state["step"], "lr": scheduler.get_last_lr()[0]}
                if due and holdout:
                    with _weights(model, ema):
                        line["holdout_J"] = holdout_score(Predictor(model, inputs), holdout, d.group_size)
                if accelerator.is_main_process:
                    log.write(json.dumps({k: round(v, 6) for k, v in line.items()}) + "\n")
                    log.flush()
                    if tensorboard:
                        accelerator.log(line, step=state["step"])
                    if line.get("holdout_J", -1.0) > state["best"]:
                        state["best"], state["best_step"] = line["holdout_J"], state["step"]
                        save("best.safetensors", line["holdout_J"])
            # A checkpoint at the same steps however the run is cut: sums restart at a log line.
            if (time.monotonic() - since_kept > 60 and state["step"] % 50 == 0) or due or state["step"] == last:
                state["seconds"] += time.monotonic() - began
                began = since_kept = time.monotonic()
                keep()
    if state["step"] >= t.steps and accelerator.is_main_process:
        save("last.safetensors", None)
        checkpoint.unlink(missing_ok=True)
    if tensorboard:
        accelerator.end_training()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    return {**state, "seconds_before": before, "parameters": trained, "parameters_all": everything}


def _average(ema: dict[str, Tensor], now: dict[str, Tensor], decay: float) -> None:
    floats = [k for k, v in ema.items() if v.is_floating_point()]
    torch._foreach_lerp_([ema[k] for k in floats], [now[k].detach() for k in floats], 1 - decay)
    for k in set(ema) - set(floats):
        ema[k].copy_(now[k])


@contextlib.contextmanager
def _weights(model: LCCo, ema: dict[str, Tensor] | None) -> Iterator[None]:
    """The model with the averaged weights inside, its own again afterwards."""
    if ema is None:
        yield
        return
    own = {k: v.detach().clone() for k, v in trained_state(model).items()}
    model.load_state_dict(ema, strict=False)
    try:
        yield
    finally:
        model.load_state_dict(own, strict=False)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and runtime errors all mean the same to a user
        raise LCCoError(
            f"{path}: damaged ({type(error).__name__}); remove it to train again from the start"
        ) from None


def same_data(checkpoint: Path, data: CoSegData, saved: dict[str, Any] | None = None) -> None:
    """Raises: LCCoError where the training data were edited since a checkpoint (as `saved`, if read) was written."""
    saved = saved or _read_checkpoint(checkpoint)
    if saved.get("data", data.identity()) != data.identity():
        raise LCCoError(f"{checkpoint}: {data.name} was edited since; remove it and start again")


def _cut_log(path: Path, step: int) -> None:
    """Drop log lines written after the checkpoint that a run goes on from."""
    if path.is_file():
        whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
        path.write_text("".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= step))
