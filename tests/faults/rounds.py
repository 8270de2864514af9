"""Histories of an installation: one for each run of faults in it, from its beginning until all has settled.

A history begins and ends while nothing is under way, so that what the database has at its beginning is what its clients
know of.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import psycopg

from seedcore.core.lifecycle import Status
from seedcore.core.timeouts import end
from tests.faults.histories import check_history, file_of
from tests.faults.history import History, Seen
from tests.faults.installation import Installation, Row
from tests.faults.recording import Journal, calls_since, look, mark

_LOOK_EVERY_S = 0.5


class Round:
    """One history, recorded while the block lasts. `finish` ends it in time for what it found to count."""

    def __init__(self, it: Installation, harness: str, seed: int, into: Path | None) -> None:
        """`into` keeps the history."""
        self._it = it
        self._harness = harness
        self._seed = seed
        self._into = into
        self._looking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._since = mark(self._it.history)
        self._last_transition = self._it.last_transition()
        rows = self._it.rows()
        self._dead = {row.instance_id for row in rows if row.status is Status.DEAD}
        self._before = self._seen(rows)
        self._looking = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_: object) -> None:
        await end(self._looking)

    async def finish(self) -> list[str]:
        """Check the history up to now; the violations."""
        await end(self._looking)
        after, steps = self._rows(), self._it.steps(self._last_transition)
        ended_s = time.monotonic()
        calls = tuple(call for call in calls_since(self._it.history, self._since) if (call.ended_s or 0.0) < ended_s)
        history = History(
            self._harness, self._seed, self._since.at_s, ended_s, False, {}, 0.0, self._before, calls, steps, after
        )
        if self._into is not None:
            await asyncio.to_thread(history.write, file_of(self._into, history))
        report = await asyncio.to_thread(check_history, history)
        return [f"history: {violation}" for violation in report.violations]

    def _rows(self) -> tuple[Seen, ...]:
        return self._seen(self._it.rows())

    def _seen(self, rows: list[Row]) -> tuple[Seen, ...]:
        return tuple(
            Seen(row.instance_id, row.logical_id, row.status, row.seq)
            for row in rows
            if row.instance_id not in self._dead
        )

    async def _look(self) -> None:
        journal = Journal(self._it.history, "test")
        try:
            while True:
                # while the database is away there is nothing to see
                with suppress(psycopg.Error):
                    await look(journal, self._rows)
                await asyncio.sleep(_LOOK_EVERY_S)
        finally:
            journal.close()
