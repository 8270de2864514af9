"""Reading the members: the instance of an agent that a caller gets, or why there is none; pages, and counts.

Owns nothing. Every function reads `core.members.Members` and changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from seedcore.core.answers import InstanceFilter, NotResolved, Resolution
from seedcore.core.holds import HoldKind
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.members import Members
from seedcore.core.paging import first_page
from seedcore.core.selection import best


def resolve(members: Members, logical_id: str, now_s: float, *, allow_late: bool = False) -> Resolution:
    """The best instance of an agent, or why there is none: alive, of the current epoch, and fresh, or late where that
    is allowed and none is fresh."""
    silence = members.silence
    rows = [row for row in members.instances_of(logical_id) if row.cluster_epoch == members.shown.listed]
    for verdict in (Verdict.FRESH, Verdict.LATE) if allow_late else (Verdict.FRESH,):
        chosen = best(
            row for row in rows if row.status is Status.ALIVE and silence.verdict(row.instance_id, now_s) is verdict
        )
        if chosen is not None:
            return Resolution(logical_id, chosen, verdict=verdict)
    nearest = best(rows)
    if nearest is None:
        return _without_rows(members, logical_id)
    if nearest.status is not Status.ALIVE:
        return Resolution(logical_id, None, *why_not_alive(nearest))
    silence_s = silence.silence_s(nearest.instance_id, now_s)
    verdict = silence.verdict(nearest.instance_id, now_s)
    if silence.is_reported_dead(nearest.instance_id):
        reason = NotResolved.REPORTED_DEAD
        detail = "a caller found its actor dead, and it has sent no beat since"
    elif silence.terms.has_lapsed(silence_s):
        reason, detail = NotResolved.LEASE_EXPIRED, f"silent for {silence_s:.0f} s, its lease has expired"
    else:
        reason = NotResolved.LATE if verdict is Verdict.LATE else NotResolved.SUSPECT
        detail = f"it is {verdict}: silent for {silence_s:.1f} s"
    return Resolution(logical_id, None, reason, detail, verdict=verdict)


def why_not_alive(instance: Instance) -> tuple[NotResolved, str]:
    """Why an instance that is not alive is not resolved, for programs and in words."""
    readiness = instance.hold(HoldKind.READINESS)
    if instance.status is Status.STARTING and readiness is not None:
        return NotResolved.NOT_READY, "it is not ready" + (f": {readiness.reason}" if readiness.reason else "")
    process = instance.hold(HoldKind.PROCESS)
    if instance.status is Status.DRAINING and process is not None:
        return NotResolved.DRAINING, f"a process that it depends on has ended: {process.reason or 'no reason is given'}"
    node = instance.hold(HoldKind.NODE)
    if instance.status is Status.DRAINING and node is not None:
        return NotResolved.DRAINING, node.reason or "its node is being drained"
    status = NotResolved.DIED if instance.status is Status.DEAD else NotResolved(instance.status)
    return status, f"it is {instance.status}" + ("" if instance.cause is None else f" ({instance.cause})")


def _without_rows(members: Members, logical_id: str) -> Resolution:
    """Why an agent without an instance in the current epoch is not resolved."""
    if members.shown.unconfirmed is not None:
        return Resolution(logical_id, None, NotResolved.EPOCH_UNCONFIRMED, unconfirmed_epoch(members))
    if members.index.has_agent(logical_id):
        return Resolution(logical_id, None, NotResolved.OTHER_EPOCH, "its instances are of another epoch")
    last = members.deaths.last_of(logical_id)
    if last is None:
        return Resolution(logical_id, None, NotResolved.NOT_REGISTERED, "no live instance is registered")
    why = "" if last.cause is None else f" ({last.cause})"
    return Resolution(logical_id, None, NotResolved.DIED, f"no live instance is registered, the last one is dead{why}")


def unconfirmed_epoch(members: Members) -> str | None:
    """What an operator must do about a lost flip, in one line; None where none is lost."""
    lost = members.shown.unconfirmed
    if lost is None:
        return None
    return (
        f"the database has lost the flip to epoch {lost.name} (number {lost.number}) and shows {members.epoch} "
        f"(number {members.shown.number}): confirm one of them with `seedcore epoch flip NAME`"
    )


def page(
    members: Members, wanted: InstanceFilter, after: tuple[str, str], limit: int, now_s: float
) -> tuple[list[Instance], bool]:
    """Up to `limit` matching instances after a key, in key order, and whether there are more."""
    silence = members.silence
    rows = members.index.wanted(wanted, members.shown.listed, after)
    if wanted.fresh_only:
        rows = (row for row in rows if not silence.terms.has_lapsed(silence.silence_s(row.instance_id, now_s)))
    verdicts = wanted.verdicts
    if verdicts is not None:
        rows = (row for row in rows if silence.verdict(row.instance_id, now_s) in verdicts)
    return first_page(rows, limit)


def observed(members: Members, instance: Instance, now_s: float, at: datetime) -> Instance:
    """A live instance with the time of its last beat as the registry received it."""
    silence_s = members.silence.silence_s(instance.instance_id, now_s)
    return replace(instance, last_heartbeat=at - timedelta(seconds=max(0.0, silence_s)))


def seen_at(members: Members, instances: Sequence[Instance], now_s: float, at: datetime) -> list[float]:
    """When each of these live instances beat last, as `observed` has it, in seconds since 1970."""
    at_s, silence_of = at.timestamp(), members.silence.silence_s
    return [at_s - max(0.0, silence_of(row.instance_id, now_s)) for row in instances]


def verdicts_of(members: Members, instances: Sequence[Instance]) -> dict[str, Verdict]:
    """The published verdicts of those instances that are not fresh."""
    known = members.silence.known_verdicts
    return {row.instance_id: known[row.instance_id] for row in instances if row.instance_id in known}


def loads_since(members: Members, number: int, wanted: InstanceFilter) -> tuple[dict[str, float], int]:
    """The loads, of instances that match a filter, that have changed since `number`; and the number after them."""
    epoch, by_id = members.shown.listed, members.index.by_id
    return members.loads.since(number, lambda instance_id: wanted.matches(by_id[instance_id], epoch))


def count_by_status(members: Members) -> dict[Status, int]:
    """The number of live instances in each status."""
    return {status: members.index.statuses[status] for status in Status if status is not Status.DEAD}


def count_by_verdict(members: Members) -> Counter[tuple[Status, Verdict]]:
    """The number of live instances in each status with each published verdict."""
    counts = Counter({(status, Verdict.FRESH): count for status, count in members.index.statuses.items()})
    for instance_id, verdict in members.silence.known_verdicts.items():
        status = members.index.by_id[instance_id].status
        counts[status, Verdict.FRESH] -= 1
        counts[status, verdict] += 1
    return counts
