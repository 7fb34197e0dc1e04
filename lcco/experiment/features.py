"""From pictures to a batch: what the frozen parts say of a set is computed once and kept.

Embeddings, masked embeddings and a frozen backbone's maps lie in one memory-mapped file each, so
that a training on frozen features takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lcco.backbones import Backbone, make_backbone
from lcco.common import VOID, digest, place, progress
from lcco.config import Experiment, TowerConfig
from lcco.data import CoSegData, Draw
from lcco.data.pictures import load_square, mask_square
from lcco.losses import true_class
from lcco.semantics import Tower, Vocabulary, make_tower, painted, target_word
from lcco.store import kept

Box = tuple[float, float, float, float]
Pair = tuple[int, tuple[str, ...]]  # an item, and the classes whose union is its truth
TRUTH_BYTES = 2**29  # of true masks that are remembered: decoding them costs more than a step
AT_ONCE = 16  # pictures through the backbone at once: early maps are large


@dataclass
class Batch:
    """One step's tensors, B groups of N images."""

    images: Tensor | None  # [B, N, 3, S, S] in 0..1, where the backbone is live
    maps: list[Tensor] | None  # leading frozen maps, [B, N, C, h, w] each
    embeddings: Tensor  # [B, N, D]
    truth: Tensor  # [B, N, S, S] uint8 of {0, 1, 255 = void}
    present: Tensor  # [B, N]
    true: Tensor | None  # [B] index of the class that v^gt marks, -1 = unknown

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; half-precision maps become float there."""
        maps = self.maps and [m.to(device).float() for m in self.maps]
        rest = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, maps=maps, **rest)


class Features:
    """The frozen tower, the backbone with its leading frozen stages, and what they made of sets.

    size: the side S of the squares that the network sees. stages: how many leading stages' maps
    are kept (default: all that are frozen).
    """

    def __init__(
        self, tower: Tower, backbone: Backbone, size: int, *,
        stages: int | None = None, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.tower, self.backbone, self.size, self.device = tower, backbone, size, device
        self.stages = backbone.frozen_stages if stages is None else stages
        shapes = [(size // 2 ** (n + 2),) * 2 + (c,) for n, c in enumerate(backbone.channels)]
        kept = enumerate(shapes[: self.stages])
        self.row = np.dtype([(str(n), np.float16, shape) for n, shape in kept])  # a picture's maps
        self._identity = backbone.identity if self.stages else ""  # before a training alters it
        self._memo: dict[str, np.ndarray] = {}
        self._truth = lru_cache(maxsize=TRUTH_BYTES // size**2)(
            lambda data, i, classes, crop: mask_square(data.mask(i, classes), size, crop)
        )

    def prepare(
        self, data: CoSegData, *, flip: bool = False, background: str | None = None
    ) -> None:
        """Embed a set ahead. flip: mirrored too. background: its objects too, as `masked` does."""
        self.embeddings(data, [])
        for mirrored in (False, True)[: 1 + flip] if self.stages else ():
            self._maps(data, mirrored)
        if background:
            self.masked(data, [*_rows(data)][:1], background)

    def embeddings(self, data: CoSegData, items: Sequence[int], *, keep: bool = True) -> Tensor:
        """Image embeddings [n, D] of the tower; the set is embedded whole at the first call.

        `keep=False` writes nothing to disk: for pictures seen once.
        """
        recipe = [data.digest(), self.tower.identity]
        stored = self._array("embeddings", recipe, partial(self._embed, data), disk=keep)
        return torch.from_numpy(stored[np.array(items, int)])

    def _embed(self, data: CoSegData) -> np.ndarray:
        first: dict[str, int] = {}  # a picture that stands in two classes is embedded once
        for i in range(len(data)):
            first.setdefault(data.content(i), i)
        items = progress(first.values(), f"embedding {data.name}", len(first))
        vectors = self.tower.encode_images(data.image(i) for i in items).float().numpy()
        row = {content: n for n, content in enumerate(first)}
        return vectors[[row[data.content(i)] for i in range(len(data))]]

    def masked(self, data: CoSegData, pairs: Sequence[Pair], background: str) -> Tensor:
        """Embeddings [n, D] of pictures with all but the object painted over; zero without one.

        background: "zero", black, or "mean", the tower's mean colour.
        """
        recipe, rows = [data.identity(), self.tower.identity, background], _rows(data)
        make = partial(self._embed_masked, data, background)
        stored = self._array("masked", recipe, partial(make, list(rows)))

        def one(pair: Pair) -> np.ndarray:
            if pair in rows:
                return stored[rows[pair]]
            # of several classes, or of one that the picture lacks
            return self._array("masked", [*recipe, pair], partial(make, [pair]), disk=False)[0]

        return torch.from_numpy(np.stack([one(pair) for pair in pairs]))

    def _embed_masked(self, data: CoSegData, background: str, pairs: list[Pair]) -> np.ndarray:
        shown: list[bool] = []

        def pictures() -> Iterator[Image.Image]:
            for i, classes in progress(pairs, f"embedding objects of {data.name}"):
                mask = data.mask(i, classes)
                shown.append(bool((mask == 1).any()))
                yield painted(data.image(i), mask, background, self.tower.mean)

        vectors = self.tower.encode_images(pictures()).float().numpy()
        vectors[~np.array(shown, bool)] = 0
        return vectors

    def truth(
        self, data: CoSegData, i: int, classes: tuple[str, ...], crop: Box | None = None
    ) -> np.ndarray:
        """uint8 [S, S] of {0, 1, 255 = void}: the truth of item i, or of a crop, as a square."""
        return self._truth(data, i, classes, crop)

    def visual(
        self, data: CoSegData, items: Sequence[int], flips: Sequence[bool] | None = None,
        crops: Sequence[Box | None] | None = None, keep: bool = True,
    ) -> tuple[Tensor | None, list[Tensor] | None]:  # fmt: skip
        """(images [n, 3, S, S] in 0..1, None) for a live backbone, else (None, leading maps).

        Maps: [n, C, h, w] each, in half precision where kept. `keep=False`: for pictures seen once.
        """
        flips, crops = flips or [False] * len(items), crops or [None] * len(items)
        if self.stages and keep and not any(crops):
            rows = [self._maps(data, flip)[i] for i, flip in zip(items, flips, strict=True)]
            maps = [np.stack([row[stage] for row in rows]) for stage in self.row.names]
            return None, [torch.from_numpy(m).permute(0, 3, 1, 2) for m in maps]
        images = self._images(data, items, flips, crops)
        if not self.stages:
            return images, None
        maps = [self.frozen_maps(part) for part in images.split(AT_ONCE)]
        return None, [torch.cat(stride) for stride in zip(*maps, strict=True)]

    def _images(self, data: CoSegData, items: Sequence[int], flips: Sequence[bool],
                crops: Sequence[Box | None]) -> Tensor:  # fmt: skip
        how = zip(items, crops, strict=True)
        squares = [load_square(data.image(i), self.size, crop) for i, crop in how]
        squares = [s[:, ::-1] if flip else s for s, flip in zip(squares, flips, strict=True)]
        return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float().div_(255)

    @torch.no_grad()
    def frozen_maps(self, images: Tensor) -> list[Tensor]:
        """The leading maps that are kept, of images [n, 3, S, S] in 0..1, on the CPU."""
        mode = self.backbone.training
        self.backbone.eval().to(self.device)
        x, maps = self.backbone.normalise(images.to(self.device)), []
        for stage in self.backbone.stages[: self.stages]:
            x = stage(x)
            maps.append(x.cpu())
        self.backbone.train(mode)
        return maps

    def _maps(self, data: CoSegData, mirrored: bool) -> np.ndarray:
        """Every picture's maps, [n] of `row`. They may be larger than memory."""

        def write(part: Path) -> None:
            out = np.lib.format.open_memmap(part, "w+", self.row, (len(data),))
            what = f"embedding {data.name} ({self.backbone.name}, {self.size} px)"
            for start in progress(range(0, len(data), AT_ONCE), what):
                items = range(start, min(start + AT_ONCE, len(data)))
                images = self._images(data, items, [mirrored] * len(items), [None] * len(items))
                for stage, maps in zip(self.row.names, self.frozen_maps(images), strict=True):
                    out[stage][items] = maps.permute(0, 2, 3, 1).half().numpy()
            out.flush()

        recipe = [self._identity, self.size, self.row.descr, mirrored, data.digest()]
        return self._array("maps", recipe, write=write)

    def _array(
        self, kind: str, recipe: list, make: Callable[[], np.ndarray] | None = None, *,
        disk: bool = True, write: Callable[[Path], None] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """What `make` gives or `write` writes: remembered, and kept on disk."""
        name = f"{kind}-{digest(recipe, 16)}.npy"
        if name not in self._memo:
            file = place("cache") / name
            self._memo[name] = kept(file, make, write) if disk else make()
        return self._memo[name]


@lru_cache(maxsize=8)
def _rows(data: CoSegData) -> Mapping[Pair, int]:
    """Every (item, class) of a set → its row in the file of masked embeddings, by item."""
    pairs = sorted((i, (c,)) for c, items in data.groups.items() for i in items)
    return {pair: n for n, pair in enumerate(pairs)}


def make_features(experiment: Experiment, device: str | None = None) -> Features:
    """The frozen parts of an experiment, on the GPU if there is one.

    Experiments with the same wholly frozen parts share one object, and with it what it remembers.
    """
    m, device = experiment.model, device or ("cuda" if torch.cuda.is_available() else "cpu")
    # An encoder-side module changes what later stages see, so only the first one's maps are kept.
    stages = min(m.frozen_stages, 1 if m.placement == "encoder" else 4)
    make = _made if m.frozen_stages == 4 else _made.__wrapped__
    seed = experiment.seed if m.weights is None else 0  # random weights are the seed's alone
    tower = experiment.tower.model_copy(update={"vocabulary": ""})  # the words are apart
    backbone = (m.backbone, m.weights, m.frozen_stages)
    return make(tower, backbone, seed, experiment.data.size, stages, device)


@lru_cache(maxsize=2)
def _made(
    tower: TowerConfig, backbone: tuple, seed: int, size: int, stages: int, device: str
) -> Features:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make_backbone(*backbone)
    return Features(_tower(tower, device), net, size, stages=stages, device=device)


@lru_cache(maxsize=2)
def _tower(settings: TowerConfig, device: str) -> Tower:
    return make_tower(settings, device=device)


def batch(
    features: Features, vocabulary: Vocabulary, data: CoSegData, draws: Sequence[Draw], *,
    v_gt: str | None, background: str,
) -> Batch:  # fmt: skip
    """The tensors of some drawn groups; shorter groups are padded and marked in `present`.

    v_gt: what marks the true class, the "tower" (Eq. 12) or the class's own "name".
    """
    pairs = [(i, d.classes) for d in draws for i in d.items]
    items, flips, crops = ([x for d in draws for x in getattr(d, name)]
                           for name in ("items", "flips", "crops"))  # fmt: skip
    images, maps = features.visual(data, items, flips, crops)
    truths = (features.truth(data, *pair, crop) for pair, crop in zip(pairs, crops, strict=True))
    truths = [t[:, ::-1] if flip else t for t, flip in zip(truths, flips, strict=True)]
    longest, true = max(len(d.items) for d in draws), None
    present = torch.tensor([[n < len(d.items) for n in range(longest)] for d in draws])
    if v_gt == "name":  # −1: no such word, or a group that shares several classes
        single = [d.classes[0] if len(d.classes) == 1 else "" for d in draws]
        words = [target_word(name, vocabulary.words) for name in single]
        true = torch.tensor([-1 if word is None else word for word in words])
    elif v_gt == "tower":
        masked = _padded(features.masked(data, pairs, background), present)
        true = true_class(masked, vocabulary.embeddings, present)
    return Batch(
        images=None if images is None else _padded(images, present),
        maps=maps and [_padded(m, present) for m in maps],
        embeddings=_padded(features.embeddings(data, items), present),
        truth=_padded(torch.from_numpy(np.stack(truths)), present, VOID),
        present=present, true=true,
    )  # fmt: skip


def _padded(flat: Tensor, present: Tensor, value: float = 0) -> Tensor:
    """[M, …] → [B, N, …]."""
    if present.all():
        return flat.unflatten(0, present.shape)
    out = flat.new_full((*present.shape, *flat.shape[1:]), value)
    return out.index_put(present.nonzero(as_tuple=True), flat)
