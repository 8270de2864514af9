"""The routes for routers and for Prometheus: where agents are reached, by the name of an endpoint."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from seedcore.core.answers import Origin
from seedcore.core.errors import CannotKnowError
from seedcore.core.feed import Position
from seedcore.discovery.endpoints import EndpointsAnswer, endpoint_json
from seedcore.discovery.etags import IfNoneMatch, Since, etag_headers, positions_of
from seedcore.discovery.pages import filled, json_answer
from seedcore.discovery.parameters import Replica, WantedEndpoints
from seedcore.discovery.problems import PROBLEMS
from seedcore.discovery.prometheus import TargetGroup, target_json

router = APIRouter(tags=["endpoints"])


@router.get(
    "/endpoints",
    responses={**PROBLEMS, 304: {"description": "No wanted instance has changed"}},
    response_model=EndpointsAnswer,
)
async def list_endpoints(
    replica: Replica,
    request: Request,
    wanted: WantedEndpoints,
    since: Since = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The URL of each routable agent that has this endpoint: all of them, in the order of logical id.

    An agent that missed one beat stays in the list until its lease ends. One that is suspect, draining, not ready or
    dead leaves it at once. If `complete` is false, keep what you have. 422 if the list would have more than 8 MiB.
    """
    reader = replica.reader
    view = reader.view()
    query = None
    if view is not None:
        position = Position(str(view.stream), view.version)
        known = positions_of(since, if_none_match)
        if any(reader.is_unchanged(one.stream, one.version, wanted) for one in known):
            return Response(status_code=304, headers=etag_headers(position))
        # the same query about the same version has the same answer
        query = ("endpoints", request.url.query, view.stream, view.version, view.as_of)
        body = replica.answers.get(query)
        if body is not None:
            return json_answer(body, etag_headers(position))
    found = await replica.endpoints.find(wanted, endpoint_json)
    answer = EndpointsAnswer(
        items=[],
        stream=found.stream,
        source=found.source.value,
        as_of=found.as_of,
        version=found.version,
        complete=found.complete,
    )
    body = filled(answer, "items", found.parts)
    if found.source is not Origin.SNAPSHOT or not found.complete:
        return json_answer(body)
    position = Position(str(found.stream), found.version)
    if query is not None and query[2:4] == (found.stream, found.version):
        replica.answers.put(query, body)
    return json_answer(body, etag_headers(position))


@router.get("/sd/prometheus", responses=PROBLEMS, response_model=list[TargetGroup])
async def discover_targets(replica: Replica, wanted: WantedEndpoints) -> Response:
    """The same agents as targets of Prometheus, for `http_sd_configs`: all of them, one group for each agent.

    503 if an agent may be missing, so that Prometheus keeps its targets: an empty list means that there is none.
    """
    found = await replica.endpoints.find(wanted, target_json)
    if not found.complete:
        raise CannotKnowError("*", "the registry is recovering or superseded, or its epoch is not confirmed")
    return json_answer(b"[" + b",".join(found.parts) + b"]")
