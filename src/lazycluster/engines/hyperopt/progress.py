"""Progress of a search."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from lazycluster.output.view import Cell, Fact, Shown, Table, View

from .programs import compat, trials

_WANTED = ["state", "owner", "book_time", "refresh_time", "result.loss", "result.status"]


@dataclass(frozen=True)
class SearchProgress(Shown):
    """Progress of a search.

    Attributes:
        done: Trials with a result.
        running: Trials that are being evaluated.
        waiting: Trials that nobody has taken yet.
        failed: Trials whose objective raised an error or ended its process.
        best_loss: The smallest loss so far, None if there is none.
        per_minute: Trials that ended per minute, from the first one's start to the last one's end.
        per_worker: Trials that ended, by worker.
        problem: Why no trial is evaluated any more, None if they are.
    """

    done: int
    running: int
    waiting: int
    failed: int
    best_loss: float | None
    per_minute: float
    per_worker: dict[str, int]
    problem: str | None = None

    def _view(self) -> View:
        best = Cell("none yet", "dim") if self.best_loss is None else Cell(f"{self.best_loss:g}")
        facts: list[Fact] = [
            ("trials", f"{self.done} done, {self.running} running, {self.waiting} waiting"),
            ("failed", Cell(str(self.failed), "bad" if self.failed else "")),
            ("best loss", best),
            ("per minute", f"{self.per_minute:.1f}"),
        ]
        if self.problem:
            facts.append(("problem", Cell(self.problem, "bad")))
        rows = [[worker, str(count)] for worker, count in self.per_worker.items()]
        tables = (Table(("worker", "trials"), rows, "Trials by worker", frozenset({"trials"})),) if rows else ()
        return View("Search", None, facts, tables)

    def __str__(self) -> str:
        best = "" if self.best_loss is None else f", best loss {self.best_loss:g}"
        return (
            f"{self.done} done, {self.running} running, {self.waiting} waiting, {self.failed} failed{best}, "
            f"{self.per_minute:.1f} per minute" + (f"; {self.problem}" if self.problem else "")
        )


def progress_of(jobs: Any, exp_key: str | None) -> SearchProgress:
    """Return how far a search is.

    Args:
        jobs: The collection of trials.
        exp_key: The name of the search; None: all.
    """
    states: Counter[int] = Counter()
    workers: Counter[str] = Counter()
    losses: list[float] = []
    times: list[tuple[Any, Any]] = []
    for trial in jobs.find({} if exp_key is None else {"exp_key": exp_key}, projection=_WANTED):
        states[trial["state"]] += 1
        if trial["state"] not in (trials.DONE, trials.ERROR):
            continue
        owner = trial.get("owner")
        workers[str(owner[0] if isinstance(owner, list) and owner else owner)] += 1
        times += [(trial["book_time"], trial["refresh_time"])] if trial.get("book_time") else []
        result = trial.get("result") or {}
        loss = result.get("loss")
        if trial["state"] == trials.DONE and result.get("status") == "ok" and loss is not None and loss == loss:
            losses.append(float(loss))
    seconds = (max(end for _, end in times) - min(begin for begin, _ in times)).total_seconds() if times else 0.0
    return SearchProgress(
        states[trials.DONE],
        states[trials.RUNNING],
        states[trials.NEW],
        states[trials.ERROR],
        min(losses, default=None),
        60 * len(times) / max(seconds, 0.001) if times else 0.0,
        dict(workers),
        compat.told_problem(jobs.database),
    )
