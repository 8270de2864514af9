"""Server-sent events (https://html.spec.whatwg.org/, section 9.2): sends every change to the watchers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from seedcore.core.answers import InstanceFilter
from seedcore.core.errors import CannotKnowError
from seedcore.core.events import kind_of
from seedcore.core.feed import START, Feed, FeedChange, Position
from seedcore.core.instances import Instance, Verdict
from seedcore.core.limits import MAX_PAGE
from seedcore.core.paging import decode_cursor
from seedcore.core.timeouts import within
from seedcore.discovery.reader import DiscoveryReader
from seedcore.discovery.rendering import cause_out, instance_out

MAX_FEED_BYTES = 512 * 1024
"""Of one answer: Serve's proxy keeps what a watcher does not read, so a longer feed is asked for again."""

_GAP = "the earlier changes are no longer available: list again"
_STATE_S = 2.0
_LINGER_S = 0.05


def require_feed(reader: DiscoveryReader) -> Feed:
    """Return the feed of this replica. Raises CannotKnowError if there is none."""
    feed = reader.feed
    if feed is None:
        raise CannotKnowError("*", "this deployment follows no registry (SEEDCORE_FOLLOW, SEEDCORE_MODE)")
    return feed


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a watch begins: after a position (None: now). `with_state`: a reset has all instances, if they are few.
    `is_start`: it begins with a reset."""

    position: Position | None = None
    with_state: bool = False
    is_start: bool = False

    @classmethod
    def parsed(cls, since: str | None, resumes_at: str | None, *, with_state: bool) -> Beginning:
        """From a request: `since`, and the id of the last event that the watcher received, which overrides it. Raises
        InvalidInputError."""
        if resumes_at is not None:
            return cls(Position.parsed(resumes_at, "Last-Event-ID"), with_state or since == START)
        if since == START:
            return cls(None, with_state=True, is_start=True)
        return cls(None if since is None else Position.parsed(since, "since"), with_state)


async def happenings(
    reader: DiscoveryReader, feed: Feed, begin: Beginning, wanted: InstanceFilter
) -> AsyncIterator[tuple[str, dict[str, object], Position]]:
    """Yield the name, data and position of each event. Never ends by itself."""
    at = begin.position if begin.position is not None else Position(feed.stream, feed.version)
    is_due = begin.is_start
    changed = asyncio.Event()
    number = feed.follow(wanted, changed.set)
    try:
        while True:
            batch = feed.since(at.stream, at.version, wanted)
            is_due = is_due or batch.is_reset
            if is_due and (reader.is_current or not begin.with_state):
                at, is_due = Position(batch.stream, batch.version), False
                why = _GAP if batch.is_reset else "the watch begins"
                rows = {"instances": _state_out(reader, wanted)} if begin.with_state else {}
                yield "reset", {"why": why, **rows}, at
            elif not is_due:
                at = Position(batch.stream, batch.version)
                for change in batch.changes:
                    yield "change", _change_out(change), Position(batch.stream, change.version)
            # its position also lets a client resume after a period without changes
            yield "state", {"current": reader.is_current, "as_of": _as_of(reader)}, at
            await _until_changed(changed)
            feed.unfollow(number)
            changed.clear()
            number = feed.follow(wanted, changed.set)
    finally:
        feed.unfollow(number)


async def events(
    reader: DiscoveryReader,
    feed: Feed,
    begin: Beginning,
    wanted: InstanceFilter,
    may_still: Callable[[], bool],
) -> AsyncIterator[str]:
    """Yield the same events as text/event-stream. Ends when the watcher loses the right to read, which is checked with
    each `state` event, and after MAX_FEED_BYTES: the watcher resumes from the id of the last event."""
    sent = 0
    async for name, data, at in happenings(reader, feed, begin, wanted):
        if name == "state" and not may_still():
            return
        event = f"event: {name}\nid: {at}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
        yield event
        sent += len(event)
        if sent >= MAX_FEED_BYTES:
            return


async def _until_changed(changed: asyncio.Event) -> None:
    """Wait for a change, or until the next `state` event is due."""
    try:
        await within(changed.wait(), _STATE_S)
    except TimeoutError:
        return
    # send changes of a short period together
    await asyncio.sleep(_LINGER_S)


def _change_out(change: FeedChange) -> dict[str, object]:
    shown, cause = None, cause_out(change.cause if change.instance is None else change.instance.cause)
    if change.instance is not None:
        shown = _shown(change.instance, change.verdict)
    return {
        "kind": kind_of(change).value,
        "version": change.version,
        "instance_id": change.instance_id,
        "logical_id": change.logical_id,
        "instance": shown,
        "cause": None if cause is None else cause.model_dump(mode="json"),
    }


def _state_out(reader: DiscoveryReader, wanted: InstanceFilter) -> list[object] | None:
    """All instances, or None if they are more than a page or would be longer than a feed may be."""
    view = reader.view()
    if view is None:
        return None
    rows, has_more = view.page(wanted, decode_cursor(None), MAX_PAGE)
    shown: list[object] = []
    length = 0
    for row in rows if not has_more else ():
        shown.append(_shown(row, view.verdict(row.instance_id)))
        length += len(json.dumps(shown[-1], separators=(",", ":")))
        if length > MAX_FEED_BYTES:
            return None
    return None if has_more else shown


def _shown(instance: Instance, verdict: Verdict) -> dict[str, object]:
    row = instance_out(instance)
    row.verdict = verdict.value
    row.last_heartbeat = None
    return row.model_dump(mode="json")


def _as_of(reader: DiscoveryReader) -> str | None:
    view = reader.last_view()
    return None if view is None or view.as_of is None else view.as_of.isoformat()
