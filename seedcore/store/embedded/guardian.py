"""The guardian process: creates the data, runs the server, restarts it after a crash, stops it when no holder lives.

It holds the lock of the data folder, so there is at most one. If it is killed, the kernel shuts the server down, and
the next holder starts another guardian.
"""

from __future__ import annotations

import argparse
import errno
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
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from seedcore.core.backoff import Backoff
from seedcore.store.embedded.cluster import create_cluster, create_socket_dir
from seedcore.store.embedded.layout import EmbeddedPostgresError, Layout, last_lines, layout_of, unusable
from seedcore.store.embedded.processes import is_alive, own_key
from seedcore.store.embedded.programs import programs_for, server_user
from seedcore.store.embedded.record import Record, State
from seedcore.store.embedded.server import Server

logger = logging.getLogger("seedcore.embedded")


@dataclass(frozen=True, slots=True)
class Bounds:
    """The times of a guardian, and the size at which it rotates its logs.

    The server outlives its last holder by `linger_s`. If it ran for `steady_s`, the next restart is the first again.
    """

    linger_s: float = 10.0
    longest_tick_s: float = 1.0
    first_restart_s: float = 0.1
    longest_restart_s: float = 10.0
    steady_s: float = 60.0
    max_log_bytes: int = 5_000_000

    @property
    def tick_s(self) -> float:
        """The time between two looks at the holders."""
        return min(self.longest_tick_s, max(0.05, self.linger_s / 4))


class Wakeups:
    """Waits that end at once at SIGTERM or when a child dies."""

    def __init__(self) -> None:
        self.must_stop = False
        self._read_end, write_end = os.pipe()
        for descriptor in (self._read_end, write_end):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        # the parent may have blocked or ignored any of these signals
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        for number in (signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, self._wake)

    def wait(self, timeout_s: float) -> None:
        """Wait for a signal, at most `timeout_s` seconds."""
        if select.select([self._read_end], [], [], timeout_s)[0]:
            os.read(self._read_end, 4096)

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        self.must_stop = True

    def _wake(self, _signal: int, _frame: FrameType | None) -> None:
        """Do nothing: the byte that the signal writes to the pipe ends the wait."""


class Guardian:
    """The life of one server. `run()` returns when the server has ended."""

    def __init__(self, layout: Layout, lock: int, bounds: Bounds) -> None:
        """`lock` is the descriptor of the folder's lock, which the caller holds."""
        self._layout = layout
        self._lock = lock
        self._bounds = bounds
        self._wakeups = Wakeups()
        self._key = own_key()
        self._restarts = Backoff(bounds.first_restart_s, bounds.longest_restart_s)
        self._unpublished: Record | None = None
        self._is_disk_full = False

    def run(self, on_ready: Callable[[], None]) -> None:
        """Run the server until no holder has lived for `linger_s` seconds, or SIGTERM. Calls `on_ready` once.

        Raises EmbeddedPostgresError if the server cannot start at all.
        """
        self._publish(State.STARTING, self._layout.socket_dir)
        try:
            server = self._prepare()
            try:
                server.start(self._must_stop)
                if not self._must_stop():
                    self._publish(State.READY, server.socket_dir)
                    on_ready()
                    logger.info("ready at %s", server.socket_dir)
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
            # tempfile.mkdtemp creates such a folder. Its parents may be open, and the data in it stays closed
            self._layout.let_pass()
        if not user.can_enter(self._layout.data_dir):
            raise EmbeddedPostgresError(
                f"started by root, it runs as {user.name}, who cannot enter {self._layout.data_dir}; "
                "set SEEDCORE_DATA_DIR to a folder that all users can pass through, such as /var/lib/seedcore"
            )
        programs = programs_for(user, self._layout)
        create_cluster(user, self._layout, programs)
        return Server(user, self._layout, programs, create_socket_dir(user, self._layout))

    def _guard(self, server: Server) -> None:
        held_s = started_s = time.monotonic()
        while not self._must_stop():
            self._publish_again()
            is_held = self._is_held()
            if is_held:
                held_s = time.monotonic()
            elif time.monotonic() - held_s >= self._bounds.linger_s and self._may_end(server):
                return
            for log in (self._layout.guard_log, self._layout.postgres_log):
                _rotate(log, self._bounds.max_log_bytes)
            if server.is_alive() or not is_held:
                self._wakeups.wait(self._bounds.tick_s)
                continue
            if time.monotonic() - started_s > self._bounds.steady_s:
                self._restarts.reset()
            self._restart(server)
            started_s = time.monotonic()

    def _restart(self, server: Server) -> None:
        delay_s = self._restarts.next_s()
        why = f"postgres ended: {last_lines(self._layout.postgres_log)}"
        logger.warning("%s; restarting it in %.1f s", why, delay_s)
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
        """Whether SIGTERM arrived, or the folder was removed: another guardian may hold the lock in a new one."""
        try:
            is_ours = os.path.samestat(os.stat(self._layout.lock), os.fstat(self._lock))
        except FileNotFoundError:
            is_ours = False
        return self._wakeups.must_stop or not is_ours

    def _may_end(self, server: Server) -> bool:
        # publish, then look for holders; a new holder does the reverse, so one sees the other
        self._publish(State.STOPPING, server.socket_dir)
        if not self._is_held():
            return True
        self._publish(State.READY if server.is_alive() else State.STARTING, server.socket_dir)
        return False

    def _is_held(self) -> bool:
        """Whether a holder is alive. Removes the files of dead ones."""
        is_held = False
        with suppress(FileNotFoundError):
            for owner in list(self._layout.owners.iterdir()):
                if is_alive(owner.name):
                    is_held = True
                else:
                    owner.unlink(missing_ok=True)
        return is_held

    def _publish(self, state: State, socket_dir: Path, problem: str | None = None) -> None:
        """Publish the state: at once, or when the disk has space for it. Raises FileNotFoundError if there is no folder
        for it."""
        self._unpublished = Record(state, self._key, str(socket_dir), problem)
        self._publish_again()

    def _publish_again(self) -> None:
        if self._unpublished is None:
            return
        try:
            self._unpublished.write(self._layout)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not self._is_disk_full:
                logger.warning("the state %s is not published yet: %s", self._unpublished.state, error.strerror)
            self._is_disk_full = True
        else:
            self._unpublished, self._is_disk_full = None, False


def _reset_priorities() -> None:
    """Undo what a Ray worker passes on: the kernel kills workers first when memory is short, and they are nice."""
    score = Path("/proc/self/oom_score_adj")
    with suppress(OSError):
        if int(score.read_text()) > 0:
            score.write_text("0")
    with suppress(OSError):
        if os.getpriority(os.PRIO_PROCESS, 0) > 0:
            os.setpriority(os.PRIO_PROCESS, 0, 0)


def _rotate(log: Path, max_bytes: int) -> None:
    """Copy a log that is too long, and empty it in place: its writers append, and keep their descriptors."""
    copy = log.with_name(f"{log.name}.1")
    with suppress(FileNotFoundError):
        if log.stat().st_size > max_bytes:
            try:
                shutil.copyfile(log, copy)
            except OSError:
                # on a full disk the space is worth more than the copy
                copy.unlink(missing_ok=True)
            os.truncate(log, 0)


class Answer:
    """The answer to the holder that started this guardian. Only the first one is sent."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def send(self, text: str) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(BrokenPipeError):
                os.write(descriptor, text.encode())
            os.close(descriptor)


def guard(layout: Layout, bounds: Bounds, answer: Answer) -> None:
    """Guard the folder's server, unless another guardian does."""
    layout.require_trusted()
    lock = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Guardian(layout, lock, bounds).run(lambda: answer.send("ready"))
    except BlockingIOError:
        logger.info("another guardian is running")
    finally:
        os.close(lock)
    # a holder without an answer tries again
    answer.send("busy")


def main() -> None:
    parser = argparse.ArgumentParser(description="Guards an embedded PostgreSQL.")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--linger-s", type=float, default=Bounds().linger_s)
    parser.add_argument("--answer-fd", type=int, help="descriptor for the answer to the holder")
    chosen = parser.parse_args()
    if os.fork():
        # the holder waits for this process; the guardian continues as an orphan
        os._exit(0)
    os.umask(0o077)
    _reset_priorities()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(message)s")
    layout = layout_of(chosen.data_dir)
    answer = Answer(chosen.answer_fd)
    try:
        guard(layout, Bounds(linger_s=chosen.linger_s), answer)
    except EmbeddedPostgresError as error:
        logger.exception("the embedded server cannot run")
        answer.send(error.why)
        sys.exit(1)
    except OSError as error:
        logger.exception("the guardian cannot work in its folder")
        answer.send(unusable(layout.data_dir, error).why)
        sys.exit(1)
    except Exception as error:
        logger.exception("the guardian failed")
        answer.send(f"{type(error).__name__}: {error}; see {layout.guard_log}")
        sys.exit(1)


if __name__ == "__main__":
    main()
