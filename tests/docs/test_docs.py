"""Every code block of the documentation runs, as it stands, in an installation that `serve run` made."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
import pytest_asyncio

from seedcore.store.embedded.postgres import dsn_if_running
from tests.newcomer import ROOT, Newcomer, a_newcomer, errors_of
from tests.waiting import eventually

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE_NAME = re.compile(r"# ([\w./-]+\.(?:py|yaml))\n")
# what the installation under test has done already, and what has tests of its own and takes long
DONE = ("pip install -e .", "serve run serve_config.yaml", "pip install -e . && serve run serve_config.yaml")
LONG = ("python -m tests.", "pytest", "seedcore demo", "seedcore bench")

PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (ROOT / "docs").rglob("*.md")
    if any(kind != "text" for kind, _ in BLOCK.findall(page.read_text()))
)


# somebody's own agent, which the demo has no business with
_MINE = """
import asyncio, os, ray, sys
from seedcore.tier0 import get_tier0_manager
ray.init(address=os.environ["RAY_ADDRESS"], namespace="seedcore")
asyncio.run(get_tier0_manager().create_agent(sys.argv[1], labels={"app": "demo"}))
"""


_END_ALL = """
import asyncio, os, ray
from seedcore.tier0 import get_tier0_manager
ray.init(address=os.environ["RAY_ADDRESS"], namespace="seedcore")
async def end_all():
    manager = get_tier0_manager()
    await manager.discover_and_refresh_agents()
    await manager.shutdown_agents()
asyncio.run(end_all())
"""


class Block(NamedTuple):
    """A code block and its kind."""

    kind: str
    text: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def newcomer() -> AsyncIterator[Newcomer]:
    with a_newcomer() as newcomer:
        newcomer.serve()
        await newcomer.ready()
        newcomer.find_cluster()
        yield newcomer


def blocks_of(page: str) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall((ROOT / page).read_text())]


def commands_of(blocks: list[Block]) -> list[str]:
    """The commands of a page, in their order; a line that begins with a blank goes on."""
    commands: list[str] = []
    for block in blocks:
        if block.kind != "console":
            continue
        for line in block.text.splitlines():
            if line.startswith("$ "):
                commands.append(line[2:])
            else:
                assert line.startswith("  "), f"neither a command nor its continuation: {line!r}"
                commands[-1] += "\n" + line
    return commands


def script_of(commands: list[str], url: str) -> str:
    """One shell for the whole page, which stops at the first command that fails."""
    lines = ["set -eo pipefail"]
    for command in commands:
        if command in DONE:
            continue
        shown = command.replace("http://127.0.0.1:8000", url)
        if shown.startswith(LONG):
            shown = f"{shown.split(' #')[0]} --help"
        lines += [f"echo '$' {shlex.quote(shown)}", shown]
    return "\n".join(lines)


@pytest.mark.timeout(300)
async def test_the_readmes_agents_join_the_running_cluster_and_the_demo_leaves_others_alone(
    newcomer: Newcomer,
) -> None:
    readme = (ROOT / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(snippets) == 2
    # the variable that the newcomer's environment has
    assert "`export RAY_AUTH_MODE=token`" in readme
    for number, snippet in enumerate(snippets):
        # RAY_ADDRESS, which names our cluster here, hides that a newcomer's Ray would start one of its own
        assert 'ray.init(address="auto", namespace="seedcore")' in snippet
        script = newcomer.folder / f"snippet_{number}.py"
        script.write_text(snippet)
        # Ray may have something to say too
        said = newcomer.run(sys.executable, str(script)).stdout.splitlines()
        assert ("3" in said) == (number == 0), said
        assert any("counter-1" in line and "alive" in line for line in said) == (number == 1), said

    # the agent outlives the script that created it
    def listed() -> list[str]:
        return [item["logical_id"] for item in newcomer.get("/v1/instances")["items"]]

    await eventually(lambda: listed() == ["counter-1"])

    newcomer.run("seedcore", "demo", "--agents", "4")
    newcomer.run(sys.executable, "-c", _MINE, "demo-mine")
    assert "stopped 3 agents" in newcomer.run("seedcore", "demo", "--down").stdout
    assert listed() == ["counter-1", "demo-mine"]
    newcomer.run(sys.executable, "-c", _MINE, "demo-vision-2")
    refused = newcomer.run("seedcore", "demo", "--agents", "4", check=False)
    (error,) = errors_of(refused)
    assert refused.returncode == 1
    assert "'demo-vision-2': is not of the demo" in error
    assert listed() == ["counter-1", "demo-mine", "demo-vision-2"]
    newcomer.run("seedcore", "deregister", "--yes", "counter-1", "demo-mine", "demo-vision-2")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.timeout(300)
async def test_every_block_of_a_page_runs(newcomer: Newcomer, page: str) -> None:
    blocks = blocks_of(page)
    folder = newcomer.folder / page.replace("/", "-")
    folder.mkdir()
    commands = commands_of(blocks)
    for block in blocks:
        assert block.kind in {"console", "python", "yaml", "sql", "text"}, f"no test runs a {block.kind!r} block"
        if block.kind in {"python", "yaml"}:
            name = FILE_NAME.match(block.text)
            assert name is not None, "the block begins with no file name"
            (folder / name[1]).write_text(block.text)
            used = "\n".join(commands) + "".join(other.text for other in blocks if other is not block)
            assert Path(name[1]).stem in used, f"{name[1]} is used by no command"
        if block.kind == "sql":
            run_sql(newcomer, block.text)
    script = script_of(commands, newcomer.url)
    # a page sets the variables that its commands need
    answer = newcomer.run("bash", "-c", f"cd {shlex.quote(str(folder))}\n{script}", check=False, RAY_AUTH_MODE=None)
    # the next page begins without this one's agents
    newcomer.run(sys.executable, "-c", _END_ALL)
    assert answer.returncode == 0, f"{answer.stdout[-3000:]}\n{answer.stderr[-3000:]}"
    assert "Traceback" not in answer.stderr


def run_sql(newcomer: Newcomer, text: str) -> None:
    dsn = dsn_if_running(newcomer.data_dir)
    assert dsn is not None
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in filter(str.strip, text.split(";")):
            connection.execute(statement.encode())
