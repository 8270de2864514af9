"""What every command shares: where it prints, how it fails, and the options that mean the same everywhere.

Names, causes and messages come from others. All that a command prints passes here, and no character of it commands the
terminal or hides: such characters are shown as JSON escapes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NoReturn

import typer
from pydantic import BaseModel
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.text import Text as RichText

from seedcore.core.errors import InvalidInputError
from seedcore.core.text import shown

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_FOUND = 3
EXIT_CANNOT_KNOW = 4
EXIT_INTERRUPTED = 130

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])?")

# a line break is the layout's, or JSON's
_LAYOUT = "\n"


class Text(RichText):
    """Styled text without such characters, so that it has the width that it will be shown with."""

    def __init__(self, text: str = "", style: str | Style = "", **options: Any) -> None:
        super().__init__(shown(text, _LAYOUT), style, **options)

    def append(self, text: RichText | str, style: str | Style | None = None) -> RichText:
        return super().append(shown(text, _LAYOUT) if isinstance(text, str) else text, style)


class Terminal(Console):
    """A console that prints no such character, also where it is not given as `Text`."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=shown(segment.text, _LAYOUT))


# a pipe has no width to respect: rows stay whole
out = Terminal() if sys.stdout.isatty() else Terminal(width=200)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def echo(text: str, *, err: bool = False) -> None:
    """Print plain text, or JSON, and a line break."""
    typer.echo(shown(text, _LAYOUT), err=err)


def confirm(question: str) -> None:
    """Go on only where the user says so."""
    typer.confirm(shown(question), abort=True, err=True)


def fail(message: str, code: int) -> NoReturn:
    """End the command with one line on stderr."""
    typer.echo(shown(f"seedcore: {message}"), err=True)
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
    echo(answer.model_dump_json(indent=2))
