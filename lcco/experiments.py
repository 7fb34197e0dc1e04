"""The paper's tables beyond Table 1 as experiments: which settings make which rows, and what else is measured of a run.

A variant changes settings of the profile's one experiment and never its name, so what several notebooks need (the
full model, the Baseline) has one folder in the run store and is trained once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcco.common import LCCoError, digest, progress, write_json
from lcco.config import Experiment, Profile, load_profile
from lcco.tables import (
    BASELINE,
    MEASURED,
    Results,
    Variant,
    collect,
    label,
    main_variants,
    make_row,
    paper_table,
    per_cent,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

    from lcco.data import CoSegData
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
             "mean": "sum", "sum": "mean", "vocabulary": "shared", "shared": "vocabulary",
             "tower": "name", "name": "tower"}  # fmt: skip
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
        ("v_gt", "v_gt: " + ("what the tower sees" if loss.v_gt == "name" else "the class's own word"),
         {"loss.v_gt": other[loss.v_gt]}),
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
def ahead(
    profile: Profile, notebooks: Iterable[str], set_sizes: Sequence[int] = (), k_values: Sequence[int] = ()
) -> None:  # fmt: skip
    """Train and score in one go what notebooks (by number, such as `02`) will ask for, so that no core waits.

    The notebooks would do the same, each for itself; here nothing else is in memory meanwhile.
    """
    from lcco.data import load_data
    from lcco.runs import train_ahead

    asked, there = set(notebooks), {}
    for test in (*profile.tests, *profile.ablation_test, *profile.choice_test):
        with contextlib.suppress(LCCoError):  # what is absent the notebooks will say
            there[test] = load_data(test)
    size, protocols, e = profile.group_size, profile.protocols, profile.experiment
    choice = [(t, ("choice",), size) for t in profile.choice_test if t in there]
    main = [(t, protocols, size) for t in profile.tests if t in there] + choice
    more = [(t, protocols[:1], n) for t in profile.ablation_test if t in there for n in set_sizes if "05" in asked]
    ablation = [(t, protocols, size) for t in profile.ablation_test if t in there] + choice
    jobs = [
        (e.replace(dict(v.changes), seed=s), main + more)
        for v in main_variants(profile) for s in profile.seeds if asked & {"01", "05"}
    ]  # fmt: skip
    variants = {"02": component_variants(profile), "03": loss_variants(), "09": reading_variants(e)}
    variants["04"] = k_variants(k_values) if k_values else []
    jobs += [
        (e.replace(dict(v.changes), seed=s), ablation)
        for number in sorted(asked & set(variants)) for v in variants[number] for s in profile.ablation_seeds
    ]  # fmt: skip
    if there:
        with contextlib.suppress(LCCoError):
            train_ahead(jobs)


def choice(run: Run, test: str | CoSegData, group_size: int = 5, *, k: int | None = None) -> Evaluation:
    """The group-choice test (`evaluate.evaluate_choice`, protocol `choice`) of a run, computed once and kept.

    Raises: LCCoError if the model was trained on pictures of the test set.
    """
    return run.evaluate(test, "choice", group_size, k=k)["choice"]


def choice_results(profile: Profile, table: str = "choice") -> Results:
    """The group-choice test of LCCo and the Baseline, every seed, on each of the profile's sets that offer a choice."""
    found = collect(profile, table, main_variants(profile), choice=profile.choice_test)
    found.rows = [
        _choice_row(profile, like, found, found.runs.get((like["row"], like["seed"])), test=test)
        for test in profile.choice_test for like in _once(found.rows)
    ]  # fmt: skip
    return found


def ablate(
    profile: Profile, table: str, variants: Sequence[Variant], seeds: Sequence[int] | None = None
) -> Results:  # fmt: skip
    """Rows of an ablation on its test sets under every protocol, and on the group-choice test if it has one.

    seeds: by default the profile's for ablations, and those of its main table with which every row was trained before.
    The standard sets hardly need the set (most pictures show one object), so they hardly tell the modules apart.
    """
    if seeds is None:
        more = [s for s in profile.seeds if all(_trained(profile, v, s) for v in variants)]
        seeds = sorted({*profile.ablation_seeds, *more})
    found = collect(
        profile, table, variants, tests=profile.ablation_test, seeds=tuple(seeds), choice=profile.choice_test
    )
    found.rows += [
        _choice_row(profile, r, found, found.runs.get((r["row"], r["seed"])), test=test)
        for test in profile.choice_test for r in _once(found.rows)
    ]  # fmt: skip
    return found


def _trained(profile: Profile, variant: Variant, seed: int) -> bool:
    from lcco.runs import run_path

    return (run_path(profile.experiment.replace(dict(variant.changes), seed=seed)) / "record.json").is_file()


def _once(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One of the rows of each line and seed."""
    return list({(row["row"], row["seed"]): row for row in rows}.values())


def _choice_row(
    profile: Profile, like: Mapping[str, Any], found: Results, run: Run | None, k: int | None = None, *, test: str
) -> dict[str, Any]:
    """The row of the choice test beside a row of the standard tests, `found` with it."""
    row, data = dict(like) | dict.fromkeys((*per_cent({}), "paper_P", "paper_J")), found.tests[test]
    row |= {"test_set": test, "protocol": "choice", "group_size": profile.group_size, "run": None}
    if isinstance(data, str):
        return row | {"status": data}
    if not run:
        return row
    summary = choice(run, data, profile.group_size, k=k).summary
    more = {key: round(100 * summary[key], 4) for key in CHOICE_CELLS}
    return row | per_cent(summary) | more | {"status": MEASURED, "run": run.path.name}


def k_at_test_time(profile: Profile, k_values: Sequence[int], table: str = "table4_k_test_time") -> Results:
    """Table 4's cheap sweep: the full model as it was trained, given another number of prompts when it is used."""
    k_variants(k_values)
    found = collect(
        profile, table, [Variant("LCCo")], tests=profile.ablation_test, seeds=profile.ablation_seeds,
        choice=profile.choice_test,
    )  # fmt: skip
    plain, found.rows = found.rows, []
    for k in k_values:
        given = None if k == profile.experiment.model.k else k  # as trained: shares its score with the other tables
        for like in plain:
            row = dict(like) | {"row": f"K = {k}", "K": k}
            if like["run"]:
                run = found.runs["LCCo", like["seed"]]
                done = run.evaluate(found.tests[like["test_set"]], profile.protocols, like["group_size"], k=given)
                row |= per_cent(done[like["protocol"]].summary)
            found.rows.append(row)
        for test in profile.choice_test:
            for like in _once(r for r in found.rows if r["K"] == k and r["protocol"] != "choice"):
                run = found.runs.get(("LCCo", like["seed"]))
                found.rows.append(_choice_row(profile, like, found, run, given, test=test))
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
        on = f", {label(row['test_set'])}" if len(profile.ablation_test) > 1 else ""
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

    The profile's own stands there with every seed of the main table, so that its spread can be seen; another reading
    with the ablation's seeds, and with those of the main table that were trained already.
    """
    first, *rest = reading_variants(profile.experiment, vocabularies)
    seeds = tuple(dict.fromkeys((*profile.ablation_seeds, *profile.seeds)))
    found = ablate(profile, "interpretations", [first], seeds)
    for seed in seeds:  # of one seed all at once, so that they train side by side
        asked = [v for v in rest if seed in profile.ablation_seeds or _trained(profile, v, seed)]
        more = ablate(profile, "interpretations", asked, [seed])
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
            out.append(f"{label(test)}, {protocol}: {metric} against {reference}: {'; '.join(parts)}.")
    return out


# ------------------------------------------------------------------------- what fails: classes, words, images without
MANY = 100  # pictures of a class, from which on training knows it well


def class_results(profile: Profile, table: str = "per_class", *, choice: bool = False) -> Results:
    """J of Baseline and LCCo class by class, each seed, from the images' stored scores.

    Under the first protocol on every test set; or, with `choice`, of the group-choice test. A row: one class of one
    test set; `training` says whether training had it, under any of its names (`seen` or `new`), and `trained_on` in how
    many pictures. The last rows of a test set are the means over its classes with `MANY` such pictures or more, with
    fewer, and with none.
    """
    from lcco.semantics import target_word

    protocol = "choice" if choice else profile.protocols[0]
    if choice:
        found = choice_results(profile, table)
    else:
        found = collect(profile, table, main_variants(profile), protocols=[protocol])
    plain, found.rows = [r for r in found.rows if r["row"] == "LCCo"], []
    try:
        groups = next(iter(found.runs.values())).training_data.groups if found.runs else {}
    except LCCoError:  # the model was trained before, and its data are gone
        groups = {}
    trained = list(groups)
    for like in plain:
        row = {k: v for k, v in _blank(like).items() if k not in CHOICE_CELLS}
        row |= dict.fromkeys(("training", "trained_on", "scored", "J_Baseline", "J_LCCo", "change_J"))
        if not like["run"]:
            found.rows.append(row | {"row": "all classes"})
            continue
        J: dict[str, dict[str, list[float]]] = {}
        for model in ("Baseline", "LCCo"):
            if run := found.runs.get((model, like["seed"])):
                for r in run.evaluate(found.tests[like["test_set"]], protocol, profile.group_size)[protocol].rows:
                    J.setdefault(r["class"], {}).setdefault(model, []).append(r["J"])
        of_kind: dict[str, list[dict[str, float | None]]] = {}
        for cls, own in J.items():
            word = target_word(cls, trained)
            seen = ("new" if word is None else "seen") if trained else "unknown"
            means = {m: _share([j for j in own.get(m, []) if j is not None]) for m in ("Baseline", "LCCo")}
            n, on = len(own["LCCo"]), 0 if word is None else len(groups[trained[word]])
            kind = f"{MANY} or more" if on >= MANY else f"under {MANY}"
            of_kind.setdefault((seen, f"{kind} images" if seen == "seen" else None), []).append(means)
            on = f"{on} images" if trained else None
            cells = {"row": cls, "training": seen, "trained_on": on, "images": n, "scored": f"{n} images"}
            found.rows.append(row | cells | _pair(means))
        for (seen, on), every in sorted(of_kind.items(), key=str, reverse=True):
            means = {m: _share([e[m] for e in every if e[m] is not None]) for m in ("Baseline", "LCCo")}
            cells = {"row": "mean", "training": seen, "trained_on": on, "scored": f"{len(every)} classes"}
            found.rows.append(row | cells | _pair(means))
    return found


def _blank(like: Mapping[str, Any]) -> dict[str, Any]:
    return dict(like) | dict.fromkeys((*per_cent({}), "paper_P", "paper_J"))


def _share(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _pair(J: Mapping[str, float | None]) -> dict[str, float | None]:
    cells = {f"J_{m}": None if j is None else round(100 * j, 4) for m, j in J.items()}
    both = None not in cells.values()
    return cells | {"change_J": round(cells["J_LCCo"] - cells["J_Baseline"], 4) if both else None}


def word_accuracy(run: Run, test: str, group_size: int = 5, protocol: str = "ufo") -> dict[str, Any]:
    """In how many of a test set's sets the words are right, class by class; computed once and kept with the run.

    Returns: `classes`: class → `sets`, and of those where the true word is the first distilled prompt (`top_1`), one
    of the K (`top_k`), i* (`i_star`, None without CLIP regularization); `without`: the classes that no word names.
    """
    from lcco.data import load_data
    from lcco.metrics import get_protocol
    from lcco.semantics import target_word

    data = load_data(test)

    def measure() -> dict[str, Any]:
        predictor, out = run.predictor(), {"data": data.name, "classes": {}, "without": []}
        predictor.inputs.prepare(data)
        true = {c: target_word(c, predictor.inputs.words) for c in sorted(data.groups) if data.groups[c]}
        out["without"] = [c for c, word in true.items() if word is None]
        plan = [
            (c, members) for c, word in true.items() if word is not None for members, _ in get_protocol(protocol)
            .groups(sorted(data.groups[c], key=data.keys.__getitem__), group_size, 0, c)
        ]  # fmt: skip
        for c, members in progress(plan, f"words of {data.name}"):
            got, own = predictor.output(data, members), out["classes"].setdefault(c, Counter(top_1=0, top_k=0))
            distilled = got.distilled[0].tolist()
            own["sets"] += 1
            own["top_1"] += distilled[0] == true[c]
            own["top_k"] += true[c] in distilled
            if got.best is not None:
                own["i_star"] += int(got.best[0]) == true[c]
        return out

    return _kept(run, data, "words", [data.identity(), "words", protocol, group_size], measure)


def word_results(profile: Profile, table: str = "words") -> Results:
    """Accuracy of the distilled words and of i* of LCCo, first seed: share of the sets of each class of each test set.

    The last row of a test set is of all its sets, and says how many classes no word of the vocabulary names.
    """
    protocol = profile.protocols[0]
    found = collect(profile, table, [Variant("LCCo")], seeds=profile.seeds[:1], protocols=[protocol])
    plain, found.rows = found.rows, []
    for like in plain:
        row = _blank(like) | dict.fromkeys(("scored", "top_1", "top_k", "i_star"))
        if not like["run"]:
            found.rows.append(row | {"row": "all classes"})
            continue
        got = word_accuracy(found.runs["LCCo", like["seed"]], like["test_set"], profile.group_size, protocol)
        every = {c: Counter(own) for c, own in got["classes"].items()}
        every["all classes"] = sum(every.values(), Counter())
        for name, own in every.items():
            said = f"{own['sets']} sets"
            if name == "all classes" and got["without"]:
                said += f"; {len(got['without'])} of {len(got['without']) + len(got['classes'])} classes have no word"
            there = [k for k in ("top_1", "top_k", "i_star") if own["sets"] and (k != "i_star" or _has_best(profile))]
            shares = {k: round(100 * own[k] / own["sets"], 4) for k in there}
            found.rows.append(row | {"row": name, "scored": said} | shares)
    return found


def _has_best(profile: Profile) -> bool:
    return profile.experiment.model.clip_regularization


def mixed_sets(run: Run, test: str, group_size: int = 5) -> dict[int, dict[str, Any]]:
    """Summaries of `evaluate_absent` for 0 to 3 images without the object in a set; computed once and kept."""
    from lcco.data import load_data
    from lcco.evaluate import evaluate_absent

    data = load_data(test)

    def measure() -> dict[str, Any]:
        predictor = run.predictor()
        predictor.inputs.prepare(data)
        found = evaluate_absent(predictor, data, _lacking(group_size), group_size)
        return {str(k): ev.summary for k, ev in found.items()}

    kept = _kept(run, data, "mixed", [data.identity(), "mixed sets", group_size], measure)
    return {int(k): summary for k, summary in kept.items()}


def _lacking(group_size: int) -> range:
    return range(max(0, min(3, group_size - 2)) + 1)


def absent_results(profile: Profile, table: str = "mixed_sets") -> Results:
    """LCCo and Baseline, first seed, on sets of which `absent` images lack the object, on the sets of the ablations.

    Cells: `false_alarms` (share of those images with more than 1% predicted), `empty_area` (their mean predicted
    share), J_nonempty (of the images that show the object); protocol `native`.
    """
    found = collect(
        profile, table, main_variants(profile), tests=profile.ablation_test, seeds=profile.seeds[:1],
        protocols=profile.protocols[:1],
    )  # fmt: skip
    plain, found.rows = found.rows, []
    for like in plain:
        row, curve = _blank(like) | {"protocol": "native", "false_alarms": None, "empty_area": None}, {}
        if like["run"]:
            try:
                curve = mixed_sets(found.runs[like["row"], like["seed"]], like["test_set"], profile.group_size)
            except LCCoError as error:  # a set that cannot be mixed, such as one of a single class
                row |= {"status": f"not run: {error}", "run": None}
        for k in _lacking(profile.group_size):
            cells = per_cent(curve[k]) if k in curve else {}
            for name in ("false_alarms", "empty_area") if k in curve else ():
                cells[name] = None if curve[k][name] is None else round(100 * curve[k][name], 4)
            found.rows.append(row | {"absent": k} | cells)
    return found


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

    def measure() -> dict[str, Any]:
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
        return {"data": data.name, "images": images, **means}

    return _kept(run, data, "features", [data.identity(), "feature quality", group_size], measure)


def _kept(run: Run, data: CoSegData, name: str, recipe: list[Any], measure: Callable[[], Any]) -> Any:
    """What is measured of a run's model on a set: once, then read from the run's `evaluations/`."""
    file = f"{data.name}-{name}-{recipe[-1]}-{digest([*recipe, run.sha], 10)}.json"
    path = run.path / "evaluations" / file.replace("/", "_")
    if not path.is_file():
        write_json(path, measure())
    return json.loads(path.read_text(encoding="utf-8"))


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
RANDOM = {"model.weights": None, "tower.weights": None}  # weights change no cost


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
    experiment = experiment.replace(RANDOM)
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


def cost_results(profile: Profile, profiles: Sequence[str] | None = None, repeats: int = 3) -> Results:
    """Parameters, FLOPs and seconds a set, part by part, of the networks of several profiles, on this machine.

    profiles: None: embedded, lite and paper (at `smoke`: itself alone, because that is to take seconds).
    """
    from lcco.runs import Run, environment, run_path

    if profiles is None:
        profiles = [profile.name] if profile.name == "smoke" else ["embedded", "lite", "paper"]
    out = Results()
    for name in dict.fromkeys(profiles):
        other = profile if name == profile.name else load_profile(name)
        e = other.experiment.replace(RANDOM, name=f"cost-{other.name}")
        record = {"experiment": dataclasses.asdict(e), "hash": e.hash, "environment": environment(), "repeats": repeats}
        run = out.runs[f"of {name}", e.seed] = Run(run_path(e), e, record)
        for part, cells in part_costs(e, other.group_size, repeats).items():
            row = make_row("cost", part, profile, e, run=run.path.name)
            row |= {"network": f"of {name}", "images": other.group_size, "group_size": other.group_size}
            row |= {"test_set": f"a set of {other.group_size} at {e.data.size} px"}
            out.rows.append(row | {k: round(v, 5) for k, v in cells.items()})
    return out


def cost_notes(repeats: int) -> tuple[str, ...]:
    """How the numbers of `cost_results` were found, and on what machine."""
    from lcco.runs import environment

    e = environment()
    return (
        "parameters: million; flops: 10^9 operations of convolutions and matrix products for one set, a multiply-add "
        f"as two; seconds: median of {repeats} rounds on {e['device']} ({e['platform']}, {e['threads']} threads).",
        "A module: the difference between the Baseline with it and without; its seconds are taken inside the full "
        "model. Of the image tower its image side alone, because prompts are embedded once a vocabulary. LCCo, all: "
        "tower, backbone, path and modules.",
    )
