"""Kubernetes: every overlay renders to valid objects, and their references resolve."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from seedcore.discovery.builder import DiscoveryArgs
from seedcore.settings import Settings
from tests.deploy.conftest import DEPLOY
from tests.deploy.haproxy import variables_of_serve
from tests.deploy.kinds import check
from tests.deploy.kustomize import Document, render
from tests.deploy.rules import wrapped

OVERLAYS = sorted(path.parent for path in (DEPLOY / "kubernetes" / "overlays").glob("*/kustomization.yaml"))
README = (DEPLOY / "README.md").read_text()


@pytest.fixture(params=OVERLAYS, ids=lambda folder: str(folder.name))
def overlay(request: pytest.FixtureRequest) -> list[Document]:
    folder: Path = request.param
    return render(folder)


def the(objects: list[Document], kind: str) -> list[Document]:
    return [one for one in objects if one["kind"] == kind]


def templates(objects: list[Document]) -> Iterator[Document]:
    """Every pod template."""
    for one in objects:
        if one["kind"] == "RayService":
            cluster = one["spec"]["rayClusterConfig"]
            yield cluster["headGroupSpec"]["template"]
            yield from (group["template"] for group in cluster["workerGroupSpecs"])
        elif one["kind"] in {"Job", "StatefulSet"}:
            yield one["spec"]["template"]


def containers(objects: list[Document]) -> list[Document]:
    return [container for template in templates(objects) for container in template["spec"]["containers"]]


def is_selected(labels: dict[str, str], selector: Document) -> bool:
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def test_there_is_an_overlay_for_cloudnative_pg_and_one_for_any_postgres() -> None:
    assert [folder.name for folder in OVERLAYS] == ["any-postgres", "cloudnative-pg"]


def test_every_object_is_valid_for_its_kind(overlay: list[Document]) -> None:
    for one in overlay:
        check(one)
        assert one["metadata"]["namespace"] == "seedcore"
    kinds = {one["kind"] for one in overlay}
    assert kinds >= {"RayService", "PodDisruptionBudget", "NetworkPolicy", "Service", "Job", "ConfigMap"}


def _misspell(document: Document, *path: str | int) -> None:
    node: Any = document
    for step in path[:-1]:
        node = node[step]
    node[f"{path[-1]}x"] = node.pop(path[-1])


_HEAD = ("spec", "rayClusterConfig", "headGroupSpec")
MISTAKES: list[tuple[str, Callable[[Document], None]]] = [
    ("RayService", lambda one: _misspell(one, "spec", "serveConfigV2")),
    ("RayService", lambda one: _misspell(one, "spec", "rayClusterConfig", "authOptions", "secretName")),
    ("RayService", lambda one: _misspell(one, *_HEAD, "template", "spec", "automountServiceAccountToken")),
    ("RayService", lambda one: _misspell(one, *_HEAD, "template", "spec", "containers", 0, "livenessProbe", "httpGet")),
    ("RayService", lambda one: one["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].update({"a": 1})),
    ("Cluster", lambda one: _misspell(one, "spec", "storage", "size")),
    ("Cluster", lambda one: _misspell(one, "spec", "resources", "requests")),
    ("Job", lambda one: _misspell(one, "spec", "backoffLimit")),
    ("PodDisruptionBudget", lambda one: _misspell(one, "spec", "minAvailable")),
    ("NetworkPolicy", lambda one: _misspell(one, "spec", "policyTypes")),
]


@pytest.mark.parametrize("mistake", range(len(MISTAKES)))
def test_validation_refuses_a_mistake(mistake: int) -> None:
    kind, make = MISTAKES[mistake]
    one = the(render(DEPLOY / "kubernetes" / "overlays" / "cloudnative-pg"), kind)[0]
    check(one)
    make(one)
    with pytest.raises((ValidationError, jsonschema.ValidationError)):
        check(one)


def test_pods_of_workers_have_the_time_that_ray_takes_to_drain(overlay: list[Document]) -> None:
    [service] = the(overlay, "RayService")
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    # RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S is 30
    assert [group["template"]["spec"]["terminationGracePeriodSeconds"] for group in groups] == [60, 60]


def test_a_failover_of_cloudnative_pg_promotes_only_a_replica_with_every_commit() -> None:
    [database] = the(render(DEPLOY / "kubernetes" / "overlays" / "cloudnative-pg"), "Cluster")
    assert database["spec"]["postgresql"]["synchronous"] == {
        "method": "any",
        "number": 1,
        "dataDurability": "required",
        "failoverQuorum": True,
    }


def test_pods_have_no_more_rights_than_they_use(overlay: list[Document]) -> None:
    for template in templates(overlay):
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(overlay):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]
        image = container["image"]
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", image), image


def test_long_lived_pods_have_probes_and_no_probe_depends_on_the_database(overlay: list[Document]) -> None:
    for template in templates(overlay):
        if template["metadata"]["labels"]["app.kubernetes.io/component"] == "migrate":
            continue
        for container in template["spec"]["containers"]:
            assert {"livenessProbe", "readinessProbe"} <= set(container)
            assert "readyz" not in str(container)


def test_every_secret_and_setting_that_is_used_exists_or_is_documented(overlay: list[Document]) -> None:
    maps = {one["metadata"]["name"]: set(one["data"]) for one in the(overlay, "ConfigMap")}
    wanted: set[tuple[str, str]] = set()

    def look(node: Any) -> None:
        if isinstance(node, list):
            for item in node:
                look(item)
        elif isinstance(node, dict):
            if "secretKeyRef" in node:
                wanted.add((node["secretKeyRef"]["name"], node["secretKeyRef"]["key"]))
            if "configMapKeyRef" in node:
                assert node["configMapKeyRef"]["key"] in maps[node["configMapKeyRef"]["name"]]
            if "configMapRef" in node:
                assert node["configMapRef"]["name"] in maps
            if "secretName" in node and "items" in node:
                wanted.update((node["secretName"], item["key"]) for item in node["items"])
            for value in node.values():
                look(value)

    look(overlay)
    wanted.add(("seedcore-ray-token", "auth_token"))
    made = {("seedcore-database-ca", "ca.crt")} if the(overlay, "Cluster") else set[tuple[str, str]]()
    rows = set(re.findall(r"^\| `([\w-]+)` \| `([\w.-]+)` \|", README, re.MULTILINE))
    assert wanted - made <= rows
    assert {name for name, _ in wanted} <= {name for name, _ in rows}
    before, applied, _ = README.partition("$ kubectl apply --kustomize deploy/kubernetes/overlays")
    assert applied
    commands = re.findall(r"^\$ kubectl .*create secret generic ([\w-]+)((?:.*\\\n)*.*)$", before, re.MULTILINE)
    for name, key in wanted - made:
        assert any(name == one and re.search(rf"--from-(literal|file)={key}\b", rest) for one, rest in commands), name
    if the(overlay, "Cluster"):
        # CloudNativePG creates the roles from these Secrets
        made_roles = {name for name, rest in commands if "basic-auth" in rest and "username=" in rest}
        assert made_roles == {"seedcore-database", "seedcore-database-owner"}


def test_every_setting_exists(overlay: list[Document]) -> None:
    known = {
        str(name) for field in Settings.model_fields.values() for name in getattr(field.validation_alias, "choices", [])
    }
    used = {key for one in the(overlay, "ConfigMap") for key in one["data"]}
    used |= {variable["name"] for container in containers(overlay) for variable in container.get("env", [])}
    assert {name for name in used if not name.startswith(("PGSSL", "REDIS_"))} <= known | variables_of_serve()


def test_services_budgets_and_policies_select_pods(overlay: list[Document]) -> None:
    pods = [template["metadata"]["labels"] for template in templates(overlay)]
    for cluster in the(overlay, "Cluster"):
        # the operator sets this label
        pods.append({"cnpg.io/cluster": cluster["metadata"]["name"]})
    for service in the(overlay, "Service"):
        assert any(is_selected(labels, {"matchLabels": service["spec"]["selector"]}) for labels in pods)
    for budget in the(overlay, "PodDisruptionBudget"):
        assert sum(is_selected(labels, budget["spec"]["selector"]) for labels in pods) == 1
        # Kubernetes supports nothing else for pods whose owner has no scale subresource
        assert isinstance(budget["spec"]["minAvailable"], int)
        assert "maxUnavailable" not in budget["spec"]
    policies = [policy["spec"]["podSelector"] for policy in the(overlay, "NetworkPolicy")]
    for selector in policies:
        assert any(is_selected(labels, selector) for labels in pods)
    for labels in pods:
        assert any(is_selected(labels, selector) for selector in policies), labels


def test_only_prometheus_reaches_the_metrics(overlay: list[Document]) -> None:
    reached = {
        (port["port"], str(rule["from"]))
        for policy in the(overlay, "NetworkPolicy")
        for rule in policy["spec"].get("ingress", [])
        for port in rule.get("ports", [])
        if port["port"] in {8080, 9187}
    }
    prometheus = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
    }
    ports = {8080, 9187} if the(overlay, "Cluster") else {8080}
    assert reached == {(port, str([prometheus])) for port in ports}


def test_pods_of_other_namespaces_are_known_by_the_name_of_theirs(overlay: list[Document]) -> None:
    peers = [
        peer
        for policy in the(overlay, "NetworkPolicy")
        for rule in [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]
        for peer in [*rule.get("from", []), *rule.get("to", [])]
    ]
    named = {peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for peer in peers if len(peer) > 1}
    assert named == {"kuberay-system", "monitoring"} | ({"cnpg-system"} if the(overlay, "Cluster") else set())
    # the others are of the namespace of these objects: a label alone is enough of a name there
    assert all(set(peer) in ({"podSelector"}, {"podSelector", "namespaceSelector"}) for peer in peers)
    for name in named:
        assert f"`{name}`" in README


def reached_by(overlay: list[Document], component: str) -> set[int]:
    """Ports that the pods of a component may connect to, Ray's own apart."""
    labels = {"app.kubernetes.io/part-of": "seedcore", "app.kubernetes.io/component": component}
    return {
        port["port"]
        for policy in the(overlay, "NetworkPolicy")
        if is_selected(labels, policy["spec"]["podSelector"]) and "Egress" in policy["spec"]["policyTypes"]
        for rule in policy["spec"]["egress"]
        for port in rule.get("ports", [])
    }


def test_only_pods_that_have_a_dsn_reach_a_database(overlay: list[Document]) -> None:
    assert reached_by(overlay, "head") == {53, 6379, 5432}
    assert reached_by(overlay, "discovery") == {53, 5432}
    assert reached_by(overlay, "migrate") == {53, 5432}
    assert reached_by(overlay, "agents") == {53}
    assert reached_by(overlay, "redis") == set()


def test_the_target_port_of_a_service_is_a_port_of_its_pods(overlay: list[Document]) -> None:
    for service in the(overlay, "Service"):
        for template in templates(overlay):
            if not is_selected(template["metadata"]["labels"], {"matchLabels": service["spec"]["selector"]}):
                continue
            names = {port["name"] for one in template["spec"]["containers"] for port in one["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_the_head_offers_no_cpu_requires_a_token_and_stores_its_tables_in_redis(overlay: list[Document]) -> None:
    (service,) = the(overlay, "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == "seedcore-redis:6379"


def test_the_prometheus_operator_scrapes_every_ray_node_and_has_the_same_alerts(overlay: list[Document]) -> None:
    objects = render(DEPLOY / "kubernetes" / "prometheus-operator")
    for one in objects:
        check(one)
    (monitor,), (rule,) = the(objects, "PodMonitor"), the(objects, "PrometheusRule")
    assert rule["spec"] == wrapped()["spec"], "run python -m tests.deploy.rules"
    (service,) = the(overlay, "RayService")
    nodes = list(templates([service]))
    for template in nodes:
        assert is_selected(template["metadata"]["labels"], monitor["spec"]["selector"])
        ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
        assert ports[monitor["spec"]["podMetricsEndpoints"][0]["port"]] == 8080
    others = [template for template in templates(overlay) if template not in nodes]
    assert not any(is_selected(one["metadata"]["labels"], monitor["spec"]["selector"]) for one in others)


def secrets_of(template: Document) -> set[str]:
    pod = template["spec"]
    found = {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    for container in pod["containers"]:
        for variable in container["env"]:
            if "secretKeyRef" in variable.get("valueFrom", {}):
                found.add(variable["valueFrom"]["secretKeyRef"]["name"])
    return found


def test_agent_pods_have_no_secret_and_the_others_only_those_they_use(overlay: list[Document]) -> None:
    (service,) = the(overlay, "RayService")
    had = {
        template["metadata"]["labels"]["app.kubernetes.io/component"]: secrets_of(template)
        for template in templates([service])
    }
    database = {"seedcore-database", "seedcore-database-ca"}
    assert had == {"head": database, "discovery": database | {"seedcore-http-tokens"}, "agents": set()}


def test_serve_builds_the_application_on_a_discovery_pod() -> None:
    # otherwise Serve may call the builder on an agent pod, which has neither DSN nor tokens
    config = ServeDeploySchema.model_validate(serve_configs()["kubernetes"])
    # it calls the builder where all deployments that name a pool have to run, if they agree and allow no other
    options = [deployment.ray_actor_options for deployment in config.applications[0].deployments]
    (selector,) = (one.label_selector for one in options if one and one.label_selector)
    assert not any(one.fallback_strategy for one in options if one)
    (service,) = the(render(OVERLAYS[0]), "RayService")
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (group,) = [one for one in groups if selector.items() <= one.get("labels", {}).items()]
    assert group["groupName"] == "discovery"
    assert "label" not in str([one["rayStartParams"] for one in groups])


def serve_configs() -> dict[str, Document]:
    (service,) = the(render(OVERLAYS[0]), "RayService")
    return {
        "kubernetes": yaml.safe_load(service["spec"]["serveConfigV2"]),
        "compose": yaml.safe_load((DEPLOY / "compose" / "serve.yaml").read_text()),
    }


@pytest.mark.parametrize("where", ["kubernetes", "compose"])
def test_ray_and_discovery_accept_the_serve_configuration(where: str) -> None:
    config = ServeDeploySchema.model_validate(serve_configs()[where])
    (application,) = config.applications
    assert application.import_path == "seedcore.discovery:build"
    replicas = DiscoveryArgs.model_validate(application.args).num_replicas
    (deployment,) = application.deployments
    assert deployment.name == "Discovery"
    # the Service, or the published port, leads to nodes with this resource
    options = deployment.ray_actor_options
    assert options.num_cpus == 0
    assert set(options.resources) == {"discovery"}
    assert replicas == (2 if where == "kubernetes" else 1)


def test_the_discovery_resource_exists_on_as_many_pods_as_discovery_has_replicas() -> None:
    (service,) = the(render(OVERLAYS[0]), "RayService")
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    having = [group for group in groups if "discovery" in group["rayStartParams"].get("resources", "")]
    (group,) = having
    assert group["replicas"] == serve_configs()["kubernetes"]["applications"][0]["args"]["num_replicas"]
    assert group["template"]["metadata"]["labels"]["app.kubernetes.io/component"] == "discovery"
