"""The user's specification of an environment, checked when it is made."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lazycluster.utils import absolute, expanded

__all__ = ["ROOT", "EnvironmentSpec", "check_cache_dir", "file_kind", "hide", "normalized"]

ROOT = "~/.cache/lazycluster"
"""The default directory of environments on a host."""

Kind = Literal["manager", "requirements", "file", "path"]
Network = Literal["auto", "host", "manager"]

_LOCKS = re.compile(r"^pylock(\.[^.]+)?\.toml$")
_PYTHON = re.compile(r"^3\.\d{1,2}$")
_USERINFO = re.compile(r"(?<=://)[^/\s]*@")


def normalized(name: str) -> str:
    """Return the normalized name of a package (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def hide(text: str) -> str:
    """Return a text without the credentials in its URLs."""
    return _USERINFO.sub("***@", text)


def check_cache_dir(path: object) -> None:
    """Check the name of a directory of environments on hosts.

    Raises:
        ValueError: If it is none; "" does not stand for the default.
    """
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise ValueError(f"cache_dir must be a directory on the hosts, not {path!r}")


@dataclass(frozen=True)
class EnvironmentSpec:
    """The environment in which functions, commands and workers run on the hosts.

    Wherever one is taken, so is what stands for `source` alone.

    Args:
        source: One of
            ``"manager"``: what is installed for the interpreter that runs this, in the same versions;
            a list of requirements, e.g. ``["numpy==2.3", "scikit-learn", "./my-package"]``;
            a file of this machine: ``requirements.txt``, ``pyproject.toml``, ``uv.lock`` or ``pylock.toml``, in any
            directory;
            a path on the hosts: a virtual or conda environment, or an interpreter; nothing is made then.
        exclude: Packages that are left out. With ``"manager"``, also those that only they need, and tools such as
            Jupyter, linters and test runners are left out in any case, which is logged; ``[]`` leaves out nothing.
        extras: Extras of a ``pyproject.toml`` or ``uv.lock``.
        groups: Dependency groups of a ``pyproject.toml`` or ``uv.lock``.
        python: The minor version, e.g. ``"3.12"``; by default the manager's, which functions need.
        cache_dir: Where environments are kept on the hosts. Nobody else may own it or write to it; see
            ``Environment.trust_group`` for groups.
        network: Where hosts get packages from: ``"host"``: from the index by themselves; ``"manager"``: the manager
            sends them; ``"auto"``: by themselves where they can reach it, else from the manager.
        size_limit: Bytes that environments and packages may take on a host; when a new one has been made, those used
            longest ago go, never one in use. None: no limit.

    Raises:
        TypeError, ValueError: If something makes no sense.

    Examples:
        >>> EnvironmentSpec("manager", exclude=["torch"]).kind
        'manager'
        >>> EnvironmentSpec(["numpy==2.3"]).kind
        'requirements'
    """

    source: str | os.PathLike[str] | Sequence[str]
    exclude: Sequence[str] | None = None
    extras: Sequence[str] = ()
    groups: Sequence[str] = ()
    python: str | None = None
    cache_dir: str = ROOT
    network: Network = "auto"
    size_limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("exclude", "extras", "groups"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _texts(name, value))
        source: Any = self.source
        if isinstance(source, os.PathLike):
            source = os.fspath(source)
        if not isinstance(source, str):
            source = _texts("environment", source)
            if not source:
                raise ValueError('environment is an empty list: name packages, or use environment="manager"')
        elif not source.strip():
            raise ValueError("environment is empty")
        object.__setattr__(self, "source", source)
        self._check_options()
        if self.kind == "file":
            self._check_file()

    def _check_options(self) -> None:
        if self.python is not None and not (isinstance(self.python, str) and _PYTHON.match(self.python)):
            raise ValueError(f'python of an environment must be a minor version such as "3.12", not {self.python!r}')
        if self.network not in ("auto", "host", "manager"):
            raise ValueError(f'network must be "auto", "host" or "manager", not {self.network!r}')
        check_cache_dir(self.cache_dir)
        limit = self.size_limit
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise ValueError(f"size_limit must be a number of bytes, not {limit!r}")
        if (self.extras or self.groups) and self.file_kind not in ("pyproject.toml", "uv.lock"):
            raise ValueError("extras and groups are for a pyproject.toml or uv.lock; else name them as package[extra]")
        if self.exclude and self.kind == "path":
            raise ValueError("nothing can be excluded from an environment that is on the hosts already")

    def _check_file(self) -> None:
        if not self.file.is_file():
            raise ValueError(f"environment: no such file on this machine: {self.file}")

    @classmethod
    def of(cls, given: Any) -> EnvironmentSpec | None:
        """Return a user's value as a specification; None for None.

        Raises:
            TypeError, ValueError: If it makes no sense.
        """
        if given is None or isinstance(given, EnvironmentSpec):
            return given
        if not isinstance(given, (str, os.PathLike, list, tuple)):
            raise TypeError(
                f"environment must be a string, a path, a list of requirements or an EnvironmentSpec, not "
                f"{type(given).__name__}"
            )
        return cls(given)

    def document(self) -> dict[str, Any]:
        """Return it as JSON can hold it: the arguments, with absolute paths."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        if self.kind == "file":
            found["source"] = str(self.file)
        elif self.kind == "requirements":
            found["source"] = [
                str(absolute(item)) if item.startswith(("./", "../")) else item for item in self.requirements
            ]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    @property
    def kind(self) -> Kind:
        """The kind of source."""
        if not isinstance(self.source, str):
            return "requirements"
        if self.source == "manager":
            return "manager"
        if self.file_kind:
            return "file"
        if "/" in self.source or self.source.startswith("~"):
            return "path"
        raise ValueError(
            f'environment={self.source!r} is neither "manager", nor the name of a requirements file, pyproject.toml, '
            f"uv.lock or pylock.toml, nor a path on the hosts; a single package is a list, too: [{self.source!r}]"
        )

    @property
    def file_kind(self) -> str:
        """The kind of file that the source names; empty if it is none."""
        return file_kind(self.source) if isinstance(self.source, str) else ""

    @property
    def file(self) -> Path:
        """The file, if the source is one."""
        assert isinstance(self.source, str)
        return absolute(expanded(self.source))

    @property
    def requirements(self) -> tuple[str, ...]:
        """The requirements, if the source is a list of them."""
        return () if isinstance(self.source, str) else tuple(str(item) for item in self.source)  # type: ignore[union-attr]

    def __repr__(self) -> str:
        options = [one for one in fields(self) if one.name != "source" and getattr(self, one.name) != one.default]
        shown = [f"{one.name}={getattr(self, one.name)!r}" for one in options]
        source = repr(self.source if isinstance(self.source, str) else list(self.requirements))
        return f"EnvironmentSpec({', '.join([hide(source), *shown])})"

    def __str__(self) -> str:
        if isinstance(self.source, str):
            return self.source
        shown = hide(", ".join(self.requirements[:4]))  # an address may have a password in it
        return f"[{shown}, ...]" if len(self.requirements) > 4 else f"[{shown}]"


def file_kind(source: str) -> str:
    """Return the kind of file that a source names, as that which it is called by most; empty if it is none."""
    name = os.path.basename(source)
    if name in ("pyproject.toml", "uv.lock"):
        return name
    if _LOCKS.match(name):
        return "pylock.toml"
    return "requirements.txt" if name.endswith((".txt", ".in")) else ""


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(f"{name} must be a list of strings, not {type(value).__name__}")
    for item in value:
        if not isinstance(item, (str, os.PathLike)):
            raise TypeError(f"{name}: {item!r} is not a string")
        text = os.fspath(item)
        if not isinstance(text, str) or not text.strip() or "\n" in text or "\0" in text:
            raise ValueError(f"{name}: {item!r} cannot be used")
    return tuple(os.fspath(item) for item in value)
