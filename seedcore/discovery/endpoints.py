"""The endpoints of one name, for routers and for Prometheus: the best routable instance of each agent that has one.

An instance is routable here while it is alive and its lease is valid: one that missed a single beat stays, so that no
router drops it and takes it back. Of a suspect, draining or dead one no endpoint is listed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from pydantic import BaseModel, Field

from seedcore.core.answers import InstanceFilter, Listing, Origin
from seedcore.core.errors import CannotKnowError, InvalidInputError
from seedcore.core.events import READY_VERDICTS
from seedcore.core.instances import Instance, Verdict
from seedcore.core.limits import MAX_PAGE
from seedcore.core.selection import preference
from seedcore.discovery.api import Stamp
from seedcore.discovery.reader import DiscoveryReader
from seedcore.discovery.stored_json import Labels

MAX_LIST_BYTES = 8 * 1024 * 1024
LISTS_AT_ONCE = 4

_ATTEMPTS = 3

Rank = tuple[bool, tuple[int, bool, float, str]]


class EndpointOut(BaseModel):
    """The endpoint of an agent, and the instance that has it."""

    logical_id: str
    instance_id: str
    url: str
    labels: Labels
    organ_id: str | None
    node_id: str | None


class EndpointsAnswer(Stamp):
    """The endpoints of one name in the order of logical id, at most one of an agent."""

    stream: str | None = Field(None, description="with `version`, what `since` takes: STREAM:VERSION")
    items: list[EndpointOut]


@dataclass(frozen=True, slots=True)
class Found:
    """The chosen instances, each as JSON, in the order of logical id; and what the answer is worth, as of its first
    page."""

    parts: tuple[bytes, ...]
    source: Origin
    as_of: datetime
    version: int
    stream: str | None
    complete: bool


Render = Callable[[Instance, str], bytes | None]


class EndpointLists:
    """The lists of one replica: so many at once that their bytes are bounded."""

    def __init__(self, reader: DiscoveryReader) -> None:
        self._reader = reader
        self._slots = asyncio.Semaphore(LISTS_AT_ONCE)

    async def find(self, wanted: InstanceFilter, render: Render) -> Found:
        """As `find_endpoints`."""
        async with self._slots:
            return await find_endpoints(self._reader, wanted, render)


async def find_endpoints(reader: DiscoveryReader, wanted: InstanceFilter, render: Render) -> Found:
    """Every agent that has the endpoint, its best instance by `render`, which gets the URL and may leave it out.

    Raises InvalidInputError for more than MAX_LIST_BYTES, and CannotKnowError if no source answers.
    """
    assert wanted.endpoint is not None
    for _ in range(_ATTEMPTS):
        chosen = _Chosen(wanted.endpoint, render)
        first = page = await _page(reader, wanted, None)
        is_complete = page.complete
        chosen.add(page)
        while page.next_cursor is not None and (page.source, page.stream) == (first.source, first.stream):
            # other requests get their turn
            await asyncio.sleep(0)
            page = await _page(reader, wanted, page.next_cursor)
            is_complete &= page.complete
            chosen.add(page)
        if (page.source, page.stream) != (first.source, first.stream):
            # two sources may differ: what one has before a page, the other may have behind it
            continue
        if not chosen.by_agent and is_complete and first.source is not Origin.POSTGRES:
            # while an operator must confirm the epoch the registry lists no agent, however many there are
            is_complete = await reader.registry.problem() is None
        return Found(chosen.parts(), first.source, first.as_of, first.version, first.stream, is_complete)
    raise CannotKnowError("*", "the source of the list changed between two pages; ask again")


async def _page(reader: DiscoveryReader, wanted: InstanceFilter, cursor: str | None) -> Listing:
    page = await reader.list_instances(wanted, MAX_PAGE, cursor)
    if not isinstance(page, Listing):
        raise CannotKnowError("*", "Ray's listing has no endpoints")
    return page


class _Chosen:
    """The best instance of each agent so far, and the bytes of all."""

    def __init__(self, name: str, render: Render) -> None:
        self._name = name
        self._render = render
        self._bytes = 0
        self.by_agent: dict[str, tuple[Rank, bytes]] = {}

    def add(self, page: Listing) -> None:
        """Choose among the instances of a page, too."""
        for row in page:
            verdict = page.verdicts.get(row.instance_id, Verdict.FRESH)
            if verdict not in READY_VERDICTS:
                continue
            rank = (verdict is Verdict.LATE, preference(row))
            before = self.by_agent.get(row.logical_id)
            if before is not None and before[0] <= rank:
                continue
            part = self._render(row, row.endpoints[self._name])
            if part is None:
                continue
            self._bytes += len(part) - (0 if before is None else len(before[1]))
            if self._bytes > MAX_LIST_BYTES:
                why = f"the list has more than {MAX_LIST_BYTES} bytes: select fewer agents by organ, node or selector"
                raise InvalidInputError("name", why)
            self.by_agent[row.logical_id] = rank, part

    def parts(self) -> tuple[bytes, ...]:
        """What was chosen."""
        return tuple(part for _, part in self.by_agent.values())


def endpoint_json(instance: Instance, url: str) -> bytes:
    """An endpoint as /v1/endpoints lists it."""
    shown = EndpointOut(
        logical_id=instance.logical_id,
        instance_id=instance.instance_id,
        url=url,
        labels=instance.labels,
        organ_id=instance.organ_id,
        node_id=instance.node_id,
    )
    return shown.model_dump_json().encode()
