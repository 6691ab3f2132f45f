"""The errors of clusters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lazycluster.exceptions import LazyclusterError
from lazycluster.exceptions import _restore as _restore  # what earlier versions have pickled names it here

if TYPE_CHECKING:
    from lazycluster.runtime.reachability import Reachability

__all__ = [
    "ClusterError",
    "ClusterFileError",
    "ClusterStartError",
    "MasterStartError",
    "ServiceError",
    "UnreachableError",
    "VersionMismatchError",
    "WorkerStartError",
]


_SHOWN = 10


class ClusterError(LazyclusterError):
    """Base class of the errors of clusters."""


class ServiceError(ClusterError):
    """A process of a cluster ended, or did not get ready.

    Attributes:
        name: The name of the process.
        host: Where it ran.
        problem: What happened.
        exit_status: Its exit status; negative: the signal that ended it; None if it did not end.
        output: The end of what it printed.
        log_file: The file with all that it printed, or None.
        hint: The next step, if there is one.
    """

    def __init__(
        self,
        name: str,
        host: str,
        problem: str,
        *,
        exit_status: int | None = None,
        output: str = "",
        log_file: str | None = None,
        hint: str = "",
    ) -> None:
        self.name = name
        self.host = host
        self.problem = problem
        self.exit_status = exit_status
        self.output = output.strip()
        self.log_file = log_file
        self.hint = hint
        super().__init__(self._text())

    def _text(self) -> str:
        ended = ""
        if self.exit_status is not None:
            how = f"exit status {self.exit_status}" if self.exit_status >= 0 else f"signal {-self.exit_status}"
            ended = f" ({how})"
        lines = [f"{self.host}: {self.name}: {self.problem}{ended}"]
        if self.output:
            lines += ["  The end of its output:", *(f"  | {line}" for line in self.output.splitlines()[-25:])]
        if self.log_file:
            lines.append(f"  All of it: {self.log_file}")
        if self.hint:
            lines.append(f"  Next step: {self.hint}")
        return "\n".join(lines)


class MasterStartError(ServiceError):
    """The master of a cluster did not start."""

    def __init__(
        self,
        name: str = "master",
        host: str = "localhost",
        problem: str = "the master did not start",
        **evidence: Any,
    ) -> None:
        super().__init__(name, host, problem, **evidence)


class WorkerStartError(ServiceError):
    """A worker of a cluster did not start."""


class ClusterStartError(ClusterError):
    """Several parts of a cluster did not start.

    Attributes:
        errors: One error for each.
    """

    def __init__(self, errors: Sequence[BaseException]) -> None:
        self.errors = list(errors)
        text = "\n\n".join(str(error) for error in self.errors)
        super().__init__(f"{len(self.errors)} parts of the cluster did not start:\n\n{text}")


class UnreachableError(ClusterError):
    """Hosts of a cluster with ``network="direct"`` do not reach each other.

    Attributes:
        found: Which do not, at which address and port, and why.
    """

    def __init__(self, found: Reachability) -> None:
        self.found = found
        lines = [f"  {obstacle}" for obstacle in found.obstacles[:_SHOWN]]
        if len(found.obstacles) > _SHOWN:
            lines.append(f"  and {len(found.obstacles) - _SHOWN} more")
        super().__init__(
            "\n".join(
                [
                    'network="direct" needs hosts that reach each other:',
                    *lines,
                    "  Next step: allow these connections between the hosts, state another address of a host with "
                    'address=, or leave out network= to have tunnels through this machine ("auto" chooses)',
                ]
            )
        )


class VersionMismatchError(ClusterError):
    """The software on hosts does not match the manager's.

    Attributes:
        hosts: The hosts that do not match.
    """

    def __init__(self, message: str, hosts: Sequence[str]) -> None:
        self.hosts = list(hosts)
        super().__init__(message)


class ClusterFileError(ClusterError, ValueError):
    """A file that specifies a cluster cannot be used.

    Attributes:
        file: The file.
        problems: What is wrong, each with its line, or None where it has none.
    """

    def __init__(self, file: str, problems: Sequence[tuple[int | None, str]], hint: str = "") -> None:
        self.file = file
        self.problems = list(problems)
        lines = [f"{file}{'' if line is None else f', line {line}'}: {text}" for line, text in self.problems]
        super().__init__("\n".join([*lines, *([f"  Next step: {hint}"] if hint else [])]))
