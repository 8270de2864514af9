"""The gate to Ray: every call of ours passes it, and it names the Ray session that this process has now.

A session is one connection of this process to Ray, from `ray.init` to `ray.shutdown`; an actor has one for life. Handles,
and what was learned with them, belong to the session that they were found in, also where the next one is of the same cluster.

Ray joins or starts a cluster by itself where a process without one makes a call (auto-init). Ours never do: the gate
refuses without a session, and then calls Ray beneath its auto-init, so that a `ray.shutdown()` on another thread between
the two raises an error and starts nothing. What remains is inside Ray: a call that its core has begun while another
thread ends that core. No lock around `ray.shutdown()` is ours to take.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import ray
import ray.util
from ray._private.worker import global_worker
from ray.exceptions import ActorHandleNotFoundError, RayTaskError
from ray.runtime_context import RuntimeContext
from ray.util.client import ray as ray_client

from seedcore.core.errors import ForkedProcessError, RegistryError, SessionError, first_line

ActorHandle = Any  # ray.actor.ActorHandle, or its Ray Client twin: both without useful types

_LOOK_S = 1.0
_AUTO_INIT = "auto_init_wrapper"
_NOT_CONNECTED = "this process is not connected to Ray (ray.init)"
ENDED = "the connection to Ray ended during the call"
_FORKED = (
    "this process was forked from one that is connected to Ray: use spawn "
    "(multiprocessing.get_context('spawn')), and make agents and reporters in the new process"
)


class Session:
    """One connection to Ray. Two are never equal."""

    __slots__ = ("__weakref__", "connection")

    def __init__(self, connection: object) -> None:
        # weak: Ray tears down what it finds unused
        self.connection = weakref.ref(connection)

    def require_still_current(self) -> None:
        """Raise SessionError where it is not the session of this process any more."""
        if current() is not self:
            raise SessionError(ENDED)


_door = threading.Lock()
_current: Session | None = None
_inherited: object | None = None


def current() -> Session | None:
    """The session of this process; None without one, and in a process forked from a connected one."""
    connection = ray_connection()
    if connection is None or connection is _inherited:
        return None
    session = _current
    return session if session is not None and session.connection() is connection else _begun(connection)


def require() -> Session:
    """The session of this process. Raises SessionError without one, ForkedProcessError as `refuse_forked`."""
    session = current()
    if session is None:
        refuse_forked()
        raise SessionError(_NOT_CONNECTED)
    return session


def refuse_forked() -> None:
    """Raise ForkedProcessError in a process forked from a connected one: Ray's threads and sockets are the parent's."""
    if _inherited is not None and ray_connection() is _inherited:
        raise ForkedProcessError(_FORKED)


@contextmanager
def passing() -> Iterator[Session]:
    """Calls to Ray in the session of this process, with what Ray itself raises in them named.

    Raises SessionError where there is no session, it ends meanwhile, or a handle is of another one; ForkedProcessError as
    `refuse_forked`; and what the call raises.
    """
    session = require()
    try:
        yield session
    except (RegistryError, RayTaskError):
        raise
    except Exception as error:
        if current() is not session:
            raise SessionError(ENDED) from error
        # Ray has no class of its own for the handle that its core does not know
        if type(error) is Exception or isinstance(error, ActorHandleNotFoundError):
            raise SessionError(f"{first_line(error)}; find the actor again: handles are of one Ray session") from error
        raise


async def ask(handle: ActorHandle, method: str, *args: object, **kwargs: object) -> Any:
    """What an actor's method answers.

    Raises as `passing`: RayTaskError is the method's own error. AttributeError and TypeError where the actor has no such
    method, or it takes no such arguments.
    """
    with passing() as began:
        answer = asyncio.ensure_future(_submitted(getattr(handle, method), args, kwargs))
        try:
            # Ray leaves an answer pending for ever where its session ends first
            while not (await asyncio.wait({answer}, timeout=_LOOK_S))[0]:
                began.require_still_current()
            return answer.result()
        finally:
            answer.cancel()


def create(actor_class: Any, options: Mapping[str, Any], *args: object, **kwargs: object) -> ActorHandle:
    """A new actor of what `ray.remote` made of a class. Raises what Ray raises for the options, and as `passing`."""
    with passing():
        # refuses what is no option
        actor_class.options(**options)
        return _submitted(actor_class, args, kwargs, **options)


def get_actor(name: str, namespace: str) -> ActorHandle:
    """`ray.get_actor`, which blocks. Raises ValueError where there is none, and as `passing`."""
    with passing():
        return _without_auto_init(ray.get_actor)(name, namespace=namespace)


def kill(handle: ActorHandle) -> None:
    """`ray.kill`, for good. Raises as `passing`."""
    with passing():
        _without_auto_init(ray.kill)(handle, no_restart=True)


def nodes() -> list[dict[str, Any]]:
    """`ray.nodes`, which blocks. Raises as `passing`."""
    with passing():
        found: list[dict[str, Any]] = _without_auto_init(ray.nodes)()
        return found


def list_named_actors() -> list[dict[str, str]]:
    """`ray.util.list_named_actors` of all namespaces, which blocks. Raises as `passing`."""
    with passing():
        found: list[dict[str, str]] = _without_auto_init(ray.util.list_named_actors)(all_namespaces=True)
        return found


def context() -> RuntimeContext:
    """What Ray says of this process. Raises as `passing`."""
    with passing():
        return cast(RuntimeContext, _without_auto_init(ray.get_runtime_context)())


def cluster_name() -> str:
    """The name of the cluster, which no other has. Raises as `passing`."""
    with passing():
        return str(context().get_session_name())


def _submitted(stub: Any, args: Sequence[object], kwargs: Mapping[str, object], **options: Any) -> Any:
    submit = getattr(type(stub), "_remote", None)
    inner = _without_auto_init(submit)
    if inner is submit:
        # a twin of Ray Client's, which has no auto-init
        return (stub.options(**options) if options else stub).remote(*args, **kwargs)
    return inner(stub, args, kwargs, **options)


def _without_auto_init(api: Any) -> Any:
    """What Ray's call does once it has made sure of a session."""
    is_wrapped = getattr(getattr(api, "__code__", None), "co_name", None) == _AUTO_INIT
    return api.__wrapped__ if is_wrapped else api


def ray_connection() -> object | None:
    """What Ray makes anew for each connection: read from memory, in less than a microsecond."""
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
    # a thread that the child does not have may have held it
    _door = threading.Lock()
    _inherited = ray_connection()


os.register_at_fork(after_in_child=_note_fork)
