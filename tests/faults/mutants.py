"""The code broken on purpose, one law at a time: the simulation has to notice each."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from unittest import mock

from seedcore.core.answers import InstanceFilter, Outcome, Receipt
from seedcore.core.batch import ChangeBatch
from seedcore.core.changes import Change, Registration, StatusChange
from seedcore.core.errors import StoreRejectedError, StoreUnavailableError
from seedcore.core.feed import Feed, FeedBatch
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lease import MassLateness
from seedcore.core.lifecycle import Status
from seedcore.core.roster import Roster
from seedcore.core.rules import apply_status
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.server.flusher import Writer
from seedcore.registry.server.registry import Registry
from seedcore.store.memory import MemoryStore


def _nothing(*_: object) -> None:
    """What the code would do."""


async def _acknowledge(registry: Registry, change: Change) -> Receipt:
    return Receipt(change.instance_id, Status.ALIVE, change.seq or 0, durable=True, epoch=None, why=None)


_adopt = Roster.adopt


def _adopt_as_silent(roster: Roster, instance: Instance, now_s: float) -> None:
    _adopt(roster, instance, now_s - 1000)


_credit = Roster.credit


def _credit_no_whole_lease(roster: Roster, absence_s: float, now_s: float) -> None:
    if absence_s != math.inf:
        _credit(roster, absence_s, now_s)


def _revive(known: Instance, change: StatusChange, now: datetime) -> tuple[Outcome, Instance]:
    if known.status is Status.DEAD:
        known = replace(known, status=Status.STARTING, stopped_at=None)
    return apply_status(known, change, now)


def _ignore_numbers(known: Instance, change: StatusChange, now: datetime) -> tuple[Outcome, Instance]:
    return apply_status(replace(known, seq=-1), change, now)


def _forget_seconds(_: object, lapsed: int, living: int, now: float) -> bool:
    return False


_send_all = RegistryClient._send_all


async def _send_and_forget(client: RegistryClient) -> Receipt:
    receipt = await _send_all(client)
    client._undelivered.clear()
    return receipt


def _own_interval_s(client: RegistryClient) -> float:
    return client._settings.beat_interval_s


def _put_back_reversed(batch: ChangeBatch, taken: list[Any]) -> None:
    batch._changes.extendleft(taken)


async def _stay_fenced(_: Writer) -> None:
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


async def _compare_nothing(_: Writer) -> None:
    """What the code would do."""


_append, _since = Feed.append, Feed.since


def _append_most(feed: Feed, before: Instance | None, after: Instance | None, verdict: Verdict = Verdict.FRESH) -> None:
    if before is None or after is None or before.status is not Status.DRAINING:
        _append(feed, before, after, verdict)


def _since_never_reset(feed: Feed, stream: str | None, version: int, wanted: InstanceFilter) -> FeedBatch:
    batch = _since(feed, stream, version, wanted)
    return replace(batch, is_reset=False) if stream is not None else batch


async def _belong_to_none(_: MemoryStore, registrations: Sequence[Registration]) -> list[str | None]:
    return [None] * len(registrations)


@dataclass(frozen=True)
class Mutant:
    """A way to break the code, and a seed whose history notices it: where a search does well to begin."""

    seed: int
    patch: Callable[[], AbstractContextManager[object]]


MUTANTS: dict[str, Mutant] = {
    "the term is not checked": Mutant(0, lambda: mock.patch.object(MemoryStore, "_fence", _nothing)),
    "acknowledged before the commit": Mutant(
        0, lambda: mock.patch.object(Registry, "_receipt_when_settled", _acknowledge)
    ),
    "a replay is acknowledged at once": Mutant(
        0, lambda: mock.patch.object(Writer, "is_unsettled", return_value=False)
    ),
    "no credit for our own stalls": Mutant(186, lambda: mock.patch.object(Roster, "credit", _nothing)),
    "no new lease after a restart": Mutant(
        64, lambda: mock.patch.multiple(Roster, adopt=_adopt_as_silent, credit=_credit_no_whole_lease)
    ),
    "the dead may live again": Mutant(0, lambda: mock.patch("seedcore.store.memory.apply_status", _revive)),
    "sequence numbers are ignored": Mutant(
        2, lambda: mock.patch("seedcore.store.memory.apply_status", _ignore_numbers)
    ),
    "expiry never freezes": Mutant(18, lambda: mock.patch.object(MassLateness, "note", _forget_seconds)),
    "no grace at the end of a freeze": Mutant(65, lambda: mock.patch.object(MassLateness, "is_spent", True)),
    "the client keeps nothing": Mutant(83, lambda: mock.patch.object(RegistryClient, "_send_all", _send_and_forget)),
    "a failed batch returns reversed": Mutant(
        182, lambda: mock.patch.object(ChangeBatch, "put_back", _put_back_reversed)
    ),
    "fenced for ever": Mutant(87, lambda: mock.patch.object(Writer, "_take_the_term_back", _stay_fenced)),
    "the feed forgets a change": Mutant(0, lambda: mock.patch.object(Feed, "append", _append_most)),
    "the feed begins again without a reset": Mutant(0, lambda: mock.patch.object(Feed, "since", _since_never_reset)),
    "who is not read yet is unknown": Mutant(0, lambda: mock.patch.object(Writer, "may_know_more", False)),
    "agents beat at the interval of their own environment": Mutant(
        1, lambda: mock.patch.object(RegistryClient, "beat_interval_s", property(_own_interval_s))
    ),
    "who ended with its epoch comes back in the next": Mutant(
        2, lambda: mock.patch.object(MemoryStore, "epochs_of", _belong_to_none)
    ),
    "a registry that takes over retires the fleet": Mutant(
        0, lambda: mock.patch.object(MemoryStore, "_continuing", lambda _, epoch: epoch)
    ),
    "a refused value keeps its batch": Mutant(
        0, lambda: mock.patch("seedcore.registry.server.flusher._in_parts", _keep_the_batch)
    ),
    "memory and database are not compared": Mutant(88, lambda: mock.patch.object(Writer, "_compare", _compare_nothing)),
}
