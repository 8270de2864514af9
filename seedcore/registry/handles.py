"""From a name to a proven handle: of the registered actor, in a named namespace, with a sign of life.

Handles found by name are weak: holding one never keeps an agent alive.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError

from seedcore.core.circuit import Circuit
from seedcore.core.errors import (
    ActorGoneError,
    CannotKnowError,
    DirectoryUnavailableError,
    NotResolvableError,
    SessionError,
)
from seedcore.core.model import Instance
from seedcore.core.waiting import within
from seedcore.registry import session
from seedcore.registry.lookup import ActorHandle, actor_id_of, find_actor

_KILL_POLL_S = 0.02
_MAX_HELD = 10_000
_AWAY_PAUSE_S = 2.0


class Proof(str, Enum):
    """A probe's answer: it lives, it does not, or it has not said yet."""

    YES = "yes"
    NO = "no"
    NOT_YET = "not yet"


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

    async def of_instance(self, instance: Instance, *, is_vouched: bool = True) -> ActorHandle:
        """The handle of a registered instance. `is_vouched`: its beats say that it lives, so it need not answer now.

        Raises NotResolvableError where it has no actor, or one that is not vouched for does not answer,
        ActorGoneError where the actor is gone or another, CannotKnowError where Ray does not answer, and the actor that
        it named before does not live any more.
        """
        handle, proof = await self._probed(instance)
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
        handle, proof = await self._probed(instance)
        if proof is Proof.NOT_YET:
            raise CannotKnowError(instance.logical_id, f"its actor did not answer within {self.probe_timeout_s:g} s")
        return handle

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

    async def _probed(self, instance: Instance) -> tuple[ActorHandle, Proof]:
        """Its actor, which is not known to be gone."""
        found = await self._registered(instance)
        proof = await probe(found.handle, self.probe_timeout_s)
        if proof is Proof.NO and found.is_held:
            raise _superseded(instance.logical_id)
        if proof is Proof.NO:
            raise ActorGoneError(instance.logical_id, "its actor has died")
        return found.handle, proof

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


async def probe(handle: ActorHandle, timeout_s: float) -> Proof:
    """Ask the actor for a sign of life. A result counts, an error that is ready does not."""
    try:
        await within(session.ask(handle, "__ray_ready__"), timeout_s)
    except (asyncio.TimeoutError, ActorUnavailableError, SessionError):
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
