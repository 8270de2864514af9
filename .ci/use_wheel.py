"""Uses what is installed as the README says, in the empty folder that this runs in: serve, demo, look, end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
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


def ours() -> list[list[str]]:
    """The command lines of everything that works in this folder."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [words for words in lines if any(str(FOLDER) in word for word in words)]


def gcs_address() -> str:
    """The cluster of this folder: beside another one on the machine, a command would have to guess."""
    for words in ours():
        for word in words:
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
    rungs: object = None
    while time.monotonic() < deadline_s and serving.poll() is None:
        try:
            rungs = httpx.get(f"{url}/readyz", timeout=5).json()["rungs"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            rungs = error
        if isinstance(rungs, dict) and set(rungs.values()) == {"ok"}:
            return
        time.sleep(0.5)
    raise SystemExit(f"not ready: {rungs}\n{Path('serve.log').read_text()[-4000:]}")


def main() -> None:
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
        serving.send_signal(signal.SIGINT)
        serving.wait(60)
        deadline_s = time.monotonic() + END_S
        while ours():
            if time.monotonic() > deadline_s:
                raise SystemExit(f"something of {FOLDER} is left running")
            time.sleep(0.5)
    sys.stdout.write("the wheel alone serves, and runs the demo\n")


main()
