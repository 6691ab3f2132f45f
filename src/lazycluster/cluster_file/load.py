"""A ``cluster.toml``, read and checked."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazycluster.agent.ownership import Users
from lazycluster.background.state import checked_name
from lazycluster.cluster.exceptions import ClusterError, ClusterFileError
from lazycluster.core.durations import duration
from lazycluster.core.hostsets import HostSetError, expand, is_pattern
from lazycluster.core.suggestions import suggestion
from lazycluster.environments.spec import file_kind
from lazycluster.exceptions import one_line
from lazycluster.group.selection import ALL, match, without
from lazycluster.ssh.config_hosts import configured_hosts
from lazycluster.utils import Environment, absolute, expanded

from .keys import CONNECTION_KEYS, HOST_KEYS, TOP_KEYS, Key, option_key
from .spec import ClusterSpec
from .toml_lines import KeyLines

if TYPE_CHECKING:
    from lazycluster.cluster.engine import Option

__all__ = ["engine_of", "load_cluster_file"]

_logger = logging.getLogger("lazycluster")

_LARGEST = 1024 * 1024  # bytes
_MOST_PARTS = 32  # of a key: the parser takes time by their square
_MOST_NAMED = 500_000  # hosts in all places together, each as often as it is named
_MOST_PROBLEMS = 10  # that are shown
_MOST_COUNTED = 100  # problems, after which the rest is not looked at
_LONGEST_PROBLEM = 1000  # characters
_LONGEST_SHOWN = 80  # characters of a name in a message

_LONG_KEY = re.compile(
    r"""(?:\.[ \t]*(?:[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')[ \t]*){%d}""" % _MOST_PARTS  # noqa: UP031
)

_Path = tuple[str, ...]


def load_cluster_file(
    path: str | os.PathLike[str],
    *,
    trust: bool = False,
    config_file: str | None = None,
    hosts: Sequence[str] | None = None,
) -> ClusterSpec:
    """Read a file that specifies a cluster, usually ``cluster.toml``. Nothing is connected.

    Args:
        path: The file. Paths in it are relative to its directory.
        trust: Take what could run code of whoever wrote the file: ``setup``, options of ssh, paths of programs and the
            like. Use it only for files that you have written or read.
        config_file: The ssh configuration that says which hosts there are; by default the user's.
        hosts: Take these hosts, and not those of the file.

    Raises:
        ClusterFileError: If it cannot be used; says what is wrong, and in which lines.

    Examples:
        >>> spec = lazycluster.load_cluster_file("cluster.toml")                          # doctest: +SKIP
        >>> with spec.make_group() as group, spec.make_cluster(group) as cluster:        # doctest: +SKIP
        ...     cluster.start(spec.workers, spec.master_port)
    """
    opened = _Opened.open(path)
    _check_writers(opened.status, opened.shown, trust)
    return _File(opened, trust, config_file, hosts).spec()


def engine_of(path: str | os.PathLike[str]) -> str:
    """Return the engine that a file names; the rest of it is not looked at.

    Args:
        path: The file.

    Raises:
        ClusterFileError: If it cannot be read, or names no engine that there is.
    """
    file = _File(_Opened.open(path))
    name = file.engine()
    file.finish()
    return name


@dataclass(frozen=True)
class _Opened:
    """A file that has been read.

    Attributes:
        document: What it says.
        lines: Where.
        path: Its absolute path.
        shown: Its path in messages.
        status: Its owner and mode.
    """

    document: dict[str, Any]
    lines: KeyLines
    path: Path
    shown: str
    status: os.stat_result

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> _Opened:
        file = absolute(expanded(path))
        shown = one_line(os.fspath(path))
        text, status = _read(file, shown)
        if (found := _LONG_KEY.search(text)) is not None:
            line = text.count("\n", 0, found.start()) + 1
            raise ClusterFileError(shown, [(line, f"it is nested too deeply: a key has more than {_MOST_PARTS} parts")])
        from lazycluster.core import toml

        try:
            return cls(toml.loads(text), KeyLines(text), file, shown, status)
        except (ValueError, RecursionError) as error:  # ValueError: a number has too many digits
            raise ClusterFileError(shown, [_of_parser(error, text)]) from None


def _read(file: Path, shown: str) -> tuple[str, os.stat_result]:
    try:
        if file.is_dir():
            raise ClusterFileError(shown, [(None, "it is a directory: name the file in it")])
        # A pipe may have nobody who writes to it, a device may never end.
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as opened:
            status = os.fstat(fd)
            content = opened.read(_LARGEST + 1) if stat.S_ISREG(status.st_mode) else None
    except FileNotFoundError:
        raise ClusterFileError(shown, [(None, "no such file")]) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ClusterFileError(shown, [(None, f"it cannot be read: {why}")]) from None
    if content is None:
        raise ClusterFileError(shown, [(None, "it is not a regular file")])
    if len(content) > _LARGEST:
        raise ClusterFileError(shown, [(None, f"it has more than {_LARGEST >> 20} MiB: it is not a cluster.toml")])
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ClusterFileError(shown, [(line, "it is not UTF-8 text, so it is not a TOML file")]) from None
    if not text.strip():
        raise ClusterFileError(shown, [(None, "it is empty: it needs at least engine and hosts")])
    return text.replace("\r\n", "\n"), status


def _check_writers(status: os.stat_result, shown: str, trust: bool) -> None:
    """Refuse to trust a file that other users could have written; else warn of it."""
    users = Users(Environment.trust_group)
    if status.st_uid not in users.trusted:
        why, how = "another user owns it", "copy it, and look at what it says"
    elif status.st_mode & stat.S_IWOTH:
        why, how = "everybody on this machine may write to it", f"chmod o-w {shown}"
    elif status.st_mode & stat.S_IWGRP and not users.trusts(status.st_gid):
        why, how = "its group may write to it", f"chmod g-w {shown}"
    else:
        return
    if trust:
        raise ClusterFileError(shown, [(None, f"{why}, so it cannot be trusted")], how)
    _logger.warning("%s: %s (%s)", shown, why, how)


def _of_parser(error: Exception, text: str) -> tuple[int | None, str]:
    """Return the line that Python's parser names, and what it says."""
    from lazycluster.core import toml

    if isinstance(error, RecursionError):
        return None, "it is nested too deeply"
    if not isinstance(error, toml.TOMLDecodeError):
        return None, f"it cannot be read: {error}"
    said = f"it is not valid TOML: {error}"
    found = re.search(r" \(at line ([0-9]+), column ([0-9]+)\)$", said)
    if found is None:  # it is the end of the document where something is missing
        return text.rstrip().count("\n") + 1, said
    return int(found[1]), f"{said[: found.start()]} (column {found[2]})"


class _File:
    """One file, and what is wrong with it."""

    def __init__(
        self, opened: _Opened, trust: bool = False, config_file: str | None = None, hosts: Sequence[str] | None = None
    ) -> None:
        self._document, self._lines, self._shown = opened.document, opened.lines, opened.shown
        self._file, self._directory = opened.path, opened.path.parent
        self._trust, self._config_file, self._instead = trust, config_file, hosts
        self._problems: dict[tuple[int | None, str], None] = {}  # in their order
        self._left = _MOST_NAMED
        self._warnings: list[str] = []
        self._is_distrusted = False
        self._known: list[str] | None = None  # hosts of the ssh configuration

    def spec(self) -> ClusterSpec:
        """Return what it says.

        Raises:
            ClusterFileError: Something is wrong.
        """
        values = self._table((), self._document, TOP_KEYS)
        engine = self.engine()
        options = self._options(engine, values.get("options", {}))
        self._name(("name",), values.get("name"))
        groups = self._groups(values.get("groups", {}))
        hosts, everyone = self._hosts(values, groups)
        settings = self._settings(values.get("host", {}), hosts, groups)
        self.finish()
        own = {key.name for key in HOST_KEYS}
        return ClusterSpec(
            engine=engine,
            hosts=tuple(hosts),
            everyone=everyone,
            name=values.get("name", ""),
            workers=values.get("workers"),
            master_port=values.get("master_port"),
            options=options,
            group_options={name: self._used(name, value) for name, value in values.items() if name in own},
            settings=settings,
            idle_timeout=_seconds(values.get("idle_timeout")),
            lifetime=_seconds(values.get("lifetime")),
            file=str(self._file),
        )

    # --- problems ------------------------------------------------------------------------------
    def _problem(self, path: _Path, text: str) -> None:
        self._problems[self._lines.of(path), one_line(text[:_LONGEST_PROBLEM])] = None
        if len(self._problems) >= _MOST_COUNTED:
            self.finish()

    def finish(self) -> None:
        """Raise an error if there are problems.

        Raises:
            ClusterFileError: With all of them.
        """
        if not self._problems:
            for warning in self._warnings:
                _logger.warning("%s", one_line(warning))
            return
        problems = sorted(self._problems, key=lambda one: (one[0] is None, one[0] or 0))
        left = len(problems) - _MOST_PROBLEMS
        if left > 0:
            least = "at least " if len(problems) >= _MOST_COUNTED else ""
            problems = [*problems[:_MOST_PROBLEMS], (None, f"and {least}{left} more")]
        hint = ""
        if self._is_distrusted:
            hint = "read the file; if you trust whoever wrote it, use it with trust=True"
        raise ClusterFileError(self._shown, problems, hint)

    # --- tables --------------------------------------------------------------------------------
    def _table(self, path: _Path, table: Mapping[str, Any], keys: Iterable[Key]) -> dict[str, Any]:
        """Return the values of a table that are as they should be; note what is wrong with the others."""
        known = {key.name: key for key in keys}
        good = {}
        for name, value in table.items():
            here = (*path, name)
            if name not in known:
                self._problem(here, f"unknown key {_shown(name)}{self._elsewhere(path, name, list(known))}")
            elif self._is_good(here, known[name], value):
                good[name] = value
        return good

    def _is_good(self, path: _Path, key: Key, value: Any) -> bool:
        if key.trust == "never":
            self._problem(path, f"{key.name} cannot stand in a file: use a key, or let ssh ask for it")
            return False
        try:
            key.check(value)
            if self._is_allowed(path, key, value):
                key.check_use(self._used(key.name, value))
                return True
        except ClusterFileError:
            raise
        except (TypeError, ValueError) as error:
            text = str(error)
            self._problem(path, text if text.startswith(key.name) else f"{key.name} {text}")
        return False

    def _is_allowed(self, path: _Path, key: Key, value: Any) -> bool:
        if self._trust or key.is_free(value):
            return True
        self._is_distrusted = True
        instead = f"; without that: {key.safe}" if key.safe else ""
        self._problem(path, f"{key.name} is taken only from a file that you trust, since {key.reason}{instead}")
        return False

    def _elsewhere(self, path: _Path, name: str, known: list[str]) -> str:
        if not path and name in {key.name for key in CONNECTION_KEYS}:
            return f': it is a setting of hosts, e.g. below [host."*"]{suggestion(name, known, listed=False)}'
        return suggestion(name, known)

    # --- the engine ----------------------------------------------------------------------------
    def engine(self) -> str:
        """Return the name of the engine; "" if there is none, which is a problem then."""
        from lazycluster import engines

        if "engine" not in self._document:
            self._problem((), f"engine is missing, e.g. engine = {next(iter(engines.known()))!r}")
            return ""
        name = self._document["engine"]
        if not isinstance(name, str):
            self._problem(("engine",), "engine must be a string")
            return ""
        if name not in engines.known():
            self._problem(("engine",), f"there is no engine {_shown(name)}{suggestion(name, engines.known())}")
            return ""
        return name

    def _options(self, engine: str, table: Mapping[str, Any]) -> dict[str, Any]:
        from lazycluster import engines

        if not engine:
            return {}
        try:
            stated = engines.load(engine).engine_class.options
        except (ClusterError, ImportError) as error:
            self._problem(("engine",), str(error))
            return {}
        by_flag = {option.flag.removeprefix("--"): option.argument for option in stated}
        for name in table:
            if name in by_flag and by_flag[name] != name:
                self._problem(("options", name), f"unknown key {_shown(name)}; did you mean {by_flag[name]!r}?")
        own = {name: value for name, value in table.items() if by_flag.get(name, name) == name}
        found = self._table(("options",), own, [option_key(option) for option in stated])
        for option in stated:
            if option.argument in found:
                found[option.argument] = self._option(option, found[option.argument])
        return found

    def _option(self, option: Option, value: Any) -> Any:
        """Return the value of an option as the engine takes it; note what the engine finds wrong with it."""
        if option.kind == "directory":
            return str(self._directory / expanded(value))
        if option.check is not None:
            try:
                option.check(value)
            except ValueError as error:
                self._problem(("options", option.argument), f"{option.argument}: {error}")
        return value

    # --- hosts ---------------------------------------------------------------------------------
    def _name(self, path: _Path, name: str | None) -> None:
        try:
            if name is not None:
                checked_name(name)
        except ValueError as error:
            self._problem(path, str(error))

    def _groups(self, table: Mapping[str, Any]) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name, value in table.items():
            path = ("groups", name)
            self._name(path, name)
            if name == ALL.removeprefix("@"):
                self._problem(path, f"{ALL} stands for all hosts of the ssh configuration already")
            elif self._is_good(path, Key(name, "texts", "", "free"), value):
                # One that is made of others stands below them.
                groups[name] = self._selected(path, value, groups)
        return groups

    def _hosts(self, values: Mapping[str, Any], groups: Mapping[str, list[str]]) -> tuple[list[str], bool]:
        if self._instead is not None:
            return list(self._instead), False
        if "hosts" not in values:
            if "hosts" not in self._document:
                self._problem((), "hosts is missing, e.g. hosts = ['node[1-4]']")
            return [], False
        named = self._selected(("hosts",), values["hosts"], groups)
        excluded = self._selected(("exclude",), values.get("exclude", []), groups)
        try:
            hosts = without(match(named, self._hosts_known(named)), excluded, self._hosts_known(excluded))
        except HostSetError as error:
            self._problem(("hosts",), str(error))
            return [], False
        if not hosts and not self._problems:
            all_gone = "all named hosts are excluded" if named and excluded else "no host is named"
            self._problem(("hosts",), f"no host is left: {all_gone}")
        return hosts, ALL in named

    def _selected(self, path: _Path, value: str | Sequence[str], groups: Mapping[str, list[str]]) -> list[str]:
        """Return the names and patterns of some sets, with the groups replaced by what they hold."""
        names: dict[str, None] = {}
        for text in [value] if isinstance(value, str) else value:
            if self._left < 0:
                break
            try:
                found = expand(text)
            except HostSetError as error:
                self._problem(path, str(error))
                continue
            self._count(path, len(found))
            for name in found:
                if not name.startswith("@") or name == ALL:
                    names[name] = None
                elif name[1:] in groups:
                    if self._count(path, len(groups[name[1:]])):
                        names |= dict.fromkeys(groups[name[1:]])
                else:
                    self._problem(path, f"there is no group {_shown(name)}{suggestion(name[1:], groups)}")
        return list(names)

    def _count(self, path: _Path, named: int) -> bool:
        """Return whether so many more may be named: a small file can stand for more than there is memory for."""
        if self._left >= 0:
            self._left -= named
            if self._left < 0:
                self._problem(path, f"more than {_MOST_NAMED} hosts are named, each counted as often as it is")
        return self._left >= 0

    def _hosts_known(self, names: Sequence[str]) -> list[str]:
        """Return the hosts of the ssh configuration, if names need them."""
        if ALL not in names and not any(map(is_pattern, names)):
            return []
        if self._known is None:
            self._known = [host.name for host in configured_hosts(self._config_file) if not host.skipped]
        return self._known

    def _settings(
        self, tables: Mapping[str, Any], hosts: Sequence[str], groups: Mapping[str, list[str]]
    ) -> dict[str, dict[str, Any]]:
        settings: dict[str, dict[str, Any]] = {}
        places = {host: number for number, host in enumerate(hosts)}
        for name, table in tables.items():
            path = ("host", name)
            if not isinstance(table, Mapping):
                self._problem(path, f"{_shown(name)} must be a table with settings, e.g. [host.node1]")
                continue
            values = self._table(path, table, HOST_KEYS)
            for host in self._meant(path, name, places, groups):
                own = settings.setdefault(host, {})
                for key, value in values.items():
                    used = self._used(key, value)
                    own[key] = {**own.get(key, {}), **used} if key == "env" else used
        return settings

    def _meant(self, path: _Path, name: str, hosts: Mapping[str, int], groups: Mapping[str, list[str]]) -> list[str]:
        """Return those of the hosts that settings are for; of the hosts the places in their order are known."""
        named = self._selected(path, name, groups)
        try:
            patterns = [one for one in named if one not in hosts and (one == ALL or is_pattern(one))]
        except HostSetError as error:
            self._problem(path, str(error))
            return []
        if not self._count(path, len(hosts) * len(patterns)):
            return []
        if ALL in named:
            return list(hosts)
        fitting = [host for one in patterns for host in hosts if fnmatch.fnmatchcase(host, one)]
        found = sorted({*fitting, *(one for one in named if one in hosts)}, key=hosts.__getitem__)
        if not found and named and hosts and self._instead is None:
            self._warnings.append(f"{self._shown}, line {self._lines.of(path)}: no host of the cluster is {name!r}")
        return found

    # --- paths ---------------------------------------------------------------------------------
    def _used(self, name: str, value: Any) -> Any:
        """Return a value as it is used: its paths on this machine are absolute."""
        if name == "environment":
            return self._environment(value)
        if name == "config_file":
            return value if value.lower() == "none" else self._path(value)
        if name == "key_filename":
            return self._path(value) if isinstance(value, str) else [self._path(one) for one in value]
        if name == "setup" and not isinstance(value, str):
            return "\n".join(value)
        return value

    def _path(self, text: str) -> str:
        return str(self._directory / expanded(text)) if "%" not in text else text

    def _environment(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {**value, "source": self._environment(value["source"])} if "source" in value else value
        if isinstance(value, str):
            return self._path(value) if file_kind(value) else value
        return [self._path(one) if re.match(r"\.{1,2}/", str(one)) else one for one in value]


def _seconds(value: Any) -> float | None:
    return None if value is None else duration(value)


def _shown(name: str) -> str:
    return repr(name if len(name) <= _LONGEST_SHOWN else name[:_LONGEST_SHOWN] + "...")
