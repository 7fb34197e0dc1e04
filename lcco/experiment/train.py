"""Training: one loop on Hugging Face Accelerate, resumable to the bit on a CPU."""

import io
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from lcco import __version__
from lcco.backbones import model_file, reading
from lcco.common import LCCoError, progress
from lcco.config import Experiment
from lcco.data import CoSegData, GroupSampler, load_data
from lcco.experiment.features import deterministic, make_features
from lcco.experiment.predictor import Predictor, build_model, fill, save_model, trained_state
from lcco.losses import total_loss, true_class
from lcco.metrics import consecutive_groups, count
from lcco.semantics import make_vocabulary, target_word
from lcco.store import atomic_path, write_text

PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "accelerate", "numpy")
HALVE_EVERY = 20_000  # steps, of the schedule "halving"
LOG_EVERY = 50


def environment(root: Path = Path(__file__).parents[2]) -> dict[str, Any]:
    """Where something was computed: commit, whether the code had edits (dirty), machine, versions.

    commit and dirty are None where the code does not stand in its own checkout.
    """

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout
        except OSError:  # no git here
            return ""

    ours = git("ls-files", "lcco/common.py")  # an installed package may lie in another repository
    return {
        "commit": git("rev-parse", "HEAD").strip() if ours else None,
        "dirty": bool(git("status", "--porcelain", "--", "lcco")) if ours else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "platform": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count(),
        "versions": {name: metadata.version(name) for name in PACKAGES} | {"lcco": __version__},
        "threads": torch.get_num_threads(), "python": platform.python_version()}  # fmt: skip


def training_data(experiment: Experiment) -> tuple[CoSegData, CoSegData | None]:
    """The training set and the holdout; what `data.without` names is left out of both."""
    d = experiment.data
    how = {"counts": d.counts, "without": d.without}
    return load_data(d.train, **how), load_data(d.holdout, **how) if d.holdout else None


def learning_rate(experiment: Experiment, step: int) -> float:
    """The factor on the learning rates at a step (0-based): warm-up, then `halving` or `cosine`."""
    t = experiment.train
    if step < t.warmup:
        return (step + 1) / t.warmup
    if t.schedule == "halving":
        return 0.5 ** (step // HALVE_EVERY)
    return 0.5 * (1 + math.cos(math.pi * (step - t.warmup) / max(1, t.steps - t.warmup)))


def v_gt_source(e: Experiment) -> str | None:
    """Who names the true class, "tower" or "name"; None where nothing needs to know it."""
    return e.loss.v_gt if e.model.clip_regularization and e.loss.lambda_c else None


def holdout_score(predict: Predictor, data: CoSegData, group_size: int) -> float:
    """Mean J over held-out images, at network size and threshold 0.5, sets in sorted order."""
    scores: list[float] = []
    for cls, indices in data.groups.items():
        for members, scored in consecutive_groups(list(indices), group_size, repeat=False):
            for i, p in list(zip(members, predict(data, members, cls), strict=True))[:scored]:
                truth = predict.features.truth(data, i, (cls,))
                scores.append(count(p > 0.5, truth).jaccard("one"))
    return float(np.mean(scores))


class Trainer:
    """Trains an experiment into a folder; with `few`, on so many pictures alone, to time it.

    `fit` writes `metrics.jsonl`, `best.safetensors` (highest J on the holdout),
    `last.safetensors`, and `checkpoint.pt`, from which an interrupted training goes on.
    """

    def __init__(self, experiment: Experiment, folder: Path, few: int | None = None) -> None:
        self.experiment, self.folder, d = experiment, Path(folder), experiment.data
        self.data, self.holdout = training_data(experiment)
        if both := sorted(set(d.train) & set(d.holdout)):
            said = f"`data.holdout` names {', '.join(both)}, as `data.train` does"
            print(f"{said}: weights are chosen on pictures of training", file=sys.stderr)
        if few:
            items = range(min(few, len(self.data)))
            d = d.model_copy(update=dict.fromkeys(("given", "absent", "paired"), 0))  # as dear
            self.data, self.holdout = self.data.subset(items, f"{few} of {self.data.name}"), None
        self.features = make_features(experiment)
        self.vocabulary = make_vocabulary(self.features.tower, experiment.tower)
        self.checkpoint = self.folder / "checkpoint.pt"
        # Autocast is switched on in `step` alone, so that validation runs as later scoring does.
        self.accelerator = a = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
        self.model = build_model(experiment, self.features, self.vocabulary).to(a.device)
        if start := experiment.train.start:
            fill(self.model, model_file(start), self.features, self.vocabulary, start=True)
        # What is validated and saved: the weights' moving average, or the weights themselves.
        self.averaged = deepcopy(self.model) if experiment.train.ema else self.model
        states = (trained_state(model).values() for model in (self.averaged, self.model))
        self.means = list(zip(*states, strict=True))  # a mean, and what it follows
        self.net, self.optimizer = a.prepare(self.model, self._optimizer())
        names = {"group_size", "class_sampling", "paired", "absent", "flip", "crop"}
        m, how = experiment.model, {"groups": d.groups * a.num_processes, "seed": experiment.seed}
        how["given"] = d.given * (m.clip_interaction or m.clip_regularization)  # who can be told
        self.sampler = GroupSampler(self.data, **d.model_dump(include=names), **how)
        self.learned = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.state = {"step": 0, "best": -1.0, "best_step": 0, "seconds": 0.0, "machines": []}
        self.log: list[dict[str, float]] = []  # the lines of `metrics.jsonl`
        self.since: list[dict[str, Tensor]] = []  # losses since the last of them

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW, with a group of parameters for each learning rate."""
        t = self.experiment.train
        rates = {"backbone.": t.backbone_lr, "clip_regularization.mlp3": t.lr * t.mlp3_lr, "": t.lr}
        parts: dict[str, list[Tensor]] = {part: [] for part in rates}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                parts[next(part for part in rates if name.startswith(part))].append(p)
        groups = [{"params": parts[n], "lr": r, "full_lr": r} for n, r in rates.items() if parts[n]]
        return torch.optim.AdamW(groups, weight_decay=t.weight_decay, fused=True)

    def fit(self, stop_at: int | None = None) -> dict[str, Any]:
        """Train from the checkpoint, if there is one, to the last step, or to `stop_at`.

        Returns a summary. Raises: LCCoError as `restore`, and where the loss is not finite.
        """
        self.restore()
        e, t = self.experiment, self.experiment.train
        steps = range(self.state["step"], min(stop_at or t.steps, t.steps))
        background = e.loss.mask_background if v_gt_source(e) == "tower" else None
        self.features.prepare(self.data, flip=e.data.flip, background=background)
        if self.holdout:
            self.features.prepare(self.holdout)
        with deterministic(self.features), ThreadPoolExecutor(1) as loader:
            here, before = environment(), self.state["machines"]
            self.state["machines"] = [one for one in before if one != here] + [here]
            began = saved = time.monotonic()
            coming = loader.submit(self.batch, steps.start)
            what = f"training {e.name} (seed {e.seed})"
            for n in progress((step + 1 for step in steps), what, len(steps)):
                batch = send_to_device(coming.result(), self.accelerator.device)
                coming = loader.submit(self.batch, n)  # while this one is learned from
                self.since.append(self.step(batch))
                due = n % t.eval_every == 0 or n == t.steps
                if logged := due or n % LOG_EVERY == 0:
                    self._log(due)
                self.state["seconds"] += time.monotonic() - began
                began = time.monotonic()
                # Only after a line of the log, so that a log is the same however a run was cut.
                if due or n == steps.stop or (logged and began - saved > 60):
                    self.save()
                    saved = began
        if self.state["step"] >= t.steps:
            self._save_weights("last")
        return self.state | {"parameters": self.learned}

    def batch(self, step: int) -> dict[str, Any]:
        """This process's groups of a step (0-based), B of N images, on the CPU.

        images: [B, N, 3, S, S] in 0..1, or None; maps: the leading frozen ones [B, N, C, h, w], or
        None; embeddings: [B, N, D]; truth: uint8 [B, N, S, S] of {0, 1, 255 = void}; true: [B] the
        class that v^gt marks, −1 = unknown, or None; given: [B] those that the network is told.
        """
        f, a, source = self.features, self.accelerator, v_gt_source(self.experiment)
        draws = self.sampler.draws(step)[a.process_index :: a.num_processes]
        pairs, shape = [(i, d.classes) for d in draws for i in d.items], (len(draws), -1)
        items, flips, crops = ([x for d in draws for x in getattr(d, name)]
                               for name in ("items", "flips", "crops"))  # fmt: skip
        images, maps = f.visual(self.data, items, flips, crops)
        truth = f.truth if self.sampler.crop == 1 else f.truth.__wrapped__  # no crop comes again
        truths = [truth(self.data, *p, crop) for p, crop in zip(pairs, crops, strict=True)]
        truths = [t[:, ::-1] if flip else t for t, flip in zip(truths, flips, strict=True)]
        true, given = None, None
        if source == "name":  # −1: no such word, or a group that shares several classes
            single = [d.classes[0] if len(d.classes) == 1 else "" for d in draws]
            words = [target_word(name, self.vocabulary.words) for name in single]
            true = torch.tensor([-1 if word is None else word for word in words])
        elif source == "tower":
            masked = f.masked(self.data, pairs, self.experiment.loss.mask_background)
            masked, every = masked.unflatten(0, shape), torch.ones(1, 1, dtype=torch.bool)
            true = true_class(masked, self.vocabulary.embeddings, every)
        if self.sampler.given:  # −1: not told; L_c leaves the others out, no picture tells it
            near = self.vocabulary.nearest
            given = torch.tensor([near(d.classes[0], f.tower) if d.given else -1 for d in draws])
            true = true if true is None else true.where(given < 0, -1)
        return {
            "given": given, "images": None if images is None else images.unflatten(0, shape),
            "maps": maps and [m.unflatten(0, shape) for m in maps], "true": true,
            "embeddings": f.embeddings(self.data, items).unflatten(0, shape),
            "truth": torch.from_numpy(np.stack(truths)).unflatten(0, shape)}  # fmt: skip

    def step(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """One step of the optimiser. Returns the loss and its parts."""
        e, a = self.experiment, self.accelerator
        maps = batch["maps"] and [m.float() for m in batch["maps"]]
        with torch.autocast(a.device.type, torch.bfloat16, enabled=e.train.precision == "bf16"):
            text = self.vocabulary.embeddings.to(a.device)
            how = {"maps": maps, "target": batch["given"]}
            out = self.net(batch["images"], batch["embeddings"], text, **how)
        weights = e.loss.model_dump(include={"lambda_cs", "lambda_c", "lc_reduction", "bce"})
        present = torch.ones(out.logits.shape[:2], dtype=torch.bool, device=a.device)
        loss, parts = total_loss(out, batch["truth"], present, batch["true"], **weights)
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
        if e.train.ema:
            self._average()
        loss = a.reduce(loss.detach(), "mean")  # of all processes; the parts are this one's
        return {"loss": loss} | {k: v.detach() for k, v in parts.items()}

    @torch.no_grad()
    def _average(self) -> None:
        """Move the average; the first steps' is short, to forget the initial weights."""
        n = self.state["step"]
        decay = min(self.experiment.train.ema, n / (9 + n))
        for mean, now in self.means:
            mean.lerp_(now, 1 - decay) if mean.is_floating_point() else mean.copy_(now)

    def _log(self, due: bool) -> None:
        """A line of `metrics.jsonl`: mean losses since the line before; where due, holdout J."""
        step, line = self.state["step"], {}
        for part in dict.fromkeys(k for one in self.since for k in one):
            line[part] = fmean(float(one[part]) for one in self.since if part in one)
        line |= {"step": step, "lr": self.optimizer.param_groups[-1]["lr"]}
        self.since = []
        if not math.isfinite(line["loss"]):
            said = f"the loss is {line['loss']} at step {step}"
            mend = "lower `train.lr`, or set `train.clip`; weights saved before are kept"
            raise LCCoError(f"{self.folder.name}: {said}; {mend}")
        if due and self.holdout:
            predictor = Predictor(self.averaged, self.features, self.vocabulary)  # as a run's is
            score = holdout_score(predictor, self.holdout, self.experiment.data.group_size)
            self.net.train()
            line["holdout_J"] = score
            if score > self.state["best"]:
                self.state |= {"best": score, "best_step": step}
                self._save_weights("best", score)
        self.log.append({k: round(v, 6) for k, v in line.items()})

    def _save_weights(self, name: str, score: float | None = None) -> None:
        if self.accelerator.is_main_process:
            file, state = self.folder / f"{name}.safetensors", trained_state(self.averaged)
            about = {"step": self.state["step"], "holdout_J": score}
            save_model(file, state, self.experiment, self.features, self.vocabulary, **about)

    def save(self) -> None:
        """Write the log, and the checkpoint that `restore` reads."""
        if self.accelerator.is_main_process:
            own = {"model": trained_state(self.model), "averaged": trained_state(self.averaged)}
            own |= {"optimizer": self.optimizer.state_dict(), "data": self.data.identity()}
            data = io.BytesIO()
            torch.save(own | {"state": self.state, "log": self.log}, data)
            lines = [f"{json.dumps(line)}\n" for line in self.log]
            write_text(self.folder / "metrics.jsonl", "".join(lines))  # before the last checkpoint
            with atomic_path(self.checkpoint) as part:  # see `save_model`
                part.write_bytes(data.getbuffer())

    def restore(self) -> None:
        """Take up the checkpoint, if there is one.

        Raises: LCCoError where it is damaged, or of other settings, or data were edited since.
        """
        if not self.checkpoint.is_file():
            return
        with reading(self.checkpoint, "a checkpoint of this training: remove it to start again"):
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self.model.load_state_dict(saved["model"], strict=False)
            self.averaged.load_state_dict(saved["averaged"], strict=False)
            self.optimizer.load_state_dict(saved["optimizer"])
            self.state, self.log = saved["state"], saved["log"]
            if saved["data"] != self.data.identity():
                raise ValueError(f"{self.data.name} was edited since")
