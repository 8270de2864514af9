"""A backend of the commands: a deployment's HTTP API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, SecretStr, ValidationError

from seedcore.cli.backend import Event, ListQuery, every_page
from seedcore.cli.errors import HttpProblemError
from seedcore.core.errors import InvalidInputError, RegistryError, RegistryUnavailableError, first_line
from seedcore.core.limits import MAX_PAGE, check_key
from seedcore.discovery.api import AgentAnswer, InstancePage, OperationAnswer, OverviewAnswer, ResolveAnswer
from seedcore.discovery.problems import Problem
from seedcore.settings import without_user

A = TypeVar("A", bound=BaseModel)

_TIMEOUT_S = 15.0
# /v1/watch sends a comment more often than this
_WATCH_SILENCE_S = 30.0


class Deployment:
    """Implements Backend over HTTP."""

    def __init__(self, url: str, token: SecretStr | None = None) -> None:
        """Does not connect."""
        self._url = url.rstrip("/")
        self.place = without_user(self._url)
        self._headers = {} if token is None else {"Authorization": f"Bearer {token.get_secret_value()}"}

    async def listing(self, query: ListQuery) -> InstancePage:
        parameters = {**query.parameters(), "limit": MAX_PAGE}

        async def page(cursor: str | None) -> InstancePage:
            place = {} if cursor is None else {"cursor": cursor}
            return await self._ask(InstancePage, "GET", "/v1/instances", params={**parameters, **place})

        return await every_page(page)

    async def deaths(self, limit: int, within_s: float | None) -> InstancePage:
        parameters = {"limit": limit, **({} if within_s is None else {"within_s": within_s})}
        return await self._ask(InstancePage, "GET", "/v1/deaths", params=parameters)

    async def agent(self, logical_id: str) -> AgentAnswer:
        return await self._ask(AgentAnswer, "GET", _path_of(logical_id))

    async def resolve(self, logical_ids: Sequence[str]) -> ResolveAnswer:
        return await self._ask(ResolveAnswer, "POST", "/v1/resolve", json={"logical_ids": list(logical_ids)})

    async def overview(self) -> OverviewAnswer:
        return await self._ask(OverviewAnswer, "GET", "/v1/overview")

    async def drain(self, logical_id: str, reason: str | None, duration_s: float | None) -> OperationAnswer:
        body = _given(reason=reason, duration_s=duration_s)
        return await self._ask(OperationAnswer, "POST", f"{_path_of(logical_id)}/drain", json=body)

    async def undrain(self, logical_id: str, reason: str | None) -> OperationAnswer:
        return await self._ask(OperationAnswer, "POST", f"{_path_of(logical_id)}/undrain", json=_given(reason=reason))

    async def deregister(self, logical_id: str, reason: str | None) -> OperationAnswer:
        return await self._ask(OperationAnswer, "DELETE", _path_of(logical_id), params=_given(reason=reason))

    async def watch(self, query: ListQuery, after: str | None) -> AsyncIterator[Event]:
        parameters = {**query.parameters(), **_given(since=after)}
        async with (
            self._client(read_s=_WATCH_SILENCE_S) as client,
            client.stream("GET", "/v1/watch", params=parameters) as answer,
        ):
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
                f"the server at {self.place} is not a SeedCore deployment of this version: {first_line(error)}"
            ) from error

    @asynccontextmanager
    async def _client(self, read_s: float = _TIMEOUT_S) -> AsyncIterator[httpx.AsyncClient]:
        try:
            timeout = httpx.Timeout(_TIMEOUT_S, read=read_s)
            async with httpx.AsyncClient(base_url=self._url, timeout=timeout, headers=self._headers) as client:
                yield client
        except httpx.InvalidURL as error:
            raise RegistryUnavailableError(f"{self.place} is not a URL: {error}") from error
        except httpx.HTTPError as error:
            why = first_line(error) or type(error).__name__
            raise RegistryUnavailableError(f"{self.place} does not answer: {why}") from error


def _given(**fields: object) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _path_of(logical_id: str) -> str:
    # no URL can contain these two as a part of its path
    if check_key("agent", logical_id) in {".", ".."}:
        raise InvalidInputError("agent", f"must not be {logical_id!r}")
    return f"/v1/agents/{quote(logical_id, safe='')}"


def _problem(answer: httpx.Response) -> RegistryError:
    try:
        problem = Problem.model_validate_json(answer.content)
    except ValidationError:
        url = answer.request.url
        return RegistryUnavailableError(f"{url} answers {answer.status_code}, but not as a SeedCore deployment does")
    hint = " (the command reads the token from SEEDCORE_HTTP_TOKEN)" if answer.status_code in {401, 403} else ""
    return HttpProblemError(answer.status_code, problem.detail + hint, problem.code)
