"""A wait returns as soon as enough agents are ready, without polling while the cache is current, and its error has the
reason of every missing agent."""

from __future__ import annotations

import asyncio
import math
import re
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from seedcore.core.answers import NotResolved, Origin
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.errors import (
    CannotKnowError,
    ForkedProcessError,
    InvalidInputError,
    NotResolvableError,
    RegistryUnavailableError,
)
from seedcore.core.holds import HoldKind
from seedcore.core.instances import Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.not_ready import NotReady, NotReadyError
from seedcore.core.verdict import Death
from seedcore.registry.caller.awaited import awaited, check_deadline
from seedcore.registry.caller.live_sources import RegistrySource, SnapshotSource
from seedcore.registry.caller.locator import Located
from seedcore.registry.caller.reasons import age_text, of_dead, of_description, of_live, of_refusal
from seedcore.registry.caller.resolver import Resolver
from seedcore.registry.caller.waiting import Wait, WaitTimes
from seedcore.registry.following.follower import Follower
from seedcore.registry.following.times import FollowTimes
from seedcore.registry.protocol.messages import Description, Observed
from seedcore.registry.server.config import RegistryConfig
from seedcore.store.memory import Tables
from tests.builders import START, hold, iid, instance, joins
from tests.local import LocalRegistry as Registry
from tests.unit.callers import Plain
from tests.unit.registries import joined_registry
from tests.waiting import eventually

# no agent beats here
CONFIG = RegistryConfig(
    "cluster", beat_interval_s=3600.0, lease_s=86_400.0, flush_interval_s=0.01, linger_s=0.0, epoch_check_s=0.01
)
TIMES = FollowTimes(wait_s=0.05, retry_s=0.001, retry_longest_s=0.01)
# a poll would be too late for every test here
NEVER = WaitTimes(retry_s=1000.0, retry_longest_s=1000.0, sweep_s=1000.0)
SOON = WaitTimes(retry_s=0.002, retry_longest_s=0.01)
SHORT_S, LONG_S = 0.1, 60.0


class Fleet:
    """A registry, and a caller that waits for its agents. A handle is the name of its agent."""

    def __init__(self, registry: Registry, connection: Any) -> None:
        self.registry = registry
        self.connection = connection
        self.follower: Follower | None = Follower(connection, times=TIMES)
        self.resolver = Resolver(snapshot=SnapshotSource(self.follower), records=[RegistrySource(connection)])
        self.hanging: set[str] = set()
        self.unproven: set[str] = set()
        self.outdated: dict[str, Located] = {}
        self.located: list[str] = []

    async def join(self, number: int, logical_id: str, *, is_alive: bool = True, **details: Any) -> None:
        await self.registry.register(joins(number, logical_id, **details).registration)
        if is_alive:
            await self.registry.set_status(iid(number), Status.ALIVE, 2)

    async def locate(self, logical_id: str) -> Located:
        self.located.append(logical_id)
        if logical_id in self.hanging:
            await asyncio.sleep(LONG_S)
        if logical_id in self.unproven:
            raise NotResolvableError(logical_id, NotResolved.UNREACHABLE, "its actor does not answer")
        if logical_id in self.outdated:
            return self.outdated[logical_id]
        try:
            answer = await self.connection.resolve([logical_id])
        except RegistryUnavailableError as error:
            raise CannotKnowError(logical_id, str(error)) from error
        [found] = answer.value
        if found.instance is None:
            raise NotResolvableError(logical_id, found.reason, found.detail)
        return Located(logical_id, logical_id, Origin.REGISTRY, START, found.instance)

    async def wait(
        self,
        ids: Sequence[str] | None = None,
        count: int | None = None,
        *,
        organ_id: str | None = None,
        selector: str | None = None,
        endpoint: str | None = None,
        timeout_s: float = LONG_S,
        times: WaitTimes = NEVER,
    ) -> list[str]:
        of = awaited(ids, organ_id, selector, count, endpoint)
        wait = Wait(of, self.locate, self.resolver, self.follower, times=times)
        return [located.handle for located in await wait.until_ready(check_deadline(timeout_s))]


@asynccontextmanager
async def fleet_of(*, follows: bool = True) -> AsyncIterator[Fleet]:
    async with joined_registry(CONFIG, Tables(START)) as registry:
        fleet = Fleet(registry, Plain(registry, RegistryUnavailableError, is_reworded=False))
        assert fleet.follower is not None
        follower = fleet.follower
        if follows:
            follower.start()
            assert await follower.until_current(LONG_S)
        else:
            fleet.follower = None
            fleet.resolver = Resolver(records=fleet.resolver.records)
        yield fleet
        await follower.stop()


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with fleet_of() as fleet:
        yield fleet


@pytest.fixture
async def blind() -> AsyncIterator[Fleet]:
    """A caller that follows no registry."""
    async with fleet_of(follows=False) as fleet:
        yield fleet


async def started(waiting: Any, fleet: Fleet) -> asyncio.Task[list[str]]:
    """A wait that has tried every agent that there is."""
    task = asyncio.create_task(waiting)
    await asyncio.sleep(0.02)
    assert not task.done()
    return task


async def missed(waiting: Any) -> NotReadyError:
    with pytest.raises(NotReadyError) as refused:
        await waiting
    return refused.value


def names_of_tasks() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks()}


# Ready agents


async def test_wait_for_ids_returns_them_in_their_order_once_the_last_one_is_ready(fleet: Fleet) -> None:
    await fleet.join(1, "a")
    waiting = await started(fleet.wait(["c", "a", "b"]), fleet)
    await fleet.join(2, "b")
    await fleet.join(3, "c", is_alive=False)
    await asyncio.sleep(0.02)
    assert not waiting.done()
    await fleet.registry.set_status(iid(3), Status.ALIVE, 2)
    assert await waiting == ["c", "a", "b"]


async def test_wait_for_some_of_the_ids_returns_as_many(fleet: Fleet) -> None:
    waiting = await started(fleet.wait(["a", "b", "c"], 2), fleet)
    await fleet.join(3, "c")
    await fleet.join(1, "a")
    assert await waiting == ["a", "c"]


async def test_wait_for_a_filter_takes_any_that_match(fleet: Fleet) -> None:
    await fleet.join(1, "a", organ_id="eye")
    await fleet.join(2, "b", organ_id="ear")
    await fleet.join(3, "c", organ_id="eye", labels={"spot": "yes"})
    waiting = await started(fleet.wait(count=2, organ_id="eye", selector="!spot"), fleet)
    await fleet.join(4, "d", organ_id="ear")
    await fleet.join(5, "e", organ_id="eye")
    assert await waiting == ["a", "e"]


async def test_wait_for_an_endpoint_takes_an_agent_once_it_has_it(fleet: Fleet) -> None:
    await fleet.join(1, "a", organ_id="eye")
    await fleet.join(2, "b", organ_id="eye")
    waiting = await started(fleet.wait(count=1, organ_id="eye", endpoint="http"), fleet)
    await fleet.join(3, "c", organ_id="ear", endpoints={"http": "http://10.0.0.3:8000"})
    moved = joins(2, "b", organ_id="eye", endpoints={"http": "http://10.0.0.2:8000"})
    await fleet.registry.register(moved.registration, 3)
    assert await waiting == ["b"]
    error = await missed(fleet.wait(count=3, endpoint="http", timeout_s=SHORT_S))
    assert str(error) == (
        "2 of 3 agents with endpoint 'http' ready after 0.1 s: 1 has not registered with endpoint 'http'"
    )


async def test_two_instances_of_an_agent_are_one_agent(fleet: Fleet) -> None:
    await fleet.join(1, "a", organ_id="eye")
    await fleet.join(2, "a", organ_id="eye")
    waiting = await started(fleet.wait(count=2, organ_id="eye"), fleet)
    await fleet.join(3, "b", organ_id="eye")
    assert await waiting == ["a", "b"]


async def test_agent_that_stops_being_ready_during_the_wait_is_not_returned(fleet: Fleet) -> None:
    await fleet.join(1, "a")
    waiting = await started(fleet.wait(["a", "b"]), fleet)
    await fleet.registry.drain(["a"])
    await fleet.join(2, "b")
    # the wait that began before has noticed it, too
    assert await fleet.wait(["b"]) == ["b"]
    assert not waiting.done()
    await fleet.registry.undrain(["a"])
    assert await waiting == ["a", "b"]
    waiting = await started(fleet.wait(count=3, selector=""), fleet)
    await fleet.registry.drain(["a"])
    await fleet.join(3, "c")
    assert await fleet.wait(["c"]) == ["c"]
    assert not waiting.done()
    await fleet.join(4, "d")
    assert await waiting == ["b", "c", "d"]


async def test_proof_that_hangs_delays_no_other_agent(fleet: Fleet) -> None:
    fleet.hanging = {"a", "b"}
    for number, name in enumerate("abcd"):
        await fleet.join(number, name, organ_id="eye")
    assert await fleet.wait(count=2, organ_id="eye") == ["c", "d"]
    assert await fleet.wait(["a", "c", "d"], 2) == ["c", "d"]


async def test_proof_that_hangs_is_begun_again_when_its_agent_changes(fleet: Fleet) -> None:
    fleet.hanging = {"a"}
    await fleet.join(1, "a")
    waiting = await started(fleet.wait(["a"]), fleet)
    fleet.hanging = set()
    await fleet.join(2, "a")
    assert await waiting == ["a"]


async def test_agent_that_appears_ready_and_does_not_prove_it_is_waited_for(fleet: Fleet) -> None:
    fleet.unproven = {"a"}
    await fleet.join(1, "a")
    waiting = await started(fleet.wait(["a"], times=SOON), fleet)
    await eventually(lambda: fleet.located.count("a") > 3, every_s=0.001)
    fleet.unproven = set()
    assert await waiting == ["a"]


async def test_agent_that_the_cache_has_as_not_ready_is_not_polled(fleet: Fleet) -> None:
    await fleet.join(1, "a", is_alive=False)
    waiting = await started(fleet.wait(["a", "b"], times=SOON), fleet)
    before = len(fleet.located)
    await asyncio.sleep(0.1)
    assert len(fleet.located) == before
    waiting.cancel()


async def test_source_that_knows_less_than_the_cache_does_not_make_an_agent_ready(fleet: Fleet) -> None:
    await fleet.join(1, "a")
    waiting = await started(fleet.wait(["a", "b"]), fleet)
    # as the database answers that has not committed the drain yet, or the manager's memory
    fleet.outdated["a"] = await fleet.locate("a")
    before = len(fleet.located)
    await fleet.registry.drain(["a"])
    await eventually(lambda: "a" in fleet.located[before:], every_s=0.001)
    await fleet.join(2, "b")
    # the wait that began before has noticed it, too
    assert await fleet.wait(["b"]) == ["b"]
    assert not waiting.done()
    await fleet.registry.undrain(["a"])
    assert await waiting == ["a", "b"]


async def test_source_that_knows_more_than_the_cache_makes_an_agent_ready_with_the_next_change(fleet: Fleet) -> None:
    for number, logical_id in enumerate("ab"):
        await fleet.join(number, logical_id, is_alive=False)
        row = instance(number, logical_id)
        fleet.outdated[logical_id] = Located(logical_id, logical_id, Origin.REGISTRY, START, row)
    waiting = await started(fleet.wait(["a", "b"]), fleet)
    for number in range(2):
        await fleet.registry.set_status(iid(number), Status.ALIVE, 2)
    assert await waiting == ["a", "b"]


async def test_proof_of_long_ago_of_an_agent_that_does_not_report_is_repeated(fleet: Fleet) -> None:
    times = WaitTimes(retry_s=0.002, retry_longest_s=0.01, sweep_s=0.01, stale_s=0.01)
    fleet.outdated["a"] = Located("a", "a", Origin.RAY, START, None)
    waiting = await started(fleet.wait(["a", "b"], times=times), fleet)
    before = len(fleet.located)
    fleet.unproven = {"a"}
    await fleet.join(2, "b")
    await eventually(lambda: "a" in fleet.located[before:], every_s=0.001)
    assert not waiting.done()
    fleet.unproven = set()
    assert await waiting == ["a", "b"]


async def test_without_a_feed_every_id_is_tried_again_until_it_is_ready(blind: Fleet) -> None:
    waiting = await started(blind.wait(["a", "b"], times=SOON), blind)
    await blind.join(1, "a")
    await blind.join(2, "b")
    assert await waiting == ["a", "b"]
    waiting = await started(blind.wait(count=3, selector="", times=SOON), blind)
    await blind.join(3, "c")
    assert await waiting == ["a", "b", "c"]


async def test_without_a_feed_a_proof_of_long_ago_is_repeated(blind: Fleet) -> None:
    times = WaitTimes(retry_s=0.002, retry_longest_s=0.01, stale_s=0.01)
    await blind.join(1, "a")
    waiting = await started(blind.wait(["a", "b"], times=times), blind)
    await eventually(lambda: blind.located.count("b") > 5, every_s=0.001)
    await blind.registry.deregister(["a"])
    await blind.join(2, "b")
    await eventually(lambda: blind.located.count("a") > 3, every_s=0.001)
    assert not waiting.done()
    await blind.join(3, "a")
    assert await waiting == ["a", "b"]


async def test_wait_outlives_an_outage_of_the_registry(fleet: Fleet) -> None:
    fleet.connection.is_away = True
    waiting = await started(fleet.wait(["a"], times=SOON), fleet)
    of_organ = await started(fleet.wait(count=1, organ_id="eye", times=SOON), fleet)
    await fleet.join(1, "a", organ_id="eye")
    await asyncio.sleep(0.02)
    assert not waiting.done()
    fleet.connection.is_away = False
    assert await waiting == await of_organ == ["a"]


async def test_wait_in_another_event_loop_is_woken_by_the_feed(fleet: Fleet) -> None:
    result: list[list[str]] = []
    # the proofs of a loop run in it, and the registry of this test belongs to this one
    there = asyncio.get_running_loop()

    async def locate(logical_id: str) -> Located:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(fleet.locate(logical_id), there))

    def other() -> None:
        async def wait() -> None:
            wait = Wait(awaited(["a"], None, None, None), locate, fleet.resolver, fleet.follower, times=NEVER)
            result.append([located.handle for located in await wait.until_ready(LONG_S)])

        asyncio.run(wait())

    thread = threading.Thread(target=other)
    thread.start()
    await eventually(lambda: fleet.located, every_s=0.001)
    await asyncio.sleep(0.02)
    await fleet.join(1, "a")
    await asyncio.to_thread(thread.join)
    assert result == [["a"]]


async def test_cancelled_wait_leaves_nothing_behind(fleet: Fleet) -> None:
    fleet.hanging = {"a"}
    await fleet.join(1, "a")
    waiting = await started(fleet.wait(["a"]), fleet)
    assert "wait-tries" in names_of_tasks()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await eventually(lambda: "wait-tries" not in names_of_tasks(), every_s=0.001)


async def test_unexpected_error_of_a_proof_ends_the_wait(fleet: Fleet) -> None:
    async def fails(logical_id: str) -> Located:
        raise ForkedProcessError("forked")

    wait = Wait(awaited(["a"], None, None, None), fails, fleet.resolver, fleet.follower, times=NEVER)
    with pytest.raises(ForkedProcessError):
        await wait.until_ready(LONG_S)


# The deadline


async def test_error_names_every_missing_agent_of_the_ids_and_why(fleet: Fleet) -> None:
    registry = fleet.registry
    await fleet.join(1, "ready")
    await fleet.join(2, "starting", is_alive=False)
    await fleet.join(3, "drained")
    await registry.drain(["drained"], "a new disk", "ann")
    await fleet.join(4, "draining")
    await registry.set_status(iid(4), Status.DRAINING, 3, "enough work")
    await fleet.join(5, "killed")
    registry.expiry.declare_dead(iid(5), Death.PROCESS, Cause(CauseKind.PROCESS_KILLED, "SIGKILL (pid 7)"))
    await fleet.join(6, "suspect")
    await registry.report_dead_call(iid(6))
    await fleet.join(7, "elsewhere", cluster_epoch="later")
    await fleet.join(8, "[b]silent[/b]")
    fleet.unproven = {"[b]silent[/b]"}
    ids = ["ready", "starting", "drained", "draining", "killed", "suspect", "elsewhere", "[b]silent[/b]", "never"]
    error = await missed(fleet.wait(ids, timeout_s=SHORT_S))
    assert re.sub(r"\d+(\.\d+)? (s|d|min|h)\b", "N s", str(error)) == (
        "1 of 9 agents ready after N s: "
        "'starting' has been starting for N s; "
        "'drained' has been drained by ann for N s: a new disk; "
        "'draining' has been draining for N s: enough work; "
        "'killed' died N s ago: process killed: SIGKILL (pid 7); "
        "'suspect' is suspect: silent for N s; "
        "'elsewhere' is not ready: its instances are of another epoch; "
        "'[b]silent[/b]' is not ready: its actor does not answer; "
        "'never' has never registered"
    )
    assert [one.reason for one in error.missing] == [
        NotReady.STARTING,
        NotReady.DRAINING,
        NotReady.DRAINING,
        NotReady.DEAD,
        NotReady.SUSPECT,
        NotReady.OTHER_EPOCH,
        NotReady.UNREACHABLE,
        NotReady.NEVER_REGISTERED,
    ]
    killed = error.missing[3]
    assert killed.cause is not None
    assert killed.cause.kind is CauseKind.PROCESS_KILLED
    assert killed.since is not None


async def test_error_of_a_filter_names_live_members_then_dead_ones(fleet: Fleet) -> None:
    await fleet.join(1, "w1", organ_id="eye")
    await fleet.join(2, "w2", organ_id="eye", is_alive=False)
    await fleet.join(3, "other", organ_id="ear", is_alive=False)
    await fleet.join(4, "w3", organ_id="eye")
    await fleet.registry.deregister(["w3"], "broken", "ann")
    error = await missed(fleet.wait(count=4, organ_id="eye", timeout_s=SHORT_S))
    assert re.sub(r"\d+(\.\d+)? (s|d|min|h)\b", "N s", str(error)) == (
        "1 of 4 agents of organ 'eye' ready after N s: 'w2' has been starting for N s; 2 have not registered; "
        "'w3' died N s ago: operator (ann): broken"
    )


async def test_error_is_bounded(fleet: Fleet) -> None:
    for number in range(40):
        await fleet.join(number, f"w{number}", organ_id="eye", is_alive=False)
    error = await missed(fleet.wait(count=50, organ_id="eye", timeout_s=SHORT_S))
    assert (len(error.missing), error.others) == (20, 21)
    assert "and 21 more" in str(error)
    error = await missed(fleet.wait([f"w{number}" for number in range(40)], timeout_s=SHORT_S))
    assert (len(error.missing), error.others) == (40, 0)
    assert "and 20 more" in str(error)


async def test_while_the_registry_is_away_the_reasons_are_what_this_process_knows(fleet: Fleet) -> None:
    fleet.connection.is_away = True
    error = await missed(fleet.wait(["a"], timeout_s=SHORT_S, times=SOON))
    assert str(error) == (
        "0 of 1 agents ready after 0.1 s: 'a' cannot be known: the registry is away: it does not answer"
    )
    assert [one.reason for one in error.missing] == [NotReady.UNKNOWN]
    error = await missed(fleet.wait(count=1, organ_id="eye", timeout_s=SHORT_S, times=SOON))
    assert [one.reason for one in error.missing] == [NotReady.UNKNOWN]
    assert "the others cannot be known: " in str(error)


async def test_reasons_that_come_too_late_are_not_waited_for(fleet: Fleet) -> None:
    asked: list[str] = []

    async def hangs(logical_id: str) -> Description:
        asked.append(logical_id)
        await asyncio.sleep(LONG_S)
        raise AssertionError

    fleet.registry.describe = hangs  # type: ignore[method-assign]
    times = WaitTimes(retry_s=0.01, reasons_s=0.01)
    error = await missed(fleet.wait(["a"], timeout_s=SHORT_S, times=times))
    assert asked == ["a"]
    assert [one.reason for one in error.missing] == [NotReady.NEVER_REGISTERED]


async def test_without_records_only_ids_can_be_waited_for() -> None:
    async def never(logical_id: str) -> Located:
        raise NotResolvableError(logical_id, NotResolved.NOT_REGISTERED, "Ray has no actor of that name")

    with pytest.raises(CannotKnowError, match="only ids"):
        await Wait(awaited(None, "eye", None, 1), never, Resolver(), None).until_ready(LONG_S)
    error = await missed(Wait(awaited(["a"], None, None, None), never, Resolver(), None).until_ready(SHORT_S))
    assert str(error) == "0 of 1 agents ready after 0.1 s: 'a' is not ready: Ray has no actor of that name"


@pytest.mark.parametrize(
    ("kind", "reason", "words"),
    [
        (HoldKind.OPERATOR, NotReady.DRAINING, "'agent' has been drained by an operator for 40 s: words"),
        (HoldKind.READINESS, NotReady.NOT_READY, "'agent' has not been ready for 40 s: words"),
        (HoldKind.PROCESS, NotReady.PROCESS, "because a process that it depends on has ended: words"),
        (HoldKind.NODE, NotReady.NODE, "because its node is drained: words"),
    ],
)
def test_hold_is_the_reason_with_its_words_and_its_age(kind: HoldKind, reason: NotReady, words: str) -> None:
    row = instance(holds=(hold("words", kind=kind),))
    found = of_live(Observed(row, Verdict.FRESH, 0.0), START + timedelta(seconds=40))
    assert (found.reason, found.since) == (reason, START)
    assert words in str(found)


def test_reason_is_one_short_line() -> None:
    row = instance(holds=(hold("first\nsecond\x1b" + "x" * 1000, kind=HoldKind.PROCESS),))
    text = str(of_live(Observed(row, Verdict.FRESH, 0.0), START))
    assert "\n" not in text
    assert "first second" in text
    assert len(text) < 450


def test_database_without_verdicts_and_memory_without_records_have_reasons() -> None:
    def described(*rows: Any, complete: bool = True) -> Description:
        return Description("agent", (), rows, Origin.POSTGRES, START, 0, complete=complete)

    starting = instance(status=Status.STARTING, age_s=7200.0)
    dead = instance(status=Status.DEAD)
    assert str(of_description(described(dead, starting), None)) == "'agent' has been starting for 2 h"
    assert of_description(described(dead), None).detail == "is dead: no cause is known"
    assert of_description(described(complete=False), None).reason is NotReady.UNKNOWN
    assert of_refusal("agent", None).reason is NotReady.UNKNOWN
    assert of_dead(dead, START).reason is NotReady.DEAD


@pytest.mark.parametrize(
    ("seconds", "words"), [(-1.0, "0 s"), (40.0, "40 s"), (300.0, "5 min"), (7200.0, "2 h"), (1e6, "12 d")]
)
def test_age_has_the_unit_of_its_size(seconds: float, words: str) -> None:
    assert age_text(seconds) == words


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "ids: name the agents to wait for, by ids, organ_id, selector or endpoint"),
        ({"ids": []}, "ids: must be 1 to 1000 ids, not 0"),
        ({"ids": "abc"}, "ids: must be a list of logical ids, not str"),
        ({"ids": [7]}, "ids: must be text, not int"),
        ({"ids": ["a", "b", "a"]}, "ids: name each agent once, not 'a' again"),
        ({"ids": [str(n) for n in range(1001)]}, "ids: must be 1 to 1000 ids, not 1001"),
        ({"ids": ["a"], "organ_id": "eye"}, "ids: give ids, or organ_id, selector and endpoint, not both"),
        ({"ids": ["a"], "selector": ""}, "ids: give ids, or organ_id, selector and endpoint, not both"),
        ({"ids": ["a"], "count": 2}, "count: must be at most the number of ids, 1, not 2"),
        ({"ids": ["a"], "count": 0}, "count: must be a whole number from 1 to 1000, not 0"),
        ({"organ_id": "eye", "count": True}, "count: must be a whole number from 1 to 1000, not True"),
        ({"organ_id": "eye", "count": 1001}, "count: must be a whole number from 1 to 1000, not 1001"),
        ({"organ_id": "eye"}, "count: must be given where no ids are: how many agents to wait for"),
        ({"selector": "a in (", "count": 1}, "selector: cannot be read from 'a in (' on"),
    ],
)
def test_bad_input_of_a_wait_is_refused_by_field(arguments: dict[str, Any], message: str) -> None:
    given = {"ids": None, "organ_id": None, "selector": None, "count": None, **arguments}
    with pytest.raises(InvalidInputError) as refused:
        awaited(**given)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("timeout_s", [0, -1.0, math.inf, math.nan, True, "5", None])
def test_deadline_that_is_past_or_never_is_refused(timeout_s: Any) -> None:
    with pytest.raises(InvalidInputError, match="timeout_s: must be "):
        check_deadline(timeout_s)


@pytest.mark.parametrize("refused", NotResolved)
def test_every_refusal_of_a_resolution_is_a_reason(refused: NotResolved) -> None:
    missing = of_refusal("agent", NotResolvableError("agent", refused, "in words"))
    assert missing.reason is not NotReady.UNKNOWN
    assert missing.detail == "is not ready: in words"
