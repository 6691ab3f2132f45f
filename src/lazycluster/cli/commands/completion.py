"""``lazycluster completion``: completion of commands, options and hosts in a shell."""

from __future__ import annotations

import click

__all__ = ["completion"]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that makes a shell complete commands, options and host names.

    \b
    Examples, for the shell's start-up file:
      eval "$(lazycluster completion bash)"     # ~/.bashrc
      eval "$(lazycluster completion zsh)"      # ~/.zshrc, after 'compinit'
      lazycluster completion fish | source      # ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    from lazycluster.cli.app import cli

    found = get_completion_class(shell)
    assert found is not None
    text = found(cli, {}, "lazycluster", "_LAZYCLUSTER_COMPLETE").source()
    # fish would cut a completion at its first comma, and sets of hosts contain commas.
    click.echo(text.replace('string split ","', 'string split --max 1 ","'))
