"""What a run of the tests leaves on the machine: one folder, and a mark in the environment of every process it starts.

The process that begins the run makes both; all others inherit them. Imports nothing that reads the environment.
"""

from __future__ import annotations

import compileall
import os
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePath

import psutil

# the run's folder; not named SEEDCORE_: those are taken away from some processes
MARK = "PYTEST_RUN_OF_SEEDCORE"
# what others make in temporary folders, and Ray's sessions
_OTHERS = {"TMPDIR": "tmp", "RAY_TMPDIR": "ray"}
# what the processes of the run make once for all of them
_SHARED = "shared"
_KEPT = {*_OTHERS.values(), _SHARED, "compiled"}
Steps = Sequence[tuple[signal.Signals, float]]
_STEPS: Steps = ((signal.SIGINT, 20.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0))
_SHOWN_CHARS = 160


def begin() -> bool:
    """Make the run's folder, mark this process, and let signals reach its children; False where the run has begun."""
    if threading.current_thread() is threading.main_thread():
        # `nohup` and scripts start their background jobs deaf to these, and children inherit that
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, handler)
    if MARK in os.environ:
        return False
    # short: the path of a socket has about 100 characters at most
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    # servers run as another user where we are root
    folder.chmod(0o755)
    os.environ[MARK] = str(folder)
    for variable, name in _OTHERS.items():
        (folder / name).mkdir(mode=0o1777)
        os.environ[variable] = str(folder / name)
    # asked not to write beside the sources, hundreds of processes would compile them again each
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        _link_compiled(folder / "compiled")
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(folder / "compiled")
        sys.dont_write_bytecode = False
    # it may have been asked for before
    tempfile.tempdir = None
    return True


def _link_compiled(folder: Path) -> None:
    """Let a folder for bytecode begin with what is installed compiled, where Python looks for it there."""
    for root in map(sysconfig.get_path, ("stdlib", "purelib")):
        for here, inner, files in os.walk(root):
            inner[:] = [name for name in inner if name not in {"site-packages", "test", "tests"}]
            if PurePath(here).name == "__pycache__":
                there = folder / PurePath(here).parent.relative_to("/")
                there.mkdir(parents=True, exist_ok=True)
                for file in files:
                    os.symlink(f"{here}/{file}", there / file)


def has_own_bytecode() -> bool:
    """Whether this run has a folder for bytecode of its own, in which none of our files is at first."""
    return os.environ.get("PYTHONPYCACHEPREFIX") == f"{os.environ[MARK]}/compiled"


def compile_for_all(package: Path) -> None:
    """Compile a package for the processes of this run, if nothing is compiled yet."""
    if has_own_bytecode():
        compileall.compile_dir(package, quiet=2, workers=2)


def short_folder(prefix: str) -> Path:
    """A new folder with a short path, in the run's; the caller removes it."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=os.environ.get(MARK, "/tmp")))


def shared_folder(name: str) -> Path | None:
    """A folder that all processes of the run share, until its end; None where there is no run."""
    if MARK not in os.environ:
        return None
    folder = Path(os.environ[MARK]) / _SHARED / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def processes_of(folder: Path, mark: str | None = None) -> list[psutil.Process]:
    """Processes that work in a folder, name it in their command line, or have the mark; never this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid == os.getpid() or not lives(process):
                continue
            is_marked = mark is not None and process.environ().get(mark) == str(folder)
            if is_marked or any(str(folder) in word for word in process.cmdline()) or _is_within(process, folder):
                found.append(process)
    return found


def _is_within(process: psutil.Process, folder: Path) -> bool:
    return Path(process.cwd()).is_relative_to(folder)


def end(processes: list[psutil.Process], steps: Steps = _STEPS) -> list[str]:
    """End processes, in steps; how each was shown before."""
    shown = [_shown(process) for process in processes]
    for number, within_s in steps:
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(number)
        deadline_s = time.monotonic() + within_s
        while (processes := [process for process in processes if lives(process)]) and time.monotonic() < deadline_s:
            time.sleep(0.05)
    return shown


def lives(process: psutil.Process) -> bool:
    """Whether a process runs. Reaps none: that is its parent's."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _shown(process: psutil.Process) -> str:
    try:
        return f"pid {process.pid}: {' '.join(process.cmdline())[:_SHOWN_CHARS]}"
    except psutil.Error:
        return f"pid {process.pid}"


def finish(within_s: float, *, keep: bool = False) -> list[str]:
    """What the run has left behind after so many seconds, a line each. Ends the processes, and removes the files unless
    `keep`."""
    folder = Path(os.environ.pop(MARK))
    deadline_s = time.monotonic() + within_s
    while (left := processes_of(folder, MARK)) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    traces = end(left)
    traces += [f"file {path}" for path in sorted(folder.iterdir()) if path.name not in _KEPT]
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return traces
