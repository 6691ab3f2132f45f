"""The context in which tasks are executed (host, directory, environment), and the options of one execution."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lazycluster.exceptions import TaskExecutionError

if TYPE_CHECKING:
    from lazycluster.ssh.connection import Connection
    from lazycluster.ssh.transfer import TransferResult

    from .pickling import PickledCall

__all__ = ["Context", "ExecutionOptions", "checked_variables"]


@dataclass(frozen=True)
class Context:
    """The host, directory and environment in which the steps of a task are executed.

    Attributes:
        host: The host as the user named it.
        connection: The connection to it.
        cwd: The working directory there.
        env: What is added to the host's environment.
        python: The interpreter for functions; None: the one that the agent finds.
        shell: The shell for commands; None: the user's own.
        owner: The object that holds the connection: it must live as long as something is executed.
        prepare: Makes the Python environment that functions, commands and workers need, and returns the context in
            it; None if there is nothing to be made. See :meth:`prepared`.
        startup_files: When the shell reads its start-up files: ``once`` per connection, or ``always``.
        generation: Which agent of the host the working directory belongs to; 0: it depends on none.
    """

    host: str
    connection: Connection
    cwd: str
    env: Mapping[str, str] = field(default_factory=dict, repr=False)  # it may hold secrets
    python: str | None = None
    shell: str | None = None
    owner: object = field(default=None, repr=False, compare=False)
    prepare: Callable[[Context], Awaitable[Context]] | None = field(default=None, repr=False, compare=False)
    generation: int = 0
    startup_files: str = "once"

    def for_shell(self, shell: str | None) -> dict[str, str | None]:
        """Return the part of a request that says how and where a line of shell is run.

        Args:
            shell: Another shell than that of the context.
        """
        return {"shell": shell or self.shell, "cwd": self.cwd, "startup_files": self.startup_files}

    async def prepared(self) -> Context:
        """Return the context in which something can be run, once all is there that this needs."""
        return self if self.prepare is None else await self.prepare(self)


@dataclass(frozen=True)
class ExecutionOptions:
    """The options of one execution of a task.

    Attributes:
        debug: Print output to standard output as it comes.
        omit_on_join: Have a join of the runtime pass it over.
        retries: How often it is begun again when its host is lost.
        retry_on: ``"host"``, or ``"any"`` to begin it again whatever has failed.
        next_context: Returns where it is begun again, given the hosts that were tried, perhaps after waiting for one;
            None if there is no such host. It is called on the loop. By default the runtime that executes the task.
        calls: For each step the pickled call of its function, as
            :func:`~lazycluster.tasks.step_runner.pickle_calls` returns them, where they are shared by several hosts.
        send: Sends files in place of :func:`lazycluster.ssh.transfer.send`.
        send_lock: Held while files are sent, where hosts share a file system: so only the first of them sends.
    """

    debug: bool = False
    omit_on_join: bool = False
    retries: int = 0
    retry_on: str = "host"
    next_context: Callable[[Sequence[str]], Awaitable[Context | None]] | None = field(default=None, repr=False)
    calls: Sequence[PickledCall | TaskExecutionError | None] | None = field(default=None, repr=False)
    send_lock: asyncio.Lock | None = field(default=None, repr=False)
    send: Callable[..., Awaitable[TransferResult]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.retries, int) or isinstance(self.retries, bool):
            raise TypeError(f"retries must be an integer, not {type(self.retries).__name__}")
        if self.retries < 0:
            raise ValueError(f"retries must be at least 0, not {self.retries}")
        if self.retry_on not in ("host", "any"):
            raise ValueError(f"retry_on must be 'host' or 'any', not {self.retry_on!r}")


def checked_variables(variables: Mapping[str, Any]) -> dict[str, str]:
    """Return environment variables as text.

    Args:
        variables: Names and values; numbers and paths are turned into text.

    Returns:
        A new dictionary.

    Raises:
        TypeError: If it is not a mapping, a name is not a string, or a value is neither text nor a number or path.
        ValueError: If a name is empty or contains ``=``, or anything contains a null character.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(f"environment variables must be a dictionary, not {type(variables).__name__}")
    checked = {}
    for name, value in variables.items():
        if not isinstance(name, str):
            raise TypeError(f"the name of an environment variable must be a string, not {name!r}")
        if not name or "=" in name or "\0" in name:
            raise ValueError(f"not usable as the name of an environment variable: {name!r}")
        if isinstance(value, bool) or not isinstance(value, (str, int, float, os.PathLike)):
            # The value itself may be a secret.
            raise TypeError(f"environment variable {name} must be a string, not {type(value).__name__}")
        text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
        if not isinstance(text, str):
            raise TypeError(f"environment variable {name} must be a string, not bytes")
        if "\0" in text:
            raise ValueError(f"the value of the environment variable {name} contains a null character")
        checked[name] = text
    return checked
