"""The Serve deployment: starts the registry actor, keeps it running, answers over HTTP and by handle.

Its health check never asks the database: an outage there must not restart replicas.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from seedcore import __version__
from seedcore.core.errors import (
    CannotKnowError,
    InvalidInputError,
    NotResolvableError,
    RegistryError,
    RegistryUnavailableError,
    StoreUnavailableError,
    UnknownInstanceError,
)
from seedcore.core.lifecycle import Status
from seedcore.core.model import MAX_PAGE, InstanceFilter
from seedcore.discovery.api import (
    AgentAnswer,
    EpochAnswer,
    HealthAnswer,
    InstanceAnswer,
    InstancePage,
    Problem,
    ReadyAnswer,
    ResolveAnswer,
    ResolveRequest,
    RungsOut,
    agent_answer,
    instance_out,
    page_of,
    resolve_answer,
    stamp_of,
)
from seedcore.discovery.ladder import DiscoveryLadder
from seedcore.registry.connection import RegistryConnection
from seedcore.registry.directory import RayDirectory
from seedcore.registry.handles import HandleFinder
from seedcore.registry.lookup import ActorHandle
from seedcore.runtime import start_registry, store_recipe
from seedcore.settings import Settings, load_settings

logger = logging.getLogger(__name__)

_KEEP_PERIOD_S = 5.0


class DiscoveryArgs(BaseModel):
    """`args` of the application in serve_config.yaml."""

    model_config = ConfigDict(extra="forbid")

    num_replicas: Annotated[int, Field(ge=1, le=100)] = 1
    max_ongoing_requests: Annotated[int, Field(ge=1, le=10_000)] = 100
    keep_registry: bool = True


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """Equality selectors `key=value`, or InvalidInputError."""
    labels: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise InvalidInputError("label", f"must be written key=value, not {text[:80]!r}")
        labels[key] = value
    return labels


_STATUS_OF_ERROR: tuple[tuple[type[RegistryError], int], ...] = (
    (InvalidInputError, 422),
    (NotResolvableError, 404),
    (UnknownInstanceError, 404),
    (CannotKnowError, 503),
    (RegistryUnavailableError, 503),
    (StoreUnavailableError, 503),
)

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    422: {"model": Problem, "description": "A value breaks a stated limit"},
    503: {"model": Problem, "description": "Nobody who could tell can be asked now"},
}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "There is none"}}

api = FastAPI(
    title="SeedCore Registry",
    version=__version__,
    description="Who is alive, by logical id. Every answer says its source, its time and whether it is complete.",
)


def _problem(status: int, title: str, detail: str) -> JSONResponse:
    body = Problem(title=title, status=status, detail=detail)
    return JSONResponse(body.model_dump(), status_code=status, media_type="application/problem+json")


@api.exception_handler(RegistryError)
async def _registry_error(_request: Request, error: Exception) -> JSONResponse:
    status = next((code for kind, code in _STATUS_OF_ERROR if isinstance(error, kind)), 500)
    return _problem(status, type(error).__name__.removesuffix("Error"), str(error))


@api.exception_handler(RequestValidationError)
async def _invalid_request(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in {"query", "body", "path"})
    return _problem(422, "InvalidInput", f"{where or 'body'}: {first['msg']}")


class Discovery:
    """One replica. Routes answer HTTP; `resolve` and `resolve_many` answer in-cluster callers with handles."""

    def __init__(self, settings: Settings, args: DiscoveryArgs) -> None:
        self._settings = settings
        self._connection = RegistryConnection(settings.namespace, settings.call_timeout_s)
        self._ladder = DiscoveryLadder(
            self._connection,
            store_recipe(settings).reader,
            RayDirectory(settings.namespace, settings.call_timeout_s),
            HandleFinder(settings.namespace, settings.probe_timeout_s),
        )
        self._keeping: asyncio.Task[None] | None = None
        if args.keep_registry and settings.registry_enabled:
            self._keeping = asyncio.get_running_loop().create_task(self._keep_registry())

    def check_health(self) -> None:
        """The replica answers, that is all: what is behind it has its own health."""

    # For in-cluster callers

    async def resolve(self, logical_id: str) -> ActorHandle:
        """A live, proven handle. Raises NotResolvableError or CannotKnowError."""
        return await self._ladder.handle_of(logical_id)

    async def resolve_many(self, logical_ids: Sequence[str]) -> dict[str, ActorHandle | str]:
        """A proven handle for each agent, or the reason why there is none; at most MAX_PAGE at once."""
        return await self._ladder.handles_of(logical_ids)

    # HTTP

    @api.get("/v1/instances", responses=_PROBLEMS)
    async def list_instances(
        self,
        status: Annotated[list[Status] | None, Query(description="repeatable; default alive")] = None,
        organ: Annotated[str | None, Query(description="organ id")] = None,
        label: Annotated[list[str] | None, Query(description="key=value; repeatable, all must hold")] = None,
        logical_id: Annotated[str | None, Query(description="instances of one agent")] = None,
        epoch: Annotated[str | None, Query(description="default: the current one")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
        cursor: Annotated[str | None, Query(description="next_cursor of the page before")] = None,
    ) -> InstancePage:
        """A page of instances in the order of logical id."""
        wanted = InstanceFilter(
            statuses=frozenset(status) if status else frozenset({Status.ALIVE}),
            organ_id=organ,
            labels=parse_labels(label if label is not None else []),
            logical_id=logical_id,
            epoch=epoch,
        )
        return page_of(await self._ladder.list_instances(wanted, limit, cursor))

    @api.get("/v1/instances/{instance_id}", responses={**_PROBLEMS, **_NOT_FOUND})
    async def get_instance(self, instance_id: str) -> InstanceAnswer:
        """One instance, dead or alive."""
        answer = await self._ladder.instance(instance_id)
        return InstanceAnswer(instance=instance_out(answer.value), **stamp_of(answer))

    @api.get("/v1/agents/{logical_id:path}", responses={**_PROBLEMS, **_NOT_FOUND})
    async def get_agent(self, logical_id: str) -> AgentAnswer:
        """One agent: its live instances and its newest ones dead or alive."""
        described = await self._ladder.describe(logical_id)
        if described.complete and not described.live and not described.history:
            raise NotResolvableError(logical_id, "nobody ever registered under this logical id")
        return agent_answer(described)

    @api.post("/v1/resolve", responses=_PROBLEMS)
    async def resolve_over_http(self, request: ResolveRequest) -> ResolveAnswer:
        """The best instance of each agent, or why there is none."""
        return resolve_answer(await self._ladder.resolve(request.logical_ids))

    @api.get("/v1/epoch", responses=_PROBLEMS)
    async def get_epoch(self) -> EpochAnswer:
        """The current epoch."""
        answer = await self._ladder.epoch()
        return EpochAnswer(epoch=answer.value.name, number=answer.value.number, **stamp_of(answer))

    @api.get("/healthz")
    async def healthz(self) -> HealthAnswer:
        """This replica is up. Always 200; says how the registry is."""
        health = await self._ladder.registry_health()
        is_report = not isinstance(health, str)
        return HealthAnswer(
            status="ok",
            version=__version__,
            mode=self._settings.mode.value,
            registry=asdict(health) if not isinstance(health, str) else None,
            registry_problem=None if is_report else str(health),
        )

    @api.get("/readyz", responses={503: {"model": ReadyAnswer, "description": "No rung answers"}})
    async def readyz(self) -> JSONResponse:
        """200 while the registry, the database or Ray's listing can answer; says which."""
        rungs = await self._ladder.rungs()
        shown = RungsOut(registry=rungs.registry or "ok", postgres=rungs.postgres or "ok", ray=rungs.ray or "ok")
        body = ReadyAnswer(ready=rungs.is_ready, rungs=shown)
        return JSONResponse(body.model_dump(), status_code=200 if rungs.is_ready else 503)

    async def _keep_registry(self) -> None:
        """Start the registry actor, and again whenever it is gone for good."""
        while True:
            try:
                await self._connection.hello()
            except RegistryUnavailableError:
                try:
                    hello = await start_registry(self._settings)
                    logger.info("registry actor runs", extra={"pid": hello.pid, "node_id": hello.node_id})
                except RegistryError as error:
                    logger.warning("the registry actor could not be started: %s", error)
            await asyncio.sleep(_KEEP_PERIOD_S)


def build(args: DiscoveryArgs) -> serve.Application:
    """The application, for `import_path: seedcore.discovery:build`. Raises ConfigurationError."""
    settings = load_settings()
    store_recipe(settings)
    deployment: Any = serve.deployment(
        name="Discovery",
        num_replicas=args.num_replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=5,
    )(serve.ingress(api)(Discovery))
    application: serve.Application = deployment.bind(settings, args)
    return application
