"""`seedcore doctor`: checks an installation, and prints a remedy for each problem."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path

import ray

from seedcore import __version__
from seedcore.cli.cluster import join_cluster
from seedcore.cli.errors import NoClusterError
from seedcore.cli.findings import Finding, Grade
from seedcore.cli.output import counted
from seedcore.cli.queries import answered
from seedcore.cli.troubles import losses_of
from seedcore.composition import store_recipe
from seedcore.core.clock import utc_now
from seedcore.core.errors import (
    ConfigurationError,
    RegistryError,
    SchemaError,
    StoreUnavailableError,
    VersionMismatchError,
)
from seedcore.core.timeouts import within
from seedcore.discovery.exposure import exposures
from seedcore.discovery.overview import registry_out
from seedcore.discovery.tokens import TokenFile
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.protocol.messages import Health, Hello
from seedcore.registry.ray_support import session
from seedcore.settings import Mode, Settings, load_settings
from seedcore.store.dsn import is_unverified
from seedcore.store.maintenance import ServerState
from seedcore.store.replication import Durability, Replication

_CHECK_TIMEOUT_S = 10.0
_MAX_SKEW_S = 2.0
_MIN_SERVER = 150_000
_MIN_FREE_BYTES = 1024**3
_MIN_DESCRIPTORS = 4096


def examine() -> list[Finding]:
    """Run every check. If the configuration is wrong, it is the only finding: the other checks depend on it."""
    try:
        settings = load_settings()
        store_recipe(settings)
    except ConfigurationError as error:
        return [_wrong_setting("configuration", error)]
    findings = [_configuration(settings), _descriptors()]
    is_joined = _join(settings, findings)
    findings += _shared_machine()
    return findings + answered(_look(settings, is_joined=is_joined))


def _wrong_setting(check: str, error: ConfigurationError) -> Finding:
    return Finding(check, Grade.FAILED, str(error), "correct this variable; docs/reference/settings.md lists them all")


def _configuration(settings: Settings) -> Finding:
    if not settings.registry_enabled:
        return Finding(
            "configuration", Grade.WARNING, "agents do not report", "unset ENABLE_RUNTIME_REGISTRY to use the registry"
        )
    database = "embedded PostgreSQL" if settings.pg_dsn is None else "PostgreSQL of SEEDCORE_PG_DSN"
    times = f"beats every {settings.beat_interval_s:g} s, lease {settings.effective_lease_s:g} s"
    return Finding("configuration", Grade.OK, f"mode {settings.mode}, {times}, {database}")


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"limit {soft} (hard limit {hard})"
    if soft >= _MIN_DESCRIPTORS or soft == resource.RLIM_INFINITY:
        return Finding("open files", Grade.OK, found)
    remedy = f"relays and managers open one file per agent: ulimit -n {_MIN_DESCRIPTORS}"
    return Finding("open files", Grade.WARNING, found, remedy)


def _shared_machine() -> list[Finding]:
    found = [Finding("shared machine", Grade.WARNING, one.what, one.remedy) for one in exposures()]
    return found or [Finding("shared machine", Grade.OK, "other users of this machine cannot reach Ray")]


def _tokens(file: Path) -> Finding:
    tokens = TokenFile(file, log=None)
    found = f"{counted(len(tokens.tokens), 'token')} in {file}"
    if not tokens.problems:
        return Finding("tokens", Grade.OK, found)
    grade = Grade.WARNING if tokens.tokens else Grade.FAILED
    return Finding("tokens", grade, f"{found}; {tokens.problems[0]}", f"`seedcore token check {file}` lists them all")


def _join(settings: Settings, findings: list[Finding]) -> bool:
    try:
        address = join_cluster(settings)
    except NoClusterError as error:
        findings.append(Finding("Ray", Grade.FAILED, error.why, error.remedy))
        return False
    nodes = [node for node in session.nodes() if node["Alive"]]
    found = f"cluster at {address}, version {ray.__version__}, {counted(len(nodes), 'node')}"
    findings.append(Finding("Ray", Grade.OK, found))
    if settings.pg_dsn is None and len(nodes) > 1 and settings.mode is not Mode.RAY:
        findings.append(
            Finding(
                "database for several nodes",
                Grade.WARNING,
                "the embedded PostgreSQL is for one node",
                "set SEEDCORE_PG_DSN to a PostgreSQL that every node can reach",
            )
        )
    return True


async def _look(settings: Settings, *, is_joined: bool) -> list[Finding]:
    findings: list[Finding] = []
    if settings.http_tokens_file is not None:
        findings.append(_tokens(settings.http_tokens_file))
    if settings.mode is Mode.RAY:
        return [*findings, Finding("registry", Grade.SKIPPED, "SEEDCORE_MODE is ray")]
    if is_joined:
        connection = RegistryConnection(settings.namespace, settings.call_timeout_s)
        findings += await _checked("registry", lambda: registry_findings(connection, settings))
    else:
        findings.append(Finding("registry", Grade.SKIPPED, "not connected to a cluster"))
    if is_joined or settings.pg_dsn is not None:
        findings += await look_at_database(settings)
    else:
        findings.append(Finding("PostgreSQL", Grade.SKIPPED, "the embedded server runs beside the registry"))
    if settings.pg_dsn is None:
        findings.append(_data_folder(settings.data_dir))
    return findings


async def look_at_database(settings: Settings) -> list[Finding]:
    """Check the database in the settings."""
    return await _checked("PostgreSQL", lambda: _database(settings))


async def _checked(check: str, look: Callable[[], Awaitable[list[Finding]]]) -> list[Finding]:
    try:
        return await within(look(), _CHECK_TIMEOUT_S)
    except TimeoutError:
        return [Finding(check, Grade.FAILED, f"no answer within {_CHECK_TIMEOUT_S:g} s", "see its log")]
    except ConfigurationError as error:
        return [_wrong_setting(check, error)]
    except StoreUnavailableError as error:
        remedy = "start it, or correct SEEDCORE_PG_DSN; agents keep working meanwhile"
        return [Finding(check, Grade.FAILED, str(error), remedy)]
    except SchemaError as error:
        remedy = "set SEEDCORE_PG_DSN to a database of the registry's own"
        return [Finding(check, Grade.FAILED, str(error), remedy)]
    except RegistryError as error:
        return [Finding(check, Grade.FAILED, str(error), "`seedcore registry start`, or `serve run serve_config.yaml`")]


async def registry_findings(connection: RegistryConnection, settings: Settings) -> list[Finding]:
    """Check the registry. Raises as `connection`."""
    hello: Hello = await connection.hello()
    upgrade = "`seedcore registry upgrade`, and the same version on every node"
    try:
        hello.require_understood()
    except VersionMismatchError as error:
        # the error names the remedy
        found = f"it runs version {hello.code_version}, this is {__version__}: {error}"
        return [Finding("registry", Grade.FAILED, found)]
    asked_at = utc_now()
    health: Health = await connection.health()
    term = "no term yet" if health.term is None else f"term {health.term}"
    findings = [Finding("registry", Grade.OK, f"pid {hello.pid} on node {hello.node_id[:8]}, {term}")]
    if hello.code_version != __version__:
        found = f"it runs version {hello.code_version}, this is {__version__}"
        findings.append(Finding("version", Grade.WARNING, found, upgrade))
    else:
        findings.append(Finding("version", Grade.OK, f"{__version__}, here and in the registry"))
    findings.append(_clock("clock of the registry's node", asked_at, health.as_of))
    findings += _of_health(health, settings)
    return findings


def _of_health(health: Health, settings: Settings) -> list[Finding]:
    findings: list[Finding] = []
    if health.fenced_by is not None:
        found = f"superseded by the registry of term {health.fenced_by}: this one only reads"
        remedy = "another cluster writes to this database; end one of them, or give each its own SEEDCORE_PG_DSN"
        findings.append(Finding("writer", Grade.FAILED, found, remedy))
    if health.epoch_problem is not None:
        found = f"not confirmed, so no agent is resolved: {health.epoch_problem}"
        remedy = "`seedcore epoch show` lists both epochs with their agents: see deploy/runbook/epoch-unconfirmed.md"
        findings.append(Finding("epoch", Grade.FAILED, found, remedy))
    for _, found in losses_of(registry_out(health)):
        remedy = "see deploy/runbook/lost-commits.md; shown until the registry restarts"
        findings.append(Finding("lost commits", Grade.WARNING, found, remedy))
    if health.store_problem is not None:
        remedy = "restore the database; until then the registry works from memory"
        findings.append(Finding("registry's database", Grade.FAILED, health.store_problem, remedy))
    if health.capacity_problem is not None:
        remedy = "see deploy/runbook/nearly-full.md"
        findings.append(Finding("capacity", Grade.WARNING, health.capacity_problem, remedy))
    if health.is_frozen:
        found = f"frozen: {health.silent} agents are silent at once"
        remedy = "look for a common cause: a network, a node, a stalled process"
        findings.append(Finding("expiry", Grade.WARNING, found, remedy))
    findings.append(_death_reports(health))
    if health.flush.beats_dropped:
        found = f"{health.flush.beats_dropped} beats were dropped"
        findings.append(Finding("beats", Grade.WARNING, found, "the database is too slow: see docs/performance.md"))
    if health.lease_s < settings.effective_lease_s:
        found = f"the registry's lease is {health.lease_s:g} s, in this environment {settings.effective_lease_s:g} s"
        findings.append(Finding("lease", Grade.WARNING, found, "give every process the same settings"))
    return findings


def _death_reports(health: Health) -> Finding:
    if health.watch_problem is not None:
        remedy = "until this is fixed, deaths are found when leases expire"
        return Finding("deaths", Grade.WARNING, health.watch_problem, remedy)
    found = f"{counted(health.watched, 'agent')} watched by {counted(health.relays, 'relay')}"
    by_lease = sum(health.unwatched.values())
    if by_lease:
        found += f"; {by_lease} by lease alone (Ray Client, or not a process of a node)"
    return Finding("deaths", Grade.OK, found)


async def _database(settings: Settings) -> list[Finding]:
    asked_at = utc_now()
    state = await store_recipe(settings).inspect()
    is_supported = state.version_number >= _MIN_SERVER
    findings = [
        Finding("PostgreSQL", Grade.OK, f"version {state.version}")
        if is_supported
        else Finding("PostgreSQL", Grade.FAILED, f"version {state.version}", "upgrade it to 15 or newer")
    ]
    if settings.pg_dsn is not None and is_unverified(settings.pg_dsn.get_secret_value()):
        found = "the identity of the server is not verified"
        remedy = "add sslmode=verify-full&sslrootcert=FILE to SEEDCORE_PG_DSN"
        findings.append(Finding("TLS", Grade.WARNING, found, remedy))
    if settings.pg_dsn is not None:
        findings += [crash_safety(state.durability), replication(state.durability.replication)]
    findings.append(_schema(state))
    findings.append(_clock("clock of the database", asked_at, state.now))
    return findings


def crash_safety(state: Durability) -> Finding:
    """Check whether a crash of the server or its machine can lose commits."""
    off = [name for name in ("fsync", "full_page_writes") if not getattr(state, name)]
    if state.replication.commit == "off":
        off.append("synchronous_commit")
    if not off:
        return Finding("crash safety", Grade.OK, "a commit is on disk before it is acknowledged")
    found = f"{' and '.join(off)} off: a crash of the machine can lose commits, or damage the database"
    return Finding("crash safety", Grade.WARNING, found, f"set {', '.join(off)} to on")


def replication(state: Replication) -> Finding:
    """Check whether commits reach the standbys, and whether a failover can lose some."""
    if state.is_standby:
        return Finding("replication", Grade.SKIPPED, "this server is a standby; its primary was not checked")
    if state.is_blocked:
        found = f"{state.confirming} of the {state.required} required synchronous standbys connected"
        found += f", {counted(state.waiting, 'commit')} waiting" if state.waiting else ""
        remedy = "start the standby; until then nothing is committed: see deploy/runbook/database-away.md"
        return Finding("replication", Grade.FAILED, f"{found} (synchronous_standby_names = {state.names})", remedy)
    if state.is_synchronous:
        found = f"synchronous: a commit waits for {counted(state.required, 'standby')}"
        if not state.is_visible:
            found += " (grant pg_monitor to this role to check that they confirm)"
        return Finding("replication", Grade.OK, found)
    if state.standbys == 0:
        return Finding("replication", Grade.OK, "no standby is connected")
    standbys = counted(state.standbys, "standby")
    found = f"{standbys}, and a commit does not wait until one has it on disk: a failover can lose the last commits"
    remedy = "set synchronous_standby_names, and synchronous_commit to on: see deploy/README.md"
    return Finding("replication", Grade.WARNING, found, remedy)


def _schema(state: ServerState) -> Finding:
    if state.schema_problem is not None:
        remedy = "run `seedcore migrate --grant ROLE` as the owner, with this role"
        return Finding("schema", Grade.FAILED, state.schema_problem, remedy)
    if state.is_earlier:
        found = "a database of the earlier SeedCore, which a registry does not adopt by itself"
        return Finding("schema", Grade.FAILED, found, "`seedcore migrate` adopts it: docs/adopt.md")
    if state.missing:
        found = f"{', '.join(state.missing)} missing"
        return Finding("schema", Grade.FAILED, found, "run `seedcore migrate`, or start the registry, which does it")
    if state.unknown:
        found = f"newer than this version: {', '.join(state.unknown)}"
        return Finding("schema", Grade.WARNING, found, "install the newer version here too")
    return Finding("schema", Grade.OK, "up to date")


def _clock(check: str, here: datetime, there: datetime) -> Finding:
    skew_s = (there - here).total_seconds()
    if abs(skew_s) <= _MAX_SKEW_S:
        return Finding(check, Grade.OK, f"{skew_s:+.2f} s from the clock here")
    # leases are measured by monotonic clocks; the times that people read are wrong
    remedy = "run NTP on every machine: the times shown are wrong"
    return Finding(check, Grade.WARNING, f"{skew_s:+.1f} s from the clock here", remedy)


def _data_folder(folder: Path) -> Finding:
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not os.access(existing, os.W_OK):
        return Finding("data folder", Grade.FAILED, f"{folder} is not writable", "set SEEDCORE_DATA_DIR")
    free = shutil.disk_usage(existing).free
    found = f"{folder}, {free / 1024**3:.1f} GiB free"
    if free < _MIN_FREE_BYTES:
        return Finding("data folder", Grade.WARNING, found, "free some space, or set SEEDCORE_DATA_DIR")
    return Finding("data folder", Grade.OK, found)
