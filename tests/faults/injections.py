"""The faults: each a context manager that breaks something for real when it is entered, and mends it when it is left.

What cannot be mended (a killed process) is left to the library. A fault that finds nobody to hit raises
`NobodyThereError`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scenes import NobodyThereError, Scene, UnavailableError, hit

from controlgroups import ControlGroupsUnavailableError, control_group, move
from sshhosts import procfs

TASKS, COPY, MAP, SHUFFLE, DIRECT, SEARCH = LOADS = ("tasks", "copy", "map", "shuffle", "direct shuffle", "search")
_CLUSTERS = (SHUFFLE, DIRECT, SEARCH)
_CALLS = (TASKS, MAP)

Strike = Callable[[Scene, int], Iterator[None]]

HOST_HIT = {DIRECT: 1}
"""By load, the number of the host that is hit, where it is not the first: that one has the scheduler then."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        name: What it is called in the table.
        strike: What breaks it on the host with a number, and mends it.
        lasts: Seconds from the one to the other.
        loads: The loads that it concerns.
        heals: Whether all is as before once it was mended; else a host or a connection is lost for good.
        slow: Whether little gets through, so that a load is to be small.
        bastion: Whether it needs hosts behind a bastion.
    """

    name: str
    strike: Callable[[Scene, int], contextlib.AbstractContextManager[None]]
    lasts: float
    loads: tuple[str, ...]
    heals: bool
    slow: bool
    bastion: bool


FAULTS: dict[str, Fault] = {}


def in_soak(one: Fault) -> bool:
    """Whether hosts and links come back from it, so that the soak has it, too."""
    return one.heals and not one.bastion


def fault(
    name: str,
    lasts: float = 0,
    loads: tuple[str, ...] = LOADS,
    heals: bool = True,
    slow: bool = False,
    bastion: bool = False,
) -> Callable[[Strike], Strike]:
    """Make a function a fault: what it does before it yields breaks something, the rest mends it."""

    def register(strike: Strike) -> Strike:
        FAULTS[name] = Fault(name, contextlib.contextmanager(strike), lasts, loads, heals, slow, bastion)
        return strike

    return register


# --- processes --------------------------------------------------------------------------------------------
_STOPPED = 8.0
_VICTIMS: dict[str, tuple[Callable[[Scene, int], list[int]], tuple[str, ...]]] = {
    "agent": (Scene.agent, LOADS),
    "function process": (Scene.functions, _CALLS),
    "zygote": (Scene.zygotes, _CALLS),
    "worker": (Scene.workers, _CLUSTERS),
    "nanny": (Scene.services, _CLUSTERS),
    "scheduler": (lambda scene, number: scene.master(scene.dask), (SHUFFLE, DIRECT)),
    "database": (lambda scene, number: scene.master(scene.hyperopt), (SEARCH,)),
    "keeper": (lambda scene, number: scene.keeper(), LOADS),
    "ssh": (Scene.ssh, LOADS),
    "sshd session": (Scene.sessions, LOADS),
}


def _killed(victims: Callable[[Scene, int], list[int]]) -> Strike:
    def strike(scene: Scene, number: int) -> Iterator[None]:
        hit(victims(scene, number), signal.SIGKILL)
        yield

    return strike


def _stopped(victims: Callable[[Scene, int], list[int]]) -> Strike:
    def strike(scene: Scene, number: int) -> Iterator[None]:
        stopped = hit(victims(scene, number), signal.SIGSTOP)
        yield
        with contextlib.suppress(NobodyThereError):  # whoever waited for them may have ended them
            hit(stopped, signal.SIGCONT)

    return strike


for _name, (_victims, _loads) in _VICTIMS.items():
    fault(f"{_name} killed", loads=_loads)(_killed(_victims))
    fault(f"{_name} stopped for {_STOPPED:.0f} s", lasts=_STOPPED, loads=_loads)(_stopped(_victims))


# --- machines and links -----------------------------------------------------------------------------------
@fault("host powered off for good", heals=False)
def _off(scene: Scene, number: int) -> Iterator[None]:
    scene.hosts[number].power_off()
    yield


@fault("host powered off and on", lasts=5)
def _off_and_on(scene: Scene, number: int) -> Iterator[None]:
    scene.hosts[number].power_off()
    yield
    scene.hosts[number].power_on()


def _cut(scene: Scene, number: int) -> Iterator[None]:
    scene.hosts[number].cut_off()
    yield
    scene.hosts[number].restore()


for _seconds in (5, 30, 90):
    fault(f"link cut for {_seconds} s", lasts=_seconds)(_cut)


def _bad_cable(**properties: object) -> Strike:
    def strike(scene: Scene, number: int) -> Iterator[None]:
        scene.hosts[number].slow(**properties)
        yield
        scene.hosts[number].restore()

    return strike


fault("20 % of packets lost", lasts=10, slow=True)(_bad_cable(loss=0.2))
fault("200 ms delay", lasts=10, slow=True)(_bad_cable(delay_ms=200))
fault("1 Mbit/s", lasts=10, slow=True)(_bad_cable(rate="1mbit"))
fault("half-open connection: nothing comes from the host for 8 s", lasts=8)(_bad_cable(loss=(1.0, 0.0)))


@fault("sshd restarted, its sessions killed")
def _sshd(scene: Scene, number: int) -> Iterator[None]:
    sessions = scene.sessions(number)
    scene.hosts[number].restart_sshd()
    hit(sessions, signal.SIGKILL)
    yield


@fault("host key changed in between", lasts=8, heals=False)
def _host_key(scene: Scene, number: int) -> Iterator[None]:
    host = scene.hosts[number]
    key, sessions = Path(f"/proc/{host.pid}/root/run/host/host_key"), scene.sessions(number)
    before = key.read_bytes()
    key.unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    host.restart_sshd()
    hit(sessions, signal.SIGKILL)
    yield
    key.write_bytes(before)
    host.restart_sshd()


@fault("bastion powered off and on", lasts=5, bastion=True)
def _bastion(scene: Scene, number: int) -> Iterator[None]:
    assert scene.hosts.bastion is not None
    scene.hosts.bastion.power_off()
    yield
    scene.hosts.bastion.power_on()


# --- what a machine has -----------------------------------------------------------------------------------
@fault("disk full", lasts=8)
def _disk(scene: Scene, number: int) -> Iterator[None]:
    host = scene.hosts[number]
    for place in ("/tmp", "~"):
        host.fill_disk(place)
    yield
    for place in ("/tmp", "~"):
        host.free_disk(place)


@contextlib.contextmanager
def _control_group(kind: str, number: int) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(control_group(kind, number))
        except ControlGroupsUnavailableError as error:
            raise UnavailableError(str(error)) from error
        yield group


@fault("memory limit reached", lasts=8, loads=(MAP, *_CLUSTERS))
def _memory(scene: Scene, number: int) -> Iterator[None]:
    """Those that work get no more memory than they have: the kernel kills who wants more."""
    working = [*scene.workers(number), *scene.functions(number)]
    if not working:
        raise NobodyThereError("nothing works there")
    with _control_group("memory", number) as group:
        (group / "memory.limit_in_bytes").write_text("65536")
        move(working, group)
        yield
        killed = dict(line.split() for line in (group / "memory.oom_control").read_text().splitlines())["oom_kill"]
    if killed == "0":
        raise NobodyThereError("nobody there has wanted more memory")


@fault("no more processes allowed", lasts=5)
def _process_limit(scene: Scene, number: int) -> Iterator[None]:
    with _control_group("pids", number) as group:
        move([found.pid for found in scene._host(number).processes() if found.uid], group)
        (group / "pids.max").write_text("1")
        yield
        (group / "pids.max").write_text("max")


_CROWD = """
import os, signal, sys
for number in range(int(sys.argv[1])):
    if os.fork() == 0:
        signal.pause()
print("there", flush=True)
signal.pause()
"""


@fault("2,000 other processes on the host", lasts=8)
def _crowd(scene: Scene, number: int) -> Iterator[None]:
    command = scene._host(number) and scene.hosts[number].inside(
        [sys.executable, "-ISc", _CROWD, "2000"], user=scene.hosts[number].user
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as crowd:
        assert crowd.stdout is not None
        crowd.stdout.readline()
        yield
        for found in procfs.descendants(crowd.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(found.pid, signal.SIGKILL)
        crowd.kill()


@fault("the host's name changes", lasts=3)
def _name_of_host(scene: Scene, number: int) -> Iterator[None]:
    host = scene.hosts[number]
    host.run("hostname somebody-else")
    yield
    host.run(f"hostname {host.name}")


_JUMP = 600.0


@fault("all clocks jump by 10 minutes, and back", lasts=5)
def _clocks(scene: Scene, number: int) -> Iterator[None]:
    """The hosts here have this machine's clock: it is changed for whatever else runs, too."""
    if os.environ.get("LAZYCLUSTER_TEST_CLOCK") != "1":
        raise UnavailableError("it would change the clock of this machine; LAZYCLUSTER_TEST_CLOCK=1 allows that")

    def jump(seconds: float) -> None:
        time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME) + seconds)

    try:
        jump(_JUMP)
    except OSError as error:
        raise UnavailableError(f"the clock cannot be set here: {error}") from error
    try:
        yield
    finally:
        jump(-_JUMP)


# --- the manager ------------------------------------------------------------------------------------------
@fault("the manager may open 256 files at most", lasts=5)
def _descriptors(scene: Scene, number: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
