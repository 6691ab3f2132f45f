"""Settings of the process, and the files of the library: their directory and their names."""

from __future__ import annotations

import datetime
import errno
import itertools
import logging
import os
import threading
from pathlib import Path

from .agent.ownership import make

__all__ = ["Environment", "Timestamp", "new_log_file_path", "private_directory", "safe_name"]

_THIRD_PARTY_LOGGERS = ("asyncio", "distributed", "tornado", "bokeh", "hyperopt", "pymongo")
_LONGEST_NAME = 120  # characters; file systems allow 255 bytes, and a stamp follows

NO_CURRENT_DIRECTORY = "the current directory was removed: change to another one"

_numbers = itertools.count(1)
_making = threading.Lock()
_log_directory: Path | None = None
_known: set[Path] = set()  # directories that are nobody else's


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` and ``~user`` expanded; as in a shell, that of an unknown user stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  (Path.expanduser raises RuntimeError)


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return a path that starts at the root; a relative one is taken from the current directory.

    Raises:
        FileNotFoundError: If the current directory was removed, with that reason.
    """
    try:
        return Path(path).absolute()
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, NO_CURRENT_DIRECTORY, str(path)) from None


def default_directory() -> Path:
    """Return where the library keeps its files unless the user chooses another place."""
    return Path(os.environ.get("XDG_STATE_HOME") or expanded("~/.local/state")).absolute() / "lazycluster"


class Environment:
    """Settings of the library that hold for the whole process.

    Attributes:
        main_directory: Where the library keeps log files and the like on this machine. By default
            ``$XDG_STATE_HOME/lazycluster``, or ``~/.local/state/lazycluster``. It is made when it is first needed, and
            only its owner can read it.
        progress: Whether it is shown how far things are that take more than two seconds: connecting, copying, starting
            a cluster. It is shown on a terminal and in a notebook, and never written to files. See also ``progress`` of
            :class:`~lazycluster.RuntimeGroup` and :class:`~lazycluster.RuntimeManager`.
        trust_group: Whether directories are used, here and on the hosts, that their group may write to: main directory,
            ``working_dir``, ``cache_dir``, ``dbpath``, ``local_directory``. Its members can have any code run as you.
            Without it they are refused, as are those that another user owns or everybody may write to. By default what
            the environment variable ``LAZYCLUSTER_TRUST_GROUP`` says (``1``).

    Examples:
        >>> Environment.set_main_directory("/tmp/my-experiment")
        >>> Environment.main_directory
        '/tmp/my-experiment'
    """

    main_directory: str = str(default_directory())
    progress: bool = True
    trust_group: bool = os.environ.get("LAZYCLUSTER_TRUST_GROUP", "").lower() in ("1", "true", "yes", "on")

    @classmethod
    def set_main_directory(cls, dir: str | os.PathLike[str]) -> None:
        """Choose the directory where the library keeps its files. Files that already exist stay where they are.

        Args:
            dir: The directory; made when it is first needed. ``~`` is understood.

        Raises:
            TypeError: If it is not a path.
            ValueError: If it is empty, or there is a file of this name.
        """
        if not isinstance(dir, (str, os.PathLike)):
            raise TypeError(f"a directory must be a path, not {type(dir).__name__}")
        text = os.fspath(dir)
        if not text or "\0" in text:
            raise ValueError(f"not usable as a directory: {text!r}")
        path = expanded(text).absolute()
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file, not a directory")
        cls.main_directory = str(path)

    @staticmethod
    def set_third_party_log_level(log_level: int | str) -> None:
        """Set the level of the loggers of the libraries that are used here, e.g. of ``distributed``.

        Args:
            log_level: As for :meth:`logging.Logger.setLevel`, e.g. ``logging.ERROR`` or ``"ERROR"``.

        Raises:
            ValueError: If there is no such level.
        """
        for name in _THIRD_PARTY_LOGGERS:
            logging.getLogger(name).setLevel(log_level)


class Timestamp:
    """A moment, as text for people and for file names.

    Examples:
        >>> stamp = Timestamp()
        >>> stamp.get_formatted()                       # doctest: +SKIP
        '2024-05-17 09:30:12'
        >>> stamp.get_unformatted()                     # doctest: +SKIP
        '20240517093012123456'
    """

    def __init__(self) -> None:
        self._moment = datetime.datetime.now()
        self._number = next(_numbers)

    def get_formatted(self) -> str:
        """Return it for people, to the second."""
        return self._moment.strftime("%Y-%m-%d %H:%M:%S")

    def get_unformatted(self) -> str:
        """Return it as digits only, to the microsecond."""
        return self._moment.strftime("%Y%m%d%H%M%S%f")

    def get_unique(self) -> str:
        """Return it as a part of a file name that no other process or moment shares."""
        return f"{self._moment:%Y%m%d-%H%M%S-%f}-{os.getpid()}-{self._number}"

    def __str__(self) -> str:
        return self.get_formatted()


def safe_name(name: str) -> str:
    """Return a name as one part of a path: whatever it contains, it stays in its directory, and differs from others.

    Args:
        name: Any text, e.g. a host or a task that the user named.

    Returns:
        The name with other characters than letters, digits and ``_.-~@:+=,`` written as ``%XX``.

    Examples:
        >>> safe_name("me@host:22"), safe_name("../etc/passwd"), safe_name("..")
        ('me@host:22', '..%2Fetc%2Fpasswd', '%2E%2E')
    """
    from urllib.parse import quote

    quoted = quote(name, safe="@:+=,", errors="surrogatepass")
    if not quoted.strip("."):
        quoted = quoted.replace(".", "%2E") or "%"
    if len(quoted) > _LONGEST_NAME:
        import hashlib

        # Python's own hash differs from run to run; this one keeps long names apart for good.
        digest = hashlib.sha256(quoted.encode()).hexdigest()[:16]
        quoted = f"{quoted[: _LONGEST_NAME - 17]}~{digest}"
    return quoted


def private_directory(*parts: str, main: Path | None = None) -> Path:
    """Return a directory below the main directory; made if it is missing, readable for its owner only.

    Args:
        *parts: Its path below that.
        main: Another one in place of the main directory.

    Raises:
        OSError: If it cannot be made.
    """
    path = (main or Path(Environment.main_directory)).joinpath(*parts)
    if path not in _known or not path.is_dir():
        with _making:
            make(str(path), 0o700, Environment.trust_group)
            _known.add(path)
    return path


def use_log_directory(path: Path) -> None:
    """Have the log files of this process in a directory of its own, which may be removed with what they tell of."""
    global _log_directory
    _log_directory = path


def new_log_file_path(host: str, task: str) -> Path:
    """Return the path of a log file that does not exist yet; its directory does.

    Args:
        host: The host.
        task: The name of the task.

    Raises:
        OSError: If the directory cannot be made.
    """
    return (
        private_directory("logs", safe_name(host))
        if _log_directory is None
        else private_directory(safe_name(host), main=_log_directory)
    ) / f"{safe_name(task)}-{Timestamp().get_unique()}.log"
