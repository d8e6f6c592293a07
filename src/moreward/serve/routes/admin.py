"""What the one who runs the server may ask: with an admin key only."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from moreward.serve.routes.common import Body, StrictRoute, TheDoor

router = APIRouter(route_class=StrictRoute, tags=["admin"])


class Reload(Body):
    """Has no fields: what is loaded is what stands at the place that the server was started with."""


@router.post("/admin/reload", summary="Load the run's folder again and let the new model serve; needs an admin key")
async def reload(body: Reload, door: TheDoor) -> dict[str, Any]:
    """Answers when the new model serves, or 409 where it was refused and the old one goes on."""
    about = await door.reload()
    return {"model_version": about["version"], "before": door.about.get("version")}
