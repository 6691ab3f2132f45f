"""Hosts and managers whose places for temporary files are full, read-only, or made useless by an umask."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lazycluster import Runtime, RuntimeTask
from lazycluster.exceptions import InvalidRuntimeError, TaskExecutionError
from patience import until

pytestmark = pytest.mark.skipif(
    any(
        Path(path).is_relative_to(place)
        for path in (sys.prefix, __file__)
        for place in ("/tmp", "/var/tmp", "/dev/shm")
    ),
    reason="these tests hide the directories for temporary files, and with them this checkout or its Python",
)

_FULL = {
    "blocks": "mount -t tmpfs -o mode=1777,size=64k none {0} && { head -c 65536 /dev/zero > {0}/filler; true; }",
    "nearly all blocks": "mount -t tmpfs -o mode=1777,size=64k none {0} && head -c 40000 /dev/zero > {0}/filler",
    "inodes": "mount -t tmpfs -o mode=1777,nr_inodes=2 none {0} && touch {0}/filler",
    "an inode too few": "mount -t tmpfs -o mode=1777,nr_inodes=3 none {0}",
    "read-only": "mount -t tmpfs -o mode=1777 none {0} && mount -o remount,ro {0}",
}
_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
# A directory stays as it is though what it is in is hidden.
_KEEP = "mkdir -p /run/kept && mount --bind {0} /run/kept"
_BRING_BACK = "mkdir -p {0} && mount --bind /run/kept {0}"


def connect(host: Any, pool: Any) -> Runtime:
    return Runtime(host.name, connection_kwargs={"config_file": pool.config_file})


def entries(host: Any) -> list[str]:
    return sorted(host.run(["find", *_PLACES, "-mindepth", "1"]).stdout.splitlines())


def test_a_host_whose_usual_place_is_full_uses_the_next(make_hosts: Any) -> None:
    pool = make_hosts(1)
    host = pool[0]
    for what, fill in _FULL.items():
        host.run(fill.replace("{0}", "/tmp"))
        filled = entries(host)
        with connect(host, pool) as runtime:
            made = set(entries(host)) - set(filled)
            assert made and all(path.startswith("/var/tmp/lazycluster-") for path in made), what
            assert runtime.call(os.getuid) == 1000
        assert entries(host) == filled, what
        host.run("umount /tmp")


def test_a_host_that_has_no_room_anywhere_says_so_and_keeps_nothing(make_hosts: Any) -> None:
    pool = make_hosts(1)
    host = pool[0]
    for place, fill in zip(_PLACES, _FULL.values(), strict=False):
        host.run(fill.replace("{0}", place))
    before = entries(host)
    with pytest.raises(InvalidRuntimeError) as caught:
        connect(host, pool)
    error = caught.value
    assert (error.host, error.reason) == ("host1", "disk")
    for place in _PLACES:
        assert f"{place}: No space left on device" in str(error)
    assert "on the host" in error.detail and "TMPDIR for sessions on host1" in error.hint
    assert entries(host) == before
    for place in _PLACES:
        host.run(["umount", place])


def test_what_failed_starts_have_left_is_removed_by_the_next(make_hosts: Any) -> None:
    pool = make_hosts(1)
    host = pool[0]
    empty, full, work = (f"/tmp/lazycluster-{letter * 12}" for letter in "abc")
    host.run(f"mkdir -m 0 {empty}; mkdir -m 700 {full} {work}; touch {full}/host {work}/results", user="lazy")
    host.run(f"touch -d '1 hour ago' {empty} {full} {work}", user="lazy")
    with connect(host, pool):
        until(lambda: not {empty, full} & set(entries(host)), "they to be removed")
    assert entries(host) == [work, f"{work}/results"]
    host.run(["rm", "-r", work])


@pytest.mark.parametrize("umask", ["777", "177", "377"])
def test_an_umask_that_forbids_everything_to_its_owner_does_no_harm(make_hosts: Any, umask: str) -> None:
    pool = make_hosts(1, files={".bashrc": f"umask {umask}\n"})
    with connect(pool[0], pool) as runtime:
        assert runtime.call(os.getuid) == 1000
        runtime.send_file(__file__, "~/there")
        assert pool[0].path("there").read_bytes() == Path(__file__).read_bytes()
    pool[0].path("there").unlink()


def test_a_disk_that_fills_up_meanwhile_ends_nothing(make_hosts: Any, tmp_path: Path) -> None:
    pool = make_hosts(1, tmp_size="1m")
    host = pool[0]
    (tmp_path / "file").write_bytes(bytes(10_000))
    with connect(host, pool) as runtime:
        task = RuntimeTask("wait").run_command("until test -e ~/go; do sleep 0.05; done; echo done")
        runtime.execute_task(task)
        host.run("cat /dev/zero >/tmp/filler", check=False)
        connection = runtime._session.connection
        for session in host.sessions():
            os.kill(session.pid, signal.SIGKILL)
        until(lambda: connection.interruptions and connection.state == "open", "the link to be back")
        assert runtime.call(len, bytes(3_000_000)) == 3_000_000
        with pytest.raises(TaskExecutionError, match="No space left on device"):
            runtime.send_file(tmp_path / "file", "/tmp/there")
        host.path("~/go").touch()
        task.join()
        assert task.execution_log[0].strip() == "done"
    assert entries(host) == ["/tmp/filler"]
    host.run(["rm", "/tmp/filler", host.home + "/go"])


_CONNECT = """
import sys
from lazycluster import Runtime
from lazycluster.exceptions import InvalidRuntimeError
try:
    with Runtime("host1", connection_kwargs={"config_file": sys.argv[1]}) as runtime:
        print(runtime.call(len, "four"))
except InvalidRuntimeError as error:
    print(error.reason, error)
"""


def manager(pool: Any, fill: str, places: tuple[str, ...]) -> str:
    """Connect from a machine whose places for temporary files are filled; return what is said, or was left."""
    folder = os.path.dirname(pool.config_file)
    lines = [
        "mount -t tmpfs none /run", _KEEP.replace("{0}", folder), *(fill.replace("{0}", place) for place in places),
        _BRING_BACK.replace("{0}", folder),
        f"{sys.executable} -c {shlex.quote(_CONNECT)} {pool.config_file} 2>&1",
        f"find {' '.join(places)} -name 'lazycluster-*'",
    ]  # fmt: skip
    env = {**os.environ, "XDG_STATE_HOME": "/run/state"}
    env.pop("TMPDIR")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", "\n".join(["set -e", *lines])], capture_output=True, text=True, env=env,
        check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_a_manager_whose_usual_place_is_full_uses_the_next(make_hosts: Any) -> None:
    pool = make_hosts(1)
    assert manager(pool, _FULL["blocks"], ("/tmp",)) == "4\n"


def test_a_manager_that_has_no_room_anywhere_does_not_blame_the_host(make_hosts: Any) -> None:
    pool = make_hosts(1)
    said = manager(pool, _FULL["blocks"], _PLACES)
    assert said.startswith("manager localhost: ") and "host1" not in said
    for place in _PLACES:
        assert f"{place}: No space left on device" in said
    assert "this machine, the manager" in said and "TMPDIR" in said
