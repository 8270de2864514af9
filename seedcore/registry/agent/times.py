"""How long an agent's side waits, in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from seedcore.core import comebacks


@dataclass(frozen=True, slots=True)
class AgentTimes:
    """`identify_max_s`: the longest pause between two questions to Ray about this process. `unanswered_first_s` and
    `unanswered_max_s`: the pause after the first failed beat of an agent that has never had an answer, and the longest
    one. `comeback_first_s` and `comeback_longest_s`: see Comebacks."""

    identify_max_s: float = 60.0
    unanswered_first_s: float = 1.0
    unanswered_max_s: float = 5.0
    comeback_first_s: float = comebacks.FIRST_S
    comeback_longest_s: float = comebacks.LONGEST_S
