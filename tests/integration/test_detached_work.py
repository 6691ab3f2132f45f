"""Detached work from the command line: started, listed, read, waited for, ended and removed, from any machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazycluster.background.state import Claim
from lazycluster.cli import app
from patience import until


class Machine:
    """A machine of the user's, with its own records; the hosts are the same for all."""

    def __init__(self, hosts: Any, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.hosts, self.state, self._capsys = hosts, state, capsys
        self.config: str | None = str(hosts.config_file)

    def start(self, command: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "lazycluster", command, "--config", str(self.hosts.config_file), *arguments]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        env = {**os.environ, "XDG_STATE_HOME": str(self.state)}
        return subprocess.Popen(argv, env=env, **{**pipes, "text": True, **options})

    def __call__(self, command: str, *arguments: str) -> tuple[int, str, str]:
        """Run a command in this process, which saves the start of another one."""
        self._capsys.readouterr()
        config = [] if self.config is None else ["--config", self.config]
        argv = ["lazycluster", command, *config, *arguments]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_STATE_HOME", str(self.state))
            patch.setenv("COLUMNS", "200")
            patch.setattr(sys, "argv", argv)
            try:
                status = app._run()
            except SystemExit as end:
                status = int(end.code or 0)
        return (status, *self._capsys.readouterr())

    def states(self, *options: str) -> dict[tuple[str, str], dict[str, Any]]:
        found = json.loads(self("ps", "--json", *options)[1])
        return {(one.get("name", ""), one["host"]): one for one in found}


@pytest.fixture
def machine(hosts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Machine]:
    made = Machine(hosts, tmp_path / "state", capsys)
    yield made
    names = {name for name, _ in made.states("-w", "@all") if name}
    if names:
        assert made("rm", "-w", "@all", "--force", *names)[0] == 0


@pytest.fixture
def other(hosts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Machine:
    """Another machine with the same key."""
    return Machine(hosts, tmp_path / "other", capsys)


def test_work_goes_on_and_is_found_from_any_machine(machine: Machine, other: Machine) -> None:
    line = "echo begun on $HOSTNAME; while [ ! -e go ]; do sleep 0.05; done; rm go; exit ${HOSTNAME#host}"
    status, out, err = machine("run", "-w", "host[1-2]", "--detach", "--name", "train", "--", line)
    assert (status, out) == (0, "train\n"), err
    assert "started on host[1-2]" in err
    for one in (machine, other):
        found = one.states()
        assert {key: value["state"] for key, value in found.items()} == dict.fromkeys(
            [("train", "host1"), ("train", "host2")], "running"
        )
        assert found["train", "host1"]["exit_status"] is None
        assert found["train", "host1"]["command"] == line
    assert machine("logs", "train")[1] == "host1: begun on host1\nhost2: begun on host2\n"
    assert other("logs", "-w", "host2", "train")[1] == "begun on host2\n"
    assert machine("run", "-w", "host[1-2]", "--", "touch go")[0] == 0
    status, out, err = other("wait", "train")
    assert status == 2, err
    assert sorted(out.splitlines()) == ["host1: failed, exit status 1", "host2: failed, exit status 2"]
    status, out, _ = machine("ps")
    assert status == 0
    header, *rows = out.splitlines()
    assert header.split() == ["NAME", "HOST", "STATE", "STATUS", "SINCE", "COMMAND"]
    assert [row.split()[:4] for row in rows] == [["train", "host1", "failed", "1"], ["train", "host2", "failed", "2"]]
    assert machine("rm", "train") == (0, "host1: removed\nhost2: removed\n", "")
    assert machine.states("-w", "@all") == {}
    assert machine("run", "-w", "host1", "-d", "--name", "train", "--", "true")[0] == 0, "its name is free again"


def test_cancel_ends_all_processes(machine: Machine) -> None:
    line = "sh -c 'trap \"\" TERM INT; sleep 1000' & setsid sleep 1001 & echo begun; wait"
    assert machine("run", "-w", "host1", "-d", "--name", "stubborn", "--", line)[0] == 0
    host = machine.hosts[0]
    until(lambda: "begun" in machine("logs", "stubborn")[1], "the work")
    assert host.run("pgrep -c sleep").stdout.strip() == "2"
    status, _, err = machine("rm", "stubborn")
    assert status == 1
    assert "'stubborn' runs on host1, and is not removed" in err
    assert "lazycluster cancel stubborn" in err
    assert machine("cancel", "stubborn") == (0, "host1: cancelled\n", "")
    assert host.run("pgrep -c sleep || true").stdout.strip() == "0"
    assert machine("wait", "stubborn")[:2] == (143, "host1: cancelled\n")
    assert machine("cancel", "stubborn") == (0, "host1: it had ended before: cancelled\n", "")
    assert machine("rm", "stubborn")[0] == 0


def test_a_name_is_used_once(machine: Machine, other: Machine) -> None:
    assert machine("run", "-w", "host1", "-d", "--name", "once", "--", "sleep 1000")[0] == 0
    status, out, err = machine("run", "-w", "host2", "-d", "--name", "once", "--", "true")
    assert (status, out) == (1, "")
    assert "there is detached work 'once' already" in err
    # Another machine, which has no record of it: it runs on none of the hosts.
    status, out, err = other("run", "-w", "host[1-2]", "-d", "--name", "once", "--", "touch ran")
    assert (status, out) == (1, "")
    assert "host1: there is work 'once' already" in err
    assert "host2: not started: another host has work of that name" in err
    assert set(other.states("-w", "@all")) == {("once", "host1")}
    assert other("rm", "--force", "once") == (0, "host1: removed\n", "")
    # The first machine's record is behind the truth.
    status, _, err = machine("wait", "once")
    assert status == 1
    assert "there is no work 'once'" in err
    assert "lazycluster rm --forget once frees the name" in err
    assert machine("rm", "once") == (0, "host1: it was there no more\n", "")
    assert machine("run", "-w", "host1", "-d", "--name", "once", "--", "true")[0] == 0


def test_unknown_names_and_hostile_ones(machine: Machine) -> None:
    assert machine("run", "-w", "host1", "-d", "--name", "training", "--", "true")[0] == 0
    for command in ("wait", "logs", "cancel", "rm"):
        status, out, err = machine(command, "-w", "host1", "trainig")
        assert (status, out) == (1, "")
        assert "there is no work 'trainig' on host1; did you mean 'training'?" in err
    for name in ("../x", "a\nb", "x" * 64, "-x", "", "a b"):
        status, out, err = machine("run", "-w", "host1", "-d", f"--name={name}", "--", "true")
        assert (status, out) == (2, ""), name
        assert machine("logs", "-w", "host1", "--", name)[0] == 1
    assert machine("run", "-w", "host1", "--name", "x", "--", "true")[0] == 2
    assert machine("run", "-w", "host1", "-d", "--stdin", "--", "true")[0] == 2


def test_without_a_name_there_is_one(machine: Machine) -> None:
    status, out, _ = machine("run", "-w", "host1", "-d", "--json", "--", "/usr/bin/env", "true")
    found = json.loads(out)
    assert status == 0
    assert found["name"].startswith("env-")
    assert found["hosts"] == [{"host": "host1", "state": "done", "error": None}]
    assert machine("wait", found["name"])[0] == 0


def test_a_script_with_arguments_environment_and_directory(machine: Machine, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text("import os, sys\nprint(sys.argv[1:], os.environ['A'], os.getcwd(), sys.stdin.read() == '')\n")
    arguments = ("-w", "host1", "-d", "--env", "A=b c", "--cwd", "/tmp", "--python", str(script), "--", "x y", "-z")
    name = machine("run", *arguments)[1].strip()
    assert name.startswith("job-")
    assert machine("wait", name)[0] == 0
    assert machine("logs", name)[1] == "['x y', '-z'] b c /tmp True\n"


def test_how_work_can_end(machine: Machine) -> None:
    lines = {"killed": "kill -9 $$", "late": "sleep 1000", "nothing": "no-such-program"}
    for name, line in lines.items():
        limit = ("--timeout", "0.5") if name == "late" else ()
        assert machine("run", "-w", "host1", "-d", "--name", name, *limit, "--", line)[0] == 0
    assert machine("wait", "killed", "late", "nothing")[0] == 137
    assert {name: one["exit_status"] for (name, _), one in machine.states().items()} == {
        "killed": 137, "late": 124, "nothing": 127,
    }  # fmt: skip
    assert machine("run", "-w", "host1", "-d", "--name", "gone", "--", "no-such-program", "x")[0] == 0
    status, out, _ = machine("wait", "gone")
    assert status == 127
    assert "no-such-program" in out


def test_ctrl_c_ends_the_waiting_and_not_the_work(machine: Machine) -> None:
    assert machine("run", "-w", "host1", "-d", "--name", "long", "--", "echo begun; sleep 1000")[0] == 0
    following = machine.start("logs", "-f", "long")
    assert following.stdout is not None
    assert following.stdout.readline() == "begun\n"
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=60)
    assert following.returncode == 130
    assert "'long' goes on: lazycluster logs -f long" in err
    waiting = machine.start("wait", "--timeout", "1000", "long", "-w", "host1")
    until(lambda: _waits(waiting.pid), "the waiting")
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    assert "'long' goes on: lazycluster wait long" in err
    assert machine("wait", "--timeout", "0.3", "long")[0] == 124
    assert machine.states()["long", "host1"]["state"] == "running"


def _waits(pid: int) -> bool:
    """Return whether a process has its connection: then it has an ssh below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return (
        children.exists()
        and subprocess.run(["pgrep", "-P", str(pid), "-x", "ssh"], capture_output=True).returncode == 0
    )


def test_a_log_that_is_followed_comes_to_its_end(machine: Machine) -> None:
    line = "for i in 1 2 3 4 5; do echo $i; sleep 0.2; done; printf end"
    assert machine("run", "-w", "host[1-2]", "-d", "--name", "count", "--", line)[0] == 0
    status, out, _ = machine("logs", "-f", "count")
    assert status == 0
    for host in ("host1", "host2"):
        assert [row for row in out.splitlines() if row.startswith(host)] == [
            f"{host}: {word}" for word in ("1", "2", "3", "4", "5", "end")
        ]
    assert machine("logs", "-n", "2", "-w", "host1", "count")[1] == "5\nend"
    assert machine("logs", "-n", "2", "-N", "count")[1] == "5\nend\n5\nend\n"


def test_binary_output_comes_byte_by_byte(machine: Machine) -> None:
    line = "python3 -c 'import sys; sys.stdout.buffer.write(bytes(range(256)) * 1000)'"
    assert machine("run", "-w", "host1", "-d", "--name", "bytes", "--", line)[0] == 0
    assert machine("wait", "bytes")[0] == 0
    process = machine.start("logs", "bytes", text=False)
    assert process.communicate(timeout=60)[0] == bytes(range(256)) * 1000


def test_a_very_long_log_keeps_its_beginning_and_its_end(machine: Machine) -> None:
    line = "head -c 200000000 /dev/zero | tr '\\0' x | fold -w 99 ; echo the end"
    assert machine("run", "-w", "host1", "-d", "--name", "long", "--", f"echo the beginning; {line}")[0] == 0
    assert machine("wait", "long")[0] == 0
    host = machine.hosts[0]
    used = int(host.run("du -sm ~/.local/state/lazycluster/detached | cut -f1", user=host.user).stdout)
    assert used <= 3 * 16 + 2
    status, out, _ = machine("logs", "long")
    assert status == 0
    assert out.startswith("the beginning\nxxx")
    assert out.endswith("xxthe end\n")
    (note,) = [row for row in out.splitlines() if row.startswith("[lazycluster: ")]
    left = int(note.split()[1])
    assert len(out) - len(note) - 2 + left == len("the beginning\nthe end\n") + 200_000_000 * 100 // 99


def test_a_host_that_is_down_hides_no_other(make_hosts: Any, tmp_path: Path, capsys: Any) -> None:
    hosts = make_hosts(2)
    machine = Machine(hosts, tmp_path / "state", capsys)
    assert machine("run", "-w", "host[1-2]", "-d", "--name", "both", "--", "sleep 1000")[0] == 0
    hosts[1].power_off()
    status, out, err = machine("ps", "--connect-timeout", "3")
    assert status == 255
    assert "both" in out
    assert "host2: not usable as a runtime" in err
    assert machine("cancel", "both", "--connect-timeout", "3")[0] == 255
    found = machine.states("-w", "host1")
    assert found["both", "host1"]["state"] == "cancelled"
    status, _, err = machine("rm", "both", "--connect-timeout", "3")
    assert status == 255
    assert "host2" in err
    assert "or lazycluster rm --forget both" in err
    assert "both" in json.dumps(machine("run", "-w", "host1", "-d", "--name", "both", "--", "true"))
    assert machine("rm", "--forget", "both")[0] == 0
    assert machine("run", "-w", "host1", "-d", "--name", "both", "--", "true")[0] == 0


def test_a_restart_of_the_host_ends_work_and_is_told(machine: Machine) -> None:
    assert machine("run", "-w", "host1", "-d", "--name", "ended", "--", "echo begun; sleep 1000")[0] == 0
    host = machine.hosts[0]
    until(lambda: "begun" in machine("logs", "ended")[1], "the work")
    directory = "~/.local/state/lazycluster/detached/*"
    (about,) = [json.loads(host.run(f"cat {directory}/task.json", user=host.user).stdout)]
    host.run(f"kill -9 {about['pid']}")
    until(lambda: machine.states()["ended", "host1"]["state"] == "lost", "its end")
    assert machine("wait", "ended")[:2] == (137, "host1: lost\n")
    # As if the host had been restarted: its boot has another number.
    host.run(f"sed -i 's/{about['boot']}/other 1/' {directory}/task.json", user=host.user)
    state = machine.states()["ended", "host1"]
    assert (state["state"], state["restarted"], state["exit_status"]) == ("lost", True, 137)
    assert machine("ps")[1].splitlines()[1].split()[:3] == ["ended", "host1", "lost:"]
    assert machine("wait", "ended")[:2] == (137, "host1: lost: the host was restarted\n")
    assert machine("logs", "-f", "ended")[:2] == (0, "begun\n")
    assert machine("rm", "ended")[0] == 0


def test_times_are_those_of_the_host_whatever_its_clock_says(machine: Machine) -> None:
    assert machine("run", "-w", "host1", "-d", "--name", "clock", "--", "true")[0] == 0
    assert machine("wait", "clock")[0] == 0
    host = machine.hosts[0]
    # As if its clock had been set back by a year since.
    shift = "import json,sys;f='{}.json';d=json.load(open(f));d['{}']+=3e7;json.dump(d,open(f,'w'))"
    for name, key in (("task", "begun"), ("task", "created"), ("state", "ended")):
        line = shift.format(name, key).replace('"', "'")
        host.run(f'cd ~/.local/state/lazycluster/detached/*/ && python3 -c "{line}"', user=host.user)
    state = machine.states()["clock", "host1"]
    assert 0 <= state["ended_ago"] <= state["age"] < 1000


def test_work_is_asked_about_where_and_as_whom_it_was_started(
    machine: Machine, other: Machine, hosts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = re.sub(r"(?m)^\s*User .*\n", "", Path(hosts.config_file).read_text())
    (tmp_path / "any-user").write_text(text)
    monkeypatch.chdir(tmp_path)
    known, machine.config = machine.config, "any-user"
    user = hosts[0].user
    assert machine("run", "-w", "host1", "-l", user, "-d", "--name", "mine", "--", "sleep 1000")[0] == 0
    machine.config = known
    assert machine("run", "-w", "host[1-2]", "-d", "--name", "theirs", "--", "sleep 1000")[0] == 0
    machine.config = None
    monkeypatch.chdir("/")
    running = {key: one["state"] for key, one in machine.states().items()}
    assert running == dict.fromkeys([("mine", "host1"), ("theirs", "host1"), ("theirs", "host2")], "running")
    # What names another account counts, and what is not seen there is not gone.
    status, out, err = machine("rm", "-l", "root", "mine")
    assert (status, out) == (1, "")
    assert f"since it was started on host1 as {user} with the ssh configuration {tmp_path / 'any-user'}" in err
    assert other("run", "-w", "host1", "-l", "root", "-d", "--name", "mine", "--", "true")[0] == 0
    assert other("wait", "mine")[0] == 0
    status, out, err = machine("rm", "-l", "root", "mine")
    assert (status, out) == (0, "host1: removed\n")
    assert "'mine' stays taken on this machine" in err
    status, out, err = machine("rm", "-w", "host2", "mine")
    assert (status, out) == (1, "")
    assert "leave out what names others" in err
    assert machine("cancel", "-w", "host1", "mine")[:2] == (0, "host1: cancelled\n")
    assert machine("rm", "mine")[:2] == (0, "host1: removed\n")
    assert machine("rm", "--force", "theirs")[0] == 0
    machine.config = known


def test_work_whose_record_cannot_be_completed_runs_and_is_found(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Claim, "write", lambda claim, **changes: os.open("/dev/full/no", os.O_WRONLY))
        assert machine("run", "-w", "host1", "-d", "--name", "full", "--", "true")[0] == 0
    assert machine("wait", "full")[0] == 0
    assert machine("rm", "full") == (0, "host1: removed\n", "")
