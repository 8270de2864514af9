"""Owns the processes of the registry: the real registry over a simulated database, with every answer checked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray.exceptions import ActorDiedError

from seedcore.core.answers import BeatAnswer, Listing, Receipt
from seedcore.core.causes import Cause
from seedcore.core.changes import HoldChange, SequencedChange, StatusChange
from seedcore.core.errors import RegistryError, UnknownInstanceError
from seedcore.core.feed import FeedBatch
from seedcore.core.instances import Epoch
from seedcore.core.lifecycle import Status
from seedcore.core.ports import OnDeath
from seedcore.core.verdict import Death, Witness
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.death_watch import DeathWatch
from seedcore.registry.server.watched_node import WatchTimes
from tests.faults.simulated.database import SimStore
from tests.faults.simulated.nodes import SimCluster
from tests.faults.simulated.ray import RegistryHandle, SimDirectory
from tests.faults.simulated.world import BEAT_S, CALL_TIMEOUT_S, FREEZE_MAX_S, LEASE_S, World
from tests.local import LocalRegistry as Registry

if TYPE_CHECKING:
    from tests.faults.simulated.caller_laws import CallerLaws
    from tests.faults.simulated.laws import Laws

_TIMES = WatchTimes(node_table_s=1.0)
OPERATIONS = frozenset({"drain", "undrain", "deregister"})


class Office:
    """One process of the registry. Ray reports its end to the components in `keeps` only after so many seconds."""

    def __init__(
        self, world: World, directory: SimDirectory, laws: Laws, caller_laws: CallerLaws, ray_cluster: str
    ) -> None:
        self.world = world
        self.laws = laws
        self._caller_laws = caller_laws
        self.name = f"registry-{len(world.offices) + 1}"
        self.handle = RegistryHandle(world, self)
        self.is_up = True
        # in their order: that of a set is not a part of the seed
        self.calls: dict[asyncio.Future[Any], None] = {}
        self.keeps: dict[str, float] = {}
        self.began_s = world.now_s
        self.wrote_s = 0.0
        self.must_join = False
        # the time of the last term that it took: it has joined once it has recovered after that
        self.joins_s = 0.0
        # a later epoch than the registry has, which an agent or the registry knew, and the one that it showed last
        self.doubt: Epoch | None = None
        self.shown: Epoch | None = None
        # those that it has shown since it took the term, in their order
        self.shown_before: dict[str, None] = {}
        self.shown_fences = 0
        self.buried: set[str] = set()
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
            freeze_max_s=FREEZE_MAX_S,
            feed_capacity=12,
            direct_followers=0,
            change_capacity=world.change_capacity,
            agent_call_s=CALL_TIMEOUT_S,
            journal_capacity=world.losses.journal_capacity,
        )
        cluster = SimCluster(world, directory)
        self.registry = Registry(
            config,
            self._store,
            clock=world.clock,
            watch_factory=lambda on_death: DeathWatch(self._checked(on_death), cluster, _TIMES, world.clock),
        )
        declare_dead = self.registry.expiry.declare_dead

        def decide(instance_id: str, death: Death, cause: Cause) -> None:
            laws.note_decision(instance_id, is_alone=self._was_alone(instance_id))
            declare_dead(instance_id, death, cause)

        self.registry.expiry.declare_dead = decide  # type: ignore[method-assign]
        world.offices.append(self)
        world.loop.run_in(self.name, self._start())
        world.note(f"{self.name} starts in {ray_cluster}")

    def _was_alone(self, instance_id: str) -> bool:
        """Whether every other instance has registered only after the last message of this one."""
        members, now = self.registry.members, self.world.utc()
        silent_s = members.silence.silence_s(instance_id, self.world.now_s)
        others = (row for row in members if row.instance_id != instance_id)
        return all((now - row.started_at).total_seconds() < silent_s for row in others)

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

    async def serve(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        laws = self.laws
        try:
            result = await getattr(self.registry, method)(*args, **kwargs)
        except UnknownInstanceError as error:
            laws.check_unknown(self, error.instance_id)
            raise
        if isinstance(result, BeatAnswer):
            self._note_known(args, kwargs)
            for instance_id in result.unknown:
                laws.check_unknown(self, instance_id)
        if isinstance(result, Receipt):
            laws.check_receipt(self, result, _status_of(args[0]), _is_ready(args[0]))
        if method in OPERATIONS:
            laws.operators.note_answer(self, method, result)
        if method == "deliver":
            for sequenced, receipt in zip(args[0], result, strict=True):
                if isinstance(receipt, Receipt):
                    laws.check_receipt(self, receipt, _status_of(sequenced), _is_ready(sequenced))
        if isinstance(result, FeedBatch):
            self._caller_laws.note_feed(self, result)
        if isinstance(result, Listing):
            self._caller_laws.check_one_epoch(self, result)
            for row in result:
                self.check_lives(row.instance_id)
                self._caller_laws.note_instance(row, is_complete=result.complete)
        if method == "resolve":
            laws.operators.check_resolved(self, result.value)
            self._caller_laws.check_one_epoch(self, [one.instance for one in result.value if one.instance is not None])
            for found in result.value:
                if found.instance is not None:
                    self.check_lives(found.instance.instance_id)
                    self._caller_laws.note_instance(found.instance, is_complete=result.complete)
        return result

    def _note_known(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """An agent brings the epoch that a registry before this one has shown it."""
        known = kwargs.get("known", args[2] if len(args) > 2 else None)
        if known is not None and self.registry.writer.database.is_complete and self.note_doubt(known.epoch):
            self.world.counts["lost flips brought by agents"] += 1

    def note_doubt(self, epoch: Epoch | None) -> bool:
        """This epoch is known as current. Returns whether the registry has lost the flip to it."""
        shown = self.registry.members.shown.known
        doubted = shown.number if self.doubt is None else self.doubt.number
        is_lost = epoch is not None and epoch.number > doubted and epoch.name != shown.name
        if is_lost:
            self.doubt = epoch
        return is_lost

    def check_lives(self, instance_id: str) -> None:
        """Law 8."""
        if instance_id in self.buried:
            self.world.check(False, 8, f"{self.name} names {instance_id}, whose death it has committed")

    def kill(self) -> None:
        self.is_up = False
        self.world.loop.kill(self.name)
        self.world.note(f"{self.name} is killed")
        for reply in list(self.calls):
            if not reply.done():
                reply.set_exception(ActorDiedError())


def _status_of(change: SequencedChange) -> Status | None:
    return change.change.status if isinstance(change.change, StatusChange) else None


def _is_ready(sequenced: SequencedChange) -> bool | None:
    """What an agent reports of its readiness; None of another change."""
    change = sequenced.change
    return change.hold is None if isinstance(change, HoldChange) else None
