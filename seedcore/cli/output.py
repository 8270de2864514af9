"""The output of every command, its failure, and the options that all commands share.

Names, causes and messages come from other processes. Everything that a command prints goes through this module, which
shows control and invisible characters as JSON escapes.
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

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])?")

# line breaks come from the layout or from JSON
_LAYOUT = "\n"


class Text(RichText):
    """Styled text in which such characters are escaped, so that its width is the width on the terminal."""

    def __init__(self, text: str = "", style: str | Style = "", **options: Any) -> None:
        super().__init__(shown(text, _LAYOUT), style, **options)

    def append(self, text: RichText | str, style: str | Style | None = None) -> RichText:
        return super().append(shown(text, _LAYOUT) if isinstance(text, str) else text, style)


class Terminal(Console):
    """A console that escapes such characters also in what is not `Text`."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=shown(segment.text, _LAYOUT))


# a pipe has no width: rows are not wrapped
out = Terminal() if sys.stdout.isatty() else Terminal(width=200)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def echo(text: str, *, err: bool = False) -> None:
    """Print plain text, or JSON, and a line break."""
    typer.echo(shown(text, _LAYOUT), err=err)


def confirm(question: str) -> None:
    """Ask the user. Raises typer.Abort unless the answer is yes."""
    typer.confirm(shown(question), abort=True, err=True)


def fail(message: str, code: int) -> NoReturn:
    """Print one line on stderr and exit."""
    typer.echo(shown(f"seedcore: {message}"), err=True)
    sys.exit(code)


def parse_duration(option: str, text: str | None, check: Callable[[float], float | None]) -> float | None:
    """Return the seconds of `90`, `90s`, `15m`, `1h` or `2d`; None if the option is not given.

    Raises InvalidInputError with the name of the option. `check` raises it if the duration is out of bounds.
    """
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
    """Return a number and a noun, in the plural if necessary."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def print_json(answer: BaseModel) -> None:
    """Print an answer in the JSON of the HTTP API."""
    echo(answer.model_dump_json(indent=2))
