"""Output of tasks, step by step: as one table if it is short, else one step below the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lazycluster.exceptions import printable

from .lines import settled, write
from .progress import in_notebook
from .view import Cell, Table, View, as_text, columns, headline, show

__all__ = ["LoggedStep", "LoggedTask", "show_logs"]

_LINES = 8  # of a step's output that fit into a cell
_WIDEST = 160  # columns; nobody reads a wider table in a file


@dataclass(frozen=True)
class LoggedStep:
    """A step.

    Attributes:
        label: What it did.
        status: How it ended.
        output: What it printed.
    """

    label: str
    status: Cell
    output: str


@dataclass(frozen=True)
class LoggedTask:
    """The output of a task on a host.

    Attributes:
        host: The host.
        task: The name of the task.
        status: Its status.
        steps: Its steps.
        error: Why it failed, if it did.
    """

    host: str
    task: str
    status: str
    steps: Sequence[LoggedStep]
    error: str = ""


def show_logs(logs: Sequence[LoggedTask]) -> None:
    """Print the output of tasks, or show it below the cell of a notebook."""
    if not logs:
        return
    view = View(tables=(_table(logs),))
    short = all(step.output.count("\n") <= _LINES for log in logs for step in log.steps)
    if in_notebook() or (short and max(map(len, as_text(view, _WIDEST * 10).splitlines())) <= min(columns(), _WIDEST)):
        show(view)
    else:
        write("".join(f"{line}\n" for log in logs for line in _lines(log)))


def _table(logs: Sequence[LoggedTask]) -> Table:
    rows: list[list[Cell | str]] = []
    for log in logs:
        head = [log.host, log.task]
        for step in log.steps:
            rows.append([*head, step.label, step.status, settled(step.output)])
            head = ["", ""]
        if log.error:
            rows.append([*head, "", "", Cell(log.error, "bad")])
    return Table(("host", "task", "step", "status", "output"), rows, exact=frozenset({"output"}))


def _lines(log: LoggedTask) -> list[str]:
    lines = [headline(f"task {log.task} on {log.host}: {log.status}")]
    for number, step in enumerate(log.steps, 1):
        lines += [printable(f"[{number}] {step.label}"), settled(step.output)]
    return [line for line in [*lines, printable(log.error)] if line]
