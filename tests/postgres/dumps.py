"""Dumps and restores, by the server's own programs."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.servers import PostgresServer


def run(server: PostgresServer, program: str, *arguments: str) -> None:
    subprocess.run([server.binaries / program, *arguments], check=True, capture_output=True, timeout=60)


def dump_and_restore(server: PostgresServer, before: str, after: str, folder: Path, form: str) -> None:
    """As docs/how-to/backup.md says."""
    file = str(folder / "seedcore.dump")
    if form == "custom":
        run(server, "pg_dump", "--format=custom", "--no-owner", f"--file={file}", server.dsn(before))
        options = ("--no-owner", "--exit-on-error", "--single-transaction")
        run(server, "pg_restore", *options, f"--dbname={server.dsn(after)}", file)
    else:
        run(server, "pg_dump", "--format=plain", "--no-owner", f"--file={file}", server.dsn(before))
        run(
            server,
            "psql",
            "--quiet",
            "--set=ON_ERROR_STOP=1",
            "--single-transaction",
            f"--file={file}",
            server.dsn(after),
        )
