"""The command line against real hosts: what is printed, and with which exit status it ends."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import basevenv
from terminals import Terminal


def start(hosts: Any, command: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "lazycluster", command, "--config", str(hosts.config_file), *arguments]
    options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def lazycluster(hosts: Any, *arguments: str, given: str | None = None) -> tuple[int, str, str]:
    process = start(hosts, *arguments, stdin=subprocess.DEVNULL if given is None else subprocess.PIPE)
    out, err = process.communicate(given, timeout=60)
    return process.returncode, out, err


def lines(text: str) -> list[str]:
    return sorted(text.splitlines())


# --- run -------------------------------------------------------------------------------------------
def test_lines_with_their_hosts(hosts: Any) -> None:
    status, out, err = lazycluster(hosts, "run", "-w", "host[1-3]", "-x", "host2", "--", "echo a; printf b; echo c >&2")
    assert status == 0
    assert lines(out) == ["host1: a", "host1: b", "host3: a", "host3: b"]
    assert lines(err) == ["host1: c", "host3: c"]


@pytest.mark.parametrize(
    ("named", "ran"),
    [
        (("-w", "host[1, 3]"), [1, 3]),
        (("-w", "host[1 - 2]"), [1, 2]),
        (("-w", "host{3..2}"), [2, 3]),
        (("-w", "host[!2]"), [1, 3]),
        (("-w", "@all", "-x", "host[1, 12]"), [2, 3]),
        (("-w", "@all", "-x", "-"), [2]),
    ],
)
def test_the_hosts_that_are_asked_for_and_no_others(hosts: Any, named: tuple[str, ...], ran: list[int]) -> None:
    status, out, err = lazycluster(hosts, "run", *named, "--", "echo ran", given="host[1, 3]  # not these\n")
    assert (status, err) == (0, "")
    assert lines(out) == [f"host{number}: ran" for number in ran]


def test_arguments_arrive_unchanged(hosts: Any) -> None:
    words = ["a b", "*", "$HOME", "'", '"', "", "-x", "\n"]
    status, out, _ = lazycluster(hosts, "run", "-w", "host1", "-N", "--", "printf", "[%s]", *words)
    assert (status, out) == (0, "".join(f"[{word}]" for word in words) + "\n")


def test_exit_statuses(hosts: Any) -> None:
    status, _, err = lazycluster(hosts, "run", "-w", "@all", "--", "exit ${HOSTNAME#host}")
    assert status == 3
    assert lines(err) == ["host1: exit status 1", "host2: exit status 2", "host3: exit status 3"]
    status, out, err = lazycluster(hosts, "run", "-w", "host1,nowhere.invalid", "--", "echo here")
    assert (status, out) == (255, "host1: here\n")
    assert "nowhere.invalid: not usable as a runtime (dns)" in err
    status, _, err = lazycluster(hosts, "run", "-w", "host1", "--timeout", "0.5", "--", "sleep 100")
    assert (status, err) == (124, "host1: ended after 0.5 s\n")
    status, _, err = lazycluster(hosts, "run", "-w", "host1", "--", "no-such-program", "x")
    assert status == 127
    assert "no-such-program" in err


@pytest.mark.soak
@pytest.mark.keeps("hosts")  # it ends what runs there within the grace
def test_the_timeout_holds_for_a_host_that_falls_silent(make_hosts: Any) -> None:
    hosts = make_hosts(1)
    process = start(hosts, "run", "-w", "host1", "--timeout", "2", "--", "echo begun; exec sleep 600")
    assert process.stdout
    assert process.stdout.readline() == "host1: begun\n"
    hosts[0].cut_off()
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        hosts[0].restore()
    assert process.returncode == 124
    assert err.endswith("host1: told to end after 2 s, and silent since then\n")


def test_an_unreachable_host_is_no_error_for_all(make_hosts: Any) -> None:
    hosts = make_hosts(2)
    hosts[1].power_off()
    status, out, err = lazycluster(hosts, "run", "-w", "@all", "--connect-timeout", "3", "--", "echo up")
    assert (status, out) == (0, "host1: up\n")
    assert err.startswith("host2: not usable as a runtime")


def test_options_of_pdsh_and_clush(hosts: Any) -> None:
    status, out, _ = lazycluster(hosts, "run", "-w", "host[1-2]", "-l", "root", "-f", "1", "-N", "--", "id -un")
    assert (status, out) == (0, "root\nroot\n")
    status, out, _ = lazycluster(hosts, "list-runtimes", "-w", "host1", "--user", "nobody-there", "--json")
    assert "nobody-there@host1" in json.loads(out)[0]["reason"]


def test_gathered(hosts: Any) -> None:
    status, out, _ = lazycluster(
        hosts, "run", "-w", "@all", "--gather", "--", "echo same; [ $HOSTNAME != host2 ] || echo 2"
    )
    assert status == 0
    assert out == "── host[1,3] (2 hosts)\nsame\n── host2\nsame\n2\n"


def test_json(hosts: Any) -> None:
    status, out, err = lazycluster(hosts, "run", "-w", "host[1-2]", "--json", "--", "echo out; echo err >&2; exit 4")
    found = json.loads(out)
    assert (status, err) == (4, "")
    assert [entry["host"] for entry in found] == ["host1", "host2"]
    assert {(e["status"], e["state"], e["stdout"], e["stderr"]) for e in found} == {(4, "done", "out\n", "err\n")}


def test_standard_input_goes_to_all(hosts: Any) -> None:
    data = "".join(f"line {number}\n" for number in range(200_000))
    status, out, _ = lazycluster(hosts, "run", "-w", "@all", "--stdin", "--", "wc -c", given=data)
    assert (status, lines(out)) == (0, [f"host{n}: {len(data)}" for n in (1, 2, 3)])
    status, out, _ = lazycluster(hosts, "run", "-w", "host1", "--", "cat; echo end", given="not for it")
    assert (status, out) == (0, "host1: end\n")


def test_hosts_from_standard_input_and_a_file(hosts: Any, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("host1 # the first\nhost[2-3]\n")
    for option in (("-w", "-"), ("--hostfile", "-")):
        status, out, _ = lazycluster(hosts, "run", *option, "--", "hostname", given=file.read_text())
        assert (status, lines(out)) == (0, ["host1: host1", "host2: host2", "host3: host3"])
    status, out, _ = lazycluster(hosts, "run", "--hostfile", str(file), "-x", "host[1-2]", "--", "hostname")
    assert (status, out) == (0, "host3: host3\n")


def test_what_a_command_leaves_running_is_told(hosts: Any) -> None:
    """It ends with the command: with nohup somebody may have wanted it to stay."""
    line = "nohup sleep 7301 > /dev/null 2>&1 & echo started"
    status, out, err = lazycluster(hosts, "run", "-w", "@all", "--", line)
    assert (status, lines(out)) == (0, [f"host{n}: started" for n in (1, 2, 3)])
    assert err.splitlines() == [
        "host[1-3]: what the command had left running was ended: sleep 7301",
        "  Next step: start what is to go on after the command with 'lazycluster run --detach'",
    ]
    _, out, err = lazycluster(hosts, "run", "-w", "host1", "--json", "--", "setsid -f sleep 7302 > /dev/null 2>&1")
    assert json.loads(out)[0]["state"] == "done"
    assert "sleep 7302" in err
    assert lazycluster(hosts, "run", "-w", "host1", "--", "sleep 0.01 & wait; echo end")[1:] == ("host1: end\n", "")


@pytest.mark.parametrize(("line", "step"), [("no-such-program f", "check the name"), ("/etc/passwd x", "chmod +x")])
def test_what_a_shell_cannot_run_has_a_next_step(hosts: Any, line: str, step: str) -> None:
    status, _, err = lazycluster(hosts, "run", "-w", "@all", "--", line)
    assert status in (126, 127)
    assert err.count("Next step") == 1
    assert err.splitlines()[-1].startswith(f"  Next step after exit status {status}: ")
    assert step in err.splitlines()[-1]


def test_a_script(hosts: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nprint(sys.argv[1:], os.environ['MODE'], os.getcwd())\nsys.exit(5)\n")
    status, out, _ = lazycluster(
        hosts, "run", "-w", "host1", "--env", "MODE=fast", "--cwd", "/", "--python", str(script), "--", "--a", "b c"
    )
    assert (status, out) == (5, "host1: ['--a', 'b c'] fast /\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_everywhere(hosts: Any, number: signal.Signals, status: int) -> None:
    process = start(hosts, "run", "-w", "@all", "--", "echo $HOSTNAME; exec sleep 600")
    assert process.stdout
    assert sorted(process.stdout.readline() for _ in range(3)) == ["host1: host1\n", "host2: host2\n", "host3: host3\n"]
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == status


def test_a_closed_pipe_ends_it_everywhere(hosts: Any) -> None:
    process = start(hosts, "run", "-w", "@all", "--", "yes")
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == ""
    assert process.wait(timeout=30) == 128 + signal.SIGPIPE
    process.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--", "ls"), "no hosts are named: use -w HOSTS"),
        (("run", "-w", "host1"), "no command given"),
        (("run", "-w", "", "--", "ls"), "no hosts are named: the given set or file is empty"),
        (("run", "--hostfile", "/dev/null", "--", "ls"), "no hosts are named: the given set or file is empty"),
        (("run", "-w", "x*", "--", "ls"), r"no host of the ssh configuration fits 'x*'; there are: host[1-3]"),
        (("run", "-w", "host[3-1]", "--", "ls"), "empty range"),
        (("run", "-w", "host[^1]", "--", "ls"), "[^1] is not valid: [!1] is any one character but these"),
        (("run", "-w", "@all", "-x", "host[1,x]", "--", "ls"), "words are written in braces: {1,x}"),
        (("run", "-w", "host[1-3]!host2", "--", "ls"), "those to leave out with -x"),
        (("run", "-w", "host1,host2;ls", "--", "ls"), "'host2;ls' is not a host"),
        (("get", "-w", "{a,a}" * 26, "x", "y"), "more than 100000 hosts"),
        (("doctor", "{" * 2000 + "a" + "}" * 2000), "nested more than"),
        (("run", "-w", "host1", "-x", "host1", "--", "ls"), "no host is left"),
        (("run", "-w", "me@host1", "-l", "you", "--", "ls"), "-l you: the name 'me@host1' says another account"),
        (("doctor", "-l", "-oProxyCommand=x", "host1"), "a user's name cannot begin with '-'"),
        (("get", "-w", "host1", "-f", "0", "x", "y"), "'0' is not an integer from 1 to"),
        (("run", "-w", "host1", "--env", "A", "--", "ls"), "'A' is not NAME=VALUE"),
        (("run", "-w", "host1", "--timeout", "-1", "--", "ls"), "'-1' is not a time in seconds, from 0.1 to"),
        (("put", "-w", "host1", "nothing-here", "x"), "no such file or directory: nothing-here"),
        (
            ("put", "-w", "host1", "--network", "direct", "/etc/hosts", "/etc", "x/"),
            "/etc is a directory, and --network",
        ),
        (("put", "-w", "host1", "x"), "SRC... DEST"),
        (("forward", "host1", "99999"), "is not a port"),
        (("expose", "-w", "host1", "a:b"), "is not a port"),
        (("list-runtimes", "--watch", "--json"), "can be given, not both"),
        (("list-runtimes", "--hots"), "--hots"),
        (("run", "--fanout", "x", "--", "ls"), "For more: lazycluster run --help"),
    ],
)
def test_wrong_usage(hosts: Any, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = lazycluster(hosts, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in " ".join(err.split())


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(closed: str) -> None:
    line = f"{shlex.quote(sys.executable)} -m lazycluster run -w nowhere.invalid -- true {closed}"
    ended = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert ended.returncode == 255
    assert "bug" not in ended.stdout + ended.stderr
    assert "2>&-" in closed or "nowhere.invalid: not usable" in ended.stderr


@pytest.fixture
def foreign(hosts: Any, tmp_path: Path) -> list[str]:
    """Options for a host whose name is not ASCII, and one that cannot be reached."""
    config = tmp_path / "config"
    refused = "\nHost h\u00f6st9\n  HostName 127.0.0.1\n  Port 1\n"
    config.write_text(Path(hosts.config_file).read_text().replace("Host host1", "Host h\u00f6st1 host1") + refused)
    return ["--config", str(config), "-w", "h\u00f6st1,h\u00f6st9"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8:strict"])
def test_no_output_is_lost_for_an_encoding(foreign: list[str], encoding: str, tmp_path: Path) -> None:
    """What a host prints arrives byte by byte; names that the encoding has no bytes for are escaped."""
    h1, h9 = (name.encode(encoding.partition(":")[0], "backslashreplace") for name in ("h\u00f6st1", "h\u00f6st9"))
    line = b"--" if encoding in ("ascii", "latin-1") else "\u2500\u2500".encode()
    (tmp_path / "file\u2500").write_text("")

    def ran(*words: str) -> tuple[int, bytes, bytes]:
        argv = [sys.executable, "-m", "lazycluster", *words]
        done = subprocess.run(argv, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    command = r"printf '\342\224\200\377\n'; printf '\374\n' >&2; exit 3"
    status, out, err = ran("run", "--gather", *foreign, "--", command)
    assert (status, out) == (255, line + b" " + h1 + b": exit status 3\n\xe2\x94\x80\xff\n\xfc\n")
    assert err.startswith(h9 + b": not usable")
    status, out, err = ran("run", *foreign, "--", command)
    assert (status, out) == (255, h1 + b": \xe2\x94\x80\xff\n")
    assert h1 + b": \xfc\n" in err
    assert h9 + b": not usable" in err
    status, out, err = ran("list-runtimes", *foreign)
    assert (status, err) == (255, b"")
    assert h1 in out
    assert h9 + b": connect to 127.0.0.1 port 1: Connection refused" in out
    status, out, err = ran("put", *foreign, str(tmp_path / "file\u2500"), str(tmp_path / "no"), "x/")
    assert (status, out) == (2, b"")
    status, out, err = ran("get", *foreign, "file\u2500", str(tmp_path))
    assert (status, out) == (255, b"")
    assert h1 + b": No such file" in err
    status, out, _ = ran("doctor", *foreign[:2], "h\u00f6st9")
    assert (status, out.startswith(h9 + b"\n")) == (1, True)
    status, _, err = ran("run", "-w", "h\u00f6st[\u2500]", "--", "ls")
    assert (status, err.startswith(b"error: ")) == (2, True)


@pytest.mark.parametrize(
    ("command", "status", "out", "err"),
    [
        # that it cannot say what is wrong must not cost what it has
        ("run -w host1,nowhere.invalid -- 'echo a; echo b >&2' 2>/dev/full", 255, "host1: a\n", ""),
        ("run --gather -w host1 -- 'echo a; exit 3' 2>/dev/full", 3, "\u2500\u2500 host1: exit status 3\na\n", ""),
        ("run -w 'host[' -- ls 2>/dev/full", 2, "", ""),
        ("run --json -w host1 -- true >/dev/full", 1, "", "error: [Errno 28] No space left on device\n"),
        ("run --gather -w host1 -- echo a >/dev/full", 1, "", "error: [Errno 28] No space left on device\n"),
        ("run --json -w host1 -- true | true", 141, "", ""),
        ("doctor --json host1 | true", 141, "", ""),
        ("run -w host1 -- 'echo b >&2' 2>&1 >/dev/null | true", 141, "", ""),
        # another program has made the pipe non-blocking, and reads when it likes
        ("run -w host1 -N -- 'yes | head -c 3000000' | slow", 0, "3000000\n", ""),
    ],
)
def test_standard_streams_may_be_broken(hosts: Any, command: str, status: int, out: str, err: str) -> None:
    name, _, rest = command.partition(" ")
    slow = "import os, sys, time; time.sleep(1); print(sum(len(part) for part in iter(lambda: os.read(0, 9999), b'')))"
    nonblocking = "import os, sys; os.set_blocking(1, False); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    python = shlex.quote(sys.executable)
    script = (
        f"slow() {{ {python} -c {shlex.quote(slow)}; }}; {python} -c {shlex.quote(nonblocking)} -m lazycluster {name} "
        f"--config {shlex.quote(str(hosts.config_file))} {rest}; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


def test_hosts_from_a_standard_input_that_is_closed() -> None:
    line = f"{shlex.quote(sys.executable)} -m lazycluster run -w - -- true <&-"
    ended = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "the given set or file is empty" in ended.stderr


def test_what_is_no_command() -> None:
    for words, said in (("list-runtime",), "Did you mean 'list-runtimes'?"), (("xyz",), "See 'lazycluster --help'."):
        argv = [sys.executable, "-m", "lazycluster", *words]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: No such command {words[0]!r}. {said}\n")
    argv = [sys.executable, "-m", "lazycluster", "start"]
    done = subprocess.run(argv, capture_output=True, text=True)
    # Before click 8.2 that is as good as --help.
    assert "dask      Start a Dask cluster." in (done.stderr if done.returncode else done.stdout)


def test_a_host_that_is_an_option(hosts: Any) -> None:
    status, _, err = lazycluster(hosts, "run", "-w", "-oProxyCommand=touch /tmp/owned", "--", "ls")
    assert status != 0
    assert "begins with '-'" in err


# --- files -----------------------------------------------------------------------------------------
def test_files_there_and_back(hosts: Any, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "keep.txt").write_text("x" * 1000)
    (tree / "sub" / "leave.pyc").write_text("y")
    (tree / "sub" / "deep.txt").write_text("z")
    status, out, _ = lazycluster(
        hosts, "put", "-w", "host[1-2]", "--exclude", "*.pyc", str(tree), str(tree / "keep.txt"), "in"
    )
    assert status == 0
    assert [line.partition(" in ")[0] for line in lines(out)] == ["host1: 3 files, 2.0K", "host2: 3 files, 2.0K"]
    status, out, _ = lazycluster(hosts, "run", "-w", "host1", "-N", "--", "cd in && find . -type f | sort")
    assert out.split() == ["./keep.txt", "./tree/keep.txt", "./tree/sub/deep.txt"]
    back = tmp_path / "back"
    excluded = ["--exclude", "./tree/sub/", "--exclude", "in/tree/sub", "--exclude", "./sub", "--exclude", "*.o"]
    status, _, err = lazycluster(hosts, "get", "-q", "-w", "host[1-2]", *excluded, "in", str(back))
    assert status == 0
    assert [line.partition(":")[0] for line in lines(err)] == [
        "--exclude '*.o' left nothing out",
        "--exclude ./sub left nothing out",
    ]
    found = sorted(str(path.relative_to(back)) for path in back.rglob("*") if path.is_file())
    assert found == [f"host{n}/in/{name}" for n in (1, 2) for name in ("keep.txt", "tree/keep.txt")]
    status, _, err = lazycluster(hosts, "get", "-w", "host1", "missing", str(back))
    assert status == 1
    assert "missing" in err
    lazycluster(hosts, "run", "-w", "host[1-2]", "--", "rm -r in")


# --- hosts -----------------------------------------------------------------------------------------
def test_list_runtimes(make_hosts: Any) -> None:
    hosts = make_hosts(2)
    hosts[1].power_off()
    with ThreadPoolExecutor(2) as pool:  # each waits for the host that is off
        both = [pool.submit(lazycluster, hosts, "list-runtimes", "--connect-timeout", "8", *options)
                for options in (["-l"], ["--json", "-w", "host[1-2]"])]  # fmt: skip
    status, out, _ = both[0].result()
    assert status == 0
    head, *rows = out.splitlines()
    assert head.split() == ["HOST", "STATE", "LATENCY", "OS", "CORES", "LOAD", "MEMORY", "DISK", "PYTHON", "GPUS"]
    assert rows[0].split()[:2] == ["host1", "active"]
    assert re.fullmatch(r"host2 +inactive +(timeout|unreachable)", rows[1])  # the network says so, or nobody does
    assert "Next step" in out
    status, out, _ = both[1].result()
    first, second = json.loads(out)
    assert status == 255
    assert first["state"] == "active"
    assert first["cpu_cores"] >= 1
    assert second["state"] == "inactive"
    assert second["reason"]


def test_the_live_view(hosts: Any) -> None:
    process = start(hosts, "run", "-w", "host1", "--", "echo up; exec sleep 600")
    tunnels = start(hosts, "forward", "host1", "22", "5000")
    assert process.stdout
    assert tunnels.stdout
    assert process.stdout.readline() == "host1: up\n"
    assert all("-> host1:" in tunnels.stdout.readline() for _ in range(2))
    own, theirs = pty.openpty()
    try:
        argv = [sys.executable, "-m", "lazycluster", "list-runtimes", "--watch", "--config", str(hosts.config_file)]
        env = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
        view = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True)
        os.close(theirs)
        seen = ""
        # host1 has one task and two tunnels, and some share of its processors is busy.
        while not re.search(r"host1 +active +\d+% +\S+ +\S+ +1 +0 +2\s", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen)):
            seen += os.read(own, 65536).decode(errors="replace")
        view.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the end of a terminal
            while os.read(own, 65536):
                pass
        assert view.wait(30) == 130
    finally:
        os.close(own)
        for one in (process, tunnels):
            one.send_signal(signal.SIGINT)
            one.communicate(timeout=30)


def test_doctor(make_hosts: Any) -> None:
    hosts = make_hosts(1)
    status, out, _ = lazycluster(hosts, "doctor", "--json", "host1")
    (found,) = json.loads(out)
    states = {step["name"]: step["state"] for step in found["steps"]}
    assert {states[name] for name in states if name != "packages"} == {"ok"}
    assert status == 0
    status, out, _ = lazycluster(hosts, "doctor", "nowhere.invalid")
    assert status == 1
    steps = [line.split()[:2] for line in out.splitlines() if "not known" in line or "port " in line]
    assert steps == [["name", "failed"], ["port", "not"]]


@pytest.mark.parametrize(
    ("options", "failed"),
    [({"forwarding": False}, "forwarding"), ({"python": "none"}, "Python"), ({"password": True}, "authentication")],
)
def test_doctor_finds_what_is_wrong(make_hosts: Any, options: dict[str, Any], failed: str) -> None:
    hosts = make_hosts(1, **options)
    status, out, _ = lazycluster(hosts, "doctor", "--json", "host1")
    (found,) = json.loads(out)
    assert status == 1
    assert [step["name"] for step in found["steps"] if step["state"] == "failed"] == [failed]
    assert next(step["fix"] for step in found["steps"] if step["name"] == failed)


# --- ports -----------------------------------------------------------------------------------------
def test_which_hosts_reach_each_other_is_told(make_hosts: Any) -> None:
    hosts = make_hosts(3)
    hosts[2].run(["/usr/sbin/iptables", "-A", "INPUT", "-s", hosts[1].address, "-p", "tcp", "-j", "REJECT"])
    status, out, _ = lazycluster(hosts, "doctor", "host[1-3]", "nowhere.invalid")
    assert status == 1
    assert "host1 reaches: host2 yes, host3 yes" in out
    assert re.search(rf"host2 reaches: host1 yes, host3 no: {re.escape(hosts[2].address)}:25\d\d\d ", out)
    assert "nowhere.invalid reaches" not in out
    status, out, _ = lazycluster(hosts, "list-runtimes", "-l", "-w", "host[1-3]")
    assert status == 0
    refused = rf"host2 cannot reach host3 at {re.escape(hosts[2].address)}:25\d\d\d: "
    assert out.splitlines()[-1].startswith("--network direct cannot be used: ")
    assert re.search(refused, out.splitlines()[-1])
    _, out, _ = lazycluster(hosts, "list-runtimes", "-l", "-w", "host[1-2]")
    assert out.splitlines()[-1] == "The 2 active hosts reach each other: --network direct can be used"
    _, out, _ = lazycluster(hosts, "list-runtimes", "--json", "-w", "host[1-2],nowhere.invalid")
    assert [one.get("reaches") for one in json.loads(out)] == [{"host2": ""}, {"host1": ""}, None]


def test_doctor_offers_the_environment_of_this_side(make_hosts: Any) -> None:
    for python, differs in (("3.8", "Python 3.8"), (f"{sys.base_prefix}/bin/python3", "missing")):
        hosts = make_hosts(1, python=python)
        status, out, _ = lazycluster(hosts, "doctor", "--json", "host1")
        (found,) = json.loads(out)
        (packages,) = (step for step in found["steps"] if step["name"] == "packages")
        assert packages["state"] == "differs"
        assert differs in packages["detail"]
        assert "--environment manager" in packages["fix"]
        assert status == 0  # commands and files work


def test_forward_until_ctrl_c(hosts: Any) -> None:
    import socket

    process = start(hosts, "forward", "host1", "22")
    assert process.stdout
    line = process.stdout.readline()
    port = int(line.partition(" ")[0].rpartition(":")[2])
    assert line == f"localhost:{port} -> host1:22\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        assert sock.recv(4) == b"SSH-"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_a_dask_cluster_in_the_foreground(hosts: Any, tmp_path: Path) -> None:
    from lazycluster.cluster.dask_cluster import DaskCluster

    file = tmp_path / "cluster.json"
    process = start(hosts, "start-dask", "-w", "host[1-2]", "--workers", "3", "--connection-file", str(file))
    assert process.stdout
    said = ""
    for line in iter(process.stdout.readline, "Ctrl-C ends it.\n"):
        assert line, process.communicate()
        said += line
    assert "DaskCluster with 3 workers" in said
    assert str(file) in said
    with DaskCluster.connect(file) as client:
        assert client.submit(sum, [1, 2, 3]).result() == 6
        names = {address: worker["name"] for address, worker in client.scheduler_info()["workers"].items()}
        (pid,) = [pid for address, pid in client.run(os.getpid).items() if names[address] == "host2-0"]
    hosts[1].run(f"kill -9 {pid}")
    assert "respawned" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert not file.exists()


def test_a_connection_file_takes_the_place_of_nothing_else(hosts: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.ipynb").write_text("years")
    os.mkfifo(tmp_path / "fifo")
    for name in ("thesis.ipynb", "fifo"):
        status, out, err = lazycluster(hosts, "start-dask", "-w", "host1", "--connection-file", str(tmp_path / name))
        assert (status, out) == (1, "")
        assert "it is not replaced\n  Next step: name another file" in err
        assert "Starting" not in err
    assert (tmp_path / "thesis.ipynb").read_text() == "years"
    status, _, err = lazycluster(hosts, "start-dask", "-w", "host1", "--connection-file", str(tmp_path / "no" / "x"))
    assert status == 2
    assert "no such directory" in err


_SEARCH = """
import sys
from hyperopt import fmin, hp, rand
from lazycluster.cluster.hyperopt_cluster import HyperoptCluster
trials = HyperoptCluster.connect(sys.argv[1], exp_key="parabola")
space = hp.uniform("x", -1, 1)
fmin(abs, space, rand.suggest, 6, max_queue_len=3, trials=trials, show_progressbar=False, verbose=False)
"""


def test_a_hyperopt_cluster_in_the_foreground(hosts: Any, tmp_path: Path) -> None:
    file = tmp_path / "search.json"
    argv = [sys.executable, "-m", "lazycluster", "start", "hyperopt", "--config", str(hosts.config_file)]
    argv += ["-w", "host1", "--dbpath", str(tmp_path / "trials"), "--connection-file", str(file)]
    with Terminal(argv, columns=120) as terminal:
        terminal.until(r"Starting 1 worker on 1 host \.\.\.")
        terminal.until(r"HyperoptCluster with 1 worker, its master on port \d+ of this machine")
        terminal.until(r'HyperoptCluster.connect\(".*search.json"\)')
        terminal.until(r"WORKER +HOST +STATE +RESTARTS +PID +CPU +MEMORY\s+\S+ +host1 +ready +0 +\d+")
        assert file.stat().st_mode & 0o777 == 0o600
        subprocess.run([sys.executable, "-c", _SEARCH, str(file)], check=True, capture_output=True, timeout=60)
        terminal.until(r"6 done, 0 running, 0 waiting, 0 failed, best loss [\d.]+")
        terminal.type("\x03")
        assert terminal.end() == 130, terminal.seen
    assert not file.exists()
    assert "Ending the cluster ...\n" in terminal.seen
    assert "Traceback" not in terminal.seen


def test_cleanup(hosts: Any) -> None:
    # It leaves the agent's processes alone that another manager uses.
    other = start(hosts, "run", "-w", "host1", "--", "echo up; exec sleep 601")
    assert other.stdout
    assert other.stdout.readline() == "host1: up\n"
    process = start(hosts, "run", "-w", "host1", "--", "echo up; exec sleep 600")
    assert process.stdout
    assert process.stdout.readline() == "host1: up\n"
    (sleep,) = [found for found in hosts[0].processes() if found.command == "sleep 600"]
    agent = sleep.parent
    guardian = next(found.parent for found in hosts[0].processes() if found.pid == agent)
    for pid, number in ((guardian, signal.SIGSTOP), (agent, signal.SIGKILL), (guardian, signal.SIGKILL)):
        os.kill(pid, number)
    process.kill()
    process.communicate()
    for folder in hosts[0].path("/tmp").glob("lazycluster-*"):
        os.utime(folder, (0, 0))  # a young one is left alone: it may be about to be used
    status, out, err = lazycluster(hosts, "cleanup", "-w", "host[1-2]")
    assert (status, err) == (0, "")
    assert "host1: ended process" in out
    assert "sleep 600" in out
    assert "host1: removed /tmp/lazycluster-" in out
    assert "host2: nothing was left behind" in out
    assert [found.command for found in hosts[0].processes() if "sleep 60" in found.command] == ["sleep 601"]
    other.send_signal(signal.SIGTERM)
    other.communicate(timeout=30)


def _commands() -> list[str]:
    from lazycluster.cli.app import cli

    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    groups = {name: command for name, command in found.items() if isinstance(command, click.Group)}
    del groups["up"]  # its commands come after a name, and refer to those of start
    return [*found, *(f"{name} {sub}" for name, group in groups.items() for sub in group.list_commands(context))]


@pytest.mark.parametrize("command", ["", *_commands()])
def test_help_teaches_with_examples_and_fits_on_a_screen(command: str) -> None:
    from lazycluster.cli.app import cli

    done = CliRunner().invoke(cli, [*command.split(), "--help"], prog_name="lazycluster", terminal_width=80)
    assert done.exit_code == 0
    assert "Example" in done.output
    assert f"    lazycluster {command.replace('-dask', ' dask')}".rstrip() in done.output
    assert len(done.output.splitlines()) <= (46 if command else 55)
    assert max(map(len, done.output.splitlines())) <= 80
    assert "..." not in done.output.partition("Commands:")[2], "a command's line is cut"


def test_demo(hosts: Any) -> None:
    status, out, err = lazycluster(hosts, "demo", "dask", "-w", "host[1-2]")
    assert (status, err) == (0, "")
    assert "host2: Linux" in out
    assert out.count("pi is about 3.14") == 2
    assert "Not shown" not in out


def test_demo_with_the_base_dependencies_alone(tmp_path: Path) -> None:
    python = basevenv.make(tmp_path / "base")
    run = {"capture_output": True, "text": True, "check": False, "stdin": subprocess.DEVNULL, "cwd": tmp_path}
    done = subprocess.run([python, "-m", "lazycluster", "demo"], **run)
    assert (done.returncode, done.stderr) == (0, "")
    assert "localhost: Linux" in done.stdout
    assert "pi is about 3.14" in done.stdout
    told = done.stdout.partition("Not shown: a Dask cluster")[2]
    assert "dask, distributed, cryptography cannot be imported here" in told
    assert re.search(rf"Next step: .*{re.escape(str(python))}.* 'dask\[distributed\]>=", told)
    assert "pip install '.[dask]'" in told
    # What was asked for by name and cannot be shown is an error before anything runs.
    for engine, missing in (
        ("dask", "dask, distributed, cryptography"),
        ("hyperopt", "hyperopt, pymongo, cryptography"),
    ):
        done = subprocess.run([python, "-m", "lazycluster", "demo", engine, "-w", "nowhere.invalid"], **run)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"error: {missing} cannot be imported here")
        assert "Next step: " in done.stderr


def test_help_needs_nothing_heavy() -> None:
    program = "import sys; sys.argv[0] = 'lazycluster'; import lazycluster.cli.commands.{}; print(*sys.modules)"
    for name in ("run", "runtimes", "doctor", "ports", "copy", "configuration", "demo"):
        argv = [sys.executable, "-c", program.format(name)]
        loaded = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
        assert not {"asyncio", "rich", "cloudpickle", "lazycluster.runtimes"} & set(loaded), name


def test_completion(hosts: Any) -> None:
    def complete(words: str) -> list[str]:
        env = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1), "_LAZYCLUSTER_COMPLETE": "bash_complete"}
        argv = [sys.executable, "-m", "lazycluster"]
        done = subprocess.run(argv, env={**os.environ, **env}, capture_output=True, text=True, check=True)
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert complete("lazycluster add") == ["add-runtime"]
    assert complete(f"lazycluster run --config {hosts.config_file} -w ho") == ["host1", "host2", "host3"]
    assert complete(f"lazycluster run --config {hosts.config_file} -w @all -x host2,host") == [
        "host2,host1",
        "host2,host3",
    ]
    assert complete(f"lazycluster run --config {hosts.config_file} -w host1,ho") == ["host1,host2", "host1,host3"]


_SHELLS = {
    "bash": """eval "$(lazycluster completion bash)"
        COMP_WORDS=(lazycluster run -w host1,ho) COMP_CWORD=3
        _lazycluster_completion lazycluster && printf '%s\\n' "${COMPREPLY[@]}" """,
    # Outside of its editor zsh has no `compadd`, which takes what was found by the name of an array.
    "zsh": """autoload -U compinit && compinit -u -D && eval "$(lazycluster completion zsh)"
        compadd() { print -rl -- ${(P)@[-1]} }
        words=(lazycluster run -w host1,ho) CURRENT=4
        [[ $_comps[lazycluster] == _lazycluster_completion ]] && _lazycluster_completion""",
    "fish": """lazycluster completion fish | source
        complete -C 'lazycluster run -w host1,ho'""",
}


@pytest.mark.parametrize("shell", _SHELLS)
def test_completion_in_a_real_shell(shell: str, hosts: Any, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    program = tmp_path / "lazycluster"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lazycluster "$@"\n')
    program.chmod(0o755)
    env = {**os.environ, "HOME": str(tmp_path), "LAZYCLUSTER_SSH_CONFIG": str(hosts.config_file)}
    env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run([shell, "-c", _SHELLS[shell]], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["host1,host2", "host1,host3"], done.stderr
