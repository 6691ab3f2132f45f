"""Changes to a file with an ssh configuration that leave all the rest of it as it is."""

from __future__ import annotations

import codecs
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
from lazycluster.core.suggestions import suggestion
from lazycluster.utils import expanded

from .config_hosts import configured_hosts, user_config
from .config_text import BOM_HINT, Word, keyword_of, option_values, split_words

__all__ = ["BACKUP", "ConfigurationError", "add_host", "remove_host"]

BACKUP = ".lazycluster-backup"
"""Suffix of the copy of a file that is made before a change."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9]*")
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
        ConfigurationError: If the name is not safe or is taken, ssh does not understand the result, or the file cannot
            be written.
    """
    _check_name(name)
    for key, value in options.items():
        if not _OPTION.fullmatch(key) or key.lower() in ("host", "match", "include"):
            raise ConfigurationError(f"{key!r} is not an option of a host")
        if not value or re.search(r"[\x00-\x1f\x7f]", value):
            raise ConfigurationError(f"the value of {key} is empty or holds a control character")
    file = _file(path)
    with _changing(file) as change:
        taken = {host.name: host.place for host in configured_hosts(file)} if file.exists() else {}
        if name in taken:
            raise ConfigurationError(
                f"{name!r} is there already, in {taken[name]}\n"
                f"  Next step: choose another name, or remove it first: lazycluster delete-runtime {name}"
            )
        newline = b"\r\n" if b"\r\n" in change.text else b"\n"
        lines = [f"Host {name}", *(f"    {key} {_quoted(value)}" for key, value in options.items())]
        block = b"".join(os.fsencode(line) + newline for line in lines)
        change.text = _with_block(change.text, block, newline)
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
        ConfigurationError: If it is not there, or only in a file that this one includes, or the file cannot be written.
    """
    if not name or re.search(r"[\s*?!]", name):
        raise ConfigurationError(f"{name!r} is not the name of a single host")
    file = _file(path)
    if not file.exists():
        raise ConfigurationError(f"no such file: {file}")
    with _changing(file) as change:
        text = _without_host(change.text, name)
        if text == change.text:
            places = [host.place for host in configured_hosts(file) if host.name == name]
            if places:
                raise ConfigurationError(f"{name!r} stands in {places[0]}: remove it there, with that file as --config")
            known = suggestion(name, [host.name for host in configured_hosts(file) if not host.skipped])
            raise ConfigurationError(f"{file} has no host {name!r}{known}")
        change.text = text
    return file


def _check_name(name: str) -> None:
    if re.search(r"[*?!,]", name):
        raise ConfigurationError(f"{name!r} is a pattern: name a single host")
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise ConfigurationError(f"{name!r} cannot be a host's name: letters, digits, '.', '-' and '_' can be in one")


def _quoted(value: str) -> str:
    return f'"{value}"' if re.search(r"[\s#]", value) and '"' not in value else value


def _with_block(text: bytes, block: bytes, newline: bytes) -> bytes:
    lines = _lines(text)
    place = _place_for(lines)
    before, after = b"".join(lines[:place]), b"".join(lines[place:])
    if before and not before.endswith(b"\n"):
        before += newline
    if before and not before.endswith(newline * 2):
        before += newline
    return before + block + (newline if after else b"") + after


def _lines(text: bytes) -> list[bytes]:
    """Return the lines with their ends, which are line feeds only, as for ssh."""
    return [line for line in re.split(rb"(?<=\n)", text) if line]


def _block_of(line: bytes) -> tuple[str, list[Word]] | None:
    """Return the keyword of a ``Host`` or ``Match`` line, and its words, whose spans are those of its bytes."""
    text = line.decode("latin-1").rstrip("\n")
    found = keyword_of(text)
    return (found[0], split_words(text, found[1])) if found and found[0] in ("host", "match") else None


def _place_for(lines: list[bytes]) -> int:
    """Return the line before which a host goes: the first value of an option wins, so before what holds for all."""
    for number, line in enumerate(lines):
        block = _block_of(line)
        if block is None:
            continue
        if block[0] == "match" or any(re.search(r"[*?!]", word.text) for word in block[1]):
            # The comment above it belongs to it.
            while number > 0 and lines[number - 1].lstrip().startswith(b"#"):
                number -= 1
            return number
    return len(lines)


def _without_host(text: bytes, name: str) -> bytes:
    wanted = os.fsencode(name).decode("latin-1")
    kept: list[bytes] = []
    removing = gap = False
    for line in _lines(text):
        block = _block_of(line)
        if block is not None:
            keyword, words = block
            listed = keyword == "host" and wanted in [word.text for word in words]
            removing = listed and all(word.text == wanted for word in words)
            gap = not kept or not kept[-1].strip()
            if listed and not removing:
                line = _without_words(line, words, wanted)
        if removing and gap and not line.strip():
            gap = False  # of the blank lines before and after the block one goes with it
        elif not removing or not line.strip() or line.startswith(b"#"):
            # A comment that is not indented may belong to the next block.
            kept.append(line)
    return b"".join(kept)


def _without_words(line: bytes, words: list[Word], unwanted: str) -> bytes:
    """Cut words out of a line, each with the blanks behind it, or before it if it is the last one."""
    for number in reversed(range(len(words))):
        if words[number].text == unwanted:
            is_last = number == len(words) - 1
            start = words[number - 1].end if is_last else words[number].start
            end = words[number].end if is_last else words[number + 1].start
            line = line[:start] + line[end:]
            words = words[:number] + words[number + 1 :]
    return line


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
            raise ConfigurationError(f"ssh could not check the configuration: {error}") from None
        finally:
            temporary.unlink()
        said = done.stderr.decode(errors="replace").replace(str(temporary), str(self.path)).strip()
        if done.returncode != 0:
            if self.text.startswith(codecs.BOM_UTF8):
                said = f"{BOM_HINT} {shlex.quote(str(self.path))}"
            raise ConfigurationError(f"ssh rejects the new configuration, so nothing was changed: {said}")
        (means,) = option_values(done.stdout).get("hostname", [""])
        if hostname is not None and means.lower() != hostname.replace("%%", "%").lower():
            raise ConfigurationError(
                f"with what stands before it, {name!r} would mean {means!r}, not {hostname!r}; nothing was changed"
            )

    def _written(self, suffix: str) -> Path:
        # Beside it: relative includes of a user's configuration start at ~/.ssh whatever its name.
        fd, name = tempfile.mkstemp(prefix=f".{self.path.name}-", suffix=suffix, dir=self.path.parent)
        return _fill_new(fd, Path(name), self.text)

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
        _fill_new(fd, Path(name), self._before).replace(backup)


def _fill_new(fd: int, path: Path, text: bytes) -> Path:
    """Fill a file that has just been made; it is removed again if that fails."""
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink()
        raise
    return path


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
    inode = path.stat()
    if inode.st_mode & stat.S_IWUSR and os.access(path, os.W_OK):
        return
    step = f"{shlex.join(['chmod', 'u+w', str(path)])} if it may be changed, or choose another: --config"
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        step = "choose another file: --config"
    raise ConfigurationError(f"{path} is read-only, so it was not changed\n  Next step: {step}")


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[_Change]:
    """Change a file, if nothing goes wrong; two who do it at once do it one after the other."""
    # A link is followed: many keep their configuration in a repository.
    path = Path(os.path.realpath(path))
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _not_changed(path, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_symlink():
            raise ConfigurationError(f"{path} is a link that leads to itself")
        if path.exists():
            if not stat.S_ISREG(path.stat().st_mode):
                raise ConfigurationError(f"{path} is not a regular file")
            _check_writable(path)
        change = _Change(path)
        yield change
        change.commit()
    except OSError as error:
        raise _not_changed(path, error) from None
    finally:
        os.close(lock)


def _not_changed(path: Path, error: OSError) -> ConfigurationError:
    """Return the error about a file that cannot be written, and is as it was."""
    hint = "make its directory writable, or choose another file: --config"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space in its directory, or choose another file: --config"
    return ConfigurationError(f"{path} cannot be changed: {error.strerror}\n  Next step: {hint}")
