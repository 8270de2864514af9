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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from pathlib import Path

from seedcore.core.errors import ConfigurationError, InvalidInputError
from seedcore.core.model import check_text
from seedcore.settings import Settings

logger = logging.getLogger(__name__)

MAX_TOKENS = 1000
MAX_FILE_BYTES = 1024 * 1024
MAX_NAME_CHARS = 100
MAX_TOKEN_CHARS = 512

_PREFIX = "sct_"
_HASH = "sha256:"
_VARIABLE = "SEEDCORE_HTTP_TOKENS_FILE"


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


def parse_tokens(text: str) -> tuple[Token, ...]:
    """The tokens of a file: `NAME read|write sha256:HEX [EXPIRES]` a line, # begins a comment.

    Raises InvalidInputError that names the line, and shows nothing of it.
    """
    tokens: list[Token] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        tokens.append(_parsed(words, number))
        if len(tokens) > MAX_TOKENS:
            raise InvalidInputError("tokens", f"must be at most {MAX_TOKENS}")
    return tuple(tokens)


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
    if right not in _GRANTED or len(raw) != hashlib.sha256().digest_size or len(name) > MAX_NAME_CHARS:
        raise InvalidInputError(f"line {number}", f"must be {form}")
    return Token(name, _GRANTED[right], raw, expires_at)


def _moment(text: str) -> datetime:
    # before Python 3.11 fromisoformat does not know the Z
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    if moment.tzinfo is None:
        raise ValueError("the time needs a zone, for example Z")
    return moment


class TokenFile:
    """The tokens of a file, read again when it changes. A change that cannot be read leaves those that were there."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigurationError where the file cannot be read now."""
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._tokens: tuple[Token, ...] = ()
        try:
            self._read()
        except (OSError, InvalidInputError) as error:
            raise ConfigurationError(_VARIABLE, f"{path}: {_why(error)}") from None
        if not self._tokens:
            raise ConfigurationError(_VARIABLE, f"{path} has no token in it: make one with `seedcore token new`")

    def owner_of(self, secret: str, now: datetime) -> Caller:
        """Whose token it is. Takes the same time whichever of them it is, or none."""
        self._refresh()
        digest = _digest(secret[: MAX_TOKEN_CHARS + 1])
        found = [token for token in self._tokens if hmac.compare_digest(token.digest, digest)]
        living = [token for token in found if token.expires_at is None or now < token.expires_at]
        if living:
            best = max(living, key=lambda token: token.right)
            return Caller(best.right, best.name)
        return Caller(Right.NONE, problem="the token has expired" if found else "the token is not known")

    def _refresh(self) -> None:
        try:
            self._read()
        except (OSError, InvalidInputError) as error:
            logger.warning("the file of tokens cannot be read, the tokens that were in it still hold: %s", _why(error))

    def _read(self) -> None:
        state = os.stat(self._path)
        seen = (state.st_mtime_ns, state.st_size, state.st_ino)
        if seen == self._seen:
            return
        # also where it cannot be read: once is enough to be told
        self._seen = seen
        if state.st_size > MAX_FILE_BYTES:
            raise InvalidInputError("file", f"must have at most {MAX_FILE_BYTES} bytes")
        try:
            self._tokens = parse_tokens(self._path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise InvalidInputError("file", "must be UTF-8") from None


class Access:
    """Decides what each request may do, by the settings and the address that Serve listens on."""

    def __init__(self, settings: Settings, host: str | None) -> None:
        """`host` None: not known, and taken as public. Raises ConfigurationError."""
        self._tokens = None if settings.http_tokens_file is None else TokenFile(settings.http_tokens_file)
        self._proxies = settings.proxy_networks
        self._header = settings.http_trusted_header.lower().encode("ascii")
        self.anonymous = _anonymous_right(settings, host)

    def caller(self, headers: Iterable[tuple[bytes, bytes]], peer: str | None, now: datetime) -> Caller:
        """Who asks, by the headers of the request and the address it came from."""
        told = dict(headers)
        scheme, _, secret = told.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scheme.lower() == "bearer":
            if self._tokens is None:
                return Caller(Right.NONE, problem="no token is known here")
            return self._tokens.owner_of(secret.strip(), now)
        if scheme:
            return Caller(Right.NONE, problem="it must be a bearer token")
        if self._header in told and self.trusts(peer):
            right = _GRANTED.get(told[self._header].decode("latin-1").strip().lower(), Right.NONE)
            return Caller(right, "the proxy")
        return Caller(self.anonymous)

    def trusts(self, peer: str | None) -> bool:
        """Whether it is the address of a trusted proxy."""
        try:
            address = ipaddress.ip_address(peer or "")
        except ValueError:
            return False
        return any(address in network for network in self._proxies)


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


def _anonymous_right(settings: Settings, host: str | None) -> Right:
    if settings.http_anonymous is not None:
        return Right[settings.http_anonymous.upper()]
    return Right.READ if host is not None and is_loopback(host) else Right.NONE


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _why(error: OSError | InvalidInputError) -> str:
    return str(error) if isinstance(error, InvalidInputError) else error.strerror or type(error).__name__
