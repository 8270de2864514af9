"""Listings, the best instances and history, in every store."""

from __future__ import annotations

from dataclasses import replace

import pytest

from seedcore.core.answers import InstanceFilter, Origin
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.errors import InvalidInputError
from seedcore.core.instances import Beat, Instance
from seedcore.core.lifecycle import Status
from seedcore.core.paging import encode_name_cursor
from seedcore.core.selection import best
from seedcore.core.selector import parse_selector
from tests.builders import iid, joins, turns
from tests.conformance.worlds import EVERYONE, World, enter, row_of

# equal prefixes, case, space and punctuation, and letters that languages sort elsewhere than their code points
NAMES = [
    "a",
    "A",
    "aa",
    "ab",
    "a b",
    "a-b",
    "a_b",
    "a/b",
    "B",
    "b",
    "z",
    "Z",
    "ä",
    "é",
    "ß",
    "ÿ",
    "я",
    "\ufffd",
    "\U0001f600",
]
assert len(NAMES) == len(set(NAMES))


async def read_all(world: World, wanted: InstanceFilter, limit: int) -> tuple[list[Instance], int]:
    rows: list[Instance] = []
    pages, cursor = 0, None
    while pages == 0 or cursor is not None:
        page = await world.store.list_instances(wanted, limit, cursor)
        assert len(page) <= limit
        assert page.complete
        rows += page
        cursor = page.next_cursor
        pages += 1
        assert pages < 100
    return rows, pages


@pytest.mark.parametrize("limit", [1, 7, 19, 1000])
async def test_pages_follow_code_point_order_without_gap_or_repeat(world: World, limit: int) -> None:
    changes = [joins(number, name) for number, name in enumerate(reversed([*NAMES, *NAMES]))]
    await world.store.register_many(changes)
    rows, pages = await read_all(world, EVERYONE, limit)
    keys = [(row.logical_id, row.instance_id) for row in rows]
    assert keys == sorted((change.registration.logical_id, change.instance_id) for change in changes)
    assert pages == -(-len(changes) // limit)


async def test_page_that_ends_exactly_at_the_end_is_the_last(world: World) -> None:
    for number in (1, 2):
        await enter(world, number)
    assert (await world.store.list_instances(EVERYONE, 2)).next_cursor is None
    assert (await world.store.list_instances(EVERYONE, 1)).next_cursor is not None


async def test_listing_goes_on_behind_its_cursor_whatever_happened_to_the_row_it_names(world: World) -> None:
    for number in range(6):
        await enter(world, number, f"agent-{number}")
    first = await world.store.list_instances(InstanceFilter(), 3)
    await world.store.set_status_many([turns(2, Status.DEAD), turns(4, Status.DEAD)])
    await enter(world, 7, "agent-0")
    second = await world.store.list_instances(InstanceFilter(), 3, first.next_cursor)
    assert [row.instance_id for row in second] == [iid(3), iid(5)]


async def test_empty_store_lists_nothing_and_marks_that_as_complete(world: World) -> None:
    page = await world.store.list_instances(EVERYONE, 10)
    assert list(page) == []
    assert (page.source, page.complete, page.next_cursor) == (Origin.POSTGRES, True, None)
    assert page.as_of.utcoffset() is not None


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [
        (InstanceFilter(), [1, 2, 3]),
        (InstanceFilter(statuses=frozenset({Status.STARTING, Status.DRAINING})), [4, 5]),
        (InstanceFilter(statuses=frozenset({Status.DEAD})), [6]),
        (InstanceFilter(statuses=None), [1, 2, 3, 4, 5, 6]),
        (InstanceFilter(statuses=frozenset()), []),
        (InstanceFilter(organ_id="vision"), [1, 2]),
        (InstanceFilter(organ_id="visio"), []),
        (InstanceFilter(labels={"zone": "a"}), [1, 3]),
        (InstanceFilter(labels={"zone": "a", "tier": "1"}), [1]),
        (InstanceFilter(labels={"zone": ""}), []),
        (InstanceFilter(labels={"none": ""}), [2]),
        (InstanceFilter(labels={'quo"te': "\\"}), [3]),
        (InstanceFilter(logical_id="b"), [2, 3]),
        (InstanceFilter(logical_id="B"), []),
        (InstanceFilter(logical_id="b", organ_id="vision", labels={"zone": "b"}), [2]),
        (InstanceFilter(epoch="epoch-1"), [1, 2, 3]),
        (InstanceFilter(epoch="green"), [7]),
        (InstanceFilter(epoch="not-there"), []),
    ],
)
async def test_listing_shows_what_is_wanted_and_only_that(
    world: World, wanted: InstanceFilter, numbers: list[int]
) -> None:
    await enter(world, 1, "a", organ_id="vision", labels={"zone": "a", "tier": "1"})
    await enter(world, 2, "b", organ_id="vision", labels={"zone": "b", "none": ""})
    await enter(world, 3, "b", labels={"zone": "a", 'quo"te': "\\"})
    await enter(world, 4, "c", "starting")
    await enter(world, 5, "d", "draining")
    await enter(world, 6, "e", "dead")
    await enter(world, 7, "f", cluster_epoch="green")
    assert [row.instance_id for row in await world.store.list_instances(wanted, 100)] == [iid(n) for n in numbers]


async def test_listing_of_the_fresh_leaves_out_the_silent_but_not_the_dead(world: World) -> None:
    for number, status in enumerate(["alive", "alive", "draining", "dead"], start=1):
        await enter(world, number, status=status)
        await world.age(iid(number), 60.0 if number > 1 else 0.0)
    fresh = InstanceFilter(statuses=None)
    assert [row.instance_id for row in await world.store.list_instances(fresh, 10)] == [iid(1), iid(4)]
    everyone = await world.store.list_instances(replace(fresh, fresh_only=False), 10)
    assert [row.instance_id for row in everyone] == [iid(number) for number in (1, 2, 3, 4)]


async def test_listed_rows_are_those_that_can_be_read_one_by_one(world: World) -> None:
    for number in range(5):
        await enter(world, number, f"agent-{number}", pid=number + 1)
    rows = list(await world.store.list_instances(EVERYONE, 10))
    assert rows == [await row_of(world, number) for number in range(5)]
    assert sorted([row async for row in world.store.load_live()], key=lambda row: row.instance_id) == rows


@pytest.mark.parametrize("cursor", ["", "junk", "W10", "\u00e9"])
async def test_foreign_cursor_is_refused(world: World, cursor: str) -> None:
    with pytest.raises(InvalidInputError, match="cursor"):
        await world.store.list_instances(EVERYONE, 10, cursor)


@pytest.mark.parametrize("limit", [0, -5, 1001])
async def test_illegal_page_size_is_refused(world: World, limit: int) -> None:
    with pytest.raises(InvalidInputError, match="limit"):
        await world.store.list_instances(EVERYONE, limit)
    with pytest.raises(InvalidInputError, match="limit"):
        await world.store.instances("agent", limit)
    with pytest.raises(InvalidInputError, match="limit"):
        await world.store.history("agent", 10, limit)


async def test_illegal_filter_is_refused(world: World) -> None:
    with pytest.raises(InvalidInputError, match="organ_id"):
        await world.store.list_instances(InstanceFilter(organ_id="\x00"), 10)


async def test_best_instance_is_the_rules_choice_among_the_active(world: World) -> None:
    number = 0
    for logical_id in ("one", "two", "three", "four", "none-active"):
        for status in ("alive", "draining", "starting", "dead", "alive", "alive"):
            if logical_id == "none-active" and status == "alive":
                continue
            number += 1
            await enter(world, number, logical_id, status)
    # a batch starts its instances at one moment: the id decides
    await world.store.register_many([joins(n, "two") for n in (205, 203, 204)])
    await world.store.set_status_many([turns(n, Status.ALIVE) for n in (205, 203, 204)])
    await enter(world, 300, "three", cluster_epoch="green")
    newest_of_four = (await world.store.instances("four", 1))[0]
    await world.age(newest_of_four.instance_id, 60.0)
    names = ["one", "two", "three", "four", "none-active", "unheard-of"]
    answer = await world.store.best_instances(names)
    active = list(await world.store.list_instances(InstanceFilter(), 100))
    expected = {name: best(row for row in active if row.logical_id == name) for name in names}
    assert answer.value == {name: row for name, row in expected.items() if row is not None}
    assert set(answer.value) == {"one", "two", "three", "four"}
    assert answer.value["two"].instance_id == iid(203)
    assert answer.value["four"].instance_id != newest_of_four.instance_id
    assert (answer.source, answer.complete) == (Origin.POSTGRES, True)


async def test_asking_twice_for_an_agent_answers_once(world: World) -> None:
    await enter(world, 1)
    assert set((await world.store.best_instances(["agent", "agent"])).value) == {"agent"}


async def test_history_is_newest_first_with_the_dead_in_it_and_bounded(world: World) -> None:
    for number in (3, 1, 2):
        await enter(world, number, status="dead" if number == 1 else "alive")
    await world.pass_time()
    await world.store.register_many([joins(n) for n in (9, 7, 8)])
    await enter(world, 50, "another")
    order = [iid(number) for number in (7, 8, 9, 2, 1, 3)]
    assert [row.instance_id for row in await world.store.instances("agent", 100)] == order
    assert [row.instance_id for row in await world.store.instances("agent", 4)] == order[:4]
    assert await world.store.instances("not-there", 10) == []
    for name, counts in (("agent", (4, 2)), ("agent", (100, 100)), ("not-there", (10, 10))):
        expected = await world.store.instances(name, counts[0]), await world.store.transitions(name, counts[1])
        assert await world.store.history(name, *counts) == expected


async def test_deaths_are_read_the_last_first_page_by_page(world: World) -> None:
    for number, name in ((3, "a"), (1, "b"), (2, "c")):
        await enter(world, number, name)
        await world.store.set_status_many([turns(number, Status.DEAD, None, f"cause {number}")])
    # these die at the same moment
    for number in (9, 7, 8):
        await enter(world, number, "d")
    await world.pass_time()
    await world.store.set_status_many([turns(number, Status.DEAD) for number in (9, 7, 8)])
    await enter(world, 50, "living")
    order = [iid(number) for number in (9, 8, 7, 2, 1, 3)]
    whole = await world.store.deaths(10)
    assert [row.instance_id for row in whole] == order
    assert (whole.next_cursor, whole.complete) == (None, True)
    assert whole[3].cause == Cause(CauseKind.AGENT, "cause 2")
    found, cursor = [], None
    while True:
        page = await world.store.deaths(2, cursor)
        assert len(page) <= 2
        found += [row.instance_id for row in page]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert found == order
    assert (await world.store.deaths(6)).next_cursor is None
    assert [row.instance_id for row in await world.store.deaths(10, None, 3600.0)] == order


async def test_deaths_of_longer_ago_are_left_out_where_a_span_is_asked_for(world: World) -> None:
    await enter(world, 1, status="dead")
    await world.age_history(1800.0)
    await enter(world, 2, status="dead")
    assert [row.instance_id for row in await world.store.deaths(10, None, 3600.0)] == [iid(2), iid(1)]
    assert [row.instance_id for row in await world.store.deaths(10, None, 900.0)] == [iid(2)]


@pytest.mark.parametrize("cursor", ["junk", "", encode_name_cursor("no time"), encode_name_cursor("2026-01-01")])
async def test_cursor_that_names_no_death_is_refused(world: World, cursor: str) -> None:
    with pytest.raises(InvalidInputError, match="start again without it"):
        await world.store.deaths(10, cursor)


@pytest.mark.parametrize(("limit", "within_s"), [(0, None), (10**6, None), (10, 0.0), (10, -1.0), (10, float("nan"))])
async def test_deaths_within_no_span_are_refused(world: World, limit: int, within_s: float | None) -> None:
    with pytest.raises(InvalidInputError):
        await world.store.deaths(limit, None, within_s)


async def test_every_step_is_remembered_once_with_its_number_and_cause(world: World) -> None:
    await world.store.register_many([joins(1, seq=1)])
    steps = [
        turns(1, Status.ALIVE, 2),
        turns(1, Status.ALIVE, 2),
        turns(1, Status.ALIVE, 3),
        turns(1, Status.DRAINING, 4, "new version"),
        turns(1, Status.STARTING, 5),
        turns(1, Status.DEAD, None, Cause(CauseKind.PROCESS_EXITED, "pid 7")),
        turns(1, Status.ALIVE, 6),
    ]
    await world.store.set_status_many(steps)
    await world.store.register_many([joins(1, seq=7), joins(2, "another")])
    await world.store.beat_many([Beat(iid(1)), Beat(iid(2))])
    remembered = await world.store.transitions("agent", 10)
    assert [(one.from_status, one.to_status, one.seq, one.cause) for one in reversed(remembered)] == [
        (None, "starting", 1, None),
        ("starting", "alive", 2, None),
        ("alive", "draining", 4, Cause(CauseKind.AGENT, "new version")),
        ("draining", "dead", None, Cause(CauseKind.PROCESS_EXITED, "pid 7")),
    ]
    assert {(one.instance_id, one.logical_id) for one in remembered} == {(iid(1), "agent")}
    assert await world.store.transitions("agent", 2) == remembered[:2]
    assert await world.store.transitions("not-there", 10) == []


async def test_unknown_instance_is_none_and_an_illegal_id_is_refused(world: World) -> None:
    assert await world.store.get_instance(iid(1)) is None
    with pytest.raises(InvalidInputError, match="instance_id"):
        await world.store.get_instance("junk")


async def test_live_are_loaded_whatever_their_epoch_and_the_dead_are_not(world: World) -> None:
    for number, status in enumerate(["starting", "alive", "draining", "dead"]):
        await enter(world, number, status=status)
    await enter(world, 4, cluster_epoch="green")
    await world.store.set_current_epoch("green")
    await world.age(iid(0), 1000.0)
    loaded = sorted([row.instance_id async for row in world.store.load_live()])
    assert loaded == [iid(number) for number in (0, 1, 2, 4)]


async def test_opening_and_closing_twice_is_harmless(world: World) -> None:
    await world.store.open()
    await enter(world, 1)
    await world.store.close()
    await world.store.close()
    await world.store.open()
    assert (await row_of(world, 1)).status is Status.ALIVE


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", [1, 2, 3]),
        ("zone=a", [1]),
        ("zone==a", [1]),
        ("zone != a", [2, 3]),
        ("zone in (a, b)", [1, 2]),
        ("zone notin (a,b)", [3]),
        ("gpu", [2]),
        ("!gpu", [1, 3]),
        ("gpu=", [2]),
        ("gpu!=", [1, 3]),
        ("zone in (a,b),!gpu", [1]),
        ("zone=a,zone=b", []),
        ("absent in (a)", []),
    ],
)
async def test_selector_selects_the_same_in_the_database_as_in_memory(
    world: World, text: str, numbers: list[int]
) -> None:
    await enter(world, 1, labels={"zone": "a"})
    await enter(world, 2, labels={"zone": "b", "gpu": ""})
    await enter(world, 3, labels={"tier": "1"})
    wanted = InstanceFilter(selector=parse_selector(text))
    assert [row.instance_id for row in await world.store.list_instances(wanted, 10)] == [iid(n) for n in numbers]
    everyone = await world.store.list_instances(InstanceFilter(), 10)
    assert [row.instance_id for row in everyone if wanted.matches(row, "epoch-1")] == [iid(n) for n in numbers]


async def test_listing_of_a_node_has_those_that_live_there(world: World) -> None:
    await enter(world, 1, node_id="n1")
    await enter(world, 2, node_id="n2")
    await enter(world, 3)
    listing = await world.store.list_instances(InstanceFilter(node_id="n1"), 10)
    assert [row.instance_id for row in listing] == [iid(1)]
