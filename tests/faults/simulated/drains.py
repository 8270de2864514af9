"""Owns the drains of Ray's nodes: when they begin and end, what the GCS reports of them, and law 19."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from seedcore.core.holds import HoldKind

if TYPE_CHECKING:
    from tests.faults.simulated.callers import Caller
    from tests.faults.simulated.world import World

BY_HAND = HoldKind.PROCESS
"""The kind of the holds that are placed in SQL, past the registry: one that nothing else of a history places."""
BOUND_S = 3.0
"""So long after the begin of a drain no caller gets an instance of the node, where all is quiet otherwise: a look at
Ray's tables (1.1 s), the holds in steps of the smallest backlog, and the feed."""
_FORGETS_S = 1.5


class Drains:
    """All drains. Those of a seed have a chance of their own: other histories stay as they are."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self.random = random.Random(f"drains {seed}")
        self.happen = self.random.random() < 0.4
        self._draining: dict[str, datetime | None] = {}
        self._forgets_s = 0.0

    def is_draining(self, node_id: str) -> bool:
        return node_id in self._draining and self._world.nodes[node_id]

    def reported(self) -> Mapping[str, datetime | None]:
        """What the GCS reports. After a restart it knows of no drain until the nodes have reported to it again."""
        world = self._world
        if max(self._forgets_s, world.gcs_back_s + _FORGETS_S) > world.now_s:
            return {}
        return {node_id: end for node_id, end in self._draining.items() if world.nodes[node_id]}

    def begin(self, node_id: str) -> None:
        world = self._world
        end = None if self.random.random() < 0.3 else world.utc() + timedelta(seconds=self.random.uniform(1.0, 60.0))
        self._draining[node_id] = end
        world.note(f"node {node_id} is being drained")
        world.counts["drains of nodes"] += 1

    def end(self, node_id: str) -> None:
        del self._draining[node_id]
        self._world.note(f"node {node_id} is drained no longer")

    def forget(self) -> None:
        """The GCS restarts."""
        self._forgets_s = self._world.now_s + _FORGETS_S

    async def drain_for_ever(self) -> None:
        """Drains begin, get another deadline, and end."""
        while self.happen:
            await asyncio.sleep(self.random.uniform(1.0, 15.0))
            node_id = self.random.choice(list(self._world.nodes))
            if self.is_draining(node_id) and self.random.random() < 0.6:
                self.end(node_id)
            else:
                self.begin(node_id)

    # Law 19

    async def check_left(self, caller: Caller, node_id: str) -> None:
        """No source that the caller has names an instance of the node."""
        for number in range(self._world.agents):
            found = await caller.resolved(f"agent-{number}")
            is_left = found is None or found.node_id != node_id
            self._world.check(is_left, 19, f"{caller.name} got {found}, whose node is being drained")

    def check_held(self, node_id: str) -> None:
        """Every instance of the node that the registry has is held."""
        office = self._world.office()
        assert office is not None
        for row in office.registry.members:
            is_held = row.node_id != node_id or row.hold(HoldKind.NODE) is not None
            self._world.check(is_held, 19, f"{office.name} has {row}, whose node is being drained")
