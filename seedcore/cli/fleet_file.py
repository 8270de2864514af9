"""Fleet files: the agents that a YAML file lists, checked before any of them is created."""

from __future__ import annotations

import importlib
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seedcore.agents import RayAgent
from seedcore.core.errors import InvalidInputError, first_line
from seedcore.core.limits import check_epoch
from seedcore.tier0.answers import AgentSpec

MAX_FILE_BYTES = 10 * 1024 * 1024
MAX_AGENTS = 10_000

_Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class AgentGroup(BaseModel):
    """Agents with the same properties. Their logical ids are `ids`, or the one `id`; with `count`, `{n}` in `id` counts
    from 1."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    agent_class: str = Field("seedcore.agents:RayAgent", alias="class")
    id: str | None = None
    ids: list[str] = []
    count: Annotated[int, Field(ge=1, le=MAX_AGENTS)] | None = None
    organ: str | None = None
    labels: dict[str, str] = {}
    metadata: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    num_cpus: _Share = 0
    resources: dict[str, _Share] = {}
    max_restarts: Annotated[int, Field(ge=-1)] = -1

    def names(self) -> list[str]:
        """Return the logical ids. Raises InvalidInputError."""
        if (self.id is None) is not bool(self.ids):
            raise InvalidInputError("agents", "each entry needs either id or ids")
        if self.id is None:
            if self.count is not None:
                raise InvalidInputError("count", "needs id, not ids")
            return self.ids
        if self.count is None:
            return [self.id]
        if "{n}" not in self.id:
            raise InvalidInputError("id", f"must contain {{n}} if there is a count, not {self.id!r}")
        return [self.id.replace("{n}", str(number)) for number in range(1, self.count + 1)]


class FleetFile(BaseModel):
    """The content of a fleet file."""

    model_config = ConfigDict(extra="forbid")

    epoch: str | None = None
    agents: list[AgentGroup]

    def names(self) -> list[str]:
        """Return every logical id. Raises InvalidInputError."""
        names = [name for group in self.agents for name in group.names()]
        if len(names) > MAX_AGENTS:
            raise InvalidInputError("agents", f"must be at most {MAX_AGENTS}, not {len(names)}")
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise InvalidInputError("agents", f"name each agent once; repeated: {repeated[:5]}")
        return names

    def epoch_or(self, option: str | None) -> str | None:
        """Return the epoch of the option, or else that of the file. Raises InvalidInputError."""
        named = option if option is not None else self.epoch
        return None if named is None else check_epoch(named)

    def specs(self, epoch: str | None = None) -> list[AgentSpec]:
        """Return the agents to create. Raises InvalidInputError."""
        self.names()
        named = self.epoch_or(epoch)
        return [
            AgentSpec(
                name,
                group.organ,
                agent_class,
                group.labels,
                group.metadata,
                group.arguments,
                group.num_cpus,
                group.resources,
                group.max_restarts,
                is_detached=True,
                epoch=named,
            )
            for group in self.agents
            for agent_class in [_class_of(group.agent_class)]
            for name in group.names()
        ]


def read_fleet(file: Path) -> FleetFile:
    """Parse a fleet file. Raises InvalidInputError that names the wrong place."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInputError("FILE", f"{file} is larger than {MAX_FILE_BYTES} bytes")
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError("FILE", f"{file} cannot be read: {first_line(error)}") from None
    except yaml.YAMLError as error:
        raise InvalidInputError("FILE", f"{file} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return FleetFile.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InvalidInputError("FILE", f"{file}: {where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


def _class_of(path: str) -> type[Any]:
    """Return the class `module:Class`. The module may be in the working folder."""
    module_name, colon, class_name = path.partition(":")
    if not colon or not module_name or not class_name:
        raise InvalidInputError("class", f"must be written module:Class, not {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # noqa: BLE001 - the import runs the module's own code
        raise InvalidInputError("class", f"{path} cannot be imported: {first_line(error)}") from None
    if not (isinstance(found, type) and issubclass(found, RayAgent)):
        raise InvalidInputError("class", f"{path} is not a subclass of RayAgent")
    return found
