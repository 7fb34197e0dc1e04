"""Eq. 9–12 against their formulas written with loops over pixels and prompts, in float64."""

import math

import pytest
import torch

from lcco import losses
from lcco.model import Output


def eta(p, g, weight, eps=1.0):
    """1 − (Σpg + ε) / (Σp + Σg − Σpg + ε) of one mask, pixel by pixel."""
    both = sp = sg = 0.0
    for a in range(len(p)):
        for b in range(len(p[0])):
            w = float(weight[a][b])
            both += w * p[a][b] * g[a][b]
            sp, sg = sp + w * p[a][b], sg + w * g[a][b]
    return 1 - (both + eps) / (sp + sg - both + eps)


def sigmoid(x):
    return [[1 / (1 + math.exp(-v)) for v in row] for row in x.tolist()]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def setting(N=3, H=4, W=8):
    truth = (numbers(2, N, H, W, seed=1) > 0).byte()
    truth[0, 0, 0] = 255
    truth[0, 1, :2, :4] = 255
    present = torch.tensor([[True] * N, [True] + [False] * (N - 1)])
    return numbers(2, N, H, W), truth, present


def test_iou_loss_is_eq_10_and_void_counts_for_nothing():
    logits, truth, present = setting()
    terms = []
    for b, i in present.nonzero().tolist():
        g, valid = (truth[b, i] == 1).double().tolist(), (truth[b, i] != 255).tolist()
        terms.append(eta(sigmoid(logits[b, i]), g, valid))
    assert losses.iou_loss(logits, truth, present).item() == pytest.approx(sum(terms) / 4, rel=1e-9)
    moved = logits.clone()
    moved[truth == 255] = 50.0
    moved[1, 1:] = 50.0  # padding
    assert losses.iou_loss(moved, truth, present) == losses.iou_loss(logits, truth, present)
    assert losses.bce_loss(moved, truth, present) == losses.bce_loss(logits, truth, present)


def test_empty_truth_is_finite_and_wants_an_empty_mask():
    truth, present = torch.zeros(1, 1, 8, 8).byte(), torch.ones(1, 1).bool()
    full = [torch.full((1, 1, 8, 8), x, dtype=torch.double) for x in (-40.0, 40.0)]
    assert losses.iou_loss(full[0], truth, present).item() == pytest.approx(0, abs=1e-9)
    assert losses.iou_loss(full[1], truth, present).item() == pytest.approx(1 - 1 / 65, rel=1e-9)
    nothing = torch.zeros(1, 1).bool()
    assert losses.iou_loss(full[1], truth, nothing) == 0  # and no division by no image
    void = torch.full_like(truth, 255)
    for loss in (losses.iou_loss, losses.bce_loss, losses.coarse_loss):
        assert loss(full[1], void, present) == 0


def coarse_by_hand(coarse, truth, present):
    """Each cell: the mean of its valid pixels, weighted by their share."""
    terms, (h, w), (H, W) = [], coarse.shape[-2:], truth.shape[-2:]
    for b, i in present.nonzero().tolist():
        g, share = [[0.0] * w for _ in range(h)], [[0.0] * w for _ in range(h)]
        for y in range(h):
            for x in range(w):
                cell = truth[b, i, y * H // h : (y + 1) * H // h, x * W // w : (x + 1) * W // w]
                values = [v for v in cell.flatten().tolist() if v != 255]
                g[y][x] = sum(values) / len(values) if values else 0.0
                share[y][x] = len(values) / cell.numel()
        terms.append(eta(sigmoid(coarse[b, i]), g, share, eps=h * w / (H * W)))
    return sum(terms) / len(terms)


def test_coarse_loss_is_eq_11_and_void_counts_for_nothing():
    _, truth, present = setting(H=8, W=8)
    coarse = numbers(2, 3, 4, 4, seed=3)
    expected = coarse_by_hand(coarse, truth, present)
    assert losses.coarse_loss(coarse, truth, present).item() == pytest.approx(expected, rel=1e-9)
    moved, before = coarse.clone(), losses.coarse_loss(coarse, truth, present)
    moved[0, 1, 0, :2] = 50.0  # cells of void alone
    assert losses.coarse_loss(moved, truth, present) == before
    other, ones = truth.clone(), torch.ones(2, 3).bool()
    other[0, 0, 0] = 0  # void is not background: the loss of a mask that covers it falls
    covered = torch.full((2, 3, 4, 4), 9.0, dtype=torch.double)
    assert losses.coarse_loss(covered, truth, ones) < losses.coarse_loss(covered, other, ones)


def eq_12(logits, true, reduction):
    """log v and log(1 − v) by sums of exponentials of the others, in float64."""
    each = []
    for row, t in zip(logits, true, strict=True):
        e, total = (row - row.max()).exp(), 0.0
        for p in range(len(row)):
            others = torch.stack([e[q] for q in range(len(row)) if q != p]).sum()
            total = total + torch.log((e[p] if p == t else others) / e.sum())
        each.append(-total / (len(row) if reduction == "mean" else 1))
    return sum(each) / len(each)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("gap", [0, 17, 90])
def test_classification_loss_is_eq_12_at_any_gap(gap, reduction):
    """Right and wrong, with the softmax of one word at 1 to the last bit of a float."""
    logits, true = numbers(2, 6) / 2, torch.tensor([2, 5])
    logits[:, 2] = logits.max() + gap
    naive = logits.clone().requires_grad_()
    expected = eq_12(naive, true.tolist(), reduction)
    (gradient,) = torch.autograd.grad(expected, naive)
    for dtype, tolerance in ((torch.double, 1e-9), (torch.float, 1e-6)):
        x = logits.to(dtype).requires_grad_()
        loss = losses.classification_loss(x, true, reduction)
        (got,) = torch.autograd.grad(loss, x)
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
        scale = gradient.abs().max()
        assert (got.double() - gradient).abs().max() < tolerance * scale
    assert gap == 0 or gradient[1, 2] > 0.5 * gradient.abs().max()  # the wrong word unlearns


def test_classification_loss_of_one_word_is_nothing():
    x = torch.zeros(1, 1, requires_grad=True)
    loss = losses.classification_loss(x, torch.tensor([0]))
    loss.backward()
    assert loss == 0 and x.grad == 0


def test_true_class_is_the_largest_column_sum():
    h = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert losses.true_class(h, text, torch.ones(1, 3).bool()).item() == 1  # sums 1.6, 1.8, −1.6
    assert losses.true_class(h, text, torch.tensor([[True, False, False]])).item() == 0


def test_true_class_of_a_group_without_its_object_is_unknown():
    h = torch.tensor([[[0.0, 0.0]] * 2, [[0.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]])
    present = torch.tensor([[True, True], [True, True], [False, True]])  # third: padding shows it
    true = losses.true_class(h, torch.eye(2), present)
    assert true.tolist() == [-1, 1, -1]
    truth = torch.zeros(3, 2, 4, 4).byte()
    out = Output(torch.zeros(3, 2, 4, 4), class_logits=torch.randn(3, 2))
    parts = losses.total_loss(out, truth, present, true)[1]
    assert parts["c"] == losses.classification_loss(out.class_logits[1:2], true[1:2])
    assert "c" not in losses.total_loss(out, truth, present, torch.full((3,), -1))[1]
    first = losses.total_loss(out, truth, present, torch.tensor([-1, 0, -1]))[1]
    assert first["c"] == losses.classification_loss(out.class_logits[1:2], torch.tensor([0]))


def test_total_is_eq_9_with_its_switches():
    logits, truth, present = setting()
    out = Output(logits, coarse=numbers(2, 3, 2, 2, seed=4), class_logits=numbers(2, 5, seed=5))
    true = torch.tensor([1, -1])
    settings = {"lambda_cs": 0.5, "lambda_c": 2.0, "lc_reduction": "sum", "bce": 0.3}
    total, parts = losses.total_loss(out, truth, present, true, **settings)
    by_hand = (
        losses.iou_loss(logits, truth, present)
        + 0.5 * losses.coarse_loss(out.coarse, truth, present)
        + 2.0 * losses.classification_loss(out.class_logits[:1], true[:1], "sum")
        + 0.3 * losses.bce_loss(logits, truth, present)
    )
    assert total.item() == pytest.approx(by_hand.item(), rel=1e-12)
    assert set(parts) == {"iou", "cs", "c", "bce"}
    assert set(losses.total_loss(out, truth, present, true, lambda_cs=0, lambda_c=0)[1]) == {"iou"}
    assert set(losses.total_loss(Output(logits), truth, present)[1]) == {"iou"}


def test_half_precision_logits_become_float_once_for_all_terms():
    logits, truth, present = setting(H=64, W=64)
    coarse = numbers(2, 3, 14, 14, seed=4)
    half = Output(logits.bfloat16(), coarse=coarse.bfloat16())
    full = Output(half.logits.float(), coarse=half.coarse.float())
    got, parts = losses.total_loss(half, truth, present, bce=0.3)
    expected, same = losses.total_loss(full, truth, present, bce=0.3)
    assert got.dtype == torch.float32 and got == expected and parts == same


def test_bce_by_hand():
    truth = torch.tensor([[[[1, 0, 255]]]], dtype=torch.uint8)
    logits = torch.tensor([[[[2.0, -1.0, 5.0]]]], dtype=torch.double)
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    got = losses.bce_loss(logits, truth, torch.ones(1, 1).bool()).item()
    assert got == pytest.approx(expected, rel=1e-9)


def test_gradcheck_of_every_loss():
    truth, present = (numbers(1, 2, 4, 4, seed=1) > 0).byte(), torch.ones(1, 2).bool()
    truth[0, 0, 0, :3] = 255
    logits, coarse = numbers(1, 2, 4, 4).requires_grad_(), numbers(1, 2, 2, 2).requires_grad_()
    words, check = numbers(1, 5).requires_grad_(), torch.autograd.gradcheck
    assert check(lambda x: losses.iou_loss(x, truth, present), logits)
    assert check(lambda x: losses.coarse_loss(x, truth, present), coarse)
    assert check(lambda x: losses.bce_loss(x, truth, present), logits)
    assert check(lambda x: losses.classification_loss(x, torch.tensor([3])), words)
