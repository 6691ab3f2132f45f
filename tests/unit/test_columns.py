"""Tables of the command line in terminals that are narrow."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from rich.console import Console

from lazycluster.cli import fanout
from lazycluster.cli.commands import runtimes


def test_what_matters_least_is_left_out_first() -> None:
    widths = {"host": 10, "os": 12, "cpu": 4}
    assert runtimes._fitting(widths, 30, ("os",)) == ["host", "os", "cpu"]
    assert runtimes._fitting(widths, 29, ("os",)) == ["host", "cpu"]
    assert runtimes._fitting(widths, 5, ("cpu", "os", "nothing")) == ["host"]
    assert runtimes._fitting({}, 5, ()) == []


@pytest.mark.parametrize("width", [80, 200])
def test_the_live_view_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    monkeypatch.setattr(runtimes, "output", lambda: console)
    gigabyte = 2**30
    info: dict[str, Any] = {"os": "Debian GNU/Linux 12 (bookworm)", "cpu_cores": 128, "load": [127.5, 1, 1]}
    info |= {"memory": 1000 * gigabyte, "memory_free": 100 * gigabyte, "disk_total": 9 * 2**40, "disk_free": 2**40}
    info |= {"gpus": [{"name": "NVIDIA A100", "utilization": 90.0}] * 8}
    hosts = [runtimes._Watched(name) for name in ("gpu-node-1", "gpu-node-2")]
    hosts[0].state, hosts[0].info, hosts[0].cpu = "active", info, "100%"
    hosts[0].activity = {"tasks": 1000, "workers": 128, "tunnels": 12}
    hosts[1].state, hosts[1].why = "inactive", "gone\033[2J"
    console.print(runtimes._table(hosts, long=True))
    head, first, second, *why = console.export_text().rstrip("\n").split("\n")
    console.file.close()
    assert max(map(len, (head, first, second))) <= width
    assert "…" not in head + first
    assert {"HOST", "STATE", "CPU", "MEMORY", "TASKS"} <= set(head.split())
    assert ("TUNNELS" in head.split(), "OS" in head.split()) == (True, width == 200)
    assert "8x 90%" in first or width == 80
    assert second.split() == ["gpu-node-2", "inactive"]
    *notes, why = why
    assert why == "gpu-node-2: gone\\x1b[2J"
    assert bool(notes) == (width == 80)
    assert not notes or re.fullmatch(r"No room for: OS, .* \(a wider terminal shows them\)", notes[0].strip())


def test_hosts_are_shown_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, one that is late holds back the others for a moment only."""
    shown: list[str] = []

    async def main(late: bool) -> list[str]:
        shown.clear()
        rows = fanout.InOrder("abcd", shown.append)
        for name in "cb":
            rows.put(name, name)
        assert shown == []
        if late:
            await asyncio.sleep(0)
            while not shown:
                await asyncio.sleep(0.001)
        for name in "da":
            rows.put(name, name)
        return shown

    monkeypatch.setattr(fanout, "is_terminal", lambda: False)
    assert asyncio.run(main(late=False)) == list("abcd")
    monkeypatch.setattr(fanout, "is_terminal", lambda: True)
    monkeypatch.setattr(fanout, "_PATIENCE", 0.0)
    assert asyncio.run(main(late=True)) == list("bcda")
