"""The gate to Ray: SeedCore makes every call to a cluster through this module, in the Ray session of this process.

A session is one connection of this process to Ray, from `ray.init` to `ray.shutdown`; an actor has one for its life. A
handle belongs to the session in which it was found, even where the next session is of the same cluster.

Ray starts or joins a cluster by itself when a process without a session makes a call (auto-init). This module refuses a
call without a session, and then calls Ray beneath its auto-init: a `ray.shutdown()` on another thread between the two
raises an error and starts nothing. One race remains, inside Ray: a call that its core has begun while another thread
ends that core. A lock around `ray.shutdown()` would close it, and user code calls `ray.shutdown()`.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import weakref
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import ray
import ray.util
from ray._private.worker import global_worker
from ray.exceptions import ActorHandleNotFoundError, RayTaskError
from ray.runtime_context import RuntimeContext
from ray.util.client import ray as ray_client

from seedcore.core.errors import CannotKnowError, ForkedProcessError, RegistryError, SessionError, first_line
from seedcore.core.timeouts import abandon

ActorHandle: TypeAlias = Any
"""The handle of an actor of any class: ray.actor.ActorHandle, or that of Ray Client, which is not a subclass of it.

It stays untyped because Ray 2.60 types the methods of a handle of an unknown class as Never: mypy then takes a call of
one for the end of the function, and silently skips the code behind it.
"""

T = TypeVar("T")

_SESSION_CHECK_S = 1.0
_AUTO_INIT = "auto_init_wrapper"
_NOT_CONNECTED = "this process is not connected to Ray (ray.init)"
ENDED = "the connection to Ray ended during the call"
_FORKED = (
    "this process was forked from one that is connected to Ray: use spawn "
    "(multiprocessing.get_context('spawn')), and make agents and reporters in the spawned process"
)


class Session:
    """One connection to Ray. Two are never equal."""

    __slots__ = ("__weakref__", "connection")

    def __init__(self, connection: object) -> None:
        # weak: Ray must be able to free it at the end of the session
        self.connection = weakref.ref(connection)

    def require_still_current(self) -> None:
        """Raise SessionError unless it is the session of this process now."""
        if current() is not self:
            raise SessionError(ENDED)


_door = threading.Lock()
_current: Session | None = None
_inherited: object | None = None


def current() -> Session | None:
    """The session of this process; None where it has none, or was forked from a process that has one."""
    connection = ray_connection()
    if connection is None or connection is _inherited:
        return None
    session = _current
    return session if session is not None and session.connection() is connection else _begun(connection)


def require() -> Session:
    """The session of this process. Raises SessionError where it has none, and as `refuse_forked`."""
    session = current()
    if session is None:
        refuse_forked()
        raise SessionError(_NOT_CONNECTED)
    return session


def require_connected() -> None:
    """Raise CannotKnowError without a session: a question could only wait, or be answered by what was before."""
    try:
        require()
    except SessionError as error:
        raise CannotKnowError("*", first_line(error)) from None


def own_node_id() -> str | None:
    """The Ray node that this process runs on; None where it is connected to none, and for a Ray Client process: what
    Ray names the node of that client's server."""
    try:
        with passing():
            return None if is_ray_client() else str(context().get_node_id())
    except SessionError:
        return None


def refuse_forked() -> None:
    """Raise ForkedProcessError in a process forked from a connected one: it has Ray's sockets without Ray's threads."""
    if _inherited is not None and ray_connection() is _inherited:
        raise ForkedProcessError(_FORKED)


@contextmanager
def passing() -> Iterator[Session]:
    """Run calls to Ray in the session of this process.

    Raises SessionError where there is no session, the session ends before the calls do, or a handle is of another one;
    ForkedProcessError as `refuse_forked`; and what the calls raise.
    """
    session = require()
    try:
        yield session
    except (RegistryError, RayTaskError):
        raise
    except Exception as error:
        if current() is not session:
            raise SessionError(ENDED) from error
        # a method of a handle that Ray does not know raises no class of its own
        if type(error) is Exception or isinstance(error, ActorHandleNotFoundError):
            why = first_line(error).rstrip(".")
            raise SessionError(f"{why}; find the actor again: a handle is of one Ray session") from error
        raise


async def ask(handle: ActorHandle, method: str, *args: object, **kwargs: object) -> Any:
    """The answer of an actor's method.

    Raises RayTaskError for the method's own error; AttributeError or TypeError where the actor has no such method, or
    the arguments do not fit; another RayError where the actor does not answer; and as `passing`.
    """
    return await ask_within(math.inf, handle, method, *args, **kwargs)


async def ask_within(timeout_s: float, handle: ActorHandle, method: str, *args: object, **kwargs: object) -> Any:
    """As `ask`. Raises asyncio.TimeoutError after `timeout_s` seconds."""
    with passing() as began:
        return await in_session(submitted(getattr(handle, method), args, kwargs), began, timeout_s)


async def in_session(
    answer: Awaitable[T], began: Session, timeout_s: float = math.inf, check_s: float = _SESSION_CHECK_S
) -> T:
    """The answer of a call that was made in the session `began`. Raises asyncio.TimeoutError after `timeout_s` seconds,
    and SessionError where the session ends first, which Ray reports to no pending call: it is looked at every `check_s`
    seconds."""
    pending = asyncio.ensure_future(answer)
    try:
        while timeout_s > 0 and not (await asyncio.wait({pending}, timeout=min(check_s, timeout_s)))[0]:
            began.require_still_current()
            timeout_s -= check_s
    except BaseException:
        abandon(pending)
        raise
    if not pending.done():
        abandon(pending)
        raise TimeoutError
    return pending.result()


def send(handle: ActorHandle, method: str, *args: object) -> None:
    """Call an actor's method and do not wait for it. Raises as `passing`."""
    with passing():
        submitted(getattr(handle, method), args, {})


def create(actor_class: Any, options: Mapping[str, Any], *args: object, **kwargs: object) -> ActorHandle:
    """A new actor of the class that `ray.remote` returned. Raises what Ray raises for the options, and as `passing`."""
    with passing():
        # validates the options
        actor_class.options(**options)
        return submitted(actor_class, args, kwargs, **options)


def get_actor(name: str, namespace: str) -> ActorHandle:
    """`ray.get_actor`, which blocks. Raises ValueError where there is none, and as `passing`."""
    with passing():
        return without_auto_init(ray.get_actor)(name, namespace=namespace)


def kill(handle: ActorHandle) -> None:
    """`ray.kill`, for good. Raises as `passing`."""
    with passing():
        without_auto_init(ray.kill)(handle, no_restart=True)


def nodes() -> list[dict[str, Any]]:
    """`ray.nodes`, which blocks. Raises as `passing`."""
    with passing():
        found: list[dict[str, Any]] = without_auto_init(ray.nodes)()
        return found


def list_named_actors() -> list[dict[str, str]]:
    """`ray.util.list_named_actors` of all namespaces, which blocks. Raises as `passing`."""
    with passing():
        found: list[dict[str, str]] = without_auto_init(ray.util.list_named_actors)(all_namespaces=True)
        return found


def context() -> RuntimeContext:
    """`ray.get_runtime_context`. Its methods raise as `passing` only within `passing`."""
    with passing():
        found: RuntimeContext = without_auto_init(ray.get_runtime_context)()
        return found


def cluster_name() -> str:
    """The unique name of the cluster. Raises as `passing`."""
    with passing():
        return str(context().get_session_name())


def folder() -> Path | None:
    """Ray's folder of this session on this machine; None without a session, and with Ray Client."""
    node = global_worker.node
    return None if node is None or current() is None else Path(node.get_session_dir_path())


def is_ray_client() -> bool:
    """Whether this process has joined its cluster by Ray Client (ray://): it may run on any host."""
    return bool(ray_client.is_connected())


def submitted(stub: Any, args: Sequence[object], kwargs: Mapping[str, object], **options: Any) -> Any:
    submit = getattr(type(stub), "_remote", None)
    inner = without_auto_init(submit)
    if inner is submit:
        # a stub of Ray Client has no auto-init
        return (stub.options(**options) if options else stub).remote(*args, **kwargs)
    return inner(stub, args, kwargs, **options)


def without_auto_init(api: Any) -> Any:
    """The function beneath Ray's auto-init, or the function itself where it has none."""
    is_wrapped = getattr(getattr(api, "__code__", None), "co_name", None) == _AUTO_INIT
    return api.__wrapped__ if is_wrapped else api


def ray_connection() -> object | None:
    """An object that Ray makes for each connection, or None. A read from memory: Ray's public ids of a session take
    several microseconds, and with Ray Client a call to its server."""
    node: object | None = global_worker.node
    if node is not None and global_worker.connected:
        return node
    client = ray_client.get_context().client_worker
    return client if client is not None and client.is_connected() else None


def _begun(connection: object) -> Session:
    global _current
    with _door:
        if _current is None or _current.connection() is not connection:
            _current = Session(connection)
        return _current


def _note_fork() -> None:
    global _door, _inherited
    # a thread that the child does not have may hold the old one
    _door = threading.Lock()
    _inherited = ray_connection()


os.register_at_fork(after_in_child=_note_fork)
