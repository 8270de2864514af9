"""The regular work in the database: the term is renewed, flips and retired epochs are noticed, old history is pruned.

Owns the times of this work. Each piece is bounded, so that the write loop is never busy with it for long.
"""

from __future__ import annotations

from seedcore.core.clock import Clock
from seedcore.core.members import Members
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.database import DatabaseSession
from seedcore.registry.server.retirement import end_retired


class Housekeeping:
    """Use it from the write loop."""

    def __init__(self, config: RegistryConfig, members: Members, database: DatabaseSession, clock: Clock) -> None:
        self._config = config
        self._members = members
        self._database = database
        self._clock = clock
        self._owes_grace = False
        self._next_epoch_check_s = 0.0
        self._next_prune_s = 0.0
        self.pruned = 0

    def owe_grace(self) -> None:
        """This process was absent: every lease in the database starts again before the next flush."""
        self._owes_grace = True

    async def give_grace(self) -> None:
        """Start every lease in the database again, where that is owed."""
        if self._owes_grace:
            await self._database.writable.renew_every_lease()
            self._owes_grace = False

    async def check_epoch_if_due(self) -> None:
        """Renew the term, notice a flip that was made in SQL, and end the instances of retired epochs.

        It also shows an idle registry, or one whose last flush failed, whether the database answers.
        """
        now_s = self._clock.monotonic()
        if now_s < self._next_epoch_check_s and not self._database.is_failing:
            return
        self._next_epoch_check_s = now_s + self._config.epoch_check_s
        store = self._database.writable
        await store.renew_term(self._members.silence.terms.lease_s)
        epoch = await store.current_epoch()
        self._members.set_epoch(epoch.name, epoch.number)
        await end_retired(store, self._members, self._config.sweep_limit)

    async def prune_if_due(self) -> None:
        """Delete old history, up to a limit; soon again where there is more."""
        now_s = self._clock.monotonic()
        if now_s < self._next_prune_s:
            return
        pruned = await self._database.writable.prune_history(self._config.keep_history_s, self._config.prune_limit)
        is_done = pruned < self._config.prune_limit
        self._next_prune_s = now_s + (self._config.prune_s if is_done else self._config.flush_interval_s)
        self.pruned += pruned
