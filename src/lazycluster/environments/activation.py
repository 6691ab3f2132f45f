"""The environment of one runtime: prepared when it is first needed, and then used by all that runs there."""

from __future__ import annotations

import logging
import posixpath
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lazycluster.core.single_flight import SingleFlight
from lazycluster.exceptions import AgentError, EnvironmentBuildError, NoAnswerError
from lazycluster.output.progress import Progress

from .build import RUN_LIMIT, Builder, BuildHost
from .index import IndexSettings
from .plan import InstallPlan, LockedPackage, Target
from .resolution import resolve, resolve_installed, settings_for
from .spec import EnvironmentSpec
from .uv import MANAGER, IndexUnreachableError
from .wheels import digest_of

__all__ = ["Activation", "BuildHost", "HostEnvironment"]

logger = logging.getLogger("lazycluster")

_LIMIT = 60.0  # seconds for a request


@dataclass(frozen=True)
class Activation:
    """The settings that make processes run in an environment.

    Attributes:
        prefix: The environment's directory; empty for an interpreter that is in none.
        python: Its interpreter.
        conda: True if conda made it.
    """

    prefix: str
    python: str
    conda: bool = False

    def variables(self, env: Mapping[str, str], path: str) -> dict[str, str]:
        """Return environment variables with those of the environment.

        Args:
            env: The variables without it.
            path: The host's own PATH.
        """
        if not self.prefix:
            return dict(env)
        name = "CONDA_PREFIX" if self.conda else "VIRTUAL_ENV"
        rest = env.get("PATH", path)
        return {**env, "PATH": f"{self.prefix}/bin:{rest}" if rest else f"{self.prefix}/bin", name: self.prefix}


class HostEnvironment:
    """The environment of one runtime. For the event loop's thread.

    Args:
        host: The host.
        spec: The specification of the environment.

    Attributes:
        active: How it is used, once it was found or built.
    """

    def __init__(self, host: BuildHost, spec: EnvironmentSpec) -> None:
        self.spec = spec
        self.active: Activation | None = None
        self._host = host
        self._preparing: SingleFlight[None, Activation] = SingleFlight()
        self._step = ""  # what is being done, in a few words

    async def ready(self, *, again: bool = False, refresh: bool = False) -> Activation:
        """Return it, found or built first if necessary; concurrent callers share one preparation.

        Args:
            again: Check whether packages from this machine have changed meanwhile.
            refresh: Find the newest versions that are allowed, whatever was found before.

        Raises:
            EnvironmentBuildError: If it cannot be built.
        """
        if self.active is not None and not again and not refresh:
            return self.active
        self.active = await self._preparing.do(None, lambda: self._prepare(refresh))
        return self.active

    async def compiled(self) -> None:
        """Wait until the modules of the environment are compiled, which goes on after it is ready to be used."""
        active = await self.ready()
        if self.spec.kind != "path":
            name = posixpath.basename(active.prefix)
            await self._host.ask("compiled", RUN_LIMIT, root=self.spec.cache_dir, id=name)

    async def _prepare(self, refresh: bool) -> Activation:
        try:
            if self.spec.kind == "path":
                return await self._existing()
            with Progress("Preparing environments", 1, "hosts", self._shown) as progress:
                prefix = await self._find_or_build(refresh)
                progress.advance()
        except AgentError as error:
            raise EnvironmentBuildError(self._host.name, error.message) from None
        except NoAnswerError as error:
            raise EnvironmentBuildError(
                self._host.name, f"the host does not answer: {error}", "", "check how busy the host is, and try again"
            ) from None
        except EnvironmentBuildError as error:
            raise self._of_this_host(error) from error.__cause__
        except OSError as error:  # agents report the errors of files on hosts
            where = f"{error.filename}: " if error.filename else ""
            hint = "check the directory of lazycluster on the manager (Environment.main_directory), and its disk"
            raise EnvironmentBuildError(
                self._host.name, f"on the manager: {where}{error.strerror or error}", "", hint
            ) from None
        return Activation(prefix, f"{prefix}/bin/python")

    async def _find_or_build(self, refresh: bool) -> str:
        self._report("finding versions of packages")
        settings = await settings_for(self.spec)
        target = await self._target()
        try:
            return await self._build(target, await resolve(self.spec, target, settings, refresh), settings)
        except IndexUnreachableError as error:
            if self.spec.kind != "manager" or error.host != MANAGER:
                raise
            self._report("no index; using what is installed here")
            logger.info("%s: %s; the packages are taken from what is installed here", self._host.name, error.problem)
        return await self._build(target, await resolve_installed(self.spec, target, settings), settings)

    async def _build(self, target: Target, packages: Sequence[LockedPackage], settings: IndexSettings) -> str:
        plan = InstallPlan(target, tuple(packages), tuple(digest_of(locked) for locked in packages))
        return await Builder(self._host, self.spec, plan, settings, self._report).find_or_build()

    def _report(self, step: str) -> None:
        self._step = step

    def _shown(self) -> list[str]:
        return [f"{self._host.name} ({self._step})"]

    def _of_this_host(self, error: EnvironmentBuildError) -> EnvironmentBuildError:
        """Return an error that names the host for which something failed on the manager."""
        if error.host == self._host.name:
            return error
        return EnvironmentBuildError(
            self._host.name, f"on the {error.host}: {error.problem}", error.package, error.hint, error.output
        )

    async def _target(self) -> Target:
        wanted = self.spec.python
        python = (3, int(wanted[2:])) if wanted else sys.version_info[:2]
        try:
            return Target.of(python, await self._host.ask("facts", root=self.spec.cache_dir))
        except ValueError as error:
            raise EnvironmentBuildError(
                self._host.name,
                f"the host reports an unknown platform: {error}",
                "",
                "see what 'uname -sm' and 'getconf GNU_LIBC_VERSION' print there",
            ) from None

    async def _existing(self) -> Activation:
        """Check an environment or interpreter that is on the host already."""
        path, host = str(self.spec.source), self._host.name
        found = await self._expand(path=path, env=dict(self._host.env))
        real = str(found["path"])
        hint = "name a virtual environment, a conda environment or an interpreter that is on the host"
        if found["directory"] is None:
            raise EnvironmentBuildError(host, f"there is no {real} on the host", "", hint)
        python = await self._interpreter_in(real) if found["directory"] else real
        if python is None:
            hint = "name the directory that has bin/python in it, or the interpreter itself"
            raise EnvironmentBuildError(host, f"{real} is not an environment: it has no bin/python", "", hint)
        try:
            answer = await self._host.interpreter(python)
        except AgentError as error:
            raise EnvironmentBuildError(host, f"{real} cannot be used: {error.message}", "", hint) from None
        self._check_version(real, answer["version"])
        if not found["directory"]:
            return await self._of_interpreter(real)
        conda = await self._expand(path=f"{real}/conda-meta")
        return Activation(real, python, bool(conda["directory"]))

    async def _interpreter_in(self, prefix: str) -> str | None:
        """Return the interpreter of an environment; systems' own prefixes have python3 only."""
        for name in ("python", "python3"):
            found = await self._expand(path=f"{prefix}/bin/{name}")
            if found["directory"] is False:
                return f"{prefix}/bin/{name}"
        return None

    def _check_version(self, path: str, version: list[int]) -> None:
        wanted = self.spec.python
        if wanted is not None and version[:2] != [3, int(wanted[2:])]:
            shown = ".".join(map(str, version))
            raise EnvironmentBuildError(self._host.name, f"{path} has Python {shown}, not {wanted}", "python")

    async def _of_interpreter(self, python: str) -> Activation:
        prefix = posixpath.dirname(posixpath.dirname(python))
        found = await self._expand(path=f"{prefix}/pyvenv.cfg")
        return Activation(prefix if found["directory"] is False else "", python)

    async def _expand(self, **params: Any) -> dict[str, Any]:
        return await self._host.connection.request("expand", within=_LIMIT, **params)
