"""The image and the compose file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose
from packaging.requirements import Requirement

from seedcore.settings import Settings
from tests.deploy.conftest import DEPLOY

COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = DEPLOY / "Dockerfile"
# one version of an image, not a name that moves
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+(\.\d+)?(-[\w.-]+)?(@sha256:[0-9a-f]{64})?")


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("hadolint")
    return subprocess.run([program, file], capture_output=True, text=True, timeout=60, check=False)


def test_hadolint_has_nothing_to_say_of_the_image() -> None:
    checked = hadolint(DOCKERFILE)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_hadolint_notices_what_moves_and_what_runs_as_root(tmp_path: Path) -> None:
    worse = DOCKERFILE.read_text().replace("USER 10001:10001", "USER root").replace(":3.12.12-slim-bookworm", "")
    (tmp_path / "Dockerfile").write_text(worse)
    told = hadolint(tmp_path / "Dockerfile").stdout
    assert "DL3006" in told
    assert "DL3002" in told


def test_the_image_is_pinned_small_and_not_roots() -> None:
    text = DOCKERFILE.read_text()
    stages = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(stages) == 2
    assert all(PINNED.fullmatch(image) for image in stages)
    last = text.split("\nFROM ")[-1]
    assert re.search(r"^USER \d+:\d+$", last, re.MULTILINE)
    assert "HEALTHCHECK" in last
    assert "pip" not in last
    # older pips take the first for the build's own environment too, newer ones the second
    for variable in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):
        assert f" {variable}=/src/deploy/constraints.txt" in text
    assert "WORKDIR /src\n" in text


def test_what_the_image_copies_is_let_through_to_it() -> None:
    text = DOCKERFILE.read_text()
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]}
    lines = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((DEPLOY.parent / name).exists() for name in copied)


def test_every_dependency_of_the_package_and_of_its_build_has_one_version_in_the_image() -> None:
    lines = [line for line in (DEPLOY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    assert len(pinned) == len(lines)
    backend = re.search(r"^requires = \[(.*)\]$", (DEPLOY.parent / "pyproject.toml").read_text(), re.MULTILINE)
    assert backend is not None
    needed = [Requirement(one) for one in requires("seedcore") or [] if "extra ==" not in one]
    needed += [Requirement(one.strip(' "')) for one in backend[1].split(",")]
    for one in needed:
        name = one.name.lower().replace("_", "-")
        assert one.specifier.contains(pinned[name]), f"{one} and {pinned[name]}"


def test_compose_understands_the_file() -> None:
    # with its merge keys resolved, as Compose does first
    PyCompose.from_json(json.dumps(COMPOSE)).validate()
    with pytest.raises(ValueError, match="imagee"):
        PyCompose.from_json(json.dumps({"services": {"a": {"imagee": "b"}}}))


def test_all_that_is_promised_is_there() -> None:
    assert set(SERVICES) >= {"postgres", "ray-head", "registry", "prometheus", "grafana"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_waits_for_services_that_are_there_and_uses_files_that_are_there(name: str) -> None:
    service = SERVICES[name]
    assert PINNED.fullmatch(service["image"])
    waited_for = service.get("depends_on", {})
    for other in waited_for:
        condition = waited_for[other]["condition"] if isinstance(waited_for, dict) else "service_started"
        assert condition != "service_healthy" or "healthcheck" in SERVICES[other] or SERVICES[other].get("command")
        assert other in SERVICES
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
    # nobody but this machine
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", ["migrate", "ray-head", "registry"])
def test_our_containers_have_no_more_rights_than_they_use(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]


def test_every_variable_is_told_of_and_every_setting_is_read() -> None:
    asked = set(re.findall(r"\$\{(\w+):\?", (DEPLOY / "compose.yaml").read_text()))
    told = set(re.findall(r"^(\w+)=$", (DEPLOY / "compose" / "env.example").read_text(), re.MULTILINE))
    assert asked == told
    known = {
        str(name) for field in Settings.model_fields.values() for name in getattr(field.validation_alias, "choices", [])
    }
    used = {name for one in ("ray-head", "registry", "migrate") for name in SERVICES[one]["environment"]}
    assert {name for name in used if name.startswith("SEEDCORE_")} <= known


def test_every_password_is_asked_for_and_none_has_a_default() -> None:
    # Grafana's own default is admin, for whoever comes first
    assert "GF_SECURITY_ADMIN_PASSWORD" in SERVICES["grafana"]["environment"]
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if key.endswith(("PASSWORD", "TOKEN", "DSN")):
                assert re.search(r"\$\{\w+:\?", value), (name, key)


def test_prometheus_scrapes_every_node_of_ray_and_reads_the_rules() -> None:
    config = yaml.safe_load((DEPLOY / "compose" / "prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    targets = {target for group in job["static_configs"] for target in group["targets"]}
    nodes = {name for name, one in SERVICES.items() if "--metrics-export-port=8080" in str(one.get("command"))}
    assert targets == {f"{name}:8080" for name in nodes}
    mounted = {volume.split(":")[1] for volume in SERVICES["prometheus"]["volumes"]}
    assert set(config["rule_files"]) <= mounted


def test_promtool_understands_the_configuration(promtool: str, tmp_path: Path) -> None:
    text = (DEPLOY / "compose" / "prometheus.yaml").read_text()
    rules = DEPLOY / "prometheus" / "seedcore.rules.yaml"
    (tmp_path / "prometheus.yaml").write_text(text.replace("/etc/prometheus/seedcore.rules.yaml", str(rules)))
    checked = subprocess.run(
        [promtool, "check", "config", str(tmp_path / "prometheus.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_nothing_lets_a_caller_choose_its_own_address() -> None:
    # uvicorn would take the address from X-Forwarded-For, and proxies are trusted by their address
    assert "FORWARDED_ALLOW_IPS=none" in (DEPLOY / "Dockerfile").read_text()
    files = [file for file in DEPLOY.rglob("*") if file.is_file() and file.suffix != ".md"]
    assert {"Dockerfile", "compose.yaml", "settings.yaml", "rayservice.yaml"} <= {file.name for file in files}
    for file in files:
        told = re.findall(r"forwarded.allow.ips\W+(\w*)", file.read_text(), re.IGNORECASE)
        assert set(told) <= {"none"}, file
