"""From pictures to what the network takes: squared images or cached backbone maps, embeddings, truths, v^gt.

Frozen parts see each picture once. Their output is kept: embeddings by `semantics.EmbeddingCache`, a frozen
backbone's maps here, in half precision and memory-mapped, so that a training on frozen features takes minutes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lcco.backbones import Backbone, make_backbone
from lcco.common import atomic_path, digest, file_lock, place, progress, write_json
from lcco.config import Experiment
from lcco.data import VOID, Box, CoSegData, Draw, load_square, mask_square
from lcco.losses import true_class
from lcco.semantics import EmbeddingCache, Tower, make_tower, prompts, target_word, vocabulary, vocabulary_hash

MEMO_BYTES = 2**30  # bound on decoded truths (and squared images) kept in memory


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

        def move(t: Tensor | None) -> Tensor | None:
            return t if t is None else t.to(device, non_blocking=True)

        maps = None if self.maps is None else [move(m).float() for m in self.maps]
        embeddings, truth, present, true = map(move, (self.embeddings, self.truth, self.present, self.true))
        return Batch(move(self.images), maps, embeddings, truth, present, true)


class Inputs:
    """The frozen parts of an experiment and what they say about pictures.

    words, prompts [P, D]: the vocabulary and its embeddings. Everything here depends on the data, tower and backbone
    settings only, so one `Inputs` can serve many models of a profile.
    """

    def __init__(self, experiment: Experiment, *, device: str = "cpu", backbone: Backbone | None = None,
                 tower: Tower | None = None):  # fmt: skip
        self.experiment, self.device = experiment, device
        self.size = experiment.data.size
        model = experiment.model
        with torch.random.fork_rng(devices=[]):  # random weights, where asked for, are the seed's alone
            torch.manual_seed(experiment.seed)
            self.backbone = backbone or make_backbone(model.backbone, model.weights, model.frozen_stages)
        self.tower = tower or make_tower(experiment.tower)
        self.words = vocabulary(experiment.tower.vocabulary)
        self.prompts = prompts(self.tower, self.words, experiment.tower.templates, place("cache"))
        self.cache = EmbeddingCache(place("cache"), self.tower)
        # An encoder-side module changes what later stages see, so only the first stage's maps can be kept.
        self.cached_stages = min(model.frozen_stages, 1 if model.placement == "encoder" else 4)
        self._stores: dict[tuple[str, bool], list[np.ndarray]] = {}
        self._embeddings: dict[str, Tensor] = {}
        self._masked: dict[tuple[str, int, tuple[str, ...]], Tensor] = {}
        self._truths: dict[str, np.ndarray] = {}
        self._pairs: dict[str, dict[tuple[int, tuple[str, ...]], int]] = {}
        # One object a set, however often it is loaded: a memo keyed by objects would hold every one of them.
        self._sets: dict[str, CoSegData] = {}
        self._truth = lru_cache(maxsize=max(64, MEMO_BYTES // self.size**2))(self._read_truth)
        self._square = lru_cache(maxsize=max(64, MEMO_BYTES // (3 * self.size**2)))(self._read_square)

    @property
    def _v_gt(self) -> str | None:
        """Who names the class that v^gt marks; None where Eq. 12 is not used."""
        e = self.experiment
        return e.loss.v_gt if e.model.clip_regularization and e.loss.lambda_c else None

    def _own_word(self, classes: Sequence[str]) -> int:
        """The vocabulary index of a group's one class; −1 = unknown: no such word, or several classes shared."""
        word = target_word(classes[0], self.words) if len(classes) == 1 else None
        return -1 if word is None else word

    @property
    def vocabulary_hash(self) -> str:
        """Hash of the words and their order, which the weights are tied to."""
        return vocabulary_hash(self.words)

    def truth(self, data: CoSegData, i: int, classes: tuple[str, ...]) -> np.ndarray:
        """uint8 [S, S] of {0, 1, 255 = void}: the truth of item i as a square, remembered."""
        return self._truth(self._known(data, data.identity()), i, classes)

    def _known(self, data: CoSegData, key: str) -> str:
        self._sets.setdefault(key, data)
        return key

    def _read_truth(self, key: str, i: int, classes: tuple[str, ...]) -> np.ndarray:
        data, stored = self._sets[key], self._truths.get(key)
        row = self._rows(data).get((i, classes)) if stored is not None else None
        return mask_square(data, i, classes, self.size) if row is None else stored[row]

    def _rows(self, data: CoSegData) -> dict[tuple[int, tuple[str, ...]], int]:
        """Every (item, class) that a group can ask for → its row in the stores below."""
        if data.identity() not in self._pairs:
            # By item, so that a picture with several classes is read once.
            pairs = sorted((i, (c,)) for c, items in data.groups.items() for i in items)
            self._pairs[data.identity()] = {pair: n for n, pair in enumerate(pairs)}
        return self._pairs[data.identity()]

    def _read_square(self, key: str, i: int) -> np.ndarray:
        return load_square(self._sets[key], i, self.size)

    # -------------------------------------------------------------------------------------------- frozen outputs
    def prepare(self, data: CoSegData, *, flip: bool = False, truth: bool = False) -> None:
        """Embed a whole set ahead: maps, embeddings and, for training (`truth`), the masked images' embeddings."""
        if self.cached_stages:
            self._store(data, flip)
        self.embeddings(data, [])
        if truth:
            self._store_truths(data)
            if self._v_gt == "tower":
                self._store_masked(data)

    def _store_truths(self, data: CoSegData) -> None:
        """Keep the training truths as squares on disk (sets up to `MEMO_BYTES`): decoding costs more than a step."""
        pairs = self._rows(data)
        if data.identity() in self._truths or len(pairs) * self.size**2 > MEMO_BYTES:
            return
        path = place("cache") / f"truths-{digest([data.identity(), self.size, 'by item'], 16)}.npy"
        with file_lock(path.with_suffix(".lock"), f"waiting for another process to read the masks of {data.name}"):
            if not path.is_file():
                with atomic_path(path) as part:
                    out = np.lib.format.open_memmap(part, "w+", np.uint8, (len(pairs), self.size, self.size))
                    for (i, classes), n in progress(pairs.items(), f"reading masks of {data.name}"):
                        out[n] = mask_square(data, i, classes, self.size)
                    out.flush()
        self._truths[data.identity()] = np.load(path, mmap_mode="r")

    def _store_masked(self, data: CoSegData) -> None:
        """Keep the masked pictures' embeddings in one file: looking each up needs its mask, which must be decoded."""
        pairs = self._rows(data)
        if all((data.identity(), *p) in self._masked for p in pairs):
            return
        recipe = [data.identity(), self.tower.identity, self.experiment.loss.mask_background, "by item"]
        path = place("cache") / f"masked-{digest(recipe, 16)}.npy"
        with file_lock(path.with_suffix(".lock"), f"waiting for another process to embed objects of {data.name}"):
            if not path.is_file():
                self._embed_masked(data, list(pairs))
                with atomic_path(path) as part, open(part, "wb") as f:
                    np.save(f, np.stack([self._masked[(data.identity(), *p)].numpy() for p in pairs]))
        for p, vector in zip(pairs, torch.from_numpy(np.load(path)), strict=True):
            self._masked[(data.identity(), *p)] = vector

    def _store(self, data: CoSegData, flip: bool) -> list[np.ndarray]:
        """The memory-mapped maps [n·(1 or 2), h, w, C] of a set; the flipped half follows the plain one."""
        stored = self._stores.get((data.digest(), True)) or self._stores.get((data.digest(), flip))
        if stored:
            return stored
        net = self.backbone
        key = digest([net.identity, self.size, self.cached_stages, flip, data.digest()], 16)
        folder = place("cache") / f"maps-{key}"
        files = [folder / f"stride{4 * 2**n}.npy" for n in range(self.cached_stages)]
        with file_lock(folder.with_suffix(".lock"), f"waiting for another process to embed {data.name}"):
            if not (folder / "done.json").is_file():
                self._embed_maps(data, flip, files)
                write_json(folder / "done.json", {"data": data.name, "backbone": net.identity, "size": self.size})
        self._stores[data.digest(), flip] = [np.load(f, mmap_mode="r") for f in files]
        return self._stores[data.digest(), flip]

    def _embed_maps(self, data: CoSegData, flip: bool, files: list[Path]) -> None:
        total, at_once = len(data) * (1 + flip), 16
        out: list[np.ndarray] = []
        files[0].parent.mkdir(parents=True, exist_ok=True)
        what = f"embedding {data.name} ({self.backbone.name}, {self.size} px)"
        for start in progress(range(0, len(data), at_once), what):
            items = list(range(start, min(start + at_once, len(data))))
            images = self._tensor(data, items)
            for side in range(1 + flip):
                maps = self.frozen_maps(images.flip(-1) if side else images)
                if not out:
                    shapes = [(total, *m.shape[2:], m.shape[1]) for m in maps]
                    opened = zip(files, shapes, strict=True)
                    out = [np.lib.format.open_memmap(f, "w+", np.float16, shape) for f, shape in opened]
                for store, m in zip(out, maps, strict=True):
                    store[[i + side * len(data) for i in items]] = m.permute(0, 2, 3, 1).half().numpy()
        for store in out:
            store.flush()

    @torch.no_grad()
    def frozen_maps(self, images: Tensor) -> list[Tensor]:
        """The leading maps that are cached, of images [n, 3, S, S] in 0..1, on the CPU."""
        mode = self.backbone.training
        self.backbone.eval().to(self.device)
        x, maps = self.backbone.normalise(images.to(self.device)), []
        for stage in self.backbone.stages[: self.cached_stages]:
            x = stage(x)
            maps.append(x.cpu())
        self.backbone.train(mode)
        return maps

    def embeddings(self, data: CoSegData, items: Sequence[int]) -> Tensor:
        """Image embeddings [n, D] of the tower; the set is embedded whole at the first call."""
        key = data.digest()
        if key not in self._embeddings:
            self._embeddings[key] = self.cache.images(data, range(len(data))).float()
        return self._embeddings[key][list(items)]

    def embed_once(self, data: CoSegData) -> None:
        """Embed a set of pictures that are seen once: the embeddings stay in memory, nothing is written."""
        if (key := data.digest()) not in self._embeddings:
            pictures = (data.image(i) for i in progress(range(len(data)), f"embedding {data.name}"))
            self._embeddings[key] = self.tower.encode_images(pictures).float()

    def _embed_masked(self, data: CoSegData, pairs: Sequence[tuple[int, tuple[str, ...]]]) -> None:
        for start in range(0, len(pairs), 512):  # native-size masks of a large set do not fit in memory at once
            part = pairs[start : start + 512]
            masks = [data.mask(i, c) for i, c in part]
            vectors = self.cache.images(
                data, [i for i, _ in part], masks=masks, background=self.experiment.loss.mask_background
            ).float()
            for (i, c), vector, mask in zip(part, vectors, masks, strict=True):
                # An image without the object says nothing about the class.
                self._masked[data.identity(), i, c] = vector if (mask == 1).any() else torch.zeros_like(vector)

    # ------------------------------------------------------------------------------------------------- tensors
    def _tensor(
        self, data: CoSegData, items: Sequence[int], flips: Sequence[bool] = (), crops: Sequence[Box | None] = (),
        *, keep: bool = True,
    ) -> Tensor:  # fmt: skip
        squares = []
        for n, i in enumerate(items):
            crop, flip = crops[n] if crops else None, bool(flips and flips[n])
            if keep and not crop:
                square = self._square(self._known(data, data.digest()), i)
            else:
                square = load_square(data, i, self.size, crop)
            squares.append(square[:, ::-1] if flip else square)
        return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float().div_(255)

    def visual(
        self, data: CoSegData, items: Sequence[int], flips: Sequence[bool] | None = None,
        crops: Sequence[Box | None] | None = None, *, cached: bool = True,
    ) -> tuple[Tensor | None, list[Tensor] | None]:  # fmt: skip
        """(images [n, 3, S, S], None) for a live backbone, or (None, leading maps [n, C, h, w] each) for a frozen one.

        `cached=False` computes frozen maps without keeping them: for pictures seen once.
        """
        flips = flips or [False] * len(items)
        if self.cached_stages and cached and not any(crops or ()):
            rows = [i + f * len(data) for i, f in zip(items, flips, strict=True)]
            maps = [torch.from_numpy(s[rows]) for s in self._store(data, any(flips))]
            return None, [m.permute(0, 3, 1, 2) for m in maps]  # channels-last memory, as convolutions like it
        images = self._tensor(data, items, flips, crops or (), keep=cached)
        if self.cached_stages:  # early maps are large: a few pictures at a time
            parts = [self.frozen_maps(part) for part in images.split(16)]
            return None, [torch.cat(maps) for maps in zip(*parts, strict=True)]
        return images, None

    def batch(self, data: CoSegData, draws: Sequence[Draw]) -> Batch:
        """The tensors of some drawn groups; shorter groups are padded and marked in `present`."""
        items = [i for d in draws for i in d.items]
        flips = [f for d in draws for f in d.flips]
        crops = [c for d in draws for c in d.crops]
        truths = []
        for d in draws:
            for i, flip, crop in zip(d.items, d.flips, d.crops, strict=True):
                t = mask_square(data, i, d.classes, self.size, crop) if crop else self.truth(data, i, d.classes)
                truths.append(torch.from_numpy(np.array(t[:, ::-1] if flip else t)))
        images, maps = self.visual(data, items, flips, crops)
        sizes = [len(d.items) for d in draws]
        N = max(sizes)
        present = torch.tensor([[n < s for n in range(N)] for s in sizes])
        true = None
        if self._v_gt == "name":
            true = torch.tensor([self._own_word(d.classes) for d in draws])
        elif self._v_gt == "tower":
            pairs = [(i, d.classes) for d in draws for i in d.items]
            self._embed_masked(data, list({p for p in pairs if (data.identity(), *p) not in self._masked}))
            masked = _pad(torch.stack([self._masked[(data.identity(), *p)] for p in pairs]), present)
            true = true_class(masked, self.prompts, present)

        return Batch(
            None if images is None else _pad(images, present),
            None if maps is None else [_pad(m, present) for m in maps],
            _pad(self.embeddings(data, items), present),
            _pad(torch.stack(truths), present, VOID),
            present,
            true,
        )

    def nearest_word(self, name: str) -> int:
        """The vocabulary index of a class: the word itself, else the nearest by text embedding ("GT semantics")."""
        known = target_word(name, self.words)
        if known is not None:
            return known
        one = prompts(self.tower, [name.replace("_", " ")], self.experiment.tower.templates, place("cache"))
        return int((self.prompts @ one[0]).argmax())


def _pad(flat: Tensor, present: Tensor, value: float = 0) -> Tensor:
    """[M, …] → [B, N, …]."""
    if present.all():
        return flat.unflatten(0, present.shape)
    return flat.new_full((*present.shape, *flat.shape[1:]), value).index_put(present.nonzero(as_tuple=True), flat)


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Write a safetensors file whole or not at all, with a JSON description inside."""
    from safetensors.torch import save_file

    with atomic_path(path) as part:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part, {"lcco": json.dumps(about, sort_keys=True)})
