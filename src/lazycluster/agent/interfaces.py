"""The addresses of this host's interfaces, which the kernel is asked for: other modules import much more for that."""

from __future__ import annotations

import _socket as socket  # the module proper takes as long to import as all others together
import errno
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator, List, Tuple

# See netlink(7) and rtnetlink(7).
_HEADER = struct.Struct("=IHHII")  # of a message: its length, its type, flags, a number, a process
_ADDRESS = struct.Struct("=BBBBI")  # of an address: family, bits of the network, flags, scope, interface
_ATTRIBUTE = struct.Struct("=HH")  # its length, its type
_STATUS = struct.Struct("=i")  # of an error, and of the end: 0, or less if something went wrong
_ERROR, _DONE, _NEW_ADDRESS, _GET_ADDRESS = 2, 3, 20, 22
_DUMP = 0x301  # NLM_F_REQUEST, NLM_F_DUMP
_PEER, _LOCAL = 1, 2  # attributes of an address; IPv6 has the first alone, for the address itself
_UNUSABLE = 0x01 | 0x08 | 0x20 | 0x40  # flags of an IPv6 address: temporary, duplicate, deprecated, tentative
_OF_ONE_LINK = ("127.", "169.254.", "0.", "::1", "fe80:")  # and of no link at all
_REFUSED = (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.ENOSYS)
_ROOM = 64 * 1024  # bytes; the kernel sends less at once
_LIMIT = 2.0  # seconds; it answers at once


def interface_addresses() -> List[str]:
    """Return the addresses of this host's interfaces, loopback and link-local ones left out; that of ssh first.

    Where the kernel tells none, as in some sandboxes and on other kinds of Unix, that of ssh is the only one.

    Raises:
        OSError: If they cannot be had at present: no descriptors are left, for instance.
    """
    by_ssh = os.environ.get("SSH_CONNECTION", "").split()[2:3]
    try:
        every = [*_told(socket.AF_INET), *_told(socket.AF_INET6)]
    except AttributeError:
        every = by_ssh
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        every = by_ssh
    found = [text for text in every if not text.lower().startswith(_OF_ONE_LINK)]
    if by_ssh and by_ssh[0] in found:
        found.insert(0, by_ssh[0])
    return list(dict.fromkeys(found))


def _told(family: int) -> Iterator[str]:
    for data in _messages(family):
        is_of, _, flags, scope, _ = _ADDRESS.unpack_from(data)
        if is_of != family:
            continue
        attributes = dict(_attributes(data[_ADDRESS.size :]))
        address = attributes.get(_LOCAL, attributes.get(_PEER))
        if address and (family == socket.AF_INET or _is_usable(address, flags, scope)):
            yield socket.inet_ntop(family, address)


def _is_usable(address: bytes, flags: int, scope: int) -> bool:
    return not scope and not flags & _UNUSABLE and address[:12] != bytes(12)  # ::1, and IPv4 written as IPv6


def _messages(family: int) -> Iterator[bytes]:
    """Ask for all addresses of a family; yields what each message holds."""
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    try:
        kernel.settimeout(_LIMIT)
        question = _ADDRESS.pack(family, 0, 0, 0, 0)
        kernel.send(_HEADER.pack(_HEADER.size + len(question), _GET_ADDRESS, _DUMP, 1, 0) + question)
        while True:
            data = kernel.recv(_ROOM)
            while len(data) >= _HEADER.size:
                length, kind, _, _, _ = _HEADER.unpack_from(data)
                part = data[_HEADER.size : max(length, _HEADER.size)]
                if kind in (_ERROR, _DONE):
                    code = _STATUS.unpack_from(part)[0] if len(part) >= _STATUS.size else 0
                    if code < 0:
                        raise OSError(-code, os.strerror(-code))
                    return
                if kind == _NEW_ADDRESS:
                    yield part
                data = data[_aligned(max(length, _HEADER.size)) :]
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
