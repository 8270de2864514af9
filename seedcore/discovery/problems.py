"""Errors over HTTP: problem details (RFC 9457), and the bound of a request's body."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from time import monotonic
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seedcore.core.errors import (
    BacklogFullError,
    CannotKnowError,
    FencedError,
    FollowersFullError,
    ForbiddenTransitionError,
    InstanceDeadError,
    InvalidInputError,
    NotResolvableError,
    RegistryError,
    RegistryUnavailableError,
    StoreUnavailableError,
    UnknownInstanceError,
    VersionMismatchError,
)
from seedcore.core.timeouts import within
from seedcore.discovery.api import Problem

# MAX_PAGE logical ids of MAX_ID_CHARS, each of them four bytes of UTF-8, take less
MAX_BODY_BYTES = 1024 * 1024
MAX_BODY_S = 10.0

_PROBLEM_TYPE = "application/problem+json"

_STATUS_OF_ERROR: tuple[tuple[type[RegistryError], int], ...] = (
    (InvalidInputError, 422),
    (NotResolvableError, 404),
    (UnknownInstanceError, 404),
    (ForbiddenTransitionError, 409),
    (InstanceDeadError, 409),
    (CannotKnowError, 503),
    (RegistryUnavailableError, 503),
    (StoreUnavailableError, 503),
    (FencedError, 503),
    (BacklogFullError, 503),
    (FollowersFullError, 503),
    (VersionMismatchError, 503),
)

PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "It needs a token that is known and has not expired"},
    403: {"model": Problem, "description": "The token does not give the right to this"},
    422: {"model": Problem, "description": "A value breaks a stated limit"},
    429: {"model": Problem, "description": "This address asks too often: again after Retry-After"},
    503: {"model": Problem, "description": "Nobody who could tell can be asked now"},
}
BODY: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is no text"},
    408: {"model": Problem, "description": "The body came too slowly"},
    413: {"model": Problem, "description": "The body is too long"},
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "There is none"}}


REFUSED: dict[int | str, dict[str, Any]] = {409: {"model": Problem, "description": "What it is now forbids it"}}


class BoundedBody:
    """Refuses a request's body once it is known to be too long, or too slow: it is neither read to its end nor kept."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_s = max_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        too_long = HTTPException(413, f"the body must have at most {self._max_bytes} bytes")
        received = 0
        ends_s: float | None = monotonic() + self._max_s

        async def receive_bounded() -> Message:
            nonlocal received, ends_s
            if declared.isdigit() and int(declared) > self._max_bytes:
                raise too_long
            if ends_s is None:
                # the body is there; what is waited for is the end of the connection
                return await receive()
            try:
                message = await within(receive(), max(0.0, ends_s - monotonic()))
            except TimeoutError:
                raise HTTPException(408, f"the body must be there within {self._max_s:g} s") from None
            if not message.get("more_body", False):
                ends_s = None
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise too_long
            return message

        await self._app(scope, receive_bounded, send)


def install(api: FastAPI) -> None:
    """Answer every error of `api` as problem details, and bound its requests."""
    api.add_middleware(BoundedBody, max_bytes=MAX_BODY_BYTES, max_s=MAX_BODY_S)
    api.add_exception_handler(RegistryError, _registry_error)
    api.add_exception_handler(RequestValidationError, _invalid_request)
    api.add_exception_handler(HTTPException, _http_error)


def problem_media_type(document: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI document in which every problem has the media type that it is sent with."""
    for path in document["paths"].values():
        for operation in path.values():
            for answer in operation["responses"].values():
                content = answer.get("content", {})
                if content.get("application/json", {}).get("schema", {}).get("$ref", "").endswith("/Problem"):
                    content[_PROBLEM_TYPE] = content.pop("application/json")
    return document


def problem(status: int, title: str, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An answer that says what is wrong."""
    body = Problem(title=title, status=status, detail=detail)
    return JSONResponse(body.model_dump(), status_code=status, headers=headers, media_type=_PROBLEM_TYPE)


async def _registry_error(_request: Request, error: Exception) -> JSONResponse:
    status = next((code for kind, code in _STATUS_OF_ERROR if isinstance(error, kind)), 500)
    return problem(status, type(error).__name__.removesuffix("Error"), str(error))


async def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    is_of_body = first["loc"][0] == "body"
    if first["type"] == "json_invalid":
        # its place is a position in the text, not a field
        detail = f"body: is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
    elif is_of_body and isinstance(error.body, bytes):
        sent = request.headers.get("content-type", "no content type")
        detail = f"body: must be JSON and be sent as Content-Type: application/json, not {sent[:80]}"
    else:
        where = ".".join(str(part) for part in first["loc"] if part not in {"query", "body", "path"})
        detail = f"{where or 'body'}: {first['msg']}"
    return problem(422, "InvalidInput", detail)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """No such route, no such method, an unreadable body: found before a route of ours is asked."""
    assert isinstance(error, HTTPException)
    title = HTTPStatus(error.status_code).phrase
    detail = error.detail if error.detail != title else f"{title}: {request.method} {request.url.path[:200]}"
    return problem(error.status_code, title, detail, error.headers)


def own_fault() -> JSONResponse:
    """A defect of ours, which is logged."""
    return problem(500, "InternalError", "the request failed for a fault of this service; its log says why")
