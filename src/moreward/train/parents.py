"""A run made from finished runs: reading them, saying where they differ, writing the new one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moreward.config import RunConfig, deviations
from moreward.data.batches import Encoder, tokenizer_sha256
from moreward.errors import ConfigError
from moreward.items import as_text
from moreward.nn.backbone import load_tokenizer
from moreward.runs import identity, model_folder, read_card, write_model
from moreward.scoring import Scorer
from moreward.systems._base import System
from moreward.train.runner import NUM_GOLDEN, open_run
from moreward.types import Conversation, text_key


@dataclass(frozen=True)
class Parent:
    """A finished run as it is on disk."""

    run: Path
    folder: Path
    card: dict[str, Any]
    tokenizer: str

    @property
    def config(self) -> RunConfig:
        return RunConfig.model_validate(self.card["config"])

    @property
    def backbone(self) -> str:
        """What tells backbones apart: the hash of a directory, the name of one on the hub."""
        told = self.card["backbone"]
        return str(told["sha256"] or told["name"])


Property = Callable[[Parent], Any]
TEXT_TO_TOKENS: Mapping[str, Property] = {
    "tokenizer": lambda p: p.tokenizer,
    "data.max_length": lambda p: p.config.data.max_length,
    "data.input_template": lambda p: p.config.data.input_template,
    "pooling": lambda p: p.card["backbone"]["pooling"],
}


def read_parents(runs: Sequence[str | Path]) -> list[Parent]:
    """Raises ConfigError for fewer than two, RunError for what is no finished run."""
    if len(runs) < 2:
        raise ConfigError(f"at least two finished runs are needed (got {len(runs)})")
    return [read_parent(run) for run in runs]


def read_parent(run: str | Path) -> Parent:
    """Raises RunError for what is no finished run."""
    folder = model_folder(run)
    return Parent(Path(run), folder, read_card(folder), tokenizer_sha256(load_tokenizer(str(folder / "backbone"))))


def refuse_differences(parents: Sequence[Parent], must_agree: Mapping[str, Property], why: str) -> None:
    """ConfigError with every property in which a run is not as the first one."""
    first, *others = parents
    faults = [
        f"{name}: {first.run} has {_shown(get(first))}, {other.run} has {_shown(get(other))}"
        for name, get in must_agree.items()
        for other in others
        if get(first) != get(other)
    ]
    if faults:
        raise ConfigError([why, *faults])


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def write_child(
    config: RunConfig, system: System, encoder: Encoder, parents: Sequence[Parent], told: Mapping[str, Any]
) -> Scorer:
    """Write the new run's folder: configuration, and the model with a card that names its parents and has golden
    rewards of its own. RunError where `config.out` holds a finished run."""
    card = {
        "recipe": config.recipe,
        "paper": system.paper,
        "domains": list(system.domains),
        "experts": list(system.expert_labels),
        "config": config.model_dump(mode="json"),
        "deviations_from_paper": deviations(config),
        "backbone": parents[0].card["backbone"],
        "parameters": {"stored": system.num_parameters(), "active": system.num_active_parameters()},
        "parents": [{"run": str(p.run), "model": identity(p.folder), "recipe": p.config.recipe} for p in parents],
        "stages": [],
        **told,
    }
    with open_run(config) as run:
        scorer = Scorer(system, encoder, card, device="cpu")
        card["golden"] = scorer.golden(_golden_texts(parents))
        write_model(run, system.cpu(), encoder, card)
    return scorer


def _golden_texts(parents: Sequence[Parent]) -> list[Conversation]:
    """The texts of the parents' golden rewards, each once; where there are many, some of each parent."""
    share = -(-NUM_GOLDEN // len(parents))
    texts = {
        text_key(prompt, response): Conversation(prompt=prompt, response=response)
        for parent in parents
        for golden in parent.card["golden"][:share]
        for prompt, response in [(as_text(golden["prompt"]), as_text(golden["response"]))]
    }
    return list(texts.values())
