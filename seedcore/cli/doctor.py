"""`seedcore doctor`: looks at everything that can be wrong with an installation, and says what helps."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

import ray
import typer
from rich.table import Table

from seedcore import __version__
from seedcore.cli.cluster import NoClusterError, join_cluster
from seedcore.cli.output import EXIT_FAILED, JsonOption, Text, counted, echo, out
from seedcore.cli.queries import answered
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
from seedcore.discovery.access import TokenFile
from seedcore.discovery.exposure import exposures
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.protocol.messages import Health, Hello
from seedcore.registry.ray_support import session
from seedcore.settings import Mode, Settings, load_settings
from seedcore.store.dsn import is_unverified

_PATIENCE_S = 10.0
_SKEW_S = 2.0
_MIN_SERVER = 150_000
_MIN_FREE_BYTES = 1024**3
_MIN_DESCRIPTORS = 4096


class Grade(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


_STYLE = {Grade.OK: "green", Grade.WARNING: "yellow", Grade.FAILED: "red", Grade.SKIPPED: "dim"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check has found, and what helps where it is not well."""

    check: str
    grade: Grade
    told: str
    remedy: str | None = None


def doctor_command(as_json: JsonOption = False) -> None:
    """Check Ray, registry, versions, PostgreSQL, schema, clocks and configuration. Exit code 1 where one failed."""
    findings = examine()
    if as_json:
        echo(json.dumps([asdict(finding) for finding in findings], indent=2, default=str))
    else:
        _show(findings)
    if any(finding.grade is Grade.FAILED for finding in findings):
        raise typer.Exit(EXIT_FAILED)


def examine() -> list[Finding]:
    """Every finding, in the order in which one would look."""
    try:
        settings = load_settings()
    except ConfigurationError as error:
        return [Finding("configuration", Grade.FAILED, str(error), "correct that variable; README lists them all")]
    findings = [_configuration(settings), _descriptors()]
    is_joined = _join(settings, findings)
    findings += _shared_machine()
    return findings + answered(_look(settings, is_joined=is_joined))


def _configuration(settings: Settings) -> Finding:
    if not settings.registry_enabled:
        return Finding(
            "configuration", Grade.WARNING, "agents report nothing", "unset ENABLE_RUNTIME_REGISTRY to have a registry"
        )
    database = "embedded PostgreSQL" if settings.pg_dsn is None else "PostgreSQL of SEEDCORE_PG_DSN"
    told = f"mode {settings.mode}, beats every {settings.beat_interval_s:g} s, lease {settings.effective_lease_s:g} s, "
    return Finding("configuration", Grade.OK, told + database)


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = f"{soft} open files at once (at most {hard})"
    if soft >= _MIN_DESCRIPTORS or soft == resource.RLIM_INFINITY:
        return Finding("open files", Grade.OK, told)
    return Finding(
        "open files", Grade.WARNING, told, f"relays and managers hold one for each agent: ulimit -n {_MIN_DESCRIPTORS}"
    )


def _shared_machine() -> list[Finding]:
    found = [Finding("shared machine", Grade.WARNING, one.what, one.remedy) for one in exposures()]
    return found or [Finding("shared machine", Grade.OK, "other users of this machine reach nothing of Ray's")]


def _tokens(file: Path) -> Finding:
    tokens = TokenFile(file, log=None)
    told = f"{counted(len(tokens.tokens), 'token')} in {file}"
    if not tokens.problems:
        return Finding("tokens", Grade.OK, told)
    grade = Grade.WARNING if tokens.tokens else Grade.FAILED
    return Finding("tokens", grade, f"{told}; {tokens.problems[0]}", f"`seedcore token check {file}` tells all of it")


def _join(settings: Settings, findings: list[Finding]) -> bool:
    try:
        address = join_cluster(settings)
    except NoClusterError as error:
        findings.append(Finding("Ray", Grade.FAILED, error.why, error.remedy))
        return False
    nodes = [node for node in session.nodes() if node["Alive"]]
    told = f"cluster at {address}, version {ray.__version__}, {counted(len(nodes), 'node')}"
    findings.append(Finding("Ray", Grade.OK, told))
    if settings.pg_dsn is None and len(nodes) > 1 and settings.mode is not Mode.RAY:
        findings.append(
            Finding(
                "database for several nodes",
                Grade.WARNING,
                "the embedded PostgreSQL is for one node",
                "set SEEDCORE_PG_DSN to a PostgreSQL that every node reaches",
            )
        )
    return True


async def _look(settings: Settings, *, is_joined: bool) -> list[Finding]:
    findings: list[Finding] = []
    if settings.http_tokens_file is not None:
        findings.append(_tokens(settings.http_tokens_file))
    if settings.mode is Mode.RAY:
        return [*findings, Finding("registry", Grade.SKIPPED, "the mode is ray")]
    if is_joined:
        connection = RegistryConnection(settings.namespace, settings.call_timeout_s)
        findings += await _checked("registry", lambda: _registry(connection, settings))
    else:
        findings.append(Finding("registry", Grade.SKIPPED, "there is no cluster to ask"))
    if is_joined or settings.pg_dsn is not None:
        findings += await look_at_database(settings)
    else:
        findings.append(Finding("PostgreSQL", Grade.SKIPPED, "the embedded one runs beside the registry"))
    if settings.pg_dsn is None:
        findings.append(_data_folder(settings.data_dir))
    return findings


async def look_at_database(settings: Settings) -> list[Finding]:
    """What is to be said of the database that the settings name."""
    return await _checked("PostgreSQL", lambda: _database(settings))


async def _checked(check: str, look: Callable[[], Awaitable[list[Finding]]]) -> list[Finding]:
    try:
        return await within(look(), _PATIENCE_S)
    except TimeoutError:
        return [Finding(check, Grade.FAILED, f"no answer within {_PATIENCE_S:g} s", "see its log")]
    except StoreUnavailableError as error:
        return [
            Finding(check, Grade.FAILED, str(error), "start it, or correct SEEDCORE_PG_DSN; agents go on meanwhile")
        ]
    except SchemaError as error:
        return [Finding(check, Grade.FAILED, str(error), "let SEEDCORE_PG_DSN name a database of the registry's own")]
    except RegistryError as error:
        return [Finding(check, Grade.FAILED, str(error), "`seedcore registry start`, or `serve run serve_config.yaml`")]


async def _registry(connection: RegistryConnection, settings: Settings) -> list[Finding]:
    hello: Hello = await connection.hello()
    upgrade = "`seedcore registry upgrade`, and the same version on every node"
    try:
        hello.require_understood()
    except VersionMismatchError as error:
        # it says itself which of the two is to be replaced
        return [Finding("registry", Grade.FAILED, f"version {hello.code_version}, here {__version__}: {error}")]
    asked_at = utc_now()
    health: Health = await connection.health()
    findings = [Finding("registry", Grade.OK, f"pid {hello.pid} on node {hello.node_id[:8]}, term {health.term}")]
    if hello.code_version != __version__:
        told = f"it runs version {hello.code_version}, this is {__version__}"
        findings.append(Finding("version", Grade.WARNING, told, upgrade))
    else:
        findings.append(Finding("version", Grade.OK, f"{__version__} everywhere asked"))
    findings.append(_clock("clock of the registry's node", asked_at, health.as_of))
    findings += _of_health(health, settings)
    return findings


def _of_health(health: Health, settings: Settings) -> list[Finding]:
    findings: list[Finding] = []
    if health.fenced_by is not None:
        findings.append(
            Finding(
                "writer",
                Grade.FAILED,
                f"superseded by the registry of term {health.fenced_by}: it only reads",
                "another cluster writes this database; end one of them, or give each its own SEEDCORE_PG_DSN",
            )
        )
    if health.store_problem is not None:
        findings.append(
            Finding(
                "registry's database", Grade.FAILED, health.store_problem, "it goes on from memory; heal the database"
            )
        )
    if health.is_frozen:
        findings.append(
            Finding(
                "expiry",
                Grade.WARNING,
                f"frozen: {health.silent} agents are silent at once",
                "look for what they have in common: a network, a node, a stalled process",
            )
        )
    if health.watch_problem is not None:
        findings.append(
            Finding(
                "deaths", Grade.WARNING, health.watch_problem, "until then deaths show when leases end, not at once"
            )
        )
    else:
        told = f"{counted(health.watched, 'agent')} watched by {counted(health.relays, 'relay')}"
        by_beats = sum(health.unwatched.values())
        if by_beats:
            told += f"; {by_beats} live by their beats alone (Ray Client, or no process of a node's own host)"
        findings.append(Finding("deaths", Grade.OK, told))
    if health.flush.beats_dropped:
        told = f"{health.flush.beats_dropped} beats were dropped"
        findings.append(Finding("beats", Grade.WARNING, told, "the database is too slow: see docs/performance.md"))
    if health.lease_s < settings.effective_lease_s:
        told = f"the registry's lease is {health.lease_s:g} s, this environment's {settings.effective_lease_s:g} s"
        findings.append(Finding("lease", Grade.WARNING, told, "give every process the same settings"))
    return findings


async def _database(settings: Settings) -> list[Finding]:
    asked_at = utc_now()
    state = await store_recipe(settings).inspect()
    findings = []
    if state.version_number < _MIN_SERVER:
        told = f"it is version {state.version}"
        findings.append(Finding("PostgreSQL", Grade.FAILED, told, "15 or newer is needed"))
    else:
        findings.append(Finding("PostgreSQL", Grade.OK, f"version {state.version}"))
    if settings.pg_dsn is not None and is_unverified(settings.pg_dsn.get_secret_value()):
        told = "nobody verifies that the server is the one it says it is"
        findings.append(Finding("TLS", Grade.WARNING, told, "sslmode=verify-full&sslrootcert=FILE in SEEDCORE_PG_DSN"))
    if state.is_earlier:
        told = "it is a database of the earlier SeedCore, which no registry begins by itself"
        findings.append(Finding("schema", Grade.FAILED, told, "`seedcore migrate` adopts it: docs/adopt.md"))
    elif state.missing:
        told = f"{', '.join(state.missing)} missing"
        findings.append(
            Finding("schema", Grade.FAILED, told, "`seedcore migrate`, or start the registry, which does it")
        )
    elif state.unknown:
        told = f"it is newer than this version: {', '.join(state.unknown)}"
        findings.append(Finding("schema", Grade.WARNING, told, "install the newer version here too"))
    else:
        findings.append(Finding("schema", Grade.OK, "up to date"))
    findings.append(_clock("clock of the database", asked_at, state.now))
    return findings


def _clock(check: str, here: datetime, there: datetime) -> Finding:
    skew_s = (there - here).total_seconds()
    if abs(skew_s) <= _SKEW_S:
        return Finding(check, Grade.OK, f"{skew_s:+.2f} s from this one")
    # leases are measured by monotonic clocks; what suffers is what people read
    return Finding(
        check, Grade.WARNING, f"{skew_s:+.1f} s from this one", "run NTP on every machine: times shown are off"
    )


def _data_folder(folder: Path) -> Finding:
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not os.access(existing, os.W_OK):
        return Finding("data folder", Grade.FAILED, f"{folder} cannot be written", "set SEEDCORE_DATA_DIR")
    free = shutil.disk_usage(existing).free
    told = f"{folder}, {free / 1024**3:.1f} GiB free"
    if free < _MIN_FREE_BYTES:
        return Finding("data folder", Grade.WARNING, told, "make room, or set SEEDCORE_DATA_DIR")
    return Finding("data folder", Grade.OK, told)


def _show(findings: list[Finding]) -> None:
    table = Table("CHECK", "", "FOUND", box=None, pad_edge=False)
    for finding in findings:
        told = Text(finding.told)
        if finding.remedy is not None:
            told.append(f"\n-> {finding.remedy}", style="bold")
        table.add_row(finding.check, Text(finding.grade.value, style=_STYLE[finding.grade]), told)
    out.print(table)
