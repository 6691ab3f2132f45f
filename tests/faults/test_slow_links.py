"""Links over which things take their time."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from patience import until

_SENDER = """
    import sys
    from lazycluster import RuntimeGroup, RuntimeTask

    settings = {{"config_file": {config!r}, "grace": 600}}
    group = RuntimeGroup(hosts=["host1"], connection_kwargs=settings, python=sys.executable)
    group.execute_task(RuntimeTask("sleep").run_command("sleep 7301"), broadcast=True)
    print("working", flush=True)
    group.send_file({file!r}, "~/copy", execute_async=False)
"""


@pytest.mark.soak
def test_a_manager_that_is_killed_is_not_taken_for_a_link_that_is_down(make_hosts: Any, tmp_path: Path) -> None:
    """What is under way when it dies comes before the news of that; the host must get to hear them all the same."""
    hosts = make_hosts(1)
    (tmp_path / "large").write_bytes(os.urandom(20_000_000))
    program = textwrap.dedent(_SENDER).format(config=hosts.config_file, file=str(tmp_path / "large"))
    table = Path(f"/proc/{hosts[0].pid}/net/dev")

    def received() -> int:
        return sum(int(line.split()[1]) for line in table.read_text().splitlines() if "eth" in line)

    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as manager:
        try:
            assert manager.stdout is not None
            assert manager.stdout.readline() == "working\n"
            until(lambda: "sleep 7301" in str(hosts[0].processes()), "the command")
            hosts[0].slow(rate="4mbit")
            before = received()
            until(lambda: received() - before > 1_000_000, "the copy to fill the link")
        finally:
            manager.kill()
    until(lambda: not list(hosts[0].leftovers()), "the host to be clean, long before its grace is over")
    hosts[0].path("~/copy").unlink(missing_ok=True)
