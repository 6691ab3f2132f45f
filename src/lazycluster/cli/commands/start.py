"""``lazycluster start``: a cluster in the foreground."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lazycluster.cli.options import Whole, connection_options, host_options, relay_option, targets

if TYPE_CHECKING:
    from lazycluster.cluster.runtime_cluster import MasterWorkerCluster
    from lazycluster.runtime_mgmt import RuntimeGroup

__all__ = ["start", "start_dask"]

F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def start() -> None:
    """Start a cluster, and keep it until Ctrl-C.

    It stays in the foreground, and shows its workers. When it ends, however it does, nothing of it stays on the hosts.

    \b
    Examples:
      lazycluster start dask -w 'node[1-4]' --connection-file cluster.json
      lazycluster start hyperopt -w @all --workers 8 --dbpath ./trials
    """


def _cluster_options(command: F) -> F:
    for option in (
        click.option(
            "--connection-file",
            type=click.Path(dir_okay=False),
            metavar="FILE",
            help="Write what programs need to connect; has secrets.",
        ),
        relay_option,
        click.option("--environment", metavar="WHAT", help="Packages there: 'manager' (as here), a file, a path."),
        click.option("--setup", metavar="LINES", help="Shell lines to run first: 'conda activate ml'."),
        click.option("--python", metavar="PYTHON", help="The hosts' Python: a path, a name, or 'auto'."),
        click.option("--port", type=Whole(65535), metavar="PORT", help="The port of the master here."),
        click.option("--workers", type=Whole(), metavar="N", help="How many workers (one per host)."),
        host_options,
    ):
        command = option(command)
    return command


@click.command("dask", short_help="Start a Dask cluster.")
@_cluster_options
@click.option("--threads", type=Whole(), metavar="N", help="Threads per worker (all cores).")
@click.option("--memory-limit", metavar="SIZE", default="auto", help="Memory per worker: '4 GiB'.")
@click.option("--gpus-per-worker", type=Whole(), metavar="N", help="One worker for every so many GPUs.")
@connection_options
def _dask(
    hosts: tuple[str, ...], exclude_hosts: tuple[str, ...], hostfile: Any, config: str | None,
    connect_timeout: float | None, accept_new_host_key: bool, workers: int | None, port: int | None,
    python: str | None, setup: str | None, environment: str | None, relay: bool,
    connection_file: str | None, threads: int | None, memory_limit: str,
    gpus_per_worker: int | None,
) -> None:  # fmt: skip
    """Start a Dask cluster: the scheduler here, the workers on the hosts.

    All of it goes through the ssh connections, encrypted and authenticated. The dashboard's address is a secret.

    \b
    Examples:
      lazycluster start dask -w 'node[1-4]'
      lazycluster start dask -w @all --workers 8 --connection-file cluster.json
    then, in Python:
      from lazycluster.cluster.dask_cluster import DaskCluster
      client = DaskCluster.connect("cluster.json")
    """

    def make(group: RuntimeGroup) -> MasterWorkerCluster:
        from lazycluster.engines.dask.cluster import DaskCluster

        return DaskCluster(group, nthreads=threads, memory_limit=memory_limit, gpus_per_worker=gpus_per_worker)

    chosen = targets(hosts, exclude_hosts, hostfile, config, connect_timeout, accept_new_host_key, relay=relay)
    _serve(chosen, make, workers, port, {"python": python, "setup": setup, "environment": environment}, connection_file)


@click.command("hyperopt", short_help="Start a Hyperopt cluster.")
@_cluster_options
@click.option(
    "--dbpath", type=click.Path(file_okay=False), metavar="DIR", help="Keep the trials there, to go on with them later."
)
@click.option("--dbname", default="hyperopt", metavar="NAME", help="The name of the database (hyperopt).")
@click.option("--exp-key", metavar="KEY", help="Work on this search only (on all).")
@connection_options
def _hyperopt(
    hosts: tuple[str, ...], exclude_hosts: tuple[str, ...], hostfile: Any, config: str | None,
    connect_timeout: float | None, accept_new_host_key: bool, workers: int | None, port: int | None,
    python: str | None, setup: str | None, environment: str | None, relay: bool,
    connection_file: str | None, dbpath: str | None, dbname: str,
    exp_key: str | None,
) -> None:  # fmt: skip
    """Start a Hyperopt cluster: the database of the trials here, the workers on the hosts.

    Trials that are done stay in --dbpath: start it again there, and fmin goes on where it was.

    \b
    Examples:
      lazycluster start hyperopt -w @all --dbpath trials --connection-file s.json
    then, in Python:
      from lazycluster.cluster.hyperopt_cluster import HyperoptCluster
      trials = HyperoptCluster.connect("s.json", exp_key="svm-1")
    """

    def make(group: RuntimeGroup) -> MasterWorkerCluster:
        from lazycluster.engines.hyperopt.cluster import HyperoptCluster

        return HyperoptCluster(group, dbpath=dbpath, dbname=dbname, exp_key=exp_key)

    chosen = targets(hosts, exclude_hosts, hostfile, config, connect_timeout, accept_new_host_key, relay=relay)
    _serve(chosen, make, workers, port, {"python": python, "setup": setup, "environment": environment}, connection_file)


start.add_command(_dask)
start.add_command(_hyperopt)
# The name that it always had.
start_dask = _dask


def _serve(
    chosen: Any,
    make: Callable[[RuntimeGroup], MasterWorkerCluster],
    workers: int | None,
    port: int | None,
    there: dict[str, Any],
    connection_file: str | None,
) -> None:
    from lazycluster.cli.console import INTERRUPTED, errors
    from lazycluster.cli.foreground import serve
    from lazycluster.core.words import counted
    from lazycluster.runtime_mgmt import RuntimeGroup

    _check_connection_file(connection_file)
    _check_environment(there["environment"])
    group = RuntimeGroup(
        hosts=chosen.names,
        connection_kwargs=chosen.settings,
        **there,
        on_unreachable="skip" if chosen.everyone else "raise",
    )
    with group:
        starting, on = counted(workers or group.runtime_count, "worker"), counted(group.runtime_count, "host")
        errors().print(f"Starting {starting} on {on} ...")
        with make(group) as cluster:  # which loads the engine, for seconds
            try:
                cluster.start(workers, port)
                file = cluster.write_connection_file(connection_file) if connection_file is not None else None
                serve(cluster, file)
            except KeyboardInterrupt:
                errors().print("\rEnding the cluster ...")  # over the ^C; it takes seconds, in which somebody waits
                raise SystemExit(INTERRUPTED) from None


def _check_connection_file(path: str | None) -> None:
    """Refuse a connection file that could not be written, before the cluster starts."""
    from lazycluster.cluster.connection_file import check
    from lazycluster.utils import expanded

    if path is None:
        return
    if not expanded(path).absolute().parent.is_dir():
        raise click.UsageError(f"--connection-file {path}: there is no such directory")
    check(path)


def _check_environment(what: str | None) -> None:
    from lazycluster import EnvironmentSpec

    try:
        EnvironmentSpec.of(what)
    except ValueError:
        raise click.UsageError(
            f"--environment {what}: it is 'manager', a requirements.txt, pyproject.toml, uv.lock or pylock.toml here, "
            "or the path of an environment on the hosts, such as 'lazycluster env build' prints"
        ) from None
