"""One experiment as data: typed settings read from YAML, checked, and named by their content.

Every open point of the paper is a setting here, with the default that README's table gives.
"""

import contextlib
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic import model_validator as checked

from lcco.common import LCCoError, digest, one_line, project_root

# Raised by hand when the same settings would train to other weights, so that runs made by older
# code are never taken for new ones. 2: Eq. 12 from logits, void left out of L_cs.
TRAINING_VERSION = 2

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, pattern=r"\S")]
Names = Annotated[tuple[Name, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
Seeds = Annotated[tuple[int, ...], Field(min_length=1)]


class Settings(BaseModel):
    """A part of an experiment: fixed once made, and without unknown settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(Settings):
    """What a model is trained on. A set is a known name (`lcco.data.KNOWN_SETS`) or a folder."""

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
    given: Share = 0.0  # Deviation: share of groups of two classes, told which one is meant
    flip: bool = False
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0  # smallest side; Deviation: the tower sees all


class TowerConfig(Settings):
    """The frozen image–text model, the vocabulary and the prompts (P = number of words)."""

    kind: Literal["openclip", "conse"] = "openclip"
    model: str = "ViT-B-16-quickgelu"
    weights: str | None = "openai"  # a tag of open_clip's, a file, "package", null = random
    vocabulary: Name = "coco80"  # coco80, voc20, imagenet1k, glyphs, or a text file
    templates: Annotated[Names, Field(min_length=1)] = ("a photo of a {}.",)
    precision: Literal["no", "bf16"] = "no"  # Deviation: images embedded in bf16


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
    isfc_neighbours: Positive | None = None  # Deviation: attend to that many, the most similar ones
    placement: Literal["decoder", "encoder"] = "decoder"
    strides: tuple[int, int, int] = (32, 16, 8)  # where F1, F2, F3 sit in the decoder
    modulation_residual: bool = False
    mlp3: Literal["vocabulary", "shared"] = "vocabulary"  # P→P, or one small network for all words
    mlp3_skip: bool = False  # MLP3 adds its input to its output
    k: Positive = 5  # distilled prompts

    @checked(mode="after")
    def _fit(self) -> Self:
        if not set(self.strides) <= {8, 16, 32} or list(self.strides) != sorted(self.strides)[::-1]:
            raise ValueError("strides must be of 32, 16 and 8, and not rise")
        return self


class LossConfig(Settings):
    """Eq. 9's weights and the open points of Eq. 12.

    λ2 and `lc_reduction` scale the gradient of MLP3 alone, which nothing but L_c reaches, and AdamW
    divides a gradient by its own size: they change little. `train.mlp3_lr` changes MLP3's steps.
    """

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
    mlp3_lr: NotNegative = 1.0  # Deviation: factor on MLP3's learning rate, see `LossConfig`
    weight_decay: NotNegative = 1e-6
    warmup: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["halving", "cosine"] = "halving"  # halved every 20,000 steps
    clip: NotNegative = 0.0  # bound on the gradient's norm; 0 = none
    ema: Share = 0.0  # decay of the weights' moving average that is evaluated; 0 = none
    precision: Literal["no", "bf16"] = "no"
    eval_every: Positive = 5_000
    start: str | None = None  # "shipped" or a model file to go on from


class Experiment(Settings):
    """Everything that decides a training run; runs with the same `hash` have the same settings."""

    name: Annotated[str, Field(pattern=r"^[^/\\\s][^/\\\n]*$")] = "lcco"
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig = DataConfig()
    tower: TowerConfig = TowerConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()

    @checked(mode="after")
    def _fit(self) -> Self:
        if self.data.crop < 1 and self.model.frozen_stages:
            raise ValueError("data.crop needs a live backbone: set model.frozen_stages to 0")
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
        tree = self.model_dump(mode="json")
        parts = {part: tree.pop(part) for part in [*tree] if isinstance(tree[part], dict)}
        return tree | {f"{part}.{k}": v for part, own in parts.items() for k, v in own.items()}

    def replace(self, changes: Mapping[str, Any] | None = None, **top: Any) -> Self:
        """A copy with settings changed: `replace({"model.k": 3, "loss": {"bce": 0.5}}, seed=1)`.

        Raises: LCCoError naming an unknown setting or a value that does not fit.
        """
        tree = self.model_dump()
        parts = {key: value for key, value in tree.items() if isinstance(value, dict)}
        for key, value in {**(changes or {}), **top}.items():
            part, _, name = key.rpartition(".")
            if key in parts and isinstance(value, Mapping):
                parts[key].update(value)
            elif part in parts:
                parts[part][name] = value
            else:
                tree[key] = value  # an unknown one is refused by what follows
        return typed(tree, Experiment)


class Profile(Settings):
    """A size at which the paper is run: an experiment, the sets it is tested on, seeds."""

    name: str
    about: str = ""
    experiment: Experiment = Experiment()
    tests: Names = ()
    seeds: Seeds = (0,)
    protocols: Annotated[Names, Field(min_length=1)] = ("ufo", "native")
    group_size: Positive = 5
    ablation_seeds: Seeds = (0,)  # of Tables 2 to 4, Fig. 3
    reading_seeds: Seeds = (0,)  # of what the paper leaves open
    ablation_tests: Names = ()  # the sets in the place of iCoseg
    k_values: tuple[Positive, ...] = (1, 3, 5, 7, 9)  # Table 4's numbers of distilled prompts
    set_sizes: tuple[Positive, ...] = (1, 2, 3, 5, 8, 12, 16)  # in the test of more images
    choice_tests: Names = ()  # sets with pictures of two classes, for the group-choice test
    counts: dict[str, Positive] = {}  # how many pictures of a drawn test set


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a line about an unknown word: the closest known one, or all of them."""
    known = list(known)
    leaf = [k for k in known if k.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    close = leaf or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(known)}"


def from_text(value: Any) -> Any:
    """A command line's text: lists, mappings and `null` are YAML; `typed` converts the rest."""
    if isinstance(value, str) and (value == "null" or value.startswith(("[", "{"))):
        with contextlib.suppress(yaml.YAMLError):
            return yaml.safe_load(value)
    return value


def typed(value: Any, kind: Any, key: str = "") -> Any:
    """`value` as `kind`; texts are converted, as papermill's -p hands them over for most.

    Raises: LCCoError naming the setting, what it is and must be.
    """
    try:
        return TypeAdapter(kind).validate_python(value if kind is str else from_text(value))
    except ValidationError as error:
        first = error.errors()[0]
    key = ".".join(map(str, (*filter(None, [key]), *first["loc"])))
    if first["type"] == "extra_forbidden":
        known = Profile.model_fields if kind is Profile else Experiment().flat()
        raise LCCoError(f"unknown setting `{key}`{nearest(key, known)}")
    said, given = first["msg"].removeprefix("Value error, "), first["input"]
    got = "" if isinstance(given, Mapping | BaseModel) else f" is {given!r}:"
    raise LCCoError(f"`{key}`{got} {said}" if key else said)


def _profiles() -> Path:
    return project_root() / "notebooks" / "profiles"


def profile_names() -> list[str]:
    """The profiles of the repository, by name."""
    return sorted(p.stem for p in _profiles().glob("*.yaml"))


def load_profile(profile: str | Path, *seen: Path) -> Profile:
    """The profile of that name (`notebooks/profiles/<name>.yaml`) or YAML file.

    `base: other` in the file takes over what it does not set itself. seen: files whose base it is.
    Raises: LCCoError naming the file and the setting, or the profiles there are.
    """
    path = _profiles() / f"{profile}.yaml"
    if str(profile).endswith((".yaml", ".yml")):
        path = (seen[-1].parent if seen else Path.cwd()) / Path(profile).expanduser()
    if not path.is_file():
        known = ", ".join(profile_names()) or f"none in {_profiles()}"
        raise LCCoError(f"no profile `{profile}`; there are: {known}")
    if path.resolve() in seen:
        raise LCCoError(f"`base` leads back to {path.name}")
    try:
        own = typed(yaml.safe_load(path.read_text(encoding="utf-8")), dict, "settings")
        base = own.pop("base", None)
        base = load_profile(base, *seen, path.resolve()) if base else Profile(name="")
        experiment = base.experiment.replace(typed(own.pop("experiment", {}), dict))
        tree = base.model_dump() | {"name": path.stem, "experiment": experiment}
        return typed(tree | own, Profile)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise LCCoError(f"{path}: not valid YAML: {one_line(error)}") from None
    except LCCoError as error:
        raise LCCoError(f"{path}: {error}") from None
