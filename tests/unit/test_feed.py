"""The feed is in order and without gaps, keeps a bounded number of changes, and wakes only followers that match one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seedcore.core.answers import InstanceFilter
from seedcore.core.feed import Feed, FeedBatch
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lifecycle import Status
from tests.builders import iid, instance

ALL = InstanceFilter(statuses=None)
ALIVE = InstanceFilter(statuses=frozenset({Status.ALIVE}))
STATES = st.sampled_from([None, Status.STARTING, Status.ALIVE, Status.DRAINING])


def with_status(row: Instance, status: Status) -> Instance:
    return replace(row, status=status)


def applied(cached: dict[str, Instance], batch: FeedBatch) -> dict[str, Instance]:
    """The cache of a follower after a batch."""
    assert not batch.is_reset
    after = dict(cached)
    for change in batch.changes:
        if change.instance is None:
            after.pop(change.instance_id, None)
        else:
            after[change.instance_id] = change.instance
    return after


@given(st.lists(st.tuples(st.integers(0, 4), STATES), max_size=40), st.sets(st.integers(0, 40)))
def test_follower_that_applies_every_batch_has_the_current_state(
    steps: list[tuple[int, Status | None]], reads_after: set[int]
) -> None:
    feed = Feed("here", 100)
    feed.start_over("epoch-1")
    rows: dict[str, Instance] = {}
    followers: dict[str, tuple[InstanceFilter, int, dict[str, Instance]]] = {
        "all": (ALL, 1, {}),
        "alive": (ALIVE, 1, {}),
    }

    def read() -> None:
        for name, (wanted, version, cached) in followers.items():
            batch = feed.since("here", version, wanted)
            assert (batch.since, batch.version) == (version, feed.version)
            assert [change.version for change in batch.changes] == sorted({one.version for one in batch.changes})
            cached = applied(cached, batch)
            followers[name] = (wanted, batch.version, cached)
            assert cached == {key: row for key, row in rows.items() if wanted.matches(row, "epoch-1")}

    for position, (number, status) in enumerate(steps):
        before = rows.get(iid(number))
        after = None if status is None else instance(number, status=status)
        if before is None and after is None:
            continue
        feed.append(before, after)
        if after is None:
            del rows[iid(number)]
        else:
            rows[after.instance_id] = after
        if position in reads_after:
            read()
    read()


@given(st.lists(st.tuples(st.integers(0, 9), STATES), max_size=60), st.sets(st.integers(0, 60)), st.integers(1, 4))
def test_follower_of_compacted_changes_has_the_current_state_after_the_last_of_them(
    steps: list[tuple[int, Status | None]], reads_after: set[int], most: int
) -> None:
    feed = Feed("here", 3, compacts=True)
    feed.start_over("epoch-1")
    rows: dict[str, Instance] = {}
    ended: list[int] = []
    followers: dict[str, tuple[InstanceFilter, int, dict[str, Instance]]] = {
        "all": (ALL, 1, {}),
        "alive": (ALIVE, 1, {}),
    }

    def read() -> None:
        for name, (wanted, version, cached) in followers.items():
            since = partial(feed.since, "here", wanted=wanted, may_compact=True, most=most)
            batch = since(version)
            if batch.is_reset:
                assert len([one for one in ended if one > version]) > 3, "the ended ones are bounded"
                cached = {key: row for key, row in rows.items() if wanted.matches(row, "epoch-1")}
                followers[name] = (wanted, feed.version, cached)
                continue
            changes = list(batch.changes)
            while batch.has_more:
                assert batch.is_compacted
                assert len(batch.changes) == most
                batch = since(batch.version)
                changes += batch.changes
            versions = [change.version for change in changes]
            assert (versions, batch.version) == (sorted(set(versions)), feed.version)
            cached = applied(cached, replace(batch, changes=tuple(changes)))
            followers[name] = (wanted, batch.version, cached)
            assert cached == {key: row for key, row in rows.items() if wanted.matches(row, "epoch-1")}

    for position, (number, status) in enumerate(steps):
        # an id is used once
        known = [key for key in rows if key.startswith(f"0000000{number}")]
        before = rows[known[0]] if known else None
        after = None if status is None else instance(number, status=status)
        if before is not None and after is not None:
            after = replace(after, instance_id=before.instance_id)
        elif after is not None:
            after = replace(after, instance_id=f"0000000{number}-{position}")
        if before is None and after is None:
            continue
        feed.append(before, after)
        if after is None:
            assert before is not None
            del rows[before.instance_id]
            ended.append(feed.version)
        else:
            rows[after.instance_id] = after
        if position in reads_after:
            read()
    read()


@pytest.mark.parametrize("most", [1, 2, 100])
def test_instance_that_left_the_filter_in_a_forgotten_change_is_removed_from_every_copy(most: int) -> None:
    feed = Feed("here", 3, compacts=True)
    feed.start_over("epoch-1")
    left, *others = (instance(number, status=Status.ALIVE) for number in range(6))
    feed.append(None, left)
    copy, version = {left.instance_id: left}, feed.version
    # forgotten one by one, and before a change of it that does not concern the filter
    draining = with_status(left, Status.DRAINING)
    feed.append(left, draining)
    for other in others:
        feed.append(None, other)
    feed.append(draining, with_status(left, Status.STARTING))
    while True:
        batch = feed.since("here", version, ALIVE, may_compact=True, most=most)
        copy, version = applied(copy, batch), batch.version
        if not batch.has_more:
            break
    assert copy == {other.instance_id: other for other in others}


def test_feed_of_a_few_changes_has_the_last_of_each_of_many_instances() -> None:
    feed = Feed("here", 10, compacts=True)
    feed.epoch = "epoch-1"
    rows = [instance(number) for number in range(1000)]
    for row in rows:
        feed.append(None, row)
    listed = feed.version
    for verdict in (Verdict.LATE, Verdict.FRESH, Verdict.LATE):
        for row in rows:
            feed.append(row, row, verdict)
    batch = feed.since("here", listed, ALL, may_compact=True)
    assert (batch.is_reset, batch.is_compacted, batch.has_more, batch.version) == (False, True, False, 4000)
    assert {change.instance_id: change.verdict for change in batch.changes} == {
        row.instance_id: Verdict.LATE for row in rows
    }
    # one by one they are forgotten
    assert feed.since("here", listed, ALL).is_reset
    feed.start_over("green")
    assert feed.since("here", listed, ALL, may_compact=True).is_reset


def test_position_outside_the_feed_returns_a_reset() -> None:
    feed = Feed("here", 3)
    row = instance()
    for _ in range(5):
        feed.append(row, row)
    assert not feed.since("here", 2, ALL).is_reset
    for stream, version in (("here", 1), ("here", 6), ("there", 5), (None, 5)):
        batch = feed.since(stream, version, ALL)
        assert (batch.is_reset, batch.changes, batch.version, batch.stream) == (True, (), 5, "here")


def test_current_position_returns_an_empty_batch_and_no_reset() -> None:
    feed = Feed("here", 3)
    assert feed.since("here", 0, ALL) == FeedBatch("here", 0, 0, "", ())
    feed.append(None, instance())
    assert feed.since("here", 1, ALL) == FeedBatch("here", 1, 1, "", ())


def test_change_wakes_only_followers_whose_filter_matches_before_or_after_it() -> None:
    feed = Feed("here", 100)
    feed.start_over("epoch-1")
    woken: list[str] = []
    numbers: dict[str, int] = {}

    def follow_again() -> None:
        for name, organ_id in (("left", "left"), ("right", "right"), ("all", None)):
            feed.unfollow(numbers.get(name, 0))
            wanted = InstanceFilter(statuses=None, organ_id=organ_id)
            numbers[name] = feed.follow(wanted, partial(woken.append, name))

    follow_again()
    left = instance(1, organ_id="left")
    feed.append(None, left)
    assert woken == ["left", "all"]
    # a follower is woken once until it follows again
    feed.append(left, with_status(left, Status.DRAINING))
    assert woken == ["left", "all"]
    assert feed.followers == 3
    follow_again()
    # the filter `left` matches before the change, `right` after it
    feed.append(left, replace(left, organ_id="right"))
    assert woken == ["left", "all", "left", "right", "all"]
    follow_again()
    feed.unfollow(numbers["right"])
    feed.unfollow(numbers["right"])
    woken.clear()
    feed.append(None, instance(2, organ_id="right"))
    # instances of a staged epoch match no filter
    feed.append(None, instance(3, organ_id="left", cluster_epoch="green"))
    assert woken == ["all"]
    assert feed.followers == 2


def test_epoch_flip_wakes_every_follower_with_a_reset() -> None:
    feed = Feed("here", 100)
    feed.start_over("blue")
    woken: list[str] = []
    feed.follow(InstanceFilter(organ_id="left"), lambda: woken.append("left"))
    feed.append(None, instance(1, cluster_epoch="green"))
    feed.start_over("green")
    assert woken == ["left"]
    batch = feed.since("here", 2, ALL)
    assert (batch.is_reset, batch.version, batch.epoch) == (True, 3, "green")
    assert not feed.since("here", 3, ALL).is_reset


def test_many_changes_as_one_reset_wake_every_follower_once() -> None:
    feed = Feed("here", 10, compacts=True)
    feed.epoch = "epoch-1"
    feed.append(None, instance(1))
    woken: list[int] = []
    feed.follow(ALIVE, lambda: woken.append(feed.version))
    with feed.as_one_reset():
        for number in range(2, 100):
            feed.append(None, instance(number))
        assert (feed.version, woken) == (1, [])
    assert woken == [2]
    assert feed.since("here", 1, ALL, may_compact=True).is_reset
    feed.append(None, instance(100))
    assert [change.instance_id for change in feed.since("here", 2, ALL).changes] == [iid(100)]


def test_a_feed_keeps_a_bounded_number_of_bytes_and_shows_its_oldest_version() -> None:
    feed = Feed("stream", 10_000, max_bytes=1_000_000)
    heavy = replace(instance(1, "heavy"), metadata={"notes": ["x" * 1000] * 14})
    for _ in range(200):
        feed.append(heavy, heavy)
        assert feed.bytes <= 1_000_000
    kept = [version for version in range(200) if not feed.since("stream", version, ALL).is_reset]
    assert kept == list(range(200 - len(kept), 200))
    assert 0 < len(kept) < 100
    light = instance(2, "light")
    for _ in range(400):
        feed.append(light, light)
    # what is light is remembered for longer
    assert not feed.since("stream", 200, ALL).is_reset
    feed.append(None, replace(heavy, metadata={"note": "x" * 2_000_000}))
    assert (feed.bytes, feed.since("stream", feed.version - 1, ALL).is_reset) == (0, True)
