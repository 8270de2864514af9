"""The HTTP API. Each route finds its replica by dependency: Serve's class-based views need a FastAPI that
analyses a route twice, which newer ones do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from ray import serve

from seedcore import __version__
from seedcore.core.answers import InstanceFilter
from seedcore.core.clock import utc_now
from seedcore.core.errors import CannotKnowError, FollowersFullError, InvalidInputError, NotResolvableError
from seedcore.core.instances import Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_KEPT_S, MAX_PAGE, MAX_REASON_CHARS
from seedcore.core.paging import encode_death_cursor
from seedcore.core.selector import MAX_SELECTOR_CHARS, parse_labels, parse_selector
from seedcore.discovery import page
from seedcore.discovery.access import Caller, Right
from seedcore.discovery.api import (
    AccessAnswer,
    AgentAnswer,
    DrainRequest,
    EpochAnswer,
    HealthAnswer,
    HistoryAnswer,
    InstanceAnswer,
    InstancePage,
    OverviewAnswer,
    ReadyAnswer,
    ReasonRequest,
    ResolveAnswer,
    ResolveRequest,
    TurnedAnswer,
    agent_answer,
    instance_out,
    resolve_by_name,
    rungs_out,
    stamp_of,
    transitions_out,
    turned_answer,
)
from seedcore.discovery.app import Discovery
from seedcore.discovery.guard import STATE, STILL, Guard
from seedcore.discovery.pages import page_json, resolve_json
from seedcore.discovery.problems import BODY, NOT_FOUND, PROBLEMS, REFUSED, install, problem_media_type
from seedcore.discovery.watch import Position, events, require_feed

_MAX_ETAGS = 20


async def this_replica() -> Discovery:
    """The deployment's object that this request was routed to."""
    replica = serve.get_replica_context().servable_object
    assert isinstance(replica, Discovery)
    return replica


async def wanted_instances(
    status: Annotated[list[Status] | None, Query(description="repeatable; default alive")] = None,
    verdict: Annotated[list[Verdict] | None, Query(description="repeatable; default any")] = None,
    organ: Annotated[str | None, Query(description="organ id")] = None,
    node: Annotated[str | None, Query(description="Ray node id")] = None,
    selector: Annotated[
        str | None,
        Query(description="labels in Kubernetes' syntax: env in (a, b), tier!=x, !spot", max_length=MAX_SELECTOR_CHARS),
    ] = None,
    label: Annotated[list[str] | None, Query(description="key=value; repeatable, all must hold")] = None,
    logical_id: Annotated[str | None, Query(description="instances of one agent")] = None,
    epoch: Annotated[str | None, Query(description="default: the current one")] = None,
) -> InstanceFilter:
    """Which instances a request wants."""
    return InstanceFilter(
        statuses=frozenset(status) if status else frozenset({Status.ALIVE}),
        verdicts=frozenset(verdict) if verdict else None,
        organ_id=organ,
        node_id=node,
        selector=parse_selector(selector if selector is not None else ""),
        labels=parse_labels(label if label is not None else []),
        logical_id=logical_id,
        epoch=epoch,
    ).validated()


async def this_caller(request: Request) -> Caller:
    """Who asks, as the guard found."""
    caller = request.scope["state"][STATE]
    assert isinstance(caller, Caller)
    return caller


Replica = Annotated[Discovery, Depends(this_replica)]
Who = Annotated[Caller, Depends(this_caller)]
Wanted = Annotated[InstanceFilter, Depends(wanted_instances)]
Reason = Annotated[str | None, Query(description="what shall be remembered", min_length=1, max_length=MAX_REASON_CHARS)]

_bearer = HTTPBearer(auto_error=False, description="Made by `seedcore token new`. The guard judges it.")


def _query_parameters(dependant: Dependant) -> set[str]:
    own = {field.alias for field in dependant.query_params}
    return own.union(*map(_query_parameters, dependant.dependencies))


async def only_known_parameters(request: Request) -> None:
    """Refuse what would be left out of account: a filter by a slip of the pen would list everybody."""
    known = _query_parameters(request.scope["route"].dependant)
    unknown = sorted(set(request.query_params) - known)
    if unknown:
        takes = f"this takes {', '.join(sorted(known))}" if known else "this takes none"
        raise InvalidInputError(unknown[0][:80], f"is no query parameter: {takes}")


# the scheme is named here for the document alone
v1 = APIRouter(prefix="/v1", dependencies=[Depends(_bearer), Depends(only_known_parameters)])


@v1.get("/access", responses={429: PROBLEMS[429]}, tags=["health"])
async def get_access(replica: Replica, who: Who) -> AccessAnswer:
    """What whoever asks may do here, and what anybody may."""
    return AccessAnswer(
        right=str(who.right), name=who.name, problem=who.problem, anonymous=str(replica.access.anonymous)
    )


@v1.get("/overview", responses=PROBLEMS, tags=["fleet"])
async def get_overview(replica: Replica) -> OverviewAnswer:
    """The fleet at a glance, and how registry and database are."""
    return await replica.overviews.now()


@v1.get(
    "/instances",
    responses={**PROBLEMS, 304: {"description": "Nothing that is wanted has changed"}},
    response_model=InstancePage,
    tags=["fleet"],
)
async def list_instances(
    replica: Replica,
    request: Request,
    wanted: Wanted,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    cursor: Annotated[str | None, Query(description="next_cursor of the page before")] = None,
    consistent: Annotated[bool, Query(description="ask the registry itself, not a copy up to 4 s old")] = False,
    since: Annotated[
        str | None, Query(description="STREAM:VERSION of an earlier answer: 304 unless something wanted has changed")
    ] = None,
    if_none_match: Annotated[
        list[str] | None, Header(description="ETags of earlier answers, with commas between them: as `since`")
    ] = None,
) -> Response:
    """A page of instances in the order of logical id.

    It has fewer than `limit` where they would have more than 1 MiB of JSON: `next_cursor` says that there are more.
    """
    known = [Position.parsed(since)] if since is not None else _positions_of(if_none_match or [])
    view = None if consistent else replica.ladder.view()
    if view is None or not view.knows(wanted):
        listing = await replica.ladder.list_instances(wanted, limit, cursor, consistent=consistent)
        return _json(page_json(listing))
    headers = {"ETag": f'W/"{view.stream}:{view.version}"', "Cache-Control": "no-cache"}
    if any(replica.ladder.is_unchanged(position.stream, position.version, wanted) for position in known):
        return Response(status_code=304, headers=headers)
    # the same question about the same version has the same answer
    question = (request.url.query, view.stream, view.version, view.as_of)
    body = replica.answers.get(question)
    if body is None:
        body = page_json(await replica.ladder.list_instances(wanted, limit, cursor))
        replica.answers.put(question, body)
    return _json(body, headers)


@v1.get("/instances/{instance_id}", responses={**PROBLEMS, **NOT_FOUND}, tags=["fleet"])
async def get_instance(replica: Replica, instance_id: str) -> InstanceAnswer:
    """One instance, dead or alive."""
    answer = await replica.ladder.instance(instance_id)
    return InstanceAnswer(instance=instance_out(answer.value), **stamp_of(answer))


@v1.get(
    "/watch",
    responses={**PROBLEMS, 200: {"content": {"text/event-stream": {}}, "description": "events, for ever"}},
    response_class=StreamingResponse,
    tags=["fleet"],
)
async def watch(
    replica: Replica,
    request: Request,
    wanted: Wanted,
    after: Annotated[str | None, Query(description="STREAM:VERSION of an answer; default: from now on")] = None,
    last_event_id: Annotated[str | None, Header(description="where to go on; wins over `after`")] = None,
) -> StreamingResponse:
    """What changes, as server-sent events, of every living status unless `status` says which.

    `change` has the instance, or null where it has died (`cause` says why) or is not wanted any more; `reset` comes
    where what happened before is not remembered: list again; `state`, every two seconds, says whether the registry
    confirms what this deployment knows. Each event's id can be given as Last-Event-ID.
    """
    if wanted.verdicts is not None or (wanted.statuses is not None and Status.DEAD in wanted.statuses):
        raise InvalidInputError("status", "changes are of the living, and tell every verdict: filter what comes")
    if wanted.epoch is not None:
        raise InvalidInputError("epoch", "changes are of the epoch that is shown")
    if replica.rates.open_feeds > replica.max_watchers:
        raise FollowersFullError(replica.max_watchers)
    feed = require_feed(replica.ladder)
    position = last_event_id if last_event_id is not None else after
    start = Position.parsed(position) if position is not None else None
    selected = wanted if request.query_params.get("status") else replace(wanted, statuses=None)
    return StreamingResponse(
        events(replica.ladder, feed, start, selected, request.scope["state"][STILL]),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


@v1.get("/agents/{logical_id:path}", responses={**PROBLEMS, **NOT_FOUND}, tags=["agents"])
async def get_agent(replica: Replica, logical_id: str) -> AgentAnswer:
    """One agent: its live instances, its newest ones dead or alive, and their steps."""
    described = await replica.ladder.describe(logical_id)
    if described.complete and not described.live and not described.history:
        raise NotResolvableError(logical_id, "nobody ever registered under this logical id")
    return agent_answer(described)


@v1.get("/history/{logical_id:path}", responses={**PROBLEMS, **NOT_FOUND}, tags=["agents"])
async def get_history(
    replica: Replica, logical_id: str, limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100
) -> HistoryAnswer:
    """The steps of an agent's instances with their causes, newest first."""
    answer = await replica.ladder.transitions(logical_id, limit)
    if not answer.value:
        raise NotResolvableError(logical_id, "nothing is remembered of this logical id")
    return HistoryAnswer(logical_id=logical_id, transitions=transitions_out(answer.value), **stamp_of(answer))


@v1.get("/deaths", responses=PROBLEMS, response_model=InstancePage, tags=["fleet"])
async def get_deaths(
    replica: Replica,
    within_s: Annotated[
        float | None, Query(gt=0, le=MAX_KEPT_S, description="only of the last so many seconds")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    cursor: Annotated[str | None, Query(description="next_cursor of the page before")] = None,
) -> Response:
    """Dead instances and why they died, of every agent and epoch that is remembered, the last first.

    It has fewer than `limit` where they would have more than 1 MiB of JSON: `next_cursor` says that there are more.
    """
    return _json(page_json(await replica.ladder.deaths(limit, cursor, within_s), encode_death_cursor))


_CHANGES = {**PROBLEMS, **NOT_FOUND, **REFUSED, **BODY}


@v1.post("/agents/{logical_id:path}/drain", responses=_CHANGES, tags=["operations"])
async def drain(replica: Replica, who: Who, logical_id: str, request: DrainRequest) -> TurnedAnswer:
    """Hand an agent out no more, for a while or until it is undrained. It goes on with what it does."""
    turned = await replica.ladder.operate(Status.DRAINING, logical_id, request.reason, request.duration_s, who.name)
    return turned_answer(logical_id, turned, utc_now())


@v1.post("/agents/{logical_id:path}/undrain", responses=_CHANGES, tags=["operations"])
async def undrain(replica: Replica, who: Who, logical_id: str, request: ReasonRequest) -> TurnedAnswer:
    """Hand a draining agent out again."""
    turned = await replica.ladder.operate(Status.ALIVE, logical_id, request.reason, by=who.name)
    return turned_answer(logical_id, turned, utc_now())


@v1.delete("/agents/{logical_id:path}", responses={**PROBLEMS, **NOT_FOUND, **REFUSED}, tags=["operations"])
async def deregister_agent(replica: Replica, who: Who, logical_id: str, reason: Reason = None) -> TurnedAnswer:
    """Declare every instance of an agent dead, for good. One that still runs registers again, as a new instance."""
    turned = await replica.ladder.operate(Status.DEAD, logical_id, reason, by=who.name)
    return turned_answer(logical_id, turned, utc_now())


@v1.delete("/instances/{instance_id}", responses={**PROBLEMS, **NOT_FOUND, **REFUSED}, tags=["operations"])
async def deregister_instance(replica: Replica, who: Who, instance_id: str, reason: Reason = None) -> InstanceAnswer:
    """Declare one instance dead, for good."""
    await replica.ladder.deregister_instance(instance_id, reason, who.name)
    answer = await replica.ladder.instance(instance_id)
    return InstanceAnswer(instance=instance_out(answer.value), **stamp_of(answer))


@v1.post("/resolve", responses={**PROBLEMS, **BODY}, response_model=ResolveAnswer, tags=["agents"])
async def resolve_over_http(replica: Replica, request: ResolveRequest) -> Response:
    """The best instance of each agent, or why there is none. 422 where that would have more than 8 MiB of JSON."""
    try:
        answer = await replica.ladder.resolve(request.logical_ids, allow_late=request.allow_late)
    except CannotKnowError:
        names = await replica.ladder.names_among(request.logical_ids)
        return _json(resolve_by_name(request.logical_ids, names).model_dump_json().encode())
    return _json(resolve_json(answer))


@v1.get("/epoch", responses=PROBLEMS, tags=["fleet"])
async def get_epoch(replica: Replica) -> EpochAnswer:
    """The current epoch."""
    answer = await replica.ladder.epoch()
    return EpochAnswer(epoch=answer.value.name, number=answer.value.number, **stamp_of(answer))


health = APIRouter(tags=["health"])


@health.get("/healthz", responses={429: PROBLEMS[429]})
async def healthz(replica: Replica, who: Who) -> HealthAnswer:
    """This replica is up. Always 200; tells who may read how the registry is."""
    if who.right < Right.READ:
        return HealthAnswer(status="ok", version=__version__, mode=replica.settings.mode.value)
    report = await replica.ladder.registry_health()
    return HealthAnswer(
        status="ok",
        version=__version__,
        mode=replica.settings.mode.value,
        registry=None if isinstance(report, str) else asdict(report),
        registry_problem=report if isinstance(report, str) else None,
    )


@health.get("/readyz", responses={429: PROBLEMS[429], 503: {"model": ReadyAnswer, "description": "No rung answers"}})
async def readyz(replica: Replica, who: Who) -> JSONResponse:
    """200 while the registry, the database or Ray's listing can answer; tells who may read which, and why not."""
    rungs = await replica.ladder.rungs()
    body = ReadyAnswer(ready=rungs.is_ready, rungs=rungs_out(rungs) if who.right >= Right.READ else None)
    return JSONResponse(body.model_dump(), status_code=200 if rungs.is_ready else 503)


def _json(body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, media_type="application/json", headers=headers)


def _positions_of(headers: Sequence[str]) -> list[Position]:
    """What the ETags of ours name."""
    positions: list[Position] = []
    for etag in islice((etag for header in headers for etag in header.split(",")), _MAX_ETAGS):
        with suppress(InvalidInputError):
            positions.append(Position.parsed(etag.strip().removeprefix("W/").strip('"')))
    return positions


def _document(api: FastAPI) -> Callable[[], dict[str, Any]]:
    """The OpenAPI document; it names the media types that are really sent."""
    plain = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            api.openapi_schema = problem_media_type(plain())
        return api.openapi_schema

    return openapi


# it brings Swagger UI's files; /docs is a page of ours, for its own has a script in its HTML
api: FastAPI = FastAPIOffline(
    docs_url=None,
    redoc_url=None,
    title="SeedCore Registry",
    version=__version__,
    description="Who is alive, by logical id. Every answer says its source, its time and whether it is complete.",
)
api.openapi = _document(api)  # type: ignore[method-assign]
install(api)
# the last one added is the first one asked
api.add_middleware(Guard)
api.include_router(v1)
api.include_router(health)
api.include_router(page.router)
