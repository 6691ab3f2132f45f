"""Commands on clusters in the background: ``ls``, ``info``, ``scale``, ``dashboard``, ``login``, ``down``."""

from __future__ import annotations

import concurrent.futures
import json
import time
from typing import TYPE_CHECKING, Any

import click

from lazycluster.cli.times import moment, span

if TYPE_CHECKING:
    from lazycluster.background.state import Named
    from lazycluster.output.view import Cell

__all__ = ["complete_clusters", "dashboard", "down", "found_cluster", "info", "login", "ls", "scale"]

_AT_ONCE = 16  # processes that are asked


def complete_clusters(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the names of clusters for a shell."""
    return [found.name for found in _clusters() if found.name.startswith(incomplete)]


_name = click.argument("name", shell_complete=complete_clusters)


def _clusters() -> list[Named]:
    """Return the clusters, with what may be one: it is being started, or damaged."""
    from lazycluster.background import state

    return [found for found in state.all_named() if found.record is None or found.record.kind == "cluster"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def ls(as_json: bool) -> None:
    """List clusters in the background.

    UNTIL is when one ends by itself, at the latest when its certificates expire; "idle 2 h": if it has no work for so
    long. One that is "gone" has left a log:
    'lazycluster logs NAME'; 'lazycluster down NAME' forgets it.

    \b
    Examples:
      lazycluster ls
      lazycluster ls --json
    """
    from lazycluster.cli.console import output, tell
    from lazycluster.cli.work import show_damaged
    from lazycluster.output.view import Table, View, show

    found = _clusters()
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        listed = list(pool.map(_listed, found))
    if as_json:
        output().print_json(json.dumps(listed))
        return
    if not listed:
        tell("no cluster runs in the background: 'lazycluster up NAME ENGINE -w HOSTS' starts one")
        return
    rows = [_row(one) for one in listed]
    show(View(tables=(Table(("NAME", "ENGINE", "WORKERS", "SINCE", "UNTIL", "STATE"), rows),)))
    show_damaged()


def _listed(found: Named) -> dict[str, Any]:
    """Return what is known of a cluster."""
    from lazycluster.background.client import BackgroundProcess
    from lazycluster.exceptions import LazyclusterError

    record = found.record
    one: dict[str, Any] = {"name": found.name, "engine": None, "state": "unknown", "since": None, "until": None}
    one |= {"host": None, "hosts": [], "workers": None, "ready": None, "needs_login": {}, "problem": "", "links": {}}
    if record is not None:
        details = {key: record.details.get(key) for key in ("engine", "hosts", "idle")}
        one |= {"state": record.state, "since": record.started, "until": record.until, "host": record.host, **details}
    if found.problem and not found.is_held:
        return {**one, "state": "damaged", "problem": found.problem}
    if found.gone:
        return {**one, "state": "gone", "problem": found.gone}
    if found.is_elsewhere:
        return {**one, "state": "elsewhere", "problem": f"started on {one['host']}"}
    try:
        status = BackgroundProcess(found).status()
    except LazyclusterError as error:
        return {**one, "problem": str(error).partition("\n")[0]}
    one |= {key: value for key, value in status.items() if key in one or key in ("version", "idle_left")}
    if one["needs_login"]:
        one["state"] = "needs login"
    return one


def _row(one: dict[str, Any]) -> list[Cell | str]:
    from lazycluster.output.view import Cell

    state = one["state"]
    ready, workers = one["ready"], one["workers"]
    until = moment(one["until"]) if one["until"] is not None else ""
    if one.get("idle_left") is not None and state == "running":
        until = f"idle {span(max(1.0, one['idle_left']))}"
    problem = one["problem"] or "; ".join(one["links"].values())
    text = f"{state}: {problem}" if problem and state != "damaged" else state
    if one["needs_login"]:
        text = f"needs login for {', '.join(one['needs_login'])}: lazycluster login {one['name']}"
    tone = "good" if text == "running" else "dim" if state in ("starting", "ending") else "bad"
    return [
        one["name"],
        str(one["engine"] or ""),
        "" if workers is None or state == "gone" else f"{ready}/{workers}",
        "" if one["since"] is None else moment(one["since"]),
        until if state != "gone" else "",
        Cell(text, tone),  # type: ignore[arg-type]
    ]


@click.command()
@_name
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def info(name: str, as_json: bool) -> None:
    """Show a cluster in the background: its workers, and what it has kept of your environment.

    Of environment variables it shows the names, not the values.

    \b
    Examples:
      lazycluster info night
    """
    from lazycluster.background import state
    from lazycluster.background.client import running
    from lazycluster.cli.console import output
    from lazycluster.output.view import Cell, View, show

    process = running(name)
    told = process.request("info")
    if as_json:
        output().print_json(json.dumps({"name": name, **told}))
        return
    view = View.of(told["view"])
    record = process.found.record
    assert record is not None
    facts: list[Any] = [("cluster", name), ("since", moment(record.started))]
    if told["until"] is not None:
        facts.append(("until", moment(told["until"])))
    if told["idle_left"] is not None:
        facts.append(("idle end", f"in {span(max(1.0, told['idle_left']))}, if there is no work"))
    facts.append(("process", f"{told['pid']}, lazycluster {told['version']}"))
    facts.append(("log", str(process.found.path / state.LOG)))
    for host, why in told["needs_login"].items():
        facts.append(("needs login", Cell(f"{host}: {why}", "bad")))
    for host, why in told["unreachable"].items():
        facts.append(("left out", Cell(f"{host}: {why}", "dim")))
    facts.append(("environment", ", ".join(told["environment"])))
    secret = {"dashboard": f"lazycluster dashboard {name} prints its address, a secret"}
    of_cluster = [(fact, secret.get(fact, value)) for fact, value in view.facts]
    show(View(view.title, view.state, [*facts[:1], *of_cluster, *facts[1:]], view.tables))


@click.command()
@_name
@click.argument("workers", type=click.IntRange(0), metavar="N")
def scale(name: str, workers: int) -> int:
    """Have N workers in a cluster in the background.

    Ctrl-C ends the waiting for them; the cluster goes on to scale.

    \b
    Examples:
      lazycluster scale night 8
    """
    from lazycluster.background.client import running
    from lazycluster.cli.console import INTERRUPTED, errors, tell
    from lazycluster.core.words import counted
    from lazycluster.output.progress import RelayedProgress

    process = running(name)
    try:
        with RelayedProgress() as display:
            display.show(f"waiting for {name} to have {counted(workers, 'worker')}")
            told = process.request("scale", n=workers, timeout=None)
    except KeyboardInterrupt:
        errors().print(f"\rInterrupted; {name!r} goes on to scale: lazycluster info {name}", markup=False)
        return INTERRUPTED
    tell(f"{name} has {counted(told['ready'], 'worker')}")
    return 0


@click.command()
@_name
def dashboard(name: str) -> None:
    """Print the address of a cluster's dashboard, which is a secret.

    \b
    Examples:
      lazycluster dashboard night
    """
    from lazycluster.background.client import running
    from lazycluster.cli.console import tell
    from lazycluster.exceptions import LazyclusterError

    connection = running(name).request("connection")
    if not connection.get("dashboard"):
        raise LazyclusterError(f"the cluster {name!r} has no dashboard: it is a {connection['engine']}")
    tell(connection["dashboard"])


@click.command()
@_name
def login(name: str) -> int:
    """Let a cluster in the background use your present login, where it cannot reach hosts without.

    It gets the ssh agent and the Kerberos tickets of this login (SSH_AUTH_SOCK, KRB5CCNAME), and you are asked what ssh
    has to ask.

    \b
    Examples:
      lazycluster login night
    """
    import os

    from lazycluster.background.client import running
    from lazycluster.background.launch import Person
    from lazycluster.cli.console import FAILED, person_is_there, show_error, tell

    names = ("SSH_AUTH_SOCK", "KRB5CCNAME")
    variables = {name: value for name in names if (value := os.environ.get(name))}
    person = Person(person_is_there())
    try:
        left = running(name).request("login", variables=variables, on_stream=person.at, on_message=person, timeout=None)
    finally:
        person.close()
    for host, why in left.items():
        show_error(f"{host}: {why}")
    if left:
        return FAILED
    tell(f"{name} uses this login now" + (f" ({', '.join(variables)})" if variables else ""))
    return 0


@click.command()
@click.argument("name", required=False, shell_complete=complete_clusters)
@click.option("--all", "everything", is_flag=True, help="End all of them.")
@click.option("--forget", is_flag=True, help="Forget one of a machine that is no more.")
def down(name: str | None, everything: bool, forget: bool) -> int:
    """End a cluster in the background; nothing of it stays, here or on the hosts.

    \b
    Examples:
      lazycluster down night
      lazycluster down --all
    """
    from lazycluster.cli.console import show_error, tell
    from lazycluster.output.progress import RelayedProgress

    if (name is None) is not everything:
        raise click.UsageError("say the name of a cluster, or --all for all of them")
    chosen = [one for one in _clusters() if not one.is_elsewhere] if name is None else [found_cluster(name)]
    chosen = [one for one in chosen if name is not None or one.is_held or not one.problem]
    if not chosen:
        tell("no cluster runs in the background")
    status = 0
    with RelayedProgress() as display, concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        ending = {pool.submit(_end, one, forget): one.name for one in chosen}
        left = list(ending.values())
        display.show(f"ending {', '.join(left)}" if left else "")
        for ended in concurrent.futures.as_completed(ending):
            display.close()
            failed, text = ended.result()
            show_error(text) if failed else tell(text)
            status = max(status, failed)
            left.remove(ending[ended])
            display.show(f"ending {', '.join(left)}" if left else "")
    return status


def found_cluster(name: str) -> Named:
    """Return what is there of a cluster, whether it is alive or not."""
    from lazycluster.background import client, state

    found = state.find(name)
    if found is None or (found.record is not None and found.record.kind != "cluster"):
        return client.running(name).found  # says why there is none
    return found


def _end(one: Named, forget: bool) -> tuple[int, str]:
    """End a cluster; returns the exit status, and what there is to say."""
    from lazycluster.background import client
    from lazycluster.cli.console import FAILED
    from lazycluster.exceptions import LazyclusterError

    begin = time.monotonic()
    try:
        if one.is_elsewhere and not one.gone and not forget:
            assert one.record is not None
            raise LazyclusterError(
                f"it was started on {one.record.host}: end it there\n"
                f"  Next step: if that machine is no more: lazycluster down {one.name} --forget"
            )
        done = client.end(one)
    except (LazyclusterError, OSError) as error:
        return FAILED, f"{one.name}: {error}"
    if done == "killed":
        return 0, f"{one.name}: its process did not answer, and was killed; its hosts end the rest by themselves"
    return 0, f"{one.name}: {done}" + (f" ({time.monotonic() - begin:.1f} s)" if done == "ended" else "")
