"""The same task on all hosts of a group."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from lazycluster.core import event_loop
from lazycluster.runtimes import Runtime
from lazycluster.tasks.context import ExecutionOptions
from lazycluster.tasks.step_runner import pickle_calls
from lazycluster.tasks.steps import GetFile, Step, on_manager
from lazycluster.tasks.task import RuntimeTask
from lazycluster.utils import safe_name

from .shared_filesystems import gates

__all__ = ["start_on_all"]


def start_on_all(runtimes: Sequence[Runtime], task: RuntimeTask, options: ExecutionOptions) -> list[RuntimeTask]:
    """Start a copy of a task on each of some runtimes.

    Functions are pickled once. What is fetched goes into a directory of each host. Where hosts share a file system,
    what is sent is sent once.

    Args:
        runtimes: The runtimes.
        task: The task.
        options: The options of each execution.

    Returns:
        The copies, in the order of the runtimes. If one cannot be started, those that were are ended.
    """
    if not task.steps:
        raise ValueError(f"task {task.name!r} has no steps: add one, e.g. with run_command()")
    for runtime in runtimes:
        runtime.task_context()  # raises if one cannot be used any more, before any is given work
    options = replace(options, calls=pickle_calls(task.steps))
    locks = event_loop.run(gates(runtimes, task.steps))
    started: list[RuntimeTask] = []
    try:
        for runtime, lock in zip(runtimes, locks, strict=True):
            own = task._with_steps([_for_host(step, runtime.host) for step in task.steps])
            started.append(runtime.start_task(own, replace(options, send_lock=lock)))
    except BaseException:
        for other in started:
            other.cancel()
        raise
    return started


def _for_host(step: Step, host: str) -> Step:
    """Return a step as it is for one of several hosts: a file that is fetched goes to ``<directory>/<host>/<name>``."""
    if not isinstance(step, GetFile):
        return step
    name = PurePath(step.remote_path).name or "file"
    if step.local_path is None:
        directory = Path()
    else:
        local = on_manager(step.local_path)
        if step.local_path.endswith(os.sep) or local.is_dir():
            directory = local
        else:
            directory, name = local.parent, local.name
    return GetFile(step.remote_path, str(directory / safe_name(host) / name))
