"""Settings: checked with one line, named by content, built on one another in YAML."""

import typing

import pytest
import yaml

from lcco import config
from lcco.common import LCCoError
from lcco.config import Experiment, load_profile, profile_names, typed


def test_the_hash_is_of_the_content_and_not_of_the_name():
    e = Experiment()
    assert e.hash == Experiment(name="other").hash == e.replace({"model.k": 5}).hash
    others = [{"model.k": 3}, {"seed": 1}, {"data.counts": {"glyphworld_train": 3}}]
    assert len({e.hash, *(e.replace(o).hash for o in others)}) == 4
    assert e.run_name == f"lcco-{e.hash}"


def test_older_training_code_gives_other_names(monkeypatch):
    before = Experiment().hash
    monkeypatch.setattr(config, "TRAINING_VERSION", config.TRAINING_VERSION + 1)
    assert Experiment().hash != before


def test_an_experiment_survives_json():
    e = load_profile("embedded").experiment
    assert Experiment.model_validate(e.model_dump(mode="json")) == e
    counts = e.flat()["data.counts"]
    assert e.flat()["model.strides"] == [16, 16, 8] and counts == {"glyphworld_holdout": 100}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.kk": 3}, "unknown setting `model.kk`; did you mean `model.k`"),
        ({"k": 3}, "unknown setting `k`; did you mean `model.k`"),
        ({"seed.k": 3}, "unknown setting `seed.k`; did you mean `model.k`"),
        ({"foo.seed": 9}, "unknown setting `foo.seed`; did you mean `seed`"),
        ({"experiment.data.train": "a"}, "unknown setting `experiment.data.train`"),
        ({"model": 3}, "`model` is 3"),
        ({"model.k": 0}, "`model.k` is 0"),
        ({"model.k": 2.5}, "`model.k` is 2.5"),
        ({"train.lr": float("nan")}, "`train.lr` is nan"),
        ({"train.lr": "fast"}, "`train.lr` is 'fast'"),
        ({"data.train": []}, "`data.train`"),
        ({"data.train": [" "]}, "`data.train.0`"),
        ({"data.size": 100}, "`data.size` is 100"),
        ({"data.paired": 1.5}, "`data.paired` is 1.5"),
        ({"model.strides": [8, 16, 32]}, "strides must be"),
        ({"model.placement": "head"}, "'decoder' or 'encoder'"),
        ({"data.crop": 0.5, "model.frozen_stages": 2}, "needs a live backbone"),
        ({"name": "a/b"}, "`name` is 'a/b'"),
        ({"seed": -1}, "`seed` is -1"),
    ],
)
def test_wrong_settings_are_one_line(changes, said):
    with pytest.raises(LCCoError) as error:
        Experiment().replace(changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_one_name_is_a_list_of_one():
    assert Experiment().replace({"data.train": "a set"}).data.train == ("a set",)


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_loads_and_says_what_it_is(name):
    profile = load_profile(name)
    assert profile.name == profile.experiment.name == name
    assert profile.about and profile.seeds and profile.protocols
    assert profile.ablation_tests or profile.choice_tests  # of notebooks 02 to 04, and 09


def test_base_gives_what_a_profile_does_not_set(tmp_path, monkeypatch):
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({
        "base": "embedded", "seeds": [7], "experiment": {"model": {"k": 3}},
    }))  # fmt: skip
    (tmp_path / "two.yaml").write_text("base: one.yaml\nexperiment: {name: two}\n")
    monkeypatch.chdir(tmp_path)
    embedded, two = load_profile("embedded"), load_profile("two.yaml")
    assert (two.name, two.seeds, two.experiment.model.k) == ("two", (7,), 3)
    same = two.experiment.replace({"model.k": embedded.experiment.model.k})
    assert same.hash == embedded.experiment.hash


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not valid YAML: while parsing"),
        ("- a", "should be a valid dictionary"), ("experiment: 5", "should be a valid dictionary"),
        ("tests: [a]\nsedes: [0]", "unknown setting `sedes`; did you mean `seeds`"),
        ("experiment: {model: {k: 0}}", "`model.k` is 0"),
        ("base: loop.yaml", "`base` leads back to loop.yaml"),
        ("seeds: []", "`seeds`"),
    ],
)
def test_a_wrong_profile_names_its_file(tmp_path, text, said):
    (tmp_path / "loop.yaml").write_text(text)
    with pytest.raises(LCCoError) as error:
        load_profile(tmp_path / "loop.yaml")
    assert said in str(error.value) and "loop.yaml" in str(error.value)


def test_an_unknown_profile_names_those_there_are():
    with pytest.raises(LCCoError, match="no profile `lyte`; there are: .*lite"):
        load_profile("lyte")


@pytest.mark.parametrize(
    ("value", "kind", "want"),
    [
        ("true", bool, True), ("3", int, 3), ("[0, 1]", list[int], [0, 1]),
        ("null", list[int] | None, None), ("null", str | None, None), (None, str | None, None),
        ("007", str, "007"), ("[a]", str, "[a]"), ("007", str | None, "007"),
        ("2024_05", str, "2024_05"), (2, float, 2.0), ("a", typing.Literal["a", "b"], "a"),
    ],
)  # fmt: skip
def test_parameters_become_what_they_are_declared(value, kind, want):
    assert typed(value, kind, "p") == want


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        (7, str, "`p` is 7: Input should be a valid string"), ("maybe", bool, "is 'maybe'"),
        ("[a]", list[int], "`p.0`"),
    ],
)  # fmt: skip
def test_parameters_of_another_type_are_one_line(value, kind, said):
    with pytest.raises(LCCoError) as error:
        typed(value, kind, "p")
    assert said in str(error.value) and "\n" not in str(error.value)
