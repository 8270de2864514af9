"""A process's way to the relay of its node: found when the registry names it, left for a while when it is silent."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import Any

from ray.exceptions import RayError, RayTaskError

from seedcore.core.answers import BeatAnswer
from seedcore.core.errors import (
    DirectoryUnavailableError,
    InvalidInputError,
    RegistryError,
    RegistryReplacedError,
    RegistryUnavailableError,
    SessionError,
    first_line,
)
from seedcore.core.timeouts import within
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.lookup import ActorHandle, find_actor

logger = logging.getLogger(__name__)

_REST_S = 5.0
_PATIENCE_S = 1.0


class RelayFinder:
    """The relay in use, if any. Safe to use from several event loops of a process."""

    def __init__(self, namespace: str, call_timeout_s: float) -> None:
        self._namespace = namespace
        self._call_timeout_s = call_timeout_s
        self._name: str | None = None
        self._patience_s = _PATIENCE_S
        self._rests_until_s = 0.0
        self._looking: asyncio.Task[None] | None = None
        self._relay: ActorHandle | None = None

    @property
    def relay(self) -> ActorHandle | None:
        """The relay to speak to now."""
        return self._relay if time.monotonic() >= self._rests_until_s else None

    def learn(self, answer: BeatAnswer) -> None:
        """Take what the registry says of the relay on this node; it is looked up in the background."""
        # a silent relay must not cost a beat so much time that its agent is late
        self._patience_s = min(_PATIENCE_S, answer.beat_interval_s / 4)
        if answer.relay == self._name:
            return
        self.forget()
        if answer.relay is not None:
            self._name = answer.relay
            self._looking = asyncio.create_task(self._look_up(answer.relay), name="relay-found")

    def forget(self) -> None:
        """Use none until another is named."""
        self._name, self._relay = None, None

    def reset(self) -> None:
        """In another Ray session: the relay in use, and that it was silent, are of the one before."""
        self.forget()
        self._rests_until_s = 0.0

    def _rest(self, error: RegistryUnavailableError) -> None:
        """It failed: speak to the registry itself for a while."""
        rest_s = _REST_S * random.uniform(0.5, 1.5)
        logger.info("the relay of this node is not used for %.1f s: %s", rest_s, error.why)
        self._rests_until_s = time.monotonic() + rest_s

    async def ask(self, method: str, *said: object) -> Any:
        """The relay's answer; None where there is no relay to speak to now, or it gives none, and then it rests.

        Raises what the registry raises through it.
        """
        relay = self.relay
        if relay is None:
            return None
        try:
            return await self._answer(relay, method, *said)
        except RegistryReplacedError:
            # said to another registry it may mean something else: the caller's to decide
            raise
        except RegistryUnavailableError as error:
            self._rest(error)
            return None

    async def _answer(self, relay: ActorHandle, method: str, *said: object) -> Any:
        """Within the bound of a call, while the relay itself answers: then the registry, or the database, takes its
        time."""
        asked = asyncio.ensure_future(session.ask(relay, method, *said))
        try:
            done, _ = await asyncio.wait({asked}, timeout=self._patience_s)
            if not done:
                await within(session.ask(relay, "__ray_ready__"), self._patience_s / 2)
            return await within(asked, self._call_timeout_s)
        except TimeoutError:
            raise RegistryUnavailableError("no answer from the relay") from None
        except RayTaskError as error:
            raise cause_of(error, method) from None
        except (RayError, SessionError) as error:
            raise RegistryUnavailableError(f"no relay: {first_line(error)}") from None
        finally:
            asked.cancel()

    async def _look_up(self, name: str) -> None:
        try:
            relay = await find_actor(name, self._namespace, self._call_timeout_s)
        except DirectoryUnavailableError as error:
            logger.debug("the relay is not found: %s", error)
        else:
            if self._name == name:
                self._relay = relay
        finally:
            # whatever kept us from it: the next answer names it again
            if self._name == name and self._relay is None:
                self._name = None


def cause_of(error: RayTaskError, method: str) -> RegistryError:
    """The registry's own error, out of what Ray wraps it in."""
    cause = error.cause
    if isinstance(cause, RegistryError):
        return cause
    if isinstance(cause, TypeError):
        return InvalidInputError(method, str(cause))
    return RegistryUnavailableError(f"{method} failed inside the actor: {cause!r}")
