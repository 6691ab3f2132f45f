"""Where and how tasks are carried out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazycluster.ssh.connection import Connection

__all__ = ["Context"]


@dataclass(frozen=True)
class Context:
    """Where and how the steps of a task are carried out.

    Attributes:
        host: The host as the user named it.
        connection: The connection to it.
        cwd: The working directory there.
        env: What is added to the host's environment.
        python: The interpreter for functions; None: the one that the agent finds.
        shell: The shell for commands; None: the user's own.
        keeper: What must live as long as something is carried out, for the connection to stay.
        prepare: What makes the Python environment that functions, commands and workers need, and returns the context
            in it; None if there is nothing to be made. See :meth:`prepared`.
        startup_files: When the shell reads its start-up files: ``once`` per connection, or ``always``.
        generation: Which agent of the host the working directory belongs to; 0: it depends on none.
    """

    host: str
    connection: Connection
    cwd: str
    env: Mapping[str, str] = field(default_factory=dict, repr=False)  # it may hold secrets
    python: str | None = None
    shell: str | None = None
    keeper: object = field(default=None, repr=False, compare=False)
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
