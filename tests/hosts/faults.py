"""What is done to the hosts, each with its end."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from tests.hosts.line import Quality
from tests.hosts.records import Call
from tests.hosts.world import World

logger = logging.getLogger(__name__)

VICTIM = "left"
_PERFECT = Quality()
# the registry writes at each beat, and waits 15 s for an answer
_STORE_NOTICED_S = 25.0


@dataclass
class Fault(ABC):
    """A fault: `begin`, so many seconds, `end`. The agents of the hosts in `unreachable` cannot reach the registry.
    Calls that work for `work_s` are under way when it begins. Ray may react to it up to `aftermath_s` after its end."""

    seconds: float
    unreachable: frozenset[str] = frozenset()
    needs_tolerance: bool = True
    replaces_cluster: bool = False
    work_s: float = 30.0
    # Ray counts the health checks that failed until one succeeds
    aftermath_s: float = 20.0

    @property
    @abstractmethod
    def name(self) -> str:
        """How the table names it."""

    @abstractmethod
    async def begin(self, it: World) -> None:
        """Break it."""

    @abstractmethod
    async def end(self, it: World) -> None:
        """Mend it."""

    @abstractmethod
    async def has_effect(self, it: World, calls: Sequence[Call]) -> bool:
        """Whether the fault can be seen, shortly before its end: a fault without one proves nothing."""


@dataclass
class LinkDown(Fault):
    """The link of a worker is down."""

    unreachable: frozenset[str] = frozenset({VICTIM})

    @property
    def name(self) -> str:
        return f"link of a worker down, {self.seconds:g} s"

    async def begin(self, it: World) -> None:
        it.network.cut(VICTIM)

    async def end(self, it: World) -> None:
        it.network.join(VICTIM)

    async def has_effect(self, it: World, calls: Sequence[Call]) -> bool:
        return _has_unanswered(calls)


@dataclass
class BadLine(Fault):
    """The link of a worker loses or delays frames."""

    title: str = ""
    quality: Quality = _PERFECT

    @property
    def name(self) -> str:
        return f"{self.title}, {self.seconds:g} s"

    async def begin(self, it: World) -> None:
        it.network.degrade(VICTIM, self.quality)

    async def end(self, it: World) -> None:
        it.network.restore(VICTIM)

    async def has_effect(self, it: World, calls: Sequence[Call]) -> bool:
        line = it.network.line_of(VICTIM)
        logger.info("%s: frames out %s, in %s", self.name, line.out, line.into)
        loses = self.quality.lost_out + self.quality.lost_in > 0
        return line.out.lost + line.into.lost > 0 if loses else _slowest_s(calls) > 2 * self.quality.delay_s


@dataclass
class DatabaseAway(Fault):
    """The link of the database's host is down."""

    aftermath_s: float = 0.0

    @property
    def name(self) -> str:
        return f"database cut off, {self.seconds:g} s"

    async def begin(self, it: World) -> None:
        it.network.cut("base")

    async def end(self, it: World) -> None:
        it.network.join("base")

    async def has_effect(self, it: World, calls: Sequence[Call]) -> bool:
        if self.seconds > _STORE_NOTICED_S:
            return (await it.look()).is_store_away
        return not await asyncio.to_thread(it.head.in_network, it.accepts_connections)


@dataclass
class HeadKilled(Fault):
    """The host of Ray's head and the registry loses its power, and starts again."""

    aftermath_s: float = 0.0

    @property
    def name(self) -> str:
        tables = "tables in RocksDB" if self.needs_tolerance else "tables in memory"
        return f"head host killed, {self.seconds:g} s; Ray's {tables}"

    async def begin(self, it: World) -> None:
        await asyncio.to_thread(it.head.kill)

    async def end(self, it: World) -> None:
        await asyncio.to_thread(it.head.start)
        await asyncio.to_thread(it.head.start_head)

    async def has_effect(self, it: World, calls: Sequence[Call]) -> bool:
        return not it.head.is_running


def _has_unanswered(calls: Sequence[Call]) -> bool:
    return any(call.answered_at is None for call in calls if call.agent_id.startswith(VICTIM))


def _slowest_s(calls: Sequence[Call]) -> float:
    return max((call.answered_at - call.began_at for call in calls if call.answered_at is not None), default=0.0)


def one_way(seconds: float, direction: str) -> Fault:
    """Frames of one direction are lost: "out" from the worker, or "in" to it."""
    is_out = direction == "out"
    quality = Quality(lost_out=1.0) if is_out else Quality(lost_in=1.0)
    title = f"one direction only: a worker {'receives and cannot send' if is_out else 'sends and cannot receive'}"
    return BadLine(seconds, frozenset({VICTIM}), title=title, quality=quality)


def lossy(seconds: float, share: float) -> Fault:
    """A share of the frames of a worker is lost, in each direction."""
    return BadLine(seconds, title=f"{share:.0%} loss in each direction", quality=Quality(share, share))


def slow(seconds: float, delay_s: float) -> Fault:
    """The frames of a worker are delayed, in each direction."""
    return BadLine(seconds, title=f"{delay_s * 1000:g} ms delay in each direction", quality=Quality(delay_s=delay_s))


def every_fault() -> list[Fault]:
    """The whole set."""
    return [
        LinkDown(20),
        LinkDown(60),
        LinkDown(120),
        one_way(60, "out"),
        one_way(60, "in"),
        lossy(60, 0.3),
        slow(60, 0.5),
        DatabaseAway(60),
        HeadKilled(30),
        HeadKilled(30, needs_tolerance=False, replaces_cluster=True),
    ]


def short_set() -> list[Fault]:
    """What CI runs: a link that is down for longer than a lease, and the database cut off."""
    return [LinkDown(20, work_s=5.0, aftermath_s=0.0), DatabaseAway(10, work_s=5.0)]
