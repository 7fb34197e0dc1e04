"""One experiment as data: typed settings read from YAML, checked, and named by their content.

Every open point of the paper is a setting here, with the default that README's table gives.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from lcco.common import LCCoError, digest, project_root

# Raised by hand when the same settings would train to other weights, so that runs made by older
# code are never taken for new ones. 2: Eq. 12 by log-softmax, void left out of L_cs.
TRAINING_VERSION = 2

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, pattern=r"\S")]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[tuple[Name, ...], BeforeValidator(_as_list)]


class Settings(BaseModel):
    """A part of an experiment: fixed once made, and without unknown settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(Settings):
    """What a model is trained on. A set is a known name (`lcco.data.known_sets`) or a folder."""

    train: Annotated[Names, Field(min_length=1)] = ("voc_train",)
    holdout: Names = ("voc_val",)  # held-out part of the training fold; chooses the checkpoint
    without: Names = ()  # sets whose pictures are left out of `train` and `holdout`, by content
    counts: dict[str, Positive] = {}  # how many pictures of a drawn set
    size: Annotated[int, Field(ge=32, multiple_of=32)] = 224  # squashed to size × size
    groups: Positive = 4  # groups a step
    group_size: Positive = 5  # images a group, N
    class_sampling: Literal["uniform", "sqrt", "proportional"] = "uniform"  # ∝ 1, √count, count
    paired: Share = 0.0  # share of groups drawn from images that hold a second class
    absent: Share = 0.0  # chance that one image of a group lacks the object
    given: Share = 0.0  # Deviation: share of groups whose true class is given (GT semantics)
    flip: bool = False
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0  # smallest side of a random crop, as a share


class TowerConfig(Settings):
    """The frozen image–text model, the vocabulary and the prompts (P = number of words)."""

    kind: Literal["openclip", "conse"] = "openclip"
    model: str = "ViT-B-16-quickgelu"
    weights: str | None = "openai"  # a tag of open_clip's, a file, "package", null = random
    vocabulary: Name = "coco80"  # coco80, voc20, imagenet1k, glyphs, or a text file
    templates: Annotated[Names, Field(min_length=1)] = ("a photo of a {}.",)


class ModelConfig(Settings):
    """The segmentation network and its three modules. Baseline = the three switches off."""

    backbone: str = "resnet50"
    weights: str | None = "imagenet"  # "imagenet", "package", "shipped", a file, null = random
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = 0  # leading stages that are not trained
    width: Annotated[int, Field(ge=4, multiple_of=4)] = 256  # channels of the top-down path
    isfc: bool = True
    clip_interaction: bool = True
    clip_regularization: bool = True
    isfc_softmax: Literal["neighbours", "channels"] = "neighbours"
    placement: Literal["decoder", "encoder"] = "decoder"
    strides: tuple[int, int, int] = (32, 16, 8)  # where F1, F2, F3 sit in the decoder
    modulation_residual: bool = False
    mlp3: Literal["vocabulary", "shared"] = "vocabulary"  # P→P, or one small network for all words
    mlp3_skip: bool = False  # MLP3 adds its input to its output
    k: Positive = 5  # distilled prompts

    @model_validator(mode="after")
    def _fit(self) -> ModelConfig:
        if not set(self.strides) <= {8, 16, 32} or list(self.strides) != sorted(self.strides)[::-1]:
            raise ValueError("strides must be of 32, 16 and 8, and not rise")
        return self


class LossConfig(Settings):
    """Eq. 9's weights and the open points of Eq. 12."""

    lambda_cs: NotNegative = 1.0
    lambda_c: NotNegative = 1.0
    lc_reduction: Literal["mean", "sum"] = "mean"
    mask_background: Literal["zero", "mean"] = "zero"  # v^gt: what stands outside the true mask
    v_gt: Literal["tower", "name"] = "tower"  # "name": v^gt marks the class's own word
    bce: NotNegative = 0.0  # Deviation: weight of a pixel-wise BCE beside Eq. 10; 0 = the paper


class TrainConfig(Settings):
    """The optimiser. Not stated in the paper; defaults after the code it builds on."""

    steps: Positive = 100_000
    lr: NotNegative = 1e-4
    backbone_lr: NotNegative = 1e-5
    weight_decay: NotNegative = 1e-6
    warmup: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["halving", "cosine"] = "halving"  # halved every 20,000 steps
    clip: NotNegative = 0.0  # bound on the gradient's norm; 0 = none
    ema: Share = 0.0  # decay of the weights' moving average that is evaluated; 0 = none
    precision: Literal["no", "bf16"] = "no"
    eval_every: Positive = 5_000
    start: str | None = None  # "shipped" or a model file to go on from


class Experiment(Settings):
    """Everything that decides a training run; runs with the same `hash` are the same run."""

    name: Annotated[str, Field(pattern=r"^[^/\\\s][^/\\\n]*$")] = "lcco"
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig = DataConfig()
    tower: TowerConfig = TowerConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _fit(self) -> Experiment:
        if self.data.crop < 1 and self.model.frozen_stages:
            raise ValueError("data.crop needs a live backbone: set model.frozen_stages to 0")
        if self.data.size == 32 and self.data.groups * self.data.group_size == 1:
            raise ValueError("data.size 32 needs two pictures a step: batch statistics of one fail")
        return self

    @property
    def hash(self) -> str:
        """Content hash over every setting but the name, and the version of the training code."""
        return digest([TRAINING_VERSION, self.model_dump(mode="json", exclude={"name"})], 10)

    @property
    def run_name(self) -> str:
        """The run's folder in the run store."""
        return f"{self.name}-{self.hash}"

    def flat(self) -> dict[str, Any]:
        """Every setting by its dotted name, as JSON has it."""
        return flat(self.model_dump(mode="json"))

    def replace(self, changes: Mapping[str, Any] | None = None, **top: Any) -> Experiment:
        """A copy with dotted settings changed: `replace({"model.k": 3}, seed=1)`.

        Raises: LCCoError naming an unknown setting or a value that does not fit.
        """
        tree = self.model_dump()
        for key, value in {**(changes or {}), **top}.items():
            node, (*parents, leaf) = tree, key.split(".")
            for parent in parents:
                node = node.get(parent) if isinstance(node, dict) else None
            if not isinstance(node, dict) or leaf not in node:
                raise LCCoError(f"unknown setting `{key}`{nearest(key, self.flat())}")
            node[leaf] = value
        return validated(Experiment, tree)


class Profile(Settings):
    """A size at which the paper is run: an experiment, the sets it is tested on, seeds."""

    name: str
    about: str = ""
    experiment: Experiment = Experiment()
    tests: Names = ()
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    protocols: Annotated[Names, Field(min_length=1)] = ("ufo", "native")
    group_size: Positive = 5
    ablation_seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    ablation_tests: Names = ()  # the sets in the place of iCoseg
    choice_tests: Names = ()  # sets with pictures of two classes, for the group-choice test
    counts: dict[str, Positive] = {}  # how many pictures of a drawn test set


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"k": 5}}` → `{"model.k": 5}`."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and key != "counts"
        out |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return out


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a line about an unknown word: the closest known one, or all of them."""
    known = list(known)
    leaf = [k for k in known if k.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    close = leaf or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(known)}"


def validated(kind: Any, value: Any, where: str = "") -> Any:
    """`value` as `kind`. Raises: LCCoError naming the setting, what it is and must be."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in (*filter(None, [where]), *first["loc"]))
        if first["type"] == "extra_forbidden":
            known = Experiment().flat() if issubclass(kind, Experiment) else Profile.model_fields
            raise LCCoError(f"unknown setting `{key}`{nearest(key, known)}") from None
        said = first["msg"].removeprefix("Value error, ")
        got = "" if isinstance(first["input"], Mapping | BaseModel) else f" is {first['input']!r}:"
        raise LCCoError(f"`{key}`{got} {said}" if key else said) from None


def typed(value: Any, kind: Any, key: str) -> Any:
    """A notebook parameter as its declared type; papermill's -p hands over text for most.

    Raises: LCCoError where the value is not of this type, such as a number for a text.
    """
    import yaml

    if kind is str and not isinstance(value, str):
        raise LCCoError(f"`{key}` is {value!r}, not text; give it as `papermill -r {key} TEXT`")
    if isinstance(value, str) and kind is not str:
        try:
            return validated(kind, value, key)
        except LCCoError:
            value = yaml.safe_load(value)
    return validated(kind, value, key)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises: LCCoError naming the file, and the line where it does not parse."""
    import yaml

    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise LCCoError(f"{path}: not a text file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise LCCoError(f"{path}: not valid YAML{where}") from None
    if not isinstance(value, dict):
        raise LCCoError(f"{path}: must hold a mapping of settings")
    return value


def _profiles() -> Path:
    return project_root() / "notebooks" / "profiles"


def profile_names() -> list[str]:
    """The profiles of the repository, by name."""
    return sorted(p.stem for p in _profiles().glob("*.yaml"))


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if both else value
    return out


def _profile_tree(profile: str | Path, seen: tuple[Path, ...] = ()) -> tuple[Path, dict[str, Any]]:
    is_file = str(profile).endswith((".yaml", ".yml"))
    path = Path(profile).expanduser() if is_file else _profiles() / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(profile_names()) or f"none in {_profiles()}"
        raise LCCoError(f"no profile `{profile}`; there are: {known}")
    if path.resolve() in seen:
        raise LCCoError(f"{path}: `base` leads back to the file itself")
    values = read_yaml(path)
    base = values.pop("base", None)
    if base is not None:
        beside = path.parent / str(base)
        below = _profile_tree(beside if beside.is_file() else str(base), (*seen, path.resolve()))[1]
        values = _merged({k: v for k, v in below.items() if k != "name"}, values)
    return path, values


def load_profile(profile: str | Path) -> Profile:
    """The profile of that name (`notebooks/profiles/<name>.yaml`) or YAML file.

    `base: other` in the file takes over what it does not set itself.
    Raises: LCCoError naming the file and the setting, or the profiles there are.
    """
    path, values = _profile_tree(profile)
    try:
        return validated(Profile, {"name": path.stem, **values})
    except LCCoError as error:
        raise LCCoError(f"{path}: {error}") from None
