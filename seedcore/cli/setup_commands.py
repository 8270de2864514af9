"""Commands that set up, check and measure an installation: migrate, doctor, demo, bench.

What they run is imported when they run: Ray and the benchmarks are slow to import, and other commands do not need them.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from seedcore.bench import NAMES, ONLY_IF_NAMED
from seedcore.cli.errors import EXIT_FAILED
from seedcore.cli.output import JsonOption, Terminal, echo, fail, out
from seedcore.core.errors import InvalidInputError, first_line
from seedcore.settings import load_settings


def migrate_command(
    role: Annotated[
        str | None,
        typer.Option("--grant", metavar="ROLE", help="Grant this role what a registry needs. Create it if necessary."),
    ] = None,
    password_file: Annotated[
        Path | None,
        typer.Option(help="Password of the role. Default: unchanged; a new role has none (certificate login)."),
    ] = None,
    end_old_calls: Annotated[
        bool,
        typer.Option("--end-old-calls", help="Then drop the functions kept for clients of an adopted database."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring the database's schema up to date, or adopt a database of the earlier SeedCore. Run as the owner."""
    from seedcore.cli.cluster import require_no_url
    from seedcore.composition import store_recipe

    if password_file is not None and role is None:
        raise InvalidInputError("--password-file", "needs --grant")
    password = None if password_file is None else _secret_of(password_file)
    settings = load_settings()
    if settings.pg_dsn is None:
        # the embedded database of this machine is not the deployment's
        require_no_url(settings)
    recipe = store_recipe(settings)
    if role is not None:
        asyncio.run(recipe.check_grant(role, with_password=password is not None))
    applied = asyncio.run(recipe.migrate(partial(echo, err=as_json)))
    if end_old_calls and asyncio.run(recipe.end_old_calls()):
        echo("the functions for old clients are dropped", err=as_json)
    if role is not None:
        is_new = asyncio.run(recipe.grant(role, password))
        echo(f"role {role} {'is created and ' if is_new else ''}has what a registry needs", err=as_json)
    if as_json:
        echo(json.dumps({"applied": applied}))
        return
    for name in applied:
        echo(f"applied {name}")
    echo("the schema is up to date")


def doctor_command(as_json: JsonOption = False) -> None:
    """Check configuration, Ray, registry, versions, PostgreSQL, schema and clocks. Exit code 1 if a check failed."""
    from seedcore.cli.doctor import examine
    from seedcore.cli.findings import Grade, show_findings

    findings = examine()
    if as_json:
        echo(json.dumps([asdict(finding) for finding in findings], indent=2, default=str))
    else:
        show_findings(findings)
    if any(finding.grade is Grade.FAILED for finding in findings):
        raise typer.Exit(EXIT_FAILED)


def demo_command(
    agents: Annotated[int, typer.Option(min=4, max=50, help="Number of agents.")] = 6,
    down: Annotated[bool, typer.Option("--down", help="Stop the agents of the demo instead.")] = False,
) -> None:
    """Start a small real fleet: its agents register, are resolved, drain and die."""
    from seedcore.cli import demo

    settings = load_settings()
    asyncio.run(demo.take_down(settings, out) if down else demo.run(settings, out, agents))


def bench_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(help=f"Any of {', '.join(NAMES)}. Default: all but {', '.join(sorted(ONLY_IF_NAMED))}."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, in about two minutes. The promises do not apply.")
    ] = False,
    with_json: JsonOption = False,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios to this file (.png, .svg, .pdf).")] = None,
    dsn: Annotated[
        str | None, typer.Option(help="PostgreSQL to create databases in. Default: an embedded server.")
    ] = None,
) -> None:
    """Measure on this machine, each figure beside a baseline of the same run. Starts its own Ray and PostgreSQL.

    `peers` does the same work on etcd, if the program `etcd` is found, on a server of its own.

    Exit code 1 if a ratio breaks the project's promise, except with --quick.
    """
    from seedcore.bench.environment import machine
    from seedcore.bench.report import as_json, require_plot, write_plot
    from seedcore.bench.run import run_all

    if plot is not None:
        require_plot()
    # Ray prints what becomes of its workers
    with redirect_stdout(sys.stderr) if with_json else nullcontext():
        results = run_all(Terminal(stderr=True) if with_json else out, names or [], is_quick=quick, dsn=dsn)
    figures = as_json(results, machine())
    if with_json:
        echo(figures)
    if output is not None:
        output.write_text(f"{figures}\n")
    if plot is not None:
        write_plot(plot, results)
    broken = [f"{result.name}: {ratio.name}" for result in results for ratio in result.ratios if not ratio.holds]
    if broken and not quick:
        fail(f"not as promised: {'; '.join(broken)}", EXIT_FAILED)


def _secret_of(file: Path) -> str:
    try:
        secret = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError("--password-file", f"{file} cannot be read: {first_line(error)}") from None
    if not secret:
        raise InvalidInputError("--password-file", f"{file} is empty")
    return secret
