"""Pictures as people have them: every kind of input, folders and files, words, one or many."""

from __future__ import annotations

import html.parser
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import tiny
import torch
from drawn import picture
from PIL import Image

import lcco
from lcco.cli import main
from lcco.common import LCCoError
from lcco.config import Experiment
from lcco.cosegmentation import cosegment, cosegment_folder, find_sets, load_segmenter
from lcco.experiment.features import make_features
from lcco.experiment.figures import overlay
from lcco.experiment.predictor import Predictor, build_model, save_model, trained_state
from lcco.metrics import resize_map
from lcco.model import Output
from lcco.semantics import make_vocabulary

room = sys.modules["lcco.cosegmentation"]
WORDS = ["cow", "dog", "car", "boat", "cat", "airplane"]
NAMES = ["p0", "p1", "p2", "p3"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A model file of a random tiny network that finds something in each picture."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "clip.json").write_text(json.dumps(tiny.CLIP))
    (folder / "words.txt").write_text("\n".join(WORDS) + "\n")
    experiment = Experiment().replace({
        "name": "tiny", "data.size": 64, "tower.model": str(folder / "clip.json"),
        "tower.weights": None, "tower.vocabulary": str(folder / "words.txt"), "model.k": 2,
        "model.backbone": "glyphnet", "model.weights": None, "model.width": 16,
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCCO_CACHE", str(folder / "cache"))
        torch.manual_seed(3)
        features = make_features(experiment, "cpu")
        vocabulary = make_vocabulary(features.tower, experiment.tower)
        model = build_model(experiment, features, vocabulary).eval()
        for block in (model.clip_interaction, model.clip_regularization):
            for p in block.modulate_map.parameters():  # here words must matter
                torch.nn.init.normal_(p, std=0.3)
        predictor = Predictor(model, features, vocabulary)
        shown = [picture(n, size=(90, 60)) for n in range(4)]
        found = np.stack([r.probability for r in cosegment(shown, weights=predictor)])
        logits = np.log(found / (1 - found))
        with torch.no_grad():  # half of the pixels are object, at clear probabilities
            model.head[-1].bias -= float(np.median(logits))
            for p in model.head[-1].parameters():
                p *= 4 / np.std(logits)
        file, state = folder / "tiny.safetensors", trained_state(model)
        save_model(file, state, experiment, features, vocabulary)
    return file


@pytest.fixture(scope="module")
def model(weights):
    torch.set_num_threads(1)
    return load_segmenter(weights)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Four pictures, each with an object."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for n, name in enumerate(NAMES):
        picture(n, size=(90, 60)).save(folder / f"{name}.jpg", quality=95)
    return folder


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def made(*names: str) -> set[str]:
    each = {f"masks/{n}.png" for n in names} | {f"cutouts/{n}.png" for n in names}
    each |= {f"overlays/{n}.jpg" for n in names}
    return each | {"contact_sheet.jpg", "index.html", "result.json"}


def record(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def refuses(says: str, *args, **settings) -> None:
    """One line that says so."""
    with pytest.raises(LCCoError, match=says) as error:
        cosegment_folder(*args, **settings)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------- in Python
def test_masks_have_the_pictures_own_size_and_follow_the_threshold(model, photos):
    paths = [*sorted(photos.iterdir()), picture(9, size=(33, 70))]
    results = cosegment(paths, weights=model)
    assert [r.name for r in results] == ["p0.jpg", "p1.jpg", "p2.jpg", "p3.jpg", "picture 5"]
    for r, size in zip(results, [(90, 60)] * 4 + [(33, 70)], strict=True):
        assert r.size == size and r.mask.shape == size[::-1] and r.mask.dtype == bool
        assert r.probability.shape == (64, 64) and 0 <= r.probability.min() < r.probability.max()
        assert len(r.words) == 5 and {w for w, _ in r.words} <= set(WORDS)
        assert r.words == sorted(r.words, key=lambda w: -w[1]) and 0 < r.confidence <= 1
    high, low = (cosegment(paths, weights=model, threshold=t)[0].mask for t in (0.9, 0.1))
    some = results[0].mask
    assert not (high & ~some).any() and not (some & ~low).any() and low.sum() > high.sum()


def test_same_probabilities_as_a_data_set_of_the_same_pictures(model, photos):
    from lcco.data import CoSegData

    paths = sorted(photos.iterdir())
    data = CoSegData("photos", "test", [p.name for p in paths])
    data.files = [(p, p) for p in paths]
    want = Predictor(model.model, model.features, model.vocabulary, keep=False)(data, range(4))
    got = np.stack([r.probability for r in cosegment(photos, weights=model)])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_one_picture_alone_is_as_beside_itself(model, photos):
    a, b = (cosegment(s, weights=model)[0] for s in (photos / "p1.jpg", [photos / "p1.jpg"]))
    twins = cosegment([photos / "p1.jpg"] * 2, weights=model)
    assert np.array_equal(a.probability, b.probability) and a.error is None
    np.testing.assert_allclose(a.probability, twins[0].probability, atol=0.02)  # one token less


def test_arrays_and_images_of_every_kind(model):
    eight = np.asarray(picture(7))
    kinds = [eight, eight / 255, eight.astype(np.uint16) * 257, eight[..., :1], eight > 100,
             Image.fromarray(eight)]  # fmt: skip
    results = cosegment(kinds, weights=model)
    assert [r.error for r in results] == [None] * 6
    for k in (1, 2, 5):
        np.testing.assert_allclose(results[k].probability, results[0].probability, atol=1e-5)
    (alone,) = cosegment(eight, weights=model)
    assert alone.mask.shape == (32, 48)
    odd = [np.zeros((4, 4, 2), np.uint8), np.full((4, 4, 3), 200.0), None]
    results = cosegment(odd, weights=model)
    for r, says in zip(results, ("4, 4, 2", "not in 0 to 1", "a NoneType"), strict=True):
        assert says in r.error and r.mask is None


def test_cutout_shows_the_object_and_nothing_else(model, photos):
    result = cosegment(photos, weights=model)[0]
    cut, white, blur = (result.cutout(b) for b in (None, "white", "blur"))
    alpha, rgb = np.asarray(cut)[..., 3], np.asarray(cut)[..., :3]
    assert cut.mode == "RGBA" and cut.size == result.size and white.mode == blur.mode == "RGB"
    clear = np.abs(resize_map(result.probability, result.size[::-1]) - 0.5) > 0.11
    assert np.array_equal((alpha == 255)[clear], result.mask[clear])
    assert not rgb[alpha == 0].any()  # hidden colours would show in programs without alpha
    own = np.asarray(Image.open(photos / "p0.jpg"))
    assert np.array_equal(rgb[alpha == 255], own[alpha == 255])
    assert (np.asarray(white)[alpha == 0] == 255).all()
    assert np.array_equal(np.asarray(blur)[alpha == 255], own[alpha == 255])
    behind = result.cutout(photos / "p1.jpg")
    other = np.asarray(Image.open(photos / "p1.jpg"))
    assert np.array_equal(np.asarray(behind)[alpha == 0], other[alpha == 0])


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.3, 0.97])
def test_a_cutout_follows_its_mask_at_any_threshold(threshold):
    result = room.Result("a", Image.new("RGB", (40, 25), "red"), threshold, (40, 25))
    result.probability = np.linspace(0, 1, 1000, dtype=np.float32).reshape(25, 40)
    alpha, mask = np.asarray(result.cutout())[..., 3], result.mask
    soft = min(0.1, threshold, 1 - threshold)
    far, step = np.abs(result.probability - threshold) > max(soft - 0.002, 0.005), 1 / (soft + 0.01)
    assert (mask & far).any() and (alpha[mask & far] >= 255 - step).all()
    assert (threshold == 0 or (~mask & far).any()) and (alpha[~mask & far] <= step).all()
    result.probability = np.zeros_like(result.probability)
    assert not np.asarray(result.cutout())[..., 3].any()


def test_unreadable_pictures_do_not_disturb_the_others(model, photos):
    good = sorted(photos.iterdir())
    (photos / "bad.jpg").write_bytes((photos / "p0.jpg").read_bytes()[:700])
    given = [good[0], photos / "bad.jpg", photos / "none.png", *good[1:]]
    mixed = cosegment(given, weights=model)
    assert [bool(r.error) for r in mixed] == [False, True, True, False, False, False]
    assert "corrupt" in mixed[1].error and mixed[2].error.startswith("no such file")
    assert mixed[1].cutout() is None and mixed[1].confidence == 0
    clean = cosegment(good, weights=model)
    np.testing.assert_allclose(mixed[0].probability, clean[0].probability, atol=1e-6)


def test_large_sets_are_cut_evenly_and_keep_one_word_list(model, photos, monkeypatch):
    paths = sorted(photos.iterdir()) + [picture(n) for n in (20, 21, 22)]
    monkeypatch.setattr(room, "AT_ONCE", 3)
    results = cosegment(paths, weights=model)
    assert len({str(r.words) for r in results}) == 1
    for part in (slice(0, 3), slice(3, 5), slice(5, 7)):
        alone = cosegment(paths[part], weights=model)[0]
        np.testing.assert_allclose(results[part][0].probability, alone.probability, atol=1e-6)


def test_a_few_odd_pictures_do_not_name_a_large_set(model):
    """Eq. 7's maximum over many images finds some other word by chance: the mean does not."""

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def class_logits(self, s, present):  # Eq. 7 with MLP3 the identity
            return (20 * s).amax(1)

    predictor = copy(model)
    predictor.model = torch.nn.Module()
    predictor.model.clip_regularization = Head()
    dogs = torch.full((60, 6), 0.1)
    dogs[:, 1] = 0.5  # each looks like a dog
    dogs[::12, 0] = 0.7  # five of them more like a cow
    largest = (20 * dogs).amax(0).softmax(-1)
    assert largest.argmax() == 0 and room._words(predictor, dogs)[0][0] == "dog"
    few = dogs[1:5]  # a set of the training's size is as the network has it
    want = (20 * few).amax(0).softmax(-1)
    assert dict(room._words(predictor, few))["dog"] == pytest.approx(float(want[1]), abs=1e-5)


def test_agreement_falls_where_a_picture_is_of_something_else(model, monkeypatch):
    S = torch.zeros(5, 6)
    S[:4, 1], S[4, 3] = 6 / model.features.tower.logit_scale, 6 / model.features.tower.logit_scale

    def output(self, data, one):
        items, _ = one
        return Output(similarity=S[None, items], logits=torch.ones(1, len(items), 64, 64))

    monkeypatch.setattr(Predictor, "output", output)
    pictures = [picture(n) for n in range(5)]
    *same, other = (r.agreement for r in cosegment(pictures, weights=model))
    assert min(same) > 0.8 and other < 0.2
    assert cosegment(pictures[0], weights=model)[0].agreement > 0.9


def test_a_picture_that_lacks_it_gets_no_mask_and_says_so(tmp_path, capsys):
    """By the shipped weights, on photographs: motorbikes, and a cat or five."""
    shipped, examples = room.load_segmenter(), Path(__file__).parents[1] / "examples"
    bikes, cats = (sorted((examples / kind).glob("*.jpg")) for kind in ("motorbike", "cat"))
    [record] = cosegment_folder([*bikes, cats[1]], tmp_path / "out", weights=shipped)
    notes = [image["note"] for image in record["images"]]
    assert notes == [""] * 6 + ["seems to lack it"], notes
    assert "; 1 seems to lack it (--keep-all keeps the masks); look at" in capsys.readouterr().out
    cosegment_folder(bikes[:2], tmp_path / "no", weights=shipped, cls="dog")
    said = "2 pictures: looked for dog; 2 seem to lack it (--keep-all keeps the masks)"
    assert said in capsys.readouterr().out and said in (tmp_path / "no" / "index.html").read_text()
    *beside, cat = cosegment([*bikes, cats[1]], weights=shipped)
    assert cat.lacks and cat.confidence == 0 and not cat.mask.any()
    assert not np.asarray(cat.cutout())[..., 3].any()
    for one, alone in zip(beside, cosegment(bikes, weights=shipped), strict=True):
        np.testing.assert_allclose(one.probability, alone.probability, atol=1e-5)
        assert [w for w, _ in one.words] == [w for w, _ in alone.words] == [w for w, _ in cat.words]
    *_, cat = cosegment([*bikes, cats[1]], weights=shipped, keep_all=True)
    assert not cat.lacks and cat.mask.any()
    for cls, mine, others in (("cat", cats, bikes), ("motorcycle", bikes, cats)):
        asked = cosegment([*mine, *others], weights=shipped, cls=cls)
        assert all(r.lacks for r in asked[len(mine) :])
        assert sum(r.lacks for r in asked[: len(mine)]) <= 1  # one cat is small and turned away
    assert not any(r.lacks for r in cosegment([bikes[0], cats[0]], weights=shipped))  # who knows


def test_class_takes_the_nearest_word(model, photos, capsys):
    free, dog, plane, aero = (
        cosegment(photos, weights=model, cls=c)[0].probability
        for c in (None, "dog", "airplane", "aeroplane")
    )
    assert np.abs(dog - free).max() > 1e-4 and np.abs(plane - dog).max() > 1e-4
    np.testing.assert_array_equal(plane, aero)
    assert capsys.readouterr().err == ""
    assert cosegment(photos, weights=model, cls="zorkmid")[0].error is None
    said = capsys.readouterr().err
    assert "`zorkmid` is none of these weights' 6 words; the nearest is `" in said


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"threshold": 1.5}, "threshold is 1.5"), ({"weights": "none.safetensors"}, "none"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(model, photos, settings, says):
    with pytest.raises(LCCoError, match=says) as error:
        cosegment(photos, **{"weights": model, **settings})
    assert "\n" not in str(error.value)


def test_the_module_and_the_function_of_one_name(model, photos):
    assert lcco.cosegment([photos / "p0.jpg"], weights=model)[0].error is None
    with pytest.raises(LCCoError, match="no pictures given"):
        lcco.cosegment([])


def test_nothing_of_the_pictures_is_kept_in_the_cache(weights, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("LCCO_CACHE", str(tmp_path / "cache"))
    segmenter = load_segmenter(weights)
    before = files(tmp_path / "cache")
    cosegment_folder(photos, tmp_path / "out", weights=segmenter)
    made = {f for f in files(tmp_path / "cache") - before if not f.startswith("locks/")}
    assert not made and not files(Path(os.environ["LCCO_RUNS"]))


# ------------------------------------------------------------------------------- which pictures
def test_folders_files_and_globs_are_sets(photos, tmp_path, capsys):
    (photos / "inner").mkdir()
    picture(5).save(photos / "inner" / "x.png")

    def places(*sources, **more):
        return {str(place): len(files) for place, files in find_sets(sources, **more)}

    assert places(photos) == {".": 4}
    assert places(photos, recursive=True) == {".": 4, "inner": 1}
    assert places(photos, photos / "inner") == {"photos": 4, "inner": 1}
    assert places(photos / "p0.jpg", str(photos / "p[12].jpg")) == {".": 3}
    assert places(photos / "p0.jpg", photos / "inner") == {".": 1, "inner": 1}
    assert places(str(photos / "*.jpg"), photos / "p0.jpg") == {".": 4}
    bad = {
        photos / "none": "no such file", str(photos / "*.gif"): "no such file",
        tmp_path: "no pictures in it; give files, a folder with some, --recursive",
    }  # fmt: skip
    for source, says in bad.items():
        with pytest.raises(LCCoError, match=says):
            find_sets([source])
    (tmp_path / "other" / "photos").mkdir(parents=True)
    picture(1).save(tmp_path / "other" / "photos" / "a.png")
    with pytest.raises(LCCoError, match="two sets would be written there"):
        find_sets([photos, tmp_path / "other" / "photos"])
    (photos / "inner" / "up").symlink_to(photos)
    (photos / "here").symlink_to(".")
    assert places(photos, recursive=True) == {".": 4, "inner": 1}


def test_the_same_command_again_does_not_take_its_results_for_pictures(model, photos, capsys):
    (photos / "inner").mkdir()
    picture(5).save(photos / "inner" / "x.png")
    for sources in ([str(photos / "*")], sorted(photos.iterdir())):  # by lcco, by the shell
        for _ in range(2):
            cosegment_folder(sources, photos / "out", weights=model)
        assert capsys.readouterr().err.count("is complete") >= 2
    assert files(photos / "out") == made(*NAMES) | {f"inner/{f}" for f in made("x")}


def test_each_folder_inside_has_its_place_and_results_are_no_pictures(model, photos, tmp_path):
    for n, name in enumerate(("a", "a/b", "@eaDir", ".hidden")):
        (photos / name).mkdir()
        picture(n + 10).save(photos / name / "x.png")
    (photos / "p9.jpg").mkdir()  # a folder that is named like a picture
    for _ in range(2):  # the second time its own results lie inside
        records = cosegment_folder(photos, photos / "found", recursive=True, weights=model)
        want = made(*NAMES)
        want |= {f"{sub}/{f}" for sub in ("a", "a/b") for f in made("x")}
        assert files(photos / "found") == want and len(records) == 3
    with pytest.raises(LCCoError, match="two sets would be written there"):
        (photos / "masks").mkdir()
        picture(3).save(photos / "masks" / "x.png")
        cosegment_folder(photos, tmp_path / "out", recursive=True, weights=model)


def test_what_is_left_out_is_named(model, photos, tmp_path, capsys):
    cosegment_folder(photos, tmp_path / "none", weights=model)
    assert "left out" not in capsys.readouterr().err
    for name in ("notes.txt", "raw.cr2", ".hidden"):
        (photos / name).write_text("")
    (photos / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    os.mkfifo(photos / "pipe.jpg")
    cosegment_folder(photos, tmp_path / "out", weights=model)
    said = capsys.readouterr().err
    for name in ("notes.txt", "raw.cr2", "gone.jpg", "pipe.jpg"):
        assert name in said, said
    assert ".hidden" not in said
    refuses("pipe.jpg: no such file", [photos / "p0.jpg", photos / "pipe.jpg"], tmp_path / "two")
    (records,) = cosegment_folder(str(photos / "[np]*[0t]*"), tmp_path / "three", weights=model)
    assert [(i["name"], i["error"] is None) for i in records["images"]] == [
        ("notes.txt", False), ("p0.jpg", True)]  # fmt: skip


def test_manifest_in_pieces_equals_the_whole_byte_for_byte(model, weights, photos, tmp_path):
    sets = {"one": ["p0.jpg", "p1.jpg"], "deep/two": ["p2.jpg"], "three": ["p1.jpg", "p3.jpg"]}
    lines = [json.dumps({"name": n, "images": i}) for n, i in sets.items()]
    manifest = photos / "sets.jsonl"
    manifest.write_text("\n".join(lines))

    def run(out):
        return cosegment_folder((), tmp_path / out, manifest=manifest, weights=weights)

    assert len(run("whole")) == 3
    manifest.write_text("\n".join(lines[1:]))
    assert len(run("parts")) == 2
    shutil.rmtree(tmp_path / "parts" / "three" / "masks")  # as a kill would leave it
    unfinished = record(tmp_path / "parts" / "three") | {"complete": False}
    (tmp_path / "parts" / "three" / "result.json").write_text(json.dumps(unfinished))
    manifest.write_text("\n".join(lines))
    run("parts")
    want = {f"{name}/{f}" for name in sets for f in made(*(Path(i).stem for i in sets[name]))}
    assert files(tmp_path / "whole") == files(tmp_path / "parts") == want
    for name in want:
        a, b = ((tmp_path / place / name).read_bytes() for place in ("whole", "parts"))
        assert a == b, name
    for bad in ("{", '{"name": "x\\u0000", "images": ["p0.jpg"]}',
                '{"name": "../x", "images": ["p0.jpg"]}', '{"name": "x", "images": []}',
                '{"name": "/x", "images": ["p0.jpg"]}', '{"name": "x", "images": "p0.jpg"}',
                '{"name": "é", "images": ["p0.jpg"]}'):  # fmt: skip
        manifest.write_bytes(f"{lines[0]}\n{bad}\n".encode("latin-1"))
        refuses("sets.jsonl: line 2 must be", (), tmp_path / "out", manifest=manifest)
    manifest.write_text(f"{lines[0]}\n{lines[0]}\n")
    refuses("two sets", (), tmp_path / "out", manifest=manifest)


# -------------------------------------------------------------------------------- what is written
def test_a_folder_gives_masks_cutouts_overlays_sheet_gallery_and_record(model, photos, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(5, size=(90, 60)).save(photos / "turned.jpg", exif=exif)
    out = tmp_path / "out"
    (written,) = cosegment_folder(photos, out, weights=model)
    names = [*NAMES, "turned"]
    assert files(out) == made(*names)
    for n, r in zip(names, cosegment(photos, weights=model), strict=True):
        size = (60, 90) if n == "turned" else (90, 60)
        mask, cut, over = (Image.open(out / f) for f in (
            f"masks/{n}.png", f"cutouts/{n}.png", f"overlays/{n}.jpg"))  # fmt: skip
        assert mask.size == cut.size == over.size == size
        assert mask.mode == "L" and np.array_equal(np.asarray(mask), r.mask * np.uint8(255))
        assert np.array_equal(np.asarray(cut), np.asarray(r.cutout()))
        shown = 255 * overlay(np.asarray(r.read()) / 255, r.probability)
        assert np.abs(np.asarray(over) - shown).mean() < 8  # a JPEG
    found = record(out)
    assert found == written and found["complete"] and found["note"] == ""
    assert found["words"] == [[w, round(s, 4)] for w, s in r.words]
    assert (found["threshold"], found["class"], found["background"]) == (0.5, None, None)
    assert found["version"] == lcco.__version__ and len(found["key"]) == 16
    assert len(found["weights"]) == 12  # a model in memory
    for entry, r in zip(found["images"], cosegment(photos, weights=model), strict=True):
        assert entry["name"] == r.name and (entry["width"], entry["height"]) == r.size
        assert entry["foreground"] == pytest.approx(r.mask.mean(), abs=0.02)
        assert entry["confidence"] == pytest.approx(r.confidence, abs=1e-3)
    with Image.open(out / "contact_sheet.jpg") as sheet:
        assert sheet.size == (5 * 252 + 12, 2 * 180 + 52 + 44)  # a column for each picture
        tiles = [np.asarray(sheet.convert("L").crop((12, y, 252, y + 180))) for y in (44, 228)]
    assert min(tile.std() for tile in tiles) > 20 and not np.array_equal(*tiles)


def test_backgrounds_replace_transparency(model, photos, tmp_path):
    for background in ("white", "blur", str(photos / "p1.jpg")):
        out = tmp_path / Path(background).stem
        cosegment_folder(photos, out, weights=model, background=background)
        with Image.open(out / "cutouts" / "p0.png") as cut:
            want = cosegment(photos, weights=model)[0].cutout(background)
            assert cut.mode == "RGB" and np.array_equal(np.asarray(cut), np.asarray(want))
    refuses("none.jpg: no such file", photos, tmp_path / "x", weights=model, background="none.jpg")


@pytest.mark.parametrize("colour", [(213, 94, 0), (0, 114, 178), (250, 250, 250), (5, 5, 5)])
def test_an_overlay_shows_on_objects_of_any_colour(colour):
    plain, mask = np.full((300, 400, 3), colour) / 255, np.zeros((300, 400))
    mask[100:200, 100:300] = 1
    over = (255 * overlay(plain, mask)).astype(int)
    inside, outside = over[150, 200], over[20, 20]
    assert np.abs(inside - np.array(colour)).max() > 40 and np.ptp(outside) < 3
    assert np.abs(inside - outside).max() > 40 and np.ptp(inside) > 40
    assert over[100, 200].min() > 240 and over[99, 200].max() < 15  # two tones
    nothing = (255 * overlay(plain, 0 * mask)).astype(int)
    assert np.ptp(nothing, axis=2).max() < 3  # nothing found: grey


def test_empty_masks_and_sets_without_a_common_object_say_so(model, photos, tmp_path, capsys):
    (found,) = cosegment_folder(photos, tmp_path / "a", weights=model, threshold=0.9999)
    assert [i["note"] for i in found["images"]] == ["no object found"] * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "COMMON", 1.01)  # no set can agree as much
        (found,) = cosegment_folder(photos, tmp_path / "b", weights=model)
        (alone,) = cosegment_folder(photos / "p0.jpg", tmp_path / "c", weights=model)
    assert found["note"] == "these share no clear object"
    assert "these share no clear object" in capsys.readouterr().out
    assert "these share no clear object" in (tmp_path / "b" / "index.html").read_text()
    assert alone["note"] == ""  # a picture alone shares nothing with none


NASTY = ["a b&c.jpg", "<script>x.png", "100%23#.jpg", "ü犬.jpg", "two\nlines.png", "q\"'?.png"]


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.images, self.tags, self.said = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img" and dict(attributes).get("src"):
            self.images.append(dict(attributes))

    def handle_data(self, data):
        self.said.append(data)


def test_gallery_escapes_names_and_links_what_is_there(model, tmp_path):
    (tmp_path / "in").mkdir()
    for n, name in enumerate(NASTY):
        picture(n).save(tmp_path / "in" / name)
    (tmp_path / "in" / "<b>bad.png").write_text("no")
    cosegment_folder(tmp_path / "in", tmp_path / "out", weights=model)
    page = Page((tmp_path / "out" / "index.html").read_text())
    assert [i["alt"] for i in page.images] == sorted(NASTY, key=str.casefold)
    for image in page.images:
        for kind in ("src", "data-overlay", "data-cutout", "data-mask"):
            link = image[kind]
            assert ":" not in link and not link.startswith("/")
            assert (tmp_path / "out" / unquote(link)).is_file(), link
    assert page.tags.count("script") == 1 and "b" not in page.tags and "link" not in page.tags
    assert any("<b>bad.png" in text for text in page.said)  # what could not be read is listed


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_gallery_in_a_browser(model, photos, tmp_path, width):
    (photos / f"{'long' * 40}.jpg").write_bytes((photos / "p0.jpg").read_bytes())
    cosegment_folder(photos, tmp_path / "out", weights=model)
    page = tmp_path / "out" / "index.html"
    check = """<script>onload = () => {
      const key = k => document.dispatchEvent(new KeyboardEvent("keydown", {key: k}));
      const root = document.documentElement, out = [];
      out.push("wide " + (root.scrollWidth <= innerWidth) + " " + innerWidth);
      out.push("columns " + getComputedStyle(document.querySelector("ul"))
        .gridTemplateColumns.split(" ").length);
      out.push("loaded " + [...document.images].filter(i => i.getAttribute("src"))
        .every(i => i.naturalWidth > 0 || i.loading === "lazy"));
      key("ArrowRight"); out.push("at " + document.activeElement.firstElementChild.alt);
      key("ArrowLeft"); key("m"); out.push("mask " + document.activeElement.getAttribute("href"));
      document.activeElement.click(); out.push("open " + document.querySelector("dialog").open);
      parent.postMessage(out.join("; "), "*");
    };</script>"""
    page.write_text(page.read_text().replace("</body>", check + "</body>"))
    outer = page.with_name("frame.html")  # a window itself is never narrower than 500 px
    outer.write_text(
        f'<iframe src="index.html" style="width:{width}px;height:900px;border:0"></iframe>'
        "<script>onmessage = e => { document.title = e.data; };</script>"
    )
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
             "--window-size=1300,1000", outer.as_uri()]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    assert f"wide true {width}" in title and "loaded true" in title and "open true" in title, title
    assert ("columns 1" in title) == (width < 600), title
    assert "at p0.jpg" in title and "mask masks/long" in title, title


# ------------------------------------------------------------------------------------- names
def test_twins_and_colliding_names_stay_apart(model, tmp_path):
    (tmp_path / "in").mkdir()
    names = ["a.jpg", "a.png", "A.bmp", "a.jpg.webp", "b c.jpeg", "ü.jpg"]
    for n, name in enumerate(names):
        picture(n).save(tmp_path / "in" / name)
    (tmp_path / "more").mkdir()
    picture(9).save(tmp_path / "more" / "b c.jpeg")
    given = [*(tmp_path / "in").iterdir(), tmp_path / "more" / "b c.jpeg"]
    (found,) = cosegment_folder(given, tmp_path / "out", weights=model)
    named = [(i["name"], Path(i["mask"]).name) for i in found["images"]]
    masks = {m for _, m in named}
    assert len({m.casefold() for m in masks}) == 7 == len(list((tmp_path / "out/masks").iterdir()))
    assert ("a.jpg.webp", "a.jpg.png") in named and ("ü.jpg", "ü.png") in named
    assert {m for n, m in named if n == "b c.jpeg"} == {"b c.png", "b c-2.png"}


def test_names_as_long_as_a_disk_allows(model, tmp_path):
    (tmp_path / "in").mkdir()
    names = ["犬" * 77 + "cc.jpg", "x" * 251 + ".jpg", "x" * 251 + ".png", "a.jpg"]
    names.append(os.fsdecode(b"\xb9" * 160 + b".jpg"))  # of an old archive, in another encoding
    for n, name in enumerate(names[:4]):
        picture(n).save(tmp_path / "in" / name)
    try:
        picture(4).save(tmp_path / "in" / names[4])
    except OSError:  # some disks take only text
        names.pop()
    (found,) = cosegment_folder(tmp_path / "in", tmp_path / "out", weights=model)
    assert not any(i["error"] for i in found["images"]) and len(found["images"]) == len(names)
    stems = [Path(n).stem for n in names[:1]] + ["x" * 246, "x" * 246 + "-2", "a"]
    assert files(tmp_path / "out") == made(*stems, *["\ufffd" * 82 for _ in names[4:]])


def test_names_that_are_no_text(model, photos, tmp_path, capsys):
    (photos / "bad\none.png").write_text("no")
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        (photos / "p0.jpg").rename(photos / name)
    except OSError:  # some disks take only text
        name = "p0.jpg"
    (found,) = cosegment_folder(photos, tmp_path / "out", weights=model)
    assert [i["name"] for i in found["images"] if i["error"]] == ["bad\none.png"]
    assert "not read: bad one.png: " in capsys.readouterr().err
    shown = os.fsencode(name).decode("utf-8", "replace")
    assert f"masks/{Path(shown).stem}.png" in files(tmp_path / "out")
    assert Page((tmp_path / "out" / "index.html").read_text()).images


def test_a_folder_whose_name_is_no_text(weights, photos, tmp_path):
    odd, out = photos / os.fsdecode(b"caf\xe9"), tmp_path / "out"
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("this disk takes only text")
    picture(1).save(odd / "x.png")
    words = ["cosegment", str(photos), "--recursive", "--out", str(out), "--weights", str(weights)]
    assert main(words) == 0
    assert files(out / odd.name) == made("x") and record(out / odd.name)["complete"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_cannot_print_a_name(weights, photos, tmp_path, encoding, monkeypatch):
    (photos / "犬.jpg").write_text("no")
    (photos / "犬.txt").write_text("no")
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    out = tmp_path / "犬"
    assert main(["cosegment", str(photos), "--out", str(out), "--weights", str(weights)]) == 1
    for stream in streams:
        stream.flush()
        assert b"\\u72ac" in stream.buffer.getvalue()
    assert len(list((out / "masks").iterdir())) == 4


# ------------------------------------------------------------------------- again, and side by side
def test_bad_files_are_named_and_the_rest_is_done(weights, photos, tmp_path, capsys):
    (photos / "cut.jpg").write_bytes((photos / "p0.jpg").read_bytes()[:600])
    (photos / "text.png").write_text("not a picture")
    (photos / "empty.gif").write_bytes(b"")
    words = ["cosegment", str(photos), "--out", str(tmp_path / "out"), "--weights", str(weights)]
    for _ in range(2):
        assert main(words) == 1
        said = capsys.readouterr().err
        for name in ("cut.jpg", "empty.gif", "text.png"):
            assert f"not read: {name}: corrupt picture" in said
    assert "nothing to do" in said and files(tmp_path / "out") == made(*NAMES)
    errors = {i["name"]: i["error"] for i in record(tmp_path / "out")["images"]}
    assert errors["p0.jpg"] is None and "corrupt" in errors["cut.jpg"]
    assert str(photos) not in errors["cut.jpg"]
    for f in photos.iterdir():
        f.write_text("no")
    (found,) = cosegment_folder(photos, tmp_path / "all", weights=weights)
    assert all(i["error"] for i in found["images"]) and len(found["images"]) == 7
    assert files(tmp_path / "all") == made()


def test_a_second_start_makes_only_what_is_missing(weights, photos, tmp_path, monkeypatch, capsys):
    out, draw, drawn = tmp_path / "out", room._draw, []

    def interrupted(*given):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(given)
        return draw(*given)

    def one(compute, items, what, workers=1):
        return [compute(item) for item in items]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(room, "threaded", one)
        patch.setattr(room, "_draw", interrupted)
        cosegment_folder(photos, out, weights=weights)
    assert not record(out)["complete"]
    before = {f: (out / f).stat().st_mtime_ns for f in files(out)}
    assert {"masks/p0.png", "masks/p1.png"} <= set(before) and "masks/p3.png" not in before
    cosegment_folder(photos, out, weights=weights)
    after = {f: (out / f).stat().st_mtime_ns for f in files(out)}
    assert {f for f in before if after[f] != before[f]} == {"result.json"}
    cosegment_folder(photos, tmp_path / "whole", weights=weights)
    for name in made(*NAMES):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    capsys.readouterr()
    monkeypatch.setattr(room, "load_model", lambda *_: pytest.fail("there is nothing to do"))
    cosegment_folder(photos, out, weights=weights)
    assert "nothing to do" in capsys.readouterr().err
    assert after == {f: (out / f).stat().st_mtime_ns for f in files(out)}


def test_what_was_deleted_of_a_finished_set_is_made_again(weights, photos, tmp_path):
    out = tmp_path / "out"
    (photos / "p3.jpg").write_bytes(b"no picture")  # has no mask, and none is missed
    cosegment_folder(photos, out, weights=weights)
    before = {f: (out / f).read_bytes() for f in files(out)}
    shutil.rmtree(out / "cutouts")
    cosegment_folder(photos, out, weights=weights)
    assert before == {f: (out / f).read_bytes() for f in files(out)}


def test_a_model_in_memory_is_told_from_another(model, photos, tmp_path):
    other = replace(model, model=deepcopy(model.model))
    with torch.no_grad():
        other.model.head[-1].bias += 9
    cosegment_folder(photos, tmp_path / "out", weights=model)
    refuses("out: holds results of other pictures", photos, tmp_path / "out", weights=other)


def test_another_set_into_the_same_folder_is_refused(weights, photos, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    cosegment_folder(photos, out, weights=weights)
    before = {f: (out / f).read_bytes() for f in files(out)}
    other.mkdir()
    picture(8).save(other / "q.png")
    says = "out: holds results of other pictures or settings; give another --out, or --overwrite"
    refuses(says, other, out, weights=weights)
    refuses(says, photos, out, weights=weights, threshold=0.4)
    refuses("threshold is 2", other, out, weights=weights, threshold=2, overwrite=True)
    picture(9, size=(90, 60)).save(photos / "p0.jpg")
    refuses(says, photos, out, weights=weights)
    assert before == {f: (out / f).read_bytes() for f in files(out)}
    (out / "masks" / "mine.txt").write_text("not lcco's")
    cosegment_folder(other, out, weights=weights, overwrite=True)
    assert files(out) == made("q") | {"masks/mine.txt"}
    cosegment_folder([photos, other], tmp_path / "both", weights=weights)
    picture(7).save(other / "q.png")
    says = "other: holds results of other pictures"
    refuses(says, [photos, other], tmp_path / "both", weights=weights)
    done = cosegment_folder([photos, other], tmp_path / "both", weights=weights, overwrite=True)
    assert len(done) == 2


def test_sets_that_are_refused_do_not_stop_the_others(weights, photos, tmp_path, capsys):
    out, folders = tmp_path / "out", [photos]
    for n, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        picture(n).save(tmp_path / name / "q.png")
        folders.append(tmp_path / name)
    for name in "ab":
        (out / name).mkdir(parents=True)
        (out / name / "index.html").write_text("mine")
    words = ["cosegment", *map(str, [*folders[1:], photos]), "--out", str(out)]
    for _ in range(2):
        assert main([*words, "--weights", str(weights)]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if "holds files" in line]
        assert said[0].startswith(f"refused: {out / 'a'}: holds files that lcco did not make")
        assert said[1].startswith(f"lcco: {out / 'b'}: holds files that lcco did not make")
        assert len(said) == 2
        want = {f"c/{f}" for f in made("q")} | {f"photos/{f}" for f in made(*NAMES)}
        assert files(out) == want | {"a/index.html", "b/index.html"}
    assert (out / "a" / "index.html").read_text() == "mine"


def test_an_interrupted_set_leaves_nothing_to_another(weights, photos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(room, "_contact_sheet", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        cosegment_folder(photos, tmp_path / "out", weights=weights)
    (photos / "p3.jpg").unlink()
    how = {"weights": weights, "threshold": 0.4}
    cosegment_folder(photos, tmp_path / "out", overwrite=True, **how)
    cosegment_folder(photos, tmp_path / "new", **how)
    assert files(tmp_path / "out") == made(*NAMES[:3])
    for name in made(*NAMES[:3]):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


def test_what_lcco_did_not_make_and_the_pictures_are_not_written_over(model, photos, tmp_path):
    for name in ("masks/p0.png", "contact_sheet.jpg", "result.json"):
        mine = tmp_path / Path(name).stem / name
        mine.parent.mkdir(parents=True)
        mine.write_text("[1]")
        out = tmp_path / Path(name).stem
        refuses("files that lcco did not make", photos, out, weights=model, overwrite=True)
        assert files(out) == {name} and mine.read_text() == "[1]"
    before = {f: (photos / f).read_bytes() for f in files(photos)}
    (tmp_path / "link").symlink_to(photos)
    for out in (photos, photos / ".." / "photos", tmp_path / "link"):
        refuses("holds the pictures themselves", photos, out, weights=model)
    cosegment_folder(photos, photos / "out", weights=model)  # a folder of its own in it is well
    refuses("holds the pictures", photos / "out" / "masks", photos / "out", weights=model)
    assert before.items() <= {f: (photos / f).read_bytes() for f in files(photos)}.items()


def test_two_at_once_into_one_folder_lose_nothing(model, photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    picture(8).save(other / "q.png")
    told = []

    def run(source: Path) -> None:
        try:
            told.append(cosegment_folder(source, tmp_path / "out", weights=model))
        except LCCoError as error:
            told.append(error)

    jobs = [threading.Thread(target=run, args=(s,)) for s in (photos, other, photos)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    refused = [t for t in told if isinstance(t, LCCoError)]
    won = "q" if len(refused) == 2 else NAMES
    assert all("holds results of other" in str(e) for e in refused)
    assert len(refused) == (2 if won == "q" else 1) and files(tmp_path / "out") == made(*won)


def test_a_place_that_cannot_be_written_is_one_line(weights, photos, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    assert main(["cosegment", str(photos), "--out", out, "--weights", str(weights)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lcco: ") and said.count("\n") == 1 and "file" in said


# ------------------------------------------------------------------------------ real photographs
def test_thirty_dogs_are_dogs(real, monkeypatch):
    from lcco.data import load_data

    data = load_data("voc_train")
    dogs = [i for i in data.groups["dog"] if data.labels_of(i) == {"dog"}]
    predictor = load_segmenter()
    texts = predictor.vocabulary.embeddings
    found = predictor.features.tower.encode_images(data.image(i) for i in dogs[:64])
    S = torch.nn.functional.normalize(found.to(texts), dim=-1) @ texts.T
    for n in (30, 64):  # the maximum over them is "person" in both
        (word, score), *_ = room._words(predictor, S[:n])
        assert word == "dog" and score > 0.5, (n, word, score)
