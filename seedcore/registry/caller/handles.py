"""From a name to a proven handle: of the registered actor, in a named namespace, with a sign of life."""

from __future__ import annotations

from seedcore.core.answers import NotResolved
from seedcore.core.errors import ActorGoneError, CannotKnowError, DirectoryUnavailableError, NotResolvableError
from seedcore.core.instances import Instance
from seedcore.registry.caller.handle_cache import ActorTable, NamedHandle
from seedcore.registry.caller.proofs import IsRegistered, prove
from seedcore.registry.ray_support.actors import Proof, probe
from seedcore.registry.ray_support.lookup import ActorHandle, actor_id_of


class HandleFinder:
    """Finds and proves handles. `probe_timeout_s` bounds each look-up and each probe, in seconds."""

    def __init__(self, namespace: str, probe_timeout_s: float = 2.0, *, table: ActorTable | None = None) -> None:
        self.namespace = namespace
        self.probe_timeout_s = probe_timeout_s
        self._table = table if table is not None else ActorTable(probe_timeout_s)

    async def of_instance(
        self, instance: Instance, *, is_vouched: bool = True, is_registered: IsRegistered | None = None
    ) -> ActorHandle:
        """The handle of a registered instance. `is_vouched`: its beats prove that it lives, so it need not answer now.
        `is_registered` is asked if the actor cannot know which instance it runs, or has lost its process.

        Raises NotResolvableError if it has no actor, or is not vouched for and does not answer; ActorGoneError if the
        actor is gone or another, or its process runs another instance; CannotKnowError if Ray does not answer, and the
        last known actor of that name does not live any more.
        """
        handle, proof = await self._proven(instance, is_registered)
        # a busy agent is not dead, if its beats vouch for it
        if proof is Proof.NOT_YET and not is_vouched:
            raise NotResolvableError(
                instance.logical_id,
                NotResolved.UNREACHABLE,
                f"it missed a beat and did not answer within {self.probe_timeout_s:g} s",
            )
        return handle

    async def vouched(self, instance: Instance) -> ActorHandle:
        """The handle that Ray's table names now for a registered instance whose beats prove that it lives: the actor is
        not asked. Raises as `of_instance`, and CannotKnowError if the table does not answer."""
        found = await self._registered(instance)
        if found.is_old:
            raise CannotKnowError(instance.logical_id, "Ray's table does not answer now")
        return found.handle

    async def answering(self, instance: Instance) -> ActorHandle:
        """As `of_instance`, if only the instance itself can prove that it lives: CannotKnowError if it does not
        answer."""
        return self._answered(instance.logical_id, *await self._proven(instance, None))

    async def actor_of(self, instance: Instance) -> ActorHandle:
        """As `answering`, whichever instance the actor runs now."""
        found = await self._registered(instance)
        proof = await probe(found.handle, self.probe_timeout_s)
        return self._answered(instance.logical_id, found.handle, _checked(instance, found, proof))

    async def of_name(self, logical_id: str) -> ActorHandle:
        """The handle of the actor that is named like the logical id, proven by its own answer.

        Raises NotResolvableError if there is none, CannotKnowError if it does not answer.
        """
        found = await self._named(logical_id)
        proof = await probe(found.handle, self.probe_timeout_s)
        if proof is Proof.NO and found.is_old:
            raise _superseded(logical_id)
        if proof is Proof.NO:
            raise NotResolvableError(logical_id, NotResolved.DIED, "its actor has died")
        return self._answered(logical_id, found.handle, proof)

    async def unproven(self, actor_name: str, instance: Instance | None = None) -> ActorHandle:
        """The handle of a named actor, or of a registered instance, without any call to it. Raises as `of_name`, and as
        `of_instance`."""
        found = await self._named(actor_name) if instance is None else await self._registered(instance)
        return found.handle

    async def _proven(self, instance: Instance, is_registered: IsRegistered | None) -> tuple[ActorHandle, Proof]:
        """Its actor, unless its process is known to be gone, or to run another instance."""
        found = await self._registered(instance)
        proof = await prove(found.handle, instance, self.probe_timeout_s, is_registered)
        return found.handle, _checked(instance, found, proof)

    def _answered(self, logical_id: str, handle: ActorHandle, proof: Proof) -> ActorHandle:
        if proof is Proof.NOT_YET:
            raise CannotKnowError(logical_id, f"its actor did not answer within {self.probe_timeout_s:g} s")
        return handle

    async def _registered(self, instance: Instance) -> NamedHandle:
        """The actor that registered: of its namespace, its name and its id."""
        logical_id, name = instance.logical_id, instance.actor_name
        if name is None:
            detail = "it runs in a process, not in an actor: it has no handle"
            if instance.actor_id is not None:
                detail = f"its actor has no name: create it with .options(name=..., namespace={self.namespace!r})"
            raise NotResolvableError(logical_id, NotResolved.NO_HANDLE, detail)
        namespace = instance.namespace or self.namespace
        found = await self._find(logical_id, name, namespace)
        if found is None:
            raise _gone(logical_id, f"Ray has no actor {name!r} in namespace {namespace!r}")
        if instance.actor_id is not None and actor_id_of(found.handle) != instance.actor_id:
            if found.is_old:
                raise _superseded(logical_id)
            raise _gone(logical_id, f"the name {name!r} now belongs to another actor")
        return found

    async def _named(self, name: str) -> NamedHandle:
        found = await self._find(name, name, self.namespace)
        if found is None:
            detail = f"Ray has no actor of that name in namespace {self.namespace!r}"
            raise NotResolvableError(name, NotResolved.NOT_REGISTERED, detail)
        return found

    async def _find(self, logical_id: str, name: str, namespace: str) -> NamedHandle | None:
        try:
            return await self._table.find(name, namespace)
        except DirectoryUnavailableError as error:
            raise CannotKnowError(logical_id, str(error)) from error


def _checked(instance: Instance, found: NamedHandle, proof: Proof) -> Proof:
    if proof in {Proof.NO, Proof.ANOTHER, Proof.LOST} and found.is_old:
        raise _superseded(instance.logical_id)
    if proof is Proof.NO:
        raise _gone(instance.logical_id, "its actor has died")
    if proof is Proof.ANOTHER:
        raise _gone(instance.logical_id, "its process has ended, and its actor runs another instance")
    if proof is Proof.LOST:
        raise NotResolvableError(instance.logical_id, NotResolved.UNREACHABLE, "Ray restarts its actor")
    return proof


def _gone(logical_id: str, detail: str) -> ActorGoneError:
    return ActorGoneError(logical_id, NotResolved.DIED, detail)


def _superseded(logical_id: str) -> CannotKnowError:
    return CannotKnowError(
        logical_id, "its last known actor is gone, and Ray's table does not answer whether there is another one"
    )
