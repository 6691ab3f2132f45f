"""Which runtimes a group has, and what is said of all of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

from lazycluster.core import event_loop
from lazycluster.environments.cache import Host, HostCache, Removal, list_on, prune_on, remove_on
from lazycluster.environments.spec import ROOT
from lazycluster.exceptions import LazyclusterError
from lazycluster.output import progress as _progress
from lazycluster.output.view import View, show
from lazycluster.runtime.views import info_table
from lazycluster.runtimes import Runtime

from .members import Members, answers_of, connect, prepare_all, warn_of_aliases
from .settings import Common, listed
from .status import HostCallback, HostStatus, status_of, watch
from .views import hosts_view, reasons

__all__ = ["Membership"]

T = TypeVar("T")


class Membership:
    """The part of a group that knows its members."""

    _members: Members
    _common: Common
    _lock: threading.RLock
    _unreachable: dict[str, str]
    _closed: bool

    # --- members -------------------------------------------------------------------------------
    @property
    def hosts(self) -> list[str]:
        """The hosts."""
        return self._members.hosts

    @property
    def runtimes(self) -> list[Runtime]:
        """The runtimes, in the order in which they were added."""
        return self._members.all

    @property
    def runtime_count(self) -> int:
        """How many runtimes there are."""
        return len(self._members.all)

    @property
    def unreachable_hosts(self) -> dict[str, str]:
        """The hosts that were skipped, each with the reason."""
        return dict(self._unreachable)

    @property
    def progress(self) -> bool | None:
        """Whether it is shown how far things are that take long; None: as ``Environment.progress`` says."""
        return self._common.progress

    @property
    def status(self) -> list[HostStatus]:
        """How each host does: the state of its connection, and how many tasks run there."""
        return [status_of(runtime) for runtime in self.runtimes]

    def on_state(self, callback: HostCallback) -> Callable[[], None]:
        """Have a function called whenever the state of a present host changes.

        It is called on the thread that serves all connections: it must not wait, nor use the group itself.

        Args:
            callback: The function; it gets a `HostStatus`.

        Returns:
            A function that ends it.

        Examples:
            >>> group.on_state(print)                                            # doctest: +SKIP
        """
        return watch(self.runtimes, callback)

    def contains_runtime(self, host: str) -> bool:
        """Check whether a host is in the group.

        Args:
            host: The host.
        """
        return host in self._members

    def get_runtime(self, host: str | None = None) -> Runtime:
        """Return a runtime.

        Args:
            host: Its host; by default the one that executes the fewest tasks is returned.

        Raises:
            ValueError: If the host is not in the group.
        """
        return self._members.least_busy() if host is None else self._members.get(host)

    def get_runtimes(
        self, include_hosts: str | list[str] | None = None, exclude_hosts: str | list[str] | None = None
    ) -> dict[str, Runtime]:
        """Return some of the runtimes by host.

        Args:
            include_hosts: Only these; by default all.
            exclude_hosts: All but these.

        Raises:
            ValueError: If both are given, or a host is not in the group.
        """
        return self._members.some(include_hosts, exclude_hosts)

    def _check_open(self) -> None:
        if self._closed:
            raise LazyclusterError("the group was closed (cleanup() was called); make a new one")

    def add_runtime(self, host: str | None = None, runtime: Runtime | None = None) -> None:
        """Add a runtime.

        Args:
            host: A host that is connected now, with what was said when the group was made.
            runtime: Or a runtime that exists already.

        Raises:
            ValueError: If not exactly one of them is given, or the host is in the group already.
            InvalidRuntimeError: If the host cannot be used.
            LazyclusterError: If the group has been cleaned up.
        """
        self._check_open()
        if (host is None) == (runtime is None):
            raise ValueError("either host or runtime must be given, and not both")
        if host is not None:
            self._members.refuse_duplicate(host)
            runtime = connect([host], self._common, "raise")[0][0]
        assert runtime is not None
        with self._lock:
            self._members.add(runtime)
        warn_of_aliases(self.runtimes)

    def remove_runtime(self, host: str) -> Runtime:
        """Remove a runtime from the group. It is not cleaned up: that is now for who holds it.

        Args:
            host: Its host.

        Returns:
            The runtime.

        Raises:
            ValueError: If it is not in the group.
            LazyclusterError: If it executes tasks.
        """
        with self._lock:
            busy = self._members.get(host).alive_task_process_count
            if busy:
                raise LazyclusterError(
                    f"{host} executes {busy} tasks and cannot be removed: wait for them with join(), or cancel them"
                )
            return self._members.remove(host)

    # --- the Python environment ----------------------------------------------------------------
    def prepare(self, refresh: bool = False) -> None:
        """Make the Python environment on all hosts at once, see :meth:`Runtime.prepare`.

        Args:
            refresh: Take the newest versions that are allowed, whatever was found before.

        Raises:
            EnvironmentBuildError: If it cannot be made on a host; if there are several, it holds all of their errors.
        """
        self._check_open()
        with _progress.shown(self.progress):
            event_loop.run(prepare_all(self.runtimes, refresh))

    def list_environments(self, cache_dir: str = ROOT) -> dict[str, HostCache]:
        """Return the Python environments that the hosts keep, with sizes, age and last use, by host.

        Hosts that cannot be asked are left out, with a warning in the log; so they are below.

        Args:
            cache_dir: Where they are kept, see :class:`~lazycluster.EnvironmentSpec`.

        Raises:
            LazyclusterError: If no host can be asked.
        """
        return self._on_stores(lambda host: list_on(host, cache_dir), "its environments are not listed")

    def remove_environments(self, ids: str | Iterable[str], cache_dir: str = ROOT) -> dict[str, Removal]:
        """Remove Python environments from the hosts; those in use stay.

        Args:
            ids: Their names, which are the same on all hosts.
            cache_dir: See :meth:`list_environments`.
        """
        names = listed(ids)
        return self._on_stores(lambda host: remove_on(host, names, cache_dir), "its environments are not removed")

    def prune_environments(
        self, size_limit: int | None = None, unused_for: float | None = None, cache_dir: str = ROOT
    ) -> dict[str, Removal]:
        """Remove what was used longest ago, and what broken builds left; never an environment in use.

        Args:
            size_limit: Until environments and packages together take no more bytes than this on a host.
            unused_for: All that was not used for so many seconds.
            cache_dir: See :meth:`list_environments`.
        """
        return self._on_stores(
            lambda host: prune_on(host, size_limit, unused_for, cache_dir), "its environments are not pruned"
        )

    def _on_stores(self, work: Callable[[Host], Awaitable[T]], problem: str) -> dict[str, T]:
        self._check_open()
        return event_loop.run(answers_of(self.runtimes, lambda runtime: work(runtime._connection), problem))

    # --- environment variables -----------------------------------------------------------------
    def set_env_variables(self, env_variables: Mapping[str, Any]) -> None:
        """Set the environment variables of tasks, instead of the present ones.

        Args:
            env_variables: Names and values.
        """
        for runtime in self.runtimes:
            runtime.env_variables = env_variables

    def add_env_variables(self, env_variables: Mapping[str, Any]) -> None:
        """Add environment variables, or give new values to those that exist.

        Args:
            env_variables: Names and values.
        """
        for runtime in self.runtimes:
            runtime.add_env_variables(env_variables)

    # --- information ---------------------------------------------------------------------------
    def fill_runtime_info_buffers_async(self) -> None:
        """Have all runtimes ask their hosts for their :attr:`Runtime.info`, without waiting for the answers.

        That a host cannot be asked is said when its information is wanted.
        """
        for runtime in self.runtimes:
            with contextlib.suppress(LazyclusterError):
                runtime.fill_info_buffer()

    def print_hosts(self) -> None:
        """Print the hosts."""
        show(
            View(
                tables=(
                    *hosts_view("Hosts of the group", self.hosts).tables,
                    *reasons("Skipped hosts", self._unreachable),
                )
            )
        )

    def print_runtime_info(self) -> None:
        """Print what machines the hosts are, as a table; in the row of a host that cannot be asked it says why."""
        self.fill_runtime_info_buffers_async()
        show(View(tables=(info_table(self.hosts, [_info_of(runtime) for runtime in self.runtimes]),)))


def _info_of(runtime: Runtime) -> dict[str, Any]:
    try:
        return runtime.info
    except LazyclusterError as error:
        return {"error": str(error).partition("\n")[0]}
