"""LCCo's network: a top-down segmentation path and the three modules that refine it. Tensors in, tensors out.

Letters as in the paper: B groups, N images a group, M = all present images of a batch (padding dropped), C channels,
H×W a map, D width of the image–text embeddings, P prompts, K distilled prompts, E ordered pairs of images of a group.

Images of a batch travel as one flat list with a group number each, so ragged groups need no padding inside and
padding can change nothing; `present` says which of the B×N inputs exist.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Output:
    """What `LCCo.forward` gives. Rows of absent images are zero."""

    logits: Tensor  # [B, N, H, W] mask logits at full size
    coarse: Tensor | None  # [B, N, 14, 14] logits of Eq. 11's coarse masks; None without CLIP interaction
    similarity: Tensor  # [B, N, P] cosines S
    distilled: Tensor  # [B, K] prompt indices, most similar first
    v: Tensor | None  # [B, P] Eq. 7's probabilities; None without CLIP regularization
    best: Tensor | None  # [B] i* of Eq. 6, or the true class where one was given
    maps: dict[str, tuple[Tensor, Tensor]] | None = None  # module → its map before and after, [B, N, C, h, w]


def conv_ffn(c_in: int, c_mid: int, c_out: int, kernel: int = 1) -> nn.Sequential:
    """A convolutional feed-forward network: conv, norm, ReLU, conv."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_mid, 1, bias=False),
        nn.BatchNorm2d(c_mid),
        nn.ReLU(inplace=True),
        nn.Conv2d(c_mid, c_out, kernel, padding=kernel // 2),
    )


def conv_block(c_in: int, c_out: int) -> nn.Sequential:
    """3×3 conv, norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)
    )


def neighbours(group: Tensor) -> tuple[Tensor, Tensor]:
    """Each image's other images of its group.

    group: [M] group number of each image. Returns index [M, J] and valid [M, J], J = the largest group's N − 1.
    """
    same = group[:, None] == group[None, :]
    same.fill_diagonal_(False)
    J = int(same.sum(1).max()) if len(group) else 0
    index = same.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :J]
    return index, same.gather(1, index)


class ISFC(nn.Module):
    """Image-set feature correspondence: each image's map is refined by cross-attention to every other image's.

    The weights are shared by all edges of the complete graph, so any N works; a lone image passes through.
    softmax: `neighbours` weighs the N − 1 edges against one another at each channel and position; `channels` is the
    paper's sentence read literally (softmax over the stacked (N − 1)·C channels, rescaled by C so that maps keep
    their size). Deviation: heads, norm and layer sizes follow SuperGlue, which the paper cites and builds on.
    """

    def __init__(self, channels: int, *, heads: int = 4, softmax: str = "neighbours", edges_at_once: int = 512):
        super().__init__()
        self.heads, self.softmax, self.edges_at_once = heads, softmax, edges_at_once
        self.query, self.value, self.merge = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.key = nn.Conv2d(channels, channels, 1, bias=False)  # a bias adds the same to all of a softmax's scores
        self.ffn1 = conv_ffn(2 * channels, 2 * channels, channels)
        nn.init.zeros_(self.ffn1[-1].weight)  # F̄ starts as F, as in SuperGlue
        nn.init.zeros_(self.ffn1[-1].bias)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.dirac_(self.conv.weight)  # the module starts as the identity: training departs from the Baseline
        nn.init.zeros_(self.conv.bias)

    def _tokens(self, x: Tensor) -> Tensor:
        M, C, H, W = x.shape
        return x.reshape(M, self.heads, C // self.heads, H * W).transpose(-1, -2)  # [M, heads, HW, C/heads]

    def edge(self, F_i: Tensor, q_i: Tensor, k_j: Tensor, v_j: Tensor) -> Tensor:
        """The value of node i updated along the edge from j.

        Paper: Eq. (1), F̄_i^j = F_i + FFN1(F_i ‖ m_{j→i}), m_{j→i} = Att(F_i, F_j, F_j).
        F_i: [E, C, H, W]; q_i, k_j, v_j: [E, heads, HW, C/heads], the projections of F_i and F_j. Returns [E, C, H, W].
        """
        m = F.scaled_dot_product_attention(q_i, k_j, v_j)  # [E, heads, HW, C/heads]
        m = self.merge(m.transpose(-1, -2).reshape(F_i.shape))
        return F_i + self.ffn1(torch.cat([F_i, m], dim=1))

    def aggregate(self, edges: Tensor, valid: Tensor) -> Tensor:
        """The weighted average of a node's updated values.

        Paper: Eq. (2), F̂_i = Conv(Σ_{j≠i} α_i^j ⊙ F̄_i^j), α the softmax of the F̄ themselves.
        edges: [M, J, C, H, W]; valid: [M, J], false where a node has fewer than J neighbours. Returns [M, C, H, W].
        """
        absent = ~valid[:, :, None, None, None]
        scores = edges.masked_fill(absent, float("-inf"))
        if self.softmax == "neighbours":
            alpha = scores.softmax(dim=1)  # [M, J, C, H, W]
        else:
            alpha = scores.flatten(1, 2).softmax(dim=1).view_as(edges) * edges.shape[2]
        return self.conv((alpha * edges.masked_fill(absent, 0)).sum(dim=1))

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        """Refine F¹. x: [M, C, H, W]; group: [M] group numbers. Returns [M, C, H, W]."""
        index, valid = neighbours(group)
        J, out = index.shape[1], x.clone()
        nodes = valid.any(dim=1).nonzero()[:, 0]  # images that have neighbours
        if len(nodes) == 0:
            return out
        q, k, v = self._tokens(self.query(x)), self._tokens(self.key(x)), self._tokens(self.value(x))
        # Batch statistics see all edges in training; evaluation goes node by node where a set is large.
        at_once = len(nodes) if self.training else max(1, self.edges_at_once // J)
        for i in nodes.split(at_once):
            has = valid[i]  # [m, J]
            src, dst = i[:, None].expand_as(has)[has], index[i][has]  # [E] each
            bar = self.edge(x[src], q[src], k[dst], v[dst])  # [E, C, H, W]
            edges = bar.new_zeros(len(i), J, *x.shape[1:]).index_put((has.nonzero(as_tuple=True)), bar)
            out = out.index_put((i,), self.aggregate(edges, has))
        return out


class Modulation(nn.Module):
    """FFN_out(FFN_in(F) ⊙ PAD(z)): the form that Eq. 5 and Eq. 8 share.

    PAD repeats the vector over the map. residual: adds F. Deviation (`modulation_residual`): the printed equations
    have no residual.
    """

    def __init__(self, channels: int, width: int, *, residual: bool = False):
        super().__init__()
        self.residual = residual
        self.ffn_in = conv_ffn(channels, channels, width)
        self.ffn_out = conv_ffn(width, channels, channels, kernel=3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x: [M, C, H, W]; z: [M, D] with entries of order 1. Returns [M, C, H, W]."""
        y = self.ffn_out(self.ffn_in(x) * z[:, :, None, None])
        return x + y if self.residual else y


class CLIPInteraction(nn.Module):
    """CLIP interaction: the set's images and Top-K prompts are fused to one semantic an image, which modulates F².

    Deviation: MLP1 ends in a LayerNorm and text is scaled by √D, so that both kinds of token have entries of order 1
    (the paper does not state how unit-norm text meets un-normalised ĥ).
    """

    def __init__(self, channels: int, width: int, *, heads: int = 4, residual: bool = False):
        super().__init__()
        self.mlp1 = nn.Sequential(
            nn.Linear(2 * width, width), nn.ReLU(inplace=True), nn.Linear(width, width), nn.LayerNorm(width)
        )
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp2 = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width))
        self.modulate_map = Modulation(channels, width, residual=residual)
        # Eq. 11's light decoder: a vector to a 7×7 map, twice as large at the end.
        self.coarse_map = nn.Linear(width, 32 * 7 * 7)
        self.coarse_head = nn.Sequential(
            nn.ReLU(inplace=True), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(32, 1, 3, padding=1)
        )

    def refine(self, h: Tensor, present: Tensor) -> Tensor:
        """Each image embedding beside the set's mean.

        Paper: Eq. (3), ĥ_i = MLP1([h_i ‖ h̄]), h̄ the mean over the set.
        h: [B, N, D] with entries of order 1; present: [B, N]. Returns [B, N, D].
        """
        weight = present[..., None].to(h)
        mean = (h * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        return self.mlp1(torch.cat([h, mean.expand_as(h)], dim=-1))

    def fuse(self, h_hat: Tensor, text: Tensor, present: Tensor) -> Tensor:
        """One semantic an image from all images and the distilled prompts.

        Paper: Eq. (4), z_i = ĥ_i + MLP2(Att(ĥ_i, T, T)), T = the N refined embeddings and K prompts stacked.
        h_hat: [B, N, D]; text: [B, K, D]; present: [B, N]. Returns [B, N, D].
        """
        T = torch.cat([h_hat, text], dim=1)  # [B, N+K, D]
        absent = torch.cat([~present, torch.zeros(text.shape[:2], dtype=torch.bool, device=text.device)], dim=1)
        message, _ = self.attention(h_hat, T, T, key_padding_mask=absent, need_weights=False)
        return h_hat + self.mlp2(message)

    def modulate(self, x: Tensor, z: Tensor) -> Tensor:
        """Refine F² by the fused semantic.

        Paper: Eq. (5), F̂² = FFN3(FFN2(F²) ⊙ PAD(z_i)). x: [M, C, H, W]; z: [M, D]. Returns [M, C, H, W].
        """
        return self.modulate_map(x, z)

    def decode(self, h_hat: Tensor) -> Tensor:
        """The coarse mask logits of Eq. 11's decoder. h_hat: [B, N, D]. Returns [B, N, 14, 14]."""
        maps = self.coarse_map(h_hat.flatten(0, 1)).view(-1, 32, 7, 7)
        return self.coarse_head(maps).view(*h_hat.shape[:2], 14, 14)


class CLIPRegularization(nn.Module):
    """CLIP regularization: the set's most likely class is identified and its text embedding modulates F³.

    The argmax passes no gradient: MLP3 learns from Eq. 12 alone.
    Deviation (`mlp3: shared`): MLP3 is P→P, so Eq. 12 teaches it never to choose a word that no training group was
    of. `shared` is one small network for all words, of a word's similarity to the image and to the set on average; it
    knows no word by name, so classes unseen in training may be chosen and any vocabulary fits.
    Deviation (`mlp3_skip`): MLP3's input (`shared`: the set's average) is added to its output, so that training
    starts from CLIP's own opinion.
    """

    def __init__(
        self, channels: int, width: int, prompts: int, *, logit_scale: float, residual: bool = False,
        skip: bool = False, shared: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.logit_scale, self.skip, self.shared = logit_scale, skip, shared
        c_in, hidden, c_out = (2, 32, 1) if shared else (prompts, min(prompts, 256), prompts)
        self.mlp3 = nn.Sequential(nn.Linear(c_in, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, c_out))
        if skip:
            nn.init.zeros_(self.mlp3[-1].weight)
            nn.init.zeros_(self.mlp3[-1].bias)
        self.modulate_map = Modulation(channels, width, residual=residual)

    def class_probabilities(self, similarity: Tensor, present: Tensor) -> Tensor:
        """How likely each prompt is the set's class.

        Paper: Eq. (7), v = Softmax(MAX(MLP3({s_i}))), MAX over the N images, Softmax over the P prompts.
        similarity: [B, N, P] cosines (scaled by CLIP's logit scale here); present: [B, N]. Returns [B, P], sums to 1.
        """
        s = similarity * self.logit_scale
        if self.shared:
            s = s - s.mean(dim=-1, keepdim=True)  # what all words share says nothing of any of them
            weight = present[..., None].to(s)
            mean = ((s * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)).expand_as(s)
            logits = self.mlp3(torch.stack([s, mean], dim=-1))[..., 0]
            s = mean
        else:
            logits = self.mlp3(s)
        logits = logits + s if self.skip else logits
        return logits.masked_fill(~present[..., None], float("-inf")).amax(dim=1).softmax(dim=-1)

    @staticmethod
    def most_likely(v: Tensor) -> Tensor:
        """The most likely class. Paper: Eq. (6), i* = argmax v. v: [B, P]. Returns [B]."""
        return v.argmax(dim=-1)

    def modulate(self, x: Tensor, h_txt: Tensor) -> Tensor:
        """Refine F³ by the most likely class.

        Paper: Eq. (8), F̂³ = FFN5(FFN4(F³) ⊙ PAD(h^txt_{i*})).
        x: [M, C, H, W]; h_txt: [M, D] with entries of order 1. Returns [M, C, H, W].
        """
        return self.modulate_map(x, h_txt)


class LCCo(nn.Module):
    """The whole network; with the three switches off it is the Baseline (same backbone, same top-down path).

    backbone: gives maps at strides 4, 8, 16, 32 (`lcco.backbones.Backbone`). embedding_width: D. prompts: P; MLP3 is
    P→P unless `shared`, so weights belong to one vocabulary in one order. placement `decoder` refines the top-down
    path at `strides` (F¹ coarse to F³ fine); `encoder` refines backbone stages 2, 3, 4, each feeding the next stage.
    Source: Duan et al., LCCo, Fig. 2; the top-down path follows FPN, which the paper names by its property only.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        embedding_width: int,
        prompts: int,
        logit_scale: float = 100.0,
        width: int = 256,
        isfc: bool = True,
        clip_interaction: bool = True,
        clip_regularization: bool = True,
        isfc_softmax: str = "neighbours",
        placement: str = "decoder",
        strides: tuple[int, int, int] = (32, 16, 8),
        modulation_residual: bool = False,
        mlp3: str = "vocabulary",
        mlp3_skip: bool = False,
        heads: int = 4,
        k: int = 5,
    ):
        super().__init__()
        if placement == "decoder" and not (set(strides) <= {8, 16, 32} and list(strides) == sorted(strides)[::-1]):
            raise ValueError(f"strides must be of 32, 16, 8 and not rise, from F1 to F3; got {strides}")
        self.backbone, self.k, self.placement = backbone, k, placement
        c4, c8, c16, c32 = backbone.channels
        fine = width // 2
        self.lateral = nn.ModuleDict(
            {"32": conv_block(c32, width), "16": nn.Conv2d(c16, width, 1), "8": nn.Conv2d(c8, width, 1)}
        )
        self.smooth = nn.ModuleDict({"16": conv_block(width, width), "8": conv_block(width, width)})
        self.lateral4, self.reduce4 = nn.Conv2d(c4, fine, 1), nn.Conv2d(width, fine, 1)
        self.head = nn.Sequential(conv_block(fine, fine), nn.Conv2d(fine, 1, 1))

        at = strides if placement == "decoder" else (8, 16, 32)
        ch = [width] * 3 if placement == "decoder" else [c8, c16, c32]
        D = embedding_width
        self.where = {"isfc": at[0], "clip_interaction": at[1], "clip_regularization": at[2]}
        self.isfc = ISFC(ch[0], heads=heads, softmax=isfc_softmax) if isfc else None
        self.clip_interaction = (
            CLIPInteraction(ch[1], D, heads=heads, residual=modulation_residual) if clip_interaction else None
        )
        self.clip_regularization = (
            CLIPRegularization(
                ch[2], D, prompts, logit_scale=logit_scale, residual=modulation_residual, skip=mlp3_skip,
                shared=mlp3 == "shared",
            )
            if clip_regularization
            else None
        )

    def forward(
        self,
        images: Tensor | None,
        image_embeddings: Tensor,
        prompt_embeddings: Tensor,
        *,
        maps: list[Tensor] | None = None,
        present: Tensor | None = None,
        target: Tensor | None = None,
        k: int | None = None,
        return_maps: bool = False,
    ) -> Output:
        """Segment the common object of each group.

        images: [B, N, 3, H, W] in 0..1, H and W divisible by 32, N ≥ 1; or None with `maps`, the backbone's leading
        maps as [B, N, C, h, w] (stride 4 first; missing later ones are computed).
        image_embeddings: [B, N, D]; prompt_embeddings: [P, D]; both unit-norm. present: [B, N], false for padding.
        target: [B] prompt index of the true class ("GT semantics": replaces i* and the distilled prompts), −1 = none.
        k: distilled prompts, at most P count; default the constructor's. Returns an `Output`.
        """
        B, N, D = image_embeddings.shape
        if present is None:
            present = torch.ones(B, N, dtype=torch.bool, device=image_embeddings.device)
        group = present.nonzero()[:, 0]  # [M]

        # S, and the Top-K prompts of its column sums over the set: always in full precision, because cosines of a
        # CLIP lie so close together that half precision would put other words first in training than in use.
        with torch.autocast(image_embeddings.device.type, enabled=False):
            S = F.normalize(image_embeddings, dim=-1) @ F.normalize(prompt_embeddings, dim=-1).T  # [B, N, P]
        S = S * present[..., None]
        distilled = S.sum(dim=1).topk(min(k or self.k, S.shape[-1]), dim=-1).indices  # [B, K]
        if target is not None:
            distilled = torch.where(target[:, None] >= 0, target[:, None], distilled)

        text = prompt_embeddings * D**0.5  # unit-norm vectors have entries near 1/√D; modulation wants order 1
        coarse = z = v = best = None
        if self.clip_interaction is not None:
            h_hat = self.clip_interaction.refine(image_embeddings * D**0.5, present)
            z = self.clip_interaction.fuse(h_hat, text[distilled], present)[present]  # [M, D]
            coarse = self.clip_interaction.decode(h_hat) * present[..., None, None]
        if self.clip_regularization is not None:
            with torch.autocast(S.device.type, enabled=False):
                v = self.clip_regularization.class_probabilities(S, present)
            best = self.clip_regularization.most_likely(v)
            if target is not None:
                best = torch.where(target >= 0, target, best)

        kept: dict[str, tuple[Tensor, Tensor]] = {}

        def refine(x: Tensor, stride: int) -> Tensor:
            """Apply the modules that sit at this stride, in the paper's order."""
            for name in (n for n, s in self.where.items() if s == stride and getattr(self, n) is not None):
                before = x
                if name == "isfc":
                    x = self.isfc(x, group)
                elif name == "clip_interaction":
                    x = self.clip_interaction.modulate(x, z)
                else:
                    x = self.clip_regularization.modulate(x, text[best][group])
                if return_maps:
                    kept[name] = tuple(_scatter(t, present) for t in (before, x))
            return x

        leading = [m[present] for m in maps or []]
        if self.placement == "encoder":
            if len(leading) > 1:
                raise ValueError("placement `encoder` refines stages 2 to 4, so only the first map can be given")
            for n, stage in enumerate(self.backbone.stages):
                if n >= len(leading):
                    leading.append(stage(leading[-1] if leading else self.backbone.normalise(images[present])))
                leading[n] = refine(leading[n], 4 * 2**n)
        elif leading:
            leading = self.backbone.tail(leading)
        else:
            leading = self.backbone(images[present])
        c4, c8, c16, c32 = leading
        inner = refine if self.placement == "decoder" else lambda x, stride: x

        p = inner(self.lateral["32"](c32), 32)
        p = inner(self.smooth["16"](self.lateral["16"](c16) + _resize(p, c16)), 16)
        p = inner(self.smooth["8"](self.lateral["8"](c8) + _resize(p, c8)), 8)
        p = self.head(self.lateral4(c4) + _resize(self.reduce4(p), c4))  # [M, 1, H/4, W/4]
        logits = F.interpolate(p, scale_factor=4, mode="bilinear", align_corners=False)[:, 0]  # [M, H, W]
        return Output(_scatter(logits, present), coarse, S, distilled, v, best, kept or None)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _scatter(flat: Tensor, present: Tensor) -> Tensor:
    """[M, …] back to [B, N, …], zero where absent."""
    if present.all():
        return flat.view(*present.shape, *flat.shape[1:])
    return flat.new_zeros(*present.shape, *flat.shape[1:]).index_put(present.nonzero(as_tuple=True), flat)
