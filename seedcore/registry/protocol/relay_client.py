"""A process's way to the relay of its node: found when the registry names it, left alone for a while when silent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError, RayTaskError

from seedcore.core.answers import BeatAnswer
from seedcore.core.backoff import Backoff
from seedcore.core.clock import Clock
from seedcore.core.errors import (
    DirectoryUnavailableError,
    InvalidInputError,
    RegistryError,
    RegistryReplacedError,
    RegistryUnavailableError,
    SessionError,
    first_line,
)
from seedcore.core.timeouts import end, within
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.lookup import ActorHandle, find_actor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RelayTimes:
    """Seconds. `patience_s`: how long a relay may be silent in one call, at most. `rest_s` and `longest_rest_s`: how
    long a relay that failed is not used, the first time and at most."""

    patience_s: float = 1.0
    rest_s: float = 7.5
    longest_rest_s: float = 60.0


class RelayFinder:
    """The relay in use, if any. Safe to use from several event loops of a process."""

    def __init__(
        self,
        namespace: str,
        call_timeout_s: float,
        clock: Clock | None = None,
        times: RelayTimes | None = None,
        find: Callable[[str, str, float], Awaitable[ActorHandle | None]] = find_actor,
    ) -> None:
        self._namespace = namespace
        self._call_timeout_s = call_timeout_s
        self._clock = clock if clock is not None else Clock()
        self._times = times if times is not None else RelayTimes()
        self._find = find
        self._rests = Backoff(self._times.rest_s, self._times.longest_rest_s, jitter=2 / 3)
        self._name: str | None = None
        self._patience_s = self._times.patience_s
        self._rests_until_s = 0.0
        self._looking: asyncio.Task[None] | None = None
        self._relay: ActorHandle | None = None

    @property
    def relay(self) -> ActorHandle | None:
        """The relay to call now."""
        return self._relay if self._clock.monotonic() >= self._rests_until_s else None

    def learn(self, answer: BeatAnswer) -> None:
        """Note the relay that the registry names for this node; it is looked up in the background."""
        # a silent relay must not delay a beat so much that its agent is late
        self._patience_s = min(self._times.patience_s, answer.beat_interval_s / 4)
        self._use(answer.relay)

    async def use(self, name: str) -> None:
        """Use the relay of this name from now on; it is looked up before this returns."""
        self._use(name)
        looking = self._looking
        if looking is not None and looking.get_loop() is asyncio.get_running_loop():
            await asyncio.wait({looking}, timeout=self._patience_s)

    def _use(self, name: str | None) -> None:
        if name == self._name:
            return
        self.forget()
        if name is not None:
            self._name = name
            self._looking = asyncio.create_task(self._look_up(name), name="relay-found")

    def forget(self) -> None:
        """Use none until another is named."""
        self._name, self._relay = None, None

    def reset(self) -> None:
        """Start over, in another Ray session: the relay in use and its silence are of the one before."""
        self.forget()
        self._rests.reset()
        self._rests_until_s = 0.0

    async def close(self) -> None:
        """End the look-up."""
        await end(self._looking)

    def _rest(self, error: RegistryUnavailableError) -> None:
        """It failed: call the registry itself for a while."""
        rest_s = self._rests.next_s()
        logger.info("the relay of this node is not used for %.1f s: %s", rest_s, error.why)
        self._rests_until_s = self._clock.monotonic() + rest_s

    async def ask(
        self, method: str, *args: object, is_last: bool = False, waits_s: float = 0.0, **kwargs: object
    ) -> Any:
        """The relay's answer; None where there is no relay to call now, or it gives no answer, and then it rests.
        `is_last`: there is no other way to the registry, so that a relay that rests is called too. `waits_s`: so many
        seconds the relay may wait before it answers.

        Raises what the registry raises through it.
        """
        relay = self._relay if is_last else self.relay
        if relay is None:
            return None
        try:
            answer = await self._answer(relay, method, waits_s, *args, **kwargs)
        except RegistryReplacedError:
            # the caller decides: sent to another registry it may mean something else
            raise
        except RegistryUnavailableError as error:
            self._rest(error)
            return None
        self._rests.reset()
        self._rests_until_s = 0.0
        return answer

    async def _answer(self, relay: ActorHandle, method: str, waits_s: float, *args: object, **kwargs: object) -> Any:
        """Within the bound of a call, while the relay itself answers: then the registry or the database is slow."""
        asked = asyncio.ensure_future(session.ask(relay, method, *args, **kwargs))
        try:
            done, _ = await asyncio.wait({asked}, timeout=waits_s + self._patience_s)
            if not done:
                await within(session.ask(relay, "__ray_ready__"), self._patience_s / 2)
            return await within(asked, self._call_timeout_s)
        except TimeoutError:
            raise RegistryUnavailableError("no answer from the relay") from None
        except RayTaskError as error:
            raise cause_of(error, method) from None
        except (RayError, SessionError, AttributeError, TypeError) as error:
            # the last two: it is of another version
            raise RegistryUnavailableError(f"no relay: {first_line(error)}") from None
        finally:
            asked.cancel()

    async def _look_up(self, name: str) -> None:
        try:
            relay = await self._find(name, self._namespace, self._call_timeout_s)
        except DirectoryUnavailableError as error:
            logger.debug("the relay is not found: %s", error)
        else:
            if self._name == name:
                self._relay = relay
        finally:
            # for any failure: the next answer names it again
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
