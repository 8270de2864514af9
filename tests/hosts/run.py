"""Faults of real hosts: three network namespaces with a Ray node each, a database beside them, and a table.

    python -m tests.hosts.run                                  # every fault, about 20 minutes
    python -m tests.hosts.run --only "link of a worker down"   # the faults whose name contains this
    python -m tests.hosts.run --short                          # what CI runs, about 90 seconds
    python -m tests.hosts.run --write docs/reliability.md      # put the table where it belongs

It needs root, and ends with everything that it has started.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psycopg

from seedcore.core.timeouts import end
from tests.hosts import laws
from tests.hosts.faults import VICTIM, Fault, every_fault, short_set
from tests.hosts.host import RayState
from tests.hosts.laws import Absence, Observed
from tests.hosts.records import Row
from tests.hosts.space import missing, own_folder, run_in_own_space
from tests.hosts.world import LEASE_S, NoAnswerError, World, world

logger = logging.getLogger(__name__)

MODULE = "tests.hosts.run"
BEGIN, END = "<!-- hosts: begin -->", "<!-- hosts: end -->"
HEADER = (
    "| fault | false deaths | stale handles | longest outage for callers: agents of that host, others "
    "| calls under way ended within | time to heal | Ray's share |\n|---|---|---|---|---|---|---|"
)
UNMOVED = "none: the node stayed in its table"
_SETTLED_S = 180.0
_LOOK_S = 1.0


@dataclass(frozen=True)
class Outcome:
    """A row of the table, and the laws that were broken."""

    fault: str
    false_deaths: int
    stale: int
    outage_s: float
    others_outage_s: float
    longest_call_s: float
    healed_s: float
    rays_share: str
    problems: list[str]

    @property
    def row(self) -> str:
        cells = [
            self.fault,
            str(self.false_deaths),
            str(self.stale),
            f"{self.outage_s:.1f} s, {self.others_outage_s:.1f} s",
            f"{self.longest_call_s:.1f} s",
            f"{self.healed_s:.1f} s",
            self.rays_share,
        ]
        return f"| {' | '.join(cells)} |"


class Watch:
    """Looks at processes and database continuously: for living processes that were declared dead, and for agents with
    two processes."""

    def __init__(self, it: World) -> None:
        self._it = it
        self._seen: dict[str, Row] = {}
        self._watching: asyncio.Task[None] | None = None
        self.living_dead: dict[str, Row] = {}
        self.doubled_s = 0.0

    async def __aenter__(self) -> Self:
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        await end(self._watching)

    async def _watch(self) -> None:
        before_s = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_S)
            with suppress(psycopg.Error):
                rows = await asyncio.to_thread(self._it.rows)
                living = await asyncio.to_thread(self._it.living)
                dead = laws.living_dead(rows, living)
                # twice: a process whose end was just reported may still be ending
                self.living_dead |= {key: row for key, row in dead.items() if key in self._seen}
                self._seen = dead
                now_s = time.monotonic()
                if laws.doubles(rows, living):
                    self.doubled_s += now_s - before_s
                before_s = now_s


async def broken(it: World, fault: Fault) -> Outcome:
    """Do it, end it, wait until all is settled again, and check the laws."""
    seen = Observed()
    await _collect(it, seen)
    node_of = {node.node_id: node.address for node in seen.nodes if node.is_alive}
    left = [agent_id for agent_id, address in it.fleet.items() if address == it.hosts[VICTIM].address]
    seen.calls, seen.ended = [], []
    async with Watch(it) as watch:
        await it.work(left, fault.work_s)
        began_at = time.time()
        await fault.begin(it)
        await asyncio.sleep(fault.seconds)
        # the caller may not survive its cluster
        await _collect(it, seen)
        has_effect = await fault.has_effect(it, seen.calls)
        await fault.end(it)
        ended_at = time.time()
        healed_s, problem = await _settle(it, seen, fault)
        if problem is None and fault.aftermath_s:
            await asyncio.sleep(fault.aftermath_s)
            again_s, problem = await _settle(it, seen, fault)
            healed_s += fault.aftermath_s + again_s if again_s else 0.0
        # calls that were under way may end later than everything else
        await _await_ends(it, seen)
    settled_at = ended_at + healed_s
    seen.rows = await asyncio.to_thread(it.rows)
    seen.living_dead = watch.living_dead
    false_deaths = laws.false_deaths(seen, _absence(it, fault, node_of, began_at, ended_at))
    stale = laws.stale_handles(seen)
    now = time.time()
    problems = [*false_deaths, *stale, *laws.wrong_handles(seen), *laws.late_ends(seen, now)]
    if not has_effect:
        problems.append("the fault had no effect")
    if problem is not None:
        problems.append(f"not settled: {problem}")
    others = set(it.fleet) - set(left)
    return Outcome(
        fault.name,
        len(false_deaths),
        len(stale),
        laws.longest_outage_s(seen, left, began_at, settled_at),
        laws.longest_outage_s(seen, others, began_at, settled_at),
        max((laws.took_s(one, now) - one.work_s for one in seen.ended), default=0.0),
        healed_s,
        _rays_share(it, seen, watch, began_at, ended_at),
        problems,
    )


def _absence(it: World, fault: Fault, node_of: dict[str, str], began_at: float, ended_at: float) -> Absence | None:
    """The nodes whose agents could not reach the registry, from the fault until their first beat after it: a lease is
    allowed for that. The nodes of a cluster that was replaced never reach it again."""
    if fault.replaces_cluster:
        return Absence(frozenset(node_of), began_at, float("inf"))
    if not fault.unreachable:
        return None
    addresses = {it.hosts[name].address for name in fault.unreachable}
    node_ids = frozenset(node_id for node_id, address in node_of.items() if address in addresses)
    return Absence(node_ids, began_at, ended_at + LEASE_S)


async def _collect(it: World, seen: Observed) -> None:
    calls, ended, nodes = await it.take()
    seen.calls += calls
    seen.ended = [one for one in seen.ended if one.ended_at is not None] + ended
    seen.nodes += nodes


async def _settle(it: World, seen: Observed, fault: Fault) -> tuple[float, str | None]:
    """Wait until a look finds the installation settled: the time until that look, 0 if it is the first, and what is not
    settled. Meanwhile act as an operator: start hosts again, and the caller if it has ended or the cluster is new."""
    began_s = time.monotonic()
    healed_s = 0.0
    problem: str | None = "never asked"
    it.needs_caller |= fault.replaces_cluster
    while problem is not None and time.monotonic() - began_s < _SETTLED_S:
        try:
            await it.supervise()
            if it.needs_caller:
                await it.start_caller()
            look = await it.look()
            rows, living = await asyncio.to_thread(it.rows), await asyncio.to_thread(it.living)
            problem = laws.unsettled(it.fleet, rows, living, look)
        except (NoAnswerError, RuntimeError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            logger.info("%s: not settled: %s", fault.name, problem)
            await asyncio.sleep(_LOOK_S)
            healed_s = time.monotonic() - began_s
    with suppress(NoAnswerError):
        await _collect(it, seen)
    return healed_s, problem


async def _await_ends(it: World, seen: Observed) -> None:
    while any(
        one.ended_at is None and laws.took_s(one, time.time()) < one.work_s + laws.RAYS_BOUND_S for one in seen.ended
    ):
        await asyncio.sleep(_LOOK_S)
        await _collect(it, seen)
        # new ones begin all the time
        if all(laws.took_s(one, time.time()) < _LOOK_S * 3 for one in seen.ended if one.ended_at is None):
            return


def _rays_share(it: World, seen: Observed, watch: Watch, began_at: float, ended_at: float) -> str:
    shares = []
    address_of = {node.node_id: node.address for node in seen.nodes}
    for name, host in it.hosts.items():
        dead = [at for node_id, at in seen.dead_nodes.items() if address_of[node_id] == host.address]
        if dead and min(dead) > began_at:
            what = "head" if name == "head" else "worker"
            shares.append(f"{what} dead in its table after {min(dead) - began_at:.0f} s")
    for one in it.restarts:
        if one.at > began_at:
            what = "ended by itself" if one.state is RayState.ENDED else "ran on"
            shares.append(f"a worker's node {what}, started again {one.at - ended_at:.0f} s after the fault")
    if watch.doubled_s:
        shares.append(f"two processes of one agent for {watch.doubled_s:.0f} s")
    return "; ".join(shares) or UNMOVED


async def every(folder: Path, faults: Iterable[Fault], report: Callable[[Outcome], None]) -> bool:
    """One fault after another, each in an installation of its own unless nothing has moved in the one before. Whether
    all laws were kept."""
    is_lawful = True
    waiting = list(faults)
    while waiting:
        kind = waiting[0].needs_tolerance
        async with world(folder / f"w{len(waiting)}", is_tolerant=kind) as it:
            is_as_new = True
            while waiting and waiting[0].needs_tolerance == kind and is_as_new:
                one = await broken(it, waiting.pop(0))
                report(one)
                is_lawful = is_lawful and not one.problems
                is_as_new = not it.restarts and not one.problems and one.rays_share == UNMOVED
    return is_lawful


def with_rows(text: str, rows: Iterable[str]) -> str:
    """A page with these rows in its table; rows of other faults stay."""
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    by_fault = {_first_cell(row): row for row in [*old.split("\n"), *rows] if row.startswith("| ")}
    table = "\n".join([HEADER, *(by_fault[one.name] for one in every_fault() if one.name in by_fault)])
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _first_cell(row: str) -> str:
    return row.split("|")[1].strip()


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--short", action="store_true", help="only the faults that CI runs")
    parser.add_argument("--only", help="only the faults whose name contains this")
    parser.add_argument("--verbose", action="store_true", help="print what is not settled yet")
    parser.add_argument("--write", type=Path, help="put the rows into the table of this file")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(asctime)s %(message)s")
    folder = own_folder()
    if folder is None:
        why_not = missing()
        if why_not is not None:
            parser.error(why_not)
        return run_in_own_space(MODULE, sys.argv[1:])
    faults = short_set() if options.short else every_fault()
    if options.only is not None:
        faults = [fault for fault in faults if options.only in fault.name]

    def report(one: Outcome) -> None:
        print(one.row, flush=True)
        for problem in one.problems:
            print(f"VIOLATION: {one.fault}: {problem}", flush=True)
        if options.write is not None:
            options.write.write_text(with_rows(options.write.read_text(), [one.row]))

    return 0 if asyncio.run(every(folder, faults, report)) else 1


if __name__ == "__main__":
    sys.exit(main())
