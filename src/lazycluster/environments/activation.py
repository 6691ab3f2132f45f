"""The environment of one runtime: made when it is first needed, and then part of all that runs there."""

from __future__ import annotations

import logging
import posixpath
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lazycluster.exceptions import AgentError, EnvironmentBuildError, NoAnswerError
from lazycluster.output.progress import Progress

from .build import Builder
from .build_host import RUN_LIMIT, BuildHost
from .plan import InstallPlan, Locked, Target
from .resolution import resolve, resolve_installed, settings_for
from .single_flight import SingleFlight
from .spec import EnvironmentSpec
from .uv import MANAGER
from .uv_errors import IndexUnreachableError
from .wheels import digest_of

if TYPE_CHECKING:
    from lazycluster.tasks.context import Context

    from .index import IndexSettings

__all__ = ["Activation", "BuildHost", "HostEnvironment"]

logger = logging.getLogger("lazycluster")

_LIMIT = 60.0


@dataclass(frozen=True)
class Activation:
    """What makes processes run in an environment.

    Attributes:
        prefix: The environment's directory; empty for an interpreter that is in none.
        python: Its interpreter.
        conda: Whether it is one of conda.
    """

    prefix: str
    python: str
    conda: bool = False

    def variables(self, env: Mapping[str, str], path: str) -> dict[str, str]:
        """Return environment variables with those of the environment.

        Args:
            env: The variables that hold without it.
            path: The host's own PATH.
        """
        if not self.prefix:
            return dict(env)
        name = "CONDA_PREFIX" if self.conda else "VIRTUAL_ENV"
        rest = env.get("PATH", path)
        return {**env, "PATH": f"{self.prefix}/bin:{rest}" if rest else f"{self.prefix}/bin", name: self.prefix}

    def apply(self, context: Context) -> Context:
        """Return where and how tasks are carried out, in the environment."""
        env = self.variables(context.env, context.connection.agent_info.path)
        return replace(context, env=env, python=self.python, prepare=None)


class HostEnvironment:
    """The environment of one runtime. For the event loop's thread.

    Args:
        place: The host.
        spec: What the user asked for.

    Attributes:
        active: What it is, once it was found or made.
    """

    def __init__(self, place: BuildHost, spec: EnvironmentSpec) -> None:
        self.spec = spec
        self.active: Activation | None = None
        self._place = place
        self._preparing: SingleFlight[None, Activation] = SingleFlight()
        self._stage = ""  # how far it is, in a few words

    async def ready(self, *, again: bool = False, refresh: bool = False) -> Activation:
        """Return it, and find or make it before if need be; all who ask at once wait for the same.

        Args:
            again: Look whether packages from this machine have changed meanwhile.
            refresh: Find the newest versions that are allowed, whatever was found before.

        Raises:
            EnvironmentBuildError: If it cannot be made.
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
            await self._place.ask("compiled", RUN_LIMIT, root=self.spec.cache_dir, id=name)

    async def applied(self, context: Context) -> Context:
        """Return a context in the environment, which is made before if need be."""
        return (await self.ready()).apply(context)

    async def _prepare(self, refresh: bool) -> Activation:
        try:
            if self.spec.kind == "path":
                return await self._existing()
            with Progress("Preparing environments", 1, "hosts", self._shown) as progress:
                prefix = await self._found_or_made(refresh)
                progress.advance()
        except AgentError as error:
            raise EnvironmentBuildError(self._place.host, error.message) from None
        except NoAnswerError as error:
            raise EnvironmentBuildError(
                self._place.host, f"the host does not answer: {error}", "", "see how busy it is, and try again"
            ) from None
        except EnvironmentBuildError as error:
            raise self._of_this_host(error) from error.__cause__
        except OSError as error:  # what the hosts' files have is told by their agents
            where = f"{error.filename}: " if error.filename else ""
            hint = "see to the directory of lazycluster on the manager (Environment.main_directory), and to its disk"
            raise EnvironmentBuildError(
                self._place.host, f"on the manager: {where}{error.strerror or error}", "", hint
            ) from None
        return Activation(prefix, f"{prefix}/bin/python")

    async def _found_or_made(self, refresh: bool) -> str:
        self._tell("finding versions of packages")
        settings = await settings_for(self.spec)
        try:
            plan = await self._plan(settings, await self._target(), refresh)
            return await Builder(self._place, self.spec, plan, settings, self._tell).find_or_make()
        except IndexUnreachableError as error:
            if self.spec.kind != "manager" or error.host != MANAGER:
                raise
            self._tell("no index; taking what is installed here")
            logger.info("%s: %s; the packages are taken from what is installed here", self._place.host, error.problem)
        target = await self._target()
        plan = self._planned(target, await resolve_installed(self.spec, target, settings))
        return await Builder(self._place, self.spec, plan, settings, self._tell).find_or_make()

    def _tell(self, stage: str) -> None:
        self._stage = stage

    def _shown(self) -> list[str]:
        return [f"{self._place.host} ({self._stage})"]

    def _of_this_host(self, error: EnvironmentBuildError) -> EnvironmentBuildError:
        """Return an error that names the host for which something failed on the manager."""
        if error.host == self._place.host:
            return error
        return EnvironmentBuildError(
            self._place.host, f"on the {error.host}: {error.problem}", error.package, error.hint, error.output
        )

    async def _target(self) -> Target:
        wanted = self.spec.python
        python = (3, int(wanted[2:])) if wanted else sys.version_info[:2]
        try:
            return Target.of(python, await self._place.ask("facts", root=self.spec.cache_dir))
        except ValueError as error:
            raise EnvironmentBuildError(
                self._place.host,
                f"the host tells of no platform that there is: {error}",
                "",
                "see what 'uname -sm' and 'getconf GNU_LIBC_VERSION' print there",
            ) from None

    async def _plan(self, settings: IndexSettings, target: Target, refresh: bool) -> InstallPlan:
        return self._planned(target, await resolve(self.spec, target, settings, refresh))

    def _planned(self, target: Target, packages: Sequence[Locked]) -> InstallPlan:
        return InstallPlan(target, tuple(packages), tuple(digest_of(locked) for locked in packages), str(self.spec))

    async def _existing(self) -> Activation:
        """Check an environment or interpreter that is on the host already."""
        path, host = str(self.spec.source), self._place.host
        found = await self._expand(path=path, env=dict(self._place.env))
        real = str(found["path"])
        hint = "name a virtual environment, a conda environment or an interpreter that is on the host"
        if found["directory"] is None:
            raise EnvironmentBuildError(host, f"there is no {real} on the host", "", hint)
        python = f"{real}/bin/python" if found["directory"] else real
        try:
            answer = await self._place.connection.request(
                "packages", within=_LIMIT, python=python, env=dict(self._place.env), names=[]
            )
        except AgentError as error:
            raise EnvironmentBuildError(host, f"{real} cannot be used: {error.message}", "", hint) from None
        self._check_version(real, answer["version"])
        if not found["directory"]:
            return await self._of_interpreter(real)
        conda = await self._expand(path=f"{real}/conda-meta")
        return Activation(real, python, bool(conda["directory"]))

    def _check_version(self, path: str, version: list[int]) -> None:
        wanted = self.spec.python
        if wanted is not None and version[:2] != [3, int(wanted[2:])]:
            shown = ".".join(map(str, version))
            raise EnvironmentBuildError(self._place.host, f"{path} has Python {shown}, not {wanted}", "python")

    async def _of_interpreter(self, python: str) -> Activation:
        prefix = posixpath.dirname(posixpath.dirname(python))
        found = await self._expand(path=f"{prefix}/pyvenv.cfg")
        return Activation(prefix if found["directory"] is False else "", python)

    async def _expand(self, **params: Any) -> dict[str, Any]:
        return await self._place.connection.request("expand", within=_LIMIT, **params)
