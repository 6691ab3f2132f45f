"""What a supervised process runs, and how one knows that it is ready."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Program", "Source"]


@dataclass(frozen=True)
class Source:
    """A program that is sent as text: modules of one directory, which import nothing but each other.

    Attributes:
        directory: The directory with the modules.
        module: The module whose function ``main`` is called.
        package: The name of the package that they form where they run.
        shared: Modules from elsewhere that become part of the package.
    """

    directory: Path
    module: str
    package: str
    shared: tuple[Path, ...] = ()

    def message(self) -> dict[str, Any]:
        """Return it as the agent wants it."""
        files = {path.name: path.read_text("utf-8") for path in [*sorted(self.directory.glob("*.py")), *self.shared]}
        return {"package": self.package, "module": self.module, "files": files}


@dataclass(frozen=True)
class Program:
    """What is to run, and how one knows that it is ready.

    Attributes:
        name: What it is called in messages.
        argv: The program and its arguments; or
        source: our own program, for the place's Python.
        env: Environment variables, which those of the place override.
        marker: The start of the lines by which our own programs talk to the manager.
        ready: A text in a line of output that says that it is ready. With neither, it is ready when it runs.
        restarts: How often it is started again, within minutes, when it dies after it was ready.
        patience: Seconds from the request to end until it is killed.
        at_restart: What it means to others when it is started again.
        gpus: How many GPUs of the host it gets for itself; the host says CUDA_VISIBLE_DEVICES.
        idle_gpus: Whether GPUs that others use are left alone.
    """

    name: str
    argv: tuple[str, ...] = ()
    source: Source | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    marker: str = ""
    ready: str = ""
    restarts: int = 0
    patience: float = 3.0
    at_restart: str = ""
    gpus: int = 0
    idle_gpus: bool = False
