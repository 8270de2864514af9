"""Records the calls of clients as they happen, each process in a file of its own, and gathers them into a history.

A call is written down before it is made: a process that is killed leaves it as one whose outcome is not known.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from seedcore.core.answers import Answer, InstanceFilter, Listing, Receipt, Resolution
from seedcore.core.changes import RegisterChange, SequencedChange, StatusChange
from seedcore.core.errors import FencedError, RegistryError, RegistryUnavailableError
from seedcore.core.feed import FeedBatch
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE
from seedcore.registry.caller.live_sources import SnapshotSource
from seedcore.registry.caller.locator import Located
from seedcore.registry.protocol.connection import RegistryConnection
from tests.faults.history import Call, Outcome, Seen, Source, plain

P = ParamSpec("P")
R = TypeVar("R")

EVERY = InstanceFilter(statuses=None, fresh_only=False)
_IN_DOUBT = (RegistryUnavailableError, FencedError)
_serial = itertools.count(1)


class Journal:
    """The file of one process, or of one client in it. Use it from any thread."""

    def __init__(self, folder: Path, process: str) -> None:
        """`process` names the caller in the history."""
        self._process = f"{process}#{os.getpid()}"
        name = f"{process}-{os.getpid()}-{next(_serial)}.jsonl"
        self._file = os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        self._calls = itertools.count(1)

    def close(self) -> None:
        os.close(self._file)

    @asynccontextmanager
    async def call(self, name: str, **details: Any) -> AsyncIterator[list[Call]]:
        """Record the call that the block makes. The block replaces the call in the list by one with the answer."""
        known = Call(self._process, name, time.monotonic(), None, Outcome.UNKNOWN, **details)
        number = next(self._calls)
        self._write({"n": number, "call": plain(known)})
        answered = [known]
        try:
            yield answered
        except BaseException as error:
            is_refused = isinstance(error, RegistryError) and not isinstance(error, _IN_DOUBT)
            outcome = Outcome.REFUSED if is_refused else Outcome.UNKNOWN
            self._end(number, replace(answered[0], outcome=outcome, error=type(error).__name__))
            raise
        self._end(number, replace(answered[0], outcome=Outcome.ANSWERED))

    def _end(self, number: int, call: Call) -> None:
        self._write({"n": number, "call": plain(replace(call, ended_s=time.monotonic()))})

    def _write(self, line: dict[str, Any]) -> None:
        os.write(self._file, f"{json.dumps(line, separators=(',', ':'))}\n".encode())


@dataclass(frozen=True, slots=True)
class Mark:
    """How much of each file there was at a moment."""

    at_s: float
    sizes: dict[str, int]


def mark(folder: Path) -> Mark:
    """Where the calls from now on begin."""
    return Mark(time.monotonic(), {file.name: file.stat().st_size for file in folder.glob("*.jsonl")})


def calls_since(folder: Path, since: Mark) -> tuple[Call, ...]:
    """The calls that began after a mark, as they are known now."""
    found: list[Call] = []
    for file in sorted(folder.glob("*.jsonl")):
        with file.open("rb") as opened:
            opened.seek(since.sizes.get(file.name, 0))
            lines = [json.loads(line) for line in opened if line.endswith(b"\n")]
        latest: dict[int, Call] = {}
        for line in lines:
            call = Call.from_json(line["call"])
            # the end of a call that began before
            if call.began_s >= since.at_s:
                latest[line["n"]] = call
        found += latest.values()
    return tuple(sorted(found, key=lambda call: call.began_s))


# Shapes of answers


def seen_of(instances: Iterable[Instance]) -> tuple[Seen, ...]:
    """Instances as a read shows them."""
    return tuple(Seen(row.instance_id, row.logical_id, row.status, row.seq) for row in instances)


def with_listing(call: Call, listing: Listing, *, lists_all: bool) -> Call:
    """A read that was answered with a list. `lists_all`: the question was for every live instance, and this is one page
    of all."""
    return replace(
        call,
        source=Source(listing.source),
        version=listing.version,
        stream=listing.stream,
        as_of=listing.as_of.isoformat(),
        complete=listing.complete,
        lists_all=lists_all and listing.next_cursor is None,
        seen=seen_of(listing.items),
    )


def with_resolutions(call: Call, answer: Answer[list[Resolution]]) -> Call:
    """A read that was answered with resolutions."""
    return replace(
        call,
        source=Source(answer.source),
        version=answer.version,
        as_of=answer.as_of.isoformat(),
        complete=answer.complete,
        seen=seen_of(found.instance for found in answer.value if found.instance is not None),
    )


def with_batch(call: Call, batch: FeedBatch) -> Call:
    """A question to the feed: what it shows is the last change of each instance that lives."""
    latest = {change.instance_id: change.instance for change in batch.changes}
    return replace(
        call,
        # a read of the registry in all but its promise: it answers from any version on
        version=batch.version,
        stream=batch.stream,
        complete=batch.complete,
        seen=seen_of(instance for instance in latest.values() if instance is not None),
    )


def with_located(call: Call, located: Located) -> Call:
    """A read that was answered with a proven handle."""
    return replace(
        call,
        source=Source(located.source),
        as_of=located.as_of.isoformat(),
        seen=() if located.instance is None else seen_of([located.instance]),
    )


def with_http_page(call: Call, answer: dict[str, Any]) -> Call:
    """A read that was answered by HTTP, without the numbers of the changes."""
    items = [item for item in answer["items"] if item["instance_id"] is not None and item["status"] is not None]
    return replace(
        call,
        source=Source(answer["source"]),
        version=answer["version"],
        stream=answer["stream"],
        as_of=answer["as_of"],
        complete=answer["complete"],
        seen=tuple(Seen(item["instance_id"], item["logical_id"], Status(item["status"]), None) for item in items),
    )


async def take(
    journal: Journal, change: SequencedChange, send: Callable[[SequencedChange], Awaitable[Receipt]]
) -> Receipt:
    """Record a change that an agent sends."""
    inner = change.change
    details: dict[str, Any]
    if isinstance(inner, RegisterChange):
        registration = inner.registration
        details = {"logical_id": registration.logical_id, "status": Status.ALIVE if inner.is_alive else Status.STARTING}
        name = "register"
    else:
        assert isinstance(inner, StatusChange)
        details = {"status": inner.status}
        name = "set_status"
    async with journal.call(name, instance_id=inner.instance_id, seq=inner.seq, **details) as called:
        receipt = await send(change)
        called[0] = replace(called[0], durable=receipt.durable, registry=receipt.registry)
    return receipt


def recorded(
    method: Callable[Concatenate[RegistryConnection, P], Coroutine[Any, Any, R]],
    note: Callable[[Call, R], Call] | None = None,
) -> Callable[Concatenate[RegistryConnection, P], Coroutine[Any, Any, R]]:
    """A method of a connection that records its calls."""

    @functools.wraps(method)
    async def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        async with self.journal.call(method.__name__) as called:
            answer = await method(self, *args, **kwargs)
            if note is not None:
                called[0] = note(called[0], answer)
        return answer

    return call


class RecordedConnection(RegistryConnection):
    """A connection that records every call that changes or reads instances."""

    def __init__(self, journal: Journal, namespace: str, call_timeout_s: float, *, by_relay: bool = False) -> None:
        super().__init__(namespace, call_timeout_s, by_relay=by_relay)
        self.journal = journal

    async def take(self, change: SequencedChange) -> Receipt:
        """See RegistryApi.take."""
        return await take(self.journal, change, super().take)

    async def page(
        self, wanted: InstanceFilter, limit: int = 100, cursor: str | None = None, packed: bool = False
    ) -> Listing:
        """See RegistryApi.page. What it returns is not packed."""
        return await page(self.journal, super().page, wanted, limit, cursor)

    beat_many = recorded(RegistryConnection.beat_many)
    resolve = recorded(RegistryConnection.resolve, with_resolutions)
    changes = recorded(RegistryConnection.changes, with_batch)
    get_instance = recorded(RegistryConnection.get_instance)
    report_dead_call = recorded(RegistryConnection.report_dead_call)
    drain = recorded(RegistryConnection.drain)
    undrain = recorded(RegistryConnection.undrain)
    deregister = recorded(RegistryConnection.deregister)


async def page(
    journal: Journal,
    ask: Callable[[InstanceFilter, int, str | None], Awaitable[Listing]],
    wanted: InstanceFilter,
    limit: int,
    cursor: str | None,
) -> Listing:
    """Record a question for a page."""
    async with journal.call("page") as called:
        listing = await ask(wanted, limit, cursor)
        called[0] = with_listing(called[0], listing, lists_all=wanted == EVERY and cursor is None)
    return listing


async def read_cache(journal: Journal, source: SnapshotSource) -> None:
    """Record a look into the followed cache. Raises NoAnswerError where it is not current."""
    async with journal.call("cache") as called:
        listing = await source.page(EVERY, MAX_PAGE, None)
        assert isinstance(listing, Listing)
        called[0] = with_listing(called[0], listing, lists_all=True)


async def look(journal: Journal, rows: Callable[[], tuple[Seen, ...]]) -> None:
    """Record a look of the test's own into the tables, which shows every row that it shall."""
    async with journal.call("look") as called:
        seen = await asyncio.to_thread(rows)
        called[0] = replace(called[0], source=Source.DATABASE, complete=True, lists_all=True, seen=seen)
