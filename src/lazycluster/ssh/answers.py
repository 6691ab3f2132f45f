"""What an agent may answer: checked before anybody uses it, since the host may run something else than our agent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["check_answer", "check_shape"]

# A shape is a type or several, [shape] for a list, {name: shape} for an object that has at least these, {...: shape}
# for one with any names; a name that ends with "?" may be missing.
_NUMBER = (int, float)
_MAYBE_NUMBER = (int, float, type(None))
_STATUS = {"exit": (int, type(None)), "signal": (int, type(None)), "limit?": str, "out_of_memory?": str}
_TASK = {"id": str, "state": str, "labels": [str], "steps": [dict]}
_INFO = {
    "os": str, "cpu_cores": int, "memory": int, "memory_free": int, "load": [_NUMBER], "disk_total": int,
    "disk_free": int, "python_version": str, "python": str, "hostname": str, "architecture": str, "kernel": str,
    "uptime": _MAYBE_NUMBER, "gpus": [dict], "gpu_problem": str,
}  # fmt: skip
_ENVIRONMENT = {
    "id": str, "path": str, "source": (str, type(None)), "python": (str, type(None)), "packages": dict,
    "size": (int, type(None)), "made": _MAYBE_NUMBER, "last_used": _NUMBER, "problem": (str, type(None)),
}  # fmt: skip

_SHAPES: dict[str, Any] = {
    "activity": dict.fromkeys(("busy", "total", "tasks", "workers", "tunnels"), _NUMBER),
    "call": {"status": str, "exit?": (int, type(None)), "signal?": (int, type(None)), "phase?": str, "limit?": str},
    "detached list": {"tasks": [_TASK]},
    "detached state": {"task": _TASK},
    "environment build": {"prefix": str},
    "environment compiled": {"compiled": bool},
    "environment facts": {"root": str, "system": str, "machine": str, "libc": [str]},
    "environment find": {"found": bool, "prefix": str},
    "environment list": {"root": str, "size": int, "now": _NUMBER, "environments": [_ENVIRONMENT]},
    "environment prune": {"removed": [str], "in_use": [str], "before": int, "after": int},
    "environment remove": {"removed": [str], "in_use": [str], "unknown": [str]},
    "environment sift": {"removed": list},
    "environment survey": {"interpreters": [{"path": str, "version": [int]}], "reachable": [[(str, int)]]},
    "environment wheels": {"missing": [str], "directory": str},
    "expand": {"path": str, "directory": (bool, type(None)), "identity": (list, type(None))},
    "exposed": {"exposed": [int]},
    "gpus": {"gpus": [dict], "problem": str},
    "info": _INFO,
    "interpreters": {"interpreters": [{"path": str, "version": [int]}]},
    "leftovers": {"processes": [{"pid": int, "command": str}], "directories": [str]},
    "listen": {"sockets": [str]},
    "mkdir": {"path": str},
    "mkdtemp": {"path": str},
    "nonce": {"port": int, "nonce": str},
    "packages": {"version": [int], "executable": str, "packages": {...: (str, type(None))}},
    "ports": {"free": [int]},
    "run": _STATUS,
    "service": {"exit": (int, type(None)), "signal": (int, type(None))},
    "setup": {"env": {...: str}},
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
            raise ValueError(f"{where} is no list")
        for one in value:
            check_shape(one, shape[0], where)
    elif isinstance(shape, dict):
        _check_object(value, shape, where)
    elif not isinstance(value, shape) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{where} is {value!r:.60}")


def _check_object(value: Any, shape: dict[Any, Any], where: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is no object")
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
