"""What must hold on the hosts, whatever the network does. Functions of what was observed; nothing is asked here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from seedcore.core.causes import CauseKind
from seedcore.core.lifecycle import Status
from seedcore.registry.following.times import MAX_AGE_S
from seedcore.registry.ray_support.process_keys import split_key
from seedcore.registry.server.watched_node import WatchTimes
from tests.hosts.records import Call, Ended, Look, Node, Row

# a cache may be that old; the rest is for the clock of the test, which looks twice a second
STALE_S = MAX_AGE_S + 1.0
# the registry reads Ray's node table that often, and waits for the commit
NODE_STALE_S = STALE_S + 2 * WatchTimes().node_table_s
# Ray's own bound: five health checks of its GCS, each 3 s after the last and with 10 s for its answer, and our margin
RAYS_BOUND_S = 5 * (3.0 + 10.0) + 15.0
_CAUSES_OF_THE_LIVING = {CauseKind.AGENT, CauseKind.EPOCH_RETIRED}


@dataclass(frozen=True)
class Absence:
    """From `began_at` to `ended_at` the agents of these nodes could not reach the registry."""

    node_ids: frozenset[str]
    began_at: float
    ended_at: float

    def covers(self, row: Row) -> bool:
        """Whether an instance was declared dead in it."""
        return row.node_id in self.node_ids and self.began_at <= (row.died_at or 0.0) <= self.ended_at


@dataclass
class Observed:
    """Everything seen from the beginning of a fault until all was settled again."""

    calls: list[Call] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    # dead in the database while their process lived
    living_dead: dict[str, Row] = field(default_factory=dict)

    @property
    def dead_nodes(self) -> dict[str, float]:
        """When each node that is dead in Ray's table was first seen so."""
        found: dict[str, float] = {}
        for node in self.nodes:
            if not node.is_alive:
                found.setdefault(node.node_id, node.at)
        return found


def is_living(row: Row, living: Collection[str]) -> bool:
    """Whether the process of an instance is among the living ones of all hosts."""
    return row.process_key is not None and split_key(row.process_key).process in living


def living_dead(rows: Iterable[Row], living: Collection[str]) -> dict[str, Row]:
    """The instances that were declared dead while their process lives."""
    return {
        row.instance_id: row
        for row in rows
        if row.status is Status.DEAD and row.cause not in _CAUSES_OF_THE_LIVING and is_living(row, living)
    }


def doubles(rows: Iterable[Row], living: Collection[str]) -> set[str]:
    """The agents that have more than one living process."""
    processes: dict[str, set[str]] = {}
    for row in rows:
        if row.process_key is not None and is_living(row, living):
            processes.setdefault(row.agent_id, set()).add(row.process_key)
    return {agent_id for agent_id, keys in processes.items() if len(keys) > 1}


def false_deaths(seen: Observed, absence: Absence | None) -> list[str]:
    """No agent that lives and can reach the registry is declared dead, unless its node is dead in Ray's table: then its
    agents end."""
    found = []
    for row in seen.living_dead.values():
        is_rays = row.cause is CauseKind.NODE_DIED and row.node_id in seen.dead_nodes
        if not is_rays and not (absence is not None and absence.covers(row)):
            found.append(f"false death: {row.agent_id} ({row.instance_id}) lives, and is dead: {row.cause}")
    return found


def stale_handles(seen: Observed) -> list[str]:
    """No instance is resolved, or answers a resolved call, that was declared dead, or whose node Ray declared dead."""
    rows = {row.instance_id: row for row in seen.rows}
    dead_nodes = seen.dead_nodes
    found = []
    for call in seen.calls:
        for instance_id in {call.instance_id, call.answered_by} - {None}:
            row = rows.get(str(instance_id))
            if row is None:
                continue
            ages = {
                "was declared dead": (call.began_at - row.died_at, STALE_S) if row.died_at is not None else None,
                "was on a dead node": (call.began_at - dead_nodes[row.node_id], NODE_STALE_S)
                if row.node_id in dead_nodes
                else None,
            }
            for what, age in ages.items():
                if age is not None and age[0] > age[1]:
                    found.append(
                        f"stale handle: {call.agent_id} {call.way} by {call.source} at {call.began_at:.1f}: instance"
                        f" {instance_id} {what} {age[0]:.1f} s before ({row.cause})"
                    )
    return found


def wrong_handles(seen: Observed) -> list[str]:
    """A handle is of the agent that was asked for."""
    return [call.problem for call in seen.calls if call.problem is not None and "wrong handle" in call.problem]


def late_ends(seen: Observed, now: float) -> list[str]:
    """A call under way ends, with its answer or an error, within Ray's bound."""
    return [
        f"a call of {one.agent_id} took {took_s(one, now):.0f} s: {one.problem}"
        for one in seen.ended
        if took_s(one, now) > one.work_s + RAYS_BOUND_S
    ]


def took_s(one: Ended, now: float) -> float:
    """How long Ray took to end a call; until now where it has not."""
    return (now if one.ended_at is None else one.ended_at) - one.began_at


def longest_outage_s(seen: Observed, agent_ids: Iterable[str], began_at: float, ended_at: float) -> float:
    """The longest time in which the calls of one of these agents got no answer."""
    longest_s = 0.0
    for agent_id in agent_ids:
        answered = sorted(
            call.answered_at for call in seen.calls if call.agent_id == agent_id and call.answered_at is not None
        )
        marks = [began_at, *(at for at in answered if began_at <= at <= ended_at), ended_at]
        longest_s = max(longest_s, *(after - before for before, after in pairwise(marks)))
    return longest_s


def unsettled(fleet: Mapping[str, str], rows: Iterable[Row], living: Collection[str], look: Look) -> str | None:
    """Why the installation is not settled: each agent has one living instance, and registry, database and Ray agree."""
    all_rows = list(rows)
    live = {row.instance_id: row for row in all_rows if row.status is not Status.DEAD}
    if look.problem is not None:
        return look.problem
    if look.alive_nodes != 3:
        return f"{look.alive_nodes} nodes are alive in Ray's table"
    if sorted(row.agent_id for row in live.values()) != sorted(fleet):
        return f"live in the database are {sorted((row.agent_id, row.status.value) for row in live.values())}"
    if any(row.status is not Status.ALIVE or not is_living(row, living) for row in live.values()):
        return f"not alive, or without a process: {sorted(live.values(), key=lambda row: row.agent_id)}"
    if twice := doubles(all_rows, living):
        return f"more than one process has {sorted(twice)}"
    if look.listed != {row.instance_id: row.agent_id for row in live.values()}:
        return f"registry and database differ: {look.listed}"
    if missing := set(fleet) - set(look.in_ray):
        return f"Ray does not list {sorted(missing)}"
    if look.answered_by != {row.agent_id: row.instance_id for row in live.values()}:
        return f"other instances answer: {look.answered_by}"
    return None
