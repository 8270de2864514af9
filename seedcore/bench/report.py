"""Figures and ratios, printed as a table and written as JSON or as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from seedcore.core.errors import ConfigurationError


@dataclass(frozen=True)
class Figure:
    """One measured value. `unit` is printed after the number."""

    name: str
    value: float
    unit: str


@dataclass(frozen=True)
class Ratio:
    """A value divided by its baseline. `bound` is the promise, such as `>= 15` or `<= 2`; None: no promise."""

    name: str
    value: float
    bound: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the ratio is within its bound."""
        if self.bound is None:
            return True
        sign, limit = self.bound.split()
        return self.value >= float(limit) if sign == ">=" else self.value <= float(limit)


@dataclass(frozen=True)
class Result:
    """The results of one benchmark, and its duration in seconds."""

    name: str
    figures: Sequence[Figure]
    ratios: Sequence[Ratio] = ()
    took_s: float = 0.0
    notes: Sequence[str] = field(default=())


def show(console: Console, result: Result) -> None:
    """Print the table of one benchmark."""
    table = Table(result.name.upper(), "", "PROMISED", box=None, pad_edge=False, min_width=70)
    table.columns[1].justify = "right"
    for figure in result.figures:
        table.add_row(figure.name, f"{_number(figure.value)} {figure.unit}", "")
    for ratio in result.ratios:
        promised = "" if ratio.bound is None else f"{ratio.bound}{'' if ratio.holds else '  NOT HELD'}"
        table.add_row(ratio.name, f"{_number(ratio.value)} x", promised)
    console.print(table)
    for note in result.notes:
        console.print(note, style="dim")
    console.print()


def as_json(results: Sequence[Result], machine: dict[str, object]) -> str:
    """All results and the description of the machine."""
    rows = [
        {**asdict(result), "ratios": [{**asdict(ratio), "holds": ratio.holds} for ratio in result.ratios]}
        for result in results
    ]
    return json.dumps({"machine": machine, "results": rows}, indent=2)


def require_plot() -> None:
    """Raise ConfigurationError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigurationError("--plot", "needs matplotlib: pip install 'seedcore[bench]'") from None


def write_plot(path: Path, results: Sequence[Result]) -> None:
    """Draw each ratio as a bar on a logarithmic axis, with its promised bound."""
    require_plot()
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    rows = [(f"{result.name}: {ratio.name}", ratio) for result in results for ratio in result.ratios][::-1]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.4 * len(rows)))
    axes.barh([name for name, _ in rows], [ratio.value for _, ratio in rows], color="#4477aa")
    for place, (_, ratio) in enumerate(rows):
        if ratio.bound is not None:
            axes.plot([float(ratio.bound.split()[1])] * 2, [place - 0.4, place + 0.4], color="#cc3311")
        axes.text(ratio.value, place, f" {_number(ratio.value)}", va="center")
    axes.set_xscale("log")
    axes.set_xlabel("ratio to the baseline of the same run; red: promised bound")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"
