"""``lazycluster add-runtime`` and ``delete-runtime``: the hosts of the ssh configuration."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lazycluster.cli.console import tell
from lazycluster.cli.option_names import names_its_options, spelled_next_steps
from lazycluster.cli.options import Targets, complete_hosts, how_to_connect
from lazycluster.cli.parameters import File
from lazycluster.ssh.config_hosts import CONFIG_VARIABLE
from lazycluster.utils import expanded

if TYPE_CHECKING:
    from lazycluster.cli.fanout import HostOutcome
    from lazycluster.ssh.connection import Connection

__all__ = ["add_runtime", "delete_runtime"]

_config = click.option(
    "--config",
    envvar=CONFIG_VARIABLE,  # the same file is read
    type=File(exists=False),
    metavar="FILE",
    help="Change this file instead of ~/.ssh/config.",
)
_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa", "id_ed25519_sk", "id_ecdsa_sk")


@click.command()
@_config
@click.option("--id_file", "--id-file", metavar="FILE", help="The private key to use.")
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="A further line of the entry, as in 'man ssh_config'.",
)
@click.option("--copy-id", is_flag=True, help="Install your public key on it; asks for your password.")
@click.option("--check", is_flag=True, help="Connect, and report whether the host can be used.")
@click.option("--accept-new-host-key", is_flag=True, help="Accept the key of a new host without asking.")
@click.argument("name")
@click.argument("host", metavar="[USER@]HOST[:PORT]")
@names_its_options
def add_runtime(
    name: str, host: str, config: str | None, id_file: str | None, options: tuple[str, ...], copy_id: bool,
    check: bool, accept_new_host_key: bool,
) -> int:  # fmt: skip
    """Add a host to the ssh configuration, for 'ssh NAME' and for all commands.

    The rest of the file stays as it is, and a backup is kept beside it. If the new entry is not valid, nothing is
    changed.

    \b
    Examples:
      lazycluster add-runtime gpu-a me@gpu-a.lab.org
      lazycluster add-runtime node1 me@192.0.2.7:2222 --copy-id --check
      lazycluster add-runtime node1 me@192.0.2.7 --id_file ~/.ssh/lab
      lazycluster add-runtime node2 10.0.0.2 --option ProxyJump=gateway
    """
    from lazycluster.ssh.config_file import add_host
    from lazycluster.ssh.destination import parse_destination

    user, hostname, port = parse_destination(host)
    entries = {"HostName": hostname.replace("%", "%%")}
    if user is not None:
        entries["User"] = user
    if port is not None:
        entries["Port"] = str(port)
    if id_file is not None:
        if "%" not in id_file and not os.access(expanded(id_file), os.R_OK):
            raise click.UsageError(f"no readable key file: {id_file}")
        entries["IdentityFile"] = id_file if id_file.startswith(("~", "%")) else str(Path(id_file).absolute())
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise click.UsageError(f"--option {option}: write it as KEY=VALUE")
        entries[key.strip()] = value.strip()
    public = _public_key(id_file) if copy_id else None
    path = add_host(name, entries, config)
    tell(f"{name} was added to {path}.")
    if public is not None:
        _copy_id(name, config, public, accept_new_host_key)
    if check or accept_new_host_key:
        return _check(name, config, accept_new_host_key)
    if not copy_id:
        tell(f"Next step: check that it can be used: {_doctor(name, config)}")
    return 0


@click.command()
@_config
@click.argument("name", shell_complete=complete_hosts)
def delete_runtime(name: str, config: str | None) -> None:
    """Remove a host from the ssh configuration.

    If a line names several hosts, only this name is removed. A backup of the file is kept beside it.

    \b
    Example:
      lazycluster delete-runtime gpu-a
    """
    from lazycluster.ssh.config_file import BACKUP, remove_host

    path = remove_host(name, config)
    backup = os.path.realpath(path) + BACKUP
    tell(f"{name} was removed from {path}; the previous version is in {backup}.")


def _doctor(name: str, config: str | None) -> str:
    return shlex.join(["lazycluster", "doctor", *(["--config", config] if config else []), name])


def _public_key(id_file: str | None) -> Path:
    folder = expanded("~/.ssh")
    candidates = [expanded(id_file + ".pub")] if id_file else [folder / f"{name}.pub" for name in _KEYS]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    where = str(candidates[0]) if id_file else str(folder)
    make = shlex.join(["ssh-keygen", "-t", "ed25519", *(["-f", id_file] if id_file else [])])
    raise click.UsageError(
        f"no public key in {where}; nothing was changed\n  Next step: make a key pair, then try again: {make}"
    )


def _copy_id(name: str, config: str | None, key: Path, accept: bool) -> None:
    program = shutil.which("ssh-copy-id")
    if program is None:
        raise click.ClickException("ssh-copy-id is not installed; it comes with the OpenSSH client")
    options = ["-i", str(key)]
    if config is not None:
        options += ["-F", config]
    if accept:
        options += ["-o", "StrictHostKeyChecking=accept-new"]
    _confirm_host_key(name, config, accept)
    expanded("~/.ssh").mkdir(mode=0o700, exist_ok=True)  # it works there, wherever the configuration is
    # It talks to the person at the terminal itself: the fingerprint of a new host, the password.
    if subprocess.run([program, *options, "--", name], check=False).returncode != 0:
        raise click.ClickException(
            f"the key was not installed on {name}, which was added to the configuration nevertheless.\n"
            f"  Next step: fix the error above, then: {shlex.join(['ssh-copy-id', *options, name])}"
        )


def _confirm_host_key(name: str, config: str | None, accept: bool) -> None:
    """Confirm the host key before a password is sent: ssh-copy-id would ask about it three times."""
    from lazycluster.cli.console import person_is_there
    from lazycluster.core import event_loop
    from lazycluster.exceptions import InvalidRuntimeError
    from lazycluster.ssh.ssh_connection import SshConnection

    settings = {**how_to_connect(config, None, accept), "ssh_options": {"PreferredAuthentications": "none"}}
    connection = SshConnection(name, settings, ask=person_is_there())

    async def knock() -> None:
        try:
            await connection.open()
        finally:
            await connection.close()

    try:
        event_loop.run(knock())
    except InvalidRuntimeError as error:
        if error.reason != "auth":  # no authentication was tried
            raise click.ClickException(
                f"the key was not installed on {name}, which was added to the configuration nevertheless.\n  "
                + spelled_next_steps(str(error))
            ) from None


def _check(name: str, config: str | None, accept: bool) -> int:
    from lazycluster.cli.console import person_is_there, show_error
    from lazycluster.cli.fanout import HostOutcome, everywhere
    from lazycluster.core import event_loop

    async def work(connection: Connection) -> HostOutcome:
        version = ".".join(map(str, connection.agent_info.python))
        tell(f"{name} can be used: {connection.agent_info.user}@{connection.agent_info.hostname}, Python {version}.")
        return HostOutcome(name)

    chosen = Targets([name], settings=how_to_connect(config, None, accept), ask=person_is_there())
    (outcome,) = event_loop.run(everywhere(chosen, work))
    if outcome.error:
        show_error(
            f"{name}: {outcome.error}\n  It was added to the configuration nevertheless. See also: "
            f"{_doctor(name, config)}"
        )
    else:
        tell(f"To check ports and packages, too: {_doctor(name, config)}")
    return outcome.status
