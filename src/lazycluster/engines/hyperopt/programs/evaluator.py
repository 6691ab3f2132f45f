"""Takes trials from the database and evaluates them with hyperopt's own worker."""

from __future__ import annotations

import copy
import io
import os
import random
import re
import sys
import time
import traceback
import types
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from ....agent import deletion
from ....cluster.sent import messages
from ....cluster.sent.host_paths import name_host
from . import compat, objectives, trials

mongoexp = compat.load()
from bson.errors import BSONError  # noqa: E402
from gridfs import GridFS  # noqa: E402  (compat says first what is missing)
from pymongo.errors import ConnectionFailure, DocumentTooLarge  # noqa: E402

_SOON = 0.005  # seconds; after a trial the next one usually comes at once
_NUMBER = re.compile("[0-9a-f]{24}")  # of a trial, as the database gives them: no other directory is called so
_URL = "MONGO_CONNECTION_URL"
_DOMAIN = "FMinIter_Domain"  # the name of the attachment with the objective


class TrialLostError(Exception):
    """A trial is not ours any more."""


class Jobs(mongoexp.MongoJobs):  # type: ignore[misc, name-defined]
    """hyperopt's queue, for one worker process. Taking a trial waits until there is one.

    Attributes:
        current: The trial that was taken last.
        evaluated: Whether its objective has returned: what is written from then on is written in one piece, at the end.
    """

    current: Any = None
    evaluated = False
    owner: tuple[str, str] = ("", "")
    poll_interval = 0.1

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gfs = _Files(self.db, collection="fs")
        self._held: dict[str, Any] = {}

    def create_indexes(self) -> None:
        """Do nothing: the manager has made them, and this is called for each trial."""

    def update(self, doc: Any, dct: Any, collection: Any = None, do_sanity_checks: bool = True) -> Any:
        """Change a trial; the server refuses it if the trial was put back, and is somebody else's by now.

        Raises:
            TrialLostError: If so.
        """
        if "error" in dct:  # its text may have characters that cannot be stored as they are
            dct = {**dct, "error": [trials.encodable(str(part)) for part in dct["error"]]}
        if self.current is None or doc.get("_id") != self.current["_id"]:
            return super().update(doc, dct, collection, do_sanity_checks)
        self._held.update(copy.deepcopy({name: dct[name] for name in dct if name != "_id"}))
        doc.update(self._held)
        if self.evaluated and "state" not in dct:
            return doc
        version = doc["version"] + 1
        changes, self._held = {**self._held, "version": version}, {}
        mine = {"_id": doc["_id"], "owner": self.owner[1]}
        query = {**mine, "version": doc["version"]}
        try:
            result = compat.patient(lambda: self.jobs.update_one(query, {"$set": changes}))
        except (BSONError, OverflowError, DocumentTooLarge) as error:
            raise compat.UnstorableError(f"{type(error).__name__}: {error}") from None
        # Else it may have been carried out, and only the answer to a first attempt was lost.
        if not result.matched_count and not self.jobs.find_one({**mine, "version": version}, projection=["_id"]):
            raise TrialLostError(f"trial {doc['tid']} was put back: this worker was silent for too long")
        doc.update(changes)
        return doc

    def reserve(self, host_id: Any, cond: Any = None, exp_key: str | None = None) -> Any:
        """Take a trial, and wait for one if there is none."""
        self.evaluated, self._held = False, {}
        query: dict[str, Any] = {"owner": None, "state": trials.NEW}
        if exp_key is not None:
            query["exp_key"] = exp_key
        pause = _SOON
        while True:
            try:
                self.current = self._take(query)
            except ConnectionFailure:
                # It may have been carried out, and only its answer was lost.
                self.current = compat.patient(self._mine)
            if self.current is not None:
                return self.current
            time.sleep(pause * random.uniform(0.8, 1.0))
            pause = min(2 * pause, self.poll_interval)

    def _take(self, query: dict[str, Any]) -> Any:
        moment = trials.now()
        booking = {"owner": list(self.owner), "book_time": moment, "refresh_time": moment, "state": trials.RUNNING}
        booking["lease"] = 0
        return self.jobs.find_one_and_update(query, {"$set": booking}, return_document=True)

    def _mine(self) -> Any:
        return self.jobs.find_one({"owner": self.owner[1], "state": trials.RUNNING})


class _Files(GridFS):
    """hyperopt's files. The objective, which may be large, is not fetched again as long as it is the same."""

    _kept: tuple[Any, bytes] | None = None

    def get_version(self, filename: Any = None, version: Any = -1, session: Any = None, **query: Any) -> Any:
        """Return a file, open for reading."""
        found = super().get_version(filename, version, session, **query)
        if filename != _DOMAIN:
            return found
        if self._kept is None or self._kept[0] != found._id:
            self._kept = (found._id, found.read())
        return io.BytesIO(self._kept[1])


class _Domain:
    """A trial to be evaluated; tells the queue when it was."""

    def __init__(self, domain: Any, jobs: Jobs) -> None:
        self._domain = domain
        self._jobs = jobs

    def evaluate(self, *arguments: Any, **options: Any) -> Any:
        result = self._domain.evaluate(*arguments, **options)
        self._jobs.evaluated = True
        return result


def connect(settings: dict[str, Any]) -> tuple[Jobs, str]:
    """Return the queue and its address."""
    login = f"{settings['user']}:{settings['password']}@" if settings["user"] else ""
    url = f"mongo://{login}{messages.LOOPBACK}:{settings['port']}/{settings['dbname']}"
    jobs = Jobs.new_from_connection_str(url + "/jobs")
    jobs.poll_interval = settings["poll_interval"]
    return jobs, url


def serve(settings: dict[str, Any], owner: str, left: dict[str, Any], writing: int) -> NoReturn:
    """Evaluate trials for ever.

    Args:
        settings: What the manager said.
        owner: The name of this process, which no other one has.
        left: Whose trials are to be put back first, why, and whether they have failed for good.
        writing: Where to say that everything is ready, and if the database cannot be reached any more.
    """
    try:
        _serve(settings, owner, left, writing)
    except ConnectionFailure as error:
        print(f"lazycluster: {compat.unreachable(error)}", file=sys.stderr, flush=True)  # noqa: T201
        os.write(writing, trials.CUT_OFF)
        os._exit(1)


def _serve(settings: dict[str, Any], owner: str, left: dict[str, Any], writing: int) -> NoReturn:
    jobs, url = connect(settings)
    jobs.owner = (settings["name"], owner)
    mongoexp.pickler = types.SimpleNamespace(loads=lambda data: _Domain(objectives.loads(data), jobs))
    os.environ[_URL] = url  # for the user's code; it was in no environment that `ps` shows
    compat.patient(lambda: trials.put_back(jobs.jobs, left["owner"], left["reason"], left["final"]))
    root = Path(os.environ["LAZYCLUSTER_SCRATCH"], "trials")
    worker = mongoexp.MongoWorker(jobs, settings["poll_interval"], exp_key=settings["exp_key"], logfilename=None)
    messages.emit("ready", name=settings["name"])
    os.write(writing, trials.READY)
    while True:
        _clear(root)
        _evaluate_one(worker, jobs, owner)


def _clear(root: Path) -> None:
    """Remove what trials wrote into their scratch directories; the next one gets an empty place."""
    deletion.remove_tree(str(root))
    root.mkdir(exist_ok=True)
    os.chdir(root)


def _evaluate_one(worker: Any, jobs: Jobs, owner: str) -> None:
    jobs.current = None
    try:
        worker.run_one(owner, erase_created_workdir=True)
    except ConnectionFailure as failure:
        print(f"lazycluster: {compat.unreachable(failure)}", file=sys.stderr, flush=True)  # noqa: T201
        # Not the objective's fault: the trial is evaluated again.
        compat.patient(lambda: trials.put_back(jobs.jobs, owner, "the connection to the database broke"))
    except TrialLostError as lost:
        print(f"lazycluster: {lost}", file=sys.stderr, flush=True)  # noqa: T201
        _remove_scratch(jobs.current)
    except BaseException as raised:  # noqa: BLE001 - an objective that ends its interpreter has failed like any other
        error = raised
        name_host(raised, jobs.owner[0].rpartition("-")[0])
        text = traceback.format_exc()
        hint = objectives.next_step(raised)
        text += f"  Next step: {hint}\n" if hint else ""
        print(text, file=sys.stderr, flush=True)  # noqa: T201
        if jobs.current is not None:
            trial = jobs.current
            compat.patient(lambda: trials.fail(jobs.jobs, trial, owner, error, text))
            _remove_scratch(trial)


def _remove_scratch(trial: Any) -> None:
    """Remove the directory of a trial that failed: hyperopt does so only for those that succeed."""
    parent, name = trial["misc"].get("workdir"), str(trial["_id"])
    if parent and _NUMBER.fullmatch(name):
        path = Path(parent).expanduser().absolute() / name
        deletion.remove_tree(str(path))
        with suppress(OSError):
            path.with_name(path.name + ".inuse").unlink()
