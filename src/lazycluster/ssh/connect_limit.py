"""A limit for the connections that are made at once.

sshd drops connections at random when more than 10 have not yet authenticated (``MaxStartups 10:30:100``). A host sees
one of ours, but a host that all others are reached through sees them all. The limit for all is that of this machine's
processors. A handshake that does nothing but wait for its host counts for neither, so no host waits for a silent one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import re
import subprocess
import time
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

from lazycluster.agent.processes import family, stat_fields
from lazycluster.core import event_loop, unix

from .config import Settings, parse_destination
from .config_hosts import SYSTEM_CONFIG, config_lines, hops_of_command, user_config
from .config_text import option_values
from .process import WatchedProcess

__all__ = ["ConnectLimit", "ConnectSlot", "jump_key", "limiter", "resolve"]

PER_JUMP_HOST = 8
AT_ONCE = 64
_LOOK_EVERY = 0.1  # seconds
_IDLE = 0.1  # seconds without any use of the processor after which a handshake does not count for this machine
_SILENT = 0.5  # the same for a jump host, which may take its time to let somebody in
_SILENT_BY_TIME = 1.0  # the same where the system does not tell what a process uses
_DEPTH = 4
_RESOLVE_TIMEOUT = 20.0


class ConnectSlot:
    """A slot for one handshake, given up when it ends, or when its process only waits for its host."""

    def __init__(self) -> None:
        self._silent = asyncio.Event()
        self._limits: list[tuple[float, asyncio.Semaphore]] = []  # and after which idle time each is given up
        self._process: WatchedProcess | None = None
        self._used: int | None = -1
        self._used_by_others = -1
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def take(self, limit: asyncio.Semaphore, patience: float) -> None:
        """Wait for a place under a limit.

        Args:
            limit: The limit.
            patience: Seconds of idleness after which the place is given up.
        """
        await limit.acquire()
        self._limits.append((patience, limit))

    def started(self, process: WatchedProcess, silent: asyncio.Event) -> None:
        """Begin to watch the ssh process that does the handshake.

        Args:
            process: The process.
            silent: Is set when its host has been silent for a while.
        """
        self._process, self._silent = process, silent
        self._since = asyncio.get_running_loop().time()
        self._look_again()

    def _look_again(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_LOOK_EVERY, self._look)

    def _look(self) -> None:
        assert self._process is not None
        if self._process.is_logged_in or self._process.exited.done():
            return
        pid, now = self._process.pid, asyncio.get_running_loop().time()
        used = unix.processor_time(pid)
        if used != self._used:
            self._used, self._since = used, now
        elif used is not None:  # else the system does not tell
            others = _used_by_others(pid)
            if others != self._used_by_others:
                self._used_by_others, self._since = others, now
        idle = now - self._since if used is not None else _SILENT * (now - self._since) / _SILENT_BY_TIME
        self._give_up(idle)
        if idle >= _SILENT:
            self._silent.set()
        else:
            self._look_again()

    def _give_up(self, idle: float) -> None:
        for patience, limit in self._limits:
            if idle >= patience:
                limit.release()
        self._limits = [(patience, limit) for patience, limit in self._limits if idle < patience]

    def close(self) -> None:
        """Give up what is left."""
        if self._timer is not None:
            self._timer.cancel()
        self._give_up(math.inf)


def _used_by_others(pid: int) -> int:
    """Return the nanoseconds that the descendants of a process have used so far.

    One that could go on, be it the process itself, counts as using more and more.
    """
    used = 0
    for one in family(pid):
        state = stat_fields(one)
        if state is not None and state[0] == b"R":
            return time.monotonic_ns()
        if one != pid:
            used += unix.processor_time(one) or 0
    return used


class ConnectLimit:
    """Limits the handshakes in flight, for each jump host and in all. For one event loop."""

    def __init__(self, per_jump_host: int = PER_JUMP_HOST, at_once: int = AT_ONCE) -> None:
        self._per_jump_host = per_jump_host
        self._all = asyncio.Semaphore(at_once)
        self._jumps: dict[str, asyncio.Semaphore] = {}

    @contextlib.asynccontextmanager
    async def slot(self, settings: Settings) -> AsyncIterator[ConnectSlot]:
        """Hold a slot while connecting to a host.

        Args:
            settings: How the host is reached.
        """
        slot = ConnectSlot()
        try:
            # All in the same order, or two could wait for each other.
            for key in sorted(await jump_key(settings)):
                await slot.take(self._jumps.setdefault(key, asyncio.Semaphore(self._per_jump_host)), _SILENT)
            await slot.take(self._all, _IDLE)
            yield slot
        finally:
            slot.close()


_limiters: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, ConnectLimit] = weakref.WeakKeyDictionary()


def limiter(settings: Settings) -> contextlib.AbstractAsyncContextManager[ConnectSlot]:
    """Return a slot among the handshakes of this process, to be held while connecting."""
    loop = asyncio.get_running_loop()
    return _limiters.setdefault(loop, ConnectLimit()).slot(settings)


async def jump_key(settings: Settings) -> frozenset[str]:
    """Return what stands between the manager and a host: its jump hosts or its ProxyCommand; empty if nothing does."""
    own = [option.partition("=")[2] for option in settings.ssh_options if option.lower().startswith("proxycommand=")]
    if own:
        return _proxy(own[0])
    if settings.proxy_jump:
        hops = _hops(settings.proxy_jump)
    elif await event_loop.in_thread(_mentions_proxy, settings.config_file):
        hops = await _configured_hops(settings)
    else:
        return frozenset()
    return hops


async def _configured_hops(settings: Settings, depth: int = 0) -> frozenset[str]:
    values = await resolve(settings)
    if command := values.get("proxycommand"):
        return _proxy(command)
    hops = _hops(values.get("proxyjump", "none"))
    if depth >= _DEPTH:
        return hops
    outer: frozenset[str] = frozenset()
    for hop in hops:
        # A jump host may have one of its own, which then carries the connections to all that lie behind it.
        inner = Settings(host=hop, target=hop, config_file=settings.config_file)
        outer |= await _configured_hops(inner, depth + 1)
    return hops | outer


def _hops(jump: str) -> frozenset[str]:
    if jump.lower() in ("", "none"):
        return frozenset()
    names = set()
    for hop in jump.split(","):
        try:
            names.add(parse_destination(hop.strip(" \t")).host.lower())
        except ValueError:
            names.add(hop.strip(" \t"))
    return frozenset(names)


def _proxy(command: str) -> frozenset[str]:
    if command.lower() == "none":
        return frozenset()
    return _hops(",".join(hops_of_command(command))) or frozenset({command})


async def resolve(settings: Settings) -> dict[str, str]:
    """Return what the user's configuration says of a host, e.g. ``hostname``, ``user``, ``port``; asked once.

    Args:
        settings: The host, and the configuration file.

    Returns:
        The first value of each option, by its name in small letters; empty if ssh cannot say.
    """
    return await event_loop.in_thread(_resolve, settings.target, settings.user, settings.port, settings.config_file)


@functools.lru_cache(maxsize=4096)
def _resolve(target: str, user: str | None, port: int | None, config_file: str | None) -> dict[str, str]:
    argv = ["ssh", "-G"]
    for flag, value in (("-F", config_file), ("-l", user), ("-p", port)):
        if value is not None:
            argv += [flag, str(value)]
    try:
        done = subprocess.run(
            [*argv, "--", target], stdin=subprocess.DEVNULL, capture_output=True, timeout=_RESOLVE_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {option: values[0] for option, values in option_values(done.stdout).items()}


def _mentions_proxy(config_file: str | None) -> bool:
    """Return whether a configuration file mentions a proxy at all: asking ssh costs 5 ms for each host."""
    if config_file == "none":
        return False
    files = [Path(config_file)] if config_file else [user_config(), SYSTEM_CONFIG]
    return _mentions_proxy_now(tuple((str(path), _changed(path)) for path in files))


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0  # ssh says why, where it cannot go on without it


@functools.lru_cache(maxsize=16)
def _mentions_proxy_now(stamp: tuple[tuple[str, int], ...]) -> bool:
    proxy = re.compile(r"proxy(?:jump|command)", re.IGNORECASE)
    return any(proxy.match(line.keyword) for path, _ in stamp for line in config_lines(Path(path), []))
