"""Building an environment on a host, with uv."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lazycluster.agent import environment_program
from lazycluster.agent.environments import LOCK_FILE
from lazycluster.core import event_loop
from lazycluster.core.words import counted
from lazycluster.exceptions import AgentError, EnvironmentBuildError, LazyclusterError, NoAnswerError
from lazycluster.output.lines import Tail
from lazycluster.output.progress import size as shown_size
from lazycluster.ssh import transfer
from lazycluster.ssh.agent_replies import NAME, check_shape, decoded_text
from lazycluster.utils import private_directory

from .cache import prune_on
from .index import IndexSettings
from .plan import InstallPlan, LockedPackage, Target, Wheel
from .spec import EnvironmentSpec, hide, normalized
from .uv import explained, find_uv, run_uv
from .wheels import get_wheel, remove_if_damaged

if TYPE_CHECKING:
    from lazycluster.ssh.connection import Connection

__all__ = ["RUN_LIMIT", "BuildHost", "Builder"]

logger = logging.getLogger("lazycluster")

_ANSWER_LIMIT = 60.0  # seconds for a request
_SEARCH_LIMIT = 120.0  # seconds for looking through the host's directories
RUN_LIMIT = 3600.0  # seconds for a program
_ARGUMENT = 24_000  # characters of an argument
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PROGRESS = 10.0  # seconds between two lines of progress in the log


@dataclass(frozen=True)
class BuildHost:
    """A host on which an environment is built.

    Attributes:
        name: The host as the user named it.
        connection: The connection to it.
        env: The environment variables that the user's setup left.
        python: The interpreter that the user named, if it is a path.
    """

    name: str
    connection: Connection
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    python: str | None = None

    async def ask(self, action: str, within: float = _ANSWER_LIMIT, **params: Any) -> dict[str, Any]:
        """Send the agent a request about environments."""
        return await self.connection.request("environment", within=within, action=action, **params)

    async def interpreter(self, path: str) -> dict[str, Any]:
        """Return what the agent reports about an interpreter: its version and its path.

        Raises:
            AgentError: If it cannot be run.
        """
        return await self.connection.request(
            "packages", within=_ANSWER_LIMIT, python=path, env=dict(self.env), names=[]
        )

    async def run(self, argv: Sequence[str], env: Mapping[str, str], what: str) -> str:
        """Run a program there, and return the end of its output.

        Raises:
            EnvironmentBuildError: If it fails.
        """
        output = Tail()
        params = {"argv": list(argv), "cwd": "/", "env": {**self.env, **env}, "merge": True}
        channel = self.connection.channel("run", params, stdout=output.put)
        try:
            result = await self.connection.result_of(channel, f"the end of {what}", RUN_LIMIT)
        except AgentError as error:
            raise EnvironmentBuildError(self.name, f"{what}: {error.message}") from None
        except NoAnswerError:
            printed = hide(output.text())
            raise EnvironmentBuildError(self.name, f"{what} takes more than {RUN_LIMIT:g} s", output=printed) from None
        printed = hide(output.text())
        if result.get("exit") != 0:
            if result.get("signal"):
                printed += f"\nended by signal {result['signal']}"
            raise explained(self.name, what, printed)
        return printed


class Builder:
    """Finds or builds an environment on a host.

    Args:
        host: The host.
        spec: The specification of the environment.
        plan: The packages to install.
        settings: The package index.
        report: Is called with the current step, in a few words.
    """

    def __init__(
        self,
        host: BuildHost,
        spec: EnvironmentSpec,
        plan: InstallPlan,
        settings: IndexSettings,
        report: Callable[[str], Any] = lambda text: None,
    ) -> None:
        self._host, self._spec, self._plan, self._settings = host, spec, plan, settings
        self._report = report
        self._root = ""
        self._sent: list[Wheel] = []

    async def find_or_build(self) -> str:
        """Return the path of the environment on the host.

        Raises:
            EnvironmentBuildError: If it cannot be built.
        """
        params: dict[str, Any] = {"root": self._spec.cache_dir, "id": self._plan.id}
        try:
            found = await self._host.ask("find", **params)
        except AgentError as error:
            raise self._agent_failed(error) from None
        if found["found"]:
            return str(found["prefix"])
        began = time.monotonic()
        self._log(
            "building the environment %s for %s: %d packages", self._plan.id, self._spec, len(self._plan.packages)
        )
        prefix = await self._build(params)
        self._log("the environment %s is ready after %.1f s", self._plan.id, time.monotonic() - began)
        if self._spec.size_limit is not None:
            await self._prune(self._spec.size_limit)
        return prefix

    async def _prune(self, limit: int) -> None:
        self._report("removing old environments")
        try:
            removal = await prune_on(self._host.connection, limit, None, self._spec.cache_dir)
        except LazyclusterError as error:  # the environment itself can be used
            logger.warning("old environments cannot be removed: %s", error)
            return
        for name in removal.removed:
            self._log("removed the environment %s, the least recently used", name)

    def _log(self, text: str, *values: Any) -> None:
        logger.info("%s: " + text, self._host.name, *values)

    async def _build(self, params: dict[str, Any]) -> str:
        """Build it under the host's lock; the agent makes it visible when it is complete."""
        loop = asyncio.get_running_loop()
        locked: asyncio.Future[dict[str, Any]] = loop.create_future()
        waits: asyncio.Future[None] = loop.create_future()

        def on_event(event: dict[str, Any]) -> None:
            self._on_build_event(event, locked, waits)

        channel = self._host.connection.channel("environment", {"action": "build", **params}, event=on_event)
        ended = asyncio.ensure_future(channel.result())
        try:
            await self._first_of([locked, waits, ended], "its lock on the environments there", _ANSWER_LIMIT)
            await self._first_of([locked, ended], "the end of another build of this environment", RUN_LIMIT)
            if not ended.done():
                event = locked.result()
                if event["problem"] != "missing":
                    text = "%s: %s is damaged, and is built again: %s"
                    logger.warning(text, self._host.name, self._plan.id, event["problem"])
                manifest = await self._populate(event["directory"])
                channel.control(finish=manifest)
                await self._first_of([ended], "the environment to be finished", RUN_LIMIT)
            return str((await ended)["prefix"])
        except AgentError as error:
            raise self._agent_failed(error) from None
        except transfer.TransferError as error:
            raise EnvironmentBuildError(self._host.name, str(error), "", error.hint) from None
        finally:
            if not ended.done():
                channel.close()
                ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)

    def _on_build_event(
        self, event: dict[str, Any], locked: asyncio.Future[dict[str, Any]], waits: asyncio.Future[None]
    ) -> None:
        check_shape(event, {"state": str})
        if event["state"] == "waiting":
            if not waits.done():
                waits.set_result(None)
                self._report("waiting for another build")
                self._log("another process is building the same environment; waiting for it")
        elif event["state"] == "kept":
            check_shape(event, {"path": NAME})
            text = "%s: %s was in the way: it is not an environment, and is kept"
            logger.warning(text, self._host.name, event["path"])
        elif not locked.done():
            check_shape(event, {"directory": NAME, "problem": NAME})
            locked.set_result(event)

    async def _first_of(self, futures: Sequence[asyncio.Future[Any]], awaited: str, limit: float) -> None:
        done, _ = await asyncio.wait(futures, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise NoAnswerError(self._host.name, awaited, limit)

    def _agent_failed(self, error: AgentError) -> EnvironmentBuildError:
        hint = 'choose another directory: EnvironmentSpec(..., cache_dir="/path/on/the/host")'
        if error.kind == "os" and error.evidence.get("errno") in (28, 122):
            hint = "free some space there, or " + hint
        return EnvironmentBuildError(self._host.name, error.message, "", hint)

    # --- what goes into it ---------------------------------------------------------------------
    async def _populate(self, directory: str) -> dict[str, Any]:
        """Make the environment in a directory, and check it; returns its manifest."""
        self._root = directory.rpartition("/envs/")[0]
        self._report("sending uv, looking for Python")
        uv, (python, direct) = await asyncio.gather(
            _send_uv(self._host, self._plan.target, self._root, self._settings), self._survey()
        )
        env = {
            "UV_CACHE_DIR": f"{self._root}/cache",
            "UV_NO_CONFIG": "1",
            "UV_PYTHON_DOWNLOADS": "never",
            "UV_NO_PROGRESS": "1",
            "UV_LINK_MODE": "hardlink",
            "NO_COLOR": "1",
        }
        argv = [uv, "venv", "--quiet", "--allow-existing", "--relocatable", "--no-project", "--python", python]
        await self._host.run([*argv, directory], env, f"making an environment with {python}")
        if self._plan.packages:
            await self._install(uv, directory, env, direct)
        return {
            **await self._verify(directory),
            "python": python,
            "source": str(self._spec),
            "uv": (await find_uv()).version,
            "target": str(self._plan.target),
            "wheels": [wheel.folder for wheel in self._sent],
        }

    async def _survey(self) -> tuple[str, bool]:
        """Return the interpreter to use, and whether the host downloads packages itself."""
        addresses = self._servers()
        found = await self._host.ask(
            "survey",
            _SEARCH_LIMIT,
            root=self._spec.cache_dir,
            wanted=[] if self._host.python is not None else list(self._plan.target.python),
            addresses=[list(pair) for pair in addresses],
            env=dict(self._host.env),
        )
        there = next((str(one["path"]) for one in found["interpreters"]), "")
        python = await _base_interpreter(self._host, self._plan.target, self._root, self._settings, there)
        reached = bool(addresses) and set(map(tuple, found["reachable"])) == set(addresses)
        return python, reached or self._spec.network == "host"

    def _servers(self) -> list[tuple[str, int]]:
        """Return the servers that a host must reach to download packages itself; none if it is not to try."""
        if self._spec.network != "auto":
            return []
        addresses = sorted({_address(locked.url) for locked in self._plan.packages if not locked.is_local})
        # The manager's own loopback would be another machine's there.
        return [] if any(host in _LOOPBACK for host, _ in addresses) else addresses

    async def _install(self, uv: str, directory: str, env: Mapping[str, str], direct: bool) -> None:
        if direct:
            try:
                await self._install_by(uv, directory, env, direct=True)
                return
            except EnvironmentBuildError as error:
                if self._spec.network == "host":
                    raise
                self._log("cannot download packages itself; the manager sends them: %s", error.problem)
        try:
            await self._install_by(uv, directory, env, direct=False)
        except EnvironmentBuildError:
            if not await self._remove_damaged():
                raise
            await self._install_by(uv, directory, env, direct=False)

    async def _remove_damaged(self) -> bool:
        """Remove cached packages that were damaged, here or there; returns whether there were any.

        Their hashes were right when they were downloaded, so this is no reason to distrust the index.
        """
        self._report("looking for damaged packages")
        folders = [wheel.folder for wheel in self._sent]
        answer = await self._host.ask("sift", RUN_LIMIT, root=self._spec.cache_dir, folders=folders)
        here = await asyncio.gather(*(remove_if_damaged(wheel) for wheel in self._sent))
        damaged = any(here) or bool(answer["removed"])
        if damaged:
            logger.warning("%s: cached packages were damaged; they are sent again", self._host.name)
        return damaged

    async def _install_by(self, uv: str, directory: str, env: Mapping[str, str], *, direct: bool) -> None:
        wheels = await self._send_wheels(
            [
                (locked, digest)
                for locked, digest in zip(self._plan.packages, self._plan.digests, strict=True)
                if not direct or locked.is_local
            ]
        )
        self._sent = list(wheels.values())
        lock_file = f"{directory}/{LOCK_FILE}"
        await self._write(self._plan.pylock(wheels, f"{self._root}/wheels"), lock_file)
        what = f"installing {counted(len(self._plan.packages), 'package')}"
        self._report(what)
        argv = [uv, "pip", "install", "--quiet", "--no-deps", "--python", f"{directory}/bin/python", "-r", lock_file]
        if direct:
            # Credentials are in the environment of this one process.
            env = {**env, **self._direct_env()}
            self._log("downloads %d packages itself", len(self._plan.packages) - len(wheels))
        else:
            argv += ["--offline", "--no-index"]
        await self._host.run(argv, env, what)

    async def _write(self, text: str, path: str) -> None:
        # In parts: no system takes an argument of any length.
        for start in range(0, len(text), _ARGUMENT):
            script = f'umask 077; printf "%s" "$1" {">>" if start else ">"} "$2"'
            argv = ["/bin/sh", "-c", script, "sh", text[start : start + _ARGUMENT], path]
            await self._host.run(argv, {}, "writing the list of packages")

    def _direct_env(self) -> dict[str, str]:
        remote = [url for url in self._settings.urls if urlsplit(url).scheme in ("http", "https")]
        env = {"UV_SYSTEM_CERTS": "1"}
        if self._spec.network == "auto":
            env["UV_HTTP_RETRIES"] = "1"  # if this fails, the manager sends them
        if remote:
            env["UV_INDEX"] = " ".join(remote)
        return env

    # --- packages that the manager sends -------------------------------------------------------
    async def _send_wheels(self, packages: Sequence[tuple[LockedPackage, str]]) -> dict[str, Wheel]:
        """Send packages with the given digests, each as soon as its wheel is here; returns the wheels by name."""
        progress = _TransferProgress(self._host.name, len(packages), self._report)
        wheels: dict[str, Wheel] = {}

        async def send(locked: LockedPackage, digest: str) -> None:
            wheel = await get_wheel(locked, digest, self._plan.target, self._settings)
            size = wheel.path.stat().st_size
            asked = [[wheel.folder, wheel.path.name, size]]
            answer = await self._host.ask("wheels", root=self._spec.cache_dir, wheels=asked)
            if answer["missing"]:
                target = f"{answer['directory']}/{wheel.folder}/{wheel.path.name}"
                sent = functools.partial(progress.sent, wheel.folder)
                await transfer.send(self._host.connection, wheel.path, target, cwd="", env={}, progress=sent)
            wheels[locked.name] = wheel
            progress.advance()

        await event_loop.together([asyncio.ensure_future(send(locked, digest)) for locked, digest in packages])
        return wheels

    async def _verify(self, directory: str) -> dict[str, Any]:
        """Check that the interpreter runs and all packages are installed; returns what is installed."""
        self._report("checking")
        argv = environment_program.command(f"{directory}/bin/python", "check", directory)
        text = await self._host.run(argv, {}, f"running {directory}/bin/python")
        try:
            found: dict[str, Any] = decoded_text(text.splitlines()[-1])
            check_shape(found, {"packages": {...: str}, "size": range(2**63)})
        except (ValueError, IndexError):
            raise EnvironmentBuildError(
                self._host.name, f"{argv[0]} does not say what is installed", "", "read its output above", text
            ) from None
        there = {normalized(name) for name in found["packages"]}
        missing = sorted({locked.name for locked in self._plan.packages if normalized(locked.name) not in there})
        if missing:
            names = ", ".join(missing)
            raise EnvironmentBuildError(
                self._host.name, f"the installer reported success, but these packages are not there: {names}", names,
                "remove the cache directory on the host, and try again",
            )  # fmt: skip
        return found


class _TransferProgress:
    """The number of packages that are on the host, and the bytes that were sent for it."""

    def __init__(self, host: str, total: int, report: Callable[[str], Any]) -> None:
        self._host, self._total, self._report = host, total, report
        self._done = 0
        self._bytes: dict[str, int] = {}
        self._logged = time.monotonic()
        self._show()

    def sent(self, name: str, done: int, total: int | None, files: int) -> None:
        """Count bytes of a package; from any thread."""
        self._bytes[name] = done
        self._show()

    def advance(self) -> None:
        """Count a package that is on the host."""
        self._done += 1
        self._show()
        if time.monotonic() - self._logged > _PROGRESS or (self._done == self._total and self._bytes):
            self._logged = time.monotonic()
            text = "%s: %d of %d packages are there, %s were sent"
            logger.info(text, self._host, self._done, self._total, self._sent)

    @property
    def _sent(self) -> str:
        return shown_size(sum(list(self._bytes.values())))

    def _show(self) -> None:
        sent = f", {self._sent} sent" if self._bytes else ""
        self._report(f"{self._done} of {self._total} packages{sent}")


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)


# --- the interpreter ------------------------------------------------------------------------------
async def _base_interpreter(host: BuildHost, target: Target, root: str, settings: IndexSettings, found: str) -> str:
    """Return the path of an interpreter of the wanted minor version on a host.

    Args:
        host: The host.
        target: The Python and the platform.
        root: The directory of environments there.
        settings: The package index.
        found: One that the host has; empty if it has none.

    Raises:
        EnvironmentBuildError: If the host has none, and none can be sent.
    """
    if host.python is not None:
        return await _checked(host, target, host.python)
    if found:
        return found
    logger.info("%s: has no Python %s; downloading one", host.name, target.version)
    try:
        return await _send_python(host, target, root, settings)
    except EnvironmentBuildError as error:
        raise await _no_interpreter(host, target, error) from error


async def _checked(host: BuildHost, target: Target, python: str) -> str:
    try:
        answer = await host.interpreter(python)
    except AgentError as error:
        raise EnvironmentBuildError(host.name, error.message, "", 'name a Python that is there: python="..."') from None
    if tuple(answer["version"][:2]) != target.python:
        version = ".".join(map(str, answer["version"]))
        raise EnvironmentBuildError(
            host.name,
            f"{python} is Python {version}, but the environment is for {target.version}",
            "python",
            f'name a Python {target.version} with python=, or choose EnvironmentSpec(..., python="{version[:4]}")',
        )
    return str(answer["executable"])


async def _send_python(host: BuildHost, target: Target, root: str, settings: IndexSettings) -> str:
    """Download an interpreter for the host's platform with uv, and send it."""
    system = {"linux": "linux", "darwin": "macos"}.get(target.system, target.system)
    libc = {"glibc": "gnu", "musl": "musl"}.get(target.libc, "none")
    name = f"cpython-{target.version}-{system}-{target.machine}-{libc}"
    store = private_directory("environments", "python") / name
    arguments = ["python", "install", "--no-bin", "--install-dir", str(store), name]
    await run_uv(arguments, settings, what=f"fetching Python {target.version}")
    folder = next((path for path in sorted(store.glob("cpython-*")) if path.is_dir() and not path.is_symlink()), None)
    if folder is None:
        raise EnvironmentBuildError(host.name, f"uv fetched no Python {target.version}", "python")
    path = f"{root}/python/{folder.name}"
    await transfer.send(host.connection, folder, path, cwd="", env={})
    return f"{path}/bin/python{target.version}"


async def _no_interpreter(host: BuildHost, target: Target, error: EnvironmentBuildError) -> EnvironmentBuildError:
    answer = await host.connection.request("interpreters", within=_SEARCH_LIMIT, env=dict(host.env))
    found = answer["interpreters"]
    have = ", ".join(f"{'.'.join(map(str, one['version']))} ({one['path']})" for one in found) or "none"
    return EnvironmentBuildError(
        host.name,
        f"no Python {target.version} was found; the host has: {have}. It cannot be fetched, either: {error.problem}",
        "python",
        f"install Python {target.version} there, name its path with python=, or use another version: "
        'EnvironmentSpec(..., python="3.x")',
        error.output,
    )


# --- uv -------------------------------------------------------------------------------------------
async def _send_uv(host: BuildHost, target: Target, root: str, settings: IndexSettings) -> str:
    """Return the path of uv on a host, in the manager's version; it is sent if it is not there.

    The manager's own program serves where it runs there, else the one for the host's platform.

    Raises:
        EnvironmentBuildError: If there is none for the host's platform.
    """
    here, version = await find_uv()
    path = f"{root}/uv/{version}/uv"
    if target.system == sys.platform and target.machine == os.uname().machine:
        sent = await transfer.send(host.connection, here, path, cwd="", env={})
        if sent.skipped:  # it has run there before
            return path
        try:
            await host.run([path, "--version"], {}, f"running {path}")
            return path
        except EnvironmentBuildError as error:
            await host.connection.request("remove", path=path)
            if "Permission denied" in error.output or target.system != "linux":
                raise
    path = f"{root}/uv/{version}-static/uv"
    await transfer.send(host.connection, await _download_uv(version, target, settings), path, cwd="", env={})
    await host.run([path, "--version"], {}, f"running {path}")
    return path


async def _download_uv(version: str, target: Target, settings: IndexSettings) -> Path:
    """Return uv for another platform: on Linux the one that needs no libraries."""
    platform = target.platform if target.system != "linux" else f"{target.machine}-unknown-linux-musl"
    store = private_directory("environments", "uv", f"{version}-{platform}")
    binary = store / "bin" / "uv"
    if not binary.is_file():
        arguments = ["pip", "install", "--quiet", "--no-deps", "--target", str(store), "--python-platform", platform]
        await run_uv([*arguments, f"uv=={version}"], settings, what=f"fetching uv for {platform}")
    return binary
