"""What a network costs on this machine: parameters, operations and seconds, part by part."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from lcco.common import LCCoError
from lcco.config import Experiment, Profile
from lcco.experiment.features import make_features
from lcco.experiment.predictor import build_model
from lcco.experiment.runs import environment
from lcco.experiment.tables import row
from lcco.semantics import make_vocabulary

if TYPE_CHECKING:
    import pandas as pd

TOWER, BACKBONE, PATH = "image tower", "backbone", "top-down path"
# Module of the network → its name, and the methods that a forward pass calls of it
MODULES = {
    "isfc": ("ISFC", ("forward",)),
    "clip_interaction": ("CLIP interaction", ("refine", "fuse", "decode", "modulate_map.forward")),
    "clip_regularization": ("CLIP regularization", ("class_logits", "modulate_map.forward")),
}
BASELINE, LCCO, CACHED = "Baseline, all", "LCCo, all", "LCCo, embeddings cached"
PARTS = (TOWER, BACKBONE, PATH, *(name for name, _ in MODULES.values()), BASELINE, LCCO, CACHED)


def bench(profile: Profile, repeats: int = 5) -> pd.DataFrame:
    """What a profile's network costs for one set, a row for each part.

    parameters: million. flops: 10⁹, of convolutions and matrix products, a multiply-add as two.
    seconds: the least of `repeats` rounds that take all in turn; those of the path and the modules
    pass inside the Baseline and the full model. ratio: seconds by those of image tower and backbone
    alone. Weights are random, which changes no cost; prompts, embedded once, are not counted.
    """
    import pandas as pd

    if repeats < 1:
        raise LCCoError(f"`repeats` is {repeats}; it must be 1 or more")
    e = profile.experiment.replace({"model.weights": None, "tower.weights": None})
    network, n = _Network(e, profile.group_size), profile.group_size
    parameters, flops, seconds = network.parameters(), network.flops(), network.seconds(repeats)
    about = environment()
    here = {k: about[k] for k in ("device", "platform", "cores", "threads")}
    here |= {"torch": str(torch.__version__), "repeats": repeats, "protocol": ""}
    here |= {"test_set": f"a set of {n} at {e.data.size} px", "images": n, "group_size": n}
    floor, rows = seconds[TOWER] + seconds[BACKBONE], []
    for part in PARTS:
        cells = {"parameters": parameters[part] / 1e6, "flops": flops[part] / 1e9}
        cells |= {"seconds": seconds[part], "ratio": seconds[part] / floor}
        cells = {name: round(value, 5) for name, value in cells.items()}
        rows.append(row("cost", part, profile, e, **here, **cells))
    return pd.DataFrame(rows)


class _Network:
    """An experiment's network, Baseline and frozen parts, and one set of noise to run them on."""

    def __init__(self, experiment: Experiment, images: int) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.features = features = make_features(experiment, device)
        words = make_vocabulary(features.tower, experiment.tower)
        off = {f"model.{name}": False for name in MODULES}
        self.base = build_model(experiment.replace(off), features, words).eval().to(device)
        self.full = build_model(experiment, features, words).eval().to(device)
        size = experiment.data.size
        noise = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), np.uint8)
        self.pictures = [Image.fromarray(one) for one in noise]
        x = torch.from_numpy(noise).permute(0, 3, 1, 2).float().div(255).to(device)
        h, text = self.embed(), words.embeddings.to(device)
        self.works: dict[str, Callable[[], Any]] = {
            TOWER: self.embed,
            BACKBONE: lambda: features.backbone(x),
            BASELINE: lambda: self.base(x[None], h, text),
            LCCO: lambda: self.full(x[None], self.embed(), text),
            CACHED: lambda: self.full(x[None], h, text),
        }
        self.spent: Counter[str] = Counter()  # by the watched parts of what runs
        self.read: Callable[[], float] = time.perf_counter
        self._watch(self.base, PATH, "top_down")
        for module, (name, methods) in MODULES.items():
            part = getattr(self.full, module)
            for owner, _, method in (m.rpartition(".") for m in methods if part is not None):
                self._watch(part.get_submodule(owner), name, method)

    def embed(self) -> torch.Tensor:
        """The tower's embeddings of the set, [1, N, D]."""
        return self.features.tower.encode_images(self.pictures)[None].to(self.features.device)

    def _watch(self, module: nn.Module, name: str, method: str) -> None:
        """Have a method add what it takes to `spent[name]`."""
        plain = getattr(module, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            began = self.read()
            out = plain(*args, **kwargs)
            self.spent[name] += self.read() - began
            return out

        setattr(module, method, watched)

    @torch.no_grad()
    def measure(self, read: Callable[[], float]) -> Counter[str]:
        """What each part takes, once, in the units that `read` counts."""
        self.read, found = read, Counter()
        for name, work in self.works.items():
            self.spent.clear()
            began = read()
            work()
            found[name] = read() - began
            if name in (BASELINE, CACHED):
                found.update(self.spent)
        return found

    def parameters(self) -> Counter[str]:
        """How many each part has."""
        net = getattr(self.features.tower, "_net", None)
        parts = {TOWER: getattr(net, "visual", net), BACKBONE: self.features.backbone}
        parts |= {BASELINE: self.base, CACHED: self.full}
        parts |= {name: getattr(self.full, module) for module, (name, _) in MODULES.items()}
        found = Counter({n: sum(p.numel() for p in m.parameters()) for n, m in parts.items() if m})
        found[PATH] = found[BASELINE] - found[BACKBONE]
        found[LCCO] = found[CACHED] + found[TOWER]
        return found

    def flops(self) -> Counter[str]:
        """Operations of each part's matrix products and convolutions."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # fused attention would count as nothing
        try:
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                return self.measure(counter.get_total_flops)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)

    def seconds(self, repeats: int) -> Counter[str]:
        """Seconds of each part: the least of some rounds, after one to warm up."""
        rounds = [self.measure(_now) for _ in range(repeats + 1)][1:]
        return Counter({name: min(one[name] for one in rounds) for name in rounds[0]})


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
