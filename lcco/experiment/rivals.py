"""Table 5's rivals: foundation models, and clustering without any training, as co-segmenters behind one interface.

`make_baseline(name, inputs)` gives a `Baseline`, which is a Segmenter: `baseline(data, items, cls)` yields one mask an
image. Only rows named GT look at `cls` or at the truth. Weights are found by `find_weights`; whoever has them gets the
row by naming them. A model sees each picture once: what it found is kept as run-length codes (some kB an image), so
that the masks of a large set never pile up.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lcco import backbones
from lcco.common import LCCoError, digest, file_digest, place, progress, write_json
from lcco.config import Profile, build, nearest
from lcco.data import CoSegData
from lcco.evaluate import Evaluation, evaluate_all
from lcco.inputs import Inputs
from lcco.semantics import prompts, target_word, vocabulary

if TYPE_CHECKING:
    from lcco.runs import Run

# Hub name @ commit. A commit pins what a row measured; the models' pages tell under which terms they are given.
HUB = {
    "sam": "facebook/sam-vit-huge@87aecf0df4ce6b30cd7de76e87673c49644bdf67",
    "sam2": "facebook/sam2.1-hiera-large@665f8e2ad61cf5f53d65644ff27c8ee525124610",
    "sam3": "facebook/sam3@3c879f39826c281e95690f02c7821c4de09afae7",
    "mask2former": "facebook/mask2former-swin-large-coco-panoptic@85b535928a783691eaf27467a573b26d543336ea",
    "oneformer": "shi-labs/oneformer_coco_swin_large@3a263017ca5c75adbea145f25f81b118243d4394",
    "clipseg": "CIDAS/clipseg-rd64-refined@999e0328d9e10b484360c477313983f9afdd7050",
    "grounding-dino": "IDEA-Research/grounding-dino-base@12bdfa3120f3e7ec7b434d90674b3396eccf88eb",
}
BY_HAND = {
    "seem": "SEEM is not on a package index: put its checkout and its requirements on PYTHONPATH and name its weights "
    "file (seem_focall_v1.pt or seem_focalt_v2.pt)",
    "saliency": "name a TorchScript file of U²-Net or a network like it (image [1, 3, 320, 320] → map)",
}
KEPT = 256  # pictures whose findings are kept: a class of any of the test sets, so that two protocols share them
FORM = 1  # raise it when a baseline's masks change, so that no old score is taken for a new one

Fill = Literal["white", "black", "keep"]
Vote = Literal["sum", "majority"]


class Absent(LCCoError):
    """Weights (or SEEM's own code) that are not on this machine: `what` lacks, and `how` to get it."""

    def __init__(self, what: str, how: str) -> None:
        super().__init__(f"weights {what} not found: {how}")
        self.what, self.how = what, how


# ------------------------------------------------------------------------------------------------------------- weights
@lru_cache
def _hub_answers(endpoint: str) -> bool:
    return backbones.reachable(endpoint)


def find_weights(model: str, where: str | None = None) -> Path:
    """The local folder (or file) of a model's weights: `where` is a path or `repository@commit`, by default `HUB`'s.

    What the hub's cache lacks is downloaded once, unless LCCO_OFFLINE or HF_HUB_OFFLINE is set.
    Raises: Absent within seconds; LCCoError for a hub name without a commit.
    """
    where = str(where or HUB.get(model, ""))
    path = Path(where).expanduser()
    if where and path.exists():
        return path
    if model in BY_HAND:
        raise Absent(where or model, BY_HAND[model])
    repo, _, commit = where.partition("@")
    if where[0] in "./~" or repo.count("/") != 1:
        raise Absent(path.name, f"{path} is not there; name the folder that holds config.json and model.safetensors")
    if not commit:
        raise LCCoError(f"weights `{repo}`: name the commit too, `{repo}@<commit>`, so that the row says what it is")
    from huggingface_hub import constants, snapshot_download

    plain = ["*.json", "*.txt", "*.safetensors"]
    try:
        folder = Path(snapshot_download(repo, revision=commit, local_files_only=True))
        if (folder / "config.json").is_file() and any(folder.glob("*model*.*")):
            return folder
    except (OSError, ValueError):  # not in the cache; the hub's errors are OSErrors or ValueErrors
        pass
    how = f"`hf download {repo} --revision {commit}`, or name a local folder"
    if backbones.offline() or not _hub_answers(constants.ENDPOINT):
        raise Absent(repo, how)
    try:
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=plain))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo, revision=commit, allow_patterns=[*plain, "pytorch_model*.bin"]))
    except Exception as error:  # gated, moved, out of disk: each has its own
        raise Absent(repo, f"{how} (the download failed: {type(error).__name__})") from None
    return folder


def _fingerprint(path: Path) -> str:
    """A hash of a model folder's settings and weights, or of a file: what a row was measured with."""
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.glob("*") if f.suffix in (".json", ".safetensors", ".bin"))
    return digest([[f.name, file_digest(f)] for f in files])


def _load(kind: str, folder: Path, device: torch.device, **options: Any) -> Any:
    """A transformers model (or processor) from a local folder.

    Raises: LCCoError for a folder of something else, and for weights that lack parameters, which transformers would
    fill with random numbers.
    """
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    options["local_files_only"] = True
    try:
        auto = getattr(transformers, kind)
        if "Processor" in kind:
            return auto.from_pretrained(folder, **options)
        model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # each format has its own exceptions for the same mishap
        line = (str(error).strip().splitlines() or [""])[0][:120]
        raise LCCoError(f"{folder}: cannot be loaded as {kind} ({type(error).__name__}: {line})") from None
    parameters = {name for name, _ in model.named_parameters()}
    if lacking := sorted(set(info["missing_keys"]) & parameters):
        raise LCCoError(f"{folder}: not weights of {type(model).__name__}: `{lacking[0]}` is missing ({len(lacking)})")
    return model.eval().requires_grad_(False).to(device)


# ---------------------------------------------------------------------------------------------------- masks and classes
def pack(mask: np.ndarray) -> dict[str, Any]:
    """A boolean mask [H, W] as COCO's run-length code."""
    from pycocotools import mask as rle

    return rle.encode(np.asfortranarray(mask, np.uint8))


def unpack(codes: Sequence[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """The union of packed masks as uint8 [H, W]; of none it is empty."""
    from pycocotools import mask as rle

    return rle.decode(rle.merge(list(codes))) if codes else np.zeros(size, np.uint8)


def boxes_of(mask: np.ndarray, per: Literal["objects", "whole"] = "objects", least: float = 5e-4) -> list[list[int]]:
    """Boxes [x0, y0, x1, y1] (pixel edges, x1 and y1 exclusive) of a mask: one a connected object, or one for all.

    Specks below a share `least` of the picture get no box of their own, unless nothing larger is there.
    """
    from scipy import ndimage

    if not mask.any():
        return []
    labels, n = (mask.astype(int), 1) if per == "whole" else ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    found = ndimage.find_objects(labels)
    keep = [k for k in range(n) if areas[k] >= least * mask.size] or [int(areas.argmax())]
    return [[found[k][1].start, found[k][0].start, found[k][1].stop, found[k][0].stop] for k in keep]


def cut_out(
    image: np.ndarray, mask: np.ndarray, fill: Fill = "white", crop: bool = True, pad: bool = True
) -> Image.Image:
    """The masked object as CLIP shall see it: cropped by its box, `fill` outside the mask, padded to a square.

    image: uint8 [H, W, 3]; mask: bool [H, W], not empty. "keep" leaves the background, and pads with white.
    """
    mask = np.asarray(mask, bool)
    colour = 0 if fill == "black" else 255
    out = image if fill == "keep" else np.where(mask[..., None], image, np.uint8(colour))
    if crop:
        x0, y0, x1, y1 = boxes_of(mask, "whole")[0]
        out = out[y0:y1, x0:x1]
    if pad:
        height, width = out.shape[:2]
        side = max(height, width)
        square = np.full((side, side, 3), colour, np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = out
        out = square
    return Image.fromarray(np.ascontiguousarray(out))


def vote_class(scores: Sequence[np.ndarray], rule: Vote = "sum") -> int | None:
    """The set's common class from each image's class probabilities [masks, P]; None when no image has a mask.

    An image gives each class its best mask's probability. "sum": the class with the largest sum over the images;
    "majority": each image names its best class, and a tie goes to the larger sum. A last tie goes to the first class.
    """
    best = [s.max(0) for s in scores if len(s)]
    if not best:
        return None
    total = np.sum(best, axis=0, dtype=np.float64)
    if rule == "sum":
        return int(total.argmax())
    votes = np.bincount([int(b.argmax()) for b in best], minlength=len(total))
    return int(np.lexsort((-np.arange(len(total)), total, votes))[-1])


def select_masks(scores: np.ndarray, rule: Literal["best", "union"] = "best", threshold: float = 0.5) -> list[int]:
    """Which of an image's masks are taken, given their probabilities [masks] of the common class."""
    if not len(scores):
        return []
    return [int(scores.argmax())] if rule == "best" else np.flatnonzero(scores > threshold).tolist()


def vote_panoptic(images: Sequence[Mapping[str, float]]) -> str | None:
    """The class that most images show, given each image's classes and their shares of it.

    A tie goes to the larger area summed over the images, then to the first by name; None when no image shows any.
    """
    count = Counter(name for shares in images for name in shares)
    area = {name: sum(shares.get(name, 0.0) for shares in images) for name in count}
    return min(count, key=lambda name: (-count[name], -area[name], name), default=None)


# ----------------------------------------------------------------------------------------------------------- interface
class Baseline:
    """A co-segmenter without training on the task: `baseline(data, items, cls)` yields one mask [h, w] an image.

    `settings` are a frozen dataclass; `record` says what a row was measured with; `identity` is its hash.
    """

    name = ""
    models: tuple[str, ...] = ()  # whose weights it needs, by their names in HUB and BY_HAND
    frozen = True  # whether it uses the profile's frozen parts: tower, vocabulary, backbone
    truth = False  # whether it looks at the truth or the true class ("GT")

    def __init__(self, inputs: Inputs | None, folders: Mapping[str, Path], settings: Any) -> None:
        self.inputs, self.folders, self.settings = inputs, dict(folders), settings
        self.device = torch.device(inputs.device if inputs else "cuda" if torch.cuda.is_available() else "cpu")
        self._seen: OrderedDict[tuple, Any] = OrderedDict()
        self.prepare()

    def prepare(self) -> None:
        """Load the models."""

    def look(self, data: CoSegData, i: int, cls: str) -> Any:
        """What the model finds in one picture, in a compact form."""
        raise NotImplementedError

    def choose(self, found: Sequence[Any], cls: str) -> Iterator[np.ndarray]:
        """The masks of a set, one at a time, from what was found in its pictures."""
        raise NotImplementedError

    def __call__(self, data: CoSegData, items: Sequence[int], cls: str) -> Iterator[np.ndarray]:
        found = [self._once(data, i, cls) for i in progress(items, f"{self.name}, {cls}")]
        yield from self.choose(found, cls)

    def _once(self, data: CoSegData, i: int, cls: str) -> Any:
        key = (data.content(i), data.keys[i], cls) if self.truth else (data.content(i),)
        if key not in self._seen:
            self._seen[key] = self.look(data, i, cls)
            if len(self._seen) > KEPT:
                self._seen.popitem(last=False)
        return self._seen[key]

    @property
    def record(self) -> dict[str, Any]:
        """What decides the masks: settings, weights, and the frozen parts of `inputs` that are used."""
        if not hasattr(self, "_record"):
            weights = {}
            for model, path in self.folders.items():
                pinned = HUB.get(model, "")
                name = pinned if pinned and path.name == pinned.partition("@")[2] else path.name
                weights[model] = {"from": name, "sha256": _fingerprint(path)}
            self._record = {"baseline": self.name, "form": FORM, "settings": asdict(self.settings), "weights": weights}
            if self.frozen:
                self._record |= {"tower": self.inputs.tower.identity, "vocabulary": self.inputs.vocabulary_hash}
                self._record["templates"] = list(self.inputs.experiment.tower.templates)
        return self._record

    @property
    def identity(self) -> str:
        """Hash of the record."""
        return digest(self.record, 10)

    def probabilities(self, embeddings: Tensor) -> np.ndarray:
        """Embeddings [n, D] → each one's probabilities over the vocabulary, float32 [n, P]."""
        return (self.inputs.tower.logit_scale * embeddings @ self.inputs.prompts.T).softmax(-1).numpy()


def _size(data: CoSegData, i: int) -> tuple[Image.Image, tuple[int, int]]:
    image = data.image(i)
    return image, image.size[::-1]


# ----------------------------------------------------------------------------------------------------------------- SAM
@dataclass(frozen=True)
class SamSettings:
    """How SAM's automatic masks become a co-segmentation; the paper says only that CLIP classifies them."""

    fill: Fill = "white"  # outside the mask
    crop: bool = True  # by the mask's box
    pad: bool = True  # to a square
    vote: Vote = "sum"  # the set's class
    select: Literal["best", "union"] = "best"  # the image's masks of that class
    threshold: float = 0.5  # union: probability of the class
    points: int = 32  # a side of the grid of prompts
    pred_iou_thresh: float = 0.88  # SAM's own defaults
    stability_score_thresh: float = 0.95
    batch: int = 64  # points at once


class Sam(Baseline):
    """SAM's automatic masks, each cut out and classified by the tower; the set's class is voted.

    Deviation: the paper names SAM, CLIP and no more; everything in `SamSettings` is our reading.
    """

    name, models = "SAM", ("sam",)

    def prepare(self) -> None:
        model = _load("AutoModelForMaskGeneration", self.folders["sam"], self.device)
        from transformers import pipeline

        processor = _load("AutoImageProcessor", self.folders["sam"], self.device)
        self._masks = pipeline("mask-generation", model=model, image_processor=processor, device=self.device)

    def look(self, data: CoSegData, i: int, cls: str) -> tuple[list[dict], np.ndarray, tuple[int, int]]:
        s, (image, size) = self.settings, _size(data, i)
        try:
            masks = self._masks(
                image, points_per_batch=s.batch, points_per_crop=s.points, pred_iou_thresh=s.pred_iou_thresh,
                stability_score_thresh=s.stability_score_thresh,
            )["masks"]  # fmt: skip
        except IndexError:  # the pipeline's answer to a picture in which no mask passes
            masks = []
        pixels, codes = np.asarray(image), []

        def cuts() -> Iterator[Image.Image]:
            for mask in masks:
                mask = np.asarray(mask, bool)
                if mask.any():
                    codes.append(pack(mask))
                    yield cut_out(pixels, mask, s.fill, s.crop, s.pad)

        return codes, self.probabilities(self.inputs.tower.encode_images(cuts())), size

    def choose(self, found: Sequence[Any], cls: str) -> Iterator[np.ndarray]:
        s = self.settings
        common = vote_class([scores for _, scores, _ in found], s.vote)
        for codes, scores, size in found:
            taken = [] if common is None or not codes else select_masks(scores[:, common], s.select, s.threshold)
            yield unpack([codes[k] for k in taken], size)


@dataclass(frozen=True)
class BoxSettings:
    """Which boxes are computed from the true masks."""

    boxes: Literal["objects", "whole"] = "objects"  # one a connected object, or one for the whole mask
    least: float = 5e-4  # smaller specks get no box of their own
    batch: int = 16  # boxes at once


class _BoxPrompted:
    """SAM or SAM 2 with boxes as prompts; the picture is encoded once."""

    def __init__(self, folder: Path, device: torch.device, batch: int) -> None:
        self.model = _load("AutoModelForMaskGeneration", folder, device)
        self.processor, self.device, self.batch = _load("AutoProcessor", folder, device), device, batch

    @torch.no_grad()
    def __call__(self, image: Image.Image, boxes: Sequence[Sequence[float]]) -> np.ndarray:
        """The union of the masks of some boxes [x0, y0, x1, y1] in pixels, bool [H, W]."""
        out = np.zeros(image.size[::-1], bool)
        if not len(boxes):
            return out
        given = self.processor(images=image, input_boxes=[[list(map(float, b)) for b in boxes]], return_tensors="pt")
        embedded = self.model.get_image_embeddings(given["pixel_values"].to(self.device))
        sizes = [given[k] for k in ("original_sizes", "reshaped_input_sizes") if k in given]
        for prompt in given["input_boxes"].float().split(self.batch, dim=1):
            found = self.model(
                input_boxes=prompt.to(self.device), image_embeddings=embedded, multimask_output=False
            ).pred_masks
            for mask in self.processor.post_process_masks(found.cpu(), *sizes)[0].flatten(0, 1):
                out |= mask.numpy().astype(bool)
        return out


class SamGT(Baseline):
    """SAM prompted with boxes computed from the true masks: the upper bound of SAM for this task."""

    name, models, frozen, truth = "SAM GT", ("sam",), False, True

    def prepare(self) -> None:
        self._prompted = _BoxPrompted(self.folders[self.models[0]], self.device, self.settings.batch)

    def look(self, data: CoSegData, i: int, cls: str) -> dict[str, Any]:
        boxes = boxes_of(data.mask(i, [cls]) == 1, self.settings.boxes, self.settings.least)
        return pack(self._prompted(data.image(i), boxes))

    def choose(self, found: Sequence[Any], cls: str) -> Iterator[np.ndarray]:
        return (unpack([code], tuple(code["size"])) for code in found)


class Sam2GT(SamGT):
    """SAM 2 prompted with boxes computed from the true masks."""

    name, models = "SAM 2 GT", ("sam2",)


# ------------------------------------------------------------------------------------------------- panoptic: SEEM's way
@dataclass(frozen=True)
class PanopticSettings:
    """How panoptic segments become a co-segmentation."""

    things: bool = True  # only countable classes may be the common one
    threshold: float = 0.5  # a segment's least score (transformers' models)
    overlap: float = 0.8  # a segment's least share left after overlaps (transformers' models)


@dataclass(frozen=True)
class Segment:
    """One panoptic segment: its number in the map, its class, and whether that is a thing."""

    id: int
    name: str
    thing: bool


def class_areas(panoptic: np.ndarray, segments: Sequence[Segment], things: bool = True) -> dict[str, np.ndarray]:
    """Class → bool [H, W], the union of its segments in a map [H, W] of segment numbers; classes without pixels go."""
    out: dict[str, np.ndarray] = {}
    for s in segments:
        if s.thing or not things:
            out[s.name] = out.get(s.name, False) | (panoptic == s.id)
    return {name: mask for name, mask in out.items() if mask.any()}


class Panoptic(Baseline):
    """A COCO-panoptic model of transformers: each image votes for the classes it shows, the majority wins.

    Deviation: the paper does not say how a tie ends (by area here), nor that only things vote.
    """

    frozen = False

    def prepare(self) -> None:
        folder = self.folders[self.models[0]]
        self._model = _load("AutoModelForUniversalSegmentation", folder, self.device)
        names = self._model.config.id2label
        countable = {w.casefold() for w in vocabulary("coco80")}
        self.classes = {int(k): (name, name.casefold() in countable) for k, name in names.items()}
        if self._model.config.model_type != "oneformer":
            self._processor = _load("AutoImageProcessor", folder, self.device)
            return
        with tempfile.TemporaryDirectory() as place_:  # its class table lives in another repository: written from names
            table = {str(k): {"name": name, "isthing": int(thing)} for k, (name, thing) in self.classes.items()}
            (Path(place_) / "classes.json").write_text(json.dumps(table))
            tables = {"repo_path": place_, "class_info_file": "classes.json"}
            self._processor = _load("OneFormerProcessor", folder, self.device, **tables)

    @torch.no_grad()
    def segments(self, image: Image.Image) -> tuple[np.ndarray, list[Segment]]:
        """The panoptic map [H, W] of one picture, and its segments."""
        s = self.settings
        task = {"task_inputs": ["panoptic"]} if self._model.config.model_type == "oneformer" else {}
        given = self._processor(images=image, return_tensors="pt", **task).to(self.device)
        found = self._processor.post_process_panoptic_segmentation(
            self._model(**given), threshold=s.threshold, overlap_mask_area_threshold=s.overlap, label_ids_to_fuse=set(),
            target_sizes=[image.size[::-1]],
        )[0]  # fmt: skip
        listed = [Segment(int(x["id"]), *self.classes[int(x["label_id"])]) for x in found["segments_info"]]
        return found["segmentation"].cpu().numpy(), listed

    def look(self, data: CoSegData, i: int, cls: str) -> tuple[dict[str, tuple[dict, float]], tuple[int, int]]:
        image, size = _size(data, i)
        shown = class_areas(*self.segments(image), self.settings.things)
        return {name: (pack(mask), float(mask.mean())) for name, mask in shown.items()}, size

    def common(self, found: Sequence[Any], cls: str) -> str | None:
        """The class of the set: the majority's, or with GT the one nearest to the true class."""
        return vote_panoptic([{name: share for name, (_, share) in shown.items()} for shown, _ in found])

    def choose(self, found: Sequence[Any], cls: str) -> Iterator[np.ndarray]:
        common = self.common(found, cls)
        for shown, size in found:
            yield unpack([shown[common][0]] if common in shown else [], size)


class _GTClass(Panoptic):
    """The GT twin: the class nearest to the true one takes the place of the vote."""

    frozen = truth = True

    def common(self, found: Sequence[Any], cls: str) -> str | None:
        names = list(dict.fromkeys(n for n, thing in self.classes.values() if thing or not self.settings.things))
        if (known := target_word(cls, names)) is not None:
            return names[known]
        tower, templates = self.inputs.tower, self.inputs.experiment.tower.templates
        texts = prompts(tower, [cls.replace("_", " "), *names], templates, place("cache"))
        return names[int((texts[1:] @ texts[0]).argmax())] if names else None


class Mask2Former(Panoptic):
    """Mask2Former (COCO panoptic), the stand-in where SEEM cannot be had; never called SEEM."""

    name, models = "Mask2Former", ("mask2former",)


class Mask2FormerGT(_GTClass):
    """Mask2Former with the true class."""

    name, models = "Mask2Former GT", ("mask2former",)


class OneFormer(Panoptic):
    """OneFormer (COCO panoptic), the stand-in where SEEM cannot be had; never called SEEM."""

    name, models = "OneFormer", ("oneformer",)


class OneFormerGT(_GTClass):
    """OneFormer with the true class."""

    name, models = "OneFormer GT", ("oneformer",)


@dataclass(frozen=True)
class SeemSettings(PanopticSettings):
    """SEEM: as for the other panoptic models, whose scores it thresholds itself."""

    config: str = "configs/seem/focall_unicl_lang_v1.yaml"  # within its checkout
    side: int = 512  # the picture's short side, as in its demo


class Seem(Panoptic):
    """SEEM's panoptic output through the user's own installation (`modeling` and `utils` of its checkout).

    Written against its published form: `evaluate([{image, height, width}])[-1]["panoptic_seg"]` is a map of segment
    numbers and a list of {id, category_id, isthing}, the categories being `COCO_PANOPTIC_CLASSES`.
    """

    name, models = "SEEM", ("seem",)

    def prepare(self) -> None:
        try:
            from modeling import build_model
            from modeling.BaseModel import BaseModel
            from utils.arguments import load_opt_from_config_files
            from utils.constants import COCO_PANOPTIC_CLASSES
            from utils.distributed import init_distributed
        except ImportError as error:
            raise Absent("SEEM", f"{BY_HAND['seem']} ({error})") from None
        import modeling

        root = Path(modeling.__file__).resolve().parents[1]
        options = init_distributed(load_opt_from_config_files([str(root / self.settings.config)]))
        net = BaseModel(options, build_model(options)).from_pretrained(str(self.folders["seem"])).eval()
        self._model = net.to(self.device).model
        words = [*COCO_PANOPTIC_CLASSES, "background"]
        with torch.no_grad():
            self._model.sem_seg_head.predictor.lang_encoder.get_text_embeddings(words, is_eval=True)
        for task in ("spatial", "visual", "grounding", "audio"):
            self._model.task_switch[task] = False
        try:
            from detectron2.data import MetadataCatalog

            self._model.metadata = MetadataCatalog.get("coco_2017_train_panoptic")
        except ImportError:  # a form of SEEM that brings its own metadata
            pass
        countable = {w.casefold() for w in vocabulary("coco80")}
        plain = [n.replace("-other", "").replace("-merged", "").replace("-stuff", "") for n in COCO_PANOPTIC_CLASSES]
        self.classes = {k: (name, name.casefold() in countable) for k, name in enumerate(plain)}

    @torch.no_grad()
    def segments(self, image: Image.Image) -> tuple[np.ndarray, list[Segment]]:
        width, height = image.size
        scale = self.settings.side / min(width, height)
        small = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).to(self.device)
        found = self._model.evaluate([{"image": pixels, "height": height, "width": width}])
        panoptic, listed = found[-1]["panoptic_seg"]
        return panoptic.cpu().numpy(), [
            Segment(int(x["id"]), self.classes[int(x["category_id"])][0], bool(x["isthing"])) for x in listed
        ]


class SeemGT(_GTClass, Seem):
    """SEEM with the true class."""

    name, models = "SEEM GT", ("seem",)


# ------------------------------------------------------------------------------------- the voted class as a text prompt
@dataclass(frozen=True)
class TextSettings:
    """Models asked for the voted class by name."""

    vote: Vote = "sum"  # over the whole images' probabilities
    threshold: float = 0.5  # a mask's or a box's least score
    mask_threshold: float = 0.5  # SAM 3: of a mask's pixels
    batch: int = 8  # pictures (CLIPSeg) or boxes (SAM 2) at once


class _Voted(Baseline):
    """The tower names the set's common class from the whole images; a model is asked for it in each image.

    Deviation: nobody has published these rows; how the class is found is ours.
    """

    def __call__(self, data: CoSegData, items: Sequence[int], cls: str) -> Iterator[np.ndarray]:
        scores = self.probabilities(self.inputs.cache.images(data, list(items)))
        word = self.inputs.words[vote_class(list(scores[:, None]), self.settings.vote)]
        for start in range(0, len(items), self.settings.batch):
            pictures = [data.image(i) for i in items[start : start + self.settings.batch]]
            yield from self.ask(pictures, word)

    def ask(self, pictures: Sequence[Image.Image], word: str) -> Iterator[np.ndarray]:
        """One mask or map of probabilities for each picture."""
        raise NotImplementedError


class Sam3(_Voted):
    """SAM 3 asked for the voted class by name: the union of the instances it finds."""

    name, models = "SAM 3", ("sam3",)

    def prepare(self) -> None:
        self._model = _load("Sam3Model", self.folders["sam3"], self.device)
        self._processor = _load("Sam3Processor", self.folders["sam3"], self.device)

    @torch.no_grad()
    def ask(self, pictures: Sequence[Image.Image], word: str) -> Iterator[np.ndarray]:
        s = self.settings
        for image in pictures:
            given = self._processor(images=image, text=word, return_tensors="pt").to(self.device)
            found = self._processor.post_process_instance_segmentation(
                self._model(**given), threshold=s.threshold, mask_threshold=s.mask_threshold,
                target_sizes=[image.size[::-1]],
            )[0]["masks"]  # fmt: skip
            yield np.asarray(found.cpu(), bool).any(0) if len(found) else np.zeros(image.size[::-1], bool)


class ClipSeg(_Voted):
    """CLIPSeg asked for the voted class by name: its map of probabilities."""

    name, models = "CLIPSeg", ("clipseg",)

    def prepare(self) -> None:
        self._model = _load("CLIPSegForImageSegmentation", self.folders["clipseg"], self.device)
        self._processor = _load("CLIPSegProcessor", self.folders["clipseg"], self.device)

    @torch.no_grad()
    def ask(self, pictures: Sequence[Image.Image], word: str) -> Iterator[np.ndarray]:
        given = self._processor(images=list(pictures), text=[word] * len(pictures), padding=True, return_tensors="pt")
        logits = self._model(**given.to(self.device)).logits
        yield from logits.sigmoid().reshape(len(pictures), *logits.shape[-2:]).cpu().numpy()


@dataclass(frozen=True)
class GroundedSettings(TextSettings):
    """Grounding DINO's own thresholds."""

    threshold: float = 0.4
    text_threshold: float = 0.3


class Grounded(_Voted):
    """Grounding DINO finds the voted class by name, SAM 2 segments its boxes."""

    name, models = "Grounding DINO + SAM 2", ("grounding-dino", "sam2")

    def prepare(self) -> None:
        folder = self.folders["grounding-dino"]
        self._finder = _load("AutoModelForZeroShotObjectDetection", folder, self.device)
        self._processor = _load("AutoProcessor", folder, self.device)
        self._prompted = _BoxPrompted(self.folders["sam2"], self.device, self.settings.batch)

    @torch.no_grad()
    def ask(self, pictures: Sequence[Image.Image], word: str) -> Iterator[np.ndarray]:
        s = self.settings
        for image in pictures:
            given = self._processor(images=image, text=f"{word.lower()}.", return_tensors="pt").to(self.device)
            found = self._processor.post_process_grounded_object_detection(
                self._finder(**given), given["input_ids"], threshold=s.threshold, text_threshold=s.text_threshold,
                target_sizes=[image.size[::-1]],
            )[0]["boxes"]  # fmt: skip
            yield self._prompted(image, found.tolist())


# ------------------------------------------------------------------------------------------------- no training at all
@dataclass(frozen=True)
class ClusterSettings:
    """Clustering of frozen features; the defaults were chosen on VOC val with EfficientNet-Lite2 (see `CHOSEN`)."""

    stages: tuple[int, ...] = (3,)  # of the backbone, 1 to 4; their unit features side by side
    finer: int = 2  # the 16 px grid of patches is refined so many times, bilinearly
    clusters: int = 4
    saliency: tuple[str, ...] = ("energy", "border")  # their product: energy, border, centre, common
    threshold: float = 1.2  # a cluster is salient in an image from this multiple of the image's mean saliency
    votes: float = 0.8  # share of the images in which a cluster must be salient to be object
    restarts: int = 2
    seed: int = 0


# Backbone → the settings chosen with it on the profile's held-out fold, never on a test set; GlyphWorld's pictures hold
# several small objects, so that clusters must be smaller and a cue must look at the other images.
CHOSEN: dict[str, dict[str, Any]] = {
    "glyphnet": {"clusters": 12, "saliency": ["energy", "border", "common"], "threshold": 1.5},
}


def kmeans(x: Tensor, k: int, seed: int = 0, restarts: int = 2, steps: int = 15) -> Tensor:
    """Spherical k-means of unit rows [n, d] → cluster numbers [n]; k-means++ starts, the best of `restarts`."""
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
            nearest_ = (x @ centres.T).argmax(1)
            sums = torch.zeros_like(centres).index_add_(0, nearest_, x)
            moved = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centres)
            if torch.allclose(moved, centres, atol=1e-5):
                break
            centres = moved
        score, labels = (x @ centres.T).max(1)
        if float(score.sum()) > best:
            best, out = float(score.sum()), labels
    return out


def salient_clusters(labels: Tensor, saliency: Tensor, threshold: float, votes: float) -> list[int]:
    """The clusters voted object, given each patch's cluster [N, h, w] and saliency [N, h, w] ≥ 0.

    An image votes for a cluster whose mean saliency there is more than `threshold` times the image's mean; clusters
    with votes of a share `votes` of the images are object. If there is none, it is the most salient on average.
    """
    k = int(labels.max()) + 1
    member = F.one_hot(labels.flatten(1), k).float()  # [N, patches, k]
    s = saliency.flatten(1)
    s = s / s.mean(1, keepdim=True).clamp_min(1e-8)
    relative = torch.einsum("np,npk->nk", s, member) / member.sum(1).clamp_min(1)  # 0 where an image lacks the cluster
    chosen = ((relative > threshold).float().mean(0) >= votes - 1e-6).nonzero().flatten().tolist()
    return chosen or [int(relative.mean(0).argmax())]


class Clustering(Baseline):
    """No training: the frozen backbone's patch features, clustered over the set; clusters voted salient are object.

    After Amir et al. 2022, who cluster DINO's patch features and vote by DINO's attention.
    Deviation: a convolutional backbone has no attention, so a patch's saliency is a product of cues of the features,
    each scaled to 0..1 in its image: `energy` (length of the last stage's feature), `border` (1 − mean cosine with the
    patches at the image's border), `centre` (a Gaussian around the middle), `common` (mean over the other images of
    its best cosine there). No elbow rule for the number of clusters, no GrabCut afterwards.
    """

    name = "Clustering (no training)"

    def prepare(self) -> None:
        s = self.settings
        if not s.stages or not set(s.stages) <= {1, 2, 3, 4} or not set(s.saliency) <= set(CUES) or not s.saliency:
            raise LCCoError(f"clustering: stages are 1 to 4, and saliency is made of {', '.join(CUES)}")

    @property
    def record(self) -> dict[str, Any]:
        out, net = {"baseline": self.name, "form": FORM, "settings": asdict(self.settings)}, self.inputs.backbone
        # All four stages are used, those too that a profile would train, which `net.identity` leaves out.
        whole = f"{net.name}-4-{backbones.tensors_digest(net.stages.state_dict())}"
        return out | {"backbone": whole, "size": self.inputs.size}

    @torch.no_grad()
    def features(self, data: CoSegData, items: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Unit features [N, D, h, w] and the length of the last stage's feature [N, h, w], on one grid."""
        images, maps = self.inputs.visual(data, list(items))
        net = self.inputs.backbone
        mode = net.training
        net.eval()
        maps = net.tail([m.float() for m in maps]) if maps else net(images.to(self.device))
        net.train(mode)
        grid = [self.settings.finer * n for n in maps[2].shape[-2:]]
        scaled = [F.normalize(F.interpolate(maps[n - 1].float().cpu(), grid, mode="bilinear"), dim=1)
                  for n in self.settings.stages]  # fmt: skip
        energy = F.interpolate(maps[3].float().cpu().norm(dim=1, keepdim=True), grid, mode="bilinear")[:, 0]
        return torch.cat(scaled, 1) / len(scaled) ** 0.5, energy

    def __call__(self, data: CoSegData, items: Sequence[int], cls: str) -> Iterator[np.ndarray]:
        s = self.settings
        f, energy = self.features(data, items)
        N, D, h, w = f.shape
        labels = kmeans(f.permute(0, 2, 3, 1).reshape(-1, D), s.clusters, s.seed, s.restarts).view(N, h, w)
        saliency = torch.ones(N, h, w)
        for cue in s.saliency:
            saliency = saliency * CUES[cue](f, energy)
        chosen = torch.tensor(salient_clusters(labels, saliency, s.threshold, s.votes))
        yield from torch.isin(labels, chosen).float().numpy()


def _scaled(x: Tensor) -> Tensor:
    """Each image's values [N, h, w] brought to 0..1."""
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-6)


def _border(f: Tensor, energy: Tensor) -> Tensor:
    edge = torch.zeros(f.shape[-2:], dtype=torch.bool)
    edge[[0, -1]] = edge[:, [0, -1]] = True
    return _scaled(-torch.einsum("ndhw,nd->nhw", f, f[:, :, edge].mean(-1)))


def _centre(f: Tensor, energy: Tensor) -> Tensor:
    N, _, h, w = f.shape
    y, x = torch.linspace(-1, 1, h)[:, None], torch.linspace(-1, 1, w)[None]
    return _scaled(torch.exp(-(x**2 + y**2) / 0.8).expand(N, h, w))


def _common(f: Tensor, energy: Tensor) -> Tensor:
    N, _, h, w = f.shape
    flat, total = f.flatten(2), torch.zeros(N, h * w)
    for other in range(N):  # one image at a time: N² similarities of a large set would not fit
        best = torch.einsum("nda,db->nab", flat, flat[other]).amax(-1)
        best[other] = 0
        total += best
    return _scaled(total.view(N, h, w))


CUES = {"energy": lambda f, energy: _scaled(energy), "border": _border, "centre": _centre, "common": _common}


@dataclass(frozen=True)
class SaliencySettings:
    """A saliency network's input."""

    side: int = 320


class Saliency(Baseline):
    """U²-Net, or a saliency network like it, image by image: no set, no class, no training on the task.

    Its first output is brought to 0..1 in each image, as U²-Net's own code does.
    """

    name, models, frozen = "Saliency (U²-Net)", ("saliency",), False

    def prepare(self) -> None:
        import warnings

        path = self.folders["saliency"]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated, but the form in which a network is one file
                self._net = torch.jit.load(path, map_location=self.device).eval()
        except (RuntimeError, ValueError) as error:
            raise LCCoError(f"{path}: not a TorchScript file ({type(error).__name__})") from None

    @torch.no_grad()
    def look(self, data: CoSegData, i: int, cls: str) -> np.ndarray:
        side, (mean, std) = self.settings.side, backbones.IMAGENET_NORM
        pixels = np.asarray(data.image(i).resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255
        x = torch.from_numpy((pixels - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)[None]
        out = self._net(x.to(self.device))
        out = (out[0] if isinstance(out, (tuple, list)) else out).float().cpu()
        return (255 * _scaled(out.reshape(1, *out.shape[-2:]))[0]).byte().numpy()

    def choose(self, found: Sequence[Any], cls: str) -> Iterator[np.ndarray]:
        return (np.float32(values) / 255 for values in found)


# ------------------------------------------------------------------------------------------------------------- by name
BASELINES: dict[str, tuple[type[Baseline], type]] = {  # in the order of Table 5; LCCo's rows stand after SEEM's
    "sam": (Sam, SamSettings),
    "sam-gt": (SamGT, BoxSettings),
    "seem": (Seem, SeemSettings),
    "seem-gt": (SeemGT, SeemSettings),
    "mask2former": (Mask2Former, PanopticSettings),
    "mask2former-gt": (Mask2FormerGT, PanopticSettings),
    "oneformer": (OneFormer, PanopticSettings),
    "oneformer-gt": (OneFormerGT, PanopticSettings),
    "sam2-gt": (Sam2GT, BoxSettings),
    "sam3": (Sam3, TextSettings),
    "clipseg": (ClipSeg, TextSettings),
    "grounding-dino-sam2": (Grounded, GroundedSettings),
    "saliency": (Saliency, SaliencySettings),
    "clustering": (Clustering, ClusterSettings),
}


def make_baseline(
    name: str, inputs: Inputs | None = None, *, weights: Mapping[str, str] | None = None, **settings: Any
) -> Baseline:
    """The co-segmenter of that name (`BASELINES`), ready to run.

    inputs: the profile's frozen parts, from which come tower, vocabulary, backbone and device (`runs.shared_inputs`);
    weights: model → local folder or `repository@commit`, in the place of `HUB`'s; settings: of its settings class
    (the clustering's defaults are `CHOSEN` for the backbone).
    Raises: Absent within seconds when weights are not here and cannot be had; LCCoError for an unknown name or setting.
    """
    if name not in BASELINES:
        raise LCCoError(f"no baseline `{name}`{nearest(name, BASELINES)}")
    kind, form = BASELINES[name]
    given = dict(weights or {})
    for model in given:
        if model not in (*HUB, *BY_HAND):
            raise LCCoError(f"weights of unknown model `{model}`{nearest(model, (*HUB, *BY_HAND))}")
    if kind is Clustering and inputs is not None:
        settings = CHOSEN.get(inputs.backbone.name, {}) | settings
    chosen = build(form, settings, f"{name}.")
    folders = {model: find_weights(model, given.get(model)) for model in kind.models}
    if inputs is None and kind.frozen:
        raise LCCoError(f"baseline `{name}` needs `inputs`, the profile's frozen parts (runs.shared_inputs)")
    return kind(inputs, folders, chosen)


# ------------------------------------------------------------------------------------------------------------- Table 5
TABLE = "table5_foundation"


@dataclass(frozen=True)
class Scored:
    """A baseline's measurement in the place of a training run: where its scores are kept, and its record."""

    path: Path
    record: dict[str, Any]


@dataclass
class Foundation:
    """Table 5: rows; the runs and measurements behind them by (row, seed); masks of the sets that are shown.

    absent: what is not here → how to get it. shown: (test set, class, items). masks: row → the masks of each.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    runs: dict[tuple[str, int], Run | Scored] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    shown: list[tuple[str, str, list[int]]] = field(default_factory=list)
    masks: dict[str, list[list[np.ndarray]]] = field(default_factory=dict)


def score(
    baseline: Baseline, data: CoSegData, protocols: Sequence[str], group_size: int = 5, seed: int = 0
) -> tuple[dict[str, Evaluation], Scored]:
    """Scores of a baseline on a set, computed once and kept in the cache, and the record of how they were made."""
    from lcco.runs import environment

    slug = "-".join("".join(c if c.isalnum() else " " for c in baseline.name.lower()).split())
    folder = place("cache") / "baselines" / f"{slug}-{baseline.identity}"
    files = {}
    for p in dict.fromkeys(protocols):
        key = digest([data.identity(), p, group_size, seed], 10)
        files[p] = folder / f"{data.name}-{p}-{key}.json".replace("/", "_").replace(":", "_")
    missing = [p for p in files if not files[p].is_file()]
    if missing:
        write_json(folder / "record.json", {**baseline.record, "environment": environment()})
        for p, done in evaluate_all(baseline, data, missing, group_size, seed, f"{baseline.name} on").items():
            done.to_json(files[p])
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return {p: Evaluation.from_json(file) for p, file in files.items()}, Scored(folder, record)


def foundation_results(
    profile: Profile,
    *,
    weights: Mapping[str, str] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    tests: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    images: int = 5,
) -> Foundation:
    """Table 5: LCCo and LCCo GT from the run store, and every baseline whose weights are here, on the same sets.

    weights, settings: as `make_baseline` takes them, settings by baseline; only: names of `BASELINES`. Baselines run
    one after the other, and a row with absent weights says `not run: weights … not found`. The pictures shown are not
    picked by eye: of each test set the class with LCCo's median J, its first `images` by name.
    """
    from lcco import tables
    from lcco.data import load_data
    from lcco.runs import shared_inputs

    settings = dict(settings or {})
    names = list(BASELINES) if only is None else list(only)
    for name in [*settings, *names]:
        if name not in BASELINES:
            raise LCCoError(f"no baseline `{name}`{nearest(name, BASELINES)}")
    tests = list(tests or profile.ablation_test or profile.tests)  # the paper: iCoseg, or what is in its place
    out, e = Foundation(), profile.experiment
    mine = tables.collect(profile, TABLE, [_lcco_variant(profile)], tests=tests)
    out.runs.update(mine.runs)
    known: dict[str, CoSegData | str] = {}  # the test set, or why there is none
    for test in tests:
        try:
            known[test] = load_data(test)
        except LCCoError as error:
            known[test] = tables.absence(error)
    out.shown = _shown(profile, known, mine.runs, images)
    with_gt = [_with_gt(profile, row, mine.runs) for row in mine.rows]
    if mine.runs:
        run = mine.runs["LCCo", profile.seeds[0]]
        for row, gt in (("LCCo GT", True), ("LCCo", False)):
            out.masks[row] = _masks_of(run.predictor(gt=gt), known, out.shown)

    inputs: Inputs | None = None
    why = ""
    try:
        inputs = shared_inputs(e)
    except LCCoError as error:
        why = tables.absence(error)
    for name in names:
        kind, _ = BASELINES[name]
        for seed in profile.seeds if kind is Clustering else (None,):
            cells = {"backbone": " + ".join(_model_name(m, weights) for m in kind.models), "seed": seed}
            if kind.frozen:
                cells |= {"tower": tables.tower_name(e), "vocabulary": e.tower.vocabulary}
            if kind is Clustering:
                cells |= {"backbone": e.model.backbone, "tower": None, "vocabulary": None}
            own = dict(settings.get(name, {})) | ({} if seed is None else {"seed": seed})
            baseline, status = None, why if kind.frozen else ""
            try:
                for model in kind.models:  # first, so that the row says what lacks of its own
                    find_weights(model, (weights or {}).get(model))
                if not status:
                    baseline = make_baseline(name, inputs, weights=weights, **own)
            except Absent as error:
                out.absent[error.what], status = error.how, f"not run: weights {error.what} not found"
            for test, data in known.items():
                paper = _paper(kind.name) if test == "icoseg8" else (None, None)
                done: dict[str, Evaluation] = {}
                if baseline is not None and isinstance(data, CoSegData):
                    done, scored = score(baseline, data, profile.protocols, profile.group_size)
                    out.runs[f"{kind.name} on {test}", seed or 0] = scored
                for protocol in profile.protocols:
                    row = tables.make_row(TABLE, kind.name, profile, None, **cells, test_set=test, protocol=protocol)
                    row |= {"group_size": profile.group_size, "paper_P": paper[0], "paper_J": paper[1]}
                    if done:
                        row |= tables.per_cent(done[protocol].summary) | {"run": scored.path.name}
                    else:
                        row["status"] = data if isinstance(data, str) else status
                    out.rows.append(row)
            if baseline is not None and kind.name not in out.masks:
                out.masks[kind.name] = _masks_of(baseline, known, out.shown)
            del baseline
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if name == "seem-gt" or ("seem-gt" not in names and name == names[-1]):
            out.rows += [*with_gt, *mine.rows]
    if "icoseg8" not in tests:
        out.rows += _quoted(profile)
    elif not _on_coco(profile):
        gt = [row for row in _quoted(profile) if row["row"] == "LCCo GT"]
        out.rows += [row | {"row": "LCCo GT (COCO)", "train_set": "COCO"} for row in gt]
    for what, how in out.absent.items():
        print(f"weights {what} not found. To get the row: {how}", file=sys.stderr, flush=True)
    return out


def foundation_figure(profile: Profile, found: Foundation, folder: Path) -> Path | None:
    """The qualitative figure of Table 5, a row for each method that could be run; None when none could."""
    from lcco.data import load_data
    from lcco.figures import Panel, is_drawn, qualitative, save

    if not found.masks or not found.shown:
        return None
    panels, drawn = [], True
    for n, (test, cls, items) in enumerate(found.shown):
        data = load_data(test)
        drawn &= is_drawn(data)
        masks = {"truth": [(data.mask(i, [cls]) == 1).astype(np.float32) for i in items]}
        masks |= {row: [np.float32(m) for m in sets[n]] for row, sets in found.masks.items()}
        panels.append(Panel(f"{cls}, {test}", [np.asarray(data.image(i)) / 255 for i in items], masks))
    text = (
        "Table 5's methods side by side, a row each. Sets chosen by rule: of each test set the class with LCCo's "
        "median J, its first images by name; masks at threshold 0.5. Methods whose weights are not here have no row."
    )
    return save(qualitative(panels), folder, TABLE, text, photos=not drawn)


def _lcco_variant(profile: Profile) -> Any:
    from lcco.tables import Variant, main_variants

    lcco = main_variants(profile)[0]
    return Variant("LCCo", paper={k: v for k, v in lcco.paper.items() if k == "icoseg8"})


def _with_gt(profile: Profile, row: dict[str, Any], runs: Mapping[tuple[str, int], Run]) -> dict[str, Any]:
    """LCCo's row with the true class given to the same model; the paper's number is of one that was trained on COCO."""
    from lcco.tables import MEASURED, per_cent

    paper = _paper("LCCo GT") if row["test_set"] == "icoseg8" and _on_coco(profile) else (None, None)
    out = row | {"row": "LCCo GT", "paper_P": paper[0], "paper_J": paper[1]}
    if row["status"] == MEASURED:
        run = runs["LCCo", row["seed"]]
        done = run.evaluate(row["test_set"], row["protocol"], row["group_size"], gt=True)
        out |= per_cent(done[row["protocol"]].summary)
    return out


def _paper(method: str) -> tuple[float | None, float | None]:
    from lcco.tables import paper_number, paper_table

    known = set(paper_table(TABLE)["method"])
    return paper_number(TABLE, method=method) if method in known else (None, None)


def _on_coco(profile: Profile) -> bool:
    """Whether LCCo's training set is COCO, as that of the paper's Table 5: its LCCo GT equals Table 1's COCO row."""
    return any("coco" in name for name in profile.experiment.data.train)


def _quoted(profile: Profile) -> list[dict[str, Any]]:
    """The paper's Table 5 as rows of its own, where it cannot stand beside a measurement on the same set."""
    from lcco.tables import QUOTED, make_row, paper_table

    rows = []
    for method in paper_table(TABLE)["method"]:
        p, j = _paper(method)
        cells = {"test_set": "icoseg8", "protocol": "as printed", "paper_P": p, "paper_J": j, "status": QUOTED}
        rows.append(make_row(TABLE, method, profile, **cells))
    return rows


def _model_name(model: str, weights: Mapping[str, str] | None) -> str:
    """A model for the table's notes: its hub name without the commit, or the name of a local folder."""
    where = str((weights or {}).get(model) or HUB.get(model) or model)
    path = Path(where).expanduser()
    return path.name if path.exists() or where[0] in "./~" else where.partition("@")[0]


def _shown(
    profile: Profile, known: Mapping[str, CoSegData | str], runs: Mapping[tuple[str, int], Run], images: int
) -> list[tuple[str, str, list[int]]]:
    """For each test set the class with LCCo's median J (without LCCo the middle one by name) and its first images."""
    from lcco.tables import refusal

    out = []
    for test, data in known.items():
        if isinstance(data, str):
            continue
        order = sorted(data.groups)
        if runs and not refusal(profile, data):
            done = runs["LCCo", profile.seeds[0]].evaluate(test, profile.protocols[0], profile.group_size)
            scores: dict[str, list[float]] = {}
            for line in done[profile.protocols[0]].rows:
                scores.setdefault(line["class"], []).append(line["J"])
            order = sorted(scores, key=lambda c: (float(np.mean(scores[c])), c))
        # a single set would leave half of the page empty: two classes then
        for share in (0.5,) if len(known) > 1 else (0.25, 0.75):
            cls = order[min(int(share * len(order)), len(order) - 1)]
            items = sorted(data.groups[cls], key=data.keys.__getitem__)[:images]
            if (test, cls, items) not in out:
                out.append((test, cls, items))
    return out


def _masks_of(segment: Any, known: Mapping[str, CoSegData | str], shown: Sequence[tuple]) -> list[list[np.ndarray]]:
    return [[np.float16(m) for m in segment(known[test], items, cls)] for test, cls, items in shown]
