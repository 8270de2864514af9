"""Answers that are bounded by their bytes: a page ends early, and the cache of answers counts its bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from pydantic import BaseModel
from starlette.responses import Response

from seedcore.core.answers import Listing
from seedcore.core.errors import InvalidInputError
from seedcore.core.instances import Instance
from seedcore.core.paging import encode_cursor
from seedcore.discovery.api import InstancePage, ResolveAnswer
from seedcore.discovery.rendering import listed_out, page_of, resolution_out, resolve_by_name, stamp_of
from seedcore.registry.caller.sources import NameListing, Resolved

MAX_PAGE_BYTES = 1024 * 1024
MAX_RESOLVE_BYTES = 8 * 1024 * 1024
MAX_CACHE_BYTES = 16 * 1024 * 1024

# of an entry of the cache, beside its texts
_ENTRY_BYTES = 1024


def page_json(
    listing: Listing | NameListing,
    cursor_of: Callable[[Instance], str] = encode_cursor,
    max_bytes: int = MAX_PAGE_BYTES,
) -> bytes:
    """A page as JSON. It ends early at `max_bytes`, after at least one instance, with a cursor."""
    if isinstance(listing, NameListing):
        return page_of(listing).model_dump_json().encode()
    items: list[bytes] = []
    length = 0
    cursor = listing.next_cursor
    for place, instance in enumerate(listing.items):
        item = _dumped(listed_out(instance, listing))
        length += len(item) + 1
        if items and length > max_bytes:
            cursor = cursor_of(listing.items[place - 1])
            break
        items.append(item)
    page = InstancePage(items=[], next_cursor=cursor, stream=listing.stream, **stamp_of(listing))
    return filled(page, "items", items)


def resolve_json(logical_ids: Sequence[str], answer: Resolved, max_bytes: int = MAX_RESOLVE_BYTES) -> bytes:
    """Resolutions as JSON. Raises InvalidInputError if they have more than `max_bytes`."""
    if isinstance(answer, NameListing):
        return resolve_by_name(logical_ids, answer).model_dump_json().encode()

    def bounded(parts: Iterable[bytes]) -> Iterator[bytes]:
        length = 0
        for part in parts:
            length += len(part) + 1
            if length > max_bytes:
                raise InvalidInputError(
                    "logical_ids", f"the answer has more than {max_bytes} bytes: resolve fewer agents at once"
                )
            yield part

    results = bounded(_dumped(resolution_out(found)) for found in answer.value)
    return filled(ResolveAnswer(results=[], **stamp_of(answer)), "results", results)


def json_answer(body: bytes, headers: Mapping[str, str] | None = None) -> Response:
    """An answer with a body that is JSON already."""
    return Response(body, media_type="application/json", headers=headers)


class AnswerCache:
    """The answers to the last queries: at most `max_bytes` of queries and answers together."""

    def __init__(self, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._answers: OrderedDict[tuple[object, ...], bytes] = OrderedDict()
        self.bytes = 0

    def get(self, question: tuple[object, ...]) -> bytes | None:
        """The answer to an earlier query."""
        body = self._answers.get(question)
        if body is not None:
            self._answers.move_to_end(question)
        return body

    def put(self, question: tuple[object, ...], body: bytes) -> None:
        """Keep an answer; the least recently used ones are removed."""
        if question in self._answers:
            self.bytes -= _weight(question, self._answers.pop(question))
        self._answers[question] = body
        self.bytes += _weight(question, body)
        while self.bytes > self._max_bytes:
            self.bytes -= _weight(*self._answers.popitem(last=False))


def _weight(question: tuple[object, ...], body: bytes) -> int:
    return len(body) + sum(len(part) for part in question if isinstance(part, str)) + _ENTRY_BYTES


def _dumped(shown: BaseModel) -> bytes:
    return shown.model_dump_json().encode()


def filled(answer: BaseModel, field: str, parts: Iterable[bytes]) -> bytes:
    """An answer as JSON, with a list in place of an empty one: no text in JSON contains unescaped quotes."""
    name = f'"{field}":['.encode()
    before, empty, behind = _dumped(answer).partition(name + b"]")
    assert empty
    return before + name + b",".join(parts) + b"]" + behind
