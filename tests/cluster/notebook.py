"""Runs the cells of a notebook as a kernel does, in one running event loop: python -m tests.cluster.notebook FILE."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import sys
from pathlib import Path
from typing import Any


async def run_cells(cells: list[dict[str, Any]]) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            code = compile("".join(cell["source"]), cell["id"], "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = eval(code, names)
            if inspect.isawaitable(result):
                await result


if __name__ == "__main__":
    asyncio.run(run_cells(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["cells"]))
