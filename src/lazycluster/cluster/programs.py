"""What a supervised process runs, and how one knows that it is ready."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Program", "Source"]


@dataclass(frozen=True)
class Source:
    """A program that is sent as text: modules that keep their places, below a root package of another name.

    So they import each other by relative imports, here and there, while the names of the real package stay free for
    what may be installed where they run.

    Attributes:
        directory: The directory of the root package.
        module: The module whose function ``main`` is called, by its name below the root. All modules of its package are
            sent with it.
        package: The name of the root package where they run.
        shared: Further modules, or packages with all their modules, by their names below the root.
    """

    directory: Path
    module: str
    package: str
    shared: tuple[str, ...] = ()

    @classmethod
    def of(cls, module: str, package: str, shared: tuple[str, ...] = ()) -> Source:
        """Return a program by the full name of its module."""
        root, _, below = module.partition(".")
        return cls(_directory_of(root), below, package, shared)

    def message(self) -> dict[str, Any]:
        """Return it as the agent wants it."""
        package, _, _ = self.module.rpartition(".")
        files = {name: text for part in (package, *self.shared) for name, text in _texts(self.directory, part).items()}
        for name in list(files):
            while name := name.rpartition("/")[0]:
                files.setdefault(f"{name}/__init__.py", "")  # not the real one, which may import what is not sent
        files.setdefault("__init__.py", "")
        return {"package": self.package, "module": self.module, "files": files}


def _directory_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _texts(root: Path, name: str) -> dict[str, str]:
    """Return the text of a module, or of all modules of a package, by file name."""
    path = root.joinpath(*name.split(".")) if name else root
    paths = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return {file.relative_to(root).as_posix(): file.read_text("utf-8") for file in paths}


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
