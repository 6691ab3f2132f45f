"""SSH hosts for an ordinary user: sshd's on loopback addresses, without namespaces."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sshhosts import procfs
from sshhosts.hosts import make_keys
from sshhosts.options import HostsUnavailableError, Options

_DEADLINE = 10.0


class LoopbackHost:
    """An sshd on a loopback address; processes, /tmp and ports are shared with the machine."""

    def __init__(self, name: str, address: str, port: int, server: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.address = address
        self.port = port
        self.user = getpass.getuser()
        self.home = os.path.expanduser("~")
        self.pid = server.pid
        self.changed = False

    def path(self, path: str) -> Path:
        """Where a file of the host is seen from here."""
        return Path(self.home, path.replace("~", self.home, 1))

    def processes(self) -> list[procfs.Process]:
        """What runs below the sshd."""
        return [found for found in procfs.descendants(self.pid) if not found.name.startswith("sshd")]

    def sessions(self) -> list[procfs.Process]:
        """Processes of sshd that serve a connection."""
        return [found for found in procfs.descendants(self.pid) if found.name.startswith("sshd")]

    def leftovers(self) -> list[str]:
        """Processes and sessions that are left; ports and files cannot be told from the machine's own."""
        found = [f"{self.name}: process {process}" for process in self.processes()]
        return found + [f"{self.name}: ssh session {process}" for process in self.sessions()]

    def clear(self) -> None:
        """End everything that runs on the host beside its sshd."""
        for found in procfs.descendants(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(found.pid, 9)


class LoopbackHosts(Sequence[LoopbackHost]):
    """Some hosts on loopback; a context manager with what ``Hosts`` has that works without namespaces."""

    def __init__(self, count: int) -> None:
        self.options = Options()
        self._count = count
        self._hosts: list[LoopbackHost] = []
        self._servers: list[subprocess.Popen[bytes]] = []

    def __len__(self) -> int:
        return len(self._hosts)

    def __getitem__(self, index: Any) -> Any:
        return self._hosts[index]

    def __enter__(self) -> LoopbackHosts:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        """The aliases, in order."""
        return [host.name for host in self._hosts]

    @property
    def all(self) -> list[LoopbackHost]:
        """The hosts."""
        return list(self._hosts)

    def start(self) -> LoopbackHosts:
        """Start the servers.

        Raises:
            HostsUnavailableError: There is no sshd.
        """
        sshd = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
        if sshd is None or shutil.which("ssh-keygen") is None:
            raise HostsUnavailableError("sshd is missing: install openssh-server")
        self.directory = Path(tempfile.mkdtemp(prefix="lazycluster-loopback-", dir="/tmp"))
        self.config_file = str(self.directory / "config")
        self.key_file = str(self.directory / "id_ed25519")
        names = [f"host{number + 1}" for number in range(self._count)]
        make_keys(self.directory, names)
        try:
            blocks = [self._start_one(sshd, name, f"127.0.0.{number + 11}") for number, name in enumerate(names)]
        except BaseException:
            self.close()
            raise
        Path(self.config_file).write_text("\n".join(blocks))
        return self

    def _start_one(self, sshd: str, name: str, address: str) -> str:
        with socket.create_server((address, 0)) as probe:
            port = probe.getsockname()[1]
        folder = self.directory
        path = f"{os.path.dirname(self.options.interpreter or '')}:/usr/local/bin:/usr/bin:/bin"
        (folder / f"{name}.conf").write_text(
            f"ListenAddress {address}\nPort {port}\nHostKey {folder}/{name}.key\nPidFile none\nStrictModes no\n"
            f"AuthorizedKeysFile {folder}/id_ed25519.pub\nUsePAM no\nPasswordAuthentication no\n"
            f"Subsystem sftp internal-sftp\nSetEnv PATH={path}\n"
        )
        log = folder / f"{name}.log"
        server = subprocess.Popen(
            [sshd, "-D", "-f", str(folder / f"{name}.conf"), "-E", str(log)], stdin=subprocess.DEVNULL
        )
        self._servers.append(server)
        deadline = time.monotonic() + _DEADLINE
        while not log.exists() or "Server listening" not in log.read_text():
            if server.poll() is not None or time.monotonic() > deadline:
                raise HostsUnavailableError(f"sshd does not start: {log.read_text() if log.exists() else ''}")
            time.sleep(0.005)
        host = LoopbackHost(name, address, port, server)
        self._hosts.append(host)
        known = folder / "known_hosts"
        with known.open("a") as file:
            file.write(f"[{address}]:{port} {(folder / f'{name}.key.pub').read_text().strip()}\n")
        return (
            f"Host {name}\n    HostName {address}\n    Port {port}\n    User {host.user}\n"
            f"    UserKnownHostsFile {known}\n    GlobalKnownHostsFile none\n    StrictHostKeyChecking yes\n"
            f"    IdentitiesOnly yes\n    IdentityAgent none\n    IdentityFile {self.key_file}\n"
        )

    def close(self) -> None:
        """End the servers, and what their sessions left."""
        for host in self._hosts:
            host.clear()
        for server in self._servers:
            server.terminate()
            server.wait()
        shutil.rmtree(self.directory, ignore_errors=True)
