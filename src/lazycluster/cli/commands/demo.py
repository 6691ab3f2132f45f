"""``lazycluster demo``: a first look, for newcomers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from lazycluster import engines
from lazycluster.cli.options import connection_options, host_options, targets

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazycluster import RuntimeGroup, RuntimeTask

__all__ = ["demo"]

_PYTHON = """\
    from lazycluster import RuntimeGroup

    with RuntimeGroup(hosts=[...]) as group:
        total = sum(group.map(inside, range(20)))"""


@click.command()
@click.argument("engine", type=click.Choice(engines.DEMOS), required=False)
@host_options
@connection_options
def demo(
    engine: str | None, hosts: tuple[str, ...], exclude_hosts: tuple[str, ...], hostfile: Any, config: str | None,
    connect_timeout: float | None, accept_new_host_key: bool,
) -> None:  # fmt: skip
    """Show what lazycluster does: a command, a function, many calls, and a small cluster.

    Without -w, it runs on this machine only, without ssh. Nothing is left behind.
    The default is a Dask cluster; it is left out if Dask is not installed here.

    \b
    Examples:
      lazycluster demo
      lazycluster demo hyperopt -w 'node[1-3]'
    """
    from lazycluster import LocalRuntime, RuntimeGroup
    from lazycluster.cli.console import output
    from lazycluster.exceptions import LazyclusterError

    missing = ""
    shown = engines.demo(engine or engines.DEMOS[0])
    try:
        shown.check()
    except LazyclusterError as error:
        if engine is not None:
            raise
        missing = str(error)
    say = output().print
    if hosts or hostfile is not None:
        chosen = targets(hosts, exclude_hosts, hostfile, config, connect_timeout, accept_new_host_key)
        say(f"Connecting to {', '.join(chosen.names)} ...")
        group = RuntimeGroup(
            hosts=chosen.names,
            connection_kwargs=chosen.settings,
            python="auto",
            on_unreachable="skip" if chosen.everyone else "raise",
        )
    else:
        say("On this machine only; for hosts: lazycluster demo -w HOSTS")
        group = RuntimeGroup([LocalRuntime()])
    with group:
        _basics(group)
        _calls(group)
        if not missing:
            shown.show(group, say, _inside(), _CALLS, _say_pi)
        say("\nThe same in Python", style="bold")
        say(_PYTHON if missing else shown.PYTHON, markup=False, soft_wrap=True)
    if missing:
        say(f"\nNot shown: {shown.TITLE}", style="bold")
        say(f"  {missing}\n  {shown.MISSING}", markup=False, soft_wrap=True)
    say("\nEverything has ended, and nothing is left on the hosts.")


def _basics(group: RuntimeGroup) -> None:
    from lazycluster import RuntimeTask
    from lazycluster.cli.console import output
    from lazycluster.exceptions import one_line

    say = output().print
    say("\nA command on each host", style="bold")
    for host, text in _everywhere(group, RuntimeTask("command").run_command("echo $(uname -sm), $(nproc) cores")):
        say(f"  {host}: {one_line(text)}", markup=False)

    def where() -> None:
        import platform
        import sys

        print(f"Python {platform.python_version()} at {sys.executable}")  # noqa: T201

    say("\nA Python function on each host", style="bold")
    for host, text in _everywhere(group, RuntimeTask("function").run_function(where)):
        say(f"  {host}: {one_line(text)}", markup=False)


def _everywhere(group: RuntimeGroup, task: RuntimeTask) -> list[tuple[str, str]]:
    """Return what a task printed on each host."""
    tasks = group.execute_task(task, broadcast=True)
    group.join()
    return [(str(done.host), done.execution_log[0].strip()) for done in tasks]


def _calls(group: RuntimeGroup) -> None:
    from lazycluster.cli.console import output

    output().print("\nMany calls, spread over all cores of these hosts", style="bold")
    began = time.perf_counter()
    _say_pi(sum(group.map(_inside(), range(_CALLS))), "calls", began)


_CALLS, _POINTS = 20, 100_000


def _inside() -> Callable[[int], int]:
    # A function within a function goes to the hosts by value: they have no lazycluster.
    def inside(seed: int, points: int = _POINTS) -> int:
        import random

        numbers = random.Random(seed)
        return sum(numbers.random() ** 2 + numbers.random() ** 2 < 1 for _ in range(points))

    return inside


def _say_pi(hits: int, what: str, began: float) -> None:
    from lazycluster.cli.console import output

    pi, duration = 4 * hits / (_CALLS * _POINTS), time.perf_counter() - began
    output().print(f"  pi is about {pi:.4f}: {_CALLS} {what} of {_POINTS:,} random points in {duration:.1f} s")
