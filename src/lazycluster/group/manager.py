"""`RuntimeManager`: groups made of the hosts in the user's ssh configuration."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from lazycluster.core import event_loop, lifetime
from lazycluster.core.words import counted
from lazycluster.exceptions import LazyclusterError, NoRuntimesError
from lazycluster.output.view import Shown, View, show
from lazycluster.runtime.filters import HostFilter
from lazycluster.runtime.views import info_table
from lazycluster.runtimes import Runtime

from .discovery import choose_hosts, detect, open_again, select
from .group import RuntimeGroup
from .members import close_all
from .settings import GroupSettings, PerHost, read_settings
from .views import hosts_view, manager_view, reasons

__all__ = ["RuntimeManager"]


class RuntimeManager(Shown):
    """Makes groups of the hosts in your ssh configuration.

    Making one connects to all of them at once, under a deadline, and never asks anything: a host that needs a password
    which is not given is inactive. Left out are patterns, hosts that only serve as jump hosts, services for
    repositories (``User git``), and further names of a machine that another name stands for already.

    The connections are kept, and shared with the groups, until :meth:`cleanup`, or until both the manager and the
    groups are gone.

    Args:
        config_file: Read instead of ``~/.ssh/config``, or of what the environment variable ``LAZYCLUSTER_SSH_CONFIG``
            names, which holds for everything that connects.
        connection_kwargs: For all hosts, see :class:`lazycluster.Runtime`.
        python: Likewise.
        setup: Likewise.
        env: Likewise.
        environment: Likewise; groups may have others.
        startup_files: Likewise.
        settings: Per host, see :class:`lazycluster.RuntimeGroup`.
        progress: Likewise, also for the groups.

    Raises:
        NoRuntimesDetectedError: If no host can be used; says why for each.

    Examples:
        >>> manager = RuntimeManager()                                                   # doctest: +SKIP
        >>> manager.print_hosts()                                                        # doctest: +SKIP
        >>> group = manager.create_group(include_hosts="gpu-*", min_memory=16_000)       # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        config_file: str | os.PathLike[str] | None = None,
        connection_kwargs: Mapping[str, Any] | None = None,
        python: str | None = None,
        setup: str | None = None,
        env: Mapping[str, Any] | None = None,
        environment: Any = None,
        startup_files: str = "once",
        settings: PerHost | str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ) -> None:
        kwargs = dict(connection_kwargs or {})
        if config_file is not None:
            kwargs["config_file"] = os.fspath(config_file)
        self._settings = GroupSettings(
            connection_kwargs=kwargs,
            python=python,
            setup=setup,
            env=env,
            settings=read_settings(settings),
            environment=environment,
            progress=progress,
            startup_files=startup_files,
        )
        self._sessions, self._inactive = detect(self._settings, kwargs.get("config_file"))
        self._closed = False
        lifetime.register(self)

    @property
    def hosts(self) -> list[str]:
        """The hosts that can be used."""
        return list(self._sessions)

    @property
    def inactive_hosts(self) -> dict[str, str]:
        """The other names in the configuration, each with the reason why it cannot be used or was left out."""
        return dict(self._inactive)

    def create_group(
        self,
        include_hosts: str | list[str] | None = None,
        exclude_hosts: str | list[str] | None = None,
        gpu_required: bool = False,
        min_memory: int | None = None,
        min_cpu_cores: int | None = None,
        installed_executables: str | list[str] | None = None,
        filter_commands: str | list[str] | None = None,
        working_dir: str | None = None,
        environment: Any = None,
    ) -> RuntimeGroup:
        """Make a group of all hosts that can be used, or of some of them.

        Args:
            include_hosts: Only these: names, sets such as ``node[01-12]``, or patterns such as ``gpu-*``, ``gpu[13]``.
            exclude_hosts: All but these.
            gpu_required: Only hosts with a GPU.
            min_memory: Only hosts with so many megabytes of memory.
            min_cpu_cores: Only hosts with so many CPU cores.
            installed_executables: Only hosts on which these programs are found.
            filter_commands: Only hosts on which each of these shell commands prints ``true``.
            working_dir: See :class:`lazycluster.Runtime`.
            environment: See :class:`lazycluster.Runtime`.

        Returns:
            The group. Its runtimes have working directories and tasks of their own, also if another group has the
            same hosts.

        Raises:
            ValueError: If both `include_hosts` and `exclude_hosts` are given, or a host is not known.
            NoRuntimesError: If no host meets the conditions; says why for each.
            InvalidRuntimeError: If the working directory cannot be made on one of them.
        """
        self._check_open()
        wanted = HostFilter(gpu_required, min_memory, min_cpu_cores, installed_executables, filter_commands)
        hosts = choose_hosts(self.hosts, self._inactive, include_hosts, exclude_hosts)
        if not hosts:
            what = f"include_hosts={include_hosts!r}" if include_hosts else f"exclude_hosts={exclude_hosts!r}"
            raise NoRuntimesError(f"{what} leaves no host; there are: {', '.join(self.hosts)}")
        return event_loop.run(self._create(hosts, wanted, working_dir, environment))

    async def _create(
        self, hosts: list[str], wanted: HostFilter, working_dir: str | None, environment: Any
    ) -> RuntimeGroup:
        settings = dataclasses.replace(self._settings, working_dir=working_dir)
        if environment is not None:
            settings = dataclasses.replace(settings, environment=environment)
        chosen = await select([self._sessions[host] for host in hosts], wanted)
        sessions = await open_again(chosen, settings)
        return RuntimeGroup([Runtime._from_session(session) for session in sessions], progress=self._settings.progress)

    def print_hosts(self) -> None:
        """Print the hosts that can be used, and the inactive ones with the reasons."""
        show(hosts_view("Active hosts", self.hosts, "Inactive hosts", self._inactive))

    def print_inactive_hosts(self) -> None:
        """Print the names in the configuration that cannot be used or were left out, with the reasons."""
        show(View(tables=reasons("Inactive hosts", self._inactive) or hosts_view("Inactive hosts", []).tables))

    def print_runtime_info(self) -> None:
        """Print the machines of the hosts, and the names of the inactive ones."""
        self._check_open()
        answers = event_loop.run(self._infos())
        facts = [("Inactive hosts", ", ".join(self._inactive))] if self._inactive else []
        show(View(tables=(info_table(self.hosts, answers),)))
        if facts:
            show(View(facts=facts))

    async def _infos(self) -> list[dict[str, Any]]:
        answers = await asyncio.gather(
            *(session.ask("info") for session in self._sessions.values()), return_exceptions=True
        )
        return [{"error": str(a)} if isinstance(a, BaseException) else a for a in answers]

    def _check_open(self) -> None:
        if self._closed:
            raise LazyclusterError("the RuntimeManager was closed (cleanup() was called); make a new one")

    def cleanup(self) -> None:
        """Close the connections; those that groups use stay until their own clean-up."""
        if not self._closed:
            self._closed = True
            if all(session.is_ours for session in self._sessions.values()):
                event_loop.run(close_all(list(self._sessions.values())))

    def __enter__(self) -> RuntimeManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cleanup()

    def _view(self) -> View:
        return manager_view(self._sessions, self._inactive)

    def __repr__(self) -> str:
        return f"<RuntimeManager: {counted(len(self._sessions), 'active host')}, {len(self._inactive)} inactive>"
