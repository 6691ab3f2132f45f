"""The trials of workers that have fallen silent: back into the queue, whatever may have become of the worker."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from lazycluster.core import interruptible

from .database import connect
from .engine import HyperoptEngine
from .programs import trials

logger = logging.getLogger("lazycluster")


class LeaseKeeper:
    """Looks at the leases of trials in a thread, until it is stopped.

    Workers count theirs up while they live. A lease that stands still for too long has ended; how long is measured
    here, so that no clocks need to agree. Trials without a lease, those of hyperopt's own workers, are left alone.

    Args:
        settings: How to get at the database, and how long a lease lasts.
        port: The port of the database.
    """

    def __init__(self, settings: HyperoptEngine, port: int) -> None:
        self._lease = settings.lease
        self._client = connect(settings.access, port)
        self._jobs = self._client[settings.access.dbname].jobs
        self._seen: dict[Any, tuple[Any, float]] = {}
        self._stopping = interruptible.Event()
        self._look()
        self._thread = threading.Thread(target=self._watch, name="lazycluster-leases", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop looking."""
        self._stopping.set()
        self._thread.join()
        self._client.close()

    def _watch(self) -> None:
        step = self._lease / trials.BEATS
        last = time.monotonic()
        while not self._stopping.wait(step):
            if time.monotonic() - last > 3 * step:
                self._seen = {}  # this process stood still, and workers may have, too
            self._look()
            last = time.monotonic()

    def _look(self) -> None:
        from pymongo.errors import PyMongoError

        now = time.monotonic()
        try:
            seen = {}
            for trial in trials.leased(self._jobs):
                count = (trial["version"], trial["lease"])
                before = self._seen.get(trial["_id"])
                seen[trial["_id"]] = before if before is not None and before[0] == count else (count, now)
                if now - seen[trial["_id"]][1] > self._lease:
                    self._expire(trial)
            self._seen = seen
        except PyMongoError:  # it is being started again: nobody can renew a lease, either
            self._seen = {}

    def _expire(self, trial: Any) -> None:
        name = str(trial["owner"][0])
        if trials.expire(self._jobs, trial, f"{name} was silent for {self._lease:g} s"):
            logger.warning("%s was silent for %g s; its trial is put back into the queue", name, self._lease)
