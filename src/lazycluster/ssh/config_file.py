"""Changes to a file with an ssh configuration that leave all the rest of it as it is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shlex
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from lazycluster.core import unix
from lazycluster.utils import expanded

from .config_hosts import configured_hosts, user_config

__all__ = ["BACKUP", "ConfigurationError", "add_host", "remove_host"]

BACKUP = ".lazycluster-backup"
"""What is added to the name of a file for the copy that is made before a change."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9]*")
_BLOCK = re.compile(rb"\s*(host|match)(?:\s*=\s*|\s+)(.*?)\s*", re.IGNORECASE)
_LONGEST_NAME = 253


class ConfigurationError(ValueError):
    """The configuration cannot be changed as asked; it is as it was."""


def _file(path: str | os.PathLike[str] | None) -> Path:
    if path is None:
        return user_config()
    if os.fspath(path).lower() == "none":
        raise ConfigurationError("'none' stands for no configuration at all, and cannot be changed")
    return expanded(path)


def add_host(name: str, options: Mapping[str, str], path: str | os.PathLike[str] | None = None) -> Path:
    """Add a host to a configuration: before the first block that would hold for it, too, else at the end.

    Args:
        name: What it is to be called.
        options: Its options, e.g. ``HostName``; a value may not hold a line break.
        path: The file, by default the user's own; made if it does not exist.

    Returns:
        The path of the file.

    Raises:
        ConfigurationError: If the name is not safe or is taken, or ssh does not understand the result.
        OSError: If the file cannot be written.
    """
    _check_name(name)
    for key, value in options.items():
        if not _OPTION.fullmatch(key) or key.lower() in ("host", "match", "include"):
            raise ConfigurationError(f"{key!r} is not an option of a host")
        if not value or re.search(r"[\x00-\x1f\x7f]", value):
            raise ConfigurationError(f"the value of {key} is empty or holds a control character")
    file = _file(path)
    with _changing(file) as change:
        taken = {host.name.lower(): host.place for host in configured_hosts(file)} if file.exists() else {}
        if name.lower() in taken:
            raise ConfigurationError(
                f"{name!r} is there already, in {taken[name.lower()]}\n"
                f"  Next step: choose another name, or remove it first: lazycluster delete-runtime {name}"
            )
        newline = b"\r\n" if b"\r\n" in change.text else b"\n"
        lines = [f"Host {name}", *(f"    {key} {_quoted(value)}" for key, value in options.items())]
        block = b"".join(os.fsencode(line) + newline for line in lines)
        change.text = _with_block(change.text, block, newline, name)
        change.check(name, options.get("HostName"))
    return file


def remove_host(name: str, path: str | os.PathLike[str] | None = None) -> Path:
    """Remove a host from a configuration. Of a line that names several, only the name.

    Args:
        name: The host.
        path: The file, by default the user's own.

    Returns:
        The path of the file.

    Raises:
        ConfigurationError: If it is not there, or only in a file that this one includes.
        OSError: If the file cannot be written.
    """
    if not name or re.search(r"[\s*?!]", name):
        raise ConfigurationError(f"{name!r} is not the name of a single host")
    file = _file(path)
    if not file.exists():
        raise ConfigurationError(f"{file} does not exist")
    with _changing(file) as change:
        text = _without_host(change.text, name)
        if text == change.text:
            places = [host.place for host in configured_hosts(file) if host.name == name]
            if places:
                raise ConfigurationError(f"{name!r} stands in {places[0]}: remove it there, with that file as --config")
            known = ", ".join(host.name for host in configured_hosts(file) if not host.skipped) or "none"
            raise ConfigurationError(f"{file} has no host {name!r}; it has: {known}")
        change.text = text
    return file


def _check_name(name: str) -> None:
    if re.search(r"[*?!,]", name):
        raise ConfigurationError(f"{name!r} is a pattern: name a single host")
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise ConfigurationError(f"{name!r} cannot be a host's name: letters, digits, '.', '-' and '_' can be in one")


def _quoted(value: str) -> str:
    return f'"{value}"' if re.search(r"[\s#]", value) and '"' not in value else value


def _with_block(text: bytes, block: bytes, newline: bytes, name: str) -> bytes:
    lines = text.splitlines(keepends=True)
    place = _place_for(lines, name)
    before, after = b"".join(lines[:place]), b"".join(lines[place:])
    if before and not before.endswith((b"\n", b"\r")):
        before += newline
    if before and not before.endswith(newline * 2):
        before += newline
    return before + block + (newline if after else b"") + after


def _place_for(lines: list[bytes], name: str) -> int:
    """Return the line before which a host goes: the first value of an option wins, so before what holds for all."""
    for number, line in enumerate(lines):
        found = _BLOCK.fullmatch(line.rstrip(b"\r\n"))
        if found is None:
            continue
        if found.group(1).lower() == b"match" or re.search(rb"[*?!]", found.group(2)):
            # The comment above it belongs to it.
            while number > 0 and lines[number - 1].lstrip().startswith(b"#"):
                number -= 1
            return number
    return len(lines)


def _without_host(text: bytes, name: str) -> bytes:
    wanted = os.fsencode(name)
    kept: list[bytes] = []
    removing = gap = False
    for line in text.splitlines(keepends=True):
        found = _BLOCK.fullmatch(line.rstrip(b"\r\n"))
        if found is not None:
            names = re.split(rb"(?:^|\s)#", found.group(2))[0].split()
            listed = found.group(1).lower() == b"host" and wanted in names
            removing = listed and set(names) == {wanted}
            gap = not kept or not kept[-1].strip()
            if listed and not removing:
                head, rest = line[: found.start(2)], line[found.start(2) :]
                word = re.escape(wanted)
                line = head + re.sub(rb"^" + word + rb"[ \t]+|[ \t]+" + word + rb"(?=\s|$)", b"", rest, count=1)
        if removing and gap and not line.strip():
            gap = False  # of the blank lines before and after the block one goes with it
        elif not removing or not line.strip() or line.startswith(b"#"):
            # A comment that is not indented may belong to the next block.
            kept.append(line)
    return b"".join(kept)


class _Change:
    """A file that is being changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.existed = self.path.exists()
        self.text = self.path.read_bytes() if self.existed else b""
        self._before = self.text

    def check(self, name: str, hostname: str | None) -> None:
        """Have ssh read the new text.

        Raises:
            ConfigurationError: If it does not understand it.
        """
        temporary = self._written(".check")
        try:
            argv = ["ssh", "-G", "-F", str(temporary), "--", name]
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigurationError(f"ssh cannot be asked whether the configuration is right: {error}") from None
        finally:
            temporary.unlink()
        said = done.stderr.decode(errors="replace").replace(str(temporary), str(self.path)).strip()
        if done.returncode != 0:
            raise ConfigurationError(f"ssh does not understand it, nothing was changed: {said}")
        means = dict(line.partition(" ")[::2] for line in done.stdout.decode(errors="replace").splitlines())
        if hostname is not None and means.get("hostname", "").lower() != hostname.lower():
            raise ConfigurationError(
                f"with what stands before it, {name!r} would mean {means.get('hostname')!r}, not {hostname!r}; "
                "nothing was changed"
            )

    def _written(self, suffix: str) -> Path:
        # Beside it: relative includes of a user's configuration start at ~/.ssh whatever its name.
        fd, name = tempfile.mkstemp(prefix=f".{self.path.name}-", suffix=suffix, dir=self.path.parent)
        with os.fdopen(fd, "wb") as file:
            file.write(self.text)
            file.flush()
            os.fsync(file.fileno())
        return Path(name)

    def commit(self) -> None:
        """Put the new text in the place of the old, of which a copy is kept."""
        if self.text == self._before:
            return
        if self.existed:
            self._keep_backup()
        new = self._written(".new")
        try:
            if not self.existed or _made_alike(new, self.path):
                try:
                    new.replace(self.path)
                    return
                except OSError as error:
                    if error.errno != errno.EBUSY:  # mounted, as into a container
                        raise
            self._write_in_place()
        finally:
            new.unlink(missing_ok=True)

    def _write_in_place(self) -> None:
        """Write into the file itself, which keeps all that it has beside its text: other names, say."""
        with self.path.open("r+b") as file:
            try:
                _fill(file, self.text)
            except OSError:
                with contextlib.suppress(OSError):
                    _fill(file, self._before)
                raise
            with contextlib.suppress(PermissionError):
                os.fchmod(file.fileno(), _mode(os.fstat(file.fileno())))

    def _keep_backup(self) -> None:
        backup = self.path.with_name(self.path.name + BACKUP)
        fd, name = tempfile.mkstemp(prefix=f".{self.path.name}-", dir=self.path.parent)
        with os.fdopen(fd, "wb") as file:
            file.write(self._before)
        Path(name).replace(backup)


def _fill(file: BinaryIO, text: bytes) -> None:
    file.seek(0)
    file.write(text)
    file.flush()
    file.truncate(len(text))
    os.fsync(file.fileno())


def _mode(inode: os.stat_result) -> int:
    """Return the mode that a configuration keeps: ssh refuses one that others may write to, who could run anything."""
    return stat.S_IMODE(inode.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH)


def _made_alike(new: Path, old: Path) -> bool:
    """Give a new file owner, extended attributes (access lists are some) and mode of the one that it replaces.

    Returns:
        Whether nothing is lost if it does; other names of the old file would be.
    """
    inode = old.stat()
    if inode.st_nlink > 1:
        return False
    try:
        made = new.stat()
        if (made.st_uid, made.st_gid) != (inode.st_uid, inode.st_gid):
            os.chown(new, inode.st_uid, inode.st_gid)
        attributes = unix.extended_attributes(old)
        for name, value in attributes.items() - unix.extended_attributes(new).items():
            unix.set_extended_attribute(new, name, value)
        new.chmod(_mode(inode))
        return unix.extended_attributes(new).keys() == attributes.keys()
    except OSError:
        return False


def _check_writable(path: Path) -> None:
    if not path.stat().st_mode & stat.S_IWUSR or not os.access(path, os.W_OK):
        raise ConfigurationError(
            f"{path} is read-only, so it was not changed\n"
            f"  Next step: {shlex.join(['chmod', 'u+w', str(path)])} if it may be changed, or choose another: --config"
        )


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[_Change]:
    """Change a file, if nothing goes wrong; two who do it at once do it one after the other."""
    # A link is followed: many keep their configuration in a repository.
    path = Path(os.path.realpath(path))
    folder = path.parent
    if not folder.exists():
        folder.mkdir(mode=0o700, parents=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_symlink():
            raise ConfigurationError(f"{path} is a link that leads to itself")
        if path.exists():
            if not stat.S_ISREG(path.stat().st_mode):
                raise ConfigurationError(f"{path} is not a file")
            _check_writable(path)
        change = _Change(path)
        yield change
        change.commit()
    finally:
        os.close(lock)
