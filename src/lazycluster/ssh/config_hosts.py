"""Hosts that the user's ssh configuration names.

Only what is needed to list hosts is read here: names, and the few options that tell a host from a jump host or a
service. What an option means for a connection is left to ssh.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import glob
import logging
import os
import pwd
import re
import shlex
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lazycluster.utils import expanded

from .config_text import BOM_HINT, keyword_of, lines_of, split_words
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
# The criteria of a Match line are separated by "=", too.
_CRITERION = re.compile(r'"([^"]*)"|([^ \t"=]+)')
# A ProxyCommand that is an ssh of its own: its last words are the jump host, or the jump host and a netcat.
_SSH_PROXY = re.compile(r"\bssh[ \t]+(.*)")
_FLAGS_WITH_VALUE = frozenset("BbcDEeFIiJLlmOopQRSWw")
_NEEDED = ("hostname", "user")

_HOST_CRITERIA = ("host", "originalhost")
_USER_CRITERIA = ("user", "localuser")


class _HostBlock:
    """A ``Host`` line, and what follows up to the next block. Names are compared with their case, as ssh does it.

    Attributes:
        label: The names and patterns.
        names: The hosts for which it can hold; None if patterns say that.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self.label = " ".join(patterns)
        self.names = None if re.search(r"[*?]", self.label) else frozenset(patterns)
        self._patterns = _Patterns(patterns)

    def holds(self, name: str, options: Mapping[str, str]) -> bool:
        """Return whether it holds for a host, whose options so far are not asked for."""
        return self._patterns.match(name)


class _MatchBlock:
    """A ``Match`` line, and what follows up to the next block."""

    label = "a Match block"

    def __init__(self, text: str) -> None:
        self._criteria: list[tuple[bool, str, _Patterns]] = []
        words = [quoted or plain for quoted, plain in _CRITERION.findall(text)]
        rest = iter(words)
        for word in rest:
            if word.startswith("#"):
                break
            negated, criterion = word.startswith("!"), word.removeprefix("!").lower()
            if criterion in ("all", "final", "canonical"):
                self._criteria.append((negated, criterion, _Patterns(())))
                continue
            lower = criterion in _HOST_CRITERIA
            patterns = next(rest, "").split(",")
            self._criteria.append((negated, criterion, _Patterns(one.lower() if lower else one for one in patterns)))

    def holds(self, name: str, options: Mapping[str, str]) -> bool:
        """Return whether it holds for a host.

        Args:
            name: The host.
            options: What the lines before this one say of it.

        Returns:
            False, too, if it depends on what only a connection can tell, or a command (``exec``), which is not run.
        """
        return bool(self._criteria) and all(self._meets(*criterion, name, options) for criterion in self._criteria)

    @staticmethod
    def _meets(negated: bool, criterion: str, wanted: _Patterns, name: str, options: Mapping[str, str]) -> bool:
        if criterion in _HOST_CRITERIA:
            hostname = options.get("hostname", "%h").replace("%h", name) if criterion == "host" else name
            return wanted.match(hostname.lower()) != negated
        if criterion in _USER_CRITERIA:
            user = options.get("user") if criterion == "user" else None
            return wanted.match(user or _local_user()) != negated
        return criterion in ("all", "final") and not negated


class _Patterns:
    """Patterns with ``*``, ``?`` and, in front, ``!``; brackets have no meaning for ssh."""

    def __init__(self, patterns: Iterable[str]) -> None:
        names = list(patterns)
        self._names = {name for name in names if not re.search(r"[*?!]", name)}
        self._wild = [self._compiled(name) for name in names if name not in self._names and not name.startswith("!")]
        self._negated = [self._compiled(name[1:]) for name in names if name.startswith("!")]

    @staticmethod
    def _compiled(pattern: str) -> re.Pattern[str]:
        # This takes no exponential time, whatever stars there are.
        return re.compile(fnmatch.translate(pattern.replace("[", "[[]")))

    def match(self, text: str) -> bool:
        """Return whether one fits, and none of the negated ones."""
        if text not in self._names and not any(one.match(text) for one in self._wild):
            return False
        return not any(one.match(text) for one in self._negated)


Scope = tuple["_HostBlock | _MatchBlock", ...]


class ConfigLine(NamedTuple):
    """A line of a configuration: its keyword in small letters, its words, where it stands, and in which blocks."""

    keyword: str
    words: list[str]
    place: str
    scope: Scope


class _NamedHost:
    """Settings of one name in a configuration."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._held: dict[_HostBlock | _MatchBlock, bool] = {}
        self.options: dict[str, str] = {}

    def reached(self, scope: Scope) -> bool:
        """Return whether blocks hold for it; as for ssh, what counts for a block is what was known at its beginning."""
        for block in scope:
            if block not in self._held:
                self._held[block] = block.holds(self._name, self.options)
            if not self._held[block]:
                return False
        return True


class _HostOptions:
    """The few options of hosts that are needed here. There may be thousands of hosts, each with lines of its own."""

    def __init__(self, lines: Iterable[ConfigLine]) -> None:
        self._lines = [line for line in lines if line.words and line.keyword in (*_NEEDED, "match")]
        self._for_names: dict[str, list[int]] = {}
        self._others: list[int] = []
        for number, line in enumerate(self._lines):
            named = [block.names for block in line.scope if isinstance(block, _HostBlock) and block.names is not None]
            for name in named[0] if named else ():
                self._for_names.setdefault(name, []).append(number)
            if not named:
                self._others.append(number)

    def of(self, name: str) -> dict[str, str]:
        """Return the options of a host, by their names in small letters."""
        host = _NamedHost(name)
        for number in sorted([*self._for_names.get(name, []), *self._others]):
            line = self._lines[number]
            if host.reached(line.scope) and line.keyword in _NEEDED:
                host.options.setdefault(line.keyword, line.words[0])
        return host.options


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


@functools.cache
def _local_user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""


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
            if not line.scope or _NamedHost(name).reached(line.scope):
                names.setdefault(name, line)
    jumps = _jump_hosts(lines)
    options = _HostOptions(lines)
    return [_judge(name, line, options, jumps) for name, line in names.items()]


def _judge(name: str, line: ConfigLine, options: _HostOptions, jumps: dict[str, str]) -> ConfiguredHost:
    if re.search(r"[*?!]", name):
        return ConfiguredHost(name, "a pattern, not a host", line.place)
    values = options.of(name)
    hostname, user = values.get("hostname"), values.get("user")
    skipped = ""
    try:
        parse_destination(name)
    except ValueError as error:
        skipped = str(error)
    served = jumps.get(name) or jumps.get((hostname or name).lower())
    if user == "git":
        skipped = "its user is 'git': a service for repositories, not a host to log in to"
    elif served:
        skipped = f"only a jump host, for {served}"
    return ConfiguredHost(name, skipped, line.place, hostname, user)


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
        served = line.scope[-1].label if line.scope else "*"
        for hop in hops:
            try:
                host = parse_destination(hop.strip(" \t")).host
            except ValueError:
                continue
            for spelling in (host, host.lower()):
                jumps.setdefault(spelling, served)
    jumps.pop("none", None)
    return jumps


def hops_of_command(command: str) -> list[str]:
    """Return the host that a ``ProxyCommand`` goes through, if it is an ssh of its own."""
    found = _SSH_PROXY.search(command)
    words = iter(re.split(r"[ \t]+", found.group(1)) if found else [])
    for word in words:
        if not word.startswith("-"):
            return [word]
        # "-W %h:%p" takes the next word as its value, "-W%h:%p" does not.
        if len(word) == 2 and word[1] in _FLAGS_WITH_VALUE:
            next(words, None)
    return []


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
        # ssh goes no further, either; each level may include all files of a directory, which would take for ever.
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


def _read(path: Path, warnings: list[str], depth: int) -> list[str]:
    """Return the lines of a file. A line is added to the warnings if something is wrong with it."""
    try:
        lines, has_mark = lines_of(_content(path))
    except (OSError, ValueError) as error:
        if not (depth == 0 and isinstance(error, FileNotFoundError) and path in (SYSTEM_CONFIG, user_config())):
            warnings.append(f"{path}: not read: {getattr(error, 'strerror', None) or error}")
        return []
    if has_mark:
        warnings.append(f"{path}: {BOM_HINT} {shlex.quote(str(path))}")
    return lines


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
    block: Scope = ()
    for number, raw in enumerate(_read(path, warnings, depth), 1):
        found = keyword_of(raw)
        if found is None:
            continue
        keyword, start = found
        words, place = [word.text for word in split_words(raw, start)], f"{path}:{number}"
        if keyword == "include":
            for included in _included(words, base):
                if depth + 1 >= _INCLUDE_DEPTH:
                    raise _TooDeepError(
                        f"{place}: includes are nested too deeply: {included} is not read, nor all else"
                    )
                yield from _lines_of(included, warnings, scope + block, base, depth + 1)
            continue
        if keyword == "host":
            block = (_HostBlock(words),)
        elif keyword == "match":
            block = (_MatchBlock(raw[start:]),)
        yield ConfigLine(keyword, words, place, scope if keyword == "host" else scope + block)


def _included(words: Sequence[str], base: Path) -> Iterator[Path]:
    for word in words:
        if word:
            path = expanded(os.path.expandvars(word))
            # Path.glob takes no absolute patterns.
            yield from (Path(name) for name in sorted(glob.glob(str(base / path))))  # noqa: PTH207
