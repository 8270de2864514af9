"""Programs that a test starts: each in a session of its own, and ended with all that it has started there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

from tests.traces import end, lives


def run(
    *command: str | Path, timeout_s: float, check: bool = False, env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as subprocess.run does; whatever happens, nothing of its session is left."""
    pipe = subprocess.PIPE
    with started(*command, env=env, stdout=pipe, stderr=pipe, text=True, **options) as process:
        output, errors = process.communicate(timeout=timeout_s)
    done = subprocess.CompletedProcess(command, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


@contextmanager
def started(
    *command: str | Path, stdout: int | IO[Any] | None = None, stderr: int | IO[Any] | None = None, **options: Any
) -> Iterator[subprocess.Popen[Any]]:
    """A program that runs as long as the block lasts, or ends by itself before."""
    with subprocess.Popen(
        list(map(str, command)), stdout=stdout, stderr=stderr, start_new_session=True, **options
    ) as process:
        try:
            yield process
        finally:
            end_session(process)


def end_session(process: subprocess.Popen[Any]) -> None:
    """End a program and every process of its session, in steps."""
    end([member for member in psutil.process_iter() if _is_of_session(member, process.pid) and lives(member)])
    process.wait(1.0)


def _is_of_session(process: psutil.Process, leader: int) -> bool:
    try:
        return os.getsid(process.pid) == leader
    except ProcessLookupError:
        return False
