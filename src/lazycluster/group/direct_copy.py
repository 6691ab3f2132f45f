"""A file for many hosts that leaves the manager once: each host passes on what it has to the next one.

The hosts' part is in `agent/direct_copy.py`. What a host does not get from another one, for whatever reason, it gets
from the manager, as without all this.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import random
import re
import stat
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazycluster.agent.direct_copy import OTHER_CONTENTS, OTHER_FILE, FileFacts
from lazycluster.agent.sender import REWRITTEN, Sender
from lazycluster.agent.stream import (
    CAME,
    CHECK,
    ERROR,
    LISTENING,
    NEXT,
    REPORT,
    VERDICT,
    ByteCounter,
    CopyError,
    FrameStream,
    StreamClosedError,
)
from lazycluster.core import event_loop
from lazycluster.core.certificates import Identity, make_identities
from lazycluster.core.extras import install_command
from lazycluster.exceptions import LazyclusterError, printable
from lazycluster.runtime.reachability import DirectAddress, ProbedHost, ReachabilityCache
from lazycluster.ssh import transfer
from lazycluster.ssh.connection import Connection
from lazycluster.ssh.transfer import TransferError, TransferResult

__all__ = ["DirectCopy", "DirectTarget"]

SMALLEST = 8 * 1024 * 1024
"""Bytes of a file from which on it goes from host to host: less is sent before hosts have found each other."""

_PORTS = range(25100, 25200)
_PORT_TRIES = 3
_LISTEN_LIMIT = 10.0  # seconds for all hosts to be ready; the others go on without those that are not
_STALL_LIMIT = 60.0  # seconds without anything new from a host, after which the manager sends it the file itself
_LOOK_EVERY = 0.5  # seconds
_CAUSE_LIMIT = 5.0  # seconds for a host that passes on no more to say why
_BLOCK = 1024 * 1024

logger = logging.getLogger("lazycluster")


@dataclass(frozen=True)
class DirectTarget:
    """A host that is to get the file.

    Attributes:
        host: Its name.
        connection: The connection to it.
        cwd: The directory that a relative destination starts at.
        env: Variables that may stand in the destination.
        address: Where other hosts reach it, if the user has said so.
    """

    host: str
    connection: Connection
    cwd: str
    env: Mapping[str, str]
    address: str | None = None


class _OtherWayError(Exception):
    """A host does not get the file from another one: the manager has to send it."""


class DirectCopy:
    """One file for several hosts. It begins with the first call of `send`.

    Args:
        targets: The hosts; no two may write to the same directory.
        local_path: The file on this machine.
        remote_path: Where to; see `transfer.send`.
        network: ``direct`` or ``auto``.
        reachability: What is known of the hosts already.
    """

    def __init__(
        self,
        targets: Sequence[DirectTarget],
        local_path: str | os.PathLike[str],
        remote_path: str | None,
        network: str,
        reachability: ReachabilityCache | None = None,
    ) -> None:
        self._targets = {target.connection: target for target in targets}
        self._local_path, self._remote_path = local_path, remote_path
        self._is_required = network == "direct"
        self._reachability = reachability or ReachabilityCache()
        self._progress: dict[Connection, transfer.Progress] = {}
        self._work: asyncio.Task[dict[Connection, asyncio.Future[TransferResult | Exception]]] | None = None
        self._waiting = 0

    async def send(
        self,
        connection: Connection,
        local_path: str | os.PathLike[str],
        remote_path: str | os.PathLike[str] | None = None,
        *,
        cwd: str,
        env: Mapping[str, str],
        progress: transfer.Progress | None = None,
        exclude: Sequence[str] = (),
    ) -> TransferResult:
        """Wait until the file is on one of the hosts; as `transfer.send`, which does it if no other host can.

        Raises:
            TransferError: If it cannot be copied there.
        """
        if connection in self._targets:
            if progress is not None:
                self._progress[connection] = progress
            outcome = await self._outcome(connection)
            if isinstance(outcome, TransferResult):
                return outcome
            if not isinstance(outcome, _OtherWayError):
                raise outcome
        return await transfer.send(
            connection, local_path, remote_path, cwd=cwd, env=env, progress=progress, exclude=exclude
        )

    async def _outcome(self, connection: Connection) -> TransferResult | Exception:
        if self._work is None:
            self._work = asyncio.ensure_future(self._begin())
        self._waiting += 1
        copy: asyncio.Future[TransferResult | Exception] | None = None
        try:
            copies = await asyncio.shield(self._work)
            copy = copies.get(connection)
            return _OtherWayError() if copy is None else await asyncio.shield(copy)
        finally:
            self._waiting -= 1
            if copy is not None and not copy.done():
                copy.cancel()  # whoever waited for it does not any more; the other hosts go on
                await asyncio.wait([copy])
            elif not self._waiting and not self._work.done():
                self._work.cancel()

    async def _begin(self) -> dict[Connection, asyncio.Future[TransferResult | Exception]]:
        try:
            described = await event_loop.in_thread(self._described)
            chain = await self._chain(*described)
        except _OtherWayError as reason:
            return self._without(str(reason))
        return chain.begin(self._progress)

    def _without(self, reason: str) -> dict[Connection, asyncio.Future[TransferResult | Exception]]:
        """Return the outcome where no host gets the file from another one."""
        if not self._is_required or not reason:
            if reason:
                logger.warning("%s is sent to each host by the manager: %s", self._local_path, reason)
            return {}
        path = os.fspath(self._local_path)
        hint = 'use network="auto" to have the manager send it to those that cannot get it from another host'
        failed: dict[Connection, asyncio.Future[TransferResult | Exception]] = {}
        for connection, target in self._targets.items():
            text = f"does not go from host to host: {reason}"
            failed[connection] = asyncio.get_running_loop().create_future()
            failed[connection].set_result(TransferError(target.host, "manager", path, None, text, hint))
        return failed

    def _described(self) -> tuple[Path, FileFacts]:
        """Return the path of the file, and what it is."""
        path, name = transfer.local_source(self._local_path)()
        try:
            inode = Path(os.fsdecode(path)).stat()
        except OSError:
            raise _OtherWayError("") from None  # which tells what is wrong
        if not stat.S_ISREG(inode.st_mode):
            raise _OtherWayError("only single files go from host to host")
        if inode.st_size < SMALLEST or len(self._targets) < 2:
            raise _OtherWayError("")
        facts = FileFacts(
            name.decode("utf-8", "surrogateescape"), inode.st_size, inode.st_mtime_ns, stat.S_IMODE(inode.st_mode)
        )
        return Path(os.fsdecode(path)), facts

    async def _chain(self, path: Path, facts: FileFacts) -> _Chain:
        """Find out who can take part."""
        addresses, port = await self._reached()
        targets = [target for target in self._targets.values() if target.host in addresses]
        try:
            authority, identities = await event_loop.in_thread(
                make_identities, *(f"host-{index}" for index in range(len(targets)))
            )
        except ModuleNotFoundError:
            command = install_command("dask")
            raise _OtherWayError(f"the certificates need the package cryptography: {command}") from None
        parties = [
            _ChainHost(index, target, addresses[target.host], port, identities[f"host-{index}"], authority)
            for index, target in enumerate(targets)
        ]
        return _Chain(parties, path, facts, self._local_path, self._remote_path)

    async def _reached(self) -> tuple[Mapping[str, DirectAddress], int]:
        """Return where the hosts are reached by each other, and the port."""
        for port in random.sample(_PORTS, _PORT_TRIES):
            hosts = [ProbedHost(t.host, t.connection, (port,), address=t.address) for t in self._targets.values()]
            found = await self._reachability.prove(hosts)
            if found.taken:
                continue
            alone = {(one.bind, one.address) for one in found.addresses.values()}
            if len(found.addresses) < 2 or len(alone) < 2:
                raise _OtherWayError(str(found) if found.obstacles else "the hosts are one machine")
            if self._is_required and not found.is_proven:
                raise _OtherWayError(str(found))
            if found.obstacles:
                logger.warning("%s: some hosts get it from the manager: %s", self._local_path, found)
            return found.addresses, port
        raise _OtherWayError(f"other programs use the ports {_PORTS.start} to {_PORTS.stop - 1} on the hosts")


@dataclass(frozen=True)
class _ChainHost:
    """One host of a chain.

    Attributes:
        index: Its number.
        target: The host.
        where: Where others reach it.
        port: On which port it listens.
        identity: Its certificate and key.
        authority: Whoever has signed those of all.
    """

    index: int
    target: DirectTarget
    where: DirectAddress
    port: int
    identity: Identity
    authority: str

    @property
    def name(self) -> str:
        """The name in its certificate."""
        return f"lazycluster host-{self.index}"


class _FirstSender(Sender):
    """Sends the file to the first host, and compares what has come with the manager's file: nobody else does.

    Args:
        stream: Where to.
        find: See `Sender`.
        counter: Counts what is done.
        known_checksum: Waits for the CRC-32 of the manager's file.
        on_error: Told what is wrong with the manager's file, before a host is: the last one may report that first.
    """

    def __init__(
        self,
        stream: FrameStream,
        find: Callable[[], tuple[bytes, bytes]],
        counter: ByteCounter,
        known_checksum: Callable[[], int],
        on_error: Callable[[CopyError], None],
    ) -> None:
        super().__init__(stream, find, counter)
        self._known_checksum, self._on_error = known_checksum, on_error

    def _copy(self) -> dict[str, Any]:
        try:
            return super()._copy()
        except CopyError as error:
            if not error.remote:
                self._on_error(error)
            raise

    def _approve(self, path: bytes) -> None:
        if self._checksum_there() != self._known_checksum():  # its size and time may say nothing of that
            raise CopyError(path, REWRITTEN)


class _Chain:
    """Hosts of which each gets the file from the one before it, and the first from the manager.

    What follows runs in a thread for each host: they meet once, when all hosts listen.
    """

    def __init__(
        self,
        parties: Sequence[_ChainHost],
        path: Path,
        facts: FileFacts,
        local_path: str | os.PathLike[str],
        remote_path: str | None,
    ) -> None:
        self._parties = parties
        self._path, self._facts = path, facts
        self._local_path, self._remote_path = local_path, remote_path
        self._source = transfer.local_source(local_path)
        self._met = threading.Condition()
        self._ready: list[_ChainHost] = []  # those that listen
        self._missing = {party.index for party in parties}  # those of which nothing is known yet
        self._is_closed = False  # nobody else can take part
        self._known_digest, self._known_checksum = "", -1  # SHA-256 and CRC-32 of the manager's file
        self._is_known = threading.Event()
        self._own_error: CopyError | None = None
        self._causes: dict[int, str] = {}  # why a host passes on no more, "" if it has not said that

    def begin(
        self, progress: Mapping[Connection, transfer.Progress]
    ) -> dict[Connection, asyncio.Future[TransferResult | Exception]]:
        """Send the file; returns for each host what will tell how that has ended."""
        stopped = threading.Event()
        threading.Thread(target=self._compute, args=(stopped,), name="checksum", daemon=True).start()
        copies: dict[Connection, asyncio.Future[TransferResult | Exception]] = {
            party.target.connection: asyncio.ensure_future(self._one(party, progress)) for party in self._parties
        }
        asyncio.gather(*copies.values(), return_exceptions=True).add_done_callback(lambda _: stopped.set())
        return copies

    async def _one(
        self, party: _ChainHost, progress: Mapping[Connection, transfer.Progress]
    ) -> TransferResult | Exception:
        target = party.target

        def report(done: int, total: int | None, files: int) -> None:
            if (tell := progress.get(target.connection)) is not None:
                tell(done, total, files)

        request = {
            "op": "direct",
            "path": self._remote_path,
            "cwd": target.cwd,
            "env": dict(target.env),
            "file": list(self._facts),
            "now": time.time_ns(),
            "address": party.where.bind,
            "port": party.port,
            "credentials": {
                "certificate": party.identity.certificate,
                "key": party.identity.key,
                "authority": party.authority,
            },
        }
        try:
            return await transfer.copy_as_asked(
                target.connection,
                request,
                lambda stream, counter: self._converse(party, stream, counter),
                os.fspath(self._local_path),
                report,
            )
        except _OtherWayError as error:
            logger.warning(
                "%s: %s comes from the manager, not from another host: %s", target.host, self._local_path, error
            )
            return error
        except TransferError as error:
            return error
        except LazyclusterError as error:
            # Sending tells better what is wrong with the connection, or finds it well again.
            logger.debug("%s: not from another host: %s", target.host, error)
            return _OtherWayError(str(error))
        finally:
            self._without(party)

    def _compute(self, stopped: threading.Event) -> None:
        """Compute the checksums of the manager's own file."""
        state, checksum, left = hashlib.sha256(), 0, self._facts.size
        try:
            with contextlib.suppress(OSError), self._path.open("rb", buffering=0) as file:
                while left and not stopped.is_set():
                    data = file.read(min(_BLOCK, left))
                    if not data:
                        break
                    state.update(data)
                    checksum = zlib.crc32(data, checksum)
                    left -= len(data)
            if not left:
                self._known_digest, self._known_checksum = state.hexdigest(), checksum
        finally:
            self._is_known.set()

    # --- in the threads ---------------------------------------------------------------------------
    def _converse(self, party: _ChainHost, stream: FrameStream, counter: ByteCounter) -> str:
        self._begin(stream)
        before, behind = self._meet(party)
        try:
            place = {
                "previous": None if before is None else before.name,
                "next": None if behind is None else [behind.where.address, behind.port, behind.name],
            }
            stream.put_json(NEXT, place)
            stream.flush()
            if before is None:
                self._send(stream, counter)
            return self._report(party, before, self._listen(stream, counter), counter)
        except StreamClosedError as error:
            raise _OtherWayError(f"its connection to the manager: {error}") from None

    def _begin(self, stream: FrameStream) -> None:
        kind = stream.header()
        if kind == ERROR:
            raise _OtherWayError(str(CopyError.received(stream.message())))
        if kind != LISTENING:
            raise StreamClosedError(f"an unexpected frame ({kind})")
        stream.message()

    def _meet(self, party: _ChainHost) -> tuple[_ChainHost | None, _ChainHost | None]:
        """Wait until all hosts listen, or have been waited for long enough; return who comes before and after one."""
        with self._met:
            if self._is_closed:
                raise _OtherWayError("it was not ready in time")
            self._ready.append(party)
            self._missing.discard(party.index)
            self._met.notify_all()
            self._met.wait_for(lambda: not self._missing or self._is_closed, _LISTEN_LIMIT)
            self._is_closed = True
            self._met.notify_all()
            order = sorted(self._ready, key=lambda one: one.index)
        at = order.index(party)
        return order[at - 1] if at else None, order[at + 1] if at + 1 < len(order) else None

    def _without(self, party: _ChainHost, cause: str = "") -> None:
        """Wait for a host no more, which passes on nothing any more."""
        with self._met:
            self._missing.discard(party.index)
            self._causes.setdefault(party.index, cause)
            self._met.notify_all()

    def _cause(self, party: _ChainHost) -> str:
        """Return why a host passes on no more, in brackets, if it says that soon."""
        with self._met:
            self._met.wait_for(lambda: party.index in self._causes, _CAUSE_LIMIT)
            cause = self._causes.get(party.index)
        return f" ({party.target.host}: {cause})" if cause else ""

    def _send(self, stream: FrameStream, counter: ByteCounter) -> None:
        """Send the file to the first host. What fails here, or there, is in its report, too."""
        with contextlib.suppress(CopyError):
            _FirstSender(stream, self._source, counter, self._checksum, self._fail).run()

    def _fail(self, error: CopyError) -> None:
        self._own_error = error

    def _checksum(self) -> int:
        self._is_known.wait()
        return self._known_checksum

    def _listen(self, stream: FrameStream, counter: ByteCounter) -> dict[str, Any]:
        """Return the report of a host, after what it says before."""
        counter.total = self._facts.size
        while True:
            self._wait(stream)
            kind = stream.header()
            if kind == CAME:
                counter.moved(max(0, min(int(stream.message(int)), self._facts.size) - counter.bytes))
            elif kind == CHECK:
                found = stream.message(str)
                self._is_known.wait()
                stream.put_json(VERDICT, {"same": bool(found) and found == self._known_digest})
                stream.flush()
            elif kind == REPORT:
                report: dict[str, Any] = stream.message()
                return report
            else:
                raise StreamClosedError(f"an unexpected frame ({kind})")

    def _wait(self, stream: FrameStream) -> None:
        """Wait until the host says something new."""
        deadline = time.monotonic() + _STALL_LIMIT
        while not stream.readable():
            if time.monotonic() > deadline:
                raise StreamClosedError(f"nothing came for {_STALL_LIMIT:g} s")
            stream.wait(_LOOK_EVERY)

    def _report(
        self, party: _ChainHost, before: _ChainHost | None, report: Mapping[str, Any], counter: ByteCounter
    ) -> str:
        """Return the path of the file on a host, from its report."""
        if reason := self._reason(party, before, report):
            self._without(party, reason)
            reason += "" if before is None else self._cause(before)
            if self._own_error is not None:  # what counts is what was wrong here
                raise self._own_error
            raise _OtherWayError(reason)
        if report.get("next"):
            reason = f"sending it on failed: {self._text(report['next'])}"
            self._without(party, reason)
            logger.debug("%s: %s", party.target.host, reason)
        if not counter.files:
            counter.moved(self._facts.size - counter.bytes)
            counter.file(bool(report.get("sent")))
        return str(report["path"])

    def _reason(self, party: _ChainHost, before: _ChainHost | None, report: Mapping[str, Any]) -> str:
        """Return why a host does not have the file from the one before it, "" if it has.

        Raises:
            CopyError: It cannot have it from anybody.
        """
        source, error = "the manager" if before is None else before.target.host, report.get("error")
        if isinstance(error, dict):
            if report.get("remote"):  # said by the one before it, who may say what it likes
                return f"{source} has given up"
            found = CopyError.received(error)
            if found.message in (OTHER_FILE, OTHER_CONTENTS):
                return f"what came from {source} {found.message}"
            self._without(party, self._text(found.message))
            raise found
        if report.get("lost") or not isinstance(report.get("path"), str):
            return f"its connection to {source} failed: {self._text(report.get('lost'))}"
        return ""

    def _text(self, said: Any) -> str:
        """Return what a host says, with the hosts' own names in place of those in certificates."""
        names = {party.name: party.target.host for party in self._parties}
        text = re.sub(r"lazycluster host-\d+", lambda found: names.get(found[0], found[0]), str(said)[:500])
        return printable(text)
