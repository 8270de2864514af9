"""Dumps and restores, by the server's own programs."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.servers import PostgresServer


def run(server: PostgresServer, program: str, *arguments: str) -> None:
    subprocess.run([server.binaries / program, *arguments], check=True, capture_output=True, timeout=60)


def dump(server: PostgresServer, dsn: str, file: Path, form: str) -> None:
    """As in docs/how-to/backup.md; `form` is plain or custom."""
    run(server, "pg_dump", f"--format={form}", "--no-owner", "--no-privileges", f"--file={file}", dsn)


def restore(server: PostgresServer, dsn: str, file: Path, form: str) -> None:
    """As in docs/how-to/backup.md."""
    if form == "custom":
        options = ("--no-owner", "--no-privileges", "--exit-on-error", "--single-transaction")
        run(server, "pg_restore", *options, f"--dbname={dsn}", str(file))
    else:
        run(server, "psql", "--quiet", "--set=ON_ERROR_STOP=1", "--single-transaction", f"--file={file}", dsn)


def dump_and_restore(server: PostgresServer, before: str, after: str, folder: Path, form: str) -> None:
    """From one database of the server to another."""
    file = folder / "seedcore.dump"
    dump(server, server.dsn(before), file, form)
    restore(server, server.dsn(after), file, form)
