"""The results of the checks of `seedcore doctor`, and the table that shows them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from rich.table import Table

from seedcore.cli.output import Text, out


class Grade(StrEnum):
    """The result of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


_STYLE = {Grade.OK: "green", Grade.WARNING: "yellow", Grade.FAILED: "red", Grade.SKIPPED: "dim"}


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check, its details, and the remedy of a problem."""

    check: str
    grade: Grade
    found: str
    remedy: str | None = None


def show_findings(findings: list[Finding]) -> None:
    """Print a table of findings."""
    table = Table("CHECK", "RESULT", "DETAILS", box=None, pad_edge=False)
    for finding in findings:
        details = Text(finding.found)
        if finding.remedy is not None:
            details.append(f"\n-> {finding.remedy}", style="bold")
        table.add_row(finding.check, Text(finding.grade.value, style=_STYLE[finding.grade]), details)
    out.print(table)
