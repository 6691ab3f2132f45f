"""Detached tasks on several hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from lazycluster.core import event_loop
from lazycluster.runtimes import Runtime
from lazycluster.tasks.detached import DetachedTask, detachable_calls
from lazycluster.tasks.task import RuntimeTask

from .members import answers_of

__all__ = ["detach_on", "detached_on"]


def detach_on(runtimes: Sequence[Runtime], task: RuntimeTask) -> list[DetachedTask]:
    """Start a task that does not end with this process on each of some hosts, at once.

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
        starting = [asyncio.ensure_future(runtime.detach_soon(task, calls)) for runtime in runtimes]
        try:
            return list(await asyncio.gather(*starting))
        except BaseException:
            settled = await asyncio.gather(*starting, return_exceptions=True)
            begun = [one for one in settled if isinstance(one, DetachedTask)]
            await asyncio.gather(*(one._remove_async() for one in begun), return_exceptions=True)
            raise

    return event_loop.run(start())


def detached_on(runtimes: Sequence[Runtime]) -> list[DetachedTask]:
    """Return the detached tasks of some hosts, the oldest first; hosts that do not answer are left out.

    Raises:
        LazyclusterError: If none answers.
    """
    answers = event_loop.run(
        answers_of(runtimes, lambda runtime: runtime.detached_tasks_soon(), "its detached tasks are not listed")
    )
    return sorted((task for found in answers.values() for task in found), key=lambda task: task.created)
