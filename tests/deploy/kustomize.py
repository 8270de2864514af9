"""Renders overlays as kustomize does, with only the features that deploy/kubernetes uses; refuses every other one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

Document = dict[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Image(_Strict):
    """An image's name in the manifests, and its name and tag in the image registry."""

    name: str
    newName: str
    newTag: str


class Kustomization(_Strict):
    """A kustomization.yaml."""

    apiVersion: str
    kind: str
    resources: list[str]
    namespace: str | None = None
    images: list[Image] = []


def documents(file: Path) -> list[Document]:
    """The objects of a file."""
    return [document for document in yaml.safe_load_all(file.read_text()) if document is not None]


def render(folder: Path) -> list[Document]:
    """The objects that `kubectl apply --kustomize` would apply."""
    wanted = Kustomization.model_validate(yaml.safe_load((folder / "kustomization.yaml").read_text()))
    assert (wanted.apiVersion, wanted.kind) == ("kustomize.config.k8s.io/v1beta1", "Kustomization")
    found: list[Document] = []
    for resource in wanted.resources:
        path = (folder / resource).resolve()
        found += render(path) if path.is_dir() else documents(path)
    keys = [(one["kind"], one["metadata"]["name"]) for one in found]
    assert len(keys) == len(set(keys)), f"duplicate object: {keys}"
    for one in found:
        if wanted.namespace is not None:
            one["metadata"]["namespace"] = wanted.namespace
        for image in wanted.images:
            _set_image(one, image)
    return found


def _set_image(node: Any, image: Image) -> None:
    """Replace the image in every list of containers, also inside custom resources."""
    if isinstance(node, list):
        for item in node:
            _set_image(item, image)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in {"containers", "initContainers"} and isinstance(value, list):
                for container in value:
                    if container["image"].partition(":")[0] == image.name:
                        container["image"] = f"{image.newName}:{image.newTag}"
            else:
                _set_image(value, image)
