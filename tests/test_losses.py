"""Eq. 9–12 against their formulas written with loops over pixels and prompts."""

import math

import pytest
import torch

from lcco import losses
from lcco.model import Output


def eta(p, g, eps=1.0, valid=None):
    """1 − (Σpg + ε) / (Σp + Σg − Σpg + ε) of one mask, pixel by pixel."""
    both = sp = sg = 0.0
    for a in range(len(p)):
        for b in range(len(p[0])):
            if valid is None or valid[a][b]:
                both += p[a][b] * g[a][b]
                sp, sg = sp + p[a][b], sg + g[a][b]
    return 1 - (both + eps) / (sp + sg - both + eps)


def sigmoid(x):
    return [[1 / (1 + math.exp(-v)) for v in row] for row in x]


def setting(N=3, H=4, W=4):
    torch.manual_seed(0)
    truth = torch.randint(0, 2, (2, N, H, W), dtype=torch.uint8)
    truth[0, 0, 0] = 255
    present = torch.tensor([[True] * N, [True] + [False] * (N - 1)])
    return torch.randn(2, N, H, W), truth, present


def test_iou_loss_is_eq_10_and_void_counts_for_nothing():
    logits, truth, present = setting()
    terms = []
    for b, i in present.nonzero().tolist():
        g = (truth[b, i] == 1).float().tolist()
        terms.append(eta(sigmoid(logits[b, i].tolist()), g, valid=(truth[b, i] != 255).tolist()))
    assert losses.iou_loss(logits, truth, present).item() == pytest.approx(sum(terms) / 4, rel=1e-5)
    moved = logits.clone()
    moved[0, 0, 0] = 50.0  # void row
    moved[1, 1:] = 50.0  # padding
    assert losses.iou_loss(moved, truth, present) == losses.iou_loss(logits, truth, present)


def test_empty_truth_is_finite_and_wants_an_empty_mask():
    truth, present = torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.ones(1, 1, dtype=torch.bool)
    empty, full = (losses.iou_loss(torch.full((1, 1, 8, 8), x), truth, present).item() for x in (-30.0, 30.0))
    assert empty == pytest.approx(0, abs=1e-6)
    assert full == pytest.approx(1 - 1 / 65, rel=1e-5)


def test_coarse_loss_is_eq_11():
    logits, truth, present = torch.randn(1, 2, 2, 2), torch.randint(0, 2, (1, 2, 8, 8)).byte(), torch.ones(1, 2).bool()
    terms = []
    for i in range(2):
        g = (truth[0, i]).float()
        small = [[g[4 * a : 4 * a + 4, 4 * b : 4 * b + 4].mean().item() for b in (0, 1)] for a in (0, 1)]
        terms.append(eta(sigmoid(logits[0, i].tolist()), small, eps=4 / 64))
    assert losses.coarse_loss(logits, truth, present).item() == pytest.approx(sum(terms) / 2, rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_classification_loss_is_eq_12_without_the_slip(reduction):
    v, true = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]]), torch.tensor([0, 1])
    each = []
    for b in range(2):
        total = 0.0
        for p in range(3):
            one = 1.0 if p == true[b] else 0.0
            total += one * math.log(v[b, p]) + (1 - one) * math.log(1 - v[b, p])
        each.append(-total / (3 if reduction == "mean" else 1))
    assert losses.classification_loss(v, true, reduction).item() == pytest.approx(sum(each) / 2, rel=1e-5)
    saturated = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    loss = losses.classification_loss(saturated, torch.tensor([1]), reduction)
    loss.backward()
    assert loss.isfinite() and saturated.grad.isfinite().all()


def test_true_class_is_the_largest_column_sum():
    h = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert losses.true_class(h, text, torch.ones(1, 3).bool()).item() == 1  # sums 1.6, 1.8, −1.6
    assert losses.true_class(h, text, torch.tensor([[True, False, False]])).item() == 0


def test_true_class_of_a_group_without_its_object_is_unknown():
    h = torch.tensor([[[0.0, 0.0]] * 2, [[0.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]])
    present = torch.tensor([[True, True], [True, True], [False, True]])  # the third's object is only in its padding
    true = losses.true_class(h, torch.eye(2), present)
    assert true.tolist() == [-1, 1, -1]
    logits, truth = torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 4, 4, dtype=torch.uint8)
    out = Output(logits, None, None, None, torch.full((3, 2), 0.5), None)
    parts = losses.total_loss(out, truth, present, true)[1]
    assert parts["c"] == losses.classification_loss(out.v[1:2], true[1:2])
    assert "c" not in losses.total_loss(out, truth, present, torch.full((3,), -1))[1]


def test_total_is_eq_9_with_its_switches():
    logits, truth, present = setting()
    v = torch.rand(2, 5).softmax(1)
    out = Output(logits, torch.randn(2, 3, 2, 2), torch.rand(2, 3, 5), torch.zeros(2, 1), v, None)
    true = torch.tensor([1, -1])
    settings = {"lambda_cs": 0.5, "lambda_c": 2.0, "lc_reduction": "sum", "bce": 0.3}
    total, parts = losses.total_loss(out, truth, present, true, **settings)
    by_hand = (
        losses.iou_loss(logits, truth, present)
        + 0.5 * losses.coarse_loss(out.coarse, truth, present)
        + 2.0 * losses.classification_loss(out.v[:1], true[:1], "sum")  # the unknown class is left out
        + 0.3 * losses.bce_loss(logits, truth, present)
    )
    torch.testing.assert_close(total, by_hand)
    assert set(parts) == {"iou", "cs", "c", "bce"}
    assert set(losses.total_loss(out, truth, present, true, lambda_cs=0, lambda_c=0)[1]) == {"iou"}
    assert set(losses.total_loss(Output(logits, None, *[None] * 4), truth, present)[1]) == {"iou"}


def test_bce_by_hand():
    logits, truth = torch.tensor([[[[2.0, -1.0, 5.0]]]]), torch.tensor([[[[1, 0, 255]]]], dtype=torch.uint8)
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    assert losses.bce_loss(logits, truth, torch.ones(1, 1).bool()).item() == pytest.approx(expected, rel=1e-5)


def test_gradcheck_of_every_loss():
    truth, present = torch.randint(0, 2, (1, 2, 4, 4)).byte(), torch.ones(1, 2).bool()
    logits = torch.randn(1, 2, 4, 4, dtype=torch.double, requires_grad=True)
    coarse = torch.randn(1, 2, 2, 2, dtype=torch.double, requires_grad=True)
    scores = torch.randn(1, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: losses.iou_loss(x, truth, present), logits)
    assert torch.autograd.gradcheck(lambda x: losses.coarse_loss(x, truth, present), coarse)
    assert torch.autograd.gradcheck(lambda x: losses.bce_loss(x, truth, present), logits)
    assert torch.autograd.gradcheck(lambda x: losses.classification_loss(x.softmax(-1), torch.tensor([3])), scores)
