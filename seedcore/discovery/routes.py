"""The HTTP API. Each route finds its replica by dependency: Serve's class-based views need a FastAPI that
analyses a route twice, which newer ones do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seedcore import __version__
from seedcore.core.errors import (
    CannotKnowError,
    InvalidInputError,
    NotResolvableError,
    RegistryError,
    RegistryUnavailableError,
    StoreUnavailableError,
    UnknownInstanceError,
)
from seedcore.core.lifecycle import Status
from seedcore.core.model import MAX_PAGE, InstanceFilter
from seedcore.discovery.api import (
    AgentAnswer,
    EpochAnswer,
    HealthAnswer,
    InstanceAnswer,
    InstancePage,
    Problem,
    ReadyAnswer,
    ResolveAnswer,
    ResolveRequest,
    RungsOut,
    agent_answer,
    instance_out,
    page_of,
    resolve_answer,
    resolve_by_name,
    stamp_of,
)
from seedcore.discovery.app import Discovery


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """Equality selectors `key=value`, or InvalidInputError."""
    labels: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise InvalidInputError("label", f"must be written key=value, not {text[:80]!r}")
        labels[key] = value
    return labels


# MAX_PAGE logical ids of MAX_ID_CHARS, each of them four bytes of UTF-8, take less
_MAX_BODY_BYTES = 1024 * 1024
_MAX_ANSWERS = 100

_STATUS_OF_ERROR: tuple[tuple[type[RegistryError], int], ...] = (
    (InvalidInputError, 422),
    (NotResolvableError, 404),
    (UnknownInstanceError, 404),
    (CannotKnowError, 503),
    (RegistryUnavailableError, 503),
    (StoreUnavailableError, 503),
)

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    422: {"model": Problem, "description": "A value breaks a stated limit"},
    503: {"model": Problem, "description": "Nobody who could tell can be asked now"},
}
_TOO_LONG: dict[int | str, dict[str, Any]] = {413: {"model": Problem, "description": "The body is too long"}}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "There is none"}}


class BoundedBody:
    """Refuses a request's body once it is known to be too long: it is neither read to its end nor kept."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        too_long = HTTPException(413, f"the body must have at most {self._max_bytes} bytes")
        received = 0

        async def receive_bounded() -> Message:
            nonlocal received
            if declared.isdigit() and int(declared) > self._max_bytes:
                raise too_long
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise too_long
            return message

        await self._app(scope, receive_bounded, send)


api = FastAPI(
    title="SeedCore Registry",
    version=__version__,
    description="Who is alive, by logical id. Every answer says its source, its time and whether it is complete.",
)


api.add_middleware(BoundedBody, max_bytes=_MAX_BODY_BYTES)


def _problem(status: int, title: str, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    body = Problem(title=title, status=status, detail=detail)
    return JSONResponse(body.model_dump(), status_code=status, headers=headers, media_type="application/problem+json")


@api.exception_handler(RegistryError)
async def _registry_error(_request: Request, error: Exception) -> JSONResponse:
    status = next((code for kind, code in _STATUS_OF_ERROR if isinstance(error, kind)), 500)
    # "*": the question was about no agent in particular
    is_general = isinstance(error, CannotKnowError) and error.logical_id == "*"
    detail = f"cannot know now: {error.why}" if isinstance(error, CannotKnowError) and is_general else str(error)
    return _problem(status, type(error).__name__.removesuffix("Error"), detail)


@api.exception_handler(RequestValidationError)
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
    return _problem(422, "InvalidInput", detail)


@api.exception_handler(HTTPException)
async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """No such route, no such method, an unreadable body: found before a route of ours is asked."""
    assert isinstance(error, HTTPException)
    title = HTTPStatus(error.status_code).phrase
    detail = error.detail if error.detail != title else f"{title}: {request.method} {request.url.path[:200]}"
    return _problem(error.status_code, title, detail, error.headers)


@api.exception_handler(Exception)
async def _own_fault(_request: Request, _error: Exception) -> JSONResponse:
    """A defect of ours. It is raised again behind this answer, and logged with its traceback."""
    return _problem(500, "InternalError", "the request failed for a fault of this service; its log says why")


async def this_replica() -> Discovery:
    """The deployment's object that this request was routed to."""
    replica = serve.get_replica_context().servable_object
    assert isinstance(replica, Discovery)
    return replica


Replica = Annotated[Discovery, Depends(this_replica)]


def _json(body: str) -> Response:
    return Response(body, media_type="application/json")


_answers: dict[tuple[object, ...], str] = {}


@api.get("/v1/instances", responses=_PROBLEMS, response_model=InstancePage)
async def list_instances(
    replica: Replica,
    request: Request,
    status: Annotated[list[Status] | None, Query(description="repeatable; default alive")] = None,
    organ: Annotated[str | None, Query(description="organ id")] = None,
    label: Annotated[list[str] | None, Query(description="key=value; repeatable, all must hold")] = None,
    logical_id: Annotated[str | None, Query(description="instances of one agent")] = None,
    epoch: Annotated[str | None, Query(description="default: the current one")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    cursor: Annotated[str | None, Query(description="next_cursor of the page before")] = None,
    consistent: Annotated[bool, Query(description="ask the registry itself, not a copy up to 4 s old")] = False,
) -> Response:
    """A page of instances in the order of logical id."""
    wanted = InstanceFilter(
        statuses=frozenset(status) if status else frozenset({Status.ALIVE}),
        organ_id=organ,
        labels=parse_labels(label if label is not None else []),
        logical_id=logical_id,
        epoch=epoch,
    )
    view = None if consistent else replica.ladder.view()
    if view is None:
        page = page_of(await replica.ladder.list_instances(wanted, limit, cursor, consistent=consistent))
        return _json(page.model_dump_json())
    # the same question about the same version has the same answer
    question = (request.url.query, view.stream, view.version, view.as_of)
    body = _answers.get(question)
    if body is None:
        body = page_of(await replica.ladder.list_instances(wanted, limit, cursor)).model_dump_json()
        if len(_answers) >= _MAX_ANSWERS:
            _answers.clear()
        _answers[question] = body
    return _json(body)


@api.get("/v1/instances/{instance_id}", responses={**_PROBLEMS, **_NOT_FOUND})
async def get_instance(replica: Replica, instance_id: str) -> InstanceAnswer:
    """One instance, dead or alive."""
    answer = await replica.ladder.instance(instance_id)
    return InstanceAnswer(instance=instance_out(answer.value), **stamp_of(answer))


@api.get("/v1/agents/{logical_id:path}", responses={**_PROBLEMS, **_NOT_FOUND})
async def get_agent(replica: Replica, logical_id: str) -> AgentAnswer:
    """One agent: its live instances and its newest ones dead or alive."""
    described = await replica.ladder.describe(logical_id)
    if described.complete and not described.live and not described.history:
        raise NotResolvableError(logical_id, "nobody ever registered under this logical id")
    return agent_answer(described)


@api.post("/v1/resolve", responses={**_PROBLEMS, **_TOO_LONG})
async def resolve_over_http(replica: Replica, request: ResolveRequest) -> ResolveAnswer:
    """The best instance of each agent, or why there is none."""
    try:
        return resolve_answer(await replica.ladder.resolve(request.logical_ids, allow_late=request.allow_late))
    except CannotKnowError:
        names = await replica.ladder.names_among(request.logical_ids)
        return resolve_by_name(request.logical_ids, names)


@api.get("/v1/epoch", responses=_PROBLEMS)
async def get_epoch(replica: Replica) -> EpochAnswer:
    """The current epoch."""
    answer = await replica.ladder.epoch()
    return EpochAnswer(epoch=answer.value.name, number=answer.value.number, **stamp_of(answer))


@api.get("/healthz")
async def healthz(replica: Replica) -> HealthAnswer:
    """This replica is up. Always 200; says how the registry is."""
    health = await replica.ladder.registry_health()
    is_report = not isinstance(health, str)
    return HealthAnswer(
        status="ok",
        version=__version__,
        mode=replica.settings.mode.value,
        registry=asdict(health) if not isinstance(health, str) else None,
        registry_problem=None if is_report else str(health),
    )


@api.get("/readyz", responses={503: {"model": ReadyAnswer, "description": "No rung answers"}})
async def readyz(replica: Replica) -> JSONResponse:
    """200 while the registry, the database or Ray's listing can answer; says which."""
    rungs = await replica.ladder.rungs()
    shown = RungsOut(registry=rungs.registry or "ok", postgres=rungs.postgres or "ok", ray=rungs.ray or "ok")
    body = ReadyAnswer(ready=rungs.is_ready, rungs=shown)
    return JSONResponse(body.model_dump(), status_code=200 if rungs.is_ready else 503)
