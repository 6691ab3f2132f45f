"""The description of a supervised process: what runs, and how one knows that it is ready."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["SCRATCH", "ServiceSpec", "Source", "pin_sources"]

SCRATCH = "$LAZYCLUSTER_SCRATCH"
"""Stands for the private directory of a process; the agent puts its path there."""


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


_read: dict[tuple[Path, str], dict[str, str]] = {}
_pinned = False


def pin_sources() -> None:
    """Read each program once in this process: what is started later is of the same version as what runs."""
    global _pinned
    _pinned = True


def _texts(root: Path, name: str) -> dict[str, str]:
    """Return the text of a module, or of all modules of a package, by file name."""
    found = _read.get((root, name)) if _pinned else None
    if found is None:
        found = _read[root, name] = _read_texts(root, name)
    return dict(found)


def _read_texts(root: Path, name: str) -> dict[str, str]:
    path = root.joinpath(*name.split(".")) if name else root
    paths = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return {file.relative_to(root).as_posix(): file.read_text("utf-8") for file in paths}


@dataclass(frozen=True)
class ServiceSpec:
    """A process that is supervised: what runs, what it needs, and how one knows that it is ready.

    Attributes:
        name: What it is called in messages.
        command: The program and its arguments. In these, in variables, files and `cwd`, `SCRATCH` stands for a private
            directory of the process, which is removed when it ends.
        source: Our own program instead, for the place's Python. It starts before its ports are known, says how it is,
            and is told its `settings` on standard input.
        settings: Returns what it is told, once its ports are chosen; called again when it starts on another agent.
        env: Environment variables, which those of the place override.
        secrets: Environment variables that nothing overrides, and no message shows.
        files: Texts by name, put into the private directory, where only this user can read them.
        cwd: The working directory; by default the host's.
        marker: The start of the lines by which our own programs talk to the manager.
        ready: A text in a line of output that says that it is ready.
        ready_port: The name of a port that answers when it is ready. With nothing of that, it is ready when it runs.
        ready_host: The address at which that port answers: ``at.bind`` if other hosts connect to it.
        port_taken: A text in its output that says that a port is in use: it gets other ones.
        restarts: How often it is started again, within minutes, when it dies after it was ready. With exit
            status 0 it has ended as it should, and is not started again, also if somebody else has sent it SIGTERM.
        stop_signal: The signal that asks it to end, e.g. ``INT``.
        patience: Seconds from the request to end until it is killed.
        at_restart: What it means to others when it is started again.
        gpus: How many GPUs of the host it gets for itself; the host says CUDA_VISIBLE_DEVICES.
        idle_gpus: Whether GPUs that others use are left alone.
    """

    name: str
    command: tuple[str, ...] = ()
    source: Source | None = None
    settings: Callable[[], Mapping[str, Any]] | None = field(default=None, repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    files: Mapping[str, str] = field(default_factory=dict, repr=False)
    cwd: str = ""
    marker: str = ""
    ready: str = ""
    ready_port: str = ""
    ready_host: str = "127.0.0.1"
    port_taken: str = ""
    restarts: int = 0
    stop_signal: str = "TERM"
    patience: float = 3.0
    at_restart: str = ""
    gpus: int = 0
    idle_gpus: bool = False

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:  # the values may be secrets
            raise ValueError(f"ServiceSpec {self.name!r}: {problem}")


def _problem(spec: ServiceSpec) -> str:
    """Return what makes no sense, "" if all does."""
    if isinstance(spec.command, str) or not all(isinstance(part, (str, int, float)) for part in spec.command):
        return 'command must be a tuple with the program and each argument by itself, e.g. ("sleep", "60")'
    for name in ("env", "secrets", "files"):
        texts = getattr(spec, name)
        if not isinstance(texts, Mapping) or not all(isinstance(text, str) for pair in texts.items() for text in pair):
            return f"{name} must have texts by name, and nothing else"
    for name in spec.files:
        if name in ("", ".", "..") or "/" in name:
            return f"files: {name!r} is not the plain name of a file"
    if f"SIG{spec.stop_signal}" not in signal.Signals.__members__:
        return f'stop_signal must be the name of a signal without SIG, e.g. "INT", not {spec.stop_signal!r}'
    for name, kinds in (("restarts", int), ("patience", (int, float))):
        value = getattr(spec, name)
        if not isinstance(value, kinds) or not value >= 0:
            return f"{name} must be a number of at least 0, not {value!r}"
    return ""
