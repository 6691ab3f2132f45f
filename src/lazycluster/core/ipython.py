"""Results that IPython remembers: they must not keep hosts and clusters alive that nobody else refers to."""

from __future__ import annotations

import sys
import weakref
from typing import Any

__all__ = ["register"]

_OWN_NAMES = ("_", "__", "___")

_things: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
"""The objects that are tracked; True for those that have had a name of the user's."""
_listening: weakref.WeakSet[Any] = weakref.WeakSet()


def register(thing: object) -> None:
    """Have something that holds hosts let go when the user's name for it is given to something else.

    A cell that makes a group, and shows it, may be run again. IPython keeps what a cell showed (`Out`), so the group
    before would keep its connections, and a cluster its workers, until the kernel ends. What has never had a name of
    the user's is kept, since `_` or `Out[1]` is the only way to it.

    Args:
        thing: A group, a manager, a cluster.
    """
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    if shell is None:
        return
    _things[thing] = False
    if shell not in _listening:
        _listening.add(shell)
        shell.events.register("post_run_cell", lambda _result: _forget(shell))


def _forget(shell: Any) -> None:
    names: dict[str, Any] = shell.user_ns
    named = {id(value) for name, value in list(names.items()) if not name.startswith("_")}
    for thing in list(_things):
        if id(thing) in named:
            _things[thing] = True
        elif _things[thing]:
            for space in (names, getattr(shell, "user_ns_hidden", {})):
                _drop(shell.displayhook, space, thing)


def _drop(hook: Any, names: dict[str, Any], thing: object) -> None:
    shown: dict[int, Any] = names.get("_oh") or {}
    for number, value in list(shown.items()):
        if value is thing:
            del shown[number]
    for name, value in list(names.items()):
        if value is thing and (name in _OWN_NAMES or (name.startswith("_") and name[1:].isdigit())):
            names[name] = ""
    for name in _OWN_NAMES:
        if getattr(hook, name, None) is thing:
            setattr(hook, name, "")
