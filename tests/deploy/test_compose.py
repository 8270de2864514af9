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
from tests.deploy.haproxy import variables_of_serve

COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = DEPLOY / "Dockerfile"
# a fixed version of an image, not a moving tag
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+(\.\d+)?(-[\w.-]+)?(@sha256:[0-9a-f]{64})?")


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("hadolint")
    return subprocess.run([program, file], capture_output=True, text=True, timeout=60, check=False)


def test_hadolint_finds_no_fault_in_the_dockerfile() -> None:
    checked = hadolint(DOCKERFILE)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_hadolint_reports_an_unpinned_image_and_a_root_user(tmp_path: Path) -> None:
    worse = DOCKERFILE.read_text().replace("USER 10001:10001", "USER root").replace(":3.12.12-slim-bookworm", "")
    (tmp_path / "Dockerfile").write_text(worse)
    report = hadolint(tmp_path / "Dockerfile").stdout
    assert "DL3006" in report
    assert "DL3002" in report


def test_the_image_is_pinned_and_runs_without_root_and_without_pip() -> None:
    text = DOCKERFILE.read_text()
    stages = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(stages) == 2
    assert all(PINNED.fullmatch(image) for image in stages)
    last = text.split("\nFROM ")[-1]
    assert re.search(r"^USER \d+:\d+$", last, re.MULTILINE)
    assert "HEALTHCHECK" in last
    assert "pip" not in last
    # older versions of pip apply the first to the build environment too; newer versions need the second
    for variable in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):
        assert f" {variable}=/src/deploy/constraints.txt" in text
    assert "WORKDIR /src\n" in text


def test_the_dockerignore_admits_exactly_the_files_that_the_image_copies() -> None:
    text = DOCKERFILE.read_text()
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]}
    lines = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((DEPLOY.parent / name).exists() for name in copied)


def test_every_dependency_of_the_package_and_of_its_build_is_pinned_once() -> None:
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


def test_the_compose_file_follows_the_compose_schema() -> None:
    # Compose also resolves the merge keys first
    PyCompose.from_json(json.dumps(COMPOSE)).validate()
    with pytest.raises(ValueError, match="imagee"):
        PyCompose.from_json(json.dumps({"services": {"a": {"imagee": "b"}}}))


def test_the_compose_file_has_every_service_that_the_readme_names() -> None:
    assert set(SERVICES) >= {"postgres", "ray-head", "registry", "prometheus", "grafana"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_depends_only_on_services_and_files_that_exist(name: str) -> None:
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
    # published on loopback only
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", ["migrate", "ray-head", "registry"])
def test_our_containers_have_no_more_rights_than_they_use(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]


def test_env_example_lists_every_variable_and_every_setting_exists() -> None:
    required = set(re.findall(r"\$\{(\w+):\?", (DEPLOY / "compose.yaml").read_text()))
    listed = set(re.findall(r"^(\w+)=$", (DEPLOY / "compose" / "env.example").read_text(), re.MULTILINE))
    assert required == listed
    known = {
        str(name) for field in Settings.model_fields.values() for name in getattr(field.validation_alias, "choices", [])
    }
    used = {name for one in ("ray-head", "registry", "migrate") for name in SERVICES[one]["environment"]}
    assert {name for name in used if name.startswith("SEEDCORE_")} <= known
    assert {name for name in used if name.startswith("RAY_SERVE_")} <= variables_of_serve()


def test_every_password_is_required_and_none_has_a_default() -> None:
    # Grafana's own default password is "admin"
    assert "GF_SECURITY_ADMIN_PASSWORD" in SERVICES["grafana"]["environment"]
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if key.endswith(("PASSWORD", "TOKEN", "DSN")):
                assert re.search(r"\$\{\w+:\?", value), (name, key)


def test_prometheus_scrapes_every_ray_node_and_reads_the_rules() -> None:
    config = yaml.safe_load((DEPLOY / "compose" / "prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    targets = {target for group in job["static_configs"] for target in group["targets"]}
    nodes = {name for name, one in SERVICES.items() if "--metrics-export-port=8080" in str(one.get("command"))}
    assert targets == {f"{name}:8080" for name in nodes}
    mounted = {volume.split(":")[1] for volume in SERVICES["prometheus"]["volumes"]}
    assert set(config["rule_files"]) <= mounted


def test_promtool_accepts_the_configuration(promtool: str, tmp_path: Path) -> None:
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


def test_no_file_lets_a_caller_choose_its_own_address() -> None:
    # otherwise uvicorn takes the address from X-Forwarded-For, and a caller could pass as a trusted proxy
    assert "FORWARDED_ALLOW_IPS=none" in (DEPLOY / "Dockerfile").read_text()
    files = [file for file in DEPLOY.rglob("*") if file.is_file() and file.suffix != ".md"]
    assert {"Dockerfile", "compose.yaml", "settings.yaml", "rayservice.yaml"} <= {file.name for file in files}
    for file in files:
        values = re.findall(r"forwarded.allow.ips\W+(\w*)", file.read_text(), re.IGNORECASE)
        assert set(values) <= {"none"}, file
