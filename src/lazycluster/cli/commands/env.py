"""``lazycluster env``: the Python environments on hosts."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lazycluster.cli.console import lines_of, tell
from lazycluster.cli.options import connection_options, host_options, targets
from lazycluster.cli.parameters import Duration, Size
from lazycluster.core.words import counted
from lazycluster.environments.spec import ROOT

if TYPE_CHECKING:
    from lazycluster.cli.fanout import HostOutcome
    from lazycluster.environments.cache import HostCache, Removal
    from lazycluster.ssh.connection import Connection

__all__ = ["env"]

T = TypeVar("T")

_cache_dir = click.option("--cache-dir", default=ROOT, metavar="DIR", help=f"Where they are on the hosts ({ROOT}).")


@click.group()
def env() -> None:
    """Show, make and remove the Python environments that hosts keep.

    They are made by 'build' below, by 'start --environment', and in Python by environment=, and stay for the next
    time.

    \b
    Examples:
      lazycluster env list -w @all
      lazycluster env build -w 'node[1-3]' manager
      lazycluster env prune -w @all --size 20G --unused 30d
    """


@env.command("list")
@host_options
@_cache_dir
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@connection_options
def list_command(cache_dir: str, as_json: bool, **options: Any) -> int:
    """Show the environments of hosts, with sizes, age and last use.

    \b
    Examples:
      lazycluster env list -w @all
      lazycluster env list -w gpu-a --json
    """
    from lazycluster.environments.cache import list_on

    caches, status = _on_hosts(lambda connection: list_on(connection, cache_dir), options)
    if as_json:
        sys.stdout.write(json.dumps([asdict(cache) for cache in caches], indent=2) + "\n")
        return status
    for cache in caches:
        _show_cache(cache)
    return status


@env.command("build")
@host_options
@_cache_dir
@click.option("--python", metavar="3.X", help="The minor version, by default that of this machine.")
@click.option("--exclude", multiple=True, metavar="PACKAGE", help="Leave this package out.")
@click.option("-v", "--verbose", is_flag=True, help="List the tools of this machine that are left out.")
@click.option("--refresh", is_flag=True, help="Take the newest versions that are allowed, whatever was found before.")
@click.argument("what", nargs=-1, required=True)
@connection_options
def build(
    cache_dir: str, python: str | None, exclude: tuple[str, ...], verbose: bool, refresh: bool, what: tuple[str, ...],
    **options: Any,
) -> int:  # fmt: skip
    """Make an environment on hosts.

    WHAT is 'manager' (what is installed here), a file (requirements.txt, pyproject.toml, uv.lock, pylock.toml), or
    one or several packages.

    \b
    Examples:
      lazycluster env build -w 'node[1-3]' manager
      lazycluster env build -w @all --python 3.12 'numpy<3' pandas
    """
    from lazycluster import EnvironmentSpec
    from lazycluster.environments.activation import BuildHost, HostEnvironment
    from lazycluster.environments.installed_packages import left_out
    from lazycluster.output.progress import Progress

    try:
        spec = EnvironmentSpec(_source(what), exclude=exclude or None, python=python, cache_dir=cache_dir)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    unwanted = left_out(spec.exclude) if spec.kind == "manager" else ()
    if unwanted:
        names = f": {', '.join(unwanted)}" if verbose else " (--verbose lists them)"
        tell(f"{counted(len(unwanted), 'tool')} left out{names}", err=True)

    async def work(connection: Connection) -> str:
        made = HostEnvironment(BuildHost(connection.host, connection), spec)
        prefix = (await made.ready(refresh=refresh)).prefix
        with Progress("Compiling modules", 1, "hosts", lambda: [connection.host]) as progress:
            await made.compiled()
            progress.advance()
        return prefix

    paths, status = _on_hosts(work, options)
    for path in dict.fromkeys(paths):
        tell(path)
    return status


def _source(what: tuple[str, ...]) -> str | list[str]:
    if len(what) == 1 and (what[0] == "manager" or what[0].endswith((".toml", ".txt", ".in", ".lock"))):
        return what[0]
    return list(what)


@env.command("remove", short_help="Remove environments by name.")
@host_options
@_cache_dir
@click.argument("ids", nargs=-1, required=True)
@connection_options
def remove(cache_dir: str, ids: tuple[str, ...], **options: Any) -> int:
    """Remove environments from hosts by the names that 'env list' shows. Those in use stay.

    \b
    Example:
      lazycluster env remove -w 'node[1-3]' py313-3f2a9c17d0b4e86a5c21
    """
    from lazycluster.environments.cache import remove_on

    removals, status = _on_hosts(lambda connection: remove_on(connection, ids, cache_dir), options)
    for removal in removals:
        _show_removal(removal)
    return max(status, *(1 if removal.in_use or removal.unknown else 0 for removal in removals), 0)


@env.command("prune", short_help="Remove environments that were used longest ago.")
@host_options
@_cache_dir
@click.option("--size", type=Size(), metavar="SIZE", help="Until all together take no more than this: 20G.")
@click.option(
    "--unused", type=Duration(may_be_zero=True), metavar="TIME", help="Those that were not used for so long: 30d."
)
@connection_options
def prune(cache_dir: str, size: int | None, unused: float | None, **options: Any) -> int:
    """Remove environments that were used longest ago, and what broken builds left. Those in use stay.

    \b
    Examples:
      lazycluster env prune -w @all --unused 30d
      lazycluster env prune -w @all --size 20G
    """
    from lazycluster.environments.cache import prune_on

    removals, status = _on_hosts(lambda connection: prune_on(connection, size, unused, cache_dir), options)
    for removal in removals:
        _show_removal(removal)
    return status


# --- shared ---------------------------------------------------------------------------------------
def _on_hosts(work: Callable[[Connection], Awaitable[T]], options: dict[str, Any]) -> tuple[list[T], int]:
    """Run a coroutine for each host that the options name; returns the results, and the exit status."""
    from lazycluster.cli.console import show_error
    from lazycluster.cli.fanout import HostOutcome, everywhere, exit_status
    from lazycluster.core import event_loop

    chosen = targets(**options)
    found: dict[str, T] = {}

    async def one(connection: Connection) -> HostOutcome:
        found[connection.host] = await work(connection)
        return HostOutcome(connection.host)

    outcomes = event_loop.run(everywhere(chosen, one))
    for outcome in outcomes:
        if outcome.kind != "done" and not (chosen.everyone and outcome.kind == "unreachable"):
            show_error("\n".join(lines_of(f"{outcome.host}: {outcome.error}")))
    return [found[name] for name in chosen.names if name in found], exit_status(outcomes, chosen.everyone)


def _show_cache(cache: HostCache) -> None:
    tell(f"{cache.host}: {cache.path}, {_size(cache.size)} in all")
    for one in cache.environments:
        state = "in use" if one.in_use else f"used {_time(one.unused)} ago"
        made = f"made {_time(one.age)} ago" if one.age is not None else ""
        problem = f"  damaged: {one.problem}" if one.problem else ""
        packages = counted(len(one.packages), "package")
        tell(f"  {one.id}  {_size(one.size):>8}  {packages:>13}  {made}, {state}  {one.source}{problem}")


def _show_removal(removal: Removal) -> None:
    freed = f", {_size(removal.freed)} freed" if removal.freed is not None else ""
    tell(f"{removal.host}: {len(removal.removed)} removed{freed}")
    for name in removal.in_use:
        tell(f"  {name} stays: it is in use")
    for name in removal.unknown:
        tell(f"  {name} is not there")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def _time(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
