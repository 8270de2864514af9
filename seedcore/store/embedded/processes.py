"""Processes of an embedded server: names that survive the reuse of pids, and the search for leftover ones."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil


def process_key(pid: int) -> str | None:
    """Return a name of a live process that no later process has: its pid and start time. None if it is dead."""
    if sys.platform != "linux":
        try:
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else f"{pid}-{process.create_time()}"
        except psutil.Error:
            return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # ticks since boot: unlike psutil's time, they do not change when the clock is set
    return None if fields[0] in ("Z", "X") else f"{pid}-{fields[19]}"


def is_alive(key: str) -> bool:
    """Whether the process with this key is alive."""
    pid = key.partition("-")[0]
    return pid.isdecimal() and process_key(int(pid)) == key


def own_key() -> str:
    """Return the key of this process."""
    key = process_key(os.getpid())
    assert key is not None
    return key


def servers_in(cluster: Path) -> list[psutil.Process]:
    """Return the live server processes whose working folder is this data."""
    data = cluster.stat()
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.name() != "postgres" or not runs(process):
                continue
            # by inode: in another container the same path may name another folder
            where = f"/proc/{process.pid}/cwd" if sys.platform == "linux" else process.cwd()
            if os.path.samestat(os.stat(where), data):
                found.append(process)
    return found


def runs(process: psutil.Process) -> bool:
    """Whether a process runs. A zombie does not: without an init that reaps orphans, it stays forever."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
