"""Table 5's rivals: foundation models, and clustering without training, scored as runs are.

A rival has a run's `evaluate`, `path` and `record`, and is a Segmenter itself. Its weights are
looked for when a mask is asked for. Only rows named GT look at the true class or mask.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as rle
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from lcco import backbones
from lcco.common import LCCoError, Missing, digest, file_digest, place
from lcco.data import CoSegData
from lcco.experiment.evaluate import CHOICE, Evaluation, evaluate_all, evaluate_choice
from lcco.experiment.features import Features
from lcco.semantics import Vocabulary, prompts, target_word, vocabulary
from lcco.store import read_json, write_json

# A commit pins what a row measured; the models' pages tell under which terms they are given.
HUB = {
    "sam": "facebook/sam-vit-huge@87aecf0df4ce6b30cd7de76e87673c49644bdf67",
    "sam3": "facebook/sam3@3c879f39826c281e95690f02c7821c4de09afae7",
    "clipseg": "CIDAS/clipseg-rd64-refined@999e0328d9e10b484360c477313983f9afdd7050",
}
SEEM_HOW = "put SEEM's checkout and its requirements on PYTHONPATH, and name its weights file"
KEPT = 256  # pictures whose findings stay in memory, so that two protocols share them
FORM = 2  # raise it when masks change, so that no old score is taken for a new one


# ------------------------------------------------------------------------------------------ weights
def find_weights(model: str, where: str | None = None) -> Path:
    """The folder or file of a model's weights: a path, or `repository@commit` (default: HUB's).

    What the hub's cache lacks is downloaded once. Raises: Missing within seconds.
    """
    where = where or HUB.get(model, "")
    path, (repo, _, commit) = Path(where).expanduser(), where.partition("@")
    if where and path.exists():
        return path
    if commit:
        kinds = "*.safetensors", "pytorch_model*.bin"
        return backbones.hub_file(repo, *kinds, commit=commit).parent
    how = f"there is no {path}; name a local folder, or `repository@commit` of the hub"
    raise Missing("weights", path.name or model, SEEM_HOW if model == "seem" else how)


def _load(kind: str, folder: Path, device: torch.device) -> Any:
    """A transformers model (or processor) from a local folder."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    make = getattr(transformers, kind).from_pretrained
    with backbones.reading(folder, kind):
        if "Processor" in kind:
            return make(folder, local_files_only=True)
        model, info = make(folder, output_loading_info=True, local_files_only=True)
        # transformers would fill them with random numbers
        if lacking := sorted(set(info["missing_keys"]) & dict(model.named_parameters()).keys()):
            raise LookupError(f"`{lacking[0]}` is missing")
    return model.eval().requires_grad_(False).to(device)


# ------------------------------------------------------------------------------- masks and classes
def pack(mask: np.ndarray) -> dict[str, Any]:
    """A boolean mask [H, W] as COCO's run-length code, some kB, so that masks never pile up."""
    return rle.encode(np.asfortranarray(mask, np.uint8))


def unpack(code: dict[str, Any]) -> np.ndarray:
    """The mask of a code as uint8 [H, W]."""
    return rle.decode(code)


def boxes_of(mask: np.ndarray, least: float = 5e-4) -> list[list[float]]:
    """Boxes [x0, y0, x1, y1] (pixel edges) of a mask's connected objects.

    Specks below a share `least` of the picture get no box, unless nothing larger is there.
    """
    labels, n = ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    keep = areas >= min(least * mask.size, areas.max(initial=0))
    boxes = [[x.start, y.start, x.stop, y.stop] for y, x in ndimage.find_objects(labels)]
    return np.array(boxes, float).reshape(-1, 4)[keep].tolist()


def cut_out(image: np.ndarray, mask: np.ndarray) -> Image.Image:
    """The masked object, white around it, cropped by its box and padded to a square.

    image: uint8 [H, W, 3]; mask: bool [H, W], not empty.
    """
    out = Image.fromarray(np.where(mask[..., None], image, np.uint8(255)))
    out = out.crop(Image.fromarray(mask).getbbox())
    return ImageOps.pad(out, (max(out.size), max(out.size)), color="white")


def vote_class(scores: Sequence[np.ndarray]) -> int | None:
    """The set's class from each image's probabilities [masks, P]; None when no image has a mask.

    An image gives each class its best mask's probability; the largest sum over the images wins.
    """
    best = [s.max(0) for s in scores if len(s)]
    return int(np.sum(best, axis=0, dtype=np.float64).argmax()) if best else None


def vote_panoptic(images: Sequence[Mapping[str, float]]) -> str | None:
    """The class that most images show, given each image's classes and their shares of it.

    A tie goes to the larger area summed over the images, then to the first by name.
    """
    count = Counter(name for shares in images for name in shares)
    area = {name: sum(shares.get(name, 0.0) for shares in images) for name in count}
    return min(count, key=lambda name: (-count[name], -area[name], name), default=None)


# ---------------------------------------------------------------------------------------- interface
class Rival:
    """A co-segmenter without training on the task: `rival(data, items, cls)` yields masks [h, w].

    model: whose weights it needs; kinds: transformers' classes of its network and its processor.
    defaults: its settings, all our reading where the paper is silent. semantic: whether it uses
    tower and vocabulary. truth: whether it looks at the truth.
    """

    name, model = "", ""
    kinds: tuple[str, ...] = ()
    semantic, truth = True, False
    defaults: dict[str, Any] = {}

    def __init__(
        self, features: Features, words: Vocabulary, weights: Mapping[str, str],
        settings: Mapping[str, Any],
    ) -> None:  # fmt: skip
        if unknown := settings.keys() - self.defaults.keys():
            known = ", ".join(self.defaults)
            raise LCCoError(f"{self.name}: no setting `{min(unknown)}`; there are: {known}")
        self.features, self.words, self.weights = features, words, weights
        self.settings, self.device = self.defaults | dict(settings), torch.device(features.device)
        self.scored: dict[str, Any] = {"data": {}}
        self._net = self._read = None
        self._look: Callable[..., Any] | None = None

    def load(self) -> None:
        """Load network and processor. Raises: Missing for what is not here."""
        if self.kinds:
            self._net, self._read = (_load(k, self.folder, self.device) for k in self.kinds)

    def __call__(self, data: CoSegData, items: Sequence[int], cls: str) -> Iterator[np.ndarray]:
        if self._look is None:
            self.load()
            self._look = lru_cache(KEPT)(self.look)
        yield from self.masks(data, items, cls)

    def masks(self, data: CoSegData, items: Sequence[int], cls: str) -> Iterator[np.ndarray]:
        """The masks of a set, one at a time, by models that are loaded."""
        yield from self.choose([self._look(data, i, cls if self.truth else "") for i in items], cls)

    def look(self, data: CoSegData, i: int, cls: str) -> Any:
        """What the model finds in one picture, in a compact form."""

    def choose(self, found: Sequence[Any], cls: str) -> Iterator[np.ndarray]:
        """The masks of a set from what was found in its pictures."""

    def probabilities(self, embeddings: Tensor) -> np.ndarray:
        """Embeddings [n, D] → each one's probabilities over the vocabulary, float32 [n, P]."""
        scale = self.features.tower.logit_scale
        return (scale * embeddings @ self.words.embeddings.T).softmax(-1).numpy()

    @cached_property
    def folder(self) -> Path:
        """Where its weights are. Raises: Missing."""
        return find_weights(self.model, self.weights.get(self.model))

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """What decides the masks. Raises: Missing without the weights."""
        out = {"rival": self.name, "form": FORM, "settings": self.settings, "weights": {}}
        if self.model:
            at, pinned = self.folder, HUB.get(self.model, "")
            files = [f for f in at.glob("*") if f.suffix in (".json", ".safetensors", ".bin")]
            sums = [[f.name, file_digest(f)] for f in (sorted(files) if at.is_dir() else [at])]
            source = pinned if pinned.endswith(f"@{at.name}") else at.name
            out["weights"][self.model] = {"from": source, "sha256": digest(sums)}
        if self.semantic:
            out |= {"tower": self.features.tower.identity, "vocabulary_hash": self.words.hash}
            out |= {"templates": list(self.words.templates)}
        return out

    @property
    def path(self) -> Path:
        """Where its scores are kept."""
        slug = re.sub("[^a-z0-9]", "-", self.name.lower())
        return place("cache") / "rivals" / f"{slug}-{digest(self.made_of, 10)}"

    @property
    def record(self) -> dict[str, Any]:
        """What decides the masks; and the data, machine and versions behind the scores given."""
        return self.made_of | self.scored

    def evaluate(
        self, test: CoSegData, protocols: Sequence[str], group_size: int = 5
    ) -> dict[str, Evaluation]:
        """Scores under protocols (`choice` too), each computed once and kept.

        Raises: Missing for absent weights.
        """
        from lcco.experiment.runs import environment

        end = f"{group_size}-{digest(test.identity(), 10)}.json"
        files = {p: self.path / f"{test.name}-{p}-{end}".replace("/", "_") for p in protocols}
        if missing := [p for p in files if not files[p].is_file()]:
            plain = [p for p in missing if p not in CHOICE]
            found = evaluate_all(self, test, plain, group_size) if plain else {}
            if len(plain) < len(missing):
                found |= evaluate_choice(self, test, group_size)
            self._net = self._read = self._look = None  # the memory is free for the next rival
            by = {"masks": test.truth_digest(), "environment": environment()}
            for p in missing:
                write_json(files[p], asdict(found[p]) | by)
        stored = {p: read_json(file) for p, file in files.items()}
        for value in stored.values():
            by = {"digest": value["digest"], "masks": value.pop("masks")}
            self.scored["data"][test.name] = by
            self.scored["environment"] = value.pop("environment")
        return {p: Evaluation(**value) for p, value in stored.items()}


# ---------------------------------------------------------------------------------------------- SAM
class Sam(Rival):
    """SAM's automatic masks, each cut out and classified by the tower; the set's class is voted.

    The mask of an image is the one most likely of that class.
    Deviation: the paper names SAM, CLIP and no more; how they work together is our reading.
    """

    name, model = "SAM", "sam"
    kinds = "AutoModelForMaskGeneration", "AutoImageProcessor"
    defaults = {
        "points": 32, "batch": 64,  # a side of the grid of prompts; prompts at once
        "pred_iou_thresh": 0.88, "stability_score_thresh": 0.95,  # SAM's own
    }  # fmt: skip

    def load(self) -> None:
        from transformers import pipeline

        super().load()
        how = {"model": self._net, "image_processor": self._read, "device": self.device}
        self._net = pipeline("mask-generation", **how)

    def look(self, data: CoSegData, i: int, cls: str) -> tuple[list, np.ndarray, tuple[int, int]]:
        image, how = data.image(i), dict(self.settings)
        grid = {"points_per_crop": how.pop("points"), "points_per_batch": how.pop("batch")}
        try:
            masks = [np.asarray(m, bool) for m in self._net(image, **grid, **how)["masks"]]
        except IndexError:  # the pipeline's answer to a picture in which no mask passes
            masks = []
        masks, pixels = [m for m in masks if m.any()], np.asarray(image)
        vectors = self.features.tower.encode_images(cut_out(pixels, m) for m in masks)
        return [pack(m) for m in masks], self.probabilities(vectors), image.size[::-1]

    def choose(self, found: Sequence[Any], cls: str) -> Iterator[np.ndarray]:
        common = vote_class([scores for _, scores, _ in found])
        for codes, scores, size in found:
            yield unpack(codes[scores[:, common].argmax()]) if codes else np.zeros(size, np.uint8)


class SamGT(Rival):
    """SAM prompted with the boxes of the true objects: its upper bound for this task."""

    name, model, semantic, truth = "SAM GT", "sam", False, True
    kinds = "AutoModelForMaskGeneration", "AutoProcessor"

    def look(self, data: CoSegData, i: int, cls: str) -> dict[str, Any]:
        return pack(self.prompted(data.image(i), boxes_of(data.mask(i, [cls]) == 1)))

    def choose(self, found: Sequence[Any], cls: str) -> Iterator[np.ndarray]:
        return map(unpack, found)

    @torch.no_grad()
    def prompted(self, image: Image.Image, boxes: list[list[float]]) -> np.ndarray:
        """The union of the masks of some boxes [x0, y0, x1, y1] in pixels, bool [H, W]."""
        if not boxes:
            return np.zeros(image.size[::-1], bool)
        given = self._read(images=image, input_boxes=[boxes], return_tensors="pt")
        sizes = given.pop("original_sizes"), given.pop("reshaped_input_sizes")
        given["input_boxes"] = given["input_boxes"].float()
        found = self._net(**given.to(self.device), multimask_output=False).pred_masks
        masks = self._read.post_process_masks(found.cpu(), *sizes)[0]
        return masks.flatten(0, 1).any(0).numpy()


# --------------------------------------------------------------------------------------------- SEEM
class Seem(Rival):
    """SEEM's panoptic output through the user's own checkout (its `modeling` and `utils`).

    Each image votes for the things it shows, the majority wins. Written against its published form:
    `evaluate([{image, height, width}])[-1]["panoptic_seg"]` is a map of segment numbers and a list
    of {id, category_id, isthing}, the categories being `COCO_PANOPTIC_CLASSES`.
    Deviation: the paper does not say how a tie ends (by area here), nor that only things vote.
    """

    name, model, semantic = "SEEM", "seem", False
    defaults = {"config": "configs/seem/focall_unicl_lang_v1.yaml", "side": 512}  # as in its demo

    def load(self) -> None:
        try:
            import modeling
            from detectron2.data import MetadataCatalog
            from modeling.BaseModel import BaseModel
            from utils.arguments import load_opt_from_config_files
            from utils.constants import COCO_PANOPTIC_CLASSES as names
            from utils.distributed import init_distributed
        except ImportError as error:
            raise Missing("weights", "SEEM", f"{SEEM_HOW} ({error})") from None
        config = Path(modeling.__file__).resolve().parents[1] / self.settings["config"]
        options = init_distributed(load_opt_from_config_files([str(config)]))
        whole = BaseModel(options, modeling.build_model(options)).from_pretrained(str(self.folder))
        net = self._net = whole.eval().to(self.device).model
        with torch.no_grad():
            encoder = net.sem_seg_head.predictor.lang_encoder
            encoder.get_text_embeddings([*names, "background"], is_eval=True)
        net.task_switch |= dict.fromkeys(("spatial", "visual", "grounding", "audio"), False)
        net.metadata = MetadataCatalog.get("coco_2017_train_panoptic")
        self._classes = [re.sub("-(other|merged|stuff)", "", name) for name in names]

    @torch.no_grad()
    def look(self, data: CoSegData, i: int, cls: str) -> tuple[dict[str, Any], tuple[int, int]]:
        image = data.image(i)
        scale = self.settings["side"] / min(image.size)
        (width, height), size = image.size, [round(scale * n) for n in image.size]
        small = np.array(image.resize(size, Image.Resampling.BICUBIC))
        pixels = torch.from_numpy(small).permute(2, 0, 1).to(self.device)
        found = self._net.evaluate([{"image": pixels, "height": height, "width": width}])
        panoptic, listed = found[-1]["panoptic_seg"]
        panoptic, shown = panoptic.cpu().numpy(), {}
        for segment in (s for s in listed if s["isthing"]):
            name = self._classes[int(segment["category_id"])]
            shown[name] = shown.get(name, False) | (panoptic == segment["id"])
        codes = {n: (pack(m), float(m.mean())) for n, m in shown.items() if m.any()}
        return codes, (height, width)

    def common(self, found: Sequence[Any], cls: str) -> str | None:
        """The class of the set: the majority's."""
        return vote_panoptic([{name: share for name, (_, share) in s.items()} for s, _ in found])

    def choose(self, found: Sequence[Any], cls: str) -> Iterator[np.ndarray]:
        common = self.common(found, cls)
        for shown, size in found:
            yield unpack(shown[common][0]) if common in shown else np.zeros(size, np.uint8)


class SeemGT(Seem):
    """SEEM with the true class: the thing nearest to it takes the place of the vote."""

    name, semantic, truth = "SEEM GT", True, True

    def common(self, found: Sequence[Any], cls: str) -> str | None:
        things = {word.casefold() for word in vocabulary("coco80")}
        names = [name for name in dict.fromkeys(self._classes) if name.casefold() in things]
        if (known := target_word(cls, names)) is None:
            texts = [cls.replace("_", " "), *names]
            table = prompts(self.features.tower, texts, self.words.templates)
            known = int((table[1:] @ table[0]).argmax())
        return names[known]


# ----------------------------------------------------------------- the voted class as a text prompt
class _Voted(Rival):
    """The tower names the set's class from the whole images; a model is asked for it in each.

    Deviation: nobody has published these rows; how the class is found is ours.
    """

    def masks(self, data: CoSegData, items: Sequence[int], cls: str) -> Iterator[np.ndarray]:
        scores = self.probabilities(self.features.embeddings(data, list(items)))
        word = self.words.words[vote_class(list(scores[:, None]))]
        for i in items:
            yield self.ask(data.image(i), word)

    def ask(self, image: Image.Image, word: str) -> np.ndarray:
        """A mask or map of probabilities of what the word names in a picture."""
        raise NotImplementedError


class Sam3(_Voted):
    """SAM 3 asked for the voted class by name: the union of the instances it finds."""

    name, model, kinds = "SAM 3", "sam3", ("Sam3Model", "Sam3Processor")
    defaults = {"threshold": 0.5, "mask_threshold": 0.5}  # of an instance, of a mask's pixel

    @torch.no_grad()
    def ask(self, image: Image.Image, word: str) -> np.ndarray:
        given = self._read(images=image, text=word, return_tensors="pt").to(self.device)
        how = {"target_sizes": [image.size[::-1]], **self.settings}
        found = self._read.post_process_instance_segmentation(self._net(**given), **how)
        masks = found[0]["masks"].cpu().bool()  # [instances, H, W]
        return masks.any(0).numpy() if len(masks) else np.zeros(image.size[::-1])


class ClipSeg(_Voted):
    """CLIPSeg asked for the voted class by name: its map of probabilities."""

    name, model = "CLIPSeg", "clipseg"
    kinds = "CLIPSegForImageSegmentation", "CLIPSegProcessor"

    @torch.no_grad()
    def ask(self, image: Image.Image, word: str) -> np.ndarray:
        given = self._read(images=[image], text=[word], padding=True, return_tensors="pt")
        logits = self._net(**given.to(self.device)).logits
        return logits.sigmoid().reshape(logits.shape[-2:]).cpu().numpy()


# ------------------------------------------------------------------------------- no training at all
class Clustering(Rival):
    """No training: the backbone's patch features, clustered over the set; salient clusters win.

    After Amir et al. 2022, who cluster DINO's patch features and vote by DINO's attention.
    Deviation: a convolutional backbone has no attention, so a patch's saliency is a product of cues
    (`CUES`) of the features. No elbow rule for the number of clusters, no GrabCut afterwards.
    """

    name, semantic = "Clustering (no training)", False
    defaults = {  # chosen on VOC val with EfficientNet-Lite2
        "stage": 3, "finer": 2,  # features of that stage, their grid refined so many times
        "clusters": 4, "cues": ["energy", "border"],
        "threshold": 1.2,  # a cluster is salient from this multiple of the image's mean saliency
        "votes": 0.8,  # share of the images in which a cluster must be salient to be object
        "restarts": 2, "seed": 0,
    }  # fmt: skip

    @cached_property
    def made_of(self) -> dict[str, Any]:
        net = self.features.backbone  # all four stages, also those that a profile would train
        whole = f"{net.name}-4-{backbones.tensors_digest(net.stages.state_dict())}"
        return super().made_of | {"backbone": whole, "size": self.features.size}

    @torch.no_grad()
    def patches(self, data: CoSegData, items: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Unit features [N, D, h, w], and the length of the last stage's [N, h, w], on one grid."""
        images, maps = self.features.visual(data, list(items))
        net = self.features.backbone.to(self.device)
        mode = net.training
        net.eval()
        known = [m.to(self.device).float() for m in maps or ()]
        maps = net(images if known else images.to(self.device), known)
        net.train(mode)
        grid = [self.settings["finer"] * n for n in maps[2].shape[-2:]]
        chosen = maps[self.settings["stage"] - 1].float().cpu()
        unit = F.normalize(F.interpolate(chosen, grid, mode="bilinear"), dim=1)
        energy = maps[3].float().cpu().norm(dim=1, keepdim=True)
        return unit, F.interpolate(energy, grid, mode="bilinear")[:, 0]

    def masks(self, data: CoSegData, items: Sequence[int], cls: str) -> Iterator[np.ndarray]:
        s, (f, energy) = self.settings, self.patches(data, items)
        N, D, h, w = f.shape
        rows = f.permute(0, 2, 3, 1).reshape(-1, D)
        labels = kmeans(rows, s["clusters"], s["seed"], s["restarts"]).view(N, h, w)
        saliency = torch.ones(N, h, w)
        for cue in s["cues"]:
            saliency = saliency * CUES[cue](f, energy)
        chosen = salient_clusters(labels, saliency, s["threshold"], s["votes"])
        yield from torch.isin(labels, torch.tensor(chosen)).float().numpy()


# With this backbone, chosen on the held-out fold: GlyphWorld's pictures hold several small objects,
# so that clusters must be smaller and a cue must look at the other images.
CHOSEN = {"glyphnet": {"clusters": 12, "cues": ["energy", "border", "common"], "threshold": 1.5}}


def kmeans(x: Tensor, k: int, seed: int = 0, restarts: int = 2, steps: int = 15) -> Tensor:
    """Spherical k-means of unit rows [n, d] → cluster numbers [n]; k-means++, best restart."""
    rng, best, out = np.random.default_rng(seed), -np.inf, torch.zeros(len(x), dtype=torch.long)
    for _ in range(restarts):
        chosen = [int(rng.integers(len(x)))]
        far = (1 - x @ x[chosen[0]]).clamp_min(0)
        while len(chosen) < min(k, len(x)) and float(far.sum()) > 0:
            weights = far.double().numpy()
            chosen.append(int(rng.choice(len(x), p=weights / weights.sum())))
            far = torch.minimum(far, (1 - x @ x[chosen[-1]]).clamp_min(0))
        centres = x[chosen]
        for _ in range(steps):
            sums = torch.zeros_like(centres).index_add_(0, (x @ centres.T).argmax(1), x)
            empty = sums.norm(dim=1, keepdim=True) == 0
            moved = torch.where(empty, centres, F.normalize(sums, dim=1))
            if torch.allclose(moved, centres, atol=1e-5):
                break
            centres = moved
        score, labels = (x @ centres.T).max(1)
        if float(score.sum()) > best:
            best, out = float(score.sum()), labels
    return out


def salient_clusters(labels: Tensor, saliency: Tensor, threshold: float, votes: float) -> list[int]:
    """The clusters voted object, given each patch's cluster and saliency ≥ 0, both [N, h, w].

    An image votes for a cluster whose mean saliency there is above `threshold` times the image's
    mean; a share `votes` of the images decides. If none wins, it is the most salient on average.
    """
    member = F.one_hot(labels.flatten(1), int(labels.max()) + 1).float()  # [N, patches, k]
    s = saliency.flatten(1)
    s = s / s.mean(1, keepdim=True).clamp_min(1e-8)
    relative = torch.einsum("np,npk->nk", s, member) / member.sum(1).clamp_min(1)
    share = (relative > threshold).float().mean(0)
    chosen = (share >= votes - 1e-6).nonzero().flatten().tolist()
    return chosen or [int(relative.mean(0).argmax())]


def _scaled(x: Tensor) -> Tensor:
    """Each image's values [N, h, w] brought to 0..1."""
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-6)


def _border(f: Tensor, energy: Tensor) -> Tensor:
    edge = torch.zeros(f.shape[-2:], dtype=torch.bool)
    edge[[0, -1]] = edge[:, [0, -1]] = True
    return _scaled(-torch.einsum("ndhw,nd->nhw", f, f[:, :, edge].mean(-1)))


def _common(f: Tensor, energy: Tensor) -> Tensor:
    N, _, h, w = f.shape
    flat, total = f.flatten(2), torch.zeros(N, h * w)
    for other in range(N):  # one at a time: N² similarities of a large set would not fit
        best = torch.einsum("nda,db->nab", flat, flat[other]).amax(-1)
        best[other] = 0
        total += best
    return _scaled(total.view(N, h, w))


# Saliency of a patch, 0..1 in its image: the length of the last stage's feature; 1 − the mean
# cosine with the patches at the border; the mean over the other images of its best cosine there.
CUES = {"energy": lambda f, energy: _scaled(energy), "border": _border, "common": _common}


# ------------------------------------------------------------------------------------------ by name
RIVALS: dict[str, type[Rival]] = {  # in the order of Table 5; LCCo's rows stand after SEEM's
    "sam": Sam, "sam-gt": SamGT, "seem": Seem, "seem-gt": SeemGT, "sam3": Sam3,
    "clipseg": ClipSeg, "clustering": Clustering,
}  # fmt: skip


def rivals(
    names: Sequence[str], features: Features, words: Vocabulary, *,
    weights: Mapping[str, str] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Rival]:  # fmt: skip
    """Row of Table 5 → its rival, for names in `RIVALS`; nothing is loaded yet.

    weights: model ("sam", "sam3", "clipseg", "seem") → a local path, or `repository@commit`.
    settings: of some rivals, in the place of their `defaults`.
    Raises: LCCoError for an unknown rival or setting.
    """
    settings = settings or {}
    if unknown := [name for name in [*names, *settings] if name not in RIVALS]:
        raise LCCoError(f"no rival `{unknown[0]}`; there are: {', '.join(RIVALS)}")
    chosen = {"clustering": CHOSEN.get(features.backbone.name, {})}
    own = {name: chosen.get(name, {}) | dict(settings.get(name, {})) for name in names}
    found = [RIVALS[name](features, words, weights or {}, own[name]) for name in names]
    return {rival.name: rival for rival in found}
