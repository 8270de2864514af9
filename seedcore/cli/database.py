"""`seedcore migrate`: the schema of the database, and the rights of the registry's role."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from seedcore.cli.cluster import require_no_url
from seedcore.cli.output import JsonOption, echo
from seedcore.composition import store_recipe
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


def _secret_of(file: Path) -> str:
    try:
        secret = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError("--password-file", f"{file} cannot be read: {first_line(error)}") from None
    if not secret:
        raise InvalidInputError("--password-file", f"{file} is empty")
    return secret
