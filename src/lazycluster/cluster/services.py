"""A supervised process, as the manager sees it: command, readiness, restarts, logs."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

from lazycluster.agent.restart_policy import RestartPolicy
from lazycluster.exceptions import AgentError, LazyclusterError, NoAnswerError
from lazycluster.output import log_limit
from lazycluster.output.lines import Lines
from lazycluster.ssh.agent_replies import NAME, check_shape
from lazycluster.ssh.connection import ANSWER_LIMIT
from lazycluster.utils import new_log_file_path

from .exceptions import ServiceError
from .health import Watch, how_it_ended
from .service_spec import ServiceSpec
from .worker_hosts import WorkerHost

logger = logging.getLogger("lazycluster")

_STOP_LIMIT = 15.0

_OUT_OF_MEMORY = {
    "limit": "it was killed (SIGKILL): out of memory (the limit of its control group)",
    "host": "it was killed (SIGKILL), at a time when the host had no memory left",
    "worker": "it was ended, since it had nearly reached its memory_limit",
}

# What the agent says in each state; what makes no sense is an error before anything of it is believed.
_SAID: dict[str, dict[str, Any]] = {
    "message": {"event": str, "detail": dict},
    "ready": {"pid": int, "detail": dict},
    "starting": {"pid": int, "gpus": [dict]},
    "exited": {"exit?": (int, type(None)), "signal?": (int, type(None))},
}

# The same of what our own programs say.
_MESSAGES: dict[str, dict[str, Any]] = {
    "versions": {
        "python": [int],
        "executable": NAME,
        **{name: {...: (str, type(None))} for name in ("packages", "programs?")},
    },
    "port_taken": {"port": range(1, 65536)},
    "respawned": {"status?": (int, type(None)), "out_of_memory?": (str, type(None))},
}

State = Literal["new", "starting", "ready", "restarting", "ended", "failed"]


class Service:
    """One process on one host. For the event loop's thread, unless said otherwise.

    Its agent starts it again when it dies. With the agent it is lost; if the host has got another one, as after a
    restart, it is started again there, within the same limit.

    Args:
        spec: What runs.
        place: Where.
        label: The name of this very process.
        debug: Whether its output is printed as it comes.
        on_change: Called when its state has changed.
        watch: Is told what happens to it.
        renew: Prepares its host, whose agent is another one now, and sets `place` and `spec` to what holds there.
            Without it, the service ends with its agent.

    Attributes:
        spec: What runs.
        place: Where.
        label: The name of this very process.
        state: ``new``, ``starting``, ``ready``, ``restarting``, ``ended`` (as it was asked to) or ``failed``.
        pid: Its process id there, once it was started.
        restarts: How often it was started again.
        exit_status: Its exit status at its last end; negative: the signal.
        respawns: How often it has itself started the process again that it watches.
        problem: Why it failed or was started again the last time.
        gpus: What is known of the GPUs that it was given.
        ports: Its ports by name, once they are chosen.
        log_file: The file with all that it printed.
    """

    def __init__(
        self,
        spec: ServiceSpec,
        place: WorkerHost,
        label: str,
        *,
        debug: bool = False,
        on_change: Callable[[Service], Any] | None = None,
        watch: Watch | None = None,
        renew: Callable[[Service], Awaitable[Any]] | None = None,
    ) -> None:
        self.spec = spec
        self.place = place
        self.label = label
        self.state: State = "new"
        self.pid: int | None = None
        self.restarts = 0
        self.exit_status: int | None = None
        self.respawns = 0
        self.problem = ""
        self.gpus: list[dict[str, Any]] = []
        self.detail: dict[str, Any] = {}
        self.ports: dict[str, int] = {}
        self.log_file = new_log_file_path(place.host, label)
        self.error: ServiceError | None = None
        self._live = Lines(place.host) if debug else None
        self._on_change = on_change
        self._watch_of = watch
        self._renew = renew
        self._agents = RestartPolicy(spec.restarts)
        self._restarts_before = 0  # under agents that are lost
        self._away = False
        self._log: io.FileIO | None = None
        self._channel: Any = None
        self._messages: deque[tuple[str, dict[str, Any]]] = deque()
        self._news = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._stopping = False
        self._was_ready = False
        self._given_up = self._hint = ""
        self._port_taken = 0

    # --- starting ------------------------------------------------------------------------------
    def start(self) -> None:
        """Have it started; what becomes of it is told by `message` and `state`.

        Raises:
            LazyclusterError: If the connection cannot be used.
        """
        self._log = io.FileIO(os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")
        try:
            self._begin(again=False)
        except BaseException:
            self._close_log()
            raise
        self._watching = asyncio.ensure_future(self._watch())

    def _begin(self, again: bool) -> None:
        spec, place = self.spec, self.place
        ready_port = self.ports.get(spec.ready_port)
        params: dict[str, Any] = {
            "env": {**spec.env, **place.env, **spec.secrets},
            "cwd": spec.cwd or place.cwd,
            "task": self.label,
            "marker": spec.marker,
            "ready": spec.ready,
            "restarts": spec.restarts,
            "patience": spec.patience,
            "again": again,
            **({"files": dict(spec.files)} if spec.files else {}),
            **({"ready_port": ready_port, "ready_host": spec.ready_host} if ready_port else {}),
            **({"stop_signal": spec.stop_signal} if spec.stop_signal != "TERM" else {}),
            **({"gpus": {"count": spec.gpus, "idle": spec.idle_gpus}} if spec.gpus else {}),
        }
        if spec.source is not None:
            params |= {"source": spec.source.message(), "python": place.python}
        else:
            params |= {"argv": list(spec.command), "secret": bool(spec.secrets or spec.files)}
        self._channel = place.connection.channel(
            "service", params, stdout=self._on_output, stderr=self._on_output, event=self._on_event
        )
        self.state = "starting"

    async def come_up(self, spec: ServiceSpec, ports: Mapping[str, int]) -> int | None:
        """Tell a program of ours its settings, or start another one, which was not started before.

        Args:
            spec: What it is, now that its ports are chosen.
            ports: These ports by name.

        Returns:
            None once it is ready; else one of the ports, which is taken.

        Raises:
            ServiceError: If it ends instead.
        """
        _check_startable(spec, ports)
        self.spec, self.ports = spec, dict(ports)
        if spec.source is None:
            self._agents = RestartPolicy(spec.restarts)
            self.start()
        elif spec.settings is not None:
            await self.send(spec.settings())
        try:
            while True:
                name, fields = await self.message()
                if name == "ready":
                    return None
                if name == "port_taken":
                    return int(fields["port"])
        except ServiceError as error:
            if spec.port_taken and spec.port_taken in error.output:
                return next(iter(ports.values()))
            raise

    def again(self) -> Service:
        """Return one of the same name and place that was not started."""
        debug, on_change = self._live is not None, self._on_change
        return Service(
            self.spec, self.place, self.label, debug=debug, on_change=on_change, watch=self._watch_of, renew=self._renew
        )

    async def send(self, settings: Any) -> None:
        """Send a line of JSON to its standard input; from now on it is fed this one when it is started again."""
        self._channel.control(forget=True)
        await self._channel.send(json.dumps(settings).encode() + b"\n")

    async def message(self) -> tuple[str, dict[str, Any]]:
        """Return what it says next: ("ready", {...}) or an event of its own.

        Raises:
            ServiceError: If it has ended instead.
        """
        while not self._messages:
            if self.error is not None:
                raise self.error
            if self.state == "ended":
                raise self._failure("it was ended")
            self._news.clear()
            await self._news.wait()
        return self._messages.popleft()

    async def wait_for(self, wanted: str) -> dict[str, Any]:
        """Wait for one message; others are dropped.

        Raises:
            ServiceError: If it ends instead.
        """
        while True:
            name, fields = await self.message()
            if name == wanted:
                return fields

    # --- what the agent says -------------------------------------------------------------------
    def _on_output(self, data: bytes) -> None:
        if self._log is not None:
            with contextlib.suppress(OSError):  # the disk is full: the service is not to suffer from that
                self._log.write(data)
        if self._live is not None:
            self._live.feed(data)

    def _on_event(self, event: dict[str, Any]) -> None:
        state = str(event.get("state"))
        check_shape(event, {"state": str, "restarts?": int, **_SAID.get(state, {})})
        if "restarts" in event:
            self.restarts = self._restarts_before + event["restarts"]
        if state == "message":
            check_shape(event["detail"], _MESSAGES.get(event["event"], {}))
            self._heard(event["event"], event["detail"])
        elif state == "ready":
            again, self._was_ready = self._was_ready, True
            self.state, self.detail, self.pid = "ready", event["detail"], event["pid"]
            self._say("ready", self.detail)
            if not again or log_limit.may_log(self.place.host):
                self._note("ready", "again" if self.restarts else "")
            self._changed()
        elif state == "starting":
            self.pid, self.state, self.gpus = event["pid"], "starting", event["gpus"]
        elif state == "exited":
            self.exit_status = _status(event)
        elif state == "restarting":
            self._is_restarted(self._how(str(event.get("out_of_memory") or "")))

    def _is_restarted(self, problem: str) -> None:
        self.state, self.problem = "restarting", problem
        if log_limit.may_log(self.place.host):
            lost = f"; {self.spec.at_restart}" if self.spec.at_restart else ""
            logger.warning("%s: %s: %s, and is started again%s", self.place.host, self.label, problem, lost)
            self._note("restarting", f"{problem}, and is started again{lost}")
        self._changed()

    def _heard(self, name: str, fields: dict[str, Any]) -> None:
        if name == "respawned":
            if self._stopping:
                return  # it is asked to end, as is what it watches, which was first
            self.respawns += 1
            self.exit_status = fields.get("status")
            self.problem = self._how(str(fields.get("out_of_memory") or ""))
            if not log_limit.may_log(self.place.host):
                return
            logger.warning("%s: %s: its worker process: %s", self.place.host, self.label, self.problem)
            self._note("respawned", self.problem)
        elif name == "port_taken" and self._was_ready:
            # Nobody waits to choose other ports: the others know it by this one. It is tried again, up to the limit.
            port = fields.get("port")
            self._port_taken = port if isinstance(port, int) else 0
            self.signal("KILL")
        else:
            self._say(name, fields)

    def _note(self, kind: str, detail: str = "") -> None:
        if self._watch_of is not None:
            self._watch_of.note_of(self.label, self.place.host, kind, detail)

    def _how(self, out_of_memory: str) -> str:
        status = self.exit_status
        if self._port_taken:
            port, self._port_taken = self._port_taken, 0
            return f"another program has taken its port {port}"
        if out_of_memory:
            return _OUT_OF_MEMORY.get(out_of_memory, _OUT_OF_MEMORY["host"])
        return how_it_ended(status)

    def _say(self, name: str, fields: dict[str, Any]) -> None:
        if len(self._messages) < 100:  # nobody reads them any more once it is ready
            self._messages.append((name, fields))
        self._news.set()

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change(self)

    @property
    def link_problem(self) -> str:
        """Reason why nothing is heard of it at present, "" if something is. May be read from any thread."""
        connection = self.place.connection
        seconds = connection.interrupted_for
        if seconds is None or self.state in ("ended", "failed"):
            return ""
        return f"the link to {connection.host} has been interrupted for {seconds:.0f} s: {connection.why}"

    async def wait_for_link(self, within: float | None = None) -> None:
        """Wait while the link to its host is interrupted; if that is lost, until this has failed, too.

        Args:
            within: Seconds at most; None: until the link has been interrupted for as long as a host may take to answer.
        """
        connection = self.place.connection
        seconds = connection.interrupted_for
        if seconds is None:
            return
        try:
            await connection.wait_until_open(max(0.0, ANSWER_LIMIT - seconds) if within is None else within)
        except NoAnswerError:
            return  # `link_problem` tells it
        except LazyclusterError:
            await self.gone()

    async def gone(self) -> None:
        """Wait until it has ended for good."""
        if self._watching is not None:
            await asyncio.wait([self._watching])

    # --- its end -------------------------------------------------------------------------------
    async def _watch(self) -> None:
        try:
            await self._follow()
            if self._given_up:
                raise self._failure(self._given_up, hint=self._hint)
            self.state = "ended"
        except ServiceError as error:
            self.error = error
            self.state, self.problem = "failed", error.problem
            if self._was_ready and not self._stopping:
                logger.error("%s", error)
        except asyncio.CancelledError:  # by `stop`
            self.state = "ended"
        except Exception as error:
            # E.g. of whoever prepares the host once more. Nobody looks at this task: whoever waits must be told.
            logger.exception("%s: %s cannot go on", self.place.host, self.label)
            self.error = self._failure(f"{type(error).__name__}: {error}")
            self.state, self.problem = "failed", self.error.problem
        finally:
            self._close_log()
        self._note(self.state, self.problem if self.error is not None else "")
        self._news.set()
        self._changed()

    async def _follow(self) -> None:
        """Wait for its end, under this agent and those that take its place."""
        while True:
            try:
                self.exit_status = _status(await self._channel.result())
                return
            except AgentError as error:
                self.exit_status = _status(error.evidence)
                taken = f": another program has taken its port {self._port_taken}" if self._port_taken else ""
                raise self._failure(error.message + taken, str(error.evidence.get("output", ""))) from None
            except LazyclusterError as error:
                problem = await self._come_back(error)
                if problem is not None:
                    raise self._failure(str(problem)) from None

    async def _come_back(self, problem: LazyclusterError) -> LazyclusterError | None:
        """Start it on the agent that takes the place of the lost one; returns why it is not started if it is not."""
        connection = self.place.connection
        while self._renew is not None and self._was_ready and not self._stopping and not self._given_up:
            delay = self._agents.next() if connection.state in ("interrupted", "open") else None
            if delay is None:
                break
            self.restarts += 1
            self._restarts_before = self.restarts
            self._is_restarted(getattr(problem, "detail", "") or str(problem))
            self._away = True
            try:
                await connection.wait_until_open()
                await asyncio.sleep(delay)
                await self._renew(self)
                self._begin(again=True)
                if self.spec.settings is not None:
                    await self.send(self.spec.settings())
                if self._given_up:
                    self.signal("END")
                return None
            except LazyclusterError as error:
                problem = error
            finally:
                self._away = False
        return problem

    def _failure(self, problem: str, output: str = "", hint: str = "") -> ServiceError:
        return ServiceError(
            self.label,
            self.place.host,
            problem,
            exit_status=self.exit_status,
            output=output,
            log_file=str(self.log_file),
            hint=hint,
        )

    def last_output(self, limit: int = 4000) -> str:
        """Return the end of what it printed. May be called from any thread."""
        with contextlib.suppress(OSError), self.log_file.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - limit))
            return file.read().decode("utf-8", "replace")
        return ""

    def not_ready(self, seconds: float, hint: str = "") -> ServiceError:
        """Return the error that says that it was not ready in time."""
        error = self._failure(f"it was not ready within {seconds:g} s", self.last_output())
        return ServiceError(
            error.name, error.host, error.problem, output=error.output, log_file=error.log_file, hint=hint
        )

    def signal(self, name: str) -> None:
        """Send it a signal, e.g. ``TERM``; ``END`` ends it with all that it started."""
        if self._channel is not None:
            self._channel.control(signal=name)

    async def stop(self) -> None:
        """End it in stages, and wait until it has gone. Doing it again does nothing."""
        self.end()
        if self._watching is not None:
            await asyncio.shield(self._watching)

    def end(self) -> None:
        """Have it end in stages, without waiting for it."""
        self._stopping = True
        if self._watching is not None:
            self.signal("END")
            if self._away:
                self._watching.cancel()

    def give_up(self, problem: str, hint: str = "") -> None:
        """Have it end for good, as failed: it can do nothing any more where it is.

        Args:
            problem: Why.
            hint: The next step.
        """
        if self._watching is not None and not self._given_up and not self._stopping:
            self._given_up, self._hint = problem, hint
            self.signal("END")

    def _close_log(self) -> None:
        if self._live is not None:
            self._live.end()
        if self._log is not None:
            self._log.close()
            self._log = None


def _check_startable(spec: ServiceSpec, ports: Mapping[str, int]) -> None:
    if not isinstance(spec, ServiceSpec):
        raise TypeError(f"an engine's master() and worker() must return a ServiceSpec, not {spec!r}")
    if spec.source is None and not spec.command:
        raise ValueError(f"ServiceSpec {spec.name!r}: it has no command")
    if spec.ready_port and spec.ready_port not in ports:
        known = ", ".join(ports) or "none"
        raise ValueError(f"ServiceSpec {spec.name!r}: ready_port is {spec.ready_port!r}, but its ports are: {known}")


def _status(fields: Mapping[str, Any]) -> int | None:
    if fields.get("signal") is not None:
        return -int(fields["signal"])
    return fields.get("exit")


async def stop_all(services: Sequence[Service]) -> None:
    """End services, all at once."""

    async def stop(service: Service) -> None:
        connection = service.place.connection
        if not await connection.wait_while_heard(asyncio.ensure_future(service.stop()), _STOP_LIMIT):
            # It was told to; and when this connection is closed, the host ends it in any case.
            left.setdefault(connection.host, []).append(service.label)

    for service in services:
        service.end()  # all are told, whatever puts an end to the waiting
    left: dict[str, list[str]] = {}
    await asyncio.gather(*(stop(service) for service in services))
    for host, labels in left.items():
        logger.warning("%s: it has not said that it has ended %s", host, ", ".join(labels))


def as_kind(kind: type[ServiceError], error: ServiceError) -> ServiceError:
    """Return an error as one of a more specific kind."""
    return kind(
        error.name,
        error.host,
        error.problem,
        exit_status=error.exit_status,
        output=error.output,
        log_file=error.log_file,
        hint=error.hint,
    )
