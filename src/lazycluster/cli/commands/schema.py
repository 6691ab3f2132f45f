"""``lazycluster schema``: what a cluster.toml may say, for editors."""

from __future__ import annotations

import json

import click

from lazycluster.cli.console import tell

__all__ = ["schema"]


@click.command()
def schema() -> None:
    """Print the JSON schema of cluster.toml, for editors.

    By it they complete and check the file. It has the options of the engines that are installed here.

    \b
    Examples:
      lazycluster schema > cluster.schema.json
    then, as the first line of cluster.toml:
      #:schema ./cluster.schema.json
    """
    from lazycluster.cluster_file.schema import schema as made

    for line in json.dumps(made(), indent=2).splitlines():
        tell(line)
