"""From pictures to a batch: what the frozen parts say of a set is computed once and kept.

Embeddings, masked embeddings, true masks as squares and a frozen backbone's maps lie in one
memory-mapped file each, so that a training on frozen features takes minutes.
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
from lcco.store import kept, kept_file

Box = tuple[float, float, float, float]
Pair = tuple[int, tuple[str, ...]]  # an item, and the classes whose union is its truth
TRUTH_BYTES = 2**30  # bound on a file of true masks
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
        maps = self.maps and [m.to(device, non_blocking=True).float() for m in self.maps]
        rest = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, maps=maps, **{k: v.to(device) for k, v in rest.items()})


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
        channels = backbone.channels[: self.stages]
        self.shapes = [(c, size // (4 * 2**n)) for n, c in enumerate(channels)]  # of kept maps
        self._memo: dict[str, np.ndarray] = {}
        self._rows: dict[str, dict[Pair, int]] = {}
        self._flipped: set[str] = set()
        self._backbone = backbone.identity if self.stages else ""

    def prepare(
        self, data: CoSegData, *, flip: bool = False, truths: bool = False,
        background: str | None = None,
    ) -> None:  # fmt: skip
        """Embed a set ahead. flip: mirrored too. truths, background: for `truth` and `masked`."""
        self.embeddings(data, [])
        if self.stages:
            self._maps(data, flip)
        if truths:
            self.truth(data, *next(iter(self.rows(data))))
        if background:
            self.masked(data, [], background)

    def embeddings(self, data: CoSegData, items: Sequence[int], *, keep: bool = True) -> Tensor:
        """Image embeddings [n, D] of the tower; the set is embedded whole at the first call.

        `keep=False` writes nothing to disk: for pictures seen once.
        """
        recipe, make = [data.digest(), self.tower.identity], partial(self._embed, data)
        stored = self._array("embeddings", recipe, make, disk=keep)
        return torch.from_numpy(stored[np.array(items, int)])

    def _embed(self, data: CoSegData) -> np.ndarray:
        first: dict[str, int] = {}  # a picture that stands in two classes is embedded once
        contents = [data.content(i) for i in range(len(data))]
        for i, content in enumerate(contents):
            first.setdefault(content, i)
        items = progress(first.values(), f"embedding {data.name}", len(first))
        vectors = self.tower.encode_images(data.image(i) for i in items).float().numpy()
        row = {content: n for n, content in enumerate(first)}
        return vectors[[row[content] for content in contents]]

    def masked(self, data: CoSegData, pairs: Sequence[Pair], background: str) -> Tensor:
        """Embeddings [n, D] of pictures with all but the object painted over; zero without one.

        background: "zero", black, or "mean", the tower's mean colour.
        """
        recipe, rows = [data.identity(), self.tower.identity, background], self.rows(data)
        make = partial(self._embed_masked, data, background)
        stored = self._array("masked", recipe, partial(make, list(rows)))
        out = np.zeros((len(pairs), stored.shape[1]), np.float32)
        for n, pair in enumerate(pairs):
            if pair in rows:
                out[n] = stored[rows[pair]]
            else:  # of several classes, or of one that the picture lacks
                out[n] = self._array("masked", [*recipe, pair], partial(make, [pair]), disk=False)
        return torch.from_numpy(out)

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
        """uint8 [S, S] of {0, 1, 255 = void}: the truth of item i, or of a crop, as a square.

        Those of sets up to `TRUTH_BYTES` are kept on disk: decoding costs more than a step.
        """
        rows = self.rows(data)
        if crop or (i, classes) not in rows or len(rows) * self.size**2 > TRUTH_BYTES:
            return mask_square(data.mask(i, classes), self.size, crop)
        make = partial(self._truths, data)
        return self._array("truths", [data.identity(), self.size], make)[rows[i, classes]]

    def _truths(self, data: CoSegData) -> np.ndarray:
        pairs = progress(list(self.rows(data)), f"reading masks of {data.name}")
        return np.stack([mask_square(data.mask(i, classes), self.size) for i, classes in pairs])

    def visual(
        self, data: CoSegData, items: Sequence[int], flips: Sequence[bool] | None = None,
        crops: Sequence[Box | None] | None = None, keep: bool = True,
    ) -> tuple[Tensor | None, list[Tensor] | None]:  # fmt: skip
        """(images [n, 3, S, S] in 0..1, None) for a live backbone, else (None, leading maps).

        Maps: [n, C, h, w] each, in half precision where kept. `keep=False`: for pictures seen once.
        """
        flips, crops = flips or [False] * len(items), crops or [None] * len(items)
        if self.stages and keep and not any(crops):
            rows = [i + f * len(data) for i, f in zip(items, flips, strict=True)]
            ends = np.cumsum([c * s * s for c, s in self.shapes])[:-1]
            parts = np.split(self._maps(data, any(flips))[rows], ends, axis=1)
            views = [np.ascontiguousarray(p).reshape(-1, s, s, c)
                     for p, (c, s) in zip(parts, self.shapes, strict=True)]  # fmt: skip
            return None, [torch.from_numpy(v).permute(0, 3, 1, 2) for v in views]
        images = self._images(data, items, flips, crops)
        if not self.stages:
            return images, None
        maps = [self.frozen_maps(part) for part in images.split(AT_ONCE)]
        return None, [torch.cat(stride) for stride in zip(*maps, strict=True)]

    def _images(self, data: CoSegData, items: Sequence[int], flips: Sequence[bool],
                crops: Sequence[Box | None]) -> Tensor:  # fmt: skip
        how = zip(items, crops, strict=True)
        squares = [load_square(data.image(i), self.size, crop) for i, crop in how]
        squares = [s[:, ::-1] if f else s for s, f in zip(squares, flips, strict=True)]
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

    def _maps(self, data: CoSegData, flip: bool) -> np.ndarray:
        """[n or 2n, values] float16: a row holds one picture's maps; the mirrored half is last."""
        self._flipped |= {data.digest()} if flip else set()
        flip = data.digest() in self._flipped
        recipe = [self._backbone, self.size, self.stages, flip, data.digest()]
        return self._array("maps", recipe, write=partial(self._write_maps, data, flip))

    def _write_maps(self, data: CoSegData, flip: bool, part: Path) -> None:
        shape = (len(data) * (1 + flip), sum(c * s * s for c, s in self.shapes))
        out = np.lib.format.open_memmap(part, "w+", np.float16, shape)
        what = f"embedding {data.name} ({self.backbone.name}, {self.size} px)"
        for start in progress(range(0, len(data), AT_ONCE), what):
            items = range(start, min(start + AT_ONCE, len(data)))
            images = self._images(data, items, [False] * len(items), [None] * len(items))
            for side in range(1 + flip):
                maps = self.frozen_maps(images.flip(-1) if side else images)
                rows = torch.cat([m.permute(0, 2, 3, 1).flatten(1) for m in maps], dim=1)
                out[[i + side * len(data) for i in items]] = rows.half().numpy()
        out.flush()

    def rows(self, data: CoSegData) -> Mapping[Pair, int]:
        """Every (item, class) of a set → its row in the files of masks, by item."""
        if data.identity() not in self._rows:
            pairs = sorted((i, (c,)) for c, items in data.groups.items() for i in items)
            self._rows[data.identity()] = {pair: n for n, pair in enumerate(pairs)}
        return self._rows[data.identity()]

    def _array(
        self, kind: str, recipe: list, make: Callable[[], np.ndarray] | None = None, *,
        disk: bool = True, write: Callable[[Path], None] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """What `make` gives or `write` writes: remembered, and kept on disk."""
        name = f"{kind}-{digest(recipe, 16)}.npy"
        if name not in self._memo:
            if write:
                make = partial(np.load, kept_file(place("cache") / name, write), mmap_mode="r")
            found = kept(place("cache") / name, make) if disk and not write else make()
            self._memo[name] = found
        return self._memo[name]


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
    items, flips, crops = (
        [x for d in draws for x in getattr(d, name)] for name in ("items", "flips", "crops")
    )
    images, maps = features.visual(data, items, flips, crops)
    truths = [features.truth(data, *p, c) for p, c in zip(pairs, crops, strict=True)]
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
