"""From pictures to a batch: what the frozen parts say of a set is computed once and kept.

Embeddings, masked embeddings, true masks as squares and a frozen backbone's maps lie in one
memory-mapped file each, so that a training on frozen features takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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

Pair = tuple[int, tuple[str, ...]]  # an item, and the classes whose union is its truth
MEMO_BYTES = 2**30  # bound on squares in memory, and on a file of true masks
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
        rest = {k: v for k, v in vars(self).items() if k != "maps"}
        moved = {k: v if v is None else v.to(device, non_blocking=True) for k, v in rest.items()}
        return Batch(maps=maps, **moved)


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
        self._arrays: dict[str, np.ndarray] = {}
        self._truths: dict[str, np.ndarray] = {}
        self._maps: dict[tuple[str, bool], np.ndarray] = {}
        self._pairs: dict[str, dict[Pair, int]] = {}
        self._memo: dict[tuple, np.ndarray] = {}

    def prepare(
        self, data: CoSegData, *, flip: bool = False, truths: bool = False,
        background: str | None = None,
    ) -> None:  # fmt: skip
        """Compute ahead what is kept of a set.

        flip: maps of mirrored pictures too. truths: true masks as squares. background: embeddings
        of the pictures with all but the object painted over, "zero" or "mean".
        """
        self.embeddings(data, [])
        if self.stages:
            self._stored_maps(data, flip)
        if truths and len(self.rows(data)) * self.size**2 <= MEMO_BYTES:
            self._stored_truths(data)
        if background:
            self._stored_masked(data, background)

    # ------------------------------------------------------------------ the tower's embeddings
    def embeddings(self, data: CoSegData, items: Sequence[int], *, keep: bool = True) -> Tensor:
        """Image embeddings [n, D] of the tower; the set is embedded whole at the first call.

        `keep=False` writes nothing to disk: for pictures seen once.
        """
        recipe = [data.digest(), self.tower.identity]
        stored = self._kept("embeddings", recipe, lambda: self._embed(data), keep)
        return torch.from_numpy(stored[np.array(items, int)])

    def _embed(self, data: CoSegData) -> np.ndarray:
        contents = [data.content(i) for i in range(len(data))]
        first: dict[str, int] = {}  # a picture that stands in two classes is embedded once
        for i, content in enumerate(contents):
            first.setdefault(content, i)
        items = progress(first.values(), f"embedding {data.name}", len(first))
        vectors = self.tower.encode_images(data.image(i) for i in items).float().numpy()
        row = {content: n for n, content in enumerate(first)}
        return vectors[[row[content] for content in contents]]

    def masked(self, data: CoSegData, pairs: Sequence[Pair], background: str) -> Tensor:
        """Embeddings [n, D] of pictures with all but the object painted over; zero without one."""
        stored, rows = self._stored_masked(data, background), self.rows(data)
        vectors = [
            stored[rows[pair]] if pair in rows  # else of several classes, or of one it lacks
            else self._remember(("masked", data.identity(), pair, background),
                                lambda pair=pair: self._embed_masked(data, [pair], background)[0])
            for pair in pairs
        ]  # fmt: skip
        return torch.from_numpy(np.stack(vectors))

    def _stored_masked(self, data: CoSegData, background: str) -> np.ndarray:
        recipe, pairs = [data.identity(), self.tower.identity, background], list(self.rows(data))
        return self._kept("masked", recipe, lambda: self._embed_masked(data, pairs, background))

    def _embed_masked(self, data: CoSegData, pairs: list[Pair], background: str) -> np.ndarray:
        shown: list[bool] = []

        def pictures() -> Iterator[Image.Image]:
            for i, classes in progress(pairs, f"embedding objects of {data.name}"):
                mask = data.mask(i, classes)
                shown.append(bool((mask == 1).any()))
                yield painted(data.image(i), mask, background, self.tower.mean)

        vectors = self.tower.encode_images(pictures()).float().numpy()
        vectors[~np.array(shown, bool)] = 0
        return vectors

    # ------------------------------------------------------------------ pictures, masks, maps
    def truth(self, data: CoSegData, i: int, classes: tuple[str, ...]) -> np.ndarray:
        """uint8 [S, S] of {0, 1, 255 = void}: the truth of item i as a square."""
        stored = self._truths.get(data.identity())
        row = None if stored is None else self.rows(data).get((i, classes))
        if row is not None:
            return stored[row]
        key = ("truth", data.identity(), i, classes)
        return self._remember(key, lambda: mask_square(data.mask(i, classes), self.size))

    def _stored_truths(self, data: CoSegData) -> None:
        pairs = progress(self.rows(data), f"reading masks of {data.name}", len(self.rows(data)))
        self._truths[data.identity()] = self._kept(
            "truths", [data.identity(), self.size],
            lambda: np.stack([mask_square(data.mask(i, c), self.size) for i, c in pairs]),
        )  # fmt: skip

    def visual(
        self, data: CoSegData, items: Sequence[int], flips: Sequence[bool] | None = None,
        crops: Sequence[tuple | None] | None = None, keep: bool = True,
    ) -> tuple[Tensor | None, list[Tensor] | None]:  # fmt: skip
        """(images [n, 3, S, S] in 0..1, None) for a live backbone, else (None, leading maps).

        Maps: [n, C, h, w] each, in half precision where kept. `keep=False`: for pictures seen once.
        """
        flips, crops = flips or [False] * len(items), crops or [None] * len(items)
        if self.stages and keep and not any(crops):
            stored = self._stored_maps(data, any(flips))
            rows = stored[[i + f * len(data) for i, f in zip(items, flips, strict=True)]]
            ends = np.cumsum([c * s * s for c, s in self._shapes])
            maps = map(np.ascontiguousarray, np.split(rows, ends[:-1], axis=1))
            views = [m.reshape(-1, s, s, c) for m, (c, s) in zip(maps, self._shapes, strict=True)]
            return None, [torch.from_numpy(v).permute(0, 3, 1, 2) for v in views]
        squares = [self._square(data, *one, keep) for one in zip(items, flips, crops, strict=True)]
        images = _to_images(squares)
        if self.stages:
            parts = [self.frozen_maps(part) for part in images.split(AT_ONCE)]
            return None, [torch.cat(maps) for maps in zip(*parts, strict=True)]
        return images, None

    def _square(
        self, data: CoSegData, i: int, flip: bool, crop: tuple | None, keep: bool
    ) -> np.ndarray:
        key = ("image", data.digest(), i) if keep and not crop else None
        square = self._remember(key, lambda: load_square(data.image(i), self.size, crop))
        return square[:, ::-1] if flip else square

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

    @property
    def _shapes(self) -> list[tuple[int, int]]:
        """Channels and side of each kept map."""
        channels = self.backbone.channels[: self.stages]
        return [(c, self.size // (4 * 2**n)) for n, c in enumerate(channels)]

    def _stored_maps(self, data: CoSegData, flip: bool) -> np.ndarray:
        """[n or 2n, values] float16: a row holds one picture's maps; the mirrored half is last."""
        known = self._maps.get((data.digest(), True), self._maps.get((data.digest(), flip)))
        if known is None:
            recipe = [self.backbone.identity, self.size, self.stages, flip, data.digest()]
            path = place("cache") / f"maps-{digest(recipe, 16)}.npy"
            kept_file(path, lambda part: self._write_maps(part, data, flip))
            known = self._maps[data.digest(), flip] = np.load(path, mmap_mode="r")
        return known

    def _write_maps(self, part: Path, data: CoSegData, flip: bool) -> None:
        shape = (len(data) * (1 + flip), sum(c * s * s for c, s in self._shapes))
        out = np.lib.format.open_memmap(part, "w+", np.float16, shape)
        what = f"embedding {data.name} ({self.backbone.name}, {self.size} px)"
        for start in progress(range(0, len(data), AT_ONCE), what):
            items = range(start, min(start + AT_ONCE, len(data)))
            images = _to_images([self._square(data, i, False, None, False) for i in items])
            for side in range(1 + flip):
                maps = self.frozen_maps(images.flip(-1) if side else images)
                rows = torch.cat([m.permute(0, 2, 3, 1).flatten(1) for m in maps], dim=1)
                out[[i + side * len(data) for i in items]] = rows.half().numpy()
        out.flush()

    # ------------------------------------------------------------------ what is kept
    def _kept(
        self, kind: str, recipe: list, make: Callable[[], np.ndarray], keep: bool = True
    ) -> np.ndarray:
        name = f"{kind}-{digest(recipe, 16)}.npy"
        if name not in self._arrays:
            self._arrays[name] = kept(place("cache") / name, make) if keep else make()
        return self._arrays[name]

    def _remember(self, key: tuple | None, make: Callable[[], np.ndarray]) -> np.ndarray:
        value = self._memo.get(key) if key else make()
        if value is None:
            value = make()
            if len(self._memo) * 3 * self.size**2 > MEMO_BYTES:
                self._memo.clear()
            self._memo[key] = value
        return value

    def rows(self, data: CoSegData) -> Mapping[Pair, int]:
        """Every (item, class) of a set → its row in the files of masks, by item."""
        if data.identity() not in self._pairs:
            pairs = sorted((i, (c,)) for c, items in data.groups.items() for i in items)
            self._pairs[data.identity()] = {pair: n for n, pair in enumerate(pairs)}
        return self._pairs[data.identity()]


def make_features(experiment: Experiment, device: str | None = None) -> Features:
    """The frozen parts of an experiment, on the GPU if there is one.

    Experiments with the same wholly frozen parts share one object, and with it what it remembers.
    """
    m, device = experiment.model, device or ("cuda" if torch.cuda.is_available() else "cpu")
    # An encoder-side module changes what later stages see, so only the first one's maps are kept.
    stages = min(m.frozen_stages, 1 if m.placement == "encoder" else 4)
    make = _made if m.frozen_stages == 4 else _made.__wrapped__
    seed = experiment.seed if m.weights is None else 0  # random weights are the seed's alone
    tower = experiment.tower.model_copy(update={"vocabulary": "coco80"})  # words are apart
    key = (m.backbone, m.weights, m.frozen_stages)
    return make(tower, key, seed, experiment.data.size, stages, device)


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
    each = [
        (i, d.classes, flip, crop)
        for d in draws for i, flip, crop in zip(d.items, d.flips, d.crops, strict=True)
    ]  # fmt: skip
    items, classes, flips, crops = (list(column) for column in zip(*each, strict=True))
    truths = []
    for i, names, flip, crop in each:
        whole = features.truth(data, i, names) if not crop else None
        square = mask_square(data.mask(i, names), features.size, crop) if crop else whole
        truths.append(torch.from_numpy(np.array(square[:, ::-1] if flip else square)))
    images, maps = features.visual(data, items, flips, crops)
    longest = max(len(d.items) for d in draws)
    present = torch.tensor([[n < len(d.items) for n in range(longest)] for d in draws])
    true = None
    if v_gt == "name":
        true = torch.tensor([own_word(d.classes, vocabulary.words) for d in draws])
    elif v_gt == "tower":
        masked = features.masked(data, list(zip(items, classes, strict=True)), background)
        true = true_class(_padded(masked, present), vocabulary.embeddings, present)
    return Batch(
        images=None if images is None else _padded(images, present),
        maps=maps and [_padded(m, present) for m in maps],
        embeddings=_padded(features.embeddings(data, items), present),
        truth=_padded(torch.stack(truths), present, VOID), present=present, true=true,
    )  # fmt: skip


def own_word(classes: Sequence[str], words: Sequence[str]) -> int:
    """The index of a group's one class in the words; −1: no such word, or several classes."""
    word = target_word(classes[0], words) if len(classes) == 1 else None
    return -1 if word is None else word


def _padded(flat: Tensor, present: Tensor, value: float = 0) -> Tensor:
    """[M, …] → [B, N, …]."""
    if present.all():
        return flat.unflatten(0, present.shape)
    out = flat.new_full((*present.shape, *flat.shape[1:]), value)
    return out.index_put(present.nonzero(as_tuple=True), flat)


def _to_images(squares: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float().div_(255)
