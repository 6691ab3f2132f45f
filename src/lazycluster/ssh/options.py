"""Options of ``ssh_config`` that a user may pass on, and those that the library must set itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["check_options"]

_SESSION = "the library runs its own session on the connection"
_FORWARD = "use the methods that expose ports"
_PROMPT = "the library answers or declines what ssh asks"
_NO_BLOCK = "it stands in configuration files only; pass one as config_file"

_OWNED = {
    "batchmode": _PROMPT,
    "channeltimeout": _SESSION,
    "clearallforwardings": _FORWARD,
    "connecttimeout": "use timeout",
    "controlmaster": _SESSION,
    "controlpath": _SESSION,
    "controlpersist": _SESSION,
    "dynamicforward": _FORWARD,
    "escapechar": _SESSION,
    "exitonforwardfailure": _FORWARD,
    "forkafterauthentication": _SESSION,
    "forwardagent": "what runs on a host must not be able to use your keys",
    "forwardx11": _SESSION,
    "gatewayports": "forwarded ports listen on loopback only",
    "host": _NO_BLOCK,
    "ignoreunknown": "it would hide errors in the options that keep the connection safe",
    "include": _NO_BLOCK,
    "localcommand": _SESSION,
    "localforward": _FORWARD,
    "loglevel": "the library reads the errors that ssh prints",
    "match": _NO_BLOCK,
    "numberofpasswordprompts": _PROMPT,
    "permitlocalcommand": _SESSION,
    "port": "use port",
    "proxyjump": "use proxy_jump",
    "remotecommand": _SESSION,
    "remoteforward": _FORWARD,
    "requesttty": _SESSION,
    "sessiontype": _SESSION,
    "stdinnull": _SESSION,
    "tunnel": _FORWARD,
    "tunneldevice": _FORWARD,
    "updatehostkeys": _PROMPT,
    "user": "use user",
    "visualhostkey": _SESSION,
}


def check_options(what: str, value: Any) -> tuple[str, ...]:
    """Check options of ``ssh_config``.

    Args:
        what: What they are, for the message.
        value: A dictionary (a value that is a list stands for several lines), or a list of ``Key=Value``.

    Returns:
        Them, each as ``Key=Value``.

    Raises:
        TypeError: If it is neither.
        ValueError: If an option is not well-formed, or is one that the library sets itself.
    """
    if isinstance(value, Mapping):
        pairs = [(key, item) for key, items in value.items() for item in _items(items)]
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        pairs = [_split(what, item) for item in value]
    else:
        raise TypeError(f"{what} must be a dictionary or a list of 'Key=Value', not {type(value).__name__}")
    return tuple(f"{key}={_value(f'{what}: {key}', item)}" for key, item in pairs if _allowed(what, key))


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _split(what: str, item: Any) -> tuple[str, str]:
    if not isinstance(item, str):
        raise TypeError(f"{what} must hold strings, not {type(item).__name__}")
    found = re.fullmatch(r"\s*(\w+)\s*(?:=|\s)\s*(.*\S)\s*", item)
    if not found:
        raise ValueError(f"{what}: {item!r} is not of the form 'Key=Value'")
    return found.group(1), found.group(2)


def _allowed(what: str, key: Any) -> bool:
    if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*", key):
        raise ValueError(f"{what}: {key!r} is not the name of an option")
    if key.lower() in _OWNED:
        raise ValueError(f"{what}: {key} cannot be set here: {_OWNED[key.lower()]}")
    return True


def _value(what: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (str, int)):
        raise TypeError(f"{what} must be a string, a number or a boolean, not {type(value).__name__}")
    text = str(value)
    if not text.strip() or re.search(r"[\x00\r\n]", text):
        raise ValueError(f"{what} is empty or contains a line break")
    return text
