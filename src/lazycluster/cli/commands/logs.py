"""``lazycluster logs``: what detached work has printed, and the logs of clusters in the background."""

from __future__ import annotations

from typing import Any

import click

from lazycluster.cli.options import connection_options, host_options
from lazycluster.cli.parameters import Whole

__all__ = ["logs"]


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from .background import complete_clusters
    from .work import complete_work

    return [*complete_clusters(ctx, param, incomplete), *complete_work(ctx, param, incomplete)]


@click.command()
@host_options
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes from now on, until its end or Ctrl-C.")
@click.option("-n", "--lines", type=Whole(), metavar="N", help="Of work: only the last lines of what there is.")
@click.option("-N", "--no-label", is_flag=True, help="Of work: print lines without the host's name.")
@click.argument("name", shell_complete=_complete)
@click.argument("worker", required=False)
@connection_options
def logs(name: str, worker: str | None, follow: bool, lines: int | None, no_label: bool, **options: Any) -> int:
    """Show what detached work has printed, or the log of a cluster in the background.

    Of work on several hosts each line has the name of its host; from one host it comes byte by byte. The first and the
    last 16 MiB are kept on a host, with a line that says how much was left out. Ctrl-C ends -f; the work goes on.

    Of a cluster, WORKER is the name of a process, or the number of a worker, as 'lazycluster info NAME' shows them.
    Logs stay until 'lazycluster rm NAME' or 'lazycluster down NAME'.

    \b
    Examples:
      lazycluster logs train
      lazycluster logs -f -n 20 train
      lazycluster logs -w gpu-a train > train.log
      lazycluster logs night 2 -f

    Exit status: 0, or 255 if a host was not reached.
    """
    from lazycluster.cli.cluster_logs import show_cluster_logs
    from lazycluster.cli.work import cluster_named
    from lazycluster.cli.work_logs import show_logs

    cluster = None if options["hosts"] or options["hostfile"] is not None else cluster_named(name)
    if cluster is not None:
        show_cluster_logs(cluster, worker, follow)
        return 0
    if worker is not None:
        raise click.UsageError(f"{name!r} is not a cluster in the background: only those have workers")
    return show_logs(name, follow, lines, not no_label, options)
