"""Objectives from modules of the user's own, which no host has: they travel by value with all that they reach."""

from __future__ import annotations

import pickle
import types
from typing import Any

import cloudpickle

from lazycluster.agent.filenames import dumps as dumps_with_file_names
from lazycluster.tasks.pickling import dump_call

from .programs import objectives


def dumps(domain: Any, protocol: int | None = None) -> bytes:
    """Pickle what hyperopt evaluates.

    Args:
        domain: The objective and its space, as hyperopt has them.
        protocol: Without use; here since `pickle.dumps` has it.

    Raises:
        TypeError: If something cannot be sent; the message says what, and where it was found.
    """
    defined = _own_functions(domain)
    call = dump_call(domain.evaluate, (defined,))
    # If no local module is needed, every worker of hyperopt can read this.
    if not defined and not pickle.loads(call.parts[0]):  # noqa: S301
        return dumps_with_file_names(domain)
    return objectives.MAGIC + b"".join(call.parts)


def _own_functions(domain: Any) -> dict[str, Any]:
    """Return the functions of a space that are the user's own (``@scope.define``), which workers do not know."""
    from hyperopt.pyll import dfs, scope

    names = {node.name for node in dfs(domain.expr)}
    known = {name: function for name, function in scope._impls.items() if name in names}
    return {name: one for name, one in known.items() if not str(getattr(one, "__module__", "")).startswith("hyperopt.")}


def send_local_modules() -> None:
    """Have `fmin` pickle objectives such that our workers need none of the user's own modules. Does so once."""
    from hyperopt import fmin

    # What was pickled is not unpickled here, which hyperopt does to make sure that it can be.
    module = types.SimpleNamespace(dumps=dumps, loads=_nothing, dump=cloudpickle.dump, load=cloudpickle.load)
    vars(_fmin_module(fmin))["pickler"] = module


def _nothing(data: bytes) -> None:
    return None


def _fmin_module(function: Any) -> types.ModuleType:
    import sys

    return sys.modules[function.__module__]  # hyperopt has a function of the same name
