"""What every test starts from: a clean environment, and servers for those that ask."""

from __future__ import annotations

import os

# before anything can import ray: it reads these at import
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
# there are none, and each of hundreds of processes would look for them in every installed package
os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"
_LEAKS = {"RAY_ADDRESS", "RAY_NAMESPACE", "RAY_NODE_ID", "REGISTRY_BEAT_SEC", "PG_DSN", "CLUSTER_EPOCH", "POD_IP"}
_LEAKS |= {"ENABLE_RUNTIME_REGISTRY"}
for _name in list(os.environ):
    if _name in _LEAKS or _name.startswith("SEEDCORE_"):
        del os.environ[_name]

from tests import traces  # noqa: E402

_BEGAN_HERE = traces.begin()

import gc  # noqa: E402
from collections.abc import Generator, Iterator  # noqa: E402
from contextlib import suppress  # noqa: E402
from importlib import import_module  # noqa: E402
from pathlib import Path, PurePath  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from xdist.scheduler import LoadScopeScheduling  # noqa: E402

from tests.programs import is_missing  # noqa: E402
from tests.servers import PostgresServer, embedded_binaries, running_server, system_binaries  # noqa: E402

# a shared machine pauses when it likes, and a fixture that a test resets itself may live as long as the test
settings.register_profile(
    "seedcore", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
settings.load_profile("seedcore")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-postgres15", action="store_true", help="fail, not skip, where it is not installed")
    parser.addoption("--require-pgbouncer", action="store_true", help="fail, not skip, where it is not installed")
    parser.addoption("--postgres", type=Path, help="bin folder of a PostgreSQL to be tried in place of the system's 15")
    parser.addoption("--require-browser", action="store_true", help="fail, not skip, where there is no Chromium")
    parser.addoption(
        "--require-promtool", action="store_true", help="fail, not skip, where Prometheus is not installed"
    )
    parser.addoption("--require-etcd", action="store_true", help="fail, not skip, where etcd is not installed")
    parser.addoption("--require-hosts", action="store_true", help="fail, not skip, where namespaces cannot be made")


# modules that share a Ray cluster, of two: one after the other in one worker. Every other file is a group of its own.
_SHARE_A_CLUSTER = {
    "test_agents.py": "ray-agents",
    "test_causes.py": "ray-agents",
    "test_door.py": "ray-callers",
    "test_embedded_registry.py": "ray-agents",
    "test_epochs.py": "ray-agents",
    "test_examples.py": "ray-callers",
    "test_following.py": "ray-callers",
    "test_manager.py": "ray-callers",
    "test_mixed_versions.py": "ray-callers",
    "test_phases.py": "ray-callers",
    "test_public_interface.py": "ray-callers",
    "test_registry_actor.py": "ray-agents",
    "test_registry_kills.py": "ray-agents",
    "test_thousand.py": "ray-agents",
    "test_upgrade.py": "ray-callers",
}


def _group_of(nodeid: str) -> str:
    """Which tests go together, in their order, in one worker: those of a file, or all that share a cluster, or all
    that have a deployment and no haste."""
    path = PurePath(nodeid.partition("::")[0])
    if path.parent.name in {"web", "browser"}:
        return "serve"
    return _SHARE_A_CLUSTER.get(path.name, path.name) if path.parent.name == "cluster" else path.name


# the long ones first: then the workers end at about the same time
_FIRST = (
    "test_quickstart.py",
    "serve",
    "test_docs.py",
    "ray-agents",
    "ray-callers",
    "test_simulation.py",
    "test_deaths.py",
    "test_embedded.py",
    "test_ladder.py",
    "test_sessions.py",
    "test_processes.py",
    "test_database_outages.py",
    "test_adoption.py",
)


# minutes of end-to-end work, for CI and after a change of what they test: `pytest -m slow`
_SLOW = {
    "browser",
    "cluster/test_causes.py",
    "cluster/test_dashboard.py",
    "cluster/test_examples.py",
    "cluster/test_memory.py",
    "cluster/test_metrics.py",
    "cluster/test_mixed_versions.py",
    "cluster/test_registry_kills.py",
    "cluster/test_upgrade.py",
    "docs",
    "faults/test_ladder.py",
    "faults/test_processes.py",
    "web",
}
_TESTS = Path(__file__).parent
# the -m of pyproject.toml
_DEFAULT_MARKS = "not soak and not slow"


def _is_slow(path: Path) -> bool:
    """Whether a folder or file of tests is, or is in, one of the slow ones."""
    return not _SLOW.isdisjoint(str(part.relative_to(_TESTS)) for part in (path, path.parent) if part != _TESTS.parent)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """In a run without slow and soak tests import no file of theirs: each worker would import all that they need."""
    return True if config.getoption("markexpr") == _DEFAULT_MARKS and _is_slow(collection_path) else None


def pytest_xdist_setupnodes(config: pytest.Config, specs: Any) -> None:
    """Before the workers start: what all of them import at first is compiled once."""
    traces.compile_for_all(_TESTS.parent / "seedcore")


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    # what is collected stays: the collector of garbage need not look at it, now and in every later run
    gc.disable()
    _import_in_turn(session.config)
    answer = yield
    gc.freeze()
    gc.enable()
    return answer


def _import_in_turn(config: pytest.Config) -> None:
    """Where nothing is compiled yet, let each worker begin with other files of tests, and find the rest compiled."""
    worker = getattr(config, "workerinput", None)
    if worker is None or not traces.has_own_bytecode():
        return
    files = sorted(path for path in _TESTS.glob("*/test_*.py") if not pytest_ignore_collect(path, config))
    first = len(files) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
    for file in (*files[first:], *files[:first]):
        # what is wrong with it is reported when it is collected
        with suppress(Exception, pytest.skip.Exception):
            import_module(f"tests.{file.parent.name}.{file.stem}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        is_soak = item.get_closest_marker("soak") is not None
        is_slow = _is_slow(item.path) or _is_of_postgres15(item)
        if is_slow and not is_soak:
            item.add_marker(pytest.mark.slow)
    order = {group: place for place, group in enumerate(_FIRST)}
    items.sort(key=lambda item: order.get(_group_of(item.nodeid), len(_FIRST)))


def _is_of_postgres15(item: pytest.Item) -> bool:
    """What runs on the oldest PostgreSQL too: by default the tests use the one of the wheel."""
    spec = getattr(item, "callspec", None)
    return spec is not None and any(value in ("postgres15", "dsn15") for value in spec.params.values())


class _Groups(LoadScopeScheduling):  # type: ignore[misc]
    """The workers share the tests: a group at a time, and at most one Ray cluster each. There are more workers than
    cores, because most tests wait more than they compute."""

    def _split_scope(self, nodeid: str) -> str:
        return _group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Groups:
    """Instead of xdist's own: that one marks node ids, which newer versions of pytest do not let it."""
    return _Groups(config, log)


_LEFT = pytest.StashKey[list[str]]()
# Ray's processes end a moment after their driver, and an embedded server after its registry
_END_S = 30.0


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run that leaves a process or a file behind has failed. Last: then the workers have ended."""
    if not _BEGAN_HERE:
        return
    # what Ray wrote is of use where something failed
    left = session.config.stash[_LEFT] = traces.finish(_END_S, keep=session.exitstatus != pytest.ExitCode.OK)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(_LEFT, []):
        terminalreporter.write_line(f"left behind: {line}", red=True)


@pytest.fixture(scope="session")
def postgres15(request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    """A PostgreSQL 15 of the system, sorting text by language, as many installations do."""
    given: Path | None = request.config.getoption("--postgres")
    if given is not None:
        with running_server(given) as server:
            yield server
        return
    binaries = system_binaries()
    if binaries is None:
        is_missing(request, "PostgreSQL 15", "postgresql-15", "--require-postgres15")
    with running_server(binaries, "--locale-provider=icu", "--icu-locale=en-US") as server:
        yield server


@pytest.fixture(scope="session")
def postgres18() -> Iterator[PostgresServer]:
    """The PostgreSQL 18 of the wheel, as it runs embedded."""
    with running_server(embedded_binaries()) as server:
        yield server
