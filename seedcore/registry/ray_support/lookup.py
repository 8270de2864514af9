"""Blocking Ray look-ups, kept off the event loop, bounded, and of one Ray session.

Ray's look-ups block for up to a minute while the GCS is down, so each runs in a daemon thread (which cannot hold up the
interpreter's exit) under a time limit, few at a time.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import ray
from ray._private.state import state
from ray.core.generated import common_pb2, gcs_pb2
from ray.exceptions import RaySystemError

from seedcore.core.errors import DirectoryUnavailableError, ForkedProcessError, SessionError
from seedcore.core.text import shown
from seedcore.core.timeouts import within
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.session import ActorHandle as ActorHandle

logger = logging.getLogger(__name__)

T = TypeVar("T")

_AT_ONCE = 16
_RESTARTING, _DEAD = 3, 4  # of ray's ActorTableData.ActorState
_WORKER_POLL_S = 0.02
_MAX_EXPLANATION_CHARS = 500
_NOT_TOLD = ("SYSTEM_ERROR", "")
_NOT_IN_A_LINE = re.compile(r"\x1b\[[0-9;]*m|[\x00-\x1f\x7f\ud800-\udfff]+")
_SLOT_POLL_S, _SLOT_POLL_MAX_S = 0.005, 0.05
_slots = threading.BoundedSemaphore(_AT_ONCE)


async def in_thread(look_up: Callable[[], T], timeout_s: float, on_late: Callable[[T], object] | None = None) -> T:
    """Run a blocking look-up; its result or its error.

    Raises DirectoryUnavailableError after `timeout_s` seconds, the wait for a free thread included, and where there is
    no Ray session or another one by then; ForkedProcessError. A result that comes when nobody waits any more goes to
    `on_late`, in a thread.
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
    pause_s = _SLOT_POLL_S
    while not _slots.acquire(blocking=False):
        if loop.time() > ends_s:
            raise DirectoryUnavailableError(f"{_AT_ONCE} look-ups hang; is the GCS down?")
        await asyncio.sleep(pause_s)
        # a thousand that wait must not keep the loop busy
        pause_s = min(_SLOT_POLL_MAX_S, pause_s * 1.5)
    answer: asyncio.Future[T] = loop.create_future()

    def hand_over_late(result: T) -> None:
        if on_late is not None:
            threading.Thread(target=on_late, args=(result,), name="seedcore-late", daemon=True).start()

    def finish(result: T | None, error: BaseException | None) -> None:
        if answer.done():
            if error is None:
                hand_over_late(result)  # type: ignore[arg-type]
        elif error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = look_up()
        except Exception as raised:  # noqa: BLE001 - handed to the awaiting side whole
            error = raised
        finally:
            _slots.release()
        try:
            loop.call_soon_threadsafe(finish, result, error)
        except RuntimeError:
            # the loop is closed: nobody waits
            if error is None:
                hand_over_late(result)  # type: ignore[arg-type]

    threading.Thread(target=run, name="seedcore-lookup", daemon=True).start()
    try:
        return await within(answer, max(0.001, ends_s - loop.time()))
    except TimeoutError:
        raise DirectoryUnavailableError(f"no answer from Ray within {timeout_s:g} s") from None
    except asyncio.CancelledError:
        # cancelled in the moment in which the answer came
        if answer.done() and not answer.cancelled() and answer.exception() is None:
            hand_over_late(answer.result())
        raise


async def find_actor(name: str, namespace: str, timeout_s: float) -> ActorHandle | None:
    """A weak handle of the named actor, or None where there is certainly none.

    Raises DirectoryUnavailableError where Ray cannot tell.
    """
    try:
        return await in_thread(lambda: session.get_actor(name, namespace), timeout_s)
    except ValueError:
        return None


def is_known_gone(handle: ActorHandle) -> bool:
    """Whether Ray has told this process that the actor died, or is being restarted: its process is gone in both.

    Ray tells of actors that this process has called, and this reads memory. It uses a private method of Ray's handle,
    `_get_local_state`, here and nowhere else; where a handle has none (Ray Client) nothing is ever told. Raises
    SessionError where the session of the handle has ended.
    """
    try:
        return is_observable(handle) and handle._get_local_state() in {_RESTARTING, _DEAD}
    except (AttributeError, RaySystemError) as error:
        # not by `passing`, which costs as much as all of a resolution
        raise SessionError(session.ENDED) from error


def is_known_dead(handle: ActorHandle) -> bool:
    """Whether Ray has told this process, which has called the actor, that it died for good or is of a session that has
    ended."""
    try:
        return is_observable(handle) and handle._get_local_state() in {None, _DEAD}
    except (AttributeError, RaySystemError):
        return True


def is_observable(handle: ActorHandle) -> bool:
    """Whether Ray tells this process what becomes of the actor."""
    return hasattr(handle, "_get_local_state")


def own_worker_id() -> str | None:
    """The Ray worker that this process is; None of a driver, and outside Ray."""
    try:
        with session.passing():
            context = session.context()
            return str(context.get_worker_id()) if context.worker.mode == ray.WORKER_MODE else None
    except (SessionError, ForkedProcessError):
        return None


async def why_worker_ended(worker_id: str, timeout_s: float) -> str | None:
    """What Ray knows of a worker's end beyond that its process is gone; None where it knows no more.

    Raises DirectoryUnavailableError where Ray does not tell within `timeout_s` seconds.
    """
    ends_s = time.monotonic() + timeout_s
    pause_s = _WORKER_POLL_S
    while True:
        ended = await in_thread(lambda: _worker_end(worker_id), max(0.001, ends_s - time.monotonic()))
        if ended is not None:
            return explained(*ended)
        if time.monotonic() > ends_s:
            raise DirectoryUnavailableError(f"Ray does not know yet that worker {worker_id} has ended")
        # the node that it ran on has not told the GCS yet
        await asyncio.sleep(pause_s)
        pause_s = min(0.5, pause_s * 1.5)


def _worker_end(worker_id: str) -> tuple[str, str] | None:
    """The type and the detail of a worker's end; None while Ray takes it for alive.

    Only the GCS's worker table tells it of an actor that Ray restarts, and no public call reads that without the
    dashboard: what is private of Ray is used here and nowhere else, and a Ray that has it otherwise tells nothing.
    """
    try:
        found = state._connect_and_get_accessor().get_worker_info(ray.WorkerID(bytes.fromhex(worker_id)))
        if found is None:
            return _NOT_TOLD
        row = gcs_pb2.WorkerTableData.FromString(found)
        return None if row.is_alive else (common_pb2.WorkerExitType.Name(row.exit_type), row.exit_detail)
    except (AttributeError, TypeError, ValueError) as error:
        logger.debug("Ray's worker table is not read: %r", error)
        return _NOT_TOLD


async def ray_remembers(name: str, namespace: str, timeout_s: float) -> str:
    """What Ray knows of an actor of that name, living or dead, in one line."""
    try:
        return await in_thread(lambda: _remembered(name, namespace), timeout_s)
    except DirectoryUnavailableError as error:
        return f"nor can Ray be asked about an actor of that name: {error.why}"


def _remembered(name: str, namespace: str) -> str:
    unknown = f"nor does Ray know an actor of that name in namespace {namespace!r}"
    try:
        rows = map(gcs_pb2.ActorTableData.FromString, state._connect_and_get_accessor().get_actor_table(None, None))
        newest = max(
            (row for row in rows if (row.name, row.ray_namespace) == (name, namespace)),
            key=lambda row: row.timestamp,
            default=None,
        )
    except (AttributeError, TypeError, ValueError) as error:
        logger.debug("Ray's actor table is not read: %r", error)
        return unknown
    if newest is None:
        return unknown
    if newest.state in {gcs_pb2.ActorTableData.DEPENDENCIES_UNREADY, gcs_pb2.ActorTableData.PENDING_CREATION}:
        wanted = ", ".join(f"{name}: {amount:g}" for name, amount in sorted(newest.required_resources.items()))
        return f"Ray has not started its actor yet: no node has room for it ({wanted or 'it needs no resources'})"
    if newest.state != gcs_pb2.ActorTableData.DEAD:
        return "Ray has an actor of that name, which does not report to the registry"
    cause = newest.death_cause
    if cause.HasField("creation_task_failure_context"):
        text = cause.creation_task_failure_context.formatted_exception_string
        why = explained("USER_ERROR", f"Traceback: {text}") if text else "an exception in its start-up"
    else:
        why = _in_a_line(cause.actor_died_error_context.error_message) or "Ray does not say why"
    return f"Ray remembers an actor of that name, which has died: {why}"


def explained(kind: str, detail: str) -> str | None:
    """One line for the type and the detail of a worker's end in Ray's words; None where a signal or an exit code says
    as much."""
    if kind == "NODE_OUT_OF_MEMORY":
        return "Ray killed it since its node ran low on memory"
    if kind == "SYSTEM_ERROR" or not detail.strip():
        return None
    said, _, traceback = detail.partition("Traceback:")
    if kind == "USER_ERROR":
        # frames are indented; the exception stands behind the last of them
        lines = [line for line in traceback.splitlines() if line.strip()]
        behind = len(lines)
        while behind > 0 and not lines[behind - 1].startswith((" ", "\t")):
            behind -= 1
        exception = lines[behind] if behind < len(lines) else said
        said = f"an exception in its start-up: {exception}"
    else:
        said = f"Ray says: {said}"
    return _in_a_line(said)


def _in_a_line(text: str) -> str:
    return shown(" ".join(_NOT_IN_A_LINE.sub(" ", text).split())[:_MAX_EXPLANATION_CHARS])


def actor_id_of(handle: ActorHandle) -> str:
    """The Ray actor id of a handle, in hexadecimal."""
    return str(handle._actor_id.hex())
