"""An interpreter for the agent on hosts whose ``python3`` is missing or too old."""

from __future__ import annotations

import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lazycluster import Runtime
from lazycluster.exceptions import InvalidRuntimeError
from sshhosts import Hosts, HostsUnavailableError
from sshhosts.hosts import require_namespaces
from sshhosts.options import find_python

MINOR = "python{}.{}".format(*sys.version_info[:2])
BASE = f"{sys.base_prefix}/bin/{MINOR}"
MakeHosts = Callable[..., Hosts]


@pytest.fixture(scope="module")
def bare() -> Iterator[Hosts]:
    """A host with interpreters where nobody looks, and others only by the name of their version."""
    try:
        require_namespaces()
    except HostsUnavailableError as reason:
        pytest.skip(str(reason))
    with Hosts(1, python="none", path=(sys.base_prefix,)) as hosts:
        links = f"ln -s {BASE} ~/tools/python3 && ln -s {BASE} ~/named/{MINOR}"
        hosts[0].run(f"mkdir -p ~/tools ~/named && {links}", user="lazy")
        yield hosts


def runtime(hosts: Hosts, **more: Any) -> Runtime:
    return Runtime("host1", connection_kwargs={"config_file": hosts.config_file}, **more)


@pytest.mark.parametrize(
    "how",
    [
        {"python": "~/tools/python3"},
        {"python": MINOR, "env": {"PATH": "/home/lazy/named:/bin"}},
        {"python": "auto", "env": {"PATH": "/home/lazy/named:/bin"}},
        {"setup": "PATH=~/tools:$PATH"},
        {"setup": "echo noise\nread -r nothing || :\nload() { PATH=~/named:$PATH; }; load", "python": MINOR},
        {"setup": "PATH=~/tools:$PATH", "python": "auto"},
    ],
    ids=lambda how: "-".join(how),
)
def test_what_the_user_names_serves_where_there_is_no_python3(bare: Hosts, how: dict[str, Any]) -> None:
    with runtime(bare, **how) as host:
        assert host.call(platform.python_version) == platform.python_version()
        assert host.echo("ok").strip() == "ok"
        host.send_file(__file__, "copy")  # a further session


@pytest.mark.parametrize("how", [{"setup": "exit 1"}, {"setup": "syntax ("}, {"python": "python3.99"}, {}])
def test_a_search_in_vain_says_what_there_is(bare: Hosts, how: dict[str, Any]) -> None:
    with pytest.raises(InvalidRuntimeError, match=r"no Python 3\.8 or newer was found on the host") as caught:
        runtime(bare, **how)
    assert caught.value.reason == "python"


@pytest.mark.parametrize("shell", ["bash", "dash", "zsh", "fish", "tcsh"])
def test_a_newer_python_than_python3(make_hosts: MakeHosts, shell: str) -> None:
    """Which is an old one, and another directory has a good one."""
    old = Path(find_python("3.6")).parent
    hosts = make_hosts(1, python="none", shell=shell, path=(str(old), str(old.parent), sys.base_prefix))
    with pytest.raises(InvalidRuntimeError, match=rf"it has: {old}/python3 \(3\.6\."):
        runtime(hosts)
    hosts[0].run(f"mkdir -p ~/.local/bin && ln -s {BASE} ~/.local/bin/{MINOR}", user="lazy")
    with runtime(hosts) as host:
        assert host.echo("ok").strip() == "ok"


def test_a_link_that_drops_comes_back_to_the_same_agent(bare: Hosts) -> None:
    with runtime(bare, python="~/tools/python3") as host:
        before = host.call(os.getppid)
        for session in bare[0].sessions():
            os.kill(session.pid, signal.SIGKILL)
        assert host.call(os.getppid) == before


def test_set_up_lines_are_in_no_command_line(bare: Hosts) -> None:
    with runtime(bare, setup=": secret-word; test -e ~/seen || cat /proc/[0-9]*/cmdline >~/seen; PATH=~/tools:$PATH"):
        assert b"secret-word" not in bare[0].path("~/seen").read_bytes()
