"""Where waiting for a call would last for ever, it is an error."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable
from typing import Any

from lazycluster import LocalRuntime, RuntimeGroup, RuntimeTask
from lazycluster.exceptions import LazyclusterError


def test_callbacks_that_would_wait_for_themselves_are_told_so() -> None:
    with LocalRuntime() as local, RuntimeGroup([local]) as group, group.executor(1) as executor:
        uses: list[Callable[[], Any]] = [
            lambda: executor.submit(pow, 2, 3).result(),
            lambda: executor.submit(pow, 2, 3).exception(),
            lambda: list(group.map(pow, [2], [3])),
        ]
        told: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def callback(_: Any) -> None:
            for use in uses:
                try:
                    told.put(use())
                except LazyclusterError as error:
                    told.put(str(error))

        task = local.execute_task(RuntimeTask().run_command("sleep 0.2"))
        task.future.add_done_callback(callback)  # on the thread of the event loop
        assert all("in a callback of the library" in told.get(timeout=30) for _ in uses)
        executor.submit(time.sleep, 0.2).add_done_callback(callback)  # on that of the executor
        assert all("in a callback of the library" in told.get(timeout=30) for _ in uses[:2])
        assert told.get(timeout=30) == [8]
        assert executor.submit(pow, 2, 3).result(30) == 8


def test_a_forked_child_does_not_wait_for_calls() -> None:
    with LocalRuntime() as local, RuntimeGroup([local]).executor(1) as executor:
        future = executor.submit(time.sleep, 1)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                future.result()
            except LazyclusterError as error:
                status = 0 if "a forked child cannot wait for it" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert future.result(30) is None
