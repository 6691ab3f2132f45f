"""Sessions of sshd on the host: their processes, the TCP connections that they came by, and what outlives them."""

from __future__ import annotations

import _socket as socket  # the module proper takes as long to import as all others together
import os
import pwd
import struct

from .processes import ChildProcess, exists, parent_of, read_text

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Optional, Tuple

SSHD_FILE = "sshd"  # in the agent's directory: names the sshd that serves the manager now, if it is not the first
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_LARGEST = 1 << 20  # bytes of a table; who has more connections than that is not to wait for us
_ESTABLISHED = "01"
_MAPPED = "0000000000000000FFFF0000"
_LOGIND_FILES = (
    "/etc/systemd/logind.conf",
    "/usr/lib/systemd/logind.conf.d/*.conf",
    "/usr/local/lib/systemd/logind.conf.d/*.conf",
    "/run/systemd/logind.conf.d/*.conf",
    "/etc/systemd/logind.conf.d/*.conf",
)


class SshSession:
    """A session of sshd, whose streams the agent has.

    Args:
        connection: Held as long as its process on the host is to live.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        pid = _peer(connection)
        sshd = sshd_above(pid) if pid else None
        self._sshd = ChildProcess(sshd) if sshd else None
        self._tcp = tcp_connection(pid) if pid else None

    @property
    def up(self) -> bool:
        """True if sshd is there."""
        return self._sshd is not None and self._sshd.alive

    @property
    def cut(self) -> bool:
        """True if the link is lost for certain: without sshd, or with one that is about to end."""
        return not self.up or (self._tcp is not None and not self._tcp.stands())

    def note(self, directory: str) -> None:
        """Leave word for the guardian, which ends this session when the agent has ended."""
        path = os.path.join(directory, SSHD_FILE)
        with open(path + ".new", "w") as file:
            sshd = self._sshd
            file.write("{} {}".format(sshd.pid, sshd.started or 0) if sshd is not None else "0 0")
        os.rename(path + ".new", path)

    def signal(self, number: int) -> None:
        """Send sshd a signal: it may hold ports, for a manager that it cannot reach."""
        if self._sshd is not None:
            self._sshd.signal(number)

    def close(self) -> None:
        """Let its process on the host end."""
        self._connection.close()


def _peer(connection: socket.socket) -> int:
    """Return the process that has connected; 0 where the system does not tell."""
    try:
        size = struct.calcsize("3i")
        return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[0])
    except (AttributeError, OSError):
        return 0


def sshd_above(pid: int) -> Optional[int]:
    """Return the sshd process that `pid` descends from, None if there is none within a few generations.

    Where /proc hides other users' processes (``hidepid``), it hides sshd's, too, also one that runs as this user: what
    hides above a session is taken for it.
    """
    for _ in range(6):
        parent = parent_of(pid)
        if not parent or parent == 1:
            return None
        try:
            with open("/proc/{}/comm".format(parent)) as file:
                name = file.read().strip()
        except OSError:
            return parent if exists(parent) else None
        if name in ("sshd", "sshd-session", "dropbear"):
            return parent
        pid = parent
    return None


# --- its connection -------------------------------------------------------------------------------
class TcpConnection:
    """The TCP connection that a session came by, as the host's system sees it; it stood once."""

    def __init__(self, local: Tuple[str, str], peer: Tuple[str, str]) -> None:
        addresses = [(_hexadecimal(local[0]), _hexadecimal(peer[0]))]
        if ":" not in local[0]:
            addresses.append((_MAPPED + addresses[0][0], _MAPPED + addresses[0][1]))
        ports = int(local[1]), int(peer[1])
        line = " {}:{:04X} {}:{:04X} {} "
        self._lines = [
            line.format(ours, ports[0], theirs, ports[1], _ESTABLISHED).encode() for ours, theirs in addresses
        ]

    def stands(self) -> bool:
        """Return whether both sides still have it."""
        for path in _TABLES:
            try:
                with open(path, "rb") as file:
                    table = file.read(_LARGEST)
            except OSError:
                continue
            if len(table) == _LARGEST or any(line in table for line in self._lines):
                return True
        return False


def tcp_connection(pid: int) -> Optional[TcpConnection]:
    """Return the TCP connection that a process of an ssh session came by; None where it cannot be seen."""
    try:
        with open("/proc/{}/environ".format(pid), "rb") as file:
            variables = file.read().split(b"\0")
        found = [value[len(b"SSH_CONNECTION=") :] for value in variables if value.startswith(b"SSH_CONNECTION=")]
        peer, peer_port, local, local_port = found[0].decode("ascii").split()
        connection = TcpConnection((local, local_port), (peer, peer_port))
    except (OSError, ValueError, IndexError):  # e.g. "UNKNOWN", where sshd got its streams from something else
        return None
    return connection if connection.stands() else None


def _hexadecimal(address: str) -> str:
    """Return an address as the tables have it: in words of four bytes, in the machine's own order."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    packed = socket.inet_pton(family, address.partition("%")[0])
    return "".join("{:08X}".format(word) for word in struct.unpack("={}I".format(len(packed) // 4), packed))


# --- its end --------------------------------------------------------------------------------------
def kills_at_logout(root: str = "", session: str = "") -> str:
    """Return why nothing of this user outlives an ssh session; empty if it does.

    Args:
        root: A directory that stands for ``/``.
        session: The name of the session that logind has for this process, by default the one that it is in.
    """
    if not (session or os.environ.get("XDG_SESSION_ID") or "/session-" in read_text(root + "/proc/self/cgroup")):
        return ""  # logind knows nothing of it
    import glob

    settings = {"KillUserProcesses": "no", "KillOnlyUsers": "", "KillExcludeUsers": "root"}
    file = ""
    for pattern in _LOGIND_FILES:
        for path in sorted(glob.glob(root + pattern)):
            for line in read_text(path).splitlines():
                name, equals, value = line.strip().partition("=")
                if equals and name.strip() in settings:
                    settings[name.strip()] = value.strip()
                    file = path[len(root) :] if name.strip() == "KillUserProcesses" else file
    if settings["KillUserProcesses"].lower() not in ("yes", "true", "on", "1", "y", "t"):
        return ""
    user, only = _user(), settings["KillOnlyUsers"].split()
    if user in settings["KillExcludeUsers"].split() or (only and user not in only):
        return ""
    return "the system ends a user's processes at logout (KillUserProcesses=yes in {})".format(file)


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
