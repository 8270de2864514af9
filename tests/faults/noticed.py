"""Which history notices each mutant. Each history runs in a process of its own, forked from one that has imported all.

python -m tests.faults.noticed             # where a seed in mutants.py notices no more, write another there
python -m tests.faults.noticed --serve     # read a mutant's name per line, answer each with a line
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.faults.loss_mutants import LOSS_MUTANTS
from tests.faults.mutants import MUTANTS
from tests.faults.simulated.history import run_seed

ENOUGH_TO_NOTICE = 600
FOLDER = Path(__file__).parent


_broken = contextlib.ExitStack()


def _break(mutant: str) -> None:
    # to the end of the process: a patch that is not kept is undone when it is collected
    _broken.enter_context(MUTANTS[mutant].patch())


def search(mutant: str, seeds: Iterable[int], jobs: int = 1) -> tuple[int, str] | None:
    """The first seed whose history breaks the law that has to notice the mutant, and the violation."""
    # a pool whose processes all fail at their start makes new ones for ever: fail here if there is nothing to break
    with MUTANTS[mutant].patch():
        pass
    pool = multiprocessing.get_context("fork").Pool(jobs, initializer=_break, initargs=(mutant,), maxtasksperchild=1)
    with pool:
        for seed, violation, _, _ in pool.imap(run_seed, seeds):
            if violation is not None and MUTANTS[mutant].is_noticed_by(violation):
                return seed, violation
    return None


def _answer(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _serve() -> None:
    for line in sys.stdin:
        mutant = line.rstrip("\n")
        first = MUTANTS[mutant].seed
        found = search(mutant, range(first, first + ENOUGH_TO_NOTICE))
        _answer("not noticed" if found is None else f"seed {found[0]}: {found[1].splitlines()[0]}")


def _write_seeds() -> int:
    """The exit code: 1 if a mutant is not noticed."""
    missed = 0
    for mutant in MUTANTS:
        file = FOLDER / ("loss_mutants.py" if mutant in LOSS_MUTANTS else "mutants.py")
        seeds = [MUTANTS[mutant].seed, *range(2 * ENOUGH_TO_NOTICE)]
        found = search(mutant, seeds, os.cpu_count() or 1)
        _answer(f"{mutant}: {'not noticed' if found is None else f'seed {found[0]}'}")
        if found is None:
            missed = 1
            continue
        text, count = re.subn(rf'("{re.escape(mutant)}": Mutant\(\s*)\d+', rf"\g<1>{found[0]}", file.read_text())
        assert count == 1, mutant
        file.write_text(text)
    return missed


def main() -> int:
    """Search, or serve."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.noticed", description=__doc__)
    parser.add_argument("--serve", action="store_true")
    if os.environ.get("PYTHONHASHSEED") != "0":
        # the order of sets is a part of the history
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-W", "ignore", "-m", "tests.faults.noticed", *sys.argv[1:]])
    if parser.parse_args().serve:
        _serve()
        return 0
    return _write_seeds()


if __name__ == "__main__":
    sys.exit(main())
