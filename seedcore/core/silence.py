"""When each live instance was last seen, and the verdict that follows from its silence.

Owns the evidence of beats and callers. It decides nothing: `core.verdict.judge` does. It knows neither the instances'
details nor a clock: the caller passes monotonic seconds (`now_s`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime

from seedcore.core.instances import Instance, Verdict
from seedcore.core.lease import LeaseTerms
from seedcore.core.verdict import Beats, Evidence, Witness, judge, shown

_SILENT = {Beats.SUSPECT, Beats.LAPSED}


class Silence:
    """Use it from one event loop. `publish` is called with the id of an instance and its new verdict, each time that a
    verdict differs from the one published before; a new instance is `fresh`.

    An instance is `sql_only` when the registry knows it from the database alone: it may beat by the SQL functions.
    """

    def __init__(self, terms: LeaseTerms, publish: Callable[[str, Verdict], None]) -> None:
        self.terms = terms
        self.is_frozen = False
        self.is_blind = False
        self.can_read_sql_beats = True
        self.became_silent = 0
        self.came_back = 0
        # only the verdicts that are not fresh
        self.known_verdicts: dict[str, Verdict] = {}
        self._publish = publish
        # longest silent first, except instances whose time is still to come: a search for silent ones ends early
        self._last_seen: dict[str, float] = {}
        self._reported_dead: set[str] = set()
        self._sql_only: dict[str, datetime] = {}

    # Being seen

    def last_seen_s(self, instance_id: str, default_s: float = 0.0) -> float:
        """When an instance was last seen; `default_s` for one that does not live here."""
        return self._last_seen.get(instance_id, default_s)

    def silence_s(self, instance_id: str, now_s: float) -> float:
        """Seconds since a live instance was last seen."""
        return now_s - self._last_seen[instance_id]

    def see(self, instance_id: str, seen_s: float) -> None:
        """Record when an instance was seen, also a new one."""
        if self._last_seen.get(instance_id) != seen_s:
            self._last_seen.pop(instance_id, None)
            self._last_seen[instance_id] = seen_s

    def renew(self, instance_ids: Sequence[str], live: Mapping[str, Instance], now_s: float) -> list[str]:
        """Record a beat of each of these instances. Returns the ids that are not among the `live` ones."""
        lost: list[str] = []
        last_seen = self._last_seen
        for instance_id in instance_ids:
            row = live.get(instance_id)
            if row is None:
                lost.append(instance_id)
            else:
                # with the id object that is held already, and behind all others
                del last_seen[instance_id]
                last_seen[row.instance_id] = now_s
        if self._sql_only:
            for instance_id in instance_ids:
                self._sql_only.pop(instance_id, None)
        if self._reported_dead:
            self._reported_dead.difference_update(instance_ids)
        if self.known_verdicts:
            for instance_id in self.known_verdicts.keys() & instance_ids:
                self._set_verdict(instance_id, Verdict.FRESH)
        return lost

    def credit(self, absence_s: float, now_s: float) -> None:
        """Subtract `absence_s` seconds, in which the registry was absent, from every silence."""
        for instance_id, seen_s in self._last_seen.items():
            self._last_seen[instance_id] = max(seen_s, min(now_s, seen_s + absence_s))

    def report_dead(self, instance_id: str) -> None:
        """Record that a caller found the instance's actor dead: suspect until its next beat."""
        if instance_id in self._last_seen:
            self._reported_dead.add(instance_id)
            self._set_verdict(instance_id, Verdict.SUSPECT)

    def is_reported_dead(self, instance_id: str) -> bool:
        """Whether a caller found the instance's actor dead since its last beat."""
        return instance_id in self._reported_dead

    def discard(self, instance_id: str) -> None:
        """Remove an instance that lives here no longer."""
        self._last_seen.pop(instance_id, None)
        self.known_verdicts.pop(instance_id, None)
        self._reported_dead.discard(instance_id)
        self._sql_only.pop(instance_id, None)

    # Verdicts

    def evidence(self, instance_id: str, now_s: float) -> Evidence:
        """What beats and callers show of an instance. No lease ends by silence alone while expiry is frozen, while
        Ray's tables cannot be read (`is_blind`), nor while the beats of a `sql_only` instance cannot be read."""
        if instance_id not in self._last_seen:
            return Evidence()
        return Evidence(
            caller=Witness.GONE if instance_id in self._reported_dead else Witness.UNKNOWN,
            beats=self.terms.beats(self.silence_s(instance_id, now_s)),
            is_frozen=self.is_frozen
            or self.is_blind
            or (not self.can_read_sql_beats and instance_id in self._sql_only),
        )

    def verdict(self, instance_id: str, now_s: float) -> Verdict:
        """The verdict that readers see; `unknown` for an instance that does not live here."""
        return shown(judge(self.evidence(instance_id, now_s)))

    def lapsed(self, now_s: float) -> list[str]:
        """The instances whose lease has expired, the longest silent first."""
        over = [
            (seen_s, instance_id)
            for instance_id, seen_s in self._silent(now_s)
            if self.terms.has_lapsed(now_s - seen_s)
        ]
        return [instance_id for _, instance_id in sorted(over, key=lambda pair: pair[0])]

    def count_silent(self, now_s: float) -> int:
        """The number of instances that have missed two beats or more."""
        return sum(self.terms.beats(now_s - seen_s) in _SILENT for _, seen_s in self._silent(now_s))

    def publish_verdicts(self, now_s: float) -> None:
        """Publish every verdict that has changed."""
        silent = {instance_id for instance_id, _ in self._silent(now_s)}
        for instance_id in silent | self.known_verdicts.keys():
            self._set_verdict(instance_id, self.verdict(instance_id, now_s))

    def _silent(self, now_s: float) -> Iterator[tuple[str, float]]:
        """The instances that are not fresh, and when each was last seen."""
        for instance_id, seen_s in self._last_seen.items():
            if self.terms.beats(now_s - seen_s) is Beats.FRESH:
                # all behind it were seen later
                return
            yield instance_id, seen_s

    def _set_verdict(self, instance_id: str, verdict: Verdict) -> None:
        if verdict is self.known_verdicts.get(instance_id, Verdict.FRESH):
            return
        if verdict is Verdict.FRESH:
            del self.known_verdicts[instance_id]
            self.came_back += 1
        else:
            self.became_silent += instance_id not in self.known_verdicts
            self.known_verdicts[instance_id] = verdict
        self._publish(instance_id, verdict)

    # Beats by the SQL functions

    def note_sql_only(self, instance: Instance) -> None:
        """Record that the registry knows a live instance from the database alone."""
        if instance.instance_id in self._last_seen:
            self._sql_only[instance.instance_id] = instance.last_heartbeat

    def note_own_message(self, instance_id: str) -> None:
        """Record that an instance sent a message to the registry: it is not `sql_only`."""
        self._sql_only.pop(instance_id, None)

    def is_sql_only(self, instance_id: str) -> bool:
        """Whether the registry knows the instance from the database alone."""
        return instance_id in self._sql_only

    def quiet_sql_only(self, now_s: float, limit: int) -> list[str]:
        """Up to `limit` `sql_only` instances that are not fresh, the longest silent first."""
        quiet = [
            (self._last_seen[instance_id], instance_id)
            for instance_id in self._sql_only
            if self.terms.beats(now_s - self._last_seen[instance_id]) is not Beats.FRESH
        ]
        return [instance_id for _, instance_id in sorted(quiet)[:limit]]

    def note_sql_beat(self, instance_id: str, last_beat: datetime | None, now_s: float) -> None:
        """Compare an instance's last beat in the database with the one known before: if it is newer, the instance was
        seen now. Both times are the database's own."""
        known = self._sql_only.get(instance_id)
        if known is not None and last_beat is not None and last_beat > known:
            self._sql_only[instance_id] = last_beat
            self.see(instance_id, now_s)
