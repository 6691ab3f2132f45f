"""Objectives that the manager has pickled for `fmin`: plainly, or with the modules of the user's own that it needs."""

from __future__ import annotations

import io
import pickle
from typing import Any

from ....agent import localmodules

MAGIC = b"lazycluster objective\n"
_THEIRS = "lazycluster.agent.localmodules"  # what the manager calls the module that was sent along


class _ObjectiveUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return getattr(localmodules, name) if module == _THEIRS else super().find_class(module, name)


def loads(data: bytes) -> Any:
    """Return what was pickled."""
    if not data.startswith(MAGIC):
        return pickle.loads(data)  # noqa: S301
    file = io.BytesIO(data[len(MAGIC) :])
    localmodules.install(pickle.load(file))  # noqa: S301
    unpickler = _ObjectiveUnpickler(file)
    evaluate, defined, _ = unpickler.load()
    for portion in iter(unpickler.load, None):
        localmodules.fill(portion)
    for functions in defined:  # searches of 1.0.0rc1 have none
        _define(functions)
    return evaluate.__self__


def _define(functions: dict[str, Any]) -> None:
    """Have hyperopt know the functions that the user has defined for spaces, in their present version."""
    from hyperopt.pyll import scope

    for name, function in functions.items():
        if not hasattr(scope, name):
            scope.define(function)
        scope._impls[name] = function


def next_step(error: BaseException) -> str:
    """Return what to do about an error of an objective; nothing if it is not about what the manager has sent."""
    return str(localmodules.missing_part(error))
