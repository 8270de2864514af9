"""The choice among the instances of an agent."""

from __future__ import annotations

import random
from collections import Counter
from datetime import timedelta
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.core.selection import Policy, best, choose, preference
from tests.builders import START, iid, instance

# microseconds on both sides of START, most of them far away, and many ties
MOMENTS = (st.just(0) | st.integers(-(10**15), 10**15)).map(lambda us: START + timedelta(microseconds=us))


@st.composite
def instances(draw: st.DrawFn) -> list[Instance]:
    numbers = draw(st.lists(st.integers(1, 50), unique=True, min_size=1, max_size=12))
    return [
        instance(
            number,
            status=draw(st.sampled_from(Status)),
            started_at=draw(MOMENTS),
            actor_name=draw(st.sampled_from([None, "an actor"])),
        )
        for number in numbers
    ]


@given(instances(), st.randoms())
def test_choice_does_not_depend_on_the_order_given(rows: list[Instance], chance: random.Random) -> None:
    chosen = best(rows)
    shuffled = list(rows)
    chance.shuffle(shuffled)
    assert best(shuffled) == chosen
    assert best(reversed(rows)) == chosen


@given(instances())
def test_preference_is_a_total_order(rows: list[Instance]) -> None:
    keys = [preference(row) for row in rows]
    assert len(set(keys)) == len(rows)
    ordered = sorted(rows, key=preference)
    for better, worse in pairwise(ordered):
        assert preference(better) < preference(worse)
        assert best([worse, better]) == better


@given(instances())
def test_best_instance_is_preferred_to_every_other(rows: list[Instance]) -> None:
    chosen = best(rows)
    assert chosen is not None
    assert all(preference(chosen) <= preference(row) for row in rows)


def test_instance_with_an_actor_is_preferred_to_a_newer_one_without() -> None:
    old_actor, young_process = instance(1, age_s=1000.0, actor_name="callable"), instance(2)
    assert best([young_process, old_actor]) == old_actor
    assert best([young_process]) == young_process


def test_status_decides_before_start_time_and_start_time_before_the_id() -> None:
    old_alive = instance(3, age_s=1000.0)
    young_draining = instance(1, status=Status.DRAINING)
    younger_starting = instance(2, age_s=-1000.0, status=Status.STARTING)
    dead = instance(4, age_s=-2000.0, status=Status.DEAD)
    assert sorted([dead, younger_starting, young_draining, old_alive], key=preference) == [
        old_alive,
        young_draining,
        younger_starting,
        dead,
    ]
    assert best([instance(5, age_s=0.000001), instance(9)]) == instance(9)
    assert best([instance(7), instance(6)]) == instance(6)


def test_best_of_no_instances_is_none() -> None:
    assert best([]) is None


def test_ids_of_the_test_builders_sort_like_their_numbers() -> None:
    assert sorted(iid(number) for number in (10, 2, 1)) == [iid(1), iid(2), iid(10)]


BY_CHANCE = {Policy.LEAST_LOADED, Policy.LEAST_OUTSTANDING}


@given(instances(), st.sampled_from(Policy), st.randoms(), st.text(max_size=5), st.integers(0, 100))
def test_every_policy_prefers_instances_with_an_actor_and_leaves_only_some_to_chance(
    rows: list[Instance], policy: Policy, chance: random.Random, key: str, turn: int
) -> None:
    loads = {row.instance_id: chance.choice([0.0, 1.0, 2.0]) for row in rows}
    chosen = choose(rows, policy, node_id="node", loads=loads, turn=turn, key=key)
    shuffled = list(rows)
    chance.shuffle(shuffled)
    again = choose(shuffled, policy, node_id="node", loads=loads, turn=turn, key=key)
    assert again == chosen or policy in BY_CHANCE
    assert chosen in rows
    assert (chosen is not None and chosen.actor_name is not None) == any(row.actor_name for row in rows)
    assert choose([], policy) is None


def replicas(count: int) -> list[Instance]:
    return [
        instance(number, actor_name=f"actor-{number}", node_id=f"node-{number % 2}", started_at=START)
        for number in range(1, count + 1)
    ]


def chosen_id(rows: list[Instance], policy: Policy, **details: Any) -> str:
    chosen = choose(rows, policy, **details)
    assert chosen is not None
    return chosen.instance_id


def test_same_node_is_preferred_and_other_nodes_are_the_fallback() -> None:
    rows = replicas(4)
    assert chosen_id(rows, Policy.SAME_NODE, node_id="node-0") == iid(2)
    assert chosen_id(rows, Policy.SAME_NODE, node_id="node-1") == iid(1)
    assert chosen_id(rows, Policy.SAME_NODE, node_id="elsewhere") == iid(1)


def shares(rows: list[Instance], policy: Policy, **details: Any) -> dict[str, int]:
    """How often each is chosen, of 1000 times."""
    chance = random.Random(7).random
    return dict(Counter(chosen_id(rows, policy, chance=chance, **details) for _ in range(1000)))


def test_the_less_loaded_of_two_is_chosen_so_that_no_load_attracts_every_caller() -> None:
    rows = replicas(4)
    found = shares(rows, Policy.LEAST_LOADED, loads={iid(1): 0.2, iid(2): 0.1, iid(3): 0.3})
    # one that reports no load counts as idle, and the most loaded loses to each other one
    assert found[iid(4)] > found[iid(2)] > found[iid(1)]
    assert iid(3) not in found
    assert 400 < found[iid(4)] < 600
    assert set(shares(rows[:2], Policy.LEAST_LOADED, loads={iid(1): 1.0})) == {iid(2)}
    assert set(shares(rows[:1], Policy.LEAST_LOADED, loads={iid(1): 1.0})) == {iid(1)}


def test_equal_loads_spread() -> None:
    for policy in BY_CHANCE:
        found = shares(replicas(4), policy)
        assert len(found) == 4
        assert min(found.values()) > 180


def test_instance_with_the_fewest_calls_of_the_caller_is_chosen() -> None:
    rows = replicas(3)
    assert set(shares(rows, Policy.LEAST_OUTSTANDING, outstanding={iid(1): 2, iid(2): 1, iid(3): 5})) == {iid(2)}
    assert set(shares(rows, Policy.LEAST_OUTSTANDING, outstanding={iid(1): 1})) == {iid(2), iid(3)}


def test_round_robin_chooses_each_instance_in_turn() -> None:
    rows = replicas(3)
    turns = [chosen_id(rows, Policy.ROUND_ROBIN, turn=turn) for turn in range(6)]
    assert turns == [iid(1), iid(2), iid(3)] * 2


def test_sticky_keys_spread_and_only_the_keys_of_an_ended_instance_move() -> None:
    rows = replicas(8)
    before = {key: chosen_id(rows, Policy.STICKY, key=str(key)) for key in range(800)}
    shares = Counter(before.values())
    assert len(shares) == 8
    assert max(shares.values()) < 3 * min(shares.values())
    gone = rows.pop(3).instance_id
    moved = {key for key, chosen in before.items() if chosen_id(rows, Policy.STICKY, key=str(key)) != chosen}
    assert moved == {key for key, chosen in before.items() if chosen == gone}
