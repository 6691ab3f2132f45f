"""Changes to hyperopt, so that it works with PyMongo 4, and a few things beyond that it should have had anyway.

`hyperopt.mongoexp` calls methods that PyMongo 4 has removed, though hyperopt asks for PyMongo 4. They are given back
here, as hyperopt uses them, to PyMongo's own classes; where PyMongo still has them (PyMongo 3) nothing is changed.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from timeit import default_timer
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

T = TypeVar("T")

LOGIN = {"authSource": "admin"}
AUTHORITY = "tlsCAFile"
"""Parameter of an address that says by which certificate a database is known."""

_PATIENCE = 60.0  # seconds that one waits for a server that is being started again
_clients: dict[tuple[Any, ...], Any] = {}
_trusted: dict[tuple[str, int], str] = {}  # the file with the certificate by which the database at an address is known
_connecting = threading.Lock()
_loaded = False
_searching = threading.local()  # as `look`: the `_Look` of the search that runs in this thread
_NEW, _DONE, _ERROR = 0, 2, 3  # as in hyperopt.base
_REASON = 1000  # characters of an error
_PART = 200  # characters of a part of a result
_ENDED = (
    "the cluster has ended while the search ran: cleanup() was called\n  Next step: start one on the same dbpath, and "
    "call fmin with the same exp_key: the trials are kept"
)
_LOOK_EVERY = 1.0  # seconds, as often as hyperopt does when its queue is full
no_workers: Callable[[str], Exception] = RuntimeError
"""The error of a search whose trials nobody will evaluate, or none of which has succeeded."""


def load() -> Any:
    """Import `hyperopt.mongoexp`, made to work. Doing it again does nothing.

    Returns:
        The module.

    Raises:
        ImportError: If hyperopt or PyMongo is not installed.
    """
    global _loaded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hyperopt's own imports are deprecated ones
        import pymongo  # noqa: F401  (hyperopt swallows the error that says it is missing)
        from hyperopt import base, mongoexp
    if not _loaded:
        _loaded = True
        _give_back_methods()
        mongoexp.connection_with_tunnel = functools.partial(_connect, mongoexp.connection_with_tunnel)
        mongoexp.connection_from_string = functools.partial(_connect_to_address, mongoexp.connection_from_string)
        _make_patient(mongoexp)
        _make_watchful(mongoexp.MongoTrials)
        _keep_limits(mongoexp.MongoTrials)
        _tell_reasons(mongoexp.MongoTrials)
        _keep_attachments_readable(mongoexp.MongoTrials)
        _take_numpy_booleans(base, mongoexp)
    return mongoexp


# --- PyMongo -------------------------------------------------------------------------------------
def _give_back_methods() -> None:
    from pymongo.collection import Collection
    from pymongo.cursor import Cursor

    methods: dict[str, Callable[..., Any]] = {
        "find_and_modify": find_and_modify,
        "insert": insert,
        "update": update,
        "remove": remove,
        "count": count,
    }
    for name, method in methods.items():
        if not hasattr(Collection, name):
            setattr(Collection, name, method)
    if not hasattr(Cursor, "count"):
        Cursor.count = _count_of_cursor  # type: ignore[attr-defined]


def patient(action: Callable[[], T]) -> T:
    """Do something that may be repeated, also while the server is being started again.

    Args:
        action: What to do. It may have been carried out though its answer was lost.
    """
    from pymongo.errors import ConnectionFailure, InvalidOperation

    deadline = time.monotonic() + _PATIENCE
    pause = 0.05
    while True:
        try:
            return action()
        except InvalidOperation as error:
            if "after close" not in str(error):
                raise
            raise no_workers(_ENDED) from None
        except ConnectionFailure:
            if time.monotonic() > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def unreachable(error: Exception) -> str:
    """Return what PyMongo says of a database that does not answer, without all that it knows of its servers."""
    text = str(error).partition(", Timeout:")[0].partition(" (configured timeouts")[0]
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"another program than the database of this cluster listens on its port: {text}"
    return f"the database cannot be reached: {text}"


def find_and_modify(
    self: Any, query: Any, update: Any, upsert: bool = False, sort: Any = None, new: bool = False, **_: Any
) -> Any:
    """Change one document and return it, or what it was."""
    return self.find_one_and_update(query, update, upsert=upsert, sort=sort, return_document=new)


def insert(self: Any, document: Any, **_: Any) -> Any:
    """Insert a document, or several; returns the id, or a list of them."""
    from bson import ObjectId
    from pymongo.errors import DuplicateKeyError

    if not isinstance(document, dict):
        return [insert(self, one) for one in document]
    document.setdefault("_id", ObjectId())
    repeated = False

    def write() -> None:
        nonlocal repeated
        try:
            self.insert_one(document)
        except DuplicateKeyError:
            if not repeated:  # else the first attempt was carried out, and only its answer was lost
                raise
        finally:
            repeated = True

    patient(write)
    return document["_id"]


def update(self: Any, query: Any, changes: Any, upsert: bool = False, multi: bool = False, **_: Any) -> Any:
    """Change one document, or all that fulfil a condition."""
    if not any(name.startswith("$") for name in changes):
        return self.replace_one(query, changes, upsert=upsert).raw_result
    change = self.update_many if multi else self.update_one
    result = patient(lambda: change(query, changes, upsert=upsert))
    return result.raw_result


def remove(self: Any, condition: Any = None, multi: bool = True, **_: Any) -> Any:
    """Delete documents: those that fulfil a condition, or the one with an id."""
    if condition is not None and not isinstance(condition, dict):
        condition = {"_id": condition}
    elif condition and "_id" in condition:
        condition = {"_id": condition["_id"]}  # hyperopt passes what is left of a document
    delete = self.delete_many if multi else self.delete_one
    return delete(condition or {}).raw_result


def count(self: Any, filter: Any = None, **_: Any) -> int:
    """Return the number of documents that fulfil a condition."""
    return int(self.count_documents(filter or {}))


def _count_of_cursor(self: Any, with_limit_and_skip: bool = False) -> int:
    # The attribute has been there since PyMongo 2; it is the only place where a cursor knows what was asked for.
    conditions = getattr(self, "_spec", None)
    if conditions is None:
        conditions = getattr(self, "_Cursor__spec", {})
    return int(self.collection.count_documents(conditions))


# --- hyperopt ------------------------------------------------------------------------------------
def _connect(
    original: Callable[..., Any],
    dbname: str,
    host: str = "localhost",
    auth_dbname: str | None = None,
    port: int = 27017,
    ssh: bool = False,
    user: str | None = "hyperopt",
    pw: str | None = None,
) -> tuple[Any, Any]:
    """Connect as hyperopt does, but log in the way that PyMongo 4 still has.

    All trials of a database share one client, which is safe: nothing in hyperopt would ever close it.
    """
    if ssh or not user:
        connected: tuple[Any, Any] = original(dbname, host, auth_dbname, port, ssh, user, pw)
        return connected
    from bson import SON
    from hyperopt import mongoexp
    from pymongo import MongoClient

    password = pw or mongoexp.read_pw()
    source = auth_dbname or ("admin" if user == "hyperopt" else dbname)
    tls = tls_options(host, port)
    key = (os.getpid(), host, port, user, password, source, tls.get(AUTHORITY))
    with _connecting:
        if key not in _clients:
            login: dict[str, Any] = {"username": user, "password": password, "authSource": source, **tls}
            _clients[key] = MongoClient(host, port, document_class=SON, w=1, journal=True, **login)
        return _clients[key], None


def _connect_to_address(original: Callable[..., Any], address: str) -> Any:
    """Connect as hyperopt does, which does not look at what an address says of TLS."""
    found = urlsplit(address)
    authority = parse_qs(found.query).get(AUTHORITY)
    if authority and found.hostname and found.port:
        trust(found.hostname, found.port, authority[-1])
    return original(address)


def trust(host: str, port: int, authority: str) -> None:
    """Have the database at an address known by the certificate in a file."""
    _trusted[host, port] = authority


def tls_options(host: str, port: int) -> dict[str, Any]:
    """Return how a client makes sure that a database is the right one."""
    authority = _trusted.get((host, port))
    return {"tls": True, AUTHORITY: authority} if authority else {}


def close_clients(port: int) -> None:
    """Close what is connected to a server on this machine, which is about to end."""
    with _connecting:
        for address in [address for address in _trusted if address[1] == port]:
            del _trusted[address]
        for key in [key for key in _clients if key[0] == os.getpid() and key[2] == port]:
            _clients.pop(key).close()


_OF_SEARCHES = ("refresh_tids", "count_by_state_unsynced", "new_trial_ids")
_OF_DATABASES = ("create_indexes", "get_attachment")
_OF_FILES = ("put", "delete", "exists", "list")  # a file whose chunks were written in part is one that is not there


def _make_patient(mongoexp: Any) -> None:
    """Have a search wait for a server that is being started again: PyMongo tries only twice, and both at once."""
    for kind, names in ((mongoexp.MongoTrials, _OF_SEARCHES), (mongoexp.MongoJobs, _OF_DATABASES)):
        for name in names:
            setattr(kind, name, _patiently(getattr(kind, name)))
    initialize = mongoexp.MongoJobs.__init__

    @functools.wraps(initialize)
    def with_patient_files(self: Any, *arguments: Any, **options: Any) -> None:
        initialize(self, *arguments, **options)
        for name in _OF_FILES:
            setattr(self.gfs, name, _patiently(getattr(self.gfs, name)))

    mongoexp.MongoJobs.__init__ = with_patient_files


def _patiently(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        return patient(lambda: method(*arguments, **options))

    return call


def _make_watchful(trials: Any) -> None:
    """Have a search end with an error when nobody is left who could evaluate its trials."""
    counted = trials.count_by_state_unsynced

    @functools.wraps(counted)
    def count_by_state_unsynced(self: Any, arg: Any) -> Any:
        number = counted(self, arg)
        problem = told_problem(self.handle.db) if number and arg != _DONE else None
        if problem:
            raise no_workers(problem)
        return number

    trials.count_by_state_unsynced = count_by_state_unsynced


def _tell_reasons(trials: Any) -> None:
    """Have a search that has no result say why, and one whose cluster has ended that it has."""
    search = trials.fmin

    @functools.wraps(search)
    def fmin(self: Any, *arguments: Any, **options: Any) -> Any:
        from hyperopt.exceptions import AllTrialsFailed
        from pymongo.errors import InvalidOperation

        try:
            return search(self, *arguments, **options)
        except InvalidOperation as error:
            if "after close" not in str(error):
                raise
            raise no_workers(_ENDED) from None
        except AllTrialsFailed as error:
            raise AllTrialsFailed(without_result(self)) from error
        except Exception as error:
            if not str(error).startswith("There are no evaluation tasks") or not (reason := without_result(self)):
                raise
            raise no_workers(reason) from None

    trials.fmin = fmin


def without_result(trials: Any) -> str:
    """Return why a search has no result; "" if it has no trials.

    Args:
        trials: The trials of the search.
    """
    query = {} if trials._exp_key is None else {"exp_key": trials._exp_key}
    jobs = trials.handle.jobs
    failed, done = (patient(lambda: jobs.count_documents({**query, "state": state})) for state in (_ERROR, _DONE))  # noqa: B023
    parts = [f"{failed} of {failed + done} trials failed"] if failed else []
    first = patient(lambda: jobs.find_one({**query, "state": _ERROR}, sort=[("tid", 1)]))
    if first is not None:
        reason = ": ".join(map(str, first.get("error") or ["for an unknown reason"]))
        parts.append(f"the first, trial {first['tid']}: {reason[:_REASON]}")
    if done:
        parts.append(f"{done} returned no loss with the status 'ok'")
    if not parts:
        return ""
    text = f"the search has no result: {'; '.join(parts)}"
    if first is None or "Next step: " in text:
        return text
    return f"{text}\n  Next step: its traceback is trials.handle.jobs.find_one({{'tid': {first['tid']}}})['traceback']"


class UnstorableError(TypeError):
    """A trial's result cannot be stored.

    Args:
        detail: Which part of it, and why.
    """

    def __init__(self, detail: str) -> None:
        super().__init__(
            f"what the objective returned cannot be stored in the database: {detail}\n  Next step: return numbers, "
            "text, lists and dictionaries, and the rest as an attachment: "
            "{'status': 'ok', 'loss': ..., 'attachments': {'model': pickle.dumps(model)}}"
        )

    def __str__(self) -> str:
        return str(self.args[0])  # hyperopt adds all that the part is in


def _keep_limits(trials: Any) -> None:
    """Have `fmin` look at its limits every second, also while workers take trials as fast as it queues them.

    It queues until the queue is full, and looks then. So now and then it is told that the queue is full.
    """
    search_class = sys.modules["hyperopt.fmin"].FMinIter
    run, insert, counted = search_class.run, trials.insert_trial_docs, trials.count_by_state_unsynced

    @functools.wraps(run)
    def run_within_limits(self: Any, *arguments: Any, **options: Any) -> Any:
        limited = self.timeout is not None or self.loss_threshold is not None or self.early_stop_fn is not None
        if not limited or not isinstance(self.trials, trials):
            return run(self, *arguments, **options)
        if self.early_stop_fn is not None and not hasattr(self.early_stop_fn, "of_finished_trials"):
            self.early_stop_fn = _of_finished_trials(self.early_stop_fn)
        outer = getattr(_searching, "look", None)
        look = _searching.look = _Look(self)
        try:
            return run(self, *arguments, **options)
        finally:
            look.end()
            _searching.look = outer

    @functools.wraps(insert)
    def insert_trial_docs(self: Any, *arguments: Any, **options: Any) -> Any:
        look = _look_for(self)
        if look is not None:
            look.queued = True
        return insert(self, *arguments, **options)

    @functools.wraps(counted)
    def count_by_state_unsynced(self: Any, arg: Any) -> Any:
        look = _look_for(self)
        number = counted(self, arg)
        return number if look is None or arg != _NEW else look.queue_length(number)

    search_class.run, trials.insert_trial_docs = run_within_limits, insert_trial_docs
    trials.count_by_state_unsynced = count_by_state_unsynced


def _look_for(trials: Any) -> _Look | None:
    """Return that of the search which runs in this thread with these trials; other searches may share them."""
    look: _Look | None = getattr(_searching, "look", None)
    return look if look is not None and look.search.trials is trials else None


def _of_finished_trials(early_stop_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same for a search whose last trial has seldom a result: hyperopt's own look at that of the last."""
    from hyperopt import base

    @functools.wraps(early_stop_fn)
    def stops(trials: Any, *state: Any) -> Any:
        finished = [trial for trial in trials.trials if trial["state"] == _DONE]
        return early_stop_fn(base.trials_from_docs(finished, validate=False), *state) if finished else (False, state)

    stops.of_finished_trials = True  # type: ignore[attr-defined]
    return stops


class _Look:
    """The time since a search has looked at its limits.

    Attributes:
        search: The search, a `FMinIter` of hyperopt.
        queued: Whether trials were queued since the length of the queue was asked for.
    """

    def __init__(self, search: Any) -> None:
        self.search = search
        self._pause = search.poll_interval_secs
        self._began = time.monotonic()
        self.queued = False

    def queue_length(self, number: int) -> int:
        """Return the length of the queue, or, if a look is due, a length at which the search looks."""
        if not self.queued:  # it has just looked
            self.end()
            self._began = time.monotonic()
            return number
        self.queued = False
        timeout = self.search.timeout
        over = timeout is not None and default_timer() - self.search.start_time >= timeout
        if number >= self.search.max_queue_len or not (over or time.monotonic() - self._began >= _LOOK_EVERY):
            return number
        self.search.poll_interval_secs = 0.0  # workers wait for trials: it is only to look
        return int(self.search.max_queue_len)

    def end(self) -> None:
        """Have the search pause again as it would."""
        self.search.poll_interval_secs = self._pause


def tell_problem(database: Any, problem: str | None) -> None:
    """Note why no trial will be evaluated any more; None: because they are, all is well."""
    database.lazycluster.update_one({"_id": "workers"}, {"$set": {"problem": problem}}, upsert=True)


def told_problem(database: Any) -> str | None:
    """Return why no trial will be evaluated any more, None if they are."""
    found = patient(lambda: database.lazycluster.find_one({"_id": "workers"})) or {}
    problem: str | None = found.get("problem")
    return problem


def _keep_attachments_readable(trials: Any) -> None:
    """Have an attachment replaced without a moment in which there is none.

    A search that is resumed replaces the objective while workers evaluate what was left of it.
    """
    from gridfs.errors import CorruptGridFile

    original = trials.attachments.fget

    def attachments(self: Any) -> Any:
        found = original(self)
        files = self.handle.gfs
        query = {"exp_key": self._exp_key} if self._exp_key else {}
        get = _patiently(type(found).__getitem__)

        def getitem(self: Any, name: str) -> Any:
            try:
                return get(self, name)
            except CorruptGridFile:  # it was being replaced
                return get(self, name)

        def setitem(self: Any, name: str, value: Any) -> None:
            old = patient(lambda: [file._id for file in files.find({"filename": name, **query})])
            files.put(value, filename=name, encoding="utf-8", **query)
            for number in old:
                files.delete(number)

        kind = type(found)  # hyperopt makes one each time
        kind.__getitem__, kind.__setitem__ = getitem, setitem
        return found

    trials.attachments = property(attachments)


def _take_numpy_booleans(base: Any, mongoexp: Any) -> None:
    """Have results with numpy's own booleans taken as results with booleans, and others refused with a reason."""
    import numpy

    original = base.SONify

    def sonify(arg: Any, memo: Any = None) -> Any:
        try:
            return original(bool(arg) if isinstance(arg, numpy.bool_) else arg, memo)
        except TypeError as error:
            if error.args[:1] != ("SONify",):
                raise
            raise UnstorableError(f"{str(arg)[:_PART]} is a {type(arg).__name__}") from None

    base.SONify = mongoexp.SONify = sonify
