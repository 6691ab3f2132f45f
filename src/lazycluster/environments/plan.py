"""The packages of an environment, resolved for one Python and one platform."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lazycluster.agent.environments import facts

__all__ = ["InstallPlan", "LockedPackage", "Target", "Wheel"]

_GLIBC = (17, 28, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40)  # the versions that uv knows
_PLATFORM = {
    "system": re.compile(r"[a-z][a-z0-9]{0,30}"),
    "machine": re.compile(r"[A-Za-z0-9][A-Za-z0-9_]{0,30}"),
    "libc": re.compile("glibc|musl"),
    "libc version": re.compile(r"(\d{1,9}\.\d{1,9}[0-9A-Za-z.+-]{0,30})?", re.ASCII),
}
_VERSION = re.compile(r"^(\d+)\.(\d+)")
_MANYLINUX = re.compile(r"^(many|musl)linux_(\d+)_(\d+)_(\w+)$")
_LEGACY = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}


@dataclass(frozen=True)
class Target:
    """The Python and the platform that packages are for.

    Attributes:
        python: The minor version.
        system: The operating system, as `sys.platform` names it.
        machine: The processor, as `uname` names it.
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
        """Return the target that a host's facts describe.

        Raises:
            ValueError: If they describe no platform: names of directories and arguments of uv are made of them.
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
        """The platform as uv names it."""
        if self.system == "darwin":
            return f"{'aarch64' if self.machine == 'arm64' else self.machine}-apple-darwin"
        if self.libc == "musl":
            return f"{self.machine}-unknown-linux-musl"
        known = max((number for number in _GLIBC if number <= self.glibc[1]), default=17)
        return f"{self.machine}-manylinux_2_{known}"

    @property
    def glibc(self) -> tuple[int, int]:
        """The version of glibc; an old one where the host does not say which it has."""
        match = _VERSION.match(self.libc_version)
        return (int(match[1]), int(match[2])) if match else (2, 17)

    def accepts(self, filename: str) -> bool:
        """Tell by its name whether a wheel can be installed."""
        parts = [part.split(".") for part in filename.removesuffix(".whl").split("-")[-3:]]
        return len(parts) == 3 and any(self.mismatch(*tag) is None for tag in itertools.product(*parts))

    def mismatch(self, python: str, abi: str, platform: str) -> str | None:
        """Return why a wheel with a tag cannot be installed; None if it can (PEP 425)."""
        match = re.match(r"^(cp|py)3(\d*)$", python)
        minor = int(match[2]) if match and match[2] else 0
        compatible = match is not None and (match[1] == "py" or abi == "abi3") and minor <= self.python[1]
        if python != f"cp{self.python[0]}{self.python[1]}" and not compatible:
            return f"it is for {python}, and the host's Python is {self.version}"
        if platform == "any" or self._runs(platform):
            return None
        if platform == f"linux_{self.machine}" and self.system == "linux":
            here = facts()["libc"][0]
            return None if self.libc == here else f"it is compiled for {here}, and the host has {self.libc}"
        return f"it is compiled for {platform}, and the host is {self.platform}"

    def _runs(self, platform: str) -> bool:
        """Tell whether a platform tag names a range of systems that this is among (PEP 600, PEP 656)."""
        if self.system == "darwin":
            return platform.startswith("macosx_") and platform.endswith((f"_{self.machine}", "_universal2"))
        legacy, _, machine = platform.partition("_")
        if legacy in _LEGACY:
            return self.libc == "glibc" and machine == self.machine and _LEGACY[legacy] <= self.glibc
        found = _MANYLINUX.match(platform)
        if found is None or found[4] != self.machine:
            return False
        if found[1] == "musl":
            return self.libc == "musl"
        return self.libc == "glibc" and (int(found[2]), int(found[3])) <= self.glibc

    def __str__(self) -> str:
        return f"Python {self.version} on {self.platform}"


@dataclass(frozen=True)
class LockedPackage:
    """A package in one version, and its source.

    Attributes:
        name: Its name.
        version: Its version; empty if it is known only after building.
        url: The address of its wheel or source archive.
        sha256: Its hash; empty if the index has none.
        directory: The directory on the manager that it is built from.
        vcs: The repository that it is built from, as ``git+url@commit``.
        installed: The directory with its metadata, if its wheel is made from what is installed on the manager.
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
        """True if nothing has to be built."""
        return self.filename.endswith(".whl")

    @property
    def is_local(self) -> bool:
        """True if only the manager has it."""
        return not self.is_wheel or urlsplit(self.url).scheme not in ("http", "https")

    @property
    def label(self) -> str:
        """Its name and version, for messages."""
        return f"{self.name} {self.version}".strip()

    def to_json(self) -> dict[str, str]:
        """Return the attributes that are set."""
        return {key: value for key, value in asdict(self).items() if value}


@dataclass(frozen=True)
class Wheel:
    """A package as a file on the manager that can be installed.

    Attributes:
        name: Its name.
        version: Its version.
        path: The file.
        sha256: The hash of the file.
    """

    name: str
    version: str
    path: Path
    sha256: str

    @property
    def folder(self) -> str:
        """The name of its directory on a host."""
        return self.sha256[:24]


@dataclass(frozen=True)
class InstallPlan:
    """The packages to install, and for which target.

    Attributes:
        target: The Python and platform.
        packages: The packages.
        digests: A digest of the content of each.
    """

    target: Target
    packages: tuple[LockedPackage, ...]
    digests: tuple[str, ...]

    @property
    def id(self) -> str:
        """The name of the environment: the same for the same packages and target, wherever it is built."""
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

    def pylock(self, wheels: Mapping[str, Wheel], directory: str) -> str:
        """Return the packages as a lock file (PEP 751).

        Args:
            wheels: Those that were sent to the host, by the names of packages; others are named by their addresses.
            directory: The directory of what was sent.
        """
        lines = ['lock-version = "1.0"', 'created-by = "lazycluster"', f'requires-python = ">={self.target.version}"']
        for locked in self.packages:
            wheel = wheels.get(locked.name)
            if wheel is not None:
                where = f"path = {_toml_string(f'{directory}/{wheel.folder}/{wheel.path.name}')}"
                version, sha256 = wheel.version, wheel.sha256
            else:
                where, version, sha256 = f"url = {_toml_string(locked.url)}", locked.version, locked.sha256
            hashes = f"hashes = {{ sha256 = {_toml_string(sha256)} }}" if sha256 else "hashes = {}"
            lines += ["", "[[packages]]", f"name = {_toml_string(locked.name)}", f"version = {_toml_string(version)}"]
            lines.append(f"wheels = [{{ {where}, {hashes} }}]")
        return "\n".join(lines) + "\n"


def _toml_string(text: str) -> str:
    """Return a text as a basic string of TOML."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
