"""A pool of rollout engines, each with an inference server beside it, and a router that follows the pool.

Replaces the fleet-health code of NeMo-RL and slime, about 300 lines: threads that poll the health of every server, a
table of URLs that is rebuilt after each failure, and the kill of an engine whose server has ended. Here the kernel
reports the end of a server, its agent is unresolvable at once, and the router's table follows the feed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from typing import Any

import ray

import seedcore
from seedcore.errors import NotResolvableError

ENGINES = [f"rollout-{number}" for number in range(8)]
SERVER = """
import http.server
server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
print(f"http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""


def begin_server() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)


class Engine(seedcore.RayAgent):
    """Starts its server, and is ready once that listens. It depends on it: without the server it is dead."""

    server: subprocess.Popen[str] | None = None
    starting = asyncio.Lock()

    async def start(self) -> None:
        async with self.starting:
            if self.server is None:
                await self.set_ready(False, "its server starts")
                await super().start()
                self.server = await asyncio.to_thread(begin_server)
                assert self.server.stdout is not None
                url = await asyncio.to_thread(self.server.stdout.readline)
                await self.set_endpoints({"http": url.strip()})
                await self.watch_process(self.server.pid, name="server")
                await self.set_ready(True)

    async def stop(self, reason: str = "stopped") -> None:
        await super().stop(reason)
        if self.server is not None:
            self.server.kill()

    async def handle_task(self, task: Any) -> Any:
        return self.server.pid if self.server is not None else None


class Router:
    """The URL of each engine that is ready, in step with the feed of the registry."""

    def __init__(self, organ_id: str) -> None:
        self.urls: dict[str, str] = {}
        self._events = seedcore.watch(organ_id=organ_id, since="start")
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._events.close()
        self._thread.join()

    def _follow(self) -> None:
        for event in self._events:
            if event.is_whole:
                self.urls = {row.logical_id: row.endpoints["http"] for row in event.instances if row.status == "alive"}
            elif event.is_ready and event.instance is not None:
                self.urls[event.instance.logical_id] = event.instance.endpoints["http"]
            elif event.logical_id is not None:
                self.urls.pop(event.logical_id, None)


def wait_until(router: Router, count: int) -> None:
    while len(router.urls) != count:
        time.sleep(0.01)


def main() -> None:
    ray.init(address="auto", log_to_driver=False, logging_level="error")
    router = Router("rollout")
    with seedcore.BlockingManager() as manager:
        specs = [seedcore.AgentSpec(name, "rollout", Engine, max_restarts=0) for name in ENGINES]
        manager.create_agents_batch(specs)
        print(len(seedcore.wait_for(organ_id="rollout", count=8, timeout_s=120)), "engines are ready")
        wait_until(router, 8)
        print([urllib.request.urlopen(url, timeout=10).status for url in router.urls.values()])
        os.kill(manager.execute_task_on_agent("rollout-3", None, timeout_s=30), signal.SIGKILL)
        wait_until(router, 7)
        print("rollout-3" in router.urls, len(router.urls))
        try:
            seedcore.get_actor("rollout-3")
        except NotResolvableError as error:
            print(error)
        router.stop()
        manager.shutdown_agents(ENGINES)


if __name__ == "__main__":
    main()
