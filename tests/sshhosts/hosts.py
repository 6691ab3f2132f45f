"""Throw-away SSH hosts: real OpenSSH servers in namespaces of their own."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sshhosts import procfs
from sshhosts.config import client_config, host_spec
from sshhosts.options import PASSWORD, HostsFailedError, HostsUnavailableError, Options

CHECKOUT = Path(__file__).resolve().parents[2]
_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_DEADLINE = 30.0  # seconds, for anything that the supervisor is asked
_PREFIX = "lazycluster-hosts-"

LIVE: weakref.WeakSet[Hosts] = weakref.WeakSet()


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
        """Put the network cable back in, and end any slowness."""
        self._pool.switch(["ip", "link", "set", "dev", f"{self.name[:10]}-0", "up"])
        with contextlib.suppress(subprocess.CalledProcessError):
            self._pool.switch(["tc", "qdisc", "del", "dev", f"{self.name[:10]}-0", "root"])

    def slow(self, delay_ms: float = 0, rate: str | None = None) -> None:
        """Slow down what comes to the host.

        Args:
            delay_ms: Delay of every packet.
            rate: Bandwidth as in tc(8): ``10mbit``.

        Raises:
            HostsUnavailableError: The kernel cannot do it.
        """
        self.changed = True
        port = f"{self.name[:10]}-0"
        if delay_ms:
            discipline = ["netem", "delay", f"{delay_ms}ms", *(["rate", rate] if rate else [])]
        else:
            discipline = ["tbf", "rate", rate or "1gbit", "burst", "64kb", "latency", "400ms"]
        try:
            self._pool.switch(["tc", "qdisc", "replace", "dev", port, "root", *discipline])
        except subprocess.CalledProcessError as error:
            raise HostsUnavailableError(f"the kernel cannot slow a link down: {error.stderr.strip()}") from error

    def fill_disk(self, path: str = "/tmp") -> None:
        """Leave no free space in the file system at ``path``: ``/tmp`` or the user's home (``~``)."""
        self.changed = True
        inner = self.home if path == "~" else path
        usage = os.statvfs(self.path(inner))
        used = max(1, usage.f_blocks - usage.f_bfree)
        self._remount(inner, f"size={used * usage.f_frsize}")

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


class Hosts(Sequence[Host]):
    """Some SSH hosts on a bridge, and what ssh needs to reach them; a context manager.

    Attributes:
        directory: Private directory with all files; removed at the end.
        config_file: An ssh config with the aliases ``host1`` … ``hostN`` (and ``bastion``).
        key_file: The user's private key.
        known_hosts: File with the hosts' public keys.
        manager_address: Address of this machine on the hosts' bridge.
    """

    def __init__(self, count: int, *, keep: bool = False, directory: str | None = None, **options: Any) -> None:
        """Describe hosts; ``start`` or ``with`` brings them up.

        Args:
            count: How many.
            keep: They stay when this process ends (until the supervisor gets SIGTERM).
            directory: Where the files are made, instead of a new temporary directory.
            options: The fields of ``Options``.
        """
        self.options = Options(**options)
        self._count = count
        self._keep = keep
        self._directory = directory
        self._hosts: list[Host] = []
        self._supervisor: subprocess.Popen[bytes] | None = None
        self.bastion: Host | None = None
        self.manager_address = ""
        self.supervisor_pid = 0

    def __len__(self) -> int:
        return len(self._hosts)

    def __getitem__(self, index: Any) -> Any:
        return self._hosts[index]

    def __enter__(self) -> Hosts:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def names(self) -> list[str]:
        """The aliases, in order."""
        return [host.name for host in self._hosts]

    @property
    def all(self) -> list[Host]:
        """The hosts, and the bastion if there is one."""
        return [*self._hosts, *([self.bastion] if self.bastion else [])]

    def start(self) -> Hosts:
        """Bring the hosts up.

        Raises:
            HostsUnavailableError: Something that they need is missing here.
        """
        require_namespaces()
        remove_stale()
        self.directory = Path(self._directory or tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
        self.config_file = str(self.directory / "config")
        self.key_file = str(self.directory / "id_ed25519")
        self.known_hosts = str(self.directory / "known_hosts")
        try:
            self._bring_up()
        except BaseException:
            self.close()
            raise
        LIVE.add(self)
        if not self._keep:
            atexit.register(self.close)
        return self

    def layout(self, options: Options) -> dict[str, Any]:
        """What the description of every host needs to know about this set."""
        return {
            "directory": str(self.directory),
            "hidden": [str(CHECKOUT / "src"), str(CHECKOUT / "tests")],
            "path": self.path_of(options),
            "public_key": (self.directory / "id_ed25519.pub").read_text(),
            "names": [f"host{number + 1}" for number in range(self._count)],
        }

    @staticmethod
    def path_of(options: Options) -> str:
        """The PATH of sessions on a host."""
        first = [*options.path]
        if options.interpreter is None:
            return ":".join([*first, "/run/host/bin"])
        return ":".join([*first, os.path.dirname(options.interpreter), "/usr/local/bin", "/usr/bin", "/bin"])

    def _bring_up(self) -> None:
        names = [f"host{number + 1}" for number in range(self._count)]
        machines = names + (["bastion"] if self.options.bastion else [])
        make_keys(self.directory, machines)
        if self.options.shared_home:
            (self.directory / "home").mkdir()
        bastion = Options(sshd=self.options.bastion_sshd)
        specs = [host_spec(self.layout(self.options), name, self.options) for name in names]
        if self.options.bastion:
            specs.append(host_spec(self.layout(bastion), "bastion", bastion, inner=True))
        self._specs = {spec["name"]: spec for spec in specs}
        description = {
            "directory": str(self.directory),
            "manager_pid": os.getpid(),
            "bridges": ["front", "inner"] if self.options.bastion else ["front"],
            "hosts": specs,
        }
        reply = self._launch(description)
        self.supervisor_pid = reply["pid"]
        subnet = reply["subnet"]
        self.manager_address = f"198.18.{subnet}.1"
        inner = "198.19" if self.options.bastion else "198.18"
        for number, name in enumerate(names):
            self._hosts.append(Host(self, name, f"{inner}.{subnet}.{number + 10}", self.options))
        if self.options.bastion:
            self.bastion = Host(self, "bastion", f"198.18.{subnet}.2", bastion)
        for host in self.all:
            host._started(reply["hosts"][host.name])
        config, known_hosts = client_config(self.directory, self.all, self.options)
        Path(self.config_file).write_text(config)
        Path(self.known_hosts).write_text(known_hosts)

    def _launch(self, description: dict[str, Any]) -> dict[str, Any]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LAZYCLUSTER_")}
        environment["PATH"] = environment.get("PATH", "") + ":/usr/sbin:/sbin"
        # -I -S: it needs nothing but the standard library, and starts in half the time.
        command = [sys.executable, "-I", "-S", str(_SUPERVISOR), *(["--keep"] if self._keep else [])]
        with (self.directory / "supervisor.log").open("wb") as log:
            self._supervisor = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, cwd="/"
            )
        (self.directory / "supervisor.pid").write_text(str(self._supervisor.pid))
        return self.request(description)

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Ask the supervisor for something, and wait for its answer."""
        assert self._supervisor is not None and self._supervisor.stdin and self._supervisor.stdout
        try:
            self._supervisor.stdin.write(json.dumps(message).encode() + b"\n")
            self._supervisor.stdin.flush()
            line = self._supervisor.stdout.readline()
        except BrokenPipeError:
            line = b""
        log = self.directory / "supervisor.log"
        said = log.read_text(errors="replace") if log.exists() else ""
        if not line:
            raise HostsFailedError(f"the hosts' supervisor ended: {said}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise HostsFailedError(f"the hosts could not be made: {reply['error']}\n{said}")
        return reply

    def start_again(self, host: Host) -> None:
        """Power one host on again."""
        reply = self.request({"start": [self._specs[host.name]]})
        host._started(reply["hosts"][host.name])

    def switch(self, command: list[str]) -> None:
        """Run a command in the namespace of the bridges."""
        enter = ["nsenter", "-t", str(self.supervisor_pid), "-n", "--"]
        subprocess.run([*enter, *command], check=True, capture_output=True, text=True, env=_tools_environment())

    def close(self) -> None:
        """End all hosts, and remove what was made for them. May be called again."""
        atexit.unregister(self.close)
        LIVE.discard(self)
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            if self._keep:
                supervisor.terminate()
            assert supervisor.stdin and supervisor.stdout
            supervisor.stdin.close()
            try:
                supervisor.wait(_DEADLINE)
            except subprocess.TimeoutExpired:
                supervisor.kill()
                supervisor.wait()
            supervisor.stdout.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def release(self) -> int:
        """Let hosts that were started with ``keep`` live on without this process; returns their supervisor's pid."""
        assert self._supervisor is not None and self._supervisor.stdin and self._supervisor.stdout
        self._supervisor.stdin.close()
        self._supervisor.stdout.close()
        self._supervisor.returncode = 0
        LIVE.discard(self)
        return self.supervisor_pid


def make_keys(directory: Path, machines: Sequence[str]) -> None:
    """Make the user's key and a key for each host, all at once."""
    targets = ["id_ed25519", *(f"{name}.key" for name in machines)]
    started = [
        subprocess.Popen(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", target, "-f", str(directory / target)],
            stdin=subprocess.DEVNULL,
        )
        for target in targets
    ]
    for process in started:
        if process.wait() != 0:
            raise HostsFailedError("ssh-keygen failed")


def require_namespaces() -> None:
    """Raise when hosts with namespaces cannot be made here, saying why.

    Raises:
        HostsUnavailableError: No Linux, not root, or a program is missing.
    """
    if sys.platform != "linux":
        raise HostsUnavailableError("throw-away hosts need Linux")
    if os.geteuid() != 0:
        raise HostsUnavailableError("throw-away hosts with namespaces of their own need root")
    for program, package in (("sshd", "openssh-server"), ("ssh", "openssh-client"), ("ip", "iproute2")):
        if shutil.which(program, path=_tools_environment()["PATH"]) is None:
            raise HostsUnavailableError(f"{program} is missing: install {package}")


def remove_stale() -> None:
    """Remove directories of hosts whose supervisor is gone, as after a power cut."""
    for directory in Path("/tmp").glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):
            pid = int((directory / "supervisor.pid").read_text())
            found = procfs.process(pid)
            if found is None or found.state == "Z":
                shutil.rmtree(directory, ignore_errors=True)


def _tools_environment() -> dict[str, str]:
    return {**os.environ, "PATH": os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"}
