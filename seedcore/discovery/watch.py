"""Server-sent events (https://html.spec.whatwg.org/, section 9.2): sends every change to the watchers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

from seedcore.core.answers import InstanceFilter
from seedcore.core.errors import CannotKnowError
from seedcore.core.feed import Feed, FeedChange, Position
from seedcore.core.timeouts import within
from seedcore.discovery.reader import DiscoveryReader
from seedcore.discovery.rendering import cause_out, instance_out

MAX_FEED_BYTES = 512 * 1024
"""Of one answer: Serve's proxy keeps what a watcher does not read, so a longer feed is asked for again."""

_STATE_S = 2.0
_LINGER_S = 0.05


def require_feed(reader: DiscoveryReader) -> Feed:
    """Return the feed of this replica. Raises CannotKnowError if there is none."""
    feed = reader.feed
    if feed is None:
        raise CannotKnowError("*", "this deployment follows no registry (SEEDCORE_FOLLOW, SEEDCORE_MODE)")
    return feed


async def happenings(
    reader: DiscoveryReader, feed: Feed, position: Position | None, wanted: InstanceFilter
) -> AsyncIterator[tuple[str, dict[str, object], Position]]:
    """Yield the name, data and position of each event after a position (None: from now on). Never ends by itself."""
    at = position if position is not None else Position(feed.stream, feed.version)
    changed = asyncio.Event()
    number = feed.follow(wanted, changed.set)
    try:
        while True:
            batch = feed.since(at.stream, at.version, wanted)
            at = Position(batch.stream, batch.version)
            if batch.is_reset:
                yield "reset", {"why": "the earlier changes are no longer available: list again"}, at
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
    position: Position | None,
    wanted: InstanceFilter,
    may_still: Callable[[], bool],
) -> AsyncIterator[str]:
    """Yield the same events as text/event-stream. Ends when the watcher loses the right to read, which is checked with
    each `state` event, and after MAX_FEED_BYTES: the watcher resumes from the id of the last event."""
    sent = 0
    async for name, data, at in happenings(reader, feed, position, wanted):
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
        row = instance_out(change.instance)
        row.verdict = change.verdict.value
        row.last_heartbeat = None
        shown = row.model_dump(mode="json")
    return {
        "version": change.version,
        "instance_id": change.instance_id,
        "logical_id": change.logical_id,
        "instance": shown,
        "cause": None if cause is None else cause.model_dump(mode="json"),
    }


def _as_of(reader: DiscoveryReader) -> str | None:
    view = reader.last_view()
    return None if view is None or view.as_of is None else view.as_of.isoformat()
