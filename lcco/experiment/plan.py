"""Which runs and scores each notebook needs: the Snakefile and the notebooks read it here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from lcco.common import LCCoError
from lcco.config import Experiment, Profile

Variants = dict[str, dict[str, Any]]  # row name → changes to the profile's experiment

NOTEBOOKS = ("00", "method", "01", "02", "03", "04", "05", "06", "07", "08", "09", "10")
MODULES = {
    "isfc": "ISFC", "clip_interaction": "CLIP inter.", "clip_regularization": "CLIP reg.",
}  # fmt: skip
BASELINE = {f"model.{module}": False for module in MODULES}


@dataclass(frozen=True)
class Score:
    """A test set, protocols (`choice`: the group-choice test) and the set size."""

    test: str
    protocols: tuple[str, ...]
    group_size: int


@dataclass(frozen=True)
class Job:
    """A training, and the scores that will be asked of it."""

    experiment: Experiment
    scores: tuple[Score, ...] = ()


# ---------------------------------------------------------------------------------- variants
def main_variants(profile: Profile | None = None) -> Variants:
    """Table 1's two models."""
    return {"LCCo": {}, "Baseline": dict(BASELINE)}


def component_variants(profile: Profile | None = None) -> Variants:
    """Table 2: every combination of the three modules; none is the Baseline, all are LCCo."""
    out: Variants = {}
    for on in sorted(product((True, False), repeat=len(MODULES)), key=sum):
        used = dict(zip(MODULES, on, strict=True))
        name = " + ".join(MODULES[module] for module in used if used[module])
        name = {0: "Baseline", len(MODULES): "LCCo"}.get(sum(on), name)
        out[name] = {f"model.{module}": False for module in used if not used[module]}
    return out


def loss_variants(profile: Profile | None = None) -> Variants:
    """Table 3's four sums of losses. Without L_c nothing trains MLP3: its choice stays random."""
    no_cs, no_c = {"loss.lambda_cs": 0.0}, {"loss.lambda_c": 0.0}
    return {"L_iou": no_cs | no_c, "L_iou + L_cs": no_c, "L_iou + L_c": no_cs,
            "L_iou + L_cs + L_c": {}}  # fmt: skip


def k_values(profile: Profile) -> tuple[int, ...]:
    """Table 4's numbers of distilled prompts; fewer where seconds matter."""
    return (1, 5) if profile.name == "smoke" else (1, 3, 5, 7, 9)


def k_variants(ks: Sequence[int]) -> Variants:
    """Table 4: the model trained with each number of distilled prompts."""
    if not ks or min(ks) < 1:
        raise LCCoError(f"`k_values` is {list(ks)}; it must be one or more numbers from 1 on")
    return {f"K = {k}": {"model.k": k} for k in ks}


def set_sizes(profile: Profile) -> tuple[int, ...]:
    """Images a set in the test of more images; fewer where seconds matter."""
    return (1, 3) if profile.name == "smoke" else (1, 2, 3, 5, 8, 12, 16)


def reading_variants(profile: Profile, vocabularies: Sequence[str] | None = None) -> Variants:
    """The open readings of the paper: the profile's own, then each turned over alone.

    vocabularies: other ones to train with; None: `voc20` and `imagenet1k` (for GlyphWorld
    `coco80`, whose words name none of its objects).
    """
    pairs = {
        "model.isfc_softmax": ("neighbours", "channels"), "model.placement": ("decoder", "encoder"),
        "model.modulation_residual": (False, True), "loss.lc_reduction": ("mean", "sum"),
        "loss.mask_background": ("zero", "mean"), "loss.v_gt": ("tower", "name"),
        "model.mlp3_skip": (False, True), "model.mlp3": ("vocabulary", "shared"),
    }  # fmt: skip
    own = profile.experiment.flat()
    rows = [(key, two if own[key] == one else one) for key, (one, two) in pairs.items()]
    words = own["tower.vocabulary"]
    if vocabularies is None:
        vocabularies = ("coco80",) if words == "glyphs" else ("voc20", "imagenet1k")
    rows += [("tower.vocabulary", name) for name in vocabularies if name != words]
    out: Variants = {"LCCo": {}}
    for key, value in rows:
        changes = {key: value}
        if key == "loss.lc_reduction":  # a sum over P words at weight 1 would drown the masks
            changes["loss.lambda_c"] = 1.0 if value == "mean" else 0.1
        out[f"{key.rpartition('.')[2]} = {str(value).lower()}"] = changes
    return out


# ---------------------------------------------------------------------------------- jobs
def needs(notebook: str, profile: Profile) -> list[Job]:
    """The trainings and scores that a notebook (`01`, …, `method`) asks for.

    Raises: LCCoError for an unknown notebook.
    """
    p, lcco = profile, {"LCCo": {}}
    main = _scores(p.tests, p.protocols, p) + _scores(p.choice_tests, ("choice",), p)
    ablation = _scores(p.ablation_tests, p.protocols, p) + _scores(p.choice_tests, ("choice",), p)
    sizes = [s for n in set_sizes(p) for s in _scores(p.ablation_tests, p.protocols[:1], p, n)]
    plan: dict[str, tuple[Variants, Sequence[int], Sequence[Score]]] = {
        "00": (lcco, p.seeds[:1], ()),
        "method": (lcco, p.seeds[:1], ()),
        "01": (main_variants(p), p.seeds, main),
        "02": (component_variants(p), p.ablation_seeds, ablation),
        "03": (loss_variants(p), p.ablation_seeds, ablation),
        "04": (k_variants(k_values(p)) | lcco, p.ablation_seeds, ablation),
        "05": (main_variants(p), p.seeds, sizes),
        "06": (lcco, p.seeds, _scores(p.ablation_tests or p.tests, p.protocols, p)),
        "07": (lcco, p.ablation_seeds, ()),
        "08": ({}, (), ()),
        "09": (reading_variants(p), p.ablation_seeds, ablation),
        "10": (main_variants(p), p.seeds, main),
    }
    if notebook not in plan:
        raise LCCoError(f"no notebook `{notebook}`; there are: {', '.join(plan)}")
    variants, seeds, scores = plan[notebook]
    each = product(variants.values(), seeds)
    return [Job(p.experiment.replace(changes, seed=s), tuple(scores)) for changes, s in each]


def _scores(
    tests: Sequence[str], protocols: Sequence[str], profile: Profile, size: int | None = None
) -> list[Score]:
    return [Score(test, tuple(protocols), size or profile.group_size) for test in tests]


def all_jobs(profile: Profile, notebooks: Sequence[str] | None = None) -> list[Job]:
    """The jobs of several notebooks (default: all), each training once with all its scores."""
    found: dict[str, Job] = {}
    for notebook in NOTEBOOKS if notebooks is None else notebooks:
        for job in needs(notebook, profile):
            known = found.get(job.experiment.hash, Job(job.experiment)).scores
            scores = tuple(dict.fromkeys((*known, *job.scores)))
            found[job.experiment.hash] = Job(job.experiment, scores)
    return list(found.values())
