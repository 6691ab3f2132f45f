"""What can be asked of a host: what machine it is, which ports are free, its directories."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import logging
import os
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from lazycluster.core import event_loop
from lazycluster.exceptions import AgentError, LazyclusterError, PathCreationError
from lazycluster.output.view import show
from lazycluster.ssh.tunnels import check_port
from lazycluster.tasks.context import Context

from .filters import HostFilter, why_not
from .network import checked_ports, pick_port
from .session import ANSWER_LIMIT, HostSession
from .views import info_view

__all__ = ["HostQuestions"]

logger = logging.getLogger("lazycluster")

T = TypeVar("T")

_MEGABYTE = 1024 * 1024


class HostQuestions:
    """The part of a runtime that asks its host something; the answers come under a deadline."""

    _session: HostSession
    _info: concurrent.futures.Future[dict[str, Any]] | None
    _info_lock: threading.Lock

    @property
    def host(self) -> str:
        """The host, as it was named when the runtime was made."""
        return self._session.host

    @property
    def working_dir(self) -> str:
        """The absolute path of the working directory on the host."""
        return self._session.working_dir

    @property
    def has_temporary_working_dir(self) -> bool:
        """Whether the working directory was made for this runtime alone, and is removed at the end."""
        return self._session.spec.working_dir is None

    @property
    def _is_ours(self) -> bool:
        """Whether this is the process that made the runtime, not a forked child of it."""
        return self._session.is_ours

    @property
    def _identity(self) -> tuple[Any, ...]:
        """What two names of the same account on the same machine have in common."""
        return self._session.identity

    def _context(self) -> Context:
        """Return where and how tasks are carried out."""
        raise NotImplementedError

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            self._session.check()
        except BaseException:
            coroutine.close()
            raise
        return event_loop.run(coroutine)

    def _ask(self, op: str, **params: Any) -> dict[str, Any]:
        return self._wait(self._session.ask(op, **params))

    # --- the machine ---------------------------------------------------------------------------
    @property
    def info(self) -> dict[str, Any]:
        """What is known of the host; asked once, see :meth:`refresh_info`.

        A new dictionary with ``os``, ``cpu_cores`` and ``memory`` (bytes; what the host's control groups allow),
        ``python_version``, ``gpus`` (those that ``CUDA_VISIBLE_DEVICES`` allows; if there is none, ``gpu_problem``
        says why), and more: load, free memory, disk.
        """
        return dict(self.fill_info_buffer().result(ANSWER_LIMIT + 5))

    def fill_info_buffer(self) -> concurrent.futures.Future[dict[str, Any]]:
        """Ask for :attr:`info` unless it was asked before, without waiting for the answer."""
        with self._info_lock:
            failed = (
                self._info is not None
                and self._info.done()
                and (self._info.cancelled() or self._info.exception() is not None)
            )
            if self._info is None or failed:
                self._session.check()
                self._info = event_loop.submit(self._session.ask("info", env=dict(self._context().env)))
            return self._info

    def refresh_info(self) -> dict[str, Any]:
        """Ask the host again, e.g. for its present load and free memory, and return :attr:`info`."""
        with self._info_lock:
            self._info = None
        return self.info

    @property
    def os(self) -> str:
        """The operating system, e.g. ``Debian GNU/Linux 12 (bookworm)``."""
        return str(self.info["os"])

    @property
    def cpu_cores(self) -> int:
        """How many CPU cores may be used."""
        return int(self.info["cpu_cores"])

    @property
    def memory(self) -> int:
        """How much memory may be used, in bytes."""
        return int(self.info["memory"])

    @property
    def memory_in_mb(self) -> int:
        """How much memory may be used, in megabytes (2**20 bytes)."""
        return self.memory // _MEGABYTE

    @property
    def python_version(self) -> str:
        """The version of the host's Python, e.g. ``3.11.7``."""
        return str(self.info["python_version"])

    @property
    def gpus(self) -> list[dict[str, Any]]:
        """The GPUs, one dictionary for each."""
        return list(self.info["gpus"])

    @property
    def gpu_count(self) -> int:
        """How many GPUs there are."""
        return len(self.gpus)

    def is_valid_runtime(self) -> bool:
        """Whether the host can be used now: it is connected, and answers within a few seconds."""
        try:
            self._ask("expand", path=".")
        except LazyclusterError:
            return False
        return True

    def print_info(self) -> None:
        """Print what is known of the host."""
        show(info_view(self.host, self.info, self.working_dir))

    def check_filter(
        self,
        gpu_required: bool = False,
        min_memory: int | None = None,
        min_cpu_cores: int | None = None,
        installed_executables: str | list[str] | None = None,
        filter_commands: str | list[str] | None = None,
    ) -> bool:
        """Check whether the host meets all of some conditions.

        Args:
            gpu_required: It must have a GPU.
            min_memory: It must have so many megabytes.
            min_cpu_cores: It must have so many CPU cores.
            installed_executables: These programs must be found on it.
            filter_commands: Each of these shell commands must print ``true`` in the end; everything else means no.

        Returns:
            Whether it does.

        Raises:
            TypeError, ValueError: If a condition makes no sense.

        Examples:
            >>> runtime.check_filter(min_memory=500, installed_executables="rsync")        # doctest: +SKIP
            True
            >>> runtime.check_filter(filter_commands='[ -d /data ] && echo true')          # doctest: +SKIP
            False
        """
        wanted = HostFilter(gpu_required, min_memory, min_cpu_cores, installed_executables, filter_commands)
        return self._wait(self._why_not(wanted)) is None

    async def _why_not(self, wanted: HostFilter) -> str | None:
        info: dict[str, Any] = {}
        if wanted.needs_info:
            env = dict(self._context().env)
            info = await self._session.ask("info", gpus=wanted.gpu_required, env=env)
        return await why_not(self._session, self._context(), info, wanted)

    # --- ports ---------------------------------------------------------------------------------
    async def _free_ports(self, ports: Sequence[int], first: bool = False) -> list[int]:
        """Return which of some ports are free, tried by binding."""
        return list((await self._session.ask("ports", ports=list(ports), first=first))["free"])

    def has_free_port(self, port: int) -> bool:
        """Check whether a port is free on the host, by trying to listen on it.

        Args:
            port: The port.

        Raises:
            TypeError, ValueError: If it is no port.
        """
        return bool(self._wait(self._free_ports([check_port(port)])))

    def get_free_port(self, ports: list[int]) -> int:
        """Return the first of some ports that is free on the host.

        Args:
            ports: The ports.

        Raises:
            NoPortsLeftError: If none is free.
            TypeError, ValueError: If one is no port.
        """
        candidates = checked_ports(ports)
        free = self._wait(self._free_ports(candidates, first=True)) if candidates else []
        return pick_port(candidates, free, self._session.host)

    # --- directories ---------------------------------------------------------------------------
    def _place(self) -> dict[str, Any]:
        context = self._context()
        return {"cwd": context.cwd, "env": dict(context.env)}

    def create_dir(self, path: str) -> None:
        """Make a directory on the host, and those above it; it may exist already.

        Args:
            path: Relative to the working directory; ``~`` and environment variables are understood.

        Raises:
            PathCreationError: If it cannot be made.
            ValueError: If the path is empty.
        """
        self._check_path(path)
        try:
            self._ask("mkdir", path=path, **self._place())
        except AgentError as error:
            raise PathCreationError(f"{self._session.host}: {path} cannot be made: {error.message}") from None

    def create_tempdir(self) -> str:
        """Make an empty directory on the host that is removed when the runtime is cleaned up.

        Returns:
            Its absolute path.

        Raises:
            PathCreationError: If it cannot be made.
        """
        try:
            path = str(self._ask("mkdtemp")["path"])
        except AgentError as error:
            raise PathCreationError(f"{self._session.host}: no temporary directory: {error.message}") from None
        self._session.temporary.append(path)
        return path

    def delete_dir(self, path: str) -> bool:
        """Remove a directory on the host with all that it holds. Of a link, only the link itself is removed.

        What another file system is mounted on stays, with the directories that it is in.

        Args:
            path: See :meth:`create_dir`.

        Returns:
            Whether it is gone: False if something in it cannot be removed; the log says what.

        Raises:
            ValueError: If the path is empty, a file, a mount point, a directory of the system, or, however it is
                written, the root, the home or working directory, or a directory that one of these is in.
        """
        self._check_path(path)
        try:
            self._ask("remove", path=path, folder=True, kept=self._kept(), **self._place())
        except AgentError as error:
            if error.kind == "value":
                raise ValueError(f"{error}\n  Next step: correct the path") from None
            if error.evidence.get("errno") == errno.ENOENT:
                return True
            logger.warning("%s: not all of %s was removed: %s", self._session.host, path, error.message)
            return False
        return True

    def _kept(self) -> dict[str, str]:
        """Return directories that are not removed beside those that the host knows of."""
        with contextlib.suppress(OSError):  # this process may be in a directory that was removed
            if self._session.spec.local:
                return {"the working directory of this process": os.getcwd()}
        return {}

    def _check_path(self, path: str) -> None:
        if not isinstance(path, str):
            raise TypeError(f"a path must be a string, not {type(path).__name__}")
        if not path or "\0" in path:
            raise ValueError(f"{self._session.host}: not usable as a path: {path!r}")

    def echo(self, msg: str) -> str:
        """Let the host print a text, literally, and return what came back.

        Args:
            msg: The text.

        Raises:
            TypeError: If it is not a string.
            LazyclusterError: If the host does not do it.
        """
        if not isinstance(msg, str):
            raise TypeError(f"a message must be a string, not {type(msg).__name__}")
        argv = ["/bin/sh", "-c", 'printf "%s" "$1"', "sh", msg]
        status, output = self._wait(self._session.capture(self._context(), argv=argv))
        if status != 0:
            raise LazyclusterError(f"{self._session.host}: echo ended with {status}: {output}")
        return output
