"""What the registry needs of a store and of Ray's listing. Implementations live in other rooms."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime
from typing import Protocol

from seedcore.core.answers import Answer, InstanceFilter, Listing, LostBeat, Outcome
from seedcore.core.changes import RegisterChange, Registration, StatusChange
from seedcore.core.errors import StoreUnavailableError
from seedcore.core.instances import Beat, Epoch, EpochRecord, Instance, LiveState, Transition
from seedcore.core.verdict import Witness


class StoreDoubtError(StoreUnavailableError):
    """A trigger or constraint that is not ours refused a batch: for one of its values, or for any. Only the registry's
    writer gets it, from a batch; it crosses no process, and so is not among the errors that do."""


class InstanceReader(Protocol):
    """Reading side of a store: what discovery needs when the registry actor is away.

    Every method raises StoreUnavailableError when the database does not answer in time or cannot be used, and
    StoreRejectedError when it refuses a value.
    """

    async def list_instances(self, wanted: InstanceFilter, limit: int, cursor: str | None = None) -> Listing:
        """A page of at most `limit` instances in (logical_id, instance_id) order.

        `fresh_only` is judged against the last beat anybody recorded, not against the clock, so that an
        absent registry does not empty the list. Raises InvalidInputError for a cursor it did not issue.
        """
        ...

    async def best_instances(self, logical_ids: Sequence[str]) -> Answer[dict[str, Instance]]:
        """The best active instance of each logical id that has one (see core.selection)."""
        ...

    async def get_instance(self, instance_id: str) -> Instance | None:
        """One instance, dead or alive."""
        ...

    async def history(self, logical_id: str, limit: int) -> list[Instance]:
        """The newest `limit` instances of an agent, dead ones included, newest first."""
        ...

    async def transitions(self, logical_id: str, limit: int) -> list[Transition]:
        """The newest `limit` transitions of an agent's instances, in the reverse of the order they were committed."""
        ...

    async def deaths(self, limit: int, cursor: str | None = None, within_s: float | None = None) -> Listing:
        """Who died, of every agent and epoch, the last first; with `within_s` only within that many seconds."""
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
    """Everything the registry actor needs. A batch is one statement and one transaction; its outcomes come
    in the order of its changes; replaying it is harmless (sequence numbers, transition table). A batch with a value
    that the store refuses leaves nothing and raises StoreRejectedError, or StoreDoubtError. Once `begin` was called,
    every write raises FencedError, and changes nothing, after another store began on the same database.
    """

    async def open(self) -> None:
        """Prepare: start the server where it is ours, migrate the schema, fill the pool.

        Idempotent, and worth repeating during an outage. Safe beside other starters."""
        ...

    async def begin(self, ray_cluster: str, epoch: str | None, lease_s: float, idle_s: float | None = None) -> Epoch:
        """A registry starts in `ray_cluster`: keep the epoch of the same cluster, rotate it in a new one.

        Takes the next term, which every later write of this store carries, and starts every lease again. `epoch`
        insists on a name: it becomes current if it is not. Raises RetiredEpochError for one that was current
        before another, FencedError for a cluster that another has replaced, and, with `idle_s`, for any while the
        registry of the term in force was seen at work in the last `idle_s` seconds, but for none after that.
        """
        ...

    async def renew_term(self, lease_s: float) -> None:
        """Be seen at work; from now on a lease is so many seconds long."""
        ...

    @property
    def term(self) -> int | None:
        """The writer's term, None before `begin`."""
        ...

    @property
    def pool(self) -> Mapping[str, int]:
        """How many connections there are, by what they do now; empty where there are none."""
        ...

    @property
    def lease_before_s(self) -> float | None:
        """The lease that was in force when this store began; None where no registry had been there."""
        ...

    async def renew_every_lease(self) -> None:
        """Count nobody's silence from before now: it was our absence."""
        ...

    async def stage_epoch(self, epoch: str) -> bool:
        """Name an epoch that shall become current later; whether it is new.

        Raises RetiredEpochError or EpochLimitError."""
        ...

    async def set_current_epoch(self, epoch: str) -> Epoch:
        """Flip discovery to `epoch` in one step, or raise RetiredEpochError."""
        ...

    def load_live(self) -> AsyncIterator[Instance]:
        """Every instance that is not dead, in any order, read in bounded pages."""
        ...

    async def live_states(self, after: tuple[str, str], limit: int) -> list[LiveState]:
        """The next `limit` instances that are not dead behind the key `after`, in (logical_id, instance_id) order."""
        ...

    async def last_beats(self, instance_ids: Sequence[str]) -> dict[str, datetime]:
        """When each of these, that is there and not dead, was last heard by anybody."""
        ...

    async def epochs_of(self, registrations: Sequence[Registration]) -> list[str | None]:
        """Where registrations belong that insist on no epoch: the one in which each was started, or the one of its
        actor's instance before; where a registry took the database over since, the one that continues it. None: the
        current one, also where nobody knows the epoch any more. It may be retired."""
        ...

    async def register_many(self, changes: Sequence[RegisterChange]) -> list[Outcome]:
        """Insert or refresh instances."""
        ...

    async def set_status_many(self, changes: Sequence[StatusChange]) -> list[Outcome]:
        """Apply status changes in order, each guarded by the transition table and its sequence number, or, where it
        has none, by its number among those of this store."""
        ...

    async def refine_causes(self, causes: Mapping[str, str]) -> list[str]:
        """Tell better why instances died: the cause that is known, and more. The ids of those whose cause it is now."""
        ...

    async def beat_many(self, beats: Sequence[Beat]) -> list[LostBeat]:
        """Renew leases; the newest time wins. Returns only the beats that renewed nothing."""
        ...

    async def expire_stale(self, lease_s: float | None, limit: int) -> list[str]:
        """Declare up to `limit` instances dead whose last beat is older than the lease; their ids."""
        ...

    async def expire_old_epochs(self, limit: int) -> list[str]:
        """Declare up to `limit` instances of retired epochs dead; their ids."""
        ...

    async def prune_history(self, keep_s: float, limit: int) -> int:
        """Forget transitions, and instances that are dead, of more than `keep_s` seconds ago: at most `limit` of each,
        the oldest first; how many."""
        ...


OnDeath = Callable[[str, Witness, Witness, str], None]
OnExplained = Callable[[str, str], None]
OnLostNodes = Callable[[frozenset[str]], None]
OnUnwatched = Callable[[Mapping[str, int]], None]


class DeathWitness(Protocol):
    """Who sees deaths besides the beats: processes, nodes, actors. It tells, by `on_death(instance_id, process, node,
    cause)` in the event loop that started it, at least once; it declares nobody dead. `on_refined(instance_id,
    cause)` is called where more than that cause becomes known of a death that it told of. Each time that it has looked
    it calls `on_lost_nodes(node_ids)` with all nodes that Ray has declared dead, and `on_unwatched(counts)` with how
    many instances it does not watch, by the reason."""

    on_refined: OnExplained
    on_lost_nodes: OnLostNodes
    on_unwatched: OnUnwatched

    @property
    def problem(self) -> str | None:
        """Why it does not see everything, or None."""
        ...

    @property
    def relays(self) -> int:
        """How many relays are at work."""
        ...

    @property
    def watched(self) -> int:
        """How many instances are watched; the others' deaths show by their beats alone."""
        ...

    def relay_of(self, node_id: str) -> str | None:
        """The name of the relay at work on a node, where agents may say what they have to say to it."""
        ...

    def start(self) -> None:
        """Begin to watch."""
        ...

    async def stop(self) -> None:
        """Watch nobody any more."""
        ...

    def add(self, instance: Instance) -> None:
        """Watch an instance from now on; again when anything of it changes."""
        ...

    def drop(self, instance: Instance) -> None:
        """Watch it no more; with the details that it was added with."""
        ...

    async def ask_ray(self, instance: Instance, timeout_s: float) -> Witness:
        """What Ray's actor table says of an instance's actor now."""
        ...


class ActorDirectory(Protocol):
    """Ray's own listing of named actors: names without state, the last source that is asked."""

    async def names(self) -> list[str]:
        """All agent actors' names in our namespace, or DirectoryUnavailableError."""
        ...
