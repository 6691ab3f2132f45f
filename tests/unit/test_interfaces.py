"""The addresses that a host has, as its kernel tells them."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from typing import Any

import pytest

from lazycluster.agent import interfaces
from lazycluster.agent.interfaces import interface_addresses

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked so")
_IP = shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin:/bin")
_HIDDEN = ("temporary", "dadfailed", "deprecated", "tentative")


def is_usable(entry: dict[str, Any]) -> bool:
    """Tell whether other hosts may reach an address, as ip shows it."""
    if entry["family"] == "inet6":
        return entry["scope"] == "global" and not any(entry.get(flag) for flag in _HIDDEN)
    return not entry["local"].startswith(("127.", "169.254.", "0."))


def shown() -> set[str]:
    """Return the addresses that ip shows, if other hosts may reach them."""
    told = json.loads(subprocess.run([str(_IP), "-json", "addr"], check=True, capture_output=True).stdout)
    return {entry["local"] for interface in told for entry in interface["addr_info"] if is_usable(entry)}


@pytest.mark.skipif(_IP is None, reason="iproute2 is not there to compare with")
def test_they_are_those_that_ip_shows() -> None:
    before, after = None, shown()
    while before != after:  # other tests may have made an interface meanwhile
        before, found, after = after, set(interface_addresses()), shown()
    assert found == after


def test_the_address_of_ssh_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {2: ["127.0.0.1", "10.0.0.7", "169.254.1.1", "10.1.0.7"], 10: ["fd00::7"]}
    monkeypatch.setattr(interfaces, "_told", lambda family: iter(told[family]))
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    assert interface_addresses() == ["10.0.0.7", "10.1.0.7", "fd00::7"]
    monkeypatch.setenv("SSH_CONNECTION", "10.1.0.1 50000 10.1.0.7 22")
    assert interface_addresses() == ["10.1.0.7", "10.0.0.7", "fd00::7"]
    monkeypatch.setenv("SSH_CONNECTION", "10.1.0.1 50000 203.0.113.5 22")
    assert interface_addresses() == ["10.0.0.7", "10.1.0.7", "fd00::7"]


def message(kind: int, data: bytes = b"") -> bytes:
    text = interfaces._HEADER.pack(interfaces._HEADER.size + len(data), kind, 0, 1, 0) + data
    return text + bytes(-len(text) % 4)


def address(flags: int, scope: int, *attributes: tuple[int, bytes]) -> bytes:
    family = 2 if len(attributes[0][1]) == 4 else 10
    data = interfaces._ADDRESS.pack(family, 24, flags, scope, 2)
    for kind, value in attributes:
        data += (
            interfaces._ATTRIBUTE.pack(interfaces._ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)
        )
    return message(20, data)


class _Kernel:
    """Gives answers that are not to be had here at will, such as those of point-to-point interfaces."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)

    def __call__(self, *args: Any) -> _Kernel:
        return self

    def settimeout(self, seconds: float) -> None:
        pass

    def send(self, data: bytes) -> None:
        pass

    def recv(self, size: int) -> bytes:
        if not self._answers:
            raise TimeoutError
        return self._answers.pop(0)

    def close(self) -> None:
        self._answers.clear()


_IPV6 = bytes.fromhex("fd00" + "0" * 27 + "7")


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ([address(0, 0, (1, b"\n\0\0\1"), (2, b"\n\0\0\7"), (3, b"tun0\0")) + message(3)], ["10.0.0.7"]),
        ([address(1, 0, (1, b"\n\0\0\7"), (2, b"\n\0\0\7")), message(3)], ["10.0.0.7"]),
        ([address(0x80, 0, (1, _IPV6)) + address(0x80, 253, (1, _IPV6[:-1] + b"\x08")) + message(3)], ["fd00::7"]),
        ([address(flag, 0, (1, _IPV6)) for flag in (0x01, 0x08, 0x20, 0x40)] + [message(3)], []),
        ([address(0x80, 0, (1, bytes(12) + b"\n\0\0\7")) + address(0x80, 0, (1, _IPV6)) + message(3)], ["fd00::7"]),
        ([address(0, 0, (1, b"\n\0\0\7")) + message(3, bytes(4))], ["10.0.0.7"]),
        ([address(0, 0, (3, b"eth0")) + bytes(20), message(3)], []),
    ],
    ids=["point to point", "secondary", "link-local", "unusable", "compatible", "with a status", "torn"],
)
def test_what_the_kernel_may_answer(answers: list[bytes], found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [interfaces.socket.AF_INET6 if b"\xfd\0" in b"".join(answers) else interfaces.socket.AF_INET]
    monkeypatch.setattr(interfaces.socket, "socket", _Kernel(*answers))
    assert list(interfaces._told(kinds[0])) == found


@pytest.mark.parametrize("kind", [2, 3])
def test_where_the_kernel_refuses_the_address_of_ssh_is_the_only_one(
    kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = message(kind, (-errno.EPERM).to_bytes(4, sys.byteorder, signed=True))
    monkeypatch.setattr(interfaces.socket, "socket", _Kernel(refusal))
    monkeypatch.setenv("SSH_CONNECTION", "10.1.0.1 50000 10.1.0.7 22")
    assert interface_addresses() == ["10.1.0.7"]
    for other in ("127.0.0.1", "::1", "fe80::1%eth0"):
        monkeypatch.setenv("SSH_CONNECTION", f"10.1.0.1 50000 {other} 22")
        monkeypatch.setattr(interfaces.socket, "socket", _Kernel(refusal))
        assert interface_addresses() == []
    monkeypatch.delenv("SSH_CONNECTION")
    monkeypatch.setattr(interfaces.socket, "socket", _Kernel(refusal))
    assert interface_addresses() == []


def test_a_sandbox_without_netlink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that of a service with RestrictAddressFamilies=; other kinds of Unix do not know the name."""

    def refused(*_: int) -> None:
        raise OSError(errno.EAFNOSUPPORT, "not here")

    monkeypatch.setenv("SSH_CONNECTION", "10.1.0.1 50000 10.1.0.7 22")
    monkeypatch.setattr(interfaces.socket, "socket", refused)
    assert interface_addresses() == ["10.1.0.7"]
    monkeypatch.undo()
    monkeypatch.setenv("SSH_CONNECTION", "10.1.0.1 50000 10.1.0.7 22")
    monkeypatch.delattr(interfaces.socket, "AF_NETLINK")
    assert interface_addresses() == ["10.1.0.7"]


@pytest.mark.parametrize(
    "answers", [[], [message(2, (-errno.ENOBUFS).to_bytes(4, sys.byteorder, signed=True))]], ids=["silence", "no room"]
)
def test_what_goes_wrong_otherwise_is_an_error(answers: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces.socket, "socket", _Kernel(*answers))
    with pytest.raises(OSError):
        interface_addresses()
