"""Explains the state of an agent: the state, its cause, its start time, and advice for the operator."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from seedcore.core.instances import Verdict
from seedcore.core.lifecycle import Status
from seedcore.discovery.api import AgentAnswer, InstanceOut

_LOG = "`ray logs actor --id ACTOR_ID`, with the cluster's RAY_AUTH_MODE"
_ADVICE: tuple[tuple[str, str], ...] = (
    (
        r"low on memory",
        "Reduce the work of the agent, add memory to its node, or give its actor a memory= resource.",
    ),
    (r"exception in its start-up", "The constructor raised. Fix it and create the agent again."),
    (
        r"killed by SIGKILL",
        "SIGKILL comes from kill -9, ray.kill, a container's limit or the kernel's OOM killer (see dmesg).",
    ),
    (r"killed by SIG", f"Look for the crash in its log: {_LOG}."),
    (r"exited with code", f"See the end of its log: {_LOG}."),
    (
        r"lease expired",
        "The registry was running and received no beat for that time: the agent hung, or its network failed.",
    ),
    (r"its node died", "Ray lost the node. Ray restarts agents with max_restarts on another node."),
    (
        r"epoch .*retired",
        "The fleet was flipped to another epoch (`seedcore epoch show`), and this agent stays dead: start a new one.",
    ),
)


@dataclass(frozen=True, slots=True)
class Reason:
    """The state of an agent, its cause, its start time, and advice. `state` is a verdict if the agent is silent, else a
    status."""

    logical_id: str
    state: str
    why: str
    since: datetime | None
    advice: str | None = None
    actor_id: str | None = None


def reason_of(agent: AgentAnswer) -> Reason:
    """Explain the current state of an agent. Of several instances, explain the one that callers would resolve first."""
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
        why = f"{row.cause or 'reported by the agent'}{until}"
        return Reason(agent.logical_id, "draining", why, row.status_changed_at)
    if best.verdict != Verdict.FRESH.value:
        hangs = "It hangs, or cannot reach the registry. Its next beat makes it fresh; without one, its lease expires."
        return Reason(agent.logical_id, best.verdict, f"{row.status}, but {silent}", row.status_changed_at, hangs)
    if row.status == Status.STARTING.value:
        return Reason(agent.logical_id, "starting", "it has registered, but not reported alive yet", row.started_at)
    return Reason(agent.logical_id, "alive", f"it beats, last {best.silence_s:.1f} s ago", row.started_at)


def _of_the_dead(agent: AgentAnswer) -> Reason:
    if not agent.history:
        known = (
            "no agent has registered under this id"
            if agent.complete
            else "no live instance, and its history cannot be read now"
        )
        return Reason(agent.logical_id, "unknown", known, None)
    newest: InstanceOut = max(
        agent.history, key=lambda row: (row.stopped_at is not None, row.stopped_at or row.started_at)
    )
    if newest.status != Status.DEAD.value:
        # only the database answers, and it has no verdicts
        return Reason(
            agent.logical_id, newest.status or "unknown", "the last status in the database", newest.status_changed_at
        )
    cause = newest.cause or "no cause was given"
    advice = next((advice for pattern, advice in _ADVICE if re.search(pattern, cause)), None)
    return Reason(agent.logical_id, "dead", cause, newest.stopped_at, advice, newest.actor_id)
