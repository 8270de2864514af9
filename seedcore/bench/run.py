"""Runs the benchmarks, one after the other, on one Ray cluster and one PostgreSQL."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from seedcore.bench import (
    NAMES,
    ONLY_IF_NAMED,
    callers,
    changes,
    death,
    feed,
    growth,
    http,
    ingest,
    listing,
    memory,
    peers,
    resolve,
    restart,
    starts,
)
from seedcore.bench.environment import Bench, environment
from seedcore.bench.report import Result, show
from seedcore.core.errors import InvalidInputError

_RUNS: tuple[Callable[[Bench], Awaitable[Result]], ...] = (
    ingest.run,
    starts.run,
    resolve.run,
    feed.run,
    changes.run,
    callers.run,
    memory.run,
    death.run,
    restart.run,
    listing.run,
    http.run,
    growth.run,
    peers.run,
)
BENCHMARKS: Mapping[str, Callable[[Bench], Awaitable[Result]]] = dict(zip(NAMES, _RUNS, strict=True))


def run_all(console: Console, names: Sequence[str], *, is_quick: bool, dsn: str | None) -> list[Result]:
    """Run the named benchmarks, or all but those of ONLY_IF_NAMED. Raises InvalidInputError for an unknown name, before
    any benchmark runs."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise InvalidInputError("benchmark", f"must be one of {', '.join(BENCHMARKS)}, not {unknown[0]!r}")
    chosen = [name for name in BENCHMARKS if (name in names if names else name not in ONLY_IF_NAMED)]
    results: list[Result] = []
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("starting Ray and PostgreSQL", total=None)
        with environment(dsn, is_quick) as bench:
            for number, name in enumerate(chosen, 1):
                progress.update(bar, description=f"{name} ({number} of {len(chosen)})")
                began_s = time.monotonic()
                result = replace(asyncio.run(_run(name, bench)), took_s=time.monotonic() - began_s)
                results.append(result)
                show(console, result)
    return results


async def _run(name: str, bench: Bench) -> Result:
    return await BENCHMARKS[name](bench)
