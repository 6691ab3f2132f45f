"""The workspace of a manager process, shared by its connections: private directory, answers to ssh's questions, keeper.

The keeper is an agent on the manager's own machine. It runs the masters of clusters, and when the manager dies, in
whatever way, it ends those and the ssh processes, and removes the private directory. All of it exists only as long as
something uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from pathlib import Path

from lazycluster.agent import directories
from lazycluster.core import event_loop, unix
from lazycluster.exceptions import ConnectionLostError

from .errors import FULL, no_room_here
from .local_connection import Keeper
from .prompts import Prompter

_LONGEST = 50  # bytes of the directory's path, so that those of the sockets in it are below `unix.SOCKET_PATH_SIZE`


class Workspace:
    """The shared things of one manager process; see the module. For the event loop's thread only."""

    def __init__(self) -> None:
        self.prompter = Prompter()
        self.keeper = Keeper()
        self.directory = ""
        self._hold = -1
        self._users = 0
        self._started: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._watched: dict[int, int] = {}
        self._programs: set[int] = set()  # of the watched ones, those that end at once
        self._telling: asyncio.Task[None] | None = None

    async def acquire(self) -> None:
        """Begin to use the workspace; starts it for the first user."""
        self._users += 1
        if self._started is None:
            self._started = asyncio.ensure_future(self._start())
        try:
            await asyncio.shield(self._started)
            with contextlib.suppress(ConnectionLostError):  # most of what is wanted is possible without a keeper
                await self.keeper.wait_until_open()
        except BaseException:
            await self.release()
            raise

    async def _start(self) -> None:
        self.directory = private_directory()
        self._hold = directories.hold(self.directory)
        try:
            starting = self.prompter.start(self.directory), self.keeper.open()
            await event_loop.together([asyncio.ensure_future(each) for each in starting])
            await self._tell_keeper()
            self.keeper.on_renewal.append(self._tell_keeper)
        except BaseException as error:
            shutil.rmtree(self.directory, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in FULL:
                raise no_room_here(f"{self.directory}: {error.strerror}") from error
            raise

    async def release(self) -> None:
        """End the use; the last one ends the keeper and removes the directory."""
        self._users -= 1
        if self._users:
            return
        if _spaces.get(asyncio.get_running_loop()) is self:
            del _spaces[asyncio.get_running_loop()]  # whoever comes now gets a new one
        self._ending = asyncio.ensure_future(self._end())
        await asyncio.shield(self._ending)  # it goes on if whoever waits is cancelled: nobody comes back to this

    async def _end(self) -> None:
        if self._started is not None:
            await asyncio.wait([self._started])
        if self._telling is not None:
            await asyncio.wait([self._telling])
        await self.prompter.close()
        if self.directory:  # before the keeper goes, which sees to it if this process ends just now
            shutil.rmtree(self.directory, ignore_errors=True)
        if self._hold >= 0:
            os.close(self._hold)
            self._hold = -1
        await self.keeper.close()

    def watch(self, pid: int) -> None:
        """Have a process ended when the manager dies."""
        started = unix.process_start_time(pid)
        if started is not None:
            self._watched[pid] = started
            self._tell_keeper_soon()

    def end_with_manager(self, pid: int) -> None:
        """Have a program ended when the manager dies, at once: there is nothing that it has to finish, as ssh has."""
        self._programs.add(pid)
        self.watch(pid)

    def unwatch(self, pid: int) -> None:
        """Stop having an eye on a process."""
        self._programs.discard(pid)
        if self._watched.pop(pid, None) is not None:
            self._tell_keeper_soon()

    def _tell_keeper_soon(self) -> None:
        # One message for all that changes in this round of the loop: 64 hosts connect at once.
        if self._telling is None and self.keeper.state in ("open", "interrupted"):
            self._telling = asyncio.ensure_future(self._tell_keeper_once())

    async def _tell_keeper_once(self) -> None:
        await asyncio.sleep(0)
        self._telling = None
        with contextlib.suppress(Exception):  # the keeper's end is noticed by whoever depends on it
            await self._tell_keeper()

    async def _tell_keeper(self) -> None:
        pairs = [(pid in self._programs, [pid, started]) for pid, started in self._watched.items()]
        pids, programs = ([pair for ends, pair in pairs if ends is which] for which in (False, True))
        await self.keeper.request("at_manager_end", pids=pids, programs=programs, paths=[self.directory])


_spaces: dict[asyncio.AbstractEventLoop, Workspace] = {}


async def acquire() -> Workspace:
    """Return the workspace of this process, to be released after use."""
    loop = asyncio.get_running_loop()
    space = _spaces.get(loop)
    if space is None:
        space = _spaces[loop] = Workspace()
    await space.acquire()
    return space


_preferred = ""


def use_directory(directory: str | os.PathLike[str]) -> None:
    """Have the private directory of this process in a certain one, if its path is short enough and sockets work there.

    Args:
        directory: One that is not removed at logout, or when its files are old.
    """
    global _preferred
    _preferred = os.fspath(directory)


def private_directory() -> str:
    """Make a directory for this user only, with a path short enough for sockets.

    Raises:
        InvalidRuntimeError: If it cannot be made anywhere; its reason is ``manager``.
    """
    found = directories.parent_directories()
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if _preferred:
        found = [_preferred, *(place for place in found if place != runtime)]
    elif runtime:  # on a host it is the last: it may go when the user logs out there
        found = [runtime, *(place for place in found if place != runtime)]
    try:
        # The program that answers ssh's questions is made in it.
        return directories.private_directory(sorted(found, key=unix.forbids_programs), _LONGEST, _try_sockets)
    except OSError as error:
        raise no_room_here(str(error)) from error


def _try_sockets(directory: str) -> None:
    """Do what ssh does for its control socket: some file systems, mounted over a network above all, cannot."""
    made = [os.path.join(directory, name) for name in ("first", "second")]
    with socket.socket(socket.AF_UNIX) as probe:
        probe.bind(made[0])
    os.link(*made)
    for path in made:
        Path(path).unlink()
