"""What the registry needs of a store and of Ray's listing. Implementations live in other rooms."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime
from typing import Protocol

from seedcore.core.answers import Answer, InstanceFilter, Listing, LostBeat, Outcome
from seedcore.core.causes import Cause
from seedcore.core.changes import HoldChange, RegisterChange, Registration, StatusChange
from seedcore.core.dependencies import Dependency
from seedcore.core.errors import StoreUnavailableError
from seedcore.core.instances import Beat, Epoch, EpochRecord, Instance, LiveState, TermSeen, Transition
from seedcore.core.verdict import Witness


class StoreDoubtError(StoreUnavailableError):
    """A trigger or constraint that the owner of the database added refused a batch, for one of its values or for any.
    Only a batch raises it, and it does not leave the registry's process."""


class CommitsLostError(StoreUnavailableError):
    """The database has lost commits that this store had made: `found` is the last one that it has, `known` the last one
    that it had, 0 in another database. A standby was promoted that did not have them, or a backup was restored. `begin`
    makes it usable."""

    def __init__(self, known: int, found: int, why: str | None = None) -> None:
        super().__init__(why or f"the database has lost commits: it has {found} and had {known}")
        self.known = known
        self.found = found


class InstanceReader(Protocol):
    """The reading side of a store: what discovery needs while the registry is down.

    Every method raises StoreUnavailableError when the database does not answer in time or cannot be used, and
    StoreRejectedError when it refuses a value.
    """

    async def list_instances(self, wanted: InstanceFilter, limit: int, cursor: str | None = None) -> Listing:
        """A page of at most `limit` instances in (logical_id, instance_id) order.

        `fresh_only` judges leases at the time of the last recorded beat, so that the list does not become empty while
        the registry is down. Raises InvalidInputError for a cursor that it did not issue.
        """
        ...

    async def best_instances(self, logical_ids: Sequence[str]) -> Answer[dict[str, Instance]]:
        """The best active instance of each logical id that has one (see core.selection)."""
        ...

    async def get_instance(self, instance_id: str) -> Instance | None:
        """One instance, dead or alive."""
        ...

    async def instances(self, logical_id: str, limit: int) -> list[Instance]:
        """The newest `limit` instances of an agent, dead ones included, newest first."""
        ...

    async def transitions(self, logical_id: str, limit: int) -> list[Transition]:
        """The newest `limit` transitions of an agent's instances, in the reverse of the order they were committed."""
        ...

    async def history(
        self, logical_id: str, instances: int, transitions: int
    ) -> tuple[list[Instance], list[Transition]]:
        """So many of each, as `instances` and `transitions` return them, by one question."""
        ...

    async def deaths(self, limit: int, cursor: str | None = None, within_s: float | None = None) -> Listing:
        """The dead instances of all agents and epochs, the last death first; with `within_s` only deaths of the last
        seconds."""
        ...

    async def current_epoch(self) -> Epoch:
        """The epoch that discovery shows."""
        ...

    async def list_epochs(self, limit: int) -> list[EpochRecord]:
        """The newest `limit` epochs, newest first."""
        ...

    async def close(self) -> None:
        """Release connections. Idempotent."""
        ...


class Store(InstanceReader, Protocol):
    """Everything the registry actor needs.

    A batch is one statement and one transaction. Its outcomes are in the order of its changes. It may be sent again:
    the sequence numbers of agents, and the numbers of this store's own changes, make each change count once. Changes of
    one instance must be sent in the order of their numbers. A batch with a value that the store refuses changes nothing
    and raises StoreRejectedError or StoreDoubtError. After `begin`, every write raises FencedError and changes nothing
    once another store has begun on the same database, and CommitsLostError where the database has lost commits that
    this store knows.
    """

    async def open(self) -> None:
        """Prepare: start an embedded server, migrate the schema, fill the pool. Idempotent; may be repeated during an
        outage, and may run beside other starters."""
        ...

    async def begin(
        self,
        ray_cluster: str,
        epoch: str | None,
        lease_s: float,
        seen: TermSeen | None = None,
        new_epoch: str | None = None,
    ) -> Epoch:
        """A registry starts in `ray_cluster`: it keeps the epoch of the same cluster, and makes a new one in another.

        Takes the next term, which every later write of this store carries, and renews every lease. `epoch` names the
        epoch that must be current; `new_epoch` the one to make where another cluster's is current, unless it is
        retired. Raises RetiredEpochError for an epoch that is retired, and FencedError for a cluster that another one
        has replaced, and for a store that has begun before another one did. With `seen`, an answer of `term_seen`, it
        raises FencedError where the registry in force has been at work since, and accepts any cluster and store if not.
        Terms and commits only grow: a database that has lost some continues behind the last ones that this store knows.
        """
        ...

    async def term_seen(self) -> TermSeen:
        """The registry in force, and when it was last seen at work. `begin` takes the answer."""
        ...

    async def renew_term(self, lease_s: float) -> None:
        """Record that the registry is at work, and that a lease lasts `lease_s` seconds from now on."""
        ...

    @property
    def term(self) -> int | None:
        """The writer's term, None before `begin`."""
        ...

    @property
    def commits(self) -> int:
        """The number of the last commit of a registry that this store knows; 0 before `begin`."""
        ...

    @property
    def found_commits(self) -> int:
        """The number of the last commit that the database had when this store began; 0 before that, and where it is
        another database than the one before: its term is lower, and its commits are not. Where the store had begun
        before, a lower number than `commits` was then means that the database had lost commits."""
        ...

    @property
    def found_own(self) -> bool:
        """Whether the term that the database had when this store began is `term` as this store knew it. If not, another
        registry has begun since, or the database has lost the term, or the answer to a start was lost: then others may
        have written, and `found_commits` counts theirs, too. A lost term may have been taken by another registry: its
        number alone proves nothing."""
        ...

    @property
    def database_id(self) -> str | None:
        """Identifies the database, also after a failover or a restore; None before `begin`."""
        ...

    @property
    def pool(self) -> Mapping[str, int]:
        """The number of connections by their state; empty where there are none."""
        ...

    @property
    def lease_before_s(self) -> float | None:
        """The lease that was in force when this store began; None where it is the first registry."""
        ...

    async def renew_every_lease(self) -> None:
        """Renew every lease, because the registry was down."""
        ...

    async def stage_epoch(self, epoch: str) -> bool:
        """Name an epoch that will become current later; whether it is new.

        Raises RetiredEpochError or EpochLimitError."""
        ...

    async def set_current_epoch(self, epoch: str, above: int = 0) -> Epoch:
        """Flip discovery to `epoch` in one step, or raise RetiredEpochError. Its number becomes higher than that
        of the epoch before, and than `above`: an epoch that is confirmed after a flip was lost has a higher number than
        the lost one."""
        ...

    def load_live(self) -> AsyncIterator[Instance]:
        """Every instance that is not dead, in any order, read in bounded pages."""
        ...

    async def read_instance(self, instance_id: str) -> Instance | None:
        """One instance, dead or alive, to act on: raises also what a write raises."""
        ...

    async def live_states(self, after: tuple[str, str], limit: int) -> list[LiveState]:
        """The next `limit` instances that are not dead behind the key `after`, in (logical_id, instance_id) order, to
        act on: raises also what a write raises."""
        ...

    async def last_beats(self, instance_ids: Sequence[str]) -> dict[str, datetime]:
        """When the last beat of each of these was recorded; dead and unknown instances are left out."""
        ...

    async def epochs_of(self, registrations: Sequence[Registration]) -> list[str | None]:
        """The epochs to which registrations belong that require none: the epoch in which each was started, or that of
        the previous instance of its actor; or the epoch that continues it, where a registry took over the database
        since. It may be retired. None: the current epoch, also where the epoch is not known any more."""
        ...

    async def register_many(self, changes: Sequence[RegisterChange]) -> list[Outcome]:
        """Insert or refresh instances."""
        ...

    async def set_status_many(self, changes: Sequence[StatusChange]) -> list[Outcome]:
        """Change reported statuses, each guarded by the transition table and its number."""
        ...

    async def hold_many(self, changes: Sequence[HoldChange]) -> list[Outcome]:
        """Place, replace and release holds."""
        ...

    async def refine_causes(self, causes: Mapping[str, Cause]) -> list[str]:
        """Store better known causes of deaths, by instance id. Returns the ids of those that have this cause now. What
        the agent, an operator or the registry decided is not replaced (core.causes.is_refined_by)."""
        ...

    async def beat_many(self, beats: Sequence[Beat]) -> list[LostBeat]:
        """Renew leases; the newest beat counts. Returns only the beats that renewed nothing."""
        ...

    async def expire_stale(self, lease_s: float | None, limit: int) -> list[str]:
        """Declare up to `limit` instances dead whose last beat is older than the lease; their ids."""
        ...

    async def expire_old_epochs(self, limit: int) -> list[str]:
        """Declare up to `limit` instances of retired epochs dead; their ids."""
        ...

    async def prune_history(self, keep_s: float, limit: int) -> int:
        """Delete transitions, and dead instances, of more than `keep_s` seconds ago: at most `limit` of each, the
        oldest first. Returns how many."""
        ...


OnDeath = Callable[[str, Witness, Witness, Cause], None]
OnExplained = Callable[[str, Cause], None]
OnDependency = Callable[[str, Dependency, Cause], None]
OnLostNodes = Callable[[frozenset[str]], None]
OnUnwatched = Callable[[Mapping[str, int]], None]
OnDraining = Callable[[Mapping[str, datetime | None] | None], None]


class DeathWitness(Protocol):
    """Observes deaths by other means than beats: processes, nodes, actors. It declares no instance dead.

    It calls `on_death(instance_id, process, node, cause)` in the event loop that started it, at least once for each
    death, and `on_refined(instance_id, cause)` when the cause of a reported death becomes better known. It calls
    `on_dependency(instance_id, dependency, cause)` when a process that an instance depends on has ended. After each
    look it calls `on_lost_nodes(node_ids)` with all nodes that Ray has declared dead, `on_unwatched(counts)` with the
    number of instances that it does not watch, by reason, and `on_draining(nodes)` with all nodes that Ray drains and
    the deadline of each, where it has one; None where that could not be read.
    """

    on_refined: OnExplained
    on_dependency: OnDependency
    on_lost_nodes: OnLostNodes
    on_unwatched: OnUnwatched
    on_draining: OnDraining

    @property
    def problem(self) -> str | None:
        """Why it does not observe everything, or None."""
        ...

    @property
    def is_blind(self) -> bool:
        """Whether Ray's tables could not be read last: agents cannot find a new registry in them either."""
        ...

    @property
    def relays(self) -> int:
        """How many relays are at work."""
        ...

    @property
    def watched(self) -> int:
        """How many instances are watched. The deaths of the others show by missing beats alone."""
        ...

    def relay_of(self, node_id: str) -> str | None:
        """The name of the relay at work on a node, to which agents may send their beats and changes; None where there
        is none."""
        ...

    def start(self) -> None:
        """Begin to watch."""
        ...

    async def stop(self) -> None:
        """Stop watching."""
        ...

    def add(self, instance: Instance) -> None:
        """Watch an instance. Called again when anything of it changes."""
        ...

    def drop(self, instance: Instance) -> None:
        """Stop watching an instance, given with the details that it was added with."""
        ...

    async def ask_ray(self, instance: Instance, timeout_s: float) -> Witness:
        """The state of an instance's actor in Ray's actor table."""
        ...


class ActorDirectory(Protocol):
    """Ray's own listing of named actors: names without state, the last source that a caller asks."""

    async def names(self) -> list[str]:
        """The names of all agent actors in our namespace, or DirectoryUnavailableError."""
        ...
