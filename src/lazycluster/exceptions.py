"""Errors of the library.

All of them derive from :class:`LazyclusterError`. An error carries its evidence as attributes (host, reason, command,
output, ...), and its message ends with the next step where there is one.
"""

from __future__ import annotations

import concurrent.futures
import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "AgentError",
    "BackgroundError",
    "BrokenPoolError",
    "ConnectionLostError",
    "EnvironmentBuildError",
    "EnvironmentsBuildError",
    "ForwardingForbiddenError",
    "GroupTaskError",
    "HostsLostError",
    "InvalidRuntimeError",
    "InvalidRuntimesError",
    "LazyclusterError",
    "NoAnswerError",
    "NoPortsLeftError",
    "NoRuntimesDetectedError",
    "NoRuntimesError",
    "PathCreationError",
    "PortInUseError",
    "RemoteTraceback",
    "TaskExecutionError",
    "TunnelError",
    "WorkerLostError",
]


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text from a host that is safe to show: what would steer a terminal, or hide text, is escaped."""
    return _CONTROL.sub(_escaped, text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """Return a text from a host that is safe to show within a line: it cannot begin another line."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def _escaped(found: re.Match[str]) -> str:
    number = ord(found.group())
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def harmless(record: logging.LogRecord) -> bool:
    """Filter for logs: texts from hosts in their messages cannot steer the terminal that shows them."""
    text = record.getMessage()
    shown = printable(text)
    if shown != text:
        record.msg, record.args = shown, None
    return True


class LazyclusterError(Exception):
    """Base class of all errors of the library.

    Their messages hold what hosts say; shown as text, they hold no control characters but line breaks and tabs.
    """

    def __str__(self) -> str:
        return printable(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, vars(self))


def _restore(
    kind: type[LazyclusterError], arguments: tuple[Any, ...], attributes: Mapping[str, Any]
) -> LazyclusterError:
    """Return an error as it was when it was pickled, whatever its constructor takes. Pickles name this function."""
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(attributes)
    return error


class InvalidRuntimeError(LazyclusterError):
    """A host cannot be used as a runtime.

    Attributes:
        host: The host as the user named it.
        reason: What kind of failure it is, for programs: one of ``dns``, ``refused``, ``unreachable``, ``timeout``,
            ``dropped`` (the handshake, by a busy server), ``proxy`` (what stands between), ``host_key``, ``auth``,
            ``config``, ``ssh`` (no usable ssh client), ``python``, ``shell``, ``protocol``, ``lost``, ``setup``,
            ``working_dir``, ``disk`` (no room for temporary files on the host), ``manager`` (none on this machine).
        detail: What was seen, e.g. the last lines that ssh printed.
        hint: The next step.
    """

    def __init__(self, host: str, reason: str = "unknown", detail: str = "", hint: str = "") -> None:
        self.host = host
        self.reason = reason
        self.detail = detail.strip()
        self.hint = hint
        message = f"{host}: not usable as a runtime ({reason})"
        if self.detail:
            message += f": {self.detail}"
        if hint:
            message += f"\n  Next step: {hint}"
        super().__init__(message)


class InvalidRuntimesError(InvalidRuntimeError):
    """Several hosts cannot be used as runtimes.

    Attributes:
        errors: One error per host.
        reason: What they have in common, else ``several``.
    """

    def __init__(self, errors: Sequence[InvalidRuntimeError]) -> None:
        self.errors = list(errors)
        reasons = {error.reason for error in self.errors}
        hosts = ", ".join(dict.fromkeys(error.host for error in self.errors))
        detail = "\n".join(dict.fromkeys(str(error) for error in self.errors))
        hint = 'fix each of these, or go on without them: on_unreachable="skip"'
        super().__init__(hosts, reasons.pop() if len(reasons) == 1 else "several", detail, hint)


class ConnectionLostError(LazyclusterError):
    """The connection to a host ended while something still depended on it."""

    def __init__(self, host: str, detail: str = "") -> None:
        self.host = host
        self.detail = detail
        message = f"{host}: the connection was lost" + (f": {detail}" if detail else "")
        super().__init__(f"{message}\n  Next step: check that the host is up and reachable, then connect again")


class NoAnswerError(LazyclusterError):
    """A host whose connection works has not done in time what was asked of it.

    Attributes:
        host: The host.
        awaited: What was waited for, e.g. ``an answer to 'ports'``.
        seconds: For how long.
        detail: What else is known, e.g. that the link is interrupted.
    """

    def __init__(self, host: str, awaited: str, seconds: float, detail: str = "") -> None:
        self.host = host
        self.awaited = awaited
        self.seconds = seconds
        self.detail = detail
        waited = f"timed out after {seconds:g} s, waiting for {awaited}"
        text = f"{waited}; {detail}" if detail else f"connected, but {waited}"
        super().__init__(
            f"{host}: {text}\n  Next step: check its load, memory and disks, e.g. with: ssh {shlex.quote(host)} df"
        )


class AgentError(LazyclusterError):
    """The agent on a host answered a request with an error.

    Attributes:
        host: The host.
        kind: The kind of error, e.g. ``os``, ``value``, ``python``, ``mismatch``.
        message: What the agent said.
        evidence: Whatever else it sent along.
    """

    def __init__(self, host: str, kind: str, message: str, evidence: Mapping[str, Any] | None = None) -> None:
        self.host = host
        self.kind = kind
        self.message = message
        self.evidence = dict(evidence or {})
        super().__init__(f"{host}: {message}")


class TaskExecutionError(LazyclusterError):
    """A step of a task failed on a host.

    For a function, ``__cause__`` is the exception that it raised there, and the message holds its traceback.

    Attributes:
        host: The host.
        task: The name of the task.
        step: The index of the step, from 0.
        what: The command line, the function's name or the file of the step.
        exit_status: The exit status of a command or a function's process; negative: the signal that ended it.
        output: The end of what the step printed.
        log_file: The file with all that it printed, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        host: str = "",
        task: str = "",
        step: int | None = None,
        what: str = "",
        exit_status: int | None = None,
        output: str = "",
        log_file: str | None = None,
    ) -> None:
        self.message = message
        self.host = host
        self.task = task
        self.step = step
        self.what = what
        self.exit_status = exit_status
        self.output = output
        self.log_file = log_file
        super().__init__(message)


def _task_error(cls: type[TaskExecutionError], values: dict[str, Any]) -> LazyclusterError:
    """Return an error that an earlier version has pickled."""
    return _restore(cls, (values["message"],), values)


class GroupTaskError(TaskExecutionError):
    """Several tasks of a group failed.

    Attributes:
        errors: One error per failed task.
    """

    def __init__(self, errors: Sequence[BaseException]) -> None:
        self.errors = list(errors)
        hosts = ", ".join(str(getattr(error, "host", "?")) for error in self.errors)
        text = "\n\n".join(str(error) for error in self.errors)
        super().__init__(f"{len(self.errors)} tasks failed, on {hosts}:\n\n{text}", host=hosts)


class RemoteTraceback(LazyclusterError):  # noqa: N818  (it is what an exception is shown with, not an error)
    """The traceback of a function that raised on a host: the ``__cause__`` of the exception that came from there.

    Attributes:
        host: The host.
        pid: The process.
        traceback: The traceback there, as text.
    """

    def __init__(self, host: str, pid: int, traceback: str) -> None:
        self.host = host
        self.pid = pid
        self.traceback = traceback
        super().__init__(f"on {host}, in the process {pid}:\n{traceback.rstrip()}")


class BrokenPoolError(LazyclusterError, concurrent.futures.BrokenExecutor):
    """The workers of an executor cannot run a call, or any."""


class WorkerLostError(BrokenPoolError):
    """A call was given up, since its worker or host died under it, each time that it was tried.

    Attributes:
        call: The call.
        host: The host of the last try.
        hosts: The hosts of all tries.
        pid: The last worker's process, None if the whole host was lost.
        exit_status: What that ended with; negative: the signal that ended it; None if the host was lost.
        output: The end of what the workers of that host had printed.
    """

    def __init__(
        self,
        message: str,
        *,
        call: str = "",
        host: str = "",
        hosts: Sequence[str] = (),
        pid: int | None = None,
        exit_status: int | None = None,
        output: str = "",
    ) -> None:
        self.message = message
        self.call = call
        self.host = host
        self.hosts = list(hosts)
        self.pid = pid
        self.exit_status = exit_status
        self.output = output
        super().__init__(message)


class HostsLostError(WorkerLostError):
    """No host is left to run a call on."""


def _lost_error(cls: type[WorkerLostError], message: str, values: dict[str, Any]) -> WorkerLostError:
    """Return an error that an earlier version has pickled."""
    return cls(message, **values)


class NoRuntimesDetectedError(LazyclusterError):
    """The ssh configuration holds no host that can be used as a runtime."""


class NoRuntimesError(LazyclusterError):
    """No runtime is left, e.g. after filtering."""


class TunnelError(LazyclusterError):
    """A port could not be forwarded, for another reason than a port in use."""


class ForwardingForbiddenError(TunnelError):
    """A port could not be forwarded since the host's sshd does not allow it.

    Attributes:
        host: The host.
        problem: What it does not allow.
    """

    def __init__(self, host: str, problem: str) -> None:
        self.host = host
        self.problem = problem
        super().__init__(
            f"{host}: {problem}\n  Next step: have that changed; or, if it is not forbidden on purpose, let our agent "
            'forward the ports: connection_kwargs={"relay": "agent"}'
        )


class PortInUseError(LazyclusterError):
    """A port that was asked for is taken.

    Attributes:
        port: The port.
        host: Where it is taken; ``localhost`` means the manager.
    """

    def __init__(self, port: int, host: str = "localhost", detail: str = "") -> None:
        self.port = port
        self.host = host
        self.detail = detail
        where = "this machine (the manager)" if host == "localhost" else host
        message = f"port {port} is already in use on {where}" + (f": {detail}" if detail else "")
        super().__init__(f"{message}\n  Next step: name another port, or a list of ports to choose from")


class NoPortsLeftError(LazyclusterError):
    """None of the ports that may be used is free."""


class BackgroundError(LazyclusterError):
    """A cluster in the background cannot be used, or its process says that something has failed.

    Attributes:
        type: The name of the error's class in that process; "" if there is no answer.
    """

    def __init__(self, message: str, type: str = "") -> None:
        self.type = type
        super().__init__(message)


class PathCreationError(LazyclusterError):
    """A directory or file could not be created on a host."""


class EnvironmentBuildError(LazyclusterError):
    """The environment that a host should have cannot be made, or cannot be used.

    Attributes:
        host: The host; ``manager`` if it failed on this machine, before any host was concerned.
        problem: What is wrong.
        package: The package that it is about, if it is about one.
        hint: The next step.
        output: The end of what the installer printed.
    """

    def __init__(self, host: str, problem: str, package: str = "", hint: str = "", output: str = "") -> None:
        self.host = host
        self.problem = problem
        self.package = package
        self.hint = hint
        self.output = output.strip()
        lines = [f"{host}: no environment: {problem}"]
        if self.output:
            lines += [f"    {line[:1000]}" for line in self.output.splitlines()[-15:]]
        if hint:
            lines.append(f"  Next step: {hint}")
        super().__init__("\n".join(lines))


class EnvironmentsBuildError(EnvironmentBuildError):
    """The environment cannot be made on several hosts.

    Attributes:
        errors: One error per host.
    """

    def __init__(self, errors: Sequence[EnvironmentBuildError]) -> None:
        self.errors = list(errors)
        hosts = ", ".join(error.host for error in self.errors)
        text = "\n".join(str(error) for error in self.errors)
        packages = {error.package for error in self.errors}
        super().__init__(hosts, f"for each:\n{text}", packages.pop() if len(packages) == 1 else "")
