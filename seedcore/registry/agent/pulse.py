"""An agent of the beat loop: the pace of its beats, and what the last one came to."""

from __future__ import annotations

import logging
from collections.abc import Callable

from seedcore.core.answers import BeatAnswer
from seedcore.core.backoff import Backoff
from seedcore.core.errors import (
    BacklogFullError,
    RegistrationDelayedError,
    RegistryError,
    RegistryUnavailableError,
    RetiredEpochError,
    VersionMismatchError,
)
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.ray_support.session import refuse_forked

logger = logging.getLogger(__name__)

_REFUSED_SLOWDOWN = 6.0
# the client itself paces what it waits for
_HEALS = (RegistryUnavailableError, VersionMismatchError, BacklogFullError, RegistrationDelayedError)


class Pulse:
    """Implements beat_loop.Beater for a RegistryClient."""

    def __init__(self, client: RegistryClient, on_retired: Callable[[RetiredEpochError], None]) -> None:
        """`on_retired` is called when a beat finds that the agent has ended with its epoch."""
        self.load: float | None = None
        """The load that its beats report."""
        self.problem: str | None = None
        """Why the last report did not arrive, or None."""
        self._client = client
        self._on_retired = on_retired
        self._outages = client.outages
        longest_s = client.beat_interval_s
        # the beat loop adds the jitter
        self._unanswered = Backoff(min(client.times.unanswered_first_s, longest_s), longest_s, jitter=0.0)
        self._unanswered_s = self._unanswered.next_s()
        self._slowdown = 1.0

    @property
    def instance_id(self) -> str:
        """This incarnation."""
        return self._client.instance_id

    @property
    def pause_s(self) -> float:
        """Seconds to its next beat: what the registry asked for, longer where it refuses the agent. Before its first
        answer a pause that grows, so that an agent whose registration was taken is in time."""
        interval_s = self._client.beat_interval_s if self._client.is_answered else self._unanswered_s
        return interval_s * self._slowdown

    @property
    def has_more_to_send(self) -> bool:
        """Whether its next beat has more to send than the beat."""
        return self._client.has_more_to_send

    async def beat_alone(self) -> None:
        """Beat, and send what is not durable yet."""
        try:
            refuse_forked()
            self.take_answer(await self._client.beat())
        except RetiredEpochError as error:
            self._on_retired(error)
        except RegistryError as error:
            self.take_failure(error)
        except Exception:
            logger.exception("a beat failed; the agent goes on", extra=fields_of(self._client))

    def take_answer(self, answer: BeatAnswer) -> None:
        """The lease is renewed."""
        self._client.note_terms(answer)
        self._slowdown = 1.0
        self._outages.refused.clear(self._client)
        if answer.is_fenced:
            self.problem = "a newer registry has taken the database over"
            self._outages.unreported.note(
                self._client, self.problem, fields_of(self._client), len(self._outages.reporting)
            )
        else:
            self.problem = None
            self._outages.unreported.clear(self._client)

    def take_failure(self, error: RegistryError) -> None:
        """The beat was not taken. What does not heal by waiting may be mended by an operator: try less often."""
        self._slowdown = 1.0 if isinstance(error, _HEALS) else _REFUSED_SLOWDOWN
        self._unanswered_s = self._unanswered.next_s()
        self.problem = str(error)
        if isinstance(error, _HEALS):
            self._outages.unreported.note(
                self._client, self.problem, fields_of(self._client), len(self._outages.reporting)
            )
        else:
            self._outages.refused.note(self._client, self.problem, fields_of(self._client))


def fields_of(client: RegistryClient) -> dict[str, str]:
    """The agent's fields of a log line."""
    return {"logical_id": client.logical_id, "instance_id": client.instance_id}
