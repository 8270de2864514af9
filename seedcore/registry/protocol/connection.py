"""A process's connection to the registry actor: finds it by name, bounds every call, names every failure."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from ray.exceptions import ActorDiedError, RayError, RayTaskError

from seedcore.core.answers import BeatAnswer, InstanceFilter, KnownBefore, Listing, Receipt
from seedcore.core.changes import Change, RegisterChange, SequencedChange
from seedcore.core.circuit import Circuit
from seedcore.core.clock import Clock
from seedcore.core.errors import (
    DirectoryUnavailableError,
    RegistryError,
    RegistryReplacedError,
    RegistryUnavailableError,
    SessionError,
    VersionMismatchError,
    first_line,
)
from seedcore.core.limits import check_instance_id
from seedcore.core.timeouts import end, is_running
from seedcore.registry.protocol.api import RegistryApi, Repeats, Rules, rules_of
from seedcore.registry.protocol.durable_words import DurableWords
from seedcore.registry.protocol.forwarding import forwarded
from seedcore.registry.protocol.messages import PROTOCOL, Hello
from seedcore.registry.protocol.outbox import Outbox
from seedcore.registry.protocol.relay_client import RelayFinder, RelayTimes, cause_of
from seedcore.registry.protocol.shorthands import Shorthands
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.directory import RESERVED_PREFIX
from seedcore.registry.ray_support.lookup import ActorHandle, FindActor, find_actor

logger = logging.getLogger(__name__)

REGISTRY_NAME = RESERVED_PREFIX + "registry"
_IN_DOUBT = "; it may have been carried out: look before you repeat it"


@dataclass(frozen=True, slots=True)
class ConnectionTimes:
    """Seconds. `linger_s`: a message of changes waits so long while another is under way. `silent_pause_s`: while the
    registry is silent it is tried once in so long, and readers fail at once in between. `relay`: see RelayTimes."""

    linger_s: float = 0.001
    silent_pause_s: float = 1.0
    relay: RelayTimes = field(default_factory=RelayTimes)


class RegistryConnection(Shorthands):
    """Implements RegistryApi from anywhere in the cluster.

    Every method raises what RegistryApi declares; RegistryUnavailableError where the registry does not answer within
    the bound of the method (a change may have been made then: send it again, with its number); VersionMismatchError;
    and ForkedProcessError in a process forked from a connected one. The handle is cached, weak, and looked up again
    when the actor has died and in each Ray session. After one timeout of the registry itself, readers fail at once
    until it answers again. Changes taken at the same time share a message. With `by_relay` beats and changes go to the
    relay of this node where there is one, and to the registry itself while the relay is silent, unless it is not found.
    `async with` closes it at the end. It may be used from several event loops.
    """

    def __init__(
        self,
        namespace: str,
        call_timeout_s: float = 5.0,
        *,
        by_relay: bool = False,
        clock: Clock | None = None,
        times: ConnectionTimes | None = None,
        find: FindActor = find_actor,
    ) -> None:
        """Tries no connection. `find` finds the registry and the relays."""
        self.is_by_relay = by_relay
        self._namespace = namespace
        self._call_timeout_s = call_timeout_s
        self._clock = clock if clock is not None else Clock()
        self._times = times if times is not None else ConnectionTimes()
        self._find = find
        self._relays = (
            RelayFinder(namespace, call_timeout_s, self._clock, self._times.relay, find) if by_relay else None
        )
        self._outbox = Outbox(self.deliver, self.beat_many, self._times.linger_s)
        self._session: session.Session | None = None
        self._handle: ActorHandle | None = None
        self._greeted: ActorHandle | None = None
        self._protocol = PROTOCOL
        self._agent_call_s: float | None = None
        self._circuit = Circuit(self._times.silent_pause_s)
        self._silent_why = ""
        self._probing: asyncio.Task[None] | None = None
        self._words = DurableWords()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_raised: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End what runs in the background. A later call opens it again."""
        await end(self._probing)
        if self._relays is not None:
            await self._relays.close()

    @property
    def uses_relay(self) -> bool:
        """Whether beats and changes go to the relay of this node now."""
        return self._relays is not None and self._relays.relay is not None

    async def ask_relay(self, method: str, *args: object, waits_s: float = 0.0) -> Any:
        """The answer of this node's relay, which may wait `waits_s` seconds; None where it gives none. May raise."""
        self._enter_session()
        return await self._relays.ask(method, *args, waits_s=waits_s) if self._relays is not None else None

    async def use_relay(self, name: str) -> None:
        """Use this relay, which the registry has named for this node. Only for a connection `by_relay`."""
        if self._relays is not None:
            await self._relays.use(name)

    async def hello(self) -> Hello:
        """See RegistryApi.hello. Does not check the protocol."""
        answer: Hello = await self._ask(await self._found(), rules_of(RegistryApi.hello))
        return answer

    async def take(self, change: SequencedChange) -> Receipt:
        """See RegistryApi.take. Only a first registration goes on to a registry that replaced the one called."""
        box = self._outbox.here().changes
        self._words.note_sent(change)
        try:
            receipt = await box.take(change)
        except RegistryReplacedError:
            if not isinstance(change.change, RegisterChange) or change.after is not None:
                raise
            receipt = await box.take(change)
        self._words.note_receipt(change, receipt)
        return receipt

    async def beat(self, instance_id: str) -> BeatAnswer:
        """Renew one lease. Beats of the same moment share a message, and each gets the answer about its own instance.
        Raises InvalidInputError for what is no id, and then nothing is sent."""
        # it must not fail the others' beats
        check_instance_id(instance_id)
        return await self._outbox.here().beats.renew([instance_id])

    async def beat_many(
        self, instance_ids: Sequence[str], loads: Mapping[str, float] | None = None, known: KnownBefore | None = None
    ) -> BeatAnswer:
        """See RegistryApi.beat_many. A registry that is new to this process gets what it knows from before; changes
        that it turns out not to have are sent again."""
        sent = self._words.known_before(instance_ids) if known is None else known
        # without it the message is as short as it can be
        answer = await (self._beat_many(instance_ids, loads, sent) if sent else self._beat_many(instance_ids, loads))
        lost = self._words.note_answer(sent, answer)
        if lost:
            logger.warning(
                "the registry does not have what was durable: the database has lost commits",
                extra={"agents": len(lost)},
            )
            await asyncio.gather(*(self._take_again(changes) for changes in lost))
        return answer

    def forget(self, instance_id: str) -> None:
        """The agent has given this instance up: nothing of it will be sent again."""
        self._words.forget(instance_id)

    async def page(
        self, wanted: InstanceFilter, limit: int = 100, cursor: str | None = None, packed: bool = False
    ) -> Listing:
        """See RegistryApi.page. The message is always packed; with `packed` the listing still is."""
        listing = await self._page(wanted, limit, cursor, packed=True)
        return listing if packed else listing.unpacked()

    async def _take_again(self, changes: Sequence[Change]) -> None:
        """Send changes of one instance again, in order and under their numbers."""
        try:
            taken_by: str | None = None
            for change in changes:
                taken_by = (await self.take(SequencedChange(change, taken_by))).registry
        except RegistryError as error:
            # it is still behind at the next beat
            logger.info("a change is not restored yet: %s", error, extra={"instance_id": changes[0].instance_id})

    deliver = forwarded(RegistryApi.deliver)
    _beat_many = forwarded(RegistryApi.beat_many)
    drain = forwarded(RegistryApi.drain)
    undrain = forwarded(RegistryApi.undrain)
    deregister = forwarded(RegistryApi.deregister)
    report_dead_call = forwarded(RegistryApi.report_dead_call)
    resolve = forwarded(RegistryApi.resolve)
    _page = forwarded(RegistryApi.page)
    changes = forwarded(RegistryApi.changes)
    get_instance = forwarded(RegistryApi.get_instance)
    current_epoch = forwarded(RegistryApi.current_epoch)
    transitions = forwarded(RegistryApi.transitions)
    deaths = forwarded(RegistryApi.deaths)
    describe = forwarded(RegistryApi.describe)
    health = forwarded(RegistryApi.health)
    set_current_epoch = forwarded(RegistryApi.set_current_epoch)
    stage_epoch = forwarded(RegistryApi.stage_epoch)
    list_epochs = forwarded(RegistryApi.list_epochs)

    async def _call(self, rules: Rules, *args: Any, **kwargs: Any) -> Any:
        self._enter_session()
        if rules.is_read:
            self._require_answering()
        relays = self._relays if rules.by_relay else None
        if relays is not None:
            try:
                answer = await relays.ask(rules.name, *args, **kwargs)
            except RegistryReplacedError:
                if rules.repeats is not Repeats.CONNECTION:
                    raise
                answer = None
            if answer is not None:
                return answer
        try:
            answer = await self._ask_directly(rules, *args, **kwargs)
        except RegistryReplacedError:
            raise
        except RegistryUnavailableError:
            # where the registry is not found, as while Ray's tables are away, a relay that rests may still reach it
            if relays is None or self._handle is not None:
                raise
            answer = await relays.ask(rules.name, *args, is_last=True, **kwargs)
            if answer is None:
                raise
            return answer
        if self._relays is not None and isinstance(answer, BeatAnswer):
            self._relays.learn(answer)
        return answer

    async def _ask_directly(self, rules: Rules, *args: Any, **kwargs: Any) -> Any:
        try:
            return await self._ask_greeted(rules, *args, **kwargs)
        except RegistryReplacedError:
            if rules.repeats is not Repeats.CONNECTION:
                raise
            # the name may belong to a new actor by now
            return await self._ask_greeted(rules, *args, **kwargs)

    def _require_answering(self) -> None:
        """Raise RegistryUnavailableError while it is silent. Whether it answers again is found in the background."""
        if not self._circuit.is_open:
            return
        if self._circuit.allows(self._clock.monotonic()) and not is_running(self._probing):
            self._probing = asyncio.create_task(self._probe(), name="registry-probed")
        raise RegistryUnavailableError(self._silent_why)

    async def _probe(self) -> None:
        try:
            await self._ask_greeted(rules_of(RegistryApi.hello))
        except RegistryError as error:
            logger.debug("the registry is still silent: %s", error)

    async def _ask_greeted(self, rules: Rules, *args: Any, **kwargs: Any) -> Any:
        handle = await self._found()
        if self._greeted is not handle:
            hello: Hello = await self._ask(handle, rules_of(RegistryApi.hello))
            hello.require_understood()
            self._greeted, self._protocol, self._agent_call_s = handle, hello.protocol, hello.agent_call_s
        return await self._ask(handle, rules, *args, **kwargs)

    async def _found(self) -> ActorHandle:
        self._enter_session()
        if self._handle is None:
            try:
                self._handle = await self._find(REGISTRY_NAME, self._namespace, self._call_timeout_s)
            except DirectoryUnavailableError as error:
                raise self._silent(error.why) from error
        if self._handle is None:
            raise RegistryUnavailableError(
                f"no actor {REGISTRY_NAME!r} in namespace {self._namespace!r}; `serve run` or `seedcore demo` starts it"
            )
        return self._handle

    def _enter_session(self) -> None:
        """Start over where this process has another Ray session: handles and silences are of one session only."""
        try:
            entered = session.require()
        except SessionError as error:
            raise RegistryUnavailableError(error.why) from None
        if entered is not self._session:
            self._session, self._handle, self._greeted = entered, None, None
            self._circuit.note_answer()
            if self._relays is not None:
                self._relays.reset()

    async def _ask(self, handle: ActorHandle, rules: Rules, *args: Any, **kwargs: Any) -> Any:
        """Call the actor once."""
        bound_s = self._bound_s(rules, *args, **kwargs)
        doubt, began = _IN_DOUBT if rules.repeats is Repeats.NEVER else "", self._session
        try:
            answer = await session.ask_within(bound_s, handle, rules.name, *args, **kwargs)
        except TimeoutError:
            why = f"no answer to {rules.name} within {bound_s:g} s{doubt}"
            if not rules.is_from_memory(*args, **kwargs) or session.current() is not began:
                # the database may be the silent one, while the registry answers others; or the session has ended
                raise RegistryUnavailableError(why) from None
            raise self._silent(why) from None
        except RayTaskError as error:
            self._circuit.note_answer()
            raise cause_of(error, rules.name) from None
        except ActorDiedError as error:
            self._handle = None
            raise RegistryReplacedError(first_line(error) + doubt) from error
        except (RayError, SessionError) as error:
            if isinstance(error, SessionError):
                # a handle that Ray does not know is of no use
                self._handle = None
            raise RegistryUnavailableError(first_line(error) + doubt) from error
        except (AttributeError, TypeError):
            # Ray knows the methods that the actor was made with, and what they take
            if self._protocol == PROTOCOL:
                raise
            raise VersionMismatchError(self._protocol, PROTOCOL) from None
        self._circuit.note_answer()
        return answer

    def _bound_s(self, rules: Rules, *args: Any, **kwargs: Any) -> float:
        if rules.agent_bound and self._agent_call_s is not None:
            return self._agent_call_s
        return self._call_timeout_s + rules.wait_s(*args, **kwargs)

    def _silent(self, why: str) -> RegistryUnavailableError:
        self._silent_why = why
        self._circuit.note_silence(self._clock.monotonic())
        return RegistryUnavailableError(why)


class NoRegistry(RegistryConnection):
    """The connection where the mode is ray: every method raises RegistryUnavailableError, and no actor is called."""

    def _enter_session(self) -> None:
        raise RegistryUnavailableError("the mode is ray")


_connections: dict[tuple[str, float], RegistryConnection] = {}


def shared_connection(namespace: str, call_timeout_s: float = 5.0) -> RegistryConnection:
    """The process's connection to the registry of `namespace`: agents of one process share its handle."""
    key = (namespace, call_timeout_s)
    if key not in _connections:
        _connections[key] = RegistryConnection(namespace, call_timeout_s, by_relay=True)
    return _connections[key]
