"""Instances that are sent as columns arrive as they were, also between versions with other fields."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seedcore.core.answers import InstanceFilter, Listing
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.errors import InvalidInputError
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_LISTED
from seedcore.core.packing import pack, unpack
from seedcore.registry.caller.listing import every_page
from seedcore.registry.following.pages import pages_of
from seedcore.registry.server.config import RegistryConfig
from seedcore.store.memory import Tables
from tests.builders import START, iid, instance, joins
from tests.unit.registries import joined_registry

ALL = InstanceFilter(statuses=None)
# microseconds on both sides of START
MOMENTS = st.integers(-(10**15), 10**15).map(lambda us: START + timedelta(microseconds=us))


@st.composite
def instances(draw: st.DrawFn) -> list[Instance]:
    numbers = draw(st.lists(st.integers(1, 50), unique=True, max_size=6))
    return [
        instance(
            number,
            status=draw(st.sampled_from(Status)),
            started_at=draw(MOMENTS),
            last_heartbeat=draw(MOMENTS),
            stopped_at=draw(st.none() | MOMENTS),
            organ_id=draw(st.none() | st.just("organ")),
            labels=draw(st.sampled_from([{}, {"zone": "a"}])),
            # 1, 1.0 and True are equal, and not the same
            metadata=draw(st.sampled_from([{}, {"n": 1}, {"n": 1.0}, {"n": True}])),
            pid=draw(st.none() | st.integers(1, 9)),
            cause=draw(st.none() | st.just(Cause(CauseKind.AGENT, "its word"))),
            holds=draw(st.sampled_from([(), (Hold(HoldKind.OPERATOR, "by hand", "an operator", START),)])),
        )
        for number in numbers
    ]


@given(instances())
def test_what_is_unpacked_is_what_was_packed(rows: list[Instance]) -> None:
    found = unpack(pack(rows))
    assert list(found) == rows
    assert [repr(one.metadata) for one in found] == [repr(row.metadata) for row in rows]


@given(instances())
def test_last_beats_take_the_place_of_those_that_the_instances_have(rows: list[Instance]) -> None:
    at = START + timedelta(microseconds=1)
    assert list(unpack(pack(rows, [at.timestamp()] * len(rows)))) == [replace(row, last_heartbeat=at) for row in rows]


def packed_as(columns: dict[str, Any], count: int) -> bytes:
    return pickle.dumps((count, columns))


def test_columns_of_another_version_are_dropped_and_defaults_take_the_place_of_missing_ones() -> None:
    rows = [instance(number, organ_id="organ", labels={"zone": "a"}) for number in (1, 2)]
    count, columns = pickle.loads(pack(rows))
    later = packed_as({**columns, "not_known_yet": (1, 2)}, count)
    assert list(unpack(later)) == rows
    earlier = packed_as({name: column for name, column in columns.items() if name not in {"organ_id", "labels"}}, count)
    assert list(unpack(earlier)) == [replace(row, organ_id=None, labels={}) for row in rows]
    with pytest.raises(TypeError, match="logical_id was not sent"):
        unpack(packed_as({name: column for name, column in columns.items() if name != "logical_id"}, count))


def test_every_field_of_an_instance_is_packed() -> None:
    _, columns = pickle.loads(pack([instance(1)]))
    assert set(columns) == {field.name for field in fields(Instance)}


async def test_a_packed_page_is_the_page() -> None:
    async with joined_registry(RegistryConfig("cluster"), Tables(START)) as registry:
        for number in range(1, 8):
            await registry.register(joins(number, f"agent-{number}", labels={"zone": "a"}).registration)
        plain, packed = await registry.page(ALL, 3), await registry.page(ALL, 3, packed=True)
        assert packed.items == ()
        unpacked = packed.unpacked()
        assert [seen(one) for one in unpacked] == [seen(one) for one in plain]
        assert (unpacked.next_cursor, unpacked.stream) == (plain.next_cursor, plain.stream)
        assert unpacked.packed is None
        # the same beats, seen a moment later
        assert all(
            abs(a.last_heartbeat - b.last_heartbeat) < timedelta(seconds=5)
            for a, b in zip(unpacked, plain, strict=True)
        )
        connection: Any = registry
        pages = [page async for page in pages_of(connection, ALL, 3)]
        assert [len(page) for page in pages] == [3, 3, 1]
        assert [one.instance_id for page in pages for one in page] == [iid(number) for number in range(1, 8)]
        assert len(await every_page(connection, statuses=None)) == 7
        with pytest.raises(InvalidInputError, match=f"from 1 to {MAX_LISTED}"):
            await registry.page(ALL, MAX_LISTED + 1)


def seen(one: Instance) -> Instance:
    return replace(one, last_heartbeat=START)


async def test_a_listing_that_fails_asks_for_no_more_pages() -> None:
    class Failing:
        """A connection whose second page is an error."""

        asked = 0

        async def page(self, *_: Any, **__: Any) -> Listing:
            self.asked += 1
            if self.asked == 2:
                raise ConnectionError("it is gone")
            async with joined_registry(RegistryConfig("cluster"), Tables(START)) as registry:
                return replace(await registry.page(ALL), next_cursor="more")

    connection: Any = Failing()
    with pytest.raises(ConnectionError):
        await every_page(connection)
    assert connection.asked == 2
