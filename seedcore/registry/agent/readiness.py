"""Whether an agent is ready: what it says itself, and what its probes found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import HoldChange
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.limits import MAX_TEXT_CHARS, check_detail, check_kind


@dataclass(frozen=True, slots=True)
class Readiness:
    """The agent is ready where it says so and no probe fails. `problems` are those of the probes, by their names."""

    is_own: bool = True
    reason: str | None = None
    problems: Mapping[str, str] = field(default_factory=dict)

    def said(self, ready: bool, reason: str | None) -> Readiness:
        """The same, after what the agent says now. Raises InvalidInputError."""
        return replace(self, is_own=check_kind("ready", ready, bool), reason=check_detail(reason))

    def probed(self, name: str, problem: str | None) -> Readiness:
        """The same, after a probe found this problem, or none."""
        others = {other: known for other, known in self.problems.items() if other != name}
        return replace(self, problems=others if problem is None else {**others, name: problem})

    @property
    def why_not(self) -> tuple[bool, str | None]:
        """Whether it is ready, and the reasons why it is not."""
        own = self.reason if not self.is_own else None
        reasons = [*([own] if own else []), *(f"{name}: {problem}" for name, problem in self.problems.items())]
        return self.is_own and not self.problems, "; ".join(reasons)[:MAX_TEXT_CHARS] or None

    def change(self, instance_id: str, at: datetime) -> HoldChange:
        """The change that reports it."""
        is_ready, reason = self.why_not
        kind = HoldKind.READINESS
        if is_ready:
            return HoldChange(instance_id, kind, cause=Cause(CauseKind.AGENT, self.reason))
        return HoldChange(instance_id, kind, Hold(kind, reason, None, at))
