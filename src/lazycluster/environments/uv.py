"""Running uv and git on the manager; uv resolves, builds and installs: https://docs.astral.sh/uv."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import re
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lazycluster.agent.ownership import make
from lazycluster.core.extras import install_command
from lazycluster.exceptions import EnvironmentBuildError
from lazycluster.output.lines import Tail
from lazycluster.utils import Environment

from .index import IndexSettings
from .spec import hide

__all__ = [
    "LOWEST",
    "MANAGER",
    "RETRIES",
    "CompletedProcess",
    "IndexUnreachableError",
    "Uv",
    "explained",
    "find_uv",
    "run_program",
    "run_uv",
]

MANAGER = "manager"
LOWEST = (0, 11, 15)
"""The oldest version of uv that is used; SECURITY.md has the reasons."""

# It becomes the name of a directory, and a part of requirements.
_VERSION = re.compile(r"uv (\d{1,9}\.\d{1,9}\.\d{1,9}[0-9A-Za-z.+-]{0,40})(?:\s|$)", re.ASCII)

_chosen: Uv | None = None

RETRIES = {"UV_HTTP_RETRIES": "1", "UV_HTTP_CONNECT_TIMEOUT": "5"}
"""Variables for uv where there is a fallback for an index that cannot be reached; the user's own take precedence."""


class Uv(NamedTuple):
    """A uv program on this machine.

    Attributes:
        path: Its path.
        version: Its version.
    """

    path: str
    version: str


async def find_uv() -> Uv:
    """Return the uv of its package for this interpreter, else one on the PATH.

    Raises:
        EnvironmentBuildError: If there is none, or all are too old.
    """
    global _chosen
    if _chosen is not None:
        return _chosen
    refused = []
    for path in _installed():
        version = await _version_of(path)
        if _numbers(version) >= LOWEST:
            await _check_cache(path)
            _chosen = Uv(path, version)
            return _chosen
        refused.append(f"{path} is uv {version}")
    lowest = ".".join(map(str, LOWEST))
    problem = f"{' and '.join(refused)}; it must be {lowest} or newer" if refused else "uv is not installed here"
    raise EnvironmentBuildError(MANAGER, problem, "uv", install_command("environments"))


def _installed() -> Iterator[str]:
    with contextlib.suppress(ImportError, OSError):
        yield str(importlib.import_module("uv").find_uv_bin())
    on_path = shutil.which("uv")
    if on_path is not None:
        yield on_path


async def _version_of(path: str) -> str:
    try:
        completed = await run_program([path, "--version"], {**os.environ, "NO_COLOR": "1"})
    except OSError as error:
        raise _not_run(error) from None
    found = _VERSION.match(completed.stdout)
    if completed.returncode != 0 or found is None:
        said = hide(completed.stdout or completed.stderr)
        raise EnvironmentBuildError(MANAGER, f"{path} does not tell its version", "uv", "reinstall it", said)
    return found[1]


async def _check_cache(path: str) -> None:
    """Refuse a cache of uv that another user may write to: what it contains is run."""
    try:
        completed = await run_program([path, "cache", "dir"], {**os.environ, "NO_COLOR": "1"})
    except OSError as error:
        raise _not_run(error) from None
    directory = completed.stdout.strip()
    if completed.returncode != 0 or not directory:
        return  # its next call reports the problem
    try:
        make(directory, 0o700, Environment.trust_group)
    except PermissionError as error:
        problem = f"uv's cache {directory} cannot be used: {error.filename}: {error.strerror}"
        raise EnvironmentBuildError(MANAGER, problem, "uv", "set UV_CACHE_DIR to a directory of your own") from None
    except OSError:
        return  # likewise


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _not_run(error: OSError) -> EnvironmentBuildError:
    return EnvironmentBuildError(MANAGER, f"uv cannot be run: {error}", "uv", "reinstall it")


async def run_uv(
    arguments: Sequence[str],
    settings: IndexSettings,
    *,
    stdin: str = "",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    what: str = "",
    package: str = "",
) -> str:
    """Run uv on this machine.

    Args:
        arguments: Its arguments.
        settings: The package index.
        stdin: Its standard input.
        cwd: Its working directory.
        env: Further environment variables.
        what: Its purpose, for the error message.
        package: The package concerned.

    Returns:
        Its output.

    Raises:
        EnvironmentBuildError: If it fails.
    """
    own = {name: value for name, value in (env or {}).items() if name not in RETRIES or name not in os.environ}
    variables = {**os.environ, **settings.env, **own, "UV_NO_PROGRESS": "1", "NO_COLOR": "1"}
    variables.pop("VIRTUAL_ENV", None)
    if settings.ca_file:
        variables.setdefault("SSL_CERT_FILE", settings.ca_file)
    try:
        completed = await run_program([(await find_uv()).path, *arguments], variables, stdin=stdin, cwd=cwd)
    except OSError as error:
        raise _not_run(error) from None
    if completed.returncode != 0:
        raise explained(MANAGER, what or f"uv {arguments[0]}", hide(completed.stderr), package)
    return completed.stdout


# --- what its output means ------------------------------------------------------------------------
class IndexUnreachableError(EnvironmentBuildError):
    """The index, or a file or repository, cannot be reached now."""


# Only where a word begins: what has no spaces in it for a megabyte is read once, not from each of its characters.
_NAME = r"(?<![A-Za-z0-9._-])`?(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)"
_CLOCK = "check the clock there, and the certificates"

# The first that matches counts. Where none does, the error has the output alone.
_KNOWN: tuple[tuple[str, str, str], ...] = (
    (r"No space left on device|disk quota exceeded", "the disk is full", "free some space there"),
    (
        r"network (was|is) disabled|network connectivity is disabled",
        "the network is disabled",
        "enable it: it is disabled by UV_OFFLINE or in the configuration of uv on the manager",
    ),
    (
        r"invalid peer certificate|certificate verify failed|CertificateExpired|NotValidYet|UnknownIssuer",
        "the certificate of the index is not accepted",
        _CLOCK + "; a certificate authority of your own is named with SSL_CERT_FILE on the manager",
    ),
    (
        r"error sending request for url|client error \(Connect\)|cause: (tcp connect|dns) error"
        r"|unable to access '[^']*': (Could not resolve|Failed to connect|Couldn't connect)|HTTP status server error",
        "the index cannot be reached",
        "check the network and the index in the configuration of pip or uv on the manager",
    ),
    (
        rf"Because {_NAME}\s+was\s+not\s+found\s+in\s+the\s+(package|provided|registry)",
        "there is no package {package}",
        "fix the name of {package}, or leave it out: EnvironmentSpec(..., exclude=)",
    ),
    (rf"{_NAME} was not found in the (package )?(registry|cache)", "there is no package {package}", "fix its name"),
    (
        rf"there\s+(is|are)\s+no\s+versions?\s+of\s+{_NAME}",
        "no version of {package} fits",
        "ask for a version of {package} that exists, or exclude it",
    ),
    (
        rf"{_NAME}(==\S+)?\s+has\s+no\s+(wheels|source distribution|usable wheels)[^\n]*",
        "{package} has no wheel for the host's platform and Python",
        "choose another version of {package}, or leave it out: EnvironmentSpec(..., exclude=), or use another Python: "
        "EnvironmentSpec(..., python=)",
    ),
    (
        r"requirements are unsatisfiable|No solution found",
        "the requirements contradict each other",
        "loosen one of the versions named above",
    ),
    (
        rf"Hash mismatch for {_NAME}",
        "the hash of {package} is wrong: it is not what was locked",
        "if it was published again, update the lock; else do not trust this index",
    ),
    (
        rf"(Failed to build|Build backend failed|Failed to prepare distributions)( {_NAME})?",
        "no wheel fits, and it cannot be built here",
        "choose a version that has a wheel, install what its build needs (see above), or exclude it",
    ),
    (
        r"Git operation failed",
        "a repository cannot be fetched",
        "check its address and branch, and that git can clone it here without being asked anything",
    ),
    (
        r"401 Unauthorized|403 Forbidden|Missing credentials",
        "the index wants other credentials",
        "check name and password of the index in the configuration of pip or uv on the manager",
    ),
    (
        r"dns error|error sending request|Connection refused|tcp connect error|timed out|Could not connect"
        r"|Failed to fetch|Network is unreachable",
        "the index cannot be reached",
        "check the network and the index in the configuration of pip or uv on the manager",
    ),
    (
        r"Permission denied|Read-only file system",
        "it is not allowed to write there",
        "choose another directory: EnvironmentSpec(..., cache_dir=)",
    ),
    (
        r"No interpreter found for Python (?P<package>\S+)",
        "no Python {package} was found",
        "install Python {package}, or choose another: EnvironmentSpec(..., python=)",
    ),
    (r"TOML parse error|Failed to parse|Couldn't parse", "the file or a requirement cannot be read", "fix it"),
)
_UNREACHABLE = ("the network is disabled", "the index cannot be reached")


def explained(host: str, what: str, output: str, package: str = "") -> EnvironmentBuildError:
    """Return an error for an installer that failed.

    Args:
        host: The host on which it ran.
        what: Its purpose.
        output: Its output, without secrets.
        package: The package concerned, if known.
    """
    for pattern, problem, hint in _KNOWN:
        found = re.search(pattern, output, re.IGNORECASE)
        if found:
            package = package or (found.groupdict().get("package") or "").rstrip(".:`")
            kind = IndexUnreachableError if problem in _UNREACHABLE else EnvironmentBuildError
            return kind(
                host, f"{what}: {problem.format(package=package)}", package, hint.format(package=package), output
            )
    return EnvironmentBuildError(host, f"{what} failed", package, "read its output above", output)


# --- programs of this machine ---------------------------------------------------------------------
_END_LIMIT = 5.0  # seconds
_MOST_OUTPUT = 64 * 1024 * 1024  # bytes; what a lock file of thousands of packages takes is less
_CHUNK = 64 * 1024


class CompletedProcess(NamedTuple):
    """The result of a program.

    Attributes:
        returncode: Its exit status.
        stdout: Its standard output.
        stderr: The end of its standard error.
    """

    returncode: int
    stdout: str
    stderr: str


async def run_program(
    argv: Sequence[str], env: Mapping[str, str], *, stdin: str = "", cwd: Path | None = None
) -> CompletedProcess:
    """Run a program until it ends; on cancellation its whole process group is ended.

    Args:
        argv: The program and its arguments.
        env: All its environment variables.
        stdin: Its standard input.
        cwd: Its working directory.

    Raises:
        OSError: If it cannot be run.
    """
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=cwd,
            env=env,
            start_new_session=True,  # Ctrl-C reaches the manager, which ends it
        )
    )
    try:
        process = await asyncio.shield(starting)
        output, errors, _ = await asyncio.gather(
            _end_of(process.stdout, Tail(_MOST_OUTPUT)), _end_of(process.stderr, Tail()), _feed(process.stdin, stdin)
        )
        return CompletedProcess(await process.wait(), output, errors)
    except asyncio.CancelledError:
        await _end(await starting)
        raise


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), _END_LIMIT)


async def _end_of(stream: asyncio.StreamReader | None, tail: Tail) -> str:
    assert stream is not None
    while data := await stream.read(_CHUNK):
        tail.put(data)
    return tail.text()


async def _feed(stream: asyncio.StreamWriter | None, text: str) -> None:
    assert stream is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its exit status has the reason
        stream.write(text.encode())
        await stream.drain()
    stream.close()
