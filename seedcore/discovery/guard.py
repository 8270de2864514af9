"""What every request passes first: how many there may be, who asks, and whether that is allowed. What is not named here
needs a right, so that a new route is closed until it is opened."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv6Network
from time import monotonic

from ray import serve
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seedcore.discovery.access import Access, Caller, Right, plain_address
from seedcore.discovery.problems import own_fault, problem
from seedcore.registry.clock import utc_now

MAX_PEERS = 10_000
BURST_S = 2.0

# the page asks for a token by itself; whoever probes has none
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
"""In the state of a request: whether it would still be allowed now, for answers that last."""

_SITE_BITS = 64


class Rates:
    """Requests of each address a second: a bucket each, of the addresses that came last. And how many of them are at
    work at once, `feeds` apart, so that nobody takes all that a replica can do."""

    def __init__(self, per_s: float, at_once: int = 500, feeds: int = 125) -> None:
        self._per_s = per_s
        self._at_once = {False: at_once, True: feeds}
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._at_work: Counter[tuple[str, bool]] = Counter()

    @contextmanager
    def at_work(self, peer: str, *, is_feed: bool) -> Iterator[bool]:
        """Whether one more of the peer's requests may be worked at now; for as long as that takes."""
        key = peer, is_feed
        is_allowed = self._at_work[key] < self._at_once[is_feed]
        self._at_work[key] += is_allowed
        try:
            yield is_allowed
        finally:
            self._at_work[key] -= is_allowed
            if not self._at_work[key]:
                del self._at_work[key]

    def wait_s(self, peer: str, now_s: float) -> float:
        """Takes one of the peer's requests and answers 0, or how long until there is one again."""
        left, at_s = self._buckets.pop(peer, (self._per_s * BURST_S, now_s))
        left = min(self._per_s * BURST_S, left + (now_s - at_s) * self._per_s)
        is_allowed = left >= 1.0
        self._buckets[peer] = (left - 1.0 if is_allowed else left, now_s)
        if len(self._buckets) > MAX_PEERS:
            self._buckets.popitem(last=False)
        return 0.0 if is_allowed else (1.0 - left) / self._per_s


class Guard:
    """Refuses what a caller may not do, before anything of the request is read. `access` and `rates` are the
    replica's."""

    def __init__(self, app: ASGIApp, judges: Callable[[], tuple[Access, Rates]] | None = None) -> None:
        self._app = app
        self._judges = judges if judges is not None else _judges_of_replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        access, rates = self._judges()
        peer = scope["client"][0] if scope.get("client") else None
        path = _path(scope)
        needed = needed_right(scope["method"], path)
        has_started = False
        is_head = scope["method"] == "HEAD" and path != _FEED
        if is_head:
            # as GET, without what that sends: probes and proxies ask so
            scope = {**scope, "method": "GET"}

        async def send_with_headers(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                known = {name.lower() for name, _ in message["headers"]}
                added = [header for header in _HEADERS if header[0] not in known]
                message = {**message, "headers": [*message["headers"], *added]}
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        def caller_now() -> Caller:
            return access.caller(scope["headers"], peer, utc_now())

        async def work() -> None:
            refusal = _refusal(caller := caller_now(), needed)
            if refusal is not None:
                await refusal(scope, receive, send_with_headers)
                return
            scope.setdefault("state", {})[STATE] = caller
            scope["state"][STILL] = lambda: _refusal(caller_now(), needed) is None
            try:
                await self._app(scope, receive, send_with_headers)
            except Exception:
                # who logs it comes after us, and would answer without our headers
                if not has_started:
                    await own_fault()(scope, receive, send_with_headers)
                raise

        if access.trusts(peer):
            await work()
            return
        key = _key_of(scope, peer)
        wait_s = rates.wait_s(key, monotonic())
        with rates.at_work(key, is_feed=path == _FEED) as is_allowed:
            if wait_s == 0 and is_allowed:
                await work()
            else:
                await _too_many(wait_s)(scope, receive, send_with_headers)


def needed_right(method: str, path: str) -> Right:
    """What a request needs."""
    if method in {"GET", "HEAD"}:
        return Right.NONE if path in _OPEN or path.startswith(_OPEN_FOLDERS) else Right.READ
    return Right.READ if method == "POST" and path in _READING_POSTS else Right.WRITE


def _judges_of_replica() -> tuple[Access, Rates]:
    replica = serve.get_replica_context().servable_object
    return replica.access, replica.rates


def _key_of(scope: Scope, peer: str | None) -> str:
    """By whom requests are counted: an address; of IPv6 the network, of which one machine has as many as it likes."""
    told = b", ".join(value for name, value in scope["headers"] if name == b"x-forwarded-for").decode("latin-1")
    if peer is None or peer in told:
        # the address may be the caller's own word
        return ""
    address = plain_address(peer)
    if address is not None and address.version == 6:
        return str(IPv6Network((address, _SITE_BITS), strict=False))
    return str(address or peer)


def _path(scope: Scope) -> str:
    root = scope.get("root_path", "")
    path: str = scope["path"]
    return path[len(root) :] if root and path.startswith(root) else path


def _too_many(wait_s: float) -> Response:
    wait = str(max(1, round(wait_s)))
    return problem(
        429,
        "TooManyRequests",
        f"this address asks too often, or too much at once; again in {wait} s",
        {"Retry-After": wait},
    )


def _refusal(caller: Caller, needed: Right) -> Response | None:
    if caller.problem is not None and needed > Right.NONE:
        challenge = 'Bearer realm="seedcore", error="invalid_token"'
        return problem(401, "Unauthorized", caller.problem, {"WWW-Authenticate": challenge})
    if caller.right >= needed:
        return None
    if caller.name is None:
        detail = f"this needs a token with the right to {needed}: Authorization: Bearer TOKEN"
        return problem(401, "Unauthorized", detail, {"WWW-Authenticate": 'Bearer realm="seedcore"'})
    challenge = f'Bearer realm="seedcore", error="insufficient_scope", scope="{needed}"'
    detail = f"{caller.name} may {caller.right}, and this needs the right to {needed}"
    return problem(403, "Forbidden", detail, {"WWW-Authenticate": challenge})
