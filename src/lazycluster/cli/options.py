"""Options that many commands share: the hosts of a command, as sets and patterns, and the way to reach them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lazycluster.core.hostsets import MOST, HostSetError, expand, fold, is_pattern
from lazycluster.group.selection import ALL, match, without
from lazycluster.ssh.destination import check_user, parse_destination

from .console import tell
from .option_names import names_its_options
from .parameters import File, HostFile, Seconds, Whole, standard_input

if TYPE_CHECKING:
    from lazycluster.ssh.connection import Connection

__all__ = [
    "ALL",
    "Targets",
    "complete_hosts",
    "connection_options",
    "fanout_option",
    "fold",
    "from_lines",
    "host_options",
    "how_to_connect",
    "match",
    "relay_option",
    "targets",
    "without",
]

F = TypeVar("F", bound=Callable[..., Any])

_USER = "lazycluster.user"  # of the context of a command: the account that an option names
_SLOTS = re.compile(r"(?<=[ \t])(?:max[_-])?slots=[0-9]+(?=[ \t\r]|$)")
_SETTING = re.compile(r"(?<=[ \t])[A-Za-z_-]+=[^ \t\r]*")


@dataclass(frozen=True)
class Targets:
    """The hosts of a command.

    Attributes:
        names: As ssh takes them.
        everyone: Whether all hosts of the configuration were meant: those that do not answer are left out.
        settings: How they are reached, see :class:`lazycluster.ssh.config.Settings`.
        ask: Whether a person may be asked for passwords.
        default_user: The account where neither the settings nor the host's name say one.
    """

    names: list[str]
    everyone: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    ask: bool = False
    default_user: str | None = None

    def __post_init__(self) -> None:
        user = self.settings.get("user")
        for name in self.names if user is not None else ():
            own = parse_destination(name).user
            if own not in (None, user):
                raise click.UsageError(f"-l {user}: the name {name!r} says another account; leave out one of the two")

    def connection(self, name: str) -> Connection:
        """Return a connection to one of them that is not open yet."""
        from lazycluster.ssh.ssh_connection import SshConnection

        settings = self.settings
        if self.default_user is not None and parse_destination(name).user is None:
            settings = {"user": self.default_user, **settings}
        return SshConnection(name, settings, ask=self.ask)


def complete_hosts(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the names of hosts for a shell, also after a comma."""
    head, comma, last = incomplete.rpartition(",")
    known = [*_configured(ctx.params.get("config")), ALL]
    named = head.split(",")
    return [head + comma + name for name in known if name.startswith(last) and name not in named]


def _configured(config: str | None) -> list[str]:
    from lazycluster.ssh.config_hosts import configured_hosts

    return [host.name for host in configured_hosts(config) if not host.skipped]


def connection_options(command: F, user_flags: Sequence[str] = ("-l", "--user")) -> F:
    """Add the options that say how hosts are reached.

    Args:
        command: The command.
        user_flags: How the option for the account on the hosts is written, which `how_to_connect` looks up itself.
    """
    command = names_its_options(command)
    for option in (
        click.option(
            *user_flags,
            callback=_note_user,
            expose_value=False,
            metavar="USER",
            help="The account on hosts whose names say none.",
        ),
        click.option("--accept-new-host-key", is_flag=True, help="Accept new host keys, never changed ones."),
        click.option(
            "--connect-timeout",
            type=Seconds(86400),
            metavar="SECONDS",
            help="Time to wait for a host to answer (20).",
        ),
        click.option(
            "--config",
            type=File(),
            metavar="FILE",
            help="Read this file instead of ~/.ssh/config.",
        ),
    ):
        command = option(command)
    return command


def _note_user(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    try:
        check_user(value, value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None
    ctx.meta[_USER] = value


def host_options(command: F) -> F:
    """Add the options that name hosts."""
    for option in (
        click.option(
            "--hostfile", type=HostFile(), metavar="FILE", help="Read hosts from a file; '-' is standard input."
        ),
        click.option(
            "-x",
            "--exclude-hosts",
            multiple=True,
            metavar="HOSTS",
            shell_complete=complete_hosts,
            help="Hosts to leave out.",
        ),
        click.option(
            "-w",
            "--hosts",
            multiple=True,
            metavar="HOSTS",
            shell_complete=complete_hosts,
            help="Names, 'node[01-12]', 'gpu-*', with commas; @all: all of the ssh configuration that answer.",
        ),
    ):
        command = option(command)
    return command


fanout_option = click.option(
    "-f", "--fanout", type=Whole(), default=64, metavar="N", help="Number of hosts at once (64)."
)

relay_option = click.option("--relay", is_flag=True, help="Let our agent forward ports if sshd forbids it.")


def how_to_connect(
    config: str | None, connect_timeout: float | None, accept_new_host_key: bool, relay: bool = False
) -> dict[str, Any]:
    """Return the settings of connections that the options ask for."""
    settings: dict[str, Any] = {}
    if config is not None:
        settings["config_file"] = config
    if connect_timeout is not None:
        settings["timeout"] = connect_timeout
    if accept_new_host_key:
        settings["host_keys"] = "accept-new"
    if relay:
        settings["relay"] = "agent"
    context = click.get_current_context(silent=True)
    if context is not None and _USER in context.meta:
        settings["user"] = context.meta[_USER]
    return settings


def targets(
    hosts: Sequence[str],
    exclude_hosts: Sequence[str],
    hostfile: Any,
    config: str | None,
    connect_timeout: float | None,
    accept_new_host_key: bool,
    *,
    relay: bool = False,
    default: str | None = None,
) -> Targets:
    """Return the hosts that the options name.

    Args:
        hosts: The values of ``-w``.
        exclude_hosts: Those of ``-x``.
        hostfile: A file with hosts, or None.
        config: The ssh configuration, by default the user's.
        connect_timeout: In seconds.
        accept_new_host_key: Whether new hosts are taken.
        relay: Whether our agent carries ports where sshd does not.
        default: What is meant when no host is named; if there is nothing, a person is asked.

    Raises:
        click.UsageError: If no host is named, or what is named makes no sense.
    """
    from .console import person_is_there

    try:
        named = [name for value in hosts for name in _read(value)]
        if hostfile is not None:
            named += _from_file(hostfile.read())
        if not hosts and hostfile is None:
            named = expand(default if default is not None else _ask(config))
        excluded = [name for value in exclude_hosts for name in _read(value)]
        known = _configured(config) if any(map(is_pattern, named)) or ALL in named or excluded else []
        names = without(match(named, known), excluded, known)
    except HostSetError as error:
        raise click.UsageError(str(error)) from None
    except UnicodeDecodeError:
        raise click.UsageError("the file with the hosts is not a text file in UTF-8") from None
    if not names:
        raise click.UsageError(_no_hosts(config, named, bool(hosts) or hostfile is not None))
    settings = how_to_connect(config, connect_timeout, accept_new_host_key, relay)
    everyone = ALL in named
    # Whoever looks at what there is wants no questions about each host that has never been used.
    looking = everyone and default == ALL
    return Targets(names, everyone, settings, ask=person_is_there() and not looking)


def _read(value: str) -> list[str]:
    if value == "-":
        return _from_file(standard_input())
    if value.startswith("^"):
        from lazycluster.utils import expanded

        return _from_file(HostFile().convert(str(expanded(value[1:])), None, None).read())
    return expand(value)


def _no_hosts(config: str | None, named: Sequence[str], given: bool) -> str:
    if named and named != [ALL]:
        return "no host is left: all named hosts are excluded"
    if given and not named:
        return "no hosts are named: the given set or file is empty"
    where = config or "~/.ssh/config"
    return f"no hosts in {where}: add one with 'lazycluster add-runtime NAME [USER@]HOST', or name hosts with -w HOSTS"


def _ask(config: str | None) -> str:
    from .console import person_is_there

    known = _configured(config)
    if not person_is_there():
        have = f" (the ssh configuration has {fold(known)})" if known else ""
        raise click.UsageError(f"no hosts are named: use -w HOSTS, or -w @all for all active ones{have}")
    if not known:
        raise click.UsageError(_no_hosts(config, [], False))
    tell(f"Hosts of the ssh configuration: {fold(known)}", err=True)
    answer: str = click.prompt("On which hosts (@all for all)", err=True)
    return answer


# --- sets of hosts -------------------------------------------------------------------------------
def from_lines(text: str) -> list[str]:
    """Return the names in a text: one or more sets to a line, with ``#`` before comments.

    Behind a host, MPI's ``slots=N`` and ``max_slots=N`` may stand; a note says that they are not used.
    """
    names: dict[str, None] = {}
    slots = False
    # Not splitlines: U+2028 in a comment would begin a line there, with hosts that nobody has named.
    for line in text.split("\n"):
        hosts, found = _SLOTS.subn(" ", line.partition("#")[0])
        if setting := _SETTING.search(hosts):
            raise HostSetError(f"{setting[0]!r} is not a host, nor one of MPI's settings slots=N and max_slots=N")
        slots = slots or found > 0
        names.update(dict.fromkeys(expand(hosts, words=True)))
        if len(names) > MOST:
            raise HostSetError(f"more than {MOST} hosts are named")
    if slots:
        tell("Note: slots= in a file with hosts is for MPI, and not used here.", err=True)
    return list(names)


def _from_file(content: bytes) -> list[str]:
    """Return the names in a file, with or without a byte order mark; Windows also writes UTF-16.

    Raises:
        HostSetError: If what it names makes no sense.
        UnicodeDecodeError: If it is no text.
    """
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return from_lines(content.decode("utf-16" if is_utf_16 else "utf-8-sig"))
