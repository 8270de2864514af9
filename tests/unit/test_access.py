"""Who may do what over HTTP: tokens, proxies, and those who show nothing; every request passes the guard."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from seedcore.core.errors import ConfigurationError, InvalidInputError
from seedcore.discovery.access import Access, check_bind, check_proxies, is_behind_haproxy, is_loopback
from seedcore.discovery.guard import STATE, Guard, needed_right
from seedcore.discovery.tokens import Right, TokenFile, new_token, parse_tokens
from seedcore.discovery.traffic import MAX_CALLERS, Rates
from seedcore.settings import Settings, load_settings
from tests.waiting import eventually

NOW = datetime(2026, 3, 1, tzinfo=UTC)
LOOPBACK = "127.0.0.1"
PUBLIC = "0.0.0.0"
# of this machine, on its network
LAN = "10.20.30.40"


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, str]:
    """Secrets by name, and the file of their hashes at `file`."""
    past, future = datetime.now(UTC) - timedelta(days=1), datetime.now(UTC) + timedelta(days=1)
    made = {
        "reader": new_token("reader", Right.READ),
        "writer": new_token("writer", Right.WRITE, future),
        "bygone": new_token("bygone", Right.WRITE, past),
    }
    file = tmp_path / "tokens"
    file.write_text("# who may ask\n\n" + "\n".join(token.line() for _, token in made.values()) + "\n")
    return {"file": str(file), **{name: secret for name, (secret, _) in made.items()}}


def settings_of(**values: object) -> Settings:
    return Settings.model_validate(values)


async def answered(_scope: Scope, _receive: Receive, _send: Send) -> None:
    caller = _scope["state"][STATE]
    await PlainTextResponse(f"{caller.name}: {caller.right}")(_scope, _receive, _send)


def asker(access: Access, rates: Rates | None = None, peer: str = LOOPBACK) -> Callable[..., Awaitable[httpx.Response]]:
    """Asks a guarded application that answers everything."""
    judges = access, rates if rates is not None else Rates(1000)
    guard = Guard(answered, lambda: judges)

    async def server(scope: Scope, receive: Receive, send: Send) -> None:
        # a connection of a machine to itself has one address at both ends
        await guard({**scope, "server": (LAN, 8000)}, receive, send)

    transport = httpx.ASGITransport(server, client=(peer, 1))

    async def ask(method: str, path: str, token: str | None = None, **headers: str) -> httpx.Response:
        shown = {} if token is None else {"Authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, headers={**shown, **headers})

    return ask


# What a request needs


@pytest.mark.parametrize(
    ("method", "path", "right"),
    [
        ("GET", "/", Right.NONE),
        ("GET", "/page/app.js", Right.NONE),
        ("GET", "/healthz", Right.NONE),
        ("GET", "/readyz", Right.NONE),
        ("GET", "/v1/access", Right.NONE),
        ("GET", "/v1/instances", Right.READ),
        ("HEAD", "/v1/instances", Right.READ),
        ("GET", "/v1/endpoints", Right.READ),
        ("GET", "/v1/sd/prometheus", Right.READ),
        ("GET", "/page", Right.READ),
        ("GET", "/some/route/of/tomorrow", Right.READ),
        ("POST", "/v1/resolve", Right.READ),
        ("POST", "/v1/resolve/", Right.WRITE),
        ("POST", "/v1/agents/a/drain", Right.WRITE),
        ("DELETE", "/v1/agents/a", Right.WRITE),
        ("PUT", "/", Right.WRITE),
        ("POST", "/healthz", Right.WRITE),
        ("OPTIONS", "/v1/instances", Right.WRITE),
        ("TRACE", "/", Right.WRITE),
    ],
)
def test_what_is_not_opened_needs_a_right(method: str, path: str, right: Right) -> None:
    assert needed_right(method, path) is right


READ, WRITE, OPEN = ("GET", "/v1/instances"), ("POST", "/v1/agents/a/drain"), ("GET", "/healthz")


@pytest.mark.parametrize(
    ("anonymous", "who", "expected"),
    [
        # open, read, write
        ("none", None, (200, 401, 401)),
        ("none", "wrong", (200, 401, 401)),
        ("none", "bygone", (200, 401, 401)),
        ("none", "reader", (200, 200, 403)),
        ("none", "writer", (200, 200, 200)),
        ("read", None, (200, 200, 401)),
        # who shows a token that does not hold is told so, also where it needed none
        ("read", "wrong", (200, 401, 401)),
        ("read", "bygone", (200, 401, 401)),
        ("read", "reader", (200, 200, 403)),
        ("read", "writer", (200, 200, 200)),
        ("write", None, (200, 200, 200)),
        ("write", "wrong", (200, 401, 401)),
        ("write", "reader", (200, 200, 403)),
    ],
)
async def test_each_right_is_what_was_granted(
    tokens: dict[str, str], anonymous: str, who: str | None, expected: tuple[int, ...]
) -> None:
    access = Access(settings_of(SEEDCORE_HTTP_TOKENS_FILE=tokens["file"], SEEDCORE_HTTP_ANONYMOUS=anonymous), PUBLIC)
    ask = asker(access)
    secret = None if who is None else tokens.get(who, "sct_wrong")
    answers = [await ask(method, path, secret) for method, path in (OPEN, READ, WRITE)]
    assert tuple(answer.status_code for answer in answers) == expected
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        if answer.status_code in {401, 403}:
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.headers["www-authenticate"].startswith('Bearer realm="seedcore"')
            assert answer.json()["status"] == answer.status_code
            assert secret is None or secret not in answer.text


async def test_whose_token_it_is_is_known(tokens: dict[str, str]) -> None:
    access = Access(settings_of(SEEDCORE_HTTP_TOKENS_FILE=tokens["file"]), PUBLIC)
    assert (await asker(access)(*WRITE, tokens["writer"])).text == "writer: write"


@pytest.mark.parametrize("shown", ["Basic d3JpdGVyOnBhc3N3b3Jk", "Bearer", "Bearer ", "bearer   ", "Token x", "é"])
async def test_what_is_no_token_of_ours_is_none(tokens: dict[str, str], shown: str) -> None:
    access = Access(settings_of(SEEDCORE_HTTP_TOKENS_FILE=tokens["file"], SEEDCORE_HTTP_ANONYMOUS="write"), PUBLIC)
    caller = access.caller([(b"authorization", shown.encode("latin-1"))], None, NOW)
    assert (caller.right, caller.name, bool(caller.problem)) == (Right.NONE, None, True)


# Who shows nothing


@pytest.mark.parametrize(
    ("host", "right"), [(LOOPBACK, "read"), ("::1", "read"), ("localhost", "read"), (PUBLIC, "none"), (None, "none")]
)
def test_only_on_loopback_may_anybody_read_by_default(host: str | None, right: str) -> None:
    assert str(Access(settings_of(), host).anonymous) == right


@pytest.mark.parametrize("host", [PUBLIC, "::", "10.1.2.3", "db.example"])
def test_an_open_deployment_on_a_network_is_refused_unless_it_is_meant(host: str, tokens: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=r"SEEDCORE_HTTP_ANONYMOUS.*listens on .*seedcore token new"):
        check_bind(settings_of(), host)
    for said in (
        {"SEEDCORE_HTTP_ANONYMOUS": "read"},
        {"SEEDCORE_HTTP_ANONYMOUS": "none"},
        {"SEEDCORE_HTTP_TOKENS_FILE": tokens["file"]},
        {"SEEDCORE_HTTP_TRUSTED_PROXIES": "10.0.0.0/8"},
    ):
        check_bind(settings_of(**said), host)
    check_bind(settings_of(), LOOPBACK)
    check_bind(settings_of(), None)
    assert not is_loopback(host)


# A trusted proxy


@pytest.mark.parametrize(
    ("peer", "said", "expected"),
    [
        ("10.1.2.3", "write", 200),
        ("10.1.2.3", "WRITE ", 200),
        ("10.1.2.3", "read", 403),
        ("10.1.2.3", "admin", 403),
        ("10.1.2.3", "", 403),
        ("10.1.2.3", None, 401),
        ("192.168.0.1", "write", 401),
        ("not an address", "write", 401),
    ],
)
async def test_only_a_trusted_proxy_grants_rights_to_a_caller(peer: str, said: str | None, expected: int) -> None:
    access = Access(settings_of(SEEDCORE_HTTP_TRUSTED_PROXIES="10.0.0.0/8, fd00::/8"), PUBLIC)
    headers = {} if said is None else {"X-SeedCore-Right": said}
    assert (await asker(access, peer=peer)(*WRITE, **headers)).status_code == expected


@pytest.mark.parametrize("peer", ["::ffff:10.1.2.3", "fd00::7"])
async def test_a_proxy_is_known_by_either_kind_of_address_whatever_token_its_callers_have(peer: str) -> None:
    access = Access(settings_of(SEEDCORE_HTTP_TRUSTED_PROXIES="10.0.0.0/8, fd00::/8"), PUBLIC)
    headers = {"X-SeedCore-Right": "write", "Authorization": "Bearer of-the-user"}
    assert (await asker(access, peer=peer)(*WRITE, **headers)).status_code == 200


@pytest.mark.parametrize("name", [b"authorization", b"x-seedcore-right"])
def test_what_is_said_twice_is_not_believed(name: bytes, tokens: dict[str, str]) -> None:
    said = {"SEEDCORE_HTTP_TOKENS_FILE": tokens["file"], "SEEDCORE_HTTP_TRUSTED_PROXIES": "10.0.0.0/8"}
    access = Access(settings_of(**said), PUBLIC)
    value = b"write" if b"right" in name else b"Bearer " + tokens["writer"].encode()
    assert access.caller([(name, value)], "10.0.0.1", NOW).right is Right.WRITE
    assert access.caller([(name, b"read"), (name, value)], "10.0.0.1", NOW).right is Right.NONE


@pytest.mark.parametrize("said", [None, "", "*", "127.0.0.1"])
def test_an_address_that_could_be_made_up_is_no_proxys(monkeypatch: pytest.MonkeyPatch, said: str | None) -> None:
    settings = settings_of(SEEDCORE_HTTP_TRUSTED_PROXIES="10.0.0.0/8")
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    if said is not None:
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", said)
    with pytest.raises(ConfigurationError, match="FORWARDED_ALLOW_IPS: must be `none`"):
        check_proxies(settings)
    check_proxies(settings_of())
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "none")
    check_proxies(settings)


# Serve's HAProxy


def test_no_proxy_is_trusted_where_haproxy_hides_the_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "none")
    assert is_behind_haproxy()
    with pytest.raises(ConfigurationError, match=r"^SEEDCORE_HTTP_TRUSTED_PROXIES: must be empty .*HA_PROXY=1.*$"):
        check_proxies(settings_of(SEEDCORE_HTTP_TRUSTED_PROXIES="10.0.0.0/8"))
    check_proxies(settings_of())
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    assert not is_behind_haproxy()


async def test_where_addresses_are_hidden_callers_differ_by_their_tokens(tokens: dict[str, str]) -> None:
    settings = settings_of(SEEDCORE_HTTP_TOKENS_FILE=tokens["file"], SEEDCORE_HTTP_TRUSTED_PROXIES="10.0.0.0/8")
    access, rates = Access(settings, PUBLIC, knows_peers=False), Rates(2)
    believed = await asker(access, rates, peer="10.0.0.1")(*READ, **{"X-SeedCore-Right": "write"})
    assert believed.status_code == 401
    for address in ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"):
        flooded = await asker(access, rates, peer=address)(*READ)
    assert flooded.status_code == 429
    assert (await asker(access, rates, peer="10.0.0.1")(*READ, tokens["reader"])).status_code == 200
    assert (await asker(access, rates, peer="10.0.0.1")(*READ, tokens["writer"])).status_code == 200


# A browser that another site has sent here


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("app.localhost", 200),
        ("evil.example", 401),
        ("localhost.evil.example:8000", 401),
        ("10.0.0.1:8000", 401),
        ("[fd00::1]:8000", 401),
        ("[", 401),
    ],
)
async def test_what_only_this_machine_may_read_is_asked_by_its_own_name(host: str, expected: int) -> None:
    assert (await asker(Access(settings_of(), LOOPBACK))(*READ, Host=host)).status_code == expected


@pytest.mark.parametrize("right", ["read", "write"])
@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200),
        ("LOCALHOST.:8000", 200),
        # no other site can make a browser name an address
        ("10.0.0.1:8000", 200),
        ("[fd00::1]:8000", 200),
        ("seedcore.example:8000", 200),
        ("SeedCore.Example", 200),
        ("a.fleet.example", 200),
        ("a.b.fleet.example", 200),
        ("10.9.8.7", 200),
        (socket.gethostname(), 200),
        ("fleet.example", 401),
        ("evilfleet.example", 401),
        ("seedcore.example.evil.example", 401),
        ("evil.example", 401),
        ("10.0.0.1.evil.example", 401),
        ("evil.example:127.0.0.1", 401),
        ("[", 401),
    ],
)
async def test_every_right_without_a_token_is_asked_by_a_name_that_is_allowed(
    right: str, host: str, expected: int, tokens: dict[str, str]
) -> None:
    said = {"SEEDCORE_HTTP_ANONYMOUS": right, "SEEDCORE_HTTP_TOKENS_FILE": tokens["file"], "POD_IP": "10.9.8.7"}
    said["SEEDCORE_HTTP_ALLOWED_HOSTS"] = "seedcore.example, *.fleet.example"
    ask = asker(Access(settings_of(**said), PUBLIC))
    request = READ if right == "read" else WRITE
    answer = await ask(*request, Host=host)
    assert answer.status_code == expected
    assert expected == 200 or "SEEDCORE_HTTP_ALLOWED_HOSTS" in answer.json()["detail"]
    # another site has no token to send
    assert (await ask(*request, tokens["writer"], Host=host)).status_code == 200
    assert (await ask(*OPEN, Host=host)).status_code == 200


async def test_names_that_are_allowed_are_so_where_only_this_machine_may_read_too() -> None:
    ask = asker(Access(settings_of(SEEDCORE_HTTP_ALLOWED_HOSTS="seedcore.example"), LOOPBACK))
    assert (await ask(*READ, Host="seedcore.example:8000")).status_code == 200
    assert (await ask(*READ, Host="10.0.0.1")).status_code == 401


@pytest.mark.parametrize(
    "said", ["*", "*.", "a.example:8000", "http://a.example", "a..example", "-a.example", "a b.example", "*.*.example"]
)
def test_what_is_no_name_of_a_host_stops_the_start(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEDCORE_HTTP_ALLOWED_HOSTS", said)
    with pytest.raises(ConfigurationError, match="SEEDCORE_HTTP_ALLOWED_HOSTS: must be names like"):
        load_settings()


# The file


def test_a_new_token_is_kept_as_its_hash_alone() -> None:
    secret, token = new_token("ci", Right.WRITE, NOW)
    assert secret.startswith("sct_")
    assert secret not in token.line()
    assert parse_tokens(f"{token.line()}  \n") == ((token,), ())
    # as some editors begin a file
    assert parse_tokens(f"\ufeff{token.line()}\r\n") == ((token,), ())
    assert new_token("ci", Right.READ)[0] != secret


@pytest.mark.parametrize("name", ["", "two words", "#comment", "x" * 101, "a\x00"])
def test_a_name_that_the_file_could_not_hold_is_refused(name: str) -> None:
    with pytest.raises(InvalidInputError):
        new_token(name, Right.READ)


@pytest.mark.parametrize(
    "line",
    [
        "ci write",
        "ci admin sha256:" + "0" * 64,
        "ci write sha1:" + "0" * 40,
        "ci write sha256:" + "0" * 62,
        "ci write sha256:" + "x" * 64,
        "ci write sha256:" + "0" * 64 + " tomorrow",
        "ci write sha256:" + "0" * 64 + " 2026-01-01T00:00:00",
        "ci write sha256:" + "0" * 64 + " 2026-01-01T00:00:00Z and more",
        "ci write sct_a-secret-that-was-put-here-by-mistake",
        "x" * 101 + " write sha256:" + "0" * 64,
        "\ufeffci write sha256:" + "0" * 64,
        "c\ufffd write sha256:" + "0" * 64,
        "ci write sha256:" + "0" * 64 + "cd write sha256:" + "0" * 64,
    ],
)
def test_a_line_that_is_wrong_is_named_and_not_shown_and_the_others_hold(line: str) -> None:
    _, good = new_token("ci", Right.READ)
    tokens, problems = parse_tokens(f"# first\n{line}\n{good.line()}\n")
    assert tokens == (good,)
    assert [problem.startswith("line 2: must be NAME") for problem in problems] == [True]
    assert "by-mistake" not in problems[0]


def test_more_tokens_than_are_compared_in_time_are_left_out() -> None:
    line = new_token("ci", Right.READ)[1].line()
    tokens, problems = parse_tokens(f"{line}\n" * 1002)
    assert len(tokens) == 1000
    assert [problem.startswith("line 1001: ") and "1000 tokens" in problem for problem in problems] == [True]


@pytest.mark.parametrize("content", [None, "", "# nobody\n", "junk", b"\xff\xfe", "#" * (1024 * 1024 + 1)])
def test_a_file_without_a_token_stops_the_start(tmp_path: Path, content: str | bytes | None) -> None:
    file = tmp_path / "tokens"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    tokens = TokenFile(file)
    with pytest.raises(ConfigurationError, match="SEEDCORE_HTTP_TOKENS_FILE"):
        tokens.require_tokens()
    # who begins again at night begins, and lets nobody in
    assert tokens.owner_of("sct_any", NOW).right is Right.NONE


def test_tokens_are_rotated_without_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    (old, old_token), (new, next_token) = new_token("ci", Right.WRITE), new_token("ci", Right.WRITE)

    def write(text: str) -> None:
        # as Kubernetes and careful operators do: another file takes its place
        beside = tmp_path / "beside"
        beside.write_text(text)
        os.replace(beside, file)

    write(old_token.line())
    tokens = TokenFile(file)
    assert tokens.owner_of(old, NOW).right is Right.WRITE
    write(f"{old_token.line()}\n{next_token.line()}\n")
    assert [tokens.owner_of(secret, NOW).right for secret in (old, new)] == [Right.WRITE, Right.WRITE]
    # what was taken out is out, whatever has slipped in
    write(f"a slip of the hand\n{next_token.line()}")
    assert [tokens.owner_of(secret, NOW).right for secret in (old, new)] == [Right.NONE, Right.WRITE]
    assert [problem.partition(":")[0] for problem in tokens.problems] == ["line 1"]
    write("# nobody any more\n")
    assert tokens.owner_of(new, NOW).right is Right.NONE
    write(next_token.line())
    assert (tokens.owner_of(new, NOW).right, tokens.problems) == (Right.WRITE, ())
    file.unlink()
    assert tokens.owner_of(new, NOW).right is Right.NONE
    write(next_token.line())
    assert tokens.owner_of(new, NOW).right is Right.WRITE


def test_what_is_wrong_with_the_file_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tokens"
    file.write_text("junk\nmore junk here\n")
    tokens = TokenFile(file)
    for _ in range(5):
        tokens.owner_of("sct_any", NOW)
    assert len(caplog.records) == 2
    file.unlink()
    for _ in range(5):
        tokens.owner_of("sct_any", NOW)
    assert len(caplog.records) == 3


def test_a_world_writable_file_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(new_token("ci", Right.WRITE)[1].line())
    file.chmod(0o666)
    assert [problem for problem in TokenFile(file).problems if "chmod o-w" in problem] != []


def test_a_file_that_grows_beyond_its_bound_leaves_what_it_had(tmp_path: Path) -> None:
    secret, token = new_token("ci", Right.WRITE)
    file = tmp_path / "tokens"
    file.write_text(token.line())
    tokens = TokenFile(file)
    file.write_text("#" * (1024 * 1024 + 1))
    assert tokens.owner_of(secret, NOW).right is Right.WRITE
    assert len(tokens.problems) == 1


def test_a_token_ends_when_it_was_said_to(tmp_path: Path) -> None:
    secret, token = new_token("ci", Right.READ, NOW)
    file = tmp_path / "tokens"
    file.write_text(token.line())
    tokens = TokenFile(file)
    assert tokens.owner_of(secret, NOW - timedelta(seconds=1)).right is Right.READ
    ended = tokens.owner_of(secret, NOW)
    assert (ended.right, ended.problem) == (Right.NONE, "the token has expired")


# How often


async def test_an_address_that_asks_too_often_waits_and_others_do_not(tokens: dict[str, str]) -> None:
    access = Access(settings_of(SEEDCORE_HTTP_TRUSTED_PROXIES="10.0.0.0/8"), LOOPBACK)
    rates = Rates(2)
    answers = [(await asker(access, rates)(*READ)) for _ in range(6)]
    assert [answer.status_code for answer in answers][:4] == [200] * 4
    assert answers[-1].status_code == 429
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert (await asker(access, rates, peer="192.168.7.7")(*READ)).status_code == 200
    proxied = [(await asker(access, rates, peer="10.0.0.1")(*READ)).status_code for _ in range(6)]
    assert proxied == [200] * 6


async def test_who_makes_up_addresses_is_counted_as_one() -> None:
    ask = asker(Access(settings_of(), LOOPBACK), Rates(2), peer="203.0.113.1")
    answers = [await ask(*READ, **{"X-Forwarded-For": f"10.0.0.{n}, 203.0.113.1"}) for n in range(6)]
    assert [answer.status_code for answer in answers][-1] == 429


async def test_one_machine_of_many_ipv6_addresses_is_counted_as_one() -> None:
    access, rates = Access(settings_of(), LOOPBACK), Rates(2)
    answers = [await asker(access, rates, peer=f"2001:db8::{n}")(*READ) for n in range(1, 7)]
    assert [answer.status_code for answer in answers][-1] == 429
    assert (await asker(access, rates, peer="2001:db8:0:1::1")(*READ)).status_code == 200


@pytest.mark.parametrize("addresses", [("127.0.0.1", "127.0.0.2", "127.255.3.4", "::1", "::ffff:127.0.0.9", LAN)])
async def test_this_machine_is_one_caller_by_whichever_of_its_addresses(addresses: tuple[str, ...]) -> None:
    judges = Access(settings_of(), LOOPBACK), Rates(2, feeds=2)
    statuses = []
    for address in addresses:
        for headers in ({}, {"X-Forwarded-For": f"203.0.113.9, {address}"}):
            statuses.append((await asker(*judges, peer=address)(*READ, **headers)).status_code)
    # made up, as uvicorn takes it from this machine
    statuses.append((await asker(*judges, peer="203.0.113.9")(*READ, **{"X-Forwarded-For": "203.0.113.9"})).status_code)
    assert statuses == [200] * 4 + [429] * (len(statuses) - 4)
    assert (await asker(*judges, peer="192.0.2.1")(*READ)).status_code == 200


async def test_feeds_of_this_machine_are_bounded_together_by_whichever_address() -> None:
    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    judges = Access(settings_of(), LOOPBACK), Rates(1000, feeds=3)
    guard = Guard(endless, lambda: judges)

    async def watch(peer: str) -> int:
        transport = httpx.ASGITransport(guard, client=(peer, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.get("/v1/watch")).status_code

    watching = [asyncio.create_task(watch(peer)) for peer in ("127.0.0.1", "127.0.0.2", "::1")]
    await eventually(lambda: judges[1].open_feeds == 3)
    assert [await watch(peer) for peer in ("127.9.9.9", "::ffff:127.0.0.3")] == [429, 429]
    for task in watching:
        task.cancel()
    await asyncio.gather(*watching, return_exceptions=True)
    assert judges[1].open_feeds == 0


@pytest.mark.parametrize("address", ["fe80::1%eth0", "2001:db8::1"])
async def test_an_address_of_any_kind_is_counted(address: str) -> None:
    ask = asker(Access(settings_of(), LOOPBACK), Rates(1), peer=address)
    assert [(await ask(*READ)).status_code for _ in range(3)] == [200, 200, 429]


async def test_one_address_has_only_so_much_worked_at_at_once() -> None:
    may_end = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await may_end.wait()
        await PlainTextResponse("done")(scope, receive, send)

    judges = Access(settings_of(), LOOPBACK), Rates(1000, at_once=3, feeds=2)
    guard = Guard(slow, lambda: judges)

    async def ask(path: str, peer: str) -> int:
        transport = httpx.ASGITransport(guard, client=(peer, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.get(path)).status_code

    asked = [asyncio.create_task(ask("/v1/instances", "10.0.0.1")) for _ in range(5)]
    asked += [asyncio.create_task(ask("/v1/watch", "10.0.0.1")) for _ in range(5)]
    asked += [asyncio.create_task(ask("/v1/instances", "10.0.0.2")) for _ in range(3)]
    await eventually(lambda: sum(task.done() for task in asked) == 5)
    may_end.set()
    assert await asyncio.gather(*asked) == [*([200] * 3), 429, 429, 200, 200, *([429] * 3), *([200] * 3)]
    assert await ask("/v1/instances", "10.0.0.1") == 200
    assert judges[1].requests_at_work == 0


# What goes wrong


async def test_a_fault_of_ours_has_the_headers_too() -> None:
    async def fails(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ZeroDivisionError

    judges = Access(settings_of(), LOOPBACK), Rates(1000)
    transport = httpx.ASGITransport(Guard(fails, lambda: judges), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.get("/v1/instances")
    assert answer.status_code == 500
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["content-type"] == "application/problem+json"


async def test_who_asks_for_the_head_gets_it_without_the_body() -> None:
    judges = Access(settings_of(), LOOPBACK), Rates(1000)
    transport = httpx.ASGITransport(Guard(answered, lambda: judges))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        whole, head = await client.get("/healthz"), await client.head("/healthz")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.content))


def test_requests_are_counted_by_the_second_and_addresses_are_bounded() -> None:
    rates = Rates(10)
    assert [rates.wait_s("a", 0.0) for _ in range(20)] == [0.0] * 20
    assert rates.wait_s("a", 0.0) == pytest.approx(0.1)
    assert rates.wait_s("b", 0.0) == 0.0
    assert rates.wait_s("a", 0.15) == 0.0
    for number in range(MAX_CALLERS + 10):
        rates.wait_s(f"peer {number}", 1.0)
    assert rates.callers == MAX_CALLERS


# Secrets


def test_no_secret_shows_in_settings() -> None:
    settings = settings_of(SEEDCORE_HTTP_TOKEN="sct_secret", SEEDCORE_PG_DSN="postgresql://me:hush@db/x")
    for shown in (repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert "sct_secret" not in shown
        assert "hush" not in shown
