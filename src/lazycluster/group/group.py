"""`RuntimeGroup`: runtimes that belong together."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from lazycluster.core import event_loop, ipython
from lazycluster.output.view import Shown, View
from lazycluster.runtime.network import checked_ports, pick_port
from lazycluster.runtimes import Runtime
from lazycluster.ssh.tunnels import Tunnel, check_port
from lazycluster.tasks.task import RuntimeTask

from .executing import Executing
from .members import Members, connect, distinct, warn_of_aliases
from .ports import expose_from_one, expose_to_all, free_everywhere
from .settings import Common, PerHost, host_names, read_settings
from .spreading import Spreading
from .views import group_view

__all__ = ["RuntimeGroup"]


class RuntimeGroup(Executing, Spreading, Shown):
    """Runtimes that belong together: most methods do on all of them, at once, what :class:`Runtime` does on one.

    Two names of one account on one machine may both be members; a warning is logged, ports are exposed there once, and
    where members share a file system, a file that is sent to all of them is written once.

    Args:
        runtimes: Runtimes that exist already. They belong to the group from now on: its clean-up is theirs.
        hosts: Hosts that are connected now, all at once, with what the following arguments say.
        working_dir: See :class:`Runtime`, as for the next ones.
        connection_kwargs: See :class:`Runtime`.
        python: See :class:`Runtime`.
        setup: See :class:`Runtime`.
        env: See :class:`Runtime`.
        shell: See :class:`Runtime`.
        environment: See :class:`Runtime`; made on all hosts at once.
        startup_files: See :class:`Runtime`.
        settings: What holds for single hosts: a dictionary such as ``{"host-1": {"user": "me", "python": "auto"}}``,
            or the path of a TOML file with a table for each host. Keys are those of `connection_kwargs` and
            ``working_dir``, ``python``, ``setup``, ``env``, ``shell``, ``environment``, ``startup_files``; a name may
            be a pattern such as ``"gpu-*"``. Without `hosts`, the hosts that it names are the group.
        on_unreachable: ``"raise"`` if all hosts must be usable, or ``"skip"`` to go on without the others, see
            :attr:`unreachable_hosts`.
        progress: Whether it is shown, on a terminal or in a notebook, how far things are that take more than two
            seconds, in clusters on this group, too; by default as ``Environment.progress`` says.

    Raises:
        ValueError: If not exactly one of `runtimes` and `hosts` is given, a host is given twice, or there is none.
        InvalidRuntimeError: If a host cannot be used; if there are several, it holds all of their errors.
        NoRuntimesError: If unusable hosts are skipped, and none is left.

    Examples:
        Execute a task on one host, and on all:

        >>> group = RuntimeGroup(hosts=["host-1", "host-2"])                             # doctest: +SKIP
        >>> task = RuntimeTask("group-demo").run_command("echo Hello Group!")
        >>> print(group.execute_task(task).execution_log[0])                             # doctest: +SKIP
        Hello Group!
        >>> tasks = group.execute_task(task, broadcast=True)                             # doctest: +SKIP
        >>> group.join()                                                                 # doctest: +SKIP

        Make a database on this machine reachable on all hosts:

        >>> port = group.expose_port_to_runtimes(27017, list(range(60000, 60010)))       # doctest: +SKIP
    """

    def __init__(
        self,
        runtimes: list[Runtime] | None = None,
        hosts: list[str] | None = None,
        working_dir: str | None = None,
        *,
        connection_kwargs: Mapping[str, Any] | None = None,
        python: str | None = None,
        setup: str | None = None,
        env: Mapping[str, Any] | None = None,
        shell: str | None = None,
        environment: Any = None,
        startup_files: str = "once",
        settings: PerHost | str | os.PathLike[str] | None = None,
        on_unreachable: str = "raise",
        progress: bool | None = None,
    ) -> None:
        if on_unreachable not in ("raise", "skip"):
            raise ValueError(f"on_unreachable must be 'raise' or 'skip', not {on_unreachable!r}")
        per_host = read_settings(settings)
        if hosts is None and runtimes is None and per_host:
            hosts = host_names(per_host)
            if not hosts:
                raise ValueError(f"the settings name no host, only patterns ({', '.join(per_host)}): give hosts, too")
        if (runtimes is None) == (hosts is None):
            raise ValueError("either runtimes or hosts must be given, and not both")
        self._common = Common(
            working_dir,
            connection_kwargs,
            python,
            setup,
            env,
            shell,
            per_host,
            environment=environment,
            progress=progress,
            startup_files=startup_files,
        )
        self._lock = threading.RLock()
        self._tasks: list[RuntimeTask] = []
        self._unreachable: dict[str, str] = {}
        self._closed = False
        self._executors = set()
        self._kept = None
        if hosts is not None:
            runtimes, self._unreachable = connect(distinct(hosts), self._common, on_unreachable)
        assert runtimes is not None
        if not runtimes:
            raise ValueError("a group needs at least one runtime")
        self._members = Members(runtimes)
        ipython.register(self)
        warn_of_aliases(runtimes)

    # --- ports ---------------------------------------------------------------------------------
    def has_free_port(self, port: int, exclude_hosts: str | list[str] | None = None) -> bool:
        """Check whether a port is free on all hosts, by trying to listen on it.

        Args:
            port: The port.
            exclude_hosts: Hosts that are not asked.

        Raises:
            ValueError: If it is no port, or a host is not in the group.
        """
        runtimes = list(self.get_runtimes(exclude_hosts=exclude_hosts).values())
        return bool(event_loop.run(free_everywhere(runtimes, [check_port(port)], False)))

    def get_free_port(self, ports: list[int], enforce_check_on_localhost: bool = False) -> int:
        """Return the first of some ports that is free on all hosts.

        Args:
            ports: The ports.
            enforce_check_on_localhost: It must be free on the manager, too.

        Raises:
            NoPortsLeftError: If none is.
            ValueError: If one is no port.
        """
        candidates = checked_ports(ports)
        free = event_loop.run(free_everywhere(self.runtimes, candidates, enforce_check_on_localhost))
        return pick_port(candidates, free, "the group")

    def expose_port_to_runtimes(
        self,
        local_port: int,
        runtime_port: int | list[int] | None = None,
        exclude_hosts: str | list[str] | None = None,
    ) -> int:
        """Make a port of the manager reachable on all hosts, under the same port; if one fails, on none.

        Args:
            local_port: The port on this machine.
            runtime_port: The port on the hosts, or several, of which the first that is free everywhere is taken. By
                default `local_port`.
            exclude_hosts: Hosts that are left out.

        Returns:
            The port on the hosts.

        Raises:
            PortInUseError: If the port is taken on a host.
            NoPortsLeftError: If several were given, and none is free everywhere.
            ValueError: If a host is not in the group, or none is left.
            TunnelError: If a host does not allow it.
        """
        runtimes = list(self.get_runtimes(exclude_hosts=exclude_hosts).values())
        if not runtimes:
            raise ValueError("exclude_hosts leaves no host")
        exposed = event_loop.run(expose_to_all(runtimes, local_port, runtime_port))
        self._note(exposed)
        return exposed[0][1].remote_port

    def expose_port_from_runtime_to_group(
        self, host: str, runtime_port: int, group_port: int | list[int] | None = None
    ) -> int:
        """Make a port of one host reachable on the manager and on all other hosts, under the same port.

        Args:
            host: The host.
            runtime_port: The port on it.
            group_port: The port everywhere else, or several, of which the first that is free everywhere is taken. By
                default `runtime_port`.

        Returns:
            The port everywhere else.

        Raises:
            ValueError: If the host is not in the group.
            PortInUseError: If the port is taken on the manager or a host.
            NoPortsLeftError: If several were given, and none is free everywhere.
            TunnelError: If a host does not allow it.
        """
        source = self.get_runtime(_named(host))
        others = [runtime for runtime in self.runtimes if runtime is not source]
        port, exposed = event_loop.run(expose_from_one(source, others, runtime_port, group_port))
        self._note(exposed)
        return port

    def _note(self, exposed: Iterable[tuple[Runtime, Tunnel]]) -> None:
        for runtime, tunnel in exposed:
            runtime._add_exposure(tunnel)

    # --- end -----------------------------------------------------------------------------------
    def cleanup(self) -> None:
        """Clean up all runtimes, at once, see :meth:`Runtime.cleanup`. Doing it again does nothing."""
        self._closed = True
        ours = [runtime for runtime in self.runtimes if runtime._session.is_ours]
        if ours:
            self._end_executors()
            event_loop.run(_clean_up(ours))

    def __enter__(self) -> RuntimeGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cleanup()

    def _view(self) -> View:
        return group_view(self.runtimes, self.unreachable_hosts)

    def __repr__(self) -> str:
        closed = ", closed" if self._closed else ""
        return f"<RuntimeGroup of {self.runtime_count}: {', '.join(self.hosts)}{closed}>"


async def _clean_up(runtimes: list[Runtime]) -> None:
    results = await asyncio.gather(*(runtime._cleanup_async() for runtime in runtimes), return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise errors[0]


def _named(host: str) -> str:
    if not isinstance(host, str):
        raise TypeError(f"a host must be a string, not {type(host).__name__}")
    return host
