"""The TCP connection that an ssh session came by, as the host's system sees it."""

from __future__ import annotations

import _socket as socket  # the module proper takes as long to import as all others together
import struct

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Optional, Tuple

_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_LARGEST = 1 << 20  # bytes of a table; who has more connections than that is not to wait for us
_ESTABLISHED = "01"
_MAPPED = "0000000000000000FFFF0000"


class TcpConnection:
    """A connection that stood once; see `of_session`."""

    def __init__(self, local: Tuple[str, str], peer: Tuple[str, str]) -> None:
        addresses = [(_number(local[0]), _number(peer[0]))]
        if ":" not in local[0]:
            addresses.append((_MAPPED + addresses[0][0], _MAPPED + addresses[0][1]))
        ports = int(local[1]), int(peer[1])
        line = " {}:{:04X} {}:{:04X} {} "
        self._lines = [line.format(ours, ports[0], theirs, ports[1], _ESTABLISHED) for ours, theirs in addresses]

    def stands(self) -> bool:
        """Whether both sides still have it."""
        for path in _TABLES:
            try:
                with open(path, encoding="ascii") as file:
                    table = file.read(_LARGEST)
            except OSError:
                continue
            if len(table) == _LARGEST or any(line in table for line in self._lines):
                return True
        return False


def of_session(pid: int) -> Optional[TcpConnection]:
    """Return the connection that a process of an ssh session came by; None where it cannot be seen."""
    try:
        with open("/proc/{}/environ".format(pid), "rb") as file:
            variables = file.read().split(b"\0")
        found = [value[len(b"SSH_CONNECTION=") :] for value in variables if value.startswith(b"SSH_CONNECTION=")]
        peer, peer_port, local, local_port = found[0].decode("ascii").split()
        connection = TcpConnection((local, local_port), (peer, peer_port))
    except (OSError, ValueError, IndexError):  # e.g. "UNKNOWN", where sshd got its streams from something else
        return None
    return connection if connection.stands() else None


def _number(address: str) -> str:
    """Return an address as the tables have it: in words of four bytes, in the machine's own order."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    packed = socket.inet_pton(family, address.partition("%")[0])
    return "".join("{:08X}".format(word) for word in struct.unpack("={}I".format(len(packed) // 4), packed))
