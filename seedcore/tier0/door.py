"""The calls of `seedcore` that block, beside `ray.get_actor`: over one manager of the process, on one thread."""

from __future__ import annotations

from collections.abc import Sequence

from seedcore.core.answers import Listing
from seedcore.core.errors import InvalidInputError, ResolveTimeoutError
from seedcore.core.limits import check_timeout
from seedcore.core.selection import Policy
from seedcore.registry.ray_support.lookup import ActorHandle
from seedcore.registry.ray_support.session import require_connected
from seedcore.tier0.blocking_watch import BlockingWatch
from seedcore.tier0.hosted import HostedManager, in_running_loop, made_manager, process_manager
from seedcore.tier0.manager import get_tier0_manager


def get_actor(
    logical_id: str,
    *,
    timeout_s: float | None = None,
    allow_late: bool = False,
    policy: Policy = Policy.NEWEST,
    key: str = "",
) -> ActorHandle:
    """A live, proven handle of the agent, as Tier0MemoryManager.resolve returns it, from any thread. A cached handle is
    returned at once; else the process's manager finds it within `timeout_s` seconds (None: two calls to the registry
    and one to the agent, 12 s by default).

    Raises NotResolvableError, CannotKnowError, InvalidInputError or ForkedProcessError as `resolve`,
    ResolveTimeoutError, which is a CannotKnowError, at the time limit, and RunningLoopError if the handle is not cached
    and the call would block a running event loop.
    """
    hosted = made_manager()
    if hosted is not None and policy is Policy.NEWEST:
        handle = hosted.manager.cached(logical_id)
        if handle is not None:
            return handle
    if policy is Policy.NEWEST and in_running_loop():
        handle = _cached_by_the_loops_manager(logical_id)
        if handle is not None:
            return handle
    hosted = process_manager()
    within_s = _bound_s(hosted, timeout_s)
    return hosted.run(
        lambda manager: manager.resolve(logical_id, allow_late=allow_late, policy=policy, key=key),
        f"call `await seedcore.get_tier0_manager().resolve({logical_id!r})`",
        within_s,
        ResolveTimeoutError(logical_id, f"no answer within {within_s:g} s"),
    )


def list_agents(
    organ_id: str | None = None,
    selector: str | None = None,
    *,
    endpoint: str | None = None,
    timeout_s: float | None = None,
) -> Listing:
    """Every alive instance of the current epoch; of an organ, with labels that match a selector, or with an endpoint of
    this name, if given.

    As Tier0MemoryManager.discover_from_registry: `source` and `complete` of the listing show whether the registry
    answered. While it is away, the agents of the last listing are returned with complete=False. Raises
    InvalidInputError, CannotKnowError without Ray, and as `get_actor` ForkedProcessError, ResolveTimeoutError and
    RunningLoopError.
    """
    hosted = process_manager()
    within_s = _bound_s(hosted, timeout_s)
    listing = hosted.run(
        lambda manager: manager.discover_from_registry(organ_id, selector, endpoint),
        "call `await seedcore.get_tier0_manager().discover_from_registry(...)`",
        within_s,
        ResolveTimeoutError("*", f"no answer within {within_s:g} s"),
    )
    require_connected()
    return listing


def wait_for(
    *,
    ids: Sequence[str] | None = None,
    organ_id: str | None = None,
    selector: str | None = None,
    endpoint: str | None = None,
    count: int | None = None,
    timeout_s: float,
) -> list[ActorHandle]:
    """Proven handles as soon as `count` agents are ready: of these ids (default: all of them), or of an organ, a
    selector, and those with an endpoint of this name. Ctrl-C ends the wait at once. Raises NotReadyError at the
    deadline, which has the reason for each missing agent, InvalidInputError, CannotKnowError without Ray,
    RunningLoopError and ForkedProcessError."""
    return process_manager().run(
        lambda manager: manager.wait_for(
            ids=ids, organ_id=organ_id, selector=selector, endpoint=endpoint, count=count, timeout_s=timeout_s
        ),
        "call `await seedcore.get_tier0_manager().wait_for(...)`",
    )


def watch(
    *,
    ids: Sequence[str] | None = None,
    organ_id: str | None = None,
    selector: str | None = None,
    endpoint: str | None = None,
    since: str | None = None,
) -> BlockingWatch:
    """The changes of agents as events, from this call on: of these ids; or of an organ, a selector, and those with an
    endpoint of this name; or of all. An iterator, and a context manager that closes it. `since` is the position of an
    earlier event, or "start" for an event with the state first. Raises CannotKnowError if no registry answers, or
    without Ray, InvalidInputError, RunningLoopError and ForkedProcessError."""
    hosted = process_manager()
    watch = hosted.manager.watch(ids=ids, organ_id=organ_id, selector=selector, endpoint=endpoint, since=since)
    if not in_running_loop():
        require_connected()
    return BlockingWatch(hosted, watch)


def _bound_s(hosted: HostedManager, timeout_s: float | None) -> float:
    bound_s = check_timeout(timeout_s)
    if bound_s == 0:
        raise InvalidInputError("timeout_s", "must be more than 0 seconds")
    return hosted.patience_s if bound_s is None else bound_s


def _cached_by_the_loops_manager(logical_id: str) -> ActorHandle | None:
    """The handle that the process's asynchronous manager has: what this module asks its callers to await, it may have
    cached."""
    return get_tier0_manager().cached(logical_id) if get_tier0_manager.cache_info().currsize else None
