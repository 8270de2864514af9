"""Every example runs, as it stands, ends what it has created, and says what it replaces."""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path

import pytest
import ray

from seedcore.registry import RegistryConnection
from seedcore.settings import Settings
from tests.children import run
from tests.newcomer import errors_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SAYS = {
    "plain_script.py": [
        "2 agents are ready",
        "3 words",
        "2 words",
        "script-1 alive",
        "script-2 alive",
        "script-1: died",
    ],
    "agent_team.py": [
        "writer(researcher(Ray), researcher(actors))",
        "the researcher died: .*",
        "writer(researcher(leases), researcher(feeds))",
    ],
    "health_monitor.py": [
        "engine-1 died: .*SIGKILL.*",
        "engine-1 is replaced",
        "engine-2 died: lease expired.*",
        "engine-2 is replaced",
        "2 engines are ready",
    ],
    "name_service.py": [
        "http://10.0.0.3:8000",
        r"\['trial/server/1', 'trial/server/2'\] \['http://10.0.0.3:8000', 'http://10.0.0.4:8000'\]",
        "http://10.0.0.3:9000",
        r"gone: True \['trial/server/2'\] http://10.0.0.4:8000",
    ],
    "rollout_pool.py": [
        "8 engines are ready",
        r"\[200, 200, 200, 200, 200, 200, 200, 200\]",
        "False 7",
        ".*rollout-3.*server.*SIGKILL.*",
    ],
    "notebook.ipynb": ["3 words", "this call would block .*", "2 words", "notebook-1 alive"],
}


def test_every_example_is_listed_and_says_how_many_lines_it_replaces() -> None:
    files = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".ipynb"})
    assert files == sorted(SAYS)
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in files:
        text = (EXAMPLES / name).read_text(encoding="utf-8")
        assert f"]({name})" in readme
        assert re.search(r"eplaces .*about [\d,]+ lines", " ".join(text.split())), name
        if name.endswith(".py"):
            assert ast.get_docstring(ast.parse(text)), name


@pytest.mark.parametrize("name", SAYS)
def test_example_runs_and_ends_its_agents(registry: RegistryConnection, settings: Settings, name: str) -> None:
    environment = {
        **os.environ,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "SEEDCORE_NS": settings.namespace,
        "REGISTRY_BEAT_SEC": "1",
    }
    program = [EXAMPLES / name] if name.endswith(".py") else ["-m", "tests.cluster.notebook", EXAMPLES / name]
    done = run(sys.executable, *program, timeout_s=150, env=environment)
    # Ray reports a process that was killed, whatever it is asked not to log
    said = [line for line in done.stdout.splitlines() if "(raylet)" not in line]
    assert (done.returncode, errors_of(done)) == (0, []), done.stdout + done.stderr
    assert len(said) == len(SAYS[name]), said
    for line, expected in zip(said, SAYS[name], strict=True):
        assert line == expected or re.fullmatch(expected, line), (line, expected)


async def test_no_example_leaves_an_agent(registry: RegistryConnection) -> None:
    assert (await registry.list_active(None)).items == ()
