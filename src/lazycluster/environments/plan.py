"""What an environment consists of: the packages that were resolved for one Python and one platform."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["InstallPlan", "LockedPackage", "Target", "Wheel"]

_GLIBC = (17, 28, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40)  # the versions that uv knows
_PLATFORM = {
    "system": re.compile(r"[a-z][a-z0-9]{0,30}"),
    "machine": re.compile(r"[A-Za-z0-9][A-Za-z0-9_]{0,30}"),
    "libc": re.compile("glibc|musl"),
    "libc version": re.compile(r"(\d{1,9}\.\d{1,9}[0-9A-Za-z.+-]{0,30})?", re.ASCII),
}
_VERSION = re.compile(r"^\d+\.(\d+)")


@dataclass(frozen=True)
class Target:
    """What packages have to fit.

    Attributes:
        python: The minor version.
        system: As `sys.platform` has it.
        machine: The processor, as `uname` calls it.
        libc: ``glibc`` or ``musl``.
        libc_version: Its version.
    """

    python: tuple[int, int]
    system: str
    machine: str
    libc: str
    libc_version: str = ""

    @classmethod
    def of(cls, python: tuple[int, int], facts: Mapping[str, Any]) -> Target:
        """Return what a host's facts say.

        Raises:
            ValueError: It is no platform; the names of directories on the manager and arguments of uv are made of it.
        """
        system, machine = str(facts["system"]), str(facts["machine"])
        libc, version = [*map(str, facts["libc"]), "", ""][:2]
        said = {"system": system, "machine": machine}
        if system == "linux":
            said.update({"libc": libc, "libc version": version})
        for what, value in said.items():
            if not _PLATFORM[what].fullmatch(value):
                raise ValueError(f"its {what} is {value!r:.80}")
        if system != "linux":
            return cls(python, system, machine, "", "")
        return cls(python, "linux", {"arm64": "aarch64"}.get(machine, machine), libc, version)

    @property
    def version(self) -> str:
        """The Python version as text."""
        return f"{self.python[0]}.{self.python[1]}"

    @property
    def platform(self) -> str:
        """The platform as uv calls it."""
        if self.system == "darwin":
            return f"{'aarch64' if self.machine == 'arm64' else self.machine}-apple-darwin"
        if self.libc == "musl":
            return f"{self.machine}-unknown-linux-musl"
        match = _VERSION.match(self.libc_version)
        minor = int(match[1]) if match else 17
        known = max((number for number in _GLIBC if number <= minor), default=17)
        return f"{self.machine}-manylinux_2_{known}"

    def accepts(self, filename: str) -> bool:
        """Whether a wheel that was built on the manager can be used, as its name tells."""
        tags = filename[: -len(".whl")].split("-")[-3:]
        if len(tags) < 3 or tags[2] == "any":
            return len(tags) == 3
        pythons = tags[0].split(".")
        fits = f"cp{self.python[0]}{self.python[1]}" in pythons or "py3" in pythons or "abi3" in tags[1].split(".")
        return fits and self.system in ("linux", "darwin") and any(
            part.endswith(self.machine) for part in tags[2].split(".")
        )  # fmt: skip

    def __str__(self) -> str:
        return f"Python {self.version} on {self.platform}"


@dataclass(frozen=True)
class LockedPackage:
    """A package in one version, and where it is.

    Attributes:
        name: Its name.
        version: Its version; empty if only building it tells.
        url: Where its wheel or source archive is.
        sha256: The hash of that; empty if the index does not say.
        directory: The directory on the manager that it is built from.
        vcs: The repository that it is built from, as ``git+url@commit``.
        installed: The directory with its metadata, if it is made from what is installed on the manager.
    """

    name: str
    version: str = ""
    url: str = ""
    sha256: str = ""
    directory: str = ""
    vcs: str = ""
    installed: str = ""

    @property
    def filename(self) -> str:
        """The name of the file."""
        return unquote(urlsplit(self.url).path).rpartition("/")[2]

    @property
    def is_wheel(self) -> bool:
        """Whether nothing has to be built."""
        return self.filename.endswith(".whl")

    @property
    def is_local(self) -> bool:
        """Whether only the manager has it."""
        return not self.is_wheel or urlsplit(self.url).scheme not in ("http", "https")

    @property
    def label(self) -> str:
        """How it is called in messages."""
        return f"{self.name} {self.version}".strip()

    def to_json(self) -> dict[str, str]:
        """Return it as JSON can hold it."""
        return {key: value for key, value in asdict(self).items() if value}


@dataclass(frozen=True)
class Wheel:
    """A package as a file on the manager that can be installed.

    Attributes:
        name: Its name.
        version: Its version.
        path: Where it is.
        sha256: The hash of the file.
    """

    name: str
    version: str
    path: Path
    sha256: str

    @property
    def folder(self) -> str:
        """The directory that it has on a host."""
        return self.sha256[:24]


@dataclass(frozen=True)
class InstallPlan:
    """An environment as it is to be.

    Attributes:
        target: What it is for.
        packages: Its packages.
        digests: For each what tells its content from others.
        source: What the user asked for, in short.
    """

    target: Target
    packages: tuple[LockedPackage, ...]
    digests: tuple[str, ...]
    source: str = field(default="", compare=False)

    @property
    def id(self) -> str:
        """A name that no other environment has; the same wherever and whenever it is made."""
        target = self.target
        content = [
            [*target.python, target.system, target.machine, target.libc],
            sorted(
                [locked.name, locked.version, digest]
                for locked, digest in zip(self.packages, self.digests, strict=True)
            ),
        ]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return f"py{target.python[0]}{target.python[1]}-{digest[:20]}"
