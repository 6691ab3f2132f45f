"""``lazycluster start``: a cluster in the foreground, of any engine that is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from lazycluster import engines
from lazycluster.cli.cluster_options import cluster_options, engine_options, spec_of, with_engine_of_file
from lazycluster.cli.options import connection_options
from lazycluster.cli.parameters import File
from lazycluster.core.suggestions import suggestion

if TYPE_CHECKING:
    from lazycluster.cluster_file.spec import ClusterSpec

__all__ = [
    "EngineCommands",
    "check_connection_file",
    "check_environment",
    "connection_file_option",
    "start",
    "start_alias",
]

F = TypeVar("F", bound=Callable[..., Any])


class EngineCommands(click.Group):
    """A group with a command for each engine, which is loaded when it is named, or when a file names it.

    Args:
        command_of: Makes the command of an engine.
        named: Whether the name of the cluster comes before the engine; a file may say it, too.
        **options: See `click.Group`.
    """

    def __init__(self, command_of: Callable[[str], click.Command], named: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._command_of = command_of
        self._named = named

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the engine from the file, if it is not named."""
        if not self._named:
            args = with_engine_of_file(args)
        elif args and not args[0].startswith("-"):
            args = [args[0], *with_engine_of_file(args[1:])]
        elif (found := with_engine_of_file(args)) != args:
            args = ["", *found]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the engines."""
        return list(engines.known())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of an engine."""
        return self._command_of(cmd_name) if cmd_name in engines.known() else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Refuse an engine that is not there, in the words of the library."""
        if args and args[0] not in engines.known() and not args[0].startswith("-"):
            raise click.UsageError(f"there is no engine {args[0]!r}{suggestion(args[0], engines.known())}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what engines there are; none is loaded."""
        with formatter.section("Commands"):
            formatter.write_dl([(entry.name, entry.summary) for entry in engines.known().values()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the names of engines."""
        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        entries = engines.known().values()
        return [CompletionItem(one.name, help=one.summary) for one in entries if one.name.startswith(incomplete)]


@click.group(cls=EngineCommands, command_of=lambda name: _command(name))
def start() -> None:
    """Start a cluster, and keep it until Ctrl-C.

    It stays in the foreground, and shows its workers. When it ends, however it does, nothing of it stays on the hosts.

    \b
    Examples:
      lazycluster start dask -w 'node[1-4]' --connection-file cluster.json
      lazycluster start hyperopt -w @all --workers 8 --dbpath ./trials
      lazycluster start -f cluster.toml
    """


def start_alias(name: str) -> click.Command:
    """Return the command for an engine that has a name of its own."""
    return _command(engines.ALIASES[name])


connection_file_option = click.option(
    "--connection-file",
    type=File(exists=False),
    metavar="FILE",
    help="Write what programs need to connect; has secrets.",
)


def _options(command: F) -> F:
    return cluster_options(connection_file_option(command))


def _command(name: str) -> click.Command:
    """Return the command that starts an engine, with the options that its statement has."""
    engine = engines.load(name).engine_class

    def run(connection_file: str | None, **options: Any) -> None:
        check_connection_file(connection_file)
        check_environment(options["environment"])
        _serve(spec_of(name, options), connection_file)

    run.__doc__ = engine.help or engine.summary or engines.known()[name].summary
    command: Callable[..., Any] = engine_options(
        name, connection_options(run), engine.options, lambda bare: _options(connection_options(bare))
    )
    return click.command(name, short_help=engines.known()[name].summary)(_options(command))


def _serve(spec: ClusterSpec, connection_file: str | None) -> None:
    from lazycluster.cli.console import INTERRUPTED, errors
    from lazycluster.cli.foreground import serve
    from lazycluster.core.words import counted

    with spec.make_group() as group:
        starting, on = counted(spec.workers or group.runtime_count, "worker"), counted(group.runtime_count, "host")
        errors().print(f"Starting {starting} on {on} ...")
        with spec.make_cluster(group) as cluster:  # which loads the engine, for seconds
            try:
                cluster.start(spec.workers, spec.master_port)
                file = cluster.write_connection_file(connection_file) if connection_file is not None else None
                serve(cluster, file)
            except KeyboardInterrupt:
                errors().print("\rEnding the cluster ...")  # over the ^C; it takes seconds, in which somebody waits
                raise SystemExit(INTERRUPTED) from None


def check_connection_file(path: str | None) -> None:
    """Refuse a connection file that could not be written, before the cluster starts."""
    from lazycluster.cluster.connection_file import check
    from lazycluster.utils import expanded

    if path is None:
        return
    if not expanded(path).absolute().parent.is_dir():
        raise click.UsageError(f"--connection-file {path}: no such directory")
    check(path)


def check_environment(what: str | None) -> None:
    """Refuse an environment that makes no sense, in the words of the command line."""
    from lazycluster import EnvironmentSpec
    from lazycluster.environments.spec import file_kind

    try:
        EnvironmentSpec.of(what)
    except ValueError as error:
        if what is not None and file_kind(what):
            raise click.UsageError(str(error)) from None
        raise click.UsageError(
            f"--environment {what}: it is 'manager', a requirements.txt, pyproject.toml, uv.lock or pylock.toml here, "
            "or the path of an environment on the hosts, such as 'lazycluster env build' prints"
        ) from None
