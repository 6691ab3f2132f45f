"""Work that several want at once ends with the last who waits for it, and so do its programs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import patience
from lazycluster import EnvironmentSpec
from lazycluster.core import event_loop
from lazycluster.core.single_flight import SingleFlight
from lazycluster.environments import resolution, uv, wheels
from lazycluster.environments.index import IndexSettings
from lazycluster.environments.plan import LockedPackage, Target


def test_work_is_done_once_and_ends_with_the_last_who_wants_it() -> None:
    log: list[str] = []
    begun = asyncio.Event

    async def whole() -> None:
        shared: SingleFlight[str, int] = SingleFlight()
        go_on = begun()

        async def work() -> int:
            log.append("begins")
            try:
                await go_on.wait()
                return 7
            except asyncio.CancelledError:
                await asyncio.sleep(0)
                log.append("has cleaned up")
                raise

        def ask() -> asyncio.Task[int]:
            return asyncio.ensure_future(shared.do("key", work))

        first, second = ask(), ask()
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert log == ["begins"]
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert log == ["begins", "has cleaned up"]
        third = ask()
        await asyncio.sleep(0)
        go_on.set()
        assert await third == 7
        assert await ask() == 7

    asyncio.run(whole())
    assert log == ["begins", "has cleaned up", "begins", "begins"]


def test_whoever_comes_while_it_is_given_up_has_it_begun_anew() -> None:
    async def whole() -> None:
        shared: SingleFlight[str, int] = SingleFlight()
        turns: list[int] = []

        async def work() -> int:
            turns.append(len(turns))
            try:
                await asyncio.sleep(0 if len(turns) > 1 else 600)
            finally:
                for _ in range(5):
                    await asyncio.sleep(0)
            return turns[-1]

        first = asyncio.ensure_future(shared.do("key", work))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        assert not first.done()
        assert await shared.do("key", work) == 1

    asyncio.run(whole())


def _program(path: Path, pids: Path) -> Path:
    """Make a program that starts another one, and never ends."""
    path.write_text(f"#!/bin/sh\nsleep 1000 &\necho $$ $! > {pids}.new\nmv {pids}.new {pids}\nwait\n")
    path.chmod(0o755)
    return path


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def _resolving(program: Path, monkeypatch: pytest.MonkeyPatch) -> Coroutine[Any, Any, Any]:
    monkeypatch.setattr(uv, "_chosen", uv.Uv(str(program), "99.0.0"))
    target = Target((3, 13), "linux", "x86_64", "glibc", "2.36")
    return resolution.resolve(EnvironmentSpec(["something"]), target, IndexSettings())


def _cloning(program: Path, monkeypatch: pytest.MonkeyPatch) -> Coroutine[Any, Any, Any]:
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return wheels._git(LockedPackage("something"), ["clone", "nowhere"], {})


@pytest.mark.parametrize(("name", "begin"), [("uv", _resolving), ("git", _cloning)])
def test_programs_end_with_those_who_wait_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, begin: Callable[..., Coroutine[Any, Any, Any]]
) -> None:
    pids = tmp_path / "pids"
    work = event_loop.submit(begin(_program(tmp_path / name, pids), monkeypatch))
    patience.until(pids.exists, "the program")
    work.cancel()
    assert work.wait(30)
    assert work.cancelled()
    patience.until(lambda: not any(_lives(int(pid)) for pid in pids.read_text().split()), "the end of both")
