"""`seedcore token new`: secrets for callers of the HTTP API."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import Annotated

import typer

from seedcore.cli.output import JsonOption, parse_duration
from seedcore.core.paging import check_within_s
from seedcore.discovery.access import Right, new_token

token_app = typer.Typer(help="Tokens for the HTTP API.", no_args_is_help=True)


class _Granted(str, Enum):
    READ = "read"
    WRITE = "write"


@token_app.command("new")
def token_new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is: one word, kept in the history.")],
    right: Annotated[_Granted, typer.Option(help="What it allows; write has read in it.")] = _Granted.READ,
    expires: Annotated[str | None, typer.Option(help="It ends after 12h, 90d; default: never.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token. The secret is shown once, for its owner; the line goes into SEEDCORE_HTTP_TOKENS_FILE.

    The line alone is on stdout: `seedcore token new ci >> tokens`.
    """
    lasts_s = parse_duration("--expires", expires, check_within_s)
    ends = None if lasts_s is None else datetime.now(timezone.utc) + timedelta(seconds=lasts_s)
    secret, token = new_token(name, Right[right.name], ends)
    if as_json:
        typer.echo(json.dumps({"token": secret, "line": token.line()}, indent=2))
        return
    typer.echo(token.line())
    typer.echo(f"token of {name}, shown this once: {secret}", err=True)
