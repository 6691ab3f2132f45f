"""A file that goes from host to host: on hosts that die, lie, are full, or cannot reach each other."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from changedagents import changed

pytest.importorskip("cryptography")

from lazycluster import RuntimeGroup
from lazycluster.cli import app
from lazycluster.core import event_loop
from lazycluster.exceptions import GroupTaskError, LazyclusterError
from lazycluster.group import direct_copy
from lazycluster.group.direct_copy import DirectCopy, DirectTarget
from lazycluster.ssh import transfer
from lazycluster.ssh.ssh_connection import SshConnection
from lazycluster.ssh.transfer import TransferError, TransferResult

SIZE = 24 * 1024 * 1024
MIDWAY = SIZE // 4
RATE = "80mbit"  # of the first host's cable, where something is to happen midway


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is large enough."""
    path = tmp_path_factory.mktemp("files") / "model.bin"
    path.write_bytes(os.urandom(1024 * 1024) * (SIZE // 1024 // 1024 - 1) + os.urandom(1024 * 1024))
    path.chmod(0o640)
    return path


@contextlib.contextmanager
def connected(hosts: Any) -> Iterator[list[SshConnection]]:
    connections = [SshConnection(name, {"config_file": hosts.config_file, "link_timeout": 2}) for name in hosts.names]

    async def each(what: str) -> None:
        await asyncio.gather(*(getattr(connection, what)() for connection in connections))

    event_loop.run(each("open"), 60)
    try:
        yield connections
    finally:
        event_loop.run(each("close"), 60)


def send(
    connections: list[SshConnection],
    path: Path,
    to: str = "~/model.bin",
    network: str = "direct",
    midway: tuple[int, Callable[[], Any]] | None = None,
) -> list[TransferResult | BaseException]:
    """Send a file to all hosts; returns what has become of it on each.

    Args:
        connections: The hosts.
        path: The file.
        to: Where to.
        network: How.
        midway: The number of a host, and what to do when a part of the file is there.
    """
    copying = DirectCopy([DirectTarget(one.host, one, "", {}) for one in connections], path, to, network)
    acted: list[bool] = []

    def progress(number: int) -> transfer.Progress:
        def report(done: int, _total: int | None, _files: int) -> None:
            if midway is not None and number == midway[0] and done > MIDWAY and not acted:
                acted.append(True)
                midway[1]()

        return report

    async def all_of() -> list[TransferResult | BaseException]:
        copies = (
            copying.send(one, path, to, cwd="", env={}, progress=progress(number))
            for number, one in enumerate(connections)
        )
        return list(await asyncio.gather(*copies, return_exceptions=True))

    found = event_loop.run(all_of(), 120)
    assert midway is None or acted
    return found


def is_there(host: Any, path: Path, to: str = "~/model.bin") -> bool:
    """Tell if the file is on a host as it is here; it is removed there."""
    there = host.path(to)
    found: bool = there.exists() and there.read_bytes() == path.read_bytes()
    there.unlink(missing_ok=True)
    return found


def are_there(hosts: Any, path: Path) -> bool:
    """Tell if the file is on all hosts as it is here; it is removed there."""
    found = [is_there(host, path) for host in hosts]
    return all(found)


@pytest.fixture
def only_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have it fail if the manager sends the file to more than one host."""

    async def refused(connection: Any, *_: Any, **__: Any) -> Any:
        raise AssertionError(f"sent to {connection.host} by the manager")

    monkeypatch.setattr(transfer, "send", refused)


@pytest.fixture
def sent_by_manager(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hosts to which the manager itself has sent the file, beside the first."""
    found: list[str] = []
    sending = transfer.send

    async def send(connection: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(connection.host)
        return await sending(connection, *args, **kwargs)

    monkeypatch.setattr(transfer, "send", send)
    return found


# --- as it should be -------------------------------------------------------------------------------
@pytest.mark.usefixtures("only_first")
def test_each_host_gets_the_file_from_the_one_before_it(module_hosts: Any, file: Path) -> None:
    """With its mode and time, as in any copy."""
    with connected(module_hosts) as connections:
        results = send(connections, file)
        assert [result.sent for result in results if isinstance(result, TransferResult)] == [1, 1, 1]
        for host in module_hosts:
            inode = host.path("~/model.bin").stat()
            assert (inode.st_mode & 0o777, inode.st_mtime_ns) == (0o640, file.stat().st_mtime_ns)
        # What is there unchanged is not sent again; who does not have it gets it from who has.
        host = module_hosts[1]
        host.path("~/model.bin").unlink()
        results = send(connections, file)
        assert [result.sent for result in results if isinstance(result, TransferResult)] == [0, 1, 0]
        assert are_there(module_hosts, file)


@pytest.mark.usefixtures("only_first")
def test_a_group_sends_from_host_to_host_if_asked(module_hosts: Any, file: Path) -> None:
    settings = {"config_file": str(module_hosts.config_file)}
    with RuntimeGroup(hosts=list(module_hosts.names), connection_kwargs=settings) as group:
        tasks = group.send_file(file, "~/model.bin", execute_async=False, network="auto")
        assert [task.host for task in tasks] == list(module_hosts.names)
        with pytest.raises(ValueError, match="network must be 'tunnel'"):
            group.send_file(file, network="ssh")
    assert are_there(module_hosts, file)


def put(*arguments: str) -> Any:
    """Return the exit status of ``lazycluster put``."""
    # As a part of the group: click keeps for a command how its help is asked for.
    return app.cli.main(["put", *arguments], standalone_mode=False)


@pytest.mark.usefixtures("only_first")
def test_the_command_line_sends_from_host_to_host_if_asked(
    module_hosts: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYCLUSTER_SSH_CONFIG", str(module_hosts.config_file))
    assert put("--network", "direct", "-w", ",".join(module_hosts.names), str(file), "model.bin") == 0
    assert are_there(module_hosts, file)


def test_a_host_that_is_not_reached_keeps_no_other_waiting(
    module_hosts: Any, file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAZYCLUSTER_SSH_CONFIG", str(module_hosts.config_file))
    hosts = ",".join([*module_hosts.names, "nobody.invalid"])
    assert put("--network", "auto", "-w", hosts, str(file), "model.bin") == 255
    assert "nobody.invalid" in capfd.readouterr().err
    assert are_there(module_hosts, file)


@pytest.mark.parametrize("network", ["direct", "auto"])
def test_a_small_file_or_a_folder_comes_from_the_manager(
    module_hosts: Any, network: str, sent_by_manager: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = tmp_path / "small"
    small.write_text("x")
    with connected(module_hosts) as connections:
        send(connections, small, "~/small", network)
        assert sorted(sent_by_manager) == sorted(module_hosts.names)
        assert not caplog.records
        results = send(connections, tmp_path, "~/folder", network)
    failed = [str(result) for result in results if isinstance(result, TransferError)]
    assert len(failed) == (3 if network == "direct" else 0)
    assert "only single files go from host to host" in (failed[0] if failed else caplog.text)


# --- what goes wrong -------------------------------------------------------------------------------
@contextlib.contextmanager
def firewall(host: Any) -> Iterator[None]:
    """Have a host drop what comes in on the ports of copies."""
    rule = ["INPUT", "-p", "tcp", "--dport", "25100:25199", "-j", "DROP"]
    host.run(["/usr/sbin/iptables", "-I", *rule])
    try:
        yield
    finally:
        host.run(["/usr/sbin/iptables", "-D", *rule])


def test_hosts_that_do_not_reach_each_other_are_named(
    module_hosts: Any, file: Path, sent_by_manager: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """If they have to, that is an error; else the manager sends the file, and says so."""
    with connected(module_hosts) as connections, firewall(module_hosts[1]):
        results = send(connections, file, network="direct")
        assert all(isinstance(result, TransferError) for result in results)
        assert "host1 cannot reach host2 at" in str(results[0])
        assert "'network=\"auto\"'".strip("'") in str(results[0])
        assert not sent_by_manager
        send(connections, file, network="auto")
        assert "host2" in sent_by_manager
        assert "host1 cannot reach host2 at" in caplog.text
    assert are_there(module_hosts, file)


def test_without_certificates_the_manager_sends_the_file(
    module_hosts: Any, file: Path, sent_by_manager: list[str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def missing(*_: str) -> Any:
        raise ModuleNotFoundError("No module named 'cryptography'")

    monkeypatch.setattr(direct_copy, "make_identities", missing)
    with connected(module_hosts) as connections:
        send(connections, file, network="auto")
    assert sorted(sent_by_manager) == sorted(module_hosts.names)
    assert "the certificates need the package cryptography" in caplog.text
    assert are_there(module_hosts, file)


def test_a_host_that_dies_midway_is_named_and_the_others_get_the_file(hosts: Any, file: Path) -> None:
    with connected(hosts) as connections:
        hosts[0].slow(rate=RATE)
        connections[1].settings = _impatient(connections[1].settings)
        results = send(connections, file, midway=(2, hosts[1].power_off))
        first, dead, last = results
        assert isinstance(first, TransferResult)
        assert isinstance(last, TransferResult)
        assert isinstance(dead, LazyclusterError)
        assert "host2" in str(dead)
    assert is_there(hosts[0], file)
    assert is_there(hosts[2], file)


def _impatient(settings: Any) -> Any:
    from dataclasses import replace

    return replace(settings, reconnect=2.0)


def test_a_link_between_two_hosts_that_is_cut_midway_costs_no_file(
    hosts: Any, file: Path, sent_by_manager: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The manager goes on where it has stopped, and names the host that sends no more."""
    with connected(hosts) as connections:
        hosts[0].slow(rate=RATE)
        cut = ["/usr/sbin/iptables", "-I", "OUTPUT", "-p", "tcp", "--dport", "25100:25199", "-j", "REJECT",
               "--reject-with", "tcp-reset"]  # fmt: skip
        results = send(connections, file, midway=(2, lambda: hosts[1].run(cut)))
        assert all(isinstance(result, TransferResult) for result in results)
        assert sent_by_manager == ["host3"]
    assert "not from another host: its connection to host2 failed: " in caplog.text
    assert are_there(hosts, file)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_full_disk_is_that_of_one_host(hosts: Any, file: Path, number: int, caplog: pytest.LogCaptureFixture) -> None:
    """Those behind it get the file from the manager, and the log says why."""
    with connected(hosts) as connections:
        hosts[number].fill_disk("~")
        try:
            results = send(connections, file)
        finally:
            hosts[number].free_disk("~")
    failed = results[number]
    assert isinstance(failed, TransferError)
    assert (failed.host, failed.side, failed.errno) == (hosts.names[number], hosts.names[number], errno.ENOSPC)
    for other, host in enumerate(hosts):
        assert isinstance(results[other], TransferResult) == (other != number)
        assert is_there(host, file) == (other != number)
        if other == number + 1:
            before = hosts.names[number]
            assert f"{before} failed: it has ended ({before}: No space left on device)" in caplog.text


@pytest.mark.parametrize("is_time_set_back", [False, True])
def test_a_file_that_is_rewritten_meanwhile_is_on_no_host(
    hosts: Any, tmp_path: Path, is_time_set_back: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "changing"
    path.write_bytes(b"1" * SIZE)
    with connected(hosts) as connections:
        hosts[0].slow(rate=RATE)

        def rewrite() -> None:
            for one in threading.enumerate():
                if one.name == "checksum":  # the manager has read all of it, and sent the beginning
                    one.join(60)
            before = path.stat().st_mtime_ns
            with path.open("r+b") as file:
                file.write(b"2")
                file.seek(SIZE - 1)
                file.write(b"2")
            if is_time_set_back:
                os.utime(path, ns=(before, before))

        results = send(connections, path, "~/changing", midway=(0, rewrite))
    for host, result in zip(hosts, results, strict=True):
        assert isinstance(result, TransferError)
        assert (result.host, result.side) == (host.name, "manager")
        assert "was rewritten while it was being copied" in str(result)
        assert not host.path("~/changing").exists()
    assert not caplog.records  # no host is to blame


@pytest.fixture
def with_liar(tmp_path: Path) -> Iterator[None]:
    """Hosts that pass on something else than what they have got, if there is a file ``liar`` in their home."""
    before = "            count = os.preadv(fd, [room], position)\n"
    lie = '            if os.path.exists(os.path.expanduser("~/liar")):\n                room[0] ^= 1\n'
    with changed(tmp_path, ("direct_copy", before, before + lie)):
        yield


@pytest.mark.usefixtures("with_liar")
def test_a_host_that_passes_on_something_else_changes_no_file(
    hosts: Any, file: Path, sent_by_manager: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Those behind it compare the checksum with the manager's own, and get the file from there."""
    hosts[0].path("~/liar").touch()
    try:
        with connected(hosts) as connections, caplog.at_level(logging.WARNING):
            results = send(connections, file)
            assert all(isinstance(result, TransferResult) for result in results)
    finally:
        hosts[0].path("~/liar").unlink()
    assert sorted(sent_by_manager) == ["host2", "host3"]
    assert "what came from host1 differs from the manager's file\n" in caplog.text
    cause = "(host2: what came from host1 differs from the manager's file)"
    assert f"what came from host2 differs from the manager's file {cause}" in caplog.text
    assert are_there(hosts, file)


def test_hosts_are_called_by_their_names_where_another_one_is_met(
    module_hosts: Any, file: Path, sent_by_manager: list[str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Not by those of their certificates, which only the hosts know; and the host before says what is wrong."""
    make_identities = direct_copy.make_identities

    def mistaken(*names: str) -> Any:
        authority, identities = make_identities(*names)
        return authority, {**identities, "host-2": identities["host-0"]}

    monkeypatch.setattr(direct_copy, "make_identities", mistaken)
    with connected(module_hosts) as connections:
        send(connections, file)
    assert sent_by_manager == ["host3"]
    assert "its connection to host2 failed: it has ended" in caplog.text
    assert "(host2: sending it on failed: host1 is there, not host3)" in caplog.text
    assert are_there(module_hosts, file)


def test_the_errors_of_a_group_name_the_hosts(module_hosts: Any, file: Path) -> None:
    settings = {"config_file": str(module_hosts.config_file)}
    with RuntimeGroup(hosts=list(module_hosts.names), connection_kwargs=settings) as group:
        with firewall(module_hosts[2]), pytest.raises(GroupTaskError) as failed:
            group.send_file(file, "~/model.bin", execute_async=False, network="direct")
        assert "host1 cannot reach host3" in str(failed.value)
    assert not any(host.path("~/model.bin").exists() for host in module_hosts)


@pytest.mark.usefixtures("only_first")
def test_holes_stay_holes_from_host_to_host(module_hosts: Any, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(b"begin")
        file.seek(8 * SIZE)
        file.write(b"end")
    with connected(module_hosts) as connections:
        results = send(connections, path, "~/sparse")
    assert all(isinstance(result, TransferResult) for result in results)
    for host in module_hosts:
        assert host.path("~/sparse").stat().st_blocks * 512 < SIZE
    found = [is_there(host, path, "~/sparse") for host in module_hosts]
    assert all(found)
