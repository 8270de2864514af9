"""A newcomer with a shell: a data folder, a port, the commands of the README."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.serving import free_port
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
            "SEEDCORE_LEASE_SEC": "3",
            "RAY_TMPDIR": str(folder / "ray"),
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        }
        self.serving: subprocess.Popen[bytes] | None = None

    def run(self, *command: str, check: bool = True, **environment: str | None) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. A variable that is None is not set."""
        told = {**self.environment, **environment}
        return subprocess.run(
            command,
            env={name: value for name, value in told.items() if value is not None},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=150,
            check=check,
        )

    def serve(self) -> None:
        with (self.folder / "serve.log").open("ab") as log:
            self.serving = subprocess.Popen(
                ["serve", "run", str(self.config)], env=self.environment, cwd=self.folder, stdout=log, stderr=log
            )

    def find_cluster(self) -> None:
        """Name our cluster to the commands: beside another one on the machine, they would have to guess."""
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if any(str(self.folder) in word for word in line):
                for word in line:
                    if word.startswith("--gcs-address="):
                        self.environment["RAY_ADDRESS"] = word.partition("=")[2]
                        return
        raise AssertionError("no raylet of ours")

    def get(self, path: str) -> dict[str, Any]:
        return dict(httpx.get(self.url + path, timeout=20).raise_for_status().json())

    async def ready(self) -> None:
        def is_ready() -> bool:
            rungs = self.get("/readyz")["rungs"]
            assert set(rungs.values()) == {"ok"}, rungs
            return True

        await eventually(is_ready, within_s=90, every_s=0.3)

    def interrupt(self) -> None:
        assert self.serving is not None
        self.serving.send_signal(signal.SIGINT)
        self.serving.wait(60)

    def processes(self) -> list[str]:
        """Everything that still works in this newcomer's folder."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if str(self.folder) in line:
                found.append(line[:120])
        return found


@contextmanager
def a_newcomer() -> Iterator[Newcomer]:
    """One who leaves nothing behind."""
    folder = Path(tempfile.mkdtemp(prefix="new-", dir="/tmp"))
    folder.chmod(0o755)
    newcomer = Newcomer(folder)
    yield newcomer
    if newcomer.serving is not None and newcomer.serving.poll() is None:
        newcomer.interrupt()
    ended(lambda: not newcomer.processes())
    shutil.rmtree(folder)


def ended(question: Callable[[], bool], within_s: float = 60) -> None:
    deadline_s = time.monotonic() + within_s
    while not question():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
