"""The registry on real Ray over real PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
import ray
from pydantic import SecretStr

from seedcore.composition import start_registry
from seedcore.core.answers import InstanceFilter, NotResolved, Origin, Receipt
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Registration, SequencedChange, new_instance_id
from seedcore.core.errors import (
    FencedError,
    ForbiddenTransitionError,
    InstanceConflictError,
    InstanceDeadError,
    InvalidInputError,
    RegistryError,
    RegistryUnavailableError,
    RetiredEpochError,
    StoreUnavailableError,
    UnknownInstanceError,
    VersionMismatchError,
)
from seedcore.core.lifecycle import Status
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.agent.reporter import Reporter
from seedcore.registry.caller.listing import every_page, list_active_instances
from seedcore.registry.protocol.connection import REGISTRY_NAME, RegistryConnection
from seedcore.registry.ray_support.actors import end_actor
from seedcore.registry.server.actor import stop_registry
from seedcore.settings import Settings
from seedcore.store.maintenance import migrate_database
from tests.builders import iid
from tests.cluster.agents import Host, OldRegistry
from tests.faults.proxy import Proxy
from tests.servers import PostgresServer
from tests.waiting import eventually


def rows(settings: Settings, query: str, *parameters: object) -> list[tuple[Any, ...]]:
    assert settings.pg_dsn is not None
    with psycopg.connect(settings.pg_dsn.get_secret_value(), autocommit=True) as connection:
        return connection.execute(query, parameters).fetchall()


def registration(logical_id: str = "agent", **details: Any) -> Registration:
    return Registration(new_instance_id(), logical_id, **details)


async def kill_registry(connection: RegistryConnection) -> int:
    """SIGKILL the actor's process and wait for the one that replaces it; its pid."""
    before = (await connection.hello()).pid
    os.kill(before, signal.SIGKILL)

    async def replaced() -> int:
        pid = (await connection.hello()).pid
        return pid if pid != before and (await connection.health()).is_ready else 0

    return await eventually(replaced)


async def test_a_registered_instance_is_committed_when_the_call_returns(
    registry: RegistryConnection, settings: Settings
) -> None:
    mine = registration(
        "eye", organ_id="vision", labels={"tier": "hot"}, metadata={"model": [1, 2]}, actor_name="eye-actor"
    )
    receipt = await registry.register(mine)
    assert receipt.durable
    assert rows(settings, "select logical_id, status::text, organ_id, labels, metadata from registry_instance") == [
        ("eye", "starting", "vision", {"tier": "hot"}, {"model": [1, 2]})
    ]
    receipt = await registry.set_status(mine.instance_id, "alive", 2)
    assert receipt.durable
    assert rows(settings, "select status::text, seq from registry_instance") == [("alive", 2)]


async def test_registry_that_ray_has_restarted_makes_no_tables_in_an_emptied_database(
    registry: RegistryConnection, settings: Settings
) -> None:
    assert settings.pg_dsn is not None
    dsn = settings.pg_dsn.get_secret_value()
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("drop schema public cascade")
        connection.execute("create schema public")
    before = (await registry.hello()).pid
    os.kill(before, signal.SIGKILL)

    async def waits() -> bool:
        health = await registry.health()
        return health.hello.pid != before and "restore a backup" in str(health.store_problem)

    await eventually(waits)
    assert rows(settings, "select from pg_class where relnamespace = 'public'::regnamespace") == []
    await migrate_database(dsn)

    async def goes_on() -> bool:
        return (await registry.health()).is_ready

    await eventually(goes_on)


async def test_listing_filters_and_pages_without_gap_or_repeat(registry: RegistryConnection) -> None:
    async def add(number: int) -> None:
        mine = registration(
            f"agent-{number:02}", organ_id="left" if number % 2 else "right", labels={"n": str(number % 5)}
        )
        await registry.register(mine)
        if number < 20:
            await registry.set_status(mine.instance_id, Status.ALIVE, 2)

    # none beats: together, for one after the other can take longer than a lease
    await asyncio.gather(*(add(number) for number in range(25)))
    everything = await every_page(registry, page_size=3)
    assert [row.logical_id for row in everything] == [f"agent-{n:02}" for n in range(20)]
    assert everything.source is Origin.REGISTRY
    assert everything.complete
    starting = await registry.list_active([Status.STARTING])
    assert len(starting) == 5
    gone = everything[0].instance_id
    await registry.set_status(gone, Status.DEAD, 3)
    dead = await registry.list_active([Status.DEAD])
    assert ([row.instance_id for row in dead], dead.source) == ([gone], Origin.POSTGRES)
    left = await registry.list_active(organ_id="left", labels={"n": "1"})
    assert [row.logical_id for row in left] == ["agent-01", "agent-11"]
    page = await registry.list_active(limit=7)
    assert len(page) == 7
    assert page.next_cursor is not None


async def test_resolve_answers_many_and_has_the_reasons(registry: RegistryConnection) -> None:
    alive, draining = registration("alive"), registration("draining")
    for mine in (alive, draining):
        await registry.register(mine)
        await registry.set_status(mine.instance_id, "alive", 2)
    await registry.set_status(draining.instance_id, "draining", 3, "maintenance")
    answer = await registry.resolve(["alive", "draining", "unregistered"])
    found = {resolution.logical_id: resolution for resolution in answer.value}
    instance = found["alive"].instance
    assert instance is not None
    assert instance.instance_id == alive.instance_id
    assert (found["draining"].instance, found["draining"].reason) == (None, NotResolved.DRAINING)
    assert not found["unregistered"].is_known
    described = await registry.describe("draining")
    assert described.complete
    assert [row.cause for row in described.instances] == [Cause(CauseKind.AGENT, "maintenance")]


BAD_CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("register", (Registration("not-a-uuid", "a"),)),
    ("register", (Registration(new_instance_id(), ""),)),
    ("register", (Registration(new_instance_id(), "x" * 256),)),
    ("register", (Registration(new_instance_id(), "a\x00b"),)),
    ("register", (Registration(new_instance_id(), "a", labels={f"k{n}": "v" for n in range(10_000)}),)),
    ("register", (Registration(new_instance_id(), "a", metadata={"deep": ["\x00"]}),)),
    ("register", (Registration(new_instance_id(), "a", ip_address="not an address"),)),
    ("set_status", ("not-a-uuid", "alive", 1)),
    ("set_status", (new_instance_id(), "asleep", 1)),
    ("set_status", (new_instance_id(), "alive", -1)),
    ("beat_many", ("abc",)),
    ("beat_many", ([1, 2],)),
    ("beat_many", (["junk"],)),
    ("beat_many", ([new_instance_id()] * 10_001,)),
    ("resolve", ([],)),
    ("resolve", (["a"] * 1001,)),
    ("list_active", (["asleep"],)),
    ("list_active", (None, None, None, 0)),
    ("list_active", (None, None, None, 5, "junk")),
]


async def test_bad_input_is_a_clear_error_and_changes_nothing(registry: RegistryConnection, settings: Settings) -> None:
    for method, arguments in BAD_CALLS:
        with pytest.raises(InvalidInputError):
            await getattr(registry, method)(*arguments)
    assert rows(settings, "select count(*) from registry_instance") == [(0,)]
    assert sum((await registry.health()).instances.values()) == 0


async def test_refusals_keep_their_class_across_ray_and_change_nothing(
    registry: RegistryConnection, settings: Settings
) -> None:
    mine = registration("one")
    await registry.register(mine)
    await registry.set_status(mine.instance_id, "alive", 2)
    with pytest.raises(ForbiddenTransitionError, match="cannot become starting"):
        await registry.set_status(mine.instance_id, "starting", 3)
    with pytest.raises(InstanceConflictError):
        await registry.register(Registration(mine.instance_id, "another"))
    with pytest.raises(UnknownInstanceError):
        await registry.set_status(new_instance_id(), "alive", 2)
    await registry.set_status(mine.instance_id, "dead", 4)
    with pytest.raises(InstanceDeadError):
        await registry.set_status(mine.instance_id, "alive", 5)
    with pytest.raises(InstanceDeadError):
        await registry.register(mine)
    assert rows(settings, "select status::text, seq from registry_instance") == [("dead", 4)]


async def test_a_beat_answers_which_instances_are_unknown_or_dead(registry: RegistryConnection) -> None:
    living, dead, unknown = registration("living"), registration("dead"), new_instance_id()
    await registry.register(living)
    await registry.register(dead)
    await registry.set_status(dead.instance_id, "dead", 2)
    answer = await registry.beat_many([living.instance_id, dead.instance_id, unknown])
    assert (answer.unknown, answer.dead) == ((unknown,), (dead.instance_id,))
    assert answer.beat_interval_s == 1.0


async def test_many_starters_make_one_registry(ray_cluster: None, settings: Settings) -> None:
    def start() -> int:
        return asyncio.run(start_registry(settings)).pid

    starter: Any = ray.remote(start)
    try:
        pids = ray.get([starter.options(num_cpus=0).remote() for _ in range(4)])
        assert len(set(pids)) == 1
    finally:
        await stop_registry(settings.namespace)


async def test_another_protocol_is_refused_with_a_remedy(ray_cluster: None, settings: Settings) -> None:
    actor: Any = ray.remote(OldRegistry)
    handle = actor.options(name=REGISTRY_NAME, namespace=settings.namespace, num_cpus=0).remote()
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)
    with pytest.raises(VersionMismatchError, match="seedcore registry upgrade"):
        await connection.health()
    with pytest.raises(VersionMismatchError):
        await start_registry(settings)
    ray.kill(handle)


async def test_a_killed_registry_comes_back_with_everything_acknowledged(
    registry: RegistryConnection, settings: Settings
) -> None:
    clients = [RegistryClient(f"agent-{n}", settings=settings) for n in range(20)]
    await asyncio.gather(*(client.set_status("alive") for client in clients))
    receipts = await asyncio.gather(*(client.set_status("draining", "before the kill") for client in clients))
    assert all(receipt.durable for receipt in receipts)
    epoch = (await registry.health()).epoch
    await kill_registry(registry)
    listing = await every_page(registry, statuses=(Status.DRAINING,))
    assert {row.instance_id for row in listing} == {client.instance_id for client in clients}
    assert (await registry.health()).epoch == epoch
    answers = await asyncio.gather(*(client.beat() for client in clients))
    assert not any(answer.unknown or answer.dead for answer in answers)
    receipts = await asyncio.gather(*(client.set_status("alive", "after it") for client in clients))
    assert all(receipt.durable for receipt in receipts)
    assert rows(settings, "select distinct status::text, cause_detail, seq from registry_instance") == [
        ("alive", "after it", 4)
    ]


async def test_no_status_is_lost_while_the_registry_is_killed_again_and_again(
    registry: RegistryConnection, settings: Settings
) -> None:
    clients = [RegistryClient(f"agent-{n}", settings=settings) for n in range(5)]
    stop = asyncio.Event()
    last: dict[str, str] = {}
    turns = 0

    async def toggle(client: RegistryClient) -> None:
        nonlocal turns
        await client.set_status("alive")
        while not stop.is_set():
            for status in ("draining", "alive"):
                receipt = await client.set_status(status)
                while not receipt.durable:
                    await asyncio.sleep(0.05)
                    receipt = await client.register()
                last[client.instance_id] = status
                turns += 1

    toggling = [asyncio.create_task(toggle(client)) for client in clients]
    for _ in range(3):
        await kill_registry(registry)
        enough = turns + 20

        def has_turned() -> bool:
            return turns >= enough  # noqa: B023 - asked before the next kill sets another

        await eventually(has_turned)
    stop.set()
    await asyncio.gather(*toggling)
    assert all(client.pending == 0 for client in clients)
    stored = dict(rows(settings, "select instance_id::text, status::text from registry_instance"))
    assert stored == last


@pytest.mark.usefixtures("short_leases")
async def test_a_silent_instance_expires_with_its_cause(registry: RegistryConnection, settings: Settings) -> None:
    mine = registration("quiet")
    await registry.register(mine)
    await registry.set_status(mine.instance_id, "alive", 2)

    def stored() -> list[tuple[Any, ...]]:
        return rows(settings, "select cause_kind::text from registry_instance where status = 'dead'")

    assert await eventually(stored) == [("lease_expired",)]
    assert (await registry.beat_many([mine.instance_id])).dead == (mine.instance_id,)


async def test_an_expired_client_comes_back_as_a_new_instance(registry: RegistryConnection, settings: Settings) -> None:
    client = RegistryClient("phoenix", settings=settings)
    await client.set_status("alive")
    first = client.instance_id
    await registry.deregister(instance_ids=[first])
    await client.beat()
    assert client.instance_id != first
    answer = await registry.resolve(["phoenix"])
    assert answer.value[0].instance is not None
    assert answer.value[0].instance.instance_id == client.instance_id


async def test_a_row_deleted_by_hand_is_registered_again(registry: RegistryConnection, settings: Settings) -> None:
    client = RegistryClient("deleted", settings=settings)
    await client.set_status("alive")
    rows(settings, "delete from registry_instance returning 1")

    async def is_back() -> bool:
        await client.beat()
        return rows(settings, "select status::text from registry_instance") == [("alive",)]

    await eventually(is_back)


async def test_an_instance_declared_dead_by_hand_registers_again(
    registry: RegistryConnection, settings: Settings
) -> None:
    client = RegistryClient("condemned", settings=settings)
    await client.set_status("alive")
    first = client.instance_id
    rows(settings, "select set_instance_status(%s, 'dead', null, 'by the operator')", first)

    async def is_new() -> bool:
        await client.beat()
        return client.instance_id != first

    await eventually(is_new)


async def test_a_new_ray_cluster_rotates_the_epoch_and_ends_the_old_fleet(
    registry: RegistryConnection, settings: Settings
) -> None:
    client = RegistryClient("old", settings=settings)
    await client.set_status("alive")
    await stop_registry(settings.namespace)
    # what a new cluster is to the database: another session name
    rows(settings, "update cluster_metadata set ray_cluster = 'another cluster' returning 1")
    await start_registry(settings)

    async def is_ready() -> bool:
        return (await registry.health()).is_ready

    await eventually(is_ready)
    assert (await registry.health()).epoch == "epoch-2"
    assert rows(settings, "select status::text, cause_kind::text, cause_detail from registry_instance") == [
        ("dead", "epoch_retired", "epoch-1")
    ]
    with pytest.raises(RetiredEpochError):
        await RegistryClient("late", cluster_epoch="epoch-1", settings=settings).register()


async def test_a_staged_fleet_becomes_visible_in_one_step(registry: RegistryConnection, settings: Settings) -> None:
    green = [RegistryClient(f"agent-{n}", cluster_epoch="green", settings=settings) for n in range(3)]
    blue = [RegistryClient(f"agent-{n}", settings=settings) for n in range(3)]
    await asyncio.gather(*(client.set_status("alive") for client in [*green, *blue]))
    before = await list_active_instances(settings=settings)
    assert {row.instance_id for row in before} == {client.instance_id for client in blue}
    await registry.set_current_epoch("green")
    after = await list_active_instances(settings=settings)
    assert {row.instance_id for row in after} == {client.instance_id for client in green}
    with pytest.raises(RetiredEpochError):
        await registry.set_current_epoch("epoch-1")


async def test_a_superseded_registry_only_reads_and_reports_it(
    registry: RegistryConnection, settings: Settings
) -> None:
    client = RegistryClient("old-timer", settings=settings)
    await client.set_status("alive")
    await RegistryClient("bystander", settings=settings).set_status("alive")
    # what another registry on the same database does first
    rows(settings, "select term from begin_registry('a newer cluster', null, 3)")
    before = rows(settings, "select instance_id, status::text, last_heartbeat, seq from registry_instance")
    receipt = await client.set_status("draining")
    assert not receipt.durable
    assert receipt.why is not None
    assert "another registry process" in receipt.why
    health = await registry.health()
    assert (health.is_ready, health.term, health.fenced_by) == (False, 1, 2)
    assert (await registry.beat(client.instance_id)).is_fenced
    with pytest.raises(FencedError):
        await registry.register(registration("newcomer"))
    with pytest.raises(FencedError):
        await registry.set_current_epoch("green")
    # its memory still answers, and no lease ends; it has the drain too, if that came before the registry knew
    answer = await registry.list_active(None)
    assert "bystander" in [row.logical_id for row in answer]
    assert not answer.complete
    assert rows(settings, "select instance_id, status::text, last_heartbeat, seq from registry_instance") == before
    # nor does it take the database back when its process is replaced
    before_pid = (await registry.hello()).pid
    os.kill(before_pid, signal.SIGKILL)

    async def is_fenced_again() -> bool:
        health = await registry.health()
        return health.hello.pid != before_pid and health.fenced_by == 2

    await eventually(is_fenced_again)
    assert rows(settings, "select term, current_epoch from cluster_metadata") == [(2, "epoch-2")]


async def test_an_idle_registry_learns_that_it_is_superseded(registry: RegistryConnection, settings: Settings) -> None:
    rows(settings, "select term from begin_registry('a newer cluster', null, 3)")

    async def is_fenced() -> bool:
        return (await registry.health()).fenced_by == 2

    await eventually(is_fenced)


async def test_an_epoch_is_staged_by_name_and_listed(registry: RegistryConnection) -> None:
    assert await registry.stage_epoch("green")
    assert not await registry.stage_epoch("green")
    assert [(row.name, row.state) for row in await registry.list_epochs()] == [
        ("green", "staged"),
        ("epoch-1", "current"),
    ]
    await registry.set_current_epoch("green")
    assert [(row.name, row.state) for row in await registry.list_epochs()] == [
        ("green", "current"),
        ("epoch-1", "retired"),
    ]


async def test_statements_per_flush_do_not_grow_with_the_fleet(
    registry: RegistryConnection, settings: Settings
) -> None:
    host_class: Any = ray.remote(Host)

    async def per_flush(agents: int) -> float:
        host = host_class.options(num_cpus=0).remote(f"host-{agents}", agents, settings)
        await host.begin.remote()
        before = (await registry.health()).flush

        async def enough() -> bool:
            return (await registry.health()).flush.flushes >= before.flushes + 5

        await eventually(enough)
        after = (await registry.health()).flush
        assert await host.problems.remote() == []
        await host.end.remote()
        ray.kill(host)
        return (after.statements - before.statements) / (after.flushes - before.flushes)

    few, many = await per_flush(10), await per_flush(500)
    assert few == many == 1.0
    health = await registry.health()
    assert health.flush.beats_dropped == 0
    assert health.flush.failures == 0


async def test_an_error_of_ours_is_never_a_bare_ray_error(registry: RegistryConnection) -> None:
    untyped: Any = registry
    with pytest.raises(RegistryError):
        await untyped.page(InstanceFilter(fresh_only=[]), limit=object())  # type: ignore[arg-type]


async def test_a_silent_database_does_not_silence_the_registry(
    registry: RegistryConnection, settings: Settings, postgres18: PostgresServer
) -> None:
    assert settings.pg_dsn is not None
    database = str(psycopg.conninfo.conninfo_to_dict(settings.pg_dsn.get_secret_value())["dbname"])
    await stop_registry(settings.namespace)
    proxy = Proxy(postgres18.folder / ".s.PGSQL.5432")
    proxy.start()
    try:
        await start_registry(settings.model_copy(update={"pg_dsn": SecretStr(proxy.dsn(database))}))

        async def is_ready() -> bool:
            return (await registry.health()).is_ready

        await eventually(is_ready)
        impatient = RegistryConnection(settings.namespace, 0.7)
        assert (await impatient.resolve(["unregistered"])).complete
        proxy.go_deaf()
        unanswered = 0
        for question in (
            lambda: impatient.describe("unregistered"),
            lambda: impatient.list_active([Status.DEAD]),
            lambda: impatient.get_instance(iid(1)),
            lambda: impatient.current_epoch(),
            lambda: impatient.list_epochs(),
        ):
            try:
                await question()
            except RegistryUnavailableError:
                unanswered += 1
            except StoreUnavailableError:
                pass
            assert (await impatient.resolve(["unregistered"])).complete
            assert (await impatient.list_active()).complete
        assert unanswered
        proxy.heal()
        await eventually(is_ready)
    finally:
        proxy.stop()
        await stop_registry(settings.namespace)


async def test_a_mistyped_epoch_ends_no_fleet(registry: RegistryConnection, settings: Settings) -> None:
    reporter = Reporter("of-blue", settings=settings)
    await reporter.start()
    before = (await registry.current_epoch()).value.name
    context = ray.get_runtime_context()

    async def flip(*words: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "from seedcore.cli import main; main()", "epoch", "flip", *words),
            env={**os.environ, "RAY_ADDRESS": context.gcs_address, "SEEDCORE_NS": settings.namespace},
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await process.communicate()
        return process.returncode, errors.decode()

    assert await registry.stage_epoch("green")
    (code, errors), (code_of_green, errors_of_green) = await asyncio.gather(flip("gren"), flip("green"))
    assert (code, code_of_green) == (1, 1)
    assert f"epoch gren is not staged, so it would become current without agents; epoch {before}" in errors
    assert "epoch green has no live agents" in errors_of_green
    assert (await registry.current_epoch()).value.name == before
    assert (await flip("green", "--force"))[0] == 0
    assert (await registry.current_epoch()).value.name == "green"
    await reporter.stop()


class Interrupted(RegistryConnection):
    """Something happens right after the next answer to a change of status."""

    happens: Callable[[], Awaitable[None]] | None = None

    async def take(self, change: SequencedChange) -> Receipt:
        receipt = await super().take(change)
        happens, self.happens = self.happens, None
        if happens is not None:
            await happens()
        return receipt


@pytest.mark.parametrize("is_restarted_by_ray", [False, True])
async def test_a_registry_replaced_between_two_changes_gets_both_in_order(
    registry: RegistryConnection, settings: Settings, postgres18: PostgresServer, is_restarted_by_ray: bool
) -> None:
    assert settings.pg_dsn is not None
    database = str(psycopg.conninfo.conninfo_to_dict(settings.pg_dsn.get_secret_value())["dbname"])
    await stop_registry(settings.namespace)
    proxy = Proxy(postgres18.folder / ".s.PGSQL.5432")
    proxy.start()
    behind_proxy = settings.model_copy(update={"pg_dsn": SecretStr(proxy.dsn(database)), "durable_wait_s": 0.5})
    try:
        await start_registry(behind_proxy)

        async def is_ready() -> bool:
            return (await registry.health()).is_ready

        await eventually(is_ready)

        async def has_another_process(before: int) -> bool:
            return (await registry.hello()).pid != before

        mine = Interrupted(settings.namespace, settings.call_timeout_s)
        client = RegistryClient("agent", settings=settings, connection=mine)
        assert (await client.set_status(Status.ALIVE)).durable
        proxy.refuse()
        assert not (await client.set_status(Status.DRAINING, "first")).durable

        async def replace_registry() -> None:
            handle = ray.get_actor(REGISTRY_NAME, namespace=settings.namespace)
            if is_restarted_by_ray:
                before = (await registry.hello()).pid
                os.kill(before, signal.SIGKILL)
                await eventually(lambda: has_another_process(before))
            else:
                assert await end_actor(handle, 10.0)
            proxy.heal()
            await start_registry(behind_proxy)
            await eventually(is_ready)

        # it sends `first` again to the old one, and `second` when that is gone
        mine.happens = replace_registry
        assert (await client.set_status(Status.ALIVE, "second")).durable
        assert client.pending == 0
        steps = rows(settings, "select to_status::text, cause_detail from registry_transition order by id")
        assert steps == [("alive", None), ("draining", "first"), ("alive", "second")]
    finally:
        proxy.stop()
        await stop_registry(settings.namespace)
