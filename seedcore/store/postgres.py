"""The store over PostgreSQL: named statements, rows become values here and nowhere else.

Owns the wrapping of database errors. Knows no rules: the guards are in schema/*.sql.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import zip_longest
from sys import intern

import psycopg
from psycopg import conninfo

from seedcore.core.answers import Answer, BeatOutcome, InstanceFilter, Listing, LostBeat, Origin, Outcome, OutcomeKind
from seedcore.core.changes import RegisterChange, Registration, StatusChange
from seedcore.core.errors import (
    EpochLimitError,
    FencedError,
    RetiredEpochError,
    SchemaError,
    StoreRejectedError,
    StoreUnavailableError,
    first_line,
)
from seedcore.core.instances import Beat, Epoch, EpochRecord, Instance, LiveState, Transition
from seedcore.core.lifecycle import Status
from seedcore.core.limits import check_epoch, check_instance_id, check_lease, one_object
from seedcore.core.paging import (
    check_limit,
    check_within_s,
    decode_cursor,
    decode_death_cursor,
    encode_cursor,
    encode_death_cursor,
)
from seedcore.core.ports import StoreDoubtError
from seedcore.core.selector import Selector
from seedcore.core.timeouts import within
from seedcore.store.adoption.adopt import adopt, end_old_calls, finish_if_interrupted, is_earlier_database
from seedcore.store.connections import (
    Connection,
    Connections,
    PoolLimits,
    Row,
    answering,
    connect,
    explained,
    tells_of_schema,
)
from seedcore.store.dsn import checked_dsn
from seedcore.store.migrations import compare, is_made, is_up_to_date, known_migrations, migrate
from seedcore.store.queries import queries
from seedcore.store.roles import check_grant, check_role, grant, grant_again

logger = logging.getLogger(__name__)

_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

_LOAD_PAGE = 5000
_MIGRATION_S = 3600.0
_EMPTIED = (
    "the database is empty, and this registry has worked with it before, so it makes no tables again: restore a "
    "backup, or run `seedcore migrate` to begin with an empty one"
)
_FIRST_KEY = decode_cursor(None)
_TOO_LARGE = "54"
_BATCHES = frozenset({"register_many", "set_status_many", "refine_causes", "beat_many"})
_OUR_KEYS = frozenset(
    {
        "cluster_epoch_pkey",
        "cluster_epoch_number_key",
        "cluster_metadata_pkey",
        "registry_instance_pkey",
        "registry_instance_cluster_epoch_fkey",
        "registry_transition_pkey",
        "superseded_cluster_pkey",
    }
)


class PostgresStore:
    """Implements core.ports.Store."""

    def __init__(
        self,
        dsn: str,
        limits: PoolLimits | None = None,
        *,
        read_only: bool = False,
        makes_schema: bool = True,
        ensure_server: Callable[[], Awaitable[object]] | None = None,
        claim: Callable[[str], None] | None = None,
    ) -> None:
        """`read_only` never migrates or writes: for readers beside the registry. No connection is tried yet.
        `makes_schema`: whether an empty database gets one; after the first `begin()` none does, since it was emptied,
        and a restore would find the tables in its way. `ensure_server` runs at each `open()`, for a server that may
        have to be started; `claim`, with the Ray cluster, before each `begin()`, and raises StoreUnavailableError
        where this database is another's.

        Raises ConfigurationError where the DSN cannot be parsed.
        """
        self._limits = limits if limits is not None else PoolLimits()
        self._dsn = checked_dsn(dsn)
        self._read_only = read_only
        self._makes_schema = makes_schema
        self._ensure_server = ensure_server
        self._claim = claim
        self._connections = Connections(self._dsn, self._limits, read_only=read_only)
        self._migrated = False
        self._opening = asyncio.Lock()
        self._term: int | None = None
        self._lease_before_s: float | None = None
        self._hand = uuid.uuid4().hex
        self.statements = 0

    async def open(self) -> None:
        async with self._opening:
            if self._ensure_server is not None:
                await self._ensure_server()
            self._connections.open()
            if not self._migrated and not self._read_only:
                for name in await migrate_database(self._dsn, self._limits, makes_schema=self._makes_schema):
                    logger.info("schema migration applied", extra={"migration": name})
                self._migrated = True

    async def close(self) -> None:
        async with self._opening:
            await self._connections.close()

    async def _run(self, name: str, parameters: dict[str, object]) -> list[Row]:
        return (await self._run_all([(name, parameters)]))[0]

    async def _run_all(self, statements: Sequence[tuple[str, dict[str, object]]]) -> list[list[Row]]:
        """Run statements in one transaction. The only place that wraps errors."""
        try:
            # every wait inside is bounded; but whoever is cancelled does not wait for a deaf server to hear of it
            return await within(self._execute(statements), None)
        except psycopg.Error as error:
            if _is_refused(error):
                raise StoreRejectedError(first_line(error)) from error
            raise self._translated(error, statements) from error

    async def _execute(self, statements: Sequence[tuple[str, dict[str, object]]]) -> list[list[Row]]:
        self.statements += len(statements)
        return await self._connections.run([(queries()[name], parameters) for name, parameters in statements])

    def _translated(
        self, error: psycopg.Error, statements: Sequence[tuple[str, dict[str, object]]]
    ) -> RetiredEpochError | EpochLimitError | FencedError | StoreUnavailableError:
        if error.sqlstate == "SC004":
            return RetiredEpochError(str(statements[-1][1]["epoch"]))
        if error.sqlstate == "SC005":
            return EpochLimitError(str(statements[-1][1]["epoch"]))
        if error.sqlstate == "SC006":
            return FencedError(self._term or 0, int(error.diag.message_detail or 0))
        if tells_of_schema(error):
            # the database may have been emptied: the next open() looks
            self._migrated = False
        if statements[-1][0] in _BATCHES and _is_doubtful(error):
            return StoreDoubtError(explained(error))
        return StoreUnavailableError(explained(error))

    async def begin(self, ray_cluster: str, epoch: str | None, lease_s: float, idle_s: float | None = None) -> Epoch:
        check_lease(lease_s)
        if epoch is not None:
            check_epoch(epoch)
        if self._claim is not None:
            self._claim(ray_cluster)
        rows = await self._run(
            "begin_registry", {"ray_cluster": ray_cluster, "epoch": epoch, "lease_s": lease_s, "idle_s": idle_s}
        )
        self._term, self._lease_before_s = rows[0][2], rows[0][3]
        self._makes_schema = False
        return Epoch(name=rows[0][0], number=rows[0][1])

    @property
    def term(self) -> int | None:
        return self._term

    @property
    def lease_before_s(self) -> float | None:
        return self._lease_before_s

    async def renew_term(self, lease_s: float) -> None:
        await self._run("renew_term", {"term": self._term, "lease_s": check_lease(lease_s)})

    async def renew_every_lease(self) -> None:
        await self._run("renew_every_lease", {"term": self._term})

    async def set_current_epoch(self, epoch: str) -> Epoch:
        check_epoch(epoch)
        rows = await self._run("set_current_epoch", {"epoch": epoch, "term": self._term})
        return Epoch(name=epoch, number=rows[0][0])

    async def stage_epoch(self, epoch: str) -> bool:
        check_epoch(epoch)
        return bool((await self._run("prepare_epoch", {"epoch": epoch, "term": self._term}))[0][0])

    async def list_epochs(self, limit: int) -> list[EpochRecord]:
        return [EpochRecord(*row) for row in await self._run("list_epochs", {"limit": check_limit(limit)})]

    async def current_epoch(self) -> Epoch:
        rows = await self._run("stamp", {})
        return Epoch(name=rows[0][2], number=rows[0][3])

    async def epochs_of(self, registrations: Sequence[Registration]) -> list[str | None]:
        rows = await self._run(
            "epochs_of",
            {
                "logical_ids": [registration.logical_id for registration in registrations],
                "actor_ids": [registration.actor_id for registration in registrations],
                "epochs": [registration.started_epoch for registration in registrations],
            },
        )
        found: dict[int, str] = {row[0]: row[1] for row in rows}
        return [found.get(ord) for ord in range(1, len(registrations) + 1)]

    async def register_many(self, changes: Sequence[RegisterChange]) -> list[Outcome]:
        rows = await self._run(
            "register_many", {"rows": _json([_row_of(change) for change in changes]), "term": self._term}
        )
        return [_outcome(row) for row in rows]

    async def set_status_many(self, changes: Sequence[StatusChange]) -> list[Outcome]:
        rows = await self._run(
            "set_status_many",
            {
                "ids": [change.instance_id for change in changes],
                "statuses": [change.status.value for change in changes],
                "seqs": [change.seq for change in changes],
                "causes": [change.cause for change in changes],
                "hand": self._hand,
                "numbers": [change.number for change in changes],
                "untils": [change.until for change in changes],
                "ages_s": [change.age_s for change in changes],
                "term": self._term,
            },
        )
        return [_outcome(row) for row in rows]

    @property
    def pool(self) -> Mapping[str, int]:
        return self._connections.use

    async def refine_causes(self, causes: Mapping[str, str]) -> list[str]:
        parameters: dict[str, object] = {"ids": list(causes), "causes": list(causes.values()), "term": self._term}
        return [row[0] for row in await self._run("refine_causes", parameters)]

    async def beat_many(self, beats: Sequence[Beat]) -> list[LostBeat]:
        # as one literal the ids take a third of the time that a list of them does
        ids = "{" + ",".join([beat.instance_id for beat in beats]) + "}"
        rows = await self._run("beat_many", {"ids": ids, "ages_s": [beat.age_s for beat in beats], "term": self._term})
        return [LostBeat(row[0], BeatOutcome(row[1])) for row in rows]

    async def expire_stale(self, lease_s: float | None, limit: int) -> list[str]:
        rows = await self._run("expire_stale", {"lease_s": lease_s, "limit": check_limit(limit), "term": self._term})
        return [row[0] for row in rows]

    async def expire_old_epochs(self, limit: int) -> list[str]:
        rows = await self._run("expire_old_epochs", {"limit": check_limit(limit), "term": self._term})
        return [row[0] for row in rows]

    async def prune_history(self, keep_s: float, limit: int) -> int:
        parameters: dict[str, object] = {"keep_s": keep_s, "limit": limit, "term": self._term}
        return int((await self._run("prune_history", parameters))[0][0])

    async def load_live(self) -> AsyncIterator[Instance]:
        after = _FIRST_KEY
        while True:
            rows = await self._run(
                "load_live",
                {"after_logical_id": after[0], "after_instance_id": after[1], "limit": _LOAD_PAGE},
            )
            for row in rows:
                yield _instance(row)
            if len(rows) < _LOAD_PAGE:
                return
            after = (rows[-1][1], rows[-1][0])

    async def live_states(self, after: tuple[str, str], limit: int) -> list[LiveState]:
        rows = await self._run(
            "live_states",
            {"after_logical_id": after[0], "after_instance_id": after[1], "limit": check_limit(limit)},
        )
        return [LiveState(row[0], row[1], Status(row[2]), row[3], row[4]) for row in rows]

    async def last_beats(self, instance_ids: Sequence[str]) -> dict[str, datetime]:
        rows = await self._run("last_beats", {"ids": list(instance_ids)})
        return {row[0]: row[1] for row in rows}

    async def list_instances(self, wanted: InstanceFilter, limit: int, cursor: str | None = None) -> Listing:
        after_logical_id, after_instance_id = decode_cursor(cursor)
        parameters: dict[str, object] = {
            "statuses": None if wanted.statuses is None else [status.value for status in wanted.statuses],
            "epoch": wanted.epoch,
            "organ_id": wanted.organ_id,
            "logical_id": wanted.logical_id,
            "labels": json.dumps(dict(wanted.validated().labels)),
            "node_id": wanted.node_id,
            "selector": _requirements(wanted.selector),
            "fresh_only": wanted.fresh_only,
            "after_logical_id": after_logical_id,
            "after_instance_id": after_instance_id,
            "limit": check_limit(limit) + 1,
        }
        stamps, rows = await self._run_all([("stamp", {}), ("list_instances", parameters)])
        items = tuple(_instance(row) for row in rows[:limit])
        as_of: datetime = stamps[0][0]
        return Listing(
            items=items,
            source=Origin.POSTGRES,
            as_of=as_of,
            version=stamps[0][1],
            complete=True,
            next_cursor=encode_cursor(items[-1]) if len(rows) > limit else None,
        )

    async def best_instances(self, logical_ids: Sequence[str]) -> Answer[dict[str, Instance]]:
        stamps, rows = await self._run_all([("stamp", {}), ("best_instances", {"logical_ids": list(logical_ids)})])
        found = {instance.logical_id: instance for instance in map(_instance, rows)}
        return Answer(found, Origin.POSTGRES, stamps[0][0], stamps[0][1], complete=True)

    async def get_instance(self, instance_id: str) -> Instance | None:
        rows = await self._run("get_instance", {"instance_id": check_instance_id(instance_id)})
        return _instance(rows[0]) if rows else None

    async def history(self, logical_id: str, limit: int) -> list[Instance]:
        rows = await self._run("history", {"logical_id": logical_id, "limit": check_limit(limit)})
        return [_instance(row) for row in rows]

    async def deaths(self, limit: int, cursor: str | None = None, within_s: float | None = None) -> Listing:
        before, before_id = decode_death_cursor(cursor)
        asked = {"before": before, "before_id": before_id, "limit": check_limit(limit) + 1}
        stamps, rows = await self._run_all([("stamp", {}), ("deaths", {**asked, "within_s": check_within_s(within_s)})])
        items = tuple(_instance(row) for row in rows[:limit])
        next_cursor = encode_death_cursor(items[-1]) if len(rows) > limit else None
        return Listing(items, Origin.POSTGRES, stamps[0][0], stamps[0][1], complete=True, next_cursor=next_cursor)

    async def transitions(self, logical_id: str, limit: int) -> list[Transition]:
        rows = await self._run("transitions", {"logical_id": logical_id, "limit": check_limit(limit)})
        return [
            Transition(row[0], row[1], None if row[2] is None else Status(row[2]), Status(row[3]), *row[4:])
            for row in rows
        ]


@dataclass(frozen=True, slots=True)
class ServerState:
    """A database as it is. `missing` are migrations that it lacks, `unknown` those that this code does not know;
    `is_earlier`: it is one of the earlier SeedCore, to be adopted."""

    version: str
    version_number: int
    now: datetime
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    is_earlier: bool


@asynccontextmanager
async def _one_session(dsn: str, limits: PoolLimits | None, *, read_only: bool = False) -> AsyncIterator[Connection]:
    """A connection for one question, which has to be answered in time."""
    limits = limits if limits is not None else PoolLimits()
    connection = await connect(checked_dsn(dsn), limits, read_only=read_only)
    async with connection:
        with answering(connection, limits.answer_s):
            yield connection


async def inspect_database(dsn: str) -> ServerState:
    """Look at a database without changing it. Raises ConfigurationError, StoreUnavailableError, or SchemaError where
    somebody else's tables have our names."""
    try:
        async with _one_session(dsn, PoolLimits(connect_timeout_s=5.0), read_only=True) as connection:
            cursor = await connection.execute(
                "select current_setting('server_version'), current_setting('server_version_num')::int, "
                "clock_timestamp()"
            )
            version, number, now = (await cursor.fetchall())[0]
            missing, unknown = await compare(connection)
            is_earlier = bool(missing) and await is_earlier_database(connection)
    except psycopg.Error as error:
        raise StoreUnavailableError(explained(error)) from error
    return ServerState(version, number, now, tuple(missing), tuple(unknown), is_earlier)


async def migrate_database(
    dsn: str,
    limits: PoolLimits | None = None,
    *,
    adopting: Callable[[str], None] | None = None,
    makes_schema: bool = True,
) -> list[str]:
    """Bring the database behind `dsn` up to date; the names of what was applied.

    On a connection of its own: a migration may take longer than a statement of the hot path. One of the earlier
    SeedCore is adopted only where `adopting` is given, which is called with what is done. An empty database is left
    empty unless `makes_schema`.
    Raises ConfigurationError, StoreUnavailableError or SchemaError.
    """
    checked_dsn(dsn)
    # a caller that is cancelled does not wait until a deaf server has heard of it
    limits = limits if limits is not None else PoolLimits()
    return await within(_migrate_database(dsn, limits, adopting, makes_schema=makes_schema), None)


async def end_old_calls_of_database(dsn: str, limits: PoolLimits | None = None) -> bool:
    """Drop the calls that an adoption kept for clients of the earlier SeedCore; whether there were any. Raises as
    `migrate_database`."""
    try:
        async with _one_session(dsn, limits) as connection:
            return await end_old_calls(connection)
    except psycopg.OperationalError as error:
        raise StoreUnavailableError(explained(error)) from error
    except psycopg.Error as error:
        raise SchemaError(f"the old calls could not be dropped: {first_line(error)}") from error


async def _migrate_database(
    dsn: str, limits: PoolLimits, adopting: Callable[[str], None] | None, *, makes_schema: bool
) -> list[str]:
    try:
        connection = await connect(dsn, limits)
        async with connection:
            with answering(connection, limits.answer_s):
                is_current = await is_up_to_date(connection)
                is_earlier = not is_current and await is_earlier_database(connection)
                if not (makes_schema or is_earlier or await is_made(connection)):
                    raise StoreUnavailableError(_EMPTIED)
            if is_earlier:
                if adopting is None:
                    raise SchemaError(
                        "this is a database of the earlier SeedCore: run `seedcore migrate`, which adopts it"
                    )
                await adopt(connection, adopting)
                return [migration.name for migration in known_migrations()]
            if adopting is not None:
                await finish_if_interrupted(connection, adopting)
            if is_current:
                return []
            with answering(connection, _MIGRATION_S):
                return await migrate(connection, also=grant_again)
    except (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction) as error:
        raise StoreUnavailableError(explained(error)) from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise SchemaError(
            f"the schema is not up to date, and this role may not change it ({first_line(error)}): run "
            "`seedcore migrate` as the owner, with --grant for this role"
        ) from error
    except psycopg.Error as error:
        raise SchemaError(f"the schema could not be brought up to date: {first_line(error)}") from error


async def check_grant_on_database(
    dsn: str, role: str, *, with_password: bool, limits: PoolLimits | None = None
) -> None:
    """Whether the owner behind `dsn` may let a role do what a registry needs, before a migration: changes nothing, and
    raises as `grant_on_database`."""
    check_role(role)
    try:
        async with _one_session(dsn, limits) as connection:
            await check_grant(connection, role, with_password=with_password)
    except psycopg.Error as error:
        raise StoreUnavailableError(explained(error)) from error


async def grant_on_database(dsn: str, role: str, password: str | None, limits: PoolLimits | None = None) -> bool:
    """Let a role do what a registry needs, as the owner behind `dsn`; whether it was made. Raises ConfigurationError,
    InvalidInputError, StoreUnavailableError or SchemaError; then nothing has changed."""
    check_role(role)
    try:
        async with _one_session(dsn, limits) as connection:
            return await grant(connection, role, password)
    except psycopg.OperationalError as error:
        raise StoreUnavailableError(explained(error)) from error
    except psycopg.Error as error:
        raise SchemaError(f"role {role} could not be given its rights: {first_line(error)}") from error


def is_unverified(dsn: str) -> bool:
    """Whether the DSN goes over a network, or nobody knows where, to a server whose certificate nobody verifies."""
    given = conninfo.conninfo_to_dict(checked_dsn(dsn))
    # a service's file is read by libpq alone; an address goes before the name beside it
    is_remote = bool(given.get("service")) or any(map(_is_elsewhere, _places(given)))
    return is_remote and given.get("sslmode") != "verify-full"


def _places(given: Mapping[str, object]) -> list[str]:
    """Where libpq connects, one after another: to the address, or else to the name."""
    hosts, addresses = (str(given.get(name) or "").split(",") for name in ("host", "hostaddr"))
    return [address or host for host, address in zip_longest(hosts, addresses, fillvalue="")]


def _is_elsewhere(place: str) -> bool:
    return bool(place) and not place.startswith(("/", "@")) and place not in _LOCAL_HOSTS


def _json(rows: list[dict[str, object]]) -> str:
    try:
        return json.dumps(rows)
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreRejectedError(first_line(error)) from error


def _is_refused(error: psycopg.Error) -> bool:
    """Whether an error is of a value: of the wrong type, beyond a limit, against a rule."""
    if isinstance(error, (psycopg.DataError, psycopg.errors.CheckViolation, psycopg.errors.NotNullViolation)):
        return True
    return (error.sqlstate or "").startswith(_TOO_LARGE)


def _is_doubtful(error: psycopg.Error) -> bool:
    """Whether an error comes from a constraint or trigger that somebody has added to our tables. Our own keys are
    broken by a damaged database alone."""
    if isinstance(error, psycopg.errors.RaiseException):
        return True
    return isinstance(error, psycopg.IntegrityError) and error.diag.constraint_name not in _OUR_KEYS


def _requirements(selector: Selector) -> str:
    """A selector as labels_match reads it."""
    return json.dumps(
        [
            {"key": requirement.key, "op": requirement.operator.value, "values": requirement.values}
            for requirement in selector
        ]
    )


def _row_of(change: RegisterChange) -> dict[str, object]:
    registration = change.registration
    return {
        "instance_id": registration.instance_id,
        "logical_id": registration.logical_id,
        "cluster_epoch": registration.cluster_epoch,
        "seq": change.seq,
        "actor_name": registration.actor_name,
        "namespace": registration.namespace,
        "actor_id": registration.actor_id,
        "serve_route": registration.serve_route,
        "organ_id": registration.organ_id,
        "labels": dict(registration.labels),
        "metadata": dict(registration.metadata),
        "node_id": registration.node_id,
        "ip_address": registration.ip_address,
        "pid": registration.pid,
        "process_key": registration.process_key,
    }


def _outcome(row: Row) -> Outcome:
    kind, status, cluster_epoch, cause = row
    return Outcome(
        kind=OutcomeKind(kind),
        status=None if status is None else Status(status),
        cluster_epoch=cluster_epoch,
        cause=cause,
    )


_STATUSES = {status.value: status for status in Status}


def _instance(row: Row) -> Instance:
    started_at: datetime = row[4]
    # registries hold them by the 100,000: what is the same is one object
    return Instance(
        instance_id=row[0],
        logical_id=row[1],
        status=_STATUSES[row[2]],
        cluster_epoch=intern(row[3]),
        started_at=started_at,
        status_changed_at=started_at if row[5] == started_at else row[5],
        last_heartbeat=started_at if row[6] == started_at else row[6],
        seq=row[7],
        actor_name=row[8],
        namespace=one_object(row[9]),
        actor_id=row[10],
        serve_route=row[11],
        organ_id=one_object(row[12]),
        labels=row[13],
        metadata=row[14],
        node_id=one_object(row[15]),
        ip_address=one_object(row[16]),
        pid=row[17],
        stopped_at=row[18],
        cause=row[19],
        process_key=one_object(row[20]),
        drain_until=row[21],
        held=None if row[22] is None else _STATUSES[row[22]],
    )
