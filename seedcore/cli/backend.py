"""The backend of the command: the registry of the Ray cluster that it joins, or a deployment over HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, SecretStr, ValidationError

from seedcore.cli.cluster import join_cluster
from seedcore.core.answers import InstanceFilter
from seedcore.core.clock import utc_now
from seedcore.core.errors import (
    CannotKnowError,
    InvalidInputError,
    RegistryError,
    RegistryUnavailableError,
    first_line,
)
from seedcore.core.instances import Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE, check_key
from seedcore.core.selector import parse_labels, parse_selector
from seedcore.discovery.api import (
    AgentAnswer,
    InstancePage,
    OperationAnswer,
    OverviewAnswer,
)
from seedcore.discovery.overview import Overviews
from seedcore.discovery.problems import Problem, ProblemCode
from seedcore.discovery.reader import reader_of
from seedcore.discovery.rendering import agent_answer, operation_answer, page_of
from seedcore.discovery.watch import Position, happenings, require_feed
from seedcore.registry.ray_support.lookup import ray_remembers
from seedcore.settings import Settings, without_user

A = TypeVar("A", bound=BaseModel)

_HTTP_S = 15.0
_FOLLOWED_S = 15.0
_VERB = {Status.DRAINING: "drain", Status.ALIVE: "undrain"}


class HttpProblemError(RegistryError):
    """A deployment refused a request. `code` is the kind of the problem."""

    def __init__(self, status: int, detail: str, code: ProblemCode) -> None:
        super().__init__(status, detail, code)
        self.status = status
        self.detail = detail
        self.code = code

    def __str__(self) -> str:
        return self.detail


class NobodyError(RegistryError):
    """Nobody ever registered under a logical id; `known` is what else is known of it."""

    def __init__(self, logical_id: str, known: str) -> None:
        super().__init__(logical_id, known)
        self.logical_id = logical_id
        self.known = known

    def __str__(self) -> str:
        return f"nobody ever registered as {self.logical_id!r}; {self.known}"


class NobodySelectedError(RegistryError):
    """Nobody is as a command's options want them."""

    def __init__(self, verb: str) -> None:
        super().__init__(verb)
        self.verb = verb

    def __str__(self) -> str:
        return f"nobody to {self.verb}: no agent is of that node (its whole id), organ and selector, in a status for it"


@dataclass(frozen=True, slots=True)
class ListQuery:
    """Which instances a command wants. `statuses` empty: every living one."""

    statuses: tuple[Status, ...] = (Status.ALIVE,)
    verdicts: tuple[Verdict, ...] = ()
    organ: str | None = None
    node: str | None = None
    selector: str = ""
    labels: tuple[str, ...] = ()
    epoch: str | None = None
    with_lapsed: bool = False

    def filter(self) -> InstanceFilter:
        """As the registry takes it. Raises InvalidInputError."""
        return InstanceFilter(
            statuses=frozenset(self.statuses) if self.statuses else None,
            verdicts=frozenset(self.verdicts) if self.verdicts else None,
            organ_id=self.organ,
            node_id=self.node,
            selector=parse_selector(self.selector),
            labels=parse_labels(self.labels),
            epoch=self.epoch,
            fresh_only=not self.with_lapsed,
        ).validated()

    def parameters(self) -> dict[str, Any]:
        """As the HTTP API takes it."""
        self.filter()
        living = tuple(status for status in Status if status is not Status.DEAD)
        single = {"organ": self.organ, "node": self.node, "selector": self.selector or None, "epoch": self.epoch}
        return {
            "status": [status.value for status in self.statuses or living],
            "verdict": [verdict.value for verdict in self.verdicts],
            "label": list(self.labels),
            **{name: value for name, value in single.items() if value is not None},
        }


class Event(NamedTuple):
    """What has happened, and the position after it."""

    name: str
    data: dict[str, Any]
    at: str


class Backend(Protocol):
    """Whoever answers the command."""

    @property
    def place(self) -> str:
        """Which cluster or deployment answers, for people."""
        ...

    async def listing(self, wanted: ListQuery) -> InstancePage:
        """Every page of a listing, as one."""
        ...

    async def deaths(self, limit: int, within_s: float | None) -> InstancePage:
        """Who died, the last first."""
        ...

    async def agent(self, logical_id: str) -> AgentAnswer:
        """One agent. Raises NobodyError where nobody ever registered under it."""
        ...

    async def overview(self) -> OverviewAnswer:
        """The fleet at a glance."""
        ...

    async def turn(
        self, logical_id: str, status: Status, reason: str | None, duration_s: float | None
    ) -> OperationAnswer:
        """An operator's change of an agent."""
        ...

    def watch(self, wanted: ListQuery, after: str | None) -> AsyncIterator[Event]:
        """Events as /v1/watch sends them, after a position that a listing or an event has named (None: from now on)."""
        ...


class Cluster:
    """Implements Backend: the reader of discovery, in this process."""

    def __init__(self, settings: Settings) -> None:
        """Joins the cluster. Raises what join_cluster does."""
        self.place = f"Ray cluster at {join_cluster(settings)}, namespace {settings.namespace}"
        self._settings = settings
        # one query is faster than a listing of all agents
        self._reader = reader_of(settings.model_copy(update={"follow": False}))

    async def listing(self, wanted: ListQuery) -> InstancePage:
        query = wanted.filter()

        async def page(cursor: str | None) -> InstancePage:
            return page_of(await self._reader.list_instances(query, MAX_PAGE, cursor))

        return await _every_page(page)

    async def deaths(self, limit: int, within_s: float | None) -> InstancePage:
        return page_of(await self._reader.deaths(limit, None, within_s))

    async def agent(self, logical_id: str) -> AgentAnswer:
        described = await self._reader.describe(logical_id)
        if described.complete and not described.live and not described.history:
            known = await ray_remembers(logical_id, self._settings.namespace, self._settings.call_timeout_s)
            raise NobodyError(logical_id, known)
        return agent_answer(described)

    async def overview(self) -> OverviewAnswer:
        return await Overviews(self._settings, self._reader).now()

    async def turn(
        self, logical_id: str, status: Status, reason: str | None, duration_s: float | None
    ) -> OperationAnswer:
        return operation_answer(
            logical_id, await self._reader.operate(status, logical_id, reason, duration_s), utc_now()
        )

    async def watch(self, wanted: ListQuery, after: str | None) -> AsyncIterator[Event]:
        position = None if after is None else Position.parsed(after)
        reader = reader_of(self._settings.model_copy(update={"follow": True}))
        try:
            feed = require_feed(reader)
            if not await reader.until_current(_FOLLOWED_S):
                raise RegistryUnavailableError(f"it could not be followed within {_FOLLOWED_S:g} s")
            async for name, data, at in happenings(reader, feed, position, wanted.filter()):
                yield Event(name, data, str(at))
        finally:
            await reader.close()


class Deployment:
    """Implements Backend: the HTTP API at a URL."""

    def __init__(self, url: str, token: SecretStr | None = None) -> None:
        """Tries no connection."""
        self._url = url.rstrip("/")
        self.place = without_user(self._url)
        self._headers = {} if token is None else {"Authorization": f"Bearer {token.get_secret_value()}"}

    async def listing(self, wanted: ListQuery) -> InstancePage:
        parameters = {**wanted.parameters(), "limit": MAX_PAGE}

        async def page(cursor: str | None) -> InstancePage:
            place = {} if cursor is None else {"cursor": cursor}
            return await self._ask(InstancePage, "GET", "/v1/instances", params={**parameters, **place})

        return await _every_page(page)

    async def deaths(self, limit: int, within_s: float | None) -> InstancePage:
        parameters = {"limit": limit, **({} if within_s is None else {"within_s": within_s})}
        return await self._ask(InstancePage, "GET", "/v1/deaths", params=parameters)

    async def agent(self, logical_id: str) -> AgentAnswer:
        return await self._ask(AgentAnswer, "GET", _path_of(logical_id))

    async def overview(self) -> OverviewAnswer:
        return await self._ask(OverviewAnswer, "GET", "/v1/overview")

    async def turn(
        self, logical_id: str, status: Status, reason: str | None, duration_s: float | None
    ) -> OperationAnswer:
        path = _path_of(logical_id)
        told: dict[str, Any] = {} if reason is None else {"reason": reason}
        if status is Status.DEAD:
            return await self._ask(OperationAnswer, "DELETE", path, params=told)
        if duration_s is not None:
            told["duration_s"] = duration_s
        return await self._ask(OperationAnswer, "POST", f"{path}/{_VERB[status]}", json=told)

    async def watch(self, wanted: ListQuery, after: str | None) -> AsyncIterator[Event]:
        parameters = {**wanted.parameters(), **({} if after is None else {"after": after})}
        async with self._client(read_s=30.0) as client, client.stream("GET", "/v1/watch", params=parameters) as answer:
            if answer.is_error:
                await answer.aread()
                raise _problem(answer)
            fields: dict[str, str] = {}
            async for line in answer.aiter_lines():
                field, _, value = line.partition(": ")
                fields[field] = value
                if field == "data":
                    yield Event(fields["event"], json.loads(value), fields["id"])

    async def _ask(self, kind: type[A], method: str, path: str, **options: Any) -> A:
        async with self._client() as client:
            answer = await client.request(method, path, **options)
        if answer.is_error:
            raise _problem(answer)
        try:
            return kind.model_validate_json(answer.content)
        except ValidationError as error:
            raise RegistryUnavailableError(
                f"what answers at {self.place} is no SeedCore deployment of this version: {first_line(error)}"
            ) from error

    @asynccontextmanager
    async def _client(self, read_s: float = _HTTP_S) -> AsyncIterator[httpx.AsyncClient]:
        try:
            timeout = httpx.Timeout(_HTTP_S, read=read_s)
            async with httpx.AsyncClient(base_url=self._url, timeout=timeout, headers=self._headers) as client:
                yield client
        except httpx.InvalidURL as error:
            raise RegistryUnavailableError(f"{self.place} is no URL: {error}") from error
        except httpx.HTTPError as error:
            why = first_line(error) or type(error).__name__
            raise RegistryUnavailableError(f"{self.place} does not answer: {why}") from error


def _path_of(logical_id: str) -> str:
    # no URL can name these two
    if check_key("agent", logical_id) in {".", ".."}:
        raise InvalidInputError("agent", f"must not be {logical_id!r}")
    return f"/v1/agents/{quote(logical_id, safe='')}"


def backend_of(settings: Settings) -> Backend:
    """Whoever the settings say: a URL, or the Ray cluster."""
    return Deployment(settings.url, settings.http_token) if settings.url is not None else Cluster(settings)


async def _every_page(ask: Callable[[str | None], Awaitable[InstancePage]]) -> InstancePage:
    """All pages of a listing as one, of the first one's version; `ask` gets the one behind a cursor."""
    page = await ask(None)
    items, cursor = page.items, page.next_cursor
    while cursor is not None:
        following = await ask(cursor)
        if following.source != page.source:
            raise CannotKnowError("*", "the source of the list changed on the way; ask again")
        items, cursor = items + following.items, following.next_cursor
    return page.model_copy(update={"items": items, "next_cursor": None})


def _problem(answer: httpx.Response) -> RegistryError:
    try:
        told = Problem.model_validate_json(answer.content)
        hint = " (the command takes it from SEEDCORE_HTTP_TOKEN)" if answer.status_code in {401, 403} else ""
        return HttpProblemError(answer.status_code, told.detail + hint, told.code)
    except ValidationError:
        where = answer.request.url
        return RegistryUnavailableError(f"{where} answers {answer.status_code}, and not as a SeedCore deployment does")


def shown_ids(ids: Sequence[str], limit: int = 5) -> str:
    """Some names, and how many more there are."""
    more = "" if len(ids) <= limit else f" and {len(ids) - limit} more"
    return ", ".join(ids[:limit]) + more
