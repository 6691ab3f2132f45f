"""``lazycluster start``: a cluster in the foreground, of any engine that is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from lazycluster import engines
from lazycluster.cli.options import Whole, connection_options, host_options, relay_option, targets

if TYPE_CHECKING:
    from lazycluster.cluster.engine import Option
    from lazycluster.cluster.engine_cluster import EngineCluster
    from lazycluster.runtime_mgmt import RuntimeGroup

__all__ = ["start", "start_alias"]

F = TypeVar("F", bound=Callable[..., Any])


class _Engines(click.Group):
    """A group with a command for each engine, which is loaded when it is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(engines.known())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _command(cmd_name) if cmd_name in engines.known() else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(entry.name, entry.summary) for entry in engines.known().values()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        entries = engines.known().values()
        return [CompletionItem(one.name, help=one.summary) for one in entries if one.name.startswith(incomplete)]


@click.group(cls=_Engines)
def start() -> None:
    """Start a cluster, and keep it until Ctrl-C.

    It stays in the foreground, and shows its workers. When it ends, however it does, nothing of it stays on the hosts.

    \b
    Examples:
      lazycluster start dask -w 'node[1-4]' --connection-file cluster.json
      lazycluster start hyperopt -w @all --workers 8 --dbpath ./trials
    """


def start_alias(name: str) -> click.Command:
    """Return the command for an engine that has a name of its own."""
    return _command(engines.ALIASES[name])


def _cluster_options(command: F) -> F:
    for option in (
        click.option(
            "--connection-file",
            type=click.Path(dir_okay=False),
            metavar="FILE",
            help="Write what programs need to connect; has secrets.",
        ),
        relay_option,
        click.option("--environment", metavar="WHAT", help="Packages there: 'manager' (the same), a file, a path."),
        click.option("--setup", metavar="LINES", help="Shell lines to run first: 'conda activate ml'."),
        click.option("--python", metavar="PYTHON", help="The hosts' Python: a path, a name, or 'auto'."),
        click.option("--port", type=Whole(65535), metavar="PORT", help="The port of the master here."),
        click.option("--workers", type=Whole(), metavar="N", help="How many workers (one per host)."),
        host_options,
    ):
        command = option(command)
    return command


def _engine_option(option: Option) -> Callable[[F], F]:
    kind = {"text": None, "count": Whole(), "directory": click.Path(file_okay=False)}[option.kind]
    return click.option(
        option.flag, option.argument, type=kind, metavar=option.metavar, default=option.default, help=option.help
    )


def _command(name: str) -> click.Command:
    """Return the command that starts an engine, with the options that its statement has."""
    cluster_class = engines.load(name)
    engine = cluster_class.engine_class

    def run(
        hosts: tuple[str, ...], exclude_hosts: tuple[str, ...], hostfile: Any, config: str | None,
        connect_timeout: float | None, accept_new_host_key: bool, workers: int | None, port: int | None,
        python: str | None, setup: str | None, environment: str | None, relay: bool,
        connection_file: str | None, **options: Any,
    ) -> None:  # fmt: skip
        chosen = targets(hosts, exclude_hosts, hostfile, config, connect_timeout, accept_new_host_key, relay=relay)
        there = {"python": python, "setup": setup, "environment": environment}
        _serve(chosen, lambda group: cluster_class(group, **options), workers, port, there, connection_file)

    _check_options(name, engine.options)
    run.__doc__ = engine.help or engine.summary or engines.known()[name].summary
    command: Callable[..., Any] = connection_options(run)
    for option in reversed(engine.options):
        command = _engine_option(option)(command)
    return click.command(name, short_help=engines.known()[name].summary)(_cluster_options(command))


def _check_options(name: str, options: Sequence[Option]) -> None:
    """Refuse options of an engine that this command, or the engine itself, has already."""
    from lazycluster.cluster.exceptions import ClusterError

    common = click.command(name)(_cluster_options(connection_options(lambda **_: None)))
    taken = {"--help", *(text for param in common.params for text in (str(param.name), *param.opts))}
    for option in options:
        for text in (option.flag, option.argument):
            if text in taken:
                raise ClusterError(f"the engine {name!r} cannot be started: its option {text} is taken already")
        taken |= {option.flag, option.argument}


def _serve(
    chosen: Any,
    make: Callable[[RuntimeGroup], EngineCluster],
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
