"""Errors over HTTP as problem details (RFC 9457): the kinds, and which error is which.

A client reads `status`, `code` and `reason`. `title` and `detail` are for people: no code reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, Field

from seedcore.core.answers import NotResolved
from seedcore.core.errors import (
    BacklogFullError,
    CannotKnowError,
    FencedError,
    FollowersFullError,
    ForbiddenTransitionError,
    InstanceDeadError,
    InvalidInputError,
    NotResolvableError,
    RegistryError,
    RegistryUnavailableError,
    StoreUnavailableError,
    UnknownInstanceError,
    VersionMismatchError,
)


class ProblemCode(StrEnum):
    """The kinds of problems. A client may rely on them."""

    INVALID_INPUT = "invalid_input"
    UNREADABLE_BODY = "unreadable_body"
    BODY_TOO_LONG = "body_too_long"
    BODY_TOO_SLOW = "body_too_slow"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    NO_SUCH_ROUTE = "no_such_route"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    NOT_RESOLVABLE = "not_resolvable"
    UNKNOWN_INSTANCE = "unknown_instance"
    FORBIDDEN_TRANSITION = "forbidden_transition"
    INSTANCE_DEAD = "instance_dead"
    TOO_MANY_REQUESTS = "too_many_requests"
    CANNOT_KNOW = "cannot_know"
    REGISTRY_UNAVAILABLE = "registry_unavailable"
    DATABASE_UNAVAILABLE = "database_unavailable"
    SUPERSEDED = "superseded"
    BACKLOG_FULL = "backlog_full"
    FOLLOWERS_FULL = "followers_full"
    VERSION_MISMATCH = "version_mismatch"
    REFUSED = "refused"
    INTERNAL_ERROR = "internal_error"


class Problem(BaseModel):
    """An error (RFC 9457). `code` is the kind; `title` and `detail` are for people and may change."""

    type: str = "about:blank"
    code: ProblemCode
    title: str
    status: int
    detail: str
    reason: NotResolved | None = Field(None, description="of code not_resolvable: why the agent is not resolved")


_KINDS: tuple[tuple[type[RegistryError], int, ProblemCode], ...] = (
    (InvalidInputError, 422, ProblemCode.INVALID_INPUT),
    (NotResolvableError, 404, ProblemCode.NOT_RESOLVABLE),
    (UnknownInstanceError, 404, ProblemCode.UNKNOWN_INSTANCE),
    (ForbiddenTransitionError, 409, ProblemCode.FORBIDDEN_TRANSITION),
    (InstanceDeadError, 409, ProblemCode.INSTANCE_DEAD),
    (CannotKnowError, 503, ProblemCode.CANNOT_KNOW),
    (RegistryUnavailableError, 503, ProblemCode.REGISTRY_UNAVAILABLE),
    (StoreUnavailableError, 503, ProblemCode.DATABASE_UNAVAILABLE),
    (FencedError, 503, ProblemCode.SUPERSEDED),
    (BacklogFullError, 503, ProblemCode.BACKLOG_FULL),
    (FollowersFullError, 503, ProblemCode.FOLLOWERS_FULL),
    (VersionMismatchError, 503, ProblemCode.VERSION_MISMATCH),
    (RegistryError, 500, ProblemCode.REFUSED),
)

PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "The request needs a token that is known and has not expired"},
    403: {"model": Problem, "description": "The token does not give the right to this request"},
    422: {"model": Problem, "description": "A value breaks a stated limit"},
    429: {"model": Problem, "description": "Too many requests from this address: retry after Retry-After"},
    503: {"model": Problem, "description": "No source that could answer is available now"},
}
BODY: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is not text"},
    408: {"model": Problem, "description": "The body came too slowly"},
    413: {"model": Problem, "description": "The body is too long"},
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "There is none"}}
REFUSED: dict[int | str, dict[str, Any]] = {409: {"model": Problem, "description": "The current status forbids it"}}


def problem_of(error: RegistryError) -> Problem:
    """An error as a problem, by its class."""
    status, code = next((status, code) for kind, status, code in _KINDS if isinstance(error, kind))
    return Problem(
        code=code,
        title=type(error).__name__.removesuffix("Error"),
        status=status,
        detail=str(error),
        reason=error.reason if isinstance(error, NotResolvableError) else None,
    )


def codes_by_status() -> Mapping[int, list[ProblemCode]]:
    """The codes that this service sends with each status."""
    by_status: dict[int, list[ProblemCode]] = {
        400: [ProblemCode.UNREADABLE_BODY],
        401: [ProblemCode.UNAUTHORIZED],
        403: [ProblemCode.FORBIDDEN],
        404: [ProblemCode.NO_SUCH_ROUTE],
        405: [ProblemCode.METHOD_NOT_ALLOWED],
        408: [ProblemCode.BODY_TOO_SLOW],
        413: [ProblemCode.BODY_TOO_LONG],
        429: [ProblemCode.TOO_MANY_REQUESTS],
        500: [ProblemCode.INTERNAL_ERROR],
    }
    for _, status, code in _KINDS:
        by_status.setdefault(status, []).append(code)
    return dict(sorted(by_status.items()))
