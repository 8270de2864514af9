"""`seedcore bench`: runs the benchmarks and reports which ratios hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seedcore.bench import NAMES
from seedcore.cli.errors import EXIT_FAILED
from seedcore.cli.output import fail, out


def bench_command(
    names: Annotated[list[str] | None, typer.Argument(help=f"Any of {', '.join(NAMES)}. Default: all.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, in less than a minute. The promises do not apply.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios to this file (.png, .svg, .pdf).")] = None,
    dsn: Annotated[
        str | None, typer.Option(help="PostgreSQL to create databases in. Default: an embedded server.")
    ] = None,
) -> None:
    """Measure on this machine, each figure beside a baseline of the same run. Starts its own Ray and PostgreSQL.

    Exit code 1 if a ratio breaks the project's promise, except with --quick.
    """
    # slow to import, and no other command needs it
    from seedcore.bench.environment import machine
    from seedcore.bench.report import require_plot, write_json, write_plot
    from seedcore.bench.run import run_all

    if plot is not None:
        require_plot()
    results = run_all(out, names or [], is_quick=quick, dsn=dsn)
    if json_file is not None:
        write_json(json_file, results, machine())
    if plot is not None:
        write_plot(plot, results)
    broken = [f"{result.name}: {ratio.name}" for result in results for ratio in result.ratios if not ratio.holds]
    if broken and not quick:
        fail(f"not as promised: {'; '.join(broken)}", EXIT_FAILED)
