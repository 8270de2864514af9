"""Namespaces of our own for a run: what it needs, and how the run enters them.

    python -m tests.hosts.space    # exits with 1, and prints why, where this machine does not permit it

Network, processes and mounts of the run end with it, whatever ends it: the kernel kills every process of a PID
namespace with its first one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests import traces
from tests.children import end_session

MARK = "SEEDCORE_TEST_HOSTS_FOLDER"
ROOT = Path(__file__).resolve().parents[2]
# the first program ends with the process that started it, and the others with the first one
_UNSHARE = (
    "setpriv",
    "--pdeathsig",
    "KILL",
    "--",
    "unshare",
    "--net",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)
# a shell is the first process: it also collects the processes whose parent has ended
_AS_FIRST = ("sh", "-c", '"$@"; exit $?', "sh")
_PROGRAMS = ("ip", "setpriv", "unshare", "nsenter")
_PROBE = "ip link add p0 type veth peer name p1 && ip link add b0 type bridge && test -c /dev/net/tun"


def missing() -> str | None:
    """Why hosts cannot be made here, in one line; None where they can."""
    for program in _PROGRAMS:
        if sys.platform.startswith("linux") and shutil.which(program) is None:
            return f"hosts need the program `{program}` (apt-get install iproute2 util-linux)"
    return not_permitted()


def not_permitted() -> str | None:
    """Why this machine does not permit hosts, whatever is installed; None where it does or it cannot be tried."""
    if not sys.platform.startswith("linux"):
        return "hosts are made of Linux namespaces"
    if os.geteuid() != 0:
        return "hosts need root: they are made of namespaces"
    if any(shutil.which(program) is None for program in _PROGRAMS):
        return None
    done = subprocess.run([*_UNSHARE, "sh", "-c", _PROBE], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        return f"this machine permits no namespaces, bridges or taps: {(done.stderr or 'no /dev/net/tun').strip()}"
    return None


def own_folder() -> Path | None:
    """The folder of this run; None outside of the run's namespaces."""
    folder = os.environ.get(MARK)
    return None if folder is None else Path(folder)


def run_in_own_space(module: str, arguments: Sequence[str]) -> int:
    """Run a module again in new namespaces; its exit code. Nothing of it is left, however it ends."""
    folder = traces.short_folder("h-")
    folder.chmod(0o755)
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SEEDCORE_"))}
    # temporary folders of servers are made in the run's, too
    ours |= {MARK: str(folder), traces.MARK: str(folder), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [*_UNSHARE, *_AS_FIRST, sys.executable, "-m", module, *arguments]
    # a session of its own: an interrupt reaches this process alone, which then ends all of it
    before = signal.signal(signal.SIGTERM, _interrupt)
    with subprocess.Popen(command, env=ours, start_new_session=True) as process:
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
            process.kill()
            end_session(process)
            shutil.rmtree(folder, ignore_errors=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(not_permitted())
