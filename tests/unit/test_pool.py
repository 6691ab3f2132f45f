"""What pools are made of: packing, sizes, streams, what is shared."""

from __future__ import annotations

import logging
import pickle
import random
import subprocess
import sys
import threading
import types
from collections import deque
from typing import Any

import pytest

from lazycluster.agent.pool_protocol import ANSWER, BROKEN, CHUNK, LOCAL_CHUNK, MIXED, RETURNED
from lazycluster.pool.blob_store import BlobStore, SharedArrays
from lazycluster.pool.chunks import ChunkResult, read_results
from lazycluster.pool.executor import gpus_of, worker_counts
from lazycluster.pool.remote_pool import ResultDecoder, worker_lines
from lazycluster.pool.scheduler import ChunkScheduler
from lazycluster.pool.serialization import FunctionCache, Packed, cache_key, pack, pack_calls

# --- packing -----------------------------------------------------------------------------------------------
FACTOR: Any = 2


def scaled(x: int) -> int:
    return x * FACTOR


def plain(x: int, y: int = 1) -> int:
    return x + y


class Local:
    pass


def test_equal_functions_are_packed_once_and_changed_ones_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    packer = FunctionCache()
    assert packer.pack(plain) is packer.pack(plain)
    first = packer.pack(scaled)
    assert packer.pack(scaled) is first
    monkeypatch.setitem(globals(), "FACTOR", 3)
    assert packer.pack(scaled).digest != first.digest
    states = []
    for value in (1, 1.0, True, 0.0, -0.0, "1", b"1"):
        monkeypatch.setitem(globals(), "FACTOR", value)
        states.append(cache_key(scaled))
    assert len(set(states)) == len(states)


def test_what_may_have_changed_unseen_has_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"a": 1}
    monkeypatch.setitem(globals(), "FACTOR", [2])
    assert cache_key(scaled) is None
    assert cache_key(lambda: table) is None
    assert cache_key(Local) is None

    def imports() -> None:
        import json  # noqa: F401

    assert cache_key(imports) is None


def test_plain_arguments_take_the_short_way_local_ones_bring_their_code() -> None:
    def share(_: Any) -> None:
        return None

    assert pack_calls(plain, [(1, "a", None), (b"x", 2.0, True)], None, share).kind == CHUNK
    assert pack_calls(plain, [([1, {"a": (2,)}],)], None, share).kind == CHUNK
    assert pack_calls(plain, [(Local(),)], None, share).kind == LOCAL_CHUNK
    with pytest.raises(TypeError, match="argument 1 of plain"):
        pack_calls(plain, [(1,), (types.SimpleNamespace(f=threading.Lock()),)], None, share)


def test_functions_of_random_go_by_name() -> None:
    np = pytest.importorskip("numpy")
    for function in (random.random, random.randint, np.random.rand):
        assert pack(function).size < 600  # with its state it would be thousands


def test_large_arrays_are_told_by_what_they_hold() -> None:
    np = pytest.importorskip("numpy")
    blobs = BlobStore()
    sharing = SharedArrays(blobs)
    array = np.zeros((500, 500))
    number = sharing.share(array)
    assert sharing.share(array.copy()) == number
    assert sharing.share(np.zeros((500, 500), order="F")) != number
    assert sharing.share(np.zeros((250_000,))) != number
    array[3, 3] = 1
    assert sharing.share(array) != number
    assert sharing.share(np.zeros(10)) is None
    assert len(sharing.taken()) == 5
    assert sharing.taken() == ()
    remembered = SharedArrays(blobs, by_identity=True)
    small = np.zeros(4096)
    number = remembered.share(small)
    small[0] = 1  # was promised not to happen
    assert remembered.share(small) == number
    assert remembered.close() == [number]


def test_large_arrays_are_told_by_their_types() -> None:
    np = pytest.importorskip("numpy")
    sharing = SharedArrays(BlobStore())
    zeros = bytes(1 << 21)
    one, other = np.dtype("i8", metadata={"unit": "m"}), np.dtype("i8", metadata={"unit": "s"})
    records: list[Any] = [[("a", "i4"), ("b", "f4")], [("a", "M8[s]")]]
    records.append({"names": ["a"], "formats": ["i4"], "offsets": [4], "itemsize": 8})
    types = ["i8", "u8", "f8", ">i8", "M8[ns]", "M8[us]", "m8[ns]", "V8", "S8", "U2", "2i4", *records, one, other]
    numbers = [sharing.share(np.frombuffer(zeros, dtype=kind)) for kind in types]
    assert None not in numbers
    assert len(set(numbers)) == len(types)
    assert numbers == [sharing.share(np.frombuffer(bytes(len(zeros)), dtype=kind)) for kind in types]


def test_blobs_that_nobody_needs_are_dropped_the_oldest_first() -> None:
    blobs = BlobStore()
    made = [blobs.take(Packed("x", (b"",), 100 * 1024 * 1024, bytes([index]))) for index in range(4)]
    for blob in made[:3]:
        blobs.release(blob.number)
    assert blobs.dropped == [made[0].number]
    assert blobs.take(made[2].packed) is made[2]
    assert blobs.take(made[0].packed) is not made[0]
    with pytest.raises(KeyError):
        blobs[made[0].number]


# --- answers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", [1, 2, 7, 20, 21, 22, 64, 10_000])
def test_answers_are_found_wherever_they_are_cut(step: int) -> None:
    sizes = [0, 1, 500, 0, 3000, 21]
    data = b"".join(
        ANSWER.pack(RETURNED, number, 0.5, size) + bytes([number]) * size for number, size in enumerate(sizes)
    )
    found: list[Any] = []
    given_up: list[int] = []
    stream = ResultDecoder(
        lambda kind, number, elapsed, parts, size: found.append((number, b"".join(parts), size)),
        lambda number, error: given_up.append(number),
    )
    for start in range(0, len(data), step):
        stream.feed(b"head" + data[start : start + step], 4)
    assert found == [(number, bytes([number]) * size, size) for number, size in enumerate(sizes)]
    assert not given_up


@pytest.mark.parametrize("step", [1, 22, 600])
def test_an_answer_that_is_given_up_is_passed_over(step: int) -> None:
    """What it holds is let go of at once, and the next answer is found where it begins."""
    data = b"".join(ANSWER.pack(RETURNED, n, 0.5, 1000) + bytes([n]) * 1000 for n in range(3))
    found: list[Any] = []
    stream = ResultDecoder(
        lambda kind, number, elapsed, parts, size: found.append((number, b"".join(parts))),
        lambda number, error: found.append((number, error)),
    )
    error, refused = MemoryError("full"), False
    for start in range(0, len(data), step):
        if not refused and len(found) == 1 and stream.held:
            stream.give_up(error)
            refused = True
            assert not stream.held
        stream.feed(data[start : start + step], 0)
    assert found == [(0, bytes(1000)), (1, error), (2, b"\2" * 1000)]


def test_lines_are_shown_whole(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    lines = worker_lines("host", True)
    for part in (b"on", b"e\ntw", b"o\n\xff", b"!"):
        lines.feed(part)
    lines.end()
    assert capsys.readouterr().out == "[host] one\n[host] two\n[host] \ufffd!\n"
    with caplog.at_level(logging.DEBUG, "lazycluster"):
        worker_lines("host", False).feed(b"quiet\n")
    assert "host: quiet" in caplog.text
    assert capsys.readouterr().out == ""


# --- sizes ---------------------------------------------------------------------------------------------------
def host(name: str, cores: int) -> Any:
    return types.SimpleNamespace(host=name, info={"cpu_cores": cores}, fill_info_buffer=lambda: None)


@pytest.mark.parametrize(
    ("kind", "content"), [(RETURNED, [1]), (RETURNED, 7), (MIXED, [(True, b"")]), (MIXED, [1, 2]), (BROKEN, {})]
)
def test_answers_that_make_no_sense_are_errors_of_each_call(kind: int, content: Any) -> None:
    results = read_results(ChunkResult(kind, [pickle.dumps(content)], 0, "host1"), 0, 2, lambda call: f"f({call})")
    assert [good for good, _ in results] == [False, False]
    assert all(str(error).startswith("host1: the result of f(") for _, error in results)


def test_workers_in_all_go_where_the_cores_are() -> None:
    runtimes = [host("a", 2), host("b", 8), host("c", 2)]
    assert worker_counts(runtimes, 12, None) == {"a": 2, "b": 8, "c": 2}
    assert worker_counts(runtimes, 6, None) == {"a": 1, "b": 4, "c": 1}
    assert worker_counts(runtimes, 1, None) == {"a": 0, "b": 1, "c": 0}
    assert sum(count or 0 for count in worker_counts(runtimes, 100, None).values()) == 100
    assert worker_counts(runtimes, None, {"b": 1}) == {"a": None, "b": 1, "c": None}
    assert worker_counts(runtimes, None, None) == {"a": None, "b": None, "c": None}


def test_parts_of_gpus() -> None:
    assert gpus_of(None, False) is None
    assert gpus_of(2, True) == {"count": 2, "workers": 1, "idle": True}
    assert gpus_of(1.0, False) == {"count": 1, "workers": 1, "idle": False}
    assert gpus_of(1 / 3, False) == {"count": 1, "workers": 3, "idle": False}


def test_joblib_is_not_imported_for_us() -> None:
    program = "import sys, lazycluster, lazycluster.runtime_mgmt; sys.exit('joblib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- which host gets a chunk ---------------------------------------------------------------------------------
class CountingPool:
    """A host's pool as the scheduler sees it, which counts how often it is looked at."""

    has_suspect = False
    idle_workers = stealable = 0

    def __init__(self, number: int, workers: int, limit: int) -> None:
        self.host, self.workers, self.limit = f"host{number}", workers, limit
        self.chunks: list[Any] = []
        self.looks = 0

    @property
    def capacity(self) -> int:
        self.looks += 1
        return self.limit - len(self.chunks)

    @property
    def load(self) -> float:
        self.looks += 1
        return len(self.chunks) / self.workers

    def assign(self, chunk: Any) -> None:
        self.chunks.append(chunk)

    def flush(self) -> None:
        pass


def dispatch(pools: list[CountingPool], chunks: list[Any]) -> list[Any]:
    """Have the scheduler give out chunks; returns those that wait."""
    scheduler: Any = types.SimpleNamespace(
        error=None, _pools=pools, _pending=deque(chunks), blobs=types.SimpleNamespace(dropped=[]), _balance=lambda: None
    )
    ChunkScheduler._dispatch(scheduler)
    return list(scheduler._pending)


def waiting_chunk(*tried_on: str) -> Any:
    sink = types.SimpleNamespace(mark_started=lambda chunk: True)
    return types.SimpleNamespace(suspect=False, cancelled=False, tried_on=tried_on, sink=sink)


def test_each_chunk_goes_to_the_host_with_the_least_to_do() -> None:
    """For its number of workers; the rest waits."""
    pools = [CountingPool(0, 1, 3), CountingPool(1, 4, 12), CountingPool(2, 2, 6)]
    assert dispatch(pools, [waiting_chunk() for _ in range(14)]) == []
    assert [len(pool.chunks) for pool in pools] == [2, 8, 4]
    assert len(dispatch(pools, [waiting_chunk() for _ in range(10)])) == 3
    assert [len(pool.chunks) for pool in pools] == [3, 12, 6]


def test_a_call_that_has_taken_down_a_host_goes_to_another() -> None:
    pools = [CountingPool(0, 4, 8), CountingPool(1, 1, 2)]
    pools[1].chunks.append(waiting_chunk())
    tried = waiting_chunk("host0")
    assert dispatch(pools, [tried, waiting_chunk()]) == []
    assert tried in pools[1].chunks
    assert len(pools[0].chunks) == 1


def test_not_all_hosts_are_looked_at_for_each_chunk() -> None:
    """Else the time for many calls would grow with the square of the number of hosts."""
    pools = [CountingPool(number, 2, 10) for number in range(200)]
    assert dispatch(pools, [waiting_chunk() for _ in range(2000)]) == []
    assert sum(pool.looks for pool in pools) < 4 * (2000 + len(pools))
