"""The user's own modules of a Dask cluster on the manager: nothing is written after the end, whatever is under way."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lazycluster.cluster import local_modules, module_sources
from lazycluster.cluster.local_modules import LocalModules
from lazycluster.core import event_loop
from lazycluster.ssh import workspace
from lazycluster.ssh.local_connection import LocalConnection


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that was imported, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "module_of_mine.py"
    file.write_text("VALUE = 1\n")
    importlib.import_module(file.stem)
    yield file
    del sys.modules[file.stem]


@pytest.mark.parametrize("step", ["_read", "_write"])
def test_what_is_under_way_at_the_end_writes_nowhere_else(
    module: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    modules = LocalModules()
    event_loop.run(modules.open())
    module_of_step = module_sources if step == "_read" else local_modules
    before = getattr(module_of_step, step)
    begun, go_on = threading.Event(), threading.Event()

    def held(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return before(*arguments)

    monkeypatch.setattr(module_of_step, step, held)
    module.write_text("VALUE = 22\n")
    user = threading.Thread(target=modules.sync_now)
    user.start()
    assert begun.wait(30)
    ending = threading.Thread(target=lambda: event_loop.run(modules.close()))
    ending.start()
    if step == "_read":
        ending.join(30)
    go_on.set()
    for thread in (ending, user):
        thread.join(30)
        assert not thread.is_alive()
    assert set(os.listdir()) <= {module.name, "__pycache__"}
    monkeypatch.undo()
    event_loop.run(modules.open())
    sent = Path(modules.directory, "modules", module.name).read_text()
    event_loop.run(modules.close())
    assert sent == "VALUE = 22\n"


def test_what_stands_in_for_a_module_may_answer_as_it_likes(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"not loaded yet: {name}")

    monkeypatch.setitem(sys.modules, "loaded_later", Lazy())
    modules = LocalModules()
    event_loop.run(modules.open())
    assert Path(modules.directory, "modules", module.name).exists()
    event_loop.run(modules.close())


def test_who_opens_them_at_the_same_time_shares_them() -> None:
    """The scheduler and the workers do; what one of them would take alone, nobody would ever give back."""

    async def work() -> None:
        modules = LocalModules()
        await asyncio.gather(modules.open(), modules.open(), modules.share([]))
        await modules.close()
        assert asyncio.get_running_loop() not in workspace._spaces
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(work())


def test_nothing_is_written_while_modules_are_sent_to_a_host_that_joins(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written lies beside the file first, and would be missed by whoever copies the directory."""
    order: list[str] = []
    write = local_modules._write

    def written(*arguments: Any) -> None:
        order.append("written")
        write(*arguments)

    async def work() -> None:
        modules, connection = LocalModules(), LocalConnection()
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def sent(*_: Any, **__: Any) -> None:
            begun.set()
            await go_on.wait()
            order.append("sent")

        await connection.open()
        await modules.open()
        monkeypatch.setattr(local_modules, "_write", written)
        monkeypatch.setattr(local_modules.transfer, "send", sent)
        place: Any = SimpleNamespace(host="host1", connection=connection)
        sharing = asyncio.ensure_future(modules.share([place]))
        await begun.wait()
        module.write_text("VALUE = 22\n")
        syncing = asyncio.ensure_future(modules.sync())
        while not order and not modules._syncing._waiters:
            await asyncio.sleep(0.01)
        go_on.set()
        assert await sharing == {}
        await syncing
        await modules.close()
        await connection.close()

    event_loop.run(work(), 60)
    assert order == ["sent", "sent", "written", "sent", "sent"]
