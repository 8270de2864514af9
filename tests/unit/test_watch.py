"""`seedcore watch` prints each change once, and goes on after its stream has ended or failed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from seedcore.cli.backend import Event, ListQuery
from seedcore.cli.watch import watch
from seedcore.core.answers import Listing, Origin
from seedcore.core.backoff import Backoff
from seedcore.core.errors import RegistryUnavailableError
from seedcore.core.lifecycle import Status
from seedcore.discovery.api import InstancePage
from seedcore.discovery.rendering import page_of
from tests.builders import START, iid, instance

QUERY = ListQuery(statuses=())


def change(status: str, position: str) -> Event:
    row = {"status": status, "verdict": "fresh"}
    data = {"instance_id": iid(1), "logical_id": "agent-1", "cause": None, "instance": row}
    return Event("change", data, position)


class Streams:
    """A backend with one live agent, whose streams are given: events, then an error or the end."""

    place = "here"

    def __init__(self, *streams: tuple[Event | Exception, ...]) -> None:
        self._streams = list(streams)
        self.positions: list[str | None] = []

    async def listing(self, query: ListQuery) -> InstancePage:
        return page_of(Listing((instance(1, status=Status.ALIVE),), Origin.REGISTRY, START, 1, True))

    async def watch(self, query: ListQuery, after: str | None) -> AsyncIterator[Event]:
        self.positions.append(after)
        if not self._streams:
            raise asyncio.CancelledError
        for one in self._streams.pop(0):
            if isinstance(one, Exception):
                raise one
            yield one


async def watched(backend: Any) -> None:
    await watch(backend, QUERY, as_json=False, backoff=Backoff(0.001, 0.001))


async def test_watch_continues_at_its_last_position_after_an_error_and_after_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    away = RegistryUnavailableError("away")
    backend = Streams((change("draining", "s:2"), away), (away,), (change("alive", "s:3"),))
    with pytest.raises(asyncio.CancelledError):
        await watched(backend)
    assert backend.positions[1:] == ["s:2", "s:2", "s:3"]
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 2
    assert [line.split("agent-1 ")[1].split("  ")[0] for line in printed.out.splitlines()] == [
        "alive -> draining",
        "draining -> alive",
    ]


async def test_watch_fails_if_its_first_stream_fails() -> None:
    with pytest.raises(RegistryUnavailableError):
        await watched(Streams((RegistryUnavailableError("away"),)))


async def test_changes_during_a_lost_stream_are_printed_after_a_reset(capsys: pytest.CaptureFixture[str]) -> None:
    reset = Event("reset", {"why": "events were lost"}, "t:1")
    with pytest.raises(asyncio.CancelledError):
        await watched(Streams((change("draining", "s:2"), reset)))
    first, why, second = capsys.readouterr().out.splitlines()
    assert "alive -> draining" in first
    assert "events were lost" in why
    assert "draining -> alive" in second
