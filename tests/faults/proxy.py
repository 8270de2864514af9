"""A TCP proxy before a real PostgreSQL that loses the network in the ways a network is lost.

Owns a thread with an event loop, and sockets. Knows nothing of PostgreSQL but where its socket is.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from psycopg import conninfo

T = TypeVar("T")

_CHUNK = 65536
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_CALL_S = 10.0
_TURNS = 10


class _Link:
    """One connection of a client, with the one to the server that belongs to it."""

    def __init__(self, client: asyncio.StreamWriter, is_deaf: bool) -> None:
        self.writers = [client]
        # once bytes are lost the connection is of no use any more: deaf links stay deaf
        self.is_deaf = is_deaf
        # of the client's messages it carries so many more, and then nothing; None: all
        self.messages_left: int | None = None

    def lose_after(self, messages: int) -> None:
        """Carry so many more messages of the client, and nothing of what comes after."""
        self.messages_left = messages
        self.is_deaf = messages == 0

    def reset(self) -> None:
        """End both connections with a reset."""
        for writer in self.writers:
            raw = writer.get_extra_info("socket")
            with suppress(OSError):
                if raw.family == socket.AF_INET:
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()

    async def carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_client: bool) -> None:
        """Pass bytes on until the source ends; lose them while deaf."""
        with suppress(OSError):
            while chunk := await source.read(_CHUNK):
                if self.is_deaf:
                    continue
                if is_client and self.messages_left is not None:
                    self.lose_after(self.messages_left - 1)
                target.write(chunk)
                await target.drain()
        if self.is_deaf:
            # the other side hears nothing of the end either
            await asyncio.Event().wait()


class Proxy:
    """Passes at the start. Every method returns when its work is done; each may be called again."""

    def __init__(self, server_socket: Path) -> None:
        self._server_socket = server_socket
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._listener: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_deaf = False
        self._is_resetting = False
        self.port = 0
        self.accepted = 0

    # Life

    def start(self) -> None:
        """Listen on a port of this machine."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
            self._thread.start()
            self._call(self._listen())

    def stop(self) -> None:
        """End every connection, and listen no more. It does not start again."""
        if self._thread is None or self._loop.is_closed():
            return
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_S)
        self._loop.close()

    def dsn(self, database: str, user: str = "postgres") -> str:
        """A connection string through the proxy."""
        return conninfo.make_conninfo(host="127.0.0.1", port=self.port, dbname=database, user=user, sslmode="disable")

    # Faults

    def heal(self) -> None:
        """Take new connections and pass them on. Those that were deaf stay so."""
        self._is_deaf = self._is_resetting = False
        self._call(self._listen())

    def refuse(self) -> None:
        """End every connection and close the port."""
        self._call(self._close_port())
        self.cut()

    def cut(self) -> None:
        """Reset every connection; new ones pass."""
        self._call(self._each(_Link.reset))

    def reset_everyone(self) -> None:
        """Reset every connection, and new ones as soon as they are made."""
        self._is_resetting = True
        self.cut()

    def go_deaf(self) -> None:
        """Accept, and lose whatever is said on old and new connections."""
        self._is_deaf = True
        self.half_open()

    def half_open(self) -> None:
        """Lose whatever is said on the connections there are; new ones pass."""
        self.lose_after(0)

    def lose_after(self, messages: int) -> None:
        """Lose what the connections there are carry after so many more messages of their clients; new ones pass."""
        self._call(self._each(lambda link: link.lose_after(messages)))

    # In the thread

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_S)

    async def _each(self, fault: Callable[[_Link], None]) -> None:
        for link in list(self._links):
            fault(link)

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._listener.sockets[0].getsockname()[1]

    async def _close_port(self) -> None:
        if self._listener is not None:
            for accepting in self._listener.sockets:
                self._loop.remove_reader(accepting)
            # asyncio never closes a connection that it accepts while its server is closed: those accepted begin first
            for _ in range(_TURNS):
                await asyncio.sleep(0)
            self._listener.close()
            self._listener = None

    async def _end(self) -> None:
        await self._close_port()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        link = _Link(writer, self._is_deaf)
        self._links.add(link)
        try:
            # a server that is away ends the connection, as its machine would
            with suppress(OSError, asyncio.CancelledError):
                await self._join(link, reader, writer)
        finally:
            link.reset()
            self._links.discard(link)
            self._tasks.discard(task)

    async def _join(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_resetting:
            return
        if link.is_deaf:
            await link.carry(reader, writer, is_client=True)
        server_reader, server_writer = await asyncio.open_unix_connection(self._server_socket)
        link.writers.append(server_writer)
        ways = [
            asyncio.create_task(link.carry(reader, server_writer, is_client=True)),
            asyncio.create_task(link.carry(server_reader, writer, is_client=False)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
