"""Table 5's rivals: foundation models, and clustering without training, scored as runs are.

A rival has a run's `evaluate`, `path` and `record`, and is a Segmenter itself. Its weights are
looked for when a mask is asked for. Only rows named GT look at the true class or mask.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, cached_property
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
from lcco.common import VOID, LCCoError, Missing, digest, file_digest, place
from lcco.data import CoSegData
from lcco.data.pictures import bad, read_labels
from lcco.experiment.evaluate import Evaluation, evaluate_all
from lcco.experiment.features import Features
from lcco.experiment.runs import environment
from lcco.semantics import Vocabulary, prompts, vocabulary
from lcco.store import kept

# A commit pins what a row measured; the models' pages tell under which terms they are given.
HUB = {
    "sam": "facebook/sam-vit-huge@87aecf0df4ce6b30cd7de76e87673c49644bdf67",
    "sam3": "facebook/sam3@3c879f39826c281e95690f02c7821c4de09afae7",
    "clipseg": "CIDAS/clipseg-rd64-refined@999e0328d9e10b484360c477313983f9afdd7050",
}
FORM = 3  # raise it when masks change, so that no old score is taken for a new one


class Rival:
    """A co-segmenter without training: `rival(data, items, cls)` gives maps [h, w] in 0..1.

    model: whose weights it needs, from `HUB` or the local folder `weights`. kinds: transformers'
    classes of network and processor. settings: our reading where the paper is silent. semantic:
    whether tower and vocabulary decide its masks. how: to get the weights, if not from a hub.
    """

    name, model, semantic, how = "", "", True, "name a local folder"
    kinds: tuple[str, ...] = ()
    settings: dict[str, Any] = {}

    def __init__(self, features: Features, words: Vocabulary, weights: str | None = None) -> None:
        self.features, self.words, self.weights = features, words, weights
        self.device = torch.device(features.device)
        self.look = cache(self.look)  # until all protocols have seen the set

    def look(self, data: CoSegData, i: int, word: str = "") -> Any:
        """What the network finds in one picture (of a word); remembered, so it must be compact."""

    def __call__(self, data: CoSegData, items: Sequence[int], cls: str) -> Iterator[np.ndarray]:
        """Each picture's `look` for the class that the tower votes from the whole pictures.

        Deviation: nobody has published Table 5's rows that do so; how the class is found is ours.
        """
        scores = self.probabilities(self.features.embeddings(data, items))
        word = self.words.words[vote(scores[:, None])]
        return (self.look(data, i, word) for i in items)

    @cached_property
    def net(self) -> Any:
        """Network and processor, loaded when first used. Raises: LCCoError; Missing if absent."""
        import transformers

        transformers.utils.logging.disable_progress_bar()
        network, processor = (getattr(transformers, k).from_pretrained for k in self.kinds)
        where = {"pretrained_model_name_or_path": self.folder, "local_files_only": True}
        with backbones.reading(self.folder, self.kinds[0]):
            model, info = network(**where, output_loading_info=True)
            # transformers would fill them with random numbers
            if lacking := sorted(set(info["missing_keys"]) & dict(model.named_parameters()).keys()):
                raise LookupError(f"`{lacking[0]}` is missing")
            return model.eval().requires_grad_(False).to(self.device), processor(**where)

    @cached_property
    def folder(self) -> Path:
        """Where its weights are; the hub's are downloaded once. Raises: Missing within seconds."""
        if not self.weights and self.model in HUB:
            repo, commit = HUB[self.model].split("@")
            kinds = "*.safetensors", "pytorch_model*.bin"
            return backbones.hub_file(repo, *kinds, commit=commit).parent
        path = Path(self.weights or self.model).expanduser()
        if not self.weights or not path.is_dir():
            raise Missing("weights", path.name, f"there is no folder {path}; {self.how}")
        return path

    def probabilities(self, embeddings: Tensor) -> np.ndarray:
        """Embeddings [n, D] → each one's probabilities over the vocabulary, float32 [n, P]."""
        scale = self.features.tower.logit_scale
        return (scale * embeddings @ self.words.embeddings.T).softmax(-1).numpy()

    @cached_property
    def record(self) -> dict[str, Any]:
        """What decides the masks; then data and environment of the scores. Raises: Missing."""
        out = {"rival": self.name, "form": FORM, "settings": self.settings, "data": {}}
        if self.model:
            out["weights"] = digest({f.name: file_digest(f) for f in self.folder.glob("[!.]*.*")})
        if self.semantic:
            out |= {"tower": self.features.tower.identity, "templates": self.words.templates}
            out["vocabulary_hash"] = self.words.hash
        return out

    @cached_property
    def path(self) -> Path:
        """Where its scores are kept, named by what decides the masks."""
        slug = re.sub("[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return place("cache") / "rivals" / f"{slug}-{digest(self.record, 10)}"

    def evaluate(self, test: CoSegData, protocols: Sequence[str],
                 group_size: int = 5) -> dict[str, Evaluation]:  # fmt: skip
        """Scores under protocols (`choice` too), each computed once and kept. Raises: Missing."""
        on, out = {"digest": test.digest(), "masks": test.truth_digest()}, {}
        for p in protocols:
            name = f"{test.name}-{p}-{group_size}-{digest(on, 10)}.json".replace("/", "_")
            found = kept(self.path / name, lambda p=p: {
                "scores": asdict(evaluate_all(self, test, [p], group_size)[p]),
                "scored_by": environment()})  # fmt: skip
            self.record["data"][test.name], self.record["environment"] = on, found["scored_by"]
            out[p] = Evaluation(**found["scores"])
        self.__dict__.pop("net", None)  # its memory is for the next rival
        self.look.cache_clear()
        return out


def vote(scores: Sequence[np.ndarray]) -> int:
    """The set's class from each image's probabilities [masks, P]: the largest sum of best masks."""
    return int(np.sum([s.max(0) for s in scores if len(s)], axis=0, dtype=np.float64).argmax())


class Sam(Rival):
    """SAM's automatic masks, classified by the tower: the likeliest of the class that a set votes.

    Deviation: the paper names SAM, CLIP and no more; how they work together is our reading.
    """

    name, model = "SAM", "sam"
    kinds = "AutoModelForMaskGeneration", "AutoProcessor"
    settings = {
        "points_per_crop": 32, "points_per_batch": 64,  # a side of the grid; prompts at once
        "pred_iou_thresh": 0.88, "stability_score_thresh": 0.95,  # SAM's own
    }  # fmt: skip

    @cached_property
    def net(self) -> Any:
        from transformers import pipeline

        model, processor = super().net
        how = {"image_processor": processor.image_processor, "device": self.device}
        return pipeline("mask-generation", model=model, **how)

    def look(self, data: CoSegData, i: int, word: str = "") -> tuple[list, np.ndarray]:
        """Masks as COCO's run-length codes, since there may be a hundred; their probabilities."""
        image = data.image(i)
        try:
            masks = [np.asarray(m, bool) for m in self.net(image, **self.settings)["masks"]]
        except IndexError:  # the pipeline's answer to a picture in which no mask passes
            masks = []
        masks, pixels = [m for m in masks if m.any()], np.asarray(image)
        vectors = self.features.tower.encode_images(cut_out(pixels, m) for m in masks)
        codes = [rle.encode(np.asfortranarray(m, np.uint8)) for m in masks]
        return codes, self.probabilities(vectors)

    def __call__(self, data: CoSegData, items: Sequence[int], cls: str) -> Iterator[np.ndarray]:
        found = [self.look(data, i) for i in items]
        common = vote([scores for _, scores in found])
        for codes, scores in found:  # scorers take maps of any size
            yield rle.decode(codes[scores[:, common].argmax()]) if codes else np.zeros((1, 1))


def cut_out(image: np.ndarray, mask: np.ndarray) -> Image.Image:
    """The masked object of a picture [H, W, 3], on white, cropped and padded to a square."""
    out = Image.fromarray(np.where(mask[..., None], image, np.uint8(255)))
    out = out.crop(Image.fromarray(mask).getbbox())
    return ImageOps.pad(out, (max(out.size), max(out.size)), color="white")


class SamGT(Rival):
    """SAM prompted with the boxes of the true objects: its upper bound for this task."""

    name, model, semantic = "SAM GT", "sam", False
    kinds = "AutoModelForMaskGeneration", "AutoProcessor"

    def __call__(self, data: CoSegData, items: Sequence[int], cls: str) -> Iterator[np.ndarray]:
        return (self.look(data, i, cls) for i in items)

    def look(self, data: CoSegData, i: int, word: str = "") -> np.ndarray:
        """The union of the masks of all objects, by their boxes [x0, y0, x1, y1] in pixels."""
        truth = data.mask(i, [word]) == 1
        found = ndimage.find_objects(ndimage.label(truth, np.ones((3, 3)))[0])
        boxes = [[float(v) for v in (x.start, y.start, x.stop, y.stop)] for y, x in found]
        if not boxes:
            return truth
        model, processor = self.net
        given = processor(images=data.image(i), input_boxes=[boxes], return_tensors="pt")
        sizes = given.pop("original_sizes"), given.pop("reshaped_input_sizes")
        found = model(**given.to(self.device, torch.float32), multimask_output=False).pred_masks
        return processor.post_process_masks(found.cpu(), *sizes)[0].flatten(0, 1).any(0).numpy()


class Seem(Rival):
    """SEEM, from class maps made with it in its own environment; most images vote for a thing.

    `weights`: a folder with one 8-bit PNG a picture, at the picture's own size, named
    `<data.content(i)>.png`; for a picture file these are 16 hex digits of its sha256
    (`sha256sum FILE | cut -c-16`). A pixel is 0 where SEEM's panoptic output shows no thing, else
    1 + the place of its class in `vocabulary("coco80")`, counted from 0.
    Deviation: the paper does not say how a tie ends (by area here), nor that only things vote.
    """

    name, model, semantic = "SEEM", "seem", False
    how = "make class maps with SEEM as help(lcco.experiment.rivals.Seem) says, name the folder"

    def look(self, data: CoSegData, i: int, word: str = "") -> np.ndarray:
        """Each pixel's class as in the file: uint8 [H, W]."""
        file, size = self.folder / f"{data.content(i)}.png", data.image(i).size
        if not file.is_file():
            raise Missing("weights", file.name, f"no {file} for {data.keys[i]}; {self.how}")
        classes = read_labels(file, len(vocabulary("coco80")))
        if classes.shape[::-1] != size:
            raise bad(file, f"{classes.shape[::-1]} pixels for a picture of {size}", self.how)
        return classes

    def __call__(self, data: CoSegData, items: Sequence[int], cls: str) -> Iterator[np.ndarray]:
        found = [self.look(data, i) for i in items]
        common = self.common(found, cls)
        return (classes == common for classes in found)

    def common(self, found: Sequence[np.ndarray], cls: str) -> int:
        """The set's class as the maps number it: in most images, then the larger area."""
        shares = [np.bincount(x.ravel(), minlength=256)[1:VOID] / x.size for x in found]
        return 1 + int(sum((s > 0) + s / (len(found) + 1) for s in shares).argmax())


class SeemGT(Seem):
    """SEEM with the true class: the thing nearest to it takes the place of the vote."""

    name, semantic = "SEEM GT", True

    def common(self, found: Sequence[np.ndarray], cls: str) -> int:
        words, tower = vocabulary("coco80"), self.features.tower
        table = prompts(tower, words, self.words.templates)
        return 1 + Vocabulary(tuple(words), table, self.words.templates).nearest(cls, tower)


class Sam3(Rival):
    """SAM 3 asked for the voted class by name: the union of the instances it finds."""

    name, model, kinds = "SAM 3", "sam3", ("Sam3Model", "Sam3Processor")
    settings = {"threshold": 0.5, "mask_threshold": 0.5}  # of an instance, of a mask's pixel

    def look(self, data: CoSegData, i: int, word: str = "") -> np.ndarray:
        (model, processor), image = self.net, data.image(i)
        given = processor(images=image, text=word, return_tensors="pt").to(self.device)
        how = {"target_sizes": [image.size[::-1]], **self.settings}
        found = processor.post_process_instance_segmentation(model(**given), **how)
        return found[0]["masks"].bool().any(0).cpu().numpy()  # of [instances, H, W]


class ClipSeg(Rival):
    """CLIPSeg asked for the voted class by name: its map of probabilities."""

    name, model = "CLIPSeg", "clipseg"
    kinds = "CLIPSegForImageSegmentation", "CLIPSegProcessor"

    def look(self, data: CoSegData, i: int, word: str = "") -> np.ndarray:
        model, processor = self.net
        given = processor(images=[data.image(i)], text=[word], padding=True, return_tensors="pt")
        logits = model(**given.to(self.device)).logits
        return logits.sigmoid().reshape(logits.shape[-2:]).cpu().numpy()


class Clustering(Rival):
    """No training: the backbone's patch features, clustered over the set; salient clusters win.

    After Amir et al. 2022, who cluster DINO's patch features and vote by DINO's attention.
    Deviation: a convolutional backbone has no attention, so a patch is salient that differs from
    its image's border. No elbow rule for the number of clusters, no GrabCut afterwards.
    """

    name, semantic = "Clustering (no training)", False
    settings = {  # chosen on held-out folds
        "clusters": 4, "in_drawings": 16,  # GlyphWorld's pictures hold several small objects
        "full": 0.04,  # a cluster counts in full in an image from this share of it on
        "threshold": 1.2,  # of saliency, as a multiple of the image's mean, over the images
    }  # fmt: skip

    @cached_property
    def net(self) -> backbones.Backbone:
        return copy.deepcopy(self.features.backbone).eval().requires_grad_(False).to(self.device)

    @cached_property
    def record(self) -> dict[str, Any]:
        sha = backbones.tensors_digest(self.net.stages[:3].state_dict())
        return super().record | {"backbone": f"{self.net.name}-{sha}", "size": self.features.size}

    def patches(self, data: CoSegData, items: Sequence[int]) -> Tensor:
        """Unit features [N, h, w, D] of the third stage, on twice its grid."""
        images, maps = self.features.visual(data, items)
        maps = [m.float().to(self.device) for m in (maps or ())[:3]]
        x = self.net(None if maps else images.to(self.device), maps, 3)[2]
        fine = F.interpolate(x, scale_factor=2, mode="bilinear")
        return F.normalize(fine, dim=1).permute(0, 2, 3, 1).cpu()

    def __call__(self, data: CoSegData, items: Sequence[int], cls: str) -> Iterator[np.ndarray]:
        f = self.patches(data, items)
        k = self.settings["in_drawings" if self.net.name == "glyphnet" else "clusters"]
        labels = kmeans(f.flatten(0, 2), k).view(f.shape[:3])
        yield from self.salient(labels, off_border(f)).numpy()

    def salient(self, labels: Tensor, saliency: Tensor) -> Tensor:
        """Whether each patch's cluster is salient where it is, and is in most images: [N, h, w]."""
        member, s = F.one_hot(labels.flatten(1)).float(), saliency.flatten(1)
        s = s / s.mean(1, keepdim=True).clamp_min(1e-8)
        inside = torch.einsum("np,npk->nk", s, member) / member.sum(1).clamp_min(1)
        there = (member.mean(1) / self.settings["full"]).clamp_max(1)
        score = (inside.clamp_max(2) * there).mean(0)  # [k]
        return (score >= score.max().clamp_max(self.settings["threshold"]))[labels]


def kmeans(x: Tensor, k: int, steps: int = 10) -> Tensor:
    """Spherical k-means of unit rows [n, d] → cluster numbers [n]; it starts from far-off rows."""
    centres = x[:1]
    for _ in range(k - 1):
        centres = torch.cat([centres, x[(x @ centres.T).amax(1).argmin()][None]])
    for _ in range(steps):
        sums = torch.zeros_like(centres).index_add_(0, (x @ centres.T).argmax(1), x)
        centres = F.normalize(sums, dim=1)
    return (x @ centres.T).argmax(1)


def off_border(f: Tensor) -> Tensor:
    """Unit features [N, h, w, D] → 1 − the mean cosine with the border's, as 0..1 an image."""
    edge = torch.ones(f.shape[1:3], dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    x = -torch.einsum("nhwd,nd->nhw", f, f[:, edge].mean(1))
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-6)


RIVALS: dict[str, type[Rival]] = {  # in the order of Table 5; LCCo's rows stand after SEEM's
    "sam": Sam, "sam-gt": SamGT, "seem": Seem, "seem-gt": SeemGT, "sam3": Sam3,
    "clipseg": ClipSeg, "clustering": Clustering}  # fmt: skip


def rivals(names: Sequence[str], features: Features, words: Vocabulary,
           weights: Mapping[str, str] | None = None) -> dict[str, Rival]:  # fmt: skip
    """Row of Table 5 → its rival, for names in `RIVALS`; nothing is loaded yet.

    weights: model ("sam", "sam3", "clipseg", "seem") → a local folder. Raises: LCCoError.
    """
    if unknown := [name for name in names if name not in RIVALS]:
        raise LCCoError(f"no rival `{unknown[0]}`; there are: {', '.join(RIVALS)}")
    made = [RIVALS[n](features, words, (weights or {}).get(RIVALS[n].model)) for n in names]
    return {rival.name: rival for rival in made}
