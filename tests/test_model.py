"""Every equation against a twin that is written from the formula, in float64 and to 1e-6.

A twin shares no code with the network: it makes its own layers from the numbers of the state dict
and goes image by image, head by head, place by place.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcco.losses import classification_loss, coarse_loss, iou_loss, total_loss
from lcco.model import ISFC, CLIPInteraction, CLIPRegularization, LCCo, Modulation

D, P, HEADS = 16, 7, 4
ON = ("isfc", "clip_interaction", "clip_regularization")


class TinyBackbone(nn.Module):
    """Four strided convolutions with the interface of `lcco.backbones.Backbone`."""

    channels = (8, 8, 16, 16)
    frozen_stages = 0

    def __init__(self):
        super().__init__()
        sides = [(3, 8, 4), (8, 8, 2), (8, 16, 2), (16, 16, 2)]
        stages = (nn.Sequential(nn.Conv2d(i, o, s, s), nn.ReLU()) for i, o, s in sides)
        self.stages = nn.ModuleList(stages)

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
    settings = {"embedding_width": D, "prompts": P, "logit_scale": 10.0, "width": 16, "k": 3}
    return stir(LCCo(backbone=TinyBackbone(), **settings | changes))


def stir(module):
    """Numbers of order 1 everywhere, in float64, so that a test sees every weight at work."""
    for p in module.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, 0, 1.5 / math.sqrt(p[0].numel()))
        else:
            nn.init.normal_(p, 0.5, 0.5)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
    return module.double().eval()


def numbers(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.double)


def unit(*shape, seed=1):
    return F.normalize(numbers(*shape, seed=seed), dim=-1)


def images(B, N, side=32, seed=2):
    return numbers(B, N, 3, side, side, seed=seed).sigmoid()


def v(out):
    """Eq. 7's probabilities."""
    return out.class_logits.softmax(-1)


def near(got, expected, tolerance=1e-6):
    """Equal within a millionth of the largest number, and not all the same."""
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape, (got.shape, expected.shape)
    assert expected.numel() == 1 or expected.std() > 0
    worst = float((got - expected).abs().max() / expected.abs().max())
    assert worst < tolerance, worst


# ------------------------------------------------------------------------------------------- twin
class Twin:
    """The network once more, from its state dict alone."""

    def __init__(self, module, training=False):
        self.w = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.training = training  # batch statistics of what is given at once

    def grads(self, *names):
        return [self.w[n].requires_grad_() for n in names]

    def conv(self, name, x, pad=0, stride=1):
        return F.conv2d(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"), stride, pad)

    def norm(self, name, x):
        w, out = self.w, torch.empty_like(x)
        for c in range(x.shape[1]):
            mean, var = w[f"{name}.running_mean"][c], w[f"{name}.running_var"][c]
            if self.training:
                mean = x[:, c].sum() / x[:, c].numel()
                var = ((x[:, c] - mean) ** 2).sum() / x[:, c].numel()
            scaled = (x[:, c] - mean) / (var + 1e-5).sqrt()
            out[:, c] = scaled * w[f"{name}.weight"][c] + w[f"{name}.bias"][c]
        return out

    def linear(self, name, x):
        return self.w[f"{name}.weight"] @ x + self.w[f"{name}.bias"]

    def relu(self, x):
        return x * (x > 0)

    def block(self, name, x):
        return self.relu(self.norm(f"{name}.1", self.conv(f"{name}.0", x, pad=1)))

    def ffn(self, name, x, pad=0):
        x = self.relu(self.norm(f"{name}.1", self.conv(f"{name}.0", x)))
        return self.conv(f"{name}.3", x, pad)

    def mlp(self, name, x):
        return self.linear(f"{name}.2", self.relu(self.linear(f"{name}.0", x)))

    def attention(self, q, k, v):
        """q [L, C]; k, v [S, C], by head and query."""
        C, out = q.shape[1], []
        d = C // HEADS
        for a in range(len(q)):
            parts = []
            for h in range(HEADS):
                s = slice(h * d, (h + 1) * d)
                e = torch.stack([(q[a, s] @ k[b, s] / math.sqrt(d)).exp() for b in range(len(k))])
                parts.append(sum(e[b] / e.sum() * v[b, s] for b in range(len(k))))
            out.append(torch.cat(parts))
        return torch.stack(out)

    def tokens(self, name, x):
        return self.conv(name, x[None])[0].flatten(1).T  # [HW, C]

    # Eq. 1 and 2, for several groups at once because batch statistics see all of their edges
    def isfc(self, name, groups, softmax="neighbours"):
        """groups: lists of maps [C, H, W]. Returns the same."""
        all_of = [(g, range(len(m))) for g, m in enumerate(groups)]
        pairs = [(g, i, j) for g, each in all_of for i in each for j in each
                 if i != j or len(each) == 1]  # fmt: skip
        joined = []
        for g, i, j in pairs:
            x, y = groups[g][i], groups[g][j]
            q = self.tokens(f"{name}query", x)
            k, v = (self.tokens(f"{name}{n}", y) for n in ("key", "value"))
            m = self.attention(q, k, v).T.reshape(1, *x.shape)
            joined.append(torch.cat([x, self.conv(f"{name}merge", m)[0]]))
        updates = self.ffn(f"{name}ffn1", torch.stack(joined))
        bars = {key: groups[key[0]][key[1]] + u for key, u in zip(pairs, updates, strict=True)}
        out = [list(m) for m in groups]
        for g, m in enumerate(groups):
            for i in range(len(m)):
                mine = [bars[g, i, j] for j in range(len(m)) if (g, i, j) in bars]
                out[g][i] = self.conv(f"{name}conv", self.average(mine, softmax)[None], 1)[0]
        return out

    def average(self, bars, softmax):
        C = len(bars[0])
        if softmax == "neighbours":
            total = sum(b.exp() for b in bars)
            return sum(b.exp() / total * b for b in bars)
        # stacked along channels, softmax along channels, split again; then to the mean's norm
        e = torch.cat(bars).exp()
        alphas = (e / e.sum(0)).split(C)
        mixed, plain = sum(a * b for a, b in zip(alphas, bars, strict=True)), sum(bars) / len(bars)
        return mixed * ((plain**2).sum() / (mixed**2).sum()).sqrt()

    # Eq. 3, 4, 5, 8 for one group
    def refined(self, name, h):
        mean = sum(h) / len(h)
        out = []
        for x in h:
            y = self.mlp(f"{name}mlp1", torch.cat([x, mean]))
            y = (y - y.mean()) / (((y - y.mean()) ** 2).mean() + 1e-5).sqrt()
            out.append(y * self.w[f"{name}mlp1.3.weight"] + self.w[f"{name}mlp1.3.bias"])
        return out

    def fused(self, name, hats, text):
        T, n = torch.stack([*hats, *text]), f"{name}attention."
        W, b = self.w[f"{n}in_proj_weight"], self.w[f"{n}in_proj_bias"]
        q, k, v = (x @ W[s].T + b[s] for x, s in zip(
            (torch.stack(hats), T, T), (slice(D), slice(D, 2 * D), slice(2 * D, 3 * D)), strict=True
        ))  # fmt: skip
        messages = [self.linear(f"{n}out_proj", m) for m in self.attention(q, k, v)]
        return [h + self.mlp(f"{name}mlp2", m) for h, m in zip(hats, messages, strict=True)]

    def coarse(self, name, hat):
        x = self.relu(self.linear(f"{name}coarse_map", hat).view(1, 32, 7, 7))
        x = F.interpolate(x, size=(14, 14), mode="bilinear", align_corners=False)
        return self.conv(f"{name}coarse_head.2", x, 1)[0, 0]

    def modulated(self, name, x, z, residual=False):
        """x [M, C, H, W], z [M, D]: padded place by place."""
        y = self.ffn(f"{name}modulate_map.ffn_in", x)
        padded = torch.empty_like(y)
        for a in range(y.shape[2]):
            for b in range(y.shape[3]):
                padded[:, :, a, b] = z
        y = self.ffn(f"{name}modulate_map.ffn_out", y * padded, 1)
        return x + y if residual else y

    # Eq. 7
    def logits(self, name, S, scale, skip=False, shared=False):
        """S [N, P] → the P numbers before the softmax."""
        N, count = S.shape
        s = S * scale
        if shared:
            s = torch.stack([row - row.sum() / count for row in s])
        rows = []
        for i in range(N):
            if shared:
                row = []
                for p in range(count):
                    mean = s[:, p].sum() / N
                    one = self.mlp(f"{name}mlp3", torch.stack([s[i, p], mean]))[0]
                    row.append(one + (mean if skip else 0))
                rows.append(row)
            else:
                row = self.mlp(f"{name}mlp3", s[i])
                rows.append([row[p] + (s[i, p] if skip else 0) for p in range(count)])
        return torch.stack([max((r[p] for r in rows), key=float) for p in range(count)])

    # ----------------------------------------------------------------------------------- Fig. 2
    def stage(self, n, x):
        if n == 0:
            x = (x - 0.5) / 0.5
        return self.relu(self.conv(f"backbone.stages.{n}.0", x, stride=4 if n == 0 else 2))

    def up(self, x, like):
        return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)

    def network(self, imgs, h, text, *, on=ON, k=3, scale=10.0, gt=None, residual=False,
                placement="decoder", strides=(32, 16, 8), skip=False, shared=False):  # fmt: skip
        """One group: imgs [N, 3, H, W], h [N, D], text [P, D] → everything on the way."""
        N, out = len(imgs), {}
        S = torch.stack([torch.stack([a @ t / a.norm() / t.norm() for t in text]) for a in h])
        sigma = [float(S[:, p].sum()) for p in range(len(text))]
        chosen = sorted(range(len(text)), key=lambda p: -sigma[p])[:k] if gt is None else [gt] * k
        big = [t * math.sqrt(D) for t in text]
        if "clip_interaction" in on:
            name = "clip_interaction."
            hats = self.refined(name, [x * math.sqrt(D) for x in h])
            z = torch.stack(self.fused(name, hats, [big[p] for p in chosen]))
            out |= {"h_hat": torch.stack(hats), "z": z}
            out["coarse"] = torch.stack([self.coarse(name, x) for x in hats])
        if "clip_regularization" in on:
            logits = self.logits("clip_regularization.", S, scale, skip, shared)
            best = max(range(len(text)), key=lambda p: float(logits[p])) if gt is None else gt
            out |= {"class_logits": logits, "best": best}

        def refine(x, at):
            for name, where in zip(ON, strides, strict=True):
                if where != at or name not in on:
                    continue
                before = x
                if name == "isfc":
                    x = torch.stack(self.isfc("isfc.", [list(x)])[0])
                else:
                    z = out["z"] if name == "clip_interaction" else big[out["best"]].expand(N, D)
                    x = self.modulated(f"{name}.", x, z, residual)
                out[name] = before, x
            return x

        c = [self.stage(0, imgs)]
        for n in (1, 2, 3):
            x = self.stage(n, c[-1])
            c.append(refine(x, 4 * 2**n) if placement == "encoder" else x)
        inner = refine if placement == "decoder" else lambda x, at: x
        p = inner(self.block("lateral.32", c[3]), 32)
        p = inner(self.block("smooth.16", self.conv("lateral.16", c[2]) + self.up(p, c[2])), 16)
        p = inner(self.block("smooth.8", self.conv("lateral.8", c[1]) + self.up(p, c[1])), 8)
        p = self.conv("lateral4", c[0]) + self.up(self.conv("reduce4", p), c[0])
        p = self.conv("head.1", self.block("head.0", p))
        out["logits"] = self.up(p, imgs)[:, 0]
        return out


def watched(net, *args, **kw):
    """The network's output; Eq. 3's ĥ, Eq. 4's z and each module's map before and after."""
    seen, hooks = {}, []

    def watch(module, note):
        hooks.append(module.register_forward_hook(lambda m, i, o: seen.update(note(i, o))))

    for name in (n for n in ON if getattr(net, n) is not None):
        module = getattr(net, name)
        watch(getattr(module, "modulate_map", module), lambda i, o, n=name: {n: (i[0], o)})
    if net.clip_interaction is not None:
        watch(net.clip_interaction.mlp1, lambda i, o: {"h_hat": o})
        watch(net.clip_interaction.modulate_map, lambda i, o: {"z": i[1].view(2, -1, D)})
    out = net(*args, **kw)
    for hook in hooks:
        hook.remove()
    return out, seen


# -------------------------------------------------------------------------------------- Eq. 1, 2
def isfc(softmax="neighbours", **kw):
    torch.manual_seed(3)
    return stir(ISFC(8, softmax=softmax, **kw))


@pytest.mark.parametrize("softmax", ["neighbours", "channels"])
@pytest.mark.parametrize("N", [1, 2, 5])
def test_isfc_is_eq_1_and_2_forward_and_backward(softmax, N):
    m, weight = isfc(softmax), numbers(N, 8, 2, 3, seed=4)
    x = numbers(N, 8, 2, 3).requires_grad_()
    fast = m(x, torch.zeros(N, dtype=torch.long))
    slow = torch.stack(Twin(m).isfc("", [list(x)], softmax)[0])
    near(fast, slow)
    near(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (fast, slow)))
    if N == 1:  # as beside a copy of itself
        near(fast, m(torch.cat([x, x]), torch.zeros(2, dtype=torch.long))[:1])


def test_batch_statistics_of_isfc_are_those_of_all_edges_of_all_groups():
    m, sizes = isfc(bytes_at_once=1).train(), (3, 1, 4)
    x, group = numbers(8, 8, 2, 3), torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    twin = Twin(m, training=True)
    slow = twin.isfc("", [list(part) for part in x.split(sizes)])
    near(m(x, group), torch.stack(sum(slow, [])))


def test_isfc_starts_as_the_identity():
    x, group = numbers(3, 8, 2, 2).abs(), torch.zeros(3, dtype=torch.long)
    near(ISFC(8).double().eval()(x, group), x)
    literal = ISFC(8, softmax="channels").double().eval()(x, group)
    near(literal.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))  # another map of the same size
    assert (literal - x).abs().max() > 0.1


@pytest.mark.parametrize("softmax", ["neighbours", "channels"])
def test_parts_and_ragged_groups_change_nothing_forward_and_backward(softmax):
    group = torch.tensor([0, 0, 1, 2, 2, 2, 2, 2])
    x, weight = numbers(8, 8, 2, 2).requires_grad_(), numbers(8, 8, 2, 2, seed=4)

    def both(m, chosen):
        y = m(x[chosen], group[chosen])
        return y, torch.autograd.grad((y * weight[chosen]).sum(), x)[0][chosen]

    everything = torch.arange(8)
    whole = both(isfc(softmax), everything)
    for a, b in zip(both(isfc(softmax, bytes_at_once=1), everything), whole, strict=True):
        near(a, b)
    for g in range(3):
        chosen = (group == g).nonzero()[:, 0]
        for a, b in zip(both(isfc(softmax), chosen), whole, strict=True):
            near(a, b[chosen])


def test_neighbours_are_the_others_of_a_group_or_else_itself():
    index, valid = ISFC(8).neighbours(torch.tensor([0, 1, 1, 1]))
    assert valid.tolist() == [[True, False], [True, True], [True, True], [True, True]]
    assert index[0, 0] == 0
    assert [sorted(index[i].tolist()) for i in (1, 2, 3)] == [[2, 3], [1, 3], [1, 2]]


def test_an_image_may_attend_to_its_most_similar_others_alone():
    m, few, group = isfc(), isfc(most=2), torch.tensor([0, 1, 1, 1, 1, 1, 2, 2])
    x, h = numbers(8, 8, 2, 3), F.normalize(numbers(8, 4, seed=5), dim=1)
    y, alike = few(x, group, h), h @ h.T
    for i in range(8):
        others = [j for j in range(8) if j != i and group[j] == group[i]]
        chosen = [i, *sorted(others, key=lambda j: -float(alike[i, j]))[:2]]
        near(y[i], m(x[chosen], torch.zeros(len(chosen), dtype=torch.long))[0])
    assert (y - m(x, group)).abs().max() > 1e-3  # five are cut to two
    near(isfc(most=4)(x, group, h), m(x, group))


def test_isfc_neighbours_are_chosen_by_the_embeddings_that_the_network_is_given():
    alone = {"clip_interaction": False, "clip_regularization": False}
    net, nearest = network(**alone), network(**alone, isfc_neighbours=1)
    x, h, text = images(1, 5), unit(1, 5, D, seed=6), unit(P, D)
    out = nearest(x, 3 * h, text).logits[0]
    for i, j in enumerate((h[0] @ h[0].T - 2 * torch.eye(5)).argmax(1).tolist()):
        near(out[i], net(x[:, [i, j]], h[:, [i, j]], text).logits[0, 0])


# ------------------------------------------------------------------------------------------ Eq. 3–8
@pytest.mark.parametrize("side", [2, 9], ids=["by a map of D channels", "by a matrix an image"])
def test_modulation_is_eq_5_and_8_at_any_size_of_the_map(side, monkeypatch):
    m, x, z = Modulation(6, 10).double().eval(), numbers(3, 6, side, side), numbers(3, 10)
    want = m.ffn_out(m.ffn_in(x) * z[:, :, None, None])
    used, multiply = [], torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *a: used.append(a) or multiply(*a))
    near(m(x, z), want)
    assert bool(used) == (side == 9)


def test_interaction_is_eq_3_4_and_11s_decoder_forward_and_backward():
    torch.manual_seed(0)
    m = stir(CLIPInteraction(8, D))
    h, text = numbers(2, 4, D).requires_grad_(), numbers(2, 3, D, seed=2)
    present = torch.tensor([[True] * 4, [True, True, False, False]])
    h_hat = m.refine(h, present)
    z, coarse = m.fuse(h_hat, text, present), m.decode(h_hat)
    twin, slow = Twin(m), []
    for b, N in enumerate((4, 2)):
        hats = twin.refined("", list(h[b, :N]))
        zs = twin.fused("", hats, list(text[b]))
        small = [twin.coarse("", x) for x in hats]
        near(h_hat[b, :N], torch.stack(hats))
        near(z[b, :N], torch.stack(zs))
        near(coarse[b, :N], torch.stack(small))
        slow.append((torch.stack(zs), torch.stack(small)))
    for fast, one in ((z, 0), (coarse, 1)):
        weight = numbers(*fast.shape, seed=5)
        naive = sum((s[one] * weight[b, : len(s[one])]).sum() for b, s in enumerate(slow))
        a, b = (torch.autograd.grad(x, h, retain_graph=True)[0] for x in
                ((fast * weight)[present].sum(), naive))  # fmt: skip
        near(a, b)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_modulation_is_eq_5_and_8(residual, training):
    torch.manual_seed(0)
    for m in (
        CLIPInteraction(8, D, residual=residual),
        CLIPRegularization(8, D, P, 10.0, residual=residual),
    ):
        m = stir(m).train(training)
        x, z = numbers(3, 8, 2, 3).requires_grad_(), numbers(3, D, seed=2).requires_grad_()
        slow = Twin(m, training).modulated("", x, z, residual)
        fast, weight = m.modulate_map(x, z), numbers(3, 8, 2, 3, seed=3)
        near(fast, slow)
        grads = [torch.autograd.grad((y * weight).sum(), (x, z)) for y in (fast, slow)]
        for a, b in zip(*grads, strict=True):
            near(a, b)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_regularization_is_eq_6_and_7(skip, shared):
    torch.manual_seed(0)
    m = stir(CLIPRegularization(8, D, P, 10.0, skip=skip, shared=shared))
    S = numbers(2, 4, P).tanh() / 5
    present = torch.tensor([[True] * 4, [True, True, False, False]])
    logits = m.class_logits(S, present)
    for b, N in enumerate((4, 2)):
        expected = Twin(m).logits("", S[b, :N], 10.0, skip, shared)
        near(logits[b], expected)
        assert int(m.most_likely(logits)[b]) == max(range(P), key=lambda p: expected[p])
    if shared:  # it knows no word by its place
        order = torch.randperm(P)
        near(m.class_logits(S[..., order], present), logits[:, order])


def test_with_the_skip_training_starts_from_the_similarities():
    for shared in (False, True):
        m = CLIPRegularization(8, D, P, 10.0, skip=True, shared=shared).double()
        S, present = numbers(1, 3, P), torch.ones(1, 3, dtype=torch.bool)
        s = 10 * S
        s = (s - s.mean(-1, keepdim=True)).mean(1) if shared else s.amax(1)
        near(m.class_logits(S, present), s)


# ---------------------------------------------------------------------------------- whole network
CASES = [
    *({"on": [n for b, n in enumerate(ON) if modules >> b & 1]} for modules in range(8)),
    {"residual": True},
    {"skip": True},
    {"shared": True, "skip": True},
    {"placement": "encoder", "strides": (8, 16, 32)},
    {"strides": (16, 16, 8)},
    {"strides": (16, 16, 16)},
    {"gt": 0},
    {"gt": 4},
    {"k": 1},
    {"k": P},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_network_is_fig_2(case):
    on, gt = case.get("on", ON), case.get("gt")
    settings = {name: name in on for name in ON} | {"k": case.get("k", 3)}
    settings |= {"placement": case.get("placement", "decoder")}
    settings |= {"strides": case.get("strides", (32, 16, 8))} if "placement" not in case else {}
    settings |= {"modulation_residual": case.get("residual", False)}
    settings |= {"mlp3_skip": case.get("skip", False)}
    settings |= {"mlp3": "shared" if case.get("shared") else "vocabulary"}
    side = 32 if 8 in settings.get("strides", (8,))[:1] else 64  # attention in loops is slow
    net, x, h, text = network(**settings), images(2, 3, side), unit(2, 3, D), unit(P, D, seed=5)
    kw = {} if gt is None else {"target": torch.tensor([gt, -1])}
    out, seen = watched(net, x, h, text, **kw)
    maps = {name: seen.pop(name) for name in on}
    for b in range(2):
        twin = Twin(net).network(x[b], h[b], text, **case | ({"gt": None} if b else {}))
        for name, value in seen.items():
            near(value[b], twin[name])
        for name in on:
            for got, expected in zip(maps[name], twin[name], strict=True):
                near(got.unflatten(0, (2, 3))[b], expected)
        near(out.logits[b], twin["logits"])
        for name in ("coarse", "class_logits"):
            assert (getattr(out, name) is None) == (name not in twin)
            if name in twin:
                near(getattr(out, name)[b], twin[name])
        if "best" in twin:
            assert out.best[b] == twin["best"]
            near(v(out)[b], twin["class_logits"].exp() / twin["class_logits"].exp().sum())


def test_similarity_and_distilled_prompts_by_hand():
    net, h, text = network(), unit(1, 3, D), unit(P, D, seed=5)
    out = net(images(1, 3), h, text)
    S = [[float(h[0, i] @ text[p]) for p in range(P)] for i in range(3)]
    near(out.similarity[0], torch.tensor(S, dtype=torch.double))
    sigma = [sum(S[i][p] for i in range(3)) for p in range(P)]
    assert out.distilled[0].tolist() == sorted(range(P), key=lambda p: -sigma[p])[:3]
    near(net(images(1, 3), 3 * h, 2 * text).similarity, out.similarity)  # cosines, of any lengths


def test_gt_semantics_replace_the_class_and_the_prompts():
    net, x, h, text = network(), images(2, 3), unit(2, 3, D), unit(P, D, seed=5)
    own = net(x, h, text)
    for word in (0, 4):  # the first word is a word like any other
        out = net(x, h, text, target=torch.tensor([word, -1]))
        assert out.best.tolist() == [word, own.best[1]]
        assert out.distilled.tolist() == [[word] * 3, own.distilled[1].tolist()]
        near(out.logits[1], own.logits[1])  # −1: its own
        assert (out.logits[0] - own.logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("N", [1, 2, 5, 17])
@pytest.mark.parametrize("softmax", ["neighbours", "channels"])
def test_any_n_and_permuting_the_set_permutes_the_masks(N, softmax):
    net, x, h, text = network(isfc_softmax=softmax), images(1, N), unit(1, N, D), unit(P, D)
    out = net(x, h, text)
    assert out.logits.shape == (1, N, 32, 32) and out.logits.isfinite().all()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(N))
    moved = net(x[:, order], h[:, order], text)
    near(moved.logits, out.logits[:, order])
    near(moved.coarse, out.coarse[:, order])
    near(v(moved), v(out))


@pytest.mark.parametrize("k,expected", [(1, 1), (3, 3), (P, P), (P + 9, P)])
def test_k_from_one_to_more_than_there_are(k, expected):
    x, h, text = images(1, 2), unit(1, 2, D), unit(P, D)
    for out in (network(k=k)(x, h, text), network(k=2)(x, h, text, k=k)):
        assert out.distilled.shape == (1, expected)
        near(out.logits, network(k=expected)(x, h, text).logits)


def test_groups_of_a_batch_know_nothing_of_one_another():
    net, x, h, text = network(), images(2, 3), unit(2, 3, D), unit(P, D)
    out, alone = net(x, h, text), net(x[1:], h[1:], text)
    for name in ("logits", "coarse", "class_logits"):
        near(getattr(out, name)[1:], getattr(alone, name))


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing_forward_and_backward(training):
    present, text = torch.tensor([[True] * 4, [True, True, False, False]]), unit(P, D)
    truth = (images(2, 4, 64, seed=6)[:, :, 0] > 0.5).byte()

    def run(fill):
        net, x, h = network().train(training), images(2, 4, 64), unit(2, 4, D)
        x[1, 2:], h[1, 2:] = fill, text[6 if fill else 0]  # would put that prompt first
        x.requires_grad_()
        out = net(x, h, text, present=present)
        loss = total_loss(out, truth, present, torch.tensor([1, 4]), bce=0.5)[0]
        loss.backward()
        return out, x.grad, net.isfc.query.weight.grad, net.clip_interaction.mlp1[0].weight.grad

    (out, *grads), (other, *same) = run(0.0), run(1000.0)
    for name in ("logits", "coarse", "class_logits"):
        near(getattr(out, name), getattr(other, name))
    assert torch.equal(out.distilled, other.distilled)
    for a, b in zip(grads, same, strict=True):
        near(a, b)
    assert not out.logits[1, 2:].any() and not out.coarse[1, 2:].any() and not grads[0][1, 2:].any()
    if not training:
        alone = network()(images(2, 4, 64)[1:, :2], unit(2, 4, D)[1:, :2], text)
        near(out.logits[1:, :2], alone.logits)
        near(v(out)[1:], v(alone))


@pytest.mark.parametrize("side", [(32, 64), (96, 32)])
def test_any_size_divisible_by_32(side):
    x = torch.rand(1, 2, 3, *side, dtype=torch.double)
    assert network()(x, unit(1, 2, D), unit(P, D)).logits.shape == (1, 2, *side)


def test_given_maps_replace_the_backbone():
    net, x, h, text = network(), images(1, 3), unit(1, 3, D), unit(P, D)
    maps, whole = [m[None] for m in net.backbone(x[0])], net(x, h, text).logits
    for n in (1, 3, 4):
        near(net(None, h, text, maps=maps[:n]).logits, whole)
    encoder = network(placement="encoder")
    first = [m[None] for m in encoder.backbone(x[0])][:1]
    near(encoder(None, h, text, maps=first).logits, encoder(x, h, text).logits)
    with pytest.raises(ValueError, match="encoder"):
        encoder(None, h, text, maps=maps)


# ------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("softmax", ["neighbours", "channels"])
def test_gradcheck(softmax):
    check, x = torch.autograd.gradcheck, numbers(3, 8, 2, 2).requires_grad_()
    m = isfc(softmax)
    assert check(lambda x: m(x, torch.tensor([0, 0, 0])), x)
    inter, present = stir(CLIPInteraction(4, 8)), torch.ones(1, 2, dtype=torch.bool)
    h, text = numbers(1, 2, 8).requires_grad_(), numbers(1, 3, 8, seed=3)
    assert check(lambda h: inter.fuse(inter.refine(h, present), text, present), h)
    regular = stir(CLIPRegularization(4, 8, 5, 3.0, residual=True))
    x, z = numbers(3, 4, 2, 2).requires_grad_(), numbers(3, 8).requires_grad_()
    assert check(regular.modulate_map, (x, z))
    S, three = numbers(1, 3, 5).requires_grad_(), torch.ones(1, 3, dtype=torch.bool)
    assert check(lambda s: regular.class_logits(s, three), S)


def trained(net, loss):
    net.zero_grad()
    loss.backward()
    return {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}


def test_what_each_loss_teaches():
    net, present = network().train(), torch.ones(2, 3, dtype=torch.bool)
    x, h, text = images(2, 3, side=64), unit(2, 3, D), unit(P, D)
    truth = (images(2, 3, 64, seed=4)[:, :, 0] > 0.5).byte()
    everything = {n for n, _ in net.named_parameters()}
    mlp3 = {n for n in everything if ".mlp3." in n}
    decoder = {n for n in everything if "coarse" in n}
    mlp1 = {n for n in everything if ".mlp1." in n}
    out = net(x, h, text)
    assert trained(net, iou_loss(out.logits, truth, present)) == everything - mlp3 - decoder
    assert trained(net, coarse_loss(net(x, h, text).coarse, truth, present)) == mlp1 | decoder
    out = net(x, h, text)
    assert trained(net, classification_loss(out.class_logits, torch.tensor([1, 4]))) == mlp3
    out = net(x, h, text)
    loss, _ = total_loss(out, truth, present, torch.tensor([1, 4]))
    assert trained(net, loss) == everything


def test_the_coarse_loss_reaches_mlp1_as_in_the_twin():
    net, x, h, text = network(), images(1, 3), unit(1, 3, D), unit(P, D)
    name, weight = "clip_interaction.mlp1.0.weight", numbers(3, 14, 14, seed=8)
    out = net(x, h, text)
    (fast,) = torch.autograd.grad((out.coarse[0] * weight).sum(), net.get_parameter(name))
    twin = Twin(net)
    own = twin.grads(name)
    slow = (twin.network(x[0], h[0], text)["coarse"] * weight).sum()
    near(fast, torch.autograd.grad(slow, own)[0])


def test_one_tiny_batch_is_overfitted():
    torch.manual_seed(0)
    net = LCCo(
        backbone=TinyBackbone(), embedding_width=D, prompts=P, logit_scale=10.0, width=16,
        modulation_residual=True,
    )  # fmt: skip
    x, truth = torch.rand(1, 3, 3, 64, 64) * 0.3, torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    for n in range(3):
        truth[0, n, 8 + 8 * n : 40 + 8 * n, 16:48] = 1
    x += 0.6 * truth[:, :, None]
    h, text, present = unit(1, 3, D).float(), unit(P, D).float(), torch.ones(1, 3, dtype=torch.bool)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for _ in range(120):
        loss, _ = total_loss(net(x, h, text), truth, present, torch.tensor([2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out = net(x, h, text)  # with the batch's statistics: few steps do not settle the running ones
    mask = out.logits > 0
    J = (mask & (truth == 1)).sum() / (mask | (truth == 1)).sum()
    assert J > 0.95, float(J)
    assert out.best.item() == 2  # and MLP3 has learnt the class


def test_words_are_chosen_in_full_precision_whatever_the_training_uses():
    """Cosines as close together as a CLIP's: half precision would put other words first."""
    common = unit(1, D, seed=5)
    text = F.normalize(common + 0.02 * unit(P, D, seed=6), dim=-1).float()
    h = F.normalize(common + 0.02 * unit(6, D, seed=7), dim=-1).view(2, 3, D).float()
    net, x = network().float(), images(2, 3).float()
    with torch.no_grad():
        plain = net(x, h, text)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(x, h, text)
    assert (h.bfloat16() @ text.T.bfloat16()).float().sub(plain.similarity).abs().max() > 1e-4
    assert half.similarity.dtype == v(half).dtype == torch.float32
    assert half.logits.dtype == torch.bfloat16
    assert torch.equal(half.similarity, plain.similarity)
    assert torch.equal(half.distilled, plain.distilled)
    torch.testing.assert_close(v(half), v(plain), atol=1e-6, rtol=0)
