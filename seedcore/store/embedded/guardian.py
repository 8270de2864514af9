"""The guardian of an embedded PostgreSQL: makes its data folder, runs it, ends it when no holder lives.

Holds the folder's lock for its lifetime, so there is one. If it is killed, the kernel tells the server, which
shuts down; the next holder starts another guardian. `server.py` knows how a server is run.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from seedcore.store.embedded.postgres import (
    EmbeddedPostgresError,
    Layout,
    Record,
    State,
    last_lines,
    layout_of,
    process_key,
)
from seedcore.store.embedded.server import Server, make_cluster, make_socket_dir, programs_for, server_user

logger = logging.getLogger("seedcore.embedded")

_MAX_TICK_S = 1.0
_FIRST_RESTART_DELAY_S = 0.1
_MAX_RESTART_DELAY_S = 10.0
_STEADY_S = 60.0
_MAX_LOG_BYTES = 5_000_000


class Wakeups:
    """Waits that SIGTERM or a dead child ends at once."""

    def __init__(self) -> None:
        self.is_told_to_stop = False
        self._read_end, write_end = os.pipe()
        for descriptor in (self._read_end, write_end):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        # the process that started us may have blocked or ignored any of them
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        for number in (signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, self._wake)

    def wait(self, timeout_s: float) -> None:
        """Wait for a signal, or the time."""
        if select.select([self._read_end], [], [], timeout_s)[0]:
            os.read(self._read_end, 4096)

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        self.is_told_to_stop = True

    def _wake(self, _signal: int, _frame: FrameType | None) -> None:
        """Nothing to do: the signal's byte in the pipe ends the wait."""


class Guardian:
    """One server's life. `run()` returns when it has ended."""

    def __init__(self, layout: Layout, lock: int, linger_s: float) -> None:
        """`lock`: the descriptor of the folder's lock, held."""
        self._layout = layout
        self._lock = lock
        self._linger_s = linger_s
        self._tick_s = min(_MAX_TICK_S, max(0.05, linger_s / 4))
        self._wakeups = Wakeups()
        key = process_key(os.getpid())
        assert key is not None
        self._key = key

    def run(self, serves: Callable[[], None]) -> None:
        """Run the server until no holder has lived for `linger_s` seconds, or SIGTERM. `serves` is told once.

        Raises EmbeddedPostgresError where it cannot be run at all.
        """
        self._publish(State.STARTING, self._layout.socket_dir)
        try:
            server = self._prepare()
            try:
                server.start(self._must_stop)
                if not self._must_stop():
                    self._publish(State.READY, server.socket_dir)
                    serves()
                    logger.info("serving at %s", server.socket_dir)
                    self._guard(server)
                with suppress(FileNotFoundError):
                    self._publish(State.STOPPING, server.socket_dir)
            finally:
                server.stop()
                if server.socket_dir != self._layout.socket_dir:
                    with suppress(OSError):
                        server.socket_dir.rmdir()
        finally:
            self._layout.record.unlink(missing_ok=True)
        logger.info("ended")

    def _prepare(self) -> Server:
        self._layout.check()
        user = server_user(self._layout)
        if not user.can_enter(self._layout.data_dir) and self._layout.is_ours_alone():
            # as tempfile.mkdtemp makes one: its parents may be open, and the data inside stays closed
            self._layout.let_pass()
        if not user.can_enter(self._layout.data_dir):
            raise EmbeddedPostgresError(
                f"as root it runs as {user.name}, who cannot enter {self._layout.data_dir}; "
                "set SEEDCORE_DATA_DIR to a folder that all may pass through, such as /var/lib/seedcore"
            )
        programs = programs_for(user, self._layout)
        make_cluster(user, self._layout, programs)
        return Server(user, self._layout, programs, make_socket_dir(user, self._layout))

    def _guard(self, server: Server) -> None:
        owned_s = started_s = time.monotonic()
        restart_delay_s = _FIRST_RESTART_DELAY_S
        while not self._must_stop():
            is_owned = self._is_owned()
            if is_owned:
                owned_s = time.monotonic()
            elif time.monotonic() - owned_s >= self._linger_s and self._may_end(server):
                return
            _bound_log(self._layout.guard_log)
            _bound_log(self._layout.postgres_log)
            if server.is_alive() or not is_owned:
                self._wakeups.wait(self._tick_s)
                continue
            if time.monotonic() - started_s > _STEADY_S:
                restart_delay_s = _FIRST_RESTART_DELAY_S
            self._restart(server, restart_delay_s)
            started_s = time.monotonic()
            restart_delay_s = min(_MAX_RESTART_DELAY_S, restart_delay_s * 2)

    def _restart(self, server: Server, delay_s: float) -> None:
        why = f"postgres ended: {last_lines(self._layout.postgres_log)}"
        logger.warning("%s; starting it again in %g s", why, delay_s)
        self._publish(State.STARTING, server.socket_dir, why)
        ends_s = time.monotonic() + delay_s
        while not self._must_stop() and (left_s := ends_s - time.monotonic()) > 0:
            self._wakeups.wait(left_s)
        if self._must_stop():
            return
        try:
            server.start(self._must_stop)
        except EmbeddedPostgresError as error:
            self._publish(State.STARTING, server.socket_dir, error.why)
            logger.warning("not started: %s", error.why)
            server.stop()
        else:
            self._publish(State.READY, server.socket_dir)

    def _must_stop(self) -> bool:
        """Told to, or our folder is gone: another guardian may hold the lock in a new one."""
        try:
            is_ours = os.path.samestat(os.stat(self._layout.lock), os.fstat(self._lock))
        except FileNotFoundError:
            is_ours = False
        return self._wakeups.is_told_to_stop or not is_ours

    def _may_end(self, server: Server) -> bool:
        # a holder first writes its file, then reads this: once it reads so, one more look of ours is final
        self._publish(State.STOPPING, server.socket_dir)
        if not self._is_owned():
            return True
        self._publish(State.READY if server.is_alive() else State.STARTING, server.socket_dir)
        return False

    def _is_owned(self) -> bool:
        is_owned = False
        with suppress(FileNotFoundError):
            for owner in list(self._layout.owners.iterdir()):
                pid = owner.name.partition("-")[0]
                if pid.isdecimal() and process_key(int(pid)) == owner.name:
                    is_owned = True
                else:
                    owner.unlink(missing_ok=True)
        return is_owned

    def _publish(self, state: State, socket_dir: Path, problem: str | None = None) -> None:
        Record(state, self._key, str(socket_dir), problem).write(self._layout)


def _shed_what_workers_inherit() -> None:
    """Ray makes its workers the first to be killed for memory, and nice; the server is neither's to be."""
    score = Path("/proc/self/oom_score_adj")
    with suppress(OSError):
        if int(score.read_text()) > 0:
            score.write_text("0")
    with suppress(OSError):
        if os.getpriority(os.PRIO_PROCESS, 0) > 0:
            os.setpriority(os.PRIO_PROCESS, 0, 0)


def _bound_log(log: Path) -> None:
    """Copy a long log away and empty it in place: whoever writes it appends, and keeps its descriptor."""
    with suppress(FileNotFoundError):
        if log.stat().st_size > _MAX_LOG_BYTES:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)


class Answer:
    """What the holder that started us is told, once, if it still listens."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def give(self, text: str) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(BrokenPipeError):
                os.write(descriptor, text.encode())
            os.close(descriptor)


def guard(layout: Layout, linger_s: float, answer: Answer) -> None:
    """Guard the folder's server unless another guardian does."""
    layout.require_trusted()
    lock = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Guardian(layout, lock, linger_s).run(lambda: answer.give("ready"))
    except BlockingIOError:
        logger.info("another guardian is at work")
    finally:
        os.close(lock)
    # to a holder that has heard nothing yet: look again
    answer.give("busy")


def main() -> None:
    parser = argparse.ArgumentParser(description="Guards an embedded PostgreSQL.")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--linger-s", type=float, default=10.0)
    parser.add_argument("--answer-fd", type=int, help="where to tell how it went")
    chosen = parser.parse_args()
    if os.fork():
        # the holder waits for this process alone; the guardian goes on as nobody's child
        os._exit(0)
    os.umask(0o077)
    _shed_what_workers_inherit()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(message)s")
    layout = layout_of(chosen.data_dir)
    answer = Answer(chosen.answer_fd)
    try:
        guard(layout, chosen.linger_s, answer)
    except EmbeddedPostgresError as error:
        logger.exception("the embedded server cannot run")
        answer.give(error.why)
        sys.exit(1)
    except Exception as error:
        logger.exception("the guardian failed")
        answer.give(f"{type(error).__name__}: {error}; see {layout.guard_log}")
        sys.exit(1)


if __name__ == "__main__":
    main()
