"""An environment on one host: found there, or made."""

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
from lazycluster.output.progress import size as shown_size
from lazycluster.output.tail import Tail
from lazycluster.ssh import transfer
from lazycluster.ssh.agent_replies import NAME, check_shape, decoded_text
from lazycluster.utils import private_directory

from .cache import prune_on
from .index import IndexSettings, hide
from .plan import InstallPlan, Target, Wheel
from .spec import EnvironmentSpec, normalized
from .uv import explained, find_uv, run_uv
from .wheels import forget_damaged, provide

if TYPE_CHECKING:
    from lazycluster.ssh.connection import Connection

__all__ = ["ANSWER_LIMIT", "RUN_LIMIT", "BuildHost", "Builder", "base_interpreter", "send_uv"]

logger = logging.getLogger("lazycluster")

_SURVEY_LIMIT = 120.0  # seconds for looking through the host's directories
_ARGUMENT = 24_000  # characters of an argument
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PROGRESS = 10.0  # seconds between two lines that say how far it is


class Builder:
    """Makes an environment on a host.

    Args:
        place: The host.
        spec: What the user asked for.
        plan: What that is.
        settings: Where packages come from.
        tell: Is called with how far it is, in a few words.
    """

    def __init__(
        self,
        place: BuildHost,
        spec: EnvironmentSpec,
        plan: InstallPlan,
        settings: IndexSettings,
        tell: Callable[[str], Any] = lambda text: None,
    ) -> None:
        self._place, self._spec, self._plan, self._settings = place, spec, plan, settings
        self._tell = tell
        self._host = place.host
        self._root = ""
        self._sent: list[Wheel] = []  # packages that came from the manager
        self._began = time.monotonic()

    async def find_or_make(self) -> str:
        """Return the path of the environment on the host.

        Raises:
            EnvironmentBuildError: If it cannot be made.
        """
        params: dict[str, Any] = {"root": self._spec.cache_dir, "id": self._plan.id}
        try:
            found = await self._place.ask("find", **params)
        except AgentError as error:
            raise self._refused(error) from None
        if found["found"]:
            return str(found["prefix"])
        self._say("making the environment %s for %s: %d packages", self._plan.id, self._spec, len(self._plan.packages))
        prefix = await self._make(params)
        self._say("the environment %s is there after %.1f s", self._plan.id, time.monotonic() - self._began)
        if self._spec.size_limit is not None:
            await self._make_room(self._spec.size_limit)
        return prefix

    async def _make_room(self, limit: int) -> None:
        self._tell("removing old environments")
        try:
            removal = await prune_on(self._place.connection, limit, None, self._spec.cache_dir)
        except LazyclusterError as error:  # what was asked for is there all the same
            logger.warning("old environments cannot be removed: %s", error)
            return
        for name in removal.removed:
            self._say("removed the environment %s, which was not used for longest", name)

    def _say(self, text: str, *values: Any) -> None:
        logger.info("%s: " + text, self._host, *values)

    async def _make(self, params: dict[str, Any]) -> str:
        """Make it under the host's lock; whatever interrupts this leaves nothing that could be taken for complete."""
        loop = asyncio.get_running_loop()
        began: asyncio.Future[dict[str, Any]] = loop.create_future()
        waits: asyncio.Future[None] = loop.create_future()

        def on_event(event: dict[str, Any]) -> None:
            self._on_build_event(event, began, waits)

        channel = self._place.connection.channel("environment", {"action": "build", **params}, event=on_event)
        ended = asyncio.ensure_future(channel.result())
        try:
            await self._first_of([began, waits, ended], "its lock on the environments there", ANSWER_LIMIT)
            await self._first_of([began, ended], "the end of what somebody else makes there", RUN_LIMIT)
            if not ended.done():
                event = began.result()
                if event["problem"] != "missing":
                    logger.warning("%s: %s is damaged, and made anew: %s", self._host, self._plan.id, event["problem"])
                manifest = await self._fill(event["directory"])
                channel.control(finish=manifest)
                await self._first_of([ended], "the environment to be finished", RUN_LIMIT)
            return str((await ended)["prefix"])
        except AgentError as error:
            raise self._refused(error) from None
        except transfer.TransferError as error:
            raise EnvironmentBuildError(self._host, str(error), "", error.hint) from None
        finally:
            if not ended.done():
                channel.close()
                ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)

    def _on_build_event(
        self, event: dict[str, Any], began: asyncio.Future[dict[str, Any]], waits: asyncio.Future[None]
    ) -> None:
        check_shape(event, {"state": str})
        if event["state"] == "waiting":
            if not waits.done():
                waits.set_result(None)
                self._tell("somebody else makes the same")
                self._say("somebody else makes the same environment; waiting")
        elif event["state"] == "kept":
            check_shape(event, {"path": NAME})
            logger.warning("%s: %s was in the way: it is no environment, and is kept", self._host, event["path"])
        elif not began.done():
            check_shape(event, {"directory": NAME, "problem": NAME})
            began.set_result(event)

    async def _first_of(self, futures: Sequence[asyncio.Future[Any]], awaited: str, limit: float) -> None:
        done, _ = await asyncio.wait(futures, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise NoAnswerError(self._host, awaited, limit)

    def _refused(self, error: AgentError) -> EnvironmentBuildError:
        hint = 'choose another directory: EnvironmentSpec(..., cache_dir="/path/on/the/host")'
        if error.kind == "os" and error.evidence.get("errno") in (28, 122):
            hint = "free some space there, or " + hint
        return EnvironmentBuildError(self._host, error.message, "", hint)

    # --- what goes into it ---------------------------------------------------------------------
    async def _fill(self, directory: str) -> dict[str, Any]:
        """Make the environment in a directory, and check it; returns what is to be said of it."""
        self._root = directory.rpartition("/envs/")[0]
        self._tell("sending uv, looking for Python")
        uv, (python, direct) = await asyncio.gather(
            send_uv(self._place, self._plan.target, self._root, self._settings), self._survey()
        )
        env = {
            "UV_CACHE_DIR": f"{self._root}/cache",
            "UV_NO_CONFIG": "1",
            "UV_PYTHON_DOWNLOADS": "never",
            "UV_NO_PROGRESS": "1",
            "UV_LINK_MODE": "hardlink",
            "NO_COLOR": "1",
        }
        argv = [
            uv,
            "venv",
            "--quiet",
            "--allow-existing",
            "--relocatable",
            "--no-project",
            "--python",
            python,
            directory,
        ]
        await self._place.run(argv, env, f"making an environment with {python}")
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
        """Return the interpreter that it is made with, and whether the host gets packages by itself."""
        addresses = self._to_be_reached()
        found = await self._place.ask(
            "survey",
            _SURVEY_LIMIT,
            root=self._spec.cache_dir,
            wanted=[] if self._place.python is not None else list(self._plan.target.python),
            addresses=[list(pair) for pair in addresses],
            env=dict(self._place.env),
        )
        there = next((str(one["path"]) for one in found["interpreters"]), "")
        python = await base_interpreter(self._place, self._plan.target, self._root, self._settings, there)
        reached = bool(addresses) and set(map(tuple, found["reachable"])) == set(addresses)
        return python, reached or self._spec.network == "host"

    def _to_be_reached(self) -> list[tuple[str, int]]:
        """Return what a host must reach so that it can get packages by itself; nothing if it is not to."""
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
                self._say("cannot get packages by itself; the manager sends them: %s", error.problem)
        try:
            await self._install_by(uv, directory, env, direct=False)
        except EnvironmentBuildError:
            if not await self._sift():
                raise
            await self._install_by(uv, directory, env, direct=False)

    async def _sift(self) -> bool:
        """Remove kept packages that were damaged, here or there; returns whether there were any.

        Their hashes were right when they came, so this is no reason to distrust the index.
        """
        self._tell("looking for damaged packages")
        folders = [wheel.folder for wheel in self._sent]
        told = await self._place.ask("sift", RUN_LIMIT, root=self._spec.cache_dir, folders=folders)
        damaged = any(await asyncio.gather(*(forget_damaged(wheel) for wheel in self._sent))) or told["removed"]
        if damaged:
            logger.warning("%s: packages that were kept have been damaged; they are sent again", self._host)
        return bool(damaged)

    async def _install_by(self, uv: str, directory: str, env: Mapping[str, str], *, direct: bool) -> None:
        wheels = await self._send_wheels([not direct or locked.is_local for locked in self._plan.packages])
        self._sent = list(wheels.values())
        lock = pylock(self._plan, wheels, f"{self._root}/wheels")
        where = f"{directory}/{LOCK_FILE}"
        await self._write(lock, where)
        self._tell(f"installing {counted(len(self._plan.packages), 'package')}")
        argv = [uv, "pip", "install", "--quiet", "--no-deps", "--python", f"{directory}/bin/python", "-r", where]
        if direct:
            # What may be secret is in the environment of this one process.
            env = {**env, **self._direct_env()}
            self._say("gets %d packages by itself", len(self._plan.packages) - len(wheels))
        else:
            argv += ["--offline", "--no-index"]
        await self._place.run(argv, env, f"installing {counted(len(self._plan.packages), 'package')}")

    async def _write(self, text: str, where: str) -> None:
        # In parts: no system takes an argument of any length.
        for start in range(0, len(text), _ARGUMENT):
            script = f'umask 077; printf "%s" "$1" {">>" if start else ">"} "$2"'
            argv = ["/bin/sh", "-c", script, "sh", text[start : start + _ARGUMENT], where]
            await self._place.run(argv, {}, "writing the list of packages")

    def _direct_env(self) -> dict[str, str]:
        remote = [url for url in self._settings.urls if urlsplit(url).scheme in ("http", "https")]
        env = {"UV_SYSTEM_CERTS": "1"}
        if self._spec.network == "auto":
            env["UV_HTTP_RETRIES"] = "1"  # if it cannot get them soon, it gets them from the manager
        if remote:
            env["UV_INDEX"] = " ".join(remote)
        return env

    # --- packages that the manager sends -------------------------------------------------------
    async def _send_wheels(self, wanted: Sequence[bool]) -> dict[str, Wheel]:
        """Send packages, each as soon as it is here; returns the wheels by name."""
        chosen = [
            (locked, digest)
            for locked, digest, want in zip(self._plan.packages, self._plan.digests, wanted, strict=True)
            if want
        ]
        progress = _TransferProgress(self._host, len(chosen), self._tell)
        wheels: dict[str, Wheel] = {}

        async def one(locked: Any, digest: str) -> None:
            wheel = await provide(locked, digest, self._plan.target, self._settings)
            size = wheel.path.stat().st_size
            asked = [[wheel.folder, wheel.path.name, size]]
            answer = await self._place.ask("wheels", root=self._spec.cache_dir, wheels=asked)
            if answer["missing"]:
                target = f"{answer['directory']}/{wheel.folder}/{wheel.path.name}"
                sent = functools.partial(progress.sent, wheel.folder)
                await transfer.send(self._place.connection, wheel.path, target, cwd="", env={}, progress=sent)
            wheels[locked.name] = wheel
            progress.advance()

        await event_loop.together([asyncio.ensure_future(one(locked, digest)) for locked, digest in chosen])
        return wheels

    async def _verify(self, directory: str) -> dict[str, Any]:
        """Check that the interpreter runs, and that what is installed is what was planned; returns what there is."""
        self._tell("checking")
        argv = environment_program.command(f"{directory}/bin/python", "check", directory)
        text = await self._place.run(argv, {}, f"running {directory}/bin/python")
        try:
            found: dict[str, Any] = decoded_text(text.splitlines()[-1])
            check_shape(found, {"packages": {...: str}, "size": range(2**63)})
        except (ValueError, IndexError):
            raise EnvironmentBuildError(
                self._host, f"{argv[0]} does not say what is installed", "", "see what it printed, above", text
            ) from None
        there = {normalized(name) for name in found["packages"]}
        missing = sorted({locked.name for locked in self._plan.packages if normalized(locked.name) not in there})
        if missing:
            names = ", ".join(missing)
            raise EnvironmentBuildError(
                self._host, f"the installer reported success, but these packages are not there: {names}", names,
                "remove the cache directory on the host, and try again",
            )  # fmt: skip
        return found


class _TransferProgress:
    """Says how far the packages are."""

    def __init__(self, host: str, total: int, tell: Callable[[str], Any]) -> None:
        self._host, self._total, self._tell = host, total, tell
        self._done = 0
        self._bytes: dict[str, int] = {}
        self._logged = time.monotonic()
        self._say()

    def sent(self, name: str, done: int, total: int | None, files: int) -> None:
        """Note that bytes of a package went to the host; from any thread."""
        self._bytes[name] = done
        self._say()

    def advance(self) -> None:
        """Note that a package is there."""
        self._done += 1
        self._say()
        if time.monotonic() - self._logged > _PROGRESS or (self._done == self._total and self._bytes):
            self._logged = time.monotonic()
            text = "%s: %d of %d packages are there, %s were sent"
            logger.info(text, self._host, self._done, self._total, self._sent)

    @property
    def _sent(self) -> str:
        return shown_size(sum(list(self._bytes.values())))

    def _say(self) -> None:
        sent = f", {self._sent} sent" if self._bytes else ""
        self._tell(f"{self._done} of {self._total} packages{sent}")


def pylock(plan: InstallPlan, wheels: Mapping[str, Wheel], directory: str) -> str:
    """Return the packages as a lock file (PEP 751); those that were sent by their paths, others by their addresses."""
    lines = ['lock-version = "1.0"', 'created-by = "lazycluster"', f'requires-python = ">={plan.target.version}"']
    for locked in plan.packages:
        wheel = wheels.get(locked.name)
        if wheel is not None:
            where = f"path = {_quoted(f'{directory}/{wheel.folder}/{wheel.path.name}')}"
            version, sha256 = wheel.version, wheel.sha256
        else:
            where, version, sha256 = f"url = {_quoted(locked.url)}", locked.version, locked.sha256
        hashes = f"hashes = {{ sha256 = {_quoted(sha256)} }}" if sha256 else "hashes = {}"
        lines += ["", "[[packages]]", f"name = {_quoted(locked.name)}", f"version = {_quoted(version)}"]
        lines.append(f"wheels = [{{ {where}, {hashes} }}]")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a text as a basic string of TOML."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)


# --- the host -------------------------------------------------------------------------------------
ANSWER_LIMIT = 60.0  # seconds for a question
RUN_LIMIT = 3600.0  # seconds for a program


@dataclass(frozen=True)
class BuildHost:
    """A host, and what holds there.

    Attributes:
        host: The host as the user named it.
        connection: The connection to it.
        env: The environment that the user's set-up left.
        python: The interpreter that the user named, if it is a path.
    """

    host: str
    connection: Connection
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    python: str | None = None

    async def ask(self, action: str, within: float = ANSWER_LIMIT, **params: Any) -> dict[str, Any]:
        """Ask the agent about environments."""
        return await self.connection.request("environment", within=within, action=action, **params)

    async def run(self, argv: Sequence[str], env: Mapping[str, str], what: str) -> str:
        """Run a program there, and return what it printed, of very much the end.

        Raises:
            EnvironmentBuildError: If it fails.
        """
        output = Tail()
        params = {"argv": list(argv), "cwd": "/", "env": {**self.env, **env}, "merge": True}
        channel = self.connection.channel("run", params, stdout=output.put)
        try:
            result = await self.connection.answered(channel, f"the end of {what}", RUN_LIMIT)
        except AgentError as error:
            raise EnvironmentBuildError(self.host, f"{what}: {error.message}") from None
        except NoAnswerError:
            said = hide(output.text())
            raise EnvironmentBuildError(self.host, f"{what} takes more than {RUN_LIMIT:g} s", output=said) from None
        said = hide(output.text())
        if result.get("exit") != 0:
            if result.get("signal"):
                said += f"\nended by signal {result['signal']}"
            raise explained(self.host, what, said)
        return said


# --- its interpreter ------------------------------------------------------------------------------

_ANSWER_LIMIT, _SEARCH_LIMIT = 60.0, 120.0  # seconds


async def base_interpreter(place: BuildHost, target: Target, root: str, settings: IndexSettings, found: str) -> str:
    """Return the path of an interpreter of the wanted minor version on a host.

    Args:
        place: The host.
        target: What is wanted.
        root: Where environments are kept there.
        settings: Where packages come from.
        found: One that the host has; empty if it has none.

    Raises:
        EnvironmentBuildError: If the host has none, and none can be had.
    """
    if place.python is not None:
        return await _named(place, target, place.python)
    if found:
        return found
    logger.info("%s: has no Python %s; one is fetched", place.host, target.version)
    try:
        return await _sent(place, target, root, settings)
    except EnvironmentBuildError as error:
        raise await _none(place, target, error) from error


async def _named(place: BuildHost, target: Target, python: str) -> str:
    try:
        answer = await place.connection.request(
            "packages", within=_ANSWER_LIMIT, python=python, env=dict(place.env), names=[]
        )
    except AgentError as error:
        raise EnvironmentBuildError(
            place.host, error.message, "", 'name a Python that is there: python="..."'
        ) from None
    if tuple(answer["version"][:2]) != target.python:
        version = ".".join(map(str, answer["version"]))
        raise EnvironmentBuildError(
            place.host,
            f"{python} is Python {version}, but the environment is for {target.version}",
            "python",
            f'name a Python {target.version} with python=, or choose EnvironmentSpec(..., python="{version[:4]}")',
        )
    return str(answer["executable"])


async def _sent(place: BuildHost, target: Target, root: str, settings: IndexSettings) -> str:
    """Have uv fetch an interpreter for the host's platform to the manager, and send it."""
    system = {"linux": "linux", "darwin": "macos"}.get(target.system, target.system)
    libc = {"glibc": "gnu", "musl": "musl"}.get(target.libc, "none")
    name = f"cpython-{target.version}-{system}-{target.machine}-{libc}"
    store = private_directory("environments", "python") / name
    arguments = ["python", "install", "--no-bin", "--install-dir", str(store), name]
    await run_uv(arguments, settings, what=f"fetching Python {target.version}")
    folder = next((path for path in sorted(store.glob("cpython-*")) if path.is_dir() and not path.is_symlink()), None)
    if folder is None:
        raise EnvironmentBuildError(place.host, f"uv fetched no Python {target.version}", "python")
    path = f"{root}/python/{folder.name}"
    await transfer.send(place.connection, folder, path, cwd="", env={})
    return f"{path}/bin/python{target.version}"


async def _none(place: BuildHost, target: Target, error: EnvironmentBuildError) -> EnvironmentBuildError:
    answer = await place.connection.request("interpreters", within=_SEARCH_LIMIT, env=dict(place.env))
    found = answer["interpreters"]
    have = ", ".join(f"{'.'.join(map(str, one['version']))} ({one['path']})" for one in found) or "none"
    return EnvironmentBuildError(
        place.host,
        f"no Python {target.version} was found; the host has: {have}. It cannot be fetched, either: {error.problem}",
        "python",
        f"install Python {target.version} there, name its path with python=, or use another version: "
        'EnvironmentSpec(..., python="3.x")',
        error.output,
    )


# --- its uv ---------------------------------------------------------------------------------------
async def send_uv(place: BuildHost, target: Target, root: str, settings: IndexSettings) -> str:
    """Return the path of uv on a host, in the manager's version; it is sent if it is not there.

    Raises:
        EnvironmentBuildError: If there is none for the host's platform.
    """
    here, version = await find_uv()
    path = f"{root}/uv/{version}/uv"
    if target.system == sys.platform and target.machine == os.uname().machine:
        sent = await transfer.send(place.connection, here, path, cwd="", env={})
        if sent.skipped:  # it has run there before
            return path
        try:
            await place.run([path, "--version"], {}, f"running {path}")
            return path
        except EnvironmentBuildError as error:
            await place.connection.request("remove", path=path)
            if "Permission denied" in error.output or target.system != "linux":
                raise
    path = f"{root}/uv/{version}-static/uv"
    await transfer.send(place.connection, await _fetched(version, target, settings), path, cwd="", env={})
    await place.run([path, "--version"], {}, f"running {path}")
    return path


async def _fetched(version: str, target: Target, settings: IndexSettings) -> Path:
    """Return uv for another platform: on Linux the one that needs no libraries."""
    platform = target.platform if target.system != "linux" else f"{target.machine}-unknown-linux-musl"
    store = private_directory("environments", "uv", f"{version}-{platform}")
    binary = store / "bin" / "uv"
    if not binary.is_file():
        arguments = ["pip", "install", "--quiet", "--no-deps", "--target", str(store), "--python-platform", platform]
        await run_uv([*arguments, f"uv=={version}"], settings, what=f"fetching uv for {platform}")
    return binary
