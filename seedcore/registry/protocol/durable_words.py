"""What agents of this process have had committed, for a registry that may not have it.

A new registry process knows what its database has. Where that has lost commits, only the agents still have their own
last changes: their first beats to a new registry carry the numbers, and it answers which of them are behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from seedcore.core.answers import BeatAnswer, KnownBefore, Receipt
from seedcore.core.changes import Change, HoldChange, RegisterChange, SequencedChange, StatusChange
from seedcore.core.holds import HoldKind
from seedcore.core.instances import Epoch
from seedcore.core.lifecycle import Status
from seedcore.registry.protocol.outbox import CAPACITY

Words: TypeAlias = "dict[type[Change] | HoldKind, Change]"


class DurableWords:
    """By instance, the last durable registration, the last durable status, and the last durable change of each kind of
    hold; until its agent gives the instance up. Bounded: the oldest make room."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._words: dict[str, Words] = {}
        self._taken: dict[str, Words] = {}
        self._registry: str | None = None
        self._database: str | None = None
        self._named_by: str | None = None
        self._unconfirmed: set[str] = set()
        self._epoch: Epoch | None = None
        self._is_epoch_confirmed = True

    def note_receipt(self, change: SequencedChange, receipt: Receipt) -> None:
        """Keep a change that is durable, with those before it: a registry commits the changes of an instance in
        order."""
        inner = change.change
        instance_id = inner.instance_id
        if not receipt.durable:
            self._put(self._taken, inner)
            return
        taken = self._taken.pop(instance_id, {})
        if isinstance(inner, StatusChange) and inner.status is Status.DEAD:
            self.forget(instance_id)
            return
        for earlier in taken.values():
            self._put(self._words if _seq(earlier) < _seq(inner) else self._taken, earlier)
        self._put(self._words, inner)

    def note_sent(self, change: SequencedChange) -> None:
        """A change is sent. Until it is taken, also if it was before, it does not become durable with a later one."""
        taken = self._taken.get(change.change.instance_id, {})
        for part in _parts(change.change):
            taken.pop(_of(part), None)

    def _put(self, words: dict[str, Words], change: Change) -> None:
        if change.instance_id not in words and len(words) >= self._capacity:
            oldest = next(iter(words))
            del words[oldest]
            self._unconfirmed.discard(oldest)
        known = words.setdefault(change.instance_id, {})
        for part in _parts(change):
            # an earlier word that was sent again may be answered after a later one
            if _of(part) not in known or _seq(known[_of(part)]) <= _seq(part):
                known[_of(part)] = part

    def known_before(self, instance_ids: Sequence[str]) -> KnownBefore | None:
        """What goes with beats of these: the epoch always, since the first beat to a new registry must carry it, and
        numbers to one that has not confirmed them. None where there is nothing."""
        if not self._unconfirmed and self._epoch is None:
            return None
        ids = [one for one in instance_ids if one in self._unconfirmed]
        seqs = {one: max(_seq(change) for change in words.values()) for one in ids if (words := self._words.get(one))}
        return KnownBefore(seqs, self._epoch, self._database)

    def note_answer(self, sent: KnownBefore | None, answer: BeatAnswer) -> list[list[Change]]:
        """Note the answer to beats. Returns, for each instance that is behind, the changes to send again in order.

        The words of a dead instance stay: the database may lose its death before the agent acts on it.
        """
        if answer.registry is None:
            return []
        if answer.database is not None:
            if self._database not in {None, answer.database} and self._named_by != answer.registry:
                # what was committed to another database is not missing in this one
                self._words, self._taken, self._epoch = {}, {}, None
            self._database, self._named_by = answer.database, answer.registry
        if answer.registry != self._registry:
            # the next beats to it carry what is known
            self._registry = answer.registry
            self._unconfirmed = set(self._words)
            self._is_epoch_confirmed = self._epoch is None
        elif sent is not None and not answer.is_recovering:
            self._unconfirmed.difference_update(sent.seqs.keys() - {*answer.behind, *answer.unknown})
            self._is_epoch_confirmed |= sent.epoch is not None and answer.epoch is not None
        if answer.epoch is not None and (self._epoch is None or self._is_epoch_confirmed):
            # also under a lower number, of a registry that knows ours and shows this one
            self._epoch = answer.epoch
        return [sorted(words.values(), key=_seq) for one in answer.behind if (words := self._words.get(one))]

    def forget(self, instance_id: str) -> None:
        """Forget an instance whose agent has given it up."""
        self._words.pop(instance_id, None)
        self._taken.pop(instance_id, None)
        self._unconfirmed.discard(instance_id)


def _parts(change: Change) -> Sequence[Change]:
    """A registration that is alive as the two words that it is."""
    if isinstance(change, RegisterChange) and change.is_alive:
        return change.alone(), change.status_change()
    return (change,)


def _of(change: Change) -> type[Change] | HoldKind:
    return change.kind if isinstance(change, HoldChange) else type(change)


def _seq(change: Change) -> int:
    return change.seq or 0
