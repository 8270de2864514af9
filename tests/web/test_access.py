"""Every route of a real deployment that knows nobody without a token: what each token gets, and nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from seedcore.core.timeouts import within
from seedcore.settings import Settings
from tests.servers import PostgresServer
from tests.serving import Tokens, World, deployed
from tests.waiting import eventually
from tests.web.routes import status_of


@pytest.fixture(scope="module")
def deployment(server: PostgresServer, tokens: Tokens) -> Iterator[tuple[Settings, str]]:
    """One that nobody may even read without a token, and that trusts the proxy on this machine."""
    with deployed(server, "access", tokens=tokens, http_anonymous="none", http_trusted_proxies="127.0.0.0/8") as (
        settings,
        url,
    ):
        yield settings, url


async def test_caller_without_the_read_right_sees_only_that_it_works(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.url, timeout=30) as stranger:
        alive = (await stranger.get("/healthz")).json()
        ready = (await stranger.get("/readyz")).json()
        access = (await stranger.get("/v1/access")).json()
    assert (alive["status"], alive["registry"], alive["registry_problem"]) == ("ok", None, None)
    assert ready == {"ready": True, "sources": None}
    assert access == {"right": "none", "name": None, "problem": None, "anonymous": "none"}
    known = (await world.ask("GET", "/v1/access")).json()
    assert (known["right"], known["name"]) == ("write", "writer")
    assert (await world.ask("GET", "/healthz")).json()["registry"] is not None
    assert (await world.ask("GET", "/readyz")).json()["sources"]["postgres"] == "ok"


async def test_the_proxy_of_this_machine_grants_rights_to_its_callers(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.url, timeout=30) as proxy:
        for said, expected in (("read", 403), ("write", 404), ("none", 403)):
            drained = await proxy.post("/v1/agents/nobody/drain", json={}, headers={"X-SeedCore-Right": said})
            assert drained.status_code == expected, said
        # as proxies pass on what their callers sent, and for whom they ask
        passed_on = {"Authorization": "Bearer of-the-user", "X-Forwarded-For": "203.0.113.5"}
        for said, expected in (("read", 403), ("write", 404)):
            headers = {"X-SeedCore-Right": said, **passed_on}
            drained = await proxy.post("/v1/agents/nobody/drain", json={}, headers=headers)
            assert drained.status_code == expected, said
        # without its word it is anybody
        assert (await proxy.get("/v1/instances", headers=passed_on)).status_code == 401


async def test_a_feed_ends_with_the_token_that_it_was_opened_with(world: World) -> None:
    before = world.tokens.file.read_text()
    headers = {"Authorization": f"Bearer {world.tokens.read}"}
    try:
        async with (
            httpx.AsyncClient(base_url=world.url, timeout=30) as client,
            client.stream("GET", "/v1/watch", headers=headers) as answer,
        ):
            lines = answer.aiter_lines()
            while not (await anext(lines)).startswith("event: state"):
                pass
            world.tokens.file.write_text("\n".join(line for line in before.splitlines() if "reader" not in line) + "\n")
            # it ends by itself
            async for _ in lines:
                pass
    finally:
        world.tokens.file.write_text(before)


async def test_body_that_arrives_too_slowly_is_refused_and_blocks_no_other_request(world: World) -> None:
    host, port = world.url.removeprefix("http://").split(":")
    head = f"POST /v1/resolve HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {world.tokens.read}\r\n"
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: 30\r\n\r\n{{".encode())
    answer = await within(reader.readline(), 60)
    assert b"408" in answer, answer
    writer.close()


async def test_who_did_it_is_in_the_history(world: World) -> None:
    done = await world.ask("POST", "/v1/agents/bee/drain", json={"reason": "a new fan"})
    assert done.status_code == 200, done.text
    await world.ask("POST", "/v1/agents/bee/undrain", json={})
    transitions = (await world.ask("GET", "/v1/history/bee?limit=2")).json()["transitions"]
    assert [(one["hold"], one["cause"]) for one in transitions] == [
        ("operator", {"kind": "operator", "detail": None, "by": "writer"}),
        ("operator", {"kind": "operator", "detail": "a new fan", "by": "writer"}),
    ]


async def test_a_token_taken_out_of_the_file_ends_at_once(world: World) -> None:
    before = world.tokens.file.read_text()
    try:
        world.tokens.file.write_text("\n".join(line for line in before.splitlines() if "reader" not in line) + "\n")
        reader = {"Authorization": f"Bearer {world.tokens.read}"}

        async def is_refused() -> bool:
            return (await status_of(world, "GET", "/v1/instances", reader)).status_code == 401

        await eventually(is_refused)
        assert (await world.ask("GET", "/v1/instances")).status_code == 200
    finally:
        world.tokens.file.write_text(before)


async def test_no_secret_is_in_an_answer_or_a_log(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    secrets = (world.tokens.read, world.tokens.write, world.tokens.expired, "sct_wrong")
    told = ""
    for secret in secrets:
        for path in ("/v1/overview", "/v1/access", "/healthz", "/v1/agents/ant", f"/v1/agents/{secret[:20]}"):
            answer = await status_of(world, "GET", path, {"Authorization": f"Bearer {secret}"})
            told += answer.text
    await asyncio.sleep(0)
    out, err = capfd.readouterr()
    password = world.settings.pg_dsn
    assert password is not None
    for secret in (*secrets, password.get_secret_value()):
        assert secret not in told + out + err
