"""The steps of a task, checked when they are made, and their results."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, TypeAlias

from lazycluster.agent.path_expansion import expand
from lazycluster.utils import absolute

__all__ = ["GetFile", "RunCommand", "RunFunction", "SendFile", "Step", "StepResult", "manager_path"]


@dataclass(frozen=True)
class SendFile:
    """Copy a file or directory from the manager to the host.

    Attributes:
        local_path: On the manager.
        remote_path: On the host; under the same name in the working directory if None.
    """

    local_path: str
    remote_path: str | None = None

    def __post_init__(self) -> None:
        _set(self, local_path=_path("local_path", self.local_path))
        if self.remote_path is not None:
            _set(self, remote_path=_path("remote_path", self.remote_path))

    @property
    def label(self) -> str:
        """The name of the step in messages."""
        return f"send {self.local_path}"


@dataclass(frozen=True)
class GetFile:
    """Copy a file or directory from the host to the manager.

    Attributes:
        remote_path: On the host.
        local_path: On the manager; under the same name in the current directory if None.
    """

    remote_path: str
    local_path: str | None = None

    def __post_init__(self) -> None:
        _set(self, remote_path=_path("remote_path", self.remote_path))
        if self.local_path is not None:
            _set(self, local_path=_path("local_path", self.local_path))

    @property
    def label(self) -> str:
        """The name of the step in messages."""
        return f"get {self.remote_path}"

    def target(self) -> str:
        """Return the path on the manager that is written, as far as it can be told without asking the host."""
        name = PurePath(self.remote_path).name or "file"
        if self.local_path is None:
            return str(absolute(name))
        local = absolute(manager_path(self.local_path))
        return str(local / name if self.local_path.endswith("/") or local.is_dir() else local)


@dataclass(frozen=True)
class RunCommand:
    """Run a line of shell on the host.

    Attributes:
        command: The line.
        shell: The shell that reads it; the runtime's, and so the user's own, if None.
    """

    command: str
    shell: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.command, str):
            raise TypeError(f"a command must be a string, not {type(self.command).__name__}")
        if not self.command.strip():
            raise ValueError("the command is empty")
        if "\0" in self.command:
            raise ValueError("the command contains a null character")

    @property
    def label(self) -> str:
        """The name of the step in messages."""
        return self.command


@dataclass(frozen=True)
class RunFunction:
    """Call a Python function on the host, in a process of its own.

    Attributes:
        function: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"a function must be callable, but {type(self.function).__name__} is not")
        _set(self, kwargs=MappingProxyType(dict(self.kwargs)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.function, self.args, dict(self.kwargs))

    @property
    def label(self) -> str:
        """The name of the step in messages."""
        name = getattr(self.function, "__qualname__", None) or type(self.function).__name__
        return f"{name}()"


Step: TypeAlias = SendFile | GetFile | RunCommand | RunFunction


@dataclass(frozen=True)
class StepResult:
    """The result of a step.

    Attributes:
        output: What it printed, or a line that says what was copied.
        exit_status: Of a command, or of a function's process; negative: the signal that ended it.
        value: What a function returned.
        has_value: Whether `value` counts, which may be None.
    """

    output: str = ""
    exit_status: int | None = None
    value: Any = None
    has_value: bool = False


def manager_path(path: str) -> Path:
    """Return a path on the manager as copies understand it, with `~` and variables replaced."""
    return Path(os.fsdecode(expand(os.fsencode(path), {})))


def _set(step: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(step, name, value)  # the way of frozen dataclasses


def _path(what: str, value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{what} must be a path, not {type(value).__name__}")
    text = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a string, not bytes")
    if not text:
        raise ValueError(f"{what} is empty")
    if "\0" in text:
        raise ValueError(f"{what} contains a null character")
    return text
