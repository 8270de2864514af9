"""BlockingManager: the calls of Tier0MemoryManager for code without an event loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from seedcore.core.errors import NotResolvableError
from seedcore.core.selection import Policy
from seedcore.registry.caller.known_agents import KnownAgent
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.ray_support.lookup import ActorHandle
from seedcore.settings import Mode, Settings, get_settings
from seedcore.tier0.blocking_watch import BlockingWatch
from seedcore.tier0.hosted import HostedManager, process_manager
from seedcore.tier0.manager import Tier0MemoryManager

P = ParamSpec("P")
R = TypeVar("R")


def blocking(
    method: Callable[Concatenate[Tier0MemoryManager, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[BlockingManager, P], R]:
    """The method of BlockingManager that calls this one of the manager and waits, with its types."""

    @functools.wraps(method)
    def call(self: BlockingManager, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.hosted.run(lambda manager: method(manager, *args, **kwargs), _instead(method.__name__))

    return call


class BlockingManager:
    """Tier0MemoryManager for plain scripts, threads, and actors with blocking methods: the same calls with the same
    arguments, time limits and errors, and each blocks until it has its result.

    Any thread may use it. A cached handle is returned without a switch of threads; everything else happens on one
    thread of the process, which all blocking managers and reporters share. In a running event loop a cached handle is
    returned, and a call that would block raises RunningLoopError. Without arguments it is the process's manager, as
    `seedcore.get_actor` uses it. With arguments it has one of its own, which follows the registry until `close`.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        mode: Mode | None = None,
        connection: RegistryConnection | None = None,
    ) -> None:
        """Opens no connection, and starts no thread. With arguments: a manager of its own, made as Tier0MemoryManager
        is."""
        self._is_shared = settings is None and mode is None and connection is None
        self.hosted = (
            process_manager()
            if self._is_shared
            else HostedManager(
                Tier0MemoryManager(settings, mode=mode, connection=connection),
                settings if settings is not None else get_settings(),
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def mode(self) -> Mode:
        """The sources that it uses."""
        return self.hosted.manager.mode

    @property
    def connection(self) -> RegistryConnection:
        """Its connection to the registry."""
        return self.hosted.manager.connection

    def close(self) -> None:
        """Stop following the registry, drop every cached handle, and leave the thread; a later call starts again. Ends
        no agent. The process's manager stays open for its other users until the process ends."""
        if not self._is_shared:
            self.hosted.close()

    def cached(self, logical_id: str) -> ActorHandle | None:
        """As Tier0MemoryManager.cached."""
        return self.hosted.manager.cached(logical_id)

    def list_agents(self) -> tuple[KnownAgent, ...]:
        """As Tier0MemoryManager.list_agents: the agents known so far. Asks no source."""
        return self.hosted.manager.list_agents()

    def resolve(
        self, logical_id: str, *, allow_late: bool = False, policy: Policy = Policy.NEWEST, key: str = ""
    ) -> ActorHandle:
        """As Tier0MemoryManager.resolve."""
        handle = self.hosted.manager.cached(logical_id) if policy is Policy.NEWEST else None
        if handle is not None:
            return handle
        return self._resolve(logical_id, allow_late=allow_late, policy=policy, key=key)

    def watch(
        self,
        *,
        ids: Sequence[str] | None = None,
        organ_id: str | None = None,
        selector: str | None = None,
        endpoint: str | None = None,
        since: str | None = None,
    ) -> BlockingWatch:
        """As Tier0MemoryManager.watch: an iterator and a context manager, whose events are those after this call."""
        watch = self.hosted.manager.watch(ids=ids, organ_id=organ_id, selector=selector, endpoint=endpoint, since=since)
        return BlockingWatch(self.hosted, watch)

    def get_agent(self, agent_id: str) -> ActorHandle | None:
        """As Tier0MemoryManager.get_agent."""
        try:
            return self.resolve(agent_id)
        except NotResolvableError:
            return None

    _resolve = blocking(Tier0MemoryManager.resolve)
    create_agent = blocking(Tier0MemoryManager.create_agent)
    create_agents_batch = blocking(Tier0MemoryManager.create_agents_batch)
    attach_existing_actor = blocking(Tier0MemoryManager.attach_existing_actor)
    locate = blocking(Tier0MemoryManager.locate)
    discover_from_registry = blocking(Tier0MemoryManager.discover_from_registry)
    discover_and_refresh_agents = blocking(Tier0MemoryManager.discover_and_refresh_agents)
    wait_for = blocking(Tier0MemoryManager.wait_for)
    reconcile = blocking(Tier0MemoryManager.reconcile)
    execute_task_on_agent = blocking(Tier0MemoryManager.execute_task_on_agent)
    collect_heartbeats = blocking(Tier0MemoryManager.collect_heartbeats)
    collect_agent_stats = blocking(Tier0MemoryManager.collect_agent_stats)
    prune = blocking(Tier0MemoryManager.prune)
    shutdown_agents = blocking(Tier0MemoryManager.shutdown_agents)
    shutdown_agents_batch = blocking(Tier0MemoryManager.shutdown_agents_batch)
    get_system_summary = blocking(Tier0MemoryManager.get_system_summary)


def _instead(name: str) -> str:
    return f"call `await manager.{name}(...)` of a Tier0MemoryManager"
