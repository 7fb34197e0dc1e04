"""The one decoder of pictures, for training, scoring, embedding, hashing and co-segmentation."""

import contextlib
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pi_heif import register_heif_opener
from PIL import Image, ImageOps

from lcco.common import VOID, LCCoError, one_line

LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")  # masks in such files are binary only nearly
ENDINGS = frozenset({*LOSSY, ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".heic",
                     ".heif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"})  # fmt: skip
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as shares of width and height

_SYSTEM = {"@eadir", "@tmp", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "lost+found",
           "system volume information", "thumbs.db", "desktop.ini"}  # fmt: skip


def bad(file: Path | str | None, what: str, mend: str) -> LCCoError:
    """The one line about a file that cannot be used."""
    return LCCoError(f"{file}: {what}; {mend}")


def same_name(name: str) -> str:
    """A file name in the one spelling (NFC) by which names are compared: disks differ in theirs."""
    return unicodedata.normalize("NFC", name)


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden or a system's own (`@eaDir`, `__MACOSX`, `Thumbs.db`)."""
    return name.startswith(".") or name.casefold() in _SYSTEM


def listing(folder: Path) -> tuple[list[Path], list[str]]:
    """The pictures of a folder by name; and its other files. Raises: LCCoError if unreadable."""
    try:
        entries = sorted(folder.iterdir(), key=lambda e: (e.name.casefold(), e.name))
    except OSError as error:
        raise bad(folder, str(error.strerror), "give a folder with pictures") from None
    named = {e: e.suffix.lower() in ENDINGS for e in entries if not is_system(e.name)}
    found = {e: e for e, picture in named.items() if picture and e.is_file()}
    return [*found], [e.name for e in named if e not in found and (named[e] or not e.is_dir())]


def pictures_in(folder: Path | str) -> list[Path]:
    """The pictures of a folder by name. Raises: LCCoError for one that cannot be read."""
    return listing(Path(folder).expanduser())[0]


@contextlib.contextmanager
def _opened(path: Path | str) -> Iterator[Image.Image]:
    """A picture file; whatever a decoder raises becomes one line."""
    register_heif_opener()  # for what phones write
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            yield image
    except Exception as error:
        told = one_line(error).split("<")[0].strip()[:80] or type(error).__name__
        what = getattr(error, "strerror", None) or f"corrupt picture or unknown kind ({told})"
        raise bad(path, what.lower(), "put back a sound PNG or JPEG") from None


def _decoded(path: Path | str, side: int | None = None) -> Image.Image:
    """The first frame, upright, of 8 bits a channel. side: as of `read_picture`."""
    with _opened(path) as image:
        if side:
            image.draft(None, (side, side))  # JPEG decodes at 1/2, 1/4 or 1/8
        image.load()  # Pillow turns a TIFF here and takes its tag away
        with contextlib.suppress(Exception):  # broken EXIF says nothing; the picture is whole
            ImageOps.exif_transpose(image, in_place=True)
        return _eight_bits(image) if image.mode[0] in "FI" else image.copy()


def read_picture(path: Path | str, side: int | None = None) -> Image.Image:
    """A picture file as RGB uint8, as a viewer shows it: upright, transparent parts white.

    Of an animation the first frame. side: the shorter side may shrink by whole factors down to
    this many pixels, which is fast. Raises: LCCoError.
    """
    image = to_rgb(_decoded(path, side))
    return image.reduce(max(1, min(image.size) // side)) if side else image


def picture_size(path: Path | str) -> tuple[int, int]:
    """(width, height) of what `read_picture` gives, from the header where that tells."""
    with _opened(path) as image:
        if image.format == "TIFF":
            image.load()  # turns it, and takes its tag away
        with contextlib.suppress(Exception):  # broken EXIF
            if image.getexif().get(0x0112) in (5, 6, 7, 8):
                return image.size[::-1]
        return image.size


def to_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """An image or array ([H, W], or [H, W, 1, 3 or 4]) as RGB uint8, transparent parts white.

    Floats are in 0..1; integers fill the least of 8, 10, 12, 14 or 16 bits that holds them.
    Raises: ValueError for an array of another shape, or for other values.
    """
    if isinstance(image, np.ndarray):
        if not image.size or image.ndim < 2 or image.shape[2:] not in ((), (1,), (3,), (4,)):
            raise ValueError(f"an array of shape {list(image.shape)}; it must be [H, W, 1, 3 or 4]")
        image = _eight_bits(image[..., 0] if image.shape[2:] == (1,) else image)
    elif not isinstance(image, Image.Image):
        raise ValueError(f"a {type(image).__name__}; give paths, PIL images or arrays")
    elif image.mode[0] in "FI":
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: np.ndarray | Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.dtype != np.uint8:
        tops = (1,) if values.dtype.kind in "fb" else (255, 1023, 4095, 16_383, 65_535)
        low, high = values.min(), values.max()
        top = next((top for top in tops if low >= 0 and high <= top), None)
        if top is None:
            raise ValueError(f"values from {low:g} to {high:g}, not in 0 to {tops[-1]}")
        values = np.round(values.astype(np.float32) * (255 / top)).astype(np.uint8)
    return Image.fromarray(values)


def read_mask(path: Path | str) -> np.ndarray:
    """A mask file as grey uint8 [H, W], upright. Raises: LCCoError, also for a cut-out (alpha)."""
    image = _decoded(path)
    if image.has_transparency_data:
        if np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
            raise bad(path, "mask with transparency", "save it as grey, object 255, rest 0")
        image = to_rgb(image)
    return np.asarray(image.convert("L"))


def read_labels(path: Path | str, last: int) -> np.ndarray:
    """A mask of class numbers to `last`, or 255, uint8 [H, W]. Raises: LCCoError for others."""
    image = _decoded(path)
    labels = np.asarray(image)
    if image.mode not in ("P", "L") or ((labels > last) & (labels < VOID)).any():
        what = f"a mask of classes must hold class numbers of 0 to {last}, or {VOID}"
        raise bad(path, what, "save it as a palette or grey PNG")
    return labels


def load_square(picture: Image.Image, size: int, crop: Box | None = None,
                how: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:  # fmt: skip
    """uint8 [size, size, 3]: a picture, or a crop of it, squashed (bilinear, antialiased)."""
    box = [s * n for s, n in zip(crop or (0, 0, 1, 1), picture.size * 2, strict=True)]
    return np.array(picture.resize((size, size), how, tuple(box)))


def mask_square(mask: np.ndarray, size: int, crop: Box | None = None) -> np.ndarray:
    """uint8 [size, size] of {0, 1, 255}: the mask that goes with `load_square`, nearest pixel."""
    return load_square(Image.fromarray(mask), size, crop, Image.Resampling.NEAREST)
