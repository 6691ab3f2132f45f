"""Sessions on hosts: a connection, the environment that the set-up left, and a working directory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from lazycluster.core import event_loop
from lazycluster.exceptions import AgentError, ConnectionLostError, InvalidRuntimeError, LazyclusterError, NoAnswerError
from lazycluster.output.lines import Tail
from lazycluster.output.progress import Progress
from lazycluster.ssh.config import Settings
from lazycluster.ssh.connection import ANSWER_LIMIT, Connection
from lazycluster.ssh.local_connection import LocalConnection
from lazycluster.ssh.python_search import PythonSearch
from lazycluster.ssh.ssh_connection import SshConnection
from lazycluster.tasks.context import Context, checked_variables

from .reachability import checked_address

if TYPE_CHECKING:
    from lazycluster.environments.activation import Activation, HostEnvironment

__all__ = ["ANSWER_LIMIT", "HostSession", "HostSpec", "SharedConnection", "connect", "may_ask"]

T = TypeVar("T")

_SETUP_LIMIT = 300.0  # seconds: set-up lines may fetch something
STARTUP_FILES = ("once", "always")
_PLAIN = ("host", "working_dir", "python", "setup", "shell", "local", "startup_files", "address")
_POSIX_SHELLS = ("bash", "zsh", "sh", "dash", "ksh", "ash")


@dataclass(frozen=True)
class HostSpec:
    """The user's description of a host, checked when it is made; what may be secret is in no `repr`.

    Attributes:
        host: Its name, as `ssh` takes it.
        working_dir: A directory there, made if it is missing; None: a temporary one, removed at the end.
        connection_kwargs: See :class:`lazycluster.ssh.config.Settings`.
        python: The interpreter: a path, a name, or ``auto`` for one of the manager's minor version.
        setup: Shell lines whose environment is used for everything that runs there.
        env: Environment variables.
        shell: The shell for commands.
        local: The manager's own machine, without ssh.
        ask: A person may be asked for a password and the like.
        environment: The Python environment there, see :class:`lazycluster.environments.EnvironmentSpec`.
        startup_files: When the shell of commands reads its start-up files: ``once`` per connection, or ``always``.
        address: The address at which other hosts reach it; None: one that it has, found out when it is needed.
    """

    host: str
    working_dir: str | None = None
    connection_kwargs: Mapping[str, Any] | None = field(default=None, repr=False)
    python: str | None = None
    setup: str | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    shell: str | None = None
    local: bool = False
    ask: bool = False
    environment: Any = None
    startup_files: str = "once"
    address: str | None = None

    def __post_init__(self) -> None:
        if self.startup_files not in STARTUP_FILES:
            wanted = " or ".join(map(repr, STARTUP_FILES))
            raise ValueError(f"{self.host}: startup_files must be {wanted}, not {self.startup_files!r}")
        if self.address is not None:
            object.__setattr__(self, "address", checked_address(self.address, self.host))
        if self.environment is not None:
            from lazycluster.environments.spec import EnvironmentSpec

            object.__setattr__(self, "environment", EnvironmentSpec.of(self.environment))
        if isinstance(self.setup, Sequence) and not isinstance(self.setup, str):
            object.__setattr__(self, "setup", "\n".join(self.setup))
        if isinstance(self.working_dir, os.PathLike):
            object.__setattr__(self, "working_dir", os.fspath(self.working_dir))
        for name in ("working_dir", "python", "setup", "shell"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{self.host}: {name} must be a string, not {type(value).__name__}")
            if value is not None and (not value.strip() or "\0" in value):
                raise ValueError(f"{self.host}: {name} is empty or contains a null character")
        object.__setattr__(self, "env", checked_variables(self.env))

    @property
    def grace(self) -> float:
        """Seconds for which the host goes on with what runs there when the manager cannot be reached."""
        return 0.0 if self.local else Settings.parse(self.host, self.connection_kwargs).grace

    def document(self) -> dict[str, Any]:
        """Return it as JSON can hold it, without `ask`, and with absolute paths; it may hold secrets.

        Raises:
            TypeError: If it holds something that JSON cannot.
        """
        found = {name: getattr(self, name) for name in _PLAIN}
        found["env"] = dict(self.env)
        found["connection_kwargs"] = None if self.local else _absolute_paths(self.host, self.connection_kwargs)
        found["environment"] = None if self.environment is None else self.environment.document()
        try:
            json.dumps(found)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{self.host}: its settings must be plain data: {error}") from None
        return found

    @classmethod
    def of(cls, document: Mapping[str, Any], ask: bool) -> HostSpec:
        """Return what `document` has described.

        Args:
            document: The description.
            ask: Whether a person may be asked.
        """
        from lazycluster.environments.spec import EnvironmentSpec

        given = document["environment"]
        return cls(**{**document, "environment": None if given is None else EnvironmentSpec(**given)}, ask=ask)

    def connection(self) -> Connection:
        """Return a connection that is not open yet."""
        if self.local:
            return LocalConnection(self.host)
        # An interpreter that is named by its path serves for the agent, too: the host may have no other.
        python = self.python if self.python and self.python.startswith("/") and not self.setup else None
        named = self.python if self.python and self.python != "auto" else ""
        search = PythonSearch(named, self.env.get("PATH", ""), self.setup or "")
        return SshConnection(self.host, self.connection_kwargs, python=python, search=search, ask=self.ask)


class SharedConnection:
    """A connection that several sessions use; the last one closes it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._users = 0

    def acquire(self) -> Connection:
        """Begin to use it."""
        self._users += 1
        return self.connection

    @property
    def is_shared(self) -> bool:
        """True if more than one session uses it."""
        return self._users > 1

    async def release(self) -> None:
        """End the use."""
        self._users -= 1
        if self._users <= 0:
            await self.connection.close()


class HostSession:
    """A connected host on which a runtime works. Make one with :meth:`open`.

    Attributes:
        spec: What the user said.
        connection: The open connection.
        base_env: The whole environment that the set-up left, else empty.
        python: The interpreter for functions, None for ``python3`` as the environment finds it.
        working_dir: The absolute path of the working directory.
        environment: The Python environment, made when it is first needed.
        state: ``open`` or ``closed``.
    """

    def __init__(self, spec: HostSpec, shared: SharedConnection) -> None:
        self.spec = spec
        self.connection = shared.acquire()
        self._shared = shared
        self.base_env: dict[str, str] = {}
        self.python = spec.python
        self.working_dir = ""
        self.temporary: list[str] = []
        self.environment: HostEnvironment | None = None
        self._generation = 0  # which agent the working directory belongs to
        self.state = "open"
        self._owner = os.getpid()
        # A runtime that nothing refers to any more disconnects; not at exit, where one hook does it for all.
        self._finalizer = weakref.finalize(self, _release, shared, self._owner)
        self._finalizer.atexit = False
        self._renewal = _renewal(weakref.ref(self))

    @classmethod
    async def open(cls, spec: HostSpec, like: HostSession | None = None) -> HostSession:
        """Connect, run the set-up, find the interpreter, make the working directory.

        Args:
            spec: What the user said of the host.
            like: A session on the same host whose connection, environment and interpreter are to be shared.

        Raises:
            InvalidRuntimeError: If the host cannot be used, with the reason.
        """
        if like is None:
            connection = spec.connection()
            await connection.open()
            session = cls(spec, SharedConnection(connection))
        else:
            like.check()
            session = cls(spec, like._shared)
        try:
            if like is None:
                await session._prepare()
            else:
                session.base_env, session.python = like.base_env, like.python
            session.working_dir = await session._make_working_dir()
            session._choose_environment()
            session.connection.on_renewal.append(session._renewal)
        except BaseException as error:
            await session.close()
            if isinstance(error, (AgentError, ConnectionLostError)):
                raise InvalidRuntimeError(spec.host, "lost", str(error)) from None
            raise
        return session

    async def renew(self) -> None:
        """Prepare the host once more: there is a new agent, and all that was prepared has ended with the one before."""
        self.temporary.clear()
        await self._prepare()
        self.working_dir = await self._make_working_dir()
        self._choose_environment()

    async def _prepare(self) -> None:
        if self.spec.setup is not None:
            self.base_env = await self._run_setup(self.spec.setup)
        if self.spec.python == "auto":
            self.python = await self._matching_python()
        elif self.spec.python is not None:
            await self._check_python(self.spec.python)

    def _choose_environment(self) -> None:
        if self.spec.environment is None:
            return
        from lazycluster.environments.activation import BuildHost, HostEnvironment

        # A path is the interpreter that the environment is made with; a LocalRuntime names the manager's own anyway.
        named = self.python if self.python and self.python.startswith(("/", "~")) else None
        env = {**self.base_env, **self.spec.env}
        self.environment = HostEnvironment(BuildHost(self.host, self.connection, env, named), self.spec.environment)

    async def _run_setup(self, script: str) -> dict[str, str]:
        shell = self.spec.shell if os.path.basename(self.spec.shell or "") in _POSIX_SHELLS else None
        try:
            answer = await self.connection.request(
                "setup",
                within=_SETUP_LIMIT,
                script=script,
                shell=shell,
                env=dict(self.spec.env),
                startup_files=self.spec.startup_files,
            )
        except AgentError as error:
            output = str(error.evidence.get("output", "")).strip()
            message, _, step = error.message.partition("\n  Next step: ")
            raise InvalidRuntimeError(
                self.spec.host,
                "setup",
                f"{message}\n{output}" if output else message,
                step or "run the set-up lines on the host by hand",
            ) from None
        except NoAnswerError:
            detail = f"the set-up lines have not ended within {_SETUP_LIMIT:g} s"
            raise InvalidRuntimeError(self.spec.host, "setup", detail, "make them shorter; they get no input") from None
        return dict(answer["env"])

    async def _matching_python(self) -> str:
        wanted = list(sys.version_info[:2])
        answer = await self._ask("interpreters", env={**self.base_env, **self.spec.env})
        found = [(entry["path"], entry["version"]) for entry in answer["interpreters"]]
        for path, version in found:
            if list(version[:2]) == wanted:
                return str(path)
        have = ", ".join(f"{'.'.join(map(str, version))} ({path})" for path, version in found) or "none"
        manager = ".".join(map(str, wanted))
        raise InvalidRuntimeError(
            self.spec.host,
            "python",
            f"no Python {manager}, the manager's version, was found; the host has: {have}",
            f'install Python {manager} there, name its path with python="...", or activate it with setup="..."',
        )

    async def _check_python(self, python: str) -> None:
        try:
            await self._ask("packages", python=python, env={**self.base_env, **self.spec.env}, names=[])
        except AgentError as error:
            hint = 'name the path of an interpreter on the host, or use python="auto"'
            raise InvalidRuntimeError(self.spec.host, "python", error.message, hint) from None

    async def _make_working_dir(self) -> str:
        self._generation = self.connection.generation
        if self.spec.working_dir is None:
            answer = await self._ask("mkdtemp")
            self.temporary.append(answer["path"])
            return str(answer["path"])
        try:
            answer = await self._ask(
                "mkdir", path=self.spec.working_dir, env={**self.base_env, **self.spec.env}, checked=True
            )
        except AgentError as error:
            raise self._no_working_dir(error.message) from None
        if not answer.get("writable", True):
            raise self._no_working_dir(f"{answer['path']} is not writable")
        return str(answer["path"])

    def _no_working_dir(self, why: str) -> InvalidRuntimeError:
        return InvalidRuntimeError(
            self.spec.host,
            "working_dir",
            f"the working directory {self.spec.working_dir} cannot be used: {why}",
            "choose another working_dir, or none for a temporary one",
        )

    async def _ask(self, op: str, **params: Any) -> dict[str, Any]:
        try:
            return await self.connection.request(op, **params)
        except NoAnswerError as error:
            detail = f"no answer to {op!r} within {error.seconds:g} s"
            raise InvalidRuntimeError(self.spec.host, "timeout", detail, "check how busy the host is") from None

    # --- use -----------------------------------------------------------------------------------
    @property
    def host(self) -> str:
        """The host as the user named it."""
        return self.spec.host

    @property
    def identity(self) -> tuple[Any, ...]:
        """The account on its machine, equal for two names of it."""
        info = self.connection.agent_info
        return info.boot_id, info.machine_id, info.hostname, info.network, info.uid

    @property
    def is_ours(self) -> bool:
        """True in the process that connected, False in a forked child of it."""
        return os.getpid() == self._owner

    def check(self) -> None:
        """Raise an error if the runtime cannot be used (any more, or in this process)."""
        if self.state == "closed" and self.is_ours:
            raise LazyclusterError(f"{self.host}: the runtime was closed (cleanup() was called); make a new one")
        self.connection.check()

    def context(self, variables: Mapping[str, Any], working_dir_name: str) -> Context:
        """Return where and how tasks are carried out.

        Args:
            variables: The runtime's environment variables.
            working_dir_name: The variable that tells the working directory.
        """
        env = {**self.base_env, working_dir_name: self.working_dir, **checked_variables(variables)}
        context = Context(
            self.host,
            self.connection,
            self.working_dir,
            env,
            self.python,
            self.spec.shell,
            self,
            generation=self._generation,
            startup_files=self.spec.startup_files,
        )
        if self.environment is None:
            return context
        if self.environment.active is not None:
            return _in_environment(context, self.environment.active)
        environment = self.environment

        async def prepare(context: Context) -> Context:
            return _in_environment(context, await environment.ready())

        return replace(context, prepare=prepare)

    async def ask(self, op: str, **params: Any) -> dict[str, Any]:
        """Ask the host something, under a deadline.

        Raises:
            AgentError: If the host answers with an error.
            NoAnswerError: If it does not answer in time.
            LazyclusterError: If the runtime cannot be used.
        """
        self.check()
        return await self.connection.request(op, **params)

    async def capture(self, context: Context, **command: Any) -> tuple[int, str]:
        """Run a short command under a deadline.

        Args:
            context: Where.
            **command: ``command`` or ``argv``, and ``shell``.

        Returns:
            Its exit status (negative: a signal) and what it printed, of much the end.
        """
        self.check()
        output = Tail()
        params = {**context.for_shell(None), "env": dict(context.env), "merge": True, **command}
        channel = self.connection.channel("run", params, stdout=output.put)
        what = command.get("command") or command.get("argv")
        result = await self.connection.result_of(channel, f"the end of {what}")
        status = -result["signal"] if result.get("signal") else result.get("exit") or 0
        return status, output.text()

    # --- end -----------------------------------------------------------------------------------
    async def close(self) -> None:
        """Remove temporary directories and release the connection. Doing it again does nothing."""
        self.state = "closed"
        if self._finalizer.detach() is None:
            return
        with contextlib.suppress(ValueError):
            self.connection.on_renewal.remove(self._renewal)
        try:
            if self.connection.state == "open" and self._shared.is_shared:  # else they go with the agent
                for path in self.temporary:
                    removing = asyncio.ensure_future(self.connection.request("remove", path=path))
                    await self.connection.wait_while_heard(removing, ANSWER_LIMIT)
            self.temporary.clear()
        finally:
            await self._shared.release()


def _in_environment(context: Context, active: Activation) -> Context:
    env = active.variables(context.env, context.connection.agent_info.path)
    return replace(context, env=env, python=active.python, prepare=None)


def _renewal(reference: weakref.ref[HostSession]) -> Callable[[], Awaitable[None]]:
    async def renew() -> None:
        session = reference()
        if session is not None:
            await session.renew()

    return renew


def _release(shared: SharedConnection, owner: int) -> None:
    """Release the connection of a session that was garbage-collected."""
    if owner == os.getpid():
        event_loop.submit(shared.release())


def _absolute_paths(host: str, connection_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return `connection_kwargs` as they are meant here, in a process with another current directory, too."""
    settings = Settings.parse(host, connection_kwargs)
    kwargs = {key: value for key, value in (connection_kwargs or {}).items() if value is not None}
    if settings.config_file is not None:
        kwargs["config_file"] = settings.config_file
    if settings.key_filename:
        kwargs["key_filename"] = list(settings.key_filename)
    return kwargs


async def connect(spec: HostSpec) -> HostSession:
    """Open a session on one host; progress is shown if that takes long."""
    with Progress(f"Connecting {spec.host}"):
        return await HostSession.open(spec)


def may_ask() -> bool:
    """Return True if a person sits at a terminal who can be asked for a password."""
    try:
        return sys.stdin.isatty() and sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False
