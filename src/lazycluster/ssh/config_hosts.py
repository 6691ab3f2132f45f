"""Which hosts the user's ssh configuration names.

Only what is needed to list hosts is read here: names, and the few options that tell a host from a jump host or a
service. What an option means for a connection is left to ssh.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import logging
import os
import pwd
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lazycluster.utils import expanded

from .destination import parse_destination

__all__ = [
    "SYSTEM_CONFIG",
    "ConfigLine",
    "ConfiguredHost",
    "config_lines",
    "configured_hosts",
    "hops_of_command",
    "user_config",
]

_log = logging.getLogger("lazycluster.ssh.hosts")

SYSTEM_CONFIG = Path("/etc/ssh/ssh_config")
_INCLUDE_DEPTH = 16  # as in ssh
_LARGEST = 16 << 20  # bytes of a configuration file
_LINE = re.compile(r"([A-Za-z]\w*)(?:\s*=\s*|\s+)(.*)")
_WORD = re.compile(r'"((?:[^"\\]|\\.)*)"|\'((?:[^\'\\]|\\.)*)\'|(\S+)')
# A ProxyCommand that is an ssh of its own: its last words are the jump host, or the jump host and a netcat.
_SSH_PROXY = re.compile(r"\bssh\s+(.*)")
_FLAGS_WITH_VALUE = frozenset("BbcDEeFIiJLlmOopQRSWw")

Scope = tuple["tuple[str, ...] | None", ...]


class ConfigLine(NamedTuple):
    """A line of a configuration: its keyword in small letters, its words, where it stands, and for which hosts."""

    keyword: str
    words: list[str]
    place: str
    scope: Scope


@dataclass(frozen=True)
class ConfiguredHost:
    """A name of a ``Host`` line.

    Attributes:
        name: The name.
        skipped: Why it is not a host to work on; empty if it is one.
        place: The file and line that name it.
        hostname: Its ``HostName``, if the configuration says one.
        user: Its ``User``, likewise.
    """

    name: str
    skipped: str = ""
    place: str = ""
    hostname: str | None = None
    user: str | None = None


CONFIG_VARIABLE = "LAZYCLUSTER_SSH_CONFIG"
"""The environment variable with the path of the ssh configuration that is read where none is given."""


def user_config() -> Path:
    """Return the path of the user's own configuration. Like ssh, this does not heed ``$HOME``."""
    try:
        home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        home = expanded("~")
    return home / ".ssh" / "config"


def configured_hosts(config_file: str | os.PathLike[str] | None = None) -> list[ConfiguredHost]:
    """Return all names on the ``Host`` lines of an ssh configuration and what it includes.

    Args:
        config_file: Instead of the one in the environment variable ``LAZYCLUSTER_SSH_CONFIG``, or ``~/.ssh/config``;
            ``none`` for no file.

    Returns:
        Each name once, in order, also those to be skipped, with the reason. Files that cannot be read are logged as
        warnings.
    """
    config_file = config_file if config_file is not None else os.environ.get(CONFIG_VARIABLE) or None
    if config_file is not None and os.fspath(config_file) == "none":
        return []
    path = expanded(config_file) if config_file is not None else user_config()
    warnings: list[str] = []
    lines = list(config_lines(path, warnings))
    for warning in dict.fromkeys(warnings):
        _log.warning("%s", warning)
    names: dict[str, ConfigLine] = {}
    for line in lines:
        for name in line.words if line.keyword == "host" else ():
            if _reached(line.scope, name):
                names.setdefault(name, line)
    jumps = _jump_hosts(lines)
    return [_judge(name, line, lines, jumps) for name, line in names.items()]


def _judge(name: str, line: ConfigLine, lines: Sequence[ConfigLine], jumps: dict[str, str]) -> ConfiguredHost:
    if re.search(r"[*?!]", name):
        return ConfiguredHost(name, "a pattern, not a host", line.place)
    hostname, user = (_first(lines, name, keyword) for keyword in ("hostname", "user"))
    skipped = ""
    try:
        parse_destination(name)
    except ValueError as error:
        skipped = str(error)
    served = jumps.get(name.lower()) or jumps.get((hostname or "").lower())
    if user == "git":
        skipped = "its user is 'git': a service for repositories, not a host to log in to"
    elif served:
        skipped = f"only a jump host, for {served}"
    return ConfiguredHost(name, skipped, line.place, hostname, user)


def _first(lines: Sequence[ConfigLine], name: str, keyword: str) -> str | None:
    for line in lines:
        if line.keyword == keyword and line.words and _reached(line.scope, name):
            return line.words[0]
    return None


def _jump_hosts(lines: Sequence[ConfigLine]) -> dict[str, str]:
    """Return the jump hosts that are named anywhere, each with what it serves."""
    jumps: dict[str, str] = {}
    for line in lines:
        if line.keyword == "proxyjump" and line.words:
            hops = line.words[0].split(",")
        elif line.keyword == "proxycommand":
            hops = hops_of_command(" ".join(line.words))
        else:
            continue
        patterns = line.scope[-1] if line.scope else ("*",)
        for hop in hops:
            try:
                jumps.setdefault(parse_destination(hop.strip()).host.lower(), " ".join(patterns or ("a Match block",)))
            except ValueError:
                continue
    jumps.pop("none", None)
    return jumps


def hops_of_command(command: str) -> list[str]:
    """Return the host that a ``ProxyCommand`` goes through, if it is an ssh of its own."""
    found = _SSH_PROXY.search(command)
    words = iter(found.group(1).split() if found else [])
    for word in words:
        if not word.startswith("-"):
            return [word]
        # "-W %h:%p" takes the next word as its value, "-W%h:%p" does not.
        if len(word) == 2 and word[1] in _FLAGS_WITH_VALUE:
            next(words, None)
    return []


def _reached(scope: Scope, name: str) -> bool:
    return all(patterns is not None and _matches(patterns, name) for patterns in scope)


def _matches(patterns: Sequence[str], name: str) -> bool:
    hit = False
    for pattern in patterns:
        negated = pattern.startswith("!")
        # Brackets have no meaning for ssh. This takes no exponential time, whatever stars there are.
        if fnmatch.fnmatchcase(name.lower(), pattern.lstrip("!").lower().replace("[", "[[]")):
            if negated:
                return False
            hit = True
    return hit


class _TooDeepError(Exception):
    """Includes are nested so deeply that ssh gives up."""


def config_lines(path: Path, warnings: list[str]) -> Iterator[ConfigLine]:
    """Read a configuration file, and what it includes, as ssh does.

    Args:
        path: The file.
        warnings: Takes a line for each file that cannot be read.

    Yields:
        Its lines in order; a ``Host`` line has the scope of the blocks around its file.
    """
    base = SYSTEM_CONFIG.parent if path == SYSTEM_CONFIG else user_config().parent
    try:
        yield from _lines_of(path, warnings, (), base, 0)
    except _TooDeepError as error:
        # ssh goes no further, either; each level may include all files of a folder, which would take for ever.
        warnings.append(str(error))


def _content(path: Path) -> bytes:
    """Return what is in a file. A device may never end, and a pipe may have nobody who writes to it.

    Raises:
        OSError: If it is no file, or a very large one.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            if path.samefile(os.devnull):
                return b""
            raise OSError(errno.EINVAL, "it is not a regular file")
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise OSError(errno.EFBIG, f"it has more than {_LARGEST >> 20} MiB")
    return text


def _lines_of(path: Path, warnings: list[str], scope: Scope, base: Path, depth: int) -> Iterator[ConfigLine]:
    """Read one file.

    Args:
        path: The file.
        warnings: Takes a line for each file that cannot be read.
        scope: The blocks around the line that included it.
        base: Where relative includes start.
        depth: How many files include it.

    Raises:
        _TooDeepError: If includes are nested too deeply.
    """
    try:
        text = _content(path).decode("utf-8", "surrogateescape")
    except (OSError, ValueError) as error:
        if not (depth == 0 and isinstance(error, FileNotFoundError) and path in (SYSTEM_CONFIG, user_config())):
            warnings.append(f"{path}: not read: {getattr(error, 'strerror', None) or error}")
        return
    block: Scope = ()
    for number, raw in enumerate(text.split("\n"), 1):
        found = _LINE.fullmatch(raw.partition("\0")[0].strip())  # ssh sees nothing of a line beyond a null character
        if found is None:
            continue  # empty, a comment, or nonsense, which ssh itself reports
        keyword, words, place = found.group(1).lower(), _words(found.group(2)), f"{path}:{number}"
        if keyword == "include":
            for included in _included(words, base):
                if depth + 1 >= _INCLUDE_DEPTH:
                    raise _TooDeepError(
                        f"{place}: includes are nested too deeply: {included} is not read, nor all else"
                    )
                yield from _lines_of(included, warnings, scope + block, base, depth + 1)
            continue
        if keyword == "host":
            block = (tuple(words),)
        elif keyword == "match":
            block = (("*",),) if [word.lower() for word in words] == ["all"] else (None,)
        yield ConfigLine(keyword, words, place, scope if keyword == "host" else scope + block)


def _words(text: str) -> list[str]:
    words = []
    for double, single, plain in _WORD.findall(text):
        if plain.startswith("#"):
            break
        words.append(plain or re.sub(r"\\(.)", r"\1", double or single))
    return words


def _included(words: Sequence[str], base: Path) -> Iterator[Path]:
    for word in words:
        if word:
            path = expanded(os.path.expandvars(word))
            # Path.glob takes no absolute patterns.
            yield from (Path(name) for name in sorted(glob.glob(str(base / path))))  # noqa: PTH207
