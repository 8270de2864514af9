"""A minute without PostgreSQL, the registry, Serve or Ray's table (GCS), and without each two of them: a table.

    python -m tests.faults.outages                                  # all ten, about 15 minutes
    python -m tests.faults.outages --seconds 20 --only registry+gcs
    python -m tests.faults.outages --write docs/reliability.md      # put the table where it belongs

In the middle of each outage one agent is killed. Counted are living agents declared dead, what callers of living agents
got, and how long after the end of the outage the database has the death.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ray.exceptions import RayError

from seedcore.core.errors import RegistryError
from seedcore.core.lifecycle import Status
from tests.faults.breakages import GcsKilled, Maker, PostgresKilled, RegistryAway, ServeStopped
from tests.faults.installation import Calls, Installation, Watch, in_own_environment, installed
from tests.faults.rounds import Round

BEAT_S = 5.0
LEASE_S = 15.0
VICTIM = "near-1"
PARTS: dict[str, Maker] = {
    "PostgreSQL": PostgresKilled,
    "registry": RegistryAway,
    "Serve": ServeStopped,
    "GCS": GcsKilled,
}
BEGIN, END = "<!-- outages: begin -->", "<!-- outages: end -->"
_REPORTED_S = 10.0


@dataclass(frozen=True)
class Outage:
    """What one outage came to. `reported_s`: from its end to the death in the database; at most 0 where that came
    before the end."""

    away: tuple[str, ...]
    calls: Calls
    http: Calls
    reported_s: float
    settled_s: float
    problems: list[str]

    @property
    def row(self) -> str:
        false_deaths = sum(problem.startswith("false death") for problem in self.problems)
        reported = "before the end" if self.reported_s <= 0 else f"{self.reported_s:.1f} s"
        cells = [
            " and ".join(self.away),
            str(false_deaths),
            f"{sum(self.calls.answered.values())} of {self.calls.asked}: {_shown(self.calls)}",
            f"{self.calls.slowest_s:.1f} s",
            f"{sum(self.http.answered.values())} of {self.http.asked}: {_shown(self.http) or 'none'}",
            reported,
            f"{self.settled_s:.1f} s",
        ]
        return f"| {' | '.join(cells)} |"


HEADER = (
    "| away | false deaths | resolved and called | slowest | answered over HTTP | death in the database, after the end "
    "| all settled |\n|---|---|---|---|---|---|---|"
)


async def outage(
    it: Installation, away: tuple[str, ...], seconds: float, number: int = 0, into: Path | None = None
) -> Outage:
    """Take parts away for so long, kill an agent meanwhile, give them back, and look."""
    chance = random.Random(0)
    faults = [PARTS[part](it, chance) for part in away]
    victim = await it.account_of(VICTIM)
    await it.caller.take.remote()
    it.take_http()
    async with Watch(it.rows) as watch, Round(it, "outage", number, into) as history:
        for fault in faults:
            await fault.begin()
        await asyncio.sleep(seconds / 2)
        os.kill(victim.pid, signal.SIGKILL)
        await asyncio.sleep(seconds / 2)
        calls: Calls = await it.caller.take.remote()
        http = it.take_http()
        for fault in reversed(faults):
            await fault.end()
        ended_s = time.monotonic()
        problems = [f"a caller was refused {times} times: {what}" for what, times in calls.failed.items()]
        reported_s = await _reported(it, victim.instance_id, ended_s)
        if reported_s > _REPORTED_S:
            problems.append(f"the death was in the database {reported_s:.0f} s after the end")
        await _man(it)
        settled_s, problem = await it.settle()
        if problem is not None:
            problems.append(f"not settled: {problem}")
        problems += await history.finish()
    at_the_end = it.violations()
    problems += [text for text in watch.found.values() if text not in at_the_end]
    problems += at_the_end
    return Outage(away, calls, http, reported_s, settled_s, problems)


async def _reported(it: Installation, instance_id: str, ended_s: float) -> float:
    while True:
        dead = await asyncio.to_thread(
            it.query,
            "select extract(epoch from clock_timestamp() - stopped_at)::float8 from registry_instance"
            " where instance_id = %s::uuid and status = 'dead'",
            instance_id,
        )
        now_s = time.monotonic() - ended_s
        if dead or now_s > 90:
            return now_s - float(dead[0][0]) if dead else now_s
        await asyncio.sleep(0.1)


async def _man(it: Installation) -> None:
    ends_s = time.monotonic() + 60
    while True:
        try:
            await it.man()
            if (await it.account_of(VICTIM)).status is Status.ALIVE:
                return
        except (TimeoutError, RayError, RegistryError, RuntimeError):
            if time.monotonic() > ends_s:
                raise
        await asyncio.sleep(0.5)


async def matrix(folder: Path, wanted: list[tuple[str, ...]], seconds: float, into: Path | None) -> list[Outage]:
    """Each outage, one after another in one installation. `into` keeps the histories of the calls."""
    found = []
    async with installed(folder, BEAT_S, LEASE_S, flush_interval_s=1.0) as it:
        await it.settle()
        print(HEADER, flush=True)
        for number, away in enumerate(wanted):
            one = await outage(it, away, seconds, number, into)
            found.append(one)
            print(one.row, flush=True)
            for problem in one.problems:
                print(f"VIOLATION: {' and '.join(away)}: {problem}", flush=True)
    return found


def _shown(calls: Calls) -> str:
    return ", ".join(f"{count} {source}" for source, count in calls.answered.most_common())


def _combinations() -> list[tuple[str, ...]]:
    return [(part,) for part in PARTS] + list(itertools.combinations(PARTS, 2))


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.outages", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each outage")
    parser.add_argument("--only", help="such as registry+gcs")
    parser.add_argument("--histories", type=Path, metavar="FOLDER", help="where to keep the histories of the calls")
    parser.add_argument("--write", type=Path, help="replace the table in this file")
    options = parser.parse_args()
    wanted = _combinations()
    if options.only is not None:
        asked = {part.lower() for part in options.only.split("+")}
        wanted = [away for away in wanted if {part.lower() for part in away} == asked]
        if not wanted:
            parser.error(f"--only takes one or two of {', '.join(PARTS)}, joined by +")
    folder = in_own_environment("tests.faults.outages")
    if options.histories is not None:
        options.histories.mkdir(parents=True, exist_ok=True)
    found = asyncio.run(matrix(folder, wanted, options.seconds, options.histories))
    if options.write is not None:
        text = options.write.read_text()
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        table = "\n".join([HEADER, *(one.row for one in found)])
        options.write.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
    return 1 if any(one.problems for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
