"""Checks of connection strings before anything is connected.

libpq and psycopg repeat parts of the DSN in their messages: what they read as a host, a port or a database. A character
of a password that is not percent-encoded makes the rest of the password such a part. So the parts are checked here, and
no message repeats one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import zip_longest

import psycopg
from psycopg import conninfo

from seedcore.core.errors import ConfigurationError

# as libpq splits it: names and passwords end at the first @ that no / stands before
_URI = re.compile(r"postgres(?:ql)?://(?:[^@/]*@)?(?P<place>[^?]*)")
_NAME = re.compile(r"[\w.:%-]*")
_MAX_PORT = 65535
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


def checked_dsn(dsn: str, variable: str = "SEEDCORE_PG_DSN") -> str:
    """The DSN itself, or ConfigurationError where it is malformed. The message never repeats the text."""
    try:
        parts = conninfo.conninfo_to_dict(dsn)
    except (psycopg.Error, ValueError):
        raise ConfigurationError(
            variable, "is not a PostgreSQL connection string (postgresql://user@host/database)"
        ) from None
    uri = _URI.match(dsn)
    if uri is not None and "@" in uri["place"]:
        raise ConfigurationError(
            variable, "has one @ too many: in a name or password of a URL write @ as %40, / as %2F and % as %25"
        )
    if not all(map(_is_host, str(parts.get("host") or "").split(","))):
        raise ConfigurationError(variable, "names a host that is no name, no address and no folder of a socket")
    if not all(map(_is_port, str(parts.get("port") or "").split(","))):
        raise ConfigurationError(variable, f"names a port that is no number from 1 to {_MAX_PORT}")
    if any("://" in str(parts.get(name) or "") for name in ("dbname", "user")):
        raise ConfigurationError(variable, "names a database or user that is itself a URL")
    return dsn


def _is_host(host: str) -> bool:
    return host.startswith(("/", "@")) or _NAME.fullmatch(host) is not None


def _is_port(port: str) -> bool:
    return not port or (port.isascii() and port.isdecimal() and 1 <= int(port) <= _MAX_PORT)


def is_unverified(dsn: str) -> bool:
    """Whether the DSN leads over a network, or by a service file, to a server whose certificate is not verified."""
    given = conninfo.conninfo_to_dict(checked_dsn(dsn))
    # only libpq reads a service file; an address is used before the name beside it
    is_remote = bool(given.get("service")) or any(map(_is_elsewhere, _places(given)))
    return is_remote and given.get("sslmode") != "verify-full"


def _places(given: Mapping[str, object]) -> list[str]:
    """The places that libpq tries, one after another: the address, else the name."""
    hosts, addresses = (str(given.get(name) or "").split(",") for name in ("host", "hostaddr"))
    return [address or host for host, address in zip_longest(hosts, addresses, fillvalue="")]


def _is_elsewhere(place: str) -> bool:
    return bool(place) and not place.startswith(("/", "@")) and place not in _LOCAL_HOSTS
