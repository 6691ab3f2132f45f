"""What runs while something goes wrong: work whose result can be checked, and what became of it."""

from __future__ import annotations

import abc
import faulthandler
import hashlib
import itertools
import os
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import work
from scenes import Scene

from lazycluster import RuntimeTask
from lazycluster.exceptions import LazyclusterError

_ENGINES = ("distributed", "pymongo", "dask")
_numbers = itertools.count()


class WrongResultError(Exception):
    """A load has ended as if all were well, and its result is wrong."""


@dataclass(frozen=True)
class Outcome:
    """What became of a load.

    Attributes:
        kind: ``right``, ``clear error``, ``unclear error``, ``wrong`` or ``hung``.
        seconds: How long it took, from the fault on.
        retries: How often a part of it had to be begun anew by whoever runs it, beyond what the library does itself.
        detail: The error, with its text; where it hangs.
    """

    kind: str
    seconds: float = 0
    retries: int = 0
    detail: str = ""

    def __str__(self) -> str:
        if self.kind == "right":
            return f"survived, begun anew {self.retries} times" if self.retries > 1 else self._survived()
        return f"{self.kind} in {self.seconds:.0f} s"

    def _survived(self) -> str:
        return "survived, begun anew" if self.retries else "survived"


class Load(abc.ABC):
    """Work on the hosts of a scene; one object for one time.

    Args:
        scene: Where.
        small: Whether little of it is to go over the links.

    Attributes:
        under_way: Set when it is in the middle of its work.
        retries: See `Outcome`.
    """

    name: ClassVar[str]

    def __init__(self, scene: Scene, small: bool = False) -> None:
        self.scene = scene
        self.small = small
        self.under_way = threading.Event()
        self.retries = 0
        self.number = next(_numbers)

    @abc.abstractmethod
    def run(self) -> None:
        """Do the work, and check what comes out.

        Raises:
            WrongResultError: That is wrong.
        """


def expect(found: Any, wanted: Any, what: str) -> None:
    """Refuse a result that is not what it must be."""
    if found != wanted:
        raise WrongResultError(f"{what}: {str(found)[:300]!r} instead of {str(wanted)[:300]!r}")


# --- tasks ------------------------------------------------------------------------------------------------
_COUNT = "i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo line $i; sleep 0.05; done"
_LINES = "".join(f"line {number}\n" for number in range(1, 61))


class Tasks(Load):
    """On every host tasks of a command whose output is known and a function whose result is; with retries."""

    name = "tasks"
    PER_HOST = 2

    def run(self) -> None:
        """Run them, and look at the logs and results of all."""
        group = self.scene.group
        started = []
        for number in range(self.PER_HOST * group.runtime_count):
            task = RuntimeTask(f"load-{self.number}-{number}").run_command(_COUNT).call(work.digest, number)
            started.append(group.execute_task(task, retries=10, retry_on="any"))
        first = started[0]
        threading.Thread(target=self._tell, args=[first], daemon=True).start()
        for number, task in enumerate(started):
            task.join()
            wanted = hashlib.sha256(bytes([number % 256]) * 60_000_000).hexdigest()
            # A shell that may not start a process says so, waits, and tries again.
            counted, *rest = task.execution_log
            counted = "".join(line for line in counted.splitlines(True) if "fork: retry" not in line)
            expect([counted, *rest], [_LINES, f"digested {number}\n"], f"the log of task {number}")
            expect(task.result(), wanted, f"the result of task {number}")
        group.clear_tasks()

    def _tell(self, task: Any) -> None:
        while not task.future.done() and not self.under_way.is_set():
            path = task.execution_log_file_path
            if path and os.path.exists(path) and "line 20" in Path(path).read_text():
                self.under_way.set()
            time.sleep(0.02)
        self.under_way.set()


# --- files ------------------------------------------------------------------------------------------------
def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _slow_sum(file)


def _slow_sum(file: Any) -> str:
    found = hashlib.sha256()
    while part := file.read(1 << 20):
        found.update(part)
    return found.hexdigest()


class Copy(Load):
    """Files to each host and back again, compared by checksums."""

    name = "copy"
    ROUNDS = 6

    def run(self) -> None:
        """Copy, on all hosts at once, each with its own file."""
        size = 400_000 if self.small else 24_000_000
        with tempfile.TemporaryDirectory(dir=self.scene.folder) as folder:
            source = Path(folder) / "source"
            with source.open("wb") as file:
                for number in range(size // 4000):
                    file.write(number.to_bytes(4, "big") * 1000)
            wanted = _checksum(source)
            for turn in range(self.ROUNDS):
                self._round(Path(folder), source, wanted, turn)
                self.under_way.set()

    def _round(self, folder: Path, source: Path, wanted: str, turn: int) -> None:
        group, place = self.scene.group, f"~/copy-{self.number}-{turn}"
        started = []
        for host in group.hosts:
            back = folder / f"{host}-{turn}"
            task = RuntimeTask(f"copy-{host}").send_file(str(source), place).get_file(place, str(back))
            task.run_command(f"rm {place}")
            started.append((host, back, group.execute_task(task, host=host, retries=20, retry_on="host")))
        failures = []
        for _, _, task in started:  # all of them: what they fetch goes into a folder that is about to be removed
            try:
                task.join()
            except LazyclusterError as error:
                failures.append(error)
        if failures:
            raise failures[0]
        for host, back, _ in started:
            expect(_checksum(back), wanted, f"the file that was copied to {host} and back")
            back.unlink()
        group.clear_tasks()


# --- map --------------------------------------------------------------------------------------------------
class Map(Load):
    """10,000 calls, each of which must be answered once, in order."""

    name = "map"
    CALLS = 10_000

    def run(self) -> None:
        """Call, and look at each result."""
        results = self.scene.group.map(work.square, range(self.CALLS))
        count = 0
        for count, found in enumerate(results, 1):
            number = count - 1
            expect(found, (number * number, 2_000_000 if number % 50 == 0 else 0), f"the result of call {number}")
            if count == self.CALLS // 10:
                self.under_way.set()
        expect(count, self.CALLS, "the number of results")


# --- Dask -------------------------------------------------------------------------------------------------
def _chain(error: BaseException | None) -> str:
    """What an error says, and those that led to it."""
    said = []
    while error is not None:
        said.append(str(error))
        error = error.__cause__ or error.__context__
    return "; ".join(said)


class Shuffle(Load):
    """A Dask shuffle: rows go from every worker to every other one, sorted by a key."""

    name = "shuffle"
    PARTS, KEYS = 16, 1000
    LIMIT = 240.0

    def run(self) -> None:
        """Shuffle; what was lost with its scheduler, or got no disk or thread, is submitted again, as errors say."""
        from distributed import CancelledError

        for turn in range(5):
            try:
                with self.scene.dask.get_client(timeout=60) as client:
                    found = self._shuffle(client)
                break
            except (CancelledError, OSError, RuntimeError) as error:
                # distributed's errors of connections and disks are OSErrors; that of a limit of processes is below
                if turn == 4 or isinstance(error, TimeoutError):
                    raise
                if isinstance(error, RuntimeError) and "can't start new thread" not in _chain(error):
                    raise
                self.retries += 1
                time.sleep(2**turn)
        rows = 500 if self.small else 20_000
        keys, total, whole = found
        expect(whole, True, "every key in one part only")
        expect(keys, min(self.KEYS, rows), "the number of keys")
        expect(total, self.PARTS * rows * (rows - 1) // 2, "the sum over all rows")

    def _shuffle(self, client: Any) -> tuple[int, int, bool]:
        import dask.dataframe

        rows = 500 if self.small else 20_000
        parts = dask.dataframe.from_map(work.part, range(self.PARTS), rows=rows, keys=self.KEYS, salt=self.number)
        shuffled = parts.shuffle("key", npartitions=self.PARTS)
        sums = shuffled.map_partitions(work.sums, meta={"key": "i8", "value": "i8"})
        future = client.compute(sums, sync=False)
        threading.Thread(target=self._tell, args=[client, future], daemon=True).start()
        frame = future.result(timeout=self.LIMIT)
        return len(frame), int(frame["value"].sum()), bool(frame["key"].is_unique)

    def _tell(self, client: Any, future: Any) -> None:
        while not future.done() and not any(client.processing().values()):
            time.sleep(0.05)
        self.under_way.set()


class DirectShuffle(Shuffle):
    """The same, from host to host: with ``network="direct"``."""

    name = "direct shuffle"


# --- Hyperopt ---------------------------------------------------------------------------------------------
class Search(Load):
    """A Hyperopt search, all of whose trials must have been evaluated once, and rightly."""

    name = "search"
    EVALUATIONS = 40

    def run(self) -> None:
        """Search, and look at each trial."""
        import numpy
        from hyperopt import fmin, hp, rand

        cluster, key = self.scene.hyperopt, f"search-{self.number}"
        trials = cluster.trials(key)
        threading.Thread(target=self._tell, args=[cluster, key], daemon=True).start()
        space, random = hp.uniform("x", -5, 5), numpy.random.default_rng(self.number)
        best = fmin(
            work.objective, space, rand.suggest, self.EVALUATIONS, trials=trials, rstate=random, max_queue_len=20,
            show_progressbar=False,
        )  # fmt: skip
        documents = trials.trials
        expect(len({document["tid"] for document in documents}), self.EVALUATIONS, "the number of trials")
        for document in documents:
            x = document["misc"]["vals"]["x"][0]
            expect((document["state"], document["result"].get("loss")), (2, (x - 1) ** 2), f"the trial of {x}")
        wanted = min((document["misc"]["vals"]["x"][0] for document in documents), key=lambda x: (x - 1) ** 2)
        expect(best["x"], wanted, "the best of all trials")

    def _tell(self, cluster: Any, key: str) -> None:
        while not self.under_way.is_set():
            try:
                if cluster.progress(key).done >= 3:
                    break
            except Exception:  # noqa: BLE001 - whatever it is, the search itself will say
                break
            time.sleep(0.05)
        self.under_way.set()


LOADS: dict[str, type[Load]] = {load.name: load for load in (Tasks, Copy, Map, Shuffle, DirectShuffle, Search)}


# --- running ----------------------------------------------------------------------------------------------
class Running:
    """A load that runs in a thread of its own."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.began = time.monotonic()
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._ended = 0.0
        self._thread = threading.Thread(target=self._run, name=f"load-{load.name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.load.run()
        except BaseException as error:  # noqa: BLE001 - it is what is asked for
            self._error = error
        finally:
            self._ended = time.monotonic()
            self.load.under_way.set()
            self._over.set()

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._over.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait for its end, for so long; returns whether it has come."""
        return self._over.wait(seconds)

    def outcome(self, limit: float, since: float | None = None) -> Outcome:
        """Wait for its end, and say what became of it.

        Args:
            limit: Seconds after which it hangs.
            since: The moment from which seconds are counted; by default its beginning.
        """
        began = self.began if since is None else since
        if not self.wait(limit):
            return Outcome("hung", time.monotonic() - began, self.load.retries, _where(self._thread))
        self._thread.join()
        seconds, error = self._ended - began, self._error
        if error is None:
            return Outcome("right", seconds, self.load.retries)
        text = "".join(traceback.format_exception(error))
        return Outcome(_kind(error), seconds, self.load.retries, f"{type(error).__name__}: {error}\n{text}")


def _kind(error: BaseException) -> str:
    if isinstance(error, WrongResultError):
        return "wrong"
    ours = isinstance(error, LazyclusterError)
    theirs = type(error).__module__.partition(".")[0] in _ENGINES
    return "clear error" if (ours or theirs) and str(error).strip() else "unclear error"


def _where(thread: threading.Thread) -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
