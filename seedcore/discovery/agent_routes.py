"""The routes about single agents: records, resolutions, and the changes of operators."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from seedcore.core.clock import utc_now
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE
from seedcore.discovery.api import (
    AgentAnswer,
    DrainRequest,
    HistoryAnswer,
    InstanceAnswer,
    OperationAnswer,
    ReasonRequest,
    ResolveAnswer,
    ResolveRequest,
)
from seedcore.discovery.app import Discovery
from seedcore.discovery.pages import json_answer, resolve_json
from seedcore.discovery.parameters import AllowLate, Reason, Replica, Who
from seedcore.discovery.problems import BODY, NOT_FOUND, PROBLEMS, REFUSED
from seedcore.discovery.rendering import agent_answer, instance_out, operation_answer, stamp_of, transitions_out

router = APIRouter()

_CHANGES = {**PROBLEMS, **NOT_FOUND, **REFUSED, **BODY}


async def agent_response(replica: Discovery, logical_id: str) -> Response:
    """The answer to a request for one agent. Raises RegistryError."""
    described = await replica.reader.require_registered(logical_id)
    return json_answer(agent_answer(described).model_dump_json().encode())


async def resolve_response(replica: Discovery, logical_id: str, *, allow_late: bool = False) -> Response:
    """The answer to a request to resolve one agent. Raises RegistryError."""
    answer = await replica.reader.require_resolved(logical_id, allow_late=allow_late)
    return json_answer(resolve_json([logical_id], answer, rendered=replica.reader.rendered))


@router.get(
    "/agents/{logical_id:path}", responses={**PROBLEMS, **NOT_FOUND}, response_model=AgentAnswer, tags=["agents"]
)
async def get_agent(replica: Replica, logical_id: str) -> Response:
    """One agent: its live instances, its newest instances, dead or alive, and their transitions."""
    return await agent_response(replica, logical_id)


@router.get("/history/{logical_id:path}", responses={**PROBLEMS, **NOT_FOUND}, tags=["agents"])
async def get_history(
    replica: Replica, logical_id: str, limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100
) -> HistoryAnswer:
    """The transitions of an agent's instances with their causes, newest first."""
    answer = await replica.reader.transitions(logical_id, limit)
    return HistoryAnswer(logical_id=logical_id, transitions=transitions_out(answer.value), **stamp_of(answer))


@router.post("/agents/{logical_id:path}/drain", responses=_CHANGES, tags=["operations"])
async def drain(replica: Replica, who: Who, logical_id: str, request: DrainRequest) -> OperationAnswer:
    """Stop routing to an agent, for a time or until it is undrained. The agent keeps running."""
    turned = await replica.reader.operate(Status.DRAINING, logical_id, request.reason, request.duration_s, who.name)
    return operation_answer(logical_id, turned, utc_now())


@router.post("/agents/{logical_id:path}/undrain", responses=_CHANGES, tags=["operations"])
async def undrain(replica: Replica, who: Who, logical_id: str, request: ReasonRequest) -> OperationAnswer:
    """Route to a draining agent again."""
    turned = await replica.reader.operate(Status.ALIVE, logical_id, request.reason, by=who.name)
    return operation_answer(logical_id, turned, utc_now())


@router.delete("/agents/{logical_id:path}", responses={**PROBLEMS, **NOT_FOUND, **REFUSED}, tags=["operations"])
async def deregister_agent(replica: Replica, who: Who, logical_id: str, reason: Reason = None) -> OperationAnswer:
    """Declare every instance of an agent dead, for good. If it still runs, it registers again as a new instance."""
    turned = await replica.reader.operate(Status.DEAD, logical_id, reason, by=who.name)
    return operation_answer(logical_id, turned, utc_now())


@router.delete("/instances/{instance_id}", responses={**PROBLEMS, **NOT_FOUND, **REFUSED}, tags=["operations"])
async def deregister_instance(replica: Replica, who: Who, instance_id: str, reason: Reason = None) -> InstanceAnswer:
    """Declare one instance dead, for good."""
    await replica.reader.deregister_instance(instance_id, reason, who.name)
    answer = await replica.reader.instance(instance_id)
    return InstanceAnswer(instance=instance_out(answer.value), **stamp_of(answer))


@router.post("/resolve", responses={**PROBLEMS, **BODY}, response_model=ResolveAnswer, tags=["agents"])
async def resolve_over_http(replica: Replica, request: ResolveRequest) -> Response:
    """The best instance of each agent, or the reason why there is none. 422 if the answer would have more than 8 MiB of
    JSON."""
    answer = await replica.reader.resolve(request.logical_ids, allow_late=request.allow_late)
    return json_answer(resolve_json(request.logical_ids, answer, rendered=replica.reader.rendered))


@router.get(
    "/resolve/{logical_id:path}", responses={**PROBLEMS, **NOT_FOUND}, response_model=ResolveAnswer, tags=["agents"]
)
async def resolve_one(replica: Replica, logical_id: str, allow_late: AllowLate = False) -> Response:
    """The best instance of one agent: the answer of POST /v1/resolve for one id. 404 with the `reason` if it has none;
    503 if no source can know that now."""
    return await resolve_response(replica, logical_id, allow_late=allow_late)
