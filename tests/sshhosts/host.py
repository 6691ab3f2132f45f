"""One throw-away SSH host, and what can be done to it and asked about it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sshhosts import procfs
from sshhosts.config import host_spec
from sshhosts.options import PASSWORD, Options

if TYPE_CHECKING:
    from sshhosts.hosts import Hosts

_DEADLINE = 30.0  # seconds, for sshd to end or to start
_UNITS = {"kbit": 125, "mbit": 125_000, "gbit": 125_000_000}


def _bytes_per_second(rate: str | None) -> float:
    if rate is None:
        return 0
    found = re.fullmatch(r"([0-9.]+)([kmg]bit)", rate)
    if found is None:
        raise ValueError(f"rate must be like 10mbit, not {rate!r}")
    return float(found[1]) * _UNITS[found[2]]


class Host:
    """One SSH host.

    Attributes:
        name: Its alias in the ssh config, and its hostname.
        address: Its address on the bridge.
        port: Port of its sshd.
        user: Account that the ssh config names.
        pid: Its first process, as seen from here; 0 while it is powered off.
        home: Home directory of the account, as the host sees it.
        changed: It was powered off, cut off, slowed, filled up or given another sshd: no longer as new.
    """

    def __init__(self, pool: Hosts, name: str, address: str, options: Options) -> None:
        self._pool = pool
        self._options = options
        self.name = name
        self.address = address
        self.port = options.port
        self.user = options.user
        self.password = PASSWORD
        self.home = "/root" if options.user == "root" else f"/home/{options.user}"
        self.pid = 0
        self.changed = False
        self._baseline_tmp: set[str] = set()
        self._identity = ""
        self._wire: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Host {self.name} {self.user}@{self.address}:{self.port}>"

    def _started(self, pid: int) -> None:
        self.pid = pid
        self._identity = procfs.namespace(pid)
        self._baseline_tmp = set(self._tmp())

    def run(
        self,
        command: str | Sequence[str],
        *,
        user: str | None = None,
        check: bool = True,
        timeout: float = 30,
        **more: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside the host, not through ssh, as root or as one of its users.

        Args:
            command: A line for ``sh -c``, or a list of arguments.
            user: Account that runs it; root unless given.
            check: Raise ``CalledProcessError`` when it fails.
            timeout: Seconds.
            more: Passed on to ``subprocess.run``.

        Returns:
            What came out, as text.
        """
        return subprocess.run(
            self.inside(command, user=user), check=check, timeout=timeout, capture_output=True, text=True, **more
        )

    def inside(self, command: str | Sequence[str], *, user: str | None = None) -> list[str]:
        """Arguments that run a command inside the host, for ``subprocess.Popen``."""
        arguments = ["sh", "-c", command] if isinstance(command, str) else list(command)
        if user is not None:
            arguments = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--", *arguments]
        path = f"PATH={self._pool.path_of(self._options)}"
        home = f"HOME={self.home if user == self.user else f'/home/{user}' if user else '/root'}"
        enter = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "--root", "--wd=/tmp"]
        return [*enter, "--", "env", path, home, *arguments]

    def path(self, path: str | os.PathLike[str]) -> Path:
        """Where a file of the host is seen from here; ``~`` and relative paths start at the user's home."""
        inner = os.path.join(self.home, os.fspath(path).replace("~", self.home, 1))
        return Path(f"/proc/{self.pid}/root{inner}")

    def processes(self, *, sshd: bool = False) -> list[procfs.Process]:
        """Processes of the host beside its first one and (unless ``sshd``) those of its sshd."""
        return [
            found
            for found in procfs.processes_of_namespaces().get(self._identity, [])
            if found.inner_pid != 1 and (sshd or not found.name.startswith("sshd"))
        ]

    def sessions(self) -> list[procfs.Process]:
        """Processes of sshd that serve a connection."""
        return [
            found for found in self.processes(sshd=True) if found.name.startswith("sshd") and found.parent != self.pid
        ]

    def listening_ports(self) -> list[int]:
        """TCP ports that listen on the host, beside sshd's own."""
        return [port for port in procfs.listening_ports(self.pid) if port != self.port]

    def tmp_entries(self) -> list[str]:
        """Paths in /tmp, /var/tmp and /dev/shm that were not there when the host started."""
        return sorted(set(self._tmp()) - self._baseline_tmp)

    def _tmp(self) -> Iterator[str]:
        for folder in ("/tmp", "/var/tmp", "/dev/shm", "/run/user"):
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(f"/proc/{self.pid}/root{folder}"):
                    yield f"{folder}/{name}"

    def leftovers(self) -> list[str]:
        """All that a well-behaved user has cleaned up: processes, sessions, listening ports, temporary files."""
        if not self.pid:
            return []
        found = [f"{self.name}: process {process}" for process in self.processes()]
        found += [f"{self.name}: ssh session {process}" for process in self.sessions()]
        found += [f"{self.name}: listening port {port}" for port in self.listening_ports()]
        return found + [f"{self.name}: {path}" for path in self.tmp_entries()]

    def clear(self) -> None:
        """End everything that runs on the host beside its sshd, and empty its temporary directories."""
        for found in [*self.processes(), *self.sessions()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found.pid, 9)
        for entry in self.tmp_entries():
            target = Path(f"/proc/{self.pid}/root{entry}")
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target, ignore_errors=True)
            else:
                target.unlink(missing_ok=True)

    def log(self) -> str:
        """What sshd has logged."""
        return Path(f"/proc/{self.pid}/root/run/host/sshd.log").read_text(errors="replace")

    def power_off(self) -> None:
        """End the host at once: its network first, then all processes. Nobody is told."""
        self.changed = True
        self._remove_wire()
        self._pool.request({"stop": self.name})
        self.pid = 0

    def power_on(self) -> None:
        """Start it again after ``power_off``: same address and keys, its files are gone."""
        self._pool.start_again(self)

    def cut_off(self) -> None:
        """Take its network cable out."""
        self.changed = True
        self._pool.switch(["ip", "link", "set", "dev", f"{self.name[:10]}-0", "down"])

    def restore(self) -> None:
        """Put the network cable back in, and a good one."""
        self._remove_wire()
        self._pool.switch(["ip", "link", "set", "dev", f"{self.name[:10]}-0", "up"])

    def slow(self, delay_ms: float = 0, rate: str | None = None, loss: float | tuple[float, float] = 0) -> None:
        """Give the host a bad network cable, instead of a bad one that it may have.

        Args:
            delay_ms: What each round trip takes longer, half of it on either way.
            rate: Bandwidth of each way as in tc(8): ``10mbit``.
            loss: The part of the frames that is lost, from 0 to 1; if two, of what the host says and what it is told.
        """
        self.changed = True
        self._remove_wire()
        port, outer, inner = (f"{self.name[:10]}-{suffix}" for suffix in ("0", "a", "b"))
        bridge = self._pool.bridge_of(self)
        self._pool.switch(["ip", "link", "add", "name", inner, "type", "veth", "peer", "name", outer])
        self._pool.switch(["ip", "link", "set", "dev", port, "nomaster"])
        self._pool.switch(["ip", "link", "set", "dev", outer, "master", bridge, "up"])
        self._pool.switch(["ip", "link", "set", "dev", inner, "up"])
        losses = loss if isinstance(loss, tuple) else (loss, loss)
        settings = {"delay": delay_ms / 2000, "loss": losses, "rate": _bytes_per_second(rate)}
        self._wire = self._pool.wire([port, inner, json.dumps(settings)])

    def unplug(self) -> None:
        """End what stands for a bad cable; the host has none then."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.communicate()

    def _remove_wire(self) -> None:
        if self._wire is None:
            return
        self.unplug()
        port = self.name[:10]
        self._pool.switch(["ip", "link", "set", "dev", f"{port}-0", "master", self._pool.bridge_of(self)])
        self._pool.switch(["ip", "link", "del", "dev", f"{port}-a"])

    def fill_disk(self, path: str = "/tmp") -> None:
        """Leave no free space in the file system at ``path``: ``/tmp`` or the user's home (``~``)."""
        self.changed = True
        inner = self.home if path == "~" else path
        place = self.path(inner)

        def filled() -> bool:
            usage = os.statvfs(place)
            used = max(1, usage.f_blocks - usage.f_bfree)
            try:
                self._remount(inner, f"size={used * usage.f_frsize}")
            except subprocess.CalledProcessError:  # somebody has just written something
                return False
            return True

        self._wait(filled, f"{path} to be full")

    def free_disk(self, path: str = "/tmp") -> None:
        """Undo ``fill_disk``."""
        inner = self.home if path == "~" else path
        self._remount(inner, f"size={self._options.tmp_size if inner == '/tmp' else self._options.home_size}")

    def _remount(self, path: str, options: str) -> None:
        self.run(["mount", "-o", f"remount,{options}", path])

    def authorize(self, public_key: str) -> None:
        """Let a further key log in, as any user."""
        with Path(f"/proc/{self.pid}/root/run/host/authorized_keys").open("a") as file:
            file.write(public_key.rstrip("\n") + "\n")

    def restart_sshd(self, **options: str) -> None:
        """Start sshd anew with further or other options; connections that exist stay, as on a real host."""
        self.changed = True
        self._options = dataclasses.replace(self._options, sshd={**self._options.sshd, **options})
        spec = host_spec(self._pool.layout(self._options), self.name, self._options)
        Path(f"/proc/{self.pid}/root/run/host/sshd_config").write_text(spec["files"]["sshd_config"][1])
        for found in self.processes(sshd=True):
            if found.parent == self.pid and found.name == "sshd" and found not in self.sessions():
                os.kill(found.pid, 15)
        self._wait(lambda: self.port not in procfs.listening_ports(self.pid), "the old sshd to end")
        self.run([spec["sshd"], "-f", "/run/host/sshd_config", "-E", "/run/host/sshd.log"])
        self._wait(lambda: self.port in procfs.listening_ports(self.pid), "the new sshd to listen")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _DEADLINE
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: waited {_DEADLINE:.0f} s for {what}\n{self.log()}")
            time.sleep(0.005)
