"""A fleet, its relays, its registries and their database in one process, under faults drawn from a seed.

Everything of ours is the real code: clients, reporters, relays, death watch, registry, write loop. Simulated are time,
the network, the processes and the database (the memory store, which the conformance suite holds to PostgreSQL).

    python -m tests.faults.simulation --seed 17            # one history, with what happened in it
    python -m tests.faults.simulation --count 10000        # many

The laws, checked all the time and at the end of every history:

1. A change acknowledged as durable is committed at that moment, and stays so.
2. The changes of one agent's process are committed in their order, each once.
3. Nothing follows `dead` in the life of an instance.
4. One registry writes in each term, and terms only grow.
5. No instance is declared dead whose process lives and could reach the registry.
6. At the end of all faults every process that ended is dead in the database, with a cause.
7. Then every process that lives is live once, with the status that it reported, in memory and in the database alike,
   and no client keeps an undelivered change, also where the database refused a value of another.
8. A registry resolves no instance whose death it has committed.
9. A follower of the feed gets every change of a registry in order and without a gap, or a reset, after which it lists
   again: its cache equals the state of that registry at the version that it has.
10. A registry that has not read its database, or that a newer one has superseded, calls no instance unknown that the
    database has: it asks agents to register again only after a whole lease without its database.
11. An actor's instances are all of the epoch that it was started in, also those of the processes that Ray starts for it
    later; where a registry took the database over, those that insist on none go on in the epoch that continues it.
12. An operator's hold that was acknowledged as durable stays until it is released or expires, whatever the agent
    reports, and no registry that knows it resolves the instance.
13. The effective status of every instance, in memory and in the database, follows from its reported status and holds.
14. A registry refuses no report of a death, however full its backlog is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import multiprocessing
import os
import random
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from unittest import mock

from ray.exceptions import ActorDiedError

from seedcore.core.answers import Answer, BeatAnswer, InstanceFilter, Listing, OutcomeKind, Receipt, Resolution
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import HoldChange, RegisterChange, SequencedChange, StatusChange
from seedcore.core.clock import Clock
from seedcore.core.errors import (
    DirectoryUnavailableError,
    FencedError,
    RegistryError,
    RegistryReplacedError,
    RegistryUnavailableError,
    RetiredEpochError,
    StoreRejectedError,
    StoreUnavailableError,
    UnknownInstanceError,
)
from seedcore.core.feed import FeedBatch
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.instances import Instance, LiveState
from seedcore.core.lifecycle import Status
from seedcore.core.ports import OnDeath
from seedcore.core.timeouts import within
from seedcore.core.verdict import Death, Witness
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.agent.identity import Identity
from seedcore.registry.agent.reporter import Reporter
from seedcore.registry.node.process_watch import OnExit
from seedcore.registry.node.relay import Relay
from seedcore.registry.protocol.messages import Watched
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.death_watch import DeathWatch
from seedcore.settings import Settings
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import START
from tests.faults.mutants import MUTANTS
from tests.faults.operators import UNSTORABLE, Operators
from tests.faults.virtual import VirtualLoop
from tests.local import LocalRegistry as Registry

# mostly a few, so that much happens to each; now and then so many that some are silent and the fleet is not
AGENTS = (5, 5, 5, 14)
BEAT_S = 1.0
LEASE_S = 8.0
CALL_TIMEOUT_S = 2.0
FAULTS_S = 50.0
CALM_S = 40.0
NODES = ("north", "south")
OPERATIONS = frozenset({"drain", "undrain", "deregister"})
EVERY = InstanceFilter(statuses=None, fresh_only=False)


Followed = tuple[Status, tuple[Hold, ...]]
"""What a follower has of an instance."""


def _status_of(change: SequencedChange) -> Status | None:
    return change.change.status if isinstance(change.change, StatusChange) else None


class Violation(AssertionError):
    """A law is broken."""


@dataclass
class Process:
    """An agent's process. `troubles`: when it could not reach the registry for reasons of its own, as (from, to)."""

    name: str
    logical_id: str
    node_id: str
    actor_id: str
    number: int
    reporter: Reporter | None = None
    instance_ids: list[str] = field(default_factory=list)
    ended_s: float | None = None
    troubles: list[tuple[float, float]] = field(default_factory=list)
    wanted: Status = Status.ALIVE
    held_by_hand: str | None = None
    epoch: str | None = None
    is_retired: bool = False

    @property
    def actor_name(self) -> str:
        return self.logical_id if self.epoch is None else f"{self.logical_id}@{self.epoch}"

    @property
    def key(self) -> str:
        return f"process-{self.number}"


class World:
    """Everything there is, and what is true of it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.agents = self.random.choice(AGENTS)
        self.loop = VirtualLoop()
        self.log: list[str] = []
        self.tables = Tables(START)
        self.clock_offset_s = 0.0
        self.database_back_s = 0.0
        self.gcs_back_s = 0.0
        self.everybody_cut_s = 0.0
        self.cut_s: dict[str, float] = {}
        self.nodes: dict[str, bool] = dict.fromkeys(NODES, True)
        self.processes: list[Process] = []
        self.offices: list[Office] = []
        self.relays: list[SimRelay] = []
        self.lost_share = self.random.choice([0.0, 0.01, 0.03])
        self.twice_share = self.random.choice([0.0, 0.02])
        self.slow_share = self.random.choice([0.0, 0.01])
        self.database_lost_share = self.random.choice([0.0, 0.02, 0.05])
        self.has_relays = self.random.random() < 0.8
        # now and then so few that a short outage of the database fills the backlog
        self.change_capacity = self.random.choice([3, 8, 100_000])
        self.is_calm = False
        self.violation: Violation | None = None
        self.decided_s: dict[str, float] = {}
        self.alone: set[str] = set()
        self.seen_dead: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.held_at: dict[tuple[str, int], dict[str, Followed]] = {}
        self.rows_seen = 0
        self.epoch_of: dict[str, str] = {}
        self.latest_utc = START
        self.operators = Operators(self, SimConnection(self, "operator"))

    # Time and truth

    @property
    def now_s(self) -> float:
        return self.loop.now_s

    def utc(self) -> datetime:
        now = START + timedelta(seconds=self.now_s + self.clock_offset_s)
        self.latest_utc = max(self.latest_utc, now)
        return now

    def note(self, text: str) -> None:
        self.log.append(f"{self.now_s:8.3f}  {text}")

    def happens(self, share: float) -> bool:
        return not self.is_calm and self.random.random() < share

    def owner(self, instance_id: str) -> Process | None:
        for process in self.processes:
            if instance_id in process.instance_ids:
                return process
        return None

    def process(self, name: str) -> Process | None:
        return next((process for process in self.processes if process.name == name), None)

    def relay_of(self, caller: str) -> SimRelay | None:
        """The relay that an agent speaks to, where it knows one."""
        process = self.process(caller)
        if process is None or self.is_cut(caller) or self.random.random() < 0.4:
            return None
        return next(
            (relay for relay in reversed(self.relays) if relay.is_up and relay.node_id == process.node_id), None
        )

    def office(self) -> Office | None:
        """The registry that has the name: the last one started, never an older one again."""
        return self.offices[-1] if self.offices and self.offices[-1].is_up else None

    def route(self, caller: str) -> Office | None:
        for office in self.offices:
            if office.is_up and office.keeps.get(caller, 0.0) > self.now_s:
                return office
        return self.office()

    def is_cut(self, caller: str) -> bool:
        return max(self.everybody_cut_s, self.cut_s.get(caller, 0.0)) > self.now_s

    # Laws

    def check(self, is_so: bool, law: int, what: str) -> None:
        if not is_so:
            # kept, since the code under test survives what is raised in it
            self.violation = self.violation or Violation(f"law {law}: {what}")
            raise self.violation

    def check_receipt(self, receipt: Receipt, status: Status | None) -> None:
        """Law 1: what is acknowledged as durable is in the tables now."""
        if not receipt.durable:
            return
        row = self.tables.rows.get(receipt.instance_id)
        self.check(row is not None, 1, f"{receipt} was acknowledged and is not there")
        assert row is not None
        if row.status is Status.DEAD:
            return
        self.check(row.seq >= receipt.seq, 1, f"{receipt} was acknowledged, committed is {row.seq}")
        if status is not None:
            steps = [step for step in self.tables.transitions if step.instance_id == receipt.instance_id]
            # what it reported under a hold is no transition
            was_held = any(step.hold is not None for step in steps)
            was_so = was_held or status in {step.to_status for step in steps}
            if row.seq == receipt.seq:
                was_so = row.reported_status is status
            self.check(was_so, 1, f"{receipt} was acknowledged as {status} and never was so")
        self.counts["acknowledged"] += 1

    def check_writer(self, office: Office, term: int | None) -> None:
        """Law 4, at each write that the database took."""
        if term is None:
            return
        self.check(office.store_terms.setdefault(term, office.name) == office.name, 4, f"two writers of term {term}")
        last = office.world_terms[-1] if office.world_terms else 0
        self.check(term >= last, 4, f"{office.name} wrote with term {term} after {last}")
        office.world_terms.append(term)
        self.check_deaths()
        self.check_epochs()
        self.operators.check_holds()
        self.operators.check_derived(self.tables.rows.values(), "the database")

    def check_deaths(self) -> None:
        """Law 5, for every death that the database has newly."""
        for row in list(self.tables.rows.values()):
            if row.status is not Status.DEAD or row.instance_id in self.seen_dead:
                continue
            self.seen_dead.add(row.instance_id)
            process = self.owner(row.instance_id)
            assert process is not None
            cause = CauseKind.UNKNOWN if row.cause is None else row.cause.kind
            self.counts[f"dead: {cause}"] += 1
            if process.ended_s is not None or cause in {CauseKind.AGENT, CauseKind.OPERATOR}:
                continue
            if cause is CauseKind.EPOCH_RETIRED:
                is_retired = self.tables.epochs[row.cluster_epoch].retired_at is not None
                self.check(is_retired, 5, f"{process.name} lives, and is dead: {cause}, which is current")
                continue
            if row.instance_id in self.alone and cause is CauseKind.LEASE_EXPIRED:
                # with one instance there is no other to compare its silence with
                continue
            # it could not reach the registry for a good part of a lease, and the fault was its own
            at_s = self.decided_s.get(row.instance_id, self.now_s)
            silent = any(end - start > LEASE_S / 3 and end > at_s - 2 * LEASE_S for start, end in process.troubles)
            # which excuses an expired lease, and no witness of its end; but a process that received its death from a
            # registry that died before the commit lives on as another instance, and the next registry finds that
            has_moved_on = process.reporter is not None and process.reporter.client.instance_id != row.instance_id
            if has_moved_on and row.instance_id in self.operators.deregistered:
                continue
            self.check(
                silent and (cause is CauseKind.LEASE_EXPIRED or has_moved_on),
                5,
                f"{process.name} lives, and {row.instance_id} is dead: {row.cause}",
            )

    def line_of(self, epoch: str) -> str:
        """The epoch that continues this one in the end."""
        following = self.tables.epochs[epoch].continued_by
        return epoch if following is None else self.line_of(following)

    def check_epochs(self) -> None:
        """Law 10, for every instance that the database has newly."""
        new = list(self.tables.rows.values())[self.rows_seen :]
        self.rows_seen += len(new)
        for row in new:
            process = self.owner(row.instance_id)
            assert process is not None
            before = self.epoch_of.setdefault(process.actor_id, process.epoch or row.cluster_epoch)
            is_there = self.line_of(row.cluster_epoch) == self.line_of(before)
            self.check(is_there, 10, f"{process.name} was started in {before}, and is in {row.cluster_epoch}")

    def check_history(self) -> None:
        """Laws 2 and 3."""
        last_seq: dict[str, int] = {}
        dead: set[str] = set()
        for step in self.tables.transitions:
            if step.instance_id in dead:
                self.check(False, 3, f"{step} after it was dead")
            if step.to_status is Status.DEAD:
                dead.add(step.instance_id)
            if step.seq is not None:
                if step.seq <= last_seq.get(step.instance_id, -1):
                    self.check(False, 2, f"{step} out of order")
                last_seq[step.instance_id] = step.seq

    def unsettled(self) -> str | None:
        """Why the world is not yet as laws 6 and 7 want it; None when it is."""
        office = self.office()
        if office is None:
            return "no registry"
        writer, members = office.registry.writer, office.registry.members
        if writer.problem is not None or not writer.database.recovered or writer.backlog.pending_changes:
            return "the registry has not settled"
        wanted: dict[str, tuple[Status, set[HoldKind]]] = {}
        for process in self.processes:
            if process.ended_s is not None:
                for instance_id in process.instance_ids:
                    row = self.tables.rows.get(instance_id)
                    if row is not None and row.status is not Status.DEAD:
                        return f"{process.name} ended, {instance_id} is {row.status}"
                    if row is not None and row.cause is None:
                        return f"{instance_id} is dead without a cause"
                continue
            if process.is_retired:
                continue
            if process.reporter is None:
                return f"{process.name} has not begun"
            client = process.reporter.client
            if client.pending:
                return f"{process.name} keeps {client.pending} changes"
            held_by = {HoldKind.NODE} if process.held_by_hand == client.instance_id else set()
            if client.instance_id in self.operators.left_held:
                held_by.add(HoldKind.OPERATOR)
            wanted[client.instance_id] = process.wanted, held_by
        live = {row.instance_id: row for row in self.tables.rows.values() if row.status is not Status.DEAD}
        found = {key: (row.reported_status, {hold.kind for hold in row.holds}) for key, row in live.items()}
        if found != wanted:
            return f"live are {found}, not {wanted}"
        remembered = {key: LiveState.of(row) for key, row in members.index.by_id.items()}
        if remembered != {key: LiveState.of(row) for key, row in live.items()}:
            return f"memory and database differ: {remembered}"
        return None

    def check_memory(self) -> None:
        """Law 13, in the memory of every registry."""
        for office in self.offices:
            if office.is_up:
                self.operators.check_derived(office.registry.members, office.name)


# Network


class SimConnection:
    """The registry's methods over a network that loses, delays, repeats and reorders.

    Messages of an agent go by the relay of its node, now and then, and to the registry where that fails: as in
    RegistryConnection.
    """

    def __init__(self, world: World, caller: str) -> None:
        self._world = world
        self._caller = caller

    async def beat(self, instance_id: str) -> Any:
        return await self.beat_many([instance_id])

    async def beat_many(self, instance_ids: Sequence[str], loads: Mapping[str, float] | None = None) -> Any:
        relay = self._world.relay_of(self._caller)
        if relay is not None:
            try:
                return await within(relay.call("beat_many", instance_ids, loads), BEAT_S / 4)
            except (TimeoutError, ActorDiedError, RegistryUnavailableError):
                pass
        return await self._call("beat_many", instance_ids, loads)

    async def take(self, change: SequencedChange) -> Any:
        inner = change.change
        process = self._world.process(self._caller)
        if process is not None and isinstance(inner, RegisterChange) and inner.instance_id not in process.instance_ids:
            process.instance_ids.append(inner.instance_id)
        relay = self._world.relay_of(self._caller)
        if relay is not None:
            try:
                [answer] = await within(relay.call("deliver", [change]), CALL_TIMEOUT_S)
            except RegistryReplacedError:
                raise
            except (TimeoutError, ActorDiedError, RegistryUnavailableError):
                pass
            else:
                if isinstance(answer, RegistryError):
                    raise answer
                return answer
        return await self._call("take", change)

    def __getattr__(self, method: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self._call(method, *args, **kwargs)

        return call

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        world = self._world
        office = world.route(self._caller)
        await asyncio.sleep(world.random.uniform(0.001, 0.02))
        if office is None or not office.is_up or world.is_cut(self._caller) or world.happens(world.lost_share):
            raise RegistryUnavailableError("simulated: not reached")
        reply: asyncio.Future[Any] = world.loop.create_future()
        office.replies.add(reply)
        reply.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        for delay_s in self._deliveries():
            world.loop.run_in("network", self._deliver(office, delay_s, reply, method, args, kwargs))
        try:
            return await within(reply, CALL_TIMEOUT_S)
        except TimeoutError:
            raise RegistryUnavailableError("simulated: no answer in time") from None
        finally:
            office.replies.discard(reply)

    def _deliveries(self) -> list[float]:
        world = self._world
        delays_s = [world.random.uniform(0.001, 0.02)]
        if world.happens(world.slow_share):
            delays_s = [world.random.uniform(0.1, 3.0)]
        # Ray repeats no call, and an operator's has no number
        if self._caller != "operator" and world.happens(world.twice_share):
            delays_s.append(world.random.uniform(0.001, 4.0))
        return delays_s

    async def _deliver(
        self, office: Office, delay_s: float, reply: asyncio.Future[Any], method: str, args: Any, kwargs: Any
    ) -> None:
        world = self._world
        await asyncio.sleep(delay_s)
        if not office.is_up:
            return
        work = world.loop.run_in(office.name, office.serve(method, args, kwargs))
        error, result = None, None
        try:
            result = await work
        except RegistryError as raised:
            error = raised
        await asyncio.sleep(world.random.uniform(0.001, 0.02))
        if reply.done():
            return
        if world.is_cut(self._caller) or world.happens(world.lost_share):
            error = RegistryUnavailableError("simulated: the answer was lost")
        if error is not None:
            reply.set_exception(error)
        else:
            reply.set_result(result)


# Database


class SimStore:
    """The memory store behind a network, in an order that a database with several connections may take."""

    def __init__(self, world: World, office: Office) -> None:
        self._world = world
        self._office = office
        self._inner = MemoryStore(world.utc, world.tables)

    @property
    def term(self) -> int | None:
        return self._inner.term

    @property
    def lease_before_s(self) -> float | None:
        return self._inner.lease_before_s

    async def open(self) -> None:
        await self._travel()

    async def close(self) -> None:
        """Nothing to release."""

    async def load_live(self) -> AsyncIterator[Instance]:
        await self._travel()
        async for row in self._inner.load_live():
            yield row

    def __getattr__(self, method: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self._call(method, *args, **kwargs)

        return call

    async def _travel(self) -> None:
        world = self._world
        await asyncio.sleep(world.random.uniform(0.001, 0.03))
        if world.database_back_s > world.now_s:
            await asyncio.sleep(world.random.uniform(0.0, 0.3))
            raise StoreUnavailableError("simulated: the database is away")

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        world = self._world
        await self._travel()
        if world.happens(world.database_lost_share):
            fate = world.random.choice(["before", "after", "later"])
            if fate == "after":
                await self._apply(method, *args, **kwargs)
            if fate == "later" and method not in {"begin", "set_current_epoch"}:
                # the server goes on with what its client has given up
                delay_s = world.random.uniform(0.05, 4.0)
                world.loop.run_in("database", self._apply_later(delay_s, method, *args, **kwargs))
            raise StoreUnavailableError(f"simulated: connection lost ({fate})")
        result = await self._apply(method, *args, **kwargs)
        await self._travel()
        return result

    async def _apply_later(self, delay_s: float, method: str, *args: Any, **kwargs: Any) -> None:
        await asyncio.sleep(delay_s)
        with contextlib.suppress(FencedError, StoreRejectedError):
            await self._apply(method, *args, **kwargs)

    async def _apply(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if method in {"set_status_many", "hold_many"} and any(map(_is_unstorable, args[0])):
            self._world.counts["batches refused for a value"] += 1
            raise StoreRejectedError("simulated")
        # the memory store never yields, so this is one transaction
        result = await getattr(self._inner, method)(*args, **kwargs)
        if method == "set_status_many":
            for change, outcome in zip(args[0], result, strict=True):
                if change.status is Status.DEAD and outcome.kind is OutcomeKind.APPLIED:
                    self._office.buried.add(change.instance_id)
        if method in {"begin", "register_many", "set_status_many", "hold_many", "beat_many", "expire_old_epochs"}:
            self._world.check_writer(self._office, self._inner.term)
        return result


def _is_unstorable(change: StatusChange | HoldChange) -> bool:
    cause = change.why if isinstance(change, HoldChange) else change.cause
    return cause is not None and cause.detail == UNSTORABLE


# Processes


class SimWatch:
    """Sees the processes of one node end."""

    def __init__(self, world: World, node_id: str, on_exit: OnExit) -> None:
        self._world = world
        self._node_id = node_id
        self._on_exit = on_exit
        self._watched: dict[str, str] = {}

    async def add(self, watched: Watched) -> bool:
        assert watched.process_key is not None
        self._watched[watched.instance_id] = watched.process_key
        process = next(one for one in self._world.processes if one.key == watched.process_key)
        if process.ended_s is not None:
            self.ended(process.key)
        return True

    def discard(self, instance_id: str) -> None:
        self._watched.pop(instance_id, None)

    def ended(self, key: str) -> None:
        for instance_id in [one for one, its in self._watched.items() if its == key]:
            del self._watched[instance_id]
            self._on_exit(instance_id, Cause(CauseKind.PROCESS_EXITED, "simulated"), key)

    async def close(self) -> None:
        self._watched.clear()


class SimRelay:
    """A relay's process: the real relay over simulated processes."""

    def __init__(self, world: World, node_id: str, number: int) -> None:
        self.world = world
        self.node_id = node_id
        self.name = f"relay-{node_id}-{number}"
        self.is_up = world.nodes.get(node_id, False) and world.has_relays
        self.watch: SimWatch | None = None
        self._relay: Relay | None = None

    def _make(self, on_exit: OnExit) -> SimWatch:
        self.watch = SimWatch(self.world, self.node_id, on_exit)
        return self.watch

    async def call(self, method: str, *args: Any) -> Any:
        world = self.world
        await asyncio.sleep(world.random.uniform(0.001, 0.01))
        if not self.is_up:
            await asyncio.sleep(world.random.uniform(0.0, 0.2))
            raise ActorDiedError
        if method == "__ray_ready__":
            await asyncio.sleep(world.random.uniform(0.1, 0.6))
            return None
        if self._relay is None:
            self._relay = Relay((self._make,), SimConnection(world, self.name), BEAT_S / 20)  # type: ignore[arg-type]
        result = await world.loop.run_in(self.name, getattr(self._relay, method)(*args))
        if not self.is_up or world.happens(world.lost_share):
            raise ActorDiedError
        return result

    def kill(self) -> None:
        self.is_up = False
        self.world.loop.kill(self.name)


class SimCluster:
    """What Ray knows, where it answers."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def nodes(self) -> Mapping[str, bool]:
        await self._asked()
        return dict(self._world.nodes)

    async def make_relay(self, node_id: str, name: str) -> SimRelay:
        relay = SimRelay(self._world, node_id, len(self._world.relays))
        self._world.relays.append(relay)
        return relay

    async def end_relay(self, relay: SimRelay) -> None:
        relay.kill()

    async def ask(self, relay: SimRelay, method: str, *args: object) -> Any:
        return await asyncio.ensure_future(relay.call(method, *args))

    async def find_actor(self, name: str, namespace: str, timeout_s: float) -> Any:
        await self._asked()
        for process in reversed(self._world.processes):
            if process.actor_name == name and process.ended_s is None:
                return mock.Mock(_actor_id=bytes.fromhex(process.actor_id))
        return None

    async def _asked(self) -> None:
        await asyncio.sleep(self._world.random.uniform(0.001, 0.02))
        if self._world.gcs_back_s > self._world.now_s:
            await asyncio.sleep(0.5)
            raise DirectoryUnavailableError("simulated: the GCS is down")


class Office:
    """One process of the registry."""

    store_terms: dict[int, str]
    world_terms: list[int]

    def __init__(self, world: World, ray_cluster: str) -> None:
        self.world = world
        self.name = f"registry-{len(world.offices) + 1}"
        self.ray_cluster = ray_cluster
        self.is_up = True
        self.replies: set[asyncio.Future[Any]] = set()
        self.keeps: dict[str, float] = {}
        self.began_s = world.now_s
        self.buried: set[str] = set()
        first = world.offices[0] if world.offices else None
        self.store_terms = first.store_terms if first is not None else {}
        self.world_terms = first.world_terms if first is not None else []
        config = RegistryConfig(
            ray_cluster=ray_cluster,
            beat_interval_s=BEAT_S,
            lease_s=LEASE_S,
            flush_interval_s=0.5,
            durable_wait_s=1.0,
            reconnect_grace_s=CALL_TIMEOUT_S + BEAT_S / 4,
            retry_max_s=1.0,
            epoch_check_s=2.0,
            term_idle_s=6.0,
            compare_s=7.0,
            freeze_share=0.4,
            feed_capacity=12,
            change_capacity=world.change_capacity,
        )
        clock = Clock(lambda: world.now_s, world.utc)
        self.registry = Registry(
            config,
            self._store,
            clock=clock,
            watch_factory=lambda on_death: DeathWatch(self._checked(on_death), SimCluster(world), clock=clock),
        )
        declare_dead = self.registry.expiry.declare_dead

        def decide(instance_id: str, death: Death, cause: Cause) -> None:
            if instance_id not in world.decided_s:
                world.decided_s[instance_id] = world.now_s
                if len(self.registry.members) == 1:
                    world.alone.add(instance_id)
            declare_dead(instance_id, death, cause)

        self.registry.expiry.declare_dead = decide  # type: ignore[method-assign]
        world.offices.append(self)
        world.loop.run_in(self.name, self._start())
        world.note(f"{self.name} starts in {ray_cluster}")

    def _checked(self, on_death: OnDeath) -> OnDeath:
        def report(instance_id: str, process: Witness, node: Witness, cause: Cause) -> None:
            try:
                on_death(instance_id, process, node, cause)
            except RegistryError as error:
                self.world.check(False, 14, f"{self.name} refused the death of {instance_id}: {error}")

        return report

    async def _store(self) -> Any:
        return SimStore(self.world, self)

    async def _start(self) -> None:
        self.registry.start()

    async def serve(self, method: str, args: Any, kwargs: Any) -> Any:
        world = self.world
        try:
            result = await getattr(self.registry, method)(*args, **kwargs)
        except UnknownInstanceError as error:
            self._check_unknown(error.instance_id)
            raise
        if isinstance(result, BeatAnswer):
            for instance_id in result.unknown:
                self._check_unknown(instance_id)
        if isinstance(result, Receipt):
            world.check_receipt(result, _status_of(args[0]))
        if method in OPERATIONS:
            world.operators.note_answer(self, method, result)
        if method == "deliver":
            for sequenced, receipt in zip(args[0], result, strict=True):
                if isinstance(receipt, Receipt):
                    world.check_receipt(receipt, _status_of(sequenced))
        if isinstance(result, FeedBatch):
            members = self.registry.members
            world.held_at[result.stream, result.version] = {
                row.instance_id: (row.status, row.holds) for row in members if row.cluster_epoch == members.epoch
            }
        if method == "resolve":
            world.operators.check_resolved(self, result.value)
            for found in result.value:
                resolved = None if found.instance is None else found.instance.instance_id
                world.check(resolved not in self.buried, 8, f"{resolved} is resolved")
        return result

    def _check_unknown(self, instance_id: str) -> None:
        """Law 10."""
        world, database = self.world, self.registry.writer.database
        row = world.tables.rows.get(instance_id)
        is_there = row is not None and row.status is not Status.DEAD
        is_patient = database.fenced_by is not None or world.now_s - self.began_s <= LEASE_S
        world.check(
            database.is_complete or not (is_there and is_patient), 10, f"{self.name} does not know {instance_id}"
        )

    def kill(self) -> None:
        self.is_up = False
        self.world.loop.kill(self.name)
        self.world.note(f"{self.name} is killed")
        for reply in list(self.replies):
            if not reply.done():
                reply.set_exception(RegistryUnavailableError("simulated: the registry died"))


# What happens


class History:
    """One run of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.world = World(seed)
        self._ray_cluster = "cluster-1"
        self._settings = {
            node: Settings.model_construct(
                **{**_SETTINGS.model_dump(), "node_id": node, "beat_interval_s": beat_s, "lease_s": LEASE_S}
            )
            # the environment of a node may ask for beats that come after the registry's lease
            for node, beat_s in zip(NODES, (BEAT_S, LEASE_S + BEAT_S), strict=True)
        }

    def run(self) -> None:
        """Raises Violation, with what had happened."""
        loop = self.world.loop
        asyncio.set_event_loop(loop)
        random.seed(self.seed)
        try:
            try:
                loop.run_until_complete(self._live())
            except Violation as error:
                raise Violation(f"seed {self.seed}: {error}") from error
        finally:
            loop.close()
            asyncio.set_event_loop(None)

    def _new_instance_id(self) -> str:
        return str(uuid.UUID(int=self.world.random.getrandbits(128), version=4))

    async def _live(self) -> None:
        world = self.world
        Office(world, self._ray_cluster)
        for number in range(world.agents):
            self._spawn(f"agent-{number}", NODES[number % 2], self._new_actor())
        world.loop.run_in("caller", self._resolve_for_ever())
        world.loop.run_in("follower", self._follow_for_ever())
        watched: list[asyncio.Task[None]] = [
            world.loop.run_in("world", self._act_for_ever()),
            world.loop.run_in("world", self._break_for_ever()),
        ]
        await self._until(lambda: world.now_s >= FAULTS_S, watched)
        for task in watched:
            task.cancel()
        await asyncio.gather(*watched, return_exceptions=True)
        self._heal()
        await self._report_again()
        # who hangs still hangs
        hanging_s = max((to for one in world.processes for _, to in one.troubles), default=0.0)
        await asyncio.sleep(max(0.0, hanging_s - world.now_s) + BEAT_S)
        ends_s = world.now_s + CALM_S
        while (why := world.unsettled()) is not None:
            if world.now_s > ends_s:
                law = 6 if "ended" in why or "cause" in why else 7
                raise Violation(f"law {law}: after {CALM_S:g} s of calm: {why}")
            await asyncio.sleep(0.5)
            self._raise_violation()
        # and stays so
        await asyncio.sleep(LEASE_S + 2)
        why = world.unsettled()
        world.check(why is None, 7, f"it did not last: {why}")
        world.check_deaths()
        world.check_history()
        self._raise_violation()

    def _raise_violation(self) -> None:
        if self.world.violation is not None:
            raise self.world.violation

    async def _until(self, is_over: Callable[[], bool], watched: Sequence[asyncio.Task[None]]) -> None:
        while not is_over():
            await asyncio.sleep(0.25)
            self._raise_violation()
            self.world.check_history()
            self.world.check_memory()
            for task in watched:
                if task.done():
                    task.result()

    def _heal(self) -> None:
        world = self.world
        world.is_calm = True
        world.database_back_s = world.gcs_back_s = world.everybody_cut_s = 0.0
        world.cut_s.clear()
        world.note("all faults end")
        office = world.office()
        for old in world.offices:
            if old.is_up and old is not office:
                old.kill()
        if office is None:
            Office(world, self._ray_cluster)
        for number in range(world.agents):
            logical_id = f"agent-{number}"
            if not any(
                one.logical_id == logical_id and one.ended_s is None and not one.is_retired for one in world.processes
            ):
                self._spawn(logical_id, self._node(), self._new_actor())

    # Agents

    def _new_actor(self) -> str:
        return f"{len(self.world.processes):032x}"

    def _node(self) -> str:
        return "north" if self.world.nodes["north"] else "south"

    def _spawn(self, logical_id: str, node_id: str, actor_id: str, epoch: str | None = None) -> None:
        world = self.world
        number = len(world.processes)
        process = Process(f"{logical_id}/{number}", logical_id, node_id, actor_id, number, epoch=epoch)
        world.processes.append(process)

        async def identity(*_: object) -> Identity:
            return Identity(process.actor_name, actor_id, "sim", node_id, "10.0.0.1", number + 1, process.key)

        def retired(name: str) -> None:
            process.is_retired = True
            goes_on = epoch is None and world.tables.epochs[world.line_of(name)].retired_at is None
            world.check(not goes_on, 10, f"{process.name} is retired, and its epoch {name} goes on")
            world.note(f"{process.name} is retired")
            if world.random.random() < 0.7:
                world.loop.run_in("world", self._ended(process))

        async def begin() -> None:
            settings = self._settings[node_id]
            client = RegistryClient(
                logical_id,
                process.actor_name,
                epoch,
                settings=settings,
                connection=SimConnection(world, process.name),  # type: ignore[arg-type]
                identifier=identity,
                clock=Clock(lambda: world.now_s, world.utc),
                new_id=self._new_instance_id,
            )
            process.reporter = Reporter(logical_id, settings=settings, client=client, on_retired=retired)
            try:
                await process.reporter.start()
            except RetiredEpochError as error:
                retired(error.epoch)
            except RegistryError:
                pass

        world.loop.run_in(process.name, begin())
        world.note(f"{process.name} starts on {node_id}")

    def _kill(self, process: Process) -> None:
        world = self.world
        process.ended_s = world.now_s
        world.loop.kill(process.name)
        world.note(f"{process.name} is killed")
        for relay in world.relays:
            if relay.is_up and relay.node_id == process.node_id and relay.watch is not None:
                relay.watch.ended(process.key)

    async def _ended(self, process: Process) -> None:
        if process.ended_s is None:
            self._kill(process)

    def _living(self) -> list[Process]:
        return [one for one in self.world.processes if one.ended_s is None]

    async def _act_for_ever(self) -> None:
        """Agents drain, return, stop, die and come back."""
        world = self.world
        while True:
            await asyncio.sleep(world.random.uniform(0.2, 2.5))
            living = self._living()
            if not living:
                continue
            process = world.random.choice(living)
            chance = world.random.random()
            if process.reporter is None or not process.reporter.is_reporting:
                continue
            if chance < 0.75:
                wanted = Status.DRAINING if process.wanted is Status.ALIVE else Status.ALIVE
                process.wanted = wanted
                world.note(f"{process.name} reports {wanted}")
                world.loop.run_in(process.name, self._report(process.reporter, wanted))
                if world.random.random() < 0.3:
                    instance_id = process.reporter.client.instance_id
                    world.loop.run_in("operator", world.operators.act_some(instance_id))
            elif chance < 0.9:
                self._kill(process)
                world.loop.run_in("world", self._return(process))

    async def _report(self, reporter: Reporter, wanted: Status) -> None:
        with contextlib.suppress(RegistryError):
            report = reporter.drain if wanted is Status.DRAINING else reporter.undrain
            await report(f"reports {wanted}")

    async def _report_again(self) -> None:
        """Once the last call of an operator has arrived, some holds are left for good and the others are released; the
        last change is the agent's."""
        world = self.world
        await asyncio.sleep(2 * CALL_TIMEOUT_S + 10.0)
        ends_s = world.now_s + CALM_S
        for process in self._living():
            if process.reporter is None or process.reporter.client.instance_id not in world.operators.touched:
                continue
            is_held = world.random.random() < 0.5
            instance_id = process.reporter.client.instance_id
            await world.loop.run_in("operator", world.operators.settle(instance_id, is_held=is_held, until_s=ends_s))
            await world.loop.run_in(process.name, self._report(process.reporter, process.wanted))

    async def _return(self, process: Process) -> None:
        world = self.world
        await asyncio.sleep(world.random.uniform(0.2, 3.0))
        if world.is_calm or any(
            one.actor_name == process.actor_name and one.ended_s is None for one in world.processes
        ):
            return
        node_id = process.node_id if world.nodes[process.node_id] else self._node()
        self._spawn(process.logical_id, node_id, process.actor_id, process.epoch)

    async def _resolve_for_ever(self) -> None:
        world = self.world
        connection = SimConnection(world, "caller")
        while True:
            await asyncio.sleep(world.random.uniform(0.1, 0.6))
            logical_id = f"agent-{world.random.randrange(world.agents)}"
            with contextlib.suppress(RegistryError):
                answer: Answer[list[Resolution]] = await connection.resolve([logical_id])
                found = answer.value[0].instance
                if found is not None and world.random.random() < 0.1:
                    # a call that failed for whatever reason: the registry believes Ray
                    await connection.report_dead_call(found.instance_id)

    async def _follow_for_ever(self) -> None:
        """Law 9, by a follower that pauses now and then, and falls behind."""
        world = self.world
        connection = SimConnection(world, "follower")
        stream: str | None = None
        version, listed_at = 0, 0
        held: dict[str, Followed] = {}
        while True:
            await asyncio.sleep(world.random.choice([0.0, 0.0, 0.3, 3.0]))
            try:
                batch: FeedBatch = await connection.changes(EVERY, stream, version, world.random.uniform(0.0, 1.0))
                if batch.is_reset:
                    stream, cursor, held = None, None, {}
                    while True:
                        page: Listing = await connection.page(EVERY, 2, cursor)
                        if page.stream != batch.stream:
                            break
                        held.update({row.instance_id: (row.status, row.holds) for row in page})
                        listed_at, cursor = page.version, page.next_cursor
                        if cursor is None:
                            stream, version = batch.stream, batch.version
                            world.counts["lists after a reset"] += 1
                            break
                    continue
            except RegistryError:
                continue
            world.check(batch.since == version, 9, f"asked from {version}, answered from {batch.since}")
            for change in batch.changes:
                world.check(version < change.version <= batch.version, 9, f"{change} out of order")
                version = change.version
                if change.instance is None:
                    held.pop(change.instance_id, None)
                else:
                    held[change.instance_id] = change.instance.status, change.instance.holds
            version = batch.version
            world.counts["changes followed"] += len(batch.changes)
            if version >= listed_at:
                there = world.held_at[batch.stream, version]
                world.check(held == there, 9, f"a follower holds {held} at {version}, the registry held {there}")

    # Faults

    async def _break_for_ever(self) -> None:
        world = self.world
        faults = [
            self._registry_dies,
            self._registry_hangs,
            self._rival_starts,
            self._cluster_is_replaced,
            self._database_goes,
            self._gcs_goes,
            self._clock_jumps,
            self._machine_pauses,
            self._relay_dies,
            self._node_dies,
            self._everybody_is_cut,
            self._one_is_cut,
            self._one_hangs,
            self._one_dies,
            self._another_hand_drains,
            self._epoch_flips,
        ]
        weights = [3, 2, 2, 0.4, 3, 2, 1, 2, 2, 0.7, 2, 2, 2, 3, 1, 0.7]
        while True:
            await asyncio.sleep(world.random.uniform(0.5, 8.0))
            await world.random.choices(faults, weights)[0]()

    async def _registry_dies(self) -> None:
        office = self.world.office()
        if office is not None:
            office.kill()
            self.world.loop.run_in("world", self._new_registry(self.world.random.uniform(0.1, 12.0)))

    async def _new_registry(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        if self.world.office() is None:
            Office(self.world, self._ray_cluster)
            self.world.counts["offices"] += 1

    async def _registry_hangs(self) -> None:
        office, seconds = self.world.office(), self.world.random.uniform(0.5, 12.0)
        if office is not None:
            self.world.note(f"{office.name} hangs for {seconds:.1f} s")
            self.world.loop.freeze(office.name, seconds)

    async def _rival_starts(self) -> None:
        """Ray believes the registry dead and starts another; some agents still talk to the old one."""
        world = self.world
        old = world.office()
        if old is None:
            return
        for process in self._living():
            if world.random.random() < 0.5:
                old.keeps[process.name] = world.now_s + world.random.uniform(0.2, 2.0)
        Office(world, self._ray_cluster)
        world.counts["offices"] += 1
        world.loop.run_in("world", self._old_ends(old, world.random.uniform(0.5, 10.0)))

    async def _old_ends(self, old: Office, after_s: float) -> None:
        await asyncio.sleep(after_s)
        if old.is_up:
            old.kill()

    async def _cluster_is_replaced(self) -> None:
        world = self.world
        old = world.office()
        self._ray_cluster = f"cluster-{len(world.offices) + 1}"
        Office(world, self._ray_cluster)
        world.counts["offices"] += 1
        if old is not None:
            world.loop.run_in("world", self._old_ends(old, world.random.uniform(0.5, 10.0)))

    async def _epoch_flips(self) -> None:
        """An operator stages an epoch, most times brings up its fleet, and shows it: the fleet before ends."""
        world, name = self.world, f"flip-{len(self.world.log)}"
        connection = SimConnection(world, "operator")
        with contextlib.suppress(RegistryError):
            await connection.stage_epoch(name)
            if world.random.random() < 0.7:
                for number in range(world.agents):
                    self._spawn(f"agent-{number}", self._node(), self._new_actor(), name)
                await asyncio.sleep(world.random.uniform(0.0, 3.0))
            world.note(f"the epoch is flipped to {name}")
            await connection.set_current_epoch(name)
            world.counts["flips"] += 1

    async def _database_goes(self) -> None:
        seconds = self.world.random.uniform(0.5, 20.0)
        self.world.note(f"the database is away for {seconds:.1f} s")
        self.world.database_back_s = self.world.now_s + seconds

    async def _gcs_goes(self) -> None:
        seconds = self.world.random.uniform(0.5, 15.0)
        self.world.note(f"the GCS is away for {seconds:.1f} s")
        self.world.gcs_back_s = self.world.now_s + seconds

    async def _clock_jumps(self) -> None:
        seconds = self.world.random.uniform(-60.0, 60.0)
        self.world.note(f"the clocks jump by {seconds:.1f} s")
        self.world.clock_offset_s += seconds

    async def _machine_pauses(self) -> None:
        seconds = self.world.random.uniform(0.5, 15.0)
        self.world.note(f"everything pauses for {seconds:.1f} s")
        self.world.loop.now_s += seconds

    async def _relay_dies(self) -> None:
        relays = [relay for relay in self.world.relays if relay.is_up]
        if relays:
            relay = self.world.random.choice(relays)
            self.world.note(f"{relay.name} is killed")
            relay.kill()

    async def _node_dies(self) -> None:
        world = self.world
        if not all(world.nodes.values()):
            return
        node_id = world.random.choice(list(world.nodes))
        world.nodes[node_id] = False
        world.note(f"node {node_id} dies")
        for relay in world.relays:
            if relay.node_id == node_id:
                relay.kill()
        for process in self._living():
            if process.node_id == node_id:
                self._kill(process)
                world.loop.run_in("world", self._return(process))

    async def _everybody_is_cut(self) -> None:
        seconds = self.world.random.uniform(0.5, 15.0)
        self.world.note(f"no process reaches the registry for {seconds:.1f} s")
        self.world.everybody_cut_s = self.world.now_s + seconds

    def _trouble(self, process: Process, seconds: float) -> None:
        process.troubles.append((self.world.now_s, self.world.now_s + seconds))

    async def _one_is_cut(self) -> None:
        living, seconds = self._living(), self.world.random.uniform(0.5, 14.0)
        if living:
            process = self.world.random.choice(living)
            self.world.note(f"{process.name} is cut off for {seconds:.1f} s")
            self.world.cut_s[process.name] = self.world.now_s + seconds
            self._trouble(process, seconds)

    async def _one_hangs(self) -> None:
        living, seconds = self._living(), self.world.random.uniform(0.5, 14.0)
        if living:
            process = self.world.random.choice(living)
            self.world.note(f"{process.name} hangs for {seconds:.1f} s")
            self.world.loop.freeze(process.name, seconds)
            self._trouble(process, seconds)

    async def _one_dies(self) -> None:
        living = self._living()
        if living:
            process = self.world.random.choice(living)
            self._kill(process)
            self.world.loop.run_in("world", self._return(process))

    async def _another_hand_drains(self) -> None:
        """An agent is held in SQL, past the registry; also one that drains by its own report."""
        world = self.world
        for process in self._living():
            instance_id = None if process.reporter is None else process.reporter.client.instance_id
            row = None if instance_id is None else world.tables.rows.get(instance_id)
            if row is None or row.status is Status.DEAD or process.held_by_hand is not None:
                continue
            hold = Hold(HoldKind.NODE, "by hand", None, world.utc())
            await MemoryStore(world.utc, world.tables).hold_many([HoldChange(row.instance_id, hold.kind, hold)])
            process.held_by_hand = row.instance_id
            world.note(f"{process.name} is held by hand")
            return


_SETTINGS = Settings.model_construct()


def run_seed(seed: int) -> tuple[int, str | None, Counter[str], list[str]]:
    """One history: its violation, or None, with what happened."""
    logging.disable(logging.CRITICAL)
    history = History(seed)
    try:
        history.run()
    except Violation as error:
        return seed, str(error), history.world.counts, history.world.log
    return seed, None, history.world.counts, history.world.log


def main() -> int:
    """Run one history, or many on every core, and print the seeds that broke a law."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="one history, with everything that happens in it")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="break the code so, and stop at the first violation")
    options = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # the order of sets is a part of the history
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.faults.simulation", *sys.argv[1:]])
    breakage = contextlib.ExitStack()
    if options.mutant is not None:
        # to the end: a patch that is not kept may be undone when it is collected
        breakage.enter_context(MUTANTS[options.mutant].patch())
    if options.seed is not None:
        _, violation, counts, log = run_seed(options.seed)
        print("\n".join(log), dict(counts), violation or "no violation", sep="\n")
        return 1 if violation else 0
    totals: Counter[str] = Counter()
    broken: list[str] = []
    # a process for each history: nothing of one may reach the next
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool:
        seeds = range(options.first, options.first + options.count)
        for done, (_, violation, counts, _) in enumerate(pool.imap(run_seed, seeds), 1):
            totals.update(counts)
            if violation is not None:
                broken.append(violation)
                print(violation, flush=True)
                if options.mutant is not None:
                    return 1
            if done % 500 == 0:
                print(f"{done} histories, {len(broken)} with a violation", file=sys.stderr, flush=True)
    print(f"{options.count} histories, {len(broken)} with a violation")
    for name, count in totals.most_common():
        print(f"{count:10d}  {name}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
