"""Explains the state of an agent: the state, its cause, its start time, and advice for the operator."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from pydantic import BaseModel

from seedcore.core.causes import CauseKind
from seedcore.core.holds import HoldKind
from seedcore.core.instances import Verdict
from seedcore.core.lifecycle import Status
from seedcore.discovery.api import AgentAnswer, CauseOut, HoldOut, InstanceOut

_LOG = "`ray logs actor --id ACTOR_ID`, with the cluster's RAY_AUTH_MODE"
ADVICE: Mapping[CauseKind, str] = {
    CauseKind.UNKNOWN: f"See the end of its log: {_LOG}.",
    CauseKind.OPERATOR: "A process that still runs registers again within seconds, as a new instance.",
    CauseKind.PROCESS_EXITED: f"See the end of its log: {_LOG}.",
    CauseKind.PROCESS_KILLED: (
        "SIGKILL comes from kill -9, ray.kill, a container's limit or the kernel's OOM killer (see dmesg). "
        f"After another signal look for the crash in its log: {_LOG}."
    ),
    CauseKind.OUT_OF_MEMORY: (
        "Reduce the work of the agent, add memory to its node, or give its actor a memory= resource."
    ),
    CauseKind.START_FAILED: "The constructor raised. Fix it and create the agent again.",
    CauseKind.ACTOR_DIED: f"Ray ended the actor. See the end of its log: {_LOG}.",
    CauseKind.NODE_DIED: "Ray lost the node. Ray restarts agents with max_restarts on another node.",
    CauseKind.LEASE_EXPIRED: (
        "The registry was running and received no beat for that time: the agent hung, or its network failed."
    ),
    CauseKind.EPOCH_RETIRED: (
        "The fleet was flipped to another epoch (`seedcore epoch show`), and this agent stays dead: start a new one."
    ),
    CauseKind.RESTORED: "The database was restored from a backup, in which this instance was not dead yet.",
}
"""What to do about a death, by the kind of its cause. The other kinds need no advice."""

_OF_HOLD: Mapping[HoldKind, str] = {
    HoldKind.OPERATOR: "`seedcore undrain ID` ends an operator's drain.",
    HoldKind.READINESS: "It is resolved once it reports that it is ready.",
    HoldKind.PROCESS: "Restart the process that it depends on.",
    HoldKind.NODE: "Its node is being drained: start the agent on another node.",
}


_WORDS: Mapping[HoldKind, str] = {
    HoldKind.READINESS: "not ready",
    HoldKind.PROCESS: "a process that it depends on has ended",
}
"""The holds that say more than their kind."""


class Reason(BaseModel):
    """The state of an agent, its cause, its start time, and advice. `state` is a verdict if the agent is silent, else a
    status. `why` is for people: a program reads `cause` and `holds`."""

    logical_id: str
    state: str
    why: str
    since: datetime | None
    cause: CauseOut | None = None
    holds: list[HoldOut] = []
    advice: str | None = None
    actor_id: str | None = None
    endpoints: dict[str, str] = {}


def hold_text(hold: HoldOut) -> str:
    """A hold in words, with its reason, its operator and its end."""
    by = "" if hold.by is None else f" ({hold.by})"
    reason = "" if hold.reason is None else f": {hold.reason}"
    if hold.kind in _WORDS:
        return f"{_WORDS[hold.kind]}{by}{reason}"
    end = "" if hold.expires_at is None else f", until {hold.expires_at.astimezone():%Y-%m-%d %H:%M:%S}"
    return f"{hold.kind.value} hold{by}{reason}{end}"


def reason_of(agent: AgentAnswer, epoch_problem: str | None = None) -> Reason:
    """Explain the current state of an agent. Of several instances, explain the one that callers would resolve first.

    `epoch_problem` is the registry's: an operator must confirm the epoch, and no agent is resolved until then.
    """
    if not agent.live:
        return _of_the_dead(agent)
    reason = _of_the_living(agent)
    if epoch_problem is None:
        return reason
    advice = epoch_problem if reason.advice is None else f"{epoch_problem}. {reason.advice}"
    why = f"{reason.why}; but no agent is resolved, because the epoch is not confirmed"
    return reason.model_copy(update={"why": why, "advice": advice})


def _of_the_living(agent: AgentAnswer) -> Reason:
    order = (Status.ALIVE.value, Status.STARTING.value, Status.DRAINING.value)
    best = min(
        agent.live,
        key=lambda live: (order.index(live.instance.status or order[0]), live.verdict != Verdict.FRESH.value),
    )
    row, silent = best.instance, f"silent for {best.silence_s:.1f} s"
    if row.status == Status.DRAINING.value:
        return _of_a_hold(agent, row, Status.DRAINING)
    if best.verdict != Verdict.FRESH.value:
        hangs = "It hangs, or cannot reach the registry. Its next beat makes it fresh; without one, its lease expires."
        return _explain(agent, row, best.verdict, f"{row.status}, but {silent}", row.status_changed_at, hangs)
    if row.status == Status.STARTING.value and row.holds:
        return _of_a_hold(agent, row, Status.STARTING)
    if row.status == Status.STARTING.value:
        return _explain(agent, row, "starting", "it has registered, but not reported alive yet", row.started_at)
    return _explain(agent, row, "alive", f"it beats, last {best.silence_s:.1f} s ago", row.started_at)


def _explain(
    agent: AgentAnswer, row: InstanceOut, state: str, why: str, since: datetime | None, advice: str | None = None
) -> Reason:
    return Reason(
        logical_id=agent.logical_id,
        state=state,
        why=why,
        since=since,
        cause=row.cause,
        holds=row.holds,
        advice=advice,
        actor_id=row.actor_id,
        endpoints=row.endpoints,
    )


def _of_a_hold(agent: AgentAnswer, row: InstanceOut, status: Status) -> Reason:
    """Explain a status that the agent reports, or that holds lead to, or both."""
    parts = [hold_text(hold) for hold in row.holds]
    if row.reported_status == status.value:
        own = row.cause if row.cause is not None and row.cause.kind is CauseKind.AGENT else None
        parts.append(
            "reported by the agent" if own is None or own.detail is None else f"reported by the agent: {own.detail}"
        )
    advice = " ".join(_OF_HOLD[hold.kind] for hold in row.holds).replace("undrain ID", f"undrain {agent.logical_id}")
    why = "; ".join(parts) or "the cause is not known"
    return _explain(agent, row, status.value, why, row.status_changed_at, advice or None)


def _of_the_dead(agent: AgentAnswer) -> Reason:
    if not agent.instances:
        known = (
            "no agent has registered under this id"
            if agent.complete
            else "no live instance, and its history cannot be read now"
        )
        return Reason(logical_id=agent.logical_id, state="unknown", why=known, since=None)
    newest = max(agent.instances, key=lambda row: (row.stopped_at is not None, row.stopped_at or row.started_at))
    if newest.status != Status.DEAD.value:
        # only the database answers, and it has no verdicts
        state, why = newest.status or "unknown", "the last status in the database"
        return _explain(agent, newest, state, why, newest.status_changed_at)
    why = "no cause was given" if newest.cause is None else str(newest.cause)
    advice = None if newest.cause is None else ADVICE.get(newest.cause.kind)
    return _explain(agent, newest, "dead", why, newest.stopped_at, advice)
