"""The one decoder: files that show the same picture are the same pixels, or are named."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import drawn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, TiffImagePlugin

from lcco.common import LCCoError
from lcco.data.pictures import (
    is_system,
    listing,
    load_square,
    mask_square,
    picture_size,
    pictures_in,
    read_labels,
    read_mask,
    read_picture,
    to_rgb,
)

MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F", "PA")
GREY = np.arange(32 * 48, dtype=np.uint8).reshape(32, 48)
COLOUR = np.asarray(drawn.picture(1))


def _read(path: Path) -> np.ndarray:
    picture = read_picture(path)
    assert picture.mode == "RGB" and picture_size(path) == picture.size
    return np.asarray(picture)


# ------------------------------------------------------------------------------------ depths, modes
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("g8.png", GREY), ("g16.png", GREY.astype(np.uint16) * 257),
        ("g16.tif", GREY.astype(np.uint16) * 257), ("g12.png", GREY.astype(np.uint16) * 16),
        ("of8in16.png", GREY.astype(np.uint16)), ("signed.tif", GREY.astype(np.int32) * 257),
        ("float.tif", GREY.astype(np.float32) / 255),
    ],
)  # fmt: skip
def test_depths_are_the_same_picture(tmp_path: Path, name: str, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / name)
    found = _read(tmp_path / name)
    assert np.abs(found.astype(int) - GREY[..., None]).max() <= 1
    if "12" not in name:
        assert np.array_equal(found, np.repeat(GREY[..., None], 3, 2))


@pytest.mark.parametrize("fill", [np.inf, -np.inf, np.nan, -9999, -3.4e38, 1e6])
def test_fill_values_are_refused_by_name(tmp_path: Path, fill: float) -> None:
    """Scaled to the range of all values, such a picture would be blank or flat."""
    values = GREY.astype(np.float32) / 255
    values[3, 4] = fill
    Image.fromarray(values).save(tmp_path / "f.tif")
    with pytest.raises(LCCoError, match="f.tif: .*values from .* to .*, not in 0 to 1"):
        read_picture(tmp_path / "f.tif")
    with pytest.raises(LCCoError, match="f.tif"):
        read_mask(tmp_path / "f.tif")


def test_negative_and_very_large_integers_are_refused_by_name(tmp_path: Path) -> None:
    for n, value in enumerate((-32768, 70_000)):
        values = GREY.astype(np.int32) * 4 + 100
        values[3, 4] = value
        Image.fromarray(values).save(tmp_path / f"{n}.tif")
        with pytest.raises(LCCoError, match=f"{n}.tif: .*not in 0 to 65535"):
            read_picture(tmp_path / f"{n}.tif")


def test_colours_of_16_bits(tmp_path: Path) -> None:
    import struct
    import zlib

    wide = (COLOUR.astype(">u2") * 257).reshape(32, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in wide)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 48, 32, 16, 2, 0, 0, 0)
    whole = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "rgb16.png").write_bytes(b"\x89PNG\r\n\x1a\n" + whole)
    assert np.array_equal(_read(tmp_path / "rgb16.png"), COLOUR)


def test_hidden_colour_under_alpha_is_white(tmp_path: Path) -> None:
    alpha = drawn.rectangle(value=255)
    white = np.where(alpha[..., None] > 0, COLOUR, 255)
    rgba = Image.fromarray(np.dstack([COLOUR, alpha]))
    for name in ("a.png", "a.tif", "a.webp"):
        rgba.save(tmp_path / name, **({"lossless": True, "exact": True} if "webp" in name else {}))
        assert np.array_equal(_read(tmp_path / name), white), name
    grey = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(alpha)))
    grey.save(tmp_path / "la.png")
    assert np.array_equal(_read(tmp_path / "la.png")[..., 0], np.where(alpha > 0, GREY, 255))
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert to_rgb(half).getpixel((0, 0)) == (127, 127, 127)


def test_palettes_with_and_without_transparency(tmp_path: Path) -> None:
    palette = Image.fromarray((GREY // 64).astype(np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 200, 210, 220])
    palette.putdata((GREY // 64).ravel().tolist())
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "t.png", transparency=1)
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [200, 210, 220]], np.uint8)
    assert np.array_equal(_read(tmp_path / "p.png"), colours[GREY // 64])
    colours[1] = 255
    assert np.array_equal(_read(tmp_path / "t.png"), colours[GREY // 64])


def test_bits_cmyk_and_ycbcr(tmp_path: Path) -> None:
    Image.fromarray(GREY > 100).save(tmp_path / "bits.png")
    assert np.array_equal(_read(tmp_path / "bits.png")[..., 0], np.where(GREY > 100, 255, 0))
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "cmyk.tif")
    assert np.abs(_read(tmp_path / "cmyk.tif").astype(int) - COLOUR).max() <= 2
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(_read(tmp_path / "cmyk.jpg").astype(int) - COLOUR).mean() < 5


@pytest.mark.parametrize("ending", [".gif", ".avif", ".jp2", ".webp", ".ppm", ".tga", ".bmp"])
def test_other_formats_and_first_frames(tmp_path: Path, ending: str) -> None:
    file, frames = tmp_path / f"a{ending}", [Image.fromarray(COLOUR)]
    more = {"save_all": True, "append_images": [Image.new("RGB", (48, 32), "red")]}
    kinds = {".gif": more, ".webp": more | {"lossless": True}, ".avif": {"quality": 95}}
    frames[0].save(file, **kinds.get(ending, {}))
    assert np.abs(_read(file).astype(int) - COLOUR).mean() < (
        8 if ending in (".gif", ".avif") else 1
    )


# -------------------------------------------------------------------------------------- orientation
@pytest.mark.parametrize("ending", [".jpg", ".png", ".tif", ".webp", ".l.tif", ".i16.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_as_a_viewer_shows_it(tmp_path: Path, ending: str, orientation: int) -> None:
    upright, file = drawn.picture(5, size=(48, 32)), tmp_path / f"a{ending}"
    if ending in (".l.tif", ".i16.tif"):  # such are mapped into memory
        upright = Image.fromarray(GREY if ending == ".l.tif" else GREY.astype(np.uint16) * 257)
    undo = {6: 8, 8: 6}.get(orientation, orientation)  # the stored pixels: turned the other way
    exif = Image.Exif()
    exif[0x0112] = undo
    stored = upright.copy()
    stored.getexif()[0x0112] = undo
    stored = ImageOps.exif_transpose(stored)
    exif[0x0112] = orientation
    if ending.endswith(".tif"):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[0x0112] = orientation
        stored.save(file, tiffinfo=tags)
    else:
        stored.save(file, exif=exif, quality=100, **{"lossless": True, "subsampling": 0})
    found = _read(file)
    assert found.shape == (32, 48, 3)
    right = np.asarray(to_rgb(upright))
    assert np.abs(found.astype(int) - right).mean() < (4 if ending == ".jpg" else 0.01)
    assert read_mask(file).shape == (32, 48)


def test_a_large_jpeg_is_read_small(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn.picture(2, size=(1200, 900)).save(tmp_path / "a.jpg", exif=exif)
    small = read_picture(tmp_path / "a.jpg", 200)
    assert picture_size(tmp_path / "a.jpg") == (900, 1200)
    assert small.height > small.width and 200 <= small.width < 450
    whole = read_picture(tmp_path / "a.jpg").resize(small.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(whole)).mean() < 2


def test_broken_exif_leaves_the_picture(tmp_path: Path) -> None:
    drawn.picture(3).save(tmp_path / "a.jpg", exif=b"Exif\0\0broken")
    assert _read(tmp_path / "a.jpg").shape == (32, 48, 3)


# -------------------------------------------------------------------------------- arrays and errors
def test_arrays(tmp_path: Path) -> None:
    for array in (GREY, GREY[..., None], GREY / 255, GREY.astype(np.uint16) * 257):
        assert np.array_equal(np.asarray(to_rgb(array))[..., 0], GREY)
    assert np.array_equal(np.asarray(to_rgb(COLOUR.astype(np.int64))), COLOUR)
    assert np.array_equal(np.asarray(to_rgb(GREY > 9))[..., 0], np.where(GREY > 9, 255, 0))
    for bad in (np.zeros((3, 4, 5)), np.zeros((0, 4)), np.zeros(4)):
        with pytest.raises(ValueError, match="array"):
            to_rgb(bad)
    with pytest.raises(ValueError, match="values from 7 to 7, not in 0 to 1"):
        to_rgb(np.full((4, 4), 7.0))


# 40 × 24 pixels, red in the upper left; written by pillow-heif, whose encoder is not needed here.
HEIC = (
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAXxtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAA"
    "AAAAAAAAACJpbG9jAAAAAERAAAEAAQAAAAABoAABAAAAAAAAAeYAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABo"
    "dmMxAAAAAA5waXRtAAAAAAABAAAA/GlwcnAAAADcaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEA"
    "GEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQApQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqrprm4CGgwIAAAAyAAAAD"
    "AIRiAAEABkQBwXPBiQAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAAChjbGFwAAAAKAAAAAEA"
    "AAAYAAAAAf///+gAAAAC////2AAAAAIAAAAQcGl4aQAAAAADCAgIAAAAGGlwbWEAAAAAAAAAAQABBYECAwWEAAAB7m1k"
    "YXQAAAHiKAGvBjII87gXgOo0Vg+c94o8WsPdXi26VGDMbiXvEQllE/Z3oPyM9YLXB5skVZ2jabd+Kv6cKtkcr/2UrHMy"
    "o+fBqAcqnN+pVmfSh+rmTfx7//W7Qk6eEOYlirkgT9XsAQH/+gahEIph1HVWqOa/hTEunPXzXQoor2IhPgnY4jm0EEnq"
    "ry/E2VN+/GoqyAiONe7W3qYnuObNJSS1bu2WUCoHliRaCj/pH/mmgKiU+8Z66q5BmPqZn/w9QGS20t8kDzLbINIIerPu"
    "8c5/mBczyeDCBX8drdqgU5SuuzsRXl/sZVegLFU4DzkE5Jt7wW4pb7aeyv4ARrPLubiZP/2hbmPxtJd/TNO7vK/GX6W8"
    "iiF9E58fW/up+iUoySFtjqNzch6maTtbfxH4LFmPtwnes+swJRaufF4yLzzxPml7QCFDqZT2suQkXGarWeM9PrlbqIpQ"
    "XSsT5aIH7uI3LIDqAR6Giy7oHHHWwPABgt855HauhYsal6rsldPGSy1DlO7c+rKpMGTrVqvYf6t5hxzeMfTp4tNhzQSw"
    "K/WiBFzOi1dJ9TgwjKKiNWA0ioQ50f+JLCYU7pU/0KEYE6+jLeZcHfkIdm+3N9oVvdJNRnbmqKnnRP2SynJsVskit1Qk"
    "gRYWAnc="
)


@pytest.mark.parametrize("name", ["photo.heic", "photo.HEIF", "sent.jpg"])
def test_what_phones_write_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(base64.b64decode(HEIC))
    image = read_picture(tmp_path / name)
    assert image.size == picture_size(tmp_path / name) == (40, 24) and image.mode == "RGB"
    assert image.getpixel((2, 2))[0] > 240 > 20 > max(image.getpixel((2, 2))[1:])
    assert pictures_in(tmp_path) == [tmp_path / name]


def test_errors_are_one_line_that_names_the_file(tmp_path: Path) -> None:
    drawn.picture(1).save(tmp_path / "half.jpg")
    half = (tmp_path / "half.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(half[: len(half) // 2])
    for name in ("text.png", "photo.heic", "none.tif"):
        (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / "none.tif").unlink()
    words = {"half.jpg": "corrupt picture or unknown kind .*put back a sound PNG or JPEG",
             "text.png": "corrupt picture", "photo.heic": "corrupt picture or unknown kind",
             "none.tif": "no such file"}  # fmt: skip
    for name, word in words.items():
        with pytest.raises(LCCoError, match=f"{name}: {word}") as caught:
            read_picture(tmp_path / name)
        assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------- masks
def test_masks_of_every_kind_are_grey(tmp_path: Path) -> None:
    truth = drawn.rectangle(value=255)
    kinds = {
        "l.png": truth, "bit.png": truth > 0, "i16.png": truth.astype(np.uint16) * 257,
        "f.tif": truth.astype(np.float32) / 255, "rgb.png": np.dstack([truth] * 3),
        "rgba.png": np.dstack([truth] * 3 + [np.full_like(truth, 255)]),
    }  # fmt: skip
    for name, values in kinds.items():
        Image.fromarray(values).save(tmp_path / name)
        found = read_mask(tmp_path / name)
        assert found.dtype == np.uint8 and np.array_equal(found, truth), name
    Image.fromarray(np.dstack([truth] * 3 + [truth])).save(tmp_path / "cut.png")
    palette = Image.fromarray((truth > 0).astype(np.uint8)).convert("P")
    palette.putpalette([255, 255, 255, 0, 0, 0])  # a dark object before a white that is hidden
    palette.save(tmp_path / "cut.gif", transparency=0)
    for name in ("cut.png", "cut.gif"):
        with pytest.raises(LCCoError, match=f"{name}: mask with transparency; save it as grey"):
            read_mask(tmp_path / name)
    for name in ("rgb.png", "high.png"):
        Image.fromarray(np.full((4, 4), 21, np.uint8)).save(tmp_path / "high.png")
        with pytest.raises(LCCoError, match=f"{name}: a mask of classes must hold class numbers"):
            read_labels(tmp_path / name, 20)
    assert read_labels(tmp_path / "high.png", 21).max() == 21


def test_a_squared_mask_has_no_value_that_it_had_not():
    """An average of background and void would be a value of neither."""
    mask = np.random.default_rng(0).choice(np.array([0, 1, 255], np.uint8), (37, 53))
    for crop in (None, (0.1, 0.2, 0.7, 0.9)):
        assert set(np.unique(mask_square(mask, 24, crop))) == {0, 1, 255}


def test_squares_move_mask_with_image() -> None:
    picture, mask = drawn.picture(0), drawn.rectangle()
    image, square = load_square(picture, 24), mask_square(mask, 24)
    assert image.shape == (24, 24, 3) and image.dtype == square.dtype == np.uint8
    assert np.array_equal(image, np.asarray(picture.resize((24, 24), Image.Resampling.BILINEAR)))
    assert set(np.unique(square)) == {0, 1}
    x0, y0, x1, y1 = (v / n for v, n in zip(drawn.BOX, (48, 32, 48, 32), strict=True))
    assert mask_square(mask, 16, (x0, y0, x1, y1)).all()  # cropped to the object itself
    assert not mask_square(mask, 16, (0, 0, x0, 1)).any()
    cut = np.asarray(picture.crop(drawn.BOX).resize((16, 16), Image.Resampling.BILINEAR))
    found = load_square(picture, 16, (x0, y0, x1, y1)).astype(int)
    assert np.abs(found - cut)[2:-2, 2:-2].max() <= 3  # the border blends with what is around


# ------------------------------------------------------------------------------------------ folders
def test_what_is_no_picture(tmp_path: Path) -> None:
    for name in ("b.jpg", "A.PNG", "._b.jpg", ".hidden.png", "Thumbs.db", "notes.txt"):
        drawn.picture(1).save(tmp_path / name, "PNG")
    for name in ("@eaDir", "__MACOSX", "p0.jpg", "more", ".trash"):
        (tmp_path / name).mkdir()
        drawn.picture(1).save(tmp_path / name / "c.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jpg")
    found, others = listing(tmp_path)
    assert [p.name for p in found] == ["A.PNG", "b.jpg"] and found == pictures_in(tmp_path)
    pipe = ["pipe.jpg"] if hasattr(os, "mkfifo") else []
    assert others == ["gone.png", "notes.txt", "p0.jpg", *pipe]
    with pytest.raises(LCCoError, match="nowhere: .*give a folder with pictures"):
        listing(tmp_path / "nowhere")
    assert is_system("@eaDir") and is_system("THUMBS.DB") and not is_system("eaDir")


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    mode=st.sampled_from(MODES),
    ending=st.sampled_from(["png", "tif", "jpg", "webp", "gif", "bmp", "jp2"]),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    orientation=st.integers(0, 9),
)  # fmt: skip
def test_any_mode_is_read_like_its_viewer_or_named(mode, ending, size, orientation) -> None:
    """What Pillow writes without loss comes back as the same colours; else one line."""
    picture = drawn.picture(sum(size), (0, 0, 1, 1), size)
    if mode in ("I;16", "I", "F"):
        scale = {"I;16": 257, "I": 257, "F": 1 / 255}[mode]
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        grey = np.asarray(picture.convert("L")).astype(kind) * kind(scale)
        grey.ravel()[0] = 255 * kind(scale)  # the full range of 16 bits
        stored = Image.fromarray(grey)
        right = (grey / scale).round().astype(np.uint8)
        right = np.repeat(right[..., None], 3, 2)
    else:
        stored = (picture.convert("P") if mode == "PA" else picture).convert(mode)
        right = np.asarray(stored.convert("RGB"))
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    try:
        more = {"exif": exif, "lossless": True} if ending in ("png", "tif", "webp", "jpg") else {}
        stored.save(
            file, {"tif": "TIFF", "jpg": "JPEG", "jp2": "JPEG2000"}.get(ending, ending), **more
        )
    except (OSError, ValueError, KeyError):
        return  # Pillow does not write it
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{ending}"
        path.write_bytes(file.getvalue())
        try:
            found = read_picture(path)
        except LCCoError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            return
        assert picture_size(path) == found.size
    turns = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
             5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 3),
             7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}  # fmt: skip
    right = turns.get(orientation if more else 1, lambda a: a)(right)
    assert found.size == right.shape[1::-1]
    if ending in ("png", "tif", "bmp") and mode not in ("CMYK", "YCbCr"):
        assert np.array_equal(np.asarray(found), right)
