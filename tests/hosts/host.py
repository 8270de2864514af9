"""One host: namespaces of its own for network, processes, mounts and name, and the Ray node in it.

Every process of a host ends with its first one, as with a power cut. All hosts use the same path for Ray's files, and
each has files of its own there.
"""

from __future__ import annotations

import http.client
import os
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ctypes import CDLL, get_errno
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import psutil

from tests.hosts.network import Network, address_of
from tests.hosts.space import ROOT
from tests.traces import lives

T = TypeVar("T")

RAY_PORT = 6379
_NEWNET = 0x40000000
# ignoring the signal lets the kernel collect the processes whose parent has ended
_FIRST = (
    'trap "" CHLD; hostname "$1" && mount -t tmpfs shm /dev/shm && mount --bind "$2" "$3" && echo ready'
    " && exec sleep infinity"
)
_SPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
_OBJECT_STORE_BYTES = 80_000_000
_RAY_START_S = 90
# the liveness probe of KubeRay
_HEALTH_PORT, _HEALTH_PATH, _HEALTH_S = 52365, "/api/local_raylet_healthz", 2.0


class RayState(StrEnum):
    """The Ray node of a host. `DEAD_IN_TABLE`: it runs, but Ray's tables do not have it as alive."""

    RUNS = "runs"
    ENDED = "ended"
    DEAD_IN_TABLE = "dead in the table"


class Host:
    """Started and killed as often as wanted; its files stay."""

    def __init__(self, name: str, number: int, folder: Path, network: Network, env: Mapping[str, str]) -> None:
        self.name = name
        self.address = address_of(number)
        self._number = number
        self._network = network
        self._own = folder / name
        # short: the path of a socket has about 100 characters at most
        self._shared = folder.parent / "r"
        self._own.mkdir()
        self._shared.mkdir(exist_ok=True)
        self._env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(self._shared), **env}
        self._log = folder / f"{name}.log"
        self._holder: subprocess.Popen[str] | None = None
        self._first: psutil.Process | None = None

    def start(self) -> None:
        """Make the namespaces and connect them. Starts no Ray."""
        names = (self.name, str(self._own), str(self._shared))
        command = ["unshare", *_SPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", _FIRST, "sh", *names]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            raise RuntimeError(f"the namespaces of {self.name} were not made")
        (self._first,) = psutil.Process(self._holder.pid).children()
        self._network.plug_in(self.name, self._number, self._first.pid)

    def kill(self) -> None:
        """End every process of the host at once, and its network."""
        if self._holder is None or self._first is None:
            return
        with suppress(psutil.NoSuchProcess):
            self._first.kill()
        self._holder.wait()
        assert self._holder.stdout is not None
        self._holder.stdout.close()
        self._holder = self._first = None
        self._network.forget(self.name)

    @property
    def is_running(self) -> bool:
        """Whether it has been started."""
        return self._first is not None

    def inside(self, *command: str | Path) -> list[str]:
        """The command that runs a command on this host."""
        assert self._first is not None
        return ["nsenter", "--target", str(self._first.pid), *_SPACES, "--", *map(str, command)]

    @property
    def env(self) -> dict[str, str]:
        """The environment of programs on this host."""
        return dict(self._env)

    # Ray

    def start_head(self) -> None:
        """Start Ray's head here."""
        self._start_ray("--head", f"--port={RAY_PORT}", "--include-dashboard=false", "--num-cpus=0")

    def start_worker(self, head: str) -> None:
        """Start a Ray node here that joins the head at an address."""
        self._start_ray(f"--address={head}:{RAY_PORT}", "--num-cpus=0", '--resources={"worker": 1000}')

    def _start_ray(self, *options: str) -> None:
        store = f"--object-store-memory={_OBJECT_STORE_BYTES}"
        command = self.inside(
            "ray", "start", f"--node-ip-address={self.address}", store, "--disable-usage-stats", *options
        )
        with self._log.open("ab") as log:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                timeout=_RAY_START_S,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"ray start on {self.name} failed:\n{self._log.read_text()[-3000:]}")

    def ray_state(self) -> RayState:
        """Look at its Ray node. The node's agent reports what Ray's tables have; a node that cannot reach them runs."""
        if not self._has_raylet():
            return RayState.ENDED
        is_dead = self.in_network(_status_of_node) == http.HTTPStatus.SERVICE_UNAVAILABLE
        return RayState.DEAD_IN_TABLE if is_dead else RayState.RUNS

    def _has_raylet(self) -> bool:
        return any(process.info["name"] == "raylet" and lives(process) for process in self.processes())

    def processes(self) -> list[psutil.Process]:
        """All processes of the host."""
        # another thread may end the host meanwhile
        first = self._first
        if first is None:
            return []
        space = _space_of(first.pid)
        return [process for process in psutil.process_iter(["name"]) if _space_of(process.pid) == space]

    def keys(self) -> set[str]:
        """The part of a process key that names each living process: PID namespace, id in it, start time."""
        found = set()
        for process in self.processes():
            with suppress(OSError, LookupError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                inner = status.partition("NSpid:")[2].split("\n")[0].split()[-1]
                fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    found.add(f"{_space_of(process.pid)}-{inner}-{fields[19]}")
        return found

    # The network of the host, for a program that stays in the other namespaces of the run

    def in_network(self, call: Callable[[], T]) -> T:
        """Call a function, and start its processes, in the network of this host."""
        assert self._first is not None
        path = f"/proc/{self._first.pid}/ns/net"

        def enter() -> T:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if CDLL(None, use_errno=True).setns(descriptor, _NEWNET):
                    raise OSError(get_errno(), f"setns of {path}")
            finally:
                os.close(descriptor)
            return call()

        # the namespace belongs to the thread, which ends with this call
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(enter).result()


def _status_of_node() -> int | None:
    connection = http.client.HTTPConnection("127.0.0.1", _HEALTH_PORT, timeout=_HEALTH_S)
    try:
        connection.request("GET", _HEALTH_PATH)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        # the agent starts after its node
        return None
    finally:
        connection.close()


def _space_of(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        return None
