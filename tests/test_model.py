"""Every equation against a second, naive implementation written from the formula: loops, one image, one pixel."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcco.backbones import make_backbone
from lcco.losses import total_loss
from lcco.model import ISFC, CLIPInteraction, CLIPRegularization, LCCo, Modulation, neighbours

D, P = 16, 7


class TinyBackbone(nn.Module):
    """Four strided convolutions with the interface of `lcco.backbones.Backbone`."""

    channels = (8, 8, 16, 16)
    frozen_stages = 0

    def __init__(self):
        super().__init__()
        sides = [(3, 8, 4), (8, 8, 2), (8, 16, 2), (16, 16, 2)]
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(i, o, s, s), nn.ReLU()) for i, o, s in sides)

    def normalise(self, images):
        return (images - 0.5) / 0.5

    def forward(self, images):
        return self.tail([self.stages[0](self.normalise(images))])

    def tail(self, maps):
        maps = list(maps)
        for stage in self.stages[len(maps) :]:
            maps.append(stage(maps[-1]))
        return maps


def network(**changes):
    torch.manual_seed(0)
    net = LCCo(
        backbone=TinyBackbone(), embedding_width=D, prompts=P, logit_scale=10.0, width=16,
        **{"strides": (32, 16, 8), "k": 3, **changes},
    )  # fmt: skip
    stir(net)
    return net.eval()


def stir(module):
    """Random values where modules start at zero or one, so that a test sees every weight at work."""
    for p in module.parameters():
        if p.dim() < 2 or not p.any():
            nn.init.normal_(p, 0.1, 0.3)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)


def unit(*shape, seed=1, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def images(B, N, side=32, seed=2):
    return torch.rand(B, N, 3, side, side, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- naive twins
def naive_attention(q, k, v, heads):
    """One image's tokens at a time: q [L, C], k and v [S, C] → [L, C]."""
    L, C = q.shape
    d = C // heads
    out = torch.zeros(L, C, dtype=q.dtype)
    for h in range(heads):
        s = slice(h * d, (h + 1) * d)
        for a in range(L):
            weights = torch.stack([(q[a, s] @ k[b, s]) / math.sqrt(d) for b in range(len(k))]).softmax(0)
            out[a, s] = sum(weights[b] * v[b, s] for b in range(len(k)))
    return out


def naive_isfc(m: ISFC, maps):
    """Eq. 1 and 2 for one group, maps a list of [C, H, W]."""
    N = len(maps)
    if N == 1:
        return list(maps)
    C, H, W = maps[0].shape

    def tokens(conv, x):
        return conv(x[None])[0].reshape(C, -1).T  # [HW, C]

    out = []
    for i in range(N):
        bars = []
        for j in (j for j in range(N) if j != i):
            att = naive_attention(tokens(m.query, maps[i]), tokens(m.key, maps[j]), tokens(m.value, maps[j]), m.heads)
            message = m.merge(att.T.reshape(1, C, H, W))[0]
            bars.append(maps[i] + m.ffn1(torch.cat([maps[i], message])[None])[0])  # Eq. 1
        # "channels": stacked along channels, softmax along channels, split again
        alpha = torch.stack(bars).softmax(0) if m.softmax == "neighbours" else (torch.cat(bars).softmax(0) * C).split(C)
        out.append(m.conv(sum(a * b for a, b in zip(alpha, bars, strict=True))[None])[0])  # Eq. 2
    return out


def naive_modulation(m: Modulation, x, z):
    """Eq. 5 and 8 for one image: x [C, H, W], z [D], padded pixel by pixel."""
    y = m.ffn_in(x[None])[0]
    padded = torch.empty_like(y)
    for a in range(y.shape[1]):
        for b in range(y.shape[2]):
            padded[:, a, b] = z
    y = m.ffn_out((y * padded)[None])[0]
    return x + y if m.residual else y


def isfc(softmax="neighbours", channels=8, **kw):
    torch.manual_seed(3)
    m = ISFC(channels, heads=2, softmax=softmax, **kw)
    nn.init.normal_(m.ffn1[-1].weight, 0, 0.3)
    nn.init.normal_(m.conv.weight, 0, 0.2)
    stir(m)
    return m.eval()


@pytest.mark.parametrize("softmax", ["neighbours", "channels"])
@pytest.mark.parametrize("N", [1, 2, 5])
def test_isfc_is_eq_1_and_2_forward_and_backward(softmax, N):
    m = isfc(softmax).double()
    x = torch.randn(N, 8, 2, 3, dtype=torch.double, requires_grad=True)
    weight = torch.randn(N, 8, 2, 3, dtype=torch.double)
    fast = m(x, torch.zeros(N, dtype=torch.long))
    slow = torch.stack(naive_isfc(m, list(x)))
    torch.testing.assert_close(fast, slow)
    (g_fast,) = torch.autograd.grad((fast * weight).sum(), x)
    (g_slow,) = torch.autograd.grad((torch.stack(naive_isfc(m, list(x))) * weight).sum(), x)
    torch.testing.assert_close(g_fast, g_slow)
    if N == 2:  # one neighbour: α = 1, so the weighted average is that neighbour's value
        assert not torch.allclose(fast, x)


def test_isfc_starts_as_the_identity_and_a_lone_image_passes_through():
    m, x = ISFC(8, heads=2).eval(), torch.randn(3, 8, 2, 2)
    torch.testing.assert_close(m(x, torch.zeros(3, dtype=torch.long)), x)
    torch.testing.assert_close(isfc()(x[:1], torch.zeros(1, dtype=torch.long)), x[:1])


@pytest.mark.parametrize("softmax", ["neighbours", "channels"])
def test_chunks_and_ragged_groups_change_nothing(softmax):
    group = torch.tensor([0, 0, 1, 2, 2, 2, 2, 2])
    x = torch.randn(8, 8, 2, 2)
    whole = isfc(softmax)(x, group)
    torch.testing.assert_close(isfc(softmax, edges_at_once=1)(x, group), whole)
    for g in range(3):
        alone = isfc(softmax)(x[group == g], group[group == g])
        torch.testing.assert_close(whole[group == g], alone)


def test_neighbours_lists_the_others_of_a_group():
    index, valid = neighbours(torch.tensor([0, 1, 1, 1]))
    assert valid.tolist() == [[False, False], [True, True], [True, True], [True, True]]
    assert [sorted(index[i].tolist()) for i in (1, 2, 3)] == [[2, 3], [1, 3], [1, 2]]


def test_interaction_is_eq_3_and_4():
    torch.manual_seed(0)
    m = CLIPInteraction(8, D, heads=4).eval()
    stir(m)
    h, text = torch.randn(2, 4, D), torch.randn(2, 3, D)
    present = torch.tensor([[True] * 4, [True, True, False, False]])
    h_hat = m.refine(h, present)
    z = m.fuse(h_hat, text, present)
    for b, N in enumerate((4, 2)):
        mean = sum(h[b, j] for j in range(N)) / N
        hats = [m.mlp1(torch.cat([h[b, i], mean])) for i in range(N)]  # Eq. 3
        T = torch.stack([*hats, *text[b]])
        wq, wk, wv = m.attention.in_proj_weight.chunk(3)
        bq, bk, bv = m.attention.in_proj_bias.chunk(3)
        for i in range(N):
            torch.testing.assert_close(h_hat[b, i], hats[i])
            att = naive_attention((hats[i] @ wq.T + bq)[None], T @ wk.T + bk, T @ wv.T + bv, 4)[0]
            expected = hats[i] + m.mlp2(m.attention.out_proj(att))  # Eq. 4
            torch.testing.assert_close(z[b, i], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_modulation_is_eq_5_and_8(residual):
    torch.manual_seed(0)
    inter = CLIPInteraction(8, D, residual=residual).double().eval()
    regular = CLIPRegularization(8, D, P, logit_scale=10.0, residual=residual).double().eval()
    for m in (inter, regular):
        stir(m)
        x = torch.randn(3, 8, 2, 3, dtype=torch.double, requires_grad=True)
        z = torch.randn(3, D, dtype=torch.double, requires_grad=True)
        fast = m.modulate(x, z)
        slow = torch.stack([naive_modulation(m.modulate_map, x[i], z[i]) for i in range(3)])
        torch.testing.assert_close(fast, slow)
        weight = torch.randn_like(fast)
        for a, b in zip(
            torch.autograd.grad((fast * weight).sum(), (x, z)),
            torch.autograd.grad((slow * weight).sum(), (x, z)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("skip", [False, True])
def test_one_mlp3_for_every_word(skip):
    torch.manual_seed(0)
    m = CLIPRegularization(8, D, P, logit_scale=10.0, skip=skip, shared=True).eval()
    stir(m)
    S, N = torch.rand(1, 3, P), 2
    v = m.class_probabilities(S, torch.tensor([[True, True, False]]))[0]
    s = [[10 * (S[0, i, p] - sum(S[0, i]) / P) for p in range(P)] for i in range(N)]
    peak = []
    for p in range(P):
        mean = (s[0][p] + s[1][p]) / 2
        scores = [m.mlp3(torch.stack([s[i][p], mean])) + (mean if skip else 0) for i in range(N)]
        peak.append(max(x.item() for x in scores))
    weights = [math.exp(x - max(peak)) for x in peak]
    assert v.tolist() == pytest.approx([w / sum(weights) for w in weights], rel=1e-4)
    order = torch.randperm(P)  # it knows no word by its place
    torch.testing.assert_close(m.class_probabilities(S[..., order], torch.tensor([[True, True, False]]))[0], v[order])


@pytest.mark.parametrize("skip", [False, True])
def test_regularization_is_eq_6_and_7(skip):
    torch.manual_seed(0)
    m = CLIPRegularization(8, D, P, logit_scale=10.0, skip=skip).eval()
    stir(m)
    S = torch.rand(2, 4, P)
    present = torch.tensor([[True] * 4, [True, True, False, False]])
    v = m.class_probabilities(S, present)
    for b, N in enumerate((4, 2)):
        rows = [m.mlp3(10 * S[b, i]) + (10 * S[b, i] if skip else 0) for i in range(N)]
        peak = [max(row[p].item() for row in rows) for p in range(P)]
        weights = [math.exp(x - max(peak)) for x in peak]
        expected = [w / sum(weights) for w in weights]
        assert v[b].tolist() == pytest.approx(expected, rel=1e-5)  # Eq. 7
        assert m.most_likely(v)[b].item() == expected.index(max(expected))  # Eq. 6
    assert v.sum(1).tolist() == pytest.approx([1, 1], rel=1e-5)


def test_similarity_and_distilled_prompts_by_hand():
    net, h, text = network(), unit(1, 3, D), unit(P, D, seed=5)
    out = net(images(1, 3), h, text)
    S = [[float(h[0, i] @ text[p]) for p in range(P)] for i in range(3)]
    assert out.similarity[0].flatten().tolist() == pytest.approx(sum(S, []), abs=1e-5)
    sigma = [sum(S[i][p] for i in range(3)) for p in range(P)]
    assert out.distilled[0].tolist() == sorted(range(P), key=lambda p: -sigma[p])[:3]
    scaled = net(images(1, 3), 3 * h, text)  # cosines, whatever the lengths
    torch.testing.assert_close(scaled.similarity, out.similarity)


# ------------------------------------------------------------------------------------------------ the whole network
def naive_network(net: LCCo, imgs, h, text, gt=None):
    """One group, image by image, from Fig. 2: returns logits [N, H, W]."""
    N = len(imgs)
    maps = [net.backbone(imgs[i : i + 1]) for i in range(N)]
    sigma = (h @ text.T).sum(0)
    order = sigma.argsort(descending=True)[: net.k]
    order = order if gt is None else torch.full_like(order, gt)
    scaled, present = text * D**0.5, torch.ones(1, N, dtype=torch.bool)
    z = i_star = None
    if net.clip_interaction is not None:
        hats = net.clip_interaction.refine(h[None] * D**0.5, present)
        z = net.clip_interaction.fuse(hats, scaled[order][None], present)[0]
    if net.clip_regularization is not None:
        v = net.clip_regularization.class_probabilities((h @ text.T)[None], present)
        i_star = int(v.argmax()) if gt is None else gt

    def up(x, like):
        return F.interpolate(x, size=like.shape[-2:], mode="bilinear")

    F1 = [net.lateral["32"](m[3])[0] for m in maps]
    F1 = naive_isfc(net.isfc, F1) if net.isfc is not None else F1
    F2 = [net.smooth["16"](net.lateral["16"](m[2]) + up(f[None], m[2]))[0] for m, f in zip(maps, F1, strict=True)]
    if z is not None:
        F2 = [naive_modulation(net.clip_interaction.modulate_map, f, z[i]) for i, f in enumerate(F2)]
    F3 = [net.smooth["8"](net.lateral["8"](m[1]) + up(f[None], m[1]))[0] for m, f in zip(maps, F2, strict=True)]
    if i_star is not None:
        F3 = [naive_modulation(net.clip_regularization.modulate_map, f, scaled[i_star]) for f in F3]
    p = [net.head(net.lateral4(m[0]) + up(net.reduce4(f[None]), m[0])) for m, f in zip(maps, F3, strict=True)]
    return torch.cat([F.interpolate(x, scale_factor=4, mode="bilinear")[:, 0] for x in p])


@pytest.mark.parametrize("modules", range(8))
def test_network_is_fig_2_with_any_modules(modules):
    on = {n: bool(modules >> b & 1) for b, n in enumerate(("isfc", "clip_interaction", "clip_regularization"))}
    net, x, h, text = network(**on, modulation_residual=bool(modules % 2)), images(2, 3), unit(2, 3, D), unit(P, D)
    out = net(x, h, text)
    for b in range(2):
        torch.testing.assert_close(out.logits[b], naive_network(net, x[b], h[b], text), atol=1e-4, rtol=1e-4)
    assert (out.coarse is None) == (not on["clip_interaction"])
    assert (out.v is None) == (not on["clip_regularization"])


def test_gt_semantics_replace_the_class_and_the_prompts():
    net, x, h, text = network(), images(2, 3), unit(2, 3, D), unit(P, D)
    out = net(x, h, text, target=torch.tensor([4, -1]))
    assert out.best[0] == 4 and out.distilled[0].tolist() == [4, 4, 4]
    torch.testing.assert_close(out.logits[0], naive_network(net, x[0], h[0], text, gt=4), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.logits[1], net(x, h, text).logits[1])  # −1: its own


@pytest.mark.parametrize("N", [1, 2, 5, 17])
@pytest.mark.parametrize("softmax", ["neighbours", "channels"])
def test_any_n_and_permuting_the_set_permutes_the_masks(N, softmax):
    net, x, h, text = network(isfc_softmax=softmax), images(1, N), unit(1, N, D), unit(P, D)
    out = net(x, h, text)
    assert out.logits.shape == (1, N, 32, 32) and out.logits.isfinite().all()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(N))
    torch.testing.assert_close(net(x[:, order], h[:, order], text).logits, out.logits[:, order], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k,expected", [(1, 1), (3, 3), (P, P), (P + 9, P)])
def test_k_from_one_to_more_than_there_are(k, expected):
    assert network(k=k)(images(1, 2), unit(1, 2, D), unit(P, D)).distilled.shape == (1, expected)
    assert network()(images(1, 2), unit(1, 2, D), unit(P, D), k=k).distilled.shape == (1, expected)


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(training):
    x, h, text = images(2, 4), unit(2, 4, D), unit(P, D)
    present = torch.tensor([[True] * 4, [True, True, False, False]])
    net = network().train(training)
    full = net(x, h, text, present=present)
    x2, h2 = x.clone(), h.clone()
    x2[1, 2:], h2[1, 2:] = 1e3, unit(2, D, seed=9)  # what stands in the padding must not matter
    net = network().train(training)  # anew: training moves the statistics
    other = net(x2, h2, text, present=present)
    torch.testing.assert_close(full.logits, other.logits)
    torch.testing.assert_close(full.v, other.v)
    assert (full.logits[1, 2:] == 0).all() and (full.coarse[1, 2:] == 0).all()
    if not training:
        alone = net(x[1:, :2], h[1:, :2], text)
        torch.testing.assert_close(full.logits[1:, :2], alone.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(full.v[1:], alone.v)


@pytest.mark.parametrize("side", [(32, 64), (96, 32)])
def test_any_size_divisible_by_32(side):
    x = torch.rand(1, 2, 3, *side)
    assert network()(x, unit(1, 2, D), unit(P, D)).logits.shape == (1, 2, *side)


def test_given_maps_replace_the_backbone():
    net, x, h, text = network(), images(1, 3), unit(1, 3, D), unit(P, D)
    maps = [m[None] for m in net.backbone(x[0])]
    whole = net(x, h, text).logits
    for n in (1, 3, 4):
        torch.testing.assert_close(net(None, h, text, maps=maps[:n]).logits, whole)
    encoder = network(placement="encoder")
    first = [m[None] for m in encoder.backbone(x[0])][:1]
    torch.testing.assert_close(encoder(None, h, text, maps=first).logits, encoder(x, h, text).logits)
    with pytest.raises(ValueError, match="encoder"):
        encoder(None, h, text, maps=maps)


def test_encoder_placement_refines_the_stages_in_sequence():
    net, x, h, text = network(placement="encoder"), images(1, 3), unit(1, 3, D), unit(P, D)
    out = net(x, h, text, return_maps=True)
    c4 = net.backbone.stages[0](net.backbone.normalise(x[0]))
    c8 = torch.stack(naive_isfc(net.isfc, list(net.backbone.stages[1](c4))))
    torch.testing.assert_close(out.maps["isfc"][1][0], c8, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.maps["clip_interaction"][0][0], net.backbone.stages[2](c8), atol=1e-5, rtol=1e-4)


def test_maps_before_and_after_only_when_asked_for():
    net, x, h, text = network(modulation_residual=True), images(1, 2), unit(1, 2, D), unit(P, D)
    assert net(x, h, text).maps is None
    out = net(x, h, text, return_maps=True)
    assert list(out.maps) == ["isfc", "clip_interaction", "clip_regularization"]
    before, after = out.maps["clip_regularization"]
    expected = naive_modulation(net.clip_regularization.modulate_map, before[0, 0], text[out.best[0]] * D**0.5)
    torch.testing.assert_close(after[0, 0], expected, atol=1e-5, rtol=1e-4)


def test_several_modules_at_one_stride_act_in_the_papers_order():
    out = network(strides=(16, 16, 16))(images(1, 2), unit(1, 2, D), unit(P, D), return_maps=True)
    torch.testing.assert_close(out.maps["isfc"][1], out.maps["clip_interaction"][0])
    torch.testing.assert_close(out.maps["clip_interaction"][1], out.maps["clip_regularization"][0])
    with pytest.raises(ValueError, match="strides"):
        network(strides=(8, 16, 32))


@pytest.mark.parametrize("softmax", ["neighbours", "channels"])
def test_gradcheck(softmax):
    m = isfc(softmax, channels=4).double()
    x = torch.randn(3, 4, 2, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: m(x, torch.tensor([0, 0, 0])), x)
    inter = CLIPInteraction(4, 8, heads=2).double().eval()
    h = torch.randn(1, 2, 8, dtype=torch.double, requires_grad=True)
    text, present = torch.randn(1, 3, 8, dtype=torch.double), torch.ones(1, 2, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda h: inter.fuse(inter.refine(h, present), text, present), h)
    regular = CLIPRegularization(4, 8, 5, logit_scale=3.0, residual=True).double().eval()
    stir(regular)
    z = torch.randn(3, 8, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(regular.modulate, (x, z))
    S = torch.rand(1, 3, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: regular.class_probabilities(s, torch.ones(1, 3, dtype=torch.bool)), S)


@pytest.mark.parametrize("placement", ["decoder", "encoder"])
def test_every_trained_parameter_receives_a_finite_gradient(placement):
    net = network(placement=placement).train()
    out = net(images(2, 3, side=64), unit(2, 3, D), unit(P, D))
    truth = (torch.rand(2, 3, 64, 64) > 0.5).to(torch.uint8)
    total_loss(out, truth, torch.ones(2, 3, dtype=torch.bool), torch.tensor([1, 4]))[0].backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_one_tiny_batch_is_overfitted():
    torch.manual_seed(0)
    backbone = make_backbone("glyphnet", None)
    net = LCCo(backbone=backbone, embedding_width=D, prompts=P, logit_scale=10.0, width=32, modulation_residual=True)
    x, truth = torch.rand(1, 3, 3, 64, 64) * 0.3, torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    for n in range(3):
        truth[0, n, 8 + 8 * n : 40 + 8 * n, 16:48] = 1
    x += 0.6 * truth[:, :, None]
    h, text, present = unit(1, 3, D), unit(P, D), torch.ones(1, 3, dtype=torch.bool)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(150):
        net.train()
        loss, _ = total_loss(net(x, h, text), truth, present, torch.tensor([2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out = net(x, h, text)  # with the batch's own statistics: 150 steps do not settle the running ones
    mask = out.logits > 0
    J = (mask & (truth == 1)).sum() / (mask | (truth == 1)).sum()
    assert J > 0.95, float(J)
    assert out.best.item() == 2  # and MLP3 has learnt the class


def test_words_are_chosen_in_full_precision_whatever_the_training_uses():
    """Cosines that lie as close together as a CLIP's: half precision would put other words first."""
    common = unit(1, D, seed=5)
    prompts = F.normalize(common + 0.02 * unit(P, D, seed=6), dim=-1)
    h = F.normalize(common + 0.02 * unit(2 * 3, D, seed=7), dim=-1).view(2, 3, D)
    net, x = network(), images(2, 3)
    with torch.no_grad():
        plain = net(x, h, prompts)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(x, h, prompts)
    assert (h.bfloat16() @ prompts.T.bfloat16()).float().sub(plain.similarity).abs().max() > 1e-4
    assert half.similarity.dtype == half.v.dtype == torch.float32 and half.logits.dtype == torch.bfloat16
    assert torch.equal(half.similarity, plain.similarity) and torch.equal(half.distilled, plain.distilled)
    torch.testing.assert_close(half.v, plain.v, atol=1e-6, rtol=0)
