"""Messages are for people: with other words in all of them every caller behaves the same (law 2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from seedcore.cli.errors import HttpProblemError, exit_code_of
from seedcore.cli.why import reason_of
from seedcore.core.causes import CauseKind
from seedcore.core.errors import RegistryError
from seedcore.discovery.access import Access
from seedcore.discovery.direct import Direct
from seedcore.discovery.guard import Guard
from seedcore.discovery.handlers import install
from seedcore.discovery.overview import Overviews
from seedcore.discovery.pages import AnswerCache
from seedcore.discovery.parameters import this_replica
from seedcore.discovery.problems import ProblemCode, codes_by_status, problem_of
from seedcore.discovery.rendering import agent_answer
from seedcore.discovery.routes import health, v1
from seedcore.discovery.traffic import Rates
from seedcore.settings import Settings
from tests.builders import iid
from tests.unit.callers import AGENTS, OTHER_WORDS, World, outcome, reworded, world_of
from tests.unit.test_errors import CLASSES, sample

OUTAGES = ((), ("connection",), ("connection", "database"), ("connection", "database", "listing"), ("database",))
FOR_PEOPLE = frozenset({"detail", "why", "title", "problem", "registry_problem", "store_problem", "watch_problem"})
TIMES = frozenset(
    {
        *("as_of", "started_at", "last_heartbeat", "status_changed_at", "stopped_at", "silence_s", "at"),
        *("since", "expires_at"),
    }
)
VARYING = frozenset({"version", "registry", "as_of_registry", "stream", "instance_id"})
WITH_CAUSES = ("alive", "draining", "dead", "held", "killed", "deregistered")
REQUESTS: Sequence[tuple[str, str, Any]] = (
    ("GET", "/v1/instances", None),
    ("GET", "/v1/instances?verdict=fresh", None),
    ("GET", "/v1/instances?limit=0", None),
    ("GET", "/v1/instances?cursor=junk", None),
    ("GET", f"/v1/instances/{iid(1)}", None),
    ("GET", f"/v1/instances/{iid(99)}", None),
    *(("GET", f"/v1/agents/{agent}", None) for agent in (*WITH_CAUSES, "never-was")),
    *(("GET", f"/v1/history/{agent}", None) for agent in (*WITH_CAUSES, "never-was")),
    ("GET", "/v1/deaths", None),
    ("GET", "/v1/epoch", None),
    ("GET", "/v1/overview", None),
    ("GET", "/v1/watch", None),
    ("GET", "/readyz", None),
    ("GET", "/healthz", None),
    ("POST", "/v1/resolve", {"logical_ids": list(AGENTS)}),
    ("POST", "/v1/resolve", {"logical_ids": []}),
    *(("GET", f"/v1/resolve/{agent}{query}", None) for agent in AGENTS for query in ("", "?allow_late=true")),
    ("POST", "/v1/agents/dead/undrain", {}),
    ("POST", "/v1/agents/alive/drain", {}),
    ("DELETE", f"/v1/instances/{iid(7)}", None),
    ("GET", "/v2/none", None),
)


async def behaviour(world: World) -> list[Any]:
    """What every caller comes to, by outage and agent."""
    found: list[Any] = []
    for outage in OUTAGES:
        world.take_away(*outage)
        for agent in AGENTS:
            found += [
                (outage, agent, await outcome(locate(agent)))
                for locate in (world.hybrid.locate, world.strict.locate, world.reader.handle_of)
            ]
        found.append((outage, await outcome(world.reader.resolve(AGENTS))))
        states = await world.reader.sources()
        found.append((states.is_ready, states.registry is None, states.postgres is None, states.ray is None))
    return found


async def test_rewording_every_message_changes_no_resolution() -> None:
    async with world_of() as plain, world_of(is_reworded=True) as other:
        assert await behaviour(plain) == await behaviour(other)


@contextmanager
def served(world: World, *, is_direct: bool = True) -> Iterator[httpx.AsyncClient]:
    """The HTTP API over a world, without Serve; with or without the answers ahead of its routes."""
    settings = Settings(namespace="nowhere", http_anonymous="write")
    access, rates = Access(settings, "127.0.0.1"), Rates(10_000)
    replica = SimpleNamespace(
        reader=world.reader,
        settings=settings,
        access=access,
        rates=rates,
        max_watchers=10,
        answers=AnswerCache(),
        # what is answered depends on the outage alone, not on how fast this machine is
        overviews=Overviews(settings, world.reader, timeout_s=60.0, max_age_s=0.0),
    )
    api = FastAPI()
    install(api)
    api.include_router(v1)
    api.include_router(health)
    api.dependency_overrides[this_replica] = lambda: replica
    replica_here: Any = lambda: replica  # noqa: E731
    behind_guard = Direct(api, replica_here) if is_direct else api
    transport = httpx.ASGITransport(Guard(behind_guard, lambda: (access, rates)))
    yield httpx.AsyncClient(transport=transport, base_url="http://localhost")


def without_words(value: Any) -> Any:
    """An answer without its texts for people, and without what differs from run to run."""
    if isinstance(value, dict):
        # the reason of a hold is an operator's text; that of a resolution is a kind
        for_people = FOR_PEOPLE | {"reason"} if "since" in value else FOR_PEOPLE
        return {
            key: value[key] is None if key in for_people else without_words(value[key])
            for key in value
            if key not in TIMES | VARYING
        }
    if isinstance(value, list):
        return [without_words(each) for each in value]
    return value


async def answers(world: World) -> list[Any]:
    found: list[Any] = []
    with served(world) as client:
        for outage in OUTAGES:
            world.take_away(*outage)
            for method, path, body in REQUESTS:
                answer = await client.request(method, path, json=body)
                shown = without_words(answer.json())
                if "sources" in shown and shown["sources"] is not None:
                    shown["sources"] = {name: state == "ok" for name, state in shown["sources"].items()}
                found.append((outage, method, path, answer.status_code, shown))
        await client.aclose()
    return found


async def test_rewording_every_message_changes_no_answer_over_http() -> None:
    async with world_of() as plain, world_of(is_reworded=True) as other:
        for one, reworded_one in zip(await answers(plain), await answers(other), strict=True):
            assert one == reworded_one


async def explained(world: World) -> list[Any]:
    """What `seedcore why` returns about each agent, but for its texts and times."""
    found: list[Any] = []
    for agent in AGENTS:
        reason = reason_of(agent_answer(await world.connection.describe(agent)))
        kind = None if reason.cause is None else (reason.cause.kind, reason.cause.by)
        found.append((agent, reason.state, kind, [(hold.kind, hold.by) for hold in reason.holds], reason.advice))
    return found


async def test_rewording_every_cause_and_hold_changes_no_advice() -> None:
    async with world_of() as plain, world_of(is_reworded=True) as other:
        explanations = await explained(plain)
        assert explanations == await explained(other)
        assert "SIGKILL (pid 7)" in str(await plain.connection.describe("killed"))
        described = await other.connection.describe("killed")
        assert "SIGKILL (pid 7)" not in str(described)
        assert OTHER_WORDS in str(described)
    states = {agent: (state, kind and kind[0]) for agent, state, kind, _, _ in explanations}
    assert states["killed"] == ("dead", CauseKind.PROCESS_KILLED)
    assert states["deregistered"] == ("dead", CauseKind.OPERATOR)
    assert states["dead"] == ("dead", CauseKind.AGENT)
    assert states["held"] == ("draining", CauseKind.OPERATOR)


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not RegistryError])
def test_exit_code_of_an_error_depends_on_its_class_alone(kind: type[RegistryError]) -> None:
    assert exit_code_of(sample(kind)) == exit_code_of(reworded(sample(kind)))


@pytest.mark.parametrize(("status", "codes"), codes_by_status().items())
def test_exit_code_of_a_problem_depends_on_its_status_and_code_alone(status: int, codes: list[ProblemCode]) -> None:
    for code in codes:
        plain, other = (HttpProblemError(status, detail, code) for detail in ("no such agent", OTHER_WORDS))
        assert exit_code_of(plain) == exit_code_of(other)


@pytest.mark.parametrize("kind", CLASSES)
def test_problem_of_an_error_depends_on_its_class_alone(kind: type[RegistryError]) -> None:
    error = sample(kind) if kind is not RegistryError else RegistryError()
    if hasattr(error, "reason"):
        error = kind("agent", "draining", "it is draining")
    plain, other = problem_of(error), problem_of(reworded(error) if kind is not RegistryError else error)
    assert (plain.status, plain.code, plain.reason) == (other.status, other.code, other.reason)
    assert (OTHER_WORDS in other.detail) == any(name in {"why", "detail"} for name in vars(error))
