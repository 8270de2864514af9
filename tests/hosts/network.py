"""The network between the hosts: a bridge with one port for each, ports that are taken down, and bad lines."""

from __future__ import annotations

import subprocess

from tests.hosts.line import Line, Quality

NETWORK = "10.77.0.0/24"
_BRIDGE = "br0"
_SIDE_BRIDGE = "br1"


def address_of(number: int) -> str:
    """The address of the host with a number."""
    return f"10.77.0.{number}"


def ip(*arguments: str, check: bool = True) -> None:
    """Run `ip` in the run's own network namespace."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=20)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Network:
    """A bridge. The namespace of a host's first process gets the other end of its port, as `eth0`."""

    def __init__(self) -> None:
        ip("link", "set", "lo", "up")
        for bridge in (_BRIDGE, _SIDE_BRIDGE):
            ip("link", "add", bridge, "type", "bridge", "stp_state", "0", "forward_delay", "0", "mcast_snooping", "0")
            ip("link", "set", bridge, "up")
        self._lines: dict[str, Line] = {}

    def plug_in(self, name: str, number: int, pid: int) -> None:
        """Connect a host. A host that starts again has the same addresses as before."""
        ip("link", "add", _port(name), "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        ip("link", "set", _port(name), "master", _BRIDGE, "up")
        inside = ("nsenter", "--target", str(pid), "--net", "ip")
        for arguments in (
            ("link", "set", "lo", "up"),
            ("link", "set", "eth0", "address", f"02:00:00:00:00:{number:02x}"),
            ("addr", "add", f"{address_of(number)}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
        ):
            subprocess.run([*inside, *arguments], check=True, timeout=20)

    def forget(self, name: str) -> None:
        """Remove the port of a host that has ended, if the kernel has not yet."""
        ip("link", "del", _port(name), check=False)

    def cut(self, name: str) -> None:
        """Take the link of a host down."""
        ip("link", "set", _port(name), "down")

    def join(self, name: str) -> None:
        """Take the link of a host up again."""
        ip("link", "set", _port(name), "up")

    def degrade(self, name: str, quality: Quality) -> None:
        """Put a bad line between a host and the network."""
        near, far = f"{name}-near", f"{name}-far"
        self._lines[name] = Line(near, far, quality)
        ip("link", "set", far, "master", _BRIDGE, "up")
        ip("link", "set", near, "master", _SIDE_BRIDGE, "up")
        ip("link", "set", _port(name), "master", _SIDE_BRIDGE)

    def restore(self, name: str) -> None:
        """Take the bad line out."""
        ip("link", "set", _port(name), "master", _BRIDGE)
        self._lines.pop(name).close()

    def line_of(self, name: str) -> Line:
        """The bad line of a host."""
        return self._lines[name]

    def close(self) -> None:
        """Remove every link."""
        for name in list(self._lines):
            self._lines.pop(name).close()
        for bridge in (_BRIDGE, _SIDE_BRIDGE):
            ip("link", "del", bridge, check=False)


def _port(name: str) -> str:
    return f"{name}-port"
