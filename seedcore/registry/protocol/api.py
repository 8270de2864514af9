"""The registry's contract: every method that crosses processes, with its types and its rules.

`RegistryApi` is implemented by the registry actor (server.registry.Registry) and by the connection to it
(protocol.connection.RegistryConnection); `RelayApi`, its first part, also by the relay of a node (node.relay.Relay).
The rules of a method stand in its decorator, and the connection reads them there: see `forwarded` in connection.py.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ParamSpec, Protocol, TypeVar

from seedcore.core.answers import Answer, BeatAnswer, InstanceFilter, KnownBefore, Listing, Receipt, Resolution
from seedcore.core.changes import SequencedChange
from seedcore.core.errors import RegistryError
from seedcore.core.feed import FeedBatch
from seedcore.core.feed_question import FeedQuestion
from seedcore.core.instances import Epoch, EpochRecord, Instance, Transition, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import check_kind
from seedcore.registry.protocol.messages import Description, Health, Hello, OperationResult

P = ParamSpec("P")
R = TypeVar("R")

_RULES = "__seedcore_rules__"


class Answered(StrEnum):
    """What an answer needs."""

    FROM_MEMORY = "from memory"
    """At once, without the database: where it does not arrive in time, the registry itself is silent."""
    AFTER_WAIT = "after a wait"
    """The registry waits a bounded time for the database or for Ray, and answers without them."""
    FROM_DATABASE = "from the database"
    """Raises StoreUnavailableError while the database cannot be read or written."""


class Repeats(StrEnum):
    """Which side sends a call again whose outcome is not known."""

    CONNECTION = "connection"
    """The connection, to the actor that replaced the one that was called."""
    SENDER = "sender"
    """The sender of the changes, which numbers them: it must decide what the new actor has to get first."""
    NEVER = "never"
    """No side: an operator's call has no number. Its error warns that it may have been carried out."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How a method is called.

    `is_read`: refused at once while the registry is known to be silent. `by_relay`: the relay of the node may answer
    it. `agent_bound`: the registry sets how long its caller waits (`Hello.agent_call_s`), instead of the caller's own
    `call_timeout_s`. `waits_s` returns by how many seconds the arguments let the registry wait, which is added to the
    bound. `reads_database` returns whether these arguments need the database although the method usually does not.
    """

    name: str
    answered: Answered
    repeats: Repeats
    is_read: bool
    by_relay: bool
    agent_bound: bool
    waits_s: Callable[..., float] | None
    reads_database: Callable[..., bool] | None

    def wait_s(self, *args: Any, **kwargs: Any) -> float:
        """By how many seconds these arguments let the registry wait."""
        return 0.0 if self.waits_s is None else self.waits_s(*args, **kwargs)

    def is_from_memory(self, *args: Any, **kwargs: Any) -> bool:
        """Whether a call with these arguments is answered without the database."""
        if self.reads_database is not None and self.reads_database(*args, **kwargs):
            return False
        return self.answered is Answered.FROM_MEMORY


def rules(
    answered: Answered,
    *,
    repeats: Repeats = Repeats.CONNECTION,
    is_read: bool = False,
    by_relay: bool = False,
    agent_bound: bool = False,
    waits_s: Callable[..., float] | None = None,
    reads_database: Callable[..., bool] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare the rules of a method of the contract. `waits_s` and `reads_database` receive the call's arguments."""

    def declare(method: Callable[P, R]) -> Callable[P, R]:
        declared = Rules(method.__name__, answered, repeats, is_read, by_relay, agent_bound, waits_s, reads_database)
        setattr(method, _RULES, declared)
        return method

    return declare


def rules_of(method: Callable[..., Coroutine[Any, Any, object]]) -> Rules:
    """The rules of a method of the contract."""
    declared: Rules = getattr(method, _RULES)
    return declared


def _wants_dead(wanted: InstanceFilter, *_: object, **__: object) -> bool:
    return wanted.statuses is not None and Status.DEAD in wanted.statuses


def _wait_of(question: FeedQuestion) -> float:
    return check_kind("question", question, FeedQuestion).validated().wait_s


class RelayApi(Protocol):
    """What agents send: the registry answers it, and so does the relay of a node."""

    @rules(Answered.AFTER_WAIT, repeats=Repeats.SENDER, by_relay=True, agent_bound=True)
    async def deliver(self, changes: Sequence[SequencedChange]) -> list[Receipt | RegistryError]:
        """The changes of many agents, at most MAX_CHANGES_PER_MESSAGE: the receipt of each, or its refusal, in their
        order. Two changes of one instance must not be in one message."""
        ...

    @rules(Answered.FROM_MEMORY, by_relay=True, agent_bound=True)
    async def beat_many(
        self, instance_ids: Sequence[str], loads: Mapping[str, float] | None = None, known: KnownBefore | None = None
    ) -> BeatAnswer:
        """Renew many leases, at most MAX_BEATS_PER_MESSAGE. `loads` are those of some of them, by instance id, in the
        unit that the agents of a logical id share. `known` goes to a registry that has not answered the sender yet."""
        ...


class RegistryApi(RelayApi, Protocol):
    """Everything that the registry answers. Every method also raises InvalidInputError for an argument beyond its
    limits, and then nothing has changed."""

    @rules(Answered.FROM_MEMORY)
    async def hello(self) -> Hello:
        """The version of the code that runs under the registry's name, and its process."""
        ...

    @rules(Answered.AFTER_WAIT, repeats=Repeats.SENDER, by_relay=True, agent_bound=True)
    async def take(self, change: SequencedChange) -> Receipt:
        """Register an instance, refresh one that is registered, or change its status, or its hold of kind `readiness`
        or `process`: the one door for changes. A change has its agent's number, so that it is applied once however
        often it is sent.

        Returns also where nothing is committed: see `Receipt.durable`. Raises, and then nothing has changed:
        UnknownInstanceError, InstanceDeadError, InstanceConflictError, ForbiddenTransitionError, RetiredEpochError,
        EpochLimitError, BacklogFullError, RegistryFullError, FencedError; NodeDeadError for a node that Ray has
        declared dead; RegistryReplacedError where another registry took the change that this one comes `after`;
        RegistryUnavailableError where the instance is not known yet.
        """
        ...

    @rules(Answered.AFTER_WAIT, repeats=Repeats.NEVER)
    async def drain(
        self,
        logical_ids: Sequence[str] = (),
        reason: str | None = None,
        by: str | None = None,
        duration_s: float | None = None,
        *,
        instance_ids: Sequence[str] = (),
    ) -> list[OperationResult]:
        """Stop routing to every live instance of these agents, and to these instances; at most MAX_PAGE ids: place the
        operator's hold on each. `by` names the operator. The hold expires after `duration_s` seconds (None: it lasts
        until `undrain`); a second call replaces it. What an agent reports meanwhile does not end it.

        Returns one result for each instance, and one for an agent that has none. Raises RegistryUnavailableError where
        it is not known yet which instances live.
        """
        ...

    @rules(Answered.AFTER_WAIT, repeats=Repeats.NEVER)
    async def undrain(
        self,
        logical_ids: Sequence[str] = (),
        reason: str | None = None,
        by: str | None = None,
        *,
        instance_ids: Sequence[str] = (),
    ) -> list[OperationResult]:
        """Release the operator's hold of these instances, and nothing else. An instance that is starting, or that
        itself reports draining, is not alive after it: `OperationResult.why` is the reason. Arguments and errors as in
        `drain`."""
        ...

    @rules(Answered.AFTER_WAIT, repeats=Repeats.NEVER)
    async def deregister(
        self,
        logical_ids: Sequence[str] = (),
        reason: str | None = None,
        by: str | None = None,
        *,
        instance_ids: Sequence[str] = (),
    ) -> list[OperationResult]:
        """Declare instances dead. An agent that still runs registers again, as a new instance. Arguments, results and
        errors as in `drain`."""
        ...

    @rules(Answered.AFTER_WAIT)
    async def report_dead_call(self, instance_id: str) -> Verdict:
        """A call to the instance's actor found it dead: the registry asks Ray, and returns the verdict after that. It
        does not rely on the report. Raises FencedError."""
        ...

    @rules(Answered.FROM_MEMORY, is_read=True)
    async def resolve(self, logical_ids: Sequence[str], *, allow_late: bool = False) -> Answer[list[Resolution]]:
        """The best instance of each agent, or why there is none; at most MAX_PAGE ids. Fresh instances only;
        `allow_late` accepts one that has missed a beat where none is fresh."""
        ...

    @rules(Answered.FROM_MEMORY, is_read=True, reads_database=_wants_dead)
    async def page(
        self, wanted: InstanceFilter, limit: int = 100, cursor: str | None = None, packed: bool = False
    ) -> Listing:
        """A page of the instances that the filter matches, in the order of their keys: the one door for lists. At most
        MAX_LISTED; of pages with dead ones, MAX_PAGE. They are `packed` for the message, where that is asked for.

        Dead instances are in the database only: asking for them raises StoreUnavailableError while it is away.
        """
        ...

    @rules(Answered.FROM_MEMORY, is_read=True, waits_s=_wait_of)
    async def changes(self, question: FeedQuestion) -> FeedBatch:
        """What changed in the feed. After a batch that is a reset, list all pages (with `fresh_only` False; their
        `stream` must be the same), then go on from its version. That the registry ended during a wait is noticed at the
        end of the bound.

        Raises FollowersFullError where all places are taken. Where the registry has many followers, it gives no place
        to a process whose node has a relay: it answers at once, and names the relay, which follows for the processes of
        its node.
        """
        ...

    @rules(Answered.FROM_DATABASE, is_read=True)
    async def get_instance(self, instance_id: str) -> Answer[Instance]:
        """One instance, dead or alive. One that memory has needs no database. Raises UnknownInstanceError."""
        ...

    @rules(Answered.AFTER_WAIT, is_read=True)
    async def current_epoch(self) -> Answer[Epoch]:
        """The epoch that listings show. Raises StoreUnavailableError until the database has been read once."""
        ...

    @rules(Answered.FROM_DATABASE, is_read=True)
    async def transitions(self, logical_id: str, limit: int = 100) -> list[Transition]:
        """The newest transitions of an agent's instances, the newest first."""
        ...

    @rules(Answered.FROM_DATABASE, is_read=True)
    async def deaths(self, limit: int = 100, cursor: str | None = None, within_s: float | None = None) -> Listing:
        """Dead instances of every agent and epoch, the last first; with `within_s` those of so many last seconds."""
        ...

    @rules(Answered.AFTER_WAIT, is_read=True)
    async def describe(self, logical_id: str) -> Description:
        """One agent: its live instances from memory, and its past from the database if that answers."""
        ...

    @rules(Answered.FROM_MEMORY)
    async def health(self) -> Health:
        """The registry's own state."""
        ...

    @rules(Answered.FROM_DATABASE)
    async def set_current_epoch(self, epoch: str) -> str:
        """Make `epoch` the one that discovery shows, in one step; instances of the one before are then declared dead.

        Raises RetiredEpochError, EpochLimitError or FencedError.
        """
        ...

    @rules(Answered.FROM_DATABASE)
    async def stage_epoch(self, epoch: str) -> bool:
        """Name an epoch in which agents can register before it is shown. Returns whether it is new. Raises as
        `set_current_epoch`."""
        ...

    @rules(Answered.FROM_DATABASE)
    async def list_epochs(self, limit: int = 20) -> list[EpochRecord]:
        """The newest epochs, the newest first."""
        ...
