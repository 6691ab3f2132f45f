"""What a runtime has started, as handles: ports that are exposed, and tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lazycluster.exceptions import LazyclusterError
from lazycluster.ssh.connection import Connection
from lazycluster.ssh.tunnels import Tunnel, check_port
from lazycluster.tasks.execution import ProcessHandle

from .network import open_from_runtime, open_to_runtime
from .questions import HostQuestions
from .registry import Registry

if TYPE_CHECKING:
    from lazycluster.tasks.context import Context
    from lazycluster.tasks.task import RuntimeTask

__all__ = ["Belongings"]

_END_LIMIT = 25.0  # seconds for a task to end


class Belongings(HostQuestions):
    """The part of a runtime that exposes ports, and hands out what was started."""

    _ledger: Registry

    @property
    def _connection(self) -> Connection:
        """The connection to the host."""
        return self._session.connection

    # --- the Python environment ----------------------------------------------------------------
    def prepare(self, refresh: bool = False) -> None:
        """Make the Python environment on the host now, instead of when it is first needed.

        Packages from directories of this machine that have changed are built and sent anew.

        Args:
            refresh: Take the newest versions that are allowed, whatever was found before.

        Raises:
            EnvironmentBuildError: If it cannot be made; the message has the package concerned and the next step.
        """
        self._wait(self._prepare_async(refresh))

    async def _prepare_async(self, refresh: bool = False) -> None:
        """Do what :meth:`prepare` does."""
        self._session.check()
        if self._session.environment is not None:
            await self._session.environment.ready(again=True, refresh=refresh)

    @property
    def environment_path(self) -> str | None:
        """The directory of the Python environment on the host; None if there is none, or it was not made yet."""
        environment = self._session.environment
        active = environment.active if environment is not None else None
        return active.prefix or None if active is not None else None

    # --- ports ---------------------------------------------------------------------------------
    def expose_port_to_runtime(self, local_port: int, runtime_port: int | Iterable[int] | None = None) -> str:
        """Make a port of the manager reachable on the host, on its loopback.

        Args:
            local_port: The port on this machine.
            runtime_port: The port on the host, or several, of which the first free one is taken. By default
                ``local_port``.

        Returns:
            A key for :meth:`get_process` and :meth:`stop_process`.

        Raises:
            PortInUseError: If the port on the host is taken.
            NoPortsLeftError: If several were given and none is free.
            TunnelError: If the host does not allow it.
        """
        check_port(local_port, "local_port")
        return self._ledger.add_exposure(self._wait(open_to_runtime(self._connection, local_port, runtime_port)))

    def expose_port_from_runtime(self, runtime_port: int, local_port: int | Iterable[int] | None = None) -> str:
        """Make a port of the host reachable on the manager, on its loopback.

        Args:
            runtime_port: The port on the host.
            local_port: The port on this machine, or several, of which the first free one is taken. By default
                ``runtime_port``.

        Returns:
            A key for :meth:`get_process` and :meth:`stop_process`.

        Raises:
            PortInUseError: If the port on this machine is taken.
            NoPortsLeftError: If several were given and none is free.
            TunnelError: If the host does not allow it.
        """
        check_port(runtime_port, "runtime_port")
        return self._ledger.add_exposure(self._wait(open_from_runtime(self._connection, runtime_port, local_port)))

    def _add_exposure(self, tunnel: Tunnel) -> str:
        """Take over a tunnel that was opened for this runtime, and return its key."""
        return self._ledger.add_exposure(tunnel)

    async def _context_when_back(self) -> Context | None:
        """Return where tasks are carried out, once the host is back if it is away.

        None if it is not coming back.
        """
        try:
            await self._connection.reached()
            return self._context()
        except LazyclusterError:
            return None

    def _take_over(self, task: RuntimeTask, before: Belongings | None) -> None:
        """Have a task that goes on here among those of this runtime.

        Args:
            task: The task.
            before: The runtime that had it.
        """
        if before is not None:
            before._ledger.drop(task)
        self._ledger.add_task(task)

    # --- processes -----------------------------------------------------------------------------
    @property
    def task_processes(self) -> list[ProcessHandle]:
        """Handles of the tasks, which behave like :class:`multiprocessing.Process`."""
        return [process for key, process in self._ledger.processes().items() if self._ledger.is_task(key)]

    @property
    def alive_process_count(self) -> int:
        """How many tasks run and ports are exposed."""
        return len(self.get_processes(only_alive=True))

    @property
    def alive_task_process_count(self) -> int:
        """How many tasks run."""
        return self._ledger.running

    @property
    def started_task_count(self) -> int:
        """How many tasks were started here since the beginning."""
        return self._ledger.started

    def get_processes(self, only_alive: bool = False) -> dict[str, ProcessHandle]:
        """Return handles of all tasks and port exposures by their keys.

        Args:
            only_alive: Only those that have not ended.
        """
        processes = self._ledger.processes()
        return {key: process for key, process in processes.items() if not only_alive or process.is_alive()}

    def get_process(self, key: str) -> ProcessHandle:
        """Return the handle of a task or port exposure.

        Args:
            key: Its key.

        Raises:
            ValueError: If there is none with this key.
        """
        try:
            return self._ledger.processes()[key]
        except KeyError:
            raise ValueError(f"{self.host}: there is no process with the key {key!r}") from None

    def is_runtime_task_process(self, process_key: str) -> bool:
        """Whether a key is that of a task of this runtime."""
        return self._ledger.is_task(process_key)

    def is_port_exposure_process(self, process_key: str) -> bool:
        """Whether a key is that of a port exposure of this runtime."""
        return self._ledger.is_exposure(process_key)

    def stop_process(self, key: str) -> None:
        """End a task or a port exposure, and wait until it has ended.

        Args:
            key: Its key.

        Raises:
            ValueError: If there is none with this key.
        """
        process = self.get_process(key)
        process.terminate()
        process.join(_END_LIMIT)
