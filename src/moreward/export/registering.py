"""Tells transformers of our mixtures, once it is there: `import moreward` itself must not import it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TARGET = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Now where transformers' Auto classes are loaded already, else as soon as they are."""
    if TARGET in sys.modules:
        _tell()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _tell() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModelForSequenceClassification

    from moreward.export.modeling_moreward import MorewardConfig, MorewardForSequenceClassification

    AutoConfig.register(MorewardConfig.model_type, MorewardConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(MorewardConfig, MorewardForSequenceClassification, exist_ok=True)


class _Finder(MetaPathFinder):
    """Finds one module as everyone else does, and lets `_Loader` load it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Executes a module as its own loader does, then registers our classes."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _tell()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
