"""The addresses of this host's interfaces, which the kernel is asked for: other modules import much more for that."""

from __future__ import annotations

import _socket as socket  # the module proper takes as long to import as all others together
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator, List, Tuple

# See netlink(7) and rtnetlink(7).
_HEADER = struct.Struct("=IHHII")  # of a message: its length, its type, flags, a number, a process
_ADDRESS = struct.Struct("=BBBBI")  # of an address: family, bits of the network, flags, scope, interface
_ATTRIBUTE = struct.Struct("=HH")  # its length, its type
_ERROR, _DONE, _NEW_ADDRESS, _GET_ADDRESS = 2, 3, 20, 22
_DUMP = 0x301  # NLM_F_REQUEST, NLM_F_DUMP
_PEER, _LOCAL = 1, 2  # attributes of an address; IPv6 has the first alone, for the address itself
_UNUSABLE = 0x01 | 0x08 | 0x20 | 0x40  # flags of an IPv6 address: temporary, duplicate, deprecated, tentative
_ROOM = 64 * 1024  # bytes; the kernel sends less at once
_LIMIT = 2.0  # seconds; it answers at once


def interface_addresses() -> List[str]:
    """Return the addresses of this host's interfaces, loopback and link-local ones left out; that of ssh first."""
    try:
        every = [*_told(socket.AF_INET), *_told(socket.AF_INET6)]
    except (AttributeError, OSError):  # another kind of Unix
        return []
    found = [text for text in every if not text.startswith(("127.", "169.254.", "0."))]
    through_ssh = os.environ.get("SSH_CONNECTION", "").split()
    if len(through_ssh) == 4 and through_ssh[2] in found:
        found.insert(0, through_ssh[2])
    return list(dict.fromkeys(found))


def _told(family: int) -> Iterator[str]:
    for kind, data in _messages(family):
        if kind != _NEW_ADDRESS:
            continue
        is_of, _, flags, scope, _ = _ADDRESS.unpack_from(data)
        if is_of != family or family == socket.AF_INET6 and (scope or flags & _UNUSABLE):
            continue
        attributes = dict(_attributes(data[_ADDRESS.size :]))
        address = attributes.get(_LOCAL, attributes.get(_PEER))
        if address:
            yield socket.inet_ntop(family, address)


def _messages(family: int) -> Iterator[Tuple[int, bytes]]:
    """Ask for all addresses of a family; yields the type of each message, and what it holds."""
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    try:
        kernel.settimeout(_LIMIT)
        question = _ADDRESS.pack(family, 0, 0, 0, 0)
        kernel.send(_HEADER.pack(_HEADER.size + len(question), _GET_ADDRESS, _DUMP, 1, 0) + question)
        while True:
            data = kernel.recv(_ROOM)
            while len(data) >= _HEADER.size:
                length, kind, _, _, _ = _HEADER.unpack_from(data)
                if kind in (_ERROR, _DONE) or length < _HEADER.size:
                    return
                yield kind, data[_HEADER.size : length]
                data = data[_aligned(length) :]
    finally:
        kernel.close()


def _attributes(data: bytes) -> Iterator[Tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            return
        yield kind, data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]


def _aligned(length: int) -> int:
    return (length + 3) & ~3
