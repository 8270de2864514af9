"""Blocking Ray look-ups, kept off the event loop, bounded, and of one Ray session.

Ray's look-ups block for up to a minute while the GCS is down, so each runs in a daemon thread (which cannot hold up the
interpreter's exit) under a time limit, few at a time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import TypeVar

import ray
from ray.exceptions import RaySystemError

from seedcore.core.backoff import Backoff
from seedcore.core.causes import Cause
from seedcore.core.errors import DirectoryUnavailableError, ForkedProcessError, SessionError
from seedcore.core.timeouts import within
from seedcore.registry.ray_support import private_tables, session
from seedcore.registry.ray_support.session import ActorHandle as ActorHandle

T = TypeVar("T")

_AT_ONCE = 16
_RESTARTING, _DEAD = 3, 4  # of ray's ActorTableData.ActorState
_WORKER_POLL_S = (0.02, 0.5)
_SLOT_POLL_S = (0.005, 0.05)
_slots = threading.BoundedSemaphore(_AT_ONCE)


async def in_thread(look_up: Callable[[], T], timeout_s: float, on_late: Callable[[T], object] | None = None) -> T:
    """Run a blocking look-up; its result or its error.

    Raises DirectoryUnavailableError after `timeout_s` seconds, the wait for a free thread included, and where there is
    no Ray session or another one by then; ForkedProcessError. A result that arrives after that goes to `on_late`, in a
    thread.
    """
    try:
        with session.passing() as began:
            found = await _in_thread(look_up, timeout_s, on_late)
            # a handle found in one session must not be kept in the next
            began.require_still_current()
            return found
    except SessionError as error:
        raise DirectoryUnavailableError(error.why) from error


async def _in_thread(look_up: Callable[[], T], timeout_s: float, on_late: Callable[[T], object] | None) -> T:
    loop = asyncio.get_running_loop()
    ends_s = loop.time() + timeout_s
    # one bound for every event loop of the process, so no asyncio primitive fits
    pauses = Backoff(*_SLOT_POLL_S)
    while not _slots.acquire(blocking=False):
        if loop.time() > ends_s:
            raise DirectoryUnavailableError(f"{_AT_ONCE} look-ups hang; is the GCS down?")
        # it grows, since a thousand that wait must not keep the loop busy
        await asyncio.sleep(pauses.next_s())
    answer: asyncio.Future[T] = loop.create_future()

    def pass_late(result: T) -> None:
        if on_late is not None:
            threading.Thread(target=on_late, args=(result,), name="seedcore-late", daemon=True).start()

    def finish(result: T | None, error: BaseException | None) -> None:
        if answer.done():
            if error is None:
                pass_late(result)  # type: ignore[arg-type]
        elif error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = look_up()
        except Exception as raised:  # noqa: BLE001 - raised on the awaiting side
            error = raised
        finally:
            _slots.release()
        try:
            loop.call_soon_threadsafe(finish, result, error)
        except RuntimeError:
            # the loop is closed, and its waiters with it
            if error is None:
                pass_late(result)  # type: ignore[arg-type]

    threading.Thread(target=run, name="seedcore-lookup", daemon=True).start()
    try:
        return await within(answer, max(0.001, ends_s - loop.time()))
    except TimeoutError:
        raise DirectoryUnavailableError(f"no answer from Ray within {timeout_s:g} s") from None
    except asyncio.CancelledError:
        # cancelled in the moment in which the answer came
        if answer.done() and not answer.cancelled() and answer.exception() is None:
            pass_late(answer.result())
        raise


FindActor = Callable[[str, str, float], Awaitable[ActorHandle | None]]
"""Finds an actor by name and namespace within so many seconds, as `find_actor` does."""


async def find_actor(name: str, namespace: str, timeout_s: float) -> ActorHandle | None:
    """A weak handle of the named actor, or None where there is certainly none.

    Raises DirectoryUnavailableError where Ray does not answer.
    """
    try:
        return await in_thread(lambda: session.get_actor(name, namespace), timeout_s)
    except ValueError:
        return None


def is_known_gone(handle: ActorHandle) -> bool:
    """Whether Ray has notified this process that the actor died or is being restarted: its process is gone in both.

    Ray notifies a process of the actors that it has called; this reads memory. It uses a private method of Ray's
    handle, `_get_local_state`, here and nowhere else; a handle without it (Ray Client) is never known to be gone.
    Raises SessionError where the session of the handle has ended.
    """
    try:
        return is_observable(handle) and handle._get_local_state() in {_RESTARTING, _DEAD}
    except (AttributeError, RaySystemError) as error:
        # not by `passing`, which costs as much as all of a resolution
        raise SessionError(session.ENDED) from error


def is_known_dead(handle: ActorHandle) -> bool:
    """Whether Ray has notified this process, which has called the actor, that it died for good, or the session of the
    handle has ended."""
    try:
        return is_observable(handle) and handle._get_local_state() in {None, _DEAD}
    except (AttributeError, RaySystemError):
        return True


def is_observable(handle: ActorHandle) -> bool:
    """Whether Ray notifies this process of the actor's state."""
    return hasattr(handle, "_get_local_state")


def own_worker_id() -> str | None:
    """The Ray worker that this process is; None of a driver, and outside Ray."""
    try:
        with session.passing():
            context = session.context()
            return str(context.get_worker_id()) if context.worker.mode == ray.WORKER_MODE else None
    except (SessionError, ForkedProcessError):
        return None


async def why_worker_ended(worker_id: str, timeout_s: float) -> Cause | None:
    """What Ray knows of a worker's end beyond that its process is gone; None where it knows no more.

    Raises DirectoryUnavailableError where Ray does not answer, or does not know yet that it has ended, within
    `timeout_s` seconds.
    """
    ends_s = time.monotonic() + timeout_s
    pauses = Backoff(*_WORKER_POLL_S)
    while True:
        ended = await in_thread(lambda: private_tables.worker_end(worker_id), max(0.001, ends_s - time.monotonic()))
        if ended is not None:
            return private_tables.explained(ended)
        if time.monotonic() > ends_s:
            raise DirectoryUnavailableError(f"Ray does not know yet that worker {worker_id} has ended")
        # its node has not reported that to the GCS yet
        await asyncio.sleep(pauses.next_s())


async def ray_remembers(name: str, namespace: str, timeout_s: float) -> str:
    """What Ray knows of an actor of that name, living or dead, in one line."""
    try:
        return await in_thread(lambda: private_tables.newest_actor(name, namespace), timeout_s)
    except DirectoryUnavailableError as error:
        return f"nor can Ray be asked about an actor of that name: {error.why}"


async def draining_nodes(timeout_s: float) -> Mapping[str, datetime | None]:
    """The nodes that Ray drains, with the deadline of each, None where it has none.

    Raises DirectoryUnavailableError where Ray does not answer, or has moved the table.
    """
    return await in_thread(lambda: private_tables.draining_nodes(timeout_s), timeout_s)


def actor_id_of(handle: ActorHandle) -> str:
    """The Ray actor id of a handle, in hexadecimal."""
    return str(handle._actor_id.hex())
