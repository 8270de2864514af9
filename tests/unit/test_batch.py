"""The buffers in front of the store: what they may drop and what they never drop."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from seedcore.core.batch import BeatBatch, ChangeBatch
from seedcore.core.changes import Change, HoldChange, RegisterChange, StatusChange
from seedcore.core.errors import BacklogFullError
from seedcore.core.lifecycle import Status
from tests.builders import holds, iid, joins, turns

CAPACITY = 4
IDS = st.sampled_from([iid(number) for number in range(8)])
MOMENTS = st.integers(0, 50).map(float)


class BeatBatchMachine(RuleBasedStateMachine):
    """Any interleaving of beats, successful flushes and failed flushes."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = BeatBatch(CAPACITY)
        self.received: set[tuple[str, float]] = set()
        self.in_flight: dict[str, float] | None = None
        self.written = 0
        self.offered = 0

    @rule(instance_id=IDS, received_s=MOMENTS)
    def offer(self, instance_id: str, received_s: float) -> None:
        self.offered += 1
        self.received.add((instance_id, received_s))
        dropped = self.batch.counts.dropped
        was_taken = self.batch.offer(instance_id, received_s)
        assert was_taken == (self.batch.counts.dropped == dropped)

    @rule(instance_ids=st.lists(IDS, max_size=6), received_s=MOMENTS)
    def offer_all(self, instance_ids: list[str], received_s: float) -> None:
        self.offered += len(instance_ids)
        self.received.update((instance_id, received_s) for instance_id in instance_ids)
        self.batch.offer_all(instance_ids, received_s)

    @precondition(lambda self: self.in_flight is None)
    @rule(limit=st.integers(1, CAPACITY + 1))
    def take(self, limit: int) -> None:
        self.in_flight = self.batch.take(limit)
        assert len(self.in_flight) <= limit
        assert self.in_flight.items() <= self.received

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def flush_succeeds(self) -> None:
        assert self.in_flight is not None
        self.written += len(self.in_flight)
        self.in_flight = None

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def flush_fails(self) -> None:
        assert self.in_flight is not None
        self.batch.put_back(self.in_flight)
        self.in_flight = None

    @rule(instance_id=IDS)
    def discard(self, instance_id: str) -> None:
        self.batch.discard(instance_id)

    @invariant()
    def never_over_capacity(self) -> None:
        assert len(self.batch) <= CAPACITY

    @invariant()
    def every_beat_is_accounted_for(self) -> None:
        counts = self.batch.counts
        in_flight = len(self.in_flight or {})
        assert counts.offered == self.offered
        assert self.offered == self.written + counts.coalesced + counts.dropped + len(self.batch) + in_flight


TestBeatBatch = BeatBatchMachine.TestCase
TestBeatBatch.settings = settings(max_examples=50, stateful_step_count=40)


@given(st.lists(st.tuples(IDS, MOMENTS)), st.integers(1, 8))
def test_newest_beat_wins_in_any_order(beats: list[tuple[str, float]], capacity: int) -> None:
    batch = BeatBatch(capacity)
    newest: dict[str, float] = {}
    for instance_id, received_s in beats:
        if batch.offer(instance_id, received_s):
            newest[instance_id] = max(received_s, newest.get(instance_id, received_s))
    assert batch.take(100) == newest
    assert len(batch) == 0


@given(st.dictionaries(IDS, MOMENTS, max_size=4), st.dictionaries(IDS, MOMENTS, max_size=4))
def test_put_back_never_replaces_a_newer_beat(first: dict[str, float], later: dict[str, float]) -> None:
    batch = BeatBatch(capacity=8)
    for instance_id, received_s in first.items():
        batch.offer(instance_id, received_s)
    taken = batch.take(100)
    for instance_id, received_s in later.items():
        batch.offer(instance_id, received_s)
    batch.put_back(taken)
    kept = batch.take(100)
    for instance_id, received_s in kept.items():
        assert received_s == max(
            moment for moment in (first.get(instance_id), later.get(instance_id)) if moment is not None
        )
    assert set(kept) == set(first) | set(later)


def test_longest_waiting_beats_are_taken_first_and_failed_beats_before_others() -> None:
    batch = BeatBatch(capacity=8)
    for number in range(5):
        batch.offer(iid(number), float(number))
    taken = batch.take(2)
    assert list(taken) == [iid(0), iid(1)]
    batch.put_back(taken)
    assert list(batch.take(8)) == [iid(number) for number in range(5)]


def test_beat_beyond_capacity_is_dropped_and_counted_but_buffered_ones_still_renew() -> None:
    batch = BeatBatch(capacity=2)
    assert batch.offer(iid(1), 1.0)
    assert batch.offer(iid(2), 1.0)
    assert not batch.offer(iid(3), 1.0)
    assert batch.offer(iid(1), 2.0)
    batch.offer_all([iid(1), iid(2), iid(3), iid(4)], 3.0)
    assert batch.counts.dropped == 3
    assert batch.take(10) == {iid(1): 3.0, iid(2): 3.0}


def test_put_back_over_capacity_drops_the_oldest_and_counts_them() -> None:
    batch = BeatBatch(capacity=2)
    batch.offer_all([iid(1), iid(2)], 1.0)
    taken = batch.take(2)
    batch.offer_all([iid(3)], 2.0)
    batch.put_back(taken)
    assert len(batch) == 2
    assert batch.counts.dropped == 1
    assert iid(3) in batch.take(2)


def test_discard_removes_the_beat_of_an_ended_instance() -> None:
    batch = BeatBatch(capacity=2)
    batch.offer(iid(1), 1.0)
    batch.discard(iid(1))
    batch.discard(iid(2))
    assert batch.take(2) == {}
    assert batch.counts.dropped == 1


INSTANCES = st.integers(0, 3)
STAGES: list[type[Change]] = [RegisterChange, StatusChange, HoldChange]


@st.composite
def changes(draw: st.DrawFn) -> Change:
    number = draw(INSTANCES)
    if draw(st.booleans()):
        return joins(number, seq=draw(st.integers(0, 1000)))
    if draw(st.booleans()):
        return replace(holds(number), number=draw(st.integers(0, 1000)))
    return turns(number, draw(st.sampled_from(Status)), seq=draw(st.integers(0, 1000)))


class ChangeBatchMachine(RuleBasedStateMachine):
    """Any interleaving of changes, declared deaths, complete or partial commits, and failures."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = ChangeBatch(capacity=6)
        self.accepted: list[Change] = []
        self.committed: list[Change] = []
        self.in_flight: list[Change] | None = None
        self.dead: set[str] = set()

    @rule(change=changes())
    def offer(self, change: Change) -> None:
        if change.instance_id in self.dead:
            # the registry accepts nothing of an instance that it has declared dead
            return
        before = len(self.batch)
        try:
            self.batch.offer(change)
        except BacklogFullError:
            assert len(self.batch) == before >= 6
        else:
            self.accepted.append(change)

    @rule(number=INSTANCES)
    def declare_dead(self, number: int) -> None:
        if iid(number) not in self.dead:
            death = StatusChange(iid(number), Status.DEAD, number=number)
            assert self.batch.offer_death(death)
            self.dead.add(iid(number))
            self.accepted.append(death)

    @precondition(lambda self: self.in_flight is None)
    @rule(limit=st.integers(1, 8))
    def take(self, limit: int) -> None:
        waiting = len(self.batch)
        taken = self.batch.take(limit)
        assert len(taken) <= limit
        assert taken or not waiting
        stages: dict[str, int] = {}
        for change in taken:
            stage = STAGES.index(type(change))
            assert stage >= stages.get(change.instance_id, 0), "it would overtake an earlier change of its instance"
            stages[change.instance_id] = stage
        self.in_flight = taken

    @precondition(lambda self: self.in_flight is not None)
    @rule(stages=st.integers(0, len(STAGES)))
    def commit(self, stages: int) -> None:
        """Commit like the writer: registrations first, then statuses, then holds. Failed changes are put back."""
        assert self.in_flight is not None
        in_order = sorted(self.in_flight, key=lambda change: STAGES.index(type(change)))
        done = sum(STAGES.index(type(change)) < stages for change in in_order)
        self.committed += in_order[:done]
        self.batch.put_back(in_order[done:])
        self.in_flight = None

    @invariant()
    def nothing_is_lost_or_reordered_for_any_instance(self) -> None:
        rest = [*(self.in_flight or [])]
        waiting = self.batch.take(1000)
        while step := self.batch.take(1000):
            waiting += step
        self.batch.put_back(waiting)
        everything = [*self.committed, *rest, *waiting]
        assert len(everything) == len(self.accepted)
        for number in range(4):
            assert [c for c in everything if c.instance_id == iid(number)] == [
                c for c in self.accepted if c.instance_id == iid(number)
            ]


TestChangeBatch = ChangeBatchMachine.TestCase
TestChangeBatch.settings = settings(max_examples=50, stateful_step_count=40)


def test_full_backlog_refuses_a_change_and_stays_unchanged() -> None:
    batch = ChangeBatch(capacity=2)
    batch.offer(turns(1, Status.ALIVE))
    batch.require_room()
    with pytest.raises(BacklogFullError):
        batch.require_room(2)
    batch.offer(turns(1, Status.DRAINING))
    with pytest.raises(BacklogFullError):
        batch.offer(turns(1, Status.DEAD))
    assert batch.take(10) == [turns(1, Status.ALIVE), turns(1, Status.DRAINING)]


def test_declared_death_is_never_refused_and_takes_no_room() -> None:
    batch = ChangeBatch(capacity=2)
    deaths = [StatusChange(iid(number), Status.DEAD, number=number) for number in range(4)]
    batch.offer(joins(0))
    batch.offer(turns(0, Status.ALIVE))
    for death in deaths:
        assert batch.offer_death(death)
    assert not batch.offer_death(StatusChange(iid(3), Status.DEAD, number=9))
    assert len(batch) == 6
    with pytest.raises(BacklogFullError):
        batch.require_room()
    # before the changes of others, and after those of its own instance
    assert batch.take(4) == [*deaths[1:], joins(0)]
    batch.require_room()
    batch.put_back(deaths[1:2])
    assert batch.take(1) == deaths[1:2]
    assert batch.take(10) == [turns(0, Status.ALIVE)]
    assert batch.take(10) == deaths[:1]
    assert len(batch) == 0


def test_put_back_is_never_refused() -> None:
    batch = ChangeBatch(capacity=2)
    first = [turns(1, Status.ALIVE, 1), turns(1, Status.DRAINING, 2)]
    for change in first:
        batch.offer(change)
    taken = batch.take(2)
    batch.offer(turns(1, Status.ALIVE, 3))
    batch.offer(turns(1, Status.DEAD, 4))
    batch.put_back(taken)
    assert len(batch) == 4
    assert batch.take(10) == [*first, turns(1, Status.ALIVE, 3), turns(1, Status.DEAD, 4)]


def test_batch_ends_before_a_change_that_would_overtake_an_earlier_one_of_its_instance() -> None:
    batch = ChangeBatch(capacity=10)
    life: list[Change] = [joins(1), turns(1, Status.ALIVE), joins(2), joins(1, seq=5), turns(1, Status.DRAINING)]
    held: list[Change] = [holds(1), holds(2), turns(3, Status.ALIVE), turns(2, Status.ALIVE)]
    for change in [*life, *held]:
        batch.offer(change)
    assert batch.take(10) == life[:3]
    assert batch.take(10) == [*life[3:], *held[:3]]
    assert batch.take(10) == held[3:]
    assert batch.take(10) == []


def test_buffer_never_exceeds_its_capacity() -> None:
    batch = BeatBatch(capacity=100)
    chance = random.Random(7)
    for _ in range(1000):
        batch.offer_all([iid(chance.randrange(300)) for _ in range(20)], chance.random())
        assert len(batch) <= 100
    counts = batch.counts
    assert counts.offered == 20_000 == counts.coalesced + counts.dropped + len(batch)
