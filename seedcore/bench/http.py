"""Discovery over HTTP, behind each of Serve's ingresses, compared with empty endpoints of the same Serve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx
import psutil
import ray
from fastapi import FastAPI, Response
from ray import serve

from seedcore.bench.environment import Bench, Place, free_ports
from seedcore.bench.http_caller import Server, rate
from seedcore.bench.ingest import registered
from seedcore.bench.listing import Echo
from seedcore.bench.own_haproxy import haproxy_folder, own_haproxy
from seedcore.bench.report import Figure, Ratio, Result
from seedcore.core.errors import RegistryUnavailableError
from seedcore.discovery.app import Discovery
from seedcore.discovery.routes import api

CALLERS = 8
AGENTS = 200
LEASE_S = 3600.0
READY_S = 60.0

_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
_OPTIMIZED = "RAY_SERVE_THROUGHPUT_OPTIMIZED"
INGRESSES: Mapping[str, Mapping[str, str]] = {
    "proxy": {_HAPROXY: "0", _OPTIMIZED: "0"},
    "HAProxy": {_HAPROXY: "1", _OPTIMIZED: "0"},
    "HAProxy optimized": {_HAPROXY: "1", _OPTIMIZED: "1"},
}

empty = FastAPI()


@empty.get("/")
async def nothing(size: int) -> Response:
    """Return a body of `size` bytes."""
    return Response("x" * size, media_type="application/json")


@empty.get("/call")
async def call(size: int) -> Response:
    """The same, after a call of an actor that does nothing."""
    await serve.get_replica_context().servable_object.echo.echo.remote(None)
    return Response("x" * size, media_type="application/json")


class Empty:
    """A replica without state. `echo` is an actor that does nothing."""

    def __init__(self) -> None:
        echo: Any = ray.remote(Echo)
        self.echo = echo.options(num_cpus=0, max_concurrency=100).remote()


@dataclass
class Measured:
    """Answers to one kind of request: per second in each round, and the CPU time of the replica."""

    rates: list[float] = field(default_factory=list)
    answers: float = 0.0
    cpu_s: float = 0.0

    @property
    def rate(self) -> float:
        """Answers per second, the mean of the rounds."""
        return sum(self.rates) / len(self.rates)

    @property
    def cpu_us(self) -> float:
        """CPU time of the replica for an answer, in microseconds."""
        return 1e6 * self.cpu_s / self.answers


async def run(bench: Bench) -> Result:
    """Measure answers per second. The endpoints alternate every second, so that a noisy machine affects all alike."""
    turns, round_s = (1, 0.3) if bench.is_quick else (8, 1.0)
    dsn = bench.new_database()
    await registered(dsn, AGENTS, is_alive=True)
    place = await bench.place("http", dsn, lease_s=LEASE_S, beat_interval_s=LEASE_S / 3)
    figures: list[Figure] = []
    ratios: list[Ratio] = []
    try:
        for ingress, variables in INGRESSES.items():
            measured = await _behind(place, variables, turns, round_s)
            figures += _figures(ingress, measured)
            ratios += _ratios(ingress, measured)
    finally:
        await bench.leave(place)
    notes = [
        f"{CALLERS} callers; CPU: of the replica, for an answer; optimized: RAY_SERVE_THROUGHPUT_OPTIMIZED=1",
        "discovery makes a page once for a query and a version of its local copy",
    ]
    return Result("http", figures, ratios, notes=notes)


def _figures(ingress: str, measured: Mapping[str, Measured]) -> list[Figure]:
    names = {
        "page": "a page of 100 instances",
        "rendered": "the same, another query each time",
        "empty page": "empty endpoint, as long as the page",
        "resolve": "one agent resolved",
        "empty": "empty endpoint, as long as the resolution",
        "agent": "one agent with its history",
        "call": "empty endpoint that calls an actor",
    }
    return [
        figure
        for kind, name in names.items()
        for figure in (
            Figure(f"{ingress}: {name}", measured[kind].rate, "/ s"),
            Figure(f"{ingress}: {name}, CPU", measured[kind].cpu_us, "us"),
        )
    ]


def _ratios(ingress: str, measured: Mapping[str, Measured]) -> list[Ratio]:
    def ratio(name: str, ours: str, theirs: str, bound: str | None = None) -> Ratio:
        return Ratio(f"{ingress}: {name}", measured[ours].rate / measured[theirs].rate, bound)

    return [
        ratio("page / empty", "page", "empty page", ">= 0.85"),
        ratio("page of another query / empty", "rendered", "empty page"),
        ratio("resolve / empty", "resolve", "empty", ">= 0.7"),
        ratio("one agent / empty with a call", "agent", "call"),
    ]


async def _behind(place: Place, variables: Mapping[str, str], turns: int, round_s: float) -> dict[str, Measured]:
    """Each kind of request behind an ingress."""
    with haproxy_folder() as folder:
        (port,) = free_ports(1)
        try:
            await asyncio.to_thread(_deploy, place, port, {**own_haproxy(folder), **variables})
            return await _measured(port, turns, round_s)
        finally:
            await asyncio.to_thread(serve.shutdown)


async def _measured(port: int, turns: int, round_s: float) -> dict[str, Measured]:
    server = Server("127.0.0.1", port)
    sizes = await _sizes_when_followed(f"http://127.0.0.1:{port}")
    replicas = {"registry": _replica("registry:Discovery"), "empty": _replica("empty:Empty")}
    serial = count()

    def agent() -> str:
        return f"agent-{next(serial) % AGENTS:06}"

    kinds: dict[str, Callable[[], str]] = {
        "page": lambda: "/registry/v1/instances",
        # a new query is not in discovery's cache of answers
        "rendered": lambda: f"/registry/v1/instances?selector=!turn-{next(serial)}",
        "empty page": lambda: f"/empty/?size={sizes['page']}",
        "resolve": lambda: f"/registry/v1/resolve/{agent()}",
        "empty": lambda: f"/empty/?size={sizes['resolve']}",
        "agent": lambda: f"/registry/v1/agents/{agent()}",
        "call": lambda: f"/empty/call?size={sizes['agent']}",
    }
    measured = {kind: Measured() for kind in kinds}
    for target in kinds.values():
        await rate(server, target, CALLERS, round_s / 2)  # warm
    for _ in range(turns):
        for kind, target in kinds.items():
            replica = replicas[target().split("/")[1]]
            before = replica.cpu_times()
            done, took_s = await rate(server, target, CALLERS, round_s)
            after = replica.cpu_times()
            one = measured[kind]
            one.rates.append(done / took_s)
            one.answers += done
            one.cpu_s += after.user + after.system - before.user - before.system
    return measured


def _deploy(place: Place, port: int, variables: Mapping[str, str]) -> None:
    environment = {"env_vars": dict(variables)}
    serve.start(http_options={"host": "127.0.0.1", "port": port}, controller_options={"runtime_env": environment})
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 0, "runtime_env": environment},
        "max_ongoing_requests": 100,
    }
    discovery: Any = serve.deployment(name="Discovery", **options)(serve.ingress(api)(Discovery))
    serve.run(discovery.bind(place.settings, False), name="registry", route_prefix="/registry")
    nothing_there: Any = serve.deployment(name="Empty", **options)(serve.ingress(empty)(Empty))
    serve.run(nothing_there.bind(), name="empty", route_prefix="/empty")


def _replica(name: str) -> psutil.Process:
    """The process of a replica of this cluster."""
    title, ours = f"ServeReplica:{name}", {child.pid for child in psutil.Process().children(recursive=True)}
    found = [
        one
        for one in psutil.process_iter(["cmdline"])
        if one.pid in ours and any(title in word for word in one.info["cmdline"] or ())
    ]
    assert len(found) == 1, f"{len(found)} replicas of {name}"
    return found[0]


async def _sizes_when_followed(url: str) -> dict[str, int]:
    """The sizes of discovery's answers, once both applications answer and discovery answers from its local copy."""
    ends_s = time.monotonic() + READY_S
    paths = {
        "page": "/registry/v1/instances",
        "resolve": "/registry/v1/resolve/agent-000000",
        "agent": "/registry/v1/agents/agent-000000",
    }
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        while time.monotonic() < ends_s:
            answers = {kind: await client.get(path) for kind, path in paths.items()}
            theirs = await client.get("/empty/call?size=1")
            if theirs.is_success and all(answer.is_success for answer in answers.values()):
                sources = [answers[kind].json()["source"] for kind in ("page", "resolve")]
                if sources == ["snapshot", "snapshot"]:
                    return {kind: len(answer.content) for kind, answer in answers.items()}
            await asyncio.sleep(0.1)
    raise RegistryUnavailableError(f"discovery does not follow the registry within {READY_S:g} s")
