"""What a source of agents is: one Protocol for the followed cache, the registry, PostgreSQL and Ray's listing.

A source answers, or raises NoAnswerError and the resolver asks the next one. `complete` of an answer states whether
the source knows every agent. Only a complete answer proves that an agent is not registered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from seedcore.core.answers import Answer, InstanceFilter, Listing, Origin, Resolution
from seedcore.core.errors import (
    DirectoryUnavailableError,
    RegistryError,
    RegistryUnavailableError,
    StoreUnavailableError,
)
from seedcore.core.instances import Epoch, Instance, Transition
from seedcore.core.limits import NOTHING
from seedcore.core.selection import Policy, choose
from seedcore.registry.protocol.messages import Description


class NoAnswerError(RegistryError):
    """A source does not answer now, or cannot answer this question: ask the next one."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True, slots=True)
class Choice:
    """How one of an agent's instances is chosen. `node_id` is the caller's node, `turn` its number of earlier
    choices. `allow_late` takes an instance that missed one beat, if none is fresh. `outstanding` has the numbers of the
    caller's calls under way, by instance id. `instance_id` takes this one or none."""

    allow_late: bool = False
    policy: Policy = Policy.NEWEST
    key: str = ""
    node_id: str | None = None
    turn: int = 0
    outstanding: Mapping[str, int] | None = None
    instance_id: str | None = None

    @property
    def is_by_chance(self) -> bool:
        """Whether the same choice may take another instance the next time."""
        return self.policy in {Policy.LEAST_LOADED, Policy.LEAST_OUTSTANDING}

    def of(self, candidates: Sequence[Instance], loads: Mapping[str, float] = NOTHING) -> Instance | None:
        """The chosen one of the routable instances, or None if there are none."""
        if self.instance_id is not None:
            return next((row for row in candidates if row.instance_id == self.instance_id), None)
        return choose(
            candidates,
            self.policy,
            node_id=self.node_id,
            loads=loads,
            turn=self.turn,
            key=self.key,
            outstanding=self.outstanding,
        )


@dataclass(frozen=True, slots=True)
class NameListing:
    """The names of actors that Ray lists: alive or about to be, without any state."""

    names: tuple[str, ...]
    as_of: datetime
    next_cursor: str | None
    source: Origin = Origin.RAY
    version: int = 0
    complete: bool = False


Resolved = Answer[list[Resolution]] | NameListing
Listed = Listing | NameListing


class Source(Protocol):
    """A place that knows agents. Every method raises NoAnswerError if another source must be asked, and
    InvalidInputError for a bad argument."""

    @property
    def origin(self) -> Origin:
        """The kind of source, as its answers name it."""
        ...

    async def problem(self) -> str | None:
        """Why it cannot answer now, or None."""
        ...

    async def resolve(self, logical_ids: Sequence[str], choice: Choice) -> Resolved:
        """The chosen instance of each agent, or why there is none."""
        ...

    async def page(self, wanted: InstanceFilter, limit: int, cursor: str | None) -> Listed:
        """A page of instances in key order."""
        ...


class RecordSource(Source, Protocol):
    """A source that has records of agents, dead ones included: the registry or its database. Raises as Source."""

    async def describe(self, logical_id: str) -> Description:
        """One agent with its instances and transitions."""
        ...

    async def transitions(self, logical_id: str, limit: int) -> Answer[list[Transition]]:
        """The newest transitions of an agent's instances, newest first."""
        ...

    async def deaths(self, limit: int, cursor: str | None, within_s: float | None) -> Listing:
        """Dead instances, the latest death first."""
        ...

    async def instance(self, instance_id: str) -> Answer[Instance]:
        """One instance, dead or alive. Raises UnknownInstanceError."""
        ...

    async def epoch(self) -> Answer[Epoch]:
        """The current epoch."""
        ...

    async def report_gone(self, instance: Instance) -> None:
        """Report that the actor of an instance is gone, if the source accepts reports."""
        ...


@asynccontextmanager
async def asked(slots: asyncio.Semaphore | None) -> AsyncIterator[None]:
    """Ask a source: an outage becomes NoAnswerError."""
    bound: AbstractAsyncContextManager[object] = nullcontext() if slots is None else slots
    async with bound:
        try:
            yield
        except (RegistryUnavailableError, StoreUnavailableError, DirectoryUnavailableError) as error:
            raise NoAnswerError(str(error)) from error
