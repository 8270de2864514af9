"""`seedcore watch`: prints the events of a backend, and reconnects when the stream ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from seedcore.cli.backend import Backend, Event, ListQuery
from seedcore.cli.output import counted, echo, out
from seedcore.cli.render import show_event
from seedcore.core.backoff import Backoff
from seedcore.core.errors import RegistryError

_FIRST_RETRY_S = 1.0
_LONGEST_RETRY_S = 10.0


async def watch(backend: Backend, query: ListQuery, *, as_json: bool, backoff: Backoff | None = None) -> None:
    """Print each change of the selected instances, until cancelled. `backoff` delays reconnections."""
    backoff = backoff if backoff is not None else Backoff(_FIRST_RETRY_S, _LONGEST_RETRY_S)
    page = await backend.listing(query)
    changes = Changes(backend, query, {item.instance_id: item.status for item in page.items})
    begin = None if page.stream is None else f"{page.stream}:{page.version}"
    async for name, data, _ in _reconnecting(backend, query, begin, backoff):
        if as_json:
            echo(json.dumps({"event": name, **data}))
        elif name == "state":
            changes.show_state(is_current=bool(data["current"]))
        elif name == "reset":
            await changes.show_reset(data["why"])
        else:
            changes.show(data)


class Changes:
    """Prints events as changes of the statuses printed before."""

    def __init__(self, backend: Backend, query: ListQuery, statuses: Mapping[str | None, str | None]) -> None:
        """`statuses` maps instance ids to their current statuses."""
        self._backend = backend
        self._query = query
        self._statuses = dict(statuses)
        self._is_current = True

    def show(self, data: Mapping[str, Any]) -> None:
        """Print the change of an instance."""
        instance_id, instance = data["instance_id"], data["instance"]
        show_event(out, data, self._statuses.get(instance_id))
        if instance is None:
            self._statuses.pop(instance_id, None)
        else:
            self._statuses[instance_id] = instance["status"]

    def show_state(self, *, is_current: bool) -> None:
        """Print that the registry stopped or resumed answering."""
        if is_current is not self._is_current:
            self._is_current = is_current
            out.print("the registry answers again" if is_current else "the registry does not answer", style="dim")

    async def show_reset(self, why: str) -> None:
        """Print the differences between a new listing and the statuses printed before: events were lost."""
        out.print(f"-- {why}", style="dim")
        items = {item.instance_id: item for item in (await self._backend.listing(self._query)).items}
        gone = self._statuses.keys() - items.keys()
        for instance_id, item in items.items():
            if self._statuses.get(instance_id) != item.status:
                instance = item.model_dump(mode="json")
                names = {"instance_id": instance_id, "logical_id": item.logical_id, "cause": instance["cause"]}
                show_event(out, {**names, "instance": instance}, self._statuses.get(instance_id))
        if gone:
            out.print(f"-- {counted(len(gone), 'agent')} left the list meanwhile: seedcore deaths", style="dim")
        self._statuses = {instance_id: item.status for instance_id, item in items.items()}


async def _reconnecting(
    backend: Backend, query: ListQuery, after: str | None, backoff: Backoff
) -> AsyncIterator[Event]:
    """Yield the events after a position, also after the stream has ended. Raises only if the first attempt fails."""
    has_begun = False
    while True:
        is_silent = True
        try:
            async with aclosing(backend.watch(query, after)) as events:  # type: ignore[type-var]
                async for event in events:
                    has_begun, is_silent, after = True, False, event.at
                    backoff.reset()
                    yield event
        except RegistryError as error:
            if not has_begun:
                raise
            echo(f"seedcore: {error}; retrying", err=True)
            is_silent = True
        # a stream with events that ended without an error has reached its time limit
        await asyncio.sleep(backoff.next_s() if is_silent else 0.0)
