"""A sign of life from an actor, and its end."""

from __future__ import annotations

import asyncio
import time
from enum import StrEnum

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError

from seedcore.core.errors import (
    SessionError,
)
from seedcore.core.timeouts import within
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.lookup import ActorHandle

_KILL_POLL_S = 0.02


class Proof(StrEnum):
    """The answer to a probe: the instance lives; its actor is dead; the process is, or will be, another instance's; Ray
    reports that the process is gone; or no answer yet."""

    YES = "yes"
    NO = "no"
    ANOTHER = "another"
    LOST = "lost"
    NOT_YET = "not yet"


async def probe(handle: ActorHandle, timeout_s: float) -> Proof:
    """Ask the actor for a sign of life. A result counts, an error that is ready does not."""
    try:
        await within(session.ask(handle, "__ray_ready__"), timeout_s)
    except (TimeoutError, ActorUnavailableError, SessionError):
        return Proof.NOT_YET
    except (ActorDiedError, RayActorError):
        return Proof.NO
    except RayError:
        return Proof.NOT_YET
    return Proof.YES


async def end_actor(handle: ActorHandle, timeout_s: float) -> bool:
    """Kill an actor for good and see it dead; False where it still lives after `timeout_s` seconds. Raises SessionError
    where the handle is of another Ray session."""
    session.kill(handle)
    ends_s = time.monotonic() + timeout_s
    while await probe(handle, timeout_s) is not Proof.NO:
        if time.monotonic() > ends_s:
            return False
        await asyncio.sleep(_KILL_POLL_S)
    return True
