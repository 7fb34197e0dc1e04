"""Eq. 9–12: what the network is trained with.

Everywhere: logits and truth are [B, N, H, W], truth of {0, 1, 255 = void}; present is [B, N], false
for padding. A loss is the mean over the present images (Eq. 12: over groups), as a scalar.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lcco.common import VOID
from lcco.model import Output


def soft_iou(p: Tensor, g: Tensor, valid: Tensor, eps: float = 1.0) -> Tensor:
    """The IoU loss η of a mask, in 0..1. Source: Su et al. 2023, which the paper cites for η.

    p: [..., H, W] probabilities; g: truth in 0..1; valid: weight of each pixel, 0 = void. With ε
    (in pixels) the loss of an empty truth grows with the predicted area. Returns [...].
    """
    p = p * valid
    both, p, g = (x.sum(dim=(-2, -1)) for x in (p * g, p, g * valid))
    # η = 1 − (Σpg + ε) / (Σp + Σg − Σpg + ε)
    return 1 - (both + eps) / (p + g - both + eps)


def _mean(per_image: Tensor, present: Tensor) -> Tensor:
    return (per_image * present).sum() / present.sum().clamp(min=1)


def _object_and_valid(truth: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    return (truth == 1).to(like), (truth != VOID).to(like)


def iou_loss(logits: Tensor, truth: Tensor, present: Tensor) -> Tensor:
    """Mean IoU loss of the masks. Paper: Eq. (10)."""
    # L_iou = (1/N) Σ_i η(M̂_i, M_i^gt)
    return _mean(soft_iou(logits.sigmoid(), *_object_and_valid(truth, logits)), present)


def coarse_loss(coarse: Tensor, truth: Tensor, present: Tensor) -> Tensor:
    """Mean IoU loss of the coarse masks against the area-averaged truth. Paper: Eq. (11).

    coarse: [B, N, h, w] logits. A cell's truth is the mean of its valid pixels, and its weight
    their share, so void counts for nothing. ε is scaled to the smaller map.
    """
    size = coarse.shape[-2:]
    g, valid = (F.adaptive_avg_pool2d(x, size) for x in _object_and_valid(truth, coarse))
    g = g / valid.clamp(min=torch.finfo(valid.dtype).tiny)  # [B, N, h, w]
    eps = coarse[0, 0].numel() / truth[0, 0].numel()
    # L_cs = (1/N) Σ_i η(M̂_i^c, M_i↓^gt)
    return _mean(soft_iou(coarse.sigmoid(), g, valid, eps), present)


def true_class(masked_embeddings: Tensor, prompt_embeddings: Tensor, present: Tensor) -> Tensor:
    """The index of v^gt's one [B]: the prompt nearest to the set's objects; −1 = no object shown.

    masked_embeddings: [B, N, D] of the images outside whose true mask everything was zeroed (zero
    where the truth is empty); prompt_embeddings: [P, D]; both unit-norm.
    """
    similarity = masked_embeddings @ prompt_embeddings.T * present[..., None]  # [B, N, P]
    shown = (masked_embeddings != 0).any(dim=-1) & present  # [B, N]
    return similarity.sum(dim=1).argmax(dim=-1).where(shown.any(dim=-1), -1)


def classification_loss(class_logits: Tensor, true: Tensor, reduction: str = "mean") -> Tensor:
    """Binary cross-entropy between v and the one-hot true class. Paper: Eq. (12), sign mended.

    class_logits: [B, P], v before its softmax; true: [B] indices.
    Deviation (`lc_reduction: sum`): leaves out 1/P, which makes the term tiny for many words.
    """
    B, P = class_logits.shape
    target = F.one_hot(true, P).to(class_logits)  # [B, P]
    # log Σ_{q≠p} exp(l_q): then v_p = sigmoid(l_p − others_p), whose log and log(1 − v_p) keep
    # their gradients where the softmax is 1 to the last bit
    own = torch.eye(P, dtype=torch.bool, device=class_logits.device)
    others = class_logits[:, None].expand(B, P, P)  # [B, P, P]
    others = others.masked_fill(own, torch.finfo(class_logits.dtype).min).logsumexp(-1)  # [B, P]
    # L_c = −(1/P) Σ_p [v_p^gt log v_p + (1 − v_p^gt) log(1 − v_p)]
    terms = F.binary_cross_entropy_with_logits(class_logits - others, target, reduction="none")
    return (terms.mean(dim=-1) if reduction == "mean" else terms.sum(dim=-1)).mean()


def bce_loss(logits: Tensor, truth: Tensor, present: Tensor) -> Tensor:
    """Binary cross-entropy over an image's valid pixels. Deviation (`bce`): not in the paper."""
    g, valid = _object_and_valid(truth, logits)
    terms = F.binary_cross_entropy_with_logits(logits, g, reduction="none") * valid
    return _mean(terms.sum(dim=(-2, -1)) / valid.sum(dim=(-2, -1)).clamp(min=1), present)


def total_loss(output: Output, truth: Tensor, present: Tensor, true: Tensor | None = None, *,
               lambda_cs: float = 1.0, lambda_c: float = 1.0, lc_reduction: str = "mean",
               bce: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The training loss and its parts, {"iou", "cs", "c", "bce"} as far as used. Paper: Eq. (9).

    output: of `LCCo`, whose half-precision logits become float here; true: [B] from `true_class`,
    −1 = unknown (left out of L_c). A term whose module is off, or whose λ is 0, is left out.
    """
    logits, coarse = output.logits, output.coarse
    logits = logits.to(wide := torch.promote_types(logits.dtype, torch.float32))
    coarse = None if coarse is None else coarse.to(wide)
    parts = {"iou": iou_loss(logits, truth, present)}
    if coarse is not None and lambda_cs:
        parts["cs"] = coarse_loss(coarse, truth, present)
    known = None if true is None else true >= 0
    if output.class_logits is not None and lambda_c and known is not None and known.any():
        parts["c"] = classification_loss(output.class_logits[known], true[known], lc_reduction)
    if bce:
        parts["bce"] = bce_loss(logits, truth, present)
    weights = {"iou": 1.0, "cs": lambda_cs, "c": lambda_c, "bce": bce}
    # L = L_iou + λ1·L_cs + λ2·L_c
    return sum(weights[name] * part for name, part in parts.items()), parts
