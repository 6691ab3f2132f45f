"""Wheels on the manager: downloaded from an index, or built here, and cached."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import http.client
import os
import shutil
import ssl
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lazycluster.core import event_loop
from lazycluster.core.single_flight import SingleFlight
from lazycluster.exceptions import EnvironmentBuildError
from lazycluster.utils import private_directory

from .index import IndexSettings, bare, for_git
from .installed_wheels import make_wheel
from .plan import LockedPackage, Target, Wheel
from .spec import hide
from .uv import MANAGER, RETRIES, IndexUnreachableError, run_program, run_uv

__all__ = ["digest_of", "get_wheel", "is_cached", "remove_if_damaged"]

AT_ONCE = 8
"""Downloads at once."""

_TIMEOUT = 30.0  # seconds without a byte, unless UV_HTTP_TIMEOUT is set
_TRIES = 3
_CHUNK = 256 * 1024
# Directories of a project that are in none of its wheels.
_NOT_SOURCE = {".git", ".hg", ".svn", "__pycache__", ".venv", "venv", ".tox", ".nox", ".mypy_cache", ".ruff_cache"}
_NOT_SOURCE |= {".pytest_cache", ".idea", ".vscode", "node_modules", "build", "dist", ".eggs"}
_MOST_FILES = 20000

_running: SingleFlight[tuple[str, str], Wheel] = SingleFlight()
_slots: asyncio.Semaphore | None = None


# --- digests --------------------------------------------------------------------------------------
def digest_of(locked: LockedPackage) -> str:
    """Return a digest of the content of a package, without building or downloading it."""
    if locked.directory:
        return tree_digest(Path(locked.directory))
    if locked.installed:
        return locked.sha256
    parts = urlsplit(locked.url)
    if parts.scheme == "file" and not locked.sha256:
        return _file_digest(Path(unquote(parts.path)))
    return locked.sha256 or locked.vcs or bare(locked.url)


def tree_digest(directory: Path) -> str:
    """Return a digest of the files of a project.

    Raises:
        EnvironmentBuildError: If it cannot be read, or is no project.
    """
    try:
        files = list(_sources(directory))
    except OSError as error:
        raise EnvironmentBuildError(MANAGER, f"{directory} cannot be read: {error}", directory.name) from None
    if len(files) > _MOST_FILES:
        raise EnvironmentBuildError(
            MANAGER,
            f"{directory} has more than {_MOST_FILES} files: too many for a package",
            directory.name,
            "keep data outside of the directory of the package, or install the package from a wheel",
        )
    stamps = []
    for name, path in files:
        inode = path.lstat()
        stamps.append((name, str(path), inode.st_mtime_ns, inode.st_size))
    return _content_digest(tuple(stamps))


def _sources(directory: Path) -> Iterator[tuple[str, Path]]:
    if not any((directory / name).is_file() for name in ("pyproject.toml", "setup.py", "setup.cfg")):
        raise EnvironmentBuildError(
            MANAGER, f"{directory} is not a package: it has neither pyproject.toml nor setup.py", directory.name,
            "fix the path",
        )  # fmt: skip
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(
            name for name in folders if name not in _NOT_SOURCE and not name.endswith((".egg-info", ".dist-info"))
        )
        if "pyvenv.cfg" in names:
            folders[:] = []
            continue
        for name in sorted(names):
            path = Path(folder) / name
            if not name.endswith((".pyc", ".pyo", ".swp", "~")) and path.is_file():
                yield str(path.relative_to(directory)), path


@functools.lru_cache(maxsize=64)
def _content_digest(stamps: tuple[tuple[str, str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, path, _, size in stamps:
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        with contextlib.suppress(OSError):
            digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return _digest_of_file(file.fileno())
    except OSError as error:
        raise EnvironmentBuildError(MANAGER, f"{path} cannot be read: {error.strerror}", path.name) from None


def _digest_of_file(descriptor: int) -> str:
    digest = hashlib.sha256()
    while data := os.read(descriptor, _CHUNK):
        digest.update(data)
    return digest.hexdigest()


# --- the cache ------------------------------------------------------------------------------------
async def get_wheel(locked: LockedPackage, digest: str, target: Target, settings: IndexSettings) -> Wheel:
    """Return the wheel of a package: from the cache, else downloaded or built.

    Args:
        locked: The package.
        digest: Its `digest_of`.
        target: The Python and the platform.
        settings: The package index.

    Raises:
        EnvironmentBuildError: If it cannot be downloaded or built, or does not fit the target.
    """
    key = (digest, "" if locked.is_wheel else target.version)
    wheel = await _running.do(key, lambda: _get_wheel(locked, digest, target, settings))
    if not locked.is_wheel and not target.accepts(wheel.path.name):
        raise EnvironmentBuildError(
            MANAGER,
            f"{locked.label} was built on the manager as {wheel.path.name}, which does not fit {target}",
            locked.name,
            f"publish a wheel of {locked.name} for that platform, or exclude it",
        )
    return wheel


async def _get_wheel(locked: LockedPackage, digest: str, target: Target, settings: IndexSettings) -> Wheel:
    global _slots
    if _slots is None:
        _slots = asyncio.Semaphore(AT_ONCE)
    entry = _cache_entry(locked, digest, target)
    path = _wheel_in(entry)
    if path is None:
        async with _slots:
            path = await _make(locked, target, settings, entry)
    os.utime(entry)  # the time of the last use
    sha256 = locked.sha256 if locked.is_wheel and locked.sha256 else await event_loop.in_thread(_file_digest, path)
    return Wheel(locked.name, locked.version or path.name.split("-")[1], path, sha256)


def _cache_entry(locked: LockedPackage, digest: str, target: Target) -> Path:
    entry = private_directory("environments", "wheels") / hashlib.sha256(digest.encode()).hexdigest()[:32]
    return entry if locked.is_wheel else entry.with_name(f"{entry.name}-{target.version}")


def is_cached(locked: LockedPackage, target: Target) -> bool:
    """Tell whether the wheel of a package is in the cache."""
    return _wheel_in(_cache_entry(locked, digest_of(locked), target)) is not None


def _wheel_in(entry: Path) -> Path | None:
    return next(iter(entry.glob("*.whl")), None)


async def _make(locked: LockedPackage, target: Target, settings: IndexSettings, entry: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f".{entry.name[:8]}-", dir=entry.parent))
    try:
        if locked.directory:
            await _build(Path(locked.directory), locked, target, settings, folder)
        elif locked.installed:
            await event_loop.in_thread(make_wheel, locked, target, folder)
        elif locked.vcs:
            await _build_repository(locked, target, settings, folder)
        else:
            source = await event_loop.in_thread(_fetch, locked, settings, folder)
            if not locked.is_wheel:
                await _build(source, locked, target, settings, folder)
                source.unlink()
        path = _wheel_in(folder)
        if path is None:
            raise EnvironmentBuildError(MANAGER, f"building {locked.label} gave no wheel", locked.name)
        for other in [other for other in folder.iterdir() if other != path]:
            shutil.rmtree(other, ignore_errors=True) if other.is_dir() else other.unlink()
        with contextlib.suppress(OSError):  # another process was faster
            folder.rename(entry)
        return _wheel_in(entry) or path
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def remove_if_damaged(wheel: Wheel) -> bool:
    """Remove a wheel from the cache if its hash is wrong; returns whether it was."""
    if not wheel.path.is_file() or await event_loop.in_thread(_file_digest, wheel.path) == wheel.sha256:
        return False
    await event_loop.in_thread(shutil.rmtree, wheel.path.parent, True)
    return True


# --- building -------------------------------------------------------------------------------------
async def _build(source: Path, locked: LockedPackage, target: Target, settings: IndexSettings, folder: Path) -> None:
    arguments = ["build", "--wheel", "--no-create-gitignore", "--out-dir", str(folder)]
    # For the manager's own version there is always an interpreter: this one.
    python = sys.executable if target.python == sys.version_info[:2] else target.version
    arguments += ["--python", python, str(source)]
    what = f"building {locked.label}"
    try:
        await run_uv(arguments, settings, cwd=folder, env=RETRIES, what=what, package=locked.name)
        return
    except IndexUnreachableError as error:
        unreachable = error
    # The requirements of the build may be in uv's cache, or be installed here.
    for options in (["--offline"], ["--offline", "--no-build-isolation"]):
        try:
            await run_uv([*arguments, *options], settings, cwd=folder, what=what, package=locked.name)
            return
        except EnvironmentBuildError:
            continue
    raise IndexUnreachableError(
        MANAGER,
        f"{unreachable.problem}, and what building it needs is not installed here",
        locked.name,
        f"install what the build-system of {locked.name} requires here, reach the index once, or leave it out: "
        f"EnvironmentSpec(..., exclude=[{locked.name!r}])",
        unreachable.output,
    )


async def _build_repository(locked: LockedPackage, target: Target, settings: IndexSettings, folder: Path) -> None:
    kind, _, rest = locked.vcs.partition("+")
    if kind != "git":
        raise EnvironmentBuildError(
            MANAGER, f"{locked.label} comes from a {kind} repository, only git is supported", locked.name,
            f"install {locked.name} from a wheel, or exclude it",
        )  # fmt: skip
    where, _, fragment = rest.partition("#")
    url, _, commit = where.rpartition("@")
    checkout = folder / "checkout"
    env = for_git(settings.logins, os.environ)
    await _git(locked, ["clone", "--quiet", "--no-checkout", "--", url, str(checkout)], env)
    await _git(locked, ["-C", str(checkout), "checkout", "--quiet", commit, "--"], env)
    subdirectory = fragment.partition("subdirectory=")[2].partition("&")[0]
    await _build(checkout / subdirectory, locked, target, settings, folder)


async def _git(locked: LockedPackage, arguments: list[str], env: Mapping[str, str]) -> None:
    try:
        completed = await run_program(["git", *arguments], {**os.environ, "GIT_TERMINAL_PROMPT": "0", **env})
    except OSError as error:
        raise EnvironmentBuildError(
            MANAGER, f"{locked.label} comes from a repository, and git cannot be run: {error}", locked.name,
            "install git here",
        ) from error  # fmt: skip
    if completed.returncode != 0:
        # git gives the reason in the user's language, so every failure counts as unreachable.
        raise IndexUnreachableError(
            MANAGER, f"the repository of {locked.label} cannot be fetched", locked.name,
            "check that you can clone it here without being asked anything", hide(completed.stderr),
        )  # fmt: skip


# --- downloading ----------------------------------------------------------------------------------
def _fetch(locked: LockedPackage, settings: IndexSettings, folder: Path) -> Path:
    """Download a file, and check its hash; for a thread."""
    parts = urlsplit(locked.url)
    path = folder / (locked.filename or "file")
    if parts.scheme == "file":
        try:
            shutil.copyfile(unquote(parts.path), path)
        except OSError as error:
            raise EnvironmentBuildError(MANAGER, f"{locked.label}: {error}", locked.name) from None
    else:
        _download(locked, settings, path)
    if locked.sha256 and _file_digest(path) != locked.sha256:
        raise EnvironmentBuildError(
            MANAGER,
            f"the hash of {locked.label} is wrong: {bare(locked.url)} is not the file that the index lists",
            locked.name,
            "try again; if it stays like that, do not trust this index",
        )
    return path


def _download(locked: LockedPackage, settings: IndexSettings, path: Path) -> None:
    error: Exception | None = None
    if os.environ.get("UV_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        error = OSError("the network is disabled by UV_OFFLINE")
    for _ in range(0 if error else _TRIES):
        try:
            with _open(locked.url, settings) as answer, path.open("wb") as file:
                shutil.copyfileobj(answer, file, _CHUNK)
                wanted = answer.headers.get("Content-Length")
                if wanted is None or file.tell() == int(wanted):
                    return
            error = EOFError(f"only {path.stat().st_size} of {wanted} bytes came")
        except urllib.error.HTTPError as refused:
            refused.close()
            error = refused
            if refused.code < 500:
                break
        except (OSError, http.client.HTTPException) as failed:
            if path.exists() and getattr(failed, "errno", None) in (28, 122):
                raise EnvironmentBuildError(
                    MANAGER, f"{locked.label}: the disk of the manager is full", locked.name, "free some space there"
                ) from failed
            error = failed
            if isinstance(getattr(failed, "reason", failed), TimeoutError):
                break  # the time-out was long enough
    is_refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
    raise (EnvironmentBuildError if is_refused else IndexUnreachableError)(
        MANAGER,
        f"{locked.label} cannot be fetched from {urlsplit(bare(locked.url)).netloc}: {error}",
        locked.name,
        "check the network and the index in the configuration of pip or uv on the manager",
    ) from error


def _open(url: str, settings: IndexSettings) -> http.client.HTTPResponse:
    if urlsplit(url).scheme not in ("http", "https"):
        raise OSError(f"{urlsplit(url).scheme} addresses are not supported")
    request = urllib.request.Request(bare(url), headers={"User-Agent": "lazycluster"})  # noqa: S310  (checked above)
    login = settings.credentials(url)
    if login is not None:
        request.add_unredirected_header(
            "Authorization", "Basic " + base64.b64encode(":".join(login).encode()).decode("ascii")
        )
    context = _context(settings.ca_file)
    return urllib.request.urlopen(request, timeout=_timeout(), context=context)  # type: ignore[no-any-return]  # noqa: S310


def _timeout() -> float:
    try:
        return max(1.0, float(os.environ["UV_HTTP_TIMEOUT"]))
    except (KeyError, ValueError):
        return _TIMEOUT


@functools.lru_cache(maxsize=4)
def _context(ca_file: str | None) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file)
