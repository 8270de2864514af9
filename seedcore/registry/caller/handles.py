"""From a name to a proven handle: of the registered actor, in a named namespace, with a sign of life.

Handles found by name are weak: holding one never keeps an agent alive. An actor is not an instance: Ray restarts it,
under the same name and id, and a call waits for that. So what proves an instance is its own answer, or the registry's
word after its actor's.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError

from seedcore.core.circuit import Circuit
from seedcore.core.errors import (
    ActorGoneError,
    CannotKnowError,
    DirectoryUnavailableError,
    NotResolvableError,
    SessionError,
)
from seedcore.core.instances import Instance
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.actors import Proof, probe
from seedcore.registry.ray_support.lookup import ActorHandle, actor_id_of, find_actor, is_known_gone

IsRegistered = Callable[[], Awaitable[bool]]
"""Whether the registry still has an instance as alive; asked after its actor has answered, or was lost."""

_TOLD_POLL_S = 0.01
_LOST_S = 0.5
_MAX_HELD = 10_000
_AWAY_PAUSE_S = 2.0


@dataclass(frozen=True, slots=True)
class _Found:
    """A handle and where from: Ray's table now, or (`is_held`) an answer of before, since the table is away."""

    handle: ActorHandle
    is_held: bool


@dataclass(frozen=True, slots=True)
class HandleFinder:
    """Finds and proves handles. `probe_timeout_s` bounds each look-up and each probe, in seconds.

    The handles found last are held, a bounded number, for while Ray's table (the GCS) does not answer: the actor behind
    one still does.
    """

    namespace: str
    probe_timeout_s: float = 2.0
    _held: OrderedDict[tuple[session.Session | None, str, str], ActorHandle] = field(
        default_factory=OrderedDict, init=False, repr=False
    )
    _table: Circuit = field(default_factory=lambda: Circuit(_AWAY_PAUSE_S), init=False, repr=False)

    async def of_instance(
        self, instance: Instance, *, is_vouched: bool = True, is_registered: IsRegistered | None = None
    ) -> ActorHandle:
        """The handle of a registered instance. `is_vouched`: its beats say that it lives, so it need not answer now.
        `is_registered` is asked where the actor cannot say which instance it is, or has lost its process.

        Raises NotResolvableError where it has no actor, or one that is not vouched for does not answer,
        ActorGoneError where the actor is gone or another, or its process another instance's, CannotKnowError where Ray
        does not answer, and the actor that it named before does not live any more.
        """
        handle, proof = await self._proven(instance, is_registered)
        # busy is not dead, where its beats vouch for it
        if proof is Proof.NOT_YET and not is_vouched:
            raise NotResolvableError(
                instance.logical_id, f"it missed a beat and did not answer within {self.probe_timeout_s:g} s"
            )
        return handle

    async def vouched(self, instance: Instance) -> ActorHandle:
        """The handle of a registered instance that Ray's table names now, for one whose beats say that it lives: it is
        not asked. Raises as `of_instance`, and CannotKnowError where the table does not answer."""
        found = await self._registered(instance)
        if found.is_held:
            raise CannotKnowError(instance.logical_id, "Ray's table does not answer now")
        return found.handle

    async def answering(self, instance: Instance) -> ActorHandle:
        """As `of_instance`, when nobody can vouch for it but itself: CannotKnowError where it does not answer."""
        return self._answered(instance, *await self._proven(instance, None))

    async def actor_of(self, instance: Instance) -> ActorHandle:
        """As `answering`, whichever instance the actor runs now."""
        found = await self._registered(instance)
        proof = await probe(found.handle, self.probe_timeout_s)
        return self._answered(instance, found.handle, self._checked(instance, found, proof))

    async def of_name(self, logical_id: str) -> ActorHandle:
        """The handle of the actor named like the logical id, when nobody can vouch for it but itself.

        Raises NotResolvableError where there is none, CannotKnowError where it does not answer.
        """
        found = await self._find(logical_id, logical_id, self.namespace)
        if found is None:
            raise NotResolvableError(logical_id, f"Ray has no actor of that name in namespace {self.namespace!r}")
        proof = await probe(found.handle, self.probe_timeout_s)
        if proof is Proof.NO and found.is_held:
            raise _superseded(logical_id)
        if proof is Proof.NO:
            raise NotResolvableError(logical_id, "its actor has died")
        if proof is Proof.NOT_YET:
            raise CannotKnowError(logical_id, f"its actor did not answer within {self.probe_timeout_s:g} s")
        return found.handle

    async def unproven(self, actor_name: str, instance: Instance | None = None) -> ActorHandle:
        """The handle of a named actor, or of a registered instance, without asking it anything. Raises as `of_name`,
        and as `of_instance`."""
        if instance is not None:
            return (await self._registered(instance)).handle
        found = await self._find(actor_name, actor_name, self.namespace)
        if found is None:
            raise NotResolvableError(actor_name, f"Ray has no actor of that name in namespace {self.namespace!r}")
        return found.handle

    async def _proven(self, instance: Instance, is_registered: IsRegistered | None) -> tuple[ActorHandle, Proof]:
        """Its actor, whose process is not known to be gone, or another's."""
        found = await self._registered(instance)
        proof = await prove(found.handle, instance, self.probe_timeout_s, is_registered)
        return found.handle, self._checked(instance, found, proof)

    def _checked(self, instance: Instance, found: _Found, proof: Proof) -> Proof:
        if proof in {Proof.NO, Proof.ANOTHER, Proof.LOST} and found.is_held:
            raise _superseded(instance.logical_id)
        if proof is Proof.NO:
            raise ActorGoneError(instance.logical_id, "its actor has died")
        if proof is Proof.ANOTHER:
            raise ActorGoneError(instance.logical_id, "its process has ended, and its actor is another instance's")
        if proof is Proof.LOST:
            raise NotResolvableError(instance.logical_id, "Ray restarts its actor")
        return proof

    def _answered(self, instance: Instance, handle: ActorHandle, proof: Proof) -> ActorHandle:
        if proof is Proof.NOT_YET:
            raise CannotKnowError(instance.logical_id, f"its actor did not answer within {self.probe_timeout_s:g} s")
        return handle

    async def _registered(self, instance: Instance) -> _Found:
        """The actor that registered: of its namespace, its name and its id."""
        logical_id, name = instance.logical_id, instance.actor_name
        if name is None and instance.actor_id is not None:
            raise NotResolvableError(
                logical_id, f"its actor has no name: create it with .options(name=..., namespace={self.namespace!r})"
            )
        if name is None:
            raise NotResolvableError(logical_id, "it runs in a process, not in an actor: it has no handle")
        namespace = instance.namespace or self.namespace
        found = await self._find(logical_id, name, namespace)
        if found is None:
            raise ActorGoneError(logical_id, f"Ray has no actor {name!r} in namespace {namespace!r}")
        if instance.actor_id is not None and actor_id_of(found.handle) != instance.actor_id:
            if found.is_held:
                raise _superseded(logical_id)
            raise ActorGoneError(logical_id, f"the name {name!r} now belongs to another actor")
        return found

    async def _find(self, logical_id: str, name: str, namespace: str) -> _Found | None:
        key = (session.current(), namespace, name)
        if not self._table.allows(time.monotonic()) and key in self._held:
            return _Found(self._held[key], is_held=True)
        try:
            handle = await find_actor(name, namespace, self.probe_timeout_s)
        except DirectoryUnavailableError as error:
            self._table.note_silence(time.monotonic())
            if key in self._held:
                return _Found(self._held[key], is_held=True)
            raise CannotKnowError(logical_id, str(error)) from error
        self._table.note_answer()
        self._held.pop(key, None)
        if handle is None:
            return None
        self._held[key] = handle
        if len(self._held) > _MAX_HELD:
            self._held.popitem(last=False)
        return _Found(handle, is_held=False)


def _superseded(logical_id: str) -> CannotKnowError:
    return CannotKnowError(logical_id, "the actor that it had is gone, and Ray does not answer whether it has another")


async def prove(
    handle: ActorHandle, instance: Instance, timeout_s: float, is_registered: IsRegistered | None = None
) -> Proof:
    """Ask the actor whether its process is an instance's. Where it cannot say (it is no RayAgent), its answer counts as
    long as the instance is registered after it.

    A call to an actor that Ray restarts waits for the next process: it is not waited for once the instance is not
    registered any more, or, without `is_registered`, once Ray has told that the process is gone.
    """
    loop = asyncio.get_running_loop()
    ends_s = loop.time() + timeout_s
    is_lost = False
    asked = asyncio.create_task(_is_instance(handle, instance), name="instance-asked")
    try:
        while (left_s := ends_s - loop.time()) > 0:
            await asyncio.wait({asked}, timeout=min(left_s, _TOLD_POLL_S))
            if asked.done():
                return await _judged(asked.result(), is_registered)
            if is_known_gone(handle):
                if is_registered is None or not await is_registered():
                    return Proof.ANOTHER
                if not is_lost:
                    # it may be the next instance already, and Ray slow to tell: then it answers by itself
                    is_lost, ends_s = True, min(ends_s, loop.time() + _LOST_S)
    except (ActorDiedError, RayActorError):
        return Proof.NO
    except (RayError, SessionError):
        return Proof.NOT_YET
    finally:
        asked.cancel()
        # whatever it still raises says nothing any more, and must not be reported as never retrieved
        asked.add_done_callback(lambda ended: None if ended.cancelled() else ended.exception())
    return Proof.LOST if is_lost else Proof.NOT_YET


async def _judged(is_instance: bool | None, is_registered: IsRegistered | None) -> Proof:
    if is_instance is None:
        is_instance = is_registered is None or await is_registered()
    return Proof.YES if is_instance else Proof.ANOTHER


async def _is_instance(handle: ActorHandle, instance: Instance) -> bool | None:
    """What the actor answers: whether its process is the instance's, None where it cannot say. Asked again while Ray
    cannot reach it."""
    method = "seedcore_instance" if hasattr(handle, "seedcore_instance") else "__ray_ready__"
    while True:
        try:
            answer = await session.ask(handle, method)
            if method == "__ray_ready__":
                return None
            logical_id, instance_id = answer
        except ActorUnavailableError:
            await asyncio.sleep(_TOLD_POLL_S)
        except (RayTaskError, TypeError, ValueError):
            # a method of another's making, which has answered all the same
            return None
        else:
            # an actor may host another agent than the one that is registered with it
            is_known = logical_id == instance.logical_id and instance_id is not None
            return instance_id == instance.instance_id if is_known else None
