"""The epoch whose instances a registry lists and resolves, and whether it is certain which one that is."""

from __future__ import annotations

from seedcore.core.feed import Feed
from seedcore.core.instances import Epoch

MAX_LOST_EPOCHS = 1_000_000
"""A number that is higher than the database's by more is not believed."""


class ShownEpoch:
    """Follows the database, and notices where agents or the registry know of a flip that it has lost. The feed starts
    over whenever what is shown changes. Use it from one event loop."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self.name = ""
        """As the database returned it last; empty before that: instances then count as current."""
        self.number = 0
        self._highest_known = 0
        self.unconfirmed: Epoch | None = None
        """An epoch that was known as current, with no lower number than the database's: a flip is lost."""

    @property
    def known(self) -> Epoch:
        """As the database returned it last."""
        return Epoch(self.name, self.number)

    @property
    def confirmed(self) -> Epoch | None:
        """The same; None while an operator must confirm which is current."""
        return self.known if self.unconfirmed is None else None

    @property
    def above(self) -> int:
        """The next flip gets a higher number: one is known that the database has lost. 0 where none is."""
        is_lost = self.unconfirmed is not None or self._highest_known > self.number
        return self._highest_known if is_lost else 0

    @property
    def listed(self) -> str:
        """The epoch whose instances are listed and resolved: none while an operator must confirm which is current."""
        return self.name if self.unconfirmed is None else ""

    def note_known_before(self, epoch: Epoch) -> None:
        """Note an epoch that agents knew as current before this registry answered them, or the registry itself before
        it read the database again."""
        if epoch.number > self.number + MAX_LOST_EPOCHS:
            # of no database that this registry has written to
            return
        self._highest_known = max(self._highest_known, epoch.number)
        lost = self.unconfirmed
        # two epochs with one number: the one that is known is lost, and another got its number
        is_lost = epoch.number >= self.number if lost is None else epoch.number > lost.number
        if is_lost and epoch.name != self.name:
            self.unconfirmed = epoch
            self._feed.start_over(self.listed)

    def set(self, name: str, number: int, *, is_reset: bool) -> None:
        """Show another epoch in one step, if that has a higher number, or `is_reset`: an answer that was under way
        during a flip may arrive after it."""
        if number < self.number and not is_reset:
            return
        before = self.name, self.listed
        self.name, self.number = name, number
        lost = self.unconfirmed
        if lost is not None and (number > lost.number or name == lost.name):
            self.unconfirmed = None
        if before != (self.name, self.listed):
            self._feed.start_over(self.listed)
