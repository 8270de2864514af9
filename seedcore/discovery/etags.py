"""ETags of answers from the cache: the version of the feed that an answer has. A caller sends them back to be answered
only when something has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Annotated

from fastapi import Header, Query

from seedcore.core.errors import InvalidInputError
from seedcore.core.feed import Position

_MAX_ETAGS = 20

Since = Annotated[
    str | None, Query(description="STREAM:VERSION of an earlier answer: 304 unless a wanted instance has changed")
]
IfNoneMatch = Annotated[
    list[str] | None, Header(description="ETags of earlier answers, separated by commas: as `since`")
]


def etag_headers(position: Position) -> Mapping[str, str]:
    """The headers of an answer with this position."""
    return {"ETag": f'W/"{position}"', "Cache-Control": "no-cache"}


def positions_of(since: str | None, if_none_match: Sequence[str] | None) -> list[Position]:
    """The positions of a caller's earlier answers: `since`, or the ETags of this service. Raises InvalidInputError for
    a wrong `since`."""
    if since is not None:
        return [Position.parsed(since, "since")]
    positions: list[Position] = []
    for etag in islice((etag for header in if_none_match or () for etag in header.split(",")), _MAX_ETAGS):
        with suppress(InvalidInputError):
            positions.append(Position.parsed(etag.strip().removeprefix("W/").strip('"')))
    return positions
