"""Transformers that compute without padding, one file a family.

A family runs a stock Hugging Face model's own modules and tensors over a packed stream, layer by layer, and gives what
the model's forward gives. Its file defines a class `Family` with `model_types`, the `config.model_type` values that
it knows; a file is all it takes to add one. Every other architecture runs on its own code, padded.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from moreward.nn.packing import Stream


class Linear(Protocol):
    """What a family calls for every linear layer: the layer's product and what the adapters add to it."""

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        """`x` holds a row for each token of the stream."""

    def leaves(self, module: nn.Module, x: Tensor) -> Tensor:
        """`x` holds a row for each leaf of the stream."""

    def others(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        """The layer under the adapter of each group of the stream, for rows `x` that belong to no text."""

    def kept(self, module: nn.Module, make: Callable[[], Tensor], sources: Sequence[Tensor]) -> list[Tensor]:
        """As `others` on `make()`, kept as long as the layer, its adapter and the `sources` of `make` stay the
        same. Without gradients."""


class Family(Protocol):
    """A model over a stream. T tokens, L leaves, D hidden."""

    model_types: ClassVar[frozenset[str]]
    causal: bool
    num_layers: int

    def __init__(self, base: Any, classifier: Any) -> None:
        """`base` is the bare transformer; `classifier` the `*ForSequenceClassification` around it, None where
        the backbone pools in its own way."""

    @staticmethod
    def fits(config: Any) -> bool:
        """Whether this configuration uses nothing that the family leaves out."""

    def embed(self, stream: Stream, linear: Linear) -> Tensor:
        """x_TD before the first layer."""

    def layer(self, i: int, x_TD: Tensor, stream: Stream, linear: Linear, keep_L: Tensor | None) -> Tensor:
        """x_TD after layer i; with `keep_L` only those tokens' rows."""

    def final(self, x_TD: Tensor) -> Tensor:
        """What the model does after its last layer."""

    def pooled(self, first_LD: Tensor, linear: Linear) -> Tensor:
        """What the classifier does with the first tokens before its last linear layer."""


def find_family(base: nn.Module, classifier: nn.Module | None) -> Family | None:
    """The family of a model, or None: then its own code runs it."""
    config: Any = base.config
    for name in _file_names():
        family = importlib.import_module(f"{__name__}.{name}").Family
        if config.model_type in family.model_types:
            return family(base, classifier) if family.fits(config) else None
    return None


def _file_names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
