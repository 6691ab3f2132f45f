"""System calls that not every Unix has, each with a fallback: the manager may be a Mac."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import subprocess
from pathlib import Path

from lazycluster.agent import processes

__all__ = [
    "SOCKET_PATH_SIZE",
    "boot_id",
    "control_groups",
    "descriptor_path",
    "enlarge_pipe",
    "extended_attributes",
    "forbids_programs",
    "is_own_peer",
    "process_descriptor",
    "process_start_time",
    "processor_time",
    "set_extended_attribute",
]

SOCKET_PATH_SIZE = 104
"""Bytes of a unix socket's path, with the null character at its end, that all systems allow; Linux allows 108."""

_PIPE_SIZE = 1024 * 1024
_REFUSED = -1  # no user has this number


def is_own_peer(connection: socket.socket) -> bool:
    """Return True unless the process at the other end of a unix socket is known to be another user's.

    Where the system does not tell, only the mode of the socket's directory keeps others away.
    """
    return _peer_uid(connection) in (None, os.getuid())


def _peer_uid(connection: socket.socket) -> int | None:
    if hasattr(socket, "SO_PEERCRED"):
        size = struct.calcsize("3i")
        return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1])
    import ctypes

    try:
        getpeereid = ctypes.CDLL(None).getpeereid  # macOS and the BSDs
    except (AttributeError, OSError):
        return None
    user, group = ctypes.c_uint32(), ctypes.c_uint32()
    failed = getpeereid(connection.fileno(), ctypes.byref(user), ctypes.byref(group))
    return _REFUSED if failed else user.value


def process_descriptor(pid: int) -> int | None:
    """Return a descriptor that becomes readable when a child has ended; None: one has to ask again and again."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # no Linux, an old one, or a container that forbids it
        return None


def process_start_time(pid: int) -> int | None:
    """Return what tells a process from a later one of the same number; None if it has ended."""
    return processes.start_time(pid)


def processor_time(pid: int) -> int | None:
    """Return the nanoseconds that a process has used; None if it has ended, or the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_bytes().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def boot_id() -> str:
    """Return what tells this start of the machine from others; "" if the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        pass
    asked = ["sysctl", "-n", "kern.bootsessionuuid"]  # macOS
    try:
        done = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def control_groups() -> list[str]:
    """Return the control groups of this process, as lines of ``/proc/self/cgroup``; none where there is no Linux."""
    try:
        return Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []


def descriptor_path(fd: int) -> str:
    """Return a short path of what a descriptor has open, to name what lies in a directory whose own path is too long.

    Raises:
        OSError: If the system has none.
    """
    if not Path("/proc/self/fd").is_dir():
        raise OSError(errno.ENAMETOOLONG, "the path is too long for a socket")
    return f"/proc/self/fd/{fd}"


def enlarge_pipe(fd: int) -> None:
    """Have a pipe hold more, so that both of its sides are woken less often."""
    with contextlib.suppress(AttributeError, OSError):  # no Linux, no pipe, or the user's limit for pipes is used up
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)


def forbids_programs(directory: str) -> bool:
    """Return whether no program can be started from a directory, as far as the system tells (``noexec``)."""
    try:
        return bool(os.statvfs(directory).f_flag & getattr(os, "ST_NOEXEC", 0))
    except OSError:
        return False


def extended_attributes(path: Path) -> dict[str, bytes]:
    """Return the extended attributes of a file (access lists are some); none where the system does not tell."""
    if not hasattr(os, "listxattr"):
        return {}
    try:
        return {name: os.getxattr(path, name) for name in os.listxattr(path)}
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise


def set_extended_attribute(path: Path, name: str, value: bytes) -> None:
    """Give a file an attribute that `extended_attributes` has returned for another one."""
    os.setxattr(path, name, value)
