"""Bounds that protect memory count bytes, and last until the bytes have left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from seedcore.core.answers import Answer, Listing, Origin, Resolution
from seedcore.core.changes import new_instance_id
from seedcore.core.errors import InvalidInputError
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.core.paging import decode_cursor, decode_death_cursor, encode_cursor, encode_death_cursor
from seedcore.core.timeouts import end
from seedcore.discovery.access import Access
from seedcore.discovery.api import InstancePage, ResolveAnswer
from seedcore.discovery.guard import CHUNK_BYTES, Guard
from seedcore.discovery.pages import MAX_PAGE_BYTES, AnswerCache, page_json, resolve_json
from seedcore.discovery.rendering import page_of
from seedcore.discovery.traffic import Rates, UnreadBytes
from seedcore.settings import Settings
from tests.waiting import eventually

NOW = datetime(2026, 3, 1, tzinfo=UTC)
LONG = 4 * CHUNK_BYTES


def instances(count: int, metadata_bytes: int = 0) -> list[Instance]:
    return [
        Instance(
            new_instance_id(),
            f"agent-{number:04}",
            Status.ALIVE,
            Status.ALIVE,
            "epoch",
            NOW,
            NOW,
            NOW,
            metadata={"note": "é" * (metadata_bytes // 2)},
            stopped_at=NOW - timedelta(seconds=number),
        )
        for number in range(count)
    ]


def listing(rows: Sequence[Instance], next_cursor: str | None = None) -> Listing:
    return Listing(tuple(rows), Origin.REGISTRY, NOW, 7, True, next_cursor, '"items":[]')


# Pages


@pytest.mark.parametrize("cursor", [None, "behind"])
def test_a_page_that_is_short_enough_is_as_it_was(cursor: str | None) -> None:
    whole = listing(instances(50, 100), cursor)
    assert json.loads(page_json(whole)) == json.loads(page_of(whole).model_dump_json())


def test_pages_of_any_metadata_are_bounded_and_lose_nothing() -> None:
    rows = instances(400, 15_000)
    seen: list[str] = []
    rest = rows
    while rest:
        body = page_json(listing(rest))
        assert len(body) < MAX_PAGE_BYTES + 20_000
        page = InstancePage.model_validate_json(body)
        assert page.items
        seen += [item.instance_id or "" for item in page.items]
        rest = rows[len(seen) :]
        assert (page.next_cursor is None) is (not rest)
        if page.next_cursor is not None:
            assert decode_cursor(page.next_cursor) == (page.items[-1].logical_id, page.items[-1].instance_id)
    assert seen == [row.instance_id for row in rows]


def test_a_page_of_deaths_that_ends_early_continues_with_the_deaths_before() -> None:
    rows = instances(10, 1000)
    page = InstancePage.model_validate_json(page_json(listing(rows), encode_death_cursor, 3000))
    assert page.next_cursor is not None
    last = rows[len(page.items) - 1]
    assert decode_death_cursor(page.next_cursor) == (last.stopped_at, last.instance_id)


def test_one_instance_that_is_above_the_bound_is_a_page() -> None:
    rows = instances(2, 5000)
    page = InstancePage.model_validate_json(page_json(listing(rows), max_bytes=100))
    assert (len(page.items), page.next_cursor) == (1, encode_cursor(rows[0]))


def test_a_resolution_of_more_than_its_bound_is_refused() -> None:
    rows = instances(20, 1000)
    answer = Answer([Resolution(row.logical_id, row) for row in rows], Origin.REGISTRY, NOW, 1, True)
    ids = [row.logical_id for row in rows]
    shown = ResolveAnswer.model_validate_json(resolve_json(ids, answer))
    assert [one.logical_id for one in shown.results] == [row.logical_id for row in rows]
    with pytest.raises(InvalidInputError, match="more than 10000 bytes: resolve fewer"):
        resolve_json(ids, answer, 10_000)


# The cache


def test_the_cache_is_bounded_by_bytes_whatever_is_asked() -> None:
    cache = AnswerCache(1_000_000)
    for number in range(200):
        cache.put((f"selector=a{number}", "stream", 1), b"x" * 50_000)
        assert cache.bytes <= 1_000_000
    for number in range(2000):
        cache.put((f"selector={number}" + "y" * 4000, "stream", 1), b"x")
        assert cache.bytes <= 1_000_000
    cache.put(("too long",), b"x" * 2_000_000)
    assert (cache.bytes, cache.get(("too long",))) == (0, None)


def test_the_cache_keeps_what_was_asked_for_last() -> None:
    cache = AnswerCache(5000)
    for name in ("a", "b", "a", "c"):
        if cache.get((name,)) is None:
            cache.put((name,), name.encode() * 1000)
    cache.put(("b",), b"b")
    assert [cache.get((name,)) is not None for name in "abc"] == [False, True, True]
    for _ in range(3):
        cache.put(("b",), b"b")
    assert cache.bytes == 1000 + 1 + 2 * 1025


# What callers have not read


class Connection:
    """A server's end of one request: the answer has left when the caller has read it, or has gone."""

    def __init__(self, guard: Guard, peer: str, *, path: str = "/v1/instances", body: Sequence[bytes] = ()) -> None:
        self.status: int | None = None
        self.parts: list[int] = []
        self._left = asyncio.Event()
        self._body = iter(body)
        scope = {"type": "http", "method": "GET", "path": path, "headers": [], "client": (peer, 1)}
        self.task = asyncio.create_task(guard(scope, self._receive, self._send))

    def read(self) -> None:
        self._left.set()

    async def answer(self) -> int | None:
        await eventually(lambda: self.status is not None)
        return self.status

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.parts.append(len(message["body"]))

    async def _receive(self) -> Message:
        for part in self._body:
            return {"type": "http.request", "body": part, "more_body": True}
        await self._left.wait()
        return {"type": "http.disconnect"}


def guarded(length: int, **bounds: int) -> tuple[Guard, Rates]:
    """An application whose answers are of a length, bounded so."""

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("x" * length)(scope, receive, send)

    rates = Rates(1000, **{"at_once": 3, **bounds}, unread=UnreadBytes(8 * LONG))
    judges = Access(Settings(), "127.0.0.1"), rates
    return Guard(application, lambda: judges), rates


async def test_a_long_answer_is_at_work_until_it_is_read() -> None:
    guard, rates = guarded(LONG)
    unread = [Connection(guard, "10.0.0.1") for _ in range(3)]
    assert [await one.answer() for one in unread] == [200] * 3
    assert unread[0].parts == [CHUNK_BYTES] * 4
    assert rates.unread.held == 3 * LONG
    # as many as may be at work are: whoever reads nothing gets no more
    refused = Connection(guard, "10.0.0.1")
    assert await refused.answer() == 429
    assert await Connection(guard, "10.0.0.2").answer() == 200
    unread[0].read()
    await unread[0].task
    assert await Connection(guard, "10.0.0.1").answer() == 200


async def test_what_a_caller_has_not_read_is_bounded_in_bytes_and_others_go_on() -> None:
    guard, rates = guarded(LONG, at_once=100)
    unread = [Connection(guard, "10.0.0.1") for _ in range(10)]
    statuses = [await one.answer() for one in unread]
    assert (statuses.count(200), statuses.count(429)) == (4, 6)
    others = [Connection(guard, "10.0.0.2") for _ in range(5)]
    assert [await one.answer() for one in others] == [200] * 4 + [429]
    # all that there is, is held
    assert rates.unread.held == 8 * LONG
    third = Connection(guard, "10.0.0.3")
    assert await third.answer() == 429
    for one in unread:
        one.read()
        await one.task
    assert rates.unread.held == 4 * LONG
    assert await Connection(guard, "10.0.0.3").answer() == 200


async def test_a_caller_that_is_cut_off_holds_nothing() -> None:
    guard, rates = guarded(LONG)
    unread = [Connection(guard, "10.0.0.1") for _ in range(3)]
    await eventually(lambda: rates.unread.held == 3 * LONG)
    await end(*(one.task for one in unread))
    assert (rates.unread.held, rates.unread.callers, rates.requests_at_work) == (0, 0, 0)


async def test_a_short_answer_waits_for_no_reader() -> None:
    guard, rates = guarded(CHUNK_BYTES)
    asked = Connection(guard, "10.0.0.1")
    await asked.task
    assert (asked.status, asked.parts, rates.unread.held) == (200, [CHUNK_BYTES], 0)


async def test_an_answer_above_a_callers_share_is_answered_where_it_holds_nothing_else() -> None:
    guard, _ = guarded(6 * LONG)
    first = Connection(guard, "10.0.0.1")
    assert await first.answer() == 200
    assert await Connection(guard, "10.0.0.1").answer() == 429
    first.read()
    await first.task
    assert await Connection(guard, "10.0.0.1").answer() == 200


async def test_a_feed_is_open_until_its_events_are_read() -> None:
    async def ended(scope: Scope, receive: Receive, send: Send) -> None:
        await StreamingResponse(iter(["event\n\n"]), media_type="text/event-stream")(scope, receive, send)

    rates = Rates(1000, feeds=2)
    judges = Access(Settings(), "127.0.0.1"), rates
    guard = Guard(ended, lambda: judges)
    feeds = [Connection(guard, "10.0.0.1", path="/v1/watch") for _ in range(2)]
    assert [await feed.answer() for feed in feeds] == [200, 200]
    await eventually(lambda: all(feed.parts[-1:] == [0] for feed in feeds))
    assert await Connection(guard, "10.0.0.1", path="/v1/watch").answer() == 429
    for feed in feeds:
        feed.read()
        await feed.task
    assert rates.open_feeds == 0


async def test_bodies_that_are_being_read_are_bounded_together() -> None:
    async def reading(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass

    rates = Rates(1000, unread=UnreadBytes(8 * LONG))
    judges = Access(Settings(), "127.0.0.1"), rates
    guard = Guard(reading, lambda: judges)
    slow = [Connection(guard, "10.0.0.1", body=[b"x" * LONG] * 2) for _ in range(2)]
    await eventually(lambda: rates.unread.held == 4 * LONG)
    greedy = Connection(guard, "10.0.0.1", body=[b"x"])
    with pytest.raises(Exception, match="too many bodies"):
        await greedy.task
    assert greedy.status == 500
    await end(*(one.task for one in slow))
    assert rates.unread.held == 0


async def test_the_head_of_a_long_answer_holds_nothing() -> None:
    guard, rates = guarded(LONG)
    transport = httpx.ASGITransport(guard)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        head = await client.head("/v1/instances")
        whole = await client.get("/v1/instances")
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(LONG), b"")
    assert (len(whole.content), rates.unread.held) == (LONG, 0)
