"""Who this process is in Ray: the actor, node and address recorded with an instance."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

import ray
import ray.util

from seedcore.core.errors import DirectoryUnavailableError
from seedcore.registry.lookup import actor_id_of, find_actor
from seedcore.registry.processes import own_process_key


@dataclass(frozen=True, slots=True)
class Identity:
    """Where an agent runs. `actor_name` and `actor_id` are None in a process that is no named actor."""

    actor_name: str | None
    actor_id: str | None
    namespace: str | None
    node_id: str | None
    ip_address: str | None
    pid: int
    process_key: str | None


async def identify(actor_name: str | None, namespace: str, timeout_s: float) -> Identity:
    """This process's identity; `actor_name` names the agent's actor where it is not the one that runs this.

    Never raises: what Ray does not tell is None. The namespace is proven by looking the name up, since a
    detached actor's own runtime context names its creator's namespace.
    """
    if not ray.is_initialized():
        return Identity(actor_name, None, namespace if actor_name else None, None, None, os.getpid(), own_process_key())
    context = ray.get_runtime_context()
    own_id, own_name = own_actor()
    name = actor_name if actor_name is not None else own_name
    actor_id = own_id
    if name is not None:
        for candidate in dict.fromkeys((namespace, context.namespace)):
            found = await _actor_id(name, candidate, timeout_s)
            if found is not None and own_id in {None, found}:
                namespace, actor_id = candidate, found
                break
    return Identity(
        actor_name=name,
        actor_id=actor_id,
        namespace=namespace if name is not None else None,
        node_id=context.get_node_id(),
        ip_address=ray.util.get_node_ip_address(),
        pid=os.getpid(),
        process_key=own_process_key(),
    )


def own_actor() -> tuple[str | None, str | None]:
    """Id and name of the actor that this code runs in; None outside one, None for the name of an unnamed one."""
    if not ray.is_initialized():
        return None, None
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return None, None
    return context.get_actor_id(), context.get_actor_name() or None


def was_restarted() -> bool:
    """Whether this code runs in an actor whose process Ray has replaced."""
    if own_actor()[0] is None:
        return False
    with warnings.catch_warnings():
        # Ray's own implementation reads an attribute that it deprecates
        warnings.simplefilter("ignore")
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


async def _actor_id(name: str, namespace: str, timeout_s: float) -> str | None:
    try:
        handle = await find_actor(name, namespace, timeout_s)
    except DirectoryUnavailableError:
        return None
    return None if handle is None else actor_id_of(handle)
