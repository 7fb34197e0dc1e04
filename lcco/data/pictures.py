"""The one decoder of pictures, for training, scoring, embedding, hashing and co-segmentation."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image

from lcco.common import LCCoError, one_line

LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")
ENDINGS = frozenset({
    *LOSSY, ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".heic", ".heif", ".jp2",
    ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
})  # fmt: skip
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as shares of width and height

_SYSTEM = {
    "@eadir", "@tmp", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "lost+found",
    "system volume information", "thumbs.db", "desktop.ini",
}  # fmt: skip
_ORIENTATION = 0x0112
_TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
), 2))  # fmt: skip


def bad(file: Path | str | None, what: str, mend: str) -> LCCoError:
    """The one line about a file that cannot be used."""
    return LCCoError(f"{file}: {what}; {mend}")


def is_lossy(path: Path) -> bool:
    """Whether a file is a JPEG: masks in it are binary only nearly."""
    return path.suffix.lower() in LOSSY


def same_name(name: str) -> str:
    """A file name in the one spelling (NFC) by which names are compared: disks differ in theirs."""
    return unicodedata.normalize("NFC", name)


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden or a system's own (`@eaDir`, `__MACOSX`, `Thumbs.db`)."""
    return name.startswith(".") or name.casefold() in _SYSTEM


def listing(folder: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """The pictures of a folder by name, and by reason the names of what else is in it.

    Hidden and system files are in neither; nor are folders, unless named like a picture.
    Raises: LCCoError for a folder that is missing or cannot be read.
    """
    try:
        entries = sorted(folder.iterdir(), key=lambda e: (e.name.casefold(), e.name))
    except OSError as error:
        raise bad(folder, str(error.strerror), "give a folder with pictures") from None
    found, others = [], {}
    for entry in entries:
        picture = entry.suffix.lower() in ENDINGS
        if is_system(entry.name) or (entry.is_dir() and not picture):
            continue
        if picture and entry.is_file():
            found.append(entry)
        else:
            why = "no picture's ending" if entry.is_file() else "no file (a folder, link or pipe)"
            others.setdefault(why, []).append(entry.name)
    return found, others


def pictures_in(folder: Path | str) -> list[Path]:
    """The pictures of a folder by name. Raises: LCCoError for one that cannot be read."""
    return listing(Path(folder).expanduser())[0]


def _why(path: Path | str, error: Exception) -> LCCoError:
    if isinstance(error, OSError) and error.strerror:
        return bad(path, error.strerror.lower(), "put it back or take its image out of the set")
    if isinstance(error, Image.UnidentifiedImageError) and Path(path).suffix[:3].lower() == ".he":
        return bad(path, "HEIC is not supported", "export it as JPEG")
    text = one_line(error).split("'/")[0].split("<")[0].strip()[:80] or type(error).__name__
    return bad(path, f"corrupt picture ({text})", "replace the file")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF says nothing; the picture itself is whole
        return 1


def _decoded(path: Path, side: int | None = None) -> Image.Image:
    """The first frame as stored, upright. side: as of `read_picture`."""
    try:  # given a path, Pillow 13 maps some turned TIFFs (grey, 16 bit) with sides swapped
        with open(path, "rb") as file, Image.open(file) as image:
            if side:
                image.draft(None, (side, side))  # JPEG decodes at 1/2, 1/4 or 1/8
            image.load()  # Pillow turns a TIFF here and takes its tag away: ask for it afterwards
            turn = _TURNS.get(_orientation(image))
            return image.copy() if turn is None else image.transpose(turn)
    except Exception as error:  # decoders raise many kinds of errors on damaged files
        raise _why(path, error) from None


def read_picture(path: Path | str, side: int | None = None) -> Image.Image:
    """A picture file as RGB uint8, as a viewer shows it: upright, transparent parts white.

    Of an animation the first frame; 16 bit and float as `to_rgb` says. side: the shorter side may
    shrink by whole factors down to this many pixels, which makes large files cheap.
    Raises: LCCoError naming a file that is missing or does not decode.
    """
    try:
        image = to_rgb(_decoded(path, side))
    except (ValueError, OSError) as error:
        raise bad(path, str(error), "save it as 8-bit RGB") from None
    factor = min(image.size) // side if side else 1
    return image.reduce(factor) if factor > 1 else image


def picture_size(path: Path | str) -> tuple[int, int]:
    """(width, height) of what `read_picture` gives, from the header."""
    try:
        with Image.open(path) as image:
            size = image.size
            if image.format == "TIFF":  # its `size` is turned or not, by Pillow's version
                size = image.tag_v2[256], image.tag_v2[257]
            return size[::-1] if _orientation(image) in (5, 6, 7, 8) else size
    except Exception as error:
        raise _why(path, error) from None


def to_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """An image or array ([H, W], or [H, W, 1, 3 or 4]) as RGB uint8, transparent parts white.

    Values of more than 8 bits are scaled from the range that `_range` finds.
    Raises: ValueError for an array of another shape, or of floats outside 0..1.
    """
    if isinstance(image, np.ndarray):
        values = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
        fits = values.size and values.ndim >= 2 and values.shape[2:] in ((), (3,), (4,))
        if fits and values.dtype.kind == "f":
            fits = np.nanmin(values) >= 0 and np.nanmax(values) <= 1
        if not fits:
            what = f"an array of shape {list(image.shape)} and kind {image.dtype} is no picture"
            raise ValueError(f"{what}; it must be [H, W] or [H, W, 3 or 4], floats in 0..1")
        image = Image.fromarray(_eight_bits(values))
    if image.mode[0] in "FI":
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """uint8 of values of any kind and range."""
    if values.dtype in (np.uint8, bool):
        return values if values.dtype == np.uint8 else values.astype(np.uint8) * 255
    low, high = _range(values)
    values = np.nan_to_num(values.astype(np.float32), nan=low, posinf=high, neginf=low)
    scaled = (np.clip(values, low, high) - low) * (255 / max(high - low, 1e-12))
    return np.round(scaled).astype(np.uint8)


def _range(values: np.ndarray) -> tuple[float, float]:
    """What becomes black and what white.

    Of integers from 0 on: the least of 8, 10, 12, 14, 16 bits that holds them. Else the range of
    the distinct finite values, without the lowest or highest 0.1% of them where those take more
    room than all the rest (fill values such as -9999, stray highlights). Inside 0..1: 0..1.
    """
    if values.dtype.kind in "iu" and values.min() >= 0:
        top = int(values.max())
        return 0.0, float(next((2**b - 1 for b in (8, 10, 12, 14, 16) if top < 2**b), top))
    found = np.unique(values[np.isfinite(values)]).astype(np.float64)
    low, high = (found[0], found[-1]) if len(found) else (0.0, 1.0)
    trim = -(-len(found) // 1000)
    if len(found) > 3 * trim:
        a, b = found[trim], found[-1 - trim]
        low, high = a if a - low > b - a else low, b if high - b > b - a else high
    return (0.0, 1.0) if low >= 0 and high <= 1 else (float(low), float(high))


def read_mask(path: Path | str) -> np.ndarray:
    """A mask file as grey uint8 [H, W], upright.

    Raises: LCCoError for a file that does not decode, or a cut-out, whose alpha hides the object.
    """
    image = _decoded(path)
    if image.mode in ("LA", "RGBA", "PA", "La", "RGBa"):
        if np.asarray(image)[..., -1].min(initial=255) < 255:
            raise bad(path, "mask with transparency", "save it as grey, object 255, rest 0")
        image = to_rgb(image)
    return _eight_bits(np.asarray(image if image.mode[0] in "FI" else image.convert("L")))


def read_labels(path: Path | str) -> np.ndarray:
    """A mask of class numbers (palette or grey), uint8 [H, W]. Raises: LCCoError for colours."""
    image = _decoded(path)
    if image.mode not in ("P", "L"):
        what = f"a VOC mask must hold class numbers, not {image.mode} colours"
        raise bad(path, what, "save it as a palette or grey PNG")
    return np.asarray(image)


def _square(image: Image.Image, size: int, crop: Box | None, how: Image.Resampling) -> np.ndarray:
    box = [s * n for s, n in zip(crop or (0, 0, 1, 1), image.size * 2, strict=True)]
    return np.array(image.resize((size, size), how, tuple(box)))


def load_square(picture: Image.Image, size: int, crop: Box | None = None) -> np.ndarray:
    """uint8 [size, size, 3]: a picture, or a crop of it, squashed (bilinear, antialiased)."""
    return _square(picture, size, crop, Image.Resampling.BILINEAR)


def mask_square(mask: np.ndarray, size: int, crop: Box | None = None) -> np.ndarray:
    """uint8 [size, size] of {0, 1, 255}: the mask that goes with `load_square`, nearest pixel."""
    return _square(Image.fromarray(mask), size, crop, Image.Resampling.NEAREST)
