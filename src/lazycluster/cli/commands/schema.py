"""``lazycluster schema``: what a cluster.toml may say, for editors."""

from __future__ import annotations

import json

import click

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

    click.echo(json.dumps(made(), indent=2))
