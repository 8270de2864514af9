"""Who is declared dead: on the word of a witness, or when a lease is over; and what of the silence was our own absence.

Owns the death watch, the meter of our absence and the freeze. What it declares, the writer commits.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence

from seedcore.core.answers import OutcomeKind
from seedcore.core.changes import StatusChange
from seedcore.core.clock import Clock
from seedcore.core.errors import BacklogFullError, NodeDeadError, StoreUnavailableError
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lease import AbsenceMeter, BeatRate, MassLateness
from seedcore.core.lifecycle import Status
from seedcore.core.ports import DeathWitness, OnDeath
from seedcore.core.roster import Roster
from seedcore.core.verdict import Beats, Death, Evidence, Witness, judge
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.flusher import Writer

logger = logging.getLogger(__name__)

_ASK_RAY_S = 2.0
_CONFIRMED_PER_SWEEP = 64
_TICK_S = 0.2


class Expiry:
    """`run()` is the sweep; it ends only by cancellation. Use from one event loop."""

    def __init__(
        self,
        config: RegistryConfig,
        clock: Clock,
        roster: Roster,
        writer: Writer,
        rate: BeatRate,
        watch_factory: Callable[[OnDeath], DeathWitness],
    ) -> None:
        self._config = config
        self._clock = clock
        self._roster = roster
        self._writer = writer
        self._rate = rate
        self.watch = watch_factory(self._take_report)
        self.watch.on_refined = writer.explain
        self.watch.on_lost_nodes = self._take_lost_nodes
        self._lost_nodes: frozenset[str] = frozenset()
        self.watch.on_unwatched = self._take_unwatched
        self.unwatched: Mapping[str, int] = {}
        roster.on_appear = self.watch.add
        roster.on_vanish = self.watch.drop
        self._lateness = MassLateness(config.freeze_floor, config.freeze_share, config.freeze_max_s)
        self._amnesty_s = 0.0
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
        """Seconds of our own absence, credited to every lease so far."""
        return self._absence.total_credit_s

    def start(self) -> None:
        """Begin to watch for deaths."""
        self.watch.start()

    async def stop(self) -> None:
        """Watch nobody any more."""
        await self.watch.stop()

    async def run(self) -> None:
        """Look for leases that are over, for ever."""
        while True:
            await asyncio.sleep(self._tick_s)
            try:
                now_s = self.attentive_now_s()
                if now_s >= self._next_sweep_s:
                    self._next_sweep_s = now_s + self._sweep_period_s * random.uniform(0.9, 1.1)
                    await self.sweep(now_s)
            except BacklogFullError as error:
                logger.debug("sweep cut short: %s", error)
            except Exception:
                logger.exception("the sweep failed and goes on")

    def attentive_now_s(self) -> float:
        """The time, once a stall of this process before it is credited: beats sent meanwhile may still wait."""
        now_s = self._clock.monotonic()
        absence_s = self._absence.tick(now_s)
        if absence_s:
            self._roster.credit(absence_s, now_s)
        if absence_s > self._sweep_period_s / 2:
            logger.warning("this process was stalled; every lease is credited", extra={"credit_s": absence_s})
            self._amnesty_s = now_s
            self._writer.owe_grace()
        return now_s

    async def sweep(self, now_s: float) -> None:
        """Declare dead whose lease is over, a bounded number of them; never before we know whom we watch.

        Where too many miss their beats at once, only those whose death Ray confirms.
        """
        if not self._writer.is_complete:
            return
        self._rate.note(len(self._roster), now_s)
        self._roster.terms = self._rate.judged
        self._roster.tell_verdicts(now_s)
        hears_all = await self._listen_in_the_database(now_s)
        # we may have been stalled while the database was asked
        now_s = self.attentive_now_s()
        self._roster.tell_verdicts(now_s)
        self._end_drains()
        lapsed = self._roster.lapsed(now_s, len(self._roster))
        was_frozen = self._lateness.is_frozen
        silent = self._roster.count_silent(now_s)
        is_frozen = self._lateness.note(silent, len(self._roster), now_s)
        if is_frozen != was_frozen:
            logger.warning(
                "expiry is frozen: too many miss their beats at once" if is_frozen else "expiry goes on",
                extra={"silent": silent, "instances": len(self._roster)},
            )
        if was_frozen and not is_frozen and not self._lateness.is_spent:
            # what kept so many silent is over; those not heard yet get a whole lease to return in, however long it was
            self._roster.credit(math.inf, now_s)
            self._amnesty_s = now_s
            return
        if is_frozen:
            await self._confirm([instance_id for instance_id, _ in lapsed])
            return
        for instance_id, silence_s in lapsed[: self._config.sweep_limit]:
            # of one that may beat in a database that cannot be asked nothing is known
            if hears_all or not self._roster.is_stranger(instance_id):
                self.declare_dead(instance_id, f"lease expired: silent for {silence_s:.0f} s")

    async def _listen_in_the_database(self, now_s: float) -> bool:
        """Hear who beats there and never spoke to us: callers of the SQL functions. False where it cannot be asked."""
        quiet = self._roster.quiet_strangers(now_s, self._config.sweep_limit)
        if not quiet:
            return True
        try:
            beats = await self._writer.store().last_beats(quiet)
        except StoreUnavailableError as error:
            logger.debug("not known whether the silent beat in SQL: %s", error)
            return False
        for instance_id in quiet:
            self._roster.hear_of(instance_id, beats, self._clock.monotonic())
        return True

    async def check_reported(self, instance_id: str) -> Verdict:
        """A caller found its actor dead: doubt it, and ask Ray. The verdict after that."""
        known = self._roster.get(instance_id)
        if known is None:
            return Verdict.UNKNOWN
        self._roster.doubt(instance_id)
        witness = await self.watch.ask_ray(known, _ASK_RAY_S)
        if isinstance(judge(Evidence(actor=witness)), Death):
            self.declare_dead(instance_id, "Ray says that its actor died")
        return self._verdict(known)

    def declare_dead(self, instance_id: str, cause: str) -> None:
        """Our own verdict. Raises BacklogFullError or FencedError."""
        if self._decide(instance_id, Status.DEAD, cause):
            self.deaths_declared += 1
            logger.info("instance declared dead: %s", cause, extra={"instance_id": instance_id})

    def _decide(self, instance_id: str, status: Status, cause: str) -> bool:
        """A change of our own, committed like any other; whether it changed anything."""
        self._writer.require_room()
        change = StatusChange(instance_id, status, cause=cause, number=self._writer.next_number())
        is_new = self._roster.set_status(change, self._clock.monotonic(), self._clock.utc()).kind is OutcomeKind.APPLIED
        if is_new:
            self._writer.enqueue(change)
        return is_new

    def _end_drains(self) -> None:
        """Make alive again whom an operator drained for a while that is over."""
        for instance_id in self._roster.drained_long_enough(self._clock.utc(), self._config.sweep_limit):
            self._decide(instance_id, Status.ALIVE, "its draining has come to the end that was set for it")

    def require_node(self, node_id: str | None) -> None:
        """Raise NodeDeadError for a node that Ray has declared dead, though its processes may live on."""
        if node_id is not None and node_id in self._lost_nodes:
            raise NodeDeadError(node_id)

    def _take_lost_nodes(self, node_ids: frozenset[str]) -> None:
        self._lost_nodes = node_ids

    def _take_unwatched(self, counts: Mapping[str, int]) -> None:
        self.unwatched = counts

    def _take_report(self, instance_id: str, process: Witness, node: Witness, cause: str) -> None:
        """Act on what the death watch saw of an instance."""
        if isinstance(judge(Evidence(process=process, node=node)), Death) and self._writer.fenced_by is None:
            self.deaths_reported += 1
            self.declare_dead(instance_id, cause)

    def _verdict(self, instance: Instance) -> Verdict:
        return self._roster.verdict(instance.instance_id, self.attentive_now_s())

    async def _ask_about(self, silent: Instance) -> Witness:
        # an actor runs one process at a time; who is fresh has beaten, unless we made everybody fresh of late
        now_s = self.attentive_now_s()
        amnesty_s = max(self._amnesty_s, self._writer.recovered_s + self._config.reconnect_grace_s)
        is_earned = now_s - amnesty_s > self._roster.terms.lease_s
        if silent.actor_id is not None and any(
            is_earned
            and other.instance_id != silent.instance_id
            and other.actor_id == silent.actor_id
            and self._roster.verdict(other.instance_id, now_s) is Verdict.FRESH
            for other in self._roster.instances_of(silent.logical_id)
        ):
            return Witness.GONE
        return await self.watch.ask_ray(silent, _ASK_RAY_S)

    async def _confirm(self, lapsed: Sequence[str]) -> None:
        """Ask Ray about some of the silent, others in each sweep, and release those that it knows to be dead."""
        asked = [
            row for row in map(self._roster.get, random.sample(lapsed, min(_CONFIRMED_PER_SWEEP, len(lapsed)))) if row
        ]
        answers = await asyncio.gather(*(self._ask_about(row) for row in asked))
        for row, witness in zip(asked, answers, strict=True):
            evidence = Evidence(actor=witness, beats=Beats.LAPSED, is_frozen=True)
            if isinstance(judge(evidence), Death):
                self.declare_dead(row.instance_id, "silent, and Ray says that its actor died")
