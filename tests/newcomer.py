"""A newcomer with a shell: a data folder, a port, the commands of the README."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.children import run, started
from tests.serving import free_port
from tests.traces import end, processes_of, short_folder
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = Path(sys.executable).parent


class Newcomer:
    """A shell of his own: a data folder, a port, commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        assert config["http_options"] == {"host": "127.0.0.1", "port": 8000}
        config["http_options"]["port"] = port
        self.config = folder / "serve_config.yaml"
        self.config.write_text(yaml.safe_dump(config))
        self.environment = {
            **os.environ,
            # as Ray does by itself for clusters that `serve run` starts: only who has the token made here gets in
            "RAY_AUTH_MODE": "token",
            "HOME": str(folder),
            "SEEDCORE_DATA_DIR": str(self.data_dir),
            "REGISTRY_BEAT_SEC": "1",
            "RAY_TMPDIR": str(folder / "ray"),
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        }
        self._serving = ExitStack()
        self._server: subprocess.Popen[bytes] | None = None

    def run(self, *command: str, check: bool = True, **environment: str | None) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. A variable that is None is not set."""
        given = {**self.environment, **environment}
        variables = {name: value for name, value in given.items() if value is not None}
        return run(*command, env=variables, cwd=self.folder, timeout_s=150, check=check)

    def serve(self) -> None:
        """`serve run`, as in a terminal of its own."""
        log = self._serving.enter_context((self.folder / "serve.log").open("ab"))
        command = ("serve", "run", self.config)
        server = started(*command, env=self.environment, cwd=self.folder, stdout=log, stderr=log)
        self._server = self._serving.enter_context(server)

    def find_cluster(self) -> None:
        """Name our cluster to the commands: beside another one on the machine, they would have to guess."""
        for process in self.processes():
            for word in process.cmdline():
                if word.startswith("--gcs-address="):
                    self.environment["RAY_ADDRESS"] = word.partition("=")[2]
                    return
        raise AssertionError("no raylet of ours")

    def get(self, path: str) -> dict[str, Any]:
        return dict(httpx.get(self.url + path, timeout=20).raise_for_status().json())

    async def ready(self) -> None:
        def is_ready() -> bool:
            sources = self.get("/readyz")["sources"]
            assert set(sources.values()) == {"ok"}, sources
            return True

        await eventually(is_ready, within_s=90, every_s=0.3)

    def interrupt(self) -> None:
        """Ctrl-C, and everything has ended."""
        assert self._server is not None
        self._server.send_signal(signal.SIGINT)
        self._server.wait(60)
        ended(lambda: not self.processes())

    def close(self) -> None:
        """End what runs, also what Ctrl-C has not ended, which is an error."""
        try:
            if self._server is not None and self._server.poll() is None:
                self.interrupt()
        finally:
            self._serving.close()
            left = end(self.processes())
        assert not left, left

    def processes(self) -> list[psutil.Process]:
        """Everything that still works in this newcomer's folder."""
        return processes_of(self.folder)


@contextmanager
def a_newcomer() -> Iterator[Newcomer]:
    """One who leaves nothing behind."""
    folder = short_folder("new-")
    folder.chmod(0o755)
    newcomer = Newcomer(folder)
    try:
        yield newcomer
    finally:
        newcomer.close()
        shutil.rmtree(folder)


def errors_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a command has said on stderr, without what Ray's C++ adds on a machine that has no network."""
    return [line for line in done.stderr.splitlines() if "network_util.cc" not in line]


def ended(question: Callable[[], bool], within_s: float = 60) -> None:
    deadline_s = time.monotonic() + within_s
    while not question():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
