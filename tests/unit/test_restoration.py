"""A registry lives through a loss of its database: what it answers meanwhile, and what it writes again."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from seedcore.core.answers import InstanceFilter
from seedcore.core.errors import StoreUnavailableError
from seedcore.store.memory import Tables
from tests.builders import START, iid
from tests.local import Snapshot as Earlier
from tests.unit.registries import joined_registry
from tests.unit.test_lost_commits import CONFIG, Fails, enter, has_mended
from tests.waiting import eventually


EVERY = InstanceFilter(statuses=None)


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


# Epochs


async def test_a_flip_to_an_epoch_that_was_staged_earlier_than_the_current_one_is_shown(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as registry:
        await registry.stage_epoch("blue")
        await registry.set_current_epoch("green")
        await enter(registry, 1, epoch="blue")
        await registry.set_current_epoch("blue")
        assert (await registry.resolve(["agent-1"])).value[0].instance is not None


# What it answers meanwhile


async def test_answers_are_complete_while_the_database_lacks_what_it_had(tables: Tables) -> None:
    store = Fails(lambda: START, tables)
    async with joined_registry(CONFIG, tables, store=store) as registry:
        await enter(registry, 1)
        earlier = Earlier(tables)
        await registry.deregister(["agent-1"])
        await enter(registry, 2)
        store.fails_after = 1
        earlier.restore()

        async def cannot_write() -> bool:
            return not (await registry.health()).is_ready

        await eventually(cannot_write)
        listed = await registry.list_active()
        assert (listed.complete, [row.instance_id for row in listed]) == (True, [iid(2)])
        assert (await registry.changes(EVERY, None, 0)).complete
        assert (await registry.beat_many([iid(9)])).unknown == (iid(9),)
        # what only the database has is not read from one that lacks commits, and nothing counts as durable
        with pytest.raises(StoreUnavailableError):
            await registry.transitions("agent-1")
        assert not (await registry.set_status(iid(2), "alive", 2)).durable
        store.fails_after = None
        await eventually(partial(has_mended, registry))
        assert (await registry.set_status(iid(2), "alive", 2)).durable
        assert len(await registry.transitions("agent-1")) == 3
