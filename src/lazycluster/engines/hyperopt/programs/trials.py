"""Trials whose worker has gone: back into the queue, a few times."""

from __future__ import annotations

import datetime
from typing import Any

NEW, RUNNING, DONE, ERROR = 0, 1, 2, 3  # as in hyperopt.base
READY, CUT_OFF = b"r", b"c"  # what the process that evaluates trials says to the one that watches it
MOST_ATTEMPTS = 3
"""Number of times that a trial is put back before it counts as failed: it may be what kills the workers."""
BEATS = 6
"""Number of times that a lease is renewed, and looked at, within the time that it lasts."""
_KEPT = ["version", "attempts"]


def now() -> datetime.datetime:
    """Return the time as hyperopt stores it: UTC, without a time zone, to the millisecond."""
    moment = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def put_back(jobs: Any, owner: str | None, reason: str, final: bool = False) -> int:
    """Put trials that nobody works on any more back into the queue.

    They have no owner then: the server refuses whatever the old one may still want to write.

    Args:
        jobs: The collection of trials.
        owner: Whose trials: the name of a worker, or of one of its processes; None: everybody's.
        reason: What happened.
        final: Whether they have failed, and are not tried again.

    Returns:
        How many there were.
    """
    query: dict[str, Any] = {"state": RUNNING}
    if owner is not None:
        query["owner"] = owner
    # That the manager was ended is no trial's fault.
    counts = owner is not None
    return sum(_put_back(jobs, trial, {}, reason, final, counts) for trial in list(jobs.find(query, projection=_KEPT)))


def leased(jobs: Any) -> list[Any]:
    """Return what the leases of all trials that are being evaluated look like."""
    return list(jobs.find({"state": RUNNING, "lease": {"$exists": True}}, projection=[*_KEPT, "owner", "lease"]))


def expire(jobs: Any, trial: Any, reason: str) -> bool:
    """Put a trial back whose lease has ended, unless it was renewed meanwhile; tells whether it was not."""
    return _put_back(jobs, trial, {"lease": trial["lease"]}, reason, False, True)


def _put_back(jobs: Any, trial: Any, guard: dict[str, Any], reason: str, final: bool, counts: bool) -> bool:
    guard = {"_id": trial["_id"], "version": trial["version"], "state": RUNNING, **guard}
    attempts = trial.get("attempts", 0) + counts
    if final or attempts > MOST_ATTEMPTS:
        text = reason if final else f"{reason}; this was attempt {attempts}"
        changes = {"state": ERROR, "error": ["WorkerDied", text], "refresh_time": now()}
    else:
        changes = {"state": NEW, "owner": None, "book_time": None, "attempts": attempts}
    # Whoever takes it next may be a worker of hyperopt's own, who renews no lease.
    update = {"$set": changes, "$unset": {"lease": ""}, "$inc": {"version": 1}}
    return bool(jobs.update_one(guard, update).modified_count)


def fail(jobs: Any, trial: Any, owner: str, error: BaseException, traceback: str) -> None:
    """Note that a trial has failed, with its traceback, unless it is somebody else's by now."""
    text = [type(error).__name__, str(error)]
    changes = {
        "state": ERROR,
        "error": [encodable(part) for part in text],
        "traceback": encodable(traceback),
        "refresh_time": now(),
    }
    guard = {"_id": trial["_id"], "owner": owner, "state": {"$in": [RUNNING, ERROR]}}
    jobs.update_one(guard, {"$set": changes, "$inc": {"version": 1}})


def encodable(text: str, most: int = 100_000) -> str:
    """Return the end of a text with what BSON cannot hold written out."""
    return text[-most:].encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\0")
