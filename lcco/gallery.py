"""How results are shown: cut-outs, overlays, a contact sheet and a gallery page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from lcco.common import one_line
from lcco.data.pictures import read_picture

ON_SHEET = 120  # pictures on the contact sheet
# Colours that colour-blind eyes tell apart (Okabe and Ito).
TINTS = ((213, 94, 0), (0, 114, 178), (240, 228, 66), (204, 121, 167), (0, 158, 115))


def shape(grey: Image.Image, threshold: float) -> Image.Image:
    """The mask of 0 and 255 of probabilities in 0..255."""
    return grey.point(lambda v: 255 * (v > 255 * threshold))


def cut_out(
    picture: Image.Image, grey: Image.Image, threshold: float, background: str | Path | None = None
) -> Image.Image:
    """The object alone: RGBA, or before `white`, the blurred picture (`blur`), or a picture file.

    grey: probabilities in 0..255; the edge is soft within 0.1 of the threshold.
    """
    alpha = grey.point(lambda v: 127 + 5 * (v - 255 * threshold))
    ground = Image.new("RGB", picture.size, "white" if background == "white" else "black")
    if background is None:  # what is hidden holds no picture, and packs well
        out = Image.composite(picture, ground, alpha.point(lambda v: 255 * (v > 0)))
        out.putalpha(alpha)
        return out
    if background == "blur":
        small = ImageOps.contain(picture, (320, 320)).filter(ImageFilter.GaussianBlur(8))
        ground = small.resize(picture.size)
    elif background != "white":
        ground = ImageOps.fit(read_picture(background), picture.size)
    return Image.composite(picture, ground, alpha)


def overlay(picture: Image.Image, shape: Image.Image) -> Image.Image:
    """The picture greyed outside the object; the object tinted, its outline white in, black out."""
    mask = np.asarray(shape) > 0
    grey = picture.convert("L").point(lambda v: 64 + 0.45 * v)
    own = np.asarray(picture)[mask].mean(0) if mask.any() else np.zeros(3)
    around = np.asarray(grey)[~mask].mean() if not mask.all() else 0

    def seen(tint: tuple[int, int, int]) -> float:  # how far it is from both
        mixed = 0.55 * own + 0.45 * np.array(tint)
        return min(np.abs(mixed - own).max(), np.abs(mixed - around).max(), np.ptp(mixed))

    tint = Image.new("RGB", picture.size, max(TINTS, key=seen))
    out = Image.composite(Image.blend(picture, tint, 0.45), grey.convert("RGB"), shape)
    near = shape.filter(ImageFilter.BoxBlur(max(1, round(max(picture.size) / 400))))
    return Image.composite(shape.convert("RGB"), out, near.point(lambda v: 255 * (0 < v < 255)))


def contact_sheet(
    pairs: Sequence[tuple[Image.Image, Image.Image]], labels: Sequence[tuple[str, str]], title: str
) -> Image.Image:
    """Each picture over its overlay; below it a name, cut in the middle where long, and a note."""
    import matplotlib

    font = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    large, small = ImageFont.truetype(font, 17), ImageFont.truetype(font, 13)
    columns, box = (4, (320, 240)) if len(pairs) <= 12 else (8, (200, 150))
    columns, w, h = min(columns, len(pairs)), box[0] + 12, 2 * box[1] + 40
    size = max(columns * w + 12, 500), -(-len(pairs) // columns) * h + 44
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((12, 12), title, "black", large)
    for n, (pair, (name, note)) in enumerate(zip(pairs, labels, strict=True)):
        x, y = n % columns * w + 12, n // columns * h + 44
        for k, image in enumerate(pair):
            thumb = ImageOps.contain(image, box)
            at = x + (box[0] - thumb.width) // 2, y + (box[1] - thumb.height) // 2
            sheet.paste(thumb, (at[0], at[1] + k * (box[1] + 4)))
        name = one_line(name)
        while draw.textlength(f"{name} {note}", small) > box[0] and len(name) > 4:
            name = f"{name[: len(name) // 2 - 1]}…{name[len(name) // 2 + 2 :]}"
        at = x + box[0] / 2, y + 2 * box[1] + 8
        draw.text(at, f"{name} {note}", "black", small, anchor="ma")
    return sheet


def page(record: dict[str, Any], title: str, kinds: Sequence[str]) -> str:
    """The gallery as HTML. record: result.json; its entries' `kinds` are files beside the page."""
    import jinja2

    template = Path(__file__).with_name("gallery.html.jinja").read_text(encoding="utf-8")
    images = [i | {k: quote(i[k]) for k in kinds if k in i} for i in record["images"]]
    html = jinja2.Environment(autoescape=True).from_string(template)
    return html.render(title=title, images=images)
