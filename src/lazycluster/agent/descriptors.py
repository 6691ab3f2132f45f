"""File descriptors that are passed between processes over unix sockets.

Sent to the interpreters of functions, too: it needs no other module of ours.
"""

from __future__ import annotations

import _socket as socket  # the module proper takes as long to import as all others together
import os
import struct

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import List, Sequence, Tuple

_SIZE = struct.calcsize("i")


def send(connection: socket.socket, fds: Sequence[int], data: bytes) -> int:
    """Send bytes, and descriptors with the first of them.

    Args:
        connection: A unix socket.
        fds: The descriptors, which stay open here; none: bytes only.
        data: The bytes, at least one.

    Returns:
        How many of the bytes were sent. If any were, all descriptors were.

    Raises:
        OSError: The other end is closed, or nothing can be sent now.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("{}i".format(len(fds)), *fds))] if fds else []
    return connection.sendmsg([data], rights)


def send_to(path: str, fds: Sequence[int], data: bytes) -> socket.socket:
    """Connect to the unix socket at a path, and send bytes and descriptors to who listens there.

    Returns:
        The connection: an agent closes its end when it is done with the descriptors.

    Raises:
        OSError: Nothing listens there.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
        send(connection, fds, data)
    except OSError:
        connection.close()
        raise
    return connection


def receive(connection: socket.socket, most: int, size: int = 64, flags: int = 0) -> Tuple[bytes, List[int]]:
    """Receive bytes, and the descriptors that come with them, which programs started later do not inherit.

    Args:
        connection: A unix socket.
        most: How many descriptors may come at once.
        size: How many bytes are taken at most.
        flags: As for `socket.recvmsg`.

    Returns:
        The bytes, none at the end of the stream; the descriptors. Either all that were sent with the bytes, or none:
        if this process may not open so many files, those that came are closed.

    Raises:
        OSError: The connection is broken, or nothing can be received now.
    """
    data, ancillary, state, _ = connection.recvmsg(size, socket.CMSG_SPACE(most * _SIZE), flags)
    fds: List[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            count = len(payload) // _SIZE  # what was truncated may end in the middle of a number
            fds.extend(struct.unpack("{}i".format(count), payload[: count * _SIZE]))
    if state & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        return data, []
    for fd in fds:
        os.set_inheritable(fd, False)  # unlike all others, received ones are inheritable
    return data, fds
