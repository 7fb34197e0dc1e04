"""What each notebook needs."""


import plan
import pytest

from lcco.common import LCCoError
from lcco.config import load_profile, profile_names
from lcco.experiment import variants


@pytest.fixture
def profile():
    return load_profile("embedded")


def test_rows_have_the_papers_names_in_its_order():
    assert list(plan.COMPONENTS) == [
        "Baseline", "ISFC", "CLIP inter.", "CLIP reg.", "ISFC + CLIP inter.", "ISFC + CLIP reg.",
        "CLIP inter. + CLIP reg.", "LCCo",
    ]  # fmt: skip
    for name, changes in plan.COMPONENTS.items():
        off = {module for module, text in variants.MODULES.items() if text not in name}
        off = {"Baseline": set(variants.MODULES), "LCCo": set()}.get(name, off)
        assert changes == {f"model.{module}": False for module in off}
    assert plan.LOSSES["L_iou + L_cs"] == {"loss.lambda_c": 0.0}
    assert len({str(v) for v in plan.LOSSES.values()}) == 4


def test_readings_turn_one_setting_over(profile):
    own, found = profile.experiment.flat(), variants.reading_variants(profile)
    assert found.pop("LCCo") == {}
    for name, changes in found.items():
        key = next(k for k in changes if k.endswith(name.partition(" = ")[0]))
        assert changes[key] != own[key]
        assert changes.keys() <= {key, "loss.lambda_c"}
        assert profile.experiment.replace(changes).hash != profile.experiment.hash
    assert found["mlp3_lr = 10"] == {"train.mlp3_lr": 10}
    assert "vocabulary = coco80" in found and "vocabulary = voc20" not in found


def test_what_notebooks_need(profile):
    size, p = profile.group_size, profile
    first = plan.needs("01", p)
    assert len(first) == 2 * len(p.seeds)
    assert plan.Score(p.tests[0], p.protocols, size) in first[0].scores
    assert plan.Score(p.choice_tests[0], ("choice",), size) in first[0].scores
    assert len(plan.needs("02", p)) == 8 * len(p.ablation_seeds)
    assert {j.experiment.model.k for j in plan.needs("04", p)} == {1, 3, 5, 7, 9}
    assert {s.group_size for s in plan.needs("05", p)[0].scores} == set(p.set_sizes)
    assert not any(plan.needs(n, p) for n in ("00", "08", "method"))
    with pytest.raises(LCCoError, match="no notebook `11`; there are: 00, method, 01"):
        plan.needs("11", p)


def test_a_training_that_several_notebooks_need_is_one_job(profile):
    jobs = plan.all_jobs(profile)
    assert len({job.experiment.hash for job in jobs}) == len(jobs)
    assert {job.experiment.hash for job in jobs} == {
        job.experiment.hash for n in plan.NOTEBOOKS for job in plan.needs(n, profile)
    }
    lcco = next(job for job in jobs if job.experiment == profile.experiment)
    for notebook in ("01", "02", "05"):
        wanted = [j for j in plan.needs(notebook, profile) if j.experiment == lcco.experiment]
        assert set(wanted[0].scores) <= set(lcco.scores)
    assert len(set(lcco.scores)) == len(lcco.scores)
    assert len(plan.all_jobs(profile, ["02"])) == 8


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_has_a_plan(name):
    assert plan.all_jobs(load_profile(name))
