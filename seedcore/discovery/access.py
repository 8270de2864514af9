"""The right of each request: by a bearer token, by the header of a trusted proxy, or without a token.

Reading and writing are separate rights.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache

from seedcore.core.errors import ConfigurationError
from seedcore.discovery.tokens import GRANTED, TOKENS_VARIABLE, Caller, Right, TokenFile
from seedcore.registry.ray_support import session
from seedcore.settings import Settings

_FORWARDED = "FORWARDED_ALLOW_IPS"
_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# the longest address, and the name of an interface
_MAX_ADDRESS_CHARS = 64
# Serve starts this actor only beside HAProxy, on the head node
_HAPROXY_ACTOR = "SERVE_PROXY_ACTOR-fallback-"


class Access:
    """Decides the right of each request, by the settings and the address that Serve listens on."""

    def __init__(self, settings: Settings, host: str | None, *, knows_peers: bool = True) -> None:
        """`host` None: not known, and treated as public. `knows_peers` False: the peer of every request is a hop of
        Serve's own, and identifies no caller."""
        self.tokens = None if settings.http_tokens_file is None else TokenFile(settings.http_tokens_file)
        self.knows_peers = knows_peers
        self._proxies = settings.proxy_networks
        self._header = settings.http_trusted_header.lower().encode("ascii")
        self.anonymous = _anonymous_right(settings, host)
        self._hosts = _AllowedHosts(settings, host)

    def caller(self, headers: Iterable[tuple[bytes, bytes]], peer: str | None, now: datetime) -> Caller:
        """The caller, by the headers of the request and the address it came from."""
        values: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in values and name in {b"authorization", self._header, b"host"}:
                return Caller(Right.NONE, problem=f"the header {name.decode('latin-1')} must be there once")
            values[name] = value
        if self._header in values and self.trusts(peer):
            # other credentials that its callers have sent are for the proxy
            right = GRANTED.get(values[self._header].decode("latin-1").strip().lower(), Right.NONE)
            return Caller(right, "the proxy")
        scheme, _, secret = values.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scheme.lower() == "bearer":
            if self.tokens is None:
                return Caller(Right.NONE, problem="this deployment has no tokens")
            return self.tokens.owner_of(secret.strip(), now)
        if scheme:
            return Caller(Right.NONE, problem="it must be a bearer token")
        if self.anonymous > Right.NONE:
            # a page of another site can point its own name at this address, and read through a browser on this machine
            problem = self._hosts.problem_of(values.get(b"host", b"").decode("latin-1"))
            if problem is not None:
                return Caller(Right.NONE, problem=problem)
        return Caller(self.anonymous)

    def trusts(self, peer: str | None) -> bool:
        """Whether it is the address of a trusted proxy."""
        address = plain_address(peer or "") if self.knows_peers and self._proxies else None
        return address is not None and any(address in network for network in self._proxies)


class _AllowedHosts:
    """The host names that a request without a token may use: this machine's own, and those of the setting.

    No other site can make a browser send an IP address as the host of its own page, so if the settings grant access
    to a network, every address is accepted.
    """

    def __init__(self, settings: Settings, host: str | None) -> None:
        self._is_local_alone = settings.http_anonymous is None
        listed = settings.allowed_hosts
        self._names = {name for name in listed if not name.startswith("*.")}
        self._suffixes = tuple(name.removeprefix("*") for name in listed if name.startswith("*."))
        if not self._is_local_alone:
            self._names |= {name.lower() for name in (host, settings.ip_address, socket.gethostname()) if name}

    def problem_of(self, header: str) -> str | None:
        """Why a Host header is refused, or None."""
        name = _host_name(header)
        if name == "" or name.endswith(".localhost") or is_loopback(name):
            # a browser always sends the header
            return None
        if name in self._names or (self._suffixes and name.endswith(self._suffixes)):
            return None
        if not self._is_local_alone and plain_address(name.strip("[]")) is not None:
            return None
        return (
            f"without a token a request must use this deployment's own name, not {name[:80]!r}: use localhost, send a "
            "token, or add the name to SEEDCORE_HTTP_ALLOWED_HOSTS"
        )


def plain_address(text: str) -> Address | None:
    """An address; the IPv4 address of one that is mapped to IPv6, as a server that listens on `::` sees it."""
    address = _address(text)
    return getattr(address, "ipv4_mapped", None) or address


def check_proxies(settings: Settings) -> None:
    """Raise ConfigurationError if a caller could spoof the address of a trusted proxy.

    Serve's HTTP server, uvicorn, takes the caller's address from X-Forwarded-For if FORWARDED_ALLOW_IPS (by default
    this machine) allows the peer to set it: then a caller could spoof it. `none` trusts no peer. Behind Serve's HAProxy
    every request has HAProxy's address.
    """
    if not settings.proxy_networks:
        return
    if is_behind_haproxy():
        raise ConfigurationError(
            "SEEDCORE_HTTP_TRUSTED_PROXIES",
            f"must be empty where Serve runs HAProxy ({_HAPROXY}=1): every request then has the address of HAProxy, so "
            f"any caller could send {settings.http_trusted_header}; unset one of the two, or use tokens",
        )
    if os.environ.get(_FORWARDED) != "none":
        raise ConfigurationError(
            _FORWARDED,
            "must be `none` on every Ray node where SEEDCORE_HTTP_TRUSTED_PROXIES is set: otherwise a process on this "
            "machine could write the address of a trusted proxy into X-Forwarded-For",
        )


def is_behind_haproxy() -> bool:
    """Whether Serve's HAProxy forwards the requests of this cluster: it hides the caller's address.

    Serve decides that by the environment of its controller, which may run on another node: then an actor shows it.
    """
    if os.environ.get(_HAPROXY, "0") == "1":
        return True
    if session.current() is None:
        return False
    return any(actor["name"].startswith(_HAPROXY_ACTOR) for actor in session.list_named_actors())


def check_bind(settings: Settings, host: str | None) -> None:
    """Raise ConfigurationError if every machine of a network could read, and no setting allows it."""
    if host is None or is_loopback(host) or settings.http_anonymous is not None:
        return
    if settings.http_tokens_file is None and not settings.proxy_networks:
        raise ConfigurationError(
            "SEEDCORE_HTTP_ANONYMOUS",
            f"Serve listens on {host}, so every machine that reaches it could read the fleet: set {TOKENS_VARIABLE} to "
            "a file of tokens (`seedcore token new`), set http_options.host to 127.0.0.1, or set "
            "SEEDCORE_HTTP_ANONYMOUS=read (or none) if that is intended",
        )


def is_loopback(host: str) -> bool:
    """Whether an address that a server listens on is reachable from its own machine only."""
    address = _address(host.strip("[]"))
    return host == "localhost" if address is None else address.is_loopback


def _address(text: str) -> Address | None:
    # no address is longer; and callers choose some of these texts, of which the last ones are kept
    return _parsed(text) if len(text) <= _MAX_ADDRESS_CHARS else None


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _host_name(header: str) -> str:
    """The name in a Host header, without its port, in lower case."""
    name = header.rpartition("]")[0] + "]" if header.startswith("[") else header.partition(":")[0]
    return name.lower().rstrip(".")


def _anonymous_right(settings: Settings, host: str | None) -> Right:
    if settings.http_anonymous is not None:
        return Right[settings.http_anonymous.upper()]
    return Right.READ if host is not None and is_loopback(host) else Right.NONE
