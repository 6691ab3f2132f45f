"""The user's own modules on the hosts of a cluster: what is not installed, as files, kept up to date.

Engines pickle functions of modules by their names, so workers must be able to import them, and in the present version.
"""

from __future__ import annotations

import asyncio
import io
import logging
import secrets
import shutil
import tempfile
import tokenize
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lazycluster.core import event_loop
from lazycluster.exceptions import LazyclusterError
from lazycluster.ssh import transfer, workspace

from .module_sources import ModuleSources

if TYPE_CHECKING:
    from lazycluster.ssh.connection import Connection

    from .worker_hosts import WorkerHost

__all__ = ["LocalModules"]

logger = logging.getLogger("lazycluster")

_LOOK = 0.5  # seconds between two looks at the files
_PATIENCE = 60.0  # seconds for a host to take what has changed
_STAMP = "stamp"


@dataclass
class _HostCopy:
    """The modules that one host has.

    Attributes:
        connection: The connection to it.
        path: The directory there.
        generation: Which agent's directory that is in.
        is_old: Whether its link was interrupted when something had changed.
        files: What is in the directory.
    """

    connection: Connection
    path: str
    generation: int
    is_old: bool = False
    files: set[str] = field(default_factory=set)


class LocalModules:
    """The user's modules on the hosts of one cluster. For the event loop's thread, unless said otherwise.

    Attributes:
        directory: Where they are on the manager, for a master that runs there; empty before `open`.
        version: How often they were sent.
        announced: The version of which workers were told, or with which they started; what they imported of an earlier
            one they have forgotten.
    """

    def __init__(self) -> None:
        self.directory = ""
        self.version = self.announced = 0
        self._space: workspace.Workspace | None = None
        self._hosts: dict[str, _HostCopy] = {}
        self._written: dict[str, str | bytes] = {}
        self._given: dict[str, str | bytes] = {}  # by clients in other processes
        self._given_from: dict[str, str] = {}  # where those have read them
        self._sources = ModuleSources()
        self._watcher: asyncio.Task[None] | None = None
        self._writing: asyncio.Future[None] | None = None
        self._opening = asyncio.Lock()
        self._syncing = asyncio.Lock()
        self._sharing = asyncio.Lock()

    # --- begin and end -------------------------------------------------------------------------
    async def open(self) -> None:
        """Have the present modules in the directory on the manager."""
        async with self._opening:  # master and workers need it at the same time
            if self._space is None:
                space = await workspace.acquire()
                try:
                    self.directory = tempfile.mkdtemp(prefix="modules-", dir=space.directory)
                except BaseException:
                    await space.release()
                    raise
                self._space = space
                self._watcher = asyncio.ensure_future(self._watch())
        await self.sync()
        self.announced = self.announced or self.version

    async def share(self, places: Iterable[WorkerHost]) -> dict[str, LazyclusterError]:
        """Have the present modules on hosts, too; those that have lost their agent, and all with it, get them again.

        Returns:
            Why some hosts have not got them.
        """
        await self.open()

        async def add(place: WorkerHost) -> None:
            answer = await place.connection.request("mkdtemp", within=_PATIENCE)
            self._hosts[place.host] = _HostCopy(place.connection, str(answer["path"]), place.connection.generation)

        failed: dict[str, LazyclusterError] = {}
        async with self._sharing:
            known = [host for host, copy in self._hosts.items() if copy.connection.generation == copy.generation]
            new = {place.host: place for place in places if place.host not in known}
            failed.update(await _failures({host: add(place) for host, place in new.items()}))
            async with self._syncing:  # nothing is written meanwhile
                failed.update(await _failures({host: self._send(host) for host in new if host not in failed}))
        return failed

    def directory_on(self, host: str) -> str:
        """Return where a host has them; empty if it has none."""
        return self._hosts[host].path if host in self._hosts else ""

    async def close(self) -> None:
        """Forget everything; the hosts remove their directories with all that belongs to the runtimes."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None
        space, self._space = self._space, None  # nothing is written from now on
        if self._writing is not None:
            await asyncio.gather(self._writing, return_exceptions=True)
        hosts, self._hosts = self._hosts, {}
        for copy in hosts.values():
            if copy.connection.state == "open":
                removing = asyncio.ensure_future(copy.connection.request("remove", within=_PATIENCE, path=copy.path))
                await copy.connection.wait_while_heard(removing, _PATIENCE)
        directory, self.directory = self.directory, ""
        self._written, self._given, self._given_from, self._sources = {}, {}, {}, ModuleSources()
        self.announced = 0
        if space is not None:
            shutil.rmtree(directory, ignore_errors=True)
            await space.release()

    # --- changes -------------------------------------------------------------------------------
    def changed(self) -> bool:
        """Tell whether a module has changed or is new since they were sent. For any thread; takes some microseconds."""
        return self._space is not None and self._sources.changed()

    def changes(self) -> bool:
        """True if hosts may not have the present modules: some have changed, or are being sent. For any thread."""
        return self.changed() or self._syncing.locked()

    async def take(self, files: Mapping[str, str | bytes], paths: Mapping[str, str]) -> dict[str, str]:
        """Have modules of a client in another process on the hosts, beside or in the place of those that are there.

        Args:
            files: Their contents by file name.
            paths: Where the client has read them, by file name.

        Returns:
            Where those were read that had the same names, other contents, and came from other files.
        """
        replaced = {
            name: self._given_from[name]
            for name, path in paths.items()
            if path and self._given_from.get(name, path) not in ("", path) and self._given.get(name) != files.get(name)
        }
        self._given.update(files)
        self._given_from.update(paths)
        await self.sync()
        return replaced

    async def sync_changes(self) -> int:
        """Have what has changed on all hosts; returns `version`."""
        await self.sync()
        return self.version

    def sync_now(self) -> int:
        """Have what has changed on all hosts before this returns; returns `version`. For a user's thread."""
        return event_loop.run(self.sync_changes()) if self.changes() else self.version

    async def sync(self) -> None:
        """Have what has changed on all hosts."""
        async with self._syncing:
            directory = self.directory
            own = await self._sources.read()
            if self._space is None or self.directory != directory:
                return  # it was closed meanwhile
            texts = own | self._given
            if texts == self._written:
                return
            # Whoever is cancelled here leaves it to `close` to wait for the thread.
            self._writing = asyncio.ensure_future(event_loop.in_thread(_write, Path(directory), texts, self._written))
            await asyncio.shield(self._writing)
            if self.directory != directory:
                return
            self._written = texts
            for error in (await _failures({host: self._send(host) for host in self._hosts})).values():
                logger.warning("changed modules were not sent: %s", error)
            self.version += 1

    async def _send(self, host: str) -> None:
        copy = self._hosts[host]
        if copy.generation != copy.connection.generation:
            return  # its directory is gone; who uses it asks for another one
        copy.is_old = copy.connection.state != "open"
        if copy.is_old:
            return
        files = set(self._written)
        for name in sorted(copy.files - files):
            await asyncio.wait_for(copy.connection.request("remove", path=f"{copy.path}/modules/{name}"), _PATIENCE)
        copy.files = files
        # The stamp comes last: what it stands for is complete when it is there.
        for name in ("modules", _STAMP):
            source = Path(self.directory, name)
            if source.exists():
                await transfer.send(copy.connection, source, f"{copy.path}/{name}", cwd="", env={})

    async def _watch(self) -> None:
        """Look for changes now and then, for those who submit work in ways of their own."""
        while True:
            await asyncio.sleep(_LOOK)
            try:
                if self.changed():
                    await self.sync()
                for host, copy in list(self._hosts.items()):
                    if copy.is_old and copy.connection.state == "open":
                        async with self._syncing:
                            await self._send(host)
            except (LazyclusterError, OSError) as error:
                logger.warning("changed modules cannot be sent: %s", error)


async def _failures(work: Mapping[str, Awaitable[None]]) -> dict[str, LazyclusterError]:
    """Wait for what is done for hosts; return why it failed for some."""
    results = await asyncio.gather(*work.values(), return_exceptions=True)
    failed: dict[str, LazyclusterError] = {}
    for host, result in zip(work, results, strict=True):
        if isinstance(result, LazyclusterError):
            failed[host] = result
        elif isinstance(result, BaseException):
            raise result
    return failed


def _write(directory: Path, texts: Mapping[str, str | bytes], written: Mapping[str, str | bytes]) -> None:
    """Have texts in a directory, in the place of what was written there before."""
    modules = directory / "modules"
    modules.mkdir(exist_ok=True)
    for name, text in texts.items():
        if written.get(name) != text:
            path = modules / name
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            partial.write_bytes(text.encode(_declared_encoding(text)) if isinstance(text, str) else text)
            partial.replace(path)
    for name in written.keys() - texts.keys():
        (modules / name).unlink(missing_ok=True)
    stamp = directory / _STAMP
    partial = stamp.with_name(".stamp")
    partial.write_text(secrets.token_hex(16))
    partial.replace(stamp)


def _declared_encoding(text: str) -> str:
    return tokenize.detect_encoding(io.BytesIO(text.encode("utf-8", "replace")).readline)[0]
