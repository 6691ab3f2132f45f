"""Programs that print without end: the manager keeps the end of it, not all."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lazycluster.cli.diagnosis import STEPS, Diagnosis
from lazycluster.environments.build import BuildHost
from lazycluster.environments.uv import run_program
from lazycluster.exceptions import EnvironmentBuildError
from lazycluster.output.lines import Tail
from patience import until
from sshhosts import procfs

_MEBIBYTE = 1024 * 1024
_LINE = b"https://me:s3cret@example.invalid/ " + b"x" * 65_000 + b"\n"


class _Talkative:
    """Stands in for the connection to a host on which a program prints 16 MB and fails."""

    agent_info: Any = SimpleNamespace(executable="python3", directory="/tmp/x/y")

    def channel(self, op: str, params: dict[str, Any], stdout: Callable[[bytes], None]) -> Any:
        async def result() -> dict[str, Any]:
            for _ in range(250):
                stdout(_LINE)
            return {"exit": 3}

        return SimpleNamespace(result=result, close=lambda: None)

    async def answered(self, channel: Any, awaited: str, within: float = 30.0) -> Any:
        return await channel.result()


def test_the_end_is_kept_from_the_beginning_of_a_line() -> None:
    tail = Tail(10)
    tail.put(b"one\ntwo\n")
    assert tail.text() == "one\ntwo\n"
    tail.put(b"three\n")
    assert tail.text() == "three\n"
    tail.put(b"a line that is longer than all that is kept")
    assert tail.text() == "at is kept"


def test_of_a_program_on_a_host() -> None:
    place = BuildHost("host1", _Talkative())  # type: ignore[arg-type]
    with pytest.raises(EnvironmentBuildError, match=r"host1: .*making it failed") as caught:
        asyncio.run(place.run(["thing"], {}, "making it"))
    assert 0 < len(caught.value.output) <= _MEBIBYTE
    assert "s3cret" not in caught.value.output
    assert len(str(caught.value)) < 20_000


def test_of_what_doctor_asks_a_host() -> None:
    diagnosis = Diagnosis("host1")
    asyncio.run(diagnosis._files_and_clock(_Talkative()))  # type: ignore[arg-type]
    step = diagnosis.steps[STEPS.index("temporary files")]
    assert step.state == "failed"
    assert 0 < len(step.detail) <= 2000


def test_of_a_program_on_the_manager() -> None:
    text = f"import sys; sys.stderr.write('y' * {16 * _MEBIBYTE}); print('the answer'); sys.exit(3)"
    completed = asyncio.run(run_program([sys.executable, "-c", text], os.environ, stdin="never read" * 100_000))
    assert (completed.returncode, completed.stdout, len(completed.stderr)) == (3, "the answer\n", _MEBIBYTE)


def test_a_program_that_is_not_wanted_any_more_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    told = tmp_path / "told"
    os.mkfifo(told)

    async def begun() -> int:
        running = asyncio.ensure_future(run_program(["sh", "-c", f"sleep 1000 & echo $! > {told}; wait"], os.environ))
        pid = int(await asyncio.get_running_loop().run_in_executor(None, told.read_text))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return pid

    pid = asyncio.run(begun())
    until(lambda: procfs.process(pid) is None, "the program to end")
