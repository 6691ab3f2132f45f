"""A cluster, as it is specified in a file or by the options of a command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lazycluster.cluster.engine_cluster import EngineCluster
    from lazycluster.runtime.session import HostSpec
    from lazycluster.runtime_mgmt import RuntimeGroup

__all__ = ["ClusterSpec"]


@dataclass(frozen=True)
class ClusterSpec:
    """The specification of a cluster: its engine, its hosts and their settings. Nothing is connected yet.

    Get one from :func:`lazycluster.load_cluster_file`. What may be secret is in no `repr`.

    Attributes:
        engine: The name of the engine, as ``lazycluster start`` knows it.
        hosts: The hosts, as ssh takes them.
        everyone: True if all hosts of the ssh configuration are meant: those that do not answer are left out.
        name: The name of the cluster, "" if it has none.
        workers: How many workers it has; None: one per host.
        master_port: The port of the master on the manager; None: any.
        options: Options of the engine, by the arguments of its cluster's class.
        group_options: Settings of all hosts: arguments of :class:`~lazycluster.RuntimeGroup`.
        settings: Settings of single hosts, as ``settings`` of :class:`~lazycluster.RuntimeGroup`.
        idle_timeout: Seconds without work after which a background cluster ends; None: never.
        lifetime: Seconds after which a background cluster ends; None: never.
        file: The file that says all this, "" if there is none.
    """

    engine: str
    hosts: tuple[str, ...]
    everyone: bool = False
    name: str = ""
    workers: int | None = None
    master_port: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    group_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    idle_timeout: float | None = None
    lifetime: float | None = None
    file: str = ""

    def make_group(self) -> RuntimeGroup:
        """Connect the hosts, all at once.

        Returns:
            The group; end it with ``cleanup()``, or use it in a ``with`` statement.

        Raises:
            InvalidRuntimeError: If a host cannot be used, or, if all were meant, none.
        """
        from lazycluster.runtime_mgmt import RuntimeGroup

        return RuntimeGroup(
            hosts=list(self.hosts),
            on_unreachable="skip" if self.everyone else "raise",
            **self._group_options(),
        )

    def _group_options(self) -> dict[str, Any]:
        options = dict(self.group_options)
        options["environment"] = _environment(options.get("environment"))
        settings = {host: dict(values) for host, values in self.settings.items()}
        for values in settings.values():
            if "environment" in values:
                values["environment"] = _environment(values["environment"])
        return {**options, "settings": settings}

    def host_specs(self) -> list[HostSpec]:
        """Return the hosts with their settings, to be connected by another process.

        Raises:
            TypeError, ValueError: If something makes no sense.
        """
        from lazycluster.group.settings import GroupSettings

        return GroupSettings(**self._group_options()).specs(self.hosts)

    def make_cluster(self, group: RuntimeGroup) -> EngineCluster:
        """Make the cluster, which is not started yet.

        Args:
            group: Its hosts, from :meth:`make_group`.

        Returns:
            The cluster; start it with ``start(spec.workers, spec.master_port)``.

        Raises:
            ClusterError: If the engine is not known or not installed.

        Examples:
            >>> spec = lazycluster.load_cluster_file("cluster.toml")                       # doctest: +SKIP
            >>> with spec.make_group() as group, spec.make_cluster(group) as cluster:     # doctest: +SKIP
            ...     cluster.start(spec.workers, spec.master_port)
        """
        from lazycluster import engines

        return engines.load(self.engine)(group, **self.options)


def _environment(value: Any) -> Any:
    """Return what :class:`RuntimeGroup` takes for an environment; a file has a table for one with options."""
    if not isinstance(value, Mapping):
        return value
    from lazycluster.environments.spec import EnvironmentSpec

    return EnvironmentSpec(**value)
