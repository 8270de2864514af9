"""What the commands ask: a backend, which is a deployment over HTTP or the registry of a Ray cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from seedcore.core.answers import InstanceFilter
from seedcore.core.errors import CannotKnowError
from seedcore.core.instances import Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.selector import parse_labels, parse_selector
from seedcore.discovery.api import AgentAnswer, InstancePage, OperationAnswer, OverviewAnswer, ResolveAnswer
from seedcore.settings import Settings

_LIVING = tuple(status for status in Status if status is not Status.DEAD)


@dataclass(frozen=True, slots=True)
class ListQuery:
    """A selection of instances. Empty `statuses` select every status but dead."""

    statuses: tuple[Status, ...] = (Status.ALIVE,)
    verdicts: tuple[Verdict, ...] = ()
    organ: str | None = None
    node: str | None = None
    selector: str = ""
    labels: tuple[str, ...] = ()
    epoch: str | None = None
    with_lapsed: bool = False

    def filter(self) -> InstanceFilter:
        """Return the query as a filter of the registry. Raises InvalidInputError."""
        return InstanceFilter(
            statuses=frozenset(self.statuses) if self.statuses else None,
            verdicts=frozenset(self.verdicts) if self.verdicts else None,
            organ_id=self.organ,
            node_id=self.node,
            selector=parse_selector(self.selector),
            labels=parse_labels(self.labels),
            epoch=self.epoch,
            fresh_only=not self.with_lapsed,
        ).validated()

    def parameters(self) -> dict[str, Any]:
        """Return the query as parameters of the HTTP API. Raises InvalidInputError."""
        self.filter()
        single = {"organ": self.organ, "node": self.node, "selector": self.selector or None, "epoch": self.epoch}
        return {
            "status": [status.value for status in self.statuses or _LIVING],
            "verdict": [verdict.value for verdict in self.verdicts],
            "label": list(self.labels),
            **{name: value for name, value in single.items() if value is not None},
        }


class Event(NamedTuple):
    """An event of /v1/watch: its name, its data, and the position after it."""

    name: str
    data: dict[str, Any]
    at: str


class Backend(Protocol):
    """Answers the commands. Each method raises a RegistryError if it cannot."""

    @property
    def place(self) -> str:
        """The cluster or deployment, as shown to the user."""
        ...

    async def listing(self, query: ListQuery) -> InstancePage:
        """Return all pages of a listing as one."""
        ...

    async def deaths(self, limit: int, within_s: float | None) -> InstancePage:
        """Return dead instances, the most recent death first."""
        ...

    async def agent(self, logical_id: str) -> AgentAnswer:
        """Return one agent. Raises NeverRegisteredError if no agent has ever registered under this id."""
        ...

    async def resolve(self, logical_ids: Sequence[str]) -> ResolveAnswer:
        """Return the best instance of each agent, or why there is none."""
        ...

    async def overview(self) -> OverviewAnswer:
        """Return a summary of the fleet, the registry and the database."""
        ...

    async def drain(self, logical_id: str, reason: str | None, duration_s: float | None) -> OperationAnswer:
        """Stop routing to an agent, for `duration_s` seconds or until it is undrained."""
        ...

    async def undrain(self, logical_id: str, reason: str | None) -> OperationAnswer:
        """End an operator's drain of an agent."""
        ...

    async def deregister(self, logical_id: str, reason: str | None) -> OperationAnswer:
        """Declare an agent dead."""
        ...

    def watch(self, query: ListQuery, after: str | None) -> AsyncIterator[Event]:
        """Yield the events of /v1/watch after the position of a listing or an event; None: from now on."""
        ...


def backend_of(settings: Settings) -> Backend:
    """Return the deployment that SEEDCORE_URL names, or else join the Ray cluster. Raises as join_cluster does."""
    if settings.url is not None:
        from seedcore.cli.deployment import Deployment

        return Deployment(settings.url, settings.http_token)
    # loads Ray Serve, which other commands do not need
    from seedcore.cli.in_cluster import Cluster

    return Cluster(settings)


async def every_page(ask: Callable[[str | None], Awaitable[InstancePage]]) -> InstancePage:
    """Return all pages of a listing as one, with the version of the first. `ask` returns the page after a cursor."""
    page = await ask(None)
    items, cursor = page.items, page.next_cursor
    while cursor is not None:
        following = await ask(cursor)
        if following.source != page.source:
            raise CannotKnowError("*", "the source of the list changed between two pages; try again")
        items, cursor = items + following.items, following.next_cursor
    return page.model_copy(update={"items": items, "next_cursor": None})


def shown_ids(ids: Sequence[str], limit: int = 5) -> str:
    """Return the first ids, and the number of the others."""
    more = "" if len(ids) <= limit else f" and {len(ids) - limit} more"
    return ", ".join(ids[:limit]) + more
