"""What a caller keeps of its look-ups: handles by agent and by instance, and the last handle of each name in Ray's
table.

Handles found by name are weak: a cached handle never keeps an agent alive.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from seedcore.core.circuit import Circuit
from seedcore.core.clock import Clock
from seedcore.core.errors import DirectoryUnavailableError, SessionError
from seedcore.core.instances import Instance
from seedcore.core.timeouts import end
from seedcore.registry.caller.proofs import prove
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.actors import Proof
from seedcore.registry.ray_support.lookup import ActorHandle, actor_id_of, find_actor, is_known_gone

_RETRY_S = 2.0


class HandleCache:
    """Handles by logical id, each proven or with its proof under way. Valid only while a follower evicts the agents
    that change.

    A new handle is proven in the background: its first call also makes Ray report what becomes of the actor. A negative
    proof evicts it.
    """

    def __init__(self, proof_timeout_s: float, *, capacity: int = 5000, max_proofs: int = 100) -> None:
        """`max_proofs` bounds the proofs that run at once; a handle beyond it is not proven in the background."""
        self._proof_timeout_s = proof_timeout_s
        self._capacity = capacity
        self._max_proofs = max_proofs
        self._handles: dict[str, ActorHandle] = {}
        self._instance_ids: dict[str, str] = {}
        self._picked: dict[str, tuple[Instance, ActorHandle]] = {}
        self._used: set[str] = set()
        self._proofs: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._handles)

    def get(self, logical_id: str) -> ActorHandle | None:
        """The cached handle, unless Ray has reported that its actor is gone. Any thread may ask: it is one read of a
        dictionary, and one of Ray's memory."""
        try:
            handle = self._handles.get(logical_id)
        except TypeError:
            # not hashable, so no id
            return None
        if handle is None or is_gone(handle):
            return None
        self._used.add(logical_id)
        return handle

    def take_use(self, logical_id: str) -> bool:
        """Whether a handle of the agent was got from here since this was asked last."""
        was_used = logical_id in self._used
        self._used.discard(logical_id)
        return was_used

    def put(self, instance: Instance, handle: ActorHandle) -> None:
        """Cache the handle of a routable instance. A cached handle of the same instance stays."""
        logical_id = instance.logical_id
        cached = self.get(logical_id)
        is_same = cached is not None and self._instance_ids.get(logical_id) == instance.instance_id
        if is_same and actor_id_of(cached) == actor_id_of(handle):
            return
        self.evict(logical_id)
        while len(self._handles) >= self._capacity:
            self.evict(next(iter(self._handles)))
        self._handles[logical_id] = handle
        self._instance_ids[logical_id] = instance.instance_id
        self._start_proof(handle, instance)

    def instance_id_of(self, logical_id: str) -> str | None:
        """The instance that the cached handle is of."""
        return self._instance_ids.get(logical_id)

    def of_instance(self, instance: Instance) -> ActorHandle | None:
        """The handle of an instance that a policy has picked, unless Ray has reported that its actor is gone, or the
        instance has changed: it is another object of the follower's cache then."""
        picked = self._picked.get(instance.instance_id)
        if picked is None or picked[0] is not instance or is_gone(picked[1]):
            return None
        self._used.add(instance.logical_id)
        return picked[1]

    def put_picked(self, instance: Instance, handle: ActorHandle) -> None:
        """Cache the handle of an instance that a policy has picked, as the follower's cache has it."""
        before = self._picked.pop(instance.instance_id, None)
        while len(self._picked) >= self._capacity:
            del self._picked[next(iter(self._picked))]
        self._picked[instance.instance_id] = instance, handle
        if before is None or actor_id_of(before[1]) != actor_id_of(handle):
            self._start_proof(handle, instance)

    def _start_proof(self, handle: ActorHandle, instance: Instance) -> None:
        if len(self._proofs) < self._max_proofs:
            task = asyncio.create_task(self._prove(handle, instance), name="handle-proven")
            self._proofs.add(task)
            task.add_done_callback(self._proofs.discard)

    def evict(self, logical_id: str) -> None:
        """Remove an agent's handle: something of the agent changed."""
        self._handles.pop(logical_id, None)
        self._instance_ids.pop(logical_id, None)
        self._used.discard(logical_id)

    def evict_other(self, instance: Instance) -> None:
        """Remove the agent's handle if it is of another instance than the newest one."""
        if self._instance_ids.get(instance.logical_id, instance.instance_id) != instance.instance_id:
            self.evict(instance.logical_id)

    def clear(self) -> None:
        """Remove every handle."""
        self._handles.clear()
        self._instance_ids.clear()
        self._picked.clear()
        self._used.clear()

    async def close(self) -> None:
        """Remove every handle and end the proofs."""
        await end(*self._proofs)
        self.clear()

    async def _prove(self, handle: ActorHandle, instance: Instance) -> None:
        proof = await prove(handle, instance, self._proof_timeout_s)
        if proof not in {Proof.NO, Proof.ANOTHER}:
            return
        if self._handles.get(instance.logical_id) is handle:
            self.evict(instance.logical_id)
        picked = self._picked.get(instance.instance_id)
        if picked is not None and picked[1] is handle:
            del self._picked[instance.instance_id]


@dataclass(frozen=True, slots=True)
class NamedHandle:
    """A handle of a named actor. `is_old`: from an earlier look-up, because Ray's table does not answer now."""

    handle: ActorHandle
    is_old: bool


class ActorTable:
    """Ray's table of named actors (the GCS), and the last handle of each name.

    While the table does not answer, the last handle is returned: its actor may still answer. After a timeout callers
    fail fast until the table answers again. A name without an actor is never cached.
    """

    def __init__(
        self,
        timeout_s: float,
        *,
        circuit: Circuit | None = None,
        capacity: int = 10_000,
        clock: Clock | None = None,
        find: Callable[[str, str, float], Awaitable[ActorHandle | None]] = find_actor,
    ) -> None:
        """`timeout_s` bounds each look-up, in seconds."""
        self._find = find
        self._timeout_s = timeout_s
        self._circuit = circuit if circuit is not None else Circuit(_RETRY_S)
        self._capacity = capacity
        self._clock = clock if clock is not None else Clock()
        self._last: OrderedDict[tuple[session.Session | None, str, str], ActorHandle] = OrderedDict()

    async def find(self, name: str, namespace: str) -> NamedHandle | None:
        """The named actor, or None if there is certainly none. Raises DirectoryUnavailableError if the table does not
        answer and there is no earlier handle."""
        key = (session.current(), namespace, name)
        if not self._circuit.allows(self._clock.monotonic()) and key in self._last:
            return NamedHandle(self._last[key], is_old=True)
        try:
            handle = await self._find(name, namespace, self._timeout_s)
        except DirectoryUnavailableError:
            self._circuit.note_silence(self._clock.monotonic())
            if key in self._last:
                return NamedHandle(self._last[key], is_old=True)
            raise
        self._circuit.note_answer()
        self._last.pop(key, None)
        if handle is None:
            return None
        self._last[key] = handle
        if len(self._last) > self._capacity:
            self._last.popitem(last=False)
        return NamedHandle(handle, is_old=False)


def is_gone(handle: ActorHandle) -> bool:
    """Whether Ray has reported that the actor is gone, or the handle is of an earlier Ray session."""
    try:
        return is_known_gone(handle)
    except SessionError:
        # the session ended on another thread
        return True
