"""The last lines of a log file, read on a thread: the file may be on a disk that does not answer."""

from __future__ import annotations

import asyncio
import os
import stat
import threading

from seedcore.core.timeouts import within

MAX_LINES = 5
MAX_BYTES = 2048
_MAX_READERS = 4

_readers = threading.Semaphore(_MAX_READERS)


async def last_lines(path: str, timeout_s: float) -> list[str]:
    """The last lines of a regular file, at most MAX_LINES of at most MAX_BYTES in all, as text that can be printed.
    Empty where it cannot be read in time, or where _MAX_READERS others are not read yet."""
    loop = asyncio.get_running_loop()
    lines: asyncio.Future[list[str]] = loop.create_future()
    if not _readers.acquire(blocking=False):
        return []

    def read() -> None:
        try:
            found = _read(path)
        finally:
            _readers.release()
        if not loop.is_closed():
            loop.call_soon_threadsafe(_settle, lines, found)

    # a daemon: a read that never ends does not keep the process
    threading.Thread(target=read, name="seedcore-log-tail", daemon=True).start()
    try:
        return await within(lines, timeout_s)
    except TimeoutError:
        return []


def _settle(lines: asyncio.Future[list[str]], found: list[str]) -> None:
    if not lines.done():
        lines.set_result(found)


def _read(path: str) -> list[str]:
    try:
        # a pipe without a writer would block
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError):
        return []
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return []
        text = os.pread(descriptor, MAX_BYTES, max(0, status.st_size - MAX_BYTES)).decode(errors="replace")
    except OSError:
        return []
    finally:
        os.close(descriptor)
    lines = ("".join(char if char.isprintable() else " " for char in line).strip() for line in text.splitlines())
    return [line for line in lines if line][-MAX_LINES:]
