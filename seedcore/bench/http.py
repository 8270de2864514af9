"""Discovery over HTTP, compared with an empty endpoint of the same response size in the same Serve."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import httpx
from fastapi import FastAPI, Response
from ray import serve

from seedcore.bench.environment import Bench, Place
from seedcore.bench.ingest import registered
from seedcore.bench.report import Figure, Ratio, Result
from seedcore.core.errors import RegistryUnavailableError
from seedcore.discovery.app import Discovery
from seedcore.discovery.routes import api

CALLERS = 8
AGENTS = 200

empty = FastAPI()


@empty.get("/")
async def nothing(size: int) -> Response:
    """Return a body of `size` bytes."""
    return Response("x" * size, media_type="application/json")


class Empty:
    """A replica without state."""


async def run(bench: Bench) -> Result:
    """Measure answers per second. The endpoints alternate every second, so that a noisy machine affects all alike."""
    turns = 1 if bench.is_quick else 8
    dsn = bench.new_database()
    await registered(dsn, AGENTS)
    place = await bench.place("http", dsn, lease_s=600.0)
    try:
        return await _measure(place, turns)
    finally:
        serve.shutdown()
        await bench.leave(place)


async def _measure(place: Place, turns: int) -> Result:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    await asyncio.to_thread(_deploy, place, port)
    ours, theirs = f"http://127.0.0.1:{port}/registry/v1/instances?status=starting", f"http://127.0.0.1:{port}/empty/"
    async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=CALLERS)) as client:
        size = await _size_when_followed(client, ours)
        theirs = f"{theirs}?size={size}"
        # a new query is not in discovery's cache of answers
        serial = count()
        kinds: dict[str, Callable[[], str]] = {
            "ours": lambda: ours,
            "uncached": lambda: f"{ours}&selector=!turn-{next(serial)}",
            "theirs": lambda: theirs,
        }
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for url in kinds.values():
            await _rate(client, url, 0.5)  # warm
        for _ in range(turns):
            for kind, url in kinds.items():
                rates[kind].append(await _rate(client, url, 1.0))
    mean = {kind: sum(found) / turns for kind, found in rates.items()}
    return Result(
        "http",
        [
            Figure("a page of 100 instances", mean["ours"], "/ s"),
            Figure("the same, rendered for each request", mean["uncached"], "/ s"),
            Figure("an empty endpoint of the same size", mean["theirs"], "/ s"),
            Figure("size", size / 1024, "KiB"),
        ],
        [
            Ratio("ours / empty", mean["ours"] / mean["theirs"], ">= 0.85"),
            Ratio("rendered for each request / empty", mean["uncached"] / mean["theirs"]),
        ],
        notes=[f"{CALLERS} callers; discovery renders an answer once per query and version of its cache"],
    )


def _deploy(place: Place, port: int) -> None:
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 100}
    discovery: Any = serve.deployment(name="Discovery", **options)(serve.ingress(api)(Discovery))
    serve.run(discovery.bind(place.settings, False), name="registry", route_prefix="/registry")
    nothing_there: Any = serve.deployment(name="Empty", **options)(serve.ingress(empty)(Empty))
    serve.run(nothing_there.bind(), name="empty", route_prefix="/empty")


async def _size_when_followed(client: httpx.AsyncClient, url: str) -> int:
    for _ in range(200):
        answer = (await client.get(url)).raise_for_status()
        if answer.json()["source"] == "snapshot":
            return len(answer.content)
        await asyncio.sleep(0.1)
    raise RegistryUnavailableError("discovery does not follow the registry")


async def _rate(client: httpx.AsyncClient, url: Callable[[], str], seconds: float) -> float:
    done = 0
    began_s = time.monotonic()

    async def call() -> None:
        nonlocal done
        while time.monotonic() < began_s + seconds:
            (await client.get(url())).raise_for_status()
            done += 1

    await asyncio.gather(*(call() for _ in range(CALLERS)))
    return done / (time.monotonic() - began_s)
