"""The comparison with etcd, on a real etcd. Skipped without Debian's package `etcd-server`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import psutil
import pytest

from seedcore.bench import peers
from seedcore.bench.environment import Bench
from seedcore.bench.etcd import EtcdClient, etcd_program, running_etcd
from seedcore.core.errors import ConfigurationError
from tests.bench.test_bench import bench_command
from tests.programs import is_missing


@pytest.fixture
def etcd(request: pytest.FixtureRequest) -> str:
    """The program, or a skip; with --require-etcd a failure."""
    found = etcd_program()
    if found is None:
        is_missing(request, "etcd", "etcd-server", "--require-etcd")
    return found


async def test_client_writes_reads_lists_renews_and_watches(etcd: str) -> None:
    with running_etcd(etcd) as server:
        client = EtcdClient(server.address)
        try:
            await client.health()
            events = await client.watch(b"some/")
            # more than one transaction takes
            rows = [(b"some/%03d" % number, b"%d" % number, 0) for number in range(300)]
            await client.put_all(rows)
            await client.put(b"other", b"1")
            assert await client.get(b"some/007") == b"7"
            assert await client.get(b"none") is None
            assert await client.list_values(b"some/") == [value for _, value, _ in rows]
            assert [await anext(events) for _ in rows] == [(key, value) for key, value, _ in rows]

            await client.grant(1, 2)
            await client.grant(2, 60)
            await client.put(b"some/leased", b"here", 1)
            assert await client.keep_alive([1, 2, 3]) == 2
            # its lease ends where it is not renewed
            assert [await anext(events) for _ in range(2)] == [(b"some/leased", b"here"), (b"some/leased", None)]
            assert await client.keep_alive([1, 2, 3]) == 1
        finally:
            await client.close()


def test_server_is_on_loopback_alone_and_leaves_no_process_and_no_file(etcd: str) -> None:
    with running_etcd(etcd) as server:
        process = psutil.Process(server.pid)
        listening = {one.laddr.ip for one in process.net_connections() if one.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}
        folder = Path(process.cwd())
        assert (folder / "data").is_dir()
    assert not process.is_running()
    assert not folder.exists()


def test_server_that_does_not_start_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    program, folders = tmp_path / "etcd", tmp_path / "folders"
    program.write_text(f"#!/bin/sh\npwd >> {folders}\necho starting\necho no space left >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(ConfigurationError, match="does not start: no space left"), running_etcd(str(program)):
        pass
    used = folders.read_text().splitlines()
    assert used
    assert not any(Path(folder).exists() for folder in used)


def test_without_an_etcd_the_result_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    result = asyncio.run(peers.run(Bench("not used", is_quick=True)))
    assert (list(result.figures), list(result.ratios)) == ([], [])
    assert len(result.notes) == 1
    assert "no program `etcd`" in result.notes[0]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_both_sides_are_measured_and_nothing_is_promised(etcd: str, tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    done = bench_command("peers", "--quick", "--output", str(written), timeout_s=280)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(written.read_text())["results"]
    assert all(ratio["bound"] is None for ratio in result["ratios"])
    figures = {figure["name"]: figure["value"] for figure in result["figures"]}
    assert all(value > 0 for value in figures.values())
    for name in [name.removesuffix(": etcd") for name in figures if name.endswith(": etcd")]:
        ratio = figures[f"{name}: SeedCore"] / figures[f"{name}: etcd"]
        assert ratio == pytest.approx(
            next(one["value"] for one in result["ratios"] if one["name"] == f"{name}: SeedCore / etcd")
        )
    # what the lease decides, on any machine
    killed = "from SIGKILL to gone for another process"
    assert figures[f"{killed}: etcd"] > figures[f"{killed}: SeedCore"]
