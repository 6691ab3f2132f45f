"""What an agent says of its host."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .agent_replies import NAME, check_shape

__all__ = ["AgentInfo"]


@dataclass(frozen=True)
class AgentInfo:
    """What the agent says about its host when it has started."""

    python: tuple[int, int, int]
    executable: str
    pid: int
    uid: int
    user: str
    home: str
    shell: str
    hostname: str
    directory: str
    identity: str
    platform: str
    boot_id: str
    booted: int
    machine_id: str
    network: str
    path: str

    @classmethod
    def parse(cls, message: dict[str, Any]) -> AgentInfo:
        """Make one from the agent's message.

        Raises:
            ValueError: If it makes no sense.
        """
        try:
            check_shape(message, _SHAPE)
            if len(message["python"]) != 3:
                raise ValueError("python has not three numbers")
        except ValueError as error:
            raise ValueError(f"the agent says of its host what makes no sense: {error}") from None
        values = {field.name: message[field.name] for field in fields(cls)}
        return cls(**{**values, "python": tuple(message["python"])})


_SHAPE: dict[str, Any] = {
    **{field.name: NAME for field in fields(AgentInfo)}, "python": [range(2**16)], "pid": range(1, 2**31),
    "uid": range(2**32), "booted": range(2**63),
}  # fmt: skip
