"""Writes the reference pages from the code: `python docs/reference/generate.py`. A test compares them with it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer.main

import seedcore
import seedcore.agents
import seedcore.errors
import seedcore.registry
import seedcore.tier0
from seedcore.cli.app import app
from seedcore.core.answers import NotResolved
from seedcore.core.causes import CauseKind
from seedcore.core.holds import HoldKind
from seedcore.discovery.problems import codes_by_status
from seedcore.discovery.routes import api
from seedcore.settings import Settings

FOLDER = Path(__file__).parent
NOTE = "<!-- written by docs/reference/generate.py: change the code, then run it -->\n\n"


def settings_page() -> str:
    """Every setting."""
    lines = ["# Settings\n", "From the environment, checked together at the start. Times in seconds.\n"]
    lines += ["| variable | type | default | meaning |", "|---|---|---|---|"]
    for field in Settings.model_fields.values():
        names = [str(name) for name in getattr(field.validation_alias, "choices", [])]
        default = "computed" if field.default_factory is not None else _shown(field.default)
        variable = " or ".join(f"`{name}`" for name in names)
        lines.append(f"| {variable} | {_kind(field.annotation)} | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """Every command, with the text of its --help."""
    root = typer.main.get_command(app)
    lines = ["# The command\n", f"{root.help}\n", f"{' '.join((root.epilog or '').split())}\n"]
    for path, command in _commands(root, ["seedcore"]):
        context = typer.Context(command, info_name=path)
        usage = " ".join(command.collect_usage_pieces(context))
        lines += [f"## {path}\n", f"```text\n{path} {usage}\n```\n", f"{inspect.cleandoc(command.help or '')}\n"]
        options = [one.get_help_record(context) for one in command.params]
        shown = [record for record in options if record is not None and record[0] != "--help, -h"]
        if shown:
            lines += ["| option | meaning |", "|---|---|"]
            lines += [f"| `{_cell(name)}` | {_cell(meaning)} |" for name, meaning in shown]
            lines.append("")
    return "\n".join(lines)


def http_page() -> str:
    """Every route of the HTTP API."""
    document = api.openapi()
    lines = ["# HTTP API\n", "`/openapi.json` has the shapes of every answer, `/docs` shows them.\n"]
    lines.append(
        "Errors are problem details (RFC 9457). A client reads `status`, `code` and, of `not_resolvable`, `reason`. "
        "`title` and `detail` are for people and may change.\n"
    )
    lines += ["| status | `code` |", "|---|---|"]
    for status, codes in codes_by_status().items():
        lines.append(f"| {status} | {', '.join(f'`{code}`' for code in codes)} |")
    reasons = ", ".join(f"`{reason}`" for reason in NotResolved)
    lines.append(f"\n`reason`, also of a resolution without an instance: {reasons}.\n")
    lines.append(
        'A cause is `{"kind": ..., "detail": ..., "by": ...}`, or null where none was given. A client '
        "reads `kind`; `detail` is for people and may change; `by` is the operator.\n"
    )
    lines.append(f"`kind` of a cause: {', '.join(f'`{kind}`' for kind in CauseKind)}.\n")
    lines.append(
        "An instance has `status`, the effective one, which follows from `reported_status` and `holds`: a list of "
        '`{"kind", "reason", "by", "since", "expires_at"}` ([holds](../concepts.md#holds)).\n'
    )
    lines.append(f"`kind` of a hold: {', '.join(f'`{kind}`' for kind in HoldKind)}.\n")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            lines += [f"## {method.upper()} {path}\n", f"{_paragraphs(operation['description'])}\n"]
            parameters = operation.get("parameters", [])
            if parameters:
                lines += ["| parameter | in | meaning |", "|---|---|---|"]
                lines += [
                    f"| `{one['name']}` | {one['in']} | {_cell(one.get('description', ''))} |" for one in parameters
                ]
                lines.append("")
            answers = {code: answer["description"] for code, answer in operation["responses"].items()}
            listed = "; ".join(f"{code} {' '.join(text.split())}" for code, text in sorted(answers.items()))
            lines.append(f"Answers: {listed}.\n")
    return "\n".join(lines)


def python_page() -> str:
    """Every public name."""
    lines = ["# Python\n", "The names of `seedcore` are the public interface; it imports each at its first use.\n"]
    lines += ["| `from seedcore import` | kind |", "|---|---|"]
    lines += [f"| `{name}` | {_kind_of(getattr(seedcore, name))} |" for name in seedcore.__all__]
    lines.append("")
    for module in (seedcore.agents, seedcore.registry, seedcore.tier0):
        lines.append(f"## {module.__name__}\n")
        for name in module.__all__:
            thing = getattr(module, name)
            lines += [f"### {name}\n", f"```text\n{_signature(name, thing)}\n```\n", f"{_doc(thing)}\n"]
            if inspect.isclass(thing):
                lines += _methods(thing)
    lines += ["## seedcore.errors\n", "| error | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(_doc(getattr(seedcore.errors, name)))} |" for name in seedcore.errors.__all__]
    return "\n".join(lines) + "\n"


PAGES = {"settings.md": settings_page, "cli.md": cli_page, "http.md": http_page, "python.md": python_page}


def _commands(command: Any, path: list[str]) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is not None:
        for name, child in children.items():
            yield from _commands(child, [*path, name])
    else:
        yield " ".join(path), command


def _kind_of(thing: Any) -> str:
    """What a public name is, and the first sentence of its documentation."""
    if inspect.ismodule(thing):
        return "module"
    if isinstance(thing, str):
        return "the version of this package"
    kind = (
        "enumeration"
        if inspect.isclass(thing) and issubclass(thing, Enum)
        else "class"
        if inspect.isclass(thing)
        else "function"
    )
    sentence = re.split(r"[.:](?:\s|$)|\n\n", _doc(thing), maxsplit=1)[0]
    return f"{kind}: {_cell(sentence)}"


def _methods(thing: type[Any]) -> list[str]:
    lines = []
    for name, member in vars(thing).items():
        is_shown = inspect.isfunction(member) or isinstance(member, property)
        if name.startswith("_") or not is_shown or not inspect.getdoc(member):
            continue
        shown = name if isinstance(member, property) else _signature(name, member)
        lines.append(f"- `{shown}`: {_cell(_doc(member))}")
    return [*lines, ""] if lines else []


def _signature(name: str, thing: Any) -> str:
    try:
        found = inspect.signature(thing)
        # Ray adds a parameter to classes that became actors in this process
        own = [parameter for parameter in found.parameters.values() if not parameter.name.startswith("_ray_")]
        signature = str(found.replace(parameters=own))
    except (TypeError, ValueError):
        return name
    # annotations are text; the address of an object has no meaning
    signature = re.sub(r"'([^']*)'", r"\1", signature)
    signature = re.sub(r"<([^<> ]*)[^<>]*>", r"<\1>", signature)
    return f"{name}{signature}".replace("self, ", "").replace("(self)", "()")


def _doc(thing: Any) -> str:
    return inspect.getdoc(thing) or ""


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _kind(annotation: Any) -> str:
    """The name of a type, without its checks; an enumeration by its values."""
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _kind(parts[0])
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, parts))
    if parts:
        return " or ".join(_kind(part) for part in parts if part is not type(None))
    if issubclass(annotation, Enum):
        return ", ".join(member.value for member in annotation)
    return str(annotation.__name__)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(NOTE + page(), encoding="utf-8")
