"""The answers to errors: every error of a request becomes a problem, and the body of a request is bounded."""

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

from seedcore.core.errors import RegistryError
from seedcore.core.timeouts import within
from seedcore.discovery.problems import Problem, ProblemCode, problem_of

# MAX_PAGE logical ids of MAX_ID_CHARS, with four bytes of UTF-8 per character, are shorter
MAX_BODY_BYTES = 1024 * 1024
MAX_BODY_S = 10.0

_PROBLEM_TYPE = "application/problem+json"

_CODE_OF_STATUS = {
    400: ProblemCode.UNREADABLE_BODY,
    404: ProblemCode.NO_SUCH_ROUTE,
    405: ProblemCode.METHOD_NOT_ALLOWED,
    408: ProblemCode.BODY_TOO_SLOW,
    413: ProblemCode.BODY_TOO_LONG,
    429: ProblemCode.TOO_MANY_REQUESTS,
}


class BoundedBody:
    """Refuses the body of a request as soon as it is too long or too slow, without reading the rest."""

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
                # the body is complete; this waits for the end of the connection
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
    """Answer every error of `api` as a problem, and bound the bodies of its requests."""
    api.add_middleware(BoundedBody, max_bytes=MAX_BODY_BYTES, max_s=MAX_BODY_S)
    api.add_exception_handler(RegistryError, _registry_error)
    api.add_exception_handler(RequestValidationError, _invalid_request)
    api.add_exception_handler(HTTPException, _http_error)


def problem_media_type(document: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI document in which every problem has its own media type."""
    for path in document["paths"].values():
        for operation in path.values():
            for answer in operation["responses"].values():
                content = answer.get("content", {})
                if content.get("application/json", {}).get("schema", {}).get("$ref", "").endswith("/Problem"):
                    content[_PROBLEM_TYPE] = content.pop("application/json")
    return document


def problem(
    status: int, code: ProblemCode, title: str, detail: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An answer with a problem."""
    return _answer(Problem(code=code, title=title, status=status, detail=detail), headers)


def own_fault() -> JSONResponse:
    """The answer to a defect of this service, which is logged."""
    detail = "the request failed because of a defect in this service; see its log"
    return problem(500, ProblemCode.INTERNAL_ERROR, "InternalError", detail)


def _answer(shown: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(
        shown.model_dump(mode="json"), status_code=shown.status, headers=headers, media_type=_PROBLEM_TYPE
    )


def registry_problem(error: RegistryError) -> JSONResponse:
    """The answer to an error of the registry."""
    return _answer(problem_of(error))


async def _registry_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RegistryError)
    return registry_problem(error)


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
    return problem(422, ProblemCode.INVALID_INPUT, "InvalidInput", detail)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """An unknown route or method, an unreadable body: found before any route of ours runs."""
    assert isinstance(error, HTTPException)
    title = HTTPStatus(error.status_code).phrase
    detail = error.detail if error.detail != title else f"{title}: {request.method} {request.url.path[:200]}"
    code = _CODE_OF_STATUS.get(error.status_code, ProblemCode.REFUSED)
    return problem(error.status_code, code, title, detail, error.headers)
