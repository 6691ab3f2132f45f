"""Options of the commands that start a cluster, of any engine; what they and a file say is one specification."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from .options import Targets, host_options, how_to_connect, relay_option, targets
from .parameters import PORT, Whole

if TYPE_CHECKING:
    from lazycluster.cluster.engine import Option
    from lazycluster.cluster_file.spec import ClusterSpec

__all__ = ["cluster_options", "engine_options", "spec_of", "with_engine_of_file"]

F = TypeVar("F", bound=Callable[..., Any])

_FILE = ("-f", "--file")
_CONNECTION = ("config", "connect_timeout", "accept_new_host_key", "relay")
_OF_GROUP = ("python", "setup", "environment")


def cluster_options(command: F) -> F:
    """Add the options that clusters of all engines have, but for those about connections."""
    for option in (
        relay_option,
        click.option("--environment", metavar="WHAT", help="Packages there: 'manager' (the same), a file, a path."),
        click.option("--setup", metavar="LINES", help="Shell lines to run first: 'conda activate ml'."),
        click.option("--python", metavar="PYTHON", help="The hosts' Python: a path, a name, or 'auto'."),
        click.option("--port", type=PORT, metavar="PORT", help="The port of the master here."),
        click.option("--workers", type=Whole(), metavar="N", help="How many workers (one per host)."),
        host_options,
        click.option("--trust", is_flag=True, help="Take from the file what can run code: you have read it."),
        click.option(*_FILE, "file", metavar="FILE", help="Take the cluster from a file: cluster.toml."),
    ):
        command = option(command)
    return command


def engine_options(name: str, command: F, options: Sequence[Option], common: Callable[[Any], Any]) -> F:
    """Add the options that an engine states.

    Args:
        name: The engine.
        command: The command.
        options: Its options.
        common: Adds the options that the command has beside them.

    Raises:
        ClusterError: If one of them is taken already.
    """
    _check_options(name, options, common)
    for option in reversed(options):
        command = _engine_option(option)(command)
    return command


def _engine_option(option: Option) -> Callable[[F], F]:
    text = click.Choice(option.choices) if option.choices else None
    kind = {"text": text, "count": Whole(), "port": PORT, "directory": click.Path(file_okay=False)}[option.kind]

    def checked(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        if option.check is not None and isinstance(value, str) and value != option.default:
            try:
                option.check(value)
            except ValueError as error:
                raise click.BadParameter(str(error), ctx, param) from None
            except ImportError:
                pass  # what has to be installed is told when the engine is loaded
        return value

    return click.option(
        option.flag,
        option.argument,
        type=kind,
        metavar=option.metavar,
        default=option.default,
        help=option.help,
        callback=checked,
    )


def _check_options(name: str, options: Sequence[Option], common: Callable[[Any], Any]) -> None:
    """Refuse options of an engine that the command, or the engine itself, has already."""
    from lazycluster.cluster.exceptions import ClusterError

    command = click.command(name)(common(lambda **_: None))
    taken = {"--help", *(text for param in command.params for text in (str(param.name), *param.opts))}
    for option in options:
        for text in (option.flag, option.argument):
            if text in taken:
                raise ClusterError(f"the engine {name!r} cannot be started: its option {text} is taken already")
        taken |= {option.flag, option.argument}


def with_engine_of_file(args: list[str]) -> list[str]:
    """Return the words behind a command with the engine as the first one, if it is a file that names it."""
    if not args or not args[0].startswith("-"):
        return args
    finder = click.Command("file", {"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False)
    finder.params = [click.Option(_FILE)]
    file = finder.make_context("file", list(args), resilient_parsing=True).params.get("file")
    if file is None:
        return args
    from lazycluster.cluster_file.load import engine_of

    return [engine_of(file), *args]


def spec_of(engine: str, given: Mapping[str, Any]) -> ClusterSpec:
    """Return the cluster that the options of a command, and the file that they name, specify.

    Args:
        engine: The engine.
        given: The values of the options, by their names: those of `cluster_options`, `connection_options` and of the
            engine.

    Raises:
        click.UsageError: If they contradict each other.
        ClusterFileError: If the file cannot be used.
    """
    options = dict(given)
    file, trust = options.pop("file"), options.pop("trust")
    hosts, excluded, hostfile = (options.pop(name) for name in ("hosts", "exclude_hosts", "hostfile"))
    connection = how_to_connect(*(options.pop(name) for name in _CONNECTION))
    of_group = {name: value for name in _OF_GROUP if (value := options.pop(name)) is not None}
    count = {"workers": options.pop("workers"), "master_port": options.pop("port")}
    spec = _spec_of_hosts(engine, file, trust, hosts, excluded, hostfile, connection.get("config_file"))
    if spec.engine != engine:
        raise click.UsageError(f"{file} is about a cluster of {spec.engine}, not of {engine}")
    options = {name: value for name, value in options.items() if file is None or _is_given(name)}
    count = {name: value for name, value in count.items() if value is not None}
    return _with_settings(replace(spec, options={**spec.options, **options}, **count), of_group, connection)


def _spec_of_hosts(
    engine: str,
    file: str | None,
    trust: bool,
    hosts: tuple[str, ...],
    excluded: tuple[str, ...],
    hostfile: Any,
    config: str | None,
) -> ClusterSpec:
    """Return what the file says, for the hosts that the options name, if they do."""
    from lazycluster.cluster_file.load import load_cluster_file
    from lazycluster.cluster_file.spec import ClusterSpec

    def named(hosts: Sequence[str], hostfile: Any) -> Targets:
        return targets(hosts, excluded, hostfile, config, None, False)

    if file is None:
        if trust:
            raise click.UsageError("--trust is for a file with a cluster: -f FILE")
        chosen = named(hosts, hostfile)
        return ClusterSpec(engine, tuple(chosen.names), chosen.everyone)
    if hosts or hostfile is not None:
        chosen = named(hosts, hostfile)
        spec = load_cluster_file(file, trust=trust, config_file=config, hosts=chosen.names)
        return replace(spec, everyone=chosen.everyone)
    spec = load_cluster_file(file, trust=trust, config_file=config)
    return replace(spec, hosts=tuple(named(spec.hosts, None).names)) if excluded else spec


def _is_given(name: str) -> bool:
    """Return whether an option was given, and does not only have its default."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


def _with_settings(spec: ClusterSpec, of_group: Mapping[str, Any], connection: Mapping[str, Any]) -> ClusterSpec:
    """Return a specification with settings of all hosts that come before those of the file."""
    settings = {
        host: {key: value for key, value in values.items() if key not in {*of_group, *connection}}
        for host, values in spec.settings.items()
        if host in spec.hosts
    }
    group_options = {**spec.group_options, **of_group, "connection_kwargs": dict(connection)}
    return replace(spec, group_options=group_options, settings=settings)
