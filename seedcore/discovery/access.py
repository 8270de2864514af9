"""Who may ask over HTTP, and what: bearer tokens from a file of hashes, a trusted proxy's word, or anybody.

Reading and writing are separate rights. Tokens are 256 random bits, so that their SHA-256 is as good a secret as a slow
hash would be (OWASP Password Storage, "high-entropy"); the scheme is RFC 6750.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import socket
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from pathlib import Path

from seedcore.core.errors import ConfigurationError, InvalidInputError
from seedcore.core.limits import check_text
from seedcore.registry.ray_support import session
from seedcore.settings import Settings

logger = logging.getLogger(__name__)

MAX_TOKENS = 1000
MAX_FILE_BYTES = 1024 * 1024
MAX_NAME_CHARS = 100
MAX_TOKEN_CHARS = 512

_PREFIX = "sct_"
_HASH = "sha256:"
_VARIABLE = "SEEDCORE_HTTP_TOKENS_FILE"
_FORWARDED = "FORWARDED_ALLOW_IPS"
_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
# Serve starts this actor only beside HAProxy, on the head node
_HAPROXY_ACTOR = "SERVE_PROXY_ACTOR-fallback-"
_MAX_TOLD = 10


class Right(IntEnum):
    """What a caller may do; a higher one has the lower ones in it."""

    NONE = 0
    READ = 1
    WRITE = 2

    def __str__(self) -> str:
        return self.name.lower()


_GRANTED = {"read": Right.READ, "write": Right.WRITE}


@dataclass(frozen=True, slots=True)
class Token:
    """One line of the file: whose it is, what it may, the hash, and when it ends (None: never)."""

    name: str
    right: Right
    digest: bytes
    expires_at: datetime | None = None

    def line(self) -> str:
        """As the file has it."""
        ends = "" if self.expires_at is None else f" {self.expires_at.isoformat(timespec='seconds')}"
        return f"{self.name} {self.right} {_HASH}{self.digest.hex()}{ends}"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what that allows; `problem` is what is wrong with the token that was shown."""

    right: Right
    name: str | None = None
    problem: str | None = None


def new_token(name: str, right: Right, expires_at: datetime | None = None) -> tuple[str, Token]:
    """A secret for its owner, and what the file keeps of it. Raises InvalidInputError."""
    check_text("name", name, MAX_NAME_CHARS)
    if len(name.split()) != 1 or name.startswith("#"):
        raise InvalidInputError("name", f"must be one word that does not begin with #, not {name!r}")
    if right is Right.NONE:
        raise InvalidInputError("right", "must be read or write")
    secret = _PREFIX + secrets.token_urlsafe(32)
    return secret, Token(name, right, _digest(secret), expires_at)


def parse_tokens(text: str) -> tuple[tuple[Token, ...], tuple[str, ...]]:
    """The tokens of a file: `NAME read|write sha256:HEX [EXPIRES]` a line, # begins a comment.

    And what is wrong with the other lines, by their numbers: nothing of them is shown.
    """
    tokens: list[Token] = []
    problems: list[str] = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(tokens) == MAX_TOKENS:
            problems.append(f"line {number}: the tokens must be at most {MAX_TOKENS}, it and what follows is left out")
            break
        try:
            tokens.append(_parsed(words, number))
        except InvalidInputError as error:
            problems.append(str(error))
    return tuple(tokens), tuple(problems)


def _parsed(words: Sequence[str], number: int) -> Token:
    form = "NAME read|write sha256:HEX [EXPIRES], as `seedcore token new` prints it"
    if not 3 <= len(words) <= 4:
        raise InvalidInputError(f"line {number}", f"must be {form}")
    name, right, digest = words[:3]
    try:
        raw = bytes.fromhex(digest.removeprefix(_HASH)) if digest.startswith(_HASH) else b""
        expires_at = None if len(words) == 3 else _moment(words[3])
    except ValueError as error:
        raise InvalidInputError(f"line {number}", f"must be {form}: {error}") from None
    is_named = len(name) <= MAX_NAME_CHARS and name.isprintable() and "\ufffd" not in name
    if right not in _GRANTED or len(raw) != hashlib.sha256().digest_size or not is_named:
        raise InvalidInputError(f"line {number}", f"must be {form}")
    return Token(name, _GRANTED[right], raw, expires_at)


def _moment(text: str) -> datetime:
    # before Python 3.11 fromisoformat does not know the Z
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    if moment.tzinfo is None:
        raise ValueError("the time needs a zone, for example Z")
    return moment


class TokenFile:
    """The tokens of a file, read again when it changes. A line that is wrong is left out, and what is not in the file,
    or whose file is gone, holds no more; while the file is there and cannot be opened, what it had still holds.

    Look at `problems` for what is wrong.
    """

    def __init__(self, path: Path, log: logging.Logger | None = logger) -> None:
        """Also where the file cannot be read now. `log` is told of problems too, once for each."""
        self._path = path
        self._log = log
        self._seen: tuple[int, ...] | None = None
        self._told: tuple[str, ...] = ()
        self.tokens: tuple[Token, ...] = ()
        self.problems: tuple[str, ...] = ()
        self._refresh()

    def require_tokens(self) -> None:
        """Raise ConfigurationError where there is none."""
        if self.tokens:
            return
        why = self.problems[0] if self.problems else "no token is in it: make one with `seedcore token new`"
        raise ConfigurationError(_VARIABLE, f"{self._path}: {why}")

    def owner_of(self, secret: str, now: datetime) -> Caller:
        """Whose token it is. Takes the same time whichever of them it is, or none."""
        self._refresh()
        digest = _digest(secret[: MAX_TOKEN_CHARS + 1])
        found = [token for token in self.tokens if hmac.compare_digest(token.digest, digest)]
        living = [token for token in found if token.expires_at is None or now < token.expires_at]
        if living:
            best = max(living, key=lambda token: token.right)
            return Caller(best.right, best.name)
        return Caller(Right.NONE, problem="the token has expired" if found else "the token is not known")

    def _refresh(self) -> None:
        try:
            self._read()
        except FileNotFoundError as error:
            self.tokens, self._seen, self.problems = (), None, (_why(error),)
        except (OSError, InvalidInputError) as error:
            self.problems = (f"{_why(error)}; the tokens that were in it still hold",)
        if self.problems != self._told and self._log is not None:
            # once for each thing that is wrong, however many ask
            self._told = self.problems
            for problem in self.problems[:_MAX_TOLD]:
                self._log.warning("the file of tokens: %s", problem)

    def _read(self) -> None:
        state = os.stat(self._path)
        seen = (state.st_mtime_ns, state.st_size, state.st_ino)
        if seen == self._seen:
            return
        if state.st_size > MAX_FILE_BYTES:
            raise InvalidInputError("file", f"must have at most {MAX_FILE_BYTES} bytes")
        # what is no text is a line that is wrong
        tokens, problems = parse_tokens(self._path.read_text(encoding="utf-8", errors="replace"))
        if state.st_mode & stat.S_IWOTH:
            problems = ("everybody on this machine may write it: chmod o-w", *problems)
        self.tokens, self.problems, self._seen = tokens, problems, seen


class Access:
    """Decides what each request may do, by the settings and the address that Serve listens on."""

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
        """Who asks, by the headers of the request and the address it came from."""
        told: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in told and name in {b"authorization", self._header, b"host"}:
                return Caller(Right.NONE, problem=f"the header {name.decode('latin-1')} must be there once")
            told[name] = value
        if self._header in told and self.trusts(peer):
            # whatever else its callers have sent is between them and the proxy
            right = _GRANTED.get(told[self._header].decode("latin-1").strip().lower(), Right.NONE)
            return Caller(right, "the proxy")
        scheme, _, secret = told.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scheme.lower() == "bearer":
            if self.tokens is None:
                return Caller(Right.NONE, problem="no token is known here")
            return self.tokens.owner_of(secret.strip(), now)
        if scheme:
            return Caller(Right.NONE, problem="it must be a bearer token")
        if self.anonymous > Right.NONE:
            # a page of another site can point its own name at this address, and read by way of a browser here
            problem = self._hosts.problem_of(told.get(b"host", b"").decode("latin-1"))
            if problem is not None:
                return Caller(Right.NONE, problem=problem)
        return Caller(self.anonymous)

    def trusts(self, peer: str | None) -> bool:
        """Whether it is the address of a trusted proxy."""
        address = plain_address(peer or "") if self.knows_peers else None
        return address is not None and any(address in network for network in self._proxies)


class _AllowedHosts:
    """The names that access without a token may be asked by: this machine's own, and those of the setting.

    No other site can make a browser send an IP address as the host of its own page, so where the settings grant access
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
            # no header at all is not a browser's
            return None
        if name in self._names or (self._suffixes and name.endswith(self._suffixes)):
            return None
        if not self._is_local_alone and plain_address(name.strip("[]")) is not None:
            return None
        return (
            f"without a token this deployment is asked by its own name, not {name[:80]!r}: use localhost, send a "
            "token, or add the name to SEEDCORE_HTTP_ALLOWED_HOSTS"
        )


def plain_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address; the IPv4 one where that is dressed as IPv6, as a server that listens on `::` sees it."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def check_proxies(settings: Settings) -> None:
    """Raise ConfigurationError where the address of a trusted proxy could be made up.

    Serve's HTTP server, uvicorn, takes the address of who asks from X-Forwarded-For where FORWARDED_ALLOW_IPS, by
    itself this machine, allows that; then it is the word of the caller. `none` allows nobody. Behind Serve's HAProxy
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
    """Whether Serve's HAProxy forwards the requests of this cluster: it hides the address of who asks.

    Serve decides that by the environment of its controller, which may be another node's: then the cluster tells.
    """
    if os.environ.get(_HAPROXY, "0") == "1":
        return True
    if session.current() is None:
        return False
    return any(actor["name"].startswith(_HAPROXY_ACTOR) for actor in session.list_named_actors())


def check_bind(settings: Settings, host: str | None) -> None:
    """Raise ConfigurationError where everybody on a network could read, and nobody said that they may."""
    if host is None or is_loopback(host) or settings.http_anonymous is not None:
        return
    if settings.http_tokens_file is None and not settings.proxy_networks:
        raise ConfigurationError(
            "SEEDCORE_HTTP_ANONYMOUS",
            f"Serve listens on {host}, so whoever reaches this machine could read who runs here: set {_VARIABLE} to a "
            "file of tokens (`seedcore token new`), let http_options.host be 127.0.0.1, or say "
            "SEEDCORE_HTTP_ANONYMOUS=read (or none) if that is meant",
        )


def is_loopback(host: str) -> bool:
    """Whether an address that a server listens on is reached from its own machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _host_name(header: str) -> str:
    """The name in a Host header, without its port, in lower case."""
    name = header.rpartition("]")[0] + "]" if header.startswith("[") else header.partition(":")[0]
    return name.lower().rstrip(".")


def _anonymous_right(settings: Settings, host: str | None) -> Right:
    if settings.http_anonymous is not None:
        return Right[settings.http_anonymous.upper()]
    return Right.READ if host is not None and is_loopback(host) else Right.NONE


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _why(error: OSError | InvalidInputError) -> str:
    return str(error) if isinstance(error, InvalidInputError) else error.strerror or type(error).__name__
