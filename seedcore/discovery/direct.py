"""Answers to the most frequent requests, ahead of the routes: to find a route and to read its parameters takes several
times as long as these answers.

They are made by the functions of the routes, which take every other request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from seedcore.core.errors import RegistryError
from seedcore.discovery.agent_routes import agent_response, resolve_response
from seedcore.discovery.app import Discovery
from seedcore.discovery.fleet_routes import kept_page
from seedcore.discovery.guard import path_of
from seedcore.discovery.handlers import registry_problem
from seedcore.discovery.parameters import replica_here

_PAGE = "/v1/instances"
_OF_ONE_AGENT: Mapping[str, Callable[[Discovery, str], Awaitable[Response]]] = {
    "/v1/resolve/": resolve_response,
    "/v1/agents/": agent_response,
}


class Direct:
    """Answers a page that is kept, and requests about one agent without parameters; behind the guard."""

    def __init__(self, app: ASGIApp, replica: Callable[[], Discovery] = replica_here) -> None:
        self._app = app
        self._replica = replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = None
        if scope["type"] == "http" and scope["method"] == "GET":
            answer = await self._answer(scope)
        await (self._app if answer is None else answer)(scope, receive, send)

    async def _answer(self, scope: Scope) -> Response | None:
        path = path_of(scope)
        if path == _PAGE:
            return kept_page(self._replica(), scope)
        if scope["query_string"]:
            return None
        for prefix, respond in _OF_ONE_AGENT.items():
            if path.startswith(prefix):
                try:
                    return await respond(self._replica(), path[len(prefix) :])
                except RegistryError as error:
                    return registry_problem(error)
        return None
