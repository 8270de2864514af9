"""Validates objects: with Kubernetes' own schemas, and with models of the parts of custom resources that we use.

The models contain documented fields of KubeRay 1.7 and CloudNativePG 1.28, and refuse every other field. Pod templates
and value sources inside them are validated with Kubernetes' schemas.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import kubernetes_validate
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tests.deploy.kustomize import Document

# the oldest version that a provider still supports, and the newest version of the schemas
VERSIONS = ("1.31", kubernetes_validate.latest_version())


def check_builtin(document: Document) -> None:
    """Validate a built-in object with the schemas. An unknown field is an error."""
    for version in VERSIONS:
        kubernetes_validate.validate(document, version, strict=True)


def _pod_template(template: Document) -> Document:
    check_builtin({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template})
    return template


def _value_source(source: Document) -> Document:
    container = {"name": "x", "image": "x", "env": [{"name": "X", "valueFrom": source}]}
    _pod_template({"spec": {"containers": [container]}})
    return source


def _resources(resources: Document) -> Document:
    _pod_template({"spec": {"containers": [{"name": "x", "image": "x", "resources": resources}]}})
    return resources


PodTemplate = Annotated[dict[str, Any], AfterValidator(_pod_template)]
ValueSource = Annotated[dict[str, Any], AfterValidator(_value_source)]
Resources = Annotated[dict[str, Any], AfterValidator(_resources)]
Count = Annotated[int, Field(ge=0, strict=True)]
Text = Annotated[str, Field(min_length=1, strict=True)]
Duration = Annotated[str, Field(pattern=r"^\d+(s|m|h)$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Metadata(_Strict):
    """Metadata of any object."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
    namespace: str | None = None
    labels: dict[str, Text] = {}
    annotations: dict[str, Text] = {}


class NamedSecret(_Strict):
    """Reference to a Secret in the same namespace."""

    name: Text


# KubeRay


class AuthOptions(_Strict):
    """Ray's token: the key auth_token of the Secret `secretName`."""

    mode: Literal["disabled", "token"]
    secretName: Text


class RedisCredential(_Strict):
    """A password from a Secret, never from the manifest itself."""

    valueFrom: ValueSource


class GcsFaultTolerance(_Strict):
    """The Redis that keeps Ray's tables when the head ends."""

    backend: Literal["redis"] | None = None
    redisAddress: Text
    redisPassword: RedisCredential


class HeadGroup(_Strict):
    """The head's pod."""

    rayStartParams: dict[str, Annotated[str, Field(strict=True)]]
    template: PodTemplate


class WorkerGroup(HeadGroup):
    """A group of worker pods; the Ray nodes get the same `labels`."""

    groupName: Text
    labels: dict[str, Text] = {}
    replicas: Count
    minReplicas: Count
    maxReplicas: Count


class RayCluster(_Strict):
    """The cluster of a RayService."""

    rayVersion: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    authOptions: AuthOptions
    gcsFaultToleranceOptions: GcsFaultTolerance
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class UpgradeStrategy(_Strict):
    """Whether KubeRay creates a changed cluster beside the old one."""

    type: Literal["NewCluster", "None"]


class RayServiceSpec(_Strict):
    """The spec of a RayService."""

    upgradeStrategy: UpgradeStrategy
    excludeHeadPodFromServeSvc: bool = False
    serveConfigV2: Text
    rayClusterConfig: RayCluster


class RayService(_Strict):
    """ray.io/v1."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


# CloudNativePG


class Storage(_Strict):
    """A volume of each server."""

    size: Annotated[str, Field(pattern=r"^\d+(Mi|Gi|Ti)$")]
    storageClass: Text | None = None


class DatabaseAffinity(_Strict):
    """The scheduling of the servers on different nodes."""

    enablePodAntiAffinity: bool
    topologyKey: Text
    podAntiAffinityType: Literal["preferred", "required"]


class InitDatabase(_Strict):
    """A new database and its owner."""

    database: Text
    owner: Text
    secret: NamedSecret


class Bootstrap(_Strict):
    """The initial content of the database."""

    initdb: InitDatabase


class ManagedRole(_Strict):
    """A role that the operator manages."""

    name: Text
    ensure: Literal["present", "absent"]
    login: bool
    passwordSecret: NamedSecret


class ManagedRoles(_Strict):
    """Every one."""

    roles: list[ManagedRole]


class Synchronous(_Strict):
    """How many standbys have a commit before it is acknowledged, and which of them may be promoted."""

    method: Literal["any", "first"]
    number: Annotated[int, Field(ge=1, strict=True)]
    dataDurability: Literal["required"]
    failoverQuorum: Literal[True]


class DatabaseSettings(_Strict):
    """The settings of PostgreSQL."""

    synchronous: Synchronous


class DatabaseClusterSpec(_Strict):
    """The spec of a Cluster."""

    instances: Annotated[int, Field(ge=1, strict=True)]
    postgresql: DatabaseSettings
    imageName: Text
    storage: Storage
    resources: Resources
    affinity: DatabaseAffinity
    bootstrap: Bootstrap
    managed: ManagedRoles


class DatabaseCluster(_Strict):
    """postgresql.cnpg.io/v1."""

    apiVersion: Literal["postgresql.cnpg.io/v1"]
    kind: Literal["Cluster"]
    metadata: Metadata
    spec: DatabaseClusterSpec


# the Prometheus operator


class Expression(_Strict):
    """One requirement on labels."""

    key: Text
    operator: Literal["In", "NotIn"]
    values: list[Text]


class Selector(_Strict):
    """A label selector."""

    matchLabels: dict[str, Text]
    matchExpressions: list[Expression] = []


class MetricsEndpoint(_Strict):
    """A named port of the pods."""

    port: Text
    interval: Duration


class PodMonitorSpec(_Strict):
    """The spec of a PodMonitor: the pods that Prometheus scrapes."""

    selector: Selector
    podMetricsEndpoints: list[MetricsEndpoint]


class PodMonitor(_Strict):
    """monitoring.coreos.com/v1."""

    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: Metadata
    spec: PodMonitorSpec


class Rule(_Strict):
    """An alert; promtool reads its expression."""

    alert: Text
    expr: Text
    wait: Duration | None = Field(None, alias="for")
    labels: dict[str, Text]
    annotations: dict[str, Text]


class RuleGroup(_Strict):
    """A group of rules that Prometheus evaluates together."""

    name: Text
    interval: Duration
    rules: list[Rule]


class Rules(_Strict):
    """All groups."""

    groups: list[RuleGroup]


class PrometheusRule(_Strict):
    """monitoring.coreos.com/v1."""

    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PrometheusRule"]
    metadata: Metadata
    spec: Rules


OTHERS: dict[tuple[str, str], type[BaseModel]] = {
    ("ray.io/v1", "RayService"): RayService,
    ("postgresql.cnpg.io/v1", "Cluster"): DatabaseCluster,
    ("monitoring.coreos.com/v1", "PodMonitor"): PodMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): PrometheusRule,
}


def check(document: Document) -> None:
    """Raise if an object is not valid for its kind."""
    model = OTHERS.get((document["apiVersion"], document["kind"]))
    if model is None:
        check_builtin(document)
    else:
        model.model_validate(document)
