"""Owns the agents: their processes, each with a real reporter, and what they do by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from seedcore.core.errors import RegistryError, RetiredEpochError
from seedcore.core.lifecycle import Status
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.agent.identity import Identity
from seedcore.registry.agent.outages import Outages
from seedcore.registry.agent.reporter import Reporter
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.settings import Settings
from tests.faults.simulated.operators import Operators
from tests.faults.simulated.ray import SimDirectory
from tests.faults.simulated.world import BEAT_S, CALL_TIMEOUT_S, CALM_S, LEASE_S, NAMESPACE, NODES, OPERATOR, World

_SETTINGS = Settings.model_construct()


@dataclass
class Process:
    """An agent's process. `troubles`: when it could not reach the registry for reasons of its own, as (from, to)."""

    name: str
    logical_id: str
    node_id: str
    actor_id: str
    number: int
    reporter: Reporter | None = None
    instance_ids: list[str] = field(default_factory=list)
    ended_s: float | None = None
    troubles: list[tuple[float, float]] = field(default_factory=list)
    wanted: Status = Status.ALIVE
    is_ready: bool = True
    held_by_hand: str | None = None
    epoch: str | None = None
    is_retired: bool = False

    @property
    def actor_name(self) -> str:
        return self.logical_id if self.epoch is None else f"{self.logical_id}@{self.epoch}"

    @property
    def key(self) -> str:
        return f"process-{self.number}"

    @property
    def instance_id(self) -> str | None:
        return None if self.reporter is None else self.reporter.client.instance_id


class Fleet:
    """All agents."""

    def __init__(self, world: World, directory: SimDirectory, operators: Operators) -> None:
        self._world = world
        self._directory = directory
        self._operators = operators
        self._settings: Mapping[str, Settings] = {
            node: Settings.model_construct(
                **{**_SETTINGS.model_dump(), "node_id": node, "beat_interval_s": beat_s, "lease_s": LEASE_S}
            )
            # the environment of a node may ask for beats that come after the registry's lease
            for node, beat_s in zip(NODES, (BEAT_S, LEASE_S + BEAT_S), strict=True)
        }

    def living(self) -> list[Process]:
        return [one for one in self._world.processes if one.ended_s is None]

    def start_all(self, epoch: str | None = None) -> None:
        """Start an actor for each agent."""
        for number in range(self._world.agents):
            node_id = NODES[number % 2] if self._world.now_s == 0 else self.node()
            self.spawn(f"agent-{number}", node_id, self.new_actor(), epoch)

    def start_missing(self) -> None:
        """Start an actor for each agent that has none, or whose epoch has ended."""
        for number in range(self._world.agents):
            logical_id = f"agent-{number}"
            if not any(one.logical_id == logical_id and not one.is_retired for one in self.living()):
                self.spawn(logical_id, self.node(), self.new_actor())

    def new_actor(self) -> str:
        return f"{len(self._world.processes):032x}"

    def node(self) -> str:
        return "north" if self._world.nodes["north"] else "south"

    def spawn(self, logical_id: str, node_id: str, actor_id: str, epoch: str | None = None) -> None:
        world = self._world
        number = len(world.processes)
        process = Process(f"{logical_id}/{number}", logical_id, node_id, actor_id, number, epoch=epoch)
        world.processes.append(process)
        world.loop.run_in(process.name, self._begin(process))
        world.note(f"{process.name} starts on {node_id}")

    async def _begin(self, process: Process) -> None:
        world, settings = self._world, self._settings[process.node_id]

        async def identity(*_: object) -> Identity:
            ip, pid = "10.0.0.1", process.number + 1
            return Identity(process.actor_name, process.actor_id, NAMESPACE, process.node_id, ip, pid, process.key)

        def new_instance_id() -> str:
            process.instance_ids.append(str(uuid.UUID(int=world.random.getrandbits(128), version=4)))
            return process.instance_ids[-1]

        def retired(epoch: str) -> None:
            self._note_retired(process, epoch)

        client = RegistryClient(
            process.logical_id,
            process.actor_name,
            process.epoch,
            settings=settings,
            connection=RegistryConnection(
                NAMESPACE, CALL_TIMEOUT_S, by_relay=True, clock=world.clock, find=self._directory.find_actor
            ),
            identifier=identity,
            clock=world.clock,
            outages=Outages(clock=world.clock),
            new_id=new_instance_id,
        )
        process.reporter = Reporter(process.logical_id, settings=settings, client=client, on_retired=retired)
        try:
            await process.reporter.start()
        except RetiredEpochError as error:
            retired(error.epoch)
        except RegistryError:
            pass

    def _note_retired(self, process: Process, epoch: str) -> None:
        world = self._world
        process.is_retired = True
        goes_on = process.epoch is None and not world.is_retired(world.line_of(epoch))
        world.check(
            not goes_on or world.losses.are_recent, 11, f"{process.name} is retired, and its epoch {epoch} goes on"
        )
        world.note(f"{process.name} is retired")
        if world.random.random() < 0.7:
            world.loop.run_in("world", self._ended(process))

    async def _ended(self, process: Process) -> None:
        if process.ended_s is None:
            self.kill(process)

    def kill(self, process: Process) -> None:
        world = self._world
        process.ended_s = world.now_s
        world.loop.kill(process.name)
        world.note(f"{process.name} is killed")
        for relay in world.relays:
            if relay.is_up and relay.node_id == process.node_id and relay.watch_of_node is not None:
                relay.watch_of_node.ended(process.key)

    def kill_and_return(self, process: Process) -> None:
        self.kill(process)
        self._world.loop.run_in("world", self._return(process))

    async def _return(self, process: Process) -> None:
        """Ray restarts an actor, unless another one has its name by then."""
        world = self._world
        await asyncio.sleep(world.random.uniform(0.2, 3.0))
        if world.is_calm or any(one.actor_name == process.actor_name for one in self.living()):
            return
        node_id = process.node_id if world.nodes[process.node_id] else self.node()
        self.spawn(process.logical_id, node_id, process.actor_id, process.epoch)

    # What they do

    async def act_for_ever(self) -> None:
        """Agents drain, return, stop, die and come back."""
        world = self._world
        while True:
            await asyncio.sleep(world.random.uniform(0.2, 2.5))
            living = self.living()
            if not living:
                continue
            process = world.random.choice(living)
            chance = world.random.random()
            if process.reporter is None or not process.reporter.is_reporting:
                continue
            if chance < 0.75:
                wanted = Status.DRAINING if process.wanted is Status.ALIVE else Status.ALIVE
                process.wanted = wanted
                world.note(f"{process.name} reports {wanted}")
                world.loop.run_in(process.name, self._report(process.reporter, wanted))
                if world.random.random() < 0.3:
                    instance_id = process.reporter.client.instance_id
                    world.loop.run_in(OPERATOR, self._operators.act_some(instance_id))
            elif chance < 0.9:
                self.kill_and_return(process)

    async def change_endpoints_for_ever(self) -> None:
        """Agents move to other ports, in some histories."""
        world, chance = self._world, self._world.endpoints_random
        while world.changes_endpoints:
            await asyncio.sleep(chance.uniform(0.1, 2.0))
            reporters = [(one, one.reporter) for one in self.living() if one.reporter and one.reporter.is_reporting]
            if reporters:
                process, reporter = chance.choice(reporters)
                endpoints = {"http": f"http://10.0.0.1:{chance.randrange(1, 65_536)}"}
                world.note(f"{process.name} moves to {endpoints['http']}")
                world.counts["moves"] += 1
                world.loop.run_in(process.name, self._move(reporter, endpoints))

    async def _move(self, reporter: Reporter, endpoints: Mapping[str, str]) -> None:
        with contextlib.suppress(RegistryError):
            await reporter.set_endpoints(endpoints)

    async def flip_for_ever(self) -> None:
        """Agents become ready, and are not any more; some before they have started."""
        world = self._world
        # of its own: the other actions of a history stay what they are
        chance = random.Random(f"readiness of {world.seed}")
        while True:
            await asyncio.sleep(chance.uniform(0.2, 4.0))
            living = [one for one in self.living() if one.reporter is not None and not one.is_retired]
            if not living:
                continue
            process = chance.choice(living)
            process.is_ready = not process.is_ready
            world.note(f"{process.name} is {'' if process.is_ready else 'not '}ready")
            world.loop.run_in(process.name, self._report_readiness(process, process.is_ready))

    async def _report_readiness(self, process: Process, is_ready: bool) -> None:
        assert process.reporter is not None
        with contextlib.suppress(RegistryError):
            await process.reporter.set_ready(is_ready, None if is_ready else f"at {self._world.now_s:.3f}")

    async def report_again(self) -> None:
        """Once the last call of an operator has arrived, some holds are left for good and the others are released; the
        last change is the agent's."""
        world = self._world
        await asyncio.sleep(2 * CALL_TIMEOUT_S + 10.0)
        ends_s = world.now_s + CALM_S
        for process in self.living():
            instance_id = process.instance_id
            if process.reporter is None or instance_id is None or instance_id not in self._operators.touched:
                continue
            is_held = world.random.random() < 0.5
            await world.loop.run_in(OPERATOR, self._operators.settle(instance_id, is_held=is_held, until_s=ends_s))
            await world.loop.run_in(process.name, self._report(process.reporter, process.wanted))

    async def _report(self, reporter: Reporter, wanted: Status) -> None:
        with contextlib.suppress(RegistryError):
            report = reporter.drain if wanted is Status.DRAINING else reporter.undrain
            await report(f"reports {wanted}")
