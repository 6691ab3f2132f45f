"""Names of options in errors: written by the library as in Python, shown by a command as its own options."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Callable
from typing import Any, TypeVar, cast

import click

__all__ = ["names_its_options", "spelled", "spelled_next_steps"]

F = TypeVar("F", bound=Callable[..., Any])

# EnvironmentSpec(..., python="3.x"), connection_kwargs={"relay": "agent"}, setup="...", exclude=
_OPTION = re.compile(
    r"""(?P<call>\b(?P<callee>[A-Z]\w+)\((?:\.\.\.|'\w+'|"\w+"),\ )?
        (?<![\w-])(?P<name>[a-z_]+)=(?P<value>"[^"\n]*"|\[[^]\n]*\]|\{[^}\n]*\}|True\b|(?=[\s,;.)]|$))
        (?(call)\))""",
    re.VERBOSE,
)
_SPEC = "EnvironmentSpec"  # its arguments are options of the commands about environments, the others' are not
_CONNECTION = {"config_file": "config", "host_keys": "accept_new_host_key", "timeout": "connect_timeout"}
_OTHERWISE = {"on_unreachable": ("exclude_hosts", "-x HOSTS")}

_options: dict[str, click.Parameter] = {}
_about_environments = False


def names_its_options(command: F) -> F:
    """Let errors name the options of this command when it runs."""

    @functools.wraps(command)
    def noted(*args: Any, **kwargs: Any) -> Any:
        global _about_environments  # a process runs one command
        context = click.get_current_context()
        _options.clear()
        _options.update({param.name: param for param in context.command.params if param.name})
        _about_environments = context.parent is not None and context.parent.info_name == "env"
        _spell_warnings()
        return command(*args, **kwargs)

    return cast(F, noted)


def _spell_warnings() -> None:
    """Let warnings of the library that no other handler takes name options in the same way."""
    import logging

    class Spelled(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return spelled_next_steps(super().format(record))

    if logging.lastResort is not None:
        logging.lastResort.setFormatter(Spelled())


def spelled_next_steps(message: str) -> str:
    """Return the message of an error with the options in its next steps named as those of the command."""
    message, word, steps = message.partition("Next step")
    return message + word + spelled(steps)


def spelled(hint: str) -> str:
    """Return a hint with its options named as those of the command; others are marked as Python's."""
    return _OPTION.sub(_one, hint)


def _one(found: re.Match[str]) -> str:
    name, value = str(found["name"]), _value(found["value"])
    if name in _OTHERWISE and _OTHERWISE[name][0] in _options:
        return _OTHERWISE[name][1]
    if name == "connection_kwargs" and isinstance(value, dict) and len(value) == 1:
        ((key, value),) = value.items()
        option = _options.get(_CONNECTION.get(str(key), str(key)))
    else:
        option = _options.get(name) if (found["callee"] == _SPEC) == _about_environments else None
    if option is None:
        return f"{found[0]} (in Python)"
    values = [str(one) for one in (value if isinstance(value, list) else [value])]
    if getattr(option, "is_flag", False) or values in (["None"], ["..."]):
        values = []
    return " ".join([option.opts[-1], *map(shlex.quote, values)])


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text) if text else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # it may be what a host has said
        return None
