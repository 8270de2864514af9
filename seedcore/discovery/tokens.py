"""Bearer tokens: a file of their hashes, and the right of each.

Tokens are 256 random bits, so their SHA-256 is as good a secret as a slow hash would be (OWASP Password Storage,
"high-entropy"). The scheme is RFC 6750.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from pathlib import Path

from seedcore.core.errors import ConfigurationError, InvalidInputError
from seedcore.core.limits import check_text

logger = logging.getLogger(__name__)

MAX_TOKENS = 1000
MAX_FILE_BYTES = 1024 * 1024
MAX_NAME_CHARS = 100
MAX_TOKEN_CHARS = 512
TOKENS_VARIABLE = "SEEDCORE_HTTP_TOKENS_FILE"

_PREFIX = "sct_"
_HASH = "sha256:"
_MAX_LOGGED = 10


class Right(IntEnum):
    """What a caller may do; a higher right includes the lower ones."""

    NONE = 0
    READ = 1
    WRITE = 2

    def __str__(self) -> str:
        return self.name.lower()


GRANTED = {"read": Right.READ, "write": Right.WRITE}


@dataclass(frozen=True, slots=True)
class Token:
    """One line of the file: its owner, its right, the hash, and when it expires (None: never)."""

    name: str
    right: Right
    digest: bytes
    expires_at: datetime | None = None

    def line(self) -> str:
        """The line of the file."""
        ends = "" if self.expires_at is None else f" {self.expires_at.isoformat(timespec='seconds')}"
        return f"{self.name} {self.right} {_HASH}{self.digest.hex()}{ends}"


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller and its right; `problem` is what is wrong with the token that it sent."""

    right: Right
    name: str | None = None
    problem: str | None = None


def new_token(name: str, right: Right, expires_at: datetime | None = None) -> tuple[str, Token]:
    """A secret for its owner, and the token for the file. Raises InvalidInputError."""
    check_text("name", name, MAX_NAME_CHARS)
    if len(name.split()) != 1 or name.startswith("#"):
        raise InvalidInputError("name", f"must be one word that does not begin with #, not {name!r}")
    if right is Right.NONE:
        raise InvalidInputError("right", "must be read or write")
    secret = _PREFIX + secrets.token_urlsafe(32)
    return secret, Token(name, right, _digest(secret), expires_at)


def parse_tokens(text: str) -> tuple[tuple[Token, ...], tuple[str, ...]]:
    """The tokens of a file: `NAME read|write sha256:HEX [EXPIRES]` a line, # begins a comment.

    Also the problems of the other lines, by their numbers and without their content.
    """
    tokens: list[Token] = []
    problems: list[str] = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(tokens) == MAX_TOKENS:
            problems.append(
                f"line {number}: the file may have at most {MAX_TOKENS} tokens, this line and the following are ignored"
            )
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
    if right not in GRANTED or len(raw) != hashlib.sha256().digest_size or not is_named:
        raise InvalidInputError(f"line {number}", f"must be {form}")
    return Token(name, GRANTED[right], raw, expires_at)


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("the time needs a zone, for example Z")
    return moment


class TokenFile:
    """The tokens of a file, read again when it changes. A wrong line is ignored. A token that is removed from the file,
    or whose file is removed, is not accepted any more; while the file cannot be opened, its last tokens are.

    `problems` has what is wrong.
    """

    def __init__(self, path: Path, log: logging.Logger | None = logger) -> None:
        """Also if the file cannot be read now. `log` gets each problem once."""
        self._path = path
        self._log = log
        self._seen: tuple[int, ...] | None = None
        self._logged: tuple[str, ...] = ()
        self.tokens: tuple[Token, ...] = ()
        self.problems: tuple[str, ...] = ()
        self._refresh()

    def require_tokens(self) -> None:
        """Raise ConfigurationError if there are no tokens."""
        if self.tokens:
            return
        why = self.problems[0] if self.problems else "the file has no token: make one with `seedcore token new`"
        raise ConfigurationError(TOKENS_VARIABLE, f"{self._path}: {why}")

    def owner_of(self, secret: str, now: datetime) -> Caller:
        """The owner of a token. Takes the same time for every token, known or not."""
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
            self.problems = (f"{_why(error)}; the last tokens of the file are still accepted",)
        if self.problems != self._logged and self._log is not None:
            # once for each problem, not once for each request
            self._logged = self.problems
            for problem in self.problems[:_MAX_LOGGED]:
                self._log.warning("the file of tokens: %s", problem)

    def _read(self) -> None:
        state = os.stat(self._path)
        seen = (state.st_mtime_ns, state.st_size, state.st_ino)
        if seen == self._seen:
            return
        if state.st_size > MAX_FILE_BYTES:
            raise InvalidInputError("file", f"must have at most {MAX_FILE_BYTES} bytes")
        # a line that is not text is a wrong line
        tokens, problems = parse_tokens(self._path.read_text(encoding="utf-8", errors="replace"))
        if state.st_mode & stat.S_IWOTH:
            problems = ("every user of this machine can write it: chmod o-w", *problems)
        self.tokens, self.problems, self._seen = tokens, problems, seen


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _why(error: OSError | InvalidInputError) -> str:
    return str(error) if isinstance(error, InvalidInputError) else error.strerror or type(error).__name__
