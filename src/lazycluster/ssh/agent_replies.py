"""Checks of all that agents answer: the host may run something else than our agent."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lazycluster.agent import wire

__all__ = ["AgentInfo", "check_answer", "check_shape", "decoded", "decoded_text"]

# --- messages -------------------------------------------------------------------------------------
_DIGITS = 20  # of an integer of 64 bits
_SMALLEST, _LARGEST = -(2**63), 2**64 - 1
_DEPTH = 32  # lists and objects in each other; our agent's are at most half as deep
# Those from U+DC80 to U+DCFF stand for bytes of names that are not UTF-8; the others are no text and cannot be written.
_NO_TEXT = re.compile("[\ud800-\udc7f\udd00-\udfff]")
_UNDECODED = re.compile("[\udc80-\udcff]")


def _integer(text: str) -> int:
    number = int(text) if len(text) <= _DIGITS else _LARGEST + 1
    if not _SMALLEST <= number <= _LARGEST:
        raise ValueError(f"the number {text:.20}... has more than 64 bits")
    return number


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text:.20} is not finite")
    return number


def _constant(text: str) -> float:
    raise ValueError(f"the number {text} is not finite")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_float, parse_constant=_constant)


def decoded_text(text: str) -> Any:
    """Decode JSON that a host has said: its numbers have 64 bits, its strings can be written, it is not deep.

    Raises:
        ValueError: It is something else.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text[:60], 0) from None
    if text.count("[") + text.count("{") > _DEPTH or "\\ud" in text or "\\uD" in text or _NO_TEXT.search(text):
        _check_tree(value)
    return value


def _check_tree(value: Any) -> None:
    level = [value]
    for _ in range(_DEPTH + 1):
        following: list[Any] = []
        for one in level:
            if isinstance(one, str):
                if _NO_TEXT.search(one):
                    raise ValueError(f"{one!r:.60} is not text")
            elif isinstance(one, dict):
                following += one
                following += one.values()
            elif isinstance(one, list):
                following += one
        if not following:
            return
        level = following
    raise ValueError("it is nested too deeply")


def decoded(payload: bytes) -> dict[str, Any]:
    """Decode a message of an agent.

    Raises:
        FrameError: It is no message.
        ValueError: It is one, but holds what our agent does not say; see `decoded_text`.
    """
    try:
        message = decoded_text(payload.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise wire.FrameError(f"a message is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise wire.FrameError(f"a message is not an object, but {message!r:.60}")
    return message


# --- answers --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Between:
    """Numbers, whole or not, from one to another."""

    low: float
    high: float


class _Name:
    """A name of the file system, or what a user has called something: text that may hold undecoded bytes."""


# A shape is a type, `NAME`, a range of integers, numbers `_Between` two, a pattern of text, a tuple of shapes of which
# one fits, [shape] for a list, {name: shape} for an object that has at least these, {...: shape} for one with any
# names; a name that ends with "?" may be missing. `str` is text without undecoded bytes, which can be written anywhere.
NAME = _Name()
_NONE = type(None)
_COUNT = range(2**63)
_PORT = range(1, 65536)
_PID = range(1, 2**31)
_EXIT = range(-(2**31), 2**32)
_NUMBER = _Between(0, 2**63)
_TIME = _Between(0, 253402214400)  # seconds since 1970; the year 9999 is the last that Python can show
_VERSION = [range(2**16)]
_WORD = re.compile("[A-Za-z0-9_.+-]{0,64}")  # becomes a part of names of files here
_STATUS = {
    "exit": (_EXIT, _NONE), "signal": (range(2**16), _NONE), "limit?": str, "out_of_memory?": (str, _NONE),
    "left?": [NAME],
}  # fmt: skip
_CALL = {
    "status": str, "exit?": (_EXIT, _NONE), "signal?": (range(2**16), _NONE), "phase?": str, "limit?": str,
    "out_of_memory?": (str, _NONE),
}  # fmt: skip
_STEP = {
    "ok": bool, "message?": NAME, "limit?": str, "status?": str, "exit?": (_EXIT, _NONE),
    "signal?": (range(2**16), _NONE), "phase?": str, "out_of_memory?": (str, _NONE),
}  # fmt: skip
_TASK = {
    "id": re.compile("[0-9a-f]{16}"), "name?": (NAME, _NONE), "created?": (_TIME, _NONE), "state": str,
    "labels": [NAME], "steps": [_STEP], "age?": _NUMBER, "ended_ago?": (_NUMBER, _NONE), "restarted?": bool,
}  # fmt: skip
_GPU = {
    "id?": str, "name?": str, "owner?": NAME, "busy?": (str, bool), "memory?": (_NUMBER, _NONE),
    "memory_used?": (_NUMBER, _NONE), "utilization?": (_NUMBER, _NONE),
}  # fmt: skip
_INFO = {
    "os": str, "cpu_cores": range(1, 2**20), "memory": _COUNT, "memory_free": _COUNT, "load": [_NUMBER],
    "disk_total": _COUNT, "disk_free": _COUNT, "python_version": str, "python": NAME, "hostname": NAME,
    "architecture": str, "kernel": str, "uptime": (_TIME, _NONE), "gpus": [_GPU], "gpu_problem": NAME,
}  # fmt: skip
_ENVIRONMENT = {
    "id": str, "path": NAME, "source": (NAME, _NONE), "python": (NAME, _NONE), "packages": {...: (str, _NONE)},
    "size": (_COUNT, _NONE), "made": (_TIME, _NONE), "last_used": _TIME, "in_use": bool, "problem": (NAME, _NONE),
}  # fmt: skip
_INTERPRETER = {"path": NAME, "version": _VERSION}

_SHAPES: dict[str, Any] = {
    "activity": dict.fromkeys(("busy", "total", "tasks", "workers", "tunnels"), _NUMBER),
    "call": _CALL,
    "detach": {"id": re.compile("[0-9a-f]{16}")},
    "detached log": {"end": _COUNT},
    "detached list": {"tasks": [_TASK]},
    "detached state": {"task": _TASK},
    "environment build": {"prefix": NAME},
    "environment compiled": {"compiled": bool},
    "environment facts": {"root": NAME, "system": _WORD, "machine": _WORD, "libc": [_WORD]},
    "environment find": {"found": bool, "prefix": NAME},
    "environment list": {"root": NAME, "size": _COUNT, "now": _TIME, "environments": [_ENVIRONMENT]},
    "environment prune": {"removed": [str], "in_use": [str], "before": _COUNT, "after": _COUNT},
    "environment remove": {"removed": [str], "in_use": [str], "unknown": [str]},
    "environment sift": {"removed": list},
    "environment survey": {"interpreters": [_INTERPRETER], "reachable": [[(NAME, int)]]},
    "environment wheels": {"missing": [NAME], "directory": NAME},
    "expand": {"path": NAME, "directory": (bool, _NONE), "identity": ([int], _NONE)},
    "exposed": {"exposed": [_PORT]},
    "gpus": {"gpus": [{**_GPU, "id": str, "owner": NAME, "busy": (str, bool)}], "problem": NAME},
    "info": _INFO,
    "interpreters": {"interpreters": [_INTERPRETER]},
    "leftovers": {"processes": [{"pid": _PID, "command": NAME}], "directories": [NAME]},
    "listen": {"sockets": [NAME]},
    "mkdir": {"path": NAME, "writable?": bool},
    "mkdtemp": {"path": NAME},
    "nonce": {"port": _PORT, "nonce": str},
    "packages": {
        "version": _VERSION,
        "executable": NAME,
        "managed?": bool,
        "packages": {...: (str, _NONE)},
        "bytecode?": {"lacking": [NAME], "cache": NAME, "problem": str},
    },
    "ports": {"free": [_PORT], "denied?": [_PORT]},
    "run": _STATUS,
    "service": {"exit": (_EXIT, _NONE), "signal": (range(2**16), _NONE)},
    "session": {"grace": _NUMBER, "refusal": (NAME, _NONE)},
    "setup": {"env": {...: NAME}},
    "usage": {"services": {...: [_NUMBER]}, "time": _NUMBER, "hertz": _NUMBER},
}


def check_answer(request: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    """Check what was answered to a request.

    Raises:
        ValueError: It makes no sense; says where.
    """
    kind = " ".join(str(request[key]) for key in ("op", "do", "action") if key in request)
    check_shape(answer, _SHAPES.get(kind, {}))


def check_shape(value: Any, shape: Any, where: str = "") -> None:
    """Check the shape of what an agent says; see above.

    Raises:
        ValueError: It is another one; says where.
    """
    if isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} is not a list")
        for one in value:
            check_shape(one, shape[0], where)
    elif isinstance(shape, dict):
        _check_object(value, shape, where)
    elif isinstance(shape, tuple):
        if not any(_has_shape(value, one) for one in shape):
            raise ValueError(f"{where} is {value!r:.60}")
    elif not _fits(value, shape):
        raise ValueError(f"{where} is {value!r:.60}")


def _has_shape(value: Any, shape: Any) -> bool:
    try:
        check_shape(value, shape)
    except ValueError:
        return False
    return True


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, range):
        return isinstance(value, int) and not isinstance(value, bool) and value in shape
    if isinstance(shape, _Between):
        return isinstance(value, (int, float)) and shape.low <= value <= shape.high  # NaN is not
    if shape is NAME:
        return isinstance(value, str)
    if isinstance(shape, re.Pattern):
        return isinstance(value, str) and shape.fullmatch(value) is not None
    if shape is str:
        return isinstance(value, str) and _UNDECODED.search(value) is None
    return isinstance(value, shape) and not (isinstance(value, float) and not math.isfinite(value))


def _check_object(value: Any, shape: dict[Any, Any], where: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is not an object")
    if ... in shape:
        for name, one in value.items():
            check_shape(one, shape[...], f"{where}.{name:.60}")
        return
    for name, inner in shape.items():
        key = name.removesuffix("?")
        inside = f"{where}.{key}" if where else key
        if key in value:
            check_shape(value[key], inner, inside)
        elif key == name:
            raise ValueError(f"{inside} is missing")


@dataclass(frozen=True)
class AgentInfo:
    """Facts about a host, which its agent states when it has started."""

    python: tuple[int, int, int]
    executable: str
    pid: int
    uid: int
    user: str
    home: str
    shell: str
    hostname: str
    directory: str
    identity: str
    platform: str
    boot_id: str
    booted: int
    machine_id: str
    network: str
    path: str

    @classmethod
    def parse(cls, message: dict[str, Any]) -> AgentInfo:
        """Make one from the agent's message.

        Raises:
            ValueError: If it makes no sense.
        """
        try:
            check_shape(message, _INFO_SHAPE)
            if len(message["python"]) != 3:
                raise ValueError("python is not three numbers")
        except ValueError as error:
            raise ValueError(f"the agent's first message is invalid: {error}") from None
        values = {field.name: message[field.name] for field in fields(cls)}
        return cls(**{**values, "python": tuple(message["python"])})


_INFO_SHAPE: dict[str, Any] = {
    **{field.name: NAME for field in fields(AgentInfo)}, "python": [range(2**16)], "pid": range(1, 2**31),
    "uid": range(2**32), "booted": range(2**63),
}  # fmt: skip
