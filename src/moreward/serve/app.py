"""The application: routes, errors in the shape that each route's clients read, start and end."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from moreward import __version__
from moreward.errors import MorewardError
from moreward.serve.door import Door
from moreward.serve.faults import Fault
from moreward.serve.guard import Guard
from moreward.serve.routes import admin, native, tei, trainers, vllm
from moreward.serve.settings import Settings

log = logging.getLogger(__name__)

FAMILIES = (native, vllm, tei, trainers, admin)
VLLM_PATHS = {"/classify", "/v1/classify", "/pooling", "/v1/embeddings", "/score", "/v1/score", "/v1/models"}
RERANK_PATHS = {"/rerank", "/v1/rerank", "/v2/rerank"}
TEI_PATHS = {"/predict", "/info"}
BRANCHES = {"str", "int", "list", "dict"}
"""Names in the place of an error that are those of a union's branch, not of a field."""
VLLM_TYPES = {400: "BadRequestError", 404: "NotFoundError", 422: "UnprocessableEntityError"}
TEI_TYPES = {400: "Empty", 413: "Validation", 422: "Validation", 424: "Backend", 429: "Overloaded", 503: "Unhealthy"}


def create_app(settings: Settings, failed: Callable[[str], None] = lambda message: None) -> Guard:
    """`failed` is told why the model could not be loaded; the server then never becomes ready."""
    door = Door(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async def begin() -> None:
            try:
                await door.owner.start()
            except MorewardError as error:
                door.owner.state = "self_test_failed"
                failed(str(error))
                return
            await door.queue.run()

        task = asyncio.create_task(begin())
        yield
        with suppress(TimeoutError):
            await asyncio.wait_for(door.queue.drained(), settings.limits.drain)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await door.owner.stop()

    app = FastAPI(title="moreward", version=__version__, lifespan=lifespan, summary="Rewards of a mixture of experts.")
    app.state.door = door
    for family in FAMILIES:
        app.include_router(family.router)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(files("moreward.serve").joinpath("page.html").read_bytes(), media_type="text/html")

    @app.exception_handler(Fault)
    async def of_fault(request: Request, fault: Fault) -> Response:
        return _response(request, fault)

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> Response:
        return _response(request, first_fault(error))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        code = {404: "no_route", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        return _response(request, Fault(error.status_code, code, str(error.detail)))

    @app.exception_handler(Exception)
    async def of_bug(request: Request, error: Exception) -> Response:
        log.error("%s: %s", request.url.path, type(error).__name__)
        return _response(request, Fault(500, "internal", "an error of ours; the server's log has its kind"))

    return Guard(app, door, shaped)


def _response(request: Request, fault: Fault) -> Response:
    request.app.state.door.metrics.rejected.labels(fault.code).inc()
    status, body, headers = shaped(request.url.path, request.scope["state"]["body"], fault)
    return Response(body, status, headers, media_type="application/json")


def first_fault(error: RequestValidationError) -> Fault:
    """The first thing that is wrong, without a word of what was sent."""
    first = error.errors()[0]
    param, index = "", None
    for step in first["loc"][1:]:
        if isinstance(step, int):
            param += f"[{step}]"
            index = step if index is None else index
        elif step.isidentifier() and step not in BRANCHES and not step[0].isupper():
            param += f".{step}" if param else step
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    message = str(first["msg"]).removeprefix("Value error, ")
    return Fault(422, str(first["type"]), f"{param or 'body'}: {message}{more}", param=param, index=index)


def shaped(path: str, body: bytes, fault: Fault) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of an error, as the clients of this path read them."""
    headers = {"retry-after": str(fault.retry_after)} if fault.retry_after else {}
    if fault.status == 401:
        headers["www-authenticate"] = 'Bearer, Basic realm="moreward"'
    is_tei = path in TEI_PATHS or (path in RERANK_PATHS and b'"texts"' in body)
    status = _status(fault, is_tei)
    told: dict[str, Any]
    if is_tei:
        told = {"error": fault.message, "error_type": TEI_TYPES.get(status, "Backend")}
    elif path in VLLM_PATHS or path in RERANK_PATHS:
        kind = VLLM_TYPES.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
        told = {"error": {"message": fault.message, "type": kind, "param": fault.param or None, "code": status}}
    else:
        told = {
            "error": fault.message,
            "error_type": fault.kind,
            "message": fault.message,
            "code": fault.code,
            "param": fault.param or None,
            "index": fault.index,
        }
    return status, json.dumps(told).encode(), headers


def _status(fault: Fault, is_tei: bool) -> int:
    if is_tei and fault.code == "overloaded":
        return 429
    return 424 if is_tei and fault.code == "non_finite" else fault.status
