"""Diagnosis of a host: what it needs to be usable, checked step by step."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from lazycluster import engines
from lazycluster.core import event_loop
from lazycluster.core.extras import pip_command
from lazycluster.exceptions import InvalidRuntimeError, LazyclusterError
from lazycluster.output.host_cells import megabytes
from lazycluster.output.lines import Tail
from lazycluster.ssh.agent_replies import check_shape, decoded_text
from lazycluster.ssh.connect_limit import resolve

from .option_names import spelled

if TYPE_CHECKING:
    from lazycluster.ssh.ssh_connection import SshConnection

__all__ = ["STEPS", "Diagnosis", "Step"]

STEPS = (
    "configuration",
    "name",
    "port",
    "host key",
    "authentication",
    "login shell",
    "Python",
    "forwarding",
    "temporary files",
    "clock",
    "packages",
    "bytecode",
)

# Kind of failure -> the step that failed; those before it went well.
_FAILED_STEP = {
    "config": "configuration",
    "ssh": "configuration",
    "manager": "configuration",
    "dns": "name",
    "refused": "port",
    "unreachable": "port",
    "dropped": "port",
    "proxy": "port",
    "host_key": "host key",
    "auth": "authentication",
    "shell": "login shell",
    "protocol": "login shell",
    "lost": "login shell",
    "python": "Python",
    "disk": "temporary files",
}
_PACKAGES = ("cloudpickle", *engines.PACKAGES, "numpy", "pandas")
_CLOCK_LIMIT = 5.0  # seconds
_LITTLE_SPACE = 100 * 1024 * 1024
_LIMIT = 30.0
_SAID = 2000  # bytes of what went wrong that are shown
_NO_GRACE = (
    "with KillUserProcesses: 'loginctl enable-linger' on the host, or KillUserProcesses=no; else have sessions run in "
    "the process namespace of their sshd"
)
_IN_PYTHON = 'in Python, environment="manager"'
_ASK_HOST = """
import json, os, sys, time
now = time.time()
place = os.statvfs(sys.argv[1])
print(json.dumps([now, place.f_bavail * place.f_frsize, place.f_files == 0 or place.f_favail, bool(place.f_flag & 8)]))
"""


@dataclass
class Step:
    """A step on the way to a usable host.

    Attributes:
        name: What is checked, one of `STEPS`.
        state: ``ok``, ``failed``, ``differs`` (it matters for some uses only), ``not reached``.
        detail: What was found.
        fix: How to fix it, if it is not ok.
    """

    name: str
    state: str = "not reached"
    detail: str = ""
    fix: str = ""


@dataclass
class Diagnosis:
    """The steps of one host, in order.

    Attributes:
        host: The host.
        steps: See `STEPS`.
        reaches: By name the other hosts that can be used: "" if it reaches them, else why not.
    """

    host: str
    steps: list[Step] = field(default_factory=lambda: [Step(name) for name in STEPS])
    reaches: dict[str, str] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Return whether no step failed."""
        return not any(step.state in ("failed", "not reached") for step in self.steps)

    def _set(self, name: str, state: str, detail: str = "", fix: str = "") -> None:
        step = self.steps[STEPS.index(name)]
        step.state, step.detail, step.fix = state, detail, fix

    async def run(self, connection: SshConnection) -> None:
        """Check one step after the other. The connection is for others to close."""
        way = await resolve(connection.settings)
        probing = asyncio.ensure_future(event_loop.in_thread(_probe, way))
        try:
            await connection.open()
        except InvalidRuntimeError as error:
            self._failed(error, way, await probing)
        else:
            self._reached(connection, way, await probing)
            for check in (self._forwarding, self._files_and_clock, self._packages):
                await check(connection)
            await self._grace(connection)

    # --- up to the agent -----------------------------------------------------------------------
    def _failed(self, error: InvalidRuntimeError, way: dict[str, str], probe: _Probe) -> None:
        failed = _FAILED_STEP.get(error.reason, "authentication" if probe.banner else "port")
        details = self._details(way, probe)
        for name in STEPS[: STEPS.index(failed)]:
            if name != "forwarding":  # it is checked by the agent, which was not reached
                self._set(name, "ok", details.get(name, ""))
        self._set(failed, "failed", error.detail or str(error), spelled(error.hint))

    def _details(self, way: dict[str, str], probe: _Probe) -> dict[str, str]:
        through = way.get("proxyjump") or way.get("proxycommand")
        port = f"{way.get('port', '22')}" + (f", {probe.banner}" if probe.banner else "")
        return {
            "configuration": f"{way.get('user', '')}@{way.get('hostname', self.host)}",
            "name": f"looked up by {through}" if through else probe.address,
            "port": f"{port}, through {through}" if through else port,
        }

    def _reached(self, connection: SshConnection, way: dict[str, str], probe: _Probe) -> None:
        hello = connection.agent_info
        details = {
            **self._details(way, probe),
            "host key": "known",
            "authentication": f"as {hello.user}",
            "login shell": hello.shell,
            "Python": f"{'.'.join(map(str, hello.python))} ({hello.executable})",
        }
        for name in STEPS[: STEPS.index("forwarding")]:
            self._set(name, "ok", details.get(name, ""))

    # --- on the host ---------------------------------------------------------------------------
    async def _grace(self, connection: SshConnection) -> None:
        refusal = await connection.agreed()
        if refusal:
            said = f"{connection.agent_info.shell}; what runs there ends when the link drops: {refusal}"
            self._set("login shell", "differs", said, _NO_GRACE)

    async def _forwarding(self, connection: SshConnection) -> None:
        from lazycluster.runtime.network import open_to_runtime
        from lazycluster.ssh.probes import can_connect, same_network
        from lazycluster.ssh.tunnels import close_tunnels

        fix = (
            "set 'AllowTcpForwarding yes' in the host's sshd_config, or ask its administrator; or, if it is not "
            "forbidden on purpose, let our agent forward the ports: --relay"
        )
        try:
            if await asyncio.wait_for(same_network(connection), _LIMIT):
                self._set("forwarding", "ok", "not needed: the host shares this machine's network")
                return
            if not await asyncio.wait_for(can_connect(connection), _LIMIT):
                self._set("forwarding", "failed", "the host's sshd refuses connections to its ports", fix)
                return
            with socket.create_server(("127.0.0.1", 0)) as server:
                opening = open_to_runtime(connection, server.getsockname()[1], range(20000, 20100))
                await close_tunnels([await asyncio.wait_for(opening, _LIMIT)])
            self._set("forwarding", "ok", "both ways")
        except (LazyclusterError, OSError, asyncio.TimeoutError) as error:
            self._set("forwarding", "failed", str(error) or "no answer", fix)

    async def _files_and_clock(self, connection: SshConnection) -> None:
        output = Tail(_SAID)
        hello = connection.agent_info
        argv = [hello.executable, "-c", _ASK_HOST, hello.directory]
        before = time.time()
        channel = connection.channel("run", {"argv": argv, "merge": True}, stdout=output.put)
        try:
            await connection.result_of(channel, "its clock and its temporary directory")
            told = decoded_text(output.text())
            check_shape(told, [(int, float)])
            now, space, inodes, noexec = told
        except (LazyclusterError, ValueError) as error:
            said = output.text().strip() or str(error)
            self._set("temporary files", "failed", said, "check the host's temporary directory")
            return
        free = f"{hello.directory.rpartition('/')[0]}, {megabytes(space)} free" + (", noexec" if noexec else "")
        if space < _LITTLE_SPACE or not inodes:
            self._set("temporary files", "failed", free, "free some space there")
        else:
            self._set("temporary files", "ok", free)
        after = time.time()
        ahead = now - (before + after) / 2
        if abs(ahead) > _CLOCK_LIMIT + (after - before) / 2:
            off = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
            self._set("clock", "failed", off, "synchronize the clocks, e.g. 'timedatectl set-ntp true'")
        else:
            self._set("clock", "ok", f"within {max(0.1, abs(ahead)):.1f} s of this machine's")

    async def _packages(self, connection: SshConnection) -> None:
        try:
            answer = await connection.request("packages", python="python3", env={}, names=list(_PACKAGES))
        except LazyclusterError as error:
            self._set("packages", "differs", str(error))
            self._set("bytecode", "differs", "not known", "see the packages")
            return
        self._set("bytecode", *_kept_bytecode(answer.get("bytecode") or {"lacking": []}))
        version = answer["version"]
        if tuple(version[:2]) != sys.version_info[:2]:
            here, there = ".".join(map(str, sys.version_info[:2])), ".".join(map(str, version[:3]))
            self._set(
                "packages",
                "differs",
                f"Python {there} there, {here} on this machine: commands and files work, functions and clusters do not",
                f"start clusters with --environment manager, which installs this machine's packages and Python {here} "
                f"there, or with --python auto, or --python /path/to/python{here}; {_IN_PYTHON}",
            )
            return
        differing = _differing(answer["packages"])
        if differing:
            missing = [f"{name}=={here}" for name, here, _ in differing]
            pip = pip_command(answer["executable"], answer.get("managed") is True, missing)
            shown = ", ".join(f"{name} {there or 'missing'} ({here} here)" for name, here, there in differing)
            fix = f"start clusters with --environment manager ({_IN_PYTHON}), or {pip}"
            self._set("packages", "differs", shown, fix)
        else:
            self._set("packages", "ok", "same versions on both sides: " + (", ".join(_installed()) or "none needed"))


def _kept_bytecode(told: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return state, detail and next step of the bytecode of installed modules."""
    if not told["lacking"]:
        return "ok", "beside the modules", ""
    where = ", ".join(map(str, told["lacking"]))
    if told["cache"]:
        return "ok", f"modules in {where} have none: it is kept in {told['cache']}", ""
    fix = f"have the owner compile them: python3 -m compileall -q {where}"
    return "differs", f"modules in {where} are compiled at each start: {told['problem']}", fix


def _installed() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _differing(theirs: dict[str, str | None]) -> Sequence[tuple[str, str, str | None]]:
    ours = _installed()
    return [(name, version, theirs.get(name)) for name, version in ours.items() if theirs.get(name) != version]


@dataclass
class _Probe:
    """Findings about a host from outside, without ssh."""

    address: str = ""
    banner: str = ""


def _probe(way: dict[str, str]) -> _Probe:
    probe = _Probe()
    if way.get("proxyjump", "none") != "none" or way.get("proxycommand", "none") != "none" or "hostname" not in way:
        return probe
    try:
        with socket.create_connection((way["hostname"], int(way.get("port", 22))), timeout=5) as sock:
            probe.address = sock.getpeername()[0]
            probe.banner = sock.recv(255).decode(errors="replace").partition("\n")[0].strip().removeprefix("SSH-2.0-")
    except OSError:
        pass  # ssh says better what is wrong
    return probe
