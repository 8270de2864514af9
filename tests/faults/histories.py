"""Checks recorded histories, and records short ones.

    python -m tests.faults.histories FILE...                          # check histories, or folders of them, again
    python -m tests.faults.histories --record 1000 --into FOLDER      # record with PostgreSQL and no Ray, then check
    python -m tests.faults.histories --record 1 --first 17 --into FOLDER

`tests.faults.chaos` and `tests.faults.outages` record theirs with `--histories FOLDER`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.history import History, Source
from tests.faults.instance_model import check_instances
from tests.faults.linearizability import UndecidedError
from tests.faults.local_histories import stages
from tests.faults.sessions import BOUNDS_S, check_sessions
from tests.servers import embedded_binaries, running_server

STAGES = 4


@dataclass(frozen=True, slots=True)
class Report:
    """What the check of one history came to."""

    name: str
    violations: tuple[str, ...]
    counts: Counter[str]


def check_history(history: History) -> Report:
    """Check a history: its instances, and the sessions of its readers."""
    counts: Counter[str] = Counter(
        {
            "histories": 1,
            "calls": len(history.calls),
            "writes": sum(call.is_write for call in history.calls),
            "durable": sum(call.is_write and call.is_durable for call in history.calls),
            "unknown": sum(call.is_write and call.outcome == "unknown" for call in history.calls),
            "reads": sum(call.source in BOUNDS_S for call in history.calls),
            "copies": sum(call.source is Source.SNAPSHOT for call in history.calls),
        }
    )
    violations = check_sessions(history)
    try:
        checked = check_instances(history)
    except UndecidedError as error:
        violations.append(f"undecided: {error}")
    else:
        violations += checked.violations
        counts.update(instances=checked.instances, operations=checked.operations, skipped=checked.skipped)
    return Report(f"{history.harness}-{history.seed}", tuple(violations), counts)


def _files(named: Iterable[Path]) -> Iterator[Path]:
    for path in named:
        if path.is_dir():
            yield from sorted(path.glob("*.jsonl"))
        else:
            yield path


def file_of(folder: Path, history: History) -> Path:
    """Where a history is written."""
    return folder / f"{history.harness}-{history.seed:05d}.jsonl"


async def record(folder: Path, seeds: Iterable[int]) -> list[Path]:
    """Record the histories of these seeds, several at a time."""
    left = iter(seeds)
    written: list[Path] = []
    with running_server(embedded_binaries()) as server, stages(server, STAGES) as made:

        async def work(number: int) -> None:
            for seed in left:
                history = await made[number].history(seed)
                file = file_of(folder, history)
                history.write(file)
                written.append(file)

        await asyncio.gather(*(work(number) for number in range(len(made))))
    return sorted(written)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.histories", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="histories, or folders of them")
    parser.add_argument("--record", type=int, metavar="COUNT", help="record so many first")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--into", type=Path, default=Path("histories"), help="the folder for what is recorded")
    options = parser.parse_args()
    files = list(_files(options.files))
    began_s = time.monotonic()
    if options.record is not None:
        options.into.mkdir(parents=True, exist_ok=True)
        files += asyncio.run(record(options.into, range(options.first, options.first + options.record)))
        print(f"recorded in {time.monotonic() - began_s:.0f} s", flush=True)
    began_s = time.monotonic()
    counts: Counter[str] = Counter()
    broken = 0
    for file in files:
        report = check_history(History.read(file))
        counts += report.counts
        broken += bool(report.violations)
        for violation in report.violations:
            print(f"{file}: VIOLATION: {violation}", flush=True)
    print(f"{dict(counts)}; {broken} with a violation; checked in {time.monotonic() - began_s:.0f} s")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
