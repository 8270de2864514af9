"""The verdict on an instance: the truth table of docs/verdicts.md as one pure function.

The first matching row applies. A death requires a witness, or an expired lease while expiry is not frozen. `judge` is
the only place where the registry decides a death from evidence; of the verdicts only those of a beat (fresh) and of a
caller's report (suspect) are set at once, without it. A death by request (of the agent, of an operator, by the end of
its epoch) needs no evidence.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from seedcore.core.instances import Verdict


class Witness(StrEnum):
    """The report of one witness: about a process, an actor or a node, or a caller's report that a call failed."""

    ALIVE = "alive"
    GONE = "gone"
    UNKNOWN = "unknown"


class Beats(StrEnum):
    """The state of an instance according to its beats: see core.lease."""

    FRESH = "fresh"
    LATE = "late"
    SUSPECT = "suspect"
    LAPSED = "lapsed"
    UNKNOWN = "unknown"


class Death(StrEnum):
    """Why the registry declares an instance dead."""

    PROCESS = "process"
    NODE = "node"
    ACTOR = "actor"
    LEASE = "lease"


@dataclass(frozen=True, slots=True)
class Evidence:
    """The reports of all witnesses on one instance. `is_frozen`: its lease does not end by silence alone, because too
    many instances miss their beats at once, because Ray's tables cannot be read (then agents cannot find a new
    registry), or because its beats are in a database that cannot be read."""

    process: Witness = Witness.UNKNOWN
    node: Witness = Witness.UNKNOWN
    actor: Witness = Witness.UNKNOWN
    caller: Witness = Witness.UNKNOWN
    beats: Beats = Beats.UNKNOWN
    is_frozen: bool = False


def judge(evidence: Evidence) -> Verdict | Death:
    """Return the verdict on a live instance, or why the instance is dead."""
    if evidence.process is Witness.GONE:
        return Death.PROCESS
    if evidence.node is Witness.GONE:
        return Death.NODE
    if evidence.actor is Witness.GONE:
        return Death.ACTOR
    if evidence.beats is Beats.LAPSED and not evidence.is_frozen:
        return Death.LEASE
    if evidence.caller is Witness.GONE or evidence.beats in {Beats.LAPSED, Beats.SUSPECT}:
        return Verdict.SUSPECT
    if evidence.beats is Beats.LATE:
        return Verdict.LATE
    return Verdict.FRESH if evidence.beats is Beats.FRESH else Verdict.UNKNOWN


def shown(judgement: Verdict | Death) -> Verdict:
    """The verdict that readers see. An instance that the table calls dead is suspect until the registry declares it
    dead, which it does for a bounded number of instances at a time."""
    return Verdict.SUSPECT if isinstance(judgement, Death) else judgement
