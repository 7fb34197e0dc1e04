"""Pictures as people have them: every mode and size, damaged files, words and classes, one picture or many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import picture
from PIL import Image
from test_train import TINY_CLIP

import lcco
from lcco import predict
from lcco.cli import main
from lcco.common import LCCoError
from lcco.config import Experiment, Profile, load_profile
from lcco.inputs import Inputs
from lcco.predict import cosegment, cosegment_folder, first_pictures, load_segmenter, read
from lcco.train import build_model, save_weights, trained_state

WORDS = ["cow", "dog", "car", "boat", "cat", "airplane"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A model file of a random tiny network that finds something in each picture."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "clip.json").write_text(json.dumps(TINY_CLIP))
    (folder / "words.txt").write_text("\n".join(WORDS) + "\n")
    experiment = Experiment().replace({
        "name": "tiny", "data.size": 64, "tower.model": str(folder / "clip.json"), "tower.weights": None,
        "tower.vocabulary": str(folder / "words.txt"), "model.backbone": "glyphnet", "model.weights": None,
        "model.width": 16, "model.frozen_stages": 0, "model.k": 2,
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCCO_CACHE", str(folder / "cache"))
        torch.manual_seed(3)
        inputs = Inputs(experiment)
        model = build_model(experiment, inputs).eval()
        for block in (model.clip_interaction.modulate_map, model.clip_regularization.modulate_map):
            for p in block.parameters():  # untrained modulation may be the identity; here words must matter
                torch.nn.init.normal_(p, std=0.3)
        save_weights(folder / "tiny.safetensors", trained_state(model), experiment, inputs)
    return folder / "tiny.safetensors"


@pytest.fixture(scope="module")
def model(weights):
    torch.set_num_threads(1)
    return load_segmenter(weights)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Four pictures, each with an object."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(4):
        picture(n, size=(90, 60)).save(folder / f"p{n}.jpg", quality=95)
    return folder


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


# ------------------------------------------------------------------------------------------------------------ reading
RGB = picture(7)


def with_alpha() -> Image.Image:
    out = RGB.convert("RGBA")
    out.paste((255, 0, 0, 0), (0, 0, 10, 10))
    return out


def palette() -> Image.Image:
    out = RGB.quantize(16)
    out.info["transparency"] = out.getpixel((20, 20))
    return out


MODES = {
    "1": (RGB.convert("1"), "png"), "L": (RGB.convert("L"), "png"), "LA": (with_alpha().convert("LA"), "png"),
    "P": (RGB.quantize(64), "png"), "P-transparent": (palette(), "png"), "RGBA": (with_alpha(), "png"),
    "CMYK": (RGB.convert("CMYK"), "jpg"), "YCbCr": (RGB.convert("YCbCr"), "jpg"), "LAB": (RGB.convert("LAB"), "tif"),
    "I;16": (Image.fromarray(np.asarray(RGB.convert("L")).astype(np.uint16) * 257), "png"),
    "I": (Image.fromarray(np.asarray(RGB.convert("L")).astype(np.int32) * 257), "tif"),
    "F": (Image.fromarray(np.asarray(RGB.convert("L")).astype(np.float32) / 255), "tif"),
    "RGB": (RGB, "webp"), "bmp": (RGB, "bmp"),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_the_same_picture(tmp_path, mode):
    image, suffix = MODES[mode]
    file = tmp_path / f"x.{suffix}"
    try:
        image.save(file)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow writes no {mode} {suffix}")
    want = np.asarray(RGB.convert("L"), float)
    for source in (file, image):
        got, size = read(source)
        assert got.mode == "RGB" and got.size == size == RGB.size
        away = np.abs(np.asarray(got.convert("L"), float) - want)[12:, 12:]
        tolerance = {"1": 140, "P-transparent": 60}.get(mode, 14)
        assert away.mean() < tolerance, (mode, away.mean())
    if mode in ("LA", "RGBA"):
        assert np.asarray(got)[:10, :10].min() == 255  # what cannot be seen is white, not its hidden colour


def test_sixteen_bits_keep_their_range():
    wide = np.linspace(0, 65535, 100, dtype=np.uint16).reshape(10, 10)
    got = np.asarray(read(Image.fromarray(wide))[0])[..., 0]
    assert got.min() == 0 and got.max() == 255 and 120 < np.median(got) < 135
    twelve = np.asarray(read(Image.fromarray((wide >> 4).astype(np.uint16)))[0])[..., 0]
    assert np.abs(twelve.astype(int) - got).max() <= 1  # a camera's 12 bits are not read as darkness


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (20, 10), c) for c in ("red", "blue", "green")]
    for suffix in ("gif", "png", "tiff"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
        assert np.asarray(read(tmp_path / f"a.{suffix}")[0])[5, 5].tolist() == [255, 0, 0]


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation(tmp_path, turn):
    from PIL import ImageOps

    stored = Image.new("RGB", (96, 48), "white")
    stored.paste((200, 0, 0), (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = turn
    stored.save(tmp_path / "x.jpg", exif=exif, quality=95, subsampling=0)
    got, size = read(tmp_path / "x.jpg")
    want = ImageOps.exif_transpose(Image.open(tmp_path / "x.jpg"))
    assert size == want.size and np.array_equal(np.asarray(got), np.asarray(want))


def test_large_pictures_are_decoded_small_and_keep_their_size(tmp_path):
    picture(1, size=(1201, 803)).save(tmp_path / "x.jpg", quality=90)
    picture(1, size=(1201, 803)).save(tmp_path / "x.png")
    for name in ("x.jpg", "x.png"):
        small, size = read(tmp_path / name, 128)
        assert size == (1201, 803) and 128 <= min(small.size) < 256
        full = read(tmp_path / name)[0].resize((64, 64), Image.Resampling.BILINEAR)
        away = np.abs(np.asarray(small.resize((64, 64), Image.Resampling.BILINEAR), float) - np.asarray(full, float))
        assert away.mean() < 3


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.zeros((4, 4, 2), np.uint8), "4, 4, 2"), (np.zeros((0, 4), np.uint8), "no picture"),
        (np.full((4, 4, 3), 200.0), "0..1"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_pictures(model, values, says):
    (result,) = cosegment([values], weights=model)
    assert says in result.error and result.mask is None


def test_arrays_of_every_kind(model):
    eight = np.asarray(RGB)
    kinds = [eight, eight / 255, eight.astype(np.uint16) * 257, eight[..., :1], eight[..., 0], eight > 100]
    results = cosegment(kinds, weights=model)
    assert [r.error for r in results] == [None] * 6
    assert np.array_equal(np.asarray(read(kinds[0])[0]), np.asarray(read(kinds[1])[0]))
    assert np.array_equal(np.asarray(read(kinds[0])[0]), np.asarray(read(kinds[2])[0]))


# ---------------------------------------------------------------------------------------------------------- cosegment
def test_masks_have_the_pictures_own_size_and_follow_the_threshold(model, photos):
    paths = [*sorted(photos.iterdir()), picture(9, size=(33, 70))]
    results = cosegment(paths, weights=model)
    assert [r.name for r in results] == ["p0.jpg", "p1.jpg", "p2.jpg", "p3.jpg", "picture 5"]
    for r, size in zip(results, [(90, 60)] * 4 + [(33, 70)], strict=True):
        assert r.size == size and r.mask.shape == size[::-1] and r.mask.dtype == bool
        assert r.probability.shape == (64, 64) and 0 <= r.probability.min() <= r.probability.max() <= 1
        assert len(r.words) == 5 and {w for w, _ in r.words} <= set(WORDS)
        assert abs(sum(s for _, s in r.words) - 1) < 0.5 and r.words[0][1] >= r.words[1][1]
    some = results[0]
    high, low = (cosegment(paths, weights=model, threshold=t)[0].mask for t in (0.9, 0.1))
    assert not (high & ~some.mask).any() and not (some.mask & ~low).any() and low.sum() > high.sum()


def test_same_probabilities_as_a_data_set_of_the_same_pictures(model, photos):
    from lcco.data import CoSegData
    from lcco.train import Predictor

    class Set(CoSegData):
        def path(self, i):
            return photos / self.keys[i]

    data = Set("photos", "test", sorted(f.name for f in photos.iterdir()), {})
    want = Predictor(model.model, model.inputs)(data, range(4))
    got = np.stack([r.probability for r in cosegment(photos, weights=model)])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_one_picture_alone_and_given_without_a_list(model, photos):
    (a,), (b,) = cosegment([photos / "p1.jpg"], weights=model), cosegment(photos / "p1.jpg", weights=model)
    assert a.error is None and np.array_equal(a.probability, b.probability)
    twins = cosegment([photos / "p1.jpg"] * 2, weights=model)  # alone it stands beside its twin
    np.testing.assert_allclose(a.probability, twins[0].probability, atol=1e-6)
    (c,) = cosegment(np.asarray(RGB), weights=model)
    assert c.mask.shape == (32, 48)


def test_a_set_counts_and_large_ones_are_cut_evenly(model, photos):
    paths = sorted(photos.iterdir()) + [picture(n) for n in (20, 21, 22)]
    together, apart = cosegment(paths, weights=model), cosegment(paths, weights=model, at_once=3)
    assert [r.set for r in apart] == [1, 1, 2, 2, 2, 3, 3] and {r.set for r in together} == {1}
    alone = cosegment(paths[:2], weights=model)
    np.testing.assert_allclose(apart[1].probability, alone[1].probability, atol=1e-6)
    assert len({f"{s:.6f}" for r in apart for _, s in r.words[:1]}) == 3  # each set has its own words


def test_unreadable_pictures_do_not_disturb_the_others(model, photos):
    good = sorted(photos.iterdir())
    (photos / "bad.jpg").write_bytes((photos / "p0.jpg").read_bytes()[:700])
    mixed = cosegment([good[0], photos / "bad.jpg", photos / "none.png", *good[1:]], weights=model)
    assert [bool(r.error) for r in mixed] == [False, True, True, False, False, False]
    assert "truncated" in mixed[1].error.lower() and mixed[2].error == "no such file"
    clean = cosegment(good, weights=model)
    np.testing.assert_allclose(mixed[0].probability, clean[0].probability, atol=1e-6)


def test_class_takes_the_nearest_word(model, photos):
    free = cosegment(photos, weights=model)[0].probability
    dog = cosegment(photos, weights=model, cls="dog")[0].probability
    assert np.abs(dog - free).max() > 1e-4
    plane, aeroplane = (cosegment(photos, weights=model, cls=c)[0].probability for c in ("airplane", "aeroplane"))
    np.testing.assert_array_equal(plane, aeroplane)
    assert np.abs(plane - dog).max() > 1e-4
    assert cosegment(photos, weights=model, cls="poodle")[0].error is None  # unknown: the nearest by embedding


def test_words_restrict_what_it_may_be(model, photos, tmp_path):
    free = dict(cosegment(photos, weights=model)[0].words)
    asked = cosegment(photos, weights=model, words=["boat", "aeroplane"])[0]
    assert [w for w, _ in asked.words] == sorted(["airplane", "boat"], key=lambda w: -free.get(w, 0))
    assert abs(sum(s for _, s in asked.words) - 1) < 1e-5
    said = cosegment(photos, weights=model, cls=asked.words[0][0])[0]
    np.testing.assert_array_equal(said.probability, asked.probability)
    (tmp_path / "all.txt").write_text("\n".join(WORDS))
    everything = cosegment(photos, weights=model, words=tmp_path / "all.txt")[0]
    np.testing.assert_array_equal(everything.probability, cosegment(photos, weights=model)[0].probability)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"words": ["zebra"]}, "`zebra` is not one of the 6 words"), ({"words": "coco80"}, "MLP3"),
        ({"words": []}, "empty"), ({"words": "none.txt"}, "no such file"), ({"cls": " "}, "class is empty"),
        ({"cls": "dog", "words": ["dog"]}, "not both"), ({"threshold": 1.5}, "threshold"), ({"at_once": 0}, "at_once"),
        ({"weights": "none.safetensors"}, "no such model file"), ({"weights": "none"}, "no run is"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(model, photos, settings, says):
    with pytest.raises(LCCoError, match=says) as error:
        cosegment(photos, **{"weights": model, **settings})
    assert "\n" not in str(error.value)


def test_no_pictures(model, tmp_path):
    with pytest.raises(LCCoError, match="no pictures given"):
        cosegment([], weights=model)
    (tmp_path / "in" / "inner").mkdir(parents=True)
    (tmp_path / "in" / "note.txt").write_text("hello")
    with pytest.raises(LCCoError, match="no pictures in it"):
        cosegment_folder(tmp_path / "in", tmp_path / "out", weights=model)
    picture(0).save(tmp_path / "in" / "inner" / "x.png")
    with pytest.raises(LCCoError, match="inner: give that folder"):
        cosegment(tmp_path / "in", weights=model)
    with pytest.raises(LCCoError, match="no such folder"):
        cosegment_folder(tmp_path / "nowhere", tmp_path / "out", weights=model)
    assert not (tmp_path / "out").exists()


def test_shipped_weights_are_the_default(monkeypatch, weights, photos):
    monkeypatch.setattr(predict, "SHIPPED", photos / "lite.safetensors")
    with pytest.raises(LCCoError, match="shipped weights are not here"):
        lcco.cosegment(photos)
    monkeypatch.setattr(predict, "SHIPPED", weights)
    assert [r.error for r in lcco.cosegment(photos)] == [None] * 4


def test_nothing_of_the_pictures_is_kept_on_disk(weights, photos, monkeypatch, tmp_path):
    import sqlite3

    cache = tmp_path / "cache"
    monkeypatch.setenv("LCCO_CACHE", str(cache))
    cosegment(photos, weights=weights)
    assert files(cache) == {"embeddings.sqlite"}
    with sqlite3.connect(cache / "embeddings.sqlite") as db:
        assert db.execute("SELECT count(*) FROM embeddings").fetchone()[0] == len(WORDS)  # the prompts


# ------------------------------------------------------------------------------------------------------------- folders
def test_folder_gives_masks_overlays_sheet_and_record(model, photos, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(5, size=(90, 60)).save(photos / "turned.jpg", exif=exif)
    report = cosegment_folder(photos, tmp_path / "out", weights=model)
    out = tmp_path / "out"
    names = ["p0", "p1", "p2", "p3", "turned"]
    assert files(out) == {"result.json", "contact_sheet.jpg", *(f"masks/{n}.png" for n in names), *(
        f"overlays/{n}.jpg" for n in names)}  # fmt: skip
    results = cosegment(photos, weights=model)
    for n, r in zip(names, results, strict=True):
        with Image.open(out / "masks" / f"{n}.png") as mask, Image.open(out / "overlays" / f"{n}.jpg") as over:
            assert mask.mode == "L" and mask.size == over.size == ((60, 90) if n == "turned" else (90, 60))
            assert np.array_equal(np.asarray(mask), r.mask.astype(np.uint8) * 255)
    record = json.loads((out / "result.json").read_text())
    assert record == report.record and record["complete"] and report.failed == []
    assert record["settings"] == {
        "threshold": 0.5, "class": None, "words": None, "looked_for": None, "at_once": predict.AT_ONCE
    }  # fmt: skip
    assert record["sets"][0]["images"] == 5 and record["seconds"] > 0
    assert [w["word"] for w in record["sets"][0]["words"]] == [w for w, _ in results[0].words]
    assert record["versions"]["lcco"] == lcco.__version__ and record["weights"]["experiment"] == "tiny"
    for entry, r in zip(record["images"], results, strict=True):
        assert entry["name"] == r.name and (entry["width"], entry["height"]) == r.size and entry["error"] is None
        assert entry["foreground"] == pytest.approx(r.mask.mean(), abs=1e-6)
    with Image.open(out / "contact_sheet.jpg") as sheet:
        assert sheet.size == (3 * (320 + 12) + 12, 40 + (2 * 60 + 22 + 24) + (2 * 90 + 22 + 24))  # 3 and 2 pictures


def test_sheet_shows_each_input_over_its_overlay(model, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (400, 300), (250, 10, 10)).save(tmp_path / "in" / "red.png")
    Image.new("RGB", (400, 300), (10, 10, 250)).save(tmp_path / "in" / "blue.png")
    cosegment_folder(tmp_path / "in", tmp_path / "out", weights=model, threshold=0.999)
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.jpg")).astype(int)
    assert sheet.shape == (40 + 2 * 240 + 22 + 24, 2 * (320 + 12) + 12, 3)
    blue, red = sheet[160, 170], sheet[160, 500]  # sorted by name
    assert blue[2] > 200 > 60 > blue[0] and red[0] > 200 > 60 > red[2]
    below = sheet[40 + 240 + 100, 170]
    assert np.ptp(below) < 12  # nothing found: grey


def test_colliding_names_stay_apart(model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for n, name in enumerate(["a.jpg", "a.png", "A.bmp", "a_jpg.webp", "b c.jpeg", "ü.jpg"]):
        picture(n).save(folder / name)
    report = cosegment_folder(folder, tmp_path / "out", weights=model)
    masks = [i["mask"] for i in report.record["images"]]
    assert len({m.casefold() for m in masks}) == 6 == len(list((tmp_path / "out" / "masks").iterdir()))
    named = {i["name"]: Path(i["mask"]).stem for i in report.record["images"]}
    assert named["b c.jpeg"] == "b c" and named["ü.jpg"] == "ü" and named["a_jpg.webp"] == "a_jpg"
    assert named["a.png"] == "a_png" and named["a.jpg"] not in ("a", "a_jpg")


def test_bad_files_are_named_and_the_rest_is_done(model, photos, tmp_path, capsys):
    (photos / "cut.jpg").write_bytes((photos / "p0.jpg").read_bytes()[:600])
    (photos / "text.png").write_text("not a picture")
    (photos / "empty.gif").write_bytes(b"")
    (photos / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (photos / "note.txt").write_text("left alone")
    report = cosegment_folder(photos, tmp_path / "out", weights=model)
    assert report.failed == ["cut.jpg", "empty.gif", "phone.heic", "text.png"]
    said = capsys.readouterr().err
    assert all(f"skipped {name}: " in said for name in report.failed) and "4 of 8 pictures" in said
    assert "export it as JPEG" in said and "left out, by their ending: note.txt\n" in said
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 4 and (tmp_path / "out" / "contact_sheet.jpg").is_file()
    errors = {i["name"]: i["error"] for i in report.record["images"]}
    assert errors["p0.jpg"] is None and "truncated" in errors["cut.jpg"].lower()


def test_all_files_bad(model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").write_text("no")
    report = cosegment_folder(tmp_path / "in", tmp_path / "out", weights=model)
    assert report.failed == ["x.png"] and files(tmp_path / "out") == {"result.json"} and report.words == []


def test_a_second_start_redoes_nothing_unless_something_changed(weights, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    first = cosegment_folder(photos, out, weights=weights)
    before = {f: (out / f).stat().st_mtime_ns for f in files(out)}
    with monkeypatch.context() as patch:
        patch.setattr(predict, "load_segmenter", lambda *_: pytest.fail("loads the model though nothing is to be done"))
        again = cosegment_folder(photos, out, weights=weights)
    assert "nothing to do" in capsys.readouterr().err and again.record == first.record
    assert before == {f: (out / f).stat().st_mtime_ns for f in files(out)}
    (out / "masks" / "p1.png").unlink()  # only this one is made again
    cosegment_folder(photos, out, weights=weights)
    changed = {f for f in before if (out / f).stat().st_mtime_ns != before[f]}
    assert changed == {"masks/p1.png", "overlays/p1.jpg", "contact_sheet.jpg", "result.json"}
    cosegment_folder(photos, out, weights=weights, threshold=0.4)
    assert all((out / f).stat().st_mtime_ns != before[f] for f in before)


def test_an_interruption_loses_nothing(weights, photos, tmp_path, monkeypatch):
    out, real, count = tmp_path / "out", predict._write, []

    def slow(*job):
        count.append(job)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(*job)

    monkeypatch.setattr(predict, "ThreadPoolExecutor", lambda _: real_pool(1))
    from concurrent.futures import ThreadPoolExecutor as real_pool

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(predict, "_write", slow)
        cosegment_folder(photos, out, weights=weights)
    record = json.loads((out / "result.json").read_text())
    assert not record["complete"] and [i["name"] for i in record["images"]] == ["p0.jpg", "p1.jpg"]
    made = (out / "masks" / "p0.png").stat().st_mtime_ns
    report = cosegment_folder(photos, out, weights=weights)
    assert len(report.record["images"]) == 4 and (out / "masks" / "p0.png").stat().st_mtime_ns == made
    monkeypatch.undo()
    whole = cosegment_folder(photos, tmp_path / "whole", weights=weights)
    assert report.record["images"] == whole.record["images"] and report.record["sets"] == whole.record["sets"]


def test_a_place_that_cannot_be_written(model, photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LCCoError, match="file.*can be written"):
        cosegment_folder(photos, tmp_path / "file" / "out", weights=model)


def test_pictures_are_not_written_over(model, photos, tmp_path):
    before = {f: (photos / f).read_bytes() for f in files(photos)}
    (tmp_path / "link").symlink_to(photos)
    for out in (photos, photos / ".." / "photos", tmp_path / "link"):
        with pytest.raises(LCCoError, match="is the folder of the pictures; give another --out"):
            cosegment_folder(photos, out, weights=model)
    assert before == {f: (photos / f).read_bytes() for f in files(photos)}
    cosegment_folder(photos, photos / "out", weights=model)  # a folder of its own in it is well
    masks = photos / "out" / "masks"
    with pytest.raises(LCCoError, match="masks: is the folder of the pictures"):  # each would replace its picture
        cosegment_folder(masks, photos / "out", weights=model)
    (photos / "out" / "p9.jpg").write_bytes(before["p0.jpg"])
    assert [f.name for f in predict.pictures_in(photos / "out")] == ["p9.jpg"]  # lcco's own sheet is none


@pytest.mark.parametrize("name", ["masks/p0.png", "overlays/mine.psd", "contact_sheet.jpg", "result.json"])
def test_what_lcco_did_not_make_is_left_alone(model, photos, tmp_path, name):
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("[1]")
    with pytest.raises(LCCoError, match="out: holds files that lcco did not make.*give another --out") as error:
        cosegment_folder(photos, tmp_path / "out", weights=model)
    assert "\n" not in str(error.value) and files(tmp_path / "out") == {name} and mine.read_text() == "[1]"
    mine.unlink()  # empty folders hold nothing
    assert not cosegment_folder(photos, tmp_path / "out", weights=model).failed


def test_masks_changed_by_hand_are_kept(weights, photos, tmp_path, capsys):
    out = tmp_path / "out"
    cosegment_folder(photos, out, weights=weights)
    hand = Image.new("L", (90, 60), 255)
    hand.save(out / "masks" / "p1.png")
    hand.save(out / "masks" / "p7.png")  # one that lcco never wrote
    mine = (out / "masks" / "p1.png").read_bytes()
    cosegment_folder(photos, out, weights=weights)
    assert (out / "masks" / "p1.png").read_bytes() == mine  # nothing to do
    capsys.readouterr()
    picture(7, size=(90, 60)).save(photos / "p7.jpg")
    cosegment_folder(photos, out, weights=weights)
    assert "kept beside the new ones: p1.edited.png, p7.edited.png\n" in capsys.readouterr().err
    assert (out / "masks" / "p1.edited.png").read_bytes() == mine != (out / "masks" / "p1.png").read_bytes()
    hand.resize((9, 6)).save(out / "masks" / "p1.png")  # and again
    cosegment_folder(photos, out, weights=weights, threshold=0.4)
    assert {f.name for f in (out / "masks").glob("*.edited*")} == {f"p{n}.png" for n in (
        "1.edited", "1.edited-2", "7.edited")}  # fmt: skip
    assert (out / "masks" / "p1.edited.png").read_bytes() == mine and "p1.edited-2.png" in capsys.readouterr().err


def test_what_earlier_starts_made_goes(weights, photos, tmp_path, capsys):
    out = tmp_path / "out"
    picture(8).save(photos / "p0.png")
    cosegment_folder(photos, out, weights=weights)
    Image.new("L", (90, 60), 255).save(out / "masks" / "p3.png")
    (out / "masks" / "mine.txt").write_text("not lcco's")
    for name in ("p0.png", "p2.jpg", "p3.jpg"):
        (photos / name).unlink()
    capsys.readouterr()
    report = cosegment_folder(photos, out, weights=weights)
    said = capsys.readouterr().err
    assert files(out) == {"result.json", "contact_sheet.jpg", "masks/p0.png", "overlays/p0.jpg", "masks/p1.png",
        "overlays/p1.jpg", "masks/p3.png", "masks/mine.txt"}  # fmt: skip
    assert "so left: masks/p3.png\n" in said and "removed" in said and "masks/p2.png" in said
    assert json.loads((out / "result.json").read_text()) == report.record and "earlier" not in report.record
    for f in photos.iterdir():
        f.write_text("no")
    cosegment_folder(photos, out, weights=weights)
    assert files(out) == {"result.json", "masks/p3.png", "masks/mine.txt"}


def test_an_interruption_forgets_nothing_of_earlier_starts(weights, photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    cosegment_folder(photos, out, weights=weights)
    Image.new("L", (90, 60), 255).save(out / "masks" / "p1.png")
    (photos / "p3.jpg").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(predict, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        cosegment_folder(photos, out, weights=weights, threshold=0.4)
    cosegment_folder(photos, out, weights=weights, threshold=0.6)
    assert {f.name for f in (out / "masks").iterdir()} == {"p0.png", "p1.png", "p1.edited.png", "p2.png"}


def test_a_killed_start_goes_on(weights, photos, tmp_path, monkeypatch):
    out, real = tmp_path / "out", predict.write_json

    def until_masks(path, value):  # as kill -9: nothing tidies up after the first mask
        if (out / "masks").is_dir():
            raise KeyboardInterrupt
        real(path, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(predict, "write_json", until_masks)
        cosegment_folder(photos, out, weights=weights)
    assert (out / "masks" / "p0.png").is_file()
    cosegment_folder(photos, out, weights=weights)
    assert not [f for f in files(out) if "edited" in f]


def test_a_mended_cause_is_something_to_do(weights, photos, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "out", predict.read

    def locked(source, side=None):  # as chmod 000, which root may read
        if Path(source).name in ("p1.jpg", "p2.jpg"):
            raise PermissionError(13, "Permission denied")
        return real(source, side)

    with monkeypatch.context() as patch:
        patch.setattr(predict, "read", locked)
        assert cosegment_folder(photos, out, weights=weights).failed == ["p1.jpg", "p2.jpg"]
        patch.setattr(predict, "load_segmenter", lambda *_: pytest.fail("loads the model though nothing is to be done"))
        assert cosegment_folder(photos, out, weights=weights).failed == ["p1.jpg", "p2.jpg"]  # still
        assert "nothing to do" in (said := capsys.readouterr().err) and "2 of 4 pictures could not be read" in said
    assert cosegment_folder(photos, out, weights=weights).failed == []
    assert "nothing to do" not in capsys.readouterr().err
    cosegment_folder(photos, tmp_path / "fresh", weights=weights)
    for name in files(tmp_path / "fresh") - {"result.json"}:  # the others too: each mask depends on the whole set
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes(), name


def test_a_deleted_sheet_is_made_again(weights, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    (photos / "bad.png").write_text("no")
    cosegment_folder(photos, out, weights=weights)
    sheet = out / "contact_sheet.jpg"
    with Image.open(sheet) as image:
        size = image.size
    sheet.unlink()
    monkeypatch.setattr(predict, "load_segmenter", lambda *_: pytest.fail("the sheet needs no model"))
    cosegment_folder(photos, out, weights=weights)
    said = capsys.readouterr()
    with Image.open(sheet) as image:
        assert image.size == size and "nothing to do" not in said.err and "contact_sheet.jpg, made again" in said.out


def test_a_class_that_is_no_word_is_said(model, weights, photos, tmp_path, capsys):
    cosegment_folder(photos, tmp_path / "a", weights=model, cls="zorkmid")
    (line,) = capsys.readouterr().err.splitlines()
    near = json.loads((tmp_path / "a" / "result.json").read_text())["settings"]["looked_for"]
    assert f"`zorkmid` is not a word of the vocabulary; looking for `{near}`, the nearest" in line
    assert line.endswith(f"may mean nothing; its words: {weights.parent / 'words.txt'}")
    cosegment_folder(photos, tmp_path / "b", weights=model, cls="aeroplane")
    assert "looking for `airplane`, the vocabulary's word for `aeroplane`" in capsys.readouterr().err
    cosegment_folder(photos, tmp_path / "c", weights=model, cls="Dog")
    assert capsys.readouterr().err == ""


def test_folders_that_cannot_be_read(model, tmp_path, monkeypatch):
    (tmp_path / "in" / "inner").mkdir(parents=True)
    real, locked = Path.iterdir, []

    def iterdir(folder):  # as chmod 000, which root may read
        if folder.name in locked:
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    for name, says in (("inner", "no pictures in it"), ("in", "in: Permission denied; give a folder that can be read")):
        locked[:] = [name]
        with pytest.raises(LCCoError, match=says) as error:
            cosegment_folder(tmp_path / "in", tmp_path / "out", weights=model)
        assert "\n" not in str(error.value)


def test_weights_that_cannot_be(weights, photos, tmp_path, monkeypatch):
    for given in (tmp_path / "no" / "run", str(tmp_path / "run*")):
        with pytest.raises(LCCoError, match="no such model file or run") as error:
            cosegment(photos, weights=given)
        assert "\n" not in str(error.value) and str(given) in str(error.value)
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(LCCoError, match="tiny.safetensors: Permission denied; give"):
        cosegment(photos, weights=weights)


def test_names_that_are_no_line_of_text(model, photos, tmp_path, capsys):
    picture(0).save(photos / "two\nlines.png")
    (photos / "bad\none.png").write_text("no")
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        (photos / "p0.jpg").rename(photos / name)
    except OSError:  # some disks take only text
        name = "p0.jpg"
    report = cosegment_folder(photos, tmp_path / "out", weights=model)
    assert report.failed == ["bad\none.png"] and "skipped bad one.png: " in capsys.readouterr().err
    assert {i["name"] for i in report.record["images"]} >= {name, "two\nlines.png"}
    assert (tmp_path / "out" / "contact_sheet.jpg").is_file()


def test_what_is_left_out_is_said(model, photos, tmp_path, capsys):
    cosegment_folder(photos, tmp_path / "none", weights=model)
    assert "left out" not in capsys.readouterr().err
    for name in ("a.ico", "notes.txt", "plain", "raw.cr2", "z.pdf", ".hidden"):
        (photos / name).write_text("")
    (photos / "inner.txt").mkdir()
    (photos / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    cosegment_folder(photos, tmp_path / "out", weights=model)
    assert capsys.readouterr().err.splitlines() == [
        "left out, by their ending: a.ico, notes.txt and 3 more", "left out, as broken links: gone.jpg"
    ]  # fmt: skip


def test_first_pictures_are_drawn_where_photographs_are_absent(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("LCCO_DATA", str(tmp_path / "none"))
    for profile in ("embedded", "lite"):
        place, model = first_pictures(load_profile(profile), tmp_path / profile, str(weights), images=3)
        assert model == weights and len(predict.pictures_in(place)) == 3
        assert Image.open(predict.pictures_in(place)[0]).size == (384, 384)
    times = [f.stat().st_mtime_ns for f in place.iterdir()]
    first_pictures(load_profile("lite"), tmp_path / "lite", str(weights), images=3)
    assert times == [f.stat().st_mtime_ns for f in place.iterdir()]  # so that a second run redoes nothing


def test_first_pictures_are_a_class_of_the_test_set(weights, tmp_path, monkeypatch):
    from drawn import folders

    folders(tmp_path, ["dog", "cat"], n=3, name="photos")
    profile = Profile("mine", tests=(str(tmp_path / "photos"),))
    monkeypatch.setattr(predict, "SHIPPED", weights)
    place, model = first_pictures(profile, tmp_path / "out", images=2)
    assert model == weights and [f.name for f in predict.pictures_in(place)] == ["cat-1.png", "cat-2.png"]


def test_report_as_a_table(model, photos, tmp_path):
    (photos / "bad.png").write_text("no")
    table = cosegment_folder(photos, tmp_path / "out", weights=model).table()
    assert list(table.index) == ["bad.png", "p0.jpg", "p1.jpg", "p2.jpg", "p3.jpg"]
    assert table["problem"].astype(bool).tolist() == [True] + [False] * 4 and table.loc["p0.jpg", "width"] == 90


def test_command_line(weights, photos, tmp_path, capsys):
    (photos / "cut.jpg").write_bytes((photos / "p0.jpg").read_bytes()[:600])
    command = [sys.executable, "-m", "lcco", "cosegment", "photos", "--out", "out dir", "--weights", str(weights)]
    done = subprocess.run(
        [*command, "--class", "aeroplane"], capture_output=True, text=True, timeout=200, cwd=tmp_path
    )
    assert done.returncode == 1, done.stderr
    assert "skipped cut.jpg" in done.stderr and "looking for `airplane`" in done.stderr
    assert "Traceback" not in done.stderr and "4 masks in" in done.stdout
    assert json.loads((tmp_path / "out dir" / "result.json").read_text())["settings"]["looked_for"] == "airplane"
    assert main(["cosegment", str(tmp_path / "nowhere"), "--out", "x"]) == 2
    assert "no such folder" in capsys.readouterr().err
