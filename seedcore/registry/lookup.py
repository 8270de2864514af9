"""Blocking Ray look-ups, kept off the event loop and bounded.

`ray.get_actor` and `ray.util.list_named_actors` block for up to a minute while the GCS is down, so each runs
in a daemon thread (which cannot hold up the interpreter's exit) under a time limit, few at a time.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import ray

from seedcore.core.errors import DirectoryUnavailableError
from seedcore.core.waiting import within

T = TypeVar("T")

ActorHandle = Any  # ray.actor.ActorHandle, or its Ray Client twin: both without useful types

_AT_ONCE = 16
_RESTARTING, _DEAD = 3, 4  # of ray's ActorTableData.ActorState
_SLOT_POLL_S, _SLOT_POLL_MAX_S = 0.005, 0.05
_slots = threading.BoundedSemaphore(_AT_ONCE)


async def in_thread(look_up: Callable[[], T], timeout_s: float, on_late: Callable[[T], object] | None = None) -> T:
    """Run a blocking look-up; its result or its error.

    Raises DirectoryUnavailableError after `timeout_s` seconds, the wait for a free thread included. A result that
    comes when nobody waits any more goes to `on_late`, in a thread.
    """
    if not ray.is_initialized():
        raise DirectoryUnavailableError("this process is not connected to Ray (ray.init)")
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
    except asyncio.TimeoutError:
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
        return await in_thread(lambda: ray.get_actor(name, namespace=namespace), timeout_s)
    except ValueError:
        return None


def is_told_gone(handle: ActorHandle) -> bool:
    """Whether Ray has told this process that the actor died, or is being restarted: its process is gone in both.

    Ray tells of actors that this process has called, and this reads memory. It uses a private method of Ray's handle,
    `_get_local_state`, here and nowhere else; where a handle has none (Ray Client) nothing is ever told.
    """
    return can_be_told(handle) and handle._get_local_state() in {_RESTARTING, _DEAD}


def can_be_told(handle: ActorHandle) -> bool:
    """Whether Ray tells this process what becomes of the actor."""
    return hasattr(handle, "_get_local_state")


def connected_cluster() -> str | None:
    """The address of the cluster that this process is connected to, or None."""
    return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else None


def actor_id_of(handle: ActorHandle) -> str:
    """The Ray actor id of a handle, in hexadecimal."""
    return str(handle._actor_id.hex())
