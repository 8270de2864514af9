"""Runs of faults on real processes, drawn from seeds, each checked against the laws of `installation.py`.

    python -m tests.faults.chaos --seed 17          # one run, with what happens in it
    python -m tests.faults.chaos --runs 100         # many, one after another in one installation

A run breaks one to three things at once, or after one another, lets agents change their status meanwhile, mends
everything, waits until all is as it shall be, and looks for what never may have happened: a living agent declared
dead, a dead one that is not, an acknowledged change lost, repeated or out of order, life after death, a caller of an
untouched agent refused. The calls of all clients are recorded, and checked too (see `histories.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from ray.exceptions import RayError

from seedcore.core.errors import RegistryError
from seedcore.core.lifecycle import Status
from tests.faults.breakages import WEIGHTS, Breakage
from tests.faults.installation import Calls, Installation, Watch, in_own_environment, installed
from tests.faults.rounds import Round

BEAT_S = 1.0
LEASE_S = 8.0
TURNS = 12


@dataclass(frozen=True)
class Run:
    """One run: what was broken and what came of it."""

    seed: int
    faults: list[str]
    turns: int
    durable: int
    settled_s: float
    calls: Calls
    http: Calls
    problems: list[str]


async def run(it: Installation, seed: int, into: Path | None = None) -> Run:
    """Break, mend, wait, look. `into` keeps the history of the calls."""
    chance = random.Random(seed)
    count = chance.choices([1, 2, 3], [5, 4, 1])[0]
    makers = chance.choices(list(WEIGHTS), list(WEIGHTS.values()), k=count)
    # each once: what is stopped twice would go on too early
    faults = [maker(it, chance) for maker in dict.fromkeys(makers)]
    await it.caller.take.remote()
    it.take_http()
    problems: list[str] = []
    async with Watch(it.rows) as watch, Round(it, "chaos", seed, into) as history:
        changes = asyncio.create_task(_turn(it, chance))
        for outcome in await asyncio.gather(*(_inflict(fault, chance) for fault in faults), return_exceptions=True):
            if isinstance(outcome, BaseException):
                problems.append(f"the fault itself failed: {outcome!r}")
        turns, durable = await changes
        problems += await _mend(it)
        settled_s, problem = await it.settle()
        problems += await history.finish()
    if problem is not None:
        problems.append(f"not settled after {settled_s:.0f} s: {problem}")
    at_the_end = it.violations()
    problems += [text for text in watch.found.values() if text not in at_the_end]
    problems += at_the_end
    calls: Calls = await it.caller.take.remote()
    problems += [f"a caller was refused {times} times: {what}" for what, times in calls.failed.items()]
    return Run(seed, [fault.name for fault in faults], turns, durable, settled_s, calls, it.take_http(), problems)


async def _inflict(fault: Breakage, chance: random.Random) -> None:
    await asyncio.sleep(chance.uniform(0.0, 2.0))
    await fault.begin()
    try:
        await asyncio.sleep(chance.uniform(0.5, 5.0))
    finally:
        await fault.end()


async def _turn(it: Installation, chance: random.Random) -> tuple[int, int]:
    """Agents drain and return; how often they were asked to, and how often it was durable at once."""
    status = dict.fromkeys([*it.restarting, *it.mortal], Status.ALIVE)
    turns, durable = 0, 0
    for _ in range(TURNS):
        name = chance.choice(list(status))
        wanted = Status.ALIVE if status[name] is Status.DRAINING else Status.DRAINING
        turns += 1
        try:
            receipt = await it.say(name, wanted, f"turn {turns}")
        except (TimeoutError, RayError, RegistryError):
            continue
        status[name] = wanted
        durable += receipt is not None and receipt.durable
        await asyncio.sleep(chance.uniform(0.0, 0.5))
    return turns, durable


async def _mend(it: Installation) -> list[str]:
    """Agents that ended for good are made again, and the whole fleet takes work."""
    ends_s = time.monotonic() + 60
    problem = ""
    while time.monotonic() < ends_s:
        try:
            await it.man()
            for name in it.fleet:
                if (await it.account_of(name)).status is not Status.ALIVE:
                    await it.say(name, Status.ALIVE, "all is mended")
        except (TimeoutError, RayError, RegistryError, RuntimeError) as error:
            problem = f"the fleet could not be made again: {error!r}"
            await asyncio.sleep(0.5)
        else:
            return []
    return [problem]


@dataclass(frozen=True)
class Summary:
    """What many runs came to."""

    runs: int
    with_a_violation: int
    minutes: float
    faults: dict[str, int]
    totals: dict[str, int]
    deaths_by_cause: dict[str, int]


async def many(folder: Path, seeds: range, into: Path | None) -> Summary:
    """Run each seed. `into` keeps their histories."""
    broken: list[Run] = []
    done = 0
    faults: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    began_s = time.monotonic()
    async with installed(
        folder, BEAT_S, LEASE_S, flush_interval_s=0.3, durable_wait_s=1.0, call_timeout_s=2.0, probe_timeout_s=1.0
    ) as it:
        await it.settle()
        for seed in seeds:
            one = await run(it, seed, into)
            done += 1
            faults.update(one.faults)
            totals.update(turns=one.turns, durable=one.durable, calls=one.calls.asked, http=one.http.asked)
            print(
                f"seed {seed}: {', '.join(one.faults)}; settled in {one.settled_s:.1f} s; {one.durable}/{one.turns} "
                f"durable at once; calls {dict(one.calls.answered)}, slowest {one.calls.slowest_s:.1f} s; "
                f"HTTP {dict(one.http.answered)} failed {dict(one.http.failed)}",
                flush=True,
            )
            for problem in one.problems:
                print(f"seed {seed} VIOLATION: {problem}", flush=True)
            if one.problems:
                broken.append(one)
                if any("not settled" in problem for problem in one.problems):
                    print("what follows would only repeat it", flush=True)
                    break
                it.said.clear()
        dead = Counter(str(row.cause) for row in it.rows() if row.stopped_at)
    return Summary(
        done, len(broken), round((time.monotonic() - began_s) / 60, 1), dict(faults), dict(totals), dict(dead)
    )


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="one run")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--histories", type=Path, metavar="FOLDER", help="where to keep the histories of the calls")
    parser.add_argument("--report", type=Path, help="where to write the summary, as JSON")
    options = parser.parse_args()
    folder = in_own_environment("tests.faults.chaos")
    seeds = (
        range(options.seed, options.seed + 1)
        if options.seed is not None
        else range(options.first, options.first + options.runs)
    )
    if options.histories is not None:
        options.histories.mkdir(parents=True, exist_ok=True)
    summary = asyncio.run(many(folder, seeds, options.histories))
    text = json.dumps(asdict(summary), indent=2)
    print(text)
    if options.report is not None:
        options.report.write_text(text)
    return 1 if summary.with_a_violation else 0


if __name__ == "__main__":
    sys.exit(main())
