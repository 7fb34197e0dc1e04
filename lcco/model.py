"""LCCo's network: a top-down segmentation path and the three modules that refine its maps.

Letters as in the paper: B groups, N images a group, C channels, H×W a map, D width of the
image–text embeddings, P prompts, K distilled prompts; E ordered pairs of images of a group, J
neighbours of an image. `present` says which of the B×N inputs exist: these M images travel as one
flat list with a group number each, so ragged groups need no padding inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 4  # of both attentions, as in SuperGlue
STAGES = (2, 3, 4)  # where F¹, F², F³ are refined with placement `encoder`


@dataclass
class Output:
    """What `LCCo.forward` gives. Rows of absent images are zero."""

    logits: Tensor | None = None  # [B, N, H, W] mask logits at full size
    coarse: Tensor | None = None  # [B, N, 14, 14] logits of Eq. 11's masks; None: no interaction
    similarity: Tensor | None = None  # [B, N, P] cosines S
    distilled: Tensor | None = None  # [B, K] prompt indices, most similar first
    class_logits: Tensor | None = None  # [B, P] Eq. 7 before its softmax; None: no regularization
    best: Tensor | None = None  # [B] i* of Eq. 6, or the true class where one was given
    maps: dict[str, tuple[Tensor, Tensor]] | None = None  # module → before, after [B, N, C, h, w]

    @property
    def v(self) -> Tensor | None:
        """Eq. 7's probabilities [B, P], which sum to 1; None without CLIP regularization."""
        return None if self.class_logits is None else self.class_logits.softmax(dim=-1)


def conv_block(c_in: int, c_out: int) -> nn.Sequential:
    """3×3 conv, norm, ReLU."""
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


def conv_ffn(c_in: int, c_mid: int, c_out: int, kernel: int = 1) -> nn.Sequential:
    """A convolutional feed-forward network: conv, norm, ReLU, conv."""
    first = nn.Conv2d(c_in, c_mid, 1, bias=False)
    last = nn.Conv2d(c_mid, c_out, kernel, padding=kernel // 2)
    return nn.Sequential(first, nn.BatchNorm2d(c_mid), nn.ReLU(inplace=True), last)


def mlp(c_in: int, c_mid: int, c_out: int) -> nn.Sequential:
    """Linear, ReLU, linear."""
    return nn.Sequential(nn.Linear(c_in, c_mid), nn.ReLU(inplace=True), nn.Linear(c_mid, c_out))


def set_mean(x: Tensor, present: Tensor) -> Tensor:
    """The mean of a set's present vectors, for each of them: [B, N, C] → [B, N, C]."""
    weight = present[..., None].to(x)  # [B, N, 1]
    mean = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    return mean.expand_as(x)


class Modulation(nn.Module):
    """FFN_out(FFN_in(F) ⊙ PAD(z)): the form that Eq. 5 and Eq. 8 share. PAD repeats z over the map.

    Deviation (`modulation_residual`): adds F; the printed equations have no residual.
    """

    def __init__(self, channels: int, width: int, *, residual: bool = False):
        super().__init__()
        self.residual = residual
        self.ffn_in = conv_ffn(channels, channels, width)
        self.ffn_out = conv_ffn(width, channels, channels, kernel=3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x, returned: [M, C, H, W]; z: [M, D] with entries of order 1."""
        y = self.ffn_out(self.ffn_in(x) * z[:, :, None, None])  # [M, C, H, W]
        return x + y if self.residual else y


class ISFC(nn.Module):
    """Image-set feature correspondence: cross-attention of each image's map to every other's.

    All edges of the complete graph share the weights, so any N works; a lone image passes through.
    softmax: `neighbours` weighs the J edges against one another at each channel and position;
    `channels` is the paper's sentence read literally, over the stacked J·C channels; Deviation: as
    its α are of order 1/(J·C), each map is brought to the norm that the plain average has.
    Deviation: heads, norm and layer sizes follow SuperGlue, which the paper cites and builds on.
    """

    def __init__(self, channels: int, *, softmax: str = "neighbours", edges_at_once: int = 512):
        super().__init__()
        C = channels
        self.softmax, self.edges_at_once = softmax, edges_at_once
        self.query, self.value, self.merge = (nn.Conv2d(C, C, 1) for _ in range(3))
        self.key = nn.Conv2d(C, C, 1, bias=False)  # a bias adds the same to a softmax's scores
        self.ffn1 = conv_ffn(2 * C, 2 * C, C)
        nn.init.zeros_(self.ffn1[-1].weight)  # F̄ starts as F, as in SuperGlue
        nn.init.zeros_(self.ffn1[-1].bias)
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        nn.init.dirac_(self.conv.weight)  # the identity: training departs from the Baseline
        nn.init.zeros_(self.conv.bias)

    @staticmethod
    def tokens(x: Tensor) -> Tensor:
        """[M, C, H, W] → [M, heads, HW, C/heads]."""
        M, C, H, W = x.shape
        return x.reshape(M, HEADS, C // HEADS, H * W).transpose(-1, -2)

    @staticmethod
    def neighbours(group: Tensor) -> tuple[Tensor, Tensor]:
        """Each image's other images of its group: index and valid, [M, J] each; group: [M]."""
        same = group[:, None] == group[None, :]
        same.fill_diagonal_(False)
        J = int(same.sum(1).max()) if len(group) else 0
        index = same.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :J]
        return index, same.gather(1, index)

    def edge(self, F_i: Tensor, q_i: Tensor, k_j: Tensor, v_j: Tensor) -> Tensor:
        """The value of node i updated along the edge from j. Paper: Eq. (1).

        F_i, returned: [E, C, H, W]; q_i, k_j, v_j: [E, heads, HW, C/heads], of F_i and F_j.
        """
        # m_{j→i} = Att(F_i, F_j, F_j)
        m = F.scaled_dot_product_attention(q_i, k_j, v_j)  # [E, heads, HW, C/heads]
        m = self.merge(m.transpose(-1, -2).reshape(F_i.shape))  # [E, C, H, W]
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
        scores = scores if self.softmax == "neighbours" else scores.flatten(1, 2)
        alpha = scores.softmax(dim=1).view_as(edges)  # [M, J, C, H, W]
        average = (alpha * edges).sum(dim=1)  # [M, C, H, W]
        if self.softmax == "channels":
            plain = edges.sum(dim=1) / valid.sum(dim=1)[:, None, None, None]  # [M, C, H, W]
            average = average * (_norm(plain) / _norm(average).clamp(min=1e-12))
        # F̂_i = Conv(Σ_{j≠i} α_i^j ⊙ F̄_i^j)
        return self.conv(average)  # [M, C, H, W]

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        """Refine F¹ [M, C, H, W]. group: [M] group numbers."""
        M, C, H, W = x.shape
        index, valid = self.neighbours(group)  # [M, J] each
        J, out = index.shape[1], x.clone()
        nodes = valid.any(dim=1).nonzero()[:, 0]  # images that have neighbours
        if len(nodes) == 0:
            return out
        q, k, v = (self.tokens(f(x)) for f in (self.query, self.key, self.value))
        # Batch statistics see all edges in training; evaluation goes in parts where a set is large.
        at_once = len(nodes) if self.training else max(1, self.edges_at_once // J)
        for i in nodes.split(at_once):
            has = valid[i]  # [m, J]
            src, dst = i[:, None].expand_as(has)[has], index[i][has]  # [E] each
            bar = self.edge(x[src], q[src], k[dst], v[dst])  # [E, C, H, W]
            edges = bar.new_zeros(len(i), J, C, H, W).index_put(has.nonzero(as_tuple=True), bar)
            out = out.index_put((i,), self.aggregate(edges, has))
        return out


class CLIPInteraction(nn.Module):
    """CLIP interaction: images and Top-K prompts give one semantic an image, which modulates F².

    Deviation: MLP1 ends in a LayerNorm and text is scaled by √D, so that both kinds of token have
    entries of order 1 (the paper does not state how unit-norm text meets un-normalised ĥ).
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
        absent = torch.cat([~present, present.new_zeros(text.shape[:2])], dim=1)  # [B, N+K]
        # z_i = ĥ_i + MLP2(Att(ĥ_i, T, T))
        message, _ = self.attention(h_hat, T, T, key_padding_mask=absent, need_weights=False)
        return h_hat + self.mlp2(message)  # [B, N, D]

    def modulate(self, x: Tensor, z: Tensor) -> Tensor:
        """F² [M, C, H, W] refined by the fused semantic z [M, D]. Paper: Eq. (5)."""
        # F̂²_i = FFN3(FFN2(F²_i) ⊙ PAD(z_i))
        return self.modulate_map(x, z)

    def decode(self, h_hat: Tensor) -> Tensor:
        """The coarse masks' logits [B, N, 14, 14], of Eq. 11, from ĥ [B, N, D]."""
        B, N, _ = h_hat.shape
        maps = self.coarse_map(h_hat.flatten(0, 1)).view(-1, 32, 7, 7)  # [BN, 32, 7, 7]
        return self.coarse_head(maps).view(B, N, 14, 14)


class CLIPRegularization(nn.Module):
    """CLIP regularization: the set's most likely class is found; its text embedding modulates F³.

    The argmax passes no gradient: MLP3 learns from Eq. 12 alone.
    Deviation (`mlp3: shared`): Eq. 12 teaches a P→P MLP3 never to choose a word that no training
    group was of. `shared` is one small network for all words, of a word's similarity to the image
    and, on average, to the set: unseen classes may be chosen, and any vocabulary fits.
    Deviation (`mlp3_skip`): adds MLP3's input (`shared`: the average), so that training starts
    from CLIP's own opinion.
    """

    def __init__(
        self, channels: int, width: int, prompts: int, logit_scale: float, *,
        residual: bool = False, skip: bool = False, shared: bool = False,
    ):  # fmt: skip
        super().__init__()
        P = prompts
        self.logit_scale, self.skip, self.shared = logit_scale, skip, shared
        self.mlp3 = mlp(2, 32, 1) if shared else mlp(P, min(P, 256), P)
        if skip:
            nn.init.zeros_(self.mlp3[-1].weight)
            nn.init.zeros_(self.mlp3[-1].bias)
        self.modulate_map = Modulation(channels, width, residual=residual)

    def class_logits(self, similarity: Tensor, present: Tensor) -> Tensor:
        """How likely each prompt is the set's class [B, P], before the softmax. Paper: Eq. (7).

        similarity: [B, N, P] cosines, scaled by CLIP's logit scale here; present: [B, N].
        """
        s = similarity * self.logit_scale  # [B, N, P]
        if self.shared:
            s = s - s.mean(dim=-1, keepdim=True)  # what all words share says nothing of any of them
            mean = set_mean(s, present)  # [B, N, P]
            logits = self.mlp3(torch.stack([s, mean], dim=-1))[..., 0]  # [B, N, P]
            s = mean
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

    def modulate(self, x: Tensor, h_txt: Tensor) -> Tensor:
        """F³ [M, C, H, W] refined by the most likely class's text [M, D]. Paper: Eq. (8)."""
        # F̂³_i = FFN5(FFN4(F³_i) ⊙ PAD(h^txt_{i*}))
        return self.modulate_map(x, h_txt)


@dataclass
class Cues:
    """What the maps of the M present images are refined by, and `maps` to note them in."""

    group: Tensor  # [M] group numbers
    z: Tensor | None = None  # [M, D] of Eq. 4
    h_txt: Tensor | None = None  # [M, D], the embedding of Eq. 6's class
    maps: dict[str, tuple[Tensor, Tensor]] | None = None

    def note(self, module: str, before: Tensor, after: Tensor) -> Tensor:
        """Keep a module's map before and after, where that is asked for."""
        if self.maps is not None:
            self.maps[module] = before, after
        return after


class LCCo(nn.Module):
    """The whole network; with the three switches off it is the Baseline.

    backbone: gives maps at strides 4, 8, 16, 32 (`lcco.backbones.Backbone`). embedding_width: D.
    prompts: P; unless MLP3 is `shared`, weights belong to one vocabulary in one order.
    placement: `decoder` refines the top-down path at `strides` (F¹ coarse to F³ fine), `encoder`
    backbone stages 2, 3, 4, each feeding the next.
    Source: Duan et al., Fig. 2; the top-down path is FPN's, as the paper names a property alone.
    Raises: ValueError for strides that are not of 32, 16, 8, or rise.
    """

    def __init__(
        self, *, backbone: nn.Module, embedding_width: int, prompts: int, width: int = 256,
        logit_scale: float = 100.0, isfc: bool = True, clip_interaction: bool = True,
        clip_regularization: bool = True, isfc_softmax: str = "neighbours",
        placement: str = "decoder", strides: tuple[int, int, int] = (32, 16, 8), k: int = 5,
        modulation_residual: bool = False, mlp3: str = "vocabulary", mlp3_skip: bool = False,
    ):  # fmt: skip
        super().__init__()
        decoder = placement == "decoder"
        if decoder and (set(strides) - {8, 16, 32} or list(strides) != sorted(strides)[::-1]):
            raise ValueError(f"strides, of F1 to F3, must be of 32, 16, 8 and not rise: {strides}")
        self.backbone, self.k, self.at = backbone, k, tuple(strides) if decoder else STAGES
        c4, c8, c16, c32 = backbone.channels
        C, fine = width, width // 2
        self.lateral = nn.ModuleDict(
            {"32": conv_block(c32, C), "16": nn.Conv2d(c16, C, 1), "8": nn.Conv2d(c8, C, 1)}
        )
        self.smooth = nn.ModuleDict({"16": conv_block(C, C), "8": conv_block(C, C)})
        self.lateral4, self.reduce4 = nn.Conv2d(c4, fine, 1), nn.Conv2d(C, fine, 1)
        self.head = nn.Sequential(conv_block(fine, fine), nn.Conv2d(fine, 1, 1))

        C1, C2, C3 = (C, C, C) if decoder else (c8, c16, c32)  # channels of F¹, F², F³
        D, residual, shared = embedding_width, modulation_residual, mlp3 == "shared"
        self.isfc = self.clip_interaction = self.clip_regularization = None
        if isfc:
            self.isfc = ISFC(C1, softmax=isfc_softmax)
        if clip_interaction:
            self.clip_interaction = CLIPInteraction(C2, D, residual=residual)
        if clip_regularization:
            self.clip_regularization = CLIPRegularization(
                C3, D, prompts, logit_scale, residual=residual, skip=mlp3_skip, shared=shared
            )

    def forward(
        self, images: Tensor | None, image_embeddings: Tensor, prompt_embeddings: Tensor, *,
        maps: list[Tensor] | None = None, present: Tensor | None = None,
        target: Tensor | None = None, k: int | None = None, return_maps: bool = False,
    ) -> Output:  # fmt: skip
        """Segment the common object of each group.

        images: [B, N, 3, H, W] in 0..1, H and W divisible by 32; or None with `maps`, the
        backbone's leading maps [B, N, C, h, w] (stride 4 first; later ones are computed).
        image_embeddings: [B, N, D], prompt_embeddings: [P, D], unit-norm. present: [B, N], false
        for padding. target: [B] prompt of the true class ("GT semantics": replaces i* and the
        distilled prompts), −1 = none. k: distilled prompts; default the constructor's.
        """
        if present is None:
            present = image_embeddings.new_ones(image_embeddings.shape[:2], dtype=torch.bool)
        out, cues = self.semantics(image_embeddings, prompt_embeddings, present, target, k)
        cues.maps = {} if return_maps else None
        images = None if images is None else images[present]  # [M, 3, H, W]
        stages = self.stages(images, [m[present] for m in maps or []], cues)
        out.logits = _scatter(self.top_down(stages, cues), present)  # [B, N, H, W]
        if cues.maps:
            out.maps = {n: tuple(_scatter(m, present) for m in x) for n, x in cues.maps.items()}
        return out

    def semantics(
        self, images: Tensor, prompts: Tensor, present: Tensor, target: Tensor | None, k: int | None
    ) -> tuple[Output, Cues]:
        """From embeddings [B, N, D] and [P, D] to what the maps are refined by."""
        P, D = prompts.shape
        # S, and later v, always in full precision: cosines of a CLIP lie so close together that
        # half precision would put other words first in training than in use.
        with torch.autocast(images.device.type, enabled=False):
            S = F.normalize(images, dim=-1) @ F.normalize(prompts, dim=-1).T  # [B, N, P]
        S = S * present[..., None]
        # σ = Σ_i S_i; the distilled prompts are its Top-K
        distilled = S.sum(dim=1).topk(min(k or self.k, P), dim=-1).indices  # [B, K]
        if target is not None:
            distilled = torch.where(target[:, None] >= 0, target[:, None], distilled)
        out, cues = Output(similarity=S, distilled=distilled), Cues(present.nonzero()[:, 0])
        text = prompts * D**0.5  # [P, D]: a unit vector's entries are near 1/√D; order 1 is wanted
        if self.clip_interaction is not None:
            h_hat = self.clip_interaction.refine(images * D**0.5, present)  # [B, N, D]
            cues.z = self.clip_interaction.fuse(h_hat, text[distilled], present)[present]  # [M, D]
            out.coarse = self.clip_interaction.decode(h_hat) * present[..., None, None]
        if self.clip_regularization is not None:
            with torch.autocast(images.device.type, enabled=False):
                out.class_logits = self.clip_regularization.class_logits(S, present)  # [B, P]
            out.best = self.clip_regularization.most_likely(out.class_logits)  # [B]
            if target is not None:
                out.best = torch.where(target >= 0, target, out.best)
            cues.h_txt = text[out.best][cues.group]  # [M, D]
        return out, cues

    def refine(self, x: Tensor, at: int, cues: Cues) -> Tensor:
        """Apply the modules that sit here, in the paper's order. x, returned: [M, C, h, w]."""
        first, second, third = self.at
        if self.isfc is not None and at == first:
            x = cues.note("isfc", x, self.isfc(x, cues.group))
        if self.clip_interaction is not None and at == second:
            x = cues.note("clip_interaction", x, self.clip_interaction.modulate(x, cues.z))
        if self.clip_regularization is not None and at == third:
            after = self.clip_regularization.modulate(x, cues.h_txt)
            x = cues.note("clip_regularization", x, after)
        return x

    def stages(self, images: Tensor | None, maps: list[Tensor], cues: Cues) -> list[Tensor]:
        """The backbone's four maps, from the first given on; `encoder` refines those of 2 to 4."""
        if self.at == STAGES and len(maps) > 1:
            raise ValueError("placement `encoder` refines stages 2 to 4: give the first map alone")
        maps = list(maps) or [self.backbone.stages[0](self.backbone.normalise(images))]
        for n in range(len(maps), 4):
            maps.append(self.refine(self.backbone.stages[n](maps[-1]), n + 1, cues))
        return maps

    def top_down(self, maps: list[Tensor], cues: Cues) -> Tensor:
        """From the backbone's maps to mask logits [M, H, W], F¹, F² and F³ refined on the way."""
        c4, c8, c16, c32 = maps
        p = self.refine(self.lateral["32"](c32), 32, cues)  # [M, C, H/32, W/32]
        p = self.smooth["16"](self.lateral["16"](c16) + _resize(p, c16))  # [M, C, H/16, W/16]
        p = self.refine(p, 16, cues)
        p = self.smooth["8"](self.lateral["8"](c8) + _resize(p, c8))  # [M, C, H/8, W/8]
        p = self.refine(p, 8, cues)
        p = self.head(self.lateral4(c4) + _resize(self.reduce4(p), c4))  # [M, 1, H/4, W/4]
        return F.interpolate(p, scale_factor=4, mode="bilinear", align_corners=False)[:, 0]


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _scatter(flat: Tensor, present: Tensor) -> Tensor:
    """[M, …] back to [B, N, …], zero where absent."""
    if present.all():
        return flat.view(*present.shape, *flat.shape[1:])
    out = flat.new_zeros(*present.shape, *flat.shape[1:])
    return out.index_put(present.nonzero(as_tuple=True), flat)
