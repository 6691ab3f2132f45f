"""Throw-away SSH hosts: real OpenSSH servers in namespaces of their own."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sshhosts.config import client_config, host_spec
from sshhosts.host import Host
from sshhosts.options import HostsFailedError, HostsUnavailableError, Options

CHECKOUT = Path(__file__).resolve().parents[2]
_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_WIRE = Path(__file__).with_name("wire.py")
_DEADLINE = 30.0  # seconds, for anything that the supervisor is asked
_PREFIX = "lzhosts-"

LIVE: weakref.WeakSet[Hosts] = weakref.WeakSet()


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
            fcntl.flock(log, fcntl.LOCK_EX)  # the supervisor inherits it: it is held as long as that one lives
            self._supervisor = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, cwd="/"
            )
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

    def bridge_of(self, host: Host) -> str:
        """The bridge that a host's first port belongs to."""
        bridge: str = self._specs[host.name]["interfaces"][0]["bridge"]
        return bridge

    def wire(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        """Start what stands for a bad cable, in the namespace of the bridges; it ends with its input."""
        enter = ["nsenter", "-t", str(self.supervisor_pid), "-n", "--"]
        command = [*enter, sys.executable, "-I", "-S", str(_WIRE), *arguments]
        wire = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_tools_environment())
        assert wire.stdout is not None
        if wire.stdout.readline() != b"ready\n":
            wire.communicate()
            raise HostsFailedError(f"no cable: {' '.join(command)} ended with status {wire.returncode}")
        return wire

    def close(self) -> None:
        """End all hosts, and remove what was made for them. May be called again."""
        atexit.unregister(self.close)
        LIVE.discard(self)
        supervisor, self._supervisor = self._supervisor, None
        for host in self.all:
            host.unplug()
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
    """Remove directories of hosts whose supervisor is gone, as after a power cut.

    A process id would not do: whoever owns the others may live in another pid namespace.
    """
    for directory in Path("/tmp").glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), (directory / "supervisor.log").open("rb") as log:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)


def _tools_environment() -> dict[str, str]:
    return {**os.environ, "PATH": os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"}
