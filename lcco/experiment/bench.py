"""What a network costs on this machine: parameters, operations and seconds, part by part."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lcco.config import Experiment, Profile
from lcco.experiment.features import make_features
from lcco.experiment.predictor import build_model
from lcco.experiment.runs import environment
from lcco.experiment.tables import label, row
from lcco.experiment.variants import MODULES
from lcco.semantics import make_vocabulary

TOWER, BACKBONE, BASELINE = "image tower", "backbone", "Baseline"
CACHED, LCCO = "LCCo, embeddings cached", "LCCo, all"


def bench(profile: Profile, repeats: int = 5) -> pd.DataFrame:
    """What a profile's network costs for one set: a row for tower, backbone and each network.

    The networks are the Baseline, it with each module alone, and LCCo without and with the tower.
    parameters: million. flops: 10⁹, of convolutions and matrix products, a multiply-add as two.
    seconds: the least of `repeats` rounds that take all in turn, after one to warm up. ratio: by
    those of tower and backbone. Weights are random; the words' embeddings are not counted.
    """
    e = profile.experiment.replace({"model.weights": None, "tower.weights": None})
    n, about = profile.group_size, environment()
    works, sizes = parts(e, n)
    costs = pd.DataFrame({"parameters": sizes, "flops": {k: flops(w) for k, w in works.items()}})
    rounds = [{k: seconds(w) for k, w in works.items()} for _ in range(repeats + 1)]
    costs["seconds"] = pd.DataFrame(rounds[1:]).min()
    costs["ratio"] = costs["seconds"] / costs.loc[[TOWER, BACKBONE], "seconds"].sum()
    costs = costs.div({"parameters": 1e6, "flops": 1e9, "seconds": 1, "ratio": 1}).round(5)
    here = {k: about[k] for k in ("device", "platform", "cores", "threads")}
    here |= {"torch": str(torch.__version__), "repeats": repeats, "protocol": ""}
    here |= {"test_set": f"{n} × {e.data.size} px", "images": n, "group_size": n}
    rows = costs.to_dict("index").items()
    return pd.DataFrame([row("bench", name, profile, e, **here, **cells) for name, cells in rows])


def parts(e: Experiment, images: int) -> tuple[dict[str, Callable], dict[str, int]]:
    """What is measured: name → its work on a set of noise, and name → its parameters."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features = make_features(e, device)
    words = make_vocabulary(features.tower, e.tower)
    shape = images, e.data.size, e.data.size, 3
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pictures = [Image.fromarray(one) for one in noise]
    x = torch.from_numpy(noise).permute(0, 3, 1, 2).float().div(255).to(device)

    def embed() -> torch.Tensor:
        return features.tower.encode_images(pictures)[None].to(device)

    def network(*on: str) -> nn.Module:
        switched = e.replace({f"model.{module}": module in on for module in MODULES})
        return build_model(switched, features, words).eval().to(device)

    nets = {BASELINE: network()} | {f"{BASELINE} + {label(m)}": network(m) for m in MODULES}
    nets[CACHED] = network(*MODULES)
    h, text = embed(), words.embeddings.to(device)
    works = {TOWER: embed, BACKBONE: lambda: features.backbone(x)}
    works |= {name: partial(net, x[None], h, text) for name, net in nets.items()}
    works[LCCO] = lambda: nets[CACHED](x[None], embed(), text)
    tower = getattr(features.tower.net, "visual", features.tower.net)
    modules = {TOWER: tower, BACKBONE: features.backbone, **nets}
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items()}
    return works, sizes | {LCCO: sizes[CACHED] + sizes[TOWER]}


@torch.no_grad()
def flops(work: Callable[[], Any]) -> int:
    """Operations of a work's matrix products and convolutions."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention would count as nothing
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


@torch.no_grad()
def seconds(work: Callable[[], Any]) -> float:
    """How long a work takes, once."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
