"""The keys of a ``cluster.toml``: what each is, and whether somebody who is not trusted may set it.

A file may come from a repository of other people. Whatever could run their code, here or on hosts, or make a connection
less safe, is refused unless the user trusts the file. A key is refused unless it says here that it is harmless.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lazycluster.core.durations import duration
from lazycluster.environments.spec import EnvironmentSpec
from lazycluster.runtime.session import STARTUP_FILES
from lazycluster.ssh.config import check_setting
from lazycluster.tasks.context import checked_variables

if TYPE_CHECKING:
    from lazycluster.cluster.engine import Option

__all__ = ["CONNECTION_KEYS", "HOST_KEYS", "TOP_KEYS", "Key", "Kind", "option_key"]

Kind = Literal["text", "texts", "count", "port", "number", "duration", "paths", "jump", "ssh", "env", "environment",
               "groups", "hosts", "options"]  # fmt: skip

_MOST = 1_000_000
_PYTHON = re.compile(r"auto|(?:python|pypy)[0-9.]*")
_SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "fish", "tcsh")

SAFE_VARIABLES = frozenset((
    "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "LANG", "MKL_DYNAMIC", "MKL_NUM_THREADS",
    "NUMEXPR_MAX_THREADS", "NUMEXPR_NUM_THREADS", "OMP_DYNAMIC", "OMP_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND",
    "OMP_SCHEDULE", "OPENBLAS_NUM_THREADS", "PYTHONHASHSEED", "PYTHONUNBUFFERED", "ROCR_VISIBLE_DEVICES",
    "TF_CPP_MIN_LOG_LEVEL", "TOKENIZERS_PARALLELISM", "TZ", "VECLIB_MAXIMUM_THREADS",
))  # fmt: skip
"""Environment variables that run nobody's code, whatever their value is. Beginnings of names would not do:
``OMP_TOOL_LIBRARIES`` names libraries that are loaded."""


@dataclass(frozen=True)
class Key:
    """A key of the file.

    Attributes:
        name: Its name.
        kind: The kind of its value.
        help: What it says, for editors and the documentation.
        trust: ``needed`` if only a file that is trusted may set it, ``free`` if any may, ``never`` if none may.
        reason: Why it is not free.
        is_safe: Tells which values are free where trust is needed else.
        safe: These values in words.
        choices: The values that there are, if it is a choice.
    """

    name: str
    kind: Kind
    help: str
    trust: Literal["needed", "free", "never"] = "needed"
    reason: str = "it is not known to be harmless"
    is_safe: Callable[[Any], bool] = lambda value: False
    safe: str = ""
    choices: tuple[str, ...] = ()

    def check(self, value: Any) -> None:
        """Check the form of a value.

        Raises:
            TypeError, ValueError: It makes no sense; says why, without the name of the key.
        """
        _CHECKS[self.kind](value)
        if self.choices and value not in self.choices:
            raise ValueError(f"must be {' or '.join(map(repr, self.choices))}, not {value!r}")

    def check_use(self, value: Any) -> None:
        """Check a value that is going to be used: also the files that it names.

        Args:
            value: A value of the right form, its paths absolute.

        Raises:
            TypeError, ValueError: It cannot be used; says why.
        """
        if self.kind == "environment":
            EnvironmentSpec(**(value if isinstance(value, Mapping) else {"source": value}))
        elif self in CONNECTION_KEYS:
            check_setting(self.name, value)

    def is_free(self, value: Any) -> bool:
        """Return whether a file may set this value without being trusted."""
        return self.trust == "free" or (self.trust == "needed" and self.is_safe(value))


# --- kinds of values ------------------------------------------------------------------------------
def _check_text(value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"must be a string, not {_kind(value)}")
    if not value.strip() or "\0" in value:
        raise ValueError("is empty, or contains a null character")


def _check_texts(value: Any) -> None:
    if isinstance(value, str):
        _check_text(value)
        return
    if not isinstance(value, list):
        raise TypeError(f"must be a string or a list of strings, not {_kind(value)}")
    for item in value:
        _check_text(item)


def _check_count(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"must be an integer, not {_kind(value)}")
    if not 1 <= value <= _MOST:
        raise ValueError(f"must be from 1 to {_MOST}, not {value}")


def _check_port(value: Any) -> None:
    _check_count(value)
    if value > 65535:
        raise ValueError(f"must be from 1 to 65535, not {value}")


def _check_number(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"must be a number, not {_kind(value)}")


def _check_table(value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"must be a table, not {_kind(value)}")


def _check_variables(value: Any) -> None:
    _check_table(value)
    checked_variables(value)


def _check_environment(value: Any) -> None:
    if isinstance(value, Mapping):
        if "source" not in value:
            raise ValueError("needs a source, e.g. { source = 'manager', exclude = ['torch'] }")
        value = value["source"]
    _check_texts(value)


def _check_ssh(value: Any) -> None:
    if not isinstance(value, (list, Mapping)):
        raise TypeError(f"must be a table, or a list of 'Key=Value', not {_kind(value)}")


def _kind(value: Any) -> str:
    """Return what TOML calls a value."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "a table"}
    return kinds.get(type(value), "a date or time")


_CHECKS: dict[Kind, Callable[[Any], Any]] = {
    "text": _check_text,
    "texts": _check_texts,
    "count": _check_count,
    "port": _check_port,
    "number": _check_number,
    "duration": duration,
    "paths": _check_texts,
    "jump": _check_texts,
    "ssh": _check_ssh,
    "env": _check_variables,
    "environment": _check_environment,
    "groups": _check_table,
    "hosts": _check_table,
    "options": _check_table,
}


# --- the keys -------------------------------------------------------------------------------------
def _matches(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: pattern.fullmatch(value) is not None


_RUNS = "it can run any code on the hosts"
_READS = "it names files of this machine"
_WEAKENS = "it changes how the host is reached, and how safely"

_OWN = (
    Key("environment", "environment", "Python environment of the hosts: 'manager', requirements, a file, a path.",
        reason="its packages run code on the hosts, and are built on this machine",
        is_safe=lambda value: value == "manager", safe="'manager'"),
    Key("python", "text", "Python of the hosts: a path, a name, or 'auto' for the manager's minor version.",
        reason=_RUNS, is_safe=_matches(_PYTHON), safe="'auto', or a name such as 'python3.12'"),
    Key("setup", "texts", "Shell lines to run first, such as 'conda activate ml'.", reason=_RUNS),
    Key("env", "env", "Environment variables.", reason=_RUNS,
        is_safe=lambda value: set(value) <= SAFE_VARIABLES, safe="OMP_NUM_THREADS, CUDA_VISIBLE_DEVICES and the like"),
    Key("shell", "text", "Shell for commands.", reason=_RUNS,
        is_safe=lambda value: value in _SHELLS, safe=f"one of {', '.join(_SHELLS)}"),
    Key("working_dir", "text", "Directory on the hosts; made if it is missing.",
        reason="Python imports modules from there"),
    Key("startup_files", "text", "When the shell reads its start-up files.", "free", choices=STARTUP_FILES),
)  # fmt: skip

CONNECTION_KEYS = (
    Key("user", "text", "Account on the host.", "free"),
    Key("port", "port", "Port of the host's ssh server.", "free"),
    Key("timeout", "number", "Seconds until a host that does not answer is given up.", "free"),
    Key("link_timeout", "number", "Seconds within which it is noticed that the link has dropped.", "free"),
    Key("grace", "number", "Seconds for which the host goes on while the link is down.", "free"),
    Key("reconnect", "number", "Seconds for which a link that has dropped is tried again.", "free"),
    Key("host_keys", "text", "Host keys that are taken.", reason=_WEAKENS, choices=("strict", "accept-new"),
        is_safe=lambda value: value == "strict", safe="'strict'"),
    Key("proxy_jump", "jump", "Hosts to go through.", reason=_WEAKENS),
    Key("relay", "text", "'agent': let our agent forward ports if sshd forbids it.", reason=_WEAKENS,
        choices=("agent",)),
    Key("ssh_options", "ssh", "Options of ssh_config.", reason="they can run any program on this machine"),
    Key("config_file", "text", "File in place of ~/.ssh/config.", reason="it can run any program on this machine"),
    Key("key_filename", "paths", "Files with private keys.", reason=_READS),
    Key("password", "text", "", "never"),
    Key("passphrase", "text", "", "never"),
)  # fmt: skip
"""Keys of a host about its connection, see :class:`lazycluster.ssh.config.Settings`."""

HOST_KEYS = (
    *_OWN,
    Key("address", "text", "IP address at which other hosts reach it.", "free"),
    *CONNECTION_KEYS,
)
"""Keys of a host."""

TOP_KEYS = (
    Key("engine", "text", "Engine of the cluster, as 'lazycluster start' knows it.", "free"),
    Key("name", "text", "Name of the cluster.", "free"),
    Key("hosts", "texts", "Hosts: names, sets 'node[1-4]', patterns 'gpu-*', groups '@gpu', '@all'.", "free"),
    Key("exclude", "texts", "Hosts to leave out.", "free"),
    Key("workers", "count", "How many workers (one per host).", "free"),
    Key("master_port", "port", "Port of the master on this machine.", "free"),
    Key("idle_timeout", "duration", "End a background cluster that had no work for so long: '30 min'.", "free"),
    Key("lifetime", "duration", "End a background cluster after this time: '12 h'.", "free"),
    *_OWN,
    Key("groups", "groups", "Names for hosts, used as '@NAME' where hosts are named.", "free"),
    Key("options", "options", "Options of the engine.", "free"),
    Key("host", "hosts", "Settings of single hosts, sets, patterns and groups; what comes later wins.", "free"),
)
"""Keys of the file; those of `options` and of `host` are looked at one by one."""


def option_key(option: Option) -> Key:
    """Return the key for an option of an engine."""
    if option.kind in ("count", "port"):
        return Key(option.argument, option.kind, option.help, "free")
    if option.kind == "directory":
        return Key(option.argument, "text", option.help, reason=_READS)
    trust: Literal["free", "needed"] = "free" if option.safe else "needed"
    reason = "its engine does not state that it is harmless"
    default = option.default
    return Key(
        option.argument, "text", option.help, trust, reason=reason, choices=option.choices,
        is_safe=lambda value: value == default, safe=repr(default) if default is not None else "",
    )  # fmt: skip
