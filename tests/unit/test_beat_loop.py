"""One loop beats for all agents of a process; an agent with more to send beats alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest

from seedcore.core.answers import BeatAnswer
from seedcore.core.errors import RegistryError, RegistryUnavailableError
from seedcore.registry.agent.beat_loop import BeatLoop
from tests.builders import iid
from tests.waiting import eventually

INTERVAL_S = 0.02


class Registry:
    """Counts messages and the ids in them."""

    def __init__(self) -> None:
        self.messages: list[dict[str, float | None]] = []
        self.dead: set[str] = set()
        self.error: Exception | None = None
        self.interval_s = INTERVAL_S

    async def beat_many(self, instance_ids: Sequence[str], loads: Mapping[str, float]) -> BeatAnswer:
        self.messages.append({instance_id: loads.get(instance_id) for instance_id in instance_ids})
        if self.error is not None:
            raise self.error
        lost = tuple(instance_id for instance_id in instance_ids if instance_id in self.dead)
        return BeatAnswer(dead=lost, beat_interval_s=self.interval_s)

    def beats_of(self, instance_id: str) -> int:
        return sum(instance_id in message for message in self.messages)


class Agent:
    """Notes the calls of the loop."""

    def __init__(self, number: int, load: float | None = None) -> None:
        self.instance_id = iid(number)
        self.pause_s = INTERVAL_S
        self.load = load
        self.has_more_to_send = False
        self.alone = 0
        self.is_cancelled = False
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.answers: list[BeatAnswer] = []
        self.failures: list[RegistryError] = []

    async def beat_alone(self) -> None:
        self.alone += 1
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise
        self.has_more_to_send = False

    def take_answer(self, answer: BeatAnswer) -> None:
        self.answers.append(answer)
        self.pause_s = answer.beat_interval_s

    def take_failure(self, error: RegistryError) -> None:
        self.failures.append(error)


class Joined(BeatLoop):
    """A loop that knows at the end of a test what has joined it."""

    def __init__(self, connection: Any) -> None:
        super().__init__(connection)
        self.joined: list[Any] = []

    def join(self, beater: Any) -> None:
        self.joined.append(beater)
        super().join(beater)


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
async def beats(registry: Registry) -> AsyncIterator[BeatLoop]:
    connection: Any = registry
    loop = Joined(connection)
    yield loop
    for beater in loop.joined:
        loop.leave(beater)


async def test_agents_that_are_due_together_share_a_message(beats: BeatLoop, registry: Registry) -> None:
    agents = [Agent(number, load=number / 2 if number % 2 else None) for number in range(200)]
    for agent in agents:
        agent.pause_s = 0.2
        beats.join(agent)
    registry.interval_s = 0.2
    await eventually(lambda: all(len(agent.answers) >= 3 for agent in agents), every_s=0.001)
    # 600 beats, spread over a tenth of the interval to each side, a twentieth at a time
    assert len(registry.messages) < 60
    reported = {instance_id: load for message in registry.messages for instance_id, load in message.items()}
    assert (reported[iid(1)], reported[iid(2)]) == (0.5, None)


async def test_the_answer_sets_the_pace(beats: BeatLoop, registry: Registry) -> None:
    quick, slow = Agent(1), Agent(2)
    beats.join(quick)
    await eventually(lambda: len(quick.answers) >= 2, every_s=0.001)
    registry.interval_s = 60.0
    beats.join(slow)
    await eventually(lambda: slow.answers, every_s=0.001)
    before = registry.beats_of(slow.instance_id)
    await asyncio.sleep(5 * INTERVAL_S)
    assert registry.beats_of(slow.instance_id) == before == 1


async def test_agent_with_more_to_send_beats_alone_and_delays_no_other(beats: BeatLoop, registry: Registry) -> None:
    talker, other = Agent(1), Agent(2)
    talker.has_more_to_send = True
    talker.may_end.clear()
    beats.join(talker)
    beats.join(other)
    await eventually(lambda: len(other.answers) >= 3, every_s=0.001)
    assert (talker.alone, talker.answers) == (1, [])
    talker.may_end.set()
    await eventually(lambda: talker.answers, every_s=0.001)


async def test_agent_that_lost_its_lease_beats_alone_at_once(beats: BeatLoop, registry: Registry) -> None:
    lost, other = Agent(1), Agent(2)
    registry.dead.add(lost.instance_id)
    beats.join(lost)
    beats.join(other)
    await eventually(lambda: lost.alone, every_s=0.001)
    assert lost.answers == []
    lost.instance_id = iid(3)
    await eventually(lambda: lost.answers, every_s=0.001)


async def test_failure_reaches_all_agents_and_they_go_on(beats: BeatLoop, registry: Registry) -> None:
    agents = [Agent(number) for number in (1, 2)]
    registry.error = RegistryUnavailableError("away for the test")
    for agent in agents:
        beats.join(agent)
    await eventually(lambda: all(agent.failures for agent in agents), every_s=0.001)
    registry.error = ValueError("a fault of ours")
    sent = len(registry.messages)
    await eventually(lambda: len(registry.messages) > sent + 2, every_s=0.001)
    registry.error = None
    await eventually(lambda: all(agent.answers for agent in agents), every_s=0.001)


async def test_agent_that_leaves_beats_no_more_and_its_call_ends(beats: BeatLoop, registry: Registry) -> None:
    agent, talker = Agent(1), Agent(2)
    talker.has_more_to_send = True
    talker.may_end.clear()
    beats.join(agent)
    beats.join(talker)
    await eventually(lambda: agent.answers and talker.alone, every_s=0.001)
    beats.leave(agent)
    assert (beats.is_running, agent in beats, talker in beats) == (True, False, True)
    beats.leave(talker)
    await eventually(lambda: talker.is_cancelled, every_s=0.001)
    before = registry.beats_of(agent.instance_id)
    # none is left: the loop ends, and begins again for the next one
    assert not beats.is_running
    await asyncio.sleep(3 * INTERVAL_S)
    assert registry.beats_of(agent.instance_id) == before
    beats.join(agent)
    beats.leave(agent)
    beats.join(agent)
    await eventually(lambda: registry.beats_of(agent.instance_id) >= before + 3, every_s=0.001)
    assert beats.planned <= 2
