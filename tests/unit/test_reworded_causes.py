"""The words of a cause are for people: relay and registry do the same, whatever they are (law 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from seedcore.cli.why import reason_of
from seedcore.core.answers import InstanceFilter
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.errors import InstanceDeadError, RegistryError
from seedcore.core.feed_question import FeedQuestion
from seedcore.core.lifecycle import Status
from seedcore.discovery.rendering import agent_answer
from seedcore.registry.node.process_watch import OnExit, exited
from seedcore.registry.node.relay import Relay
from seedcore.registry.protocol.messages import Watched
from seedcore.registry.ray_support.lookup import ActorHandle
from seedcore.registry.ray_support.private_tables import WorkerEnd, explained
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.death_watch import DeathWatch
from seedcore.registry.server.watched_node import WatchTimes
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import iid, joins
from tests.local import LocalRegistry
from tests.unit.test_registry import Elapsed
from tests.waiting import eventually

CONFIG = RegistryConfig("cluster", beat_interval_s=5.0, lease_s=15.0, flush_interval_s=0.01, linger_s=0.0)
QUICK = WatchTimes(node_table_s=0.01, poll_s=0.1)
EVERY = InstanceFilter(statuses=None, fresh_only=False)
KILLED, CRASHED = 9, 1 << 8
"""Statuses as of wait(2)."""
ENDS: Mapping[int, tuple[int | None, WorkerEnd]] = {
    1: (KILLED, WorkerEnd("NODE_OUT_OF_MEMORY", "memory")),
    2: (CRASHED, WorkerEnd("USER_ERROR", "Traceback:\n  File 1\nValueError: no")),
    3: (None, WorkerEnd("INTENDED_SYSTEM_EXIT", "ray.kill")),
    4: (KILLED, WorkerEnd("SYSTEM_ERROR", "")),
    5: (KILLED, WorkerEnd("NODE_OUT_OF_MEMORY", "memory")),
    6: (KILLED, WorkerEnd("NODE_OUT_OF_MEMORY", "memory")),
}
"""The end of each process: its exit status, and what Ray has of its worker."""


class Eyes:
    """A watch that sees what the test lets it see."""

    def __init__(self, on_exit: OnExit) -> None:
        self.on_exit = on_exit
        self.keys: dict[str, str | None] = {}

    async def add(self, watched: Watched) -> bool:
        self.keys[watched.instance_id] = watched.process_key
        return True

    def discard(self, instance_id: str) -> None: ...

    async def close(self) -> None: ...


class TwoNodes:
    """Two nodes with relays of this process; `eyes` by node."""

    def __init__(self) -> None:
        self.table = {"north": True, "south": True}
        self.eyes: dict[str, Eyes] = {}

    async def nodes(self) -> Mapping[str, bool]:
        return dict(self.table)

    async def draining(self) -> Mapping[str, datetime | None]:
        return {}

    async def make_relay(self, node_id: str, name: str) -> ActorHandle:
        def see(on_exit: OnExit) -> Eyes:
            self.eyes[node_id] = Eyes(on_exit)
            return self.eyes[node_id]

        return Relay((see,), why_ended=self._why_ended)

    async def _why_ended(self, worker_id: str, timeout_s: float) -> Cause | None:
        return explained(ENDS[int(worker_id)][1])

    async def end_relay(self, relay: ActorHandle) -> None: ...

    async def ask(self, relay: Any, method: str, *args: object) -> Any:
        return None if method == "__ray_ready__" else await getattr(relay, method)(*args)

    async def find_actor(self, name: str, namespace: str, timeout_s: float) -> ActorHandle | None:
        return None

    def end(self, number: int) -> None:
        """The process of an instance ends."""
        eyes = self.eyes["north"]
        eyes.on_exit(iid(number), exited(number, ENDS[number][0]), eyes.keys.get(iid(number)))


def kind_of(cause: Cause | None) -> tuple[CauseKind, str | None] | None:
    return None if cause is None else (cause.kind, cause.by)


async def behaviour() -> list[Any]:
    """What a fleet of ten comes to, but for the words: statuses, kinds, holds, receipts, errors, advice, feed."""
    elapsed, cluster = Elapsed(), TwoNodes()
    tables = Tables(elapsed.clock().utc())
    seen: list[Any] = []

    async def store() -> MemoryStore:
        return MemoryStore(elapsed.clock().utc, tables)

    registry = LocalRegistry(
        CONFIG, store, clock=elapsed.clock(), watch_factory=lambda on_death: DeathWatch(on_death, cluster, QUICK)
    )

    async def report(number: int, status: Status, seq: int, why: str | None = None) -> None:
        try:
            receipt = await registry.set_status(iid(number), status, seq, why)
            seen.append((number, receipt.status, receipt.durable, receipt.why is None))
        except RegistryError as error:
            cause = error.cause if isinstance(error, InstanceDeadError) else None
            seen.append((number, type(error), kind_of(cause)))

    def note(results: Sequence[Any]) -> None:
        seen.extend((one.instance_id, one.status, one.durable, one.why is None, type(one.error)) for one in results)

    async def until(number: int, kind: CauseKind) -> None:
        def is_so() -> bool:
            cause = tables.rows[iid(number)].cause
            return cause is not None and cause.kind is kind

        await eventually(is_so)

    registry.start()
    try:
        await eventually(lambda: registry.writer.database.is_complete)
        for number in range(1, 11):
            node_id = "south" if number == 10 else "north"
            details: dict[str, Any] = {"node_id": node_id, "pid": number, "process_key": f"key/{number}"}
            await registry.register(replace(joins(number, f"agent-{number}").registration, **details))
            await report(number, Status.ALIVE, 2, "ready")
        at = await registry.changes(FeedQuestion(EVERY))
        await eventually(lambda: len(cluster.eyes) == 2 and len(cluster.eyes["north"].keys) == 9)
        # deaths of a process, which Ray explains later, or not
        for number, kind in ((1, CauseKind.OUT_OF_MEMORY), (2, CauseKind.START_FAILED), (4, CauseKind.PROCESS_KILLED)):
            cluster.end(number)
            await until(number, kind)
        cluster.end(3)
        await until(3, CauseKind.PROCESS_EXITED)
        # what the agent, or an operator, decided is not replaced by what Ray knows
        await report(5, Status.DEAD, 3, "stopped")
        note(await registry.deregister(["agent-6"], "no use", "ada"))
        for number in (5, 6):
            cluster.end(number)
        # holds
        note(await registry.drain(["agent-7", "agent-8"], "upkeep", "ada"))
        note(await registry.drain(["agent-8"], "upkeep", "ada", duration_s=1.0))
        await report(7, Status.DRAINING, 3, "full")
        note(await registry.undrain(["agent-7"], "done", "bob"))
        await report(7, Status.ALIVE, 4)
        cluster.table["south"] = False
        await until(10, CauseKind.NODE_DIED)
        # all but agent-9 send beats
        for _ in range(160):
            elapsed.now_s += 0.1
            await registry.resolve(["agent-9"])
            await registry.beat_many([iid(7), iid(8)])
        await registry.expiry.sweep(elapsed.now_s)
        await until(8, CauseKind.DRAIN_ENDED)
        await until(9, CauseKind.LEASE_EXPIRED)
        await eventually(lambda: not registry.writer.backlog.pending_changes)
        for number in range(1, 11):
            await report(number, Status.DRAINING, 9, "late")
            described = await registry.describe(f"agent-{number}")
            reason = reason_of(agent_answer(described))
            [row] = described.instances
            seen.append((number, row.status, row.reported_status, kind_of(row.cause), len(row.holds)))
            seen += [(step.from_status, step.to_status, kind_of(step.cause)) for step in described.transitions]
            seen.append((reason.state, reason.advice))
        resolved = await registry.resolve([f"agent-{number}" for number in range(1, 12)])
        seen += [(one.logical_id, one.reason, one.instance is None, one.detail is None) for one in resolved.value]
        feed = await registry.changes(FeedQuestion(EVERY, at.stream, at.version))
        seen += [(one.instance_id, one.instance is None, kind_of(one.cause)) for one in feed.changes]
        deaths = [registry.members.deaths.get(iid(number)) for number in range(1, 11)]
        seen += [None if one is None else (kind_of(one.cause), one.death) for one in deaths]
    finally:
        await registry.stop()
    return seen


@pytest.mark.parametrize(
    "reword",
    [lambda _: "completely different words", lambda _: None, lambda words: words and words[::-1]],
    ids=["the same everywhere", "none", "read backwards"],
)
async def test_rewording_every_cause_changes_no_behaviour(
    monkeypatch: pytest.MonkeyPatch, reword: Callable[[str | None], str | None]
) -> None:
    plain = await behaviour()
    make = Cause.__init__

    def make_reworded(cause: Cause, kind: CauseKind, detail: str | None = None, by: str | None = None) -> None:
        make(cause, kind, reword(detail), by)

    monkeypatch.setattr(Cause, "__init__", make_reworded)
    monkeypatch.setattr(Cause, "__str__", lambda _: "a cause")
    assert Cause(CauseKind.AGENT, "words").detail == reword("words") != "words"
    assert await behaviour() == plain
