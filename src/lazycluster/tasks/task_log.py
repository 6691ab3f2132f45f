"""The output of a task: streamed to its log file as it comes, the end of it kept in memory."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from lazycluster.output.lines import Lines, Tail
from lazycluster.utils import new_log_file_path

__all__ = ["TaskLog"]

_logger = logging.getLogger("lazycluster")


class TaskLog:
    """Takes the output of one execution of a task, step by step.

    The file holds exactly the bytes that came. It is made when the first of them comes.

    Args:
        host: The host, for the prefix of what is printed live.
        task: The task's name.
        debug: Print each line to standard output as it comes; else each step's output is logged when it is over.
    """

    def __init__(self, host: str, task: str, debug: bool) -> None:
        self._host, self._task = host, task
        self._live = Lines(host) if debug else None
        self._tail = Tail()
        self._fd = -1
        self.path: Path | None = None
        try:
            self.path = new_log_file_path(host, task)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        # The work matters more than its log, the end of which still is in memory.
        _logger.warning("task %s on %s: its log file cannot be written: %s", self._task, self._host, error)
        self.path = None
        self.close()

    def write(self, data: bytes) -> None:
        """Take output of the current step."""
        self._tail.put(data)
        if self.path is not None:
            try:
                self._write(data)
            except OSError as error:
                self._give_up(error)
        if self._live is not None:
            self._live.feed(data)

    def _write(self, data: bytes) -> None:
        if self._fd < 0:
            assert self.path is not None
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def end_step(self, label: str) -> str:
        """End the current step; what follows belongs to the next one.

        Args:
            label: What the step is called.

        Returns:
            Its output as text, or the end of it.
        """
        text = self._tail.text(whole_lines=False)
        if self._tail.cut:
            where = f"; all of it is in {self.path}" if self.path else ""
            text = f"[... {self._tail.cut} bytes before this were cut{where}]\n{text}"
        self._tail = Tail()
        if self._live is not None:
            self._live.end()
        elif _logger.isEnabledFor(logging.DEBUG):
            _logger.debug("%s: task %s: %s\n%s", self._host, self._task, label, text)
        # Thousands of tasks may be running, but files may be open by the hundreds only.
        self.close()
        return text

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
