"""A manager that runs out of memory: what asked for too much fails, and nothing else; the hosts stay."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

_PRELUDE = """
    import logging, os, resource, sys
    from lazycluster import RuntimeGroup, RuntimeTask
    from lazycluster.exceptions import LazyclusterError, TaskExecutionError

    logging.basicConfig(level=logging.WARNING, format="LOG %(message)s")
    settings = {{"config_file": {config!r}}}
    group = RuntimeGroup(hosts={names!r}, connection_kwargs=settings, python=sys.executable)
    host1, host2 = group.runtimes[:2]

    def spare(mebibytes):
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + mebibytes * 1024 * 1024, resource.RLIM_INFINITY))

    def large(mebibytes):
        return bytes(mebibytes * 1024 * 1024)

    assert host1.call(large, 1) and host2.call(large, 1)
    task = RuntimeTask("other").run_command("while [ ! -e {flag} ]; do sleep 0.05; done; echo done")
    host2.execute_task(task, execute_async=True)
"""

_EPILOGUE = """
    assert [runtime._connection.state for runtime in group.runtimes[:2]] == ["open", "open"]
    assert all(runtime._connection.interruptions == 0 for runtime in group.runtimes[:2])
    assert host1.call(large, 8) == large(8)
    assert host2.call(large, 8) == large(8)
    host2.execute_task(RuntimeTask("touch").run_command("touch {flag}"), execute_async=False)
    task.join()
    assert task.execution_log == ["done\\n"], task.execution_log
    group.cleanup()
    print("all others went on")
"""

_CALL = """
    spare(300)
    try:
        host1.call(large, 2000)
    except TaskExecutionError as error:
        assert isinstance(error.__cause__, MemoryError), repr(error.__cause__)
        print("said:", error)
    else:
        raise SystemExit("there was room")
"""

_MAP = """
    with group.executor(workers_per_host=2) as pool:
        assert pool.submit(large, 1).result()
        futures = [pool.submit(large, size) for size in (1, 2000, 2, 3)]
        spare(300)
        assert isinstance(futures[1].exception(), MemoryError), repr(futures[1].exception())
        print("said:", futures[1].exception())
        for size, future in zip((1, 2, 3), (futures[0], futures[2], futures[3])):
            assert future.result() == large(size)
        assert pool.submit(large, 4).result() == large(4)
"""


_EVERYTHING = """
    home = host1.call(os.path.expanduser, "~")
    host1.execute_task(RuntimeTask("file").run_command("head -c 30M /dev/zero >~/of-memory-test"), execute_async=False)
    prints = RuntimeTask("print").run_command("head -c 30M /dev/zero; rm ~/of-memory-test")
    attempts = [
        lambda: host1.get_file("~/of-memory-test", os.devnull + "/none/x"),
        lambda: host1.get_file("~/of-memory-test", {copy!r}),
        lambda: host1.call(large, 30),
        lambda: host1.expose_port_to_runtime(24530),
        lambda: list(group.map(large, [3, 3, 3])),
        lambda: host1.execute_task(prints, execute_async=False),
    ]
    for mebibytes in (20, 5, 1):
        for attempt in attempts:
            spare(mebibytes)
            try:
                attempt()
            except (LazyclusterError, MemoryError, RuntimeError, OSError) as error:
                print("said:", type(error).__name__)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
"""


def _manager(hosts: Any, what: str, copy: str = "") -> str:
    program = textwrap.dedent(_PRELUDE + what + _EPILOGUE).format(
        config=hosts.config_file, names=["host1", "host2"], flag="/tmp/flag-of-memory-test", copy=copy
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=150, check=False)
    hosts[1].path("/tmp/flag-of-memory-test").unlink(missing_ok=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "all others went on" in done.stdout
    assert len(done.stderr) < 5000, done.stderr[:5000]
    return done.stdout + done.stderr


@pytest.mark.parametrize("what", [_CALL, _MAP], ids=["call", "map"])
def test_a_result_that_does_not_fit_fails_alone(what: str, hosts: Any) -> None:
    said = _manager(hosts, what)
    assert "said:" in said
    assert said.count("LOG") == 1, said


def test_whatever_is_tried_without_memory_ends_and_the_hosts_stay(hosts: Any, tmp_path: Path) -> None:
    assert "said:" in _manager(hosts, _EVERYTHING, str(tmp_path / "copy"))
