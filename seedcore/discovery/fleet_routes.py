"""The routes about the fleet: listings, the feed of changes, deaths, the epoch."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Scope

from seedcore.core.errors import FollowersFullError
from seedcore.core.feed import Position
from seedcore.core.limits import MAX_KEPT_S, MAX_PAGE
from seedcore.core.paging import encode_death_cursor
from seedcore.core.view import LiveView
from seedcore.discovery.api import EpochAnswer, InstanceAnswer, InstancePage, OverviewAnswer
from seedcore.discovery.app import Discovery
from seedcore.discovery.etags import IfNoneMatch, Since, etag_headers, positions_of
from seedcore.discovery.guard import STILL
from seedcore.discovery.pages import Question, json_answer, page_json
from seedcore.discovery.parameters import Replica, Wanted, WantedChanges
from seedcore.discovery.problems import NOT_FOUND, PROBLEMS
from seedcore.discovery.rendering import instance_out, stamp_of
from seedcore.discovery.watch import Beginning, events, require_feed

router = APIRouter(tags=["fleet"])


@router.get("/overview", responses=PROBLEMS)
async def get_overview(replica: Replica) -> OverviewAnswer:
    """A summary of the fleet, of the registry and of the database."""
    return await replica.overviews.now()


@router.get(
    "/instances",
    responses={**PROBLEMS, 304: {"description": "No wanted instance has changed"}},
    response_model=InstancePage,
)
async def list_instances(
    replica: Replica,
    request: Request,
    wanted: Wanted,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    cursor: Annotated[str | None, Query(description="next_cursor of the previous page")] = None,
    consistent: Annotated[bool, Query(description="ask the registry itself, not a cache up to 4 s old")] = False,
    since: Since = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """A page of instances in the order of logical id.

    It has fewer than `limit` if they would have more than 1 MiB of JSON: then `next_cursor` continues.
    """
    known = positions_of(since, if_none_match)
    reader = replica.reader
    view = None if consistent else reader.view()
    if view is None or not view.knows(wanted):
        return json_answer(page_json(await reader.list_instances(wanted, limit, cursor, consistent=consistent)))
    headers = etag_headers(_position(view))
    if any(reader.is_unchanged(position.stream, position.version, wanted) for position in known):
        return Response(status_code=304, headers=headers)
    query = _question(request.scope, view)
    body = replica.answers.get(query)
    if body is None:
        body = page_json(await reader.list_instances(wanted, limit, cursor), rendered=reader.rendered)
        replica.answers.put(query, body)
    return json_answer(body, headers)


def kept_page(replica: Discovery, scope: Scope) -> Response | None:
    """The page that the route has made for the same query about the same version of the local copy, or None. With the
    ETag of an earlier answer the route decides whether that has changed."""
    view = replica.reader.view()
    body = None if view is None else replica.answers.get(_question(scope, view))
    if view is None or body is None or any(name == b"if-none-match" for name, _ in scope["headers"]):
        return None
    return json_answer(body, etag_headers(_position(view)))


def _question(scope: Scope, view: LiveView) -> Question:
    """The same query about the same version has the same answer."""
    return "instances", scope["query_string"], view.stream, view.version, view.as_of


def _position(view: LiveView) -> Position:
    return Position(str(view.stream), view.version)


@router.get("/instances/{instance_id}", responses={**PROBLEMS, **NOT_FOUND})
async def get_instance(replica: Replica, instance_id: str) -> InstanceAnswer:
    """One instance, dead or alive."""
    answer = await replica.reader.instance(instance_id)
    return InstanceAnswer(instance=instance_out(answer.value), **stamp_of(answer))


@router.get(
    "/watch",
    responses={**PROBLEMS, 200: {"content": {"text/event-stream": {}}, "description": "events, without an end"}},
    response_class=StreamingResponse,
)
async def watch(
    replica: Replica,
    request: Request,
    wanted: WantedChanges,
    since: Annotated[
        str | None,
        Query(
            description="STREAM:VERSION of an answer; `start`: begin with a reset that has the instances; "
            "default: from now on"
        ),
    ] = None,
    state: Annotated[bool, Query(description="a `reset` has the instances; always so with `since=start`")] = False,
    last_event_id: Annotated[str | None, Header(description="where to resume; overrides `since`")] = None,
) -> StreamingResponse:
    """The changes as server-sent events: of live instances in every status, unless `status` names some.

    `change` has a `kind` (joined, changed, not_ready, died, left) and the instance, or null if it has died (with its
    `cause`) or does not match any more. `reset`: earlier changes are not available; its `instances` are all that match,
    or null if they are more than 1,000 or 512 KiB: list again. `state`, every two seconds: whether the registry
    confirms what this deployment knows. The id of each event can be sent as Last-Event-ID.
    """
    if replica.rates.open_feeds > replica.max_watchers:
        raise FollowersFullError(replica.max_watchers)
    feed = require_feed(replica.reader)
    begin = Beginning.parsed(since, last_event_id, with_state=state)
    return StreamingResponse(
        events(replica.reader, feed, begin, wanted, request.scope["state"][STILL]),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


@router.get("/deaths", responses=PROBLEMS, response_model=InstancePage)
async def get_deaths(
    replica: Replica,
    within_s: Annotated[
        float | None, Query(gt=0, le=MAX_KEPT_S, description="only deaths of the last so many seconds")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    cursor: Annotated[str | None, Query(description="next_cursor of the previous page")] = None,
) -> Response:
    """Dead instances and their causes, of every recorded agent and epoch, the latest death first.

    It has fewer than `limit` if they would have more than 1 MiB of JSON: then `next_cursor` continues.
    """
    return json_answer(page_json(await replica.reader.deaths(limit, cursor, within_s), encode_death_cursor))


@router.get("/epoch", responses=PROBLEMS)
async def get_epoch(replica: Replica) -> EpochAnswer:
    """The current epoch."""
    answer = await replica.reader.epoch()
    return EpochAnswer(epoch=answer.value.name, number=answer.value.number, **stamp_of(answer))
