"""Runs the statements of queries.sql by name. The only place that turns errors of the database into ours."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

import psycopg

from seedcore.core.errors import (
    EpochLimitError,
    FencedError,
    RetiredEpochError,
    StoreRejectedError,
    StoreUnavailableError,
    first_line,
)
from seedcore.core.ports import CommitsLostError, StoreDoubtError
from seedcore.core.timeouts import within
from seedcore.store.connections import Connections
from seedcore.store.queries import queries
from seedcore.store.sessions import PoolLimits, Row, explained, is_of_schema

Parameters = Mapping[str, object]

_TOO_LARGE = "54"
_BATCHES = frozenset({"register_many", "set_status_many", "hold_many", "refine_causes", "beat_many"})
# reads, and writes that repeat themselves: where one is lost, nothing is
_NOT_COUNTED = frozenset(
    {
        "beat_many",
        "epochs_of",
        "expire_old_epochs",
        "get_instance",
        "live_states",
        "prune_history",
        "renew_every_lease",
        "renew_term",
    }
)
_OUR_KEYS = frozenset(
    {
        "cluster_epoch_pkey",
        "cluster_epoch_number_key",
        "cluster_metadata_pkey",
        "registry_instance_pkey",
        "registry_instance_cluster_epoch_fkey",
        "registry_transition_pkey",
        "registry_writer_pkey",
        "superseded_cluster_pkey",
    }
)


class Statements:
    """The named statements over a pool of connections. Use from one event loop.

    Every method raises StoreUnavailableError, StoreRejectedError for a value that the database refuses, and
    StoreDoubtError for a batch that a rule of the database's owner refuses.
    """

    def __init__(self, dsn: str, limits: PoolLimits, *, read_only: bool) -> None:
        """`dsn` can be parsed. No connection is tried yet."""
        self.connections = Connections(dsn, limits, read_only=read_only)
        self.writer_id = uuid.uuid4().hex
        """The writer: this object."""
        self.term: int | None = None
        """The term of the writer, under which it writes."""
        self.commits = 0
        """The number of the last commit that it knows."""
        self.is_schema_known = False
        """Whether the schema was up to date when it was last looked at."""
        self.count = 0
        """How many statements were sent."""

    async def run(self, name: str, parameters: Parameters) -> list[Row]:
        """Run one statement; its rows."""
        return (await self.run_all([(name, parameters)]))[0]

    async def as_writer(self, name: str, parameters: Parameters) -> list[Row]:
        """Run one statement as the writer, if this is one: a write, or a read on which it acts. Raises FencedError once
        a newer registry has started, and CommitsLostError where the database has lost commits."""
        if self.term is None:
            return await self.run(name, parameters)
        writer = {
            "term": self.term,
            "writer_id": self.writer_id,
            "commits": self.commits,
            "counts": name not in _NOT_COUNTED,
        }
        (commits,), rows = await self.run_all([("begin_write", writer), (name, parameters)])
        self.commits = max(self.commits, commits[0])
        return rows

    async def run_all(self, statements: Sequence[tuple[str, Parameters]]) -> list[list[Row]]:
        """Run statements in one transaction; the rows of each."""
        try:
            # every wait inside is bounded; a caller that is cancelled does not wait for a server that does not answer
            return await within(self._send(statements), None)
        except psycopg.Error as error:
            if _is_refused(error):
                raise StoreRejectedError(first_line(error)) from error
            raise self._translated(error, *statements[-1]) from error

    async def _send(self, statements: Sequence[tuple[str, Parameters]]) -> list[list[Row]]:
        self.count += len(statements)
        return await self.connections.run([(queries()[name], parameters) for name, parameters in statements])

    def _translated(
        self, error: psycopg.Error, name: str, parameters: Parameters
    ) -> RetiredEpochError | EpochLimitError | FencedError | StoreUnavailableError:
        if error.sqlstate == "SC004":
            return RetiredEpochError(str(parameters["epoch"]))
        if error.sqlstate == "SC005":
            return EpochLimitError(str(parameters["epoch"]))
        if error.sqlstate == "SC006":
            return FencedError(self.term or 0, int(error.diag.message_detail or 0))
        if error.sqlstate == "SC007":
            return CommitsLostError(self.commits, int(error.diag.message_detail or 0), first_line(error))
        if is_of_schema(error):
            # the database may have been emptied
            self.is_schema_known = False
        if name in _BATCHES and _is_doubtful(error):
            return StoreDoubtError(explained(error))
        return StoreUnavailableError(explained(error))


def _is_refused(error: psycopg.Error) -> bool:
    """Whether an error is of a value: of the wrong type, beyond a limit, against a rule."""
    if isinstance(error, (psycopg.DataError, psycopg.errors.CheckViolation, psycopg.errors.NotNullViolation)):
        return True
    return (error.sqlstate or "").startswith(_TOO_LARGE)


def _is_doubtful(error: psycopg.Error) -> bool:
    """Whether an error comes from a constraint or trigger that the owner of the database has added to our tables. Only
    a damaged database violates our own keys."""
    if isinstance(error, psycopg.errors.RaiseException):
        return True
    return isinstance(error, psycopg.IntegrityError) and error.diag.constraint_name not in _OUR_KEYS
