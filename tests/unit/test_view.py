"""The cache of a follower equals the members at each version."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from seedcore.core import member_queries
from seedcore.core.answers import InstanceFilter, Listing, Origin
from seedcore.core.changes import StatusChange
from seedcore.core.feed import Feed
from seedcore.core.instances import Verdict
from seedcore.core.lease import LeaseTerms
from seedcore.core.lifecycle import Status
from seedcore.core.member_queries import verdicts_of
from seedcore.core.members import Members
from seedcore.core.paging import decode_cursor
from seedcore.core.selection import Policy, choose
from seedcore.core.view import LiveView
from tests.builders import START, iid, joins

ALL = InstanceFilter(statuses=None, fresh_only=False)
AGENTS = 4

Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["join", "alive", "drain", "die", "beat", "load", "wait", "doubt", "flip", "read"]),
        st.integers(min_value=0, max_value=AGENTS - 1),
    ),
    max_size=60,
)


class Fleet:
    """The members with its feed, and a follower's cache: of all agents, or of those that it has learned."""

    def __init__(self, capacity: int, *, is_part: bool = False) -> None:
        self.is_part = is_part
        self.listings: dict[str, Listing] = {}
        self.members = Members(LeaseTerms(5.0, 15.0), 100, Feed("here", capacity))
        self.members.set_epoch("epoch-1", 1)
        self.view = LiveView()
        self.now_s = 0.0
        self.number = 0
        self.newest = [0] * AGENTS
        self.loads = 0
        self.sent = 0

    def take(self, step: Step) -> None:
        kind, agent = step
        members, instance_id = self.members, iid(self.newest[agent])
        if kind == "join":
            self.number += 1
            self.newest[agent] = self.number
            epoch = "epoch-1" if self.number % 3 else "epoch-2"
            members.register(joins(self.number, f"agent-{agent}", cluster_epoch=epoch), self.now_s, START)
        elif kind in {"alive", "drain", "die"}:
            status = {"alive": Status.ALIVE, "drain": Status.DRAINING, "die": Status.DEAD}[kind]
            members.set_status(StatusChange(instance_id, status), self.now_s, START)
        elif kind == "beat":
            members.renew([instance_id], self.now_s)
        elif kind == "load":
            self.sent += 1
            members.note_loads({instance_id: float(self.sent)})
        elif kind == "wait":
            self.now_s += 4.0
            members.silence.publish_verdicts(self.now_s)
        elif kind == "doubt":
            members.silence.report_dead(instance_id)
        elif kind == "ask" and not self.view.is_whole:
            self.ask(f"agent-{agent}")
        elif kind == "learn":
            self.learn(f"agent-{agent}")
        elif kind == "flip":
            members.set_epoch("epoch-2", 2)
        else:
            self.read()

    def read(self) -> None:
        batch = self.members.feed.since(self.view.stream, self.view.version, ALL)
        if not batch.is_reset:
            loads, number = member_queries.loads_since(self.members, self.view.loads_number, ALL)
            self.view.apply(replace(batch, loads=loads, loads_number=number))
            return
        self.loads += 1
        self.listings.clear()
        if self.is_part:
            self.view.keep_only_learned(batch)
            return
        rows, _ = member_queries.page(self.members, ALL, decode_cursor(None), 100, self.now_s)
        verdicts = verdicts_of(self.members, rows)
        page = Listing(tuple(rows), Origin.REGISTRY, START, batch.version, True, stream="here", verdicts=verdicts)
        self.view.load(batch, [page])

    def ask(self, logical_id: str) -> None:
        """The registry lists an agent. The answer is under way."""
        if self.view.has(logical_id) or logical_id in self.listings:
            return
        self.view.expect(logical_id)
        wanted = replace(ALL, logical_id=logical_id)
        rows, _ = member_queries.page(self.members, wanted, decode_cursor(None), 100, self.now_s)
        version, verdicts = self.members.feed.version, verdicts_of(self.members, rows)
        self.listings[logical_id] = Listing(
            tuple(rows), Origin.REGISTRY, START, version, True, stream="here", verdicts=verdicts
        )

    def learn(self, logical_id: str) -> None:
        """The answer arrives."""
        listed = self.listings.pop(logical_id, None)
        if listed is not None:
            self.view.learn(logical_id, listed)

    def check_part(self) -> None:
        """What is learned is what the members have; nothing else is kept."""
        rows, _ = member_queries.page(self.members, ALL, decode_cursor(None), 100, self.now_s)
        learned = [row for row in rows if self.view.has(row.logical_id)]
        assert self.view.page(ALL, decode_cursor(None), 100) == (learned, False)
        verdicts = verdicts_of(self.members, learned)
        assert {row.instance_id: self.view.verdict(row.instance_id) for row in learned} == {
            row.instance_id: verdicts.get(row.instance_id, Verdict.FRESH) for row in learned
        }
        assert not self.view.knows(ALL)

    def check(self) -> None:
        rows, _ = member_queries.page(self.members, ALL, decode_cursor(None), 100, self.now_s)
        assert self.view.page(ALL, decode_cursor(None), 100) == (rows, False)
        assert len(self.view) == len(rows)
        verdicts = verdicts_of(self.members, rows)
        for row in rows:
            assert self.view.verdict(row.instance_id) is verdicts.get(row.instance_id, Verdict.FRESH)
        for agent in range(AGENTS):
            name = f"agent-{agent}"
            of_agent = [row for row in rows if row.logical_id == name]
            assert self.view.page(replace(ALL, logical_id=name), decode_cursor(None), 100) == (of_agent, False)
            alive = {row.instance_id: verdicts.get(row.instance_id) for row in of_agent if row.status is Status.ALIVE}
            fresh = {instance_id for instance_id, verdict in alive.items() if verdict is None}
            late = {instance_id for instance_id, verdict in alive.items() if verdict is Verdict.LATE}
            assert {row.instance_id for row in self.view.candidates(name)} == fresh
            assert {row.instance_id for row in self.view.candidates(name, allow_late=True)} == (fresh or late)
            self.check_picks(name, fresh)

    def check_picks(self, name: str, routable: set[str]) -> None:
        """Every policy picks a routable instance where there is one, and knows the loads that matter."""
        loads = self.view.loads
        for policy in Policy:
            chosen = choose(self.view.candidates(name), policy, loads=loads, node_id="node", key=name)
            assert chosen.instance_id in routable if chosen is not None else not routable
        if loads is not None and self.members.index.has_several(name):
            ids = [row.instance_id for row in self.view.candidates(name)]
            assert {one: loads[one] for one in ids if one in loads} == self.members.loads.of(ids)


@given(STEPS, st.sampled_from([2, 100]))
def test_cache_that_applied_every_change_equals_the_members(steps: list[Step], capacity: int) -> None:
    fleet = Fleet(capacity)
    for step in steps:
        fleet.take(step)
        if step[0] == "read":
            fleet.check()
    fleet.read()
    fleet.check()


PART_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["join", "alive", "drain", "die", "beat", "wait", "doubt", "flip", "read", "ask", "learn"]),
        st.integers(min_value=0, max_value=AGENTS - 1),
    ),
    max_size=60,
)


@given(PART_STEPS, st.sampled_from([2, 100]))
def test_cache_of_a_part_has_of_each_agent_that_it_learned_what_the_members_have(
    steps: list[Step], capacity: int
) -> None:
    fleet = Fleet(capacity, is_part=True)
    fleet.read()
    for step in steps:
        fleet.take(step)
        if step[0] == "read":
            fleet.check_part()
    for agent in range(AGENTS):
        fleet.learn(f"agent-{agent}")
    fleet.read()
    fleet.check_part()


def test_cache_of_a_part_forgets_the_agents_that_were_used_long_ago() -> None:
    fleet = Fleet(100, is_part=True)
    fleet.read()
    for agent in range(3):
        for kind in ("join", "alive", "ask", "learn"):
            fleet.take((kind, agent))
    # in an epoch that is not current
    assert len(fleet.view) == 2
    fleet.view.note_use("agent-0")
    assert fleet.view.forget_beyond(2) == ["agent-1"]
    assert [fleet.view.has(f"agent-{agent}") for agent in range(3)] == [True, False, True]
    assert fleet.view.candidates("agent-1") == []
    fleet.take(("drain", 1))
    fleet.read()
    assert [row.logical_id for row in fleet.view.page(ALL, decode_cursor(None), 100)[0]] == ["agent-0"]


def test_cache_of_a_part_keeps_used_agents_and_no_more_instances_than_agents() -> None:
    fleet = Fleet(100, is_part=True)
    fleet.read()
    for agent in (0, 1, 1, 3):
        for kind in ("join", "alive"):
            fleet.take((kind, agent))
    for agent in (0, 1, 3):
        for kind in ("ask", "learn"):
            fleet.take((kind, agent))
    used = Counter({"agent-0": 1})
    assert len(fleet.view) == 3
    # the oldest one was used since it was learned
    assert fleet.view.forget_beyond(2, lambda one: used.pop(one, 0) > 0) == ["agent-1"]
    assert fleet.view.forget_beyond(1) == ["agent-3"]
    # one agent with more instances than the bound stays
    for kind in ("join", "alive"):
        fleet.take((kind, 0))
    fleet.read()
    assert (len(fleet.view), fleet.view.forget_beyond(1)) == (2, [])


def test_cache_of_a_part_has_the_loads_of_agents_that_it_learns_later() -> None:
    fleet = Fleet(100, is_part=True)
    fleet.read()
    for kind in ("join", "join", "alive"):
        fleet.take((kind, 0))
    ids = [row.instance_id for row in fleet.members]
    fleet.members.note_loads(dict.fromkeys(ids, 0.5))
    fleet.read()
    fleet.take(("ask", 0))
    fleet.members.note_loads({ids[0]: 0.7})
    fleet.read()
    fleet.take(("learn", 0))
    assert fleet.view.loads == {ids[0]: 0.7, ids[1]: 0.5}
    # also where it has not learned it, an instance that is gone has no load
    fleet.take(("ask", 1))
    fleet.take(("learn", 1))
    assert fleet.view.forget_beyond(1) == ["agent-0"]
    fleet.take(("die", 0))
    fleet.read()
    assert fleet.view.loads == {ids[0]: 0.7}


def test_feed_reports_a_late_verdict_and_a_beat_clears_it_at_once() -> None:
    fleet = Fleet(100)
    for step in (("join", 0), ("alive", 0), ("read", 0), ("wait", 0), ("wait", 0), ("read", 0)):
        fleet.take(step)
    assert fleet.view.verdict(iid(1)) is Verdict.LATE
    assert fleet.view.candidates("agent-0") == []
    fleet.members.renew([iid(1)], fleet.now_s)
    fleet.read()
    assert [row.instance_id for row in fleet.view.candidates("agent-0")] == [iid(1)]
    assert fleet.loads == 1
    assert fleet.view.verdict(iid(2)) is Verdict.UNKNOWN


def test_page_contains_matching_instances_in_key_order() -> None:
    fleet = Fleet(100)
    for agent in range(AGENTS):
        fleet.take(("join", agent))
        fleet.take(("alive", agent))
    fleet.take(("drain", 0))
    fleet.read()
    alive = replace(ALL, statuses=frozenset({Status.ALIVE}))
    rows, has_more = fleet.view.page(alive, decode_cursor(None), 1)
    assert ([row.logical_id for row in rows], has_more) == (["agent-1"], True)
    rows, has_more = fleet.view.page(alive, (rows[-1].logical_id, rows[-1].instance_id), 5)
    # the third agent registered in an epoch that is not current
    assert ([row.logical_id for row in rows], has_more) == (["agent-3"], False)
