"""What we believe of an instance: the truth table of docs/verdicts.md, as one pure function.

The first row that fits counts. A death needs a witness, or a lease that is over while expiry is not frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from seedcore.core.model import Verdict


class Witness(str, Enum):
    """What one witness says: of a process, an actor, a node, or, from a caller, that a call found the actor dead."""

    ALIVE = "alive"
    GONE = "gone"
    UNKNOWN = "unknown"


class Beats(str, Enum):
    """What an instance's beats say: see core.lease."""

    FRESH = "fresh"
    LATE = "late"
    SUSPECT = "suspect"
    LAPSED = "lapsed"
    UNKNOWN = "unknown"


class Death(str, Enum):
    """Why an instance is to be declared dead."""

    PROCESS = "process"
    NODE = "node"
    ACTOR = "actor"
    LEASE = "lease"


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that the witnesses say of one instance now. `is_frozen`: expiry by silence alone is suspended."""

    process: Witness = Witness.UNKNOWN
    node: Witness = Witness.UNKNOWN
    actor: Witness = Witness.UNKNOWN
    caller: Witness = Witness.UNKNOWN
    beats: Beats = Beats.UNKNOWN
    is_frozen: bool = False


def judge(evidence: Evidence) -> Verdict | Death:
    """The verdict of the living, or why it is dead."""
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
