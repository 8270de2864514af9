"""Calls to agents: bounded in time, a bounded number at once, with named failures."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from ray.exceptions import RayError, RayTaskError

from seedcore.core.answers import Origin
from seedcore.core.errors import AgentCallError, RegistryError, SessionError, first_line
from seedcore.core.limits import check_timeout
from seedcore.core.timeouts import end, within
from seedcore.registry.ray_support import session
from seedcore.tier0.answers import Gathered

T = TypeVar("T")

_AT_ONCE = 64


async def bounded_call(agent_id: str, call: Callable[[], Any], timeout_s: float | None) -> Any:
    """The result of one call to an agent within `timeout_s` seconds (None: without a bound).

    Raises InvalidInputError for a bad bound, AgentCallError at the bound, the agent's own RegistryError, or what Ray
    raises: RayTaskError, which is also the agent's own exception, or a RayActorError.
    """
    check_timeout(timeout_s)

    async def answer() -> Any:
        # a handle may belong to another Ray session, and a call without a session would start one
        with session.passing():
            return await call()

    try:
        return await within(answer(), timeout_s)
    except RayTaskError as error:
        # first: the agent's own TimeoutError is one too
        if isinstance(error.cause, RegistryError):
            raise error.cause from None
        raise
    except TimeoutError:
        raise AgentCallError(agent_id, f"no answer within {timeout_s:g} s") from None
    except SessionError as error:
        raise AgentCallError(agent_id, error.why) from error
    except AttributeError as error:
        raise AgentCallError(agent_id, f"its actor has no such method: {error}") from None


async def gather(ids: Sequence[str], work: Callable[[str], Awaitable[T]], source: Origin) -> Gathered[T]:
    """Do the work for each id, a bounded number at once. Failures are returned by id, not raised."""
    slots = asyncio.Semaphore(_AT_ONCE)
    results: dict[str, T] = {}
    failures: dict[str, str] = {}

    async def one(agent_id: str) -> None:
        async with slots:
            try:
                results[agent_id] = await work(agent_id)
            except RayTaskError as error:
                failures[agent_id] = f"raised {error.cause!r}"
            except (RegistryError, RayError) as error:
                failures[agent_id] = first_line(error)

    tasks = [asyncio.create_task(one(agent_id)) for agent_id in ids]
    try:
        await asyncio.gather(*tasks)
    finally:
        # if one raises an unexpected error, or the caller is cancelled
        await end(*tasks)
    return Gathered(results, failures, source, datetime.now(UTC))
