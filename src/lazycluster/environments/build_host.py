"""A host on which an environment is made: asking its agent, and running programs there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lazycluster.exceptions import AgentError, EnvironmentBuildError, NoAnswerError
from lazycluster.output.lines import Tail

from .index import hide
from .uv_errors import explained

if TYPE_CHECKING:
    from lazycluster.ssh.connection import Connection

__all__ = ["ANSWER_LIMIT", "RUN_LIMIT", "BuildHost"]

ANSWER_LIMIT = 60.0  # seconds for a question
RUN_LIMIT = 3600.0  # seconds for a program


@dataclass(frozen=True)
class BuildHost:
    """A host, and what holds there.

    Attributes:
        host: The host as the user named it.
        connection: The connection to it.
        env: The environment that the user's set-up left.
        python: The interpreter that the user named, if it is a path.
    """

    host: str
    connection: Connection
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    python: str | None = None

    async def ask(self, action: str, within: float = ANSWER_LIMIT, **params: Any) -> dict[str, Any]:
        """Ask the agent about environments."""
        return await self.connection.request("environment", within=within, action=action, **params)

    async def run(self, argv: Sequence[str], env: Mapping[str, str], what: str) -> str:
        """Run a program there, and return what it printed, of very much the end.

        Raises:
            EnvironmentBuildError: If it fails.
        """
        output = Tail()
        params = {"argv": list(argv), "cwd": "/", "env": {**self.env, **env}, "merge": True}
        channel = self.connection.channel("run", params, stdout=output.put)
        try:
            result = await self.connection.answered(channel, f"the end of {what}", RUN_LIMIT)
        except AgentError as error:
            raise EnvironmentBuildError(self.host, f"{what}: {error.message}") from None
        except NoAnswerError:
            said = hide(output.text())
            raise EnvironmentBuildError(self.host, f"{what} takes more than {RUN_LIMIT:g} s", output=said) from None
        said = hide(output.text())
        if result.get("exit") != 0:
            if result.get("signal"):
                said += f"\nended by signal {result['signal']}"
            raise explained(self.host, what, said)
        return said
