"""Proof that an actor runs an instance: the instance's own answer, or the registry's record after its actor's answer.

An actor is not an instance: Ray restarts an actor under the same name and id, and a call waits for the restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError

from seedcore.core.errors import SessionError
from seedcore.core.instances import Instance
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.actors import Proof
from seedcore.registry.ray_support.lookup import ActorHandle, is_known_gone

IsRegistered = Callable[[], Awaitable[bool]]
"""Whether the registry still has an instance as alive. It is called after the actor has answered, or was lost."""

_STATE_POLL_S = 0.01
_LOST_S = 0.5


async def prove(
    handle: ActorHandle, instance: Instance, timeout_s: float, is_registered: IsRegistered | None = None
) -> Proof:
    """Ask the actor whether its process runs an instance. If it cannot know (it is no RayAgent), its answer counts as
    long as the instance is registered after it.

    A call to an actor that Ray restarts waits for the next process. The proof ends earlier: once the instance is not
    registered any more or, without `is_registered`, once Ray has reported that the process is gone.
    """
    loop = asyncio.get_running_loop()
    ends_s = loop.time() + timeout_s
    is_lost = False
    asked = asyncio.create_task(_is_instance(handle, instance), name="instance-asked")
    try:
        while (left_s := ends_s - loop.time()) > 0:
            await asyncio.wait({asked}, timeout=min(left_s, _STATE_POLL_S))
            if asked.done():
                return await _judged(asked.result(), is_registered)
            if is_known_gone(handle):
                if is_registered is None or not await is_registered():
                    return Proof.ANOTHER
                if not is_lost:
                    # it may be the next instance already, and Ray's report late: then it answers by itself
                    is_lost, ends_s = True, min(ends_s, loop.time() + _LOST_S)
    except (ActorDiedError, RayActorError):
        return Proof.NO
    except (RayError, SessionError):
        return Proof.NOT_YET
    finally:
        asked.cancel()
        # a later error of it has no meaning any more, and must not be reported as never retrieved
        asked.add_done_callback(lambda ended: None if ended.cancelled() else ended.exception())
    return Proof.LOST if is_lost else Proof.NOT_YET


async def _judged(is_instance: bool | None, is_registered: IsRegistered | None) -> Proof:
    if is_instance is None:
        is_instance = is_registered is None or await is_registered()
    return Proof.YES if is_instance else Proof.ANOTHER


async def _is_instance(handle: ActorHandle, instance: Instance) -> bool | None:
    """Whether the actor's process runs the instance, None if the actor cannot know. Repeated while Ray cannot reach
    the actor."""
    method = "seedcore_instance" if hasattr(handle, "seedcore_instance") else "__ray_ready__"
    while True:
        try:
            answer = await session.ask(handle, method)
            if method == "__ray_ready__":
                return None
            logical_id, instance_id = answer
        except ActorUnavailableError:
            await asyncio.sleep(_STATE_POLL_S)
        except (RayTaskError, TypeError, ValueError):
            # a method of the same name in another class, which has answered all the same
            return None
        else:
            # an actor may host another agent than the one that is registered with it
            is_known = logical_id == instance.logical_id and instance_id is not None
            return instance_id == instance.instance_id if is_known else None
