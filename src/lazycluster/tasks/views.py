"""What is shown of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazycluster.output.execution_log import LoggedStep, LoggedTask
from lazycluster.output.view import Cell, Fact, Table, Tone, View

if TYPE_CHECKING:
    from .broadcast import Broadcast
    from .execution import Execution
    from .steps import Step

__all__ = ["broadcast_view", "status_cell", "task_log", "task_view"]

_TONES: dict[str, Tone] = {"done": "good", "failed": "bad", "cancelled": "bad", "pending": "dim"}
_LABEL = 200  # characters of a step


def status_cell(status: str) -> Cell:
    """Return the status of a task or a step as a cell."""
    return Cell(status, _TONES.get(status, ""))


def task_view(name: str, steps: tuple[Step, ...], execution: Execution | None) -> View:
    """Return what is shown of a task in a notebook."""
    facts: list[Fact] = []
    status = "pending"
    if execution is not None:
        steps, status = execution.steps, execution.status
        facts.append(("host", execution.context.host))
        if execution.log_file is not None and execution.results:
            facts.append(("log", execution.log_file))
        if execution.error is not None:
            facts.append(("error", Cell(_cause(execution.error), "bad")))
    rows: list[list[Cell | str]] = [
        [str(number), _short(step.label), _step_status(number - 1, execution)] for number, step in enumerate(steps, 1)
    ]
    return View(
        f"RuntimeTask {name}", status_cell(status), facts, (Table(("", "step", "status"), rows, right=frozenset({""})),)
    )


def broadcast_view(broadcast: Broadcast) -> View:
    """Return what is shown of a task that was executed on several hosts."""
    rows: list[list[Cell | str]] = []
    for one in broadcast.executions:
        done = max(0, len(one.results) - (one.is_over and one.status != "done"))
        error = Cell(_cause(one.error), "bad") if one.error is not None else ""
        rows.append([one.context.host, f"{done} of {len(one.steps)}", status_cell(one.status), error])
    table = Table(("host", "steps", "status", "error"), rows, right=frozenset({"steps"}))
    return View(f"RuntimeTask {broadcast.name}", status_cell(broadcast.status), tables=(table,))


def task_log(name: str, steps: tuple[Step, ...], execution: Execution | None, failure: Exception | None) -> LoggedTask:
    """Return what a task printed."""
    if execution is None:
        return LoggedTask("", name, "pending", [LoggedStep(_short(s.label), status_cell("pending"), "") for s in steps])
    outputs = [result.output for result in execution.results]
    logged = [
        LoggedStep(_short(step.label), _step_status(index, execution), outputs[index] if index < len(outputs) else "")
        for index, step in enumerate(execution.steps)
    ]
    error = "" if failure is None else _cause(failure)
    return LoggedTask(execution.context.host, name, execution.status, logged, error)


def _step_status(index: int, execution: Execution | None) -> Cell:
    if execution is None or index > len(execution.results):
        return status_cell("pending" if execution is None or not execution.is_over else "not reached")
    if index == len(execution.results):
        return status_cell("not reached" if execution.is_over else "running")
    last = index == len(execution.results) - 1
    if last and execution.is_over and execution.status != "done":
        return status_cell(execution.status)
    return status_cell("done")


def _cause(error: Exception) -> str:
    """Return why a step failed: the first line of the message says which step it is, the second why."""
    return "\n".join(str(error).splitlines()[:2][-1:]).strip()


def _short(text: str) -> str:
    return text if len(text) <= _LABEL else f"{text[: _LABEL - 3]}..."
