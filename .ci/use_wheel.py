"""Uses the installed package as the README describes, in an empty working folder: serve, demo, queries, end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

PROGRAMS = Path(sys.executable).parent
FOLDER = Path.cwd()
CONFIG = """
proxy_location: HeadOnly
http_options: {{host: 127.0.0.1, port: {port}}}
applications: [{{name: seedcore, route_prefix: /, import_path: "seedcore.discovery:build"}}]
"""
READY_S = 120.0
END_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ours() -> list[psutil.Process]:
    """Return every process whose command line contains this folder."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(FOLDER) in word for word in process.info["cmdline"] or [])
    ]


def gcs_address() -> str:
    """Return the address of this folder's cluster. If another one runs on the machine, a command refuses to choose."""
    for process in ours():
        for word in process.info["cmdline"]:
            if word.startswith("--gcs-address="):
                return word.partition("=")[2]
    raise SystemExit("serve run started no Ray")


def command(*words: str) -> str:
    ended = subprocess.run([PROGRAMS / "seedcore", *words], capture_output=True, text=True, timeout=150, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"seedcore {' '.join(words)}: {ended.stdout}{ended.stderr}")
    return ended.stdout


def until_ready(serving: subprocess.Popen[bytes], url: str) -> None:
    deadline_s = time.monotonic() + READY_S
    sources: object = None
    while time.monotonic() < deadline_s and serving.poll() is None:
        try:
            sources = httpx.get(f"{url}/readyz", timeout=5).json()["sources"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            sources = error
        if isinstance(sources, dict) and set(sources.values()) == {"ok"}:
            return
        time.sleep(0.5)
    raise SystemExit(f"not ready: {sources}\n{Path('serve.log').read_text()[-4000:]}")


def end(serving: subprocess.Popen[bytes]) -> None:
    """Send Ctrl-C, which must end everything. Kills what is left, and fails."""
    serving.send_signal(signal.SIGINT)
    deadline_s = time.monotonic() + END_S
    while (serving.poll() is None or ours()) and time.monotonic() < deadline_s:
        time.sleep(0.5)
    left = ours() if serving.poll() is not None else [psutil.Process(serving.pid), *ours()]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    if left:
        raise SystemExit(f"something of {FOLDER} is left running: {left}")


def main() -> None:
    # a background job of a script starts with SIGINT ignored, which its children inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_TMPDIR": str(FOLDER / "ray"),
        "SEEDCORE_DATA_DIR": str(FOLDER / "data"),
    }
    port = free_port()
    Path("serve_config.yaml").write_text(CONFIG.format(port=port))
    with Path("serve.log").open("wb") as log:
        serving = subprocess.Popen([PROGRAMS / "serve", "run", "serve_config.yaml"], stdout=log, stderr=log)
    try:
        until_ready(serving, f"http://127.0.0.1:{port}")
        os.environ["RAY_ADDRESS"] = gcs_address()
        command("demo")
        listed = {row["logical_id"] for row in json.loads(command("ls", "--all", "--json"))["items"]}
        answer = httpx.get(f"http://127.0.0.1:{port}/v1/instances", params={"status": ["alive", "draining"]})
        served = {row["logical_id"] for row in answer.raise_for_status().json()["items"]}
        assert "demo-memory-1" in listed & served, (listed, served)
        page = httpx.get(f"http://127.0.0.1:{port}/")
        assert page.status_code == 200, page
        assert "SeedCore" in page.text, page.text[:200]
        command("demo", "--down")
    finally:
        end(serving)
    sys.stdout.write("the installed wheel serves, and runs the demo\n")


main()
