"""Batches the changes and beats of many callers into few messages.

A `ChangeBox` collects the changes of a process's agents, and in the relay those of its node. A `BeatBox` collects beats
in the relay. They guarantee nothing: each caller waits for its own answer, and retries without one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple
from weakref import WeakKeyDictionary

from seedcore.core.answers import BeatAnswer, KnownBefore, Receipt
from seedcore.core.changes import SequencedChange
from seedcore.core.errors import BacklogFullError, RegistryError

MAX_CHANGES_PER_MESSAGE = 1000
MAX_BEATS_PER_MESSAGE = 10_000
CAPACITY = 100_000
MAX_IN_FLIGHT = 4

Answered = Receipt | RegistryError
SendChanges = Callable[[Sequence[SequencedChange]], Awaitable[Sequence[Answered]]]
SendBeats = Callable[[Sequence[str], Mapping[str, float], KnownBefore | None], Awaitable[BeatAnswer]]


class ChangeBox:
    """Batches changes. Each change gets its own receipt or error. Use it from one event loop."""

    def __init__(
        self,
        send: SendChanges,
        linger_s: float,
        *,
        capacity: int = CAPACITY,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        """`send` returns the answers in the order of the changes. If it raises, every caller of the message gets the
        error. A message leaves at once where none is under way, else `linger_s` seconds after its first change.
        `capacity` changes may wait, and `max_in_flight` messages may be under way."""
        self._send = send
        self._linger_s = linger_s
        self._capacity = capacity
        self._max_in_flight = max_in_flight
        self._waiting: deque[_Parcel] = deque()
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None
        self._sending: set[asyncio.Task[None]] = set()

    async def take(self, change: SequencedChange) -> Receipt:
        """Send a change and return its receipt. Raises the registry's error, or BacklogFullError if the box is full."""
        (answer,) = await self.take_all([change])
        if isinstance(answer, RegistryError):
            raise answer
        return answer

    async def take_all(self, changes: Sequence[SequencedChange]) -> Sequence[Answered]:
        """Send changes in one message, at most MAX_CHANGES_PER_MESSAGE, and return their answers. Raises what `send`
        raises, or BacklogFullError if the box is full."""
        if self._size + len(changes) > self._capacity:
            raise BacklogFullError(self._capacity)
        parcel = _Parcel(changes, asyncio.get_running_loop().create_future())
        self._waiting.append(parcel)
        self._size += len(changes)
        self._plan()
        return await parcel.answers

    def _plan(self) -> None:
        if self._timer is None and self._waiting and len(self._sending) < self._max_in_flight:
            linger_s = self._linger_s if self._sending else 0.0
            self._timer = asyncio.get_running_loop().call_later(linger_s, self._flush)

    def _flush(self) -> None:
        self._timer = None
        message = [self._waiting.popleft()]
        room = MAX_CHANGES_PER_MESSAGE - len(message[0].changes)
        while self._waiting and (room := room - len(self._waiting[0].changes)) >= 0:
            message.append(self._waiting.popleft())
        self._size -= sum(len(parcel.changes) for parcel in message)
        task = asyncio.create_task(self._deliver(message), name="changes-sent")
        self._sending.add(task)
        task.add_done_callback(self._sent)
        self._plan()

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        self._plan()

    async def _deliver(self, message: Sequence[_Parcel]) -> None:
        try:
            answers = iter(await self._send([change for parcel in message for change in parcel.changes]))
        except BaseException as error:
            for parcel in message:
                parcel.fail(error)
            if not isinstance(error, Exception):
                raise
        else:
            for parcel in message:
                parcel.settle(list(islice(answers, len(parcel.changes))))


@dataclass(frozen=True, slots=True)
class _Parcel:
    """The changes of one caller, who waits for their answers."""

    changes: Sequence[SequencedChange]
    answers: asyncio.Future[Sequence[Answered]]

    def settle(self, answers: Sequence[Answered]) -> None:
        if not self.answers.done():
            self.answers.set_result(answers)

    def fail(self, error: BaseException) -> None:
        if self.answers.done():
            return
        if isinstance(error, asyncio.CancelledError):
            self.answers.cancel()
        else:
            self.answers.set_exception(error)


class BeatBox:
    """Batches beats: all beats within `linger_s` seconds share a message. Use it from one event loop."""

    def __init__(
        self,
        send: SendBeats,
        linger_s: float,
        *,
        capacity: int = CAPACITY,
        max_per_message: int = MAX_BEATS_PER_MESSAGE,
    ) -> None:
        """`send` receives at most `max_per_message` ids, the loads of some of them, and what their senders know from
        before. `capacity` beats may wait."""
        self._send = send
        self._linger_s = linger_s
        self._capacity = capacity
        self._max_per_message = max_per_message
        self._beats: dict[str, float | None] = {}
        self._known: KnownBefore | None = None
        self._round: asyncio.Task[BeatAnswer] | None = None

    async def renew(
        self, instance_ids: Sequence[str], loads: Mapping[str, float] | None = None, known: KnownBefore | None = None
    ) -> BeatAnswer:
        """Send beats and return the answer, without the lost instances of other callers. Raises the error of the
        message, or BacklogFullError if the box is full."""
        if len(self._beats) + len(instance_ids) > self._capacity:
            raise BacklogFullError(self._capacity)
        for instance_id in instance_ids:
            self._beats.setdefault(instance_id)
        if loads:
            self._beats.update(loads)
        if known is not None:
            self._known = known if self._known is None else self._known.joined(known)
        if self._round is None:
            self._round = asyncio.create_task(self._deliver(), name="beats-sent")
            self._round.add_done_callback(_note_read)
        # the cancellation of one caller must not cancel the message of the others
        return _answer_for(instance_ids, await asyncio.shield(self._round))

    async def _deliver(self) -> BeatAnswer:
        await asyncio.sleep(self._linger_s)
        self._round = None
        beats, self._beats = self._beats, {}
        known, self._known = self._known, None
        waiting = iter(beats.items())
        answer = await self._send_some(dict(islice(waiting, self._max_per_message)), known)
        while more := dict(islice(waiting, self._max_per_message)):
            answer = answer.joined(await self._send_some(more, known))
        return answer

    async def _send_some(self, beats: Mapping[str, float | None], known: KnownBefore | None) -> BeatAnswer:
        if known is not None:
            known = replace(known, seqs={beat: seq for beat, seq in known.seqs.items() if beat in beats})
        return await self._send(list(beats), {beat: load for beat, load in beats.items() if load is not None}, known)


class Boxes(NamedTuple):
    """What one event loop sends to the registry."""

    changes: ChangeBox
    beats: BeatBox


class Outbox:
    """The boxes of each event loop of a process."""

    def __init__(self, deliver: SendChanges, beat_many: SendBeats, linger_s: float) -> None:
        """See ChangeBox and BeatBox."""
        self._deliver = deliver
        self._beat_many = beat_many
        self._linger_s = linger_s
        self._boxes: WeakKeyDictionary[asyncio.AbstractEventLoop, Boxes] = WeakKeyDictionary()

    def here(self) -> Boxes:
        """Those of this event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._boxes:
            changes, beats = ChangeBox(self._deliver, self._linger_s), BeatBox(self._beat_many, self._linger_s)
            self._boxes[loop] = Boxes(changes, beats)
        return self._boxes[loop]


def _note_read(ended: asyncio.Task[BeatAnswer]) -> None:
    # retrieve the error: all callers may have been cancelled
    if not ended.cancelled():
        ended.exception()


def _answer_for(instance_ids: Sequence[str], answer: BeatAnswer) -> BeatAnswer:
    if not answer.unknown and not answer.dead and not answer.behind:
        return answer
    return answer.about(set(instance_ids))
