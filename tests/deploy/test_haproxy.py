"""HTTP comes by Serve's HAProxy wherever this folder deploys it, and nothing there contradicts that."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from seedcore.core.errors import ConfigurationError
from seedcore.discovery.access import check_bind, check_proxies, is_behind_haproxy
from seedcore.settings import load_settings
from tests.deploy.conftest import DEPLOY
from tests.deploy.haproxy import ENABLED, MAX_SOCKET_CHARS, NODE_ID_CHARS, PORTS, PUBLIC, REPLICAS, SOCKET
from tests.deploy.kustomize import Document, render
from tests.deploy.test_compose import SERVICES
from tests.deploy.test_manifests import OVERLAYS, overlay, serve_configs, templates, the

__all__ = ["overlay"]

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
NODES = ("ray-head", "registry")


def image_environment() -> dict[str, str]:
    last = DOCKERFILE.split("\nFROM ")[-1]
    block = re.search(r"^ENV ((?:.*\\\n)*.*)$", last, re.MULTILINE)
    assert block is not None
    return dict(word.split("=", 1) for word in block[1].replace("\\\n", " ").split())


def environments() -> dict[str, Mapping[str, str]]:
    """Of every container that is a node of Ray, by the name of the deployment and of the container."""
    found: dict[str, Mapping[str, str]] = {"image": image_environment()}
    for name in NODES:
        found[f"compose {name}"] = {**image_environment(), **SERVICES[name]["environment"]}
    for folder in OVERLAYS:
        objects = render(folder)
        maps = {one["metadata"]["name"]: one["data"] for one in the(objects, "ConfigMap")}
        for template in templates(the(objects, "RayService")):
            [container] = template["spec"]["containers"]
            of_maps = {
                name: value for one in container["envFrom"] for name, value in maps[one["configMapRef"]["name"]].items()
            }
            component = template["metadata"]["labels"]["app.kubernetes.io/component"]
            found[f"{folder.name} {component}"] = {**image_environment(), **of_maps}
    return found


ENVIRONMENTS = environments()


@pytest.fixture(params=ENVIRONMENTS)
def environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """The environment of one node, which is this process' own."""
    found = ENVIRONMENTS[request.param]
    for name, value in found.items():
        if name.startswith(("SEEDCORE_HTTP_", "RAY_SERVE_", "FORWARDED_")):
            monkeypatch.setenv(name, value)
    return found


def test_every_node_of_ray_has_the_variable_or_its_replicas_would_not_listen() -> None:
    assert {name: found[ENABLED] for name, found in ENVIRONMENTS.items()} == dict.fromkeys(ENVIRONMENTS, "1")
    assert len(ENVIRONMENTS) == 1 + len(NODES) + 3 * len(OVERLAYS)


def test_what_is_deployed_trusts_no_proxy_and_would_not_start_if_it_did(
    environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_behind_haproxy()
    settings = load_settings()
    assert not settings.proxy_networks
    check_proxies(settings)
    if environment is not ENVIRONMENTS["image"]:
        check_bind(settings, "0.0.0.0")
    monkeypatch.setenv("SEEDCORE_HTTP_TRUSTED_PROXIES", "10.0.3.0/24")
    with pytest.raises(ConfigurationError, match="must be empty where Serve runs HAProxy"):
        check_proxies(load_settings())


def test_the_patch_for_a_trusted_gateway_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = [
        yaml.safe_load(patch["patch"])["data"]
        for block in re.findall(r"```yaml\n(.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
        if block.lstrip().startswith("# kustomization.yaml")
        for patch in yaml.safe_load(block)["patches"]
    ]
    [trusted] = [data for data in patches if "SEEDCORE_HTTP_TRUSTED_PROXIES" in data]
    for name, value in {**image_environment(), **trusted}.items():
        if name.startswith(("SEEDCORE_HTTP_", "RAY_SERVE_", "FORWARDED_")):
            monkeypatch.setenv(name, value)
    assert not is_behind_haproxy()
    settings = load_settings()
    assert settings.proxy_networks
    check_proxies(settings)


@pytest.mark.parametrize("where", ["kubernetes", "compose"])
def test_the_replicas_of_discovery_alone_share_their_event_loop_with_serve(where: str) -> None:
    [application] = ServeDeploySchema.model_validate(serve_configs()[where]).applications
    [deployment] = application.deployments
    # Serve's handles in other processes would work in event loops only
    assert deployment.ray_actor_options.runtime_env == {
        "env_vars": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
    }
    assert not any("RAY_SERVE_THROUGHPUT_OPTIMIZED" in found for found in ENVIRONMENTS.values())


def test_clients_reach_no_other_port_of_haproxy_or_of_a_replica(overlay: list[Document]) -> None:
    rules = [rule for policy in the(overlay, "NetworkPolicy") for rule in policy["spec"].get("ingress", [])]
    closed = PORTS | set(REPLICAS)
    assert PUBLIC not in closed
    for rule in rules:
        ports = rule.get("ports")
        if ports is None:
            # every port: among Ray's nodes, and HAProxy on one of them sends requests to a replica on another
            [peer] = rule["from"]
            assert "app.kubernetes.io/component" in str(peer)
            assert "namespaceSelector" not in peer
            continue
        for port in ports:
            assert closed.isdisjoint(range(port["port"], port.get("endPort", port["port"]) + 1))
    [service] = [one for one in the(overlay, "Service") if one["metadata"]["name"] == "seedcore"]
    named = {
        port["name"]: port["containerPort"]
        for template in templates(the(overlay, "RayService"))
        for port in template["spec"]["containers"][0]["ports"]
    }
    assert [named[port["targetPort"]] for port in service["spec"]["ports"]] == [PUBLIC]
    assert closed.isdisjoint(named.values())


def test_compose_publishes_no_other_port_of_haproxy() -> None:
    published = {int(str(port).split(":")[1]) for service in SERVICES.values() for port in service.get("ports", [])}
    assert PUBLIC in published
    assert published.isdisjoint(PORTS | set(REPLICAS))


def test_the_ports_are_named_in_the_documentation() -> None:
    page = (DEPLOY.parent / "docs" / "security.md").read_text()
    rows = set(re.findall(r"^\| (\d+(?: to \d+)?) \| ", page, re.MULTILINE))
    assert rows == {str(port) for port in (PUBLIC, *PORTS)} | {f"{REPLICAS[0]} to {REPLICAS[-1]}"}


def test_the_admin_socket_is_in_a_folder_of_one_user_and_its_path_is_short_enough() -> None:
    # the path with the node's id; HAProxy opens it by a name that is ten characters longer
    path = SOCKET.parent / ("n" * NODE_ID_CHARS) / SOCKET.name
    assert len(str(path)) == 86 <= MAX_SOCKET_CHARS
    assert not any("HAPROXY_SOCKET_PATH" in str(found) for found in ENVIRONMENTS.values())
    assert SOCKET.is_relative_to("/tmp")
    for name in NODES:
        assert any(one.startswith("/tmp:mode=0700,uid=10001") for one in SERVICES[name]["tmpfs"])
    for folder in OVERLAYS:
        for template in templates(the(render(folder), "RayService")):
            [container] = template["spec"]["containers"]
            [mount] = [one for one in container["volumeMounts"] if one["mountPath"] == "/tmp"]
            [volume] = [one for one in template["spec"]["volumes"] if one["name"] == mount["name"]]
            # a folder of this pod, which has one user
            assert "emptyDir" in volume


def test_no_probe_depends_on_a_limit_that_callers_share() -> None:
    check = " ".join(SERVICES["registry"]["healthcheck"]["test"])
    assert "/readyz" in check
    assert "(200, 429)" in check
    for folder in OVERLAYS:
        for template in templates(the(render(folder), "RayService")):
            [container] = template["spec"]["containers"]
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                assert container[probe]["httpGet"]["path"] in {"/api/healthz", "/-/healthz"}


def test_compose_waits_as_long_as_serve_takes_to_end() -> None:
    registry = SERVICES["registry"]
    draining_s = float(registry["environment"]["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"])
    assert float(registry["stop_grace_period"].removesuffix("s")) > draining_s + 10
