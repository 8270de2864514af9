"""The benchmarks run, and the promised ratios hold on a quiet machine (`pytest -m soak tests/bench`)."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from seedcore.bench import NAMES, ONLY_IF_NAMED
from seedcore.bench.environment import Bench, environment
from seedcore.bench.growth import measure
from seedcore.bench.report import Figure, Ratio, Result, as_json, show, write_plot
from seedcore.bench.run import BENCHMARKS
from seedcore.cli.errors import EXIT_USAGE
from tests.children import run

PROGRAM = Path(sys.executable).parent / "seedcore"
AGENTS = 100_000
SECONDS = 300.0


def bench_command(*options: str, timeout_s: float = 170) -> subprocess.CompletedProcess[str]:
    return run(PROGRAM, "bench", *options, timeout_s=timeout_s)


@pytest.mark.slow
@pytest.mark.timeout(520)
def test_every_benchmark_runs_prints_a_table_and_writes_json_and_a_plot(tmp_path: Path) -> None:
    figures, plot = tmp_path / "figures.json", tmp_path / "ratios.png"
    done = bench_command("--quick", "--json", "--output", str(figures), "--plot", str(plot), timeout_s=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "committed / floor" in done.stderr
    written = json.loads(figures.read_text())
    assert json.loads(done.stdout) == written
    assert [result["name"] for result in written["results"]] == [one for one in BENCHMARKS if one not in ONLY_IF_NAMED]
    assert written["machine"]["cpus"]
    rates = {figure["name"]: figure["value"] for result in written["results"] for figure in result["figures"]}
    # far below the promise: this only shows that it measures
    assert rates["rows of beats committed, end to end"] > 2 * rates["floor: one transaction per beat"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_unknown_benchmark_is_refused_before_any_runs() -> None:
    done = bench_command("ingets")
    assert done.returncode == EXIT_USAGE
    assert f"must be one of {', '.join(NAMES)}, not 'ingets'" in done.stderr


def test_ratio_beyond_its_bound_is_shown_as_not_held(tmp_path: Path) -> None:
    ratios = [Ratio("good", 15.0, ">= 15"), Ratio("bad", 2.5, "<= 2"), Ratio("free", 0.1)]
    assert [ratio.holds for ratio in ratios] == [True, False, True]
    result = Result("example", [Figure("rate", 12345.6, "/ s")], ratios, notes=["a note"])
    console = Console(width=100, record=True, file=io.StringIO())
    show(console, result)
    text = console.export_text()
    assert "12,346 / s" in text
    assert text.count("NOT HELD") == 1
    written = json.loads(as_json([result], {"cpus": 2}))
    assert [ratio["holds"] for ratio in written["results"][0]["ratios"]] == [True, False, True]
    write_plot(tmp_path / "plot.svg", [result])
    assert "example: bad" in (tmp_path / "plot.svg").read_text()


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with environment(None, is_quick=False) as bench:
        yield bench


def promised(result: Result) -> None:
    show(Console(width=120), result)
    broken = {ratio.name: ratio.value for ratio in result.ratios if not ratio.holds}
    assert not broken, broken


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_promised_ratios_hold(bench: Bench, name: str) -> None:
    promised(asyncio.run(_run(bench, name)))


async def _run(bench: Bench, name: str) -> Result:
    return await BENCHMARKS[name](bench)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_hundred_thousand_agents_beat_for_five_minutes(bench: Bench) -> None:
    result = asyncio.run(measure(bench, (AGENTS,), SECONDS))
    promised(result)
    found = {figure.name.removeprefix(f"{AGENTS:,} agents: "): figure.value for figure in result.figures}
    assert found["of one core"] < 15
    assert found["memory"] < 250
    assert (found["beats dropped"], found["found late"], found["could not report"]) == (0, 0, 0)
    assert found["table growth"] < 1.1
