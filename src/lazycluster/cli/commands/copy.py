"""``lazycluster put`` and ``lazycluster get``: files and folders to and from many hosts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from lazycluster.cli.options import Whole, connection_options, host_options, targets

if TYPE_CHECKING:
    from lazycluster.cli.copy_progress import Copying
    from lazycluster.cli.fanout import HostOutcome
    from lazycluster.ssh.connection import Connection

__all__ = ["get", "put"]

_fanout = click.option("--fanout", type=Whole(), default=64, metavar="N", help="On how many hosts at once (64).")
_exclude = click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave out files and folders: '*.pyc', 'data/raw', './data'.",
)
_quiet = click.option("-q", "--quiet", is_flag=True, help="Say nothing of what went well.")


@click.command()
@host_options
@_exclude
@_fanout
@_quiet
@click.argument("sources", nargs=-1, required=True, metavar="SRC... DEST")
@connection_options
def put(
    hosts: tuple[str, ...], exclude_hosts: tuple[str, ...], hostfile: Any, config: str | None,
    connect_timeout: float | None, accept_new_host_key: bool, exclude: tuple[str, ...], fanout: int, quiet: bool,
    sources: tuple[str, ...],
) -> int:  # fmt: skip
    """Copy files and folders to hosts.

    DEST is relative to the home directory there. If it is a directory or ends with '/', each SRC comes into it under
    its own name. What is there already, unchanged, is not sent again; a file is replaced when it is complete.

    \b
    Examples:
      lazycluster put -w 'node[1-4]' train.py data/ work/
      lazycluster put -w @all --exclude '*.pyc' --exclude .git . project/

    Exit status: 0 if all is on all hosts, 255 if a host was not reached, else 1.
    """
    from lazycluster.utils import expanded

    *paths, destination = _with_destination(sources)
    for path in paths:
        if not os.path.lexists(expanded(path)):
            raise click.UsageError(f"there is no file or folder {path}")
    if len(paths) > 1 and not destination.endswith("/"):
        destination += "/"

    async def send(connection: Connection, copying: Copying) -> None:
        from lazycluster.ssh import transfer

        for path in paths:
            progress = copying.progress(connection.host)
            home = connection.agent_info.home
            result = await transfer.send(
                connection, path, destination, cwd=home, env={}, progress=progress, exclude=exclude
            )
            copying.add(connection.host, result)

    chosen = targets(hosts, exclude_hosts, hostfile, config, connect_timeout, accept_new_host_key)
    return _copy(chosen, send, fanout, quiet, exclude)


@click.command()
@host_options
@_exclude
@_fanout
@_quiet
@click.argument("sources", nargs=-1, required=True, metavar="SRC... DEST")
@connection_options
def get(
    hosts: tuple[str, ...], exclude_hosts: tuple[str, ...], hostfile: Any, config: str | None,
    connect_timeout: float | None, accept_new_host_key: bool, exclude: tuple[str, ...], fanout: int, quiet: bool,
    sources: tuple[str, ...],
) -> int:  # fmt: skip
    """Copy files and folders from hosts, into DEST/HOST/.

    SRC is relative to the home directory on the hosts; '~' and variables are those there.

    \b
    Examples:
      lazycluster get -w 'node[1-4]' a.csv got/   # got/node1/a.csv, ...
      lazycluster get -w gpu-a --exclude '*.tmp' runs/42 .

    Exit status: 0 if all is here, 255 if a host was not reached, else 1.
    """
    from lazycluster.utils import expanded

    *paths, destination = _with_destination(sources)
    base = expanded(destination)
    if base.exists() and not base.is_dir():
        raise click.UsageError(f"{destination} is a file: name a directory, which takes one per host")

    async def fetch(connection: Connection, copying: Copying) -> None:
        from lazycluster.ssh import transfer

        folder = base / connection.host.replace("/", "_")
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            progress = copying.progress(connection.host)
            home = connection.agent_info.home
            result = await transfer.get(
                connection, path, f"{folder}/", cwd=home, env={}, progress=progress, exclude=exclude
            )
            copying.add(connection.host, result)

    chosen = targets(hosts, exclude_hosts, hostfile, config, connect_timeout, accept_new_host_key)
    return _copy(chosen, fetch, fanout, quiet, exclude)


def _with_destination(sources: tuple[str, ...]) -> tuple[str, ...]:
    if len(sources) < 2:
        raise click.UsageError("name what to copy and where to: SRC... DEST")
    if not all(sources):
        raise click.UsageError("a path is empty")
    return sources


def _copy(chosen: Any, copy: Any, fanout: int, quiet: bool, exclude: tuple[str, ...] = ()) -> int:
    from lazycluster.cli.copy_progress import Copying
    from lazycluster.cli.fanout import HostOutcome, everywhere, exit_status
    from lazycluster.core import event_loop
    from lazycluster.output import progress as _progress

    # Two that show on one terminal how far things are would get in each other's way.
    with Copying(chosen.names, quiet) as copying, _progress.shown(wanted=False):

        async def work(connection: Connection) -> HostOutcome:
            await copy(connection, copying)
            return HostOutcome(connection.host)

        outcomes = event_loop.run(everywhere(chosen, work, fanout, copying.done))
    copying.warn(exclude)
    return exit_status(outcomes, chosen.everyone)
