"""What every command shares: where it prints, how it fails, and the options that mean the same everywhere."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer
from pydantic import BaseModel
from rich.console import Console

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_FOUND = 3
EXIT_CANNOT_KNOW = 4
EXIT_INTERRUPTED = 130

# a pipe has no width to respect: rows stay whole
out = Console() if sys.stdout.isatty() else Console(width=200)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def fail(message: str, code: int) -> NoReturn:
    """End the command with one line on stderr."""
    typer.echo(f"seedcore: {message}", err=True)
    sys.exit(code)


def counted(count: int, thing: str) -> str:
    """How many of a thing, in English."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def print_json(answer: BaseModel) -> None:
    """An answer as the HTTP API says it."""
    typer.echo(answer.model_dump_json(indent=2))
