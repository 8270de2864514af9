"""Answers as JSON that are bounded by their bytes: a page ends early, and the cache of answers counts its bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from pydantic import BaseModel
from starlette.responses import Response

from seedcore.core.answers import Listing, Origin, Resolution
from seedcore.core.errors import InvalidInputError
from seedcore.core.instances import Instance, Verdict
from seedcore.core.paging import encode_cursor
from seedcore.discovery.api import InstancePage, ResolveAnswer
from seedcore.discovery.rendered import RenderedInstances
from seedcore.discovery.rendering import copied_out, listed_out, page_of, resolution_out, resolve_by_name, stamp_of
from seedcore.registry.caller.sources import NameListing, Resolved

MAX_PAGE_BYTES = 1024 * 1024
MAX_RESOLVE_BYTES = 8 * 1024 * 1024
MAX_CACHE_BYTES = 16 * 1024 * 1024

Question = tuple[object, ...]
"""A query, and the version of the local copy that it is about."""

# of an entry of the cache, beside its texts
_ENTRY_BYTES = 1024


def page_json(
    listing: Listing | NameListing,
    cursor_of: Callable[[Instance], str] = encode_cursor,
    max_bytes: int = MAX_PAGE_BYTES,
    rendered: RenderedInstances | None = None,
) -> bytes:
    """A page as JSON. It ends early at `max_bytes`, after at least one instance, with a cursor. `rendered` has the JSON
    of instances of the local copy."""
    if isinstance(listing, NameListing):
        return page_of(listing).model_dump_json().encode()
    items: list[bytes] = []
    length = 0
    cursor = listing.next_cursor
    is_copied = rendered is not None and listing.source is Origin.SNAPSHOT
    for place, instance in enumerate(listing.items):
        if rendered is not None and is_copied:
            verdict = listing.verdicts.get(instance.instance_id, Verdict.FRESH)
            item = rendered.json_of(instance, verdict, _copied_json)
        else:
            item = _dumped(listed_out(instance, listing))
        length += len(item) + 1
        if items and length > max_bytes:
            cursor = cursor_of(listing.items[place - 1])
            break
        items.append(item)
    page = InstancePage(items=[], next_cursor=cursor, stream=listing.stream, **stamp_of(listing))
    return filled(page, "items", items)


def resolve_json(
    logical_ids: Sequence[str],
    answer: Resolved,
    max_bytes: int = MAX_RESOLVE_BYTES,
    rendered: RenderedInstances | None = None,
) -> bytes:
    """Resolutions as JSON. Raises InvalidInputError if they have more than `max_bytes`. `rendered` as for a page."""
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

    def resolution(found: Resolution) -> bytes:
        if rendered is None or found.instance is None or answer.source is not Origin.SNAPSHOT:
            return _dumped(resolution_out(found, answer.source))
        without = _dumped(resolution_out(replace(found, instance=None), answer.source))
        before, null, behind = without.partition(b'"instance":null')
        assert null
        shown = rendered.json_of(found.instance, found.verdict, _copied_json)
        return b"".join((before, b'"instance":', shown, behind))

    results = bounded(resolution(found) for found in answer.value)
    return filled(ResolveAnswer(results=[], **stamp_of(answer)), "results", results)


def json_answer(body: bytes, headers: Mapping[str, str] | None = None) -> Response:
    """An answer with a body that is JSON already."""
    return Response(body, media_type="application/json", headers=headers)


class AnswerCache:
    """The answers to the last queries: at most `max_bytes` of queries and answers together."""

    def __init__(self, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._answers: OrderedDict[Question, bytes] = OrderedDict()
        self.bytes = 0

    def get(self, question: Question) -> bytes | None:
        """The answer to an earlier query."""
        body = self._answers.get(question)
        if body is not None:
            self._answers.move_to_end(question)
        return body

    def put(self, question: Question, body: bytes) -> None:
        """Keep an answer; the least recently used ones are removed."""
        if question in self._answers:
            self.bytes -= _weight(question, self._answers.pop(question))
        self._answers[question] = body
        self.bytes += _weight(question, body)
        while self.bytes > self._max_bytes:
            self.bytes -= _weight(*self._answers.popitem(last=False))


def _weight(question: Question, body: bytes) -> int:
    return len(body) + sum(len(part) for part in question if isinstance(part, (str, bytes))) + _ENTRY_BYTES


def _copied_json(instance: Instance, verdict: Verdict) -> bytes:
    return _dumped(copied_out(instance, verdict))


def _dumped(shown: BaseModel) -> bytes:
    return shown.model_dump_json().encode()


def filled(answer: BaseModel, field: str, parts: Iterable[bytes]) -> bytes:
    """An answer as JSON, with a list in place of an empty one: no text in JSON contains unescaped quotes."""
    name = f'"{field}":['.encode()
    before, empty, behind = _dumped(answer).partition(name + b"]")
    assert empty
    return before + name + b",".join(parts) + b"]" + behind
