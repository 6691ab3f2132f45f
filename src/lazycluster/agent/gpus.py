"""GPUs of the host: which there are, which of them others use, and which work was given which.

What is known comes from `nvidia-smi`. An inherited CUDA_VISIBLE_DEVICES narrows it down, as it does for CUDA. A device
that is divided (MIG) is replaced by its parts; whether others use a part cannot be told.

Handlers of requests use `take`: it gives out GPUs, each to one owner at a time among all that this agent runs, and the
owner's processes see no others if they get the share's `variables` as environment.
"""

from __future__ import annotations

import re
import time

from .commands import CommandProcess, environment, outcome

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Tuple

    from .loop import Loop
    from .session import RequestChannel

    Survey = Callable[[List[Dict[str, Any]], str], Any]
    _Key = Tuple[Optional[str], ...]

VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
BUSY_MEMORY = 512  # MB; a driver, or a desktop, needs less for itself
_LIMIT = 20.0  # seconds for all that is asked; without its persistence mode, a driver starts anew each time
_FRESH = 2.0  # seconds for which an answer holds: the steps of one start ask the same
_MOST = 1 << 20  # bytes of an answer
_FIELDS = "index,name,uuid,memory.total,memory.used,utilization.gpu,driver_version"
_NAMES = ("index", "name", "uuid", "memory", "memory_used", "utilization", "driver_version")
_MODE = "mig.mode.current"  # old drivers do not know it
_FORMAT = "--format=csv,noheader,nounits"
_PART = re.compile(r"\s+MIG\s+(\S+)\s+Device\s+(\d+):\s+\(UUID:\s+(MIG-[^)\s]+)\)")

_states: Dict[Any, "_State"] = {}  # of each agent; there is one, except in tests


class _State:
    """What one agent knows of GPUs."""

    def __init__(self) -> None:
        self.owners: Dict[str, str] = {}  # a GPU's identity -> who was given it
        self.surveys: Dict[_Key, _Survey] = {}
        self.answers: Dict[_Key, Tuple[float, List[Dict[str, Any]], str]] = {}
        self.stuck: List[_Program] = []  # calls of nvidia-smi that do not even end when they are killed


def _state_of(channel: RequestChannel) -> _State:
    return _states.setdefault(channel.agent, _State())


# --- what there is -------------------------------------------------------------------------------
class _Streams:
    """Stands for the channel of a process whose output is not for the manager."""

    open = writable = True

    def __init__(self, loop: Loop) -> None:
        self.loop = loop


class _Program(CommandProcess):
    """A call of nvidia-smi. `then` gets its exit status, None if it took too long, and what it printed."""

    def __init__(
        self, state: _State, loop: Loop, env: Dict[str, str], argv: List[str], limit: float, then: Callable[..., Any]
    ) -> None:
        self._state = state
        self._then: Optional[Callable[..., Any]] = then
        self._text = bytearray()
        streams: Any = _Streams(loop)
        super().__init__(streams, ["nvidia-smi", *argv], env, "/", False, True)
        self._timer = loop.call_later(limit, self._too_long)

    def on_stdout(self, data: bytes) -> None:
        self._text += data[: _MOST - len(self._text)]

    def _too_long(self) -> None:
        # A driver that hangs leaves processes that no signal ends: the answer does not wait for that.
        self._state.stuck.append(self)
        self.end()
        self._settle(None)

    def on_over(self, status: int) -> None:
        self._timer.cancel()
        if self in self._state.stuck:
            self._state.stuck.remove(self)
        ended = outcome(status)
        self._settle(ended["exit"] if ended["signal"] is None else -int(ended["signal"] or 0))

    def _settle(self, status: Optional[int]) -> None:
        then, self._then = self._then, None
        if then is not None:
            then(status, self._text.decode("utf-8", "replace"))


class _Survey:
    """One look at the GPUs of the host, for all who ask meanwhile."""

    def __init__(self, state: _State, loop: Loop, env: Dict[str, str], users: bool, key: _Key) -> None:
        self.waiting: List[Survey] = []
        self._state, self._loop, self._env, self._users, self._key = state, loop, env, users, key
        self._deadline = time.monotonic() + _LIMIT
        self._gpus: List[Dict[str, Any]] = []

    def start(self) -> None:
        """Ask the first question."""
        if self._state.stuck:
            self._done("nvidia-smi hangs: an earlier call of it was killed and has not ended yet")
            return
        self._call(["--query-gpu={},{}".format(_FIELDS, _MODE), _FORMAT], self._listed)

    def _call(self, argv: List[str], then: Callable[[Optional[int], str], Any]) -> None:
        try:
            left = max(0.0, self._deadline - time.monotonic())
            _Program(self._state, self._loop, self._env, argv, left, then)
        except FileNotFoundError:
            self._done("nvidia-smi is not on the PATH")
        except OSError as error:
            self._done("nvidia-smi cannot be started: {}".format(error.strerror or error))

    def _listed(self, status: Optional[int], text: str) -> None:
        if status and "not a valid field" in text and _MODE in text:
            self._call(["--query-gpu=" + _FIELDS, _FORMAT], self._listed)
            return
        self._gpus = parse(text)
        if not self._gpus:
            self._done(_why(status, text))
        elif any(gpu["divided"] for gpu in self._gpus):
            self._call(["-L"], self._divided)
        else:
            self._look_for_users()

    def _divided(self, status: Optional[int], text: str) -> None:
        self._gpus = with_parts(self._gpus, text)
        self._look_for_users()

    def _look_for_users(self) -> None:
        if self._users:
            self._call(["--query-compute-apps=gpu_uuid", _FORMAT], self._told_users)
        else:
            self._done("")

    def _told_users(self, status: Optional[int], text: str) -> None:
        used = {line.strip() for line in text.splitlines()}
        for gpu in self._gpus:
            if gpu["uuid"] in used:
                gpu["busy"] = "a program computes on it"
            elif not gpu["divided"] and (gpu["memory_used"] or 0) > BUSY_MEMORY:
                # In a container the programs of others cannot be seen, their memory can.
                gpu["busy"] = "{} MB of its memory are used".format(gpu["memory_used"])
        self._done("" if status == 0 else "who uses the GPUs cannot be told: " + _why(status, text))

    def _done(self, problem: str) -> None:
        gpus, unusable = visible(self._gpus, self._env.get(VISIBLE))
        problem = problem or unusable
        del self._state.surveys[self._key]
        self._state.answers[self._key] = time.monotonic(), gpus, problem
        waiting, self.waiting = self.waiting, []
        for then in waiting:
            then([dict(gpu) for gpu in gpus], problem)


def _why(status: Optional[int], text: str) -> str:
    """Return what an answer without a GPU in it means."""
    if status is None:
        return "nvidia-smi did not answer within {:g} s".format(_LIMIT)
    said = " ".join(text.split())[:300]
    how = "signal {}".format(-status) if status < 0 else "exit status {}".format(status)
    if status == 0 and said:
        return "the answer of nvidia-smi is not understood: " + said
    return "nvidia-smi: {}{}".format(said or "no GPU", " ({})".format(how) if status else "")


def parse(text: str) -> List[Dict[str, Any]]:
    """Return one dictionary per line of nvidia-smi's answer; memory in MB, utilization in percent, None if unknown.

    Of each it is said whether it is `divided`, and `busy` has room for why it is not idle.
    """
    gpus = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        extra = len(values) - len(_NAMES)
        if extra not in (0, 1) or _number(values[0]) is None:
            continue
        gpu: Dict[str, Any] = dict(zip(_NAMES, values))
        for name in ("index", "memory", "memory_used", "utilization"):
            gpu[name] = _number(gpu[name])
        gpu["divided"] = extra == 1 and values[-1].lower() == "enabled"
        gpu["busy"] = ""
        gpus.append(gpu)
    return gpus


def _number(text: str) -> Optional[int]:
    return int(float(text)) if re.match(r"[0-9]{1,9}(\.[0-9]{1,9})?$", text) else None


def with_parts(gpus: List[Dict[str, Any]], text: str) -> List[Dict[str, Any]]:
    """Return the GPUs, those that are divided replaced by the parts that `nvidia-smi -L` names."""
    parts: Dict[str, List[Tuple[str, str]]] = {}
    whole = ""
    for line in text.splitlines():
        gpu = re.match(r"GPU (\d+):", line)
        part = _PART.match(line)
        if gpu:
            whole = gpu.group(1)
        elif part:
            parts.setdefault(whole, []).append((part.group(1), part.group(3)))
    found = []
    for one in gpus:
        if not one["divided"]:
            found.append(one)
            continue
        for profile, uuid in parts.get(str(one["index"]), []):
            size = re.search(r"(\d+)gb", profile)
            memory = int(size.group(1)) * 1024 if size else None
            name = "{} MIG {}".format(one["name"], profile)
            found.append(dict(one, name=name, uuid=uuid, memory=memory, memory_used=None, utilization=None))
    return found


def visible(gpus: List[Dict[str, Any]], limits: Optional[str]) -> Tuple[List[Dict[str, Any]], str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES allows, in its order, each with the `id` by which CUDA is told of it.

    As for CUDA, an entry that fits no GPU ends the list.

    Returns:
        The GPUs, and why there is none left, if that is so.
    """
    if limits is None:
        return [dict(gpu, id=gpu["uuid"] if gpu["divided"] else str(gpu["index"])) for gpu in gpus], ""
    found: List[Dict[str, Any]] = []
    for entry in (part.strip() for part in limits.split(",")):
        if _number(entry) is not None:
            fitting = [gpu for gpu in gpus if gpu["index"] == _number(entry)]
        else:
            fitting = [gpu for gpu in gpus if entry.startswith(("GPU-", "MIG-")) and gpu["uuid"].startswith(entry)]
        fitting = [gpu for gpu in fitting if all(gpu["uuid"] != one["uuid"] or not gpu["uuid"] for one in found)]
        if not fitting:
            break
        found += [dict(gpu, id=gpu["uuid"] if gpu["divided"] else entry) for gpu in fitting]
    return found, "" if found or not gpus else "{}={} allows none of the GPUs".format(VISIBLE, limits)


def survey(channel: RequestChannel, env: Dict[str, str], users: bool, then: Survey) -> None:
    """Call `then` with the GPUs, and with why there is none, or what is not known of them.

    Args:
        channel: The request for which it is asked.
        env: The whole environment of the work: its PATH finds nvidia-smi, and it may allow some GPUs only.
        users: Whether it is to be found out which others use; those have a text as `busy`.
        then: Gets a list of its own.
    """
    state = _state_of(channel)
    key = (env.get("PATH"), env.get(VISIBLE), "users" if users else None)
    when, gpus, problem = state.answers.get(key, (-_FRESH, [], ""))
    if time.monotonic() - when < _FRESH:
        then([dict(gpu) for gpu in gpus], problem)
    elif key in state.surveys:
        state.surveys[key].waiting.append(then)
    else:
        started = state.surveys[key] = _Survey(state, channel.loop, env, users, key)
        started.waiting.append(then)
        started.start()


# --- who gets which ------------------------------------------------------------------------------
class Share:
    """GPUs that one piece of work has for itself.

    Attributes:
        gpus: What is known of them.
        variables: The environment in which CUDA sees them, and no others.
    """

    def __init__(self, state: _State, owner: str, gpus: List[Dict[str, Any]], order: bool) -> None:
        self.gpus = gpus
        self.variables = {VISIBLE: ",".join(gpu["id"] for gpu in gpus)}
        if order:
            self.variables[ORDER] = "PCI_BUS_ID"  # as nvidia-smi counts; CUDA's own order is "fastest first"
        self._state = state
        state.owners.update((_identity(gpu), owner) for gpu in gpus)

    def release(self) -> None:
        """Let others have them. Doing it again does nothing."""
        for gpu in self.gpus:
            self._state.owners.pop(_identity(gpu), None)
        self._state.answers.clear()  # that they were busy is not true any more
        self.gpus = []


class Taking:
    """GPUs that are asked for; `cancel` ends the wait."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        """Have it come to nothing: `then` is not called."""
        self.cancelled = True


def _identity(gpu: Dict[str, Any]) -> str:
    return str(gpu["uuid"] or gpu["index"])


def take(
    channel: RequestChannel,
    env: Dict[str, str],
    owner: str,
    per: int,
    most: Optional[int],
    idle: bool,
    then: Callable[[List[Share], str], Any],
) -> Taking:
    """Give out GPUs in shares of `per`, each GPU to nobody else until its share is released.

    Args:
        channel: The request for which it is done.
        env: The whole environment of the work.
        owner: The name of the work, for messages.
        per: GPUs in each share, at least 1.
        most: How many shares; None: as many as there can be.
        idle: Whether GPUs that others use are left alone.
        then: Is called with the shares, which may be fewer than `most`, and if there is none, with the reason.
    """
    state = _state_of(channel)
    taking = Taking()

    def known(gpus: List[Dict[str, Any]], problem: str) -> None:
        if taking.cancelled:
            return
        free = [gpu for gpu in gpus if _identity(gpu) not in state.owners and not (idle and gpu["busy"])]
        count = len(free) // per if most is None else min(most, len(free) // per)
        order = VISIBLE not in env and ORDER not in env
        shares = [Share(state, owner, free[n * per : (n + 1) * per], order) for n in range(count)]
        then(shares, "" if shares else _too_few(state, gpus, per, idle, problem))

    survey(channel, env, idle, known)
    return taking


def _too_few(state: _State, gpus: List[Dict[str, Any]], per: int, idle: bool, problem: str) -> str:
    """Return why there is not one share."""
    if not gpus:
        return "the host has no GPU that can be used ({})".format(problem)
    told = []
    for gpu in gpus:
        owner = state.owners.get(_identity(gpu))
        why = "used by {}".format(owner) if owner else gpu["busy"] if idle and gpu["busy"] else "free"
        told.append("{}: {}".format(gpu["id"], why))
    return "{} GPU{} wanted, but of those of the host too few are free ({})".format(
        per, " is" if per == 1 else "s are", "; ".join(told)
    )


def wanted(params: Dict[str, Any]) -> Optional[Tuple[int, bool]]:
    """Return the number of GPUs that a request asks for, and whether idle ones only; None if it asks for none.

    Raises:
        ValueError: If it makes no sense.
    """
    asked = params.get("gpus")
    if not asked:
        return None
    count = asked.get("count")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError("the number of GPUs must be an integer of at least 1, not {!r}".format(count))
    return count, bool(asked.get("idle"))


def gpus(channel: RequestChannel) -> None:
    """Handle the request `gpus`: tell the GPUs that work with the environment `env` could get.

    With `idle`, those that others use have the reason as `busy`. Those that were given to work here have its name as
    `owner`.
    """
    state = _state_of(channel)

    def tell(found: List[Dict[str, Any]], problem: str) -> None:
        for gpu in found:
            gpu["owner"] = state.owners.get(_identity(gpu), "")
        channel.result(gpus=found, problem=problem)

    survey(channel, environment(channel), bool(channel.params.get("idle")), tell)
