"""The users of an embedded server: a process that holds it, and one that only connects to it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

from seedcore.store.embedded.layout import (
    EmbeddedPostgresError,
    Layout,
    last_lines,
    layout_of,
    open_log,
    space_problem,
    unusable,
)
from seedcore.store.embedded.processes import own_key
from seedcore.store.embedded.record import State, read_record

GUARDIAN_MODULE = "seedcore.store.embedded.guardian"
_POLL_S = 0.05
# what an interpreter needs to start, and to be measured; no variable of Ray or libpq, which would change its behaviour
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
_KEPT_PREFIXES = ("LC_", "LD_LIBRARY_", "DYLD_LIBRARY_", "COVERAGE_")


class EmbeddedPostgres:
    """This process's hold on the server of a data folder. The hold belongs to the process: any object releases it."""

    def __init__(self, data_dir: Path, linger_s: float = 10.0) -> None:
        """`linger_s`: how long the server outlives its last holder. The value of the holder that starts it counts."""
        self._layout = layout_of(data_dir)
        self._linger_s = linger_s
        self._dsn: str | None = None
        self._holder_pid = 0

    @property
    def dsn(self) -> str:
        """The DSN. Raises EmbeddedPostgresError if this process does not hold the server."""
        # a forked child is another process and holds nothing
        if self._dsn is None or self._holder_pid != os.getpid():
            raise EmbeddedPostgresError("it is not held by this process; call hold() first")
        return self._dsn

    def hold(self, timeout_s: float = 60.0) -> str:
        """Start the server, or join the running one, and return its DSN. Blocks. Idempotent; safe beside other holders.

        Call it again if connections keep failing: when the guardian is killed, the server ends with it, and the next
        hold() starts both. The DSN stays the same.
        """
        self._layout.check()
        ends_s = time.monotonic() + timeout_s
        held_before = os.path.exists(self._owner_file())
        try:
            dsn = self._join(ends_s, timeout_s)
        except EmbeddedPostgresError:
            if not held_before:
                self.release()
            raise
        self._dsn, self._holder_pid = dsn, os.getpid()
        return dsn

    def release(self) -> None:
        """End the hold of this process. Idempotent."""
        self._dsn = None
        try:
            self._owner_file().unlink(missing_ok=True)
        except OSError as error:
            raise unusable(self._layout.data_dir, error) from error

    def running(self) -> bool:
        """Whether the server accepts connections."""
        return dsn_if_running(self._layout.data_dir) is not None

    def _join(self, ends_s: float, timeout_s: float) -> str:
        while True:
            # create the file, then read the record; a guardian that ends does the reverse, so one sees the other
            self._register()
            record = read_record(self._layout)
            if record is not None and record.state is State.READY and record.accepts():
                return record.dsn
            if time.monotonic() >= ends_s:
                why = space_problem(self._layout.data_dir)
                if why is None:
                    why = record.problem if record is not None and record.problem else "it is not ready yet"
                raise EmbeddedPostgresError(
                    f"no connection within {timeout_s:g} s: {why}; "
                    f"see {self._layout.guard_log} and {self._layout.postgres_log}"
                )
            if record is not None or not start_guardian(self._layout, self._linger_s, ends_s):
                time.sleep(_POLL_S)

    def _owner_file(self) -> Path:
        return self._layout.owners / own_key()

    def _register(self) -> None:
        self._layout.create()
        try:
            self._owner_file().touch(mode=0o600)
        except OSError as error:
            raise unusable(self._layout.data_dir, error) from error


def dsn_if_running(data_dir: Path) -> str | None:
    """Return the DSN of a server that accepts connections, without holding it; None if there is none."""
    record = read_record(layout_of(data_dir))
    return record.dsn if record is not None and record.state is State.READY and record.accepts() else None


def start_guardian(layout: Layout, linger_s: float, ends_s: float) -> bool:
    """Start a guardian and wait for its answer: True if its server is ready, False if another guardian is running.

    `ends_s` is on the monotonic clock. Raises EmbeddedPostgresError with the reason if the guardian fails.
    """
    answer_end, guardian_end = os.pipe()
    try:
        try:
            launched = _launch(layout, linger_s, guardian_end)
        finally:
            os.close(guardian_end)
        with launched:
            answer = _read_all(answer_end, ends_s)
            if answer is None:
                # it has detached itself by now, or hangs before that and would never be ended
                launched.kill()
    finally:
        os.close(answer_end)
    if answer in ("ready", "busy", None):
        return answer == "ready"
    if not answer:
        answer = f"the guardian ended at once: {last_lines(layout.guard_log)}"
    raise EmbeddedPostgresError(answer)


def _launch(layout: Layout, linger_s: float, guardian_end: int) -> subprocess.Popen[bytes]:
    """Start the process. It detaches itself, because Ray kills the children of a worker that dies."""
    command = [
        sys.executable, "-m", GUARDIAN_MODULE, "--data-dir", str(layout.data_dir),
        "--linger-s", str(linger_s), "--answer-fd", str(guardian_end),
    ]  # fmt: skip
    try:
        log = open_log(layout.guard_log)
    except OSError as error:
        raise unusable(layout.data_dir, error) from error
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=_guardian_environment(),
            start_new_session=True, pass_fds=(guardian_end,),
        )  # fmt: skip
    except OSError as error:
        raise EmbeddedPostgresError(f"{sys.executable!r} cannot be started: {error.strerror}") from error
    finally:
        os.close(log)


def _guardian_environment() -> dict[str, str]:
    environment = {
        name: value for name, value in os.environ.items() if name in _KEPT_VARIABLES or name.startswith(_KEPT_PREFIXES)
    }
    # its working folder is not on its path, but a checkout must be; site-packages is already there, and would hide
    # parts of the standard library if it came first
    ours = Path(__file__).resolve().parents[3]
    given = [str(Path(path).absolute()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = given if ours.name in ("site-packages", "dist-packages") else [str(ours), *given]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def _read_all(descriptor: int, ends_s: float) -> str | None:
    """Read until the other end is closed; None after `ends_s`."""
    # not select(), which fails for descriptors above 1023
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    parts: list[bytes] = []
    while poller.poll(max(0.0, ends_s - time.monotonic()) * 1000):
        part = os.read(descriptor, 4096)
        if not part:
            return b"".join(parts).decode(errors="replace")
        parts.append(part)
    return None
