"""Make the embedded profile's two networks: `python scripts/make_glyph_weights.py --out DIR`.

Both are trained on GlyphWorld drawings of all classes, as the real CLIP and ImageNet hold the
classes that co-segmentation is tested on; masks are never used, nor a drawing of any fold.

glyph_clip: open_clip's CLIP (a timm ResNet and a Transformer), trained with open_clip's ClipLoss
on captions. glyph_backbone: the `glyphnet` ResNet, trained to name the classes in a scene; each of
its last three maps is read place by place and pooled, so that the maps say where a class stands.
Single objects come first, then scenes: begun on scenes, both need several times as long.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor, nn

from lcco.backbones import make_backbone
from lcco.common import file_digest, progress
from lcco.data.glyphworld import CLASSES, VERSION, draw
from lcco.store import atomic_path, write_json

NAMES = tuple(CLASSES)
PACKAGES = ("torch", "open_clip_torch", "timm", "matplotlib", "numpy", "pillow")
TEMPLATE = "a drawing of a {}."  # the prompt that the embedded profile uses
CAPTIONS = (TEMPLATE, "a {}.", "a picture of a {}.", "there is a {} in the scene.",
            "a scene with a {}.", "one {}.")  # fmt: skip
# timm's smallest ResNet learns these drawings several times faster than open_clip's own. The
# tokeniser's 49,408 rows decide the file's size (3.2 of 4 MB), so the text tower is narrow.
SIZE, SPAN = 96, 16
MODEL_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"timm_model_name": "test_resnet", "timm_model_pretrained": False,
                   "timm_pool": "avgmax", "timm_proj": "linear", "image_size": SIZE},
    "text_cfg": {"context_length": SPAN, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}  # fmt: skip
tokenise = open_clip.SimpleTokenizer(context_length=SPAN)


@dataclass(frozen=True)
class Recipe:
    """How much both are trained; the defaults made the shipped weights."""

    alone: int = 8_000  # drawings of one object
    scenes: int = 16_000  # drawings of two or three
    held_out: int = 400  # drawings of either kind behind each measured number
    clip_steps: tuple[int, int] = (600, 1700)  # on single objects, on scenes (a quarter single)
    backbone_steps: tuple[int, int] = (800, 1800)  # on single objects, on scenes
    backbone_batch: int = 40


SHORT = Recipe(85, 85, 170, (1, 1), (1, 1), 8)


class Drawings(NamedTuple):
    """Pictures, uint8 [n, 3, size, size], and the classes each holds, bool [n, classes]."""

    images: Tensor
    holds: Tensor


def drawings(n: int, objects: Sequence[int], seed: int) -> Drawings:
    """`n` scenes of as many objects as `objects` says in turn; classes are equally frequent.

    Those of one object are drawn at 96 pixels, others at 128: the objects are equally large.
    """
    rng, size = np.random.default_rng((77, seed)), 96 if max(objects) == 1 else 128
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    holds = torch.zeros(n, len(NAMES), dtype=torch.bool)
    for i in progress(range(n), "drawing"):
        first, count = i % len(NAMES), objects[i // len(NAMES) % len(objects)]
        others = rng.permutation([c for c in range(len(NAMES)) if c != first])
        chosen = rng.permutation([first, *others[: count - 1]])
        picture, _ = draw([NAMES[c] for c in chosen], (90, seed, i), size)  # folds have other seeds
        images[i] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        holds[i, torch.from_numpy(chosen)] = True
    return Drawings(images, holds)


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """uint8 [B, 3, H, W] → 0..1; mirrored, moved and recoloured, one way for the batch."""
    x = images[:, torch.from_numpy(rng.permutation(3))].float() / 255
    x = x.flip(-1) if rng.random() < 0.5 else x
    dy, dx = (int(d) for d in rng.integers(-6, 7, 2))
    return F.pad(x, (6 + dx, 6 - dx, 6 + dy, 6 - dy), mode="replicate")[..., 6:-6, 6:-6]


def fit(net: nn.Module, loss_of: Callable[[int], Tensor], steps: int, lr: float) -> None:
    """AdamW (no decay on vectors), warm-up and cosine, on `loss_of(step)`."""
    parameters = list(net.parameters())
    matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05}
    vectors = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    optimiser = torch.optim.AdamW([matrices, vectors], lr=lr, betas=(0.9, 0.98))
    warm = min(50, max(1, steps // 4))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda n: min(1, (n + 1) / warm) * 0.5 * (1 + math.cos(math.pi * n / steps))
    )
    for step in progress(range(steps), f"training {type(net).__name__}"):
        with torch.autocast("cpu", torch.bfloat16):  # half again as fast
            loss = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()


def clip_pixels(images: Tensor) -> Tensor:
    """0..1 pictures [n, 3, H, W] as the image tower reads them."""
    x = F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
    return ((x.clamp(0, 1) - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)


def caption(held: Sequence[int], rng: np.random.Generator, first: int) -> str:
    """A caption that names `first` alone or, half the time, all objects in any order."""
    words = NAMES[first]
    if rng.random() < 0.5:
        *most, last = (NAMES[c] for c in rng.permutation(held))
        words = ", ".join(most) + " and " + last if most else last
    return CAPTIONS[int(rng.integers(len(CAPTIONS)))].format(words)


def train_clip(alone: Drawings, scenes: Drawings, r: Recipe) -> nn.Module:
    """Contrastive, a picture of each class a step: no two captions of a batch name the same."""
    torch.manual_seed(0)
    rng = np.random.default_rng((1, 0))
    model = CLIP(**MODEL_CONFIG).to(memory_format=torch.channels_last).train()
    showing = [[np.flatnonzero(h) for h in d.holds.T.numpy()] for d in (alone, scenes)]

    def loss_of(step: int) -> Tensor:
        classes = rng.permutation(len(NAMES))
        single = len(classes) if step < r.clip_steps[0] else len(classes) // 4
        pixels, texts = [], []
        parts = (alone, showing[0], classes[:single]), (scenes, showing[1], classes[single:])
        for data, where, part in (p for p in parts if len(p[2])):
            items = [int(rng.choice(where[c])) for c in part]
            pairs = zip(part, items, strict=True)
            texts += [caption(np.flatnonzero(data.holds[i]), rng, c) for c, i in pairs]
            pixels.append(clip_pixels(augment(data.images[items], rng)))
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        image, text, scale = model(torch.cat(pixels), tokenise(texts))
        return open_clip.ClipLoss()(image.float(), text.float(), scale)

    fit(model, loss_of, sum(r.clip_steps), 2e-3)
    return model.eval()


def top(scores: Tensor, holds: Tensor) -> float:
    """Share of the k classes of a picture that are among its k likeliest."""
    pairs = zip(scores, holds, strict=True)
    return float(np.mean([h[s.topk(int(h.sum())).indices].float().mean() for s, h in pairs]))


@torch.no_grad()
def clip_accuracy(model: nn.Module, alone: Drawings, scenes: Drawings) -> dict[str, float]:
    """Zero-shot: single objects, and the shared class of 400 sets of five scenes."""
    words = model.encode_text(tokenise([TEMPLATE.format(n) for n in NAMES]), normalize=True)
    chunks = [[clip_pixels(x.float() / 255) for x in d.images.split(50)] for d in (alone, scenes)]
    one, many = (torch.cat([model.encode_image(x, True) @ words.T for x in c]) for c in chunks)
    rng, ranks = np.random.default_rng(0), []
    showing = [np.flatnonzero(h) for h in scenes.holds.T.numpy()]
    for c in np.resize([c for c, s in enumerate(showing) if len(s) >= 5], 400):
        score = many[rng.permutation(showing[c])[:5]].sum(0)
        ranks.append(int((score > score[c]).sum()))
    sets = {f"set of 5 scenes, top-{n}": float(np.mean(np.less(ranks, n))) for n in (1, 5)}
    return {"one object, top-1": top(one, alone.holds)} | sets


class PlaceHeads(nn.Module):
    """Class scores from the maps at strides 8, 16, 32, each place by place, log-sum-exp pooled."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(c, len(NAMES), 1) for c in channels[1:])
        for head in self.heads:
            nn.init.zeros_(head.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps at strides 4 to 32 → three logits [B, classes]."""
        scores = [3 * head(m).flatten(2) for head, m in zip(self.heads, maps[1:], strict=True)]
        return [(torch.logsumexp(s, 2) - math.log(s.shape[2])) / 3 for s in scores]


def train_backbone(alone: Drawings, scenes: Drawings, r: Recipe) -> nn.Sequential:
    """Classification of pictures by the classes they hold: the backbone, and heads that read it."""
    torch.manual_seed(0)
    rng, net = np.random.default_rng((2, 0)), make_backbone("glyphnet", None).train()
    both = nn.Sequential(net, PlaceHeads(net.channels).train())

    def loss_of(step: int) -> Tensor:
        data = alone if step < r.backbone_steps[0] else scenes
        items = rng.integers(len(data.images), size=r.backbone_batch)
        truth = data.holds[items].float()
        truth = truth / truth.sum(1, keepdim=True)  # cross-entropy learns faster than yes-or-no
        losses = [F.cross_entropy(x.float(), truth) for x in both(augment(data.images[items], rng))]
        return 0.5 * losses[0] + losses[1] + 0.5 * losses[2]

    fit(both, loss_of, sum(r.backbone_steps), 3e-3)
    return both.eval()


@torch.no_grad()
def place_accuracy(both: nn.Module, alone: Drawings, scenes: Drawings) -> dict[str, float]:
    """For each map: single objects named, and the share of a scene's k classes in its top k."""
    found = {}
    for kind, data in (("one object", alone), ("scene", scenes)):
        maps = zip(*(both(x.float() / 255) for x in data.images.split(50)), strict=True)
        for stride, scores in zip((8, 16, 32), maps, strict=True):
            found[f"{kind}, stride {stride}"] = top(torch.cat(scores), data.holds)
    return found


def save(folder: Path, name: str, net: nn.Module, recipe: Recipe, **card: object) -> None:
    """Write <name>.safetensors in half precision, and <name>.json: how it was made and scores."""
    path, state = folder / f"{name}.safetensors", net.half().state_dict()
    with atomic_path(path) as part:
        save_file({k: v.contiguous() for k, v in state.items()}, part)
    write_json(folder / f"{name}.json", card | {
        "command": "python scripts/make_glyph_weights.py --out DIR", "classes": NAMES,
        "recipe": asdict(recipe), "sha256": file_digest(path, 64), "glyphworld": VERSION,
        "mean": (0.5,) * 3, "std": (0.5,) * 3, "versions": {p: version(p) for p in PACKAGES},
        "note": "trained on drawings of all classes, those of the test fold too, as CLIP and "
        "ImageNet know the classes co-segmentation is tested on; no mask was used, and no picture "
        "of a fold of GlyphWorld",
    })  # fmt: skip
    print(f"{name}: {card['accuracy']}")


def main() -> None:
    """Draw, train, measure and save both; weights are rounded before they are measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and cards")
    parser.add_argument("--short", action="store_true", help="a few steps: does it run?")
    options = parser.parse_args()
    torch.set_num_threads(1)
    r = SHORT if options.short else Recipe()
    pictures = [(r.alone, (1,)), (r.scenes, (2, 3)), (r.held_out, (1,)), (r.held_out, (2, 3))]
    *train, alone, scenes = (drawings(n, of, i) for i, (n, of) in enumerate(pictures))
    clip, both = train_clip(*train, r).half().float(), train_backbone(*train, r)
    net = both[0].half().float()
    save(options.out, "glyph_clip", clip, r, accuracy=clip_accuracy(clip, alone, scenes),
         model_config=MODEL_CONFIG, image_size=SIZE, context_length=SPAN,
         template=TEMPLATE)  # fmt: skip
    save(options.out, "glyph_backbone", net, r, accuracy=place_accuracy(both, alone, scenes),
         backbone=net.name, channels=net.channels)  # fmt: skip


if __name__ == "__main__":
    main()
