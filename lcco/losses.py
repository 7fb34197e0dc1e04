"""Eq. 9–12: what the network is trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lcco.model import Output

VOID = 255  # pixels of the truth that count for nothing


def soft_iou(p: Tensor, g: Tensor, valid: Tensor | None = None, eps: float = 1.0) -> Tensor:
    """The IoU loss η of one mask: 1 − (Σpg + ε) / (Σp + Σg − Σpg + ε).

    p: [..., H, W] probabilities; g: [..., H, W] truth in 0..1; valid: [..., H, W], false = void. Returns [...] in 0..1.
    ε (in pixels) keeps an empty truth finite: the loss is then 0 for an empty prediction and grows with its area.
    Source: Su et al. 2023, which the paper cites for η.
    """
    if valid is not None:
        p, g = p * valid, g * valid
    both = (p * g).sum(dim=(-2, -1))
    return 1 - (both + eps) / (p.sum(dim=(-2, -1)) + g.sum(dim=(-2, -1)) - both + eps)


def _mean(per_image: Tensor, present: Tensor) -> Tensor:
    return (per_image * present).sum() / present.sum().clamp(min=1)


def iou_loss(logits: Tensor, truth: Tensor, present: Tensor) -> Tensor:
    """Mean IoU loss of the masks.

    Paper: Eq. (10), L_iou = (1/N) Σ_i η(M̂_i, M_i^gt). logits: [B, N, H, W]; truth: [B, N, H, W] of {0, 1, 255 = void};
    present: [B, N]. Returns a scalar.
    """
    return _mean(soft_iou(logits.sigmoid(), (truth == 1).to(logits), (truth != VOID).to(logits)), present)


def coarse_loss(coarse: Tensor, truth: Tensor, present: Tensor) -> Tensor:
    """Mean IoU loss of the coarse masks against the area-averaged truth.

    Paper: Eq. (11), L_cs = (1/N) Σ_i η(M̂_i^c, M_i↓^gt). coarse: [B, N, h, w] logits; truth: [B, N, H, W]; present:
    [B, N]. Returns a scalar. ε is scaled to the smaller map. Void pixels count as background in the average.
    """
    small = F.adaptive_avg_pool2d((truth == 1).to(coarse), coarse.shape[-2:])
    eps = coarse[0, 0].numel() / truth[0, 0].numel()
    return _mean(soft_iou(coarse.sigmoid(), small, eps=eps), present)


def true_class(masked_embeddings: Tensor, prompt_embeddings: Tensor, present: Tensor) -> Tensor:
    """The index of v^gt's one: the prompt nearest to the set's images with all but the object removed.

    masked_embeddings: [B, N, D] of the images outside whose true mask everything was zeroed; prompt_embeddings: [P, D];
    both unit-norm; present: [B, N]. An image whose truth is empty has the embedding zero. Returns [B]; −1 = unknown:
    no image of the group shows the object.
    """
    word = (masked_embeddings @ prompt_embeddings.T * present[..., None]).sum(dim=1).argmax(dim=-1)
    shown = (masked_embeddings != 0).any(dim=-1) & present
    return word.where(shown.any(dim=-1), -1)


def classification_loss(v: Tensor, true: Tensor, reduction: str = "mean") -> Tensor:
    """Binary cross-entropy between v and the one-hot true class.

    Paper: Eq. (12), L_c = −(1/P) Σ_i [v_i^gt log v_i + (1 − v_i^gt) log(1 − v_i)]; the print has a sign slip in the
    second term. v: [B, P] probabilities; true: [B] indices. Returns a scalar, the mean over groups.
    Deviation (`lc_reduction: sum`): leaves out 1/P, which makes the term tiny for a long vocabulary.
    """
    target = F.one_hot(true, v.shape[-1]).to(v)
    tiny = torch.finfo(v.dtype).tiny
    v = v.clamp(tiny, 1 - torch.finfo(v.dtype).eps)  # a saturated softmax must not give log 0
    terms = -(target * v.log() + (1 - target) * (1 - v).log())  # [B, P]
    return (terms.mean(dim=-1) if reduction == "mean" else terms.sum(dim=-1)).mean()


def bce_loss(logits: Tensor, truth: Tensor, present: Tensor) -> Tensor:
    """Pixel-wise binary cross-entropy, mean over the valid pixels of an image, then over images.

    Deviation (`bce`): not in the paper; holds the IoU loss back from painting whole images.
    """
    valid = (truth != VOID).to(logits)
    terms = F.binary_cross_entropy_with_logits(logits, (truth == 1).to(logits), reduction="none") * valid
    return _mean(terms.sum(dim=(-2, -1)) / valid.sum(dim=(-2, -1)).clamp(min=1), present)


def total_loss(
    output: Output,
    truth: Tensor,
    present: Tensor,
    true: Tensor | None = None,
    *,
    lambda_cs: float = 1.0,
    lambda_c: float = 1.0,
    lc_reduction: str = "mean",
    bce: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss and its parts.

    Paper: Eq. (9), L = L_iou + λ1·L_cs + λ2·L_c. output: of `LCCo`; truth: [B, N, H, W]; present: [B, N]; true: [B]
    from `true_class`, −1 = unknown (left out of L_c). A term whose module is off, or whose λ is 0, is left out.
    Returns (scalar, {"iou", "cs", "c", "bce"} as far as used).
    """
    parts = {"iou": iou_loss(output.logits, truth, present)}
    total = parts["iou"]
    if output.coarse is not None and lambda_cs:
        parts["cs"] = coarse_loss(output.coarse, truth, present)
        total = total + lambda_cs * parts["cs"]
    if output.v is not None and lambda_c and true is not None and bool((true >= 0).any()):
        known = true >= 0
        parts["c"] = classification_loss(output.v[known], true[known], lc_reduction)
        total = total + lambda_c * parts["c"]
    if bce:
        parts["bce"] = bce_loss(output.logits, truth, present)
        total = total + bce * parts["bce"]
    return total, parts
