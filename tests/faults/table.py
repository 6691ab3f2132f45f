"""Turns what the matrix of faults and loads has found into the table of the documentation.

``python tests/faults/table.py REPORT.xml... > TABLE.md`` after ``pytest tests/faults/test_matrix.py
-m "soak or not soak" --junitxml REPORT.xml``; of several reports, a later one goes before an earlier one.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from injections import FAULTS, LOADS


def outcomes(reports: Iterable[str]) -> dict[tuple[str, str], str]:
    """Read what came out of each cell.

    Args:
        reports: Files in JUnit's format.
    """
    found = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            told = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
            if "fault" in told:
                failed = case.find("failure") is not None or case.find("error") is not None
                found[str(told["fault"]), str(told["load"])] = "**FAILED**" if failed else str(told["outcome"])
    return found


def table(found: dict[tuple[str, str], str]) -> str:
    """Write the table in Markdown."""
    lines = [f"| fault | {' | '.join(LOADS)} |", "|---" * (len(LOADS) + 1) + "|"]
    for fault in FAULTS.values():
        cells = [found.get((fault.name, load), "not run") if load in fault.loads else "" for load in LOADS]
        lines.append(f"| {fault.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(outcomes(sys.argv[1:])))
