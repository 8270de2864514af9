"""Deaths: the evidence on each instance is gathered here, judged by the truth table, and acted upon.

Owns the death watch, the meter of the registry's own absence, and the freeze; `drains` has the holds of draining nodes.
`core.verdict.judge` decides; the write loop commits what it decides.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from seedcore.core.answers import OutcomeKind
from seedcore.core.backoff import Backoff, supervise
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import StatusChange
from seedcore.core.clock import Clock
from seedcore.core.dependencies import Dependency
from seedcore.core.errors import NodeDeadError, StoreUnavailableError
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lease import AbsenceMeter, BeatRate, MassLateness
from seedcore.core.lifecycle import Status
from seedcore.core.members import Members
from seedcore.core.ports import DeathWitness, OnDeath
from seedcore.core.verdict import Death, Evidence, Witness, judge
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.drains import Drains
from seedcore.registry.server.ended_processes import EndedProcesses
from seedcore.registry.server.own_holds import OwnHolds
from seedcore.registry.server.writer import Writer

logger = logging.getLogger(__name__)

_ASK_RAY_S = 2.0
_CONFIRMED_PER_SWEEP = 64
_TICK_S = 0.2


class Expiry:
    """`run()` is the sweep; it ends only by cancellation. Use it from one event loop."""

    def __init__(
        self,
        config: RegistryConfig,
        clock: Clock,
        members: Members,
        writer: Writer,
        rate: BeatRate,
        watch_factory: Callable[[OnDeath], DeathWitness],
    ) -> None:
        self._config = config
        self._clock = clock
        self._members = members
        self._silence = members.silence
        self._backlog = writer.backlog
        self._database = writer.database
        self._housekeeping = writer.housekeeping
        self._rate = rate
        self.watch = watch_factory(self._take_report)
        self.watch.on_refined = self._take_refined
        self.watch.on_dependency = self._take_dependency
        self._holds = OwnHolds(members, self._backlog, clock)
        self.processes = EndedProcesses(members, self._holds, clock)
        self.watch.on_lost_nodes = self._take_lost_nodes
        self.watch.on_unwatched = self._take_unwatched
        self.drains = Drains(members, self._holds, self._database, clock, config.sweep_limit)
        self.watch.on_draining = self.drains.take
        self._lost_nodes: frozenset[str] = frozenset()
        self.unwatched: Mapping[str, int] = {}
        members.on_appear = self._follow
        members.on_vanish = self._follow_no_longer
        self._lateness = MassLateness(config.freeze_floor, config.freeze_share, config.freeze_max_s)
        self._amnesty_s = 0.0
        self._stalled_s = -math.inf
        self._sweep_period_s = min(1.0, config.lease_s / 5)
        self._next_sweep_s = 0.0
        self._tick_s = min(_TICK_S, self._sweep_period_s / 4)
        self._absence = AbsenceMeter(self._tick_s, clock.monotonic())
        self.deaths_reported = 0
        self.deaths_declared = 0

    @property
    def is_frozen(self) -> bool:
        """Whether expiry by silence alone is suspended."""
        return self._lateness.is_frozen

    @property
    def credited_s(self) -> float:
        """Seconds of the registry's own absence, credited to every lease so far."""
        return self._absence.total_credit_s

    # Life

    def start(self) -> None:
        """Start the death watch."""
        self.watch.start()

    async def stop(self) -> None:
        """Stop the death watch."""
        await self.watch.stop()

    async def run(self) -> None:
        """Look for expired leases again and again."""
        await asyncio.sleep(self._tick_s)
        await supervise(self._tick, Backoff(self._tick_s, self._sweep_period_s), "the sweep")

    async def _tick(self) -> float:
        now_s = self.attentive_now_s()
        if now_s >= self._next_sweep_s:
            self._next_sweep_s = now_s + self._sweep_period_s * random.uniform(0.9, 1.1)
            await self.sweep(now_s)
        self.drains.step()
        return self._tick_s

    def attentive_now_s(self) -> float:
        """The time, after a stall of this process before it is credited: beats sent meanwhile may still wait."""
        now_s = self._clock.monotonic()
        absence_s = self._absence.tick(now_s)
        if absence_s:
            self._silence.credit(absence_s, now_s)
        if absence_s > self._sweep_period_s / 2:
            logger.warning("this process was stalled; every lease is credited", extra={"credit_s": absence_s})
            self._amnesty_s = self._stalled_s = now_s
            self._housekeeping.owe_grace()
        return now_s

    # The sweep

    async def sweep(self, now_s: float) -> None:
        """Judge the instances whose lease has expired, and declare a bounded number of them dead. Does nothing before
        the database was read.

        While too many miss their beats at once, only those die whose end has a witness: Ray, or a newer instance of the
        same actor that beats.
        """
        if not self._database.is_complete:
            return
        self._rate.note(len(self._members), now_s)
        self._silence.terms = self._rate.judged
        self._note_sight(now_s)
        self._silence.publish_verdicts(now_s)
        await self._read_sql_beats(now_s)
        # this process may have been stalled while the database was asked
        now_s = self.attentive_now_s()
        self._silence.publish_verdicts(now_s)
        self._release_expired()
        self.processes.settle_all()
        if self._has_thawed(now_s):
            return
        if now_s - self._stalled_s < self._sweep_period_s / 2:
            # beats that were sent during a stall of this process may still wait
            return
        lapsed = self._silence.lapsed(now_s)
        if self.is_frozen:
            await self._confirm(lapsed)
        # also while expiry is frozen: that is evidence, and the table decides
        for instance_id in lapsed[: self._config.sweep_limit]:
            if instance_id in self._members:
                detail = f"no beat for {self._silence.silence_s(instance_id, now_s):.0f} s"
                cause = Cause(CauseKind.LEASE_EXPIRED, detail)
                self._decide(instance_id, self._silence.evidence(instance_id, now_s), {Death.LEASE: cause})

    def _has_thawed(self, now_s: float) -> bool:
        """Begin, continue or end the freeze. Returns whether it ended now: then each silent instance gets a whole lease
        to return in."""
        was_frozen = self.is_frozen
        silent = self._silence.count_silent(now_s)
        is_frozen = self._silence.is_frozen = self._lateness.note(silent, len(self._members), now_s)
        if is_frozen != was_frozen:
            logger.warning(
                "expiry is frozen: too many miss their beats at once" if is_frozen else "expiry goes on",
                extra={"silent": silent, "instances": len(self._members)},
            )
        # a freeze that is spent has lasted so long that the silent had time enough
        has_thawed = was_frozen and not is_frozen and not self._lateness.is_spent
        if has_thawed:
            self._silence.credit(math.inf, now_s)
            self._amnesty_s = now_s
        return has_thawed

    def _note_sight(self, now_s: float) -> None:
        """Suspend expiry by silence while Ray's tables cannot be read: an agent finds a new registry, or a new relay,
        only in them. When they can be read again, each silent instance gets a whole lease to do so."""
        was_blind, is_blind = self._silence.is_blind, self.watch.is_blind
        self._silence.is_blind = is_blind
        if is_blind and not was_blind:
            logger.warning("no lease expires by silence: Ray's tables cannot be read: %s", self.watch.problem)
        elif was_blind and not is_blind:
            logger.warning("leases expire by silence again: Ray's tables can be read")
            self._silence.credit(math.inf, now_s)
            self._amnesty_s = now_s

    async def _read_sql_beats(self, now_s: float) -> None:
        """Read the last beats of silent instances that may beat by the SQL functions."""
        quiet = self._silence.quiet_sql_only(now_s, self._config.sweep_limit)
        if not quiet:
            self._silence.can_read_sql_beats = True
            return
        try:
            beats = await self._database.readable().last_beats(quiet)
        except StoreUnavailableError as error:
            logger.debug("not known whether the silent instances beat in SQL: %s", error)
            self._silence.can_read_sql_beats = False
            return
        self._silence.can_read_sql_beats = True
        for instance_id in quiet:
            self._silence.note_sql_beat(instance_id, beats.get(instance_id), self._clock.monotonic())

    def _release_expired(self) -> None:
        """Release the holds that have expired: an operator's drain ends so."""
        for instance_id, kind in self._members.expired_holds(self._clock.utc(), self._config.sweep_limit):
            if not self._holds.has_room():
                return
            self._holds.change(instance_id, kind, None, Cause(CauseKind.DRAIN_ENDED))

    async def _confirm(self, lapsed: Sequence[str]) -> None:
        """Ask Ray about some of the silent instances, others in each sweep."""
        asked = random.sample(lapsed, min(_CONFIRMED_PER_SWEEP, len(lapsed)))
        rows = [row for row in map(self._members.get, asked) if row is not None]
        answers = await asyncio.gather(*(self.ask_about(row) for row in rows))
        for row, (witness, cause) in zip(rows, answers, strict=True):
            evidence = replace(self._silence.evidence(row.instance_id, self._clock.monotonic()), actor=witness)
            self._decide(row.instance_id, evidence, {Death.ACTOR: cause})

    async def ask_about(self, silent: Instance) -> tuple[Witness, Cause]:
        """What is known of a silent instance's actor, and the cause of its death if it is gone: a newer instance of the
        actor sends beats, or Ray's answer."""
        # an actor runs one process at a time. One that is fresh has beaten, unless an amnesty made all fresh
        now_s = self.attentive_now_s()
        amnesty_s = max(self._amnesty_s, self._database.recovered_s + self._config.reconnect_grace_s)
        is_earned = now_s - amnesty_s > self._silence.terms.lease_s
        if silent.actor_id is not None and any(
            is_earned
            and other.instance_id != silent.instance_id
            and other.actor_id == silent.actor_id
            and self._silence.verdict(other.instance_id, now_s) is Verdict.FRESH
            for other in self._members.instances_of(silent.logical_id)
        ):
            return Witness.GONE, Cause(CauseKind.SUPERSEDED, "a newer instance of its actor sends beats")
        return await self.watch.ask_ray(silent, _ASK_RAY_S), _by_ray()

    # Reports

    async def check_reported(self, instance_id: str) -> Verdict:
        """A caller found the instance's actor dead: record that, and ask Ray. Returns the verdict after that."""
        known = self._members.get(instance_id)
        if known is None:
            return Verdict.UNKNOWN
        self._silence.report_dead(instance_id)
        witness = await self.watch.ask_ray(known, _ASK_RAY_S)
        now_s = self.attentive_now_s()
        evidence = replace(self._silence.evidence(instance_id, now_s), actor=witness)
        self._decide(instance_id, evidence, {Death.ACTOR: _by_ray()})
        return self._silence.verdict(instance_id, now_s)

    def require_node(self, node_id: str | None) -> None:
        """Raise NodeDeadError for a node that Ray has declared dead, though its processes may live on."""
        if node_id is not None and node_id in self._lost_nodes:
            raise NodeDeadError(node_id)

    def _follow(self, instance: Instance) -> None:
        self.watch.add(instance)
        self.drains.see(instance)

    def _follow_no_longer(self, instance: Instance) -> None:
        self.watch.drop(instance)
        self.drains.drop(instance)

    def _take_lost_nodes(self, node_ids: frozenset[str]) -> None:
        self._lost_nodes = node_ids

    def _take_unwatched(self, counts: Mapping[str, int]) -> None:
        self.unwatched = counts

    def _take_report(self, instance_id: str, process: Witness, node: Witness, cause: Cause) -> None:
        """Judge what the death watch saw of an instance. A report is never refused: an error here would end the relay
        that sent it."""
        if self._database.fenced_by is not None or instance_id not in self._members:
            return
        evidence = replace(self._silence.evidence(instance_id, self._clock.monotonic()), process=process, node=node)
        if self._decide(instance_id, evidence, {Death.PROCESS: cause, Death.NODE: cause}):
            self.deaths_reported += 1

    def _take_dependency(self, instance_id: str, dependency: Dependency, cause: Cause) -> None:
        """A process that an instance depends on has ended: that is evidence of a death, or places a hold."""
        if not self.processes.depends(instance_id, dependency):
            return
        if dependency.is_fatal:
            self._take_report(instance_id, Witness.GONE, Witness.ALIVE, cause)
        else:
            self.processes.note(instance_id, dependency, cause)

    def _take_refined(self, instance_id: str, cause: Cause) -> None:
        self._members.deaths.refine(instance_id, cause)
        self._backlog.offer_refined(instance_id, cause)

    # Deciding

    def _decide(self, instance_id: str, evidence: Evidence, causes: Mapping[Death, Cause]) -> bool:
        """Judge all the evidence on an instance, and declare it dead if the table does. Returns whether it is dead now.

        `causes` has the cause of each death that is declared here. Any other one waits: its instance is suspect until
        the sweep, which bounds the number of expired leases, comes to it.
        """
        judgement = judge(evidence)
        if not isinstance(judgement, Death) or judgement not in causes:
            return False
        self.declare_dead(instance_id, judgement, causes[judgement])
        return True

    def declare_dead(self, instance_id: str, death: Death, cause: Cause) -> None:
        """Declare an instance dead: in memory at once, in the database as soon as it takes changes. Never refused for
        want of room; raises FencedError where a newer registry writes."""
        self._backlog.require_open()
        change = StatusChange(instance_id, Status.DEAD, cause=cause, number=self._backlog.next_number())
        outcome = self._members.set_status(change, self._clock.monotonic(), self._clock.utc())
        if outcome.kind is OutcomeKind.APPLIED:
            self._members.deaths.note_verdict(instance_id, death)
            self._backlog.offer_death(change)
            self.deaths_declared += 1
            details = {"instance_id": instance_id, "death": death.value, "cause": cause.kind.value}
            logger.info("instance declared dead: %s", cause, extra=details)


def _by_ray() -> Cause:
    return Cause(CauseKind.ACTOR_DIED, "Ray reports it")
