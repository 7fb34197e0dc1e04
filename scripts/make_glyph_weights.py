"""Make the two shipped networks of the embedded profile: `python -m lcco.pretrain --out DIR [--short]`.

Both are trained on GlyphWorld drawings of all 40 classes, as the real CLIP and ImageNet hold the classes that
co-segmentation is tested on; masks are never used. The drawings are not those of any fold of `glyphworld`.

glyph_clip: open_clip's CLIP (a timm ResNet and a Transformer), trained with open_clip's ClipLoss on captions.
glyph_backbone: the `glyphnet` ResNet trained to name the classes in a scene; each of its last three maps is read
place by place and pooled by a log-sum-exp, so that the maps say where a class stands.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcco.common import atomic_path, duration, file_digest, progress, write_json
from lcco.glyphworld import CLASSES, VERSION, draw

TEMPLATE = "a drawing of a {}."  # the prompt that the embedded profile uses
CAPTIONS = (TEMPLATE, "a {}.", "a picture of a {}.", "there is a {} in the scene.", "a scene with a {}.", "one {}.")
# open_clip's arguments. timm's smallest ResNet learns these drawings several times faster than open_clip's own. The
# 49,408 rows of the tokeniser's text embedding decide the file's size (3.2 of 4 MB), so the text tower is narrow.
MODEL_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {
        "timm_model_name": "test_resnet",
        "timm_model_pretrained": False,
        "timm_pool": "avgmax",
        "timm_proj": "linear",
        "image_size": 96,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
MEAN = STD = (0.5, 0.5, 0.5)
NAMES = tuple(CLASSES)
STRIDE_WEIGHTS = (0.5, 1.0, 0.5)  # of the losses read from strides 8, 16, 32


@dataclass(frozen=True)
class Recipe:
    """How both networks are trained; the defaults made the shipped weights.

    Each learns single objects first, then scenes: started on scenes, both need several times as long.
    """

    seed: int = 0
    alone: int = 4_000  # drawings of one object
    scenes: int = 8_000  # drawings of two or three
    clip_steps: tuple[int, int] = (500, 1100)  # on single objects, on scenes (a quarter of the pictures single)
    clip_lr: float = 2e-3
    backbone_steps: tuple[int, int] = (600, 1000)  # on single objects, on scenes
    backbone_batch: int = 40
    backbone_lr: float = 3e-3
    weight_decay: float = 0.05
    bf16: bool = True  # half again as fast where the processor has it
    held_out: int = 400  # drawings of either kind behind each measured number


SHORT = Recipe(alone=80, scenes=80, clip_steps=(2, 2), backbone_steps=(2, 2), backbone_batch=8, held_out=120)


@dataclass
class Drawings:
    """Pictures, uint8 [n, 3, size, size], and the classes each holds, bool [n, 40]."""

    images: Tensor
    holds: Tensor


def drawings(n: int, objects: Sequence[int], seed: int) -> Drawings:
    """Draw `n` scenes of as many objects as `objects` says in turn; the classes are equally frequent.

    Pictures of one object are drawn at 96 pixels, others at 128, which makes the objects equally large.
    """
    rng, size = np.random.default_rng((77, seed)), 96 if max(objects) == 1 else 128
    images, holds = torch.empty(n, 3, size, size, dtype=torch.uint8), torch.zeros(n, len(NAMES), dtype=torch.bool)
    for i in progress(range(n), "drawing"):
        first = i % len(NAMES)
        others = rng.permutation([c for c in range(len(NAMES)) if c != first])
        chosen = rng.permutation([first, *others[: objects[i // len(NAMES) % len(objects)] - 1]])
        picture, _ = draw([NAMES[c] for c in chosen], (90, seed, i), size)  # the folds' seeds are others
        images[i] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        holds[i, torch.from_numpy(chosen)] = True
    return Drawings(images, holds)


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """uint8 [B, 3, H, W] → float 0..1: mirrored, moved by up to 6 pixels and recoloured, one way for the batch."""
    x = images[:, torch.from_numpy(rng.permutation(3))].float() / 255
    x = x.flip(-1) if rng.random() < 0.5 else x
    dy, dx = (int(d) for d in rng.integers(-6, 7, 2))
    return F.pad(x, (6 + dx, 6 - dx, 6 + dy, 6 - dy), mode="replicate")[..., 6:-6, 6:-6]


def fit(
    parameters: Sequence[nn.Parameter],
    loss_of: Callable[[int], Tensor],
    steps: int,
    lr: float,
    recipe: Recipe,
    what: str,
) -> None:
    """AdamW (no decay on vectors), warm-up and cosine, on `loss_of(step)`; prints the mean loss now and then."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    warm = min(50, max(1, steps // 4))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda n: min(1, (n + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1, n / steps)))
    )
    total, start = 0.0, time.monotonic()
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            loss = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        total += float(loss.detach())
        if (step + 1) % 100 == 0:
            spent = time.monotonic() - start
            left = duration(spent / (step + 1) * (steps - step - 1))
            print(f"{what}: {step + 1}/{steps}, loss {total / 100:.3f}, {left} left", file=sys.stderr, flush=True)
            total = 0.0


# ---------------------------------------------------------------------------------------------------------- CLIP
def build_clip() -> nn.Module:
    """open_clip's CLIP of `MODEL_CONFIG`, random."""
    from open_clip.model import CLIP

    return CLIP(**MODEL_CONFIG)


def clip_pixels(images: Tensor) -> Tensor:
    """0..1 pictures [n, 3, H, W] as the image tower reads them."""
    size = MODEL_CONFIG["vision_cfg"]["image_size"]
    x = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return ((x - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)


def caption(held: Sequence[int], rng: np.random.Generator, first: int) -> str:
    """A caption that names `first` alone or, half the time, all objects in any order."""
    if rng.random() < 0.5:
        words = [NAMES[c] for c in rng.permutation(held)]
        words = ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]
    else:
        words = NAMES[first]
    return CAPTIONS[int(rng.integers(len(CAPTIONS)))].format(words)


def train_clip(alone: Drawings, scenes: Drawings, recipe: Recipe) -> nn.Module:
    """Contrastive training, one picture for each class a step, so that no two captions of a batch name the same."""
    import open_clip

    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng((1, recipe.seed))
    model, contrast = build_clip().to(memory_format=torch.channels_last).train(), open_clip.ClipLoss()
    tokenise = open_clip.SimpleTokenizer(context_length=MODEL_CONFIG["text_cfg"]["context_length"])
    showing = {id(d): [np.flatnonzero(h) for h in d.holds.T.numpy()] for d in (alone, scenes)}

    def loss_of(step: int) -> Tensor:
        classes = rng.permutation(len(NAMES))
        single = len(classes) if step < recipe.clip_steps[0] else len(classes) // 4
        pixels, texts = [], []
        for data, part in ((alone, classes[:single]), (scenes, classes[single:])):
            if len(part):
                items = [int(rng.choice(showing[id(data)][c])) for c in part]
                texts += [caption(np.flatnonzero(data.holds[i]), rng, c) for c, i in zip(part, items, strict=True)]
                pixels.append(clip_pixels(augment(data.images[items], rng)))
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        image, text, scale = model(torch.cat(pixels), tokenise(texts))
        return contrast(image.float(), text.float(), scale)

    fit(list(model.parameters()), loss_of, sum(recipe.clip_steps), recipe.clip_lr, recipe, "glyph_clip")
    return model.eval()


@torch.no_grad()
def clip_embeddings(model: nn.Module, data: Drawings) -> tuple[Tensor, Tensor]:
    """Unit image embeddings [n, D] and the vocabulary's [40, D] under the project's prompt."""
    import open_clip

    tokenise = open_clip.SimpleTokenizer(context_length=MODEL_CONFIG["text_cfg"]["context_length"])
    parts = [
        model.encode_image(clip_pixels(chunk.float() / 255), normalize=True) for chunk in data.images.split(50)
    ]
    return torch.cat(parts), model.encode_text(tokenise([TEMPLATE.format(n) for n in NAMES]), normalize=True)


def set_accuracy(cosines: Tensor, holds: Tensor, top: int, seed: int = 0, sets: int = 400, size: int = 5) -> float:
    """Share of sets whose shared class is among the `top` words by the sum of cosines.

    `cosines`, `holds`: [n, 40]. A set is `size` random pictures that hold a class.
    """
    rng, hits = np.random.default_rng(seed), 0
    showing = [np.flatnonzero(holds[:, c].numpy()) for c in range(holds.shape[1])]
    known = [c for c, s in enumerate(showing) if len(s) >= size]
    for n in range(sets):
        c = known[n % len(known)]
        best = cosines[rng.permutation(showing[c])[:size]].sum(0).topk(top).indices
        hits += c in best
    return hits / sets


# ------------------------------------------------------------------------------------------------------ backbone
def build_backbone() -> nn.Module:
    """The embedded profile's backbone, random."""
    from lcco.backbones import make_backbone

    return make_backbone("glyphnet", None)


class PlaceHeads(nn.Module):
    """Class scores of a scene from the maps at strides 8, 16 and 32, each place by place, pooled by log-sum-exp."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(c, len(NAMES), 1) for c in channels[1:])
        for head in self.heads:
            nn.init.zeros_(head.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps at strides 4 to 32 → three logits [B, 40]."""
        sharp = 3.0
        scores = [head(m).flatten(2) for head, m in zip(self.heads, maps[1:], strict=True)]
        return [(torch.logsumexp(sharp * s, 2) - math.log(s.shape[2])) / sharp for s in scores]


def train_backbone(alone: Drawings, scenes: Drawings, recipe: Recipe) -> tuple[nn.Module, nn.Module]:
    """Classification of pictures by the classes they hold; gives the backbone and the heads that read it."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng((2, recipe.seed))
    net = build_backbone().train()
    heads = PlaceHeads(net.channels).train()

    def loss_of(step: int) -> Tensor:
        data = alone if step < recipe.backbone_steps[0] else scenes
        items = rng.integers(len(data.images), size=recipe.backbone_batch)
        truth = data.holds[items].float()
        truth = truth / truth.sum(1, keepdim=True)  # shared evenly: cross-entropy learns far faster than 40 yes-or-no
        logits = heads(net(augment(data.images[items], rng)))
        return sum(w * F.cross_entropy(x.float(), truth) for w, x in zip(STRIDE_WEIGHTS, logits, strict=True))

    parameters = [*net.parameters(), *heads.parameters()]
    fit(parameters, loss_of, sum(recipe.backbone_steps), recipe.backbone_lr, recipe, "glyph_backbone")
    return net.eval(), heads.eval()


@torch.no_grad()
def place_accuracy(net: nn.Module, heads: nn.Module, alone: Drawings, scenes: Drawings) -> dict[str, float]:
    """For each map: how often it names a single object, and what share of a scene's k classes is in its top k."""

    def scores(data: Drawings) -> list[Tensor]:
        return [torch.cat(z) for z in zip(*(heads(net(x.float() / 255)) for x in data.images.split(50)), strict=True)]

    found = {}
    for stride, one, many in zip((8, 16, 32), scores(alone), scores(scenes), strict=True):
        found[f"one object, stride {stride}"] = _top1(one, alone.holds)
        hits = [h[s.topk(int(h.sum())).indices].float().mean() for s, h in zip(many, scenes.holds, strict=True)]
        found[f"scene, stride {stride}"] = float(torch.stack(hits).mean())
    return found


def _top1(scores: Tensor, holds: Tensor) -> float:
    return float(holds.gather(1, scores.argmax(1, keepdim=True)).float().mean())


def clip_accuracy(model: nn.Module, alone: Drawings, scenes: Drawings) -> dict[str, float]:
    """Zero-shot accuracy on single objects and, over sets of five scenes, of the shared class, top-1 and top-5."""
    one, words = clip_embeddings(model, alone)
    many, _ = clip_embeddings(model, scenes)
    cosines = many @ words.T
    return {
        "one object, top-1": _top1(one @ words.T, alone.holds),
        "set of 5 scenes, top-1": set_accuracy(cosines, scenes.holds, 1),
        "set of 5 scenes, top-5": set_accuracy(cosines, scenes.holds, 5),
    }


# ------------------------------------------------------------------------------------------------------- command
def save(folder: Path, name: str, net: nn.Module, card: dict, seconds: float, recipe: Recipe) -> Path:
    """Write `name`.safetensors in half precision and, beside it, `name`.json: how it was made and what it scores."""
    from importlib.metadata import version

    from safetensors.torch import save_file

    path = folder / f"{name}.safetensors"
    state = {k: v.detach().half().contiguous() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    with atomic_path(path) as part:
        save_file(state, part)
    packages = ("torch", "open_clip_torch", "timm", "matplotlib", "numpy", "pillow")
    card |= {
        "command": "python -m lcco.pretrain --out DIR" + (" --short" if recipe == SHORT else ""),
        "recipe": asdict(recipe),
        "seconds": round(seconds),
        "sha256": file_digest(path, 64),
        "classes": NAMES,
        "glyphworld": VERSION,
        "note": "trained on drawings of all 40 classes, those of the test fold too, as CLIP and ImageNet know the "
        "classes co-segmentation is tested on; no mask was used, and no picture of a fold of GlyphWorld",
        "versions": {p: version(p) for p in packages},
    }
    write_json(folder / f"{name}.json", card)
    return path


def pretrain(folder: Path, recipe: Recipe | None = None, only: str | None = None) -> dict[str, dict]:
    """Draw, train, measure and save both networks, or `only` one; returns what they score.

    Weights are rounded to half precision before they are measured, as they are shipped.
    """
    recipe = recipe or Recipe()
    alone, scenes = drawings(recipe.alone, (1,), recipe.seed), drawings(recipe.scenes, (2, 3), recipe.seed + 1)
    held = drawings(recipe.held_out, (1,), recipe.seed + 2), drawings(recipe.held_out, (2, 3), recipe.seed + 3)
    scores = {}
    if only in (None, "clip"):
        start = time.monotonic()
        model = train_clip(alone, scenes, recipe).half().float()
        scores["glyph_clip"] = clip_accuracy(model, *held)
        card = {"model_config": MODEL_CONFIG, "image_size": MODEL_CONFIG["vision_cfg"]["image_size"], "mean": MEAN,
                "std": STD, "context_length": MODEL_CONFIG["text_cfg"]["context_length"], "template": TEMPLATE,
                "accuracy": scores["glyph_clip"]}  # fmt: skip
        save(folder, "glyph_clip", model, card, time.monotonic() - start, recipe)
    if only in (None, "backbone"):
        start = time.monotonic()
        net, heads = train_backbone(alone, scenes, recipe)
        net = net.half().float()
        scores["glyph_backbone"] = place_accuracy(net, heads, *held)
        card = {"backbone": net.name, "channels": net.channels, "mean": net.mean, "std": net.std,
                "accuracy": scores["glyph_backbone"]}  # fmt: skip
        save(folder, "glyph_backbone", net, card, time.monotonic() - start, recipe)
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lcco.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and their cards")
    parser.add_argument("--short", action="store_true", help="a few steps on a few drawings: does it run?")
    parser.add_argument("--only", choices=("clip", "backbone"), help="make one of the two")
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for name, found in pretrain(options.out, SHORT if options.short else Recipe(), options.only).items():
        print(name + ": " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))


if __name__ == "__main__":
    main()
