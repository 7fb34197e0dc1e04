"""What the frozen parts say of the pictures of a set, computed once and kept.

Embeddings, masked embeddings and a frozen backbone's maps lie in memory-mapped files, so that a
training on frozen features takes minutes.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lcco.backbones import Backbone, make_backbone
from lcco.common import digest, place, progress
from lcco.config import Experiment
from lcco.data import CoSegData
from lcco.data.pictures import Box, load_square, mask_square
from lcco.semantics import Tower, make_tower, painted
from lcco.store import IN_A_FILE, kept

Pair = tuple[int, tuple[str, ...]]  # an item, and the classes whose union is its truth
TRUTH_BYTES = 2**29  # of true masks that are remembered: decoding them costs more than a step
AT_ONCE = 16  # pictures through the backbone at once: early maps are large
_tower = lru_cache(maxsize=2)(make_tower)  # models are loaded once


class Features:
    """The frozen tower, the backbone with its leading frozen stages, and what they made of sets.

    size: the side S of the squares that the network sees. stages: how many leading stages' maps
    are kept (default: all that are frozen). truth(data, i, classes, crop): the truth of item i, or
    of a crop of it, uint8 [S, S] of {0, 1, 255 = void}.
    """

    def __init__(self, tower: Tower, backbone: Backbone, size: int, *, stages: int | None = None,
                 device: str = "cpu") -> None:  # fmt: skip
        self.tower, self.backbone, self.size, self.device = tower, backbone, size, device
        self.stages = backbone.frozen_stages if stages is None else stages
        shapes = [(size // 2 ** (n + 2),) * 2 + (c,) for n, c in enumerate(backbone.channels)]
        leading = enumerate(shapes[: self.stages])
        self.row = np.dtype([(str(n), np.float16, shape) for n, shape in leading])  # one picture's
        self._identity = backbone.identity if self.stages else ""  # before a training alters it
        self._memo: dict[str, np.ndarray] = {}
        self._objects: dict[str, dict[Pair, np.ndarray]] = {}
        self.truth: Callable[..., np.ndarray] = lru_cache(maxsize=TRUTH_BYTES // size**2)(
            lambda data, i, classes, crop=None: mask_square(data.mask(i, classes), size, crop)
        )

    def prepare(self, data: CoSegData, flip: bool = False, background: str | None = None) -> None:
        """Embed a set ahead. flip: mirrored too. background: its objects too, as `masked` does."""
        self.embeddings(data, [])
        if self.stages:
            what = f"embedding {data.name} ({self.backbone.name}, {self.size} px)"
            for start in progress(range(0, len(data), IN_A_FILE), what):
                for mirrored in (False, True)[: 1 + flip]:
                    self._maps(data, start, mirrored)
        if background:
            self.masked(data, [], background)

    def embeddings(self, data: CoSegData, items: Sequence[int], *, keep: bool = True) -> Tensor:
        """Image embeddings [n, D]; the first call embeds the whole set, kept on disk if `keep`."""

        def make() -> np.ndarray:
            first: dict[str, int] = {}  # a picture that stands in two classes is embedded once
            for i in range(len(data)):
                first.setdefault(data.content(i), i)
            items = progress(first.values(), f"embedding {data.name}", len(first))
            vectors = self.tower.encode_images(data.image(i) for i in items).float().numpy()
            row = {content: n for n, content in enumerate(first)}
            return vectors[[row[data.content(i)] for i in range(len(data))]]

        stored = self._kept("embeddings", [data.digest(), self.tower.identity], make, keep)
        return torch.from_numpy(stored[np.array(items, int)])

    def masked(self, data: CoSegData, pairs: Sequence[Pair], background: str) -> Tensor:
        """Embeddings [n, D] of pictures with all but the object painted over; zero without one.

        background: "zero", black, or "mean", the tower's mean colour.
        """
        name = f"masked-{digest([data.identity(), self.tower.identity, background], 16)}.npy"
        if name not in self._objects:
            pairs_of = sorted((i, (c,)) for c, items in data.groups.items() for i in items)
            make = partial(self._embed_masked, data, background, pairs_of)
            stored = np.asarray(kept(place("cache") / name, make))
            self._objects[name] = dict(zip(pairs_of, stored, strict=True))
        known = self._objects[name]
        for pair in {*pairs} - known.keys():  # of several classes, or of one that it lacks
            known[pair] = self._embed_masked(data, background, [pair])[0]
        return torch.from_numpy(np.array([known[pair] for pair in pairs]))

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

    def visual(self, data: CoSegData, items: Sequence[int], flips: Sequence[bool] | None = None,
               crops: Sequence[Box | None] | None = None,
               keep: bool = True) -> tuple[Tensor | None, list[Tensor] | None]:  # fmt: skip
        """(images [n, 3, S, S] in 0..1, None) for a live backbone, else (None, leading maps).

        Maps, never of crops: [n, C, h, w] each, in half precision where kept (`keep`).
        """
        flips, crops = flips or [False] * len(items), crops or [None] * len(items)
        if self.stages and keep:
            rows = [self._maps(data, i - i % IN_A_FILE, flip)[i % IN_A_FILE]
                    for i, flip in zip(items, flips, strict=True)]  # fmt: skip
            maps = (np.stack([row[stage] for row in rows]) for stage in self.row.names)
            return None, [torch.from_numpy(m).permute(0, 3, 1, 2) for m in maps]
        squares = [load_square(data.image(i), self.size, crop)[:, :: -1 if flip else 1]
                   for i, flip, crop in zip(items, flips, crops, strict=True)]  # fmt: skip
        images = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float().div_(255)
        if not self.stages:
            return images, None
        net, parts = self.backbone.to(self.device), images.split(AT_ONCE)
        found = [[m.cpu() for m in net(x.to(self.device), last=self.stages)] for x in parts]
        return None, [torch.cat(stage) for stage in zip(*found, strict=True)]

    def _maps(self, data: CoSegData, start: int, mirrored: bool) -> np.ndarray:
        """The maps of `IN_A_FILE` pictures, [n] of `row`."""

        def make() -> np.ndarray:
            items = range(start, min(start + IN_A_FILE, len(data)))
            _, found = self.visual(data, items, [mirrored] * len(items), keep=False)
            out = np.empty(len(items), self.row)
            for stage, maps in zip(self.row.names, found, strict=True):
                out[stage] = maps.permute(0, 2, 3, 1).half().numpy()
            return out

        recipe = [self._identity, self.size, self.row.descr, mirrored, data.digest(), start]
        return self._kept("maps", recipe, make)

    def _kept(self, kind: str, recipe: list, make: Callable, disk: bool = True) -> np.ndarray:
        """The array that `make` gives: remembered, and kept on disk."""
        name = f"{kind}-{digest(recipe, 16)}.npy"
        if name not in self._memo:
            self._memo[name] = kept(place("cache") / name, make) if disk else make()
        return self._memo[name]


def make_features(experiment: Experiment, device: str | None = None) -> Features:
    """The frozen parts of an experiment, on the GPU if there is one; a tower is loaded once."""
    m, here = experiment.model, torch.cuda.is_available()
    # With its number: the loader's thread knows of no other than the first.
    device = device or (f"cuda:{torch.cuda.current_device()}" if here else "cpu")
    with torch.random.fork_rng(devices=[]):  # random weights are the seed's alone
        torch.manual_seed(experiment.seed)
        backbone = make_backbone(m.backbone, m.weights, m.frozen_stages)
    tower = _tower(experiment.tower, device)
    # An encoder-side module changes what later stages see, so only the first one's maps are kept.
    stages = min(m.frozen_stages, 1 if m.placement == "encoder" else 4)
    return Features(tower, backbone, experiment.data.size, stages=stages, device=device)


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
