"""Endpoints as targets of Prometheus (https://prometheus.io/docs/prometheus/latest/http_sd/)."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

from pydantic import BaseModel, Field

from seedcore.core.instances import Instance
from seedcore.discovery.stored_json import as_texts

_DEFAULT_PORTS = {"http": 80, "https": 443}
_UNFIT = re.compile(r"[^a-zA-Z0-9_]")
_META = "__meta_seedcore_"


class TargetGroup(BaseModel):
    """One agent. Its labels are for relabelling: `__meta_seedcore_logical_id`, `_instance_id`, `_url`, `_scheme`,
    `_organ_id`, `_node_id`, and `_label_NAME` for each label. Scheme, path and query of an http or https URL are where
    Prometheus reads them."""

    targets: list[str] = Field(description="host:port")
    labels: dict[str, str]


def target_json(instance: Instance, url: str) -> bytes | None:
    """An instance as a target group; None if another program has stored a URL that is none."""
    target = _target_of(url)
    if target is None:
        return None
    known = {"organ_id": instance.organ_id, "node_id": instance.node_id}
    labels = {
        **{f"{_META}label_{_fit(name)}": text for name, text in as_texts(instance.labels).items()},
        f"{_META}logical_id": instance.logical_id,
        f"{_META}instance_id": instance.instance_id,
        f"{_META}url": url,
        **{_META + name: text for name, text in known.items() if text is not None},
        **_scraped(url),
    }
    return TargetGroup(targets=[target], labels=labels).model_dump_json().encode()


def _target_of(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not host or not parts.scheme or "@" in parts.netloc:
        return None
    port = _DEFAULT_PORTS.get(parts.scheme) if port is None else port
    shown = f"[{host}]" if ":" in host else host
    return shown if port is None else f"{shown}:{port}"


def _scraped(url: str) -> dict[str, str]:
    """How Prometheus scrapes an http or https URL. A probe of another scheme gets the URL by relabelling."""
    parts = urlsplit(url)
    labels = {f"{_META}scheme": parts.scheme}
    if parts.scheme in _DEFAULT_PORTS:
        labels["__scheme__"] = parts.scheme
        if parts.path not in {"", "/"}:
            labels["__metrics_path__"] = parts.path
        for name, text in reversed(parse_qsl(parts.query, keep_blank_values=True)):
            # no label can name the others
            if name == _fit(name):
                labels[f"__param_{name}"] = text
    return labels


def _fit(name: str) -> str:
    """A label's name in characters that Prometheus takes in every version."""
    return _UNFIT.sub("_", name)
