"""Detached tasks on several hosts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from lazycluster import _loop
from lazycluster.runtimes import Runtime
from lazycluster.tasks.detached import DetachedTask, checked
from lazycluster.tasks.task import RuntimeTask

__all__ = ["detach_on", "detached_on"]

_logger = logging.getLogger("lazycluster")


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
    calls = checked(task)

    async def start() -> list[DetachedTask]:
        starting = [asyncio.ensure_future(runtime.detach_soon(task, calls)) for runtime in runtimes]
        try:
            return list(await asyncio.gather(*starting))
        except BaseException:
            settled = await asyncio.gather(*starting, return_exceptions=True)
            begun = [one for one in settled if isinstance(one, DetachedTask)]
            await asyncio.gather(*(one.remove_soon() for one in begun), return_exceptions=True)
            raise

    return _loop.run(start())


def detached_on(runtimes: Sequence[Runtime]) -> list[DetachedTask]:
    """Return the detached tasks of some hosts, the oldest first; hosts that do not answer are left out.

    Raises:
        LazyclusterError: If none answers.
    """

    async def ask() -> list[list[DetachedTask] | BaseException]:
        return await asyncio.gather(*(one.detached_tasks_soon() for one in runtimes), return_exceptions=True)

    found: list[DetachedTask] = []
    errors: dict[str, Exception] = {}
    for runtime, answer in zip(runtimes, _loop.run(ask()), strict=True):
        if isinstance(answer, Exception):
            errors[runtime.host] = answer
        elif isinstance(answer, BaseException):
            raise answer
        else:
            found += answer
    if errors and len(errors) == len(runtimes):
        raise next(iter(errors.values()))
    for host, error in errors.items():
        _logger.warning("%s: its detached tasks are not listed: %s", host, error)
    return sorted(found, key=lambda one: one.created)
