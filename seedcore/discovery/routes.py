"""The HTTP API as a whole. Each route finds its replica by dependency: Serve's class-based views need a FastAPI that
analyses a route twice, which newer versions do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline

from seedcore import __version__
from seedcore.discovery import agent_routes, endpoint_routes, fleet_routes, page
from seedcore.discovery.api import AccessAnswer, HealthAnswer, ReadyAnswer
from seedcore.discovery.direct import Direct
from seedcore.discovery.guard import Guard
from seedcore.discovery.handlers import install, problem_media_type
from seedcore.discovery.parameters import Replica, Who, only_known_parameters
from seedcore.discovery.problems import PROBLEMS
from seedcore.discovery.rendering import sources_out
from seedcore.discovery.tokens import Right

_bearer = HTTPBearer(auto_error=False, description="Made by `seedcore token new`. The guard checks it.")

# the scheme is named here for the document alone
v1 = APIRouter(prefix="/v1", dependencies=[Depends(_bearer), Depends(only_known_parameters)])
health = APIRouter(tags=["health"])


@v1.get("/access", responses={429: PROBLEMS[429]}, tags=["health"])
async def get_access(replica: Replica, who: Who) -> AccessAnswer:
    """The right of the caller, and of a caller without a token."""
    return AccessAnswer(
        right=str(who.right), name=who.name, problem=who.problem, anonymous=str(replica.access.anonymous)
    )


@health.get("/healthz", responses={429: PROBLEMS[429]})
async def healthz(replica: Replica, who: Who) -> HealthAnswer:
    """Whether this replica is up: always 200. With the right to read also the registry's report."""
    if who.right < Right.READ:
        return HealthAnswer(status="ok", version=__version__, mode=replica.settings.mode.value)
    report = await replica.reader.registry.health()
    return HealthAnswer(
        status="ok",
        version=__version__,
        mode=replica.settings.mode.value,
        registry=None if isinstance(report, str) else asdict(report),
        registry_problem=report if isinstance(report, str) else None,
    )


@health.get("/readyz", responses={429: PROBLEMS[429], 503: {"model": ReadyAnswer, "description": "No source answers"}})
async def readyz(replica: Replica, who: Who) -> JSONResponse:
    """200 while the registry, the database or Ray's listing answers. With the right to read also which of them, and the
    problems of the others."""
    states = await replica.reader.sources()
    body = ReadyAnswer(ready=states.is_ready, sources=sources_out(states) if who.right >= Right.READ else None)
    return JSONResponse(body.model_dump(), status_code=200 if states.is_ready else 503)


def _document(api: FastAPI) -> Callable[[], dict[str, Any]]:
    """The OpenAPI document with the media types that are really sent."""
    plain = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            api.openapi_schema = problem_media_type(plain())
        return api.openapi_schema

    return openapi


v1.include_router(fleet_routes.router)
v1.include_router(agent_routes.router)
v1.include_router(endpoint_routes.router)
# it brings Swagger UI's files; /docs is a page of this project, because its own has a script in its HTML
api: FastAPI = FastAPIOffline(
    docs_url=None,
    redoc_url=None,
    title="SeedCore Registry",
    version=__version__,
    description="Live agents by logical id. Every answer has its source, its time and whether it is complete.",
)
api.openapi = _document(api)  # type: ignore[method-assign]
install(api)
# middleware that is added last runs first
api.add_middleware(Direct)
api.add_middleware(Guard)
api.include_router(v1)
api.include_router(health)
api.include_router(page.router)
