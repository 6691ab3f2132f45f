"""How far copies are: bars on a terminal, a line for each host at its end elsewhere."""

from __future__ import annotations

import os
import shlex
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from lazycluster.core.words import counted
from lazycluster.exceptions import one_line
from lazycluster.output.host_cells import megabytes

from .console import errors, host_style, lines_of, output
from .fanout import HostOutcome

if TYPE_CHECKING:
    from lazycluster.ssh.transfer import TransferResult

__all__ = ["Copying"]

_LITTLE = 1024 * 1024  # bytes


class Copying:
    """The copies of a command.

    Args:
        hosts: The hosts.
        quiet: Whether to say nothing of what went well.
    """

    def __init__(self, hosts: Sequence[str], quiet: bool) -> None:
        self._quiet = quiet
        self._sums: dict[str, list[float]] = {host: [0, 0, 0, 0.0] for host in hosts}
        self._left_out: dict[str, list[str]] = {}
        self._unused: set[str] | None = None  # of no copy, as far as they are complete
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()
        if errors().is_terminal and not quiet and not os.environ.get("NO_COLOR"):
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=errors(),
                transient=True,
            )

    def __enter__(self) -> Copying:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            if not self._bars.tasks:
                self._bars.add_task("")  # what is removed at the end is the lines of tasks: without one, another stays
            self._bars.stop()

    def progress(self, host: str) -> Callable[[int, int | None, int], Any] | None:
        """Return what takes the progress of the next copy from or to a host, if there is one to show."""
        bars = self._bars
        if bars is None:
            return None
        with self._lock:
            if host not in self._tasks:
                self._tasks[host] = bars.add_task(f"[{host_style(host)}]{host}[/]", total=None)
            task = self._tasks[host]

        def show(done: int, total: int | None, files: int) -> None:
            before = self._sums[host][1]
            bars.update(task, completed=before + done, total=None if total is None else before + total)

        return show

    def add(self, host: str, result: TransferResult) -> None:
        """Count a copy that is complete."""
        sums = self._sums[host]
        sums[0] += result.files
        sums[1] += result.bytes
        sums[2] += result.skipped
        sums[3] += result.seconds
        self._left_out.setdefault(host, []).extend(result.left_out)
        self._unused = set(result.unused) if self._unused is None else self._unused.intersection(result.unused)

    def warn(self, exclude: Sequence[str]) -> None:
        """Say which patterns have left nothing out of any copy: what they were to keep back may be there now."""
        for pattern in dict.fromkeys(exclude):
            if pattern in (self._unused or ()):
                text = (
                    f"--exclude {shlex.quote(pattern)} left nothing out: it is a name, or a path below what is copied"
                )
                errors().print(one_line(text), markup=False, soft_wrap=True, style="yellow")

    def done(self, outcome: HostOutcome) -> None:
        """Say how it ended on a host."""
        host = outcome.host
        with self._lock:
            if self._bars is not None and host in self._tasks:
                self._bars.remove_task(self._tasks.pop(host))
        for name in self._left_out.get(host, ()):
            errors().print(f"{host}: left out: {one_line(name)}", markup=False, soft_wrap=True)
        if outcome.error:
            error = "\n".join(lines_of(outcome.error))
            errors().print(Text.assemble((f"{host}:", "bold red"), " ", error), soft_wrap=True)
        elif not self._quiet:
            files, size, skipped, seconds = self._sums[host]
            same = f", {skipped:.0f} unchanged" if skipped else ""
            # Of little that comes late it would be the rate of waiting.
            rate = f", {megabytes(size / seconds)}/s" if seconds > 0.5 and size > _LITTLE and not skipped else ""
            text = f"{host}: {counted(files, 'file')}, {megabytes(size)} in {seconds:.1f} s{rate}{same}"
            # Bars that do not know of a line that is printed below them would overwrite it.
            out = errors() if self._bars is not None and output().is_terminal else output()
            out.print(text, markup=False, soft_wrap=True)
