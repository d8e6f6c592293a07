"""moreward: mixture-of-experts reward models, trained, evaluated, extended and served.

Public names are loaded on first use, so `import moreward` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from moreward.export.registering import register as _register

__version__ = "0.1.0.dev0"

_PUBLIC = {
    "load": "moreward.scoring",
    "Scorer": "moreward.scoring",
    "Client": "moreward.client",
    "AsyncClient": "moreward.client",
    "RunConfig": "moreward.config",
    "Preference": "moreward.types",
    "Conversation": "moreward.types",
    "Reward": "moreward.types",
    "MorewardError": "moreward.errors",
}

__all__ = sorted([*_PUBLIC, "__version__"])


_register()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'moreward' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
