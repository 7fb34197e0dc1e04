"""Training: one loop on Hugging Face Accelerate, resumable to the bit on a CPU."""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcco.backbones import model_file, read_about, read_tensors
from lcco.common import LCCoError, progress
from lcco.config import Experiment
from lcco.data import CoSegData, GroupSampler
from lcco.experiment.features import Batch, Features, batch
from lcco.experiment.predictor import (
    Predictor,
    build_model,
    check_words,
    deterministic,
    save_model,
    trained_state,
)
from lcco.losses import total_loss
from lcco.metrics import consecutive_groups, jaccard
from lcco.model import LCCo
from lcco.semantics import Vocabulary
from lcco.store import atomic_path, write_text

HALVE_EVERY = 20_000  # steps, of the schedule "halving"
LOG_EVERY = 50
LOSSES = ("loss", "iou", "cs", "c", "bce")


def learning_rate(experiment: Experiment, step: int) -> float:
    """The factor on the learning rates at a step (0-based): warm-up, then `halving` or `cosine`."""
    t = experiment.train
    if step < t.warmup:
        return (step + 1) / t.warmup
    if t.schedule == "halving":
        return 0.5 ** (step // HALVE_EVERY)
    return 0.5 * (1 + math.cos(math.pi * (step - t.warmup) / max(1, t.steps - t.warmup)))


def v_gt_source(experiment: Experiment) -> str | None:
    """Who names the true class, "tower" or "name"; None where nothing needs to know it."""
    e = experiment
    needed = (e.model.clip_regularization and e.loss.lambda_c) or e.data.given
    return e.loss.v_gt if needed else None


def holdout_score(predict: Predictor, data: CoSegData, group_size: int) -> float:
    """Mean J over held-out images, at network size and threshold 0.5, sets in sorted order."""
    scores: list[float] = []
    for cls, indices in data.groups.items():
        for members, scored in consecutive_groups(list(indices), group_size, repeat=False):
            for i, p in list(zip(members, predict(data, members, cls), strict=True))[:scored]:
                truth = predict.features.truth(data, i, (cls,))
                scores.append(jaccard(p > 0.5, truth, empty="one") or 0.0)
    return float(np.mean(scores))


class Trainer:
    """Trains an experiment into a folder.

    `fit` writes `metrics.jsonl`, `best.safetensors` (highest J on the holdout),
    `last.safetensors`, and `checkpoint.pt`, from which an interrupted training goes on.
    """

    def __init__(
        self, experiment: Experiment, folder: Path, features: Features, vocabulary: Vocabulary,
        data: CoSegData, holdout: CoSegData | None,
    ) -> None:  # fmt: skip
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.experiment, self.folder = experiment, Path(folder)
        self.features, self.vocabulary = features, vocabulary
        self.data, self.holdout = data, holdout
        self.checkpoint = self.folder / "checkpoint.pt"
        # Autocast is switched on in `step` alone, so that validation runs as later scoring does.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = a = Accelerator(mixed_precision="no", kwargs_handlers=[unused])
        self.model = build_model(experiment, features, vocabulary).to(a.device)
        if experiment.train.start:
            start_from(self.model, experiment, vocabulary)
        self.net, self.optimizer = a.prepare(self.model, self._optimizer())
        names = {"group_size", "class_sampling", "paired", "absent", "flip", "crop"}
        how, groups = experiment.data.model_dump(include=names), experiment.data.groups
        groups *= a.num_processes
        self.sampler = GroupSampler(data, groups=groups, seed=experiment.seed, **how)
        self.mine = slice(a.process_index, None, a.num_processes)  # of a step's groups
        self.text = vocabulary.embeddings.to(a.device)
        self.learned = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.source = v_gt_source(experiment)
        self.state: dict[str, Any] = {"step": 0, "best": -1.0, "best_step": 0, "seconds": 0.0}
        self.ema: dict[str, Tensor] | None = None
        self.since: list[dict[str, Tensor]] = []  # losses since the last line of the log

    def _optimizer(self) -> torch.optim.Optimizer:
        t, groups = self.experiment.train, {False: [], True: []}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                groups[name.startswith("backbone.")].append(p)
        rates = [(groups[False], t.lr), (groups[True], t.backbone_lr)]
        rates = [{"params": p, "lr": lr, "full_lr": lr} for p, lr in rates if p]
        return torch.optim.AdamW(rates, weight_decay=t.weight_decay)

    def fit(self, stop_at: int | None = None) -> dict[str, Any]:
        """Train from the checkpoint, if there is one, to the last step, or to `stop_at`.

        Returns a summary. Raises: LCCoError for a checkpoint that is damaged, of other settings or
        of data that were edited since, and where the loss is not finite.
        """
        self.restore()
        e, steps, earlier = self.experiment, self.experiment.train.steps, self.state["seconds"]
        background = e.loss.mask_background if self.source == "tower" else None
        self.features.prepare(self.data, flip=e.data.flip, background=background)
        if self.holdout:
            self.features.prepare(self.holdout)
        with deterministic(self.features), ThreadPoolExecutor(1) as loader:
            threads = torch.get_num_threads()
            self._loop(range(self.state["step"], min(stop_at or steps, steps)), loader)
        if self.state["step"] >= steps:
            self._save_weights("last.safetensors")
        more = {"parameters": self.learned, "threads": threads, "seconds_before": earlier}
        return self.state | more

    def _loop(self, steps: range, loader: ThreadPoolExecutor) -> None:
        """The steps; the loader makes a batch while the one before is learned from."""
        began = saved = time.monotonic()
        coming = loader.submit(self.batch, steps.start) if steps else None
        what = f"training {self.experiment.name} (seed {self.experiment.seed})"
        for n in progress((step + 1 for step in steps), what, len(steps)):
            batch = coming.result().to(self.accelerator.device)
            coming = loader.submit(self.batch, n) if n in steps else None
            self.since.append(self.step(batch))
            due = n % self.experiment.train.eval_every == 0 or n == self.experiment.train.steps
            if due or n % LOG_EVERY == 0:
                self._log(due)
            # Only after a line of the log, so that a log is the same however a run was cut.
            rest = time.monotonic() - saved > 60 and n % LOG_EVERY == 0
            if rest or due or n == steps.stop:
                self.state["seconds"] += time.monotonic() - began
                began = saved = time.monotonic()
                self.save()

    def batch(self, step: int) -> Batch:
        """This process's groups of a step (0-based)."""
        return batch(
            self.features, self.vocabulary, self.data, self.sampler.draws(step)[self.mine],
            v_gt=self.source, background=self.experiment.loss.mask_background,
        )  # fmt: skip

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the optimiser. Returns the loss and its parts."""
        e, a = self.experiment, self.accelerator
        if not self.model.training:  # after a validation
            self.net.train()
        with torch.autocast(a.device.type, torch.bfloat16, enabled=e.train.precision == "bf16"):
            out = self.net(
                batch.images, batch.embeddings, self.text, maps=batch.maps, present=batch.present,
                target=self._given(batch),
            )  # fmt: skip
        weights = e.loss.model_dump(include={"lambda_cs", "lambda_c", "lc_reduction", "bce"})
        loss, parts = total_loss(out, batch.truth, batch.present, batch.true, **weights)
        if a.num_processes > 1:  # they wait for the gradient of every output
            every = (out.logits, out.coarse, out.class_logits)
            loss = loss + 0 * sum(o.float().sum() for o in every if o is not None)
        a.backward(loss)
        if e.train.clip:
            a.clip_grad_norm_(self.net.parameters(), e.train.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * learning_rate(e, self.state["step"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state["step"] += 1
        self._average()
        return {k: v.detach() for k, v in {"loss": loss, **parts}.items()}

    def _given(self, batch: Batch) -> Tensor | None:
        """The true class of a share of the groups, which the network is then told; −1 = not."""
        e = self.experiment
        if not e.data.given or batch.true is None:
            return None
        lots = np.random.default_rng((e.seed, self.state["step"], 1)).random(self.sampler.n)
        told = torch.from_numpy(lots < e.data.given)[self.mine].to(batch.true.device)
        return batch.true.where(told, -1)

    @torch.no_grad()
    def _average(self) -> None:
        """The weights' moving average; the first steps' is short, to forget the initial weights."""
        if self.ema is None:
            return
        step, now = self.state["step"], trained_state(self.model)
        decay = min(self.experiment.train.ema, step / (9 + step))
        floats = [k for k, v in self.ema.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.ema[k] for k in floats], [now[k] for k in floats], 1 - decay)
        for k in self.ema.keys() - floats:
            self.ema[k].copy_(now[k])

    def validate(self) -> float:
        """J on the holdout of the weights that would be saved, as a run's predictor would score."""
        own = {k: v.detach().clone() for k, v in trained_state(self.model).items()}
        self.model.load_state_dict(self.ema or own, strict=False)
        predictor = Predictor(self.model, self.features, self.vocabulary)
        score = holdout_score(predictor, self.holdout, self.experiment.data.group_size)
        self.model.load_state_dict(own, strict=False)
        return score

    def _log(self, due: bool) -> None:
        """A line of `metrics.jsonl`: mean losses since the line before; where due, holdout J."""
        step, zero = self.state["step"], torch.zeros((), device=self.accelerator.device)
        means = [sum(one.get(k, zero) for one in self.since) / len(self.since) for k in LOSSES]
        means = self.accelerator.reduce(torch.stack(means), "mean").tolist()  # over processes
        known = set().union(*self.since)
        line = {k: v for k, v in zip(LOSSES, means, strict=True) if k in known}
        line |= {"step": step, "lr": self.optimizer.param_groups[0]["lr"]}
        self.since = []
        if not math.isfinite(line["loss"]):
            said = f"the loss is {line['loss']} at step {step}"
            mend = "lower `train.lr`, or set `train.clip`; weights saved before are kept"
            raise LCCoError(f"{self.folder.name}: {said}; {mend}")
        if due and self.holdout:
            line["holdout_J"] = self.validate()
        if self.accelerator.is_main_process:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps({k: round(v, 6) for k, v in line.items()}) + "\n")
        if line.get("holdout_J", -1.0) > self.state["best"]:
            self.state |= {"best": line["holdout_J"], "best_step": step}
            self._save_weights("best.safetensors")

    def _save_weights(self, name: str) -> None:
        if self.accelerator.is_main_process:
            step, best = self.state["step"], self.state["best"]
            save_model(
                self.folder / name, self.ema or trained_state(self.model), self.experiment,
                self.features, self.vocabulary, step=step,
                holdout_J=best if step == self.state["best_step"] else None,
            )  # fmt: skip

    def save(self) -> None:
        """Write the checkpoint that `restore` reads."""
        if self.accelerator.is_main_process:
            with atomic_path(self.checkpoint) as part:
                state = {"model": trained_state(self.model), "ema": self.ema, "state": self.state}
                state |= {"optimizer": self.optimizer.state_dict(), "data": self.data.identity()}
                torch.save(state, part)

    def restore(self) -> None:
        """Take up the checkpoint, if there is one, and cut the log where it was saved."""
        begun = self.checkpoint.is_file()
        if begun:
            self._load_checkpoint()
        elif self.experiment.train.ema:
            self.ema = {k: v.detach().clone() for k, v in trained_state(self.model).items()}
        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not begun:  # of a start that was given up
            (self.folder / "best.safetensors").unlink(missing_ok=True)
        log = self.folder / "metrics.jsonl"
        if log.is_file():
            lines = [n for n in log.read_text(encoding="utf-8").splitlines() if n.endswith("}")]
            kept = [n for n in lines if json.loads(n)["step"] <= self.state["step"]]
            write_text(log, "".join(f"{n}\n" for n in kept))

    def _load_checkpoint(self) -> None:
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self.model.load_state_dict(saved["model"], strict=False)
            self.optimizer.load_state_dict(saved["optimizer"])
            self.state, data, device = saved["state"], saved["data"], self.accelerator.device
            self.ema = saved["ema"] and {k: v.to(device) for k, v in saved["ema"].items()}
        except Exception as error:  # zip, pickle and shape errors all mean the same to a user
            what = f"damaged, or from other settings ({type(error).__name__})"
            raise LCCoError(f"{self.checkpoint}: {what}; remove it and start again") from None
        if data != self.data.identity():
            what = f"{self.data.name} was edited since; remove it and start again"
            raise LCCoError(f"{self.checkpoint}: {what}")


def start_from(model: LCCo, experiment: Experiment, vocabulary: Vocabulary) -> None:
    """Fill all but the backbone with the weights of `train.start`.

    Raises: LCCoError if that is a model of other settings, or of another vocabulary.
    """
    file = model_file(experiment.train.start)
    check_words(file, read_about(file), experiment, vocabulary)
    own, state = model.state_dict(), read_tensors(file)
    for k in [k for k in own if not k.startswith("backbone.")]:
        if k not in state or state[k].shape != own[k].shape:
            raise LCCoError(f"{file}: not a model of these settings: `{k}` differs")
        own[k].copy_(state[k])
