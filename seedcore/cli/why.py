"""Why an agent is as it is, in words: what holds now, since when, and what an operator can do about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from seedcore.core.lifecycle import Status
from seedcore.core.model import Verdict
from seedcore.discovery.api import AgentAnswer, InstanceOut

_ADVICE: tuple[tuple[str, str], ...] = (
    (r"low on memory", "Give it less to do at once, its node more memory, or its actor a memory= resource."),
    (r"exception in its start-up", "Its constructor raised; mend that and create the agent again."),
    (
        r"killed by SIGKILL",
        "SIGKILL comes from kill -9, ray.kill, a container's limit or the kernel's OOM killer (see dmesg).",
    ),
    (r"killed by SIG", "Look for the crash in its log: `ray logs actor --id ACTOR_ID`."),
    (r"exited with code", "Its last words are in its log: `ray logs actor --id ACTOR_ID`."),
    (r"lease expired", "It said nothing for that long while the registry listened: it hung, or was cut off."),
    (r"its node died", "Ray lost the node; agents with max_restarts come back on another."),
    (
        r"epoch .*retired",
        "The fleet was flipped to another epoch (`seedcore epoch show`). It does not come back: start it in that one.",
    ),
)


@dataclass(frozen=True, slots=True)
class Reason:
    """What an agent is (`state`: a status, or a verdict where that is worse), why, since when, and what helps."""

    logical_id: str
    state: str
    why: str
    since: datetime | None
    advice: str | None = None
    actor_id: str | None = None


def reason_of(agent: AgentAnswer) -> Reason:
    """Why an agent is as it is now; of several instances, the one nearest to being handed out."""
    if not agent.live:
        return _of_the_dead(agent)
    order = (Status.ALIVE.value, Status.STARTING.value, Status.DRAINING.value)
    best = min(
        agent.live,
        key=lambda live: (order.index(live.instance.status or order[0]), live.verdict != Verdict.FRESH.value),
    )
    row, silent = best.instance, f"silent for {best.silence_s:.1f} s"
    if row.status == Status.DRAINING.value:
        until = "" if row.drain_until is None else f", until {row.drain_until.astimezone():%Y-%m-%d %H:%M:%S}"
        return Reason(agent.logical_id, "draining", f"{row.cause or 'it said so'}{until}", row.status_changed_at)
    if best.verdict != Verdict.FRESH.value:
        hangs = "It hangs, or cannot reach the registry; it is back with its next beat, and dead when its lease ends."
        return Reason(agent.logical_id, best.verdict, f"{row.status}, but {silent}", row.status_changed_at, hangs)
    if row.status == Status.STARTING.value:
        return Reason(
            agent.logical_id, "starting", "it has registered, and not said yet that it is ready", row.started_at
        )
    return Reason(agent.logical_id, "alive", f"its beats come, the last one {best.silence_s:.1f} s ago", row.started_at)


def _of_the_dead(agent: AgentAnswer) -> Reason:
    if not agent.history:
        known = "nobody is registered" if agent.complete else "nobody lives, and its history cannot be read now"
        return Reason(agent.logical_id, "unknown", known, None)
    newest: InstanceOut = max(
        agent.history, key=lambda row: (row.stopped_at is not None, row.stopped_at or row.started_at)
    )
    if newest.status != Status.DEAD.value:
        # the database alone answers: it does not listen to beats
        return Reason(
            agent.logical_id, newest.status or "unknown", "as the database last heard", newest.status_changed_at
        )
    cause = newest.cause or "no cause was given"
    advice = next((advice for pattern, advice in _ADVICE if re.search(pattern, cause)), None)
    return Reason(agent.logical_id, "dead", cause, newest.stopped_at, advice, newest.actor_id)
