"""Databases of the earlier SeedCore: made, filled, and called as its clients did."""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psycopg

SHAPE = (Path(__file__).parent / "earlier.sql").read_text(encoding="utf-8")
CURRENT = uuid.UUID(int=0xC0FFEE)
PAST = uuid.UUID(int=0xBEEF)

_FILL = """
insert into registry_instance (instance_id, logical_id, cluster_epoch, status, actor_name, serve_route, node_id,
                               ip_address, pid, started_at, stopped_at, last_heartbeat)
select md5('instance ' || n)::uuid, 'agent-' || n %% (%(rows)s / 2 + 1),
       case when n %% 10 < 3 then %(current)s else %(past)s end,
       (case when n %% 10 < 2 then 'alive' when n %% 10 = 2 then 'draining' else 'dead' end)::instancestatus,
       'actor-' || n, '/agents/' || n, 'node-' || n %% 20, '10.0.0.1', 1000 + n %% 30000,
       now() - interval '1 day' + make_interval(secs => n / 100.0),
       case when n %% 10 > 2 then now() - interval '1 hour' end,
       case when n %% 10 < 2 then now() else now() - interval '1 hour' end
  from generate_series(1, %(rows)s) as n
"""


def make_earlier(dsn: str, rows: int = 0) -> None:
    """The old shape, with so many instances: a fifth of them alive."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(SHAPE)
        connection.execute("select set_current_epoch(%s)", (CURRENT,))
        connection.execute("update cluster_metadata set updated_at = now() - interval '25 hours'")
        if rows:
            connection.execute(_FILL, {"rows": rows, "current": CURRENT, "past": PAST})
            connection.execute("analyze registry_instance")


class EarlierClient:
    """The earlier SeedCore's own client with its defaults: a node that is not known is an empty text, and no text is
    sent with its type."""

    def __init__(self, connection: psycopg.Connection, logical_id: str) -> None:
        self._connection = connection
        self._logical_id = logical_id
        self.instance_id = str(uuid.uuid4())
        self.pid = 4711

    def register(self) -> None:
        row = self._connection.execute("select current_epoch from cluster_metadata where id = 1").fetchone()
        assert row is not None
        self._connection.execute(
            "select register_instance(%s, %s, %s, %s, %s, %s, %s, %s)",
            (self.instance_id, self._logical_id, str(row[0]), None, None, "", "127.0.1.1", self.pid),
        )

    def set_status(self, status: str) -> None:
        self._connection.execute("select set_instance_status(%s, %s)", (self.instance_id, status))

    def beat(self) -> None:
        self._connection.execute("select beat(%s)", (self.instance_id,))

    def list_active(self) -> list[tuple[object, ...]]:
        return self._connection.execute(
            "select logical_id, actor_name, serve_route, node_id, host(ip_address), pid from active_instance"
        ).fetchall()


@dataclass
class Record:
    """What a client has done, and how long its longest call took, in seconds."""

    calls: int = 0
    longest_s: float = 0.0
    longest: str = ""
    statuses: dict[uuid.UUID, str] = field(default_factory=dict)
    epoch: uuid.UUID = CURRENT
    failures: list[str] = field(default_factory=list)


class OldClient:
    """A client of the earlier SeedCore that calls all the time, on a connection that prepares what it repeats."""

    def __init__(self, dsn: str, calls_a_second: float = 50.0, *, flips: bool = True) -> None:
        self.record = Record()
        self._dsn = dsn
        self._pause_s = 1 / calls_a_second
        self._flips = flips
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._call_for_ever, name="old-client")

    def __enter__(self) -> Record:
        self._thread.start()
        return self.record

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join(60)

    def _call_for_ever(self) -> None:
        record = self.record
        ids: list[uuid.UUID] = []
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            due_s = time.monotonic()
            while not self._is_over.is_set():
                turn = record.calls % 10
                try:
                    if turn == 0:
                        ids.append(uuid.uuid4())
                        self._timed(
                            connection,
                            "select register_instance(%s, %s, %s, %s, %s, %s, %s::inet, %s::int)",
                            (ids[-1], f"old-{len(ids)}", record.epoch, f"a-{len(ids)}", "/a", "node", "10.0.0.2", 77),
                        )
                        record.statuses[ids[-1]] = "starting"
                    elif turn in (1, 4, 8):
                        target = ids[-1] if turn == 1 else ids[-1 - len(ids) // 2]
                        status = {1: "alive", 4: "draining", 8: "dead"}[turn]
                        if record.statuses.get(target, "dead") != "dead":
                            self._timed(
                                connection, "select set_instance_status(%s, %s::instancestatus)", (target, status)
                            )
                            record.statuses[target] = status
                        else:
                            record.calls += 1
                    elif turn == 9 and self._flips and len(ids) % 7 == 6:
                        record.epoch = uuid.uuid4()
                        self._timed(connection, "select set_current_epoch(%s)", (record.epoch,))
                    else:
                        self._timed(connection, "select beat(%s)", (ids[-1],))
                except psycopg.Error as error:
                    record.calls += 1
                    record.failures.append(f"{type(error).__name__}: {error}")
                due_s = max(due_s + self._pause_s, time.monotonic())
                self._is_over.wait(max(0.0, due_s - time.monotonic()))

    def _timed(self, connection: psycopg.Connection, statement: str, parameters: tuple[object, ...]) -> None:
        began_s = time.monotonic()
        connection.execute(statement, parameters)
        took_s = time.monotonic() - began_s
        self.record.calls += 1
        if took_s > self.record.longest_s:
            self.record.longest_s, self.record.longest = took_s, statement
