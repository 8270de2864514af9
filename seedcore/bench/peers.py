"""SeedCore beside etcd: the same work on both, in turn, on this machine. Figures only: nothing is promised.

etcd is a server of one member that the benchmark starts. Without a program `etcd` there is nothing to compare with.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import ray

from seedcore.agents import RayAgent
from seedcore.bench.death import deaths
from seedcore.bench.environment import Bench, percentile
from seedcore.bench.etcd import Etcd, EtcdClient, etcd_program, running_etcd
from seedcore.bench.feed import paced, watched_delays
from seedcore.bench.ingest import IDS_PER_CALL, registered
from seedcore.bench.listing import Echo
from seedcore.bench.peer_sides import HELD, WATCHED, EtcdHolder, EtcdSide, EtcdWatcher, SeedCoreSide, key_of, sent
from seedcore.bench.report import Figure, Ratio, Result

CHANGES_PER_S = 200
NAMED = "peers-named"
_RUNS = {"floor": 100, "change": 60, "look-up": 100, "listing": 1, "renewal": 1}
_OURS = ("hit", "renewal without relay")
_WATCHED_AGENTS = 1000
_HELD_LEASES_FROM = 1_000_000
_PATIENCE_S = 60.0

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Size:
    """How much is measured: the agents of a listing and of a renewal, the rounds, the seconds of changes in each of
    them, the holders that are killed on each side, and the lease of a holder in etcd (seconds)."""

    agents: int
    renewed: int
    rounds: int
    watch_s: float
    kills: int
    lease_s: int


FULL = Size(agents=20_000, renewed=10_000, rounds=5, watch_s=6.0, kills=10, lease_s=15)
QUICK = Size(agents=5_000, renewed=1_000, rounds=1, watch_s=2.0, kills=2, lease_s=3)


async def run(bench: Bench) -> Result:
    """Measure both in turn, or note that there is no etcd."""
    program = etcd_program()
    if program is None:
        return Result("peers", [], notes=["no program `etcd` is found here: nothing to compare with"])
    size = QUICK if bench.is_quick else FULL
    with running_etcd(program) as etcd:
        ours, theirs = await _rounds(bench, etcd, size)
        ours["death"], theirs["death"] = await _our_deaths(bench, size), await _their_deaths(etcd, size)
    return _result(ours, theirs, etcd, size)


async def _rounds(bench: Bench, etcd: Etcd, size: Size) -> tuple[Samples, Samples]:
    """Every work on both sides in each round. The side that begins alternates."""
    ours: Samples = {work: [] for work in (*_RUNS, *_OURS, "watch")}
    theirs: Samples = {work: [] for work in (*_RUNS, "watch")}
    async with _sides(bench, etcd, size) as (our_side, their_side, row):
        for turn in range(size.rounds):
            sides = [(our_side, ours), (their_side, theirs)]
            for work, count in _RUNS.items():
                for side, found in sides if turn % 2 == 0 else sides[::-1]:
                    found[work] += await side.run.remote(work, count)
            for work in _OURS:
                ours[work] += await our_side.run.remote(work, 1)
            for _, found in sides if turn % 2 == 0 else sides[::-1]:
                found["watch"] += (
                    await _our_delays(bench, size.watch_s)
                    if found is ours
                    else await _their_delays(etcd, size.watch_s, row)
                )
    return ours, theirs


@asynccontextmanager
async def _sides(bench: Bench, etcd: Etcd, size: Size) -> AsyncIterator[tuple[Any, Any, bytes]]:
    """Both sides, each in a process of its own and with the same agents, and one of these as JSON."""
    dsn = bench.new_database()
    ids = await registered(dsn, size.agents)
    place = await bench.place("peers", dsn, lease_s=3600.0)
    try:
        with _processes() as start:
            agent = start(RayAgent, NAMED, settings=place.settings, name=NAMED, namespace=place.namespace)
            await agent.start.remote()
            ours = start(SeedCoreSide, place.settings, start(Echo), NAMED, ids[: size.renewed], size.agents)
            theirs = start(EtcdSide, etcd.address)
            rows = await ours.start.remote()
            await theirs.start.remote(rows, size.renewed)
            for work in _RUNS:  # warm
                await asyncio.gather(*(side.run.remote(work, 1) for side in (ours, theirs)))
            yield ours, theirs, rows[0]
    finally:
        await bench.leave(place)


async def _our_delays(bench: Bench, seconds: float) -> list[float]:
    """The delays of changes that go straight to a registry of their own, from this process to a watcher in another."""
    return (await watched_delays(bench, CHANGES_PER_S, seconds, _WATCHED_AGENTS)).delays_s


async def _their_delays(etcd: Etcd, seconds: float, row: bytes) -> list[float]:
    """The delays of changes at the same rate, from this process to a watcher in another one."""
    client = EtcdClient(etcd.address)
    try:
        with _processes() as start:
            watcher = start(EtcdWatcher, etcd.address)
            await watcher.start.remote(WATCHED)

            async def send(numbers: range) -> None:
                keys = (key_of(WATCHED, number % _WATCHED_AGENTS) for number in numbers)
                await asyncio.gather(*(client.put(key, sent(row)) for key in keys))

            changes, _ = await paced(CHANGES_PER_S, seconds, _WATCHED_AGENTS, send)
            delays_s: list[float] = await watcher.delays.remote(changes, _PATIENCE_S)
            return delays_s
    finally:
        await client.close()


async def _our_deaths(bench: Bench, size: Size) -> list[float]:
    place = await bench.place("peers-death")
    try:
        found_s, _ = await deaths(place.settings, size.kills)
        return found_s
    finally:
        await bench.leave(place)


async def _their_deaths(etcd: Etcd, size: Size) -> list[float]:
    """Kill holders at any time since their last renewal. The seconds from each kill to the end of its key."""
    with _processes() as start:
        watcher = start(EtcdWatcher, etcd.address)
        await watcher.start.remote(HELD)
        holders = [start(EtcdHolder) for _ in range(size.kills)]
        pids = await asyncio.gather(
            *(
                holder.start.remote(etcd.address, number, size.lease_s, _HELD_LEASES_FROM + number)
                for number, holder in enumerate(holders)
            )
        )
        # by now all have renewed their leases
        await asyncio.sleep(size.lease_s / 2)
        killed_at = []
        for pid in pids:
            await asyncio.sleep(random.uniform(0, 2 * size.lease_s / 3 / size.kills))
            killed_at.append(time.time())
            os.kill(pid, signal.SIGKILL)
        keys = [key_of(HELD, number) for number in range(size.kills)]
        gone_at: list[float] = await watcher.gone.remote(keys, size.lease_s + _PATIENCE_S)
    found_s = [gone - killed for gone, killed in zip(gone_at, killed_at, strict=True)]
    assert min(found_s) > 0, "a lease has ended before its holder"
    return found_s


@contextmanager
def _processes() -> Iterator[Callable[..., Any]]:
    """Starts actors, which end with the context. `name` and `namespace` are the actor's, the rest are its arguments."""
    started: list[Any] = []

    def start(
        kind: type[Any], *args: object, name: str | None = None, namespace: str | None = None, **details: object
    ) -> Any:
        actor_class: Any = ray.remote(kind)
        started.append(actor_class.options(num_cpus=0, name=name, namespace=namespace).remote(*args, **details))
        return started[-1]

    try:
        yield start
    finally:
        for one in started:
            ray.kill(one)


def _result(ours: Samples, theirs: Samples, etcd: Etcd, size: Size) -> Result:
    figures: list[Figure] = []
    ratios: list[Ratio] = []

    def compare(name: str, mine_s: float, other_s: float, factor: float, unit: str) -> None:
        figures.append(Figure(f"{name}: SeedCore", mine_s * factor, unit))
        figures.append(Figure(f"{name}: etcd", other_s * factor, unit))
        ratios.append(Ratio(f"{name}: SeedCore / etcd", mine_s / other_s))

    def medians(work: str) -> tuple[float, float]:
        return median(ours[work]), median(theirs[work])

    compare("bare: a call that does nothing", *medians("floor"), 1e3, "ms")
    compare("a lone durable change", *medians("change"), 1e3, "ms")
    watched = f"change to watcher at {CHANGES_PER_S} / s"
    compare(watched, *medians("watch"), 1e3, "ms")
    compare(f"{watched}, p99", percentile(ours["watch"], 0.99), percentile(theirs["watch"], 0.99), 1e3, "ms")
    compare("a look-up of one agent", *medians("look-up"), 1e3, "ms")
    hit_s = median(ours["hit"])
    figures.append(Figure("a look-up of one agent: SeedCore's cache", hit_s * 1e6, "us"))
    ratios.append(Ratio("a look-up of one agent: SeedCore's cache / etcd", hit_s / median(theirs["look-up"])))
    compare(f"all {size.agents:,} agents listed", *medians("listing"), 1.0, "s")
    renewals, direct_s = f"{size.renewed:,} agents renewed once", median(ours["renewal without relay"])
    compare(renewals, *medians("renewal"), 1e3, "ms")
    figures.append(Figure(f"{renewals}: SeedCore without the relay", direct_s * 1e3, "ms"))
    ratios.append(Ratio(f"{renewals}: SeedCore without the relay / etcd", direct_s / median(theirs["renewal"])))
    compare("from SIGKILL to gone for another process", *medians("death"), 1.0, "s")
    return Result(
        "peers",
        figures,
        ratios,
        notes=[
            "medians; below 1 x SeedCore takes less time",
            f"etcd {etcd.version}, one member, called by gRPC from Python; both sync writes to this machine's disk",
            "a lone change and the renewals of SeedCore pass through the relay, which gathers renewals for 0.25 s",
            "SeedCore's watchers get a change before its commit, etcd's after it",
            f"SeedCore renews {IDS_PER_CALL:,} agents per message, and commits within a second; etcd gets one message "
            "per lease in a stream, and keeps renewals in memory",
            f"SeedCore's relay sees a process end; etcd waits for the end of the lease, here of {size.lease_s} s",
        ],
    )
