"""What every request passes first: the bounds of its caller, its identity and its right. A route that is not listed
here requires the right to read or write, so a new route is closed until it is opened."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv6Network
from time import monotonic

from ray import serve
from ray.exceptions import RayError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seedcore.core.clock import utc_now
from seedcore.discovery.access import Access, plain_address
from seedcore.discovery.handlers import own_fault, problem
from seedcore.discovery.problems import ProblemCode
from seedcore.discovery.tokens import Caller, Right
from seedcore.discovery.traffic import Rates, UnreadBytes

# the page asks for a token by itself; probes have none
_OPEN = frozenset({"/", "/healthz", "/readyz", "/v1/access", "/docs", "/openapi.json"})
_OPEN_FOLDERS = ("/page/", "/static-offline-docs/")
_FEED = "/v1/watch"
_READING_POSTS = frozenset({"/v1/resolve"})

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]

STATE = "seedcore_caller"
STILL = "seedcore_may_still"
"""In the state of a request: whether it would still be allowed now, for answers without an end."""

CHUNK_BYTES = 128 * 1024
"""Longer bodies are sent in parts of this size, and count as unread until Serve's proxy has sent them."""

_SITE_BITS = 64
_THIS_MACHINE = "this machine"


class Guard:
    """Refuses what a caller may not do, before it reads the request. `access` and `rates` are the replica's."""

    def __init__(self, app: ASGIApp, judges: Callable[[], tuple[Access, Rates]] | None = None) -> None:
        self._app = app
        self._judges = judges if judges is not None else _judges_of_replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        access, rates = self._judges()
        peer = scope["client"][0] if access.knows_peers and scope.get("client") else None
        path = path_of(scope)
        needed = needed_right(scope["method"], path)
        is_feed = path == _FEED
        is_head = scope["method"] == "HEAD" and not is_feed
        if is_head:
            # as GET without the body: probes and proxies use it
            scope = {**scope, "method": "GET"}

        def caller_now() -> Caller:
            return access.caller(scope["headers"], peer, utc_now())

        caller = caller_now()
        is_bounded = not access.trusts(peer)
        key = f"{_machine_of(scope, peer)} {caller.name or ''}"
        exchange = _Exchange(receive, send, rates.unread, key, is_head=is_head, is_bounded=is_bounded)
        wait_s = rates.wait_s(key, monotonic()) if is_bounded else 0.0
        with rates.at_work(key, is_feed=is_feed, is_bounded=is_bounded) as is_allowed, exchange:
            if wait_s > 0 or not is_allowed:
                await _too_many(wait_s)(scope, exchange.receive, exchange.send)
                return
            refusal = _refusal(caller, needed)
            if refusal is not None:
                await refusal(scope, exchange.receive, exchange.send)
                return
            scope.setdefault("state", {})[STATE] = caller
            scope["state"][STILL] = lambda: _refusal(caller_now(), needed) is None
            try:
                await self._app(scope, exchange.receive, exchange.send)
            except Exception:
                # the middleware that logs it runs after this one, and would answer without these headers
                if not exchange.has_started:
                    await own_fault()(scope, exchange.receive, exchange.send)
                raise
            # the bound of feeds, and of bytes, lasts until the caller has read
            if is_feed or exchange.is_long:
                await exchange.until_sent()


class _Exchange:
    """The body of a request and its answer while they are sent, and the bytes that they hold."""

    def __init__(
        self, receive: Receive, send: Send, unread: UnreadBytes, key: str, *, is_head: bool, is_bounded: bool
    ) -> None:
        self._receive = receive
        self._send = send
        self._unread = unread
        self._key = key
        self._is_head = is_head
        self._share = 0.5 if is_bounded else 1.0
        self._held = 0
        self._is_refused = False
        self._is_complete = False
        self.has_started = False
        self.is_long = False

    def __enter__(self) -> _Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        if self._held:
            self._unread.give_back(self._key, self._held)

    async def receive(self) -> Message:
        message = await self._receive()
        if message.get("body") and not self._take(len(message["body"])):
            raise HTTPException(429, "too many bodies are being read at once; retry in 1 s", {"Retry-After": "1"})
        return message

    async def send(self, message: Message) -> None:
        if self._is_refused:
            return
        if message["type"] == "http.response.start":
            length = 0 if self._is_head else _length_of(message)
            self.is_long = length > CHUNK_BYTES
            if self.is_long and not self._take(length):
                self._is_refused, self.is_long = True, False
                await _too_much_unread()({"type": "http"}, self._receive, self._send_started)
                return
        await self._send_started(message)

    async def _send_started(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            known = {name.lower() for name, _ in message["headers"]}
            added = [header for header in _HEADERS if header[0] not in known]
            await self._send({**message, "headers": [*message["headers"], *added]})
            return
        body = b"" if self._is_head else message.get("body", b"")
        more_body = message.get("more_body", False)
        for start in range(0, len(body) or 1, CHUNK_BYTES):
            is_last = start + CHUNK_BYTES >= len(body)
            part = body[start : start + CHUNK_BYTES]
            await self._send({**message, "body": part, "more_body": more_body or not is_last})
        self._is_complete = not more_body

    async def until_sent(self) -> None:
        """Wait until the server has sent the answer to the caller, or the caller has gone.

        ASGI has one message for both. A server waits with the last part until the connection has taken those before.
        """
        try:
            while self._is_complete and (await self._receive())["type"] != "http.disconnect":
                pass
        except RayError:
            # Serve's proxy has ended, and what it held is gone
            return

    def _take(self, count: int) -> bool:
        if not self._unread.take(self._key, count, share=self._share):
            return False
        self._held += count
        return True


def needed_right(method: str, path: str) -> Right:
    """The right that a request requires."""
    if method in {"GET", "HEAD"}:
        return Right.NONE if path in _OPEN or path.startswith(_OPEN_FOLDERS) else Right.READ
    return Right.READ if method == "POST" and path in _READING_POSTS else Right.WRITE


def _judges_of_replica() -> tuple[Access, Rates]:
    replica = serve.get_replica_context().servable_object
    return replica.access, replica.rates


def _machine_of(scope: Scope, peer: str | None) -> str:
    """The machine that a request comes from: one caller, however many addresses it has.

    This machine has all of 127.0.0.0/8, and by default may write any address into X-Forwarded-For. A machine may use
    every IPv6 address of its network.
    """
    if peer is None:
        return _THIS_MACHINE
    forwarded = b", ".join(value for name, value in scope["headers"] if name == b"x-forwarded-for").decode("latin-1")
    address = plain_address(peer.partition("%")[0])
    here = plain_address((scope.get("server") or ("",))[0] or "")
    if peer in forwarded or (address is not None and (address.is_loopback or address == here)):
        return _THIS_MACHINE
    if address is not None and address.version == 6:
        return str(IPv6Network((address, _SITE_BITS), strict=False))
    return str(address or peer)


def path_of(scope: Scope) -> str:
    """The path of a request, below the prefix of the application."""
    root = scope.get("root_path", "")
    path: str = scope["path"]
    return path[len(root) :] if root and path.startswith(root) else path


def _length_of(start: Message) -> int:
    declared = next((value for name, value in start["headers"] if name.lower() == b"content-length"), b"0")
    return int(declared)


def _too_many(wait_s: float) -> Response:
    wait = str(max(1, round(wait_s)))
    return problem(
        429,
        ProblemCode.TOO_MANY_REQUESTS,
        "TooManyRequests",
        f"too many requests of this caller, per second or at once; retry in {wait} s",
        {"Retry-After": wait},
    )


def _too_much_unread() -> Response:
    detail = "this caller has not read its earlier answers: read them, or request shorter pages (limit)"
    return problem(429, ProblemCode.TOO_MANY_REQUESTS, "TooManyRequests", detail, {"Retry-After": "1"})


def _refusal(caller: Caller, needed: Right) -> Response | None:
    if caller.problem is not None and needed > Right.NONE:
        challenge = 'Bearer realm="seedcore", error="invalid_token"'
        return problem(401, ProblemCode.UNAUTHORIZED, "Unauthorized", caller.problem, {"WWW-Authenticate": challenge})
    if caller.right >= needed:
        return None
    if caller.name is None:
        detail = f"this requires a token with the right to {needed}: Authorization: Bearer TOKEN"
        return problem(
            401, ProblemCode.UNAUTHORIZED, "Unauthorized", detail, {"WWW-Authenticate": 'Bearer realm="seedcore"'}
        )
    challenge = f'Bearer realm="seedcore", error="insufficient_scope", scope="{needed}"'
    detail = f"{caller.name} has the right to {caller.right}, and this requires the right to {needed}"
    return problem(403, ProblemCode.FORBIDDEN, "Forbidden", detail, {"WWW-Authenticate": challenge})
