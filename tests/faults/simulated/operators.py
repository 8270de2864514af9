"""Operators in the simulation: they drain, undrain and deregister instances, and remember what was acknowledged.

Owns the laws of holds. An operator does one thing after another to an instance. After a call whose outcome it does not
know, which may still be carried out, nothing that follows within UNCERTAIN_S counts as acknowledged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from seedcore.core.answers import Resolution
from seedcore.core.errors import RegistryError
from seedcore.core.holds import Hold, HoldKind, effective_status
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.registry.protocol.messages import OperationResult
from tests.faults.simulated.drains import BY_HAND
from tests.faults.simulated.ray import SENT
from tests.local import UNSTORABLE

if TYPE_CHECKING:
    from tests.faults.simulated.registries import Office
    from tests.faults.simulated.world import World

UNCERTAIN_S = 30.0


@dataclass(frozen=True)
class Acknowledged:
    """A hold that a registry acknowledged as durable, and when."""

    hold: Hold
    office: Office
    at_s: float


class Operators:
    """All operators. `call` is their connection to the registry."""

    def __init__(self, world: World, call: Any) -> None:
        self._world = world
        self._call = call
        self._acknowledged: dict[str, Acknowledged] = {}
        self._uncertain_until_s: dict[str, float] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self.touched: set[str] = set()
        self.deregistered: set[str] = set()
        self.left_held: set[str] = set()

    async def act(self, instance_id: str, method: str, **arguments: Any) -> OperationResult | None:
        """One call; None: its outcome is not known."""
        async with self._locks.setdefault(instance_id, asyncio.Lock()):
            self.touched.add(instance_id)
            if method == "deregister":
                self.deregistered.add(instance_id)
            self._acknowledged.pop(instance_id, None)
            try:
                [result] = await self._sent_once(method, instance_id, arguments)
            except RegistryError:
                self._uncertain_until_s[instance_id] = self._world.now_s + UNCERTAIN_S
                self._acknowledged.pop(instance_id, None)
                return None
            answer: OperationResult = result
            return answer

    async def _sent_once(self, method: str, instance_id: str, arguments: dict[str, Any]) -> list[OperationResult]:
        """Law 16."""
        sent: list[str] = []
        token = SENT.set(sent)
        try:
            results: list[OperationResult] = await getattr(self._call, method)(instance_ids=[instance_id], **arguments)
            return results
        finally:
            SENT.reset(token)
            self._world.check(len(sent) <= 1, 16, f"{method} of {instance_id} was sent to {sent}")

    async def act_some(self, instance_id: str) -> None:
        """Three calls in a row, now and then with a reason that cannot be stored."""
        random = self._world.random
        for _ in range(3):
            await asyncio.sleep(random.choice([0.0, random.uniform(0.0, 0.1), random.uniform(0.0, 6.0)]))
            if self._world.is_calm:
                return
            method = random.choices(["drain", "undrain", "deregister"], [6, 3, 0.5])[0]
            arguments: dict[str, Any] = {"reason": UNSTORABLE if random.random() < 0.15 else f"turn {random.random()}"}
            if method == "drain" and random.random() < 0.4:
                arguments["duration_s"] = random.uniform(0.5, 8.0)
            await self.act(instance_id, method, **arguments)

    async def settle(self, instance_id: str, *, is_held: bool, until_s: float) -> bool:
        """Leave an instance held, or not, for good. Returns False where it does not live any more."""
        method = "drain" if is_held else "undrain"
        # what cannot be done until then the calm will show
        while self._world.now_s < until_s:
            result = await self.act(instance_id, method, reason="at the end")
            if result is not None and result.error is None and result.durable:
                (self.left_held.add if is_held else self.left_held.discard)(instance_id)
                return True
            row = self._world.tables.rows.get(instance_id)
            if row is None or row.status is Status.DEAD:
                return False
            await asyncio.sleep(1.0)
        return True

    # Laws

    def note_answer(self, office: Office, method: str, results: Sequence[OperationResult]) -> None:
        """Laws 1 and 12, for an answer of a registry at the moment in which it is given."""
        world = self._world
        for result in results:
            if result.error is not None or not result.durable or result.instance_id is None:
                continue
            if self._uncertain_until_s.get(result.instance_id, 0.0) > world.now_s:
                continue
            if world.losses.is_lossy:
                self._note_while_lossy(office, method, result.instance_id)
                continue
            row = world.tables.rows.get(result.instance_id)
            world.check(row is not None, 1, f"{result} was acknowledged and is not there")
            assert row is not None
            world.counts[f"acknowledged: {method}"] += 1
            if method == "deregister":
                world.check(row.status is Status.DEAD, 1, f"{result} was acknowledged, and it is {row.status}")
            if method == "drain" and row.status is not Status.DEAD:
                hold = row.hold(HoldKind.OPERATOR)
                if hold is not None:
                    self._acknowledged[row.instance_id] = Acknowledged(hold, office, world.now_s)
                else:
                    has_ended = self._may_have_expired(row) or world.losses.taken_over > 0
                    world.check(result.status is not Status.DRAINING or has_ended, 12, f"{row}")

    def _note_while_lossy(self, office: Office, method: str, instance_id: str) -> None:
        """A registry whose database has lost commits acknowledges a hold: its memory has it."""
        known = office.registry.members.get(instance_id)
        hold = None if known is None else known.hold(HoldKind.OPERATOR)
        if method == "drain" and hold is not None:
            self._acknowledged[instance_id] = Acknowledged(hold, office, self._world.now_s)

    def note_mended(self, is_new: bool) -> None:
        """A loss is mended. A registry that is new knows nothing of the holds that the database has lost."""
        rows = self._world.tables.rows
        if is_new:
            for instance_id, known in list(self._acknowledged.items()):
                row = rows.get(instance_id)
                if row is None or not known.hold.is_same(row.hold(HoldKind.OPERATOR)):
                    del self._acknowledged[instance_id]
        else:
            self.check_holds(17)
        for process in self._world.processes:
            # a registry may have noticed what was done by hand, or not
            row = None if process.held_by_hand is None else rows.get(process.held_by_hand)
            if row is None or row.hold(BY_HAND) is None:
                process.held_by_hand = None

    def _may_have_expired(self, row: Instance) -> bool:
        """Whether a hold of the instance was placed that has expired."""
        return any(
            step.instance_id == row.instance_id
            and step.expires_at is not None
            and step.expires_at <= self._world.latest_utc
            for step in self._world.tables.transitions
        )

    def check_holds(self, law: int = 12) -> None:
        """Law 12, in the database: whatever the agent reports, an acknowledged hold is there."""
        world = self._world
        for instance_id, known in list(self._acknowledged.items()):
            row = world.tables.rows.get(instance_id)
            expires_at = known.hold.expires_at
            has_expired = expires_at is not None and expires_at <= world.latest_utc
            if row is None or row.status is Status.DEAD or has_expired:
                del self._acknowledged[instance_id]
                continue
            world.check(known.hold.is_same(row.hold(HoldKind.OPERATOR)), law, f"{known.hold} has ended: {row}")

    def check_resolved(self, office: Office, found: Sequence[Resolution]) -> None:
        """Law 12, in memory: the registry that acknowledged a hold, or read it, does not resolve the instance."""
        database = office.registry.writer.database
        for resolution in found:
            instance = resolution.instance
            known = None if instance is None else self._acknowledged.get(instance.instance_id)
            if known is None or not database.is_complete:
                continue
            if self._world.losses.is_lossy and not (known.office is office and self._world.losses.lives_on(office)):
                continue
            expires_at = known.hold.expires_at
            has_it = known.office is office or database.recovered_s > known.at_s
            has_expired = expires_at is not None and expires_at <= self._world.latest_utc
            self._world.check(not has_it or has_expired, 12, f"{office.name} resolves {instance} under {known.hold}")

    def check_derived(self, rows: Iterable[Instance], where: str) -> None:
        """Law 13."""
        for row in rows:
            derived = effective_status(row.reported_status, [hold.kind for hold in row.holds])
            if row.status is not derived:
                self._world.check(False, 13, f"in {where}: {row}")
