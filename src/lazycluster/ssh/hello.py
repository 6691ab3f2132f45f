"""What an agent says of its host."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Hello"]


@dataclass(frozen=True)
class Hello:
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
    def parse(cls, message: dict[str, Any]) -> Hello:
        """Make one from the agent's message.

        Raises:
            ValueError: If it makes no sense.
        """
        kinds = {"python": list, "pid": int, "uid": int, "booted": int}
        values: dict[str, Any] = {field.name: message.get(field.name) for field in fields(cls)}
        wrong = [name for name, value in values.items() if not isinstance(value, kinds.get(name, str))]
        python = [part for part in message.get("python") or () if isinstance(part, int)]
        if wrong or len(python) != 3:
            raise ValueError(f"the agent says of its host what makes no sense: {', '.join(wrong or ['python'])}")
        return cls(**{**values, "python": tuple(python)})
