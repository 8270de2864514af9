"""What the tests leave behind is found and ended, whatever it does against that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.children import run, started
from tests.traces import MARK, begin, end, finish, lives

DEAF = """
import signal, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print(flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess
child = subprocess.Popen(["sleep", "600"])
print(child.pid, flush=True)
child.wait()
"""
QUICK = ((signal.SIGINT, 0.1), (signal.SIGTERM, 0.1), (signal.SIGKILL, 10.0))


def test_a_process_and_a_file_that_a_run_leaves_are_reported_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ray", "forgotten"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv(MARK, str(tmp_path))
    with (
        subprocess.Popen(["sleep", "600"]) as marked,
        subprocess.Popen(["sleep", "600"], cwd=tmp_path, env={}) as inside,
    ):
        left = finish(0.0)
    assert sorted(left) == sorted(
        [f"pid {marked.pid}: sleep 600", f"pid {inside.pid}: sleep 600", f"file {tmp_path / 'forgotten'}"]
    )
    assert not tmp_path.exists()


def test_a_process_that_is_deaf_to_signals_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        end([psutil.Process(process.pid)], QUICK)
        assert process.wait(1) == -signal.SIGKILL


def test_what_a_program_has_started_ends_with_it() -> None:
    with started(sys.executable, "-c", PARENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        assert lives(child)
    assert not lives(child)
    with pytest.raises(subprocess.TimeoutExpired):
        run("sleep", "600", timeout_s=0.1)


def test_programs_hear_ctrl_c_though_the_tests_were_started_deaf_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert not begin()
        told = run(sys.executable, "-c", "import signal; print(signal.getsignal(2))", timeout_s=30).stdout
    finally:
        signal.signal(signal.SIGINT, before)
    assert "default_int_handler" in told
    assert os.environ[MARK]
