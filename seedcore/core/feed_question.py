"""What a follower asks a change feed for."""

from __future__ import annotations

from dataclasses import dataclass

from seedcore.core.answers import InstanceFilter
from seedcore.core.errors import InvalidInputError
from seedcore.core.limits import MAX_ID_CHARS, check_kind, check_text
from seedcore.core.wire import wire

MAX_FEED_WAIT_S = 30.0


@wire
@dataclass(frozen=True, slots=True)
class FeedQuestion:
    """The changes after `version` of the feed `stream` (None: the follower has read none), of the instances that the
    filter matches. Its `fresh_only` and `verdicts` are not used.

    The answer waits up to `wait_s` seconds (at most MAX_FEED_WAIT_S) for such a change where there is none yet. A
    `follower` that names itself keeps its place from question to question.

    `loads_after`, the `loads_number` of the answer before (0 at first), asks for the loads that have changed since, at
    most MAX_LOADS_PER_ANSWER. A load ends no wait.

    `may_compact`: changes that the feed no longer has one by one come as the last of them of each instance, at most
    MAX_COMPACTED in a batch, which `has_more` then. Otherwise they are a reset.

    `node_id` is the node of a process that can follow the relay of its node instead. `is_relay`: a relay asks, which
    follows for the processes of its node.
    """

    wanted: InstanceFilter
    stream: str | None = None
    version: int = 0
    wait_s: float = 0.0
    follower: str | None = None
    loads_after: int | None = None
    may_compact: bool = False
    node_id: str | None = None
    is_relay: bool = False

    def validated(self) -> FeedQuestion:
        """The same, or InvalidInputError."""
        check_kind("wanted", self.wanted, InstanceFilter).validated()
        if self.stream is not None:
            check_text("stream", self.stream, MAX_ID_CHARS)
        if type(self.version) is not int or self.version < 0:
            raise InvalidInputError("version", f"must be a whole number from 0, not {self.version!r}")
        if type(self.wait_s) not in {int, float} or not 0 <= self.wait_s <= MAX_FEED_WAIT_S:
            raise InvalidInputError("wait_s", f"must be from 0 to {MAX_FEED_WAIT_S:g} seconds, not {self.wait_s!r}")
        if self.follower is not None:
            check_text("follower", self.follower, MAX_ID_CHARS)
        if self.loads_after is not None and not (type(self.loads_after) is int and self.loads_after >= 0):
            raise InvalidInputError("loads_after", f"must be a whole number from 0, not {self.loads_after!r}")
        check_kind("may_compact", self.may_compact, bool)
        if self.node_id is not None:
            check_text("node_id", self.node_id, MAX_ID_CHARS)
        check_kind("is_relay", self.is_relay, bool)
        return self
