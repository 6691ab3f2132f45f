"""GPUs of the host: their list, their users, and the work that they were given to.

A forked child asks `nvidia-smi`. An inherited CUDA_VISIBLE_DEVICES narrows down what it says, as it does for CUDA. A
device that is divided (MIG) is replaced by its parts; whether others use a part cannot be told.

Handlers of requests use `HostGpus.take`: it gives out GPUs, each to one owner at a time among all that this agent runs.
The owner's processes see no others if they get the share's `variables` as environment.
"""

from __future__ import annotations

import os
import re
import time

from .commands import environment, outcome
from .offload import ForkedWork
from .processes import Ending, ProcessTree, spawn, start_time

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Tuple

    from .server import Agent
    from .session import RequestChannel

    Gpu = Dict[str, Any]
    Survey = Callable[[List[Gpu], str], Any]
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


# --- what there is: in a forked child -------------------------------------------------------------
def ask(env: Dict[str, str], users: bool) -> Dict[str, Any]:
    """Return the `gpus` that `env` allows, and the `problem`.

    Args:
        env: The whole environment of nvidia-smi.
        users: Whether to find out which others use.
    """
    found: List[Gpu] = []
    try:
        status, text = _call(env, "--query-gpu={},{}".format(_FIELDS, _MODE), _FORMAT)
        if status and "not a valid field" in text and _MODE in text:
            status, text = _call(env, "--query-gpu=" + _FIELDS, _FORMAT)
        found = parse(text)
        problem = "" if found else _why(status, text)
        if any(gpu["divided"] for gpu in found):
            found = with_parts(found, _call(env, "-L")[1])
        if users and not problem:
            status, text = _call(env, "--query-compute-apps=gpu_uuid", _FORMAT)
            _note_users(found, text)
            problem = "the processes that use the GPUs are unknown: " + _why(status, text) if status else ""
    except FileNotFoundError:
        problem = "nvidia-smi is not on the PATH"
    except OSError as error:
        problem = "nvidia-smi cannot be started: {}".format(error.strerror or error)
    allowed, unusable = visible(found, env.get(VISIBLE))
    return {"gpus": allowed, "problem": problem or unusable}


def _call(env: Dict[str, str], *arguments: str) -> Tuple[int, str]:
    """Return the exit status of nvidia-smi, negative for a signal, and what it printed."""
    read, write = os.pipe()
    null = os.open(os.devnull, os.O_RDONLY)
    pid = spawn(["nvidia-smi", *arguments], env, "/", null, write, write)
    os.close(write)
    text = bytearray()
    for data in iter(lambda: os.read(read, 64 * 1024), b""):
        text += data[: _MOST - len(text)]
    ended = outcome(os.waitpid(pid, 0)[1])
    return ended["exit"] or -(ended["signal"] or 0), text.decode("utf-8", "replace")


def _note_users(gpus: List[Gpu], text: str) -> None:
    used = {line.strip() for line in text.splitlines()}
    for gpu in gpus:
        if gpu["uuid"] in used:
            gpu["busy"] = "a program computes on it"
        elif not gpu["divided"] and (gpu["memory_used"] or 0) > BUSY_MEMORY:
            # In a container the programs of others cannot be seen, their memory can.
            gpu["busy"] = "{} MB of its memory are used".format(gpu["memory_used"])


def _why(status: int, text: str) -> str:
    """Return what an answer without a GPU in it means."""
    said = " ".join(text.split())[:300]
    how = "signal {}".format(-status) if status < 0 else "exit status {}".format(status)
    if status == 0 and said:
        return "the answer of nvidia-smi is not understood: " + said
    return "nvidia-smi: {}{}".format(said or "no GPU", " ({})".format(how) if status else "")


def parse(text: str) -> List[Gpu]:
    """Return one dictionary per line of nvidia-smi's answer; memory in MB, utilization in percent, None if unknown.

    Of each it is said whether it is `divided`, and `busy` has room for why it is not idle.
    """
    gpus = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        extra = len(values) - len(_NAMES)
        if extra not in (0, 1) or _number(values[0]) is None:
            continue
        gpu: Gpu = dict(zip(_NAMES, values))
        for name in ("index", "memory", "memory_used", "utilization"):
            gpu[name] = _number(gpu[name])
        gpu["divided"] = extra == 1 and values[-1].lower() == "enabled"
        gpu["busy"] = ""
        gpus.append(gpu)
    return gpus


def _number(text: str) -> Optional[int]:
    return int(float(text)) if re.match(r"[0-9]{1,9}(\.[0-9]{1,9})?$", text) else None


def with_parts(gpus: List[Gpu], text: str) -> List[Gpu]:
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


def visible(gpus: List[Gpu], limits: Optional[str]) -> Tuple[List[Gpu], str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES allows, in its order, each with the `id` by which CUDA is told of it.

    As for CUDA, an entry that fits no GPU ends the list.

    Returns:
        The GPUs, and why there is none left, if that is so.
    """
    if limits is None:
        return [dict(gpu, id=gpu["uuid"] if gpu["divided"] else str(gpu["index"])) for gpu in gpus], ""
    found: List[Gpu] = []
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


# --- who gets which -------------------------------------------------------------------------------
class GpuShare:
    """GPUs that one piece of work has for itself.

    Attributes:
        gpus: What is known of them.
        variables: The environment in which CUDA sees them, and no others.
    """

    def __init__(self, host: HostGpus, owner: str, gpus: List[Gpu], order: bool) -> None:
        self.gpus = gpus
        self.variables = {VISIBLE: ",".join(gpu["id"] for gpu in gpus)}
        if order:
            self.variables[ORDER] = "PCI_BUS_ID"  # as nvidia-smi counts; CUDA's own order is "fastest first"
        self._host = host
        host.owners.update((_identity(gpu), owner) for gpu in gpus)

    def release(self) -> None:
        """Let others have them. Doing it again does nothing."""
        for gpu in self.gpus:
            self._host.owners.pop(_identity(gpu), None)
        self._host.answers.clear()  # that they were busy is not true any more
        self.gpus = []


class GpuRequest:
    """GPUs that are asked for; `cancel` ends the wait."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        """Have it come to nothing: `then` is not called."""
        self.cancelled = True


def _identity(gpu: Gpu) -> str:
    return str(gpu["uuid"] or gpu["index"])


class HostGpus:
    """The GPUs of the host as one agent knows them, and their owners.

    Attributes:
        owners: A GPU's identity -> who was given it.
        answers: What nvidia-smi said last, and when.
    """

    def __init__(self, agent: Agent) -> None:
        self.owners: Dict[str, str] = {}
        self.answers: Dict[_Key, Tuple[float, List[Gpu], str]] = {}
        self._loop = agent.loop
        self._waiting: Dict[_Key, List[Survey]] = {}  # those who ask for what is being found out
        self._hanging = 0  # calls of nvidia-smi that do not even end when they are killed

    def survey(self, env: Dict[str, str], users: bool, then: Survey) -> None:
        """Call `then` with the GPUs, and with why there is none, or what is not known of them.

        Args:
            env: The whole environment of the work: its PATH finds nvidia-smi, and it may allow some GPUs only.
            users: Whether it is to be found out which others use; those have a text as `busy`.
            then: Gets a list of its own.
        """
        key = (env.get("PATH"), env.get(VISIBLE), "users" if users else None)
        when, gpus, problem = self.answers.get(key, (-_FRESH, [], ""))
        if time.monotonic() - when < _FRESH:
            then([dict(gpu) for gpu in gpus], problem)
        elif key in self._waiting:
            self._waiting[key].append(then)
        else:
            self._waiting[key] = [then]
            self._ask(key, env, users)

    def _ask(self, key: _Key, env: Dict[str, str], users: bool) -> None:
        def answered(fields: Dict[str, Any]) -> None:
            timer.cancel()
            failed = fields.get("failed")
            problem = "nvidia-smi cannot be asked: " + failed["message"] if failed else fields["problem"]
            self._settle(key, fields.get("gpus", []), problem)

        def too_long() -> None:
            self._end(child)
            self._settle(key, [], "nvidia-smi did not answer within {:g} s".format(_LIMIT))

        if self._hanging:
            self._settle(key, [], "nvidia-smi hangs: an earlier call of it was killed and has not ended yet")
            return
        try:
            child = ForkedWork(self._loop, lambda: ask(env, users), answered)
        except OSError as error:
            self._settle(key, [], "nvidia-smi cannot be started: {}".format(error.strerror or error))
            return
        timer = self._loop.call_later(_LIMIT, too_long)

    def _end(self, child: ForkedWork) -> None:
        """End a call that did not answer: a driver that hangs leaves processes that no signal ends."""

        def ended() -> None:
            self._hanging -= 1

        self._hanging += 1
        tree = ProcessTree()
        tree.add(child.pid, start_time(child.pid))
        tree.living()  # once before the child is gone: nvidia-smi descends from it
        child.kill()
        Ending(self._loop, tree.living, ended)

    def _settle(self, key: _Key, gpus: List[Gpu], problem: str) -> None:
        self.answers[key] = time.monotonic(), gpus, problem
        for then in self._waiting.pop(key):
            then([dict(gpu) for gpu in gpus], problem)

    def take(
        self,
        env: Dict[str, str],
        owner: str,
        per: int,
        most: Optional[int],
        idle: bool,
        then: Callable[[List[GpuShare], str], Any],
    ) -> GpuRequest:
        """Give out GPUs in shares of `per`, each GPU to nobody else until its share is released.

        Args:
            env: The whole environment of the work.
            owner: The name of the work, for messages.
            per: GPUs in each share, at least 1.
            most: How many shares; None: as many as there can be.
            idle: Whether GPUs that others use are left alone.
            then: Is called with the shares, which may be fewer than `most`, and if there is none, with the reason.
        """
        request = GpuRequest()

        def known(gpus: List[Gpu], problem: str) -> None:
            if request.cancelled:
                return
            free = [gpu for gpu in gpus if _identity(gpu) not in self.owners and not (idle and gpu["busy"])]
            count = len(free) // per if most is None else min(most, len(free) // per)
            order = VISIBLE not in env and ORDER not in env
            shares = [GpuShare(self, owner, free[n * per : (n + 1) * per], order) for n in range(count)]
            then(shares, "" if shares else self._too_few(gpus, per, idle, problem))

        self.survey(env, idle, known)
        return request

    def _too_few(self, gpus: List[Gpu], per: int, idle: bool, problem: str) -> str:
        """Return why there is not one share."""
        if not gpus:
            return "the host has no GPU that can be used ({})".format(problem)
        told = []
        for gpu in gpus:
            owner = self.owners.get(_identity(gpu))
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
    host = channel.agent.shared(HostGpus)

    def tell(found: List[Gpu], problem: str) -> None:
        for gpu in found:
            gpu["owner"] = host.owners.get(_identity(gpu), "")
        channel.result(gpus=found, problem=problem)

    host.survey(environment(channel), bool(channel.params.get("idle")), tell)
