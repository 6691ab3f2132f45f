"""The statement of an engine: what a cluster of it consists of. All else is shared by the engines."""

from __future__ import annotations

import abc
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from lazycluster.exceptions import LazyclusterError

from .exceptions import ClusterError
from .network import Port, single_ports
from .sent.messages import LOOPBACK
from .service_spec import SCRATCH, ServiceSpec

if TYPE_CHECKING:
    from lazycluster.background.client import BackgroundProcess

    from .worker_hosts import WorkerHost

__all__ = ["NETWORK_OPTION", "CheckVersions", "Endpoint", "Engine", "Option", "check_statement"]

CheckVersions = Literal["error", "warn", "ignore"]


def checked_policy(policy: CheckVersions) -> CheckVersions:
    """Return what is to happen if versions do not match.

    Raises:
        ValueError: If it makes no sense.
    """
    if policy not in get_args(CheckVersions):
        raise ValueError(f"check_versions must be 'error', 'warn' or 'ignore', not {policy!r}")
    return policy


@dataclass
class Endpoint:
    """A master or a worker, as the others reach it.

    Attributes:
        name: Its name, unique in the cluster.
        host: Where it runs; ``localhost`` is the manager.
        ports: Its ports by name; empty before they are chosen.
        python: The Python to use there.
        siblings: How many workers the cluster has on this host.
        gpus: How many GPUs it gets for itself.
        address: Address of its ports that other hosts reach, for them: with ``network="direct"`` one of its host, else
            the loopback interface on every host and on the manager. Its other ports are on the loopback interface.
        bind: The same as its own host knows it: it listens there, and on no other address.
        on_manager: Whether it runs on the manager.
    """

    name: str
    host: str = "localhost"
    ports: dict[str, int] = field(default_factory=dict)
    python: str = "python3"
    siblings: int = 1
    gpus: int = 0
    address: str = LOOPBACK
    bind: str = LOOPBACK
    on_manager: bool = False

    scratch: ClassVar[str] = SCRATCH
    """Stands, in what a `ServiceSpec` says, for a private directory that is removed when the process ends."""

    @property
    def port(self) -> int:
        """The first of its ports."""
        for port in self.ports.values():
            return port
        raise ClusterError(
            f"{self.name} has no port: the engine states none for it in master_ports or worker_ports, "
            "or it is not chosen yet"
        )

    def move(self, place: WorkerHost) -> None:
        """Take note of where it runs."""
        self.host, self.python = place.host, place.python or "python3"


@dataclass(frozen=True)
class Option:
    """An option of an engine, as ``lazycluster start`` takes it.

    Attributes:
        flag: How it is written, e.g. ``--memory-limit``.
        argument: The argument of the cluster's class that it sets.
        help: What it says in ``--help``.
        metavar: What its value is called there.
        kind: ``text``, ``count`` (an integer of at least 1), ``port`` or ``directory``.
        default: Its value where it is not given.
        safe: True if a ``cluster.toml`` of somebody who is not trusted may set it: whatever its text is, no program is
            run for it, and no file is read or written. A ``count`` or ``port`` always may be set.
        check: Called with the text on the command line before anything starts; raises ValueError, which says what is
            wrong with it.
        choices: The texts that it may be, if there are only some.
    """

    flag: str
    argument: str
    help: str
    metavar: str
    kind: Literal["text", "count", "port", "directory"] = "text"
    default: str | None = None
    safe: bool = False
    check: Callable[[str], object] | None = None
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.flag.startswith("--") or not self.argument.isidentifier():
            raise ValueError(
                f"an option is written as --depth, its argument as depth, not {self.flag}, {self.argument}"
            )
        if self.kind not in ("text", "count", "port", "directory"):
            raise ValueError(f"the kind of {self.flag} must be text, count, port or directory, not {self.kind!r}")


NETWORK_OPTION = Option(
    "--network",
    "network",
    "How hosts reach each other: through this machine (tunnel), direct, or auto.",
    "HOW",
    default="tunnel",
    choices=("tunnel", "direct", "auto"),
)
"""The argument ``network`` of clusters, for engines whose processes can talk to each other directly."""


class Engine(abc.ABC):
    """The statement of an engine. A subclass states it; an instance belongs to one cluster, and may hold its secrets.

    Examples:
        >>> class Counting(Engine):
        ...     name, cluster, packages = "counting", "CountingCluster", ("counting",)
        ...     worker_ports = (Port("worker"),)
        ...     def master(self, at):
        ...         return ServiceSpec("counter", command=("counter", "--port", str(at.port)), ready_port="master")
        ...     def worker(self, at, master):
        ...         return ServiceSpec("adder", command=("adder", f"{master.address}:{master.port}"), restarts=5)
    """

    name: ClassVar[str]
    """The name by which ``lazycluster start`` knows it."""
    cluster: ClassVar[str]
    """The name of the cluster's class, for messages."""
    module: ClassVar[str] = ""
    """The module from which users import the cluster's class; by default that in which it is."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Python packages without which nothing works, on the manager and on the hosts."""
    same_versions: ClassVar[tuple[str, ...]] = ()
    """Packages whose versions must be the same everywhere, as must be Python's minor version then."""
    told_versions: ClassVar[tuple[str, ...]] = ()
    """Further packages whose versions our own programs tell."""
    manager_packages: ClassVar[tuple[str, ...]] = ()
    """Packages that are needed on the manager alone."""
    extra: ClassVar[str] = ""
    """The extra of lazycluster that installs the packages; "" if they are installed by their names."""
    master_needs: ClassVar[tuple[str, ...]] = ()
    """Programs that must be on the PATH where the master runs."""
    worker_needs: ClassVar[tuple[str, ...]] = ()
    """Programs that must be on the PATH where workers run."""
    master_ports: ClassVar[tuple[Port, ...]] = (Port("master"),)
    """The ports of the master; the first is the one that it is known by."""
    worker_ports: ClassVar[tuple[Port, ...]] = ()
    """The ports of each worker; the first is the one in ``ports_per_host``."""
    master_on: ClassVar[Literal["manager", "host"]] = "manager"
    """Place of the master: ``"manager"``, or ``"host"`` for the first host of the group."""
    master_name: ClassVar[str] = "master"
    """Name of the master in messages."""
    sent: ClassVar[bool] = False
    """True if master and workers are programs of our own, which start before their ports are known; see `Source`."""
    options: ClassVar[tuple[Option, ...]] = ()
    """The options of ``lazycluster start`` beside those of all engines."""
    summary: ClassVar[str] = ""
    """A line on it, for ``lazycluster start --help``."""
    help: ClassVar[str] = ""
    """Text of ``lazycluster start NAME --help``; by default the summary."""

    direct: ClassVar[Literal["no", "open", "encrypted"]] = "no"
    """Use of hosts' own addresses (``network="direct"``): ``"no"``: its processes listen on loopback only;
    ``"open"``: they listen on `Endpoint.bind`; ``"encrypted"``: and encrypt and authenticate all that is said there."""

    check_versions: CheckVersions = "error"

    @abc.abstractmethod
    def master(self, at: Endpoint) -> ServiceSpec:
        """Return what the master is; called once its ports are chosen, or before if the programs are `sent`.

        Args:
            at: The master.
        """

    @abc.abstractmethod
    def worker(self, at: Endpoint, master: Endpoint) -> ServiceSpec:
        """Return what a worker is; called once its ports are chosen, or before if the programs are `sent`.

        Args:
            at: The worker.
            master: The master.
        """

    def connection(self, master: Endpoint) -> dict[str, Any]:
        """Return what another process needs to connect, as JSON can hold it: it stands in a connection file.

        Args:
            master: The master.
        """
        return {"port": master.port}

    def is_busy(self, master: Endpoint) -> bool:
        """Return True if a client's work is being done or waits, or was done since this was asked before.

        An engine that does not state it cannot be ended when it is idle.

        Args:
            master: The master.

        Raises:
            LazyclusterError: If the master does not answer.
        """
        raise NotImplementedError

    @classmethod
    def states_idleness(cls) -> bool:
        """Return True if `is_busy` is stated."""
        return cls.is_busy is not Engine.is_busy

    def valid_until(self) -> float | None:
        """Return when its certificates expire, in seconds since 1970; None if it has none."""
        return None

    def adopt(self, connection: Mapping[str, Any], process: BackgroundProcess) -> None:  # noqa: B027  (few have any)
        """Take over the secrets of the cluster in the background that this is the statement of.

        Args:
            connection: What `connection` returned there.
            process: Its process.
        """

    def forget(self) -> None:  # noqa: B027  (most have nothing to forget)
        """Forget the secrets, once the cluster has ended; one that is started anew has others."""

    def encrypts(self) -> bool:
        """Return True if all that hosts say to each other is encrypted, and both sides show who they are."""
        return self.direct == "encrypted"

    def needed_here(self) -> tuple[str, ...]:
        """Return the packages that the manager must have."""
        return (*self.packages, *self.manager_packages)

    @classmethod
    def client(cls, connection: Mapping[str, Any]) -> Any:
        """Return a client of a cluster of another process.

        Args:
            connection: What `connection` returned there.
        """
        raise TypeError(f"{cls.__name__} states no client")


def stated(engine: Engine, process: Literal["master", "worker"], *endpoints: Endpoint) -> ServiceSpec:
    """Return what an engine states about a process.

    Raises:
        ClusterError: If its code fails with an error that is no message for users; it names the engine, which may be
            somebody else's.
    """
    try:
        spec: ServiceSpec = getattr(engine, process)(*endpoints)
    except (LazyclusterError, OSError, ValueError, TypeError):
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ClusterError(
            f"the engine {engine.name!r} failed: {type(engine).__name__}.{process}() raised "
            f"{type(error).__name__}: {error}\n"
            f'  File "{last.filename}", line {last.lineno}, in {last.name}\n'
            f"  Next step: report it to those who maintain {type(engine).__module__}, with the whole traceback: that "
            "of 'lazycluster --debug ...', or of this error's __cause__"
        ) from error
    return spec


_CHOICES = {"master_on": ("manager", "host"), "direct": ("no", "open", "encrypted")}
_TEXTS = ("packages", "same_versions", "told_versions", "manager_packages", "master_needs", "worker_needs")
_TUPLES: dict[str, type] = {**dict.fromkeys(_TEXTS, str), "master_ports": Port, "worker_ports": Port, "options": Option}


def check_statement(engine: type[Engine]) -> None:
    """Make sure that a statement says what it must, in the types that it must have.

    Raises:
        TypeError: If it does not.
    """
    if not (isinstance(engine, type) and issubclass(engine, Engine)):
        raise TypeError(f"engine_class must be a subclass of lazycluster.engine.Engine, not {engine!r}")
    what = engine.__name__
    for name in ("name", "cluster"):
        if not isinstance(getattr(engine, name, None), str):
            raise TypeError(f"{what}.{name} must be stated, as a string")
    for name, kind in _TUPLES.items():
        value = getattr(engine, name)
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(one, kind) for one in value):
            raise TypeError(f"{what}.{name} must be a tuple of {kind.__name__}, not {value!r}; one alone is (it,)")
    for name in ("master_ports", "worker_ports"):
        names = [port.name for port in single_ports(getattr(engine, name))]
        if len(set(names)) < len(names) or (name == "master_ports" and not names):
            raise TypeError(f"{what}.{name} must have ports of different names, and a master at least one: {names}")
    _check_choices(engine)
    if missing := ", ".join(sorted(engine.__abstractmethods__)):
        raise TypeError(f"{what} does not state: {missing}")


def _check_choices(engine: type[Engine]) -> None:
    for name, choices in _CHOICES.items():
        if getattr(engine, name) not in choices:
            raise TypeError(
                f"{engine.__name__}.{name} must be {' or '.join(map(repr, choices))}, not {getattr(engine, name)!r}"
            )
