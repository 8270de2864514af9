"""One lone durable change, one start, and the way of a change to a watcher: beside bare actor calls and commits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

import ray

from seedcore.bench.bare import commits
from seedcore.bench.environment import Bench, percentile
from seedcore.bench.feed import watched_delays
from seedcore.bench.listing import Echo, timed
from seedcore.bench.report import Figure, Ratio, Result
from seedcore.core.lifecycle import Status
from seedcore.registry.agent.client import RegistryClient
from seedcore.settings import Settings

ROUNDS = 5
CHANGES_PER_S = 200
PAUSE_S = 0.02


class Lone:
    """A process with one agent that changes now and then, and with others that start now and then."""

    def __init__(self, settings: Settings, echo: Any) -> None:
        self._settings = settings
        self._echo = echo
        self._agent = RegistryClient("lone", settings=settings)
        self._started = 0

    async def prepare(self) -> bool:
        """Start, and beat until the registry has named the relay of this node. Whether it has."""
        await self._agent.set_status(Status.ALIVE)
        for _ in range(100):
            await self._agent.beat()
            if self._agent.connection.uses_relay:
                return True
            await asyncio.sleep(0.1)
        return False

    async def measure(self, count: int) -> dict[str, list[float]]:
        """The seconds of each of `count` durable changes, starts, and calls of an actor, in turn."""
        found: dict[str, list[float]] = {"changes": [], "starts": [], "calls": []}
        for number in range(count):
            for name, work in (
                ("changes", self._change(Status.DRAINING if number % 2 == 0 else Status.ALIVE)),
                ("starts", self._start()),
                ("calls", lambda: self._echo.echo.remote("agent")),
            ):
                found[name].append(await timed(work))
                await asyncio.sleep(PAUSE_S)
        return found

    def _change(self, status: Status) -> Callable[[], Awaitable[None]]:
        async def change() -> None:
            (await self._agent.set_status(status)).raise_unless_durable()

        return change

    def _start(self) -> Callable[[], Awaitable[None]]:
        self._started += 1
        agent = RegistryClient(f"started-{self._started}", settings=self._settings)

        async def start() -> None:
            (await agent.set_status(Status.ALIVE)).raise_unless_durable()

        return start


async def run(bench: Bench) -> Result:
    """Measure ROUNDS of each, in turn."""
    rounds, count, seconds = (1, 20, 2.0) if bench.is_quick else (ROUNDS, 60, 15.0)
    lone = await _lone(bench, rounds, count)
    watched = await watched_delays(bench, CHANGES_PER_S, seconds)
    change, start, call, commit = (median(lone[name]) for name in ("changes", "starts", "calls", "commits"))
    seen, late = median(watched.delays_s), percentile(watched.delays_s, 0.99)
    return Result(
        "changes",
        [
            Figure("a lone durable change, median", change * 1000, "ms"),
            Figure("p99", percentile(lone["changes"], 0.99) * 1000, "ms"),
            Figure("an agent started, registered and alive, median", start * 1000, "ms"),
            Figure("bare: a call of an actor, median", call * 1000, "ms"),
            Figure("bare: a commit of PostgreSQL, median", commit * 1000, "ms"),
            Figure(f"change to watcher at {CHANGES_PER_S} / s, median", seen * 1000, "ms"),
            Figure("p99", late * 1000, "ms"),
        ],
        [
            Ratio("durable change / (bare call + commit)", change / (call + commit)),
            Ratio("start / (bare call + commit)", start / (call + commit)),
            Ratio("change to watcher / bare call", seen / call),
        ],
        notes=["the change and the start pass through the relay of their node: two calls of actors, and a commit"],
    )


async def _lone(bench: Bench, rounds: int, count: int) -> dict[str, list[float]]:
    place = await bench.place("changes")
    classes: tuple[Any, Any] = ray.remote(Echo), ray.remote(Lone)
    echo = classes[0].options(num_cpus=0).remote()
    lone = classes[1].options(num_cpus=0).remote(place.settings, echo)
    found: dict[str, list[float]] = {"changes": [], "starts": [], "calls": [], "commits": []}
    try:
        assert await lone.prepare.remote(), "the registry names no relay of this node"
        for _ in range(rounds):
            for name, values in (await lone.measure.remote(count)).items():
                found[name] += values
            found["commits"] += commits(place.dsn, count, PAUSE_S)
    finally:
        for one in (lone, echo):
            ray.kill(one)
        await bench.leave(place)
    return found
