"""What a task is to do, as it is written down: its name, its steps, its environment variables."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .limits import Limits
from .steps import GetFile, RunCommand, RunFunction, SendFile, Step
from .variables import checked_variables

__all__ = ["Recipe"]

R = TypeVar("R", bound="Recipe")

_numbers = itertools.count(1)


class Recipe:
    """The part of a task that can be copied: all but its execution.

    Attributes:
        name: A name for logs and messages.
    """

    def __init__(self, name: str | None = None) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"the name of a task must be a string, not {type(name).__name__}")
        if name == "":
            raise ValueError("the name of a task is empty")
        self.name = name or f"task-{next(_numbers)}"
        self._steps: list[Step] = []
        self._env: dict[str, str] = {}
        self._limits = Limits()
        self._lock = threading.Lock()

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps, as frozen dataclasses."""
        return tuple(self._steps)

    def _add(self: R, step: Step) -> R:
        with self._lock:
            self._refuse_while_running()
            self._steps.append(step)
        return self

    def _refuse_while_running(self) -> None:
        """Raise an error if steps cannot be added now."""

    def replace_steps(self: R, steps: Sequence[Step]) -> R:
        """Take other steps instead of the present ones; for the layers above.

        Args:
            steps: The new ones.

        Returns:
            The task itself.
        """
        with self._lock:
            self._refuse_while_running()
            self._steps = list(steps)
        return self

    def send_file(self: R, local_path: str | os.PathLike[str], remote_path: str | None = None) -> R:
        """Add a step that copies a file or folder from the manager to the host.

        Args:
            local_path: The file or folder on this machine.
            remote_path: Where it goes on the host: relative to the working directory, with ``~`` and environment
                variables as in a shell. By default it keeps its name, in the working directory.

        Returns:
            The task itself.

        Raises:
            ValueError: If a path is empty.
        """
        return self._add(SendFile(local_path, remote_path))  # type: ignore[arg-type]

    def get_file(self: R, remote_path: str, local_path: str | os.PathLike[str] | None = None) -> R:
        """Add a step that copies a file or folder from the host to the manager.

        Args:
            remote_path: The file or folder on the host, see :meth:`send_file`.
            local_path: Where it goes on this machine; an existing directory, or a path that ends with ``/``, takes it
                under its own name. By default it keeps its name, in the current directory.

        Returns:
            The task itself.

        Raises:
            ValueError: If a path is empty.
        """
        return self._add(GetFile(remote_path, local_path))  # type: ignore[arg-type]

    def run_command(self: R, command: str, shell: str | None = None) -> R:
        """Add a step that runs a line of shell, without a terminal or input, in the working directory.

        It is over when the shell has exited and its output has ended. It fails if the exit status is not 0.

        Args:
            command: The line.
            shell: Another shell than the user's own, e.g. ``bash``.

        Returns:
            The task itself.

        Raises:
            ValueError: If the command is empty.
        """
        return self._add(RunCommand(command, shell))

    def run_function(self: R, function: Callable[..., Any], **func_kwargs: Any) -> R:
        """Add a step that calls a Python function on the host, in a process of its own.

        The function may be a lambda, a closure, or stand in a notebook or a local module; the host needs the
        manager's minor version of Python, and the packages that the function imports. What it returns is found in
        :attr:`function_returns` and :meth:`result`.

        Args:
            function: The function; it may be asynchronous.
            **func_kwargs: Its arguments. For arguments of other kinds or names see :meth:`call`.

        Returns:
            The task itself.

        Raises:
            TypeError: If it cannot be called.
        """
        return self._add(RunFunction(function, (), func_kwargs))

    def call(self: R, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> R:
        """Add a step that calls a Python function with any arguments, else as :meth:`run_function`.

        Args:
            function: The function.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments, whatever their names.

        Returns:
            The task itself.
        """
        return self._add(RunFunction(function, args, kwargs))

    @property
    def env_variables(self) -> dict[str, str]:
        """Environment variables of this task, which come on top of those of the runtime."""
        return self._env

    @env_variables.setter
    def env_variables(self, env_variables: Mapping[str, Any]) -> None:
        self._env = checked_variables(env_variables)

    @property
    def limits(self) -> Limits:
        """What the task may use of its host."""
        return self._limits

    def limit(
        self: R, memory: str | int | None = None, cpu_time: float | None = None, wall_time: float | None = None
    ) -> R:
        """Limit what the task may use of its host. One that wants more is ended; its error says which limit it was.

        Args:
            memory: Bytes, or a size such as ``"2 GB"``, for each process of the task: of its address space, which is
                more than what it touches; for a function, beyond what its interpreter had before the call.
            cpu_time: Seconds of processor time for each process of the task.
            wall_time: Seconds from the start of the task to its end.

        Returns:
            The task itself.

        Raises:
            TypeError, ValueError: If a limit makes no sense.

        Examples:
            >>> task = RuntimeTask("train").run_command("./train")
            >>> task = task.limit(memory="8 GB", wall_time=3600)
        """
        self._limits = Limits.checked(memory, cpu_time, wall_time)
        return self

    # --- copies --------------------------------------------------------------------------------
    def __copy__(self: R) -> R:
        return _rebuilt(type(self), self.name, self.steps, self._env, self._limits)

    def __deepcopy__(self: R, memo: dict[int, Any]) -> R:
        """Return a fresh task with the same steps, which has not been executed."""
        return _rebuilt(type(self), self.name, self.steps, self._env, self._limits)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.name, self.steps, self._env, self._limits)


def _rebuilt(cls: type[R], name: str, steps: Sequence[Step], env: Mapping[str, str], limits: Limits) -> R:
    recipe = cls(name)
    recipe._steps, recipe._env, recipe._limits = list(steps), dict(env), limits
    return recipe
