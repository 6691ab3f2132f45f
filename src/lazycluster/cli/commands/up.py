"""``lazycluster up``: a cluster in the background, of any engine that is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lazycluster import engines
from lazycluster.cli.cluster_options import cluster_options, engine_options, spec_of
from lazycluster.cli.options import connection_options
from lazycluster.cli.parameters import Duration
from lazycluster.cli.times import moment, span

from .start import EngineCommands, check_connection_file, check_environment, connection_file_option

if TYPE_CHECKING:
    from lazycluster.cluster_file.spec import ClusterSpec

__all__ = ["up"]

F = TypeVar("F", bound=Callable[..., Any])


@click.group(
    cls=EngineCommands, command_of=lambda name: _command(name), named=True, subcommand_metavar="[ENGINE] [OPTIONS]"
)
@click.argument("name")
@click.pass_context
def up(ctx: click.Context, name: str) -> None:
    """Start a cluster that goes on when you log out.

    It has a process of its own. What ssh has to ask is asked now. 'lazycluster ls' lists such clusters, 'lazycluster
    down NAME' ends one; in Python, lazycluster.connect("NAME") uses it.

    \b
    Examples:
      lazycluster up night dask -w 'node[1-4]'
      lazycluster up night dask -w @all --idle 2h
      lazycluster up night -f cluster.toml --for 8h
    """
    ctx.obj = name


def _options(command: F) -> F:
    for option in (
        click.option("--for", "lifetime", type=Duration(), metavar="TIME", help="End it after this time: '8h'."),
        click.option("--idle", type=Duration(), metavar="TIME", help="End it after this time without work: '2h'."),
        connection_file_option,
    ):
        command = option(command)
    return cluster_options(command)


def _command(engine_name: str) -> click.Command:
    """Return the command that starts an engine in the background."""
    engine = engines.load(engine_name).engine_class

    @click.pass_obj
    def run(
        name: str, /, connection_file: str | None, idle: float | None, lifetime: float | None, **options: Any
    ) -> None:
        check_connection_file(connection_file)
        check_environment(options["environment"])
        spec = spec_of(engine_name, options)
        if not (name or spec.name):
            raise click.UsageError("the name of the cluster is missing, here and in the file: lazycluster up NAME ...")
        idle, lifetime = idle or spec.idle_timeout, lifetime or spec.lifetime
        _up(replace(spec, name=name or spec.name, idle_timeout=idle, lifetime=lifetime), connection_file)

    run.__doc__ = f"Start a cluster of {engine_name} in the background; see also 'lazycluster start {engine_name} -h'."
    command: Callable[..., Any] = engine_options(
        engine_name, connection_options(run), engine.options, lambda bare: _options(connection_options(bare))
    )
    return click.command(engine_name, short_help=engines.known()[engine_name].summary)(_options(command))


def _up(spec: ClusterSpec, connection_file: str | None) -> None:
    from lazycluster.background import state
    from lazycluster.background.launch import Person, cluster_document, launch
    from lazycluster.cli.console import INTERRUPTED, errors, person_is_there
    from lazycluster.core.words import counted
    from lazycluster.utils import expanded

    state.checked_name(spec.name)
    _check_idle(spec)
    hosts = spec.host_specs()
    file = None if connection_file is None else str(expanded(connection_file).absolute())
    document = cluster_document(
        spec.engine, [host.document() for host in hosts], skip=spec.everyone, options=_absolute(spec),
        workers=spec.workers, port=spec.master_port, idle=spec.idle_timeout, lifetime=spec.lifetime,
        connection_file=file,
    )  # fmt: skip
    details = {"engine": spec.engine, "hosts": list(spec.hosts), "idle": spec.idle_timeout}
    started = launch(state.NamedRecord.new("cluster", spec.name, **details), document)
    try:
        starting, on = counted(spec.workers or len(hosts), "worker"), counted(len(hosts), "host")
        errors().print(f"Starting {starting} on {on} in the background ...")
        result = started.wait(Person(person_is_there()))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            errors().print("\rEnding the cluster ...")
        started.end()
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(INTERRUPTED) from None
        raise
    started.let_go()
    _tell(spec, result, max((host.grace for host in hosts), default=0.0))


def _absolute(spec: ClusterSpec) -> dict[str, Any]:
    """Return the options of the engine; directories are meant here, in a process with another current one, too."""
    from lazycluster.utils import expanded

    options = dict(spec.options)
    for option in engines.load(spec.engine).engine_class.options:
        if option.kind == "directory" and options.get(option.argument):
            options[option.argument] = str(expanded(options[option.argument]).absolute())
    return options


def _check_idle(spec: ClusterSpec) -> None:
    if spec.idle_timeout is not None and not engines.load(spec.engine).engine_class.states_idleness():
        raise click.UsageError(
            f"the engine {spec.engine!r} does not state when it is idle: leave out --idle, or end it after a time, "
            "with --for"
        )


def _tell(spec: ClusterSpec, result: dict[str, Any], grace: float) -> None:
    """Say that a cluster runs, and what to do next."""
    from lazycluster.cli.console import OutputGoneError, errors, lines_of, output
    from lazycluster.core.words import counted

    for host, why in result["unreachable"].items():
        errors().print("\n".join(lines_of(f"left out: {host}: {why}")), markup=False, soft_wrap=True)
    name, workers = spec.name, counted(result["ready"], "worker")
    lines = [f"The cluster {name} ({spec.engine}) runs, with {workers} on {counted(len(result['hosts']), 'host')}."]
    lines.append(f'  in Python:  lazycluster.connect("{name}")')
    if result["connection"]:
        lines.append(f"  dashboard:  lazycluster dashboard {name}")
    lines += [f"  its state:  lazycluster info {name}", f"  end it:     lazycluster down {name}"]
    limits = [f"after {span(spec.idle_timeout)} without work"] if spec.idle_timeout is not None else []
    limits += [f"at {moment(result['until'])}"] if result["until"] is not None else []
    ends, also = (f"It ends {' or '.join(limits)},", "or ") if limits else ("It ends", "")
    lines.append(f"It goes on when you log out. {ends}")
    lines.append(f"{also}with this machine; if that stops or sleeps, its hosts are clean after {span(grace)}.")
    with contextlib.suppress(OutputGoneError):  # the cluster runs, whoever reads this
        for line in lines:
            output().print(line, markup=False, soft_wrap=True)
