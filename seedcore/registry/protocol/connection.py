"""A caller's connection to the registry actor: finds it by name, bounds every call, names every failure."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, cast
from weakref import WeakKeyDictionary

from ray.exceptions import ActorDiedError, RayError, RayTaskError

from seedcore.core.answers import Answer, BeatAnswer, InstanceFilter, Listing, Receipt, Resolution
from seedcore.core.changes import RegisterChange, Registration, SequencedChange, StatusChange
from seedcore.core.circuit import Circuit
from seedcore.core.errors import (
    DirectoryUnavailableError,
    RegistryError,
    RegistryReplacedError,
    RegistryUnavailableError,
    SessionError,
    VersionMismatchError,
    first_line,
)
from seedcore.core.feed import FeedBatch
from seedcore.core.instances import Epoch, EpochRecord, Instance, Transition, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import check_status
from seedcore.core.timeouts import is_running, within
from seedcore.registry.protocol.messages import PROTOCOL, Description, Health, Hello
from seedcore.registry.protocol.outbox import ChangeBox
from seedcore.registry.protocol.relay_client import RelayFinder, cause_of
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.directory import RESERVED_PREFIX
from seedcore.registry.ray_support.lookup import ActorHandle, find_actor

logger = logging.getLogger(__name__)

REGISTRY_NAME = RESERVED_PREFIX + "registry"
_SILENT_PAUSE_S = 1.0
_LINGER_S = 0.001
_PLACES_SINCE = 9
# what an operator asks for by hand is not asked for again by itself
_IN_DOUBT = {"turn_agent": "; it may be done all the same: look before you ask again"}
# what agents send: how long they wait for the answer is the registry's to say
_OF_AGENTS = frozenset({"set_status", "deliver", "beat_many"})
# what the registry answers from memory, and so at once: only their silence is the registry's own
_FROM_MEMORY = frozenset({"hello", "resolve", "list_active", "page", "changes", "beat_many", "health"})


class RegistryConnection:
    """The registry actor's methods, from anywhere in the cluster.

    Every method raises RegistryUnavailableError where the actor cannot be asked within `call_timeout_s`
    seconds, or for what agents send within the time that the registry sets (a write may have happened then: writes are
    idempotent, send them again), and otherwise what the method itself raises; ForkedProcessError in a process forked
    from a connected one. The handle is cached, weak, and looked up again when the actor has died, and in each Ray
    session.
    Once the actor was silent where it needs no database, readers are told so at once until it is heard again.
    Changes that are said at once travel together. With `by_relay` beats and changes go to the relay of this node where
    there is one, and to the registry itself while that is silent.
    """

    def __init__(self, namespace: str, call_timeout_s: float = 5.0, *, by_relay: bool = False) -> None:
        self._namespace = namespace
        self._relays = RelayFinder(namespace, call_timeout_s) if by_relay else None
        self._boxes: WeakKeyDictionary[asyncio.AbstractEventLoop, ChangeBox] = WeakKeyDictionary()
        self._call_timeout_s = call_timeout_s
        self._handle: ActorHandle | None = None
        self._spoken_to: ActorHandle | None = None
        self._protocol = PROTOCOL
        self._session: session.Session | None = None
        self._agent_call_s: float | None = None
        self._hearing = Circuit(_SILENT_PAUSE_S)
        self._silence = ""
        self._listening: asyncio.Task[None] | None = None

    async def hello(self) -> Hello:
        """Who answers under the registry's name. Does not check the protocol."""
        return cast(Hello, await self._ask(await self._found(), "hello"))

    async def register(self, registration: Registration, seq: int = 1) -> Receipt:
        """See Registry.register. Returns also where nothing is committed: see `Receipt.durable`."""
        change = SequencedChange(RegisterChange(registration, seq))
        try:
            return await self._box().say(change)
        except RegistryReplacedError:
            # the name may belong to a new actor by now
            return await self._box().say(change)

    async def set_status(
        self,
        instance_id: str,
        status: Status | str,
        seq: int | None = None,
        cause: str | None = None,
        *,
        after: str | None = None,
        duration_s: float | None = None,
    ) -> Receipt:
        """See Registry.set_status. Returns also where nothing is committed: see `Receipt.durable`. Also raises
        RegistryReplacedError, and is not sent to the registry that came instead: that may not have what came before it.
        """
        if seq is None:
            # without a number of its own it must not be said twice
            return cast(
                Receipt, await self._call_once("set_status", instance_id, status, None, cause, duration_s=duration_s)
            )
        change = StatusChange(instance_id, check_status(status), seq, cause)
        return await self._box().say(SequencedChange(change, after))

    async def turn_agent(
        self, logical_id: str, status: Status | str, cause: str | None = None, *, duration_s: float | None = None
    ) -> dict[str, Receipt | RegistryError]:
        """See Registry.turn_agent."""
        # its changes have no numbers of their agents: they must not be said twice
        answer = await self._call_once("turn_agent", logical_id, status, cause, duration_s=duration_s)
        return cast("dict[str, Receipt | RegistryError]", answer)

    async def deliver(self, changes: Sequence[SequencedChange]) -> list[Receipt | RegistryError]:
        """See Registry.deliver. Raises RegistryReplacedError as `set_status`."""
        self._enter_session()
        answers = None if self._relays is None else await self._relays.ask("deliver", changes)
        if answers is None:
            answers = await self._call_once("deliver", changes)
        return cast("list[Receipt | RegistryError]", answers)

    async def beat(self, instance_id: str) -> BeatAnswer:
        """See Registry.beat."""
        return await self.beat_many([instance_id])

    async def beat_many(self, instance_ids: Sequence[str], loads: Mapping[str, float] | None = None) -> BeatAnswer:
        """See Registry.beat_many."""
        self._enter_session()
        relayed = None
        if self._relays is not None:
            # a beat is a beat, whoever hears it
            with suppress(RegistryReplacedError):
                relayed = await self._relays.ask("beat_many", instance_ids, loads)
        if relayed is not None:
            return cast(BeatAnswer, relayed)
        answer = cast(BeatAnswer, await self._call("beat_many", instance_ids, loads))
        if self._relays is not None:
            self._relays.learn(answer)
        return answer

    def _box(self) -> ChangeBox:
        """One for each event loop of the process."""
        loop = asyncio.get_running_loop()
        if loop not in self._boxes:
            self._boxes[loop] = ChangeBox(self.deliver, _LINGER_S)
        return self._boxes[loop]

    async def resolve(self, logical_ids: Sequence[str], *, allow_late: bool = False) -> Answer[list[Resolution]]:
        """See Registry.resolve."""
        answer = await self._read("resolve", logical_ids, allow_late=allow_late)
        return cast("Answer[list[Resolution]]", answer)

    async def report_dead_call(self, instance_id: str) -> Verdict:
        """See Registry.report_dead_call."""
        return cast(Verdict, await self._call("report_dead_call", instance_id))

    async def list_active(
        self,
        statuses: Sequence[Status | str] | None = (Status.ALIVE,),
        organ_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int = 100,
        cursor: str | None = None,
        *,
        epoch: str | None = None,
        logical_id: str | None = None,
        fresh_only: bool = True,
    ) -> Listing:
        """See Registry.list_active."""
        wants_dead = statuses is not None and Status.DEAD in statuses
        return cast(
            Listing,
            await self._read(
                "list_active",
                statuses,
                organ_id,
                labels,
                limit,
                cursor,
                epoch=epoch,
                logical_id=logical_id,
                fresh_only=fresh_only,
                needs_database=wants_dead,
            ),
        )

    async def page(self, wanted: InstanceFilter, limit: int = 100, cursor: str | None = None) -> Listing:
        """See Registry.page."""
        wants_dead = wanted.statuses is not None and Status.DEAD in wanted.statuses
        return cast(Listing, await self._read("page", wanted, limit, cursor, needs_database=wants_dead))

    async def changes(
        self,
        stream: str | None,
        version: int,
        wait_s: float = 0.0,
        statuses: Sequence[Status | str] | None = None,
        organ_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        logical_id: str | None = None,
        follower: str | None = None,
    ) -> FeedBatch:
        """See Registry.changes. A registry that ends meanwhile is noticed at the end of the call's bound."""
        asked = [stream, version, wait_s, statuses, organ_id, labels, logical_id]
        # older registries keep places for nobody
        named = [follower] if self._protocol >= _PLACES_SINCE else []
        answer = await self._read("changes", *asked, *named, waits_s=wait_s)
        return cast(FeedBatch, answer)

    async def get_instance(self, instance_id: str) -> Answer[Instance]:
        """See Registry.get_instance."""
        return cast("Answer[Instance]", await self._read("get_instance", instance_id))

    async def current_epoch(self) -> Answer[Epoch]:
        """See Registry.current_epoch."""
        return cast("Answer[Epoch]", await self._read("current_epoch"))

    async def transitions(self, logical_id: str, limit: int = 100) -> list[Transition]:
        """See Registry.transitions."""
        return cast("list[Transition]", await self._read("transitions", logical_id, limit))

    async def deaths(self, limit: int = 100, cursor: str | None = None, within_s: float | None = None) -> Listing:
        """See Registry.deaths."""
        return cast(Listing, await self._read("deaths", limit, cursor, within_s))

    async def describe(self, logical_id: str) -> Description:
        """See Registry.describe."""
        return cast(Description, await self._read("describe", logical_id))

    async def health(self) -> Health:
        """See Registry.health."""
        return cast(Health, await self._call("health"))

    async def set_current_epoch(self, epoch: str) -> str:
        """See Registry.set_current_epoch."""
        return cast(str, await self._call("set_current_epoch", epoch))

    async def stage_epoch(self, epoch: str) -> bool:
        """See Registry.stage_epoch."""
        return cast(bool, await self._call("stage_epoch", epoch))

    async def list_epochs(self, limit: int = 20) -> list[EpochRecord]:
        """See Registry.list_epochs."""
        return cast("list[EpochRecord]", await self._call("list_epochs", limit))

    async def _read(self, method: str, *args: object, **kwargs: Any) -> Any:
        self._enter_session()
        if self._hearing.is_open:
            if self._hearing.allows(time.monotonic()):
                self._listen()
            raise RegistryUnavailableError(self._silence)
        return await self._call(method, *args, **kwargs)

    def _listen(self) -> None:
        """Find out in the background whether the silent actor answers again; no reader waits for that."""
        if not is_running(self._listening):
            self._listening = asyncio.create_task(self._hear(), name="registry-heard-again")

    async def _hear(self) -> None:
        try:
            await self._call("hello")
        except RegistryError as error:
            logger.debug("the registry is still silent: %s", error)

    async def _call(self, method: str, *args: object, **kwargs: Any) -> Any:
        try:
            return await self._call_once(method, *args, **kwargs)
        except RegistryReplacedError:
            # the name may belong to a new actor by now
            return await self._call_once(method, *args, **kwargs)

    async def _call_once(self, method: str, *args: object, **kwargs: Any) -> Any:
        handle = await self._found()
        await self._shake_hands(handle)
        return await self._ask(handle, method, *args, **kwargs)

    async def _found(self) -> ActorHandle:
        self._enter_session()
        if self._handle is None:
            try:
                self._handle = await find_actor(REGISTRY_NAME, self._namespace, self._call_timeout_s)
            except DirectoryUnavailableError as error:
                raise self._silent(error.why) from error
        if self._handle is None:
            raise RegistryUnavailableError(
                f"no actor {REGISTRY_NAME!r} in namespace {self._namespace!r}; `serve run` or `seedcore demo` starts it"
            )
        return self._handle

    def _enter_session(self) -> None:
        """Begin anew where this process has another Ray session: handles, and silences, are of one session only."""
        try:
            entered = session.require()
        except SessionError as error:
            raise RegistryUnavailableError(error.why) from None
        if entered is not self._session:
            self._session, self._handle, self._spoken_to = entered, None, None
            self._hearing.note_answer()
            if self._relays is not None:
                self._relays.reset()

    async def _shake_hands(self, handle: ActorHandle) -> None:
        if self._spoken_to is handle:
            return
        hello = cast(Hello, await self._ask(handle, "hello"))
        hello.require_understood()
        self._spoken_to, self._protocol, self._agent_call_s = handle, hello.protocol, hello.agent_call_s

    async def _ask(
        self,
        handle: ActorHandle,
        method: str,
        *args: object,
        waits_s: float = 0.0,
        needs_database: bool = False,
        **kwargs: object,
    ) -> Any:
        """One call; `waits_s` is how long the method itself may wait before it answers. `needs_database`: so does this
        call of a method that does not by itself."""
        told_s = self._agent_call_s if method in _OF_AGENTS else None
        bound_s = waits_s + (self._call_timeout_s if told_s is None else told_s)
        began = self._session
        try:
            answer = await within(session.ask(handle, method, *args, **kwargs), bound_s)
        except TimeoutError:
            why = f"no answer to {method} within {bound_s:g} s{_IN_DOUBT.get(method, '')}"
            if needs_database or method not in _FROM_MEMORY or session.current() is not began:
                # it may be the database that is silent, while the registry answers others; or the session has ended
                raise RegistryUnavailableError(why) from None
            raise self._silent(why) from None
        except RayTaskError as error:
            self._hearing.note_answer()
            raise cause_of(error, method) from None
        except ActorDiedError as error:
            self._handle = None
            raise RegistryReplacedError(first_line(error) + _IN_DOUBT.get(method, "")) from error
        except (RayError, SessionError) as error:
            if isinstance(error, SessionError):
                # a handle that Ray does not know is of no use
                self._handle = None
            raise RegistryUnavailableError(first_line(error) + _IN_DOUBT.get(method, "")) from error
        except (AttributeError, TypeError):
            # Ray knows the methods that the actor was made with, and what they take
            if self._protocol == PROTOCOL:
                raise
            raise VersionMismatchError(self._protocol, PROTOCOL) from None
        self._hearing.note_answer()
        return answer

    def _silent(self, why: str) -> RegistryUnavailableError:
        self._silence = why
        self._hearing.note_silence(time.monotonic())
        return RegistryUnavailableError(why)


class NoRegistry(RegistryConnection):
    """Where the mode is ray: every method raises RegistryUnavailableError, and nobody is asked."""

    def _enter_session(self) -> None:
        raise RegistryUnavailableError("the mode is ray")


_connections: dict[tuple[str, float], RegistryConnection] = {}


def shared_connection(namespace: str, call_timeout_s: float = 5.0) -> RegistryConnection:
    """The process's connection to the registry of `namespace`: agents of one process share its handle."""
    key = (namespace, call_timeout_s)
    if key not in _connections:
        _connections[key] = RegistryConnection(namespace, call_timeout_s, by_relay=True)
    return _connections[key]
