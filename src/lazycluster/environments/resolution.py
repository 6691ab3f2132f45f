"""Resolution of requirements to packages in fixed versions, by uv; the result is cached on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lazycluster.core import event_loop, toml
from lazycluster.core.single_flight import SingleFlight
from lazycluster.exceptions import EnvironmentBuildError
from lazycluster.utils import absolute, private_directory

from . import installed_packages
from .index import (
    NO_PROMPTS,
    Credential,
    IndexSettings,
    bare,
    expand_variables,
    for_git,
    logins_in,
    plain,
    read_settings,
)
from .installed_wheels import RepackError, installed_digest, read_installed
from .plan import LockedPackage, Target
from .spec import EnvironmentSpec, normalized
from .uv import MANAGER, RETRIES, run_program, run_uv
from .wheels import is_cached

__all__ = ["resolve", "resolve_installed", "settings_for", "with_passwords"]

_HASH = re.compile(r"--hash[= ]sha256:([0-9a-f]{64})")
_PINNED = re.compile(r"^\s*([A-Za-z0-9][\w.-]*)\s*(?:\[[^]]*\])?\s*==\s*([^\s;\\]+)")
_INCLUDE = re.compile(r"^\s*(?:-r|-c|--requirement|--constraint)[ =]\s*(\S+)", re.MULTILINE)
_PROJECT_FILES = ("pyproject.toml", "setup.py", "setup.cfg")
_FORMAT = 1

_running: SingleFlight[str, list[LockedPackage]] = SingleFlight()
_running_installed: SingleFlight[str, list[LockedPackage]] = SingleFlight()


@dataclass
class _ResolverInput:
    """The input of uv's resolver.

    Attributes:
        lines: Requirements for its standard input; or
        file: a file that it reads.
        folder: The directory for relative paths.
        dependencies: True to resolve the dependencies of the requirements, too.
        known: Packages that need no resolution.
        inputs: Files on which the result depends.
        hashes: The hashes that the user's file allows, by name and version.
        options: Further options.
    """

    lines: list[str] = field(default_factory=list)
    file: Path | None = None
    folder: Path = field(default_factory=lambda: absolute("."))
    dependencies: bool = True
    known: list[LockedPackage] = field(default_factory=list)
    inputs: list[Path] = field(default_factory=list)
    hashes: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)


async def resolve(
    spec: EnvironmentSpec, target: Target, settings: IndexSettings, refresh: bool = False
) -> list[LockedPackage]:
    """Return the packages of an environment.

    The result is cached until the source or the settings change, so that all hosts get the same, today and tomorrow.

    Args:
        spec: The specification of the environment.
        target: The Python and the platform.
        settings: The package index.
        refresh: Ignore the cache.

    Raises:
        EnvironmentBuildError: If there is no solution; names the package where one is concerned.
    """
    wanted = await _resolver_input(spec, settings)
    cache = _cache_file(wanted, target, settings)
    known = None if refresh else _read_cache(cache)
    if known is None:
        known = await _running.do(cache.stem, lambda: _compile(spec, wanted, target, settings, cache))
    unwanted = {normalized(name) for name in spec.exclude or ()}
    everything = {normalized(locked.name): locked for locked in [*known, *wanted.known]}
    return [locked for name, locked in sorted(everything.items()) if name not in unwanted]


async def resolve_installed(spec: EnvironmentSpec, target: Target, settings: IndexSettings) -> list[LockedPackage]:
    """Return the packages of the manager's environment without using the index.

    Packages that were downloaded or built before come from the cache, others from the files that are installed.

    Raises:
        EnvironmentBuildError: If that is impossible for a package; names them all, with the reasons.
    """
    key = repr((spec, target, settings.stamp))
    return await _running_installed.do(key, lambda: _resolve_installed(spec, target, settings))


async def _resolve_installed(spec: EnvironmentSpec, target: Target, settings: IndexSettings) -> list[LockedPackage]:
    known = await _cached_packages(spec, target, settings)
    return await event_loop.in_thread(_cached_or_installed, spec, target, known)


def _cached_or_installed(
    spec: EnvironmentSpec, target: Target, known: Mapping[str, LockedPackage]
) -> list[LockedPackage]:
    """Return each package from the cache, else from what is installed; for a thread."""
    found, problems = [], {}
    for one in installed_packages.requirements(spec.exclude):
        if normalized(one.name) in known:
            found.append(known[normalized(one.name)])
        elif one.is_directory:
            found.append(_from_directory(one))
        else:
            try:
                digest = installed_digest(read_installed(Path(one.path), target))
            except RepackError as error:
                problems[one.name] = str(error)
                continue
            found.append(LockedPackage(one.name, one.version, sha256=digest, installed=one.path))
    if problems:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in problems.items())
        raise EnvironmentBuildError(
            MANAGER,
            f"the index cannot be reached, and not all packages can be taken from what is installed here: {reasons}",
            next(iter(problems)) if len(problems) == 1 else "",
            "use it once while the index can be reached, or leave them out: "
            f"EnvironmentSpec(..., exclude={sorted(problems)})",
        )
    return sorted(found, key=lambda locked: normalized(locked.name))


async def _cached_packages(spec: EnvironmentSpec, target: Target, settings: IndexSettings) -> dict[str, LockedPackage]:
    """Return by name the packages whose wheels from the index are cached here."""
    wanted = _from_manager(spec)
    cache = _cache_file(wanted, target, settings)
    packages = _read_cache(cache)
    if packages is None:
        try:
            packages = await _compile(spec, replace(wanted, options=["--offline"]), target, settings, cache)
        except EnvironmentBuildError:
            packages = []
    everything = [*packages, *(locked for locked in wanted.known if not locked.directory)]
    return {normalized(locked.name): locked for locked in everything if is_cached(locked, target)}


# --- what is resolved -----------------------------------------------------------------------------
async def _resolver_input(spec: EnvironmentSpec, settings: IndexSettings) -> _ResolverInput:
    if spec.kind == "manager":
        return _from_manager(spec)
    if spec.kind == "requirements":
        for line in spec.requirements:
            _check_project(Path(line) / "pyproject.toml")
        return _ResolverInput(lines=[plain(line) for line in spec.requirements])
    if spec.file_kind == "uv.lock":
        return await _from_uv_lock(spec, settings)
    if spec.file_kind == "pylock.toml":
        return _from_pylock(_read_toml(spec.file), spec.file)
    if spec.file_kind == "pyproject.toml":
        return _from_project(spec)
    return _from_requirements(spec.file)


def _from_requirements(file: Path) -> _ResolverInput:
    files = list(_included(file))
    for path in files[1:]:
        _check_logins(path, expand_variables(_read(path)))
    wanted = _ResolverInput(folder=file.parent, inputs=files, hashes=_hashes(_read(path) for path in files))
    text = _read(file) if file.is_file() else ""
    if plain(text) == text:
        wanted.file = file
    else:
        wanted.lines = plain(text).splitlines()
    return wanted


def _from_manager(spec: EnvironmentSpec) -> _ResolverInput:
    wanted = _ResolverInput(dependencies=False)
    for one in installed_packages.requirements(spec.exclude):
        if not one.origin:
            wanted.lines.append(f"{one.name}=={one.version}")
        elif one.is_directory:
            wanted.known.append(_from_directory(one))
        elif one.origin.startswith(("git+", "hg+", "svn+", "bzr+")):
            wanted.known.append(LockedPackage(one.name, one.version, vcs=one.origin))
        else:
            wanted.known.append(LockedPackage(one.name, one.version, url=one.origin))
    return wanted


def _from_directory(one: installed_packages.InstalledPackage) -> LockedPackage:
    if not Path(one.origin).is_dir():
        raise EnvironmentBuildError(
            MANAGER,
            f"{one.name} was installed from {one.origin}, which does not exist any more",
            one.name,
            f"reinstall it, or leave it out: EnvironmentSpec(..., exclude=[{one.name!r}])",
        )
    return LockedPackage(one.name, directory=one.origin)


def _from_project(spec: EnvironmentSpec) -> _ResolverInput:
    options = [option for extra in spec.extras for option in ("--extra", extra)]
    options += [option for group in spec.groups for option in ("--group", f"{spec.file}:{group}")]
    wanted = _ResolverInput(file=spec.file, folder=spec.file.parent, inputs=[spec.file], options=options)
    _check_project(spec.file)
    project = _read_toml(spec.file)
    if "build-system" in project:  # else it is a list of requirements, and no package
        name = project.get("project", {}).get("name") or spec.file.parent.name
        wanted.known.append(LockedPackage(str(name), directory=str(spec.file.parent)))
    return wanted


async def _from_uv_lock(spec: EnvironmentSpec, settings: IndexSettings) -> _ResolverInput:
    arguments = ["export", "--frozen", "--quiet", "--no-header", "--no-dev", "--no-editable"]
    arguments += ["--format", "pylock.toml", "--directory", str(spec.file.parent)]
    arguments += [option for extra in spec.extras for option in ("--extra", extra)]
    arguments += [option for group in spec.groups for option in ("--group", group)]
    text = await run_uv(arguments, settings, what=f"reading {spec.file}")
    return _from_pylock(toml.loads(text), spec.file)


def _from_pylock(lock: Mapping[str, Any], file: Path) -> _ResolverInput:
    wanted = _ResolverInput(dependencies=False, inputs=[file])
    for package in lock.get("packages", []):
        name, version = str(package["name"]), str(package.get("version", ""))
        marker = f" ; {package['marker']}" if package.get("marker") else ""
        if any(key in package for key in ("directory", "vcs", "archive")):
            locked = _locked_package(package, file.parent)
            if marker:  # uv tells whether it holds for the target
                source = Path(locked.directory).as_uri() if locked.directory else locked.vcs or locked.url
                wanted.lines.append(f"{name} @ {source}{marker}")
            else:
                wanted.known.append(locked)
            continue
        wanted.lines.append(f"{name}=={version}{marker}")
        files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
        hashes = {entry["hashes"]["sha256"] for entry in files if "sha256" in entry.get("hashes", {})}
        if hashes:
            wanted.hashes[normalized(name), version] = hashes
    return wanted


# --- credentials ----------------------------------------------------------------------------------
async def settings_for(spec: EnvironmentSpec) -> IndexSettings:
    """Return the settings of the index, with the credentials of addresses that the requirements name."""
    text = "\n".join(spec.requirements)
    if spec.kind == "file":
        text = "\n".join(_read(path) for path in _included(spec.file))
    logins = await with_passwords(logins_in(expand_variables(text)))
    return replace(read_settings(), logins=logins)


async def with_passwords(logins: Iterable[Credential]) -> tuple[Credential, ...]:
    """Return credentials with the passwords that `git credential` knows, where an address has a user name only."""
    return tuple([await _with_password(login) if login.password is None else login for login in logins])


async def _with_password(login: Credential) -> Credential:
    wanted = f"url={login.address}\nusername={login.user}\n\n"
    try:
        answer = await run_program(["git", "credential", "fill"], {**os.environ, **NO_PROMPTS}, stdin=wanted)
    except OSError:  # who needs it says so
        return login
    lines = dict(line.partition("=")[::2] for line in answer.stdout.splitlines())
    return replace(login, password=lines["password"]) if answer.returncode == 0 and lines.get("password") else login


def _check_project(file: Path) -> None:
    if not _is_file(file):
        return
    sources = _read_toml(file).get("tool", {}).get("uv", {}).get("sources", {}).values()
    tables = [one for source in sources for one in (source if isinstance(source, list) else [source])]
    _check_logins(file, "\n".join([_read(file), *(f"git+{one['git']}" for one in tables if "git" in one)]))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a requirement need not be a name that a file can have
        return False


def _check_logins(file: Path, text: str) -> None:
    """Refuse a file that uv reads itself and that has a password for git: uv would put it into git's command line."""
    for login in logins_in(text, git_only=True):
        if login.is_secret:
            raise EnvironmentBuildError(
                MANAGER,
                f"{file} has credentials in the address of {login.address}: they would be in the command line of git",
                "",
                "take them out of the address, and tell them to git (git credential approve, or ~/.netrc); or name "
                "this requirement in the list or requirements.txt that environment= is given, where they are safe",
            )


# --- files ----------------------------------------------------------------------------------------
def _included(file: Path) -> Iterable[Path]:
    """Yield a requirements file and those that it includes."""
    seen: set[Path] = set()
    queue = [file]
    while queue:
        path = queue.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        yield path
        queue += [path.parent / name for name in _INCLUDE.findall(_read(path)) if "://" not in name]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EnvironmentBuildError(MANAGER, f"{path} cannot be read: {error}", "", "check the file") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return toml.loads(_read(path))
    except toml.TOMLDecodeError as error:
        raise EnvironmentBuildError(MANAGER, f"{path} is not a TOML file: {error}", "", "fix the file") from None


def _hashes(texts: Iterable[str]) -> dict[tuple[str, str], set[str]]:
    found: dict[tuple[str, str], set[str]] = {}
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            pinned, hashes = _PINNED.match(line), _HASH.findall(line)
            if pinned and hashes:
                found.setdefault((normalized(pinned[1]), pinned[2]), set()).update(hashes)
    return found


# --- resolving ------------------------------------------------------------------------------------
async def _compile(
    spec: EnvironmentSpec, wanted: _ResolverInput, target: Target, settings: IndexSettings, cache: Path
) -> list[LockedPackage]:
    if not wanted.lines and wanted.file is None:
        return []
    arguments = ["pip", "compile", "--quiet", "--no-header", "--format", "pylock.toml"]
    arguments += ["--python-version", target.version, "--python-platform", target.platform, *wanted.options]
    arguments += [] if wanted.dependencies else ["--no-deps"]
    # For packages that must be built to know their dependencies, in an environment of their own.
    arguments += ["--python", sys.executable]
    arguments.append(str(wanted.file) if wanted.file is not None else "-")
    text = await run_uv(
        arguments,
        settings,
        stdin="\n".join(wanted.lines) + "\n",
        cwd=wanted.folder,
        env={**for_git(settings.logins, os.environ), **(RETRIES if spec.kind == "manager" else {})},
        what=f"resolving {spec} for {target}",
    )
    packages = toml.loads(text).get("packages", [])
    found = [_locked_package(package, wanted.folder) for package in packages]
    _check_hashes(found, wanted.hashes)
    inputs = [*wanted.inputs]
    for locked in found:
        inputs += [Path(locked.directory) / name for name in _PROJECT_FILES] if locked.directory else []
    content = {"inputs": [[str(path), *_stat(path)] for path in inputs], "packages": [one.to_json() for one in found]}
    partial = cache.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(cache)
    return found


def _locked_package(package: Mapping[str, Any], base: Path) -> LockedPackage:
    name, version = str(package["name"]), str(package.get("version", ""))
    if "directory" in package:
        return LockedPackage(name, directory=str((base / package["directory"]["path"]).resolve()))
    if "vcs" in package:
        vcs = package["vcs"]
        where = _repository(vcs["url"]) if vcs.get("url") else (base / vcs["path"]).resolve().as_uri()
        folder = f"#subdirectory={vcs['subdirectory']}" if vcs.get("subdirectory") else ""
        return LockedPackage(name, version, vcs=f"{vcs['type']}+{where}@{vcs['commit-id']}{folder}")
    entries = [package["archive"]] if "archive" in package else [*package.get("wheels", [])]
    if not entries and "sdist" in package:
        entries = [package["sdist"]]
    if not entries:
        raise EnvironmentBuildError(
            MANAGER,
            f"{name} {version} has no file that fits",
            name,
            f"choose another version of {name}, or leave it out: EnvironmentSpec(..., exclude=[{name!r}])",
        )
    best = max(entries, key=lambda entry: _rank(_url_of(entry, base)))
    return LockedPackage(name, version, url=_url_of(best, base), sha256=best.get("hashes", {}).get("sha256", ""))


def _repository(url: str) -> str:
    # The name of an address for ssh is part of it.
    return bare(url) if urlsplit(url).scheme in ("http", "https") else url


def _url_of(entry: Mapping[str, Any], base: Path) -> str:
    if "url" in entry:
        return bare(str(entry["url"]))
    return (base / unquote(str(entry["path"]))).resolve().as_uri()


def _rank(url: str) -> tuple[bool, bool, str]:
    """Prefer wheels for this very Python, then those for the newest system."""
    tags = urlsplit(url).path.rpartition("/")[2].removesuffix(".whl").split("-")[-3:]
    return url.endswith(".whl"), "cp" in tags[min(1, len(tags) - 1)], tags[-1]


def _check_hashes(found: Iterable[LockedPackage], hashes: Mapping[tuple[str, str], set[str]]) -> None:
    for locked in found:
        allowed = hashes.get((normalized(locked.name), locked.version))
        if allowed and locked.sha256 and locked.sha256 not in allowed:
            raise EnvironmentBuildError(
                MANAGER,
                f"the hash of {locked.label} is wrong: the index has a file that was not locked",
                locked.name,
                "if it was published again, update the lock; else do not trust this index",
            )


# --- the cache ------------------------------------------------------------------------------------
def _cache_file(wanted: _ResolverInput, target: Target, settings: IndexSettings) -> Path:
    return private_directory("environments", "resolved") / f"{_key(wanted, target, settings)}.json"


def _key(wanted: _ResolverInput, target: Target, settings: IndexSettings) -> str:
    file = wanted.file
    content = [
        _FORMAT,
        wanted.lines,
        str(file) if file is not None else "",
        [[str(path), hashlib.sha256(_read(path).encode()).hexdigest()] for path in wanted.inputs if path.is_file()],
        wanted.dependencies,
        wanted.options,
        target.version,
        target.platform,
        settings.stamp,
        # Relative paths mean something else elsewhere.
        str(wanted.folder) if any(shlex.quote(line)[0] in "./-'" or "/" in line for line in wanted.lines) else "",
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _stat(path: Path) -> list[int]:
    try:
        inode = path.stat()
    except OSError:
        return [0, 0]
    return [inode.st_mtime_ns, inode.st_size]


def _read_cache(cache: Path) -> list[LockedPackage] | None:
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
        if all(_stat(Path(path)) == stamp for path, *stamp in content["inputs"]):
            return [LockedPackage(**package) for package in content["packages"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None
