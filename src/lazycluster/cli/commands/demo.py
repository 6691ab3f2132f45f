"""``lazycluster demo``: the first thing that a newcomer runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from lazycluster._words import counted
from lazycluster.cli.targets import connection_options, host_options, targets

if TYPE_CHECKING:
    from lazycluster import RuntimeGroup, RuntimeTask

__all__ = ["demo"]

_PYTHON = {
    "dask": """\
    from lazycluster import RuntimeGroup
    from lazycluster.cluster.dask_cluster import DaskCluster

    with RuntimeGroup(hosts=[...]) as group, DaskCluster(group) as cluster:
        cluster.start()
        client = cluster.get_client()""",
    "hyperopt": """\
    from lazycluster import RuntimeGroup
    from lazycluster.cluster.hyperopt_cluster import HyperoptCluster

    with RuntimeGroup(hosts=[...]) as group, HyperoptCluster(group) as cluster:
        cluster.start()
        best = fmin(objective, space, algo=tpe.suggest, max_evals=20, trials=cluster.trials("first"))""",
}


@click.command()
@click.argument("engine", type=click.Choice(["dask", "hyperopt"]), required=False)
@host_options
@connection_options
def demo(
    engine: str | None, hosts: tuple[str, ...], exclude_hosts: tuple[str, ...], hostfile: Any, config: str | None,
    connect_timeout: float | None, accept_new_host_key: bool,
) -> None:  # fmt: skip
    """Show what it does: some commands, a function, and a small cluster.

    Without ENGINE the cluster is one of Dask, if that is installed. Without -w it runs on this machine alone, without
    ssh. Nothing stays behind.

    \b
    Examples:
      lazycluster demo
      lazycluster demo hyperopt -w 'node[1-3]'
    """
    from lazycluster import LocalRuntime, RuntimeGroup
    from lazycluster.cli.console import output

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
        say("On this machine alone; with hosts: lazycluster demo -w HOSTS")
        group = RuntimeGroup([LocalRuntime()])
    with group:
        _basics(group)
        if engine is None and (missing := _missing()):
            say("\nNo cluster", style="bold")
            say(f"  {missing}", markup=False, soft_wrap=True)
        else:
            engine = engine or "dask"
            {"dask": _dask, "hyperopt": _hyperopt}[engine](group)
            say("\nThe same in Python:", style="bold")
            say(_PYTHON[engine], markup=False, soft_wrap=True)
    say("\nAll of it has ended, and nothing is left on the hosts.")


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


def _missing() -> str:
    """Return what a cluster of Dask needs that is not installed, and the next step."""
    from lazycluster.cluster.dask_launchers import SOFTWARE
    from lazycluster.cluster.exceptions import ClusterError

    try:
        SOFTWARE.check_manager("cryptography")
    except ClusterError as error:
        return str(error)
    return ""


def _dask(group: RuntimeGroup) -> None:
    from lazycluster.cli.console import output
    from lazycluster.cluster.dask_cluster import DaskCluster

    say = output().print
    say("\nA Dask cluster on these hosts", style="bold")
    with DaskCluster(group) as cluster:
        began = time.perf_counter()
        cluster.start()
        workers = counted(group.runtime_count, "worker")
        say(f"  started in {time.perf_counter() - began:.1f} s: a scheduler here, {workers} there")
        with cluster.get_client(timeout=10) as client:

            def inside(seed: int) -> int:
                import random

                numbers = random.Random(seed)
                return sum(numbers.random() ** 2 + numbers.random() ** 2 < 1 for _ in range(100_000))

            began = time.perf_counter()
            hits = sum(client.gather(client.map(inside, range(20))))
            pi = 4 * hits / 2_000_000
            say(f"  pi is about {pi:.4f}: 20 tasks of 100,000 random points in {time.perf_counter() - began:.1f} s")


def _hyperopt(group: RuntimeGroup) -> None:
    import tempfile

    from lazycluster.cli.console import output
    from lazycluster.cluster.hyperopt_cluster import HyperoptCluster

    say = output().print
    say("\nA hyperparameter search on these hosts", style="bold")
    with tempfile.TemporaryDirectory() as folder, HyperoptCluster(group, dbpath=folder) as cluster:
        from hyperopt import fmin, hp, tpe

        began = time.perf_counter()
        cluster.start()
        workers = counted(group.runtime_count, "worker")
        say(f"  started in {time.perf_counter() - began:.1f} s: a database here, {workers} there")

        def objective(x: float) -> float:
            return (x - 3) ** 2

        space = hp.uniform("x", -10, 10)
        trials = cluster.trials("demo")
        best = fmin(objective, space, tpe.suggest, 30, trials=trials, show_progressbar=False, verbose=False)
        say(f"  the minimum of (x - 3)^2 is near x = {best['x']:.2f}, after 30 evaluations")
