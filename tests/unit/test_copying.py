"""What `put` and `get` say, beside their bars."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lazycluster.cli import copying
from lazycluster.cli.fanout import Outcome
from lazycluster.ssh.transfer import TransferResult


@pytest.mark.parametrize("piped", [False, True])
def test_bars_do_not_overwrite_what_is_said(piped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    consoles = {
        name: Console(file=file, force_terminal=terminal, highlight=False)
        for name, file, terminal in (("output", out, not piped), ("errors", err, True))
    }
    for name, console in consoles.items():
        monkeypatch.setattr(copying, name, lambda console=console: console)
    monkeypatch.delenv("NO_COLOR", raising=False)
    with copying.Copying(["host1", "host2"], quiet=False) as copies:
        for host in ("host1", "host2"):
            show = copies.progress(host)
            assert show is not None
            show(1, 3, 0)
        result = TransferResult(path="x", files=1, bytes=3_000_000, sent=1, skipped=0, seconds=2.0)
        copies.add("host1", result)
        copies.done(Outcome("host1"))
        copies.done(Outcome("host2", 1, "cannot copy: x\n  Next step: none", "error"))
    said, shown = out.getvalue(), err.getvalue()
    assert "host1: 1 file, 2.9M in 2.0 s, 1.4M/s" in (said if piped else shown)
    assert said if piped else not said  # of two that write to one terminal, one does not know of the other's lines
    assert "cannot copy: x" in shown
    assert shown.endswith("\r\x1b[1A\x1b[2K")  # nor does an empty line stay where the bars were
