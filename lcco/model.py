"""LCCo's network: a top-down segmentation path and the three modules that refine its maps.

Letters as in the paper: B groups, N images a group, C channels, H×W a map, D width of the
image–text embeddings, P prompts, K distilled prompts; E ordered pairs of images of a group, J
neighbours of an image. `present` says which of the B×N inputs exist: these M images travel as one
flat list with a group number each, so ragged groups need no padding inside.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 4  # of both attentions, as in SuperGlue
STAGES = (2, 3, 4)  # where F¹, F², F³ are refined with placement `encoder`
Step = tuple[int, Callable, Tensor]  # a module's stride or stage, itself, what it refines by


@dataclass
class Output:
    """What `LCCo.forward` gives. Rows of absent images are zero."""

    logits: Tensor | None = None  # [B, N, H, W] mask logits at full size
    coarse: Tensor | None = None  # [B, N, 14, 14] logits of Eq. 11's masks; None: no interaction
    similarity: Tensor | None = None  # [B, N, P] cosines S
    distilled: Tensor | None = None  # [B, K] prompt indices, most similar first
    class_logits: Tensor | None = None  # [B, P] Eq. 7 before its softmax; None: no regularization
    best: Tensor | None = None  # [B] i* of Eq. 6, or the true class where one was given


def conv_block(c_in: int, c_out: int, kernel: int = 3) -> nn.Sequential:
    """Conv, norm, ReLU. torchvision's own costs this room two seconds of import."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


def conv_ffn(c_in: int, c_mid: int, c_out: int, kernel: int = 1) -> nn.Sequential:
    """Conv, norm, ReLU, conv."""
    block = conv_block(c_in, c_mid, 1)
    return nn.Sequential(*block, nn.Conv2d(c_mid, c_out, kernel, padding=kernel // 2))


def mlp(c_in: int, c_mid: int, c_out: int) -> nn.Sequential:
    """Linear, ReLU, linear."""
    return nn.Sequential(nn.Linear(c_in, c_mid), nn.ReLU(inplace=True), nn.Linear(c_mid, c_out))


def set_mean(x: Tensor, present: Tensor) -> Tensor:
    """The mean of a set's present vectors, for each of them: [B, N, C] → [B, N, C]."""
    weight = present[..., None].to(x)  # [B, N, 1]
    mean = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    return mean.expand_as(x)


class Modulation(nn.Module):
    """A map modulated by a semantic. Deviation (`residual`): adds the map; the equations do not."""

    def __init__(self, channels: int, width: int, *, residual: bool = False):
        super().__init__()
        self.residual = residual
        self.ffn_in = conv_ffn(channels, channels, width)
        self.ffn_out = conv_ffn(width, channels, channels, kernel=3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x, returned: [M, C, H, W]; z: [M, D], entries of order 1. Paper: Eq. (5), Eq. (8)."""
        # F̂²_i = FFN3(FFN2(F²_i) ⊙ PAD(z_i)), F̂³_i = FFN5(FFN4(F³_i) ⊙ PAD(h^txt_{i*}));
        # PAD repeats a vector over the map, so with the 1×1 convolutions on both sides of ⊙ it is
        # one C×C matrix an image; a map of D channels is made only where that is less work.
        inner, outer, (H, W), D = self.ffn_in[-1], self.ffn_out[0], x.shape[2:], z.shape[1]
        y = self.ffn_in[:-1](x)  # [M, C, H, W]
        if x.shape[1] * (D + H * W) <= 2 * D * H * W:
            mix = outer.weight[:, :, 0, 0] * z[:, None]  # [M, C, D]
            bias, weight = (mix @ inner.bias)[:, None], (mix @ inner.weight[:, :, 0, 0]).mT
            y = torch.baddbmm(bias, y.flatten(2).mT, weight).mT.unflatten(2, (H, W))
        else:
            y = outer(inner(y) * z[:, :, None, None])
        y = self.ffn_out[1:](y)  # [M, C, H, W]
        return x + y if self.residual else y


class ISFC(nn.Module):
    """Image-set feature correspondence: cross-attention of each image's map to every other's.

    All edges share the weights, so any N works. Deviation: a lone image attends to itself; what
    passed through would be a map that later layers never saw. softmax: `neighbours` weighs the J
    edges of a channel and position; `channels`, the paper's sentence read literally, all J·C
    channels. Deviation: the latter's average, of α near 1/(J·C), gets the norm of the plain one;
    heads, norm and layer sizes follow SuperGlue, which the paper cites and builds on. Deviation
    (`most`): an image attends to that many others, those with the most similar embeddings.
    """

    def __init__(self, channels: int, *, softmax: str = "neighbours", most: int | None = None,
                 bytes_at_once: int = 2**28):  # fmt: skip
        super().__init__()
        C = channels
        self.over_channels, self.most = softmax == "channels", most
        self.bytes_at_once = bytes_at_once
        self.query, self.value, self.merge = (nn.Conv2d(C, C, 1) for _ in range(3))
        self.key = nn.Conv2d(C, C, 1, bias=False)  # a bias adds the same to a softmax's scores
        self.ffn1 = conv_ffn(2 * C, 2 * C, C)
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        nn.init.dirac_(self.conv.weight)  # all starts as the identity, FFN1 as in SuperGlue
        for zero in (self.conv.bias, *self.ffn1[-1].parameters()):
            nn.init.zeros_(zero)

    @staticmethod
    def tokens(x: Tensor) -> Tensor:
        """[M, C, H, W] → [M, heads, HW, C/heads]."""
        return x.flatten(2).unflatten(1, (HEADS, -1)).mT

    def neighbours(self, group: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Each image's others of its group, or else itself: index, valid: [M, J].

        group: [M]; h: [M, D], of unit norm, needed with `most`.
        """
        same = (group[:, None] == group).fill_diagonal_(False)
        same = same | torch.diag(~same.any(dim=1))
        likeness = 0 if self.most is None else h @ h.mT  # at least −1
        order = same * (2 + likeness)  # [M, M]
        J = min(int(same.sum(1).max()), self.most or len(group))
        index = order.argsort(dim=1, descending=True, stable=True)[:, :J]
        return index, same.gather(1, index)

    def edge(self, F_i: Tensor, q_i: Tensor, k_j: Tensor, v_j: Tensor) -> Tensor:
        """The value of node i updated along the edge from j. Paper: Eq. (1).

        F_i, returned: [E, C, H, W]; q_i, k_j, v_j: [E, heads, HW, C/heads], of F_i and F_j.
        """
        # m_{j→i} = Att(F_i, F_j, F_j)
        m = F.scaled_dot_product_attention(q_i, k_j, v_j)  # [E, heads, HW, C/heads]
        m = self.merge(m.mT.reshape(F_i.shape))  # [E, C, H, W]
        # F̄_i^j = F_i + FFN1(F_i ‖ m_{j→i})
        return F_i + self.ffn1(torch.cat([F_i, m], dim=1))  # [E, C, H, W]

    def aggregate(self, edges: Tensor, valid: Tensor) -> Tensor:
        """The weighted average [M, C, H, W] of a node's updated values. Paper: Eq. (2).

        edges: [M, J, C, H, W], the F̄; valid: [M, J], false where a node has fewer neighbours.
        """
        absent = ~valid[:, :, None, None, None]
        edges = edges.masked_fill(absent, 0)
        # α_i^j = Softmax of the F̄_i themselves
        scores = edges.masked_fill(absent, float("-inf"))
        scores = scores.flatten(1, 2) if self.over_channels else scores
        alpha = scores.softmax(dim=1).view_as(edges)  # [M, J, C, H, W]
        average = (alpha * edges).sum(dim=1)  # [M, C, H, W]
        if self.over_channels:
            plain = edges.sum(dim=1) / valid.sum(dim=1)[:, None, None, None]  # [M, C, H, W]
            norm = partial(torch.linalg.vector_norm, dim=(1, 2, 3), keepdim=True)
            average = average * (norm(plain) / norm(average).clamp(min=1e-12))
        # F̂_i = Conv(Σ_{j≠i} α_i^j ⊙ F̄_i^j)
        return self.conv(average)  # [M, C, H, W]

    def forward(self, x: Tensor, group: Tensor, h: Tensor | None = None) -> Tensor:
        """Refine F¹ [M, C, H, W]. group: [M] group numbers; h: as of `neighbours`."""
        index, valid = self.neighbours(group, h)  # [M, J] each
        (M, J), out = index.shape, []
        q, k, v = (self.tokens(f(x)) for f in (self.query, self.key, self.value))
        # Batch statistics see all edges in training; evaluation goes in parts where a set is large.
        edge_bytes = 10 * x[:1].numel() * x.element_size()  # about: F_i, m, FFN1's maps, α
        at_once = M if self.training else self.bytes_at_once // (edge_bytes * J)
        for i in torch.arange(M, device=x.device).split(max(1, at_once)):
            has = valid[i]  # [m, J]
            src, dst = i[:, None].expand_as(has)[has], index[i][has]  # [E] each
            bar = self.edge(x[src], q[src], k[dst], v[dst])  # [E, C, H, W]
            edges = bar.new_zeros(*has.shape, *x.shape[1:]).index_put((has,), bar)
            out.append(self.aggregate(edges, has))
        return torch.cat(out)


class CLIPInteraction(nn.Module):
    """CLIP interaction: images and Top-K prompts give one semantic an image, which modulates F².

    Deviation: MLP1 ends in a LayerNorm, and images and text are scaled by √D, so that both kinds of
    token have entries of order 1 (the paper does not state how unit-norm text meets ĥ).
    """

    def __init__(self, channels: int, width: int, *, residual: bool = False):
        super().__init__()
        D = width
        self.mlp1 = mlp(2 * D, D, D).append(nn.LayerNorm(D))
        self.attention = nn.MultiheadAttention(D, HEADS, batch_first=True)
        self.mlp2 = mlp(D, D, D)
        self.modulate_map = Modulation(channels, D, residual=residual)
        # Eq. 11's light decoder: a vector to a 7×7 map, twice as large at the end.
        self.coarse_map = nn.Linear(D, 32 * 7 * 7)
        up, conv = nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(32, 1, 3, padding=1)
        self.coarse_head = nn.Sequential(nn.ReLU(inplace=True), up, conv)

    def refine(self, h: Tensor, present: Tensor) -> Tensor:
        """Image embeddings h [B, N, D], of order 1, beside the set's mean. Paper: Eq. (3)."""
        # ĥ_i = MLP1([h_i ‖ h̄]), h̄ = (1/N) Σ_j h_j
        return self.mlp1(torch.cat([h, set_mean(h, present)], dim=-1))  # [B, N, D]

    def fuse(self, h_hat: Tensor, text: Tensor, present: Tensor) -> Tensor:
        """One semantic an image [B, N, D] from all and text [B, K, D]. Paper: Eq. (4)."""
        # T: the N refined embeddings and K prompts, stacked
        T = torch.cat([h_hat, text], dim=1)  # [B, N+K, D]
        absent = F.pad(~present, (0, text.shape[1]))  # [B, N+K]
        # z_i = ĥ_i + MLP2(Att(ĥ_i, T, T))
        message, _ = self.attention(h_hat, T, T, key_padding_mask=absent, need_weights=False)
        return h_hat + self.mlp2(message)  # [B, N, D]

    def decode(self, h_hat: Tensor) -> Tensor:
        """The coarse masks' logits [B, N, 14, 14], of Eq. 11, from ĥ [B, N, D]."""
        maps = self.coarse_map(h_hat.flatten(0, 1)).view(-1, 32, 7, 7)  # [BN, 32, 7, 7]
        return self.coarse_head(maps).view(*h_hat.shape[:2], 14, 14)


class CLIPRegularization(nn.Module):
    """CLIP regularization: the set's most likely class is found; its text embedding modulates F³.

    The argmax passes no gradient: MLP3 learns from Eq. 12 alone. Deviation (`shared`): Eq. 12
    teaches a P→P MLP3 never to choose a word that no training group was of. One small network for
    all words, of a word's similarity to the image and to the set, may choose unseen classes, and
    fits any vocabulary. Deviation (`skip`): adds MLP3's input (`shared`: the set's), so training
    starts from CLIP's own opinion. Deviation: cosines are scaled by CLIP's logit scale, text by √D.
    """

    def __init__(self, channels: int, width: int, prompts: int, logit_scale: float, *,
                 residual: bool = False, skip: bool = False, shared: bool = False):  # fmt: skip
        super().__init__()
        P = prompts
        self.logit_scale, self.skip, self.shared = logit_scale, skip, shared
        self.mlp3 = mlp(2, 32, 1) if shared else mlp(P, min(P, 256), P)
        for zero in self.mlp3[-1].parameters() if skip else ():
            nn.init.zeros_(zero)
        self.modulate_map = Modulation(channels, width, residual=residual)

    def class_logits(self, similarity: Tensor, present: Tensor) -> Tensor:
        """How likely each prompt is the set's class [B, P], before the softmax. Paper: Eq. (7).

        similarity: [B, N, P] cosines, scaled by CLIP's logit scale here; present: [B, N].
        """
        s = similarity * self.logit_scale  # [B, N, P]
        if self.shared:
            s = s - s.mean(dim=-1, keepdim=True)  # what all words share says nothing of any of them
            own, s = s, set_mean(s, present)  # [B, N, P] each
            logits = self.mlp3(torch.stack([own, s], dim=-1))[..., 0]  # [B, N, P]
        else:
            logits = self.mlp3(s)  # [B, N, P]
        logits = logits + s if self.skip else logits
        # v = Softmax(MAX_i(MLP3(s_i)))
        return logits.masked_fill(~present[..., None], float("-inf")).amax(dim=1)  # [B, P]

    @staticmethod
    def most_likely(class_logits: Tensor) -> Tensor:
        """The most likely class [B]. Paper: Eq. (6)."""
        # i* = argmax_p v_p: the softmax keeps the order
        return class_logits.argmax(dim=-1)  # [B]


class LCCo(nn.Module):
    """The network of Fig. 2; with the three switches off it is the Baseline.

    backbone: gives maps at strides 4, 8, 16, 32 (`lcco.backbones.Backbone`). embedding_width: D.
    prompts: P; unless MLP3 is `shared`, weights belong to one vocabulary in one order.
    placement: `decoder` refines the top-down path (FPN's: the paper names a property alone) at
    `strides`, F¹ coarse to F³ fine; `encoder` backbone stages 2, 3, 4, each feeding the next.
    """

    def __init__(self, *, backbone: nn.Module, embedding_width: int, prompts: int, width: int = 256,
                 logit_scale: float = 100.0, isfc: bool = True, clip_interaction: bool = True,
                 clip_regularization: bool = True, isfc_softmax: str = "neighbours",
                 placement: str = "decoder", strides: tuple[int, int, int] = (32, 16, 8),
                 isfc_neighbours: int | None = None, k: int = 5, modulation_residual: bool = False,
                 mlp3: str = "vocabulary", mlp3_skip: bool = False):  # fmt: skip
        super().__init__()
        decoder = placement == "decoder"
        self.backbone, self.k, self.at = backbone, k, tuple(strides) if decoder else STAGES
        c4, c8, c16, c32 = backbone.channels
        C, fine = width, width // 2
        block, conv = conv_block, partial(nn.Conv2d, kernel_size=1)
        self.lateral = nn.ModuleDict({"32": block(c32, C), "16": conv(c16, C), "8": conv(c8, C)})
        self.smooth = nn.ModuleDict({"16": block(C, C), "8": block(C, C)})
        self.lateral4, self.reduce4 = conv(c4, fine), conv(C, fine)
        self.head = nn.Sequential(block(fine, fine), conv(fine, 1))

        C1, C2, C3 = (C, C, C) if decoder else (c8, c16, c32)  # channels of F¹, F², F³
        D, how = embedding_width, {"residual": modulation_residual}
        self.isfc = ISFC(C1, softmax=isfc_softmax, most=isfc_neighbours) if isfc else None
        self.clip_interaction = CLIPInteraction(C2, D, **how) if clip_interaction else None
        how |= {"skip": mlp3_skip, "shared": mlp3 == "shared"}
        regular = partial(CLIPRegularization, C3, D, prompts, logit_scale, **how)
        self.clip_regularization = regular() if clip_regularization else None

    def forward(self, images: Tensor | None, image_embeddings: Tensor, prompt_embeddings: Tensor, *,
                maps: list[Tensor] | None = None, present: Tensor | None = None,
                target: Tensor | None = None, k: int | None = None) -> Output:  # fmt: skip
        """Segment the common object of each group.

        images: [B, N, 3, H, W] in 0..1, H and W divisible by 32; or None with `maps`, the
        backbone's leading maps [B, N, C, h, w], stride 4 first. image_embeddings: [B, N, D],
        prompt_embeddings: [P, D], unit-norm. present: [B, N], false for padding. target: [B] prompt
        of the true class ("GT semantics": replaces i* and the distilled prompts), −1 = none. k:
        distilled prompts; default the constructor's.
        """
        if present is None:
            present = image_embeddings.new_ones(image_embeddings.shape[:2], dtype=torch.bool)
        out, steps = self.semantics(image_embeddings, prompt_embeddings, present, target, k)
        images = None if images is None else images[present]  # [M, 3, H, W]
        logits = self.segment(images, [m[present] for m in maps or []], steps)  # [M, H, W]
        out.logits = logits.new_zeros(*present.shape, *logits.shape[1:])
        out.logits = out.logits.index_put((present,), logits)  # [B, N, H, W]
        return out

    def semantics(self, images: Tensor, prompts: Tensor, present: Tensor, target: Tensor | None,
                  k: int | None) -> tuple[Output, list[Step]]:  # fmt: skip
        """From embeddings [B, N, D] and [P, D] to the modules' steps on the maps, in order."""
        P, D = prompts.shape
        group = present.nonzero()[:, 0]  # [M] group numbers
        # S, and later v, always in full precision: cosines of a CLIP lie so close together that
        # half precision would put other words first in training than in use.
        with torch.autocast(images.device.type, enabled=False):
            S = F.normalize(images, dim=-1) @ F.normalize(prompts, dim=-1).T  # [B, N, P]
        S = S * present[..., None]
        # σ = Σ_i S_i; the distilled prompts are its Top-K
        distilled = S.sum(dim=1).topk(min(k or self.k, P), dim=-1).indices  # [B, K]
        if target is not None:
            distilled = torch.where(target[:, None] >= 0, target[:, None], distilled)
        out, steps = Output(similarity=S, distilled=distilled), []
        text = prompts * D**0.5  # [P, D]: a unit vector's entries are near 1/√D; order 1 is wanted
        first, second, third = self.at
        if self.isfc is not None:
            alike = F.normalize(images, dim=-1)[present]  # [M, D]
            steps.append((first, partial(self.isfc, h=alike), group))
        if (inter := self.clip_interaction) is not None:
            h_hat = inter.refine(images * D**0.5, present)  # [B, N, D]
            z = inter.fuse(h_hat, text[distilled], present)[present]  # [M, D]
            out.coarse = inter.decode(h_hat) * present[..., None, None]
            steps.append((second, inter.modulate_map, z))
        if (regular := self.clip_regularization) is not None:
            with torch.autocast(images.device.type, enabled=False):
                out.class_logits = regular.class_logits(S, present)  # [B, P]
            out.best = regular.most_likely(out.class_logits)  # [B]
            if target is not None:
                out.best = torch.where(target >= 0, target, out.best)
            steps.append((third, regular.modulate_map, text[out.best][group]))
        return out, steps

    def segment(self, images: Tensor | None, maps: list[Tensor], steps: list[Step]) -> Tensor:
        """Mask logits [M, H, W] of images [M, 3, H, W], or of the backbone's leading maps."""
        if self.at == STAGES and len(maps) > 1:
            raise ValueError("placement `encoder` refines stages 2 to 4: give the first map alone")

        def refine(x: Tensor, at: int) -> Tensor:
            for where, module, cue in steps:
                x = module(x, cue) if where == at else x  # [M, C, h, w]
            return x

        maps = maps or [self.backbone.stages[0](self.backbone.normalise(images))]
        for n in range(len(maps), 4):
            maps.append(refine(self.backbone.stages[n](maps[-1]), n + 1))
        c4, c8, c16, c32 = maps
        p = refine(self.lateral["32"](c32), 32)  # [M, C, H/32, W/32]
        p = self.smooth["16"](_add_resized(self.lateral["16"](c16), p))  # [M, C, H/16, W/16]
        p = refine(p, 16)
        p = self.smooth["8"](_add_resized(self.lateral["8"](c8), p))  # [M, C, H/8, W/8]
        p = refine(p, 8)
        p = self.head(_add_resized(self.lateral4(c4), self.reduce4(p)))  # [M, 1, H/4, W/4]
        return F.interpolate(p, scale_factor=4, mode="bilinear", align_corners=False)[:, 0]


def _add_resized(fine: Tensor, coarse: Tensor) -> Tensor:
    return fine + F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)
