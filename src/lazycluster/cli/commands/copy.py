"""``lazycluster put`` and ``lazycluster get``: files and directories to and from many hosts."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from lazycluster.cli.console import errors, host_style, lines_of, output
from lazycluster.cli.options import connection_options, fanout_option, host_options, targets

if TYPE_CHECKING:
    import asyncio

    from lazycluster.cli.fanout import HostOutcome
    from lazycluster.group.direct_copy import DirectCopy
    from lazycluster.output.progress import Board, Progress
    from lazycluster.ssh.connection import Connection
    from lazycluster.ssh.transfer import TransferResult

__all__ = ["get", "put"]

_LITTLE = 1024 * 1024  # bytes

_exclude = click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave out files and directories: '*.pyc', 'data/raw', './data'.",
)
_quiet = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")


@click.command()
@host_options
@_exclude
@fanout_option
@click.option(
    "--network",
    type=click.Choice(["tunnel", "direct", "auto"]),
    default="tunnel",
    metavar="WAY",
    help="tunnel: from here to each host (the default); auto: a file of at least 8 MiB goes on from host to host where "
    "they reach each other; direct: the same, but hosts that do not are an error, and so is a directory.",
)
@_quiet
@click.argument("sources", nargs=-1, required=True, metavar="SRC... DEST")
@connection_options
def put(
    hosts: tuple[str, ...], exclude_hosts: tuple[str, ...], hostfile: Any, config: str | None,
    connect_timeout: float | None, accept_new_host_key: bool, exclude: tuple[str, ...], fanout: int, network: str,
    quiet: bool, sources: tuple[str, ...],
) -> int:  # fmt: skip
    """Copy files and directories to hosts.

    DEST is relative to the home directory on the hosts. If it is a directory or ends with '/', each SRC is copied into
    it under its own name. Unchanged files are not sent again; a file is replaced only when its copy is complete.

    \b
    Examples:
      lazycluster put -w 'node[1-4]' train.py data/ work/
      lazycluster put -w @all --exclude '*.pyc' --exclude .git . project/

    Exit status: 0 if everything was copied, 255 if a host was not reached, else 1.
    """
    from lazycluster.utils import expanded

    *paths, destination = _with_destination(sources)
    for path in paths:
        if not os.path.lexists(expanded(path)):
            raise click.UsageError(f"no such file or directory: {path}")
        if network == "direct" and expanded(path).is_dir():
            raise click.UsageError(f"{path} is a directory, and --network direct is for files: use --network auto")
    if len(paths) > 1 and not destination.endswith("/"):
        destination += "/"

    chosen = targets(hosts, exclude_hosts, hostfile, config, connect_timeout, accept_new_host_key)
    together = None if network == "tunnel" else _Together(chosen.names, destination, network)

    async def send(connection: Connection, copying: Copying) -> None:
        from lazycluster.ssh import transfer

        for path in paths:
            progress = copying.progress(connection.host)
            home = connection.agent_info.home
            send_one = transfer.send if together is None else (await together.copy(connection, path)).send
            result = await send_one(connection, path, destination, cwd=home, env={}, progress=progress, exclude=exclude)
            copying.add(connection.host, result)

    if together is None:
        return _copy(chosen, send, fanout, quiet, exclude)
    return _copy(chosen, send, len(chosen.names), quiet, exclude, together.without)


@click.command()
@host_options
@_exclude
@fanout_option
@_quiet
@click.argument("sources", nargs=-1, required=True, metavar="SRC... DEST")
@connection_options
def get(
    hosts: tuple[str, ...], exclude_hosts: tuple[str, ...], hostfile: Any, config: str | None,
    connect_timeout: float | None, accept_new_host_key: bool, exclude: tuple[str, ...], fanout: int, quiet: bool,
    sources: tuple[str, ...],
) -> int:  # fmt: skip
    """Copy files and directories from hosts, into DEST/HOST/.

    SRC is relative to the home directory on the hosts, where '~' and variables are expanded, too.

    \b
    Examples:
      lazycluster get -w 'node[1-4]' a.csv got/   # got/node1/a.csv, ...
      lazycluster get -w gpu-a --exclude '*.tmp' runs/42 .

    Exit status: 0 if everything was copied, 255 if a host was not reached, else 1.
    """
    from lazycluster.utils import expanded

    *paths, destination = _with_destination(sources)
    base = expanded(destination)
    if base.exists() and not base.is_dir():
        raise click.UsageError(f"{destination} is a file: name a directory, which gets one subdirectory per host")

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
        raise click.UsageError("name what to copy, and the destination: SRC... DEST")
    if not all(sources):
        raise click.UsageError("a path is empty")
    return sources


class _Together:
    """Copies in which hosts pass on files: they begin when all hosts are connected that can be.

    Args:
        hosts: The hosts.
        destination: Where the files go.
        network: See `lazycluster.group.direct_copy`.
    """

    def __init__(self, hosts: Sequence[str], destination: str, network: str) -> None:
        self._destination, self._network = destination, network
        self._expected = set(hosts)
        self._connected: list[Connection] = []
        self._all_there: asyncio.Event | None = None
        self._copies: dict[str, DirectCopy] = {}

    async def copy(self, connection: Connection, path: str) -> DirectCopy:
        """Return the copy of a file to all hosts, once they are there."""
        import asyncio

        from lazycluster.group.direct_copy import DirectCopy, DirectTarget

        self._all_there = self._all_there or asyncio.Event()
        if connection not in self._connected:
            self._connected.append(connection)
            self.without(connection.host)
        await self._all_there.wait()
        if path not in self._copies:
            targets = [DirectTarget(one.host, one, one.agent_info.home, {}) for one in self._connected]
            self._copies[path] = DirectCopy(targets, path, self._destination, self._network)
        return self._copies[path]

    def without(self, host: str) -> None:
        """Wait for a host no more."""
        self._expected.discard(host)
        if not self._expected and self._all_there is not None:
            self._all_there.set()


def _copy(
    chosen: Any,
    copy: Any,
    fanout: int,
    quiet: bool,
    exclude: tuple[str, ...] = (),
    on_end: Callable[[str], Any] = lambda host: None,
) -> int:
    from lazycluster.cli.fanout import HostOutcome, everywhere, exit_status
    from lazycluster.core import event_loop
    from lazycluster.output import progress

    with progress.shown(False if quiet else None, errors) as board:
        copying = Copying(chosen.names, board, quiet)

        async def work(connection: Connection) -> HostOutcome:
            await copy(connection, copying)
            return HostOutcome(connection.host)

        def done(outcome: HostOutcome) -> None:
            on_end(outcome.host)
            copying.done(outcome)

        outcomes = event_loop.run(everywhere(chosen, work, fanout, done))
    copying.warn(exclude)
    return exit_status(outcomes, chosen.everyone)


class Copying:
    """The copies of a command: a bar for each host while it lasts, a line when it has ended.

    Args:
        hosts: The hosts.
        board: What shows the bars.
        quiet: Whether to print nothing of what went well.
    """

    def __init__(self, hosts: Sequence[str], board: Board, quiet: bool) -> None:
        from lazycluster.cli.fanout import InOrder
        from lazycluster.output.progress import can_be_shown

        self._rows: InOrder[HostOutcome] = InOrder(hosts, self._show)
        self._board = board
        self._has_bars = board.wanted and can_be_shown()
        self._quiet = quiet
        self._sums: dict[str, list[float]] = {host: [0, 0, 0, 0.0] for host in hosts}
        self._left_out: dict[str, list[str]] = {}
        self._unused: set[str] | None = None  # by none of the copies that are complete
        self._bars: dict[str, Progress] = {}

    def progress(self, host: str) -> Callable[[int, int | None, int], Any] | None:
        """Return what takes the progress of the next copy from or to a host, if it can be shown."""
        from lazycluster.output.progress import Progress

        if not self._has_bars:
            return None
        if host not in self._bars:
            self._bars[host] = Progress(host, unit="B", bar=True, style=host_style(host))
            self._board.add(self._bars[host])
        bar, before = self._bars[host], self._sums[host][1]
        return lambda done, total, files: bar.set(before + done, None if total is None else before + total)

    def add(self, host: str, result: TransferResult) -> None:
        """Count a copy that is complete."""
        sums = self._sums[host]
        sums[0] += result.files
        sums[1] += result.bytes
        sums[2] += result.skipped
        sums[3] += result.seconds
        self._left_out.setdefault(host, []).extend(result.left_out)
        self._unused = set(result.unused) if self._unused is None else self._unused.intersection(result.unused)

    def warn(self, exclude: Sequence[str]) -> None:
        """Warn of patterns that have left nothing out of any copy: a typing error may have copied what they name."""
        from lazycluster.exceptions import one_line

        for pattern in dict.fromkeys(exclude):
            if pattern in (self._unused or ()):
                text = (
                    f"--exclude {shlex.quote(pattern)} left nothing out: it is a name, or a path below what is copied"
                )
                errors().print(one_line(text), markup=False, soft_wrap=True, style="yellow")

    def done(self, outcome: HostOutcome) -> None:
        """End the bar of a host; its outcome is printed in its turn."""
        if outcome.host in self._bars:
            self._bars[outcome.host].is_over = True
        self._rows.put(outcome.host, outcome)

    def _show(self, outcome: HostOutcome) -> None:
        from rich.text import Text

        from lazycluster.core.words import counted
        from lazycluster.exceptions import one_line
        from lazycluster.output.host_cells import megabytes

        host = outcome.host
        for name in self._left_out.get(host, ()):
            errors().print(f"{host}: left out: {one_line(name)}", markup=False, soft_wrap=True)
        if outcome.error:
            error = "\n".join(lines_of(outcome.error))
            errors().print(Text.assemble((f"{host}:", "bold red"), " ", error), soft_wrap=True)
        elif not self._quiet:
            files, size, skipped, seconds = self._sums[host]
            same = f", {skipped:.0f} unchanged" if skipped else ""
            # Of little that comes late it would be the rate of waiting.
            rate = f", {megabytes(size / seconds)}/s" if seconds > 0.5 and size > _LITTLE and not skipped else ""
            text = f"{host}: {counted(files, 'file')}, {megabytes(size)} in {seconds:.1f} s{rate}{same}"
            # Bars that do not know of a line that is printed below them would overwrite it.
            out = errors() if self._has_bars and output().is_terminal else output()
            out.print(text, markup=False, soft_wrap=True)
