"""A caller of HTTP that needs little CPU time, because it shares the machine with the server that it measures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Server:
    """Where it listens."""

    host: str
    port: int


async def rate(server: Server, target: Callable[[], str], callers: int, seconds: float) -> tuple[int, float]:
    """Send GET requests for so long, one after the other from each of the callers, each with its own connection.

    Returns the number of answers and the seconds that they took. Raises RuntimeError if one is not 200.
    """
    connections = await asyncio.gather(*(asyncio.open_connection(server.host, server.port) for _ in range(callers)))
    began_s = time.monotonic()
    done = 0

    async def call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal done
        while time.monotonic() < began_s + seconds:
            writer.write(f"GET {target()} HTTP/1.1\r\nHost: {server.host}\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(_length_of(head))
            done += 1

    try:
        await asyncio.gather(*(call(*connection) for connection in connections))
        return done, time.monotonic() - began_s
    finally:
        for _, writer in connections:
            writer.close()


def _length_of(head: bytes) -> int:
    lines = head.split(b"\r\n")
    lengths = [line.partition(b":")[2] for line in lines if line.lower().startswith(b"content-length:")]
    if b" 200 " not in lines[0] or len(lengths) != 1:
        raise RuntimeError(f"unexpected answer: {head[:300]!r}")
    return int(lengths[0])
