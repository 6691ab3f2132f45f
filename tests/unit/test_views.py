"""What people see: tables on terminals, in files and in notebooks; whatever hosts say."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lazycluster import RuntimeTask
from lazycluster.cluster.views import cluster_view
from lazycluster.core.words import counted
from lazycluster.engines.hyperopt.progress import SearchProgress
from lazycluster.group.views import group_view, manager_view
from lazycluster.output.execution_log import LoggedStep, LoggedTask, show_logs
from lazycluster.output.host_cells import cells, megabytes
from lazycluster.output.lines import settled
from lazycluster.output.view import Cell, Table, View, as_html, as_text
from lazycluster.runtime.views import info_table, info_view
from lazycluster.runtimes import Runtime
from lazycluster.ssh.agent_replies import AgentInfo

EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(1)>\033]0;owned\007\u202e$\\href{javascript:alert(1)}{x}$'"
TAGS = {"div", "strong", "span", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "br"}


class Page(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def _host(info: dict[str, Any] | None = None) -> Any:
    """A runtime all of whose answers mean harm."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_result(dict.fromkeys(("os", "python_version", "hostname", EVIL), EVIL) if info is None else info)
    names = ("executable", "user", "home", "shell", "hostname", "directory", "identity", "platform")
    values = dict.fromkeys((*names, "boot_id", "machine_id", "network", "path"), EVIL)
    connection = SimpleNamespace(
        state="open",
        why=EVIL,
        agent_info=AgentInfo(python=(3, 9, 1), pid=1, uid=1, booted=1, **values),  # type: ignore[arg-type]
    )
    return SimpleNamespace(
        host=EVIL,
        class_name="Runtime",
        connection=connection,  # a session has it, too
        _connection=connection,
        working_dir=EVIL,
        has_temporary_working_dir=True,
        _session=SimpleNamespace(is_ours=True),
        tasks=[],
        alive_task_process_count=0,
        fill_info_buffer=lambda: future,
        get_processes=lambda only_alive: {EVIL: SimpleNamespace(name=EVIL)},
        is_port_exposure_process=lambda key: True,
    )


def _worker() -> Any:
    return SimpleNamespace(
        label=f"dask-worker {EVIL}",
        place=SimpleNamespace(host=EVIL),
        state=EVIL,
        pid=EVIL,
        restarts=EVIL,
        respawns=0,
        gpus=[{"name": EVIL}, EVIL],
    )


VIEWS = {
    "runtime": lambda: Runtime._view(_host()),
    "info": lambda: info_view(EVIL, {"os": EVIL, "gpus": [{EVIL: EVIL}, EVIL], EVIL: EVIL, "uptime": EVIL}, EVIL),
    "infos": lambda: View(
        tables=(info_table([EVIL, "b"], [{"os": EVIL, "gpus": EVIL, "load": EVIL}, {"error": EVIL}]),)
    ),
    "group": lambda: group_view([_host(), _host({"memory": EVIL, "cpu_cores": None})], {EVIL: EVIL}),
    "manager": lambda: manager_view({EVIL: _host()}, {EVIL: EVIL}),
    "task": lambda: RuntimeTask(EVIL).run_command(EVIL)._view(),
    "cluster": lambda: cluster_view("DaskCluster", "running", [(EVIL, EVIL)], [_worker()], {"threads": [EVIL]}),
    "search": lambda: SearchProgress(1, 2, 3, 4, 0.5, 6.0, {EVIL: 1}, EVIL)._view(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_hosts_cannot_put_anything_into_a_notebook_or_steer_a_terminal(name: str) -> None:
    view = VIEWS[name]()
    page = Page(as_html(view))
    assert set(page.tags) <= TAGS
    assert page.attributes <= {"class", "style", "open"}
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "mathjax_ignore" in as_html(view)
    for width in (20, 80, 200):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", as_text(view, width))


@given(st.text(), st.text())
def test_any_text_is_shown_as_text(one: str, other: str) -> None:
    plain = Page(as_html(View("t", Cell("s"), [("f", "x")], [Table(("h",), [["c"]], "t")])))
    page = Page(as_html(View(one, Cell(other), [(one, other)], [Table((one,), [[Cell(other, "bad")]], one or "t")])))
    assert [tag for tag in page.tags if tag not in ("br", "span", "div", "strong")] == [
        tag for tag in plain.tags if tag not in ("br", "span", "div", "strong")
    ]


def test_all_fits_into_the_columns_that_there_are() -> None:
    machine = {"os": "Debian GNU/Linux 12 (bookworm)", "cpu_cores": 64, "memory": 2**40, "memory_free": 2**39}
    machine |= {"load": [63.5], "disk_total": 2**44, "disk_free": 1, "python_version": "3.12.12"}
    machine |= {"gpus": [{"name": "NVIDIA A100-SXM4-80GB"}] * 8}
    view = View(tables=(info_table(["gpu-node-1.example.org", "b"], [machine, {}]),))
    for width in (40, 80, 200):
        text = as_text(view, width)
        assert max(map(len, text.splitlines())) <= width
        assert not any(line.endswith(" ") for line in text.splitlines())
    assert "gpu-node-1.example.org  Debian 12     64  63.50  512G/1.0T  16T/16T  3.12.12  8x A100-SXM4-80GB" in text


def test_colours_are_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    view = View("group", Cell("open", "good"))
    assert "\033[" in as_text(view, 80, Terminal())
    assert as_text(view, 80, io.StringIO()) == "group  open\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert "32m" not in as_text(view, 80, Terminal())


def test_what_is_known_of_a_machine_is_shown_even_if_little_is() -> None:
    assert cells({}) == {}
    assert cells({"memory": 2**30})["memory"] == "1.0G/1.0G"
    assert cells({"memory": float("nan"), "load": "x", "gpus": 3})["memory"] == "0B/0B"
    assert megabytes(0) == "0B"


def test_a_host_that_does_not_answer_is_shown_without_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazycluster.runtime.views._BRIEFLY", 0.01)
    silent = _host()
    silent.host = "silent"
    silent.fill_info_buffer = concurrent.futures.Future
    assert "silent" in as_text(group_view([silent], {}))


def _logs(output: str) -> list[LoggedTask]:
    steps = [LoggedStep("make all", Cell("done", "good"), output), LoggedStep("make test", Cell("failed", "bad"), "")]
    return [LoggedTask("node1", "build", "failed", steps, "exit status 2")]


def test_what_little_tasks_printed_is_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show_logs(_logs("one\n  two\n"))
    assert capsys.readouterr().out.splitlines() == [
        "host   task   step       status  output",
        "node1  build  make all   done    one",
        "                                   two",
        "              make test  failed",
        "                                 exit status 2",
    ]
    show_logs([])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("output", ["x" * 100, "line\n" * 20])
def test_what_is_too_much_for_a_table_stands_below_its_step(
    output: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show_logs(_logs(output))
    said = ["--- task build on node1: failed", "[1] make all", *output.split(), "[2] make test", "exit status 2"]
    assert capsys.readouterr().out.splitlines() == said


def test_an_output_is_shown_as_it_stands_on_a_terminal_in_the_end() -> None:
    assert settled("10%\r 99%\rdone\r\nnext\033[31m\n") == "done\nnext\\x1b[31m"
    assert settled("") == ""


def test_one_and_many() -> None:
    assert [counted(number, "host") for number in (0, 1, 2, 1.0)] == ["0 hosts", "1 host", "2 hosts", "1 host"]


def test_the_live_view_shows_workers_of_older_versions_of_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    from lazycluster.cluster.dask_cluster import DaskCluster

    class Older:
        def scheduler_info(self) -> Any:  # it takes no n_workers
            return {"workers": {"tls://...": {"nthreads": 2, "metrics": {"task_counts": {"executing": 3}}}}}

    monkeypatch.setattr(DaskCluster, "get_client", lambda *_, **__: contextlib.nullcontext(Older()))
    with DaskCluster.__new__(DaskCluster)._work_line() as line:
        assert line() == "2 threads, 3 tasks running"


def test_the_live_view_shows_what_workers_use_also_if_the_engine_does_not_answer() -> None:
    from lazycluster.cli import foreground
    from lazycluster.cluster.usage import ProcessUsage

    def worker(number: int) -> Any:
        return SimpleNamespace(
            name=f"dask worker host-{number}", host="host", state="ready", restarts=0, pid=40 + number, problem=""
        )

    class Busy:
        @property
        def workers(self) -> list[Any]:
            return [worker(0), worker(1), worker(2)]

        def usage(self, timeout: float) -> dict[str, ProcessUsage]:
            return {
                "dask worker host-0": ProcessUsage(12.4, 2_000_000),
                "dask worker host-1": ProcessUsage(None, 3 << 30),
            }

    def fails() -> str:
        raise OSError("the scheduler does not answer")

    console = Console(width=80, file=io.StringIO())
    console.print(foreground._view(cast(Any, Busy()), fails))
    lines = cast(io.StringIO, console.file).getvalue().splitlines()
    assert [line.split()[-2:] for line in lines[2:5]] == [["12%", "1.9M"], ["41", "3.0G"], ["0", "42"]]
    assert lines[5] == "not known: the scheduler does not answer"
