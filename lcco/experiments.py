"""The paper's tables beyond Table 1 as experiments: which settings make which rows, and what else is measured of a run.

A variant changes settings of the profile's one experiment and never its name, so what several notebooks need (the
full model, the Baseline) has one folder in the run store and is trained once.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcco.common import LCCoError, digest, file_digest, progress, write_json
from lcco.config import Experiment, Profile, load_profile
from lcco.tables import (
    BASELINE,
    LABELS,
    MEASURED,
    Results,
    Variant,
    absence,
    collect,
    main_variants,
    make_row,
    paper_table,
    per_cent,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

    from lcco.evaluate import Evaluation
    from lcco.runs import Run

MODULES = {"isfc": "ISFC", "clip_interaction": "CLIP inter.", "clip_regularization": "CLIP reg."}
CHOICE_CELLS = ("leak", "J_same", "gain", "decides", "agreement")  # of `evaluate_choice`, beside P and J


# ---------------------------------------------------------------------------------------------- which rows there are
def component_variants(profile: Profile) -> list[Variant]:
    """Table 2's eight combinations of the three modules, in the paper's order: none is the Baseline, all are LCCo."""
    out = []
    for line in paper_table("table2_components").to_dict("records"):
        off = [m for m in MODULES if not line[m]]
        name = " + ".join(MODULES[m] for m in MODULES if m not in off)
        changes: dict[str, Any] = {f"model.{m}": False for m in off}
        if len(off) in (0, len(MODULES)):
            name, changes = ("Baseline", BASELINE | profile.baseline) if off else ("LCCo", {})
        out.append(Variant(name, changes, {"": (line["P"], line["J"])}))
    return out


def loss_variants() -> list[Variant]:
    """Table 3's four sums of losses, in the paper's order. Without L_c nothing trains MLP3: its choice stays random."""
    weights = {"L_cs": "loss.lambda_cs", "L_c": "loss.lambda_c"}
    out = []
    for line in paper_table("table3_losses").to_dict("records"):
        name = " + ".join(term for term in ("L_iou", *weights) if line[term])
        changes = {setting: 0.0 for term, setting in weights.items() if not line[term]}
        out.append(Variant(name, changes, {"": (line["P"], line["J"])}))
    return out


def k_variants(k_values: Sequence[int]) -> list[Variant]:
    """Table 4: the model trained with each K, the number of distilled prompts. Raises: LCCoError for K below 1."""
    if not k_values or min(k_values) < 1:
        raise LCCoError(f"`k_values` is {list(k_values)}; it must be one or more numbers from 1 on")
    printed = {line["K"]: (line["P"], line["J"]) for line in paper_table("table4_k").to_dict("records")}
    return [Variant(f"K = {k}", {"model.k": k}, {"": printed.get(k, (None, None))}, {"K": k}) for k in k_values]


def reading_variants(experiment: Experiment, vocabularies: Sequence[str] | None = None) -> list[Variant]:
    """The open readings of the paper, one a row: the profile's own, then each turned over alone.

    vocabularies: other vocabularies to train with; None: `voc20` and `imagenet1k` (for GlyphWorld `coco80`, whose
    words name none of its objects).
    """
    m, loss = experiment.model, experiment.loss
    other = {"neighbours": "channels", "channels": "neighbours", "decoder": "encoder", "encoder": "decoder",
             "mean": "sum", "sum": "mean", "vocabulary": "shared", "shared": "vocabulary"}  # fmt: skip
    if vocabularies is None:
        vocabularies = ("coco80",) if experiment.tower.vocabulary == "glyphs" else ("voc20", "imagenet1k")
    softmax, reduction = other[m.isfc_softmax], other[loss.lc_reduction]
    background = "zero" if loss.mask_background == "mean" else "mean"
    lambda_c = 1.0 if reduction == "mean" else 0.1  # a sum over P words at weight 1 would drown the masks
    turned: list[tuple[str, str, dict[str, Any]]] = [
        ("isfc_softmax", "Eq. 2: softmax over " + ("the neighbours" if softmax == "neighbours" else "all channels"),
         {"model.isfc_softmax": softmax}),
        ("placement", f"F1, F2, F3 are maps of the {other[m.placement]}", {"model.placement": other[m.placement]}),
        ("modulation_residual", f"Eq. 5 and 8 {'without' if m.modulation_residual else 'with'} a residual",
         {"model.modulation_residual": not m.modulation_residual}),
        ("lc_reduction", f"Eq. 12: {'mean' if reduction == 'mean' else 'sum'} over the prompts, weight {lambda_c:g}",
         {"loss.lc_reduction": reduction, "loss.lambda_c": lambda_c}),
        ("mask_background", f"v_gt: outside the true mask {'black' if background == 'zero' else 'the mean colour'}",
         {"loss.mask_background": background}),
        ("mlp3_skip", f"Eq. 7: MLP3 {'without' if m.mlp3_skip else 'with'} a skip",
         {"model.mlp3_skip": not m.mlp3_skip}),
        ("mlp3", "Eq. 7: MLP3 " + ("from P words to P" if m.mlp3 == "shared" else "one small network for every word"),
         {"model.mlp3": other[m.mlp3]}),
    ]  # fmt: skip
    turned += [
        ("vocabulary", f"the words of {name}", {"tower.vocabulary": name})
        for name in vocabularies if name != experiment.tower.vocabulary
    ]  # fmt: skip
    out = [Variant("LCCo", rest={"reading": "as the profile reads the paper"})]
    for name, text, changes in turned:
        value = next(v for k, v in changes.items() if k.endswith(name))
        out.append(Variant(f"{name} = {str(value).lower()}", changes, rest={"reading": text}))
    return out


# ------------------------------------------------------------------------------------------------- rows of ablations
def choice(run: Run, test: str, group_size: int = 5, *, k: int | None = None) -> Evaluation:
    """The group-choice test (`evaluate.evaluate_choice`, protocol `choice`) of a run, computed once and kept.

    Raises: LCCoError if the model was trained on pictures of the test set.
    """
    return run.evaluate(test, "choice", group_size, k=k)["choice"]


def choice_results(profile: Profile, table: str = "choice") -> Results:
    """The group-choice test of LCCo and the Baseline, every seed, on each of the profile's sets that offer a choice."""
    found = collect(profile, table, main_variants(profile))
    found.rows = [
        _choice_row(profile, like, found.runs.get((like["row"], like["seed"])), test=test)
        for test in profile.choice_test for like in _once(found.rows)
    ]  # fmt: skip
    return found


def ablate(profile: Profile, table: str, variants: Sequence[Variant]) -> Results:
    """Rows of an ablation: its seeds on its test sets under every protocol, and on the group-choice test if it has one.

    The standard sets hardly need the set (most pictures show one object), so they hardly tell the modules apart.
    """
    found = collect(profile, table, variants, tests=profile.ablation_test, seeds=profile.ablation_seeds)
    found.rows += [
        _choice_row(profile, r, found.runs.get((r["row"], r["seed"])), test=test)
        for test in profile.choice_test for r in _once(found.rows)
    ]  # fmt: skip
    return found


def _once(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One of the rows of each line and seed."""
    return list({(row["row"], row["seed"]): row for row in rows}.values())


def _choice_row(
    profile: Profile, like: Mapping[str, Any], run: Run | None, k: int | None = None, *, test: str
) -> dict[str, Any]:
    """The row of the choice test beside a row of the standard tests."""
    from lcco.data import load_data

    row = dict(like) | dict.fromkeys((*per_cent({}), "paper_P", "paper_J"))
    row |= {"test_set": test, "protocol": "choice", "group_size": profile.group_size, "run": None}
    try:
        load_data(test)
    except LCCoError as error:
        return row | {"status": absence(error)}
    if not run:
        return row
    summary = choice(run, test, profile.group_size, k=k).summary
    more = {key: round(100 * summary[key], 4) for key in CHOICE_CELLS}
    return row | per_cent(summary) | more | {"status": MEASURED, "run": run.path.name}


def k_at_test_time(profile: Profile, k_values: Sequence[int], table: str = "table4_k_test_time") -> Results:
    """Table 4's cheap sweep: the full model as it was trained, given another number of prompts when it is used."""
    k_variants(k_values)
    found = collect(profile, table, [Variant("LCCo")], tests=profile.ablation_test, seeds=profile.ablation_seeds)
    plain, found.rows = found.rows, []
    for k in k_values:
        given = None if k == profile.experiment.model.k else k  # as trained: shares its score with the other tables
        for like in plain:
            row = dict(like) | {"row": f"K = {k}", "K": k}
            if like["run"]:
                run = found.runs["LCCo", like["seed"]]
                done = run.evaluate(like["test_set"], profile.protocols, like["group_size"], k=given)
                row |= per_cent(done[like["protocol"]].summary)
            found.rows.append(row)
        for test in profile.choice_test:
            for like in _once(r for r in found.rows if r["K"] == k and r["protocol"] != "choice"):
                found.rows.append(_choice_row(profile, like, found.runs.get(("LCCo", like["seed"])), given, test=test))
    return found


def more_images(profile: Profile, set_sizes: Sequence[int]) -> Results:
    """LCCo and the Baseline, trained with N images a set, used with other N; every seed of the main table.

    Rows under the profile's first protocol; `model` names the model (and the test set, if there are several).
    """
    if not set_sizes or min(set_sizes) < 1:
        raise LCCoError(f"`set_sizes` is {list(set_sizes)}; it must be one or more numbers from 1 on")
    variants = [dataclasses.replace(v, paper={}) for v in main_variants(profile)]
    found = collect(
        profile, "more_images", variants, tests=profile.ablation_test, protocols=profile.protocols[:1],
        group_sizes=set_sizes,
    )  # fmt: skip
    for row in found.rows:
        on = f", {LABELS.get(row['test_set'], row['test_set'])}" if len(profile.ablation_test) > 1 else ""
        row["model"] = row["row"] + on
        row["row"] = f"{row['row']}, {row['group_size']} image{'s' * (row['group_size'] != 1)}"
    return found


def growth(rows: Sequence[Mapping[str, Any]], trained: int = 5) -> list[str]:
    """What larger sets change, beside the paper's claim: sentences for the table of `more_images`."""
    claim = {line["method"]: line for line in paper_table("more_images").to_dict("records")}["LCCo"]
    start, end = int(claim["images_from"]), int(claim["images_to"])
    out = [f"The paper, from {start} to {end} images: P {claim['delta_P']:+.1f}, J {claim['delta_J']:+.1f}."]
    for model in dict.fromkeys(r["model"] for r in rows):
        by_size: dict[int, dict[int, Mapping[str, Any]]] = {}
        for r in rows:
            if r["model"] == model and r["J"] is not None:
                by_size.setdefault(r["group_size"], {})[r["seed"]] = r
        if trained in by_size and end in by_size:
            both = by_size[trained].keys() & by_size[end].keys()
            said = [
                f"{m} {_spread([by_size[end][s][m] - by_size[trained][s][m] for s in sorted(both)])}" for m in "PJ"
            ]
            out.append(f"Here, {model}, from {trained} to {end} images: {', '.join(said)}.")
    return out


def readings(profile: Profile, vocabularies: Sequence[str] | None = None) -> Results:
    """Each open reading of the paper as a row, with its change against the same seed of the profile's own reading.

    The profile's own stands there with every seed of the main table, so that its spread can be seen.
    """
    first, *rest = reading_variants(profile.experiment, vocabularies)
    seeds = tuple(dict.fromkeys((*profile.ablation_seeds, *profile.seeds)))
    found = ablate(dataclasses.replace(profile, ablation_seeds=seeds), "interpretations", [first])
    more = ablate(profile, "interpretations", rest)
    found.rows += more.rows
    found.runs |= more.runs
    base = {_test_of(r): r for r in found.rows if r["row"] == first.row}
    for row in found.rows:
        own = base.get(_test_of(row), {})
        for m in "PJ":
            known = row[m] is not None and own.get(m) is not None
            row[f"change_{m}"] = round(row[m] - own[m], 4) if known else None
    return found


def _test_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("test_set", "protocol", "group_size", "seed"))


def _spread(values: Sequence[float]) -> str:
    sd = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.1f}{sd}"


def against(rows: Sequence[Mapping[str, Any]], reference: str, metric: str = "J") -> list[str]:
    """How each line of a table differs from the line `reference`, seed by seed, beside what the paper says of it.

    Returns: a sentence for each test set and protocol; “against the paper” marks a difference of the other sign.
    """
    done = [r for r in rows if r[metric] is not None]
    out = []
    for test, protocol in dict.fromkeys((r["test_set"], r["protocol"]) for r in done):
        mine = [r for r in done if (r["test_set"], r["protocol"]) == (test, protocol)]
        base = {r["seed"]: r for r in mine if r["row"] == reference}
        parts = []
        for name in dict.fromkeys(r["row"] for r in mine if r["row"] != reference):
            pairs = [(r, base[r["seed"]]) for r in mine if r["row"] == name and r["seed"] in base]
            if not pairs:
                continue
            change = [r[metric] - b[metric] for r, b in pairs]
            said = f"{name} {_spread(change)}"
            r, b = pairs[0]
            if r.get(f"paper_{metric}") is not None and b.get(f"paper_{metric}") is not None:
                paper = r[f"paper_{metric}"] - b[f"paper_{metric}"]
                contrary = paper * round(statistics.fmean(change), 1) < 0
                said += f" (paper {paper:+.1f}{', against the paper' * contrary})"
            parts.append(said)
        if parts:
            out.append(f"{LABELS.get(test, test)}, {protocol}: {metric} against {reference}: {'; '.join(parts)}.")
    return out


# ---------------------------------------------------------------------------------- Fig. 3: features and regularization
def masked_norm(maps: Tensor, masks: Tensor, over: str = "positions") -> tuple[Tensor, Tensor]:
    """Fig. 3's measure of a feature map, ‖M ⊙ Softmax(F)‖₂, and the share of the softmax that lies inside M.

    maps: [n, C, h, w]; masks: [n, h, w] in 0..1. over: `positions` (softmax over the h·w positions of each channel, so
    a channel that looks at the object counts most) or `channels` (over the C channels at each position). The norm is
    over channels and positions together. Returns [n], [n]. Deviation: the paper does not say which of the two it is.
    """
    soft = maps.flatten(2).softmax(-1).view_as(maps) if over == "positions" else maps.softmax(1)
    inside = soft * masks[:, None]
    return inside.flatten(1).norm(dim=1), inside.flatten(1).sum(1) / soft.flatten(1).sum(1)


def feature_quality(run: Run, test: str, group_size: int = 5) -> dict[str, Any]:
    """`masked_norm` of F³ before and after CLIP regularization, mean over a test set's images that show the object.

    The sets are those of the protocol `ufo`; the true masks, void left out, are averaged over the map's cells. `flat`
    is what a map without any preference would score. Computed once and kept in the run's `evaluations/`.
    """
    import torch
    import torch.nn.functional as F

    from lcco.data import load_data, mask_square
    from lcco.metrics import consecutive_groups

    data = load_data(test)
    key = digest([data.digest(), "feature quality", group_size, file_digest(run.weights)], 10)
    file = run.path / "evaluations" / f"{data.name}-features-{group_size}-{key}.json"
    if not file.is_file():
        predictor, sums, images = run.predictor(), {}, 0
        predictor.inputs.prepare(data)
        plan = [(c, *g) for c, items in data.groups.items() for g in consecutive_groups(list(items), group_size)]
        for cls, members, new in progress(plan, f"feature maps of {data.name}"):
            out = predictor.output(data, members, return_maps=True)
            before, after = (m[0, :new].float().cpu() for m in out.maps["clip_regularization"])
            truth = np.stack([mask_square(data, i, (cls,), run.experiment.data.size) == 1 for i in members[:new]])
            masks = F.adaptive_avg_pool2d(torch.from_numpy(truth).float(), before.shape[-2:])
            shown = masks.flatten(1).sum(1) > 0
            images += int(shown.sum())
            for name, maps in (("before", before), ("after", after), ("flat", torch.zeros_like(before))):
                for over in ("positions", "channels"):
                    norm, inside = masked_norm(maps[shown], masks[shown], over)
                    sums.setdefault(over, {}).setdefault(name, np.zeros(2))
                    sums[over][name] += [float(norm.sum()), float(inside.sum())]
        means = {o: {n: dict(zip(("norm", "inside"), v / images, strict=True)) for n, v in d.items()}
                 for o, d in sums.items()}  # fmt: skip
        write_json(file, {"data": data.name, "images": images, **means})
    return json.loads(file.read_text(encoding="utf-8"))


def feature_rows(profile: Profile) -> Results:
    """Fig. 3's bars as rows: `norm` and `inside` (per cent) before and after the module, on each test set.

    `inside` is left out for the softmax over channels, where it says nothing of the map.
    """
    found = collect(profile, "fig3_norms", [Variant("LCCo")], seeds=profile.ablation_seeds)
    plain, found.rows = found.rows, []
    for like in plain:
        if like["protocol"] != profile.protocols[0]:
            continue
        run = found.runs.get(("LCCo", like["seed"]))
        quality = feature_quality(run, like["test_set"], profile.group_size) if like["run"] else {}
        for over in ("positions", "channels"):
            for name in ("before", "after", "flat"):
                row = dict(like) | dict.fromkeys((*per_cent({}), "paper_P", "paper_J", "norm", "inside"))
                row |= {"row": name, "protocol": "", "softmax": f"over {over}", "images": quality.get("images")}
                if quality:
                    row["norm"] = round(quality[over][name]["norm"], 5)
                    row["inside"] = round(100 * quality[over][name]["inside"], 3) if over == "positions" else None
                found.rows.append(row)
    return found


# ---------------------------------------------------------------------------------------------------------------- cost
COST_ONLY = "not run: its cost alone was measured, with random weights"


def count_flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of `work`'s matrix products and convolutions; a multiply-add counts as two."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention would be counted as nothing
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


def timed_rounds(works: Mapping[str, Callable[[], Any]], repeats: int = 5) -> dict[str, list[float]]:
    """Seconds of each piece of work in rounds that take all in turn, after a round that warms up."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in works}
    for n in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter()
            with torch.no_grad():
                work()
            _wait()
            if n:
                times[name].append(time.perf_counter() - began)
    return times


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _watch(module: Any, methods: Sequence[str]) -> list[float]:
    """Have a module note the seconds that each call of some of its methods takes, in the list given back."""
    spent: list[float] = []

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            _wait()
            began = time.perf_counter()
            out = method(*args, **kwargs)
            _wait()
            spent.append(time.perf_counter() - began)
            return out

        return call

    for name in methods:
        setattr(module, name, watched(getattr(module, name)))
    return spent


def part_costs(experiment: Experiment, images: int = 5, repeats: int = 5) -> dict[str, dict[str, float]]:
    """What each part costs for one set: `parameters` (million), `flops` (10⁹), `seconds` (median of the rounds).

    Weights are random, which changes no cost; prompts are embedded once a vocabulary and are not counted. Parameters
    and operations of a module are the difference that it makes to the Baseline; its seconds are those it takes inside
    the full model.
    """
    import torch
    from PIL import Image

    from lcco.inputs import Inputs
    from lcco.train import build_model

    if repeats < 1 or images < 1:
        raise LCCoError(f"`repeats` is {repeats} and a set has {images} images; both must be 1 or more")
    experiment = experiment.replace({"model.weights": None, "tower.weights": None})
    size = experiment.data.size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = Inputs(experiment, device=device)
    off = {f"model.{m}": False for m in MODULES}
    wanted = {"Baseline": off, **{m: off | {f"model.{m}": True} for m in MODULES}, "LCCo": {}}
    models = {k: build_model(experiment.replace(c), inputs).eval().to(device) for k, c in wanted.items()}
    noise = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), np.uint8)
    pictures = [Image.fromarray(one) for one in noise]
    x = torch.from_numpy(noise).permute(0, 3, 1, 2).float().div(255).to(device)
    h, text = inputs.tower.encode_images(pictures).to(device), inputs.prompts.to(device)
    works: dict[str, Callable[[], Any]] = {
        "tower": lambda: inputs.tower.encode_images(pictures), "backbone": lambda: inputs.backbone.eval()(x),
        **{k: (lambda model=model: model(x[None], h[None], text)) for k, model in models.items()},
    }  # fmt: skip
    inputs.backbone.to(device)
    with torch.no_grad():
        maps = [m[None] for m in inputs.backbone.eval()(x)]
    path = build_model(experiment.replace(off | {"model.placement": "decoder"}), inputs).eval().to(device)
    works["path"] = lambda: path(None, h[None], text, maps=maps)
    flops = {k: count_flops(work) for k, work in works.items()}
    size_of = {k: sum(p.numel() for p in m.parameters()) for k, m in {**models, "backbone": inputs.backbone}.items()}
    net = inputs.tower._net  # read for its size alone
    size_of["path"] = size_of["Baseline"] - size_of["backbone"]
    size_of["tower"] = sum(p.numel() for p in getattr(net, "visual", net).parameters())

    full = models["LCCo"]
    spent = {
        "isfc": _watch(full.isfc, ["forward"]),
        "clip_interaction": _watch(full.clip_interaction, ["refine", "fuse", "decode", "modulate"]),
        "clip_regularization": _watch(full.clip_regularization, ["class_probabilities", "modulate"]),
    }
    rounds = timed_rounds({k: works[k] for k in ("tower", "backbone", "path", "Baseline", "LCCo")}, repeats)
    seconds = {k: statistics.median(v) for k, v in rounds.items()}
    for name, calls in spent.items():
        each = np.array(calls).reshape(repeats + 1, -1).sum(1)[1:]  # the first round warms up
        seconds[name] = seconds["Baseline"] + float(np.median(each))

    out: dict[str, dict[str, float]] = {}
    for kind, found, scale in (("parameters", size_of, 1e6), ("flops", flops, 1e9), ("seconds", seconds, 1)):
        parts = {"image tower": found["tower"], "backbone": found["backbone"], "top-down path": found["path"]}
        parts |= {label: found[m] - found["Baseline"] for m, label in MODULES.items()}
        parts |= {"Baseline, all": found["Baseline"], "LCCo, all": found["LCCo"] + found["tower"]}
        for name, value in parts.items():
            out.setdefault(name, {})[kind] = value / scale
    return out


def cost_rows(profile: Profile, profiles: Sequence[str] | None = None, repeats: int = 3) -> list[dict[str, Any]]:
    """Parameters, FLOPs and seconds a set, part by part, of the networks of several profiles, on this machine.

    profiles: None: embedded, lite and paper (at `smoke`: itself alone, because that is to take seconds).
    """
    if profiles is None:
        profiles = [profile.name] if profile.name == "smoke" else ["embedded", "lite", "paper"]
    rows = []
    for name in dict.fromkeys(profiles):
        other = profile if name == profile.name else load_profile(name)
        for part, cells in part_costs(other.experiment, other.group_size, repeats).items():
            row = make_row("cost", part, profile, other.experiment, status=COST_ONLY, seed=None)
            row |= {"network": f"of {name}", "images": other.group_size, "group_size": other.group_size}
            row |= {"test_set": f"a set of {other.group_size} at {other.experiment.data.size} px"}
            rows.append(row | {k: round(v, 5) for k, v in cells.items()})
    return rows


def cost_notes(repeats: int) -> tuple[str, ...]:
    """How the numbers of `cost_rows` were found, and on what machine."""
    from lcco.runs import environment

    e = environment()
    return (
        "parameters: million; flops: 10^9 operations of convolutions and matrix products for one set, a multiply-add "
        f"as two; seconds: median of {repeats} rounds on {e['device']} ({e['platform']}, {e['threads']} threads).",
        "A module: the difference between the Baseline with it and without; its seconds are taken inside the full "
        "model. Of the image tower its image side alone, because prompts are embedded once a vocabulary. LCCo, all: "
        "tower, backbone, path and modules.",
    )
