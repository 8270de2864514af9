"""The code broken on purpose, one law at a time: the simulation has to notice each."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any
from unittest import mock

from seedcore.core.answers import InstanceFilter, Listing, Outcome, Receipt
from seedcore.core.batch import ChangeBatch
from seedcore.core.changes import Change, HoldChange, Registration, StatusChange
from seedcore.core.errors import RegistryError, StoreRejectedError, StoreUnavailableError
from seedcore.core.feed import Feed, FeedBatch
from seedcore.core.holds import HoldKind, effective_status
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lease import MassLateness
from seedcore.core.lifecycle import Status
from seedcore.core.members import Members
from seedcore.core.rules import apply_hold, apply_status
from seedcore.core.silence import Silence
from seedcore.core.verdict import Death, Evidence, Witness, judge
from seedcore.core.view import LiveView
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.agent.delivery import Delivery
from seedcore.registry.caller.handle_cache import HandleCache
from seedcore.registry.following.follower import Follower
from seedcore.registry.protocol.api import Repeats, Rules
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.ray_support.actors import Proof
from seedcore.registry.ray_support.lookup import ActorHandle
from seedcore.registry.server.backlog import Backlog
from seedcore.registry.server.comparison import Comparison
from seedcore.registry.server.database import DatabaseSession
from seedcore.registry.server.death_watch import DeathWatch
from seedcore.registry.server.drains import Drains
from seedcore.registry.server.receipts import Receipts
from seedcore.store.memory import MemoryStore, Tables
from tests.faults.loss_mutants import LOSS_MUTANTS
from tests.faults.mutant import Mutant
from tests.faults.simulated.breakage import Breakage


def _nothing(*_: object) -> None:
    """Instead of what the code does."""


async def _acknowledge(_: Receipts, taken: Sequence[Change | Receipt | RegistryError]) -> list[Receipt | RegistryError]:
    return [one if isinstance(one, (Receipt, RegistryError)) else _acknowledged(one) for one in taken]


def _acknowledged(change: Change) -> Receipt:
    seq = 0 if isinstance(change, HoldChange) else change.seq or 0
    return Receipt(change.instance_id, Status.ALIVE, seq, durable=True, epoch=None, why=None)


_adopt = Members.adopt


def _adopt_as_silent(members: Members, instance: Instance, now_s: float) -> None:
    _adopt(members, instance, now_s - 1000)


_credit = Silence.credit


def _credit_no_whole_lease(silence: Silence, absence_s: float, now_s: float) -> None:
    if absence_s != math.inf:
        _credit(silence, absence_s, now_s)


@contextmanager
def _patch_no_new_lease() -> Iterator[None]:
    with (
        mock.patch.object(Members, "adopt", _adopt_as_silent),
        mock.patch.object(Silence, "credit", _credit_no_whole_lease),
    ):
        yield


def _revive(known: Instance, change: StatusChange, now: datetime) -> tuple[Outcome, Instance]:
    if known.status is Status.DEAD:
        known = replace(known, status=Status.STARTING, reported_status=Status.STARTING, stopped_at=None)
    return apply_status(known, change, now)


def _ignore_numbers(known: Instance, change: StatusChange, now: datetime) -> tuple[Outcome, Instance]:
    return apply_status(replace(known, seq=-1), change, now)


def _end_the_hold(known: Instance, change: StatusChange, now: datetime) -> tuple[Outcome, Instance]:
    """An agent's report of alive makes it alive, whatever holds it."""
    outcome, row = apply_status(known, change, now)
    if change.seq is None or row.reported_status is not Status.ALIVE or row is known:
        return outcome, row
    holds = tuple(hold for hold in row.holds if hold.kind is not HoldKind.OPERATOR)
    status = effective_status(row.reported_status, [hold.kind for hold in holds])
    return replace(outcome, status=status), replace(row, holds=holds, status=status)


def _release_to_alive(known: Instance, change: HoldChange, now: datetime) -> tuple[Outcome, Instance]:
    """Whatever the agent reports, it is alive after a release."""
    outcome, row = apply_hold(known, change, now)
    if change.hold is not None or row is known:
        return outcome, row
    return replace(outcome, status=Status.ALIVE), replace(row, status=Status.ALIVE)


@contextmanager
def _patch_both(rule: str, instead: object) -> Iterator[None]:
    """In memory and in the database."""
    with mock.patch(f"seedcore.core.members.{rule}", instead), mock.patch(f"seedcore.store.memory.{rule}", instead):
        yield


def _forget_seconds(_: object, lapsed: int, living: int, now: float) -> bool:
    return False


_send_all = Delivery._send_all


async def _send_and_forget(delivery: Delivery) -> Receipt:
    receipt = await _send_all(delivery)
    delivery._pending.clear()
    return receipt


def _own_interval_s(client: RegistryClient) -> float:
    return client._settings.beat_interval_s


_put_back = ChangeBatch.put_back


def _put_back_reversed(batch: ChangeBatch, taken: Sequence[Change]) -> None:
    _put_back(batch, taken[::-1])


async def _stay_fenced(_: DatabaseSession) -> None:
    await asyncio.sleep(1e6)


async def _keep_the_batch(
    batch: Sequence[Any], write: Callable[[Sequence[Any]], Any]
) -> AsyncIterator[tuple[Any, Any]]:
    if batch:
        try:
            answer = await write(batch)
        except StoreRejectedError as error:
            raise StoreUnavailableError(error.why) from error
        yield batch, answer


async def _compare_nothing(*_: object) -> None:
    """Instead of what the code does."""


_append, _since, _compact = Feed.append, Feed.since, Feed._compact


def _append_most(feed: Feed, before: Instance | None, after: Instance | None, verdict: Verdict = Verdict.FRESH) -> None:
    if before is None or after is None or before.status is not Status.DRAINING:
        _append(feed, before, after, verdict)


def _since_never_reset(
    feed: Feed, stream: str | None, version: int, wanted: InstanceFilter, *, may_compact: bool = False
) -> FeedBatch:
    batch = _since(feed, stream, version, wanted, may_compact=may_compact)
    return replace(batch, is_reset=False) if stream is not None else batch


def _compact_the_living(feed: Feed, forgotten: Any) -> None:
    if forgotten.after is not None:
        _compact(feed, forgotten)


async def _belong_to_none(_: MemoryStore, registrations: Sequence[Registration]) -> list[str | None]:
    return [None] * len(registrations)


def _judge_no_lease(evidence: Evidence) -> Verdict | Death:
    return judge(replace(evidence, is_frozen=True))


def _judge_unfrozen(evidence: Evidence) -> Verdict | Death:
    return judge(replace(evidence, is_frozen=False))


def _judge_no_witness(evidence: Evidence) -> Verdict | Death:
    unknown = Witness.UNKNOWN
    return judge(replace(evidence, process=unknown, node=unknown, actor=unknown, is_frozen=True))


def _offer_death_in_the_queue(backlog: Backlog, change: StatusChange) -> None:
    backlog.require_room()
    backlog.offer(change)


_load = LiveView.load


def _load_once(view: LiveView, reset: FeedBatch, pages: Iterable[Listing]) -> None:
    """At the next reset the cache goes on with what it had."""
    if view.stream is None:
        _load(view, reset, pages)
    view.stream, view.version, view.epoch = reset.stream, reset.version, reset.epoch


def _is_confirmed_once(follower: Follower) -> bool:
    return follower._confirmed_s is not None


def _get_any(cache: HandleCache, logical_id: str) -> ActorHandle | None:
    return cache._handles.get(logical_id)


@contextmanager
def _patch_no_eviction() -> Iterator[None]:
    with (
        mock.patch.multiple(HandleCache, evict=_nothing, clear=_nothing, get=_get_any),
        mock.patch.object(HandleCache, "evict_other", _nothing),
    ):
        yield


@contextmanager
def _patch_sight() -> Iterator[None]:
    """It is noticed where Ray's tables go before every agent has found a new registry, for longer than a lease: too
    seldom by chance."""
    with mock.patch.object(DeathWatch, "is_blind", False), mock.patch.object(Breakage, "_gcs_goes", _gcs_goes_early):
        yield


async def _gcs_goes_early(breakage: Breakage) -> None:
    world, office = breakage.world, breakage.world.office()
    if office is not None:
        office.kill()
        breakage.start_registry()
        await asyncio.sleep(world.random.uniform(0.2, 1.2))
    world.gcs_back_s = world.now_s + world.random.uniform(15.0, 30.0)


_repeat = Feed.repeat


def _repeat_what_is_known(
    feed: Feed, batch: FeedBatch, known: Callable[[str], Instance | None], listed_at: int = 0
) -> None:
    kept = [change for change in batch.changes if change.instance is not None or known(change.instance_id) is not None]
    _repeat(feed, replace(batch, changes=tuple(kept)), known, listed_at)


_changes = RegistryConnection.changes


async def _changes_complete(connection: RegistryConnection, *args: Any, **kwargs: Any) -> FeedBatch:
    return replace(await _changes(connection, *args, **kwargs), complete=True)


_page = RegistryConnection.page


async def _page_complete(connection: RegistryConnection, *args: Any, **kwargs: Any) -> Listing:
    return replace(await _page(connection, *args, **kwargs), complete=True)


_call = RegistryConnection._call


async def _call_repeatedly(connection: RegistryConnection, rules: Rules, *args: Any, **kwargs: Any) -> Any:
    return await _call(connection, replace(rules, repeats=Repeats.CONNECTION), *args, **kwargs)


async def _prove_nothing(*_: object) -> Proof:
    return Proof.YES


MUTANTS: dict[str, Mutant] = {
    "the term is not checked": Mutant(2, lambda: mock.patch.object(MemoryStore, "fence", _nothing)),
    "acknowledged before the commit": Mutant(0, lambda: mock.patch.object(Receipts, "when_settled", _acknowledge)),
    "a replay is acknowledged at once": Mutant(
        178, lambda: mock.patch.object(Receipts, "is_settled", return_value=True)
    ),
    "no credit for our own stalls": Mutant(15, lambda: mock.patch.object(Silence, "credit", _nothing)),
    "no new lease after a restart": Mutant(1368, _patch_no_new_lease),
    "the dead may live again": Mutant(18, lambda: mock.patch("seedcore.store.memory.apply_status", _revive)),
    "sequence numbers are ignored": Mutant(
        30, lambda: mock.patch("seedcore.store.memory.apply_status", _ignore_numbers)
    ),
    "an agent's report ends a hold": Mutant(0, lambda: _patch_both("apply_status", _end_the_hold)),
    "the registry forgets a hold at a report": Mutant(
        79, lambda: mock.patch("seedcore.core.members.apply_status", _end_the_hold)
    ),
    "a release restores the wrong status": Mutant(2, lambda: _patch_both("apply_hold", _release_to_alive)),
    "no lease ends": Mutant(11, lambda: mock.patch("seedcore.registry.server.expiry.judge", _judge_no_lease)),
    "no death is decided": Mutant(0, lambda: mock.patch("seedcore.registry.server.expiry.judge", _judge_no_witness)),
    "a freeze is no evidence": Mutant(3, lambda: mock.patch("seedcore.registry.server.expiry.judge", _judge_unfrozen)),
    "a full backlog refuses a death": Mutant(
        4, lambda: mock.patch.object(Backlog, "offer_death", _offer_death_in_the_queue)
    ),
    "expiry never freezes": Mutant(3, lambda: mock.patch.object(MassLateness, "note", _forget_seconds)),
    "leases end while Ray's tables are away": Mutant(1103, _patch_sight, law=5),
    "no grace at the end of a freeze": Mutant(40, lambda: mock.patch.object(MassLateness, "is_spent", True)),
    "the client keeps nothing": Mutant(25, lambda: mock.patch.object(Delivery, "_send_all", _send_and_forget)),
    "a failed batch returns reversed": Mutant(
        227, lambda: mock.patch.object(ChangeBatch, "put_back", _put_back_reversed)
    ),
    "fenced for ever": Mutant(22, lambda: mock.patch.object(DatabaseSession, "_claim_the_term", _stay_fenced)),
    "the feed forgets a change": Mutant(0, lambda: mock.patch.object(Feed, "append", _append_most)),
    "the feed starts over without a reset": Mutant(0, lambda: mock.patch.object(Feed, "since", _since_never_reset)),
    "the compacted feed has no ended instances": Mutant(
        1, lambda: mock.patch.object(Feed, "_compact", _compact_the_living)
    ),
    "an instance that is not read yet is unknown": Mutant(
        0, lambda: mock.patch.object(DatabaseSession, "may_know_more", False)
    ),
    "agents beat at the interval of their own environment": Mutant(
        28, lambda: mock.patch.object(RegistryClient, "beat_interval_s", property(_own_interval_s))
    ),
    "an agent that ended with its epoch comes back in the next": Mutant(
        1, lambda: mock.patch.object(MemoryStore, "epochs_of", _belong_to_none)
    ),
    "a registry that takes over retires the fleet": Mutant(
        1, lambda: mock.patch.object(Tables, "continuing", lambda _, epoch: epoch)
    ),
    "a refused value keeps its batch": Mutant(
        3, lambda: mock.patch("seedcore.registry.server.flusher.in_parts", _keep_the_batch)
    ),
    "memory and database are not compared": Mutant(
        61, lambda: mock.patch.object(Comparison, "_compare", _compare_nothing)
    ),
    "a follower lists only once": Mutant(0, lambda: mock.patch.object(LiveView, "load", _load_once)),
    "a cache is trusted for ever": Mutant(
        0, lambda: mock.patch.object(Follower, "is_current", property(_is_confirmed_once))
    ),
    "the age of a relay's copy does not count": Mutant(31, lambda: mock.patch.object(Follower, "age_s", 0.0)),
    "a copy repeats no end of an instance that it never had": Mutant(
        33, lambda: mock.patch.object(Feed, "repeat", _repeat_what_is_known)
    ),
    "a cache of a registry that does not know all is trusted": Mutant(
        0, lambda: mock.patch.multiple(RegistryConnection, changes=_changes_complete, page=_page_complete)
    ),
    "a cached handle is never evicted": Mutant(0, _patch_no_eviction),
    "an actor need not answer": Mutant(
        2, lambda: mock.patch.multiple("seedcore.registry.caller.handles", prove=_prove_nothing, probe=_prove_nothing)
    ),
    "the connection repeats every call": Mutant(
        1, lambda: mock.patch.object(RegistryConnection, "_call", _call_repeatedly)
    ),
    "the agents of a draining node stay": Mutant(2, lambda: mock.patch.object(Drains, "take", _nothing)),
    "a drain that is not reported at once is over": Mutant(
        52, lambda: mock.patch("seedcore.registry.server.drains.LOOKS", 1), law=19
    ),
    **LOSS_MUTANTS,
}
