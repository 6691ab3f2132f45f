"""The same task on all hosts of a group: started, detached, waited for."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from lazycluster.core import event_loop
from lazycluster.runtime.reachability import ReachabilityCache, checked_network
from lazycluster.runtime.registry import join_all
from lazycluster.runtimes import Runtime
from lazycluster.tasks.context import ExecutionOptions
from lazycluster.tasks.detached import DetachedTask, detachable_calls
from lazycluster.tasks.step_runner import pickle_calls
from lazycluster.tasks.steps import GetFile, Step, manager_path
from lazycluster.tasks.task import RuntimeTask
from lazycluster.utils import safe_name

from .members import ask_all
from .shared_filesystems import send_locks

__all__ = ["detach_on", "detached_tasks_on", "join_or_end", "send_to_all", "start_on_all"]


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
        runtime._context()  # raises if one cannot be used any more, before any is given work
    options = replace(options, calls=pickle_calls(task.steps))

    locks = event_loop.run(send_locks(runtimes, task.steps))
    started: list[RuntimeTask] = []
    try:
        for runtime, lock in zip(runtimes, locks, strict=True):
            own = task._with_steps([_for_host(step, runtime.host) for step in task.steps])
            started.append(runtime._start_task(own, replace(options, send_lock=lock)))
    except BaseException:
        for other in started:
            other.cancel()
        raise
    return started


def send_to_all(
    runtimes: Sequence[Runtime],
    local_path: str | os.PathLike[str],
    remote_path: str | None,
    network: str,
    reachability: ReachabilityCache,
) -> list[RuntimeTask]:
    """Start to send a file or directory to some runtimes.

    Args:
        runtimes: The runtimes.
        local_path: What to send.
        remote_path: Where to.
        network: ``tunnel``, ``direct`` or ``auto``, see `RuntimeGroup.send_file`.
        reachability: What is known of which hosts reach each other.

    Returns:
        The tasks, in the order of the runtimes.
    """
    task = RuntimeTask("send-file").send_file(local_path, remote_path)
    if checked_network(network) == "tunnel":
        return start_on_all(runtimes, task, ExecutionOptions())
    from .direct_copy import DirectCopy, DirectTarget

    locks = event_loop.run(send_locks(runtimes, task.steps))
    # Of those that share a file system one gets it, and the others find it there.
    writing = [one for index, one in enumerate(runtimes) if locks[index] is None or locks[index] not in locks[:index]]
    targets = [
        DirectTarget(one.host, context.connection, context.cwd, dict(context.env), one._session.spec.address)
        for one in writing
        for context in [one._context()]
    ]
    copy = DirectCopy(targets, local_path, remote_path, network, reachability)
    return start_on_all(runtimes, task, ExecutionOptions(send=copy.send))


def _for_host(step: Step, host: str) -> Step:
    """Return a step as it is for one of several hosts: a file that is fetched goes to ``<directory>/<host>/<name>``."""
    if not isinstance(step, GetFile):
        return step
    name = PurePath(step.remote_path).name or "file"
    if step.local_path is None:
        directory = Path()
    else:
        local = manager_path(step.local_path)
        if step.local_path.endswith(os.sep) or local.is_dir():
            directory = local
        else:
            directory, name = local.parent, local.name
    return GetFile(step.remote_path, str(directory / safe_name(host) / name))


def join_or_end(tasks: Sequence[RuntimeTask]) -> None:
    """Wait for the end of some tasks; after Ctrl-C they are cancelled, and what they left is removed."""
    try:
        join_all(tasks)
    except (KeyboardInterrupt, SystemExit):
        for task in tasks:
            task.cancel()
        for task in tasks:
            task.cleanup()
        raise


def detach_on(runtimes: Sequence[Runtime], task: RuntimeTask) -> list[DetachedTask]:
    """Start a task that does not end with this process on each of some hosts at once.

    Args:
        runtimes: The hosts.
        task: The task.

    Returns:
        The detached tasks, in the order of the hosts.

    Raises:
        LazyclusterError: If it cannot be started on one; those that were are removed.
    """
    calls = detachable_calls(task)

    async def start() -> list[DetachedTask]:
        starting = [asyncio.ensure_future(runtime._detach_async(task, calls)) for runtime in runtimes]
        try:
            return list(await asyncio.gather(*starting))
        except BaseException:
            settled = await asyncio.gather(*starting, return_exceptions=True)
            begun = [one for one in settled if isinstance(one, DetachedTask)]
            await asyncio.gather(*(one._remove_async() for one in begun), return_exceptions=True)
            raise

    return event_loop.run(start())


def detached_tasks_on(runtimes: Sequence[Runtime]) -> list[DetachedTask]:
    """Return the detached tasks of some hosts, the oldest first; hosts that do not answer are left out.

    Raises:
        LazyclusterError: If none answers.
    """
    answers = event_loop.run(
        ask_all(runtimes, lambda runtime: runtime._detached_tasks_async(), "its detached tasks are not listed")
    )
    return sorted((task for found in answers.values() for task in found), key=lambda task: task.created)
