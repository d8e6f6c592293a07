"""A run's configuration: a YAML file and `key=value` on top, checked once, all faults at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moreward.errors import ConfigError
from moreward.registry import find_recipe, near

Paths = tuple[str, ...]
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
DEVICE = r"auto|cpu|cuda(:\d+)?"
WHOLE = ("domain_map", "tags", "points", "capabilities")
"""Settings that are mappings, and so have no dotted keys of their own."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Section):
    """Where the pairs are and how they become tokens."""

    train: Paths = Field((), description="files, folders, globs or hf:owner/name")
    val: Paths = Field((), description="as train; without it, a share of train is split off by prompt")
    val_fraction: float = Field(0.1, gt=0, lt=1)
    ratings: Paths = Field((), description="rated conversations, for recipes that learn from ratings")
    shape: str | None = Field(None, description="row shape, when it cannot be told from the keys")
    domain: str | None = Field(None, description="one domain for every row")
    domain_key: str | None = Field(None, description="the column that names the domain")
    domain_map: dict[str, str] | None = Field(None, description="file-name pattern or raw value -> domain")
    input_template: str = Field("", description="put around prompts that are plain text, at {}: 'User: {} Assistant: '")
    tags: dict[str, str] | None = Field(None, description="how sharegpt rows spell keys and roles, as LLaMA-Factory's")
    tokenizer_sha256: str = Field("", description="of the tokenizer that made the token ids in the rows")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="stop when more than this share of rows is bad")
    contradiction_weight: float = Field(1.0, ge=0, le=1, description="weight in the loss of both pairs that contradict")
    max_length: int = Field(512, ge=8, description="tokens of prompt and response together")
    on_long: Literal["drop", "truncate"] = Field("drop", description="what to do with longer pairs; counted")

    @field_validator("train", "val", "ratings", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("input_template")
    @classmethod
    def _one_place(cls, value: str) -> str:
        if value and value.count("{}") != 1:
            raise ValueError("must hold {} exactly once, where the prompt goes")
        return value

    @field_validator("tags")
    @classmethod
    def _known_tags(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value and not set(value) <= set(TAGS):
            raise ValueError(f"may have the keys {', '.join(TAGS)}")
        return value


class TrainConfig(_Section):
    """The optimiser and its surroundings, the same for every stage."""

    learning_rate: float | None = Field(None, gt=0, le=1, description="unset: 3e-5 full, 5e-4 lora, 1e-3 frozen")
    batch_size: int = Field(32, ge=1, description="pairs in one optimiser step, over all processes")
    accumulate: int = Field(1, ge=1, description="split each step into this many backward passes")
    epochs: int = Field(2, ge=1)
    max_steps: int | None = Field(None, ge=1, description="at most this many steps a stage")
    warmup: float = Field(0.06, ge=0, lt=1, description="share of the steps")
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    centering: float = Field(0.0, ge=0)
    use_margin: bool = Field(True, description="subtract a row's margin, where rows have one")
    dropout: bool = Field(False, description="the backbone's own dropout; off as in TRL. Adapters have system.dropout")
    domain_temperature: float = Field(1.0, gt=0, description="1 as the data is; larger evens the domains out")
    metric: str = Field("mean", description="what early stopping watches: mean, micro, loss or a domain's name")
    eval_every: float = Field(0.5, gt=0, description="in epochs")
    patience: int = Field(2, ge=0, description="evaluations without gain before a stage stops; 0 never stops")
    dtype: Literal["fp32", "bf16"] = "fp32"
    device: str = Field("auto", description="auto (the GPU where there is one), cpu, cuda or cuda:N")
    processes: int | None = Field(None, ge=1, description="refuse to run with another number of processes")
    checkpoint_every: int = Field(200, ge=1, description="steps")
    keep_checkpoints: bool = Field(False, description="keep each stage's last checkpoint after the run")
    replay: int = Field(
        512,
        ge=0,
        description="prompts of a domain whose vectors are kept, to refit a gate without the data; 0: none",
    )
    trackers: tuple[str, ...] = Field((), description="tensorboard, wandb, mlflow and others that accelerate knows")

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        """Whether it is there is seen when training starts: a configuration may be written on another machine."""
        if not re.fullmatch(DEVICE, value):
            raise ValueError("must be auto, cpu, cuda or cuda:N with N from 0")
        return value


class RunConfig(_Section):
    """Everything that decides what a run becomes."""

    recipe: str
    backbone: str = Field("minilm", description="minilm, a model directory, or a hub name")
    preset: Literal["practical", "paper"] = "practical"
    tune: Literal["full", "lora", "frozen"] | None = Field(None, description="what of the backbone learns")
    pooling: Literal["auto", "own", "mean", "first", "last", "spans"] = "auto"
    out: str = Field("", description="the run folder")
    seed: int = Field(0, ge=0, lt=2**63)
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    system: dict[str, Any] = Field(default_factory=dict, description="the recipe's own settings")

    def flat(self) -> dict[str, Any]:
        """Dotted keys to values."""
        return _flat(self.model_dump(mode="json"))


LEARNING_RATES = {"full": 3e-5, "lora": 5e-4, "frozen": 1e-3}


def parse_assignments(words: Iterable[str]) -> dict[str, Any]:
    """`a.b=value` words to a nested mapping; values are YAML (`data.train='[a, b]'`, `seed=1`)."""
    tree: dict[str, Any] = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise ConfigError(f"{word!r} is neither a CONFIG.yaml nor key=value")
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {parent} has a value already")
        node[leaf] = _scalar(value)
    return tree


def _scalar(value: str) -> Any:
    try:
        return _number(yaml.safe_load(value))
    except yaml.YAMLError:
        return value


def _number(value: Any) -> Any:
    """YAML 1.1 reads `5e-4` as text; people mean a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def read_config(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected keys and values at the top, got {type(loaded).__name__}")
    return loaded


def resolve(given: Mapping[str, Any]) -> RunConfig:
    """Defaults, then the preset, then what was given. Raises ConfigError with every fault."""
    try:
        config = _validate(given)
    except ConfigError as error:
        raise ConfigError([*error.faults, *_system_faults(given)]) from None
    recipe = find_recipe(config.recipe)
    preset = recipe.presets[config.preset]
    merged = _merge(_nested(preset), given)
    merged.pop("preset", None)
    config = _validate({**merged, "preset": config.preset})
    settings = dict(config.system)
    if config.tune is not None:
        settings["tune"] = config.tune
    system = _validate_as(recipe.Config, settings, "system.")
    train = config.train
    if train.learning_rate is None:
        train = train.model_copy(update={"learning_rate": LEARNING_RATES[system.tune]})
    if system.tune not in recipe.tunes:
        raise ConfigError(f"tune: recipe {config.recipe!r} takes {' or '.join(recipe.tunes)} (got {system.tune!r})")
    return config.model_copy(update={"system": system.model_dump(mode="json"), "tune": system.tune, "train": train})


def deviations(config: RunConfig) -> list[dict[str, Any]]:
    """Where a resolved configuration differs from the paper's: `{key, paper, used}`."""
    paper = find_recipe(config.recipe).presets["paper"]
    used = config.flat()
    return [{"key": k, "paper": v, "used": used.get(k)} for k, v in sorted(paper.items()) if used.get(k) != v]


def _validate(given: Mapping[str, Any]) -> RunConfig:
    return _validate_as(RunConfig, given, "")  # type: ignore[no-any-return]


def _system_faults(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with the recipe's name and settings, when the rest is wrong too."""
    name, settings = given.get("recipe"), given.get("system", {})
    if not isinstance(name, str) or not isinstance(settings, Mapping):
        return []
    try:
        _validate_as(find_recipe(name).Config, settings, "system.")
    except ConfigError as error:
        return error.faults
    return []


def _validate_as(model: type[BaseModel], given: Mapping[str, Any], prefix: str) -> Any:
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise ConfigError([_fault(model, e, prefix) for e in error.errors()]) from None


def _fault(model: type[BaseModel], error: Any, prefix: str) -> str:
    loc = [str(part) for part in error["loc"]]
    key = prefix + ".".join(loc)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key.{near(loc[-1], _fields_at(model, loc[:-1]))}"
    if error["type"] == "missing":
        return f"{key}: is required"
    said = error["msg"].removeprefix("Value error, ")
    return f"{key}: {said[0].lower()}{said[1:]} (got {error['input']!r})"


def _fields_at(model: type[BaseModel], loc: Sequence[str]) -> list[str]:
    for part in loc:
        inner = model.model_fields[part].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return list(model.model_fields)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    return _merge(base, over)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and (prefix or key in ("data", "train", "system")) and key not in WHOLE:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
