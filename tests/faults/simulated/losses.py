"""Owns what the database loses: earlier states of its tables, the loss itself, and law 17: what must be there again
once a registry has mended it.

A loss lasts until a registry in force is complete that joined the database after it. Where that is the registry that
was in force before, all that it had acknowledged is there again, with its history. Where it is another one, the agents
that live bring their last registrations, statuses and readiness; what operators did may be lost.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from seedcore.core.answers import Receipt
from seedcore.core.causes import CauseKind
from seedcore.core.instances import Verdict
from seedcore.core.lifecycle import Status
from tests.faults.simulated.drains import BY_HAND
from tests.local import Snapshot

if TYPE_CHECKING:
    from tests.faults.simulated.registries import Office
    from tests.faults.simulated.world import World

EVERY_S = 0.7
KEPT_S = 32.0
# histories in which the database loses commits
_SHARE = 0.6
_RECENT_S = 15.0

Word = tuple[int, Status | None]
"""The number of an agent's change that was acknowledged as durable, and the status in it."""


@dataclass(frozen=True)
class Earlier:
    """The tables as they were. `losses`: how many the database had had by then; `commits`: of registries."""

    tables: Snapshot
    taken_s: float
    losses: int
    commits: int


@dataclass
class Truth:
    """What must be there again: causes of deaths by instance, steps of the history, and the epoch."""

    deaths: dict[str, set[CauseKind]] = field(default_factory=dict)
    steps: dict[tuple[str, int, Status], None] = field(default_factory=dict)
    epoch: str | None = None


class Losses:
    """`on_loss` is called after each loss, and `on_mended` after its end, with whether another registry ended it."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        # of its own: histories without a loss stay what they are
        self.random = random.Random(f"losses of {seed}")
        self.happen = self.random.random() < _SHARE
        self.journal_capacity = self.random.choice([4, 20_000, 20_000]) if self.happen else 20_000
        self._kept: deque[Earlier] = deque()
        self._words: dict[str, Word] = {}
        self._unchecked: dict[str, Word] = {}
        self._truth = Truth()
        self._holder: Office | None = None
        self._holder_fences = 0
        self._loss_s = 0.0
        self.count = 0
        self.taken_over = 0
        self.is_lossy = False
        self.on_loss: Callable[[], None] = lambda: None
        self.on_mended: Callable[[bool], None] = lambda _: None

    # The loss

    def keep(self) -> None:
        """Remember the tables as they are now."""
        now_s = self._world.now_s
        self._kept.append(Earlier(Snapshot(self._world.tables), now_s, self.count, self._world.tables.commits))
        while self._kept[0].taken_s < now_s - KEPT_S:
            self._kept.popleft()

    def some_earlier(self, youngest_s: float, oldest_s: float) -> Earlier | None:
        """A state that is so many seconds old. While a loss is not mended, only one from before it."""
        now_s = self._world.now_s
        fitting = [
            one
            for one in self._kept
            if youngest_s <= now_s - one.taken_s <= oldest_s and not (self.is_lossy and one.taken_s > self._loss_s)
        ]
        return self.random.choice(fitting) if fitting else None

    def lose(self, earlier: Earlier) -> None:
        """The database is as it was then."""
        world, before = self._world, self._world.tables.commits
        if earlier.commits == before and not self.is_lossy:
            self._lose_by_hand(earlier)
            return
        if not self.is_lossy:
            self._holder = self._in_force()
            self._holder_fences = 0 if self._holder is None else self._holder.registry.writer.database.fences
            self._truth = Truth()
            # of the dead, what is known of their deaths counts
            self._words = {one: word for one, word in self._words.items() if world.living_row(one)}
            # what a state of a second loss has may be of before another one, and abandoned long ago
            self._note_truth()
        world.note_epochs()
        earlier.tables.restore()
        for instance_id, kinds in self._truth.deaths.items():
            # a state of before another loss may have declared it for another reason
            row = world.tables.rows.get(instance_id)
            if kinds and row is not None and row.cause is not None and row.status is Status.DEAD:
                kinds.add(row.cause.kind)
        self.count += 1
        self.is_lossy = True
        self._loss_s = world.now_s
        for office in world.offices:
            # a loss may be followed by the restore of a later state
            office.must_join = office.wrote_s > earlier.taken_s
        world.counts["losses"] += 1
        world.note(f"the database loses {before - world.tables.commits} commits: it is as at {earlier.taken_s:.3f}")
        self.on_loss()

    def _lose_by_hand(self, earlier: Earlier) -> None:
        """No registry has committed anything since: only what SQL clients did is lost, without a trace."""
        earlier.tables.restore()
        self._world.note(f"the database loses what SQL clients did since {earlier.taken_s:.3f}")
        for process in self._world.processes:
            row = None if process.held_by_hand is None else self._world.tables.rows.get(process.held_by_hand)
            if row is None or row.hold(BY_HAND) is None:
                process.held_by_hand = None

    def is_unseen_by(self, office: Office) -> bool:
        """Whether a registry has not asked the database since the loss: it repeats what it has acknowledged before."""
        return self.count > 0 and office.registry.writer.database.recovered_s <= self._loss_s

    def lives_on(self, office: Office) -> bool:
        """Whether it was in force at the loss, and no other registry has been since."""
        return office is self._holder and office.registry.writer.database.fences == self._holder_fences

    def silent_retired(self, office: Office) -> set[str]:
        """Instances whose retirement is lost with its flip, and which are silent: they are not resolved, and live in
        the tables until expiry is no longer frozen.
        """
        if not self.taken_over or not office.registry.expiry.is_frozen:
            return set()
        silence, now_s = office.registry.members.silence, office.registry.expiry.attentive_now_s()
        retired = (one for process in self._world.processes if process.is_retired for one in process.instance_ids)
        return {one for one in retired if silence.verdict(one, now_s) is not Verdict.FRESH}

    def _in_force(self) -> Office | None:
        for office in reversed(self._world.offices):
            database = office.registry.writer.database
            if office.is_up and database.is_complete and database.term == self._world.tables.term:
                return office
        return None

    def _note_truth(self) -> None:
        """What the registry in force knows and the database has."""
        holder, tables = self._holder, self._world.tables
        if holder is None:
            return
        members = holder.registry.members
        for row in tables.rows.values():
            if row.status is Status.DEAD and row.instance_id in members.deaths:
                # each of the two may have declared it first
                causes = (members.deaths.cause_of(row.instance_id), row.cause)
                kinds = self._truth.deaths.setdefault(row.instance_id, set())
                kinds.update(cause.kind for cause in causes if cause is not None)
        if members.epoch == tables.current_epoch:
            self._truth.epoch = tables.current_epoch
        for step in tables.transitions:
            seq, _ = self._words.get(step.instance_id, (-1, None))
            if step.seq is not None and step.seq <= seq:
                self._truth.steps[step.instance_id, step.seq, step.to_status] = None

    @property
    def are_recent(self) -> bool:
        """Whether a process may just receive what the database had before a loss."""
        return self.is_lossy or (self.count > 0 and self._world.now_s - self._loss_s < _RECENT_S)

    # Law 17

    def note_receipt(self, receipt: Receipt, status: Status | None) -> None:
        """A change was acknowledged as durable."""
        before, _ = self._words.get(receipt.instance_id, (-1, None))
        if receipt.seq >= before and receipt.status is not Status.DEAD:
            self._words[receipt.instance_id] = receipt.seq, status

    def check_write(self, office: Office) -> None:
        """A registry writes to no database that has lost commits of it, before it has joined it again."""
        self._world.check(not office.must_join, 17, f"{office.name} writes to a database that has lost its commits")

    def look(self) -> None:
        """Note whether the loss is mended, and check what must be there then."""
        world = self._world
        if self._unchecked and not self.is_lossy:
            self._check_words()
        office = self._in_force() if self.is_lossy else None
        if office is None or office.must_join:
            return
        # the loss may have come while it joined after another one
        if office.registry.writer.database.recovered_s <= max(self._loss_s, office.joins_s):
            return
        self.is_lossy = False
        lives_on = self.lives_on(office)
        world.note(f"{office.name}, {'which lives on' if lives_on else 'which is new'}, has mended the database")
        world.counts[f"losses mended by {'the same' if lives_on else 'another'} registry"] += 1
        if lives_on:
            self._unchecked = dict(self._words)
            self._check_words()
            self._check_truth(office)
        else:
            self.taken_over += 1
            self._words.clear()
            self._unchecked.clear()
            # a registry that did not live through the loss cannot know the states that were abandoned
            self._kept.clear()
        self.on_mended(not lives_on)

    def _check_words(self) -> None:
        """Of each instance, once the registry has no change of it under way."""
        office = self._holder
        if office is None or not office.is_up or not self.lives_on(office):
            self._unchecked.clear()
            return
        loss = office.registry.writer.database.restoration.last
        is_whole = loss is not None and loss.has_whole_history
        for instance_id, (seq, status) in list(self._unchecked.items()):
            if office.registry.writer.backlog.unsettled(instance_id):
                continue
            del self._unchecked[instance_id]
            row = self._world.tables.rows.get(instance_id)
            if row is None and not is_whole and not self._could_live(office, instance_id):
                # it is written again only from the journal, which does not reach back to it
                continue
            is_there = row is not None and (
                row.status is Status.DEAD
                or row.seq > seq
                or (row.seq == seq and (status is None or row.reported_status is status))
            )
            self._world.check(is_there, 17, f"{office.name} acknowledged {seq} of {instance_id} as {status}: {row}")

    def _could_live(self, office: Office, instance_id: str) -> bool:
        """Whether a registry has an instance that the database accepts: alive, and of an epoch that is not retired."""
        known = office.registry.members.get(instance_id)
        epoch = None if known is None else self._world.tables.epochs.get(known.cluster_epoch)
        return epoch is not None and epoch.retired_at is None

    def _check_truth(self, office: Office) -> None:
        tables = self._world.tables
        for instance_id, kinds in self._truth.deaths.items():
            row = tables.rows.get(instance_id)
            has_died = row is None or (row.status is Status.DEAD and row.cause is not None)
            self._world.check(has_died, 17, f"{office.name} knew {instance_id} dead: {kinds}, it is {row}")
            if row is not None and row.cause is not None and kinds:
                self._world.check(row.cause.kind in kinds, 17, f"the death of {instance_id} was {kinds}: {row.cause}")
        epoch = self._truth.epoch
        if epoch is not None and epoch != tables.current_epoch:
            known = tables.epochs.get(epoch)
            was_followed = known is not None and known.retired_at is not None
            self._world.check(was_followed, 17, f"{epoch} was current, and {tables.current_epoch} is: {known}")
        loss = office.registry.writer.database.restoration.last
        if loss is not None and loss.has_whole_history:
            there = {(step.instance_id, step.seq, step.to_status) for step in tables.transitions}
            # a registration that was written from memory has no number
            begun = {(instance_id, 0, status) for instance_id, _, status in there if status is Status.STARTING}
            # what was a transition may be none under a hold by hand
            by_hand = self._world.held_by_hand
            missing = [step for step in self._truth.steps if step not in there | begun and step[0] not in by_hand]
            self._world.check(not missing, 17, f"{office.name} has not restored the history: {missing[:3]}")
