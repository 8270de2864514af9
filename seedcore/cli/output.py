"""What every command shares: where it prints, how it fails, and the options that mean the same everywhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer
from pydantic import BaseModel
from rich.console import Console

from seedcore.core.errors import InvalidInputError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_FOUND = 3
EXIT_CANNOT_KNOW = 4
EXIT_INTERRUPTED = 130

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])?")

# a pipe has no width to respect: rows stay whole
out = Console() if sys.stdout.isatty() else Console(width=200)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def fail(message: str, code: int) -> NoReturn:
    """End the command with one line on stderr."""
    typer.echo(f"seedcore: {message}", err=True)
    sys.exit(code)


def parse_duration(option: str, text: str | None, check: Callable[[float], float | None]) -> float | None:
    """Seconds of `90`, `90s`, `15m`, `1h` or `2d`, None where the option is not given, or InvalidInputError that names
    it. `check` raises InvalidInputError for what is out of bounds."""
    if text is None:
        return None
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise InvalidInputError(option, f"must be a duration like 90s, 15m, 1h or 2d, not {text[:40]!r}")
    try:
        return check(float(found.group(1)) * _UNITS_S[found.group(2) or "s"])
    except InvalidInputError as error:
        raise InvalidInputError(option, error.why) from None


def counted(count: int, thing: str) -> str:
    """How many of a thing, in English."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def print_json(answer: BaseModel) -> None:
    """An answer as the HTTP API says it."""
    typer.echo(answer.model_dump_json(indent=2))
