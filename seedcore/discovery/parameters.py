"""What every route may depend on: the replica, the caller, and the filters of a query."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from fastapi import Depends, Query, Request
from fastapi.dependencies.models import Dependant
from ray import serve

from seedcore.core.answers import InstanceFilter
from seedcore.core.errors import InvalidInputError
from seedcore.core.instances import Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_REASON_CHARS
from seedcore.core.selector import MAX_SELECTOR_CHARS, parse_labels, parse_selector
from seedcore.discovery.app import Discovery
from seedcore.discovery.guard import STATE
from seedcore.discovery.tokens import Caller

Organ = Annotated[str | None, Query(description="organ id")]
Node = Annotated[str | None, Query(description="Ray node id")]
Labels = Annotated[list[str] | None, Query(description="key=value; repeatable, all must match")]
LogicalId = Annotated[str | None, Query(description="instances of one agent")]
EndpointName = Annotated[str | None, Query(description="only agents that have an endpoint of this name")]
SelectorText = Annotated[
    str | None,
    Query(description="labels in Kubernetes' syntax: env in (a, b), tier!=x, !spot", max_length=MAX_SELECTOR_CHARS),
]


def replica_here() -> Discovery:
    """The deployment's object in this process."""
    replica = serve.get_replica_context().servable_object
    assert isinstance(replica, Discovery)
    return replica


async def this_replica() -> Discovery:
    """The deployment's object that this request was routed to."""
    return replica_here()


async def selected_agents(
    organ: Organ = None, node: Node = None, selector: SelectorText = None, label: Labels = None
) -> InstanceFilter:
    """The agents of a filter, whatever their state."""
    return InstanceFilter(
        organ_id=organ,
        node_id=node,
        selector=parse_selector(selector if selector is not None else ""),
        labels=parse_labels(label if label is not None else []),
    )


Selected = Annotated[InstanceFilter, Depends(selected_agents)]


async def wanted_instances(
    selected: Selected,
    status: Annotated[list[Status] | None, Query(description="repeatable; default alive")] = None,
    verdict: Annotated[list[Verdict] | None, Query(description="repeatable; default any")] = None,
    logical_id: LogicalId = None,
    endpoint: EndpointName = None,
    epoch: Annotated[str | None, Query(description="default: the current one")] = None,
) -> InstanceFilter:
    """The filter of a listing."""
    return replace(
        selected,
        statuses=frozenset(status) if status else frozenset({Status.ALIVE}),
        verdicts=frozenset(verdict) if verdict else None,
        logical_id=logical_id,
        endpoint=endpoint,
        epoch=epoch,
    ).validated()


async def wanted_changes(
    selected: Selected,
    status: Annotated[
        list[Status] | None, Query(description="repeatable; default: every status of live instances")
    ] = None,
    logical_id: LogicalId = None,
    endpoint: EndpointName = None,
) -> InstanceFilter:
    """The filter of a feed: of the current epoch, with every verdict."""
    if Status.DEAD in (status or ()):
        raise InvalidInputError("status", "the feed has live instances; a death is a change of one")
    return replace(
        selected,
        statuses=frozenset(status) if status else None,
        logical_id=logical_id,
        endpoint=endpoint,
    ).validated()


async def wanted_endpoints(
    selected: Selected, name: Annotated[str, Query(description="the name of the endpoint")]
) -> InstanceFilter:
    """The filter of a list of endpoints: of alive instances of the current epoch."""
    return replace(selected, endpoint=name).validated()


async def this_caller(request: Request) -> Caller:
    """The caller, as the guard identified it."""
    caller = request.scope["state"][STATE]
    assert isinstance(caller, Caller)
    return caller


Replica = Annotated[Discovery, Depends(this_replica)]
Who = Annotated[Caller, Depends(this_caller)]
Wanted = Annotated[InstanceFilter, Depends(wanted_instances)]
WantedChanges = Annotated[InstanceFilter, Depends(wanted_changes)]
WantedEndpoints = Annotated[InstanceFilter, Depends(wanted_endpoints)]
AllowLate = Annotated[bool, Query(description="also an instance that missed one beat, if none is fresh")]
Reason = Annotated[str | None, Query(description="recorded as the cause", min_length=1, max_length=MAX_REASON_CHARS)]


def _query_parameters(dependant: Dependant) -> set[str]:
    own = {field.alias for field in dependant.query_params}
    return own.union(*map(_query_parameters, dependant.dependencies))


async def only_known_parameters(request: Request) -> None:
    """Refuse an unknown parameter: a filter with a typing error would otherwise list every agent."""
    known = _query_parameters(request.scope["route"].dependant)
    unknown = sorted(set(request.query_params) - known)
    if unknown:
        takes = f"this takes {', '.join(sorted(known))}" if known else "this takes none"
        raise InvalidInputError(unknown[0][:80], f"is no query parameter: {takes}")
