"""The experiment file: systems × seeds × data, the baseline and the equal-budget single models. All faults at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moreward.config import RunConfig, merge, parse_assignments, read_config, resolve
from moreward.data.synthetic import DOMAINS
from moreward.errors import ConfigError
from moreward.registry import near

SHIPPED = ("paper",)
KINDS = ("total", "active", "training")
"""What a single model can have as much of as a mixture: parameters in all, parameters that one conversation meets, and
pairs seen in training."""

SINGLE_RECIPES = ("baseline", "base_lora")
OF_THE_EXPERIMENT = ("out", "seed")
OWN_KEYS = ("single",)

Files: TypeAlias = "str | tuple[str, ...] | dict[str, str | tuple[str, ...] | None] | None"
Kind: TypeAlias = Literal["total", "active", "training"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Synthetic(_Section):
    """Generated pairs of domains that conflict, so many per domain: `moreward demo`'s data."""

    train: int = Field(120, ge=8)
    val: int = Field(24, ge=1)
    test: int = Field(100, ge=2)
    noise: float = Field(0.1, ge=0, lt=0.5)
    seed: int = Field(0, ge=0)
    domains: tuple[str, ...] = DOMAINS[:4]


class ExperimentData(_Section):
    """Where the pairs are. A mapping names the domain of each file; how rows are read stands in `settings.data`."""

    train: Files = None
    val: Files = None
    test: Files = None
    synthetic: Synthetic | None = None


class Printed(_Section):
    """A published table to print beside ours. A cell is a number, or a number and its spread over seeds."""

    title: str
    measure: Literal["accuracy", "epoch_seconds", "input_seconds"]
    columns: tuple[str, ...]
    rows: dict[str, dict[str, float | tuple[float, float]]]


class Experiment(_Section):
    """A file of `moreward compare`."""

    name: str = Field("experiment", description="the title of the report")
    out: str = Field("", description="where runs and report go; by default runs/NAME")
    seeds: tuple[int, ...] = Field((0, 1, 2), description="the seeds, or how many")
    data: ExperimentData
    settings: dict[str, Any] = Field(default_factory=dict, description="what all runs share, as a run's configuration")
    systems: dict[str, dict[str, Any]] = Field(description="label: recipe and what is its own; single: true or false")
    only: tuple[str, ...] = Field((), description="the systems to take; by default all")
    baseline: str = Field("", description="the label that everything is shown beside; by default the first single")
    controls: Literal["auto"] | dict[str, Literal["auto"] | dict[Kind, str]] = Field(
        "auto", description="per mixture the single models of equal budget"
    )
    backbones: dict[str, str] = Field(default_factory=dict, description="short names for directories or hub names")
    printed: tuple[Printed, ...] = Field((), description="published tables to show beside ours")

    @field_validator("seeds", mode="before")
    @classmethod
    def _number_or_list(cls, value: Any) -> Any:
        return tuple(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("seeds")
    @classmethod
    def _differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) < len(value) or min(value) < 0:
            raise ValueError("must be a number of seeds, or different numbers from 0 up")
        return value

    @field_validator("only", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{slug(self.name)}")

    @property
    def labels(self) -> tuple[str, ...]:
        return self.only or tuple(self.systems)

    def is_single(self, label: str) -> bool:
        told = self.systems[label].get("single")
        return bool(told) if told is not None else self.given(label).get("recipe") in SINGLE_RECIPES

    @property
    def mixtures(self) -> tuple[str, ...]:
        return tuple(label for label in self.labels if not self.is_single(label))

    def given(self, label: str) -> dict[str, Any]:
        """A system's configuration before defaults, without data, seed and folder."""
        own = {k: v for k, v in self.systems[label].items() if k not in OWN_KEYS}
        given = merge(self.settings, own)
        if (name := given.get("backbone")) in self.backbones:
            given["backbone"] = self.backbones[name]
        return given


def read_experiment(source: str, words: Sequence[str] = ()) -> Experiment:
    """An experiment from a YAML file, or a shipped one by name, with `key=value` words on top.

    A label stands in a key as in the file (`systems.rodos.tune=lora`). Raises ConfigError with every fault.
    """
    given = _read(source)
    given = merge(given, parse_assignments(words))
    try:
        experiment = Experiment.model_validate(given)
    except ValidationError as error:
        raise ConfigError([_fault(one) for one in error.errors()]) from None
    if faults := _faults(experiment):
        raise ConfigError(faults)
    return experiment


def is_experiment(word: str) -> bool:
    """Whether the first word of `moreward compare` names an experiment and not a run."""
    return (word in SHIPPED and not Path(word).is_dir()) or Path(word).suffix in (".yaml", ".yml")


def _read(source: str) -> dict[str, Any]:
    if source in SHIPPED:
        return dict(yaml.safe_load(files("moreward.proof").joinpath(f"{source}.yaml").read_text(encoding="utf-8")))
    return read_config(Path(source))


def _fault(error: Any) -> str:
    loc = [str(part) for part in error["loc"]]
    key = ".".join(loc)
    if error["type"] == "extra_forbidden":
        known = Experiment.model_fields if len(loc) == 1 else _known_at(loc)
        return f"{key}: unknown key.{near(loc[-1], known)}"
    if error["type"] == "missing":
        return f"{key}: is required"
    said = error["msg"].removeprefix("Value error, ")
    return f"{key}: {said[0].lower()}{said[1:]} (got {error['input']!r})"


def _known_at(loc: Sequence[str]) -> Sequence[str]:
    models: dict[str, type[BaseModel]] = {"data": ExperimentData, "synthetic": Synthetic, "printed": Printed}
    model = next((models[part] for part in reversed(loc[:-1]) if part in models), Experiment)
    return list(model.model_fields)


def _faults(experiment: Experiment) -> list[str]:
    unknown = [label for label in experiment.only if label not in experiment.systems]
    found = [f"only: {label!r} is no system.{near(label, experiment.systems)}" for label in unknown]
    if found or not experiment.systems:
        return found or ["systems: names none; give at least a mixture"]
    found += _misplaced(experiment)
    for label in experiment.labels:
        found += _system_faults(experiment, label)
    found += _data_faults(experiment.data)
    if not experiment.mixtures:
        found.append(
            f"systems: only single models ({', '.join(experiment.labels)}); name a mixture, or say `single: false`"
        )
    if experiment.baseline and experiment.baseline not in experiment.labels:
        found.append(f"baseline: {experiment.baseline!r} is no system.{near(experiment.baseline, experiment.labels)}")
    slugs = [slug(label) for label in experiment.labels]
    if len(set(slugs)) < len(slugs):
        found.append(f"systems: the labels become the folders {slugs}, which must differ")
    return found + _control_faults(experiment)


def _misplaced(experiment: Experiment) -> list[str]:
    places = {"settings": experiment.settings} | {f"systems.{k}": experiment.systems[k] for k in experiment.labels}
    found = [
        f"{place}.{key}: set by the experiment" for place, v in places.items() for key in OF_THE_EXPERIMENT if key in v
    ]
    found += [
        f"{place}.data.{key}: all systems see the same pairs; name them under data.{key}"
        for place, v in places.items()
        for key in ("train", "val")
        if key in (v.get("data") or {})
    ]
    return found


def _system_faults(experiment: Experiment, label: str) -> list[str]:
    try:
        resolve(experiment.given(label))
    except ConfigError as error:
        return [f"systems.{label}: {fault}" for fault in error.faults]
    return []


def _data_faults(data: ExperimentData) -> list[str]:
    if data.synthetic is not None:
        given = [key for key in ("train", "val", "test") if getattr(data, key) is not None]
        return [f"data.{key}: beside data.synthetic, which makes all pairs" for key in given]
    found = []
    for key in ("train", "val", "test"):
        told = getattr(data, key)
        if not told and key != "val":
            found.append(f"data.{key}: is required: files, folders or globs of preference pairs (or data.synthetic)")
        if isinstance(told, dict):
            found += [
                f"data.{key}.{domain}: is required: the file, folder, glob or hf:owner/name with its pairs"
                for domain, place in told.items()
                if not place
            ]
        found += [f"data.{key}: there is no {path}" for path in paths_of(told) if not _is_there(path)]
    return found


def _is_there(path: str) -> bool:
    return path.startswith("hf:") or any(sign in path for sign in "*?[") or Path(path).exists()


def _control_faults(experiment: Experiment) -> list[str]:
    if experiment.controls == "auto":
        return []
    found = []
    for mixture, told in experiment.controls.items():
        if mixture not in experiment.mixtures:
            found.append(f"controls.{mixture}: is no mixture.{near(mixture, experiment.mixtures)}")
        elif told != "auto":
            found += _named_control_faults(experiment, mixture, told)
    missing = [mixture for mixture in experiment.mixtures if mixture not in experiment.controls]
    return found + [
        f"controls.{mixture}: no single model of equal budget: a mixture compared with nothing of its size shows "
        "nothing. Say `auto`, or name one for each of total, active and training"
        for mixture in missing
    ]


def _named_control_faults(experiment: Experiment, mixture: str, told: Mapping[Kind, str]) -> list[str]:
    found = [
        f"controls.{mixture}.{kind}: is required: the label of a single model of equal {kind} budget"
        for kind in KINDS
        if kind not in told
    ]
    for kind, label in told.items():
        if label not in experiment.labels:
            found.append(f"controls.{mixture}.{kind}: {label!r} is no system.{near(label, experiment.labels)}")
        elif not experiment.is_single(label):
            found.append(f"controls.{mixture}.{kind}: {label!r} is itself a mixture; name a single model")
    return found


def paths_of(told: Files) -> list[str]:
    """All the places of a data entry, flat."""
    if told is None:
        return []
    if isinstance(told, str):
        return [told]
    parts = told.values() if isinstance(told, dict) else told
    return [path for part in parts for path in ([part] if isinstance(part, str) else part or ())]


def domain_map(*entries: Files) -> dict[str, str]:
    """File patterns to domains, from the entries that are mappings."""
    found = {}
    for told in entries:
        for domain, places in told.items() if isinstance(told, dict) else ():
            for path in paths_of(places):
                found[f"{path.rstrip('/')}/*" if Path(path).is_dir() else path] = domain
    return found


def slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") or "x"


def config_of(experiment: Experiment, label: str, data: Mapping[str, Any]) -> RunConfig:
    """A system's resolved configuration on these data, with seed 0 and no folder."""
    return resolve(merge(experiment.given(label), {"data": data}))
