"""Owns the order of a history: a fleet at work under faults, then none, until everything has settled and stays so."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence

from seedcore.registry.protocol.connection import RegistryConnection
from tests.faults.simulated.breakage import Breakage
from tests.faults.simulated.caller_laws import CallerLaws
from tests.faults.simulated.callers import Caller
from tests.faults.simulated.drains import BOUND_S
from tests.faults.simulated.fleet import Fleet
from tests.faults.simulated.laws import Laws
from tests.faults.simulated.operators import Operators
from tests.faults.simulated.ray import SimDirectory, joined
from tests.faults.simulated.registries import Office
from tests.faults.simulated.world import (
    BEAT_S,
    CALL_TIMEOUT_S,
    CALM_S,
    FAULTS_S,
    FREEZE_MAX_S,
    LEASE_S,
    NAMESPACE,
    Violation,
    World,
)


class History:
    """One run of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.world = world = World(seed)
        directory = SimDirectory(world)
        operator = RegistryConnection(NAMESPACE, CALL_TIMEOUT_S, clock=world.clock, find=directory.find_actor)
        self._operators = Operators(world, operator)
        self._laws = laws = Laws(world, self._operators)
        self._caller_laws = caller_laws = CallerLaws(world)
        self._fleet = Fleet(world, directory, self._operators)

        def new_office(ray_cluster: str) -> Office:
            return Office(world, directory, laws, caller_laws, ray_cluster)

        def new_caller(is_manager: bool) -> Caller:
            return Caller(world, directory, caller_laws, is_manager=is_manager)

        self._new_caller = new_caller
        self._breakage = Breakage(world, self._fleet, operator, new_office, new_caller)

    def run(self) -> None:
        """Raises Violation, with what had happened."""
        loop = self.world.loop
        asyncio.set_event_loop(loop)
        random.seed(self.seed)
        try:
            with joined():
                loop.run_until_complete(self._live())
        except Violation as error:
            raise Violation(f"seed {self.seed}: {error}") from error
        finally:
            loop.close()
            asyncio.set_event_loop(None)

    async def _live(self) -> None:
        world = self.world
        self._breakage.start_registry()
        self._fleet.start_all()
        for is_manager in (True, False):
            self._new_caller(is_manager)
        watched: list[asyncio.Task[None]] = [
            world.loop.run_in("world", self._fleet.act_for_ever()),
            *([world.loop.run_in("world", self._fleet.change_endpoints_for_ever())] if world.changes_endpoints else []),
            world.loop.run_in("world", self._fleet.flip_for_ever()),
            world.loop.run_in("world", self._breakage.break_for_ever()),
            world.loop.run_in("world", self._breakage.lose_for_ever()),
            world.loop.run_in("world", self._breakage.keep_for_ever()),
            world.loop.run_in("world", world.drains.drain_for_ever()),
        ]
        world.loop.run_in("world", self._breakage.confirm_for_ever())
        await self._until(lambda: world.now_s >= FAULTS_S, watched)
        for task in watched:
            task.cancel()
        await asyncio.gather(*watched, return_exceptions=True)
        self._breakage.heal()
        await self._fleet.report_again()
        # who hangs still hangs
        hanging_s = max((to for one in world.processes for _, to in one.troubles), default=0.0)
        await asyncio.sleep(max(0.0, hanging_s - world.now_s) + BEAT_S)
        await self._settle()
        # and stays so
        await asyncio.sleep(LEASE_S + 2)
        why = self._laws.unsettled() or self._caller_laws.unsettled()
        world.check(why is None, 17 if world.losses.count else 7, f"it did not last: {why}")
        for caller in world.callers:
            await world.loop.run_in(caller.name, self._caller_laws.check_answers(caller))
        if world.drains.happen:
            await self._drain_at_the_end()
        self._laws.check_deaths()
        self._laws.check_history()
        self._raise_violation()

    async def _drain_at_the_end(self) -> None:
        """Law 19: a node is drained while all is quiet otherwise, and the GCS restarts."""
        world, drains = self.world, self.world.drains
        node_id = drains.random.choice([node_id for node_id, is_alive in world.nodes.items() if is_alive])
        drains.begin(node_id)
        await asyncio.sleep(BOUND_S)
        for caller in world.callers:
            await world.loop.run_in(caller.name, drains.check_left(caller, node_id))
        await self._settle()
        drains.forget()
        for _ in range(6):
            await asyncio.sleep(0.5)
            drains.check_held(node_id)
        if drains.random.random() < 0.5:
            drains.end(node_id)
        await self._settle()

    async def _settle(self) -> None:
        world = self.world
        began_s = thawed_s = world.now_s
        while (why := self._laws.unsettled()) is not None or (cache := self._caller_laws.unsettled()) is not None:
            office = world.office()
            # an actor that lives, and whose process has ended, keeps its silent instance until the freeze ends
            if office is not None and office.registry.expiry.is_frozen:
                thawed_s = min(world.now_s, began_s + FREEZE_MAX_S)
            if world.now_s - thawed_s > CALM_S:
                settled = 17 if world.losses.count else 7
                law = 9 if why is None else 6 if "ended" in why or "cause" in why else settled
                raise Violation(
                    f"law {law}: after {world.now_s - began_s:.0f} s of calm: {cache if why is None else why}"
                )
            await asyncio.sleep(0.5)
            self._raise_violation()

    def _raise_violation(self) -> None:
        if self.world.violation is not None:
            raise self.world.violation

    async def _until(self, is_over: Callable[[], bool], watched: Sequence[asyncio.Task[None]]) -> None:
        while not is_over():
            await asyncio.sleep(0.25)
            self._raise_violation()
            self.world.losses.look()
            self._laws.check_history()
            self._laws.check_memory()
            for task in watched:
                if task.done():
                    task.result()


def run_seed(seed: int) -> tuple[int, str | None, Counter[str], list[str]]:
    """One history: its violation, or None, with what happened."""
    logging.disable(logging.CRITICAL)
    # when the garbage collector runs depends on every object of the process, and what it ends changes the history
    gc.disable()
    history = History(seed)
    try:
        history.run()
    except Violation as error:
        return seed, str(error), history.world.counts, history.world.log
    return seed, None, history.world.counts, history.world.log
