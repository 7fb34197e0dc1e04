"""Settings: mistakes are named with their mend; the hash is of the content; the shipped profiles load and run."""

import json

import drawn
import pytest
import torch

from lcco import runs
from lcco.backbones import model_file
from lcco.common import LCCoError, duration, place, progress, project_root
from lcco.config import Experiment, build, load_profile
from lcco.tables import main_variants


def test_unknown_and_mistyped_settings_are_named():
    base = Experiment()
    for change, said in [
        ({"model.kk": 3}, "unknown setting `model.kk`; did you mean `model.k`"),
        ({"k": 3}, "unknown setting `k`; did you mean `model.k`"),
        ({"model.k": "many"}, "`model.k` is 'many'; it must be int"),
        ({"model.k": 2.5}, "`model.k` is 2.5"),
        ({"data.flip": "maybe"}, "`data.flip` is 'maybe'; it must be true or false"),
        ({"model.placement": "middle"}, "must be one of 'decoder', 'encoder'"),
        ({"model.strides": [32, 16]}, "`model.strides` has 2 values; it must have 3"),
        ({"data.train": 3}, "`data.train` is 3; it must be a list"),
    ]:
        with pytest.raises(LCCoError) as error:
            base.replace(change)
        assert said in str(error.value), error.value
    with pytest.raises(LCCoError, match="must be a mapping"):
        build(Experiment, [1])


def test_settings_out_of_range_are_named():
    base = Experiment()
    for change, said in [
        ({"data.groups": 0}, "`data.groups` is 0; it must be 1 or more"),
        ({"data.group_size": 0}, "`data.group_size` is 0"),
        ({"data.size": 0}, "`data.size` is 0; it must be 32 or a multiple of it"),
        ({"data.size": 100}, "`data.size` is 100"),
        ({"data.size": 32, "data.groups": 1, "data.group_size": 1}, "`data.size` is 32 with one picture a step"),
        ({"model.width": 65}, "`model.width` is 65; it must be divisible by `model.heads`, which is 4"),
        ({"model.heads": 3}, "it must be divisible by `model.heads`, which is 3"),
        ({"model.heads": 0}, "`model.heads` is 0"),
        ({"model.strides": [8, 16, 32]}, "`model.strides` is [8, 16, 32]; it must be of 32, 16 and 8, and not rise"),
        ({"model.strides": [16, 16, 7]}, "`model.strides` is [16, 16, 7]"),
        ({"model.frozen_stages": 5}, "`model.frozen_stages` is 5; it must be 0 to 4"),
        ({"model.k": 0}, "`model.k` is 0"),
        ({"model.k": float("inf")}, "`model.k` is inf; it must be int"),
        ({"train.eval_every": 0}, "`train.eval_every` is 0"),
        ({"train.halve_every": 0}, "`train.halve_every` is 0"),
        ({"train.steps": 0}, "`train.steps` is 0; it must be 1 or more"),
        ({"train.steps": -1}, "`train.steps` is -1"),
        ({"train.lr": -1e-3}, "`train.lr` is -0.001"),
        ({"train.lr": float("inf")}, "`train.lr` is inf"),
        ({"train.backbone_lr": -1}, "`train.backbone_lr` is -1"),
        ({"train.ema": 1.1}, "`train.ema` is 1.1; it must be 0 to 1"),
        ({"data.paired": 2}, "`data.paired` is 2.0; it must be 0 to 1"),
        ({"data.absent": -0.1}, "`data.absent` is -0.1"),
        ({"data.crop": 0}, "`data.crop` is 0.0; it must be above 0"),
        ({"data.crop": 0.5, "model.frozen_stages": 2}, "`data.crop` needs a live backbone"),
        ({"loss.lambda_c": -1}, "`loss.lambda_c` is -1"),
        ({"seed": -1}, "`seed` is -1"),
        ({"seed": 2**64}, "`seed` is 18446744073709551616"),
        ({"name": "a/b"}, "`name` is 'a/b'"),
        ({"name": ""}, "`name` holds ''; it must not be empty"),
        ({"data.train": []}, "`data.train` is empty"),
        ({"data.train": [""]}, "`data.train` holds ''"),
        ({"data.holdout": ["voc_val", " "]}, "`data.holdout` holds ' '"),
        ({"train.start": ""}, "`train.start` holds ''"),
    ]:
        with pytest.raises(LCCoError) as error:
            base.replace(change)
        assert str(error.value).startswith(said) or said in str(error.value), error.value
        assert "\n" not in str(error.value)


def test_what_works_is_not_refused():
    base = Experiment()
    for change in [
        {"data.size": 32}, {"data.groups": 1, "data.group_size": 1, "data.size": 64}, {"data.crop": 0.5},
        {"model.width": 65, "model.heads": 5}, {"model.width": 65, "model.isfc": False}, {"model.strides": [8, 8, 8]},
        {"model.placement": "encoder", "model.strides": [8, 16, 32], "model.width": 65}, {"train.lr": 0, "seed": 0},
        {"data.holdout": []}, {"data.holdout": ["voc_train"]}, {"loss.lambda_c": 0, "train.clip": 0, "train.ema": 1},
        {"name": "own.v2 (new)"}, {"model.weights": None, "train.start": None},
    ]:  # fmt: skip
        base.replace(change)


def test_what_was_stored_before_there_were_ranges_still_loads():
    """A stored experiment keeps what it held; only what is changed now is checked."""
    old = build(Experiment, {"name": "a/b", "data": {"size": 40}})
    assert old.replace({"model.k": 3}).data.size == 40
    with pytest.raises(LCCoError, match="`model.k` is 0"):
        old.replace({"model.k": 0})


def test_text_from_a_command_line_is_read_as_what_is_due():
    e = Experiment().replace({"model.k": "3", "data.flip": "true", "train.lr": "1e-3", "model.weights": "null"})
    assert (e.model.k, e.data.flip, e.train.lr, e.model.weights) == (3, True, 1e-3, None)
    assert Experiment().replace({"data.train": "msrc7"}).data.train == ("msrc7",)


def test_the_hash_is_of_the_content_and_not_of_the_name():
    a = Experiment()
    assert a.hash == Experiment().replace({"model.k": 5}).hash == a.replace(name="other").hash
    hashes = {a.replace({"model.k": 4}).hash, a.replace(seed=1).hash, a.replace({"data.train": ["x"]}).hash, a.hash}
    assert len(hashes) == 4


def test_settings_added_later_leave_the_names_of_older_runs_alone():
    names = set()
    for path in (project_root() / "results").glob("*/*.records.json"):
        for name, run in json.loads(path.read_text())["runs"].items():
            if "experiment" in run:
                assert name == f"{run['experiment']['name']}-{build(Experiment, run['experiment']).hash}", path
                names.add(name)
                build(Experiment, run["experiment"]).check()
    assert len(names) > 20
    a = Experiment()
    assert a.hash == a.replace({"loss.v_gt": "tower"}).hash != a.replace({"loss.v_gt": "name"}).hash


def test_profiles_load_and_mistakes_in_them_name_the_file(tmp_path):
    for path in (project_root() / "notebooks" / "profiles").glob("*.yaml"):
        assert load_profile(path.stem).name == path.stem and load_profile(path).tests
    with pytest.raises(LCCoError, match="no profile `nothing`; there are: .*embedded"):
        load_profile("nothing")
    bad = tmp_path / "mine.yaml"
    for text, said in [
        ("a: [", "not valid YAML at line"), ("- 1", "must hold a mapping"),
        ("experiment: {model: {k: x}}", "`experiment.model.k` is 'x'"), ("sedes: [0]", "did you mean `seeds`"),
        ("experiment: {data: {groups: 0}}", "`experiment.data.groups` is 0"), ("group_size: 0", "`group_size` is 0"),
        ("seeds: [-1]", "must be 0 or more"), ("seeds: []", "one of `seeds`"),
    ]:  # fmt: skip
        bad.write_text(text)
        with pytest.raises(LCCoError, match="mine.yaml") as error:
            load_profile(bad)
        assert said in str(error.value)
    bad.write_bytes(b"\x80\xff")
    with pytest.raises(LCCoError, match="mine.yaml: not a text file"):
        load_profile(bad)


def test_what_ships_is_finetuned_with_more_training_data_and_can_be_gone_on_with():
    less, shipped = load_profile("finetuned").experiment, load_profile("shipped").experiment
    assert shipped.replace({"data.train": less.data.train}).hash == less.hash
    own = load_profile("own").experiment
    same = {f"model.{k}": getattr(shipped.model, k) for k in ("frozen_stages", "weights")}
    assert own.replace(same).model == shipped.model  # so the shipped weights fit
    assert own.model.weights == own.train.start == "shipped" and model_file("shipped", "").is_file()


def test_durations_and_places(monkeypatch, tmp_path, capsys):
    assert [duration(s) for s in (5, 75, 3720)] == ["5 s", "1 min 15 s", "1 h 02 min"]
    monkeypatch.setenv("LCCO_RUNS", str(tmp_path))
    assert place("runs") == tmp_path
    assert list(progress(range(3), "work", every=0)) == [0, 1, 2]
    assert "work: 3/3, 0 s left" in capsys.readouterr().err


def test_the_paper_profile_runs_whole_on_drawn_folds_with_local_weights(tmp_path, monkeypatch):
    """ResNet-50 from a file in torchvision's form, ViT-B/16 with random weights, drawn VOC and MSRC: images to rows."""
    import torchvision

    monkeypatch.setenv("LCCO_DATA", str(tmp_path))
    drawn.voc(tmp_path)
    drawn.folders(tmp_path, ["car", "cow", "dog"], 3, name="MSRC", first=70)
    torch.manual_seed(0)
    file = tmp_path / "resnet50.pth"
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), file)
    profile = load_profile("paper")
    steps = {"train.steps": 2, "train.eval_every": 2, "data.groups": 1, "data.group_size": 2}
    weights = {"model.weights": str(file), "tower.weights": None}
    experiment = profile.experiment.replace({**steps, **weights})
    assert experiment.model.backbone == "resnet50" and experiment.tower.model == "ViT-B-16-quickgelu"
    assert [v.row for v in main_variants(profile)] == ["LCCo", "Baseline"]
    run = runs.get_run(experiment)
    found = run.evaluate("msrc14", ("ufo", "native"), 3)
    assert found["ufo"].summary["images"] == 9 and 0 <= found["native"].summary["J"] <= 1
    assert run.record["training"]["parameters"] > 25e6  # the backbone is trained as well
