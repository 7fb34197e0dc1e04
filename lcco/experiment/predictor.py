"""A trained network with its frozen parts: masks of any set, and the model file."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from lcco.backbones import about_start, read_about, read_tensors, reading
from lcco.common import LCCoError
from lcco.config import TRAINING_VERSION, Experiment, typed
from lcco.data import CoSegData
from lcco.experiment.features import Features, deterministic, make_features
from lcco.model import LCCo, Output
from lcco.semantics import Vocabulary, make_vocabulary
from lcco.store import atomic_path

Set = tuple[Sequence[int], str | None]  # items, and their class
AT_ONCE = 40  # pictures through the network at once, of small sets


def build_model(experiment: Experiment, features: Features, vocabulary: Vocabulary) -> LCCo:
    """The network of an experiment, initialised from its seed alone."""
    settings = experiment.model.model_dump(exclude={"backbone", "weights", "frozen_stages"})
    settings |= {"embedding_width": features.tower.width, "logit_scale": features.tower.logit_scale}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        net = LCCo(backbone=features.backbone, prompts=len(vocabulary.words), **settings)
    return net.to(memory_format=torch.channels_last)


@dataclass(eq=False)
class Predictor:
    """Masks of any set by a network and its frozen parts."""

    model: LCCo
    features: Features
    vocabulary: Vocabulary
    gt: bool = False  # "GT semantics": the true class replaces i* and the distilled prompts
    k: int | None = None  # distilled prompts, if not the trained number
    keep: bool = True  # write embeddings and maps to disk; False for pictures seen once
    experiment: Experiment | None = None  # what made the network, if known

    def __post_init__(self) -> None:
        self.model.eval().to(self.features.device)  # not at each set: a third of a small one's time

    @torch.no_grad()
    def output(self, data: CoSegData, *sets: Set) -> Output:
        """The network's `Output` for sets of one size: each its items, and its class (for `gt`)."""
        f, device, target = self.features, self.features.device, None
        items, shape = [i for members, _ in sets for i in members], (len(sets), len(sets[0][0]))
        images, maps = f.visual(data, items, keep=self.keep)
        if self.gt:  # −1: none
            near = [-1 if c is None else self.vocabulary.nearest(c, f.tower) for _, c in sets]
            target = torch.tensor(near, device=device)
        every = images, f.embeddings(data, items, keep=self.keep), *(maps or [])
        every = (x if x is None else x.unflatten(0, shape).to(device).float() for x in every)
        (images, h, *maps), text = every, self.vocabulary.embeddings.to(device)  # [B, N, …] each
        with deterministic(f):
            return self.model(images, h, text, maps=maps, target=target, k=self.k)

    def many(self, data: CoSegData, sets: Iterable[Set]) -> Iterator[np.ndarray]:
        """Mask probabilities [n, S, S] in 0..1 of each set; neighbours of one size run together."""
        for n, alike in groupby(sets, key=lambda one: len(one[0])):
            while batch := list(islice(alike, max(1, AT_ONCE // n))):
                yield from self.output(data, *batch).logits.float().sigmoid().cpu().numpy()

    def __call__(self, data: CoSegData, items: Sequence[int], cls: str | None = None) -> np.ndarray:
        """Mask probabilities [n, S, S] in 0..1 of one set of items."""
        return next(self.many(data, [(items, cls)]))


def trained_state(model: LCCo) -> dict[str, Tensor]:
    """All but the frozen backbone stages, which their own weights file holds."""
    frozen = tuple(f"backbone.stages.{n}." for n in range(model.backbone.frozen_stages))
    return {k: v for k, v in model.state_dict().items() if not k.startswith(frozen)}


def trained_on(experiment: Experiment) -> list[dict[str, Any]]:
    """The data settings of every training behind a model: its own, then those of its starts."""
    out = [experiment.data.model_dump(mode="json")]
    starts = dict.fromkeys((experiment.model.weights, experiment.train.start))
    for about in filter(None, map(about_start, starts)):
        out += about.get("trained_on", [about["experiment"]["data"]])
    return out


def save_model(path: Path, state: Mapping[str, Tensor], experiment: Experiment, features: Features,
               vocabulary: Vocabulary, **about: Any) -> None:  # fmt: skip
    """Write a model file: tensors, and beside them what is needed to build the network again."""
    about |= {
        "experiment": experiment.model_dump(mode="json"), "training_version": TRAINING_VERSION,
        "vocabulary_hash": vocabulary.hash, "words": list(vocabulary.words),
        "tower": features.tower.identity, "backbone": features.backbone.identity,
        "trained_on": trained_on(experiment)}  # fmt: skip
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    with atomic_path(path) as part:  # by Python's own writer, which names a full disk
        part.write_bytes(save(tensors, {"lcco": json.dumps(about, sort_keys=True)}))


def load_model(path: str | Path, **how: Any) -> Predictor:
    """The predictor in a model file. how: of `Predictor`. Raises: Missing without it; as `fill`."""
    with reading(path, "a model of this version of lcco"):
        experiment = typed(read_about(path)["experiment"], Experiment)
    features = make_features(experiment)
    vocabulary = make_vocabulary(features.tower, experiment.tower)
    model = build_model(experiment, features, vocabulary)
    fill(model, path, features, vocabulary)
    return Predictor(model, features, vocabulary, experiment=experiment, **how)


def fill(model: LCCo, path: str | Path, features: Features, vocabulary: Vocabulary,
         start: bool = False) -> None:  # fmt: skip
    """Load a model file into a network; to start a training, all but its backbone.

    Raises: LCCoError where the file is damaged or of other settings, or where tower, frozen
    backbone or (for a P→P MLP3, whose outputs are the words in order) vocabulary are others.
    """
    about, head, state = read_about(path), model.clip_regularization, model.state_dict()
    now = {"tower": features.tower.identity}
    if features.backbone.frozen_stages and not start:
        now["backbone"] = features.backbone.identity
    if head is not None and not head.shared:
        now["vocabulary"] = vocabulary.hash
    then = about | {"vocabulary": about["vocabulary_hash"]}
    for part in [name for name, own in now.items() if then[name] != own]:
        said = f"trained with another {part} ({then[part]}) than is here now ({now[part]})"
        raise LCCoError(f"{path}: {said}; put that {part}'s files back, or train again")
    parts = {k for k in state if not k.startswith("backbone.")} if start else trained_state(model)
    stored = {k: v for k, v in read_tensors(path).items() if k in parts}
    with reading(path, "a model of these settings"):
        model.load_state_dict({k: v for k, v in state.items() if k not in parts} | stored)
