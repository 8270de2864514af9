"""Owns the faults of a history: which comes when, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from seedcore.core.changes import HoldChange
from seedcore.core.errors import RegistryError
from seedcore.core.holds import Hold
from seedcore.core.lifecycle import Status
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.store.memory import MemoryStore
from tests.faults.simulated.callers import Caller
from tests.faults.simulated.drains import BY_HAND
from tests.faults.simulated.fleet import Fleet
from tests.faults.simulated.losses import EVERY_S, Earlier
from tests.faults.simulated.registries import Office
from tests.faults.simulated.world import OPERATOR, World

_CALLERS_SHARE = 0.25


class Breakage:
    """Breaks the world, one thing after another. `new_office` starts a registry in a Ray cluster, `new_caller` a caller
    like another one."""

    def __init__(
        self,
        world: World,
        fleet: Fleet,
        operator: RegistryConnection,
        new_office: Callable[[str], Office],
        new_caller: Callable[[bool], Caller],
    ) -> None:
        self.world = world
        self._fleet = fleet
        self._operator = operator
        self._new_office = new_office
        self._new_caller = new_caller
        self._ray_cluster = "cluster-1"
        self._flips = 0

    def start_registry(self) -> None:
        self._new_office(self._ray_cluster)
        self.world.counts["offices"] += 1

    async def break_for_ever(self) -> None:
        world = self.world
        faults = [
            self._registry_dies,
            self._registry_hangs,
            self._rival_starts,
            self._two_start,
            self._cluster_is_replaced,
            self._database_goes,
            self._gcs_goes,
            self._clock_jumps,
            self._machine_pauses,
            self._relay_dies,
            self._node_dies,
            self._all_are_cut,
            self._one_is_cut,
            self._one_hangs,
            self._one_dies,
            self._a_hand_drains,
            self._epoch_flips,
            self._caller_dies,
        ]
        weights = [3, 2, 2, 0.5, 0.4, 3, 2, 1, 2, 2, 0.7, 2, 2, 2, 3, 1, 0.7, 0.5]
        while True:
            await asyncio.sleep(world.random.uniform(0.5, 8.0))
            await world.random.choices(faults, weights)[0]()

    async def keep_for_ever(self) -> None:
        """Remember earlier states of the database."""
        losses = self.world.losses
        while losses.happen:
            losses.keep()
            await asyncio.sleep(EVERY_S)

    async def lose_for_ever(self) -> None:
        """The database loses its last commits, or is restored to an earlier time; now and then the registry ends, too.
        Often it is away meanwhile."""
        world, losses = self.world, self.world.losses
        while losses.happen:
            await asyncio.sleep(losses.random.uniform(4.0, 25.0))
            earlier = await self._earlier()
            if earlier is None:
                continue
            office = world.office()
            fate = losses.random.choice(["lives", "lives", "ends before", "ends after"])
            if fate == "ends before" and office is not None:
                office.kill()
            if losses.random.random() < 0.5:
                world.database_back_s = max(world.database_back_s, world.now_s + losses.random.uniform(0.2, 5.0))
            losses.lose(earlier)
            if fate == "ends after" and office is not None and office.is_up:
                await asyncio.sleep(losses.random.uniform(0.0, 3.0))
                office.kill()
            if fate != "lives":
                world.loop.run_in("world", self._start_later(losses.random.uniform(0.1, 8.0)))

    async def _earlier(self) -> Earlier | None:
        """The state that a loss leaves: of a moment ago, a restored one, or the one before a flip that agents know."""
        losses, began_s = self.world.losses, self.world.now_s
        chance = losses.random.random()
        if chance < 0.4:
            return losses.some_earlier(0.0, 4.0)
        if chance < 0.7:
            return losses.some_earlier(10.0, 30.0)
        await self._epoch_flips()
        await asyncio.sleep(losses.random.uniform(0.5, 4.0))
        age_s = self.world.now_s - began_s
        return losses.some_earlier(age_s, age_s + 4.0)

    async def confirm_for_ever(self) -> None:
        """An operator confirms an epoch where a flip is lost, some time after the registry has asked for that."""
        world, losses = self.world, self.world.losses
        while losses.happen:
            await asyncio.sleep(1.0 if world.is_calm else losses.random.uniform(1.0, 12.0))
            office = world.office()
            lost = None if office is None else office.registry.members.shown.unconfirmed
            if office is None or lost is None:
                continue
            shown = office.registry.members.epoch
            names = [shown, lost.name] if not world.is_calm and losses.random.random() < 0.2 else [lost.name, shown]
            for name in names:
                with contextlib.suppress(RegistryError):
                    world.note(f"an operator confirms {name}")
                    await world.loop.run_in(OPERATOR, self._confirm(name))
                    world.counts["epochs confirmed"] += 1
                    break

    async def _confirm(self, name: str) -> None:
        await self._operator.set_current_epoch(name)

    def heal(self) -> None:
        """End all faults."""
        world = self.world
        world.is_calm = True
        world.database_back_s = world.gcs_back_s = world.all_cut_s = 0.0
        world.cut_s.clear()
        world.note("all faults end")
        office = world.office()
        for old in world.offices:
            if old.is_up and old is not office:
                old.kill()
        if office is None:
            self.start_registry()
        self._fleet.start_missing()

    # Registries

    async def _registry_dies(self) -> None:
        office = self.world.office()
        if office is not None:
            office.kill()
            self.world.loop.run_in("world", self._start_later(self.world.random.uniform(0.1, 12.0)))

    async def _start_later(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        if self.world.office() is None:
            self.start_registry()

    async def _registry_hangs(self) -> None:
        office, seconds = self.world.office(), self.world.random.uniform(0.5, 12.0)
        if office is not None:
            self.world.note(f"{office.name} hangs for {seconds:.1f} s")
            self.world.loop.freeze(office.name, seconds)

    async def _rival_starts(self) -> None:
        """Ray believes the registry dead and starts another; some processes still talk to the old one."""
        world = self.world
        old = world.office()
        if old is None:
            return
        components = [process.name for process in self._fleet.living()] + [caller.name for caller in world.callers]
        for component in components:
            if world.random.random() < 0.5:
                old.keeps[component] = world.now_s + world.random.uniform(0.2, 2.0)
        self.start_registry()
        world.loop.run_in("world", self._old_ends(old, world.random.uniform(0.5, 10.0)))

    async def _two_start(self) -> None:
        """Ray starts a registry, and then another one, while the database is away: either may join it last."""
        world, before = self.world, self.world.office()
        world.database_back_s = max(world.database_back_s, world.now_s + world.random.uniform(0.5, 5.0))
        world.note(f"two registries start, without the database until {world.database_back_s:.1f}")
        if before is not None:
            before.kill()
        self.start_registry()
        await self._rival_starts()

    async def _old_ends(self, old: Office, after_s: float) -> None:
        await asyncio.sleep(after_s)
        if old.is_up:
            old.kill()

    async def _cluster_is_replaced(self) -> None:
        world = self.world
        old = world.office()
        self._ray_cluster = f"cluster-{len(world.offices) + 1}"
        self.start_registry()
        if old is not None:
            world.loop.run_in("world", self._old_ends(old, world.random.uniform(0.5, 10.0)))

    async def _epoch_flips(self) -> None:
        """An operator stages an epoch, most times brings up its fleet, and shows it: the fleet before ends."""
        # one of its own: two fleets of one epoch would have actors of the same names
        self._flips += 1
        world, name = self.world, f"flip-{self._flips}"
        with contextlib.suppress(RegistryError):
            await self._operator.stage_epoch(name)
            if world.random.random() < 0.7:
                self._fleet.start_all(name)
                await asyncio.sleep(world.random.uniform(0.0, 3.0))
            world.note(f"the epoch is flipped to {name}")
            await self._operator.set_current_epoch(name)
            world.counts["flips"] += 1

    # What all depend on

    async def _database_goes(self) -> None:
        seconds = self.world.random.uniform(0.5, 20.0)
        self.world.note(f"the database is away for {seconds:.1f} s")
        self.world.database_back_s = self.world.now_s + seconds

    async def _gcs_goes(self) -> None:
        seconds = self.world.random.uniform(0.5, 15.0)
        self.world.note(f"the GCS is away for {seconds:.1f} s")
        self.world.gcs_back_s = self.world.now_s + seconds

    async def _clock_jumps(self) -> None:
        seconds = self.world.random.uniform(-60.0, 60.0)
        self.world.note(f"the clocks jump by {seconds:.1f} s")
        self.world.clock_offset_s += seconds

    async def _machine_pauses(self) -> None:
        seconds = self.world.random.uniform(0.5, 15.0)
        self.world.note(f"everything pauses for {seconds:.1f} s")
        self.world.loop.now_s += seconds

    async def _all_are_cut(self) -> None:
        seconds = self.world.random.uniform(0.5, 15.0)
        self.world.note(f"no process reaches the registry for {seconds:.1f} s")
        self.world.all_cut_s = self.world.now_s + seconds

    # Nodes, agents and callers

    async def _relay_dies(self) -> None:
        relays = [relay for relay in self.world.relays if relay.is_up]
        if relays:
            relay = self.world.random.choice(relays)
            self.world.note(f"{relay.name} is killed")
            relay.kill()

    async def _node_dies(self) -> None:
        world = self.world
        if not all(world.nodes.values()):
            return
        node_id = world.random.choice(list(world.nodes))
        world.nodes[node_id] = False
        world.note(f"node {node_id} dies")
        for relay in world.relays:
            if relay.node_id == node_id:
                relay.kill()
        for process in self._fleet.living():
            if process.node_id == node_id:
                self._fleet.kill_and_return(process)

    def _some_process(self, seconds: float) -> str | None:
        """An agent or a caller, which will not reach the registry for so long."""
        world, living = self.world, self._fleet.living()
        if world.random.random() < _CALLERS_SHARE:
            return world.random.choice(world.callers).name
        if not living:
            return None
        process = world.random.choice(living)
        process.troubles.append((world.now_s, world.now_s + seconds))
        return process.name

    async def _one_is_cut(self) -> None:
        seconds = self.world.random.uniform(0.5, 14.0)
        name = self._some_process(seconds)
        if name is not None:
            self.world.note(f"{name} is cut off for {seconds:.1f} s")
            self.world.cut_s[name] = self.world.now_s + seconds

    async def _one_hangs(self) -> None:
        seconds = self.world.random.uniform(0.5, 14.0)
        name = self._some_process(seconds)
        if name is not None:
            self.world.note(f"{name} hangs for {seconds:.1f} s")
            self.world.loop.freeze(name, seconds)

    async def _one_dies(self) -> None:
        living = self._fleet.living()
        if living:
            self._fleet.kill_and_return(self.world.random.choice(living))

    async def _caller_dies(self) -> None:
        caller = self.world.random.choice(self.world.callers)
        caller.kill()
        self._new_caller(caller.is_manager)

    async def _a_hand_drains(self) -> None:
        """An agent is held in SQL, past the registry; also one that drains by its own report."""
        world = self.world
        for process in self._fleet.living():
            instance_id = process.instance_id
            row = None if instance_id is None else world.tables.rows.get(instance_id)
            if row is None or row.status is Status.DEAD or process.held_by_hand is not None:
                continue
            hold = Hold(BY_HAND, "by hand", None, world.utc())
            await MemoryStore(world.utc, world.tables).hold_many([HoldChange(row.instance_id, hold.kind, hold)])
            process.held_by_hand = row.instance_id
            world.held_by_hand.add(row.instance_id)
            world.note(f"{process.name} is held by hand")
            return
