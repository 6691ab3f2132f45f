"""Turns what the matrix of faults and loads has found into the table of the documentation.

``python tests/faults/table.py [--into docs/faults.md] REPORT.xml...`` after ``pytest tests/faults/test_matrix.py
-m "soak or not soak" --junitxml REPORT.xml``; of several reports, a later one goes before an earlier one, and what none
of them has stays as it is in the page.
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from injections import DIRECT, FAULTS, LOADS, in_soak

_SOAK, _NOT_RUN = "soak", "not run"
_NOT_TRIED = ("", _SOAK, _NOT_RUN)


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
        soaked = in_soak(fault)
        other = {load: _SOAK if soaked and load != DIRECT else _NOT_RUN for load in LOADS}
        cells = [found.get((fault.name, load), other[load]) if load in fault.loads else "" for load in LOADS]
        lines.append(f"| {fault.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(page: Path) -> dict[tuple[str, str], str]:
    """Read what a page shows of cells that were tried."""
    found = {}
    for line in page.read_text().partition("<!-- table -->\n")[2].partition("<!-- /table -->")[0].splitlines()[2:]:
        fault, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found |= {(fault, load): cell for load, cell in zip(LOADS, cells, strict=True) if cell not in _NOT_TRIED}
    return found


def put(page: Path, text: str) -> None:
    """Put the table between its marks in a page."""
    before, _, rest = page.read_text().partition("<!-- table -->\n")
    after = rest.partition("<!-- /table -->")[2]
    page.write_text(f"{before}<!-- table -->\n{text}\n<!-- /table -->{after}")


def main() -> None:
    """Read reports, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs="+", help="files in JUnit's format")
    parser.add_argument("--into", type=Path, help="a page with marks for the table; else it is printed")
    arguments = parser.parse_args()
    found = outcomes(arguments.reports)
    if arguments.into:
        put(arguments.into, table(shown(arguments.into) | found))
    else:
        print(table(found))


if __name__ == "__main__":
    main()
