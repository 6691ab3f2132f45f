"""Wheels made from the files of installed distributions, for when no index can be reached."""

from __future__ import annotations

import base64
import configparser
import csv
import hashlib
import io
import json
import mmap
import os
import re
import stat
import struct
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lazycluster.exceptions import EnvironmentBuildError

from .plan import LockedPackage, Target
from .spec import normalized
from .uv import MANAGER

__all__ = ["ElfRequirements", "RepackError", "elf_requirements", "installed_digest", "make_wheel", "read_installed"]

_DIRECTORY = re.compile(r"^(?P<name>[^-]+)-(?P<version>[^-]+)\.dist-info$")
# Files that installers write.
_OF_INSTALLER = {"INSTALLER", "REQUESTED", "RECORD", "RECORD.jws", "RECORD.p7s"}
_OF_INSTALLER |= {"direct_url.json", "uv_cache.json", "uv_build.json", "provenance_url.json"}
# Installers that link compiled code against libraries of their own, or leave out the hashes.
_SYSTEMS = ("conda", "mamba", "debian", "apt", "dpkg", "rpm", "dnf", "yum", "zypper", "pacman", "apk", "nix", "guix")
# Libraries of every Linux with glibc (PEP 599, without those for graphics).
_BASE = re.compile(
    r"^(ld-linux.*|libc|libm|libdl|librt|libpthread|libutil|libnsl|libresolv|libgcc_s|libstdc\+\+)\.so(\.\d+)*$"
)
_HASHES = ("sha256", "sha384", "sha512")
_DATE = (1980, 1, 1, 0, 0, 0)
_CHUNK = 1024 * 1024
_LAUNCHER = re.compile(rb"\A#!/bin/sh\n'''exec' [^\n]*\n' '''\n|\A#![^\n]*python[^\n]*\n")


class RepackError(Exception):
    """The files of a distribution cannot be made into a wheel for a host; the text has the reason."""


@dataclass(frozen=True)
class _WheelEntry:
    """A file of a distribution.

    Attributes:
        name: Its name in the wheel.
        path: The installed file.
        hashed: Its hash from RECORD, such as ``sha256=...``.
        is_script: True for a script, whose first line names the interpreter of this machine.
    """

    name: str
    path: str
    hashed: str
    is_script: bool = False


@dataclass(frozen=True)
class InstalledWheel:
    """An installed distribution as a wheel.

    Attributes:
        filename: The name of the wheel.
        info: The name of its directory with metadata.
        entries: Its files.
    """

    filename: str
    info: str
    entries: tuple[_WheelEntry, ...]


# --- installed files ------------------------------------------------------------------------------
def read_installed(info: Path, target: Target) -> InstalledWheel:
    """Return an installed distribution as a wheel.

    Args:
        info: Its directory with metadata.
        target: The Python and the platform.

    Raises:
        UnfitError: If no wheel for the target can be made from it.
    """
    match = _DIRECTORY.match(info.name)
    if match is None:
        raise RepackError("it is installed in an old way, without a list of its files")
    _check_installer(info)
    tags = _tags(_read(info / "WHEEL", "it has no file WHEEL, so what it fits is unknown"))
    entries = tuple(sorted(_entries(info, match["name"], match["version"]), key=lambda entry: entry.name))
    _check_fit(tags, entries, target)
    pythons, abis, platforms = (".".join(dict.fromkeys(part)) for part in zip(*tags, strict=True))
    return InstalledWheel(f"{match['name']}-{match['version']}-{pythons}-{abis}-{platforms}.whl", info.name, entries)


def installed_digest(wheel: InstalledWheel) -> str:
    """Return a digest of the content of a distribution, the same wherever it is installed."""
    content = []
    for entry in wheel.entries:
        restored = _restored(entry)
        hashed = entry.hashed if restored is None else f"restored={hashlib.sha256(restored).hexdigest()}"
        content.append([entry.name, hashed])
    return "installed-" + hashlib.sha256(json.dumps([wheel.filename, content]).encode()).hexdigest()


def _read(path: Path, problem: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise RepackError(problem) from None


def _check_installer(info: Path) -> None:
    try:
        installer = (info / "INSTALLER").read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        installer = []
    name = installer[0].lower() if installer else ""
    if name in _SYSTEMS:
        raise RepackError(f"{name} has installed it, which may link it against libraries that no host has")
    if info.parent.name == "dist-packages" and not name:
        raise RepackError("the system's package manager has installed it, which may link it against its own libraries")


def _tags(text: str) -> list[tuple[str, str, str]]:
    found = []
    for line in text.splitlines():
        key, _, value = line.partition(":")
        parts = value.strip().split("-")
        if key == "Tag" and len(parts) == 3:
            found.append((parts[0], parts[1], parts[2]))
    if not found:
        raise RepackError("its file WHEEL does not say what it fits")
    return found


def _entries(info: Path, name: str, version: str) -> Iterator[_WheelEntry]:
    site = info.parent
    scripts = _entry_points(info)
    text = _read(info / "RECORD", "it has no RECORD, the list of its files")
    for row in csv.reader(io.StringIO(text)):
        if not row or "__pycache__/" in row[0]:
            continue
        path = os.path.normpath(os.path.join(site, row[0]))
        inner, is_script = _name_in_wheel(path, site, f"{name}-{version}.data", row[0])
        folder, _, last = path.rpartition("/")
        if is_script and last in scripts:
            continue  # installers make it from the entry point
        if last in _OF_INSTALLER and folder == str(info):
            continue
        if len(row) < 2 or row[1].partition("=")[0] not in _HASHES:
            raise RepackError(f"its RECORD has no hash of {row[0]}")
        yield _WheelEntry(inner, path, row[1], is_script)


def _name_in_wheel(path: str, site: Path, data: str, recorded: str) -> tuple[str, bool]:
    """Return the name of a file in the wheel, and whether it is a script."""
    if path.startswith(f"{site}/"):
        inner, in_data = path[len(str(site)) + 1 :], ""
    else:
        prefix = next((folder.parent for folder in site.parents if folder.name in ("lib", "lib64")), None)
        if prefix is None or not path.startswith(f"{prefix}/") or recorded.startswith("/"):
            raise RepackError(f"it has files in other places: {recorded}")
        inner, in_data = path[len(str(prefix)) + 1 :], f"{data}/data/"
    if inner.startswith("bin/") and inner.count("/") == 1:  # below the site with `pip install --target`
        return f"{data}/scripts/{inner[4:]}", True
    return in_data + inner, False


def _entry_points(info: Path) -> set[str]:
    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    try:
        parser.read(info / "entry_points.txt", encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        raise RepackError("its file entry_points.txt cannot be read") from None
    groups = ("console_scripts", "gui_scripts")
    return {name for group in groups if parser.has_section(group) for name in parser.options(group)}


# --- compatibility --------------------------------------------------------------------------------
def _check_fit(tags: list[tuple[str, str, str]], entries: tuple[_WheelEntry, ...], target: Target) -> None:
    """Check that one of the tags fits, and compiled code itself where no tag vouches for it."""
    reasons = [target.mismatch(*tag) for tag in tags]
    if all(reasons):
        raise RepackError(reasons[0])
    platforms = [platform for (_, _, platform), reason in zip(tags, reasons, strict=True) if reason is None]
    if "any" not in platforms and (target.system != "linux" or sys.platform != "linux"):
        raise RepackError(f"it is compiled for {platforms[0]}, and the host is {target.platform}")
    if not any(platform.startswith(("manylinux", "musllinux")) for _, _, platform in tags):
        for entry in entries:
            if entry.is_script or ".so" in entry.path.rpartition("/")[2]:
                _check_compiled(entry, entries, target)


def _check_compiled(entry: _WheelEntry, entries: tuple[_WheelEntry, ...], target: Target) -> None:
    try:
        needs = elf_requirements(Path(entry.path))
    except (OSError, ValueError) as error:
        raise RepackError(f"{entry.name} cannot be read: {error}") from None
    if needs is None:
        return
    if target.system != "linux" or target.machine != os.uname().machine:
        raise RepackError(f"{entry.name} is compiled for this machine, and the host is {target.platform}")
    own = {other.path.rpartition("/")[2] for other in entries}
    foreign = sorted(name for name in needs.libraries - own if not _BASE.match(name))
    if foreign:
        raise RepackError(f"{entry.name} is linked against {', '.join(foreign)}, which is not part of it")
    if target.libc == "glibc" and needs.glibc > target.glibc:
        wanted = ".".join(map(str, needs.glibc))
        raise RepackError(f"{entry.name} needs glibc {wanted}, and the host has {target.libc_version}")


# --- writing --------------------------------------------------------------------------------------
def make_wheel(locked: LockedPackage, target: Target, folder: Path) -> Path:
    """Make a wheel of installed files, whose hashes are checked; for a thread. The same files give the same wheel.

    Raises:
        EnvironmentBuildError: If a file was changed after the installation.
    """
    try:
        wheel = read_installed(Path(locked.installed), target)
        path = folder / wheel.filename
        record = []
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry in wheel.entries:
                record.append(_add(archive, entry))
            lines = [",".join(_quoted(value) for value in row) for row in record]
            lines.append(f"{wheel.info}/RECORD,,")
            archive.writestr(_zip_info(f"{wheel.info}/RECORD", 0o644), "\n".join(lines) + "\n")
    except RepackError as error:
        raise EnvironmentBuildError(
            MANAGER,
            f"no wheel of {locked.label} can be made from what is installed: {error}",
            locked.name,
            f"reinstall {locked.name}, or leave it out: EnvironmentSpec(..., exclude=[{normalized(locked.name)!r}])",
        ) from error
    return path


def _add(archive: zipfile.ZipFile, entry: _WheelEntry) -> tuple[str, str, str]:
    """Add a file; returns its line of RECORD."""
    restored = _restored(entry)
    kind, _, recorded = entry.hashed.partition("=")
    check, written, size = hashlib.new(kind), hashlib.sha256(), 0
    try:
        path = Path(entry.path)
        status = path.stat()
        is_executable = bool(status.st_mode & stat.S_IXUSR)
        info = _zip_info(entry.name, 0o755 if is_executable else 0o644)
        with path.open("rb") as file, archive.open(info, "w", force_zip64=status.st_size >= 1 << 31) as target:
            while data := file.read(_CHUNK):
                check.update(data)
                if restored is None:
                    written.update(data)
                    size += target.write(data)
            if restored is not None:
                written.update(restored)
                size = target.write(restored)
    except OSError as error:
        raise RepackError(f"its file {entry.path} cannot be read: {error.strerror}") from None
    if _encoded(check.digest()) != recorded.rstrip("="):
        raise RepackError(f"its file {entry.path} was changed after the installation: its hash is not that of RECORD")
    return entry.name, f"sha256={_encoded(written.digest())}", str(size)


def _restored(entry: _WheelEntry) -> bytes | None:
    """Return a script as it was in its wheel, without an interpreter; None if it is none."""
    if not entry.is_script:
        return None
    try:
        with Path(entry.path).open("rb") as file:
            if file.read(2) != b"#!":
                return None
            file.seek(0)
            content = file.read()
    except OSError:
        return None  # _add reports it
    return _LAUNCHER.sub(b"#!python\n", content, count=1) if _LAUNCHER.match(content) else None


def _zip_info(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _DATE)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = (stat.S_IFREG | mode) << 16
    info.create_system = 3  # Unix
    return info


def _encoded(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


def _quoted(value: str) -> str:
    return '"' + value.replace('"', '""') + '"' if set(value) & set(',"\n') else value


# --- ELF files ------------------------------------------------------------------------------------
_GLIBC = re.compile(rb"^GLIBC_(\d+)\.(\d+)")
_LOAD, _DYNAMIC = 1, 2  # kinds of segments
_NEEDED, _STRTAB, _VERNEED, _VERNEEDNUM = 1, 5, 0x6FFFFFFE, 0x6FFFFFFF  # kinds of entries of the dynamic section
_MOST = 10_000  # entries of a table


class ElfRequirements(NamedTuple):
    """The requirements of compiled code.

    Attributes:
        libraries: The names of its shared libraries.
        glibc: The oldest version of glibc that has all symbols it uses; (0, 0) if it uses none.
    """

    libraries: frozenset[str]
    glibc: tuple[int, int]


def elf_requirements(path: Path) -> ElfRequirements | None:
    """Return the requirements of compiled code; None if the file is no ELF file.

    Raises:
        ValueError: If it is one, but damaged.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _ElfFile(data).requirements()
            except (struct.error, IndexError, StopIteration) as error:
                raise ValueError(f"{path} is damaged") from error


class _ElfFile:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._is_64 = data[4] == 2
        self._order = "<" if data[5] == 1 else ">"
        self._segments = list(self._read_segments())

    def _unpack(self, layout: str, offset: int) -> tuple[int, ...]:
        return struct.unpack_from(self._order + layout, self._data, offset)

    def _read_segments(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield kind, offset, address and size of each segment."""
        start = self._unpack("Q", 32)[0] if self._is_64 else self._unpack("I", 28)[0]
        size, count = self._unpack("HH", 54 if self._is_64 else 42)
        for number in range(count):
            values = self._unpack("IIQQQQ" if self._is_64 else "IIIIII", start + number * size)
            kind, offset, address = (values[0], *values[2:4]) if self._is_64 else values[:3]
            yield kind, offset, address, values[5] if self._is_64 else values[4]

    def _offset(self, address: int) -> int:
        return next(
            offset + address - begin
            for kind, offset, begin, size in self._segments
            if kind == _LOAD and begin <= address < begin + size
        )

    def _text(self, offset: int) -> bytes:
        end = self._data.find(b"\0", offset)
        return self._data[offset:end]

    def _entries(self) -> Iterator[tuple[int, int]]:
        size = 16 if self._is_64 else 8
        for kind, start, _, length in self._segments:
            if kind == _DYNAMIC:
                for offset in range(start, start + length - size + 1, size):
                    tag, value = self._unpack("QQ" if self._is_64 else "II", offset)
                    yield tag, value

    def requirements(self) -> ElfRequirements:
        """Return its requirements."""
        entries = list(self._entries())
        single = dict(entries)
        if _STRTAB not in single:
            return ElfRequirements(frozenset(), (0, 0))  # linked statically
        names = self._offset(single[_STRTAB])
        libraries = {self._text(names + value).decode("utf-8", "replace") for tag, value in entries if tag == _NEEDED}
        versions = []
        if _VERNEED in single:
            offset = self._offset(single[_VERNEED])
            versions = [self._text(names + name) for name in self._versions(offset, single.get(_VERNEEDNUM, 0))]
        found = [match for match in map(_GLIBC.match, versions) if match]
        return ElfRequirements(frozenset(libraries), max(((int(one[1]), int(one[2])) for one in found), default=(0, 0)))

    def _versions(self, offset: int, count: int) -> Iterator[int]:
        """Yield the offsets of the names of required symbol versions."""
        for _ in range(min(count, _MOST)):
            _, parts, _, first, following = self._unpack("HHIII", offset)
            inner = offset + first
            for _ in range(min(parts, _MOST)):
                *_, name, step = self._unpack("IHHII", inner)
                yield name
                inner += step
            offset += following
