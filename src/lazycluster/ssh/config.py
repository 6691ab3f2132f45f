"""Settings of a connection to one host, and the ``ssh`` command line that they become.

The user's own ssh configuration stays in charge of everything about reaching and authenticating a host. What is
overridden here is only what would keep a program from using the connection: other sessions, terminals, forwardings,
prompts, and output that is not an error.
"""

from __future__ import annotations

import functools
import math
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lazycluster.core.limits import limit_hint
from lazycluster.core.suggestions import suggestion
from lazycluster.exceptions import InvalidRuntimeError
from lazycluster.utils import absolute, expanded

from .config_hosts import CONFIG_VARIABLE
from .destination import Destination, check_user, parse_destination

__all__ = [
    "MAX_CONTROL_PATH",
    "Destination",
    "Settings",
    "check_setting",
    "parse_destination",
    "ssh_argv",
    "ssh_version",
]

DEFAULT_TIMEOUT = 20.0
"""Seconds until a host that does not answer is given up."""

DEFAULT_LINK_TIMEOUT = 10.0
"""Seconds within which it is noticed that a link has dropped."""

DEFAULT_GRACE = 300.0
"""Seconds for which a host waits for a manager whose link has dropped."""

MAX_CONTROL_PATH = 80
"""ssh appends 17 characters to the path while it starts to listen: see `core.unix.SOCKET_PATH_SIZE`."""

_OLDEST_SSH = (7, 6)
_LONGEST_SPAN = 30 * 86400
_HOST_KEYS = {"strict": "yes", "accept-new": "accept-new"}

# Options of ssh_config that the library sets itself, each with the reason why the user cannot.
_SESSION = "the library runs its own session on the connection"
_FORWARD = "use the methods that expose ports"
_PROMPT = "the library answers or declines what ssh asks"
_NO_BLOCK = "it is allowed in configuration files only; pass one as config_file"

_RESERVED = {
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


@dataclass(frozen=True)
class Settings:
    """Settings of a connection to one host. What is None is left to the user's ssh configuration.

    Attributes:
        host: The host as the user named it.
        target: The name that ssh is given: an alias of the configuration, a name or an address.
        user: The account on the host.
        port: The port of the host's ssh server.
        key_filename: Files with private keys. They are offered first, then those that the configuration names for the
            host; keys that only an agent holds are not.
        password: The account's password; never shown.
        passphrase: What unlocks the private key; never shown.
        timeout: Seconds until a host that does not answer is given up.
        config_file: Read instead of ``~/.ssh/config``; ``none`` for no file at all. By default the one that the
            environment variable ``LAZYCLUSTER_SSH_CONFIG`` names, if it is set.
        proxy_jump: Hosts to go through, separated by commas; ``none`` for a direct connection.
        host_keys: ``strict`` takes known host keys only, ``accept-new`` also those of hosts never seen before.
        ssh_options: Further options of ``ssh_config``, each as ``Key=Value``.
        relay: ``agent``: where the host's sshd forbids to forward ports, they are carried by our agent there, over a
            further session. Whoever forbade it may have meant that. None: it is an error.
        link_timeout: Seconds within which it is noticed that the link to the host has dropped.
        grace: Seconds for which the host goes on with what runs there while the link is down, and keeps what comes out;
            0 ends everything as soon as the link drops.
        reconnect: Seconds for which a link that has dropped is tried again; None: as long as ``grace``.
    """

    host: str
    target: str
    user: str | None = None
    port: int | None = None
    key_filename: tuple[str, ...] = ()
    password: str | None = field(default=None, repr=False)
    passphrase: str | None = field(default=None, repr=False)
    timeout: float = DEFAULT_TIMEOUT
    config_file: str | None = None
    proxy_jump: str | None = None
    host_keys: str | None = None
    ssh_options: tuple[str, ...] = ()
    relay: str | None = None
    link_timeout: float = DEFAULT_LINK_TIMEOUT
    grace: float = DEFAULT_GRACE
    reconnect: float | None = None

    @classmethod
    def parse(cls, host: str, connection_kwargs: Mapping[str, Any] | None = None) -> Settings:
        """Check what a user gave.

        Args:
            host: The host, see :func:`parse_destination`.
            connection_kwargs: Any of the attributes above beside ``host`` and ``target``; None stands for "not given".
                ``key_filename`` may be one path or several, ``ssh_options`` a dictionary or a list.

        Returns:
            The settings.

        Raises:
            TypeError: If a value is of the wrong type.
            ValueError: If a key is unknown, a value out of range, or two values contradict each other.
        """
        user, target, port = parse_destination(host)
        given = dict(connection_kwargs or {})
        for key in given:
            if key not in _CHECKS:
                raise ValueError(f"{host}: unknown key in connection_kwargs: {key!r}{suggestion(key, _CHECKS)}")
        values: dict[str, Any] = {"user": user, "port": port}
        if given.get("config_file") is None and os.environ.get(CONFIG_VARIABLE):
            values["config_file"] = _config_file(CONFIG_VARIABLE, os.environ[CONFIG_VARIABLE])
        for key, value in given.items():
            if value is None:
                continue
            checked = _CHECKS[key](f"{host}: {key}", value)
            if values.get(key) not in (None, checked):
                raise ValueError(f"{host}: the host's name says {key} {values[key]}, but connection_kwargs {checked}")
            values[key] = checked
        settings = cls(host=host, target=target, **values)
        if settings.proxy_jump and any(o.lower().startswith("proxycommand=") for o in settings.ssh_options):
            raise ValueError(f"{host}: either proxy_jump or the ssh option ProxyCommand can be given, not both")
        return settings


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a string, not {type(value).__name__}")
    if not value:
        raise ValueError(f"{what} is empty")
    if re.search(r"[\x00\r\n]", value):
        raise ValueError(f"{what} contains a line break or a null character")
    return value


def _user(what: str, value: Any) -> str:
    text = _text(what, value)
    check_user(f"{what} {text}", text)
    return text


def _port(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an integer, not {type(value).__name__}")
    if not 0 < value < 65536:
        raise ValueError(f"{what} must be from 1 to 65535, not {value}")
    return value


def _timeout(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what} must be a number of seconds, not {type(value).__name__}")
    if not 0 < value <= 86400:
        raise ValueError(f"{what} must be greater than 0 and at most 86400 seconds, not {value}")
    return float(value)


def _link_timeout(what: str, value: Any) -> float:
    seconds = _timeout(what, value)
    if seconds < 1:
        raise ValueError(f"{what} must be at least 1 second, not {value}")
    return seconds


def _span(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what} must be a number of seconds, not {type(value).__name__}")
    if not 0 <= value <= _LONGEST_SPAN:
        raise ValueError(f"{what} must be at least 0 and at most {_LONGEST_SPAN} seconds, not {value}")
    return float(value)


def _path(what: str, value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{what} must be a path, not {type(value).__name__}")
    return str(expanded(_text(what, os.fspath(value))))


def _keys(what: str, value: Any) -> tuple[str, ...]:
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    paths = tuple(_path(what, item) for item in (value if several else [value]))
    if not paths:
        raise ValueError(f"{what} is empty")
    for path in paths:
        # ssh itself would go on without the key, and report a host that takes none. With % it stands for something
        # that only ssh knows.
        if "%" not in path and not os.access(path, os.R_OK):
            raise ValueError(f"{what}: no readable key file: {path}")
    return tuple(path if "%" in path else str(absolute(path)) for path in paths)


def _config_file(what: str, value: Any) -> str:
    path = _path(what, value)
    if path.lower() == "none":
        return "none"
    if not os.access(path, os.R_OK) or Path(path).is_dir():
        step = 'connection_kwargs={"config_file": "..."} names one that can be read'
        raise ValueError(f"{what}: no readable file: {path}\n  Next step: {step}")
    return str(absolute(path))


def _proxy_jump(what: str, value: Any) -> str:
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    parts = [_text(what, part) for part in (value if several else [value])]
    hops = [_text(what, hop.strip()) for part in parts for hop in part.split(",")]
    if [hop.lower() for hop in hops] == ["none"]:
        return "none"
    try:
        for hop in hops:
            parse_destination(hop)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if not hops:
        raise ValueError(f"{what} is empty")
    return ",".join(hops)


def _host_keys(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a string, not {type(value).__name__}")
    if value not in _HOST_KEYS:
        raise ValueError(f"{what} must be 'strict' or 'accept-new', not {value!r}")
    return value


def _relay(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a string, not {type(value).__name__}")
    if value != "agent":
        raise ValueError(f"{what} must be 'agent', not {value!r}")
    return value


def _ssh_options(what: str, value: Any) -> tuple[str, ...]:
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
        pairs = [(key, item) for key, items in value.items() for item in _option_items(items)]
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        pairs = [_option_pair(what, item) for item in value]
    else:
        raise TypeError(f"{what} must be a dictionary or a list of 'Key=Value', not {type(value).__name__}")
    return tuple(
        f"{key}={_option_value(f'{what}: {key}', item)}" for key, item in pairs if _option_is_allowed(what, key)
    )


def _option_items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _option_pair(what: str, item: Any) -> tuple[str, str]:
    if not isinstance(item, str):
        raise TypeError(f"{what} must hold strings, not {type(item).__name__}")
    found = re.fullmatch(r"\s*(\w+)\s*(?:=|\s)\s*(.*\S)\s*", item)
    if not found:
        raise ValueError(f"{what}: {item!r} is not of the form 'Key=Value'")
    return found.group(1), found.group(2)


def _option_is_allowed(what: str, key: Any) -> bool:
    if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*", key):
        raise ValueError(f"{what}: {key!r} is not the name of an option")
    if key.lower() in _RESERVED:
        raise ValueError(f"{what}: {key} cannot be set here: {_RESERVED[key.lower()]}")
    return True


def _option_value(what: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (str, int)):
        raise TypeError(f"{what} must be a string, a number or a boolean, not {type(value).__name__}")
    text = str(value)
    if not text.strip() or re.search(r"[\x00\r\n]", text):
        raise ValueError(f"{what} is empty or contains a line break")
    return text


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "user": _user,
    "port": _port,
    "key_filename": _keys,
    "password": _text,
    "passphrase": _text,
    "timeout": _timeout,
    "config_file": _config_file,
    "proxy_jump": _proxy_jump,
    "host_keys": _host_keys,
    "ssh_options": _ssh_options,
    "relay": _relay,
    "link_timeout": _link_timeout,
    "grace": _span,
    "reconnect": _span,
}

assert set(_CHECKS) == {f.name for f in fields(Settings)} - {"host", "target"}


def check_setting(name: str, value: Any) -> None:
    """Check one setting by itself.

    Args:
        name: One of the attributes of `Settings`, beside ``host`` and ``target``.
        value: What is given for it.

    Raises:
        TypeError: If it is of the wrong type.
        ValueError: If it is out of range.
    """
    _CHECKS[name](name, value)


@functools.lru_cache(maxsize=1)
def ssh_version() -> tuple[int, int]:
    """Return the version of the ssh client, e.g. ``(9, 2)``; asked once.

    Raises:
        InvalidRuntimeError: With the reason ``ssh`` if there is no usable OpenSSH client.
    """
    hint = "install the OpenSSH client of your system, and make sure that it is on the PATH"
    try:
        done = subprocess.run(["ssh", "-V"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
    except FileNotFoundError:
        detail = "no ssh client is installed on this machine, or it is not on the PATH"
        raise InvalidRuntimeError("localhost", "ssh", detail, hint) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        if isinstance(error, OSError) and (limit := limit_hint(error)):
            raise InvalidRuntimeError("localhost", "manager", f"ssh cannot be started: {error}", limit) from None
        raise InvalidRuntimeError("localhost", "ssh", f"the ssh client does not run: {error}", hint) from None
    text = (done.stderr + done.stdout).decode(errors="replace").strip()
    if text.startswith("No user exists for uid"):
        detail = f"ssh does not start on this machine, since the user id {os.getuid()} has no entry in /etc/passwd"
        hint = (
            "add one, as entry points of containers do where /etc/passwd may be written to: "
            'echo "user:x:$(id -u):0::$HOME:/bin/sh" >> /etc/passwd; or run as a user that has one'
        )
        raise InvalidRuntimeError("localhost", "ssh", detail, hint)
    found = re.search(r"OpenSSH\w*?_(\d+)\.(\d+)", text)
    if not found:
        raise InvalidRuntimeError("localhost", "ssh", f"'ssh' is not OpenSSH, but says: {text[:200]}", hint)
    version = int(found.group(1)), int(found.group(2))
    if version < _OLDEST_SSH:
        raise InvalidRuntimeError("localhost", "ssh", f"OpenSSH 7.6 or newer is needed, this is: {text[:200]}", hint)
    return version


_OVERRIDES = (
    "ControlPersist=no",
    "RemoteCommand=none",
    "RequestTTY=no",
    "EscapeChar=none",
    "PermitLocalCommand=no",
    "Tunnel=no",
    "ForwardX11=no",
    "ForwardAgent=no",
    "ClearAllForwardings=yes",
    "ExitOnForwardFailure=no",
    "GatewayPorts=no",
    # Prompts come to us, and are answered or declined there: so an error can say what was asked.
    "BatchMode=no",
    # Without it 64 clients at once may rewrite the same known_hosts, and "ask" would ask.
    "UpdateHostKeys=no",
    "VisualHostKey=no",
    # Below INFO it does not say why it could not agree with a host, or that a host no longer answers.
    "LogLevel=INFO",
)
_OVERRIDES_SINCE = (
    ((8, 7), ("SessionType=default", "ForkAfterAuthentication=no", "StdinNull=no")),
    ((9, 7), ("ChannelTimeout=none",)),
)


def ssh_argv(
    settings: Settings,
    control_path: str,
    remote_command: str,
    version: tuple[int, int],
    *,
    ask: bool = False,
    log: str | None = None,
) -> list[str]:
    """Return the command line of the one ssh process of a host, a multiplexing master.

    Args:
        settings: How to reach the host.
        control_path: Where the master listens: absolute, of at most ``MAX_CONTROL_PATH`` bytes.
        remote_command: What the host's login shell is to run.
        version: The client's version, see :func:`ssh_version`.
        ask: Whether a person answers its questions, and may mistype.
        log: A file that takes ssh's own words, also that it has logged in. Standard error has those of others then: the
            banner of the host's sshd, what a ProxyCommand or jump host's ssh says, and the host's login shell.

    Returns:
        The command line. It holds no secret.

    Raises:
        ValueError: If the control path is not usable.
    """
    if not control_path.startswith("/") or len(os.fsencode(control_path)) > MAX_CONTROL_PATH or "${" in control_path:
        raise ValueError(f"not usable as a control path (absolute, {MAX_CONTROL_PATH} bytes at most): {control_path}")
    argv = ["ssh"]
    if settings.config_file:
        argv += ["-F", settings.config_file]
    argv += ["-M", "-S", control_path.replace("%", "%%"), "-T"]
    if log is not None:
        argv += ["-E", log, "-o", "LogLevel=VERBOSE"]
    # ssh takes the first value that it sees for an option: ours stand before the user's.
    for option in _options(settings, version, ask):
        argv += ["-o", option]
    if settings.user is not None:
        argv += ["-l", settings.user]
    if settings.port is not None:
        argv += ["-p", str(settings.port)]
    for key in settings.key_filename:
        argv += ["-i", key]
    if settings.proxy_jump:
        argv += ["-J", settings.proxy_jump]
    return [*argv, "--", settings.target, remote_command]


def _options(settings: Settings, version: tuple[int, int], ask: bool) -> list[str]:
    options = list(_OVERRIDES)
    for since, names in _OVERRIDES_SINCE:
        if version >= since:
            options += names
    options.append(f"NumberOfPasswordPrompts={3 if ask else 1}")
    options.append(f"ConnectTimeout={math.ceil(settings.timeout)}")
    if settings.key_filename:
        options.append("IdentitiesOnly=yes")
    if settings.host_keys:
        options.append(f"StrictHostKeyChecking={_HOST_KEYS[settings.host_keys]}")
    options += settings.ssh_options
    given = {option.partition("=")[0].lower() for option in settings.ssh_options}
    # The user's configuration does not count here: without these a dead link hangs for ever.
    every = max(1, int(settings.link_timeout / 5))
    count = max(1, int(settings.link_timeout / every) - 1)
    for name, value in (("ServerAliveInterval", every), ("ServerAliveCountMax", count)):
        if name.lower() not in given:
            options.append(f"{name}={value}")
    return options
