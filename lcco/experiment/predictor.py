"""A trained network with its frozen parts: masks of any set, and the model file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcco.backbones import about_start, read_about, read_tensors
from lcco.common import LCCoError
from lcco.config import TRAINING_VERSION, Experiment, validated
from lcco.data import CoSegData
from lcco.experiment.features import Features, make_features
from lcco.model import LCCo, Output
from lcco.semantics import Vocabulary, make_vocabulary
from lcco.store import atomic_path

# Settings that older model files name and that are constants now.
OLD = {"tower": ("temperature", "top"), "model": ("heads",), "train": ("halve_every", "checkpoint")}


def build_model(experiment: Experiment, features: Features, vocabulary: Vocabulary) -> LCCo:
    """The network of an experiment, initialised from its seed alone."""
    names = ("width", "isfc", "clip_interaction", "clip_regularization", "isfc_softmax")
    names += ("placement", "strides", "modulation_residual", "mlp3", "mlp3_skip", "k")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        return LCCo(
            backbone=features.backbone, embedding_width=features.tower.width,
            prompts=len(vocabulary.words), logit_scale=features.tower.logit_scale,
            **{name: getattr(experiment.model, name) for name in names},
        ).to(memory_format=torch.channels_last)  # fmt: skip


class Predictor:
    """Masks of any set by a network and its frozen parts.

    gt: "GT semantics", the true class replaces i* and the distilled prompts. k: distilled prompts,
    if not the trained number. keep: keep what is computed of the pictures on disk (right for data
    sets, wrong for pictures seen once). experiment: what made the network, if known.
    """

    def __init__(
        self, model: LCCo, features: Features, vocabulary: Vocabulary, *, gt: bool = False,
        k: int | None = None, keep: bool = True, experiment: Experiment | None = None,
    ) -> None:  # fmt: skip
        self.model = model.eval().to(features.device)
        self.features, self.vocabulary = features, vocabulary
        self.gt, self.k, self.keep, self.experiment = gt, k, keep, experiment

    @torch.no_grad()
    def output(
        self, data: CoSegData, items: Sequence[int], cls: str | None = None,
        return_maps: bool = False,
    ) -> Output:  # fmt: skip
        """The network's `Output` for one set of items. cls: the true class, used with `gt` only."""
        f, device, target = self.features, self.features.device, None
        images, maps = f.visual(data, items, keep=self.keep)
        if self.gt and cls is not None:
            target = torch.tensor([self.vocabulary.nearest(cls, f.tower)], device=device)
        with deterministic(f):
            out = self.model(
                None if images is None else images[None].to(device),
                f.embeddings(data, items, keep=self.keep)[None].to(device),
                self.vocabulary.embeddings.to(device),
                maps=maps and [m[None].to(device).float() for m in maps],
                target=target, k=self.k, return_maps=return_maps,
            )  # fmt: skip
        return out

    def __call__(self, data: CoSegData, items: Sequence[int], cls: str | None = None) -> np.ndarray:
        """Mask probabilities [n, S, S] in 0..1 of one set of items."""
        return self.output(data, items, cls).logits[0].float().sigmoid().cpu().numpy()

    def words(self, out: Output, n: int = 5) -> list[tuple[str, float]]:
        """The set's most likely words with their probabilities: Eq. 7's v, else by similarity."""
        v = out.v
        if v is None:
            v = (out.similarity.mean(dim=1) * self.features.tower.logit_scale).softmax(dim=-1)
        order = v[0].argsort(descending=True)[:n].tolist()
        return [(self.vocabulary.words[i], float(v[0, i])) for i in order]


def trained_state(model: LCCo) -> dict[str, Tensor]:
    """All but the frozen backbone stages, which their own weights file holds."""
    frozen = tuple(f"backbone.stages.{n}." for n in range(model.backbone.frozen_stages))
    return {k: v for k, v in model.state_dict().items() if not (frozen and k.startswith(frozen))}


def trained_on(experiment: Experiment) -> list[dict[str, Any]]:
    """The data settings of every training behind a model: its own, then those of its starts."""
    starts = filter(None, map(about_start, (experiment.model.weights, experiment.train.start)))
    own = experiment.data.model_dump(mode="json")
    return [own, *(part for about in starts for part in trained_on_of(about))]


def trained_on_of(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same of a model file's description; older ones list names of training sets alone."""
    own = about["experiment"]["data"]
    known = about.get("trained_on", [own])
    return known if isinstance(known[0], dict) else [own | {"train": known}]


def save_model(
    path: Path, state: Mapping[str, Tensor], experiment: Experiment, features: Features,
    vocabulary: Vocabulary, **about: Any,
) -> None:  # fmt: skip
    """Write a model file: tensors, and beside them what is needed to build the network again."""
    from safetensors.torch import save_file

    about |= {
        "experiment": experiment.model_dump(mode="json"), "training_version": TRAINING_VERSION,
        "vocabulary_hash": vocabulary.hash, "words": list(vocabulary.words),
        "tower": features.tower.identity, "backbone": features.backbone.identity,
        "trained_on": trained_on(experiment),
    }  # fmt: skip
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    with atomic_path(path) as part:
        save_file(tensors, part, {"lcco": json.dumps(about, sort_keys=True)})


def read_experiment(tree: Mapping[str, Any]) -> Experiment:
    """The experiment in a model file or record; what older ones name and is constant now goes."""
    return validated(Experiment, {
        part: {k: v for k, v in value.items() if k not in OLD.get(part, ())}
        if isinstance(value, Mapping) else value for part, value in tree.items()
    })  # fmt: skip


def load_model(
    path: str | Path, *, features: Features | None = None, vocabulary: Vocabulary | None = None,
    device: str | None = None, changes: Mapping[str, Any] | None = None,
) -> Predictor:  # fmt: skip
    """The predictor in a model file. changes: settings to put over the stored ones.

    Raises: Missing without the file; LCCoError where it is damaged, or where vocabulary, tower or
    frozen backbone are not those that it was trained with.
    """
    about, changes = read_about(path), changes or {}
    experiment = read_experiment(about["experiment"]).replace(changes)
    features = features or make_features(experiment, device)
    vocabulary = vocabulary or make_vocabulary(features.tower, experiment.tower)
    check_words(path, about, experiment, vocabulary)
    if not any(key.startswith("tower.") for key in changes):
        _check(path, about, "tower", features.tower.identity)
    if features.backbone.frozen_stages and not any(key.startswith("model.") for key in changes):
        _check(path, about, "backbone", features.backbone.identity)
    model = build_model(experiment, features, vocabulary)
    state = {k: v.float() if v.is_floating_point() else v for k, v in read_tensors(path).items()}
    if missing := set(trained_state(model)) - set(state):
        what = f"{len(missing)} tensors missing, {min(missing)} first"
        raise LCCoError(f"{path}: does not fit its own settings: {what}")
    model.load_state_dict(state, strict=False)
    return Predictor(model, features, vocabulary, experiment=experiment)


def check_words(
    path: str | Path, about: Mapping[str, Any], experiment: Experiment, vocabulary: Vocabulary
) -> None:
    """Raises: LCCoError where MLP3, whose outputs are the words in their order, has others."""
    if experiment.model.clip_regularization and experiment.model.mlp3 == "vocabulary":
        _check(path, about, "vocabulary", vocabulary.hash)


def _check(path: str | Path, about: Mapping[str, Any], part: str, now: str) -> None:
    then = about.get("vocabulary_hash" if part == "vocabulary" else part, now)
    if then != now:
        said = f"trained with another {part} ({then}) than its settings give now ({now})"
        raise LCCoError(f"{path}: {said}; put that {part}'s files back, or train again")


@contextlib.contextmanager
def deterministic(features: Features) -> Iterator[None]:
    """Same bits on the same machine's CPU: ordered sums in backward passes, a number of threads.

    Not on a GPU, where ordered sums (of bilinear upsampling above all) multiply a step's time.
    """
    setting, threads = torch.utils.deterministic, torch.get_num_threads()
    before, fill = torch.get_deterministic_debug_mode(), setting.fill_uninitialized_memory
    torch.use_deterministic_algorithms(not torch.cuda.is_available(), warn_only=True)
    setting.fill_uninitialized_memory = False  # a tenth of a step's time
    if features.backbone.frozen_stages == 4:  # the rest is small, and two runs then fit two cores
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        setting.fill_uninitialized_memory = fill
        torch.set_num_threads(threads)
