"""What users import: `seedcore` and `seedcore.errors`. Importing it is cheap, and each name is loaded at first use."""

from __future__ import annotations

import ast
import inspect
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import seedcore
import seedcore.core.errors
import seedcore.core.events
import seedcore.core.not_ready
import seedcore.errors

HEAVY = ("fastapi", "httpx", "psycopg", "pydantic", "ray", "rich", "starlette", "typer")
STARTS = 7


def loaded_by(statement: str) -> list[str]:
    """The names of the modules that a new interpreter has loaded after a statement."""
    script = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return names


def start_s(statement: str) -> float:
    began_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - began_s


@pytest.mark.parametrize("module", ["seedcore", "seedcore.errors", "seedcore.store.embedded.guardian"])
def test_import_loads_no_heavy_dependency(module: str) -> None:
    loaded = loaded_by(f"import {module}; dir({module})")
    assert module in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_import_costs_little_more_than_the_start_of_an_interpreter() -> None:
    # in turn, so that load on the machine affects both alike
    pairs = [(start_s("pass"), start_s("import seedcore")) for _ in range(STARTS)]
    assert statistics.median(ours / bare for bare, ours in pairs) < 2.0


def test_every_public_name_is_imported_at_first_use_and_only_then() -> None:
    script = (
        "import seedcore\nassert not {*seedcore.__all__} - {*dir(seedcore)}\n"
        "for name in seedcore.__all__: getattr(seedcore, name)\n"
        "from seedcore import *\nassert RayAgent is seedcore.RayAgent and errors.RegistryError"
    )
    assert "ray" in loaded_by(script)


def test_names_that_editors_see_are_the_names_that_are_imported() -> None:
    tree = ast.parse(inspect.getsource(seedcore))
    [guarded] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {
        alias.name: str(node.module)
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {*seen} == {*seedcore.__all__} - {"__version__"}
    for name, module in seen.items():
        assert getattr(seedcore, name) is getattr(sys.modules[module], name)


def test_other_modules_import_for_type_checkers_alone_only_from_their_own_room() -> None:
    # lint-imports does not see such imports
    package = Path(seedcore.__file__).parent
    for path in package.rglob("*.py"):
        room = ".".join(path.relative_to(package.parent).parts[:-1])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if path.parent == package or not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
                continue
            imported = [inner for inner in ast.walk(node) if isinstance(inner, ast.Import | ast.ImportFrom)]
            others = [ast.unparse(inner) for inner in imported if f"from {room}." not in ast.unparse(inner)]
            assert others == [], path


def test_name_that_is_not_public_is_an_attribute_error() -> None:
    assert not hasattr(seedcore, "Registry")


def test_errors_are_all_of_the_tree() -> None:
    tree = {
        name
        for module in (seedcore.core.errors, seedcore.core.events, seedcore.core.not_ready)
        for name, thing in vars(module).items()
        if inspect.isclass(thing) and issubclass(thing, seedcore.core.errors.RegistryError)
    }
    assert {*seedcore.errors.__all__} == tree


def test_command_and_its_help_load_no_ray_serve() -> None:
    script = (
        "import sys; sys.argv = ['seedcore', '--help']\n"
        "from seedcore.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass"
    )
    assert "ray.serve" not in loaded_by(script)


def test_package_is_marked_as_typed() -> None:
    assert (Path(seedcore.__file__).parent / "py.typed").is_file()
