"""The three modules' names, and what the paper leaves open as changes to an experiment."""

from collections.abc import Sequence
from typing import Any

from lcco.config import Profile

Variants = dict[str, dict[str, Any]]  # row name → changes to the profile's experiment

MODULES = {"isfc": "ISFC", "clip_interaction": "CLIP inter.", "clip_regularization": "CLIP reg."}
READINGS: dict[str, Sequence[Any]] = {  # settings that the paper leaves open
    "model.isfc_softmax": ("neighbours", "channels"), "model.isfc_neighbours": (None, 2),
    "model.placement": ("decoder", "encoder"),
    "model.modulation_residual": (False, True), "loss.lc_reduction": ("mean", "sum"),
    "loss.mask_background": ("zero", "mean"), "loss.v_gt": ("tower", "name"),
    "model.mlp3_skip": (False, True), "model.mlp3": ("vocabulary", "shared"),
    "train.mlp3_lr": (1, 10)}  # fmt: skip
BASELINE = {f"model.{module}": False for module in MODULES}


def reading_variants(profile: Profile, vocabularies: Sequence[str] | None = None) -> Variants:
    """The open readings of the paper: the profile's own, then each turned over alone.

    vocabularies: others to train with; None: `voc20` and `imagenet1k`, for GlyphWorld `coco80`.
    """
    own = profile.experiment.flat()
    if vocabularies is None:
        glyphs = own["tower.vocabulary"] == "glyphs"
        vocabularies = ("coco80",) if glyphs else ("voc20", "imagenet1k")
    out: Variants = {"LCCo": {}}
    for key, values in (READINGS | {"tower.vocabulary": vocabularies}).items():
        for value in (value for value in values if value != own[key]):
            changes = {key: value}
            if key == "loss.lc_reduction":  # a sum over P words at weight 1 would drown the masks
                changes["loss.lambda_c"] = 1.0 if value == "mean" else 0.1
            out[f"{key.partition('.')[2]} = {str(value).lower()}"] = changes
    return out
