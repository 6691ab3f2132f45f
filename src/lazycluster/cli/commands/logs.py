"""``lazycluster logs``: what detached work has printed."""

from __future__ import annotations

from typing import Any

import click

from lazycluster.cli.options import Whole, connection_options, host_options

from .work import complete_work

__all__ = ["logs"]


@click.command()
@host_options
@click.option("-f", "--follow", is_flag=True, help="Go on with what is printed from now on, until it ends.")
@click.option("-n", "--lines", type=Whole(), metavar="N", help="Only the last lines of what there is.")
@click.option("-N", "--no-label", is_flag=True, help="Print lines without the host's name.")
@click.argument("name", shell_complete=complete_work)
@connection_options
def logs(name: str, follow: bool, lines: int | None, no_label: bool, **options: Any) -> int:
    """Show what detached work has printed.

    With several hosts each line has the name of its host; from one host it comes byte by byte. Of very long logs the
    first and the last 16 MiB are kept, with a line that says how much was left out. Ctrl-C ends -f; the work goes on.

    \b
    Examples:
      lazycluster logs train
      lazycluster logs -f -n 20 train
      lazycluster logs -w gpu-a train > train.log

    Exit status: 0, or 255 if a host was not reached.
    """
    from lazycluster.cli.work_logs import show_logs

    return show_logs(name, follow, lines, not no_label, options)
