"""The description of the server's routes, as it stands in docs/openapi.json: `python -m moreward.serve.openapi`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moreward.serve.app import create_app
from moreward.serve.settings import Settings


def described() -> str:
    """OpenAPI 3.1 as JSON. No model is loaded."""
    application = create_app(Settings(run=Path("run"))).app
    return json.dumps(application.openapi(), indent=1, ensure_ascii=False) + "\n"  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.stdout.write(described())
