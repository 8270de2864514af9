"""Changes and beats of many callers share messages, and each caller gets its own answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from seedcore.core.answers import BeatAnswer, KnownBefore, Receipt
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import RegisterChange, SequencedChange
from seedcore.core.errors import BacklogFullError, InstanceDeadError, RegistryError, RegistryUnavailableError
from seedcore.core.instances import Epoch
from seedcore.core.lifecycle import Status
from seedcore.registry.protocol.outbox import MAX_IN_FLIGHT, BeatBox, ChangeBox
from tests.builders import iid, joins
from tests.waiting import eventually


def registration(number: int) -> SequencedChange:
    return SequencedChange(joins(number, f"agent-{number}"), None)


class Registry:
    """Records the messages, and answers once `may_answer` is set."""

    def __init__(self) -> None:
        self.messages: list[list[str]] = []
        self.known: list[KnownBefore | None] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.dead: set[str] = set()
        self.error: Exception | None = None

    async def deliver(self, changes: Sequence[SequencedChange]) -> list[Receipt | RegistryError]:
        self.messages.append([change.change.instance_id for change in changes])
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return [self._answer(change) for change in changes]

    def _answer(self, change: SequencedChange) -> Receipt | RegistryError:
        instance_id = change.change.instance_id
        assert isinstance(change.change, RegisterChange)
        if instance_id in self.dead:
            return InstanceDeadError(instance_id, Cause(CauseKind.LEASE_EXPIRED))
        return Receipt(instance_id, Status.STARTING, change.change.seq, durable=True)

    async def beat_many(
        self, instance_ids: Sequence[str], loads: Mapping[str, float], known: KnownBefore | None
    ) -> BeatAnswer:
        self.known.append(known)
        self.messages.append([f"{instance_id[-1]}{loads.get(instance_id, '')}" for instance_id in instance_ids])
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return BeatAnswer(dead=tuple(instance_id for instance_id in instance_ids if instance_id in self.dead))


async def test_simultaneous_changes_share_a_message_and_each_gets_its_own_answer() -> None:
    registry = Registry()
    registry.dead.add(iid(2))
    box = ChangeBox(registry.deliver, 0.001)
    answers = await asyncio.gather(*(box.take(registration(number)) for number in (1, 2, 3)), return_exceptions=True)
    assert registry.messages == [[iid(1), iid(2), iid(3)]]
    assert [type(answer) for answer in answers] == [Receipt, InstanceDeadError, Receipt]
    assert [answer.instance_id for answer in answers if isinstance(answer, Receipt)] == [iid(1), iid(3)]


async def test_failed_message_fails_all_its_changes_and_the_next_message_is_sent() -> None:
    registry = Registry()
    registry.error = RegistryUnavailableError("away for the test")
    box = ChangeBox(registry.deliver, 0.001)
    answers = await asyncio.gather(*(box.take(registration(number)) for number in (1, 2)), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["the registry is away: away for the test"] * 2
    registry.error = None
    assert (await box.take(registration(3))).durable


async def test_changes_wait_while_the_maximum_of_messages_is_in_flight_and_then_share_one() -> None:
    registry = Registry()
    registry.may_answer.clear()
    box = ChangeBox(registry.deliver, 0.001)
    waiting = []
    for number in range(MAX_IN_FLIGHT):
        waiting.append(asyncio.create_task(box.take(registration(number))))
        await eventually(lambda: len(registry.messages) == len(waiting), every_s=0.001)
    waiting += [asyncio.create_task(box.take(registration(number))) for number in range(10, 60)]
    for _ in range(5):
        await asyncio.sleep(0.001)
    assert len(registry.messages) == MAX_IN_FLIGHT
    registry.may_answer.set()
    await asyncio.gather(*waiting)
    assert len(registry.messages) == MAX_IN_FLIGHT + 1
    assert registry.messages[-1] == [iid(number) for number in range(10, 60)]


async def test_changes_beyond_the_capacity_are_refused() -> None:
    registry = Registry()
    box = ChangeBox(registry.deliver, 0.001, capacity=2)
    answers = await asyncio.gather(*(box.take(registration(number)) for number in (1, 2, 3)), return_exceptions=True)
    assert isinstance(answers[2], BacklogFullError)
    assert registry.messages == [[iid(1), iid(2)]]


async def test_cancelled_caller_does_not_affect_the_answers_of_others() -> None:
    registry = Registry()
    registry.may_answer.clear()
    changes, beats = ChangeBox(registry.deliver, 0.001), BeatBox(registry.beat_many, 0.001)
    first, second = (asyncio.create_task(changes.take(registration(number))) for number in (1, 2))
    third, fourth = (asyncio.create_task(beats.renew([iid(number)])) for number in (3, 4))
    await eventually(lambda: len(registry.messages) == 2, every_s=0.001)
    first.cancel()
    third.cancel()
    registry.may_answer.set()
    assert (await second).instance_id == iid(2)
    assert await fourth == BeatAnswer()
    assert isinstance((await asyncio.gather(first, return_exceptions=True))[0], asyncio.CancelledError)


async def test_beats_within_the_linger_share_a_message_and_each_caller_gets_its_own_lost_instances() -> None:
    registry = Registry()
    registry.dead.add(iid(2))
    box = BeatBox(registry.beat_many, 0.01)
    answers = await asyncio.gather(box.renew([iid(1)], {iid(1): 0.5}), box.renew([iid(2), iid(3)]), box.renew([iid(1)]))
    assert registry.messages == [["10.5", "2", "3"]]
    assert [answer.dead for answer in answers] == [(), (iid(2),), ()]
    await box.renew([iid(1)], {iid(1): 0.5})
    assert registry.messages[-1] == ["10.5"]


async def test_what_senders_know_from_before_shares_the_message_of_their_beats() -> None:
    registry = Registry()
    box = BeatBox(registry.beat_many, 0.001, max_per_message=2)
    await asyncio.gather(
        box.renew([iid(1)], None, KnownBefore({iid(1): 4}, Epoch("green", 2))),
        box.renew([iid(2)]),
        box.renew([iid(3)], None, KnownBefore({iid(3): 7}, Epoch("teal", 3))),
    )
    teal = Epoch("teal", 3)
    assert registry.known == [KnownBefore({iid(1): 4}, teal), KnownBefore({iid(3): 7}, teal)]
    await box.renew([iid(1)])
    assert registry.known[-1] is None


async def test_beats_beyond_the_size_of_a_message_are_sent_in_several() -> None:
    registry = Registry()
    registry.dead |= {iid(1), iid(5)}
    box = BeatBox(registry.beat_many, 0.001, max_per_message=2)
    answer = await box.renew([iid(number) for number in range(1, 6)])
    assert registry.messages == [["1", "2"], ["3", "4"], ["5"]]
    assert answer.dead == (iid(1), iid(5))


async def test_failed_beats_fail_for_every_caller_and_beats_beyond_the_capacity_are_refused() -> None:
    registry = Registry()
    registry.error = RegistryUnavailableError("away for the test")
    box = BeatBox(registry.beat_many, 0.001, capacity=2)
    answers = await asyncio.gather(
        box.renew([iid(1)]), box.renew([iid(2)]), box.renew([iid(3)]), return_exceptions=True
    )
    assert [type(answer) for answer in answers] == [RegistryUnavailableError] * 2 + [BacklogFullError]
