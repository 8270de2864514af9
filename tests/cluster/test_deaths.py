"""Deaths are reported: processes really killed, stopped and restarted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
import ray
from ray._private.worker import global_worker
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from seedcore.composition import start_registry
from seedcore.core.causes import Cause
from seedcore.core.changes import Registration, new_instance_id
from seedcore.core.errors import NotResolvableError
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.timeouts import end
from seedcore.registry import RegistryClient
from seedcore.registry.node.process_watch import ActorStateWatch, PidfdWatch, Watch, why_unwatched
from seedcore.registry.node.relay import Relay, RelayActor
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.protocol.messages import Observed, Unwatched, Watched
from seedcore.registry.ray_support.lookup import ActorHandle, actor_id_of
from seedcore.registry.ray_support.process_keys import has_ended, process_key_of
from seedcore.registry.server.actor import stop_registry
from seedcore.registry.server.death_watch import DeathWatch
from seedcore.registry.server.ray_cluster import RayCluster
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from tests.builders import iid, instance
from tests.cluster.agents import Busy, Identifier, Quiet, Worker
from tests.cluster.conftest import HEAD
from tests.cluster.sharing import with_short_leases
from tests.waiting import eventually


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Cluster]:
    """Two nodes, so that one can be lost; its loss is noticed within a few seconds."""
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 500}
    ray.shutdown()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**HEAD, "_system_config": {**quick, "health_check_failure_threshold": 4}},
    )
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


# One contract for every watch


def sleeping_process() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


class Sleeper:
    """A process to watch: a child of ours, or an actor."""

    def __init__(self, watched: Watched, kill: Callable[[], None]) -> None:
        self.watched = watched
        self.kill = kill


@pytest.fixture(params=["pidfd", "actor state"])
async def watch_and_sleeper(
    request: pytest.FixtureRequest, ray_cluster: Cluster
) -> AsyncIterator[tuple[Watch, Callable[[], Sleeper], list[tuple[str, Cause]]]]:
    """A watch, a way to make something for it to watch, and what it has reported."""
    reported: list[tuple[str, Cause]] = []
    watch: Watch
    made: list[Any] = []

    def note(instance_id: str, cause: Cause, _process_key: str | None) -> None:
        reported.append((instance_id, cause))

    def make_process() -> Sleeper:
        child = sleeping_process()
        made.append(child)
        key = process_key_of(child.pid)
        return Sleeper(Watched(new_instance_id(), child.pid, key, None, None, None), child.kill)

    def make_actor() -> Sleeper:
        actor_class: Any = ray.remote(Quiet)
        name = f"patient-{new_instance_id()}"
        handle = actor_class.options(name=name, namespace="watched", num_cpus=0).remote()
        ray.get(handle.whereabouts.remote())
        made.append(handle)
        watched = Watched(new_instance_id(), None, None, name, "watched", actor_id_of(handle))
        return Sleeper(watched, lambda: ray.kill(handle))

    if request.param == "pidfd":
        watch = PidfdWatch(note)
        yield watch, make_process, reported
        for child in made:
            child.kill()
            child.wait()
    else:
        watch = ActorStateWatch(note)
        yield watch, make_actor, reported
    await watch.close()


Contract = tuple[Watch, Callable[[], Sleeper], list[tuple[str, Cause]]]


async def test_an_exit_is_reported_once_and_the_living_never(watch_and_sleeper: Contract) -> None:
    watch, make, reported = watch_and_sleeper
    doomed, living = make(), make()
    assert await watch.add(doomed.watched)
    assert await watch.add(living.watched)
    # added again, as after a registration that repeats
    assert await watch.add(doomed.watched)
    doomed.kill()
    await eventually(lambda: reported)
    assert [instance_id for instance_id, _ in reported] == [doomed.watched.instance_id]
    other = make()
    assert await watch.add(other.watched)
    other.kill()
    await eventually(lambda: len(reported) > 1)
    assert {instance_id for instance_id, _ in reported} == {doomed.watched.instance_id, other.watched.instance_id}


async def test_one_that_had_ended_before_is_reported(watch_and_sleeper: Contract) -> None:
    watch, make, reported = watch_and_sleeper
    late = make()
    late.kill()

    async def is_reported() -> bool:
        assert await watch.add(late.watched)
        return bool(reported)

    await eventually(is_reported)
    assert {instance_id for instance_id, _ in reported} == {late.watched.instance_id}


async def test_one_that_is_discarded_is_not_reported(watch_and_sleeper: Contract) -> None:
    watch, make, reported = watch_and_sleeper
    dropped, witness = make(), make()
    for sleeper in (dropped, witness):
        assert await watch.add(sleeper.watched)
    watch.discard(dropped.watched.instance_id)
    watch.discard(new_instance_id())
    dropped.kill()
    witness.kill()
    await eventually(lambda: reported)
    assert [instance_id for instance_id, _ in reported] == [witness.watched.instance_id]


async def test_what_cannot_be_watched_is_refused_with_its_reason(watch_and_sleeper: Contract) -> None:
    watch, _, reported = watch_and_sleeper
    assert not await watch.add(Watched(new_instance_id(), os.getpid(), None, None, None, None))
    process, worker, boot = (process_key_of(os.getpid()) or "").split("/")
    foreign = [
        # another PID namespace, another host or an earlier boot of this one, and a key without a boot id
        f"1-{process.partition('-')[2]}/{worker}/{boot}",
        f"{process}/{worker}/{new_instance_id()}",
        f"{process}/{worker}",
        process,
    ]
    for key in foreign:
        for pid in (os.getpid(), NO_PROCESS):
            watched = Watched(new_instance_id(), pid, key, None, None, None)
            assert not await watch.add(watched)
            # only that of another namespace could be mended
            assert why_unwatched(watched) is (Unwatched.NAMESPACE if key == foreign[0] else Unwatched.ELSEWHERE)
    assert reported == []


NO_PROCESS = 2**22 + 1  # above the highest process id that Linux gives


WITHOUT_A_BOOT_ID = """
import asyncio, os
from pathlib import Path
from seedcore.registry.node.process_watch import PidfdWatch
from seedcore.registry.protocol.messages import Watched
from seedcore.registry.ray_support.process_keys import process_key_of

boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

def hidden(path, *_, **__):
    raise FileNotFoundError(str(path))

async def main():
    Path.read_text = hidden
    key = process_key_of(os.getpid())
    watch = PidfdWatch(print)
    print("/" in key)
    for unproven in (key, f"{key}//{boot_id}"):
        print(await watch.add(Watched("unproven", os.getpid(), unproven, None, None, None)))

asyncio.run(main())
"""


async def test_process_is_watched_by_its_id_only_where_the_boot_id_can_be_read() -> None:
    watch = PidfdWatch(lambda *_: None)
    assert await watch.add(Watched("proven", os.getpid(), process_key_of(os.getpid()), None, None, None))
    await watch.close()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WITHOUT_A_BOOT_ID, stdout=asyncio.subprocess.PIPE
    )
    answer, _ = await process.communicate()
    assert answer.decode().split() == ["False"] * 3


async def test_a_process_id_that_was_used_again_is_another_process() -> None:
    reported: list[str] = []
    watch = PidfdWatch(lambda instance_id, _cause, _key: reported.append(instance_id))
    process, worker, boot = (process_key_of(os.getpid()) or "").split("/")
    earlier = f"{process.rpartition('-')[0]}-1/{worker}/{boot}"
    mine = Watched(new_instance_id(), os.getpid(), earlier, None, None, None)
    assert has_ended(os.getpid(), earlier)
    assert not has_ended(os.getpid(), process_key_of(os.getpid()))
    # of another host, or unknown: nothing is certain
    assert not any(
        has_ended(pid, key) for pid, key in ((os.getpid(), f"{earlier}x"), (NO_PROCESS, None), (None, earlier))
    )
    assert await watch.add(mine)
    assert reported == [mine.instance_id]
    await watch.close()


async def test_all_instances_of_a_process_die_with_it() -> None:
    reported: list[str] = []
    watch = PidfdWatch(lambda instance_id, _cause, _key: reported.append(instance_id))
    child = sleeping_process()
    key = process_key_of(child.pid)
    tenants = sorted(new_instance_id() for _ in range(5))
    for tenant in tenants:
        assert await watch.add(Watched(tenant, child.pid, key, None, None, None))
    child.kill()
    await eventually(lambda: len(reported) == 5)
    assert reported == tenants
    child.wait()
    await watch.close()


AT_THE_LIMIT = """
import asyncio, os, resource, subprocess
from seedcore.registry.ray_support.process_keys import process_key_of
from seedcore.registry.protocol.messages import Watched
from seedcore.registry.node.process_watch import PidfdWatch, why_unwatched

async def main():
    children = [subprocess.Popen(["sleep", "60"]) for _ in range(28)]
    keys = [process_key_of(child.pid) for child in children]
    reported = []
    watch = PidfdWatch(lambda instance_id, _cause, _key: reported.append(instance_id))
    await asyncio.sleep(0)
    used = len(os.listdir("/proc/self/fd"))
    limit = used + 24
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    wanted = [Watched(str(n), child.pid, keys[n], None, None, None) for n, child in enumerate(children)]
    watched = [await watch.add(one) for one in wanted]
    reasons = {why_unwatched(one).value for one, is_watched in zip(wanted, watched) if not is_watched}
    print(any(watched), all(watched), reported, reasons)
    # a quarter of them is left for the relay's own work
    print(limit - len(os.listdir("/proc/self/fd")) >= limit // 4 - 2)
    # an end makes room for another
    children[0].kill()
    while reported != ["0"]:
        await asyncio.sleep(0.01)
    print(await watch.add(wanted[watched.index(False)]))
    await watch.close()
    for child in children:
        child.kill()
        child.wait()

asyncio.run(main())
"""


def test_a_watch_without_descriptors_reports_no_death() -> None:
    answer = subprocess.run([sys.executable, "-c", AT_THE_LIMIT], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["True", "False", "[]", "{'descriptors'}", "True", "True"]


async def test_a_hidden_process_is_not_called_dead_and_an_ended_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[str] = []
    watch = PidfdWatch(lambda instance_id, _cause, _key: reported.append(instance_id))
    living, ended = sleeping_process(), sleeping_process()
    keys = process_key_of(living.pid), process_key_of(ended.pid)
    ended.kill()

    def hidden(path: Path) -> bytes:
        raise FileNotFoundError(str(path))

    # as /proc mounted with hidepid=2 hides the processes of others
    monkeypatch.setattr(Path, "read_bytes", hidden)
    await asyncio.to_thread(os.waitid, os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    hidden_one = Watched("living", living.pid, keys[0], None, None, None)
    assert not await watch.add(hidden_one)
    assert (has_ended(living.pid, keys[0]), has_ended(NO_PROCESS, keys[0])) == (False, True)
    assert why_unwatched(hidden_one) is Unwatched.HIDDEN
    assert await watch.add(Watched("ended", ended.pid, keys[1], None, None, None))
    assert reported == ["ended"]
    monkeypatch.undo()
    living.kill()
    living.wait()
    ended.wait()
    await watch.close()


class WithoutPidfd(RayCluster):
    """Relays that cannot see processes."""

    made = 0

    async def make_relay(self, node_id: str, name: str) -> ActorHandle:
        self.made += 1
        return ray.remote(Relay).options(num_cpus=0, max_restarts=0).remote((ActorStateWatch,))


async def test_busy_actors_keep_no_other_from_being_watched(ray_cluster: Cluster) -> None:
    deaths: list[str] = []
    cluster = WithoutPidfd(RelayActor, "watched")
    watch = DeathWatch(lambda instance_id, *_: deaths.append(instance_id), cluster)
    actor_class: Any = ray.remote(Busy)
    handles = [actor_class.options(name=f"busy-{n}", namespace="watched", num_cpus=0).remote() for n in range(6)]
    pids = ray.get([handle.pid.remote() for handle in handles])
    for handle in handles[:5]:
        handle.work.remote(600)
    watch.start()
    try:
        for number, handle in enumerate(handles):
            watch.add(
                instance(
                    number,
                    node_id=ray_cluster.head_node.node_id,
                    actor_name=f"busy-{number}",
                    namespace="watched",
                    actor_id=actor_id_of(handle),
                )
            )
        await eventually(lambda: watch.relay_of(ray_cluster.head_node.node_id), within_s=60)
        os.kill(pids[5], signal.SIGKILL)
        await eventually(lambda: deaths == [iid(5)], within_s=60)
        # one that is busy, and has never answered the relay
        os.kill(pids[0], signal.SIGKILL)
        await eventually(lambda: deaths == [iid(5), iid(0)], within_s=60)
        assert cluster.made == 1
    finally:
        await watch.stop()
        for handle in handles:
            ray.kill(handle)


@asynccontextmanager
async def gcs_hangs(cluster: Cluster, seconds: float) -> AsyncIterator[None]:
    """The GCS is stopped for so long. Meanwhile this event loop must not stand still for a second."""
    gcs = cluster.head_node.all_processes["gcs_server"][0].process.pid
    longest_s = 0.0

    async def tick() -> None:
        nonlocal longest_s
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(0.01)
            longest_s = max(longest_s, time.monotonic() - before_s)

    ticking = asyncio.create_task(tick())
    # it measures from now on, also what happens before the loop runs again
    await asyncio.sleep(0)
    os.kill(gcs, signal.SIGSTOP)
    awakening = threading.Timer(seconds, os.kill, (gcs, signal.SIGCONT))
    awakening.start()
    try:
        yield
    finally:
        await asyncio.to_thread(awakening.join)
        await end(ticking)
    assert longest_s < 1.0


async def test_a_relay_is_made_while_the_gcs_hangs_without_holding_up_the_loop(ray_cluster: Cluster) -> None:
    # as the first relay of a process: its class is still to be exported
    cluster = RayCluster(RelayActor, "watched")
    async with gcs_hangs(ray_cluster, 2.0):
        relay = await cluster.make_relay(ray_cluster.head_node.node_id, "seedcore-relay-of-a-test")
        await relay.__ray_ready__.remote()
    await cluster.end_relay(relay)


async def test_a_registry_is_made_while_the_gcs_hangs_without_holding_up_the_loop(
    ray_cluster: Cluster, settings: Settings
) -> None:
    try:
        async with gcs_hangs(ray_cluster, 2.0):
            assert (await start_registry(settings)).pid
    finally:
        await stop_registry(settings.namespace)


# The whole way


def rows(settings: Settings, query: str, *parameters: object) -> list[tuple[Any, ...]]:
    assert settings.pg_dsn is not None
    with psycopg.connect(settings.pg_dsn.get_secret_value(), autocommit=True) as connection:
        return connection.execute(query, parameters).fetchall()


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """A lease so long that no death below is an expiry."""
    return settings.model_copy(update={"lease_s": 120.0})


async def create(manager: Tier0MemoryManager, settings: Settings, name: str, **options: Any) -> int:
    """An agent; its pid."""
    await manager.create_agent(name, agent_class=Worker, arguments={"settings": settings}, **options)
    pid: int = await manager.execute_task_on_agent(name, "pid")
    return pid


async def watched_by_a_relay(registry: RegistryConnection, settings: Settings, manager: Tier0MemoryManager) -> None:
    """Until the relay works: a first agent's death has been reported."""
    pid = await create(manager, settings, "canary", max_restarts=0)
    os.kill(pid, signal.SIGKILL)

    async def is_reported() -> bool:
        return (await registry.health()).deaths_reported > 0

    await eventually(is_reported, within_s=60)


async def test_a_killed_agent_is_dead_at_once_and_for_the_right_reason(
    registry: RegistryConnection, settings: Settings, manager: Tier0MemoryManager
) -> None:
    await watched_by_a_relay(registry, settings, manager)
    pid = await create(manager, settings, "victim", max_restarts=0)
    bystander = await create(manager, settings, "bystander", max_restarts=0)
    assert bystander != pid
    os.kill(pid, signal.SIGKILL)

    async def is_gone() -> bool:
        found = (await registry.resolve(["victim"])).value[0]
        return found.instance is None

    await eventually(is_gone, every_s=0.005)

    def stored() -> list[tuple[Any, ...]]:
        return causes(settings, "logical_id = 'victim' and status = 'dead'")

    assert await eventually(stored) == [("process_killed", f"SIGKILL (pid {pid})")]
    with pytest.raises(NotResolvableError):
        await manager.resolve("victim")
    assert await (await manager.resolve("bystander")).ping.remote() == "pong"


async def test_a_restarted_agent_is_a_new_incarnation_of_the_same_name(
    registry: RegistryConnection, settings: Settings, manager: Tier0MemoryManager
) -> None:
    pid = await create(manager, settings, "phoenix")
    os.kill(pid, signal.SIGKILL)

    async def is_back() -> bool:
        return bool(await manager.execute_task_on_agent("phoenix", "pid") != pid)

    await eventually(is_back, within_s=60)

    def stored() -> bool:
        columns = "status::text, pid, cause_kind::text, cause_detail"
        history = rows(settings, f"select {columns} from registry_instance where logical_id = 'phoenix'")
        dead = [row for row in history if row[0] == "dead"]
        return (
            [row[0] for row in history if row[0] != "dead"] == ["alive"]
            and [row[1] for row in dead] == [pid]
            and dead[0][2:] in exits(pid)
        )

    await eventually(stored)


def exits(pid: int) -> set[tuple[str, str]]:
    """The causes of a killed process: with the signal if a relay watched it, else only that it is gone."""
    return {("process_killed", f"SIGKILL (pid {pid})"), ("process_exited", f"pid {pid}")}


def causes(settings: Settings, condition: str, *parameters: object) -> list[tuple[str, str]]:
    """The kind and the detail of each cause of the rows that match."""
    query = "select cause_kind::text, cause_detail from registry_instance where " + condition
    return [(kind, detail) for kind, detail in rows(settings, query, *parameters)]


def cause_of(settings: Settings, logical_id: str) -> tuple[str, str] | None:
    """Why the one instance of an agent died; None while it has not."""
    found = causes(settings, "logical_id = %s and status = 'dead'", logical_id)
    return found[0] if len(found) == 1 else None


def relays(cluster: Cluster) -> list[int]:
    """The pids of the relays that are children of the cluster's raylets."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}
    listing = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    found = [line.split(maxsplit=2) for line in listing.splitlines()[1:]]
    return [int(pid) for pid, parent, name in found if int(parent) in raylets and name.startswith("ray::Relay")]


async def test_a_killed_relay_is_no_death_and_another_takes_its_place(
    ray_cluster: Cluster, registry: RegistryConnection, settings: Settings, manager: Tier0MemoryManager
) -> None:
    await watched_by_a_relay(registry, settings, manager)
    pid = await create(manager, settings, "survivor", max_restarts=0)
    killed = await eventually(lambda: relays(ray_cluster))
    for relay in killed:
        os.kill(relay, signal.SIGKILL)
    # an agent that dies while it is not watched is found by the next relay
    orphan = await create(manager, settings, "orphan", max_restarts=0)
    os.kill(orphan, signal.SIGKILL)

    async def orphan_is_dead() -> bool:
        return cause_of(settings, "orphan") in exits(orphan)

    await eventually(orphan_is_dead, within_s=60)
    assert not set(relays(ray_cluster)) & set(killed)
    assert await manager.execute_task_on_agent("survivor", "pid") == pid


async def test_a_hung_relay_is_a_problem_and_another_takes_its_place(
    ray_cluster: Cluster, registry: RegistryConnection, settings: Settings, manager: Tier0MemoryManager
) -> None:
    await watched_by_a_relay(registry, settings, manager)
    stopped = await eventually(lambda: relays(ray_cluster))

    async def is_a_problem() -> bool:
        return "did not answer in time" in str((await registry.health()).watch_problem)

    # until the next relay answers, which may be before the agent below is there
    reported = asyncio.create_task(eventually(is_a_problem, within_s=60))
    for relay in stopped:
        os.kill(relay, signal.SIGSTOP)
    try:
        orphan = await create(manager, settings, "unseen", max_restarts=0)
        os.kill(orphan, signal.SIGKILL)
        await reported

        def is_reported() -> bool:
            return cause_of(settings, "unseen") in exits(orphan)

        await eventually(is_reported, within_s=60)

        async def is_well() -> bool:
            return (await registry.health()).watch_problem is None

        await eventually(is_well)
    finally:
        for relay in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(relay, signal.SIGCONT)


async def test_a_death_while_the_registry_was_away_is_found_when_it_is_back(
    registry: RegistryConnection, settings: Settings, manager: Tier0MemoryManager
) -> None:
    victim = await create(manager, settings, "fallen", max_restarts=0)
    living = await create(manager, settings, "standing", max_restarts=0)
    os.kill((await registry.hello()).pid, signal.SIGKILL)
    os.kill(victim, signal.SIGKILL)

    async def is_reported() -> bool:
        return cause_of(settings, "fallen") in exits(victim)

    await eventually(is_reported, within_s=60)
    assert await manager.execute_task_on_agent("standing", "pid") == living


async def test_a_hung_agent_is_late_then_suspect_and_comes_back_as_itself(
    registry: RegistryConnection, settings: Settings, manager: Tier0MemoryManager
) -> None:
    pid = await create(manager, settings, "sleeper", max_restarts=0)
    before = (await registry.describe("sleeper")).live[0].instance.instance_id
    quick = Tier0MemoryManager(settings.model_copy(update={"probe_timeout_s": 0.2}))
    seen: list[Verdict] = []
    os.kill(pid, signal.SIGSTOP)
    try:

        async def is_suspect() -> bool:
            verdict = (await registry.describe("sleeper")).live[0].verdict
            if verdict not in seen[-1:]:
                seen.append(verdict)
            return verdict is Verdict.SUSPECT

        await eventually(is_suspect, every_s=0.01)
        assert seen[-2:] == [Verdict.LATE, Verdict.SUSPECT]
        with pytest.raises(NotResolvableError, match="suspect"):
            await quick.resolve("sleeper")
    finally:
        os.kill(pid, signal.SIGCONT)

    async def is_back() -> bool:
        return bool(await (await quick.resolve("sleeper")).ping.remote() == "pong")

    await eventually(is_back)
    described = await registry.describe("sleeper")
    assert [observed.instance.instance_id for observed in described.live] == [before]
    assert [row.instance_id for row in described.instances] == [before]


async def test_a_lost_node_takes_its_agents_with_it_and_no_others(
    ray_cluster: Cluster, registry: RegistryConnection, settings: Settings, manager: Tier0MemoryManager
) -> None:
    node = ray_cluster.add_node(num_cpus=2)
    ray_cluster.wait_for_nodes()
    worker_class: Any = ray.remote(Worker)
    on_the_node = worker_class.options(
        name="remote",
        namespace=settings.namespace,
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
    ).remote("remote", settings=settings)
    await on_the_node.start.remote()
    on_the_head = {"node:__internal_head__": 0.001}
    await create(manager, settings, "local", max_restarts=0, resources=on_the_head)
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)

    def stored() -> list[tuple[Any, ...]]:
        return causes(settings, "logical_id = 'remote' and status = 'dead'")

    [(kind, _)] = await eventually(stored, within_s=60)
    # whichever witness is first: the raylet's workers end with it, the relay among them
    assert kind in {"node_died", "process_exited", "process_killed"}
    assert await (await manager.resolve("local")).ping.remote() == "pong"
    ray_cluster.remove_node(node)


async def start_on(node_id: str, actor_name: str, logical_id: str, settings: Settings) -> ActorHandle:
    worker_class: Any = ray.remote(Worker)
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    handle = worker_class.options(
        name=actor_name, namespace=settings.namespace, num_cpus=0, scheduling_strategy=there
    ).remote(logical_id, settings=settings)
    await handle.start.remote()
    return handle


def drain(node_id: str, for_s: float) -> None:
    """As `ray drain-node` and a notice of preemption."""
    accepted, why = global_worker.gcs_client.drain_node(
        node_id, autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION, "spot", round((time.time() + for_s) * 1000)
    )
    assert accepted, why


async def test_agents_of_a_node_that_ray_drains_are_left_at_once_and_those_of_another_are_not(
    ray_cluster: Cluster, registry: RegistryConnection, settings: Settings, manager: Tier0MemoryManager
) -> None:
    node = ray_cluster.add_node(num_cpus=2)
    ray_cluster.wait_for_nodes()
    head = ray_cluster.head_node.node_id
    # the newest instance is preferred: callers are on the node that will be drained
    kept = [
        await start_on(node_id, name, "pair", settings) for name, node_id in (("near", head), ("far", node.node_id))
    ]
    places: list[str] = []
    is_over = asyncio.Event()

    async def call_for_ever() -> None:
        while not is_over.is_set():
            pid = await manager.execute_task_on_agent("pair", "pid")
            places.append("near" if pid == near else "far")

    near, far = [row.instance.pid for row in sorted((await registry.describe("pair")).live, key=_began)]
    assert near != far
    calling = asyncio.create_task(call_for_ever())
    await eventually(lambda: places[-1:] == ["far"])
    drained_s = time.monotonic()
    drain(node.node_id, 60)

    async def held() -> list[Instance]:
        return [row.instance for row in (await registry.describe("pair")).live if row.instance.holds]

    [row] = await eventually(held, every_s=0.01)
    held_s = time.monotonic() - drained_s
    assert (row.pid, row.status, row.reported_status) == (far, Status.DRAINING, Status.ALIVE)
    assert str(row.holds[0].reason).startswith(f"node {node.node_id} is being drained by Ray, deadline ")
    assert held_s < 10.0, "one look each second, on a machine that other tests share"
    await eventually(lambda: places[-5:] == ["near"] * 5)
    is_over.set()
    # no call has failed
    await calling
    assert (await registry.health()).draining_nodes == 1
    ray_cluster.remove_node(node)
    del kept


@pytest.mark.slow
async def test_no_call_fails_while_one_of_three_nodes_is_drained_until_its_deadline(
    ray_cluster: Cluster, registry: RegistryConnection, settings: Settings, manager: Tier0MemoryManager
) -> None:
    """Then the node goes, as one that is preempted does."""
    for_s = 60.0
    leaving, staying = ray_cluster.add_node(num_cpus=2), ray_cluster.add_node(num_cpus=2)
    ray_cluster.wait_for_nodes()
    names = [f"drained-{number}" for number in range(4)]
    kept = [
        await start_on(node.node_id, f"{name}-{place}", name, settings)
        for name in names
        for place, node in (("staying", staying), ("leaving", leaving))
    ]
    calls = Counter[str]()
    is_over = asyncio.Event()

    async def call_for_ever(name: str) -> None:
        while not is_over.is_set():
            await manager.execute_task_on_agent(name, "pid")
            calls[name] += 1

    calling = [asyncio.create_task(call_for_ever(name)) for name in names]
    await eventually(lambda: calls.total() > 100)
    drained_s = time.monotonic()
    drain(leaving.node_id, for_s)

    async def all_held() -> bool:
        described = [await registry.describe(name) for name in names]
        return all(any(row.instance.holds for row in one.live) for one in described)

    await eventually(all_held, every_s=0.01)
    held_s = time.monotonic() - drained_s
    await asyncio.wait(calling, timeout=drained_s + for_s - time.monotonic())
    os.kill(leaving.all_processes["raylet"][0].process.pid, signal.SIGKILL)

    async def all_gone() -> bool:
        described = [await registry.describe(name) for name in names]
        return all(len(one.live) == 1 for one in described)

    await eventually(all_gone, within_s=60)
    before = calls.total()
    await eventually(lambda: calls.total() > before + 100)
    is_over.set()
    # no call has failed
    await asyncio.gather(*calling)
    print(f"\ndrain to every agent held: {held_s:.2f} s; {calls.total()} calls, none failed")  # noqa: T201
    assert held_s < 10.0, "one look each second, on a machine that other tests share"
    ray_cluster.remove_node(leaving)
    ray_cluster.remove_node(staying)
    del kept


def _began(observed: Observed) -> datetime:
    return observed.instance.started_at


async def test_an_agent_in_an_unnamed_namespace_is_found_and_not_dead(
    registry: RegistryConnection, settings: Settings, manager: Tier0MemoryManager
) -> None:
    worker_class: Any = ray.remote(Worker)
    handle = worker_class.options(name="lost", namespace="third", num_cpus=0).remote("lost", settings=settings)
    await handle.start.remote()
    assert await (await manager.resolve("lost")).ping.remote() == "pong"
    instance_id = (await registry.describe("lost")).live[0].instance.instance_id
    await registry.report_dead_call(instance_id)
    assert rows(settings, "select status::text, namespace, actor_id from registry_instance") == [
        ("alive", "third", actor_id_of(handle))
    ]
    ray.kill(handle)


async def test_an_actor_that_is_not_made_yet_is_not_dead(registry: RegistryConnection, settings: Settings) -> None:
    client = RegistryClient("eager", "made-later", settings=settings)
    await client.register()
    assert await registry.report_dead_call(client.instance_id) is not Verdict.UNKNOWN
    assert rows(settings, "select status::text, actor_name, namespace, actor_id from registry_instance") == [
        ("starting", "made-later", None, None)
    ]


async def test_the_actor_of_another_is_not_taken_for_our_own(ray_cluster: Cluster) -> None:
    actor_class: Any = ray.remote(Identifier)
    identifier = actor_class.options(name="identifier", namespace="third", num_cpus=0).remote()
    patient = ray.remote(Quiet).options(name="other", namespace="watched", num_cpus=0).remote()
    await patient.whereabouts.remote()
    mine, other, none = await asyncio.gather(*(identifier.identify.remote(name) for name in (None, "other", "none")))
    assert (mine.namespace, mine.actor_id, mine.is_proven) == ("third", actor_id_of(identifier), True)
    assert (other.namespace, other.actor_id, other.is_proven) == ("watched", actor_id_of(patient), True)
    assert (none.namespace, none.actor_id, none.is_proven) == (None, None, False)
    for handle in (identifier, patient):
        ray.kill(handle)


async def test_a_callers_error_is_a_hint_and_ray_decides(registry: RegistryConnection, settings: Settings) -> None:
    actor_class: Any = ray.remote(Quiet)
    handle = actor_class.options(name="called", namespace=settings.namespace, num_cpus=0).remote()
    await handle.whereabouts.remote()
    # no node and no process are known of it: only Ray knows
    living = Registration(new_instance_id(), "called", "called", settings.namespace, actor_id_of(handle))
    await registry.register(living)
    await registry.set_status(living.instance_id, Status.ALIVE, 2)
    assert await registry.report_dead_call(living.instance_id) is Verdict.SUSPECT
    assert (await registry.resolve(["called"])).value[0].instance is None
    await registry.beat(living.instance_id)
    assert (await registry.resolve(["called"])).value[0].instance is not None
    ray.kill(handle)

    async def is_dead() -> bool:
        return await registry.report_dead_call(living.instance_id) is Verdict.UNKNOWN

    await eventually(is_dead)

    def is_stored() -> bool:
        return rows(settings, "select status::text, cause_kind::text from registry_instance") == [
            ("dead", "actor_died")
        ]

    await eventually(is_stored)
    assert await registry.report_dead_call(new_instance_id()) is Verdict.UNKNOWN


async def test_mass_silence_freezes_expiry_and_releases_only_the_confirmed(
    ray_cluster: Cluster, settings: Settings
) -> None:
    settings = with_short_leases(settings, 0.5)
    await start_registry(settings)
    registry = RegistryConnection(settings.namespace, settings.call_timeout_s)
    silent = [Registration(new_instance_id(), f"silent-{n}") for n in range(12)]
    # Ray has no such actors: for these it is a second witness
    fallen = [Registration(new_instance_id(), f"fallen-{n}", f"fallen-{n}", settings.namespace, "00") for n in range(3)]
    try:
        await asyncio.gather(*(registry.register(row) for row in [*silent, *fallen]))

        def dead() -> list[tuple[Any, ...]]:
            columns = "logical_id, cause_kind::text"
            return rows(settings, f"select {columns} from registry_instance where status = 'dead' order by 1")

        confirmed = [(f"fallen-{n}", "actor_died") for n in range(3)]
        await eventually(lambda: dead() == confirmed)
        assert (await registry.health()).is_frozen
        # they beat again: no other has died, and the freeze is over by itself
        await registry.beat_many([row.instance_id for row in silent])

        async def is_over() -> bool:
            return not (await registry.health()).is_frozen

        await eventually(is_over, every_s=0.01)
        assert dead() == confirmed
    finally:
        await stop_registry(settings.namespace)
