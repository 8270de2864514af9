"""Fills a registry with instances of the largest metadata until it refuses, and measures the memory of its process.

`python -m tests.faults.filling --mib 1024 --shape text` prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pickle
from typing import Any

import psutil

from seedcore.core.answers import Receipt
from seedcore.core.changes import RegisterChange, Registration, SequencedChange, StatusChange
from seedcore.core.errors import RegistryFullError
from seedcore.core.lifecycle import Status
from seedcore.core.memory_bound import MIB
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.registry import Registry
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import START, iid
from tests.faults.stage import NoWitness
from tests.waiting import eventually

SHAPES: dict[str, Any] = {
    "text": {"text": "x" * 16_360},
    "lists": {"lists": [[] for _ in range(4000)]},
    "keys": {f"key-{number}": f"value-{number}" for number in range(600)},
    "none": {},
}


async def fill(shape: str, limit_mib: int, most: int, at_once: int) -> dict[str, object]:
    """Register until the registry refuses, or `most` live; then use those that are registered."""
    tables = Tables(START)

    async def store() -> MemoryStore:
        return MemoryStore(lambda: START, tables)

    # no agent beats here, and none must die of it
    config = RegistryConfig(
        "cluster", lease_s=86_400.0, max_instance_bytes=limit_mib * MIB, flush_interval_s=0.01, linger_s=0.0
    )
    registry = Registry(config, store, watch_factory=lambda on_death: NoWitness())
    registry.start()

    async def is_ready() -> bool:
        return (await registry.health()).is_ready

    await eventually(is_ready)
    process = psutil.Process()
    before = process.memory_info().rss
    count, refusal, warned_at = 0, None, None
    while refusal is None and count < most:
        sent = [SequencedChange(_registration(number, shape)) for number in range(count, count + at_once)]
        # as they arrive from other processes: no two have a part in common
        answers = await registry.deliver([pickle.loads(pickle.dumps(change)) for change in sent])
        refused = [answer for answer in answers if isinstance(answer, RegistryFullError)]
        refusal = str(refused[0]) if refused else None
        count += len(answers) - len(refused)
        health = await registry.health()
        if warned_at is None and health.capacity_problem is not None:
            warned_at = max(health.capacity_used.values())
    grown = process.memory_info().rss - before
    answer = await registry.beat_many([iid(0), iid(count - 1)])
    (receipt,) = await registry.deliver([SequencedChange(StatusChange(iid(0), Status.ALIVE, 2))])
    used = registry.members.memory.used
    await registry.stop()
    return {
        "instances": count,
        "refusal": refusal,
        "warned_at": warned_at,
        "counted_mib": round(used / MIB, 1),
        "rss_mib": round(grown / MIB, 1),
        "goes_on": answer.unknown == () and isinstance(receipt, Receipt),
    }


def _registration(number: int, shape: str) -> RegisterChange:
    details = {"metadata": SHAPES[shape]} if SHAPES[shape] else {}
    return RegisterChange(Registration(iid(number), f"agent-{number}", **details), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--shape", choices=SHAPES, default="text")
    parser.add_argument("--most", type=int, default=250_000)
    parser.add_argument("--at-once", type=int, default=20)
    chosen = parser.parse_args()
    print(json.dumps(asyncio.run(fill(chosen.shape, chosen.mib, chosen.most, chosen.at_once))))


if __name__ == "__main__":
    main()
