"""Who this process is in Ray: the actor, node and address recorded with an instance."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

import ray
import ray.util

from seedcore.core.errors import DirectoryUnavailableError, ForkedProcessError, SessionError
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.lookup import actor_id_of, find_actor, in_thread
from seedcore.registry.ray_support.process_keys import own_process_key
from seedcore.registry.ray_support.session import own_node_id


@dataclass(frozen=True, slots=True)
class Identity:
    """Where an agent runs. `actor_name` and `actor_id` are None in a process that is no named actor.

    `namespace` is where a look-up has found the named actor, else None; `is_proven` is False where it has a name and no
    look-up has found it yet. `node_id` is the Ray node that the process runs on; None where it runs on none
    (`is_guest`: it has joined by Ray Client, from any host), or is not connected yet.
    """

    actor_name: str | None
    actor_id: str | None
    namespace: str | None
    node_id: str | None
    ip_address: str | None
    pid: int
    process_key: str | None
    is_proven: bool = True
    is_guest: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether Ray has answered everything that it will know."""
        return self.is_proven and (self.is_guest or self.node_id is not None)


@dataclass(frozen=True, slots=True)
class ProcessEpoch:
    """The epoch that this process was started in; `is_insisted`: its maker named it."""

    name: str
    is_insisted: bool


_process_epoch: ProcessEpoch | None = None


def process_epoch() -> ProcessEpoch | None:
    """The epoch of this process's agents that name none, where the maker of its actor has named one."""
    return _process_epoch


def note_process_epoch(epoch: ProcessEpoch | None) -> None:
    """Note the epoch that this process was started in."""
    global _process_epoch
    _process_epoch = epoch


def end_own_actor() -> None:
    """End the actor that this code runs in once its running methods have returned, for good: Ray does not restart it.

    Does nothing outside an actor.
    """
    if own_actor()[0] is not None:
        session.send(session.context().current_actor, "__ray_terminate__")


async def identify(actor_name: str | None, namespace: str, timeout_s: float) -> Identity:
    """This process's identity; `actor_name` names the agent's actor where it is not the one that runs this.

    Never raises: what Ray does not answer is None. A namespace is proven by looking the name up, since a detached
    actor's own runtime context names its creator's; a wrong one would make the registry believe that the actor is gone.
    """
    try:
        with session.passing():
            return await _identified(actor_name, namespace, timeout_s)
    except (SessionError, ForkedProcessError):
        return Identity(actor_name, None, None, None, None, os.getpid(), own_process_key(), is_proven=not actor_name)


async def _identified(actor_name: str | None, namespace: str, timeout_s: float) -> Identity:
    context = session.context()
    own_id, own_name = own_actor()
    # None: the agent's actor is another than the one that runs this, if any does
    own_id = own_id if actor_name in {None, own_name} else None
    name = actor_name if actor_name is not None else own_name
    proven: tuple[str, str] | None = None
    if name is not None:
        proven = await _find(name, own_id, tuple(dict.fromkeys((namespace, context.namespace))), timeout_s)
    return Identity(
        actor_name=name,
        actor_id=own_id if proven is None else proven[1],
        namespace=None if proven is None else proven[0],
        node_id=own_node_id(),
        ip_address=ray.util.get_node_ip_address(),
        pid=os.getpid(),
        process_key=own_process_key(),
        is_proven=name is None or proven is not None,
        is_guest=session.is_ray_client(),
    )


def own_actor() -> tuple[str | None, str | None]:
    """Id and name of the actor that this code runs in; None outside one, None for the name of an unnamed one."""
    try:
        with session.passing():
            context = session.context()
            is_actor = context.worker.mode == ray.WORKER_MODE
            return (context.get_actor_id(), context.get_actor_name() or None) if is_actor else (None, None)
    except (SessionError, ForkedProcessError):
        return None, None


def own_actor_has(method: str) -> bool:
    """Whether this code runs in an actor whose class has this method."""
    return own_actor()[0] is not None and hasattr(session.context().current_actor, method)


def was_restarted() -> bool:
    """Whether this code runs in an actor whose process Ray has replaced."""
    if own_actor()[0] is None:
        return False
    with warnings.catch_warnings():
        # Ray's own implementation reads an attribute that it deprecates
        warnings.simplefilter("ignore")
        return bool(session.context().was_current_actor_reconstructed)


async def _find(name: str, own_id: str | None, candidates: tuple[str, ...], timeout_s: float) -> tuple[str, str] | None:
    """Namespace and id of the named actor; the one with the id `own_id`, where that is known. None: not found."""
    try:
        for namespace in candidates:
            handle = await find_actor(name, namespace, timeout_s)
            if handle is not None and own_id in {None, actor_id_of(handle)}:
                return namespace, actor_id_of(handle)
        if own_id is not None:
            # another creator's choice: whichever namespace has an actor of this name and this very id
            return await in_thread(lambda: _find_anywhere(name, own_id), timeout_s)
    except DirectoryUnavailableError:
        pass
    return None


def _find_anywhere(name: str, actor_id: str) -> tuple[str, str] | None:
    for entry in session.list_named_actors():
        if entry["name"] != name:
            continue
        try:
            handle = session.get_actor(name, entry["namespace"])
        except ValueError:
            continue
        if actor_id_of(handle) == actor_id:
            return entry["namespace"], actor_id
    return None
