"""One experiment as data: typed settings, read from YAML, checked, and hashed by content.

Every open point of the paper is a field here, with the default that the README's table of interpretations gives.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from lcco.common import LCCoError, digest, project_root

C = TypeVar("C")


@dataclass(frozen=True)
class DataConfig:
    """What a model is trained on. Names are resolved by `lcco.data.load_data`; a path works as well."""

    train: tuple[str, ...] = ("voc_train",)
    holdout: tuple[str, ...] = ("voc_val",)  # held-out part of the training fold; chooses the checkpoint
    size: int = 224  # images are squashed to size × size, as the peers do
    groups: int = 4  # groups a step
    group_size: int = 5  # images a group, N
    class_sampling: Literal["uniform", "sqrt", "proportional"] = "uniform"  # P(class) ∝ 1, √count, count
    paired: float = 0.0  # share of groups drawn from images that hold a second class (lcco.data.GroupSampler)
    absent: float = 0.0  # chance that one image of a group lacks the object (its truth is then empty)
    flip: bool = False
    crop: float = 1.0  # smallest side of a random crop, as a share; 1 = no crop (needs a live backbone)


@dataclass(frozen=True)
class TowerConfig:
    """The frozen image–text model, the vocabulary and the prompts (P = number of words)."""

    kind: Literal["openclip", "conse"] = "openclip"
    model: str = "ViT-B-16-quickgelu"
    weights: str | None = "openai"  # a pre-trained tag, a local file, "package" (shipped with lcco), null = random
    vocabulary: str = "coco80"  # coco80, voc20, imagenet1k, glyphs, or a text file, one class a line
    templates: tuple[str, ...] = ("a photo of a {}.",)  # embeddings are averaged over templates
    temperature: float = 1.0  # ConSE: softmax temperature of the classifier
    top: int = 10  # ConSE: how many of the classifier's classes are mixed


@dataclass(frozen=True)
class ModelConfig:
    """The segmentation network and its three modules. Baseline = the three switches off."""

    backbone: str = "resnet50"
    weights: str | None = "imagenet"  # "imagenet" (hub), "package", a file, run:<name>, shipped, null = random
    frozen_stages: int = 0  # leading backbone stages (of 4) that are not trained; 4 = frozen backbone
    width: int = 256  # channels of the top-down path
    isfc: bool = True
    clip_interaction: bool = True
    clip_regularization: bool = True
    isfc_softmax: Literal["neighbours", "channels"] = "neighbours"
    placement: Literal["decoder", "encoder"] = "decoder"
    strides: tuple[int, int, int] = (32, 16, 8)  # where F1, F2, F3 sit in the decoder
    modulation_residual: bool = False
    mlp3: Literal["vocabulary", "shared"] = "vocabulary"  # P→P as in Eq. 7, or one small network for every word
    mlp3_skip: bool = False  # MLP3 adds its input to its output
    heads: int = 4
    k: int = 5  # distilled prompts


@dataclass(frozen=True)
class LossConfig:
    """Eq. 9's weights and the open points of Eq. 12."""

    lambda_cs: float = 1.0
    lambda_c: float = 1.0
    lc_reduction: Literal["mean", "sum"] = "mean"
    mask_background: Literal["zero", "mean"] = "zero"  # v^gt: what stands outside the true mask
    v_gt: Literal["tower", "name"] = "tower"  # Deviation ("name"): v^gt marks the class's own word, where it is known
    bce: float = 0.0  # Deviation: weight of a pixel-wise BCE beside Eq. 10; 0 = the paper


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser. Not stated in the paper; defaults after the code it builds on."""

    steps: int = 100_000
    lr: float = 1e-4
    backbone_lr: float = 1e-5
    weight_decay: float = 1e-6
    warmup: int = 0
    schedule: Literal["halving", "cosine"] = "halving"
    halve_every: int = 20_000
    clip: float = 0.0  # gradient norm bound; 0 = none
    ema: float = 0.0  # decay of the weights' moving average used for evaluation; 0 = none
    precision: Literal["no", "bf16"] = "no"
    eval_every: int = 5_000
    checkpoint: Literal["last", "best"] = "best"  # which one is evaluated; best = on `data.holdout`
    start: str | None = None  # "run:<name>", "shipped" or a model file to go on from; the backbone: model.weights


# Settings younger than the first published runs: at their default they leave the hash alone, so those keep their names.
LATER = (("loss", "v_gt"), ("train", "start"))

# The least and the most that a number may be. The tower's are checked by the tower that is asked for.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**64 - 1), "data.groups": (1, math.inf), "data.group_size": (1, math.inf), "data.paired": (0, 1),
    "data.absent": (0, 1), "model.frozen_stages": (0, 4), "model.width": (2, math.inf), "model.heads": (1, math.inf),
    "model.k": (1, math.inf), "loss.lambda_cs": (0, math.inf), "loss.lambda_c": (0, math.inf),
    "loss.bce": (0, math.inf), "train.steps": (1, math.inf), "train.lr": (0, math.inf),
    "train.backbone_lr": (0, math.inf), "train.weight_decay": (0, math.inf), "train.warmup": (0, math.inf),
    "train.halve_every": (1, math.inf), "train.clip": (0, math.inf), "train.ema": (0, 1),
    "train.eval_every": (1, math.inf),
}  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """Everything that decides a training run; two runs with the same `hash` are the same run."""

    name: str = "lcco"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    tower: TowerConfig = field(default_factory=TowerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def hash(self) -> str:
        """Content hash over every field but the name, and but those of `LATER` at their default."""
        tree = {k: v for k, v in asdict(self).items() if k != "name"}
        for part, name in LATER:
            if tree[part][name] == getattr(type(getattr(self, part)), name):
                tree[part] = {k: v for k, v in tree[part].items() if k != name}
        return digest(tree, 10)

    def replace(self, changes: dict[str, Any] | None = None, **top: Any) -> Experiment:
        """A copy with dotted settings changed: `replace({"model.k": 3}, seed=1)`.

        Raises: LCCoError naming an unknown setting, or a value of the wrong type or out of range, and the mend.
        """
        tree = asdict(self)
        for key, value in {**(changes or {}), **top}.items():
            node, (*parents, leaf) = tree, key.split(".")
            for parent in parents:
                node = node.get(parent) if isinstance(node, dict) else None
            if not isinstance(node, dict) or leaf not in node:
                raise LCCoError(f"unknown setting `{key}`{nearest(key, self.settings())}")
            node[leaf] = value
        changed = build(Experiment, tree)
        changed.check(known=self)
        return changed

    def faults(self) -> typing.Iterator[tuple[str, str]]:
        """Settings that no training can be done with: each one's name, and what it is and must be."""
        values = flat(asdict(self))
        for key, value in values.items():
            for word in value if isinstance(value, list) else (value,):
                if isinstance(word, str) and not word.strip():  # an empty path is the working directory
                    yield key, f"holds {word!r}; it must not be empty"
        for key, (least, most) in RANGES.items():
            if not (least <= values[key] <= most and values[key] < math.inf):
                yield key, f"is {values[key]}; it must be {least} {f'to {most}' if most < math.inf else 'or more'}"
        d, m = self.data, self.model
        if "/" in self.name or "\\" in self.name or not self.name.isprintable():
            yield "name", f"is {self.name!r}; it names a folder in runs/, so it must be without / and \\"
        if not d.train:
            yield "data.train", "is empty; it must name a data set or a folder"
        if d.size < 32 or d.size % 32:
            yield "data.size", f"is {d.size}; it must be 32 or a multiple of it"
        elif d.size == 32 and d.groups * d.group_size == 1:  # one place of one picture has no batch statistics
            yield "data.size", "is 32 with one picture a step; it must be 64 or more, or `data.group_size` 2 or more"
        if not 0 < d.crop <= 1:
            yield "data.crop", f"is {d.crop}; it must be above 0, and at most 1"
        elif d.crop < 1 and m.frozen_stages:
            yield "data.crop", "needs a live backbone, whose maps are not cached: set `model.frozen_stages: 0`"
        if m.placement == "decoder":  # of the encoder, channels and strides are the backbone's
            if m.isfc and m.heads > 0 and m.width % m.heads:
                yield "model.width", f"is {m.width}; it must be divisible by `model.heads`, which is {m.heads}"
            if not set(m.strides) <= {8, 16, 32} or list(m.strides) != sorted(m.strides, reverse=True):
                yield "model.strides", f"is {list(m.strides)}; it must be of 32, 16 and 8, and not rise"

    def check(self, where: str = "", known: Experiment | None = None) -> None:
        """Raises: LCCoError for the first fault. known: what this one was changed from; a stored one keeps its own."""
        before = set(known.faults()) if known else ()
        for key, said in (fault for fault in self.faults() if fault not in before):
            raise LCCoError(f"`{where}{key}` {said}")

    @classmethod
    def settings(cls) -> list[str]:
        """Every setting's dotted name."""
        return list(flat(asdict(cls())))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"k": 5}}` → `{"model.k": 5}`: settings by their dotted names, tuples as the lists that JSON has."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = list(value) if isinstance(value, tuple) else value
    return out


def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """The end of an error line about an unknown word: the closest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5) or [
        k for k in known if k.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]
    ]
    return f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(known)}"


def build(cls: type[C], values: Any, where: str = "") -> C:
    """Build a settings dataclass from a plain mapping, checking names and types.

    Raises: LCCoError naming the key, what it holds, and what it may hold.
    """
    if not isinstance(values, dict):
        raise LCCoError(f"`{where or cls.__name__}` must be a mapping of settings, not {values!r}")
    kinds = _fields(cls)
    for key in values:
        if key not in kinds:
            raise LCCoError(f"unknown setting `{where}{key}`{nearest(str(key), kinds)}")
    return cls(**{k: coerce(v, kinds[k], f"{where}{k}") for k, v in values.items()})


def coerce(value: Any, kind: Any, key: str) -> Any:
    """`value` as `kind`, or a LCCoError; papermill's -p gives text, so text is parsed where a number or flag is due."""
    if dataclasses.is_dataclass(kind):
        return build(kind, value, f"{key}.")
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in args:
            return value
        raise LCCoError(f"`{key}` is {value!r}; it must be one of {', '.join(map(repr, args))}")
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() in ("null", "none", "~")):
            return None
        return coerce(value, next(a for a in args if a is not type(None)), key)
    if origin is tuple:
        if isinstance(value, str) and args[0] is str:
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise LCCoError(f"`{key}` is {value!r}; it must be a list")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise LCCoError(f"`{key}` has {len(value)} values; it must have {len(args)}")
        return tuple(coerce(v, args[0], f"{key}[{n}]") for n, v in enumerate(value))
    if origin is dict:
        if isinstance(value, dict):
            return dict(value)
        raise LCCoError(f"`{key}` is {value!r}; it must be a mapping of settings")
    if kind is bool:
        word = str(value).lower()
        if isinstance(value, bool) or word in ("true", "false"):
            return word == "true"
    elif kind in (int, float):
        with_value = None if isinstance(value, bool) else value
        try:
            number = kind(with_value)
            if number == float(with_value):
                return number
        except (TypeError, ValueError, OverflowError):  # OverflowError: an infinite whole number
            pass
    elif kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise LCCoError(f"`{key}` is {value!r}; it must be {'true or false' if kind is bool else kind.__name__}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises: LCCoError naming the file (and the line, when it does not parse).
    """
    import yaml

    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LCCoError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise LCCoError(f"{path}: not a text file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise LCCoError(f"{path}: not valid YAML{f' at line {mark.line + 1}' if mark else ''}") from None
    if not isinstance(value, dict):
        raise LCCoError(f"{path}: must hold a mapping of settings")
    return value


@dataclass(frozen=True)
class Profile:
    """A size at which the whole paper is run: one base experiment, the sets it is tested on, seeds and protocols."""

    name: str
    about: str = ""
    experiment: Experiment = field(default_factory=Experiment)
    tests: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    protocols: tuple[str, ...] = ("ufo", "native")
    group_size: int = 5
    baseline: dict[str, Any] = field(default_factory=dict)  # what the Baseline changes beside the three switches
    ablation_seeds: tuple[int, ...] = (0,)  # seeds of the ablation rows
    ablation_test: tuple[str, ...] = ()  # the set (or sets) in the place of iCoseg
    choice_test: tuple[str, ...] = ()  # sets with pictures of two classes, for the group-choice test of the ablations


def profile_names() -> list[str]:
    """The profiles that ship, by name."""
    return sorted(p.stem for p in _profiles().glob("*.yaml"))


def _profiles() -> Path:
    return project_root() / "notebooks" / "profiles"


def load_profile(profile: str | Path) -> Profile:
    """The profile of that name (`notebooks/profiles/<name>.yaml`) or file.

    Raises: LCCoError naming the file, or the profiles there are.
    """
    path = Path(profile) if str(profile).endswith((".yaml", ".yml")) else _profiles() / f"{profile}.yaml"
    if not path.is_file():
        raise LCCoError(f"no profile `{profile}`; there are: {', '.join(profile_names()) or f'none in {_profiles()}'}")
    values = {"name": path.stem, **read_yaml(path)}
    try:
        found = build(Profile, values)
        found.experiment.check("experiment.")
        if found.group_size < 1:
            raise LCCoError(f"`group_size` is {found.group_size}; it must be 1 or more")
        if not found.seeds or min(*found.seeds, *found.ablation_seeds, 0) < 0:
            raise LCCoError("`seeds` and `ablation_seeds` must be 0 or more, and one of `seeds` there")
        return found
    except LCCoError as error:
        raise LCCoError(f"{path}: {error}") from None
