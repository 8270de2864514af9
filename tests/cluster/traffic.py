"""What goes on while something is changed under it: a caller who resolves everybody, and an agent that turns."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import psycopg

from seedcore.core.errors import RegistryError
from seedcore.core.lifecycle import Status
from seedcore.registry import RegistryClient
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from tests.waiting import eventually

# how fast it turns: a load, and no wait for anything
_TURN_S = 0.02


class Traffic:
    """`refused` are the resolutions that came to nothing, `turns` the causes of the changes, in order."""

    def __init__(self, settings: Settings, names: Sequence[str]) -> None:
        self.refused: list[RegistryError] = []
        self.turns: list[str] = []
        self._settings = settings
        self._names = names
        self._resolved = 0
        self._taken = 0
        self._caller = Tier0MemoryManager(settings)
        self._turning = RegistryClient("turns", settings=settings)
        self._is_over = asyncio.Event()
        self._work: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self._turning.set_status(Status.ALIVE)
        self._work = [asyncio.create_task(self._resolve_for_ever()), asyncio.create_task(self._turn_for_ever())]

    async def goes_on(self) -> None:
        """Until everybody was resolved some times more, and some more turns were taken."""
        resolved, taken = self._resolved, self._taken
        wanted = 5 * len(self._names)
        await eventually(lambda: self._resolved > resolved + wanted and self._taken > taken + 5)

    async def stop(self) -> None:
        self._is_over.set()
        await asyncio.gather(*self._work)
        await self._caller.close()

    async def is_delivered(self) -> bool:
        """Whether the registry has every turn."""
        await self._turning.beat()
        return self._turning.pending == 0

    def committed(self) -> list[str]:
        """The causes of the turns in the database, in the order in which they were committed."""
        return [
            str(cause)
            for (cause,) in self._ask(
                "select cause_detail from registry_transition"
                " where logical_id = 'turns' and cause_detail is not null order by id"
            )
        ]

    def deaths(self) -> list[tuple[object, ...]]:
        """Who is dead in the database, and why."""
        return self._ask("select logical_id, cause_detail from registry_instance where status = 'dead'")

    async def end(self) -> None:
        """The agent that turned is gone."""
        await self._turning.set_status(Status.DEAD)

    def _ask(self, query: str) -> list[tuple[object, ...]]:
        assert self._settings.pg_dsn is not None
        with psycopg.connect(self._settings.pg_dsn.get_secret_value()) as connection:
            return connection.execute(query.encode()).fetchall()

    async def _resolve_for_ever(self) -> None:
        while not self._is_over.is_set():
            for name in self._names:
                try:
                    handle = await self._caller.resolve(name)
                    assert await handle.get_id.remote() == name
                    self._resolved += 1
                except RegistryError as error:
                    self.refused.append(error)

    async def _turn_for_ever(self) -> None:
        while not self._is_over.is_set():
            self.turns.append(f"turn {len(self.turns) + 1}")
            await self._turning.set_status((Status.ALIVE, Status.DRAINING)[len(self.turns) % 2], self.turns[-1])
            self._taken += 1
            await asyncio.sleep(_TURN_S)
