"""Which trainings and scores each notebook asks for, so that the graph can make them ahead."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import NamedTuple

from lcco.common import LCCoError
from lcco.config import Experiment, Profile
from lcco.experiment.variants import BASELINE, MODULES, Variants, reading_variants

NOTEBOOKS = ("00", "method", "01", "02", "03", "04", "05", "06", "07", "08", "09", "10")
MAIN: Variants = {"LCCo": {}, "Baseline": BASELINE}  # Table 1
COMPONENTS: Variants = {  # Table 2
    {0: "Baseline", 3: "LCCo"}.get(n, " + ".join(MODULES[module] for module in on)):
    {f"model.{module}": False for module in MODULES if module not in on}
    for n in range(4) for on in combinations(MODULES, n)}  # fmt: skip
LOSSES: Variants = {  # Table 3. Without L_c nothing trains MLP3: it stays as it began.
    "L_iou": {"loss.lambda_cs": 0.0, "loss.lambda_c": 0.0}, "L_iou + L_cs": {"loss.lambda_c": 0.0},
    "L_iou + L_c": {"loss.lambda_cs": 0.0}, "L_iou + L_cs + L_c": {}}  # fmt: skip


class Score(NamedTuple):
    """A test set, protocols (`choice`: the group-choice test) and the set size."""

    test: str
    protocols: tuple[str, ...]
    group_size: int


class Job(NamedTuple):
    """A training, and the scores that will be asked of it."""

    experiment: Experiment
    scores: tuple[Score, ...] = ()


def needs(notebook: str, profile: Profile) -> list[Job]:
    """The trainings and scores that a notebook (`01`, …, `method`) asks for. Raises: LCCoError."""
    p, lcco, n = profile, {"LCCo": {}}, profile.group_size
    ks = {f"K = {k}": {"model.k": k} for k in p.k_values}
    choice = [Score(test, ("choice",), n) for test in p.choice_tests]
    main = [Score(test, p.protocols, n) for test in p.tests]
    fewer = [Score(test, p.protocols, n) for test in p.ablation_tests]
    sizes = [Score(t, p.protocols[:1], size) for size, t in product(p.set_sizes, p.ablation_tests)]
    plan: dict[str, tuple[Variants, Sequence[int], Sequence[Score]]] = {
        "01": (MAIN, p.seeds, main + choice),
        "02": (COMPONENTS, p.ablation_seeds, fewer + choice),
        "03": (LOSSES, p.ablation_seeds, fewer + choice),
        "04": (ks | lcco, p.ablation_seeds, fewer + choice),
        "05": (MAIN, p.seeds, sizes),
        "06": (lcco, p.seeds, fewer or main),
        "07": (lcco, p.ablation_seeds, ()),
        "09": (reading_variants(p), p.reading_seeds, fewer + choice),
        "10": (MAIN, p.seeds, main + choice),
    }
    if notebook not in NOTEBOOKS:
        raise LCCoError(f"no notebook `{notebook}`; there are: {', '.join(NOTEBOOKS)}")
    variants, seeds, scores = plan.get(notebook, ({}, (), ()))
    models = [p.experiment.replace(changes, seed=s) for changes in variants.values() for s in seeds]
    return [Job(model, tuple(scores)) for model in models]


def all_jobs(profile: Profile, notebooks: Sequence[str] = NOTEBOOKS) -> list[Job]:
    """The jobs of several notebooks, each training once with all its scores."""
    found: dict[str, Job] = {}
    for job in (job for notebook in notebooks for job in needs(notebook, profile)):
        known = found.get(job.experiment.hash, Job(job.experiment)).scores
        found[job.experiment.hash] = Job(job.experiment, tuple(dict.fromkeys(known + job.scores)))
    return list(found.values())
