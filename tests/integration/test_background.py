"""Clusters that go on when the terminal, the notebook or the login ends."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Event

import lazycluster
from lazycluster import LocalRuntime, RuntimeGroup
from lazycluster.background import client, state
from lazycluster.background.client import end, running
from lazycluster.cluster.dask_cluster import DaskCluster, RoundRobinLauncher
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.core import unix
from lazycluster.exceptions import LazyclusterError
from leaks import settle
from patience import until
from sshhosts import PASSWORD, procfs
from terminals import Terminal

LAZYCLUSTER = [sys.executable, "-m", "lazycluster"]
_USE = """
import lazycluster
with lazycluster.connect("night") as client:
    print(client.submit(pow, 2, 10).result())
"""


@pytest.fixture(autouse=True)
def state_home(hosts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state directory; what runs in it is ended, before the hosts are looked at."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield tmp_path
    for found in state.all_named():
        end(found)


def run(*arguments: object, **env: str) -> tuple[int, str, str]:
    argv = [*LAZYCLUSTER, *map(str, arguments)]
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "COLUMNS": "200", **env},
    )
    return done.returncode, done.stdout, done.stderr


def up(hosts: Any, *arguments: object, name: str = "night") -> str:
    status, out, err = run("up", name, "dask", "--config", hosts.config_file, "-w", "host[1-2]", *arguments)
    assert status == 0, err
    return out


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_cluster_outlives_its_terminal_and_is_used_from_other_processes(hosts: Any) -> None:
    argv = [*LAZYCLUSTER, "up", "night", "dask", "--config", str(hosts.config_file), "-w", "host[1-2]"]
    with Terminal(argv) as terminal:
        terminal.until(r"lazycluster down night")
        assert terminal.end() == 0
    assert python(_USE) == "1024\n"
    status, out, err = run("scale", "night", 3)
    assert (status, out) == (0, "night has 3 workers\n"), err
    status, out, err = run("ls")
    assert status == 0 and "3/3" in out and "running" in out, out + err
    status, out, err = run("info", "night")
    assert status == 0 and "3 of 3 workers ready" in out, out + err
    status, out, err = run("dashboard", "night")
    assert status == 0 and out.startswith("http://127.0.0.1:"), out + err
    status, out, err = run("logs", "night", "host1-0")
    assert status == 0, err
    status, out, err = run("down", "night")
    assert status == 0 and out.startswith("night: ended ("), out + err
    assert state.all_named() == []


def pid_of(name: str = "night") -> int:
    record = running(name).found.record
    assert record is not None and record.pid is not None
    return record.pid


def is_over() -> bool:
    found = state.find("night")
    return found is None or not found.is_held


def test_the_end_of_the_terminals_whole_session_changes_nothing(hosts: Any) -> None:
    shell = " ".join([*LAZYCLUSTER, "up", "night", "dask", "--config", str(hosts.config_file), "-w", "host1"])
    with Terminal(["sh", "-c", f"{shell}; echo done; exec sleep 600"]) as terminal:
        terminal.until("done")
        session = os.getsid(terminal.process.pid)
        assert os.getsid(pid_of()) != session
        os.killpg(os.getpgid(terminal.process.pid), signal.SIGHUP)
        os.killpg(os.getpgid(terminal.process.pid), signal.SIGKILL)
        terminal.end()
        os.kill(pid_of(), signal.SIGHUP)  # as logind sends to all that are left of a session
    assert python(_USE) == "1024\n"
    assert Path(f"/proc/{pid_of()}/cwd").readlink() == Path("/")
    assert run("down", "--all")[0] == 0


def test_of_two_ups_of_one_name_one_is_refused_and_the_other_runs(hosts: Any) -> None:
    argv = [*LAZYCLUSTER, "up", "night", "dask", "--config", str(hosts.config_file), "-w", "host1"]
    processes = [
        subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [(process.communicate(timeout=90)[1], process.returncode) for process in processes]
    assert sorted(status for _, status in results) == [0, 1], results
    (refusal,) = (err for err, status in results if status)
    assert "there is a cluster 'night' already" in refusal
    assert "lazycluster down night" in refusal
    assert python(_USE) == "1024\n"


def test_a_killed_cluster_leaves_nothing_on_the_hosts_and_its_name_is_free(hosts: Any) -> None:
    up(hosts)
    os.kill(pid_of(), signal.SIGKILL)
    assert settle(lambda: [entry for host in hosts.all for entry in host.leftovers()]) == []
    status, out, _ = run("ls")
    assert status == 0 and "gone: its process was killed" in out
    status, _, err = run("scale", "night", 1)
    assert status == 1 and "the cluster 'night' is gone: its process was killed" in err
    assert run("logs", "night")[0] == 0
    assert run("down", "night") == (0, "night: forgotten\n", "")
    assert run("ls")[1].startswith("no cluster runs in the background")


def test_a_cluster_whose_state_directory_is_removed_ends(hosts: Any) -> None:
    up(hosts)
    pid = pid_of()
    started = unix.process_start_time(pid)
    with (state.directory() / "night" / state.LOG).open() as log:
        shutil.rmtree(state.directory().parent)
        other = state.claim(state.NamedRecord.new("cluster", "night"))  # the name is another's now
        before = sorted((path.name, path.read_bytes()) for path in other.path.iterdir())
        until(lambda: unix.process_start_time(pid) != started, "its own end")
        assert "night was removed, or another has the name now: nobody could reach it" in log.read()
    assert sorted((path.name, path.read_bytes()) for path in other.path.iterdir()) == before
    other.remove()
    assert settle(lambda: [entry for host in hosts.all for entry in host.leftovers()]) == []


def test_after_a_restart_of_the_manager_a_cluster_is_gone_and_may_be_started_anew(hosts: Any) -> None:
    up(hosts)
    found = state.find("night")
    assert found is not None and found.record is not None
    os.kill(pid_of(), signal.SIGKILL)
    until(is_over, "the end of the process")
    claim = state.claim(state.NamedRecord.new("cluster", "night"))
    claim.write(state="running", boot="that of yesterday")
    claim.close()
    assert "gone: the machine was restarted" in run("ls")[1]
    up(hosts)
    assert python(_USE) == "1024\n"


def test_an_idle_cluster_ends_by_itself_and_says_so(hosts: Any) -> None:
    out = up(hosts, "--idle", "3s")
    assert "after 3 s without work" in out
    status, out, err = run("logs", "-f", "night")  # to its own end
    assert status == 0 and "the cluster has ended: it was idle for 3 s" in out.splitlines()[-1], out + err
    assert "gone: it was idle for 3 s" in run("ls")[1]


def test_dask_is_busy_while_there_are_tasks() -> None:
    with RuntimeGroup([LocalRuntime()]) as group, DaskCluster(group, nthreads=1) as cluster:
        cluster.start()
        busy = functools.partial(cluster.engine.is_busy, cluster._master_endpoint())
        until(lambda: not busy(), "idleness")
        with cluster.get_client(timeout=30) as client:
            event = Event("go on", client=client)
            future = client.submit(lambda: Event("go on").wait(60))
            until(busy, "the task, at the scheduler")
            assert busy()
            event.set()
            assert future.result() is True
            assert busy()  # there were some since it was asked
            until(lambda: not busy(), "idleness")


def test_a_cluster_ends_after_its_time(hosts: Any) -> None:
    assert "It ends at " in up(hosts, "--for", "3s")
    until(is_over, "its own end")
    assert "gone: its time was over" in run("ls")[1]


def test_a_cluster_that_does_not_start_says_why_and_leaves_nothing(hosts: Any) -> None:
    argv = ("up", "night", "dask", "--config", hosts.config_file, "-w", "host1", "--python", "/no/python")
    status, _, err = run(*argv)
    assert status == 255, err  # as `start` does
    assert "/no/python" in err
    assert state.all_named() == []


def test_ctrl_c_during_the_start_ends_it(hosts: Any) -> None:
    argv = [*LAZYCLUSTER, "up", "night", "dask", "--config", str(hosts.config_file), "-w", "host[1-3]"]
    with Terminal(argv) as terminal:
        terminal.until("Starting 3 workers")
        terminal.type("\x03")
        assert terminal.end() == 130
    assert state.all_named() == []


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (signal.SIGKILL, "the process of 'night' was ended by SIGKILL before the cluster ran"),
        (signal.SIGTERM, "the cluster 'night' was ended before it ran: somebody has ended its process"),
        ("down", "the cluster 'night' was ended before it ran: somebody has used lazycluster down"),
    ],
)
def test_a_start_that_somebody_else_ends_says_how(hosts: Any, how: Any, why: str) -> None:
    argv = [*LAZYCLUSTER, "up", "night", "dask", "--config", str(hosts.config_file), "-w", "host1"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as starter:
        until(lambda: _seen("starting", ""), "the scheduler")
        (state.directory() / "night" / state.LOG).write_text("first\nwhat it said\n")
        if how == "down":
            assert run("down", "night")[0] == 0
        else:
            os.kill(pid_of(), how)
        _, err = starter.communicate(timeout=90)
    assert starter.returncode == 1
    assert why in err and "Next step: start it again" in err, err
    assert ("  The end of its log:\n  | first\n  | what it said\n" in err) is (how is signal.SIGKILL)
    assert state.all_named() == []


@pytest.mark.parametrize("moment", ["connecting", "starting", "running", "ending"])
@pytest.mark.parametrize("victim", ["up", "process"])
def test_whoever_is_killed_at_any_moment_nothing_stays(hosts: Any, moment: str, victim: str) -> None:
    argv = [*LAZYCLUSTER, "up", "night", "dask", "--config", str(hosts.config_file), "-w", "host[1-2]"]
    starter = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signs = {"connecting": '"pid"', "starting": "scheduler", "running": '"running"', "ending": '"running"'}
    until(lambda: _seen(moment, signs[moment]), "the moment")
    pid = pid_of()
    if moment == "ending":
        starter.communicate(timeout=90)
        ending = subprocess.Popen([*LAZYCLUSTER, "down", "night"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        until(lambda: _seen(moment, '"ending"') or state.find("night") is None, "the end")
        _kill(pid if victim == "process" else ending.pid)
        ending.communicate(timeout=90)
    else:
        _kill(pid if victim == "process" else starter.pid)
        starter.communicate(timeout=90)
    if moment == "running" and victim == "up":
        assert python(_USE) == "1024\n"
        assert run("down", "night")[0] == 0
    until(is_over, "the end of the process")
    assert settle(lambda: [entry for host in hosts.all for entry in host.leftovers()]) == []


def _seen(moment: str, sign: str) -> bool:
    folder = state.directory() / "night"
    try:
        if moment == "starting":
            return bool(list((folder / state.LOGS).glob("*/*scheduler*")))
        return (
            sign in (folder / "record.json").read_text() and '"pid": null' not in (folder / "record.json").read_text()
        )
    except OSError:
        return False


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# --- from Python -----------------------------------------------------------------------------------
_MODULE = "def answer():\n    return {}\n"
_START = """
import sys
from lazycluster import RuntimeGroup
from lazycluster.cluster.dask_cluster import DaskCluster
group = RuntimeGroup(hosts=["host1", "host2"], connection_kwargs={"config_file": sys.argv[1]})
cluster = DaskCluster(group, name="night", nthreads=1)
cluster.start()
import module_of_mine
with cluster.get_client(timeout=20) as client:
    print(client.submit(module_of_mine.answer).result(), len(cluster.workers), cluster.status.name)
cluster.scale(3)
print(sorted(cluster.plan), cluster.scheduler_address.startswith("tls://"), cluster.name)
print(cluster.master.state, len(cluster.events) > 0, cluster.dashboard_link.startswith("http://127.0.0.1"))
print(cluster)
if sys.argv[2] == "end":
    cluster.cleanup()
"""


def test_a_program_starts_a_cluster_that_outlives_it(hosts: Any, tmp_path: Path) -> None:
    (tmp_path / "module_of_mine.py").write_text(_MODULE.format(22))
    script = tmp_path / "start.py"
    script.write_text(_START)
    done = subprocess.run(
        [sys.executable, str(script), hosts.config_file, "leave"], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    first, second, third, shown = done.stdout.splitlines()
    assert first == "22 2 running"
    assert second == "['host1-0', 'host1-1', 'host2-0'] True night"
    assert third == "ready True True"
    assert shown.startswith("<DaskCluster running, port ") and shown.endswith("3 workers>")
    # Another program, with another version of the module, which it sends itself.
    (tmp_path / "module_of_mine.py").write_text(_MODULE.format(33))
    other = tmp_path / "other.py"
    other.write_text(
        "import lazycluster, module_of_mine\n"
        "with lazycluster.connect('night') as client:\n    print(client.submit(module_of_mine.answer).result())\n"
    )
    used = subprocess.run([sys.executable, str(other)], capture_output=True, text=True, timeout=90)
    assert (used.stdout, used.returncode) == ("33\n", 0), used.stderr
    assert run("down", "night")[0] == 0


_ANSWERS = """
import sys, lazycluster, module_of_mine
with lazycluster.connect("night") as client:
    for line in sys.stdin:
        answers = [client.submit(module_of_mine.answer, pure=False).result() for _ in range(2)]
        print(answers, flush=True)
"""


def test_each_program_runs_with_its_own_modules(hosts: Any, tmp_path: Path) -> None:
    up(hosts, "--workers", 1)
    program = tmp_path / "program.py"
    program.write_text(_ANSWERS)
    argv = [sys.executable, "-B", program]
    for version in range(4):  # each with a module that was edited just before
        (tmp_path / "module_of_mine.py").write_text(f"def answer():\n    return {version}\n")
        done = subprocess.run(argv, input="\n", capture_output=True, text=True, timeout=90)
        assert done.stdout == f"[{version}, {version}]\n", done.stderr
        assert "replace" not in done.stderr  # the same file, edited, is no other program's
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "module_of_mine.py").write_text("def answer():\n    return 'other'\n")
    shutil.copy(program, tmp_path / "other")
    streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    other = [*argv[:-1], tmp_path / "other" / "program.py"]
    with subprocess.Popen(argv, text=True, **streams) as one, subprocess.Popen(other, text=True, **streams) as two:
        for _ in range(3):
            for process, answer in ((one, 3), (two, "other")):
                process.stdin.write("\n")
                process.stdin.flush()
                assert process.stdout.readline() == f"{[answer, answer]}\n"
        told = two.communicate(timeout=60)[1]
        one.communicate(timeout=60)
    assert told.count("modules of this program replace those of another one") == 1
    assert f"{tmp_path}/other/module_of_mine.py instead of {tmp_path}/module_of_mine.py" in told


def test_a_cluster_of_a_program_ends_with_cleanup_and_unstarted_with_the_program(hosts: Any, tmp_path: Path) -> None:
    (tmp_path / "module_of_mine.py").write_text(_MODULE.format(22))
    script = tmp_path / "start.py"
    script.write_text(_START)
    done = subprocess.run(
        [sys.executable, str(script), hosts.config_file, "end"], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert state.all_named() == []
    script.write_text(_START.partition("cluster.start()")[0])
    done = subprocess.run(
        [sys.executable, str(script), hosts.config_file, "end"], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    until(is_over, "the end of a cluster that nobody has started")


# --- questions, logins, other versions --------------------------------------------------------------
def test_up_asks_for_a_password_and_login_when_the_link_needs_it_again(make_hosts: Any, tmp_path: Path) -> None:
    (host,) = (pool := make_hosts(1, password=True)).all
    argv = [*LAZYCLUSTER, "up", "night", "dask", "--config", str(_without_keys(pool, tmp_path)), "-w", "host1"]
    with Terminal(argv) as terminal:
        terminal.until(r"password: ")
        terminal.type(f"{PASSWORD}\n")
        terminal.until("lazycluster down night")
        assert terminal.end() == 0, terminal.seen
    assert PASSWORD not in terminal.seen
    assert not [path for path in state.directory().rglob("*") if path.is_file() and PASSWORD in path.read_text()]
    _drop_links()
    until(lambda: "needs login for host1: lazycluster login night" in run("ls")[1], "what ls says")
    with Terminal([*LAZYCLUSTER, "login", "night"]) as terminal:
        terminal.until(r"password: ")
        terminal.type(f"{PASSWORD}\n")
        assert terminal.end() == 0, terminal.seen
    assert "night uses this login now" in terminal.seen
    until(lambda: "running" in run("ls")[1], "what ls says")
    assert python(_USE) == "1024\n"
    assert run("down", "night")[0] == 0
    assert host.leftovers() == []


def _drop_links() -> None:
    for process in procfs.with_variable("LAZYCLUSTER_TEST_RUN=" + os.environ["LAZYCLUSTER_TEST_RUN"]):
        if process.command.startswith("ssh -F"):
            os.kill(process.pid, signal.SIGKILL)


def test_a_host_that_is_not_reached_is_named_by_ls_info_and_scale(make_hosts: Any) -> None:
    hosts = make_hosts(2)
    up(hosts, "--network", "direct")
    hosts[0].cut_off()
    _drop_links()
    link = "the link to host1 has been interrupted for [0-9]+ s: "
    until(lambda: re.search(f"running: {link}", run("ls")[1]) is not None, "what ls says")
    status, out, err = run("info", "night")
    assert status == 0 and re.search(f"problem +{link}", out), out + err
    status, out, err = run("scale", "night", 1)
    assert status == 1 and re.search(f"the scheduler is on host1, and {link}(?s:.*)Next step: check that host1", err), (
        err
    )
    with pytest.raises(ClusterError, match=f"the scheduler is on host1, and {link}"):
        lazycluster.connect("night", timeout=1)
    hosts[0].restore()
    until(lambda: "the link to" not in run("ls")[1], "what ls says")
    assert run("down", "night")[0] == 0


def _without_keys(pool: Any, tmp_path: Path) -> Path:
    config = tmp_path / "config"
    text = Path(pool.config_file).read_text()
    config.write_text(
        re.sub(
            r"(?m)^\s*(IdentityFile|IdentityAgent|IdentitiesOnly|PreferredAuthentications|BatchMode)\b.*\n", "", text
        )
    )
    return config


def test_a_source_that_is_removed_meanwhile_breaks_nothing(hosts: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(Path(lazycluster.__file__).parent, source / "lazycluster")
    here = {"PYTHONPATH": str(source)}
    argv = ("up", "night", "dask", "--config", hosts.config_file, "-w", "host[1-2]", "--workers", "1")
    status, _, err = run(*argv, **here)
    assert status == 0, err
    assert str(source) in python(f"print(open('/proc/{pid_of()}/cmdline').read())")
    shutil.rmtree(source)
    status, out, err = run("scale", "night", 3)
    assert (status, out) == (0, "night has 3 workers\n"), err
    assert python(_USE) == "1024\n"
    assert run("info", "night")[0] == 0
    assert run("down", "night")[0] == 0


def test_a_process_that_hangs_is_killed_by_down(hosts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_SILENCE", 0.5)
    monkeypatch.setattr(client, "_TERMINATE", 0.5)
    up(hosts)
    pid = pid_of()
    os.kill(pid, signal.SIGSTOP)
    status, out, _ = run("ls")
    assert status == 0 and "does not answer" in out
    for arguments in (("info", "night"), ("scale", "night", 3)):
        status, _, err = run(*arguments)
        assert status == 1, err
        assert f"the process of 'night' (pid {pid}) does not answer: it said nothing for " in err
        assert "lazycluster down night" in err
    found = state.find("night")
    assert found is not None and client.end(found) == "killed"
    assert state.all_named() == []
    assert settle(lambda: [entry for host in hosts.all for entry in host.leftovers()]) == []


def test_the_environment_is_not_kept_but_for_what_is_needed(hosts: Any) -> None:
    argv = ("up", "night", "dask", "--config", hosts.config_file, "-w", "host1")
    assert run(*argv, AWS_SECRET_ACCESS_KEY="do-not-keep", DASK_LOGGING__DISTRIBUTED="info")[0] == 0
    variables = Path(f"/proc/{pid_of()}/environ").read_text()
    assert "do-not-keep" not in variables
    status, out, err = run("info", "night")
    assert status == 0, err
    assert "DASK_LOGGING__DISTRIBUTED" in out and "AWS" not in out
    assert "do-not-keep" not in out


def test_a_start_without_a_host_that_is_reached_ends_as_that_in_the_foreground(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host host1\n  HostName 127.0.0.1\n  Port 1\n")
    for command in (["start", "dask"], ["up", "night", "dask"]):
        status, _, err = run(*command, "--config", config, "-w", "host1")
        assert status == 255
        assert "host1" in err and "Next step" in err, err
    assert state.all_named() == []


def test_where_the_login_ends_its_processes_up_says_how_to_prevent_it(hosts: Any, tmp_path: Path) -> None:
    # No systemd runs here: the commands and the control group are stand-ins.
    (tmp_path / "loginctl").write_text('#!/bin/sh\ncase "$2" in show-session) echo KillUserProcesses=yes;; esac\n')
    (tmp_path / "loginctl").chmod(0o755)
    program = (
        "import sys\nfrom lazycluster.core import unix\n"
        "unix.control_groups = lambda: ['0::/user.slice/user-0.slice/session-1.scope']\n"
        "sys.argv[0] = 'lazycluster'\nfrom lazycluster.cli import main\nmain()"
    )
    argv = [sys.executable, "-c", program, "up", "night", "dask", "--config", hosts.config_file, "-w", "host1"]
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90, env=env)
    assert done.returncode == 1
    assert "loginctl enable-linger" in done.stderr
    assert state.all_named() == []


def test_a_cluster_from_a_file(hosts: Any, tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text("engine = 'dask'\nname = 'night'\nhosts = ['host1', 'host2']\n[options]\nnthreads = 1\n")
    status, _, err = run("up", "-f", file, LAZYCLUSTER_SSH_CONFIG=str(hosts.config_file))
    assert status == 0, err
    assert python(_USE) == "1024\n"
    status, _, err = run("up", "night", "-f", file, LAZYCLUSTER_SSH_CONFIG=str(hosts.config_file))
    assert status == 1 and "there is a cluster 'night' already" in err


def test_a_search_goes_on_without_its_terminal(hosts: Any, tmp_path: Path) -> None:
    argv = ("up", "search", "hyperopt", "--config", hosts.config_file, "-w", "host1", "--dbpath", tmp_path / "trials")
    status, _, err = run(*argv, "--idle", "1h")
    assert status == 0, err
    program = (
        "from hyperopt import fmin, hp, rand\nimport lazycluster\n"
        "trials = lazycluster.connect('search', exp_key='e')\n"
        "fmin(abs, hp.uniform('x', -1, 1), rand.suggest, 3, trials=trials, show_progressbar=False, verbose=False)\n"
        "print(len(trials))"
    )
    assert python(program) == "3\n"
    status, _, err = run("dashboard", "search")
    assert status == 1 and "has no dashboard" in err
    assert run("down", "search")[0] == 0


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_many_ups_and_downs_leave_nothing(hosts: Any, tmp_path: Path) -> None:
    count = int(os.environ.get("LAZYCLUSTER_SOAK_COUNT", "200"))
    for _ in range(count):
        up(hosts, "--workers", "2")
        assert run("down", "night")[0] == 0
        assert state.all_named() == []
        assert [path for path in (tmp_path / "state").rglob("*") if path.is_file()] == []


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_cluster_that_is_used_for_long_stays_as_large_as_it_was(hosts: Any) -> None:
    up(hosts)
    rounds = int(os.environ.get("LAZYCLUSTER_SOAK_COUNT", "200"))
    sizes = []
    for number in range(rounds):
        assert python(_USE) == "1024\n"
        assert run("scale", "night", 1 + number % 3)[0] == 0
        assert run("info", "night")[0] == 0
        if number >= 2:  # what is needed once is there by then
            memory = int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid_of()}/status").read_text())[0])
            files = sorted(path.name for path in state.directory().glob("night/*"))
            sizes.append((memory, len(os.listdir(f"/proc/{pid_of()}/fd")), files))
    print("KiB and descriptors", [size[:2] for size in sizes])
    assert max(size[1] for size in sizes[-3:]) <= max(size[1] for size in sizes[:3])
    assert sizes[-1][0] < sizes[0][0] * 1.3
    assert sizes[-1][2] == sizes[0][2]


def test_launchers_of_ones_own_and_other_objects_are_refused_before_anything_starts() -> None:
    with RuntimeGroup([LocalRuntime()]) as group:
        with pytest.raises(TypeError, match="worker_launcher cannot be used for a cluster in the background"):
            DaskCluster(group, worker_launcher=RoundRobinLauncher, name="night")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="is not a name"):
            DaskCluster(group, name="a/b")  # type: ignore[arg-type]
        assert state.all_named() == []
        claim = state.claim(state.NamedRecord.new("cluster", "night"))
        with pytest.raises(LazyclusterError, match="there is a cluster 'night' already"):
            DaskCluster(group, name="night")  # type: ignore[arg-type]
        claim.remove()


def test_another_ssh_agent_is_handed_over_by_login(make_hosts: Any, tmp_path: Path) -> None:
    pool = make_hosts(1)
    config = _without_keys(pool, tmp_path)
    with agent(pool, tmp_path / "first") as first:
        argv = ("up", "night", "dask", "--config", config, "-w", "host1")
        status, _, err = run(*argv, SSH_AUTH_SOCK=str(first))
        assert status == 0, err
    _drop_links()
    until(lambda: "needs login for host1" in run("ls")[1], "what ls says")
    with agent(pool, tmp_path / "second") as second:
        status, out, err = run("login", "night", SSH_AUTH_SOCK=str(second))
        assert status == 0 and "SSH_AUTH_SOCK" in out, err
        until(lambda: "running" in run("ls")[1], "what ls says")
        assert python(_USE) == "1024\n"
        assert run("down", "night")[0] == 0


@contextlib.contextmanager
def agent(pool: Any, path: Path) -> Iterator[Path]:
    """An ssh agent that has the key of the hosts."""
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    try:
        until(path.exists, "the agent's socket")
        environment = {**os.environ, "SSH_AUTH_SOCK": str(path)}
        subprocess.run(["ssh-add", "-q", pool.key_file], env=environment, check=True)
        yield path
    finally:
        process.terminate()
        process.wait()
