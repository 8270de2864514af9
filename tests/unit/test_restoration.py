"""A registry lives through a loss of its database: what it answers meanwhile, and what it writes again."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from seedcore.store.memory import Tables
from tests.builders import START, iid
from tests.local import Snapshot as Earlier
from tests.unit.registries import joined_registry
from tests.unit.test_lost_commits import CONFIG, enter, has_mended
from tests.waiting import eventually


@pytest.fixture
def tables() -> Tables:
    return Tables(START)


# The join


async def test_the_epoch_of_the_configuration_counts_at_the_first_join_alone(tables: Tables) -> None:
    async with joined_registry(replace(CONFIG, epoch="blue"), tables) as registry:
        await enter(registry, 1)
        await registry.set_current_epoch("green")
        earlier = Earlier(tables)
        await enter(registry, 2, epoch="green")
        earlier.restore()
        await eventually(partial(has_mended, registry))
        assert tables.current_epoch == "green"
        assert iid(2) in tables.rows


async def test_a_registry_that_is_restarted_after_a_flip_keeps_the_current_epoch(tables: Tables) -> None:
    async with joined_registry(replace(CONFIG, epoch="blue"), tables) as registry:
        await registry.set_current_epoch("green")
    async with joined_registry(replace(CONFIG, epoch="blue"), tables) as registry:
        assert (await registry.current_epoch()).value.name == "green"
