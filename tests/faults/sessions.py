"""Checks the reads of a history, reader by reader.

1. Nothing is shown that no client asked for before the read was answered, and nothing newer than what is committed:
   what is shown and is not in the database in the end was never acknowledged, and its agent has died.
2. Nothing is shown that is older than the bound of its source: every change that was acknowledged as durable so long
   before the read began is shown, or a newer one. No instance is shown, or resolved, so long after its death was known
   to be committed. An incomplete answer is exempt: it states that it may be missing changes. So is, for a while, what
   happened since another registry took over: the one before learns that at its next look into the database.
3. What one reader is shown by one source does not go back: the version within a stream, the number of an instance, its
   death.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from seedcore.core.lifecycle import Status
from tests.faults.history import Call, History, Outcome, Seen, Source

BOUNDS_S = {
    Source.REGISTRY: 0.0,
    Source.POSTGRES: 0.0,
    Source.DATABASE: 0.0,
    Source.SNAPSHOT: 4.0,
}
"""How old an answer may be, in seconds. Ray's listing has no status, and no bound."""
_LOCATE = "locate"


@dataclass(slots=True)
class _Life:
    """What the history has of one instance. `asked` are the changes: number, status, and when the first call of it
    began; `settled` the numbers that were acknowledged as durable, and when; `dead_s`: since when its death was known
    to be committed."""

    asked: dict[tuple[int, Status], float] = field(default_factory=dict)
    registered: dict[int, float] = field(default_factory=dict)
    settled: list[tuple[float, int]] = field(default_factory=list)
    decided: set[Status] = field(default_factory=set)
    base: Seen | None = None
    final: Seen | None = None
    dead_s: float | None = None

    def settled_before(self, at_s: float) -> int | None:
        """The highest number that was acknowledged before."""
        return max((number for ended_s, number in self.settled if ended_s < at_s), default=None)

    def note_dead(self, at_s: float) -> None:
        self.dead_s = at_s if self.dead_s is None else min(self.dead_s, at_s)


class Sessions:
    """The check of one history."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._lives: dict[str, _Life] = defaultdict(_Life)
        self._violations: dict[str, None] = {}
        for seen in history.before:
            life = self._lives[seen.instance_id]
            life.base = seen
            life.settled.append((history.began_s, seen.seq or 0))
        for seen in history.after:
            self._lives[seen.instance_id].final = seen
        for step in history.steps:
            if step.seq is None:
                self._lives[step.instance_id].decided.add(step.status)
        for call in history.calls:
            self._note(call)

    def _note(self, call: Call) -> None:
        if call.is_write and call.instance_id is not None and call.seq is not None:
            life = self._lives[call.instance_id]
            assert call.status is not None
            life.asked.setdefault((call.seq, call.status), call.began_s)
            if call.name == "register" and call.status is Status.ALIVE:
                # until its commit it is starting, under the first of its two numbers
                life.asked.setdefault((call.seq - 1, Status.STARTING), call.began_s)
            if call.name == "register":
                life.registered.setdefault(call.seq, call.began_s)
            if call.is_durable and call.ended_s is not None:
                life.settled.append((call.ended_s, call.seq))
                if call.status is Status.DEAD:
                    life.note_dead(call.ended_s)
        if call.source in {Source.DATABASE, Source.POSTGRES} and call.ended_s is not None:
            for seen in call.seen:
                if seen.status is Status.DEAD:
                    self._lives[seen.instance_id].note_dead(call.ended_s)

    def violations(self) -> list[str]:
        """Everything that a read broke."""
        reads = [
            call
            for call in self._history.calls
            if call.outcome is Outcome.ANSWERED and call.source in BOUNDS_S and call.ended_s is not None
        ]
        for read in reads:
            for seen in read.seen:
                self._check_seen(read, seen)
            if read.lists_all and read.complete:
                self._check_absent(read)
        readers: dict[tuple[str, str, str | None], list[Call]] = defaultdict(list)
        for read in reads:
            if read.name != _LOCATE:
                readers[read.process, str(read.source), read.name].append(read)
        for session in readers.values():
            self._check_session(sorted(session, key=lambda read: read.began_s))
        return list(self._violations)

    def _found(self, read: Call, what: str) -> None:
        at_s = read.began_s - self._history.began_s
        self._violations.setdefault(f"{read.process} {read.name} from {read.source} at {at_s:.3f} s: {what}")

    def _is_blind(self, read: Call) -> bool:
        """Whether the answer may be of a time before this history."""
        assert read.source is not None
        return read.began_s - BOUNDS_S[read.source] <= self._history.began_s

    def _known_s(self, read: Call) -> float:
        """What was known before this time the read shows."""
        assert read.source is not None
        known_s = read.began_s - BOUNDS_S[read.source]
        if read.source in {Source.REGISTRY, Source.SNAPSHOT}:
            # where the answer does not name its registry, it may be of any that was superseded
            of_read = self._history.superseded if read.stream is None else {read.stream}
            for stream in of_read:
                superseded_s = self._history.superseded.get(stream, math.inf)
                if superseded_s < known_s <= superseded_s + self._history.unaware_s:
                    return superseded_s
        return known_s

    def _check_seen(self, read: Call, seen: Seen) -> None:
        """Laws 1 and 2, of an instance that is shown."""
        assert read.source is not None
        assert read.ended_s is not None
        life = self._lives.get(seen.instance_id)
        if life is None:
            if not self._is_blind(read):
                self._found(read, f"{seen} is not known to any client")
            return
        known_s = self._known_s(read)
        dead_s = math.inf if life.dead_s is None else life.dead_s
        if read.complete is not False and seen.status is not Status.DEAD and dead_s < known_s:
            self._found(read, f"{seen}, whose death was committed {read.began_s - dead_s:.3f} s before")
        if seen.seq is None or read.name == _LOCATE:
            # an answer without numbers; or one that the actor itself has proven, whatever its record is worth
            return
        if life.base is not None and seen.seq < (life.base.seq or 0) and self._is_blind(read):
            return
        if not self._was_asked(life, seen, read.ended_s):
            self._found(read, f"{seen} was asked for by no client")
        expected = life.settled_before(known_s)
        if read.complete is not False and expected is not None and seen.seq < expected:
            bound_s = BOUNDS_S[read.source]
            self._found(read, f"{seen}, older than change {expected}, acknowledged more than {bound_s:g} s before")
        self._check_committed(read, seen, life)

    def _was_asked(self, life: _Life, seen: Seen, at_s: float) -> bool:
        assert seen.seq is not None
        if life.base is not None and (life.base.seq, life.base.status) == (seen.seq, seen.status):
            return True
        if seen.status in life.decided:
            return True
        if life.asked.get((seen.seq, seen.status), at_s) < at_s:
            return True
        # a repeated registration leaves the status, and takes its number
        return life.registered.get(seen.seq, at_s) < at_s and any(
            status is seen.status and began_s < at_s for (_, status), began_s in life.asked.items()
        )

    def _check_committed(self, read: Call, seen: Seen, life: _Life) -> None:
        """The end of law 1."""
        final = life.final
        assert seen.seq is not None
        if final is not None and (final.seq or 0) >= seen.seq:
            return
        # the registry shows a change before it is committed, and a cache has it from there
        is_from_memory = read.source in {Source.REGISTRY, Source.SNAPSHOT}
        was_settled = any(number >= seen.seq for _, number in life.settled)
        has_died = final is None or final.status is Status.DEAD
        if was_settled or not has_died or not is_from_memory:
            self._found(read, f"{seen}, newer than what the database has in the end: {final}")

    def _check_absent(self, read: Call) -> None:
        """Law 2, of the instances that a complete list does not show."""
        assert read.source is not None
        shown = {seen.instance_id for seen in read.seen}
        for instance_id, life in self._lives.items():
            if instance_id in shown or life.final is None or Status.DEAD in life.decided:
                continue
            may_be_dead = any(status is Status.DEAD for _, status in life.asked) or life.final.status is Status.DEAD
            expected = life.settled_before(self._known_s(read))
            if expected is not None and not may_be_dead:
                self._found(read, f"{life.final.logical_id} ({instance_id}) is missing, and lives")

    def _check_session(self, reads: list[Call]) -> None:
        """Law 3: of reads that followed each other."""
        highest: dict[str, tuple[Call, Seen]] = {}
        newest: dict[str, Call] = {}
        for read in reads:
            stream = read.stream
            if stream is not None and read.version is not None:
                before = newest.get(stream)
                if before is not None and _follows(read, before) and read.version < (before.version or 0):
                    self._found(read, f"version {read.version} after {before.version}")
                if before is None or read.version >= (before.version or 0):
                    newest[stream] = read
            for seen in read.seen:
                earlier = highest.get(seen.instance_id)
                if earlier is not None and _follows(read, earlier[0]):
                    self._check_not_back(read, seen, *earlier)
                if earlier is None or (seen.seq or 0) >= (earlier[1].seq or 0) or seen.status is Status.DEAD:
                    highest[seen.instance_id] = (read, seen)

    def _check_not_back(self, read: Call, seen: Seen, earlier: Call, shown: Seen) -> None:
        if shown.status is Status.DEAD and seen.status is not Status.DEAD:
            self._found(read, f"{seen} after it was shown as dead")
        if seen.seq is None or shown.seq is None or seen.seq >= shown.seq:
            return
        assert earlier.ended_s is not None
        is_one_stream = read.stream is not None and read.stream == earlier.stream
        settled = self._lives[seen.instance_id].settled_before(min(earlier.ended_s, self._known_s(read)))
        # another registry process may have less than the one before it, but nothing less than what is committed
        if is_one_stream or (settled is not None and seen.seq < settled):
            self._found(read, f"{seen} after {shown}")


def _follows(read: Call, earlier: Call) -> bool:
    return earlier.ended_s is not None and read.began_s > earlier.ended_s


def check_sessions(history: History) -> list[str]:
    """The violations of a history's reads."""
    return Sessions(history).violations()
