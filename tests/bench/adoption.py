"""The cost of an adoption for old clients: `python -m tests.bench.adoption --rows 1000000`.

Adopts a database of the earlier SeedCore on a durable server (fsync on) while an old client registers, changes statuses
and beats 50 times per second.
"""

from __future__ import annotations

import argparse
import asyncio
import time

import psycopg

from seedcore.store.maintenance import migrate_database
from tests.postgres.earlier import OldClient, make_earlier
from tests.servers import embedded_binaries, running_server, system_binaries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--postgres", choices=("15", "18"), default="15")
    parser.add_argument("--calls", type=float, default=50.0, help="calls per second of the old client")
    arguments = parser.parse_args()
    binaries = system_binaries() if arguments.postgres == "15" else embedded_binaries()
    if binaries is None:
        parser.error("PostgreSQL 15 is not installed here")
    with running_server(binaries) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            for setting in ("fsync = on", "full_page_writes = on", "autovacuum = on", "deadlock_timeout = '1s'"):
                admin.execute(f"alter system set {setting}")
            admin.execute("select pg_reload_conf()")
        dsn = server.dsn(server.create_database(template="template1"))
        make_earlier(dsn, arguments.rows)
        with OldClient(dsn, arguments.calls) as before:
            time.sleep(10)
        with OldClient(dsn, arguments.calls) as during:
            time.sleep(1)
            began_s = time.monotonic()
            asyncio.run(migrate_database(dsn, adopting=_print))
            took_s = time.monotonic() - began_s
            time.sleep(2)
        _print(f"{arguments.rows:,} instances, PostgreSQL {arguments.postgres}: {took_s:.0f} s in total")
        longest = f"the longest took {during.longest_s * 1000:.0f} ms: {during.longest}"
        _print(f"old client: {during.calls} calls, {len(during.failures)} failed, {longest}")
        _print(f"in the 10 s before: {before.calls} calls, the longest took {before.longest_s * 1000:.0f} ms")
        for failure in during.failures[:5]:
            _print(failure)


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a command


if __name__ == "__main__":
    main()
