"""`seedcore token new|check`: tokens for the HTTP API, and the file of their hashes."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from seedcore.cli.errors import EXIT_FAILED
from seedcore.cli.output import JsonOption, Text, echo, out, parse_duration
from seedcore.core.paging import check_within_s
from seedcore.discovery.tokens import Right, TokenFile, new_token

token_app = typer.Typer(name="token", help="Tokens for the HTTP API.", no_args_is_help=True)


class _Granted(StrEnum):
    READ = "read"
    WRITE = "write"


@token_app.command("new")
def token_new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the owner: one word. The history records it.")],
    right: Annotated[_Granted, typer.Option(help="Right of the token; write includes read.")] = _Granted.READ,
    expires: Annotated[str | None, typer.Option(help="Lifetime, such as 12h or 90d. Default: no end.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Create a token. Add the printed line to the file that SEEDCORE_HTTP_TOKENS_FILE names.

    The line goes to stdout (`seedcore token new ci >> tokens`). The token itself is printed to stderr, once: give it to
    its owner.
    """
    lasts_s = parse_duration("--expires", expires, check_within_s)
    ends = None if lasts_s is None else datetime.now(UTC) + timedelta(seconds=lasts_s)
    secret, token = new_token(name, Right[right.name], ends)
    if as_json:
        echo(json.dumps({"token": secret, "line": token.line()}, indent=2))
        return
    echo(token.line())
    echo(f"token of {name}, shown only once: {secret}", err=True)


@token_app.command("check")
def token_check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file for SEEDCORE_HTTP_TOKENS_FILE.")],
    as_json: JsonOption = False,
) -> None:
    """List the tokens of a file and its problems. The exit code is 1 if it has problems or no tokens."""
    found, now = TokenFile(file, log=None), datetime.now(UTC)
    if as_json:
        known = [
            {
                "name": token.name,
                "right": str(token.right),
                "expires_at": None if token.expires_at is None else token.expires_at.isoformat(),
            }
            for token in found.tokens
        ]
        echo(json.dumps({"tokens": known, "problems": found.problems}, indent=2))
    else:
        table = Table("NAME", "RIGHT", "ENDS", box=None, pad_edge=False)
        for token in found.tokens:
            ends = "never" if token.expires_at is None else token.expires_at.isoformat(timespec="seconds")
            is_over = token.expires_at is not None and token.expires_at <= now
            table.add_row(Text(token.name), str(token.right), f"{ends} (it has ended)" if is_over else ends)
        out.print(table)
        for problem in found.problems:
            echo(f"seedcore: {problem}", err=True)
    if found.problems or not found.tokens:
        raise typer.Exit(EXIT_FAILED)
