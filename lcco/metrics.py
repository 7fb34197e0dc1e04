"""Pixel accuracy P, foreground IoU J, and the five named protocols under which they are reported.

The same masks score differently under each. All shares are in 0..1; tables print per cent.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from lcco.common import VOID, LCCoError, digest

Empty = Literal["zero", "one", "skip"]
Groups = list[tuple[list[int], int]]  # the members of each, and how many of them, first, are scored


@dataclass(frozen=True)
class Counts:
    """What one mask says about one image, in pixels; P, J and every average follow from it."""

    inter: int  # predicted and true
    union: int  # predicted or true
    correct: int
    pixels: int  # counted, i.e. all but ignored void
    predicted: int
    truth: int

    @property
    def accuracy(self) -> float | None:
        """P: correct over counted pixels; None when void covers the image."""
        return self.correct / self.pixels if self.pixels else None

    def jaccard(self, empty: Empty = "zero") -> float | None:
        """J: intersection over union. Of an empty truth 0, 1 if nothing is predicted, or None."""
        if self.truth:
            return self.inter / self.union
        return {"zero": 0.0, "one": float(not self.predicted), "skip": None}[empty]


def count(pred: np.ndarray, truth: np.ndarray) -> Counts:
    """Compare a boolean mask with a truth of 0, 1 and 255 (void: ignored).

    Both are [H, W]. Raises: ValueError where their sizes differ.
    """
    pred, on = np.asarray(pred, bool), np.asarray(truth) == 1
    if pred.shape != on.shape:
        raise ValueError(f"mask {pred.shape} and truth {on.shape} differ in size")
    counted = np.asarray(truth) != VOID
    pred = pred & counted
    masks = (pred & on, pred | on, counted, pred, on)
    inter, union, pixels, predicted, real = (int(np.count_nonzero(m)) for m in masks)
    return Counts(inter, union, pixels - union + inter, pixels, predicted, real)


def resize_map(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map [h, w] brought to `size` (H, W) bilinearly, antialiased where it shrinks."""
    if tuple(values.shape) == tuple(size):
        return values
    tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32))[None, None]
    resized = torch.nn.functional.interpolate(tensor, size, mode="bilinear", antialias=True)
    # Rounding must not leave the range: a flat map stays flat, under adaptive thresholds too.
    return resized[0, 0].clamp(tensor.min(), tensor.max()).numpy()


def consecutive_groups(indices: Sequence[int], n: int, repeat: bool = True) -> Groups:
    """Cut a class into groups of n.

    The remainder r is completed with the first n − r of the class, which are not scored again. In a
    class of fewer than n this repeats pictures, as the peers' code does, unless not `repeat`.
    """
    indices, r = list(indices), len(indices) % n
    groups = [(indices[k : k + n], n) for k in range(0, len(indices) - r, n)]
    rest = indices[len(indices) - r :]
    first = [i for i in indices[: n - r] if repeat or i not in rest]
    return [*groups, (rest + first, r)] if r else groups


def shuffled(indices: Sequence[int], seed: int, label: str) -> list[int]:
    """The indices in an order that depends on the seed and the label (a class) alone."""
    rng = np.random.default_rng([seed, int(digest(label, 8), 16)])
    return [indices[k] for k in rng.permutation(len(indices))]


@dataclass(frozen=True)
class Protocol:
    """How maps become scores: size, threshold, void, empty truth, groups and averages."""

    name: str
    size: int | None  # masks are compared at size × size, aspect ignored; None = each image's own
    threshold: float  # of the object, strictly above; `adaptive`: the cap of mean + std of the map
    adaptive: bool
    ignore_void: bool  # False: void is background
    empty: Empty  # J of an image without the object: 0, 1 if nothing is predicted, or left out
    grouping: Literal["consecutive", "class", "seeded"]
    average: Literal["image", "class", "pooled"]  # of the headline P and J

    def groups(self, indices: Sequence[int], n: int, seed: int, label: str) -> Groups:
        """The groups of one class, its images sorted by name."""
        if self.grouping == "class":
            return [(list(indices), len(indices))]
        if self.grouping == "seeded":
            return consecutive_groups(shuffled(indices, seed, label), n, repeat=False)
        return consecutive_groups(indices, n)

    def truth(self, mask: np.ndarray, grey: np.ndarray | None = None) -> np.ndarray:
        """A truth [H, W] of 0, 1, 255 at this protocol's size, with 255 where void is ignored.

        It is squashed as the peers' code does: PIL's bilinear on 8-bit grey, > 0.5. grey: the truth
        before its threshold, where its file is lossy (`CoSegData.grey_truth`).
        """
        if not self.size:
            return mask if self.ignore_void else np.where(mask == VOID, 0, mask)
        levels = np.where(mask == 1, 255, 0) if grey is None else grey
        image = Image.fromarray(levels.astype(np.uint8))
        small = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return (np.asarray(small) > 127).astype(np.uint8)

    def binarise(self, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The boolean mask of a map [h, w] in 0..1, at the size `shape` of the prepared truth."""
        values, cap = resize_map(np.asarray(values, np.float32), shape), self.threshold
        exact = values.astype(np.float64)
        return values > (min(float(exact.mean() + exact.std()), cap) if self.adaptive else cap)

    def row(self, key: str, label: str, counts: Counts) -> dict[str, Any]:
        """One image's scores and counts; `predicted` as a share of the counted pixels."""
        return asdict(counts) | {
            "key": key, "class": label, "P": counts.accuracy, "J": counts.jaccard(self.empty),
            "empty": not counts.truth, "predicted": counts.predicted / max(counts.pixels, 1),
        }  # fmt: skip

    def summarise(self, rows: Sequence[dict[str, Any]]) -> dict[str, float | int | None]:
        """All averages of the rows; `P` and `J` are this protocol's own. None: no image counts.

        `_image`: mean over images; `_class`: over classes, of their image means; `_pooled`: over
        classes, of their pooled pixels; `J_nonempty`: over images with the object. Of those without
        (`empty`): `false_alarms`, the share with more than 1% predicted, and mean `empty_area`.
        """
        classes: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            classes.setdefault(row["class"], []).append(row)
        lacking = [r["predicted"] for r in rows if r["empty"]]
        out: dict[str, float | int | None] = {}
        for m, part, whole in (("P", "correct", "pixels"), ("J", "inter", "union")):
            out[f"{m}_image"] = _mean(r[m] for r in rows)
            out[f"{m}_class"] = _mean(_mean(r[m] for r in c) for c in classes.values())
            sums = [(sum(r[part] for r in c), sum(r[whole] for r in c)) for c in classes.values()]
            out[f"{m}_pooled"] = _mean(i / u if u else None for i, u in sums)
            out[m] = out[f"{m}_{self.average}"]
        return out | {
            "J_nonempty": _mean(r["J"] for r in rows if not r["empty"]),
            "false_alarms": _mean(float(share > 0.01) for share in lacking),
            "empty_area": _mean(lacking), "empty": len(lacking),
            "images": len(rows), "classes": len(classes)}  # fmt: skip


def _mean(values: Iterable[float | None]) -> float | None:
    kept = [v for v in values if v is not None]
    return float(np.mean(kept)) if kept else None


PROTOCOLS = {p.name: p for p in (
    Protocol("ssnm", 224, 0.8, True, False, "zero", "consecutive", "image"),
    Protocol("ufo", 224, 0.5, True, False, "zero", "consecutive", "image"),
    Protocol("segswap", None, 0.5, False, False, "skip", "class", "class"),
    Protocol("pooled", 321, 0.5, False, False, "zero", "class", "pooled"),
    # only "one" tells a right answer from a false alarm
    Protocol("native", None, 0.5, False, True, "one", "seeded", "image"))}  # fmt: skip


def get_protocol(name: str) -> Protocol:
    """The protocol of that name. Raises: LCCoError naming the protocols there are."""
    if name not in PROTOCOLS:
        raise LCCoError(f"no protocol `{name}`; there are: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
