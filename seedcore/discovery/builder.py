"""Builds the Serve application from `args` and the environment.

No `from __future__ import annotations` here: Serve reads the type of `args` from the signature as it stands.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from seedcore.composition import store_recipe
from seedcore.discovery.access import check_bind, check_proxies
from seedcore.discovery.app import Discovery, listening_host
from seedcore.discovery.routes import api
from seedcore.discovery.tokens import TokenFile
from seedcore.registry.ray_support.session import cluster_name
from seedcore.settings import load_settings


class DiscoveryArgs(BaseModel):
    """`args` of the application in serve_config.yaml."""

    model_config = ConfigDict(extra="forbid")

    num_replicas: Annotated[int, Field(ge=1, le=100)] = 1
    max_ongoing_requests: Annotated[int, Field(ge=4, le=10_000)] = 1000
    keep_registry: bool = True


def build(args: DiscoveryArgs) -> serve.Application:
    """The application, for `import_path: seedcore.discovery:build`.

    Raises ConfigurationError, or StoreUnavailableError if another cluster's registry uses the embedded database.
    """
    settings = load_settings()
    check_bind(settings, listening_host())
    check_proxies(settings)
    if settings.http_tokens_file is not None:
        # checked here only: a replica that restarts later must start, with or without the file
        TokenFile(settings.http_tokens_file).require_tokens()
    store_recipe(settings).require_free_for(cluster_name())
    deployment: Any = serve.deployment(
        name="Discovery",
        num_replicas=args.num_replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=5,
    )(serve.ingress(api)(Discovery))
    application: serve.Application = deployment.bind(
        settings, args.keep_registry, args.max_ongoing_requests // 4, args.max_ongoing_requests
    )
    return application
