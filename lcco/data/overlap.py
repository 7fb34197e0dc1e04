"""Which pictures are the same, by what they look like."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

LOOKS = "looks-2"  # names every file that hashes decide: change it with what follows here
NEAR = 12  # bits of 128: pictures this close are one picture, if their thumbnails agree too
FLAT = 2  # grey levels: a smaller difference of two cells is noise, or a plain ground
CELLS = 24  # a side of the thumbnail


def picture_hash(image: Image.Image) -> str:
    """What a picture looks like: a grey thumbnail and a 128-bit difference hash, in hex.

    Copies differ in few bits (`NEAR`), others in half of them; on plain ground the thumbnail tells.
    """
    grey = image.convert("L")
    rows = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
    columns = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), np.int16)
    steps = np.diff(rows, axis=1).ravel(), np.diff(columns, axis=0).ravel()
    small = grey.resize((CELLS, CELLS), Image.Resampling.HAMMING)
    return small.tobytes().hex() + np.packbits(np.concatenate(steps) > FLAT).tobytes().hex()


def _looks(hashes: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bits [n, 2], thumbnails [n, cells] of mean 0 and variance 1, variances and tolerances [n].

    Thumbnails of copies are apart by 0.002 of their variance, of busy ones by 0.04, of two objects
    on a plain ground by 0.005: the tolerance grows with the share of cells with detail.
    """
    raw = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, CELLS**2 + 16)
    cells = raw[:, :-16].astype(np.float32)
    padded = np.pad(cells.reshape(-1, CELLS, CELLS), ((0, 0), (1, 1), (1, 1)), "edge")
    around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    detail = np.abs(cells - around.reshape(cells.shape) / 4)
    share = detail.sum(1) ** 2 / (detail**2).sum(1).clip(1e-6) / CELLS**2
    cells -= cells.mean(1, keepdims=True)
    cells /= cells.std(1, keepdims=True).clip(3 * FLAT)  # noise must not become a look
    return raw[:, -16:].copy().view(np.uint64), cells, (cells**2).mean(1), 0.0025 + 0.2 * share**2


def near_pairs(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """Index pairs of hashes that differ in few bits, and whose thumbnails agree."""
    found, right = [], _looks(b)
    for n, (bits, cells, variance, tolerance) in enumerate(zip(*_looks(a), strict=True)):
        m = np.flatnonzero(np.bitwise_count(right[0] ^ bits).sum(1) <= NEAR)
        apart = (right[2][m] + variance) / 2 - right[1][m] @ cells / CELLS**2
        found += [(n, int(k)) for k in m[apart <= np.minimum(right[3][m], tolerance)]]
    return found
