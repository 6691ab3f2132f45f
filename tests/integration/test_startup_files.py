"""Start-up files of shells: read once per connection, and what they set holds for all commands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from lazycluster import LocalRuntime, Runtime, RuntimeTask
from lazycluster.cli.app import cli
from lazycluster.exceptions import TaskExecutionError
from sshhosts import Hosts

# Functions as conda and nvm define them: not exported, some short and some long, one with a pattern of extglob.
_BASHRC = r"""
echo run >> ~/count
echo "noise on stdout"
echo "noise on stderr" >&2
shopt -s extglob
export EXPORTED="from the file"
export PATH="$HOME/first:$PATH"
UNEXPORTED="two
lines of \"it's\" \$HOME"
declare -A TABLE=([a]="1 2" [b]=$'\t')
umask 027
ulimit -S -n 512
conda() {
    case "$1" in
        activate) export CONDA_DEFAULT_ENV="$2"; PATH="$HOME/envs/$2/bin:$PATH" ;;
        !(activate)) return 7 ;;
    esac
}
nvm_version() {
    cat <<-END
	}
	$1 of ${TABLE[a]}
END
}
nvm() {
    # PADDING
    local version="$1" line
    if [ "$version" = "use" ]; then
        export NVM_BIN="$HOME/node/$2/bin"
        nvm_version "$2"
    else
        for line in 1 2 3; do echo "unknown ${version:-nothing} ${line}" | sed -e 's/unknown/not known/' >&2; done
        echo "a long function, which is not read before it is called: ${UNEXPORTED}" >&2
        echo "a long function, which is not read before it is called: ${UNEXPORTED}" >&2
        return 3
    fi
}
ls() { echo "wrapped: $*"; }
exported() { echo "exported: $1"; }
export -f exported
cd /tmp
trap 'echo trapped' EXIT
"""
_COUNT = "cat ~/count"


def runtime(hosts: Hosts, **more: object) -> Runtime:
    return Runtime(hosts.names[0], connection_kwargs={"config_file": str(hosts.config_file)}, **more)  # type: ignore[arg-type]


def output(where: Runtime, command: str, check: bool = True) -> str:
    task = RuntimeTask("t").run_command(command)
    with contextlib.nullcontext() if check else contextlib.suppress(TaskExecutionError):
        where.execute_task(task, execute_async=False)
    return task.execution_log[0]


def reads(hosts: Hosts) -> int:
    path = hosts[0].path("count")
    return len(path.read_text().splitlines()) if path.exists() else 0


def forget(hosts: Hosts) -> None:
    hosts[0].path("count").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def bash_hosts() -> Iterator[Hosts]:
    with Hosts(1, files={".bashrc": _BASHRC}) as hosts:
        yield hosts


@pytest.fixture
def bash(bash_hosts: Hosts) -> Iterator[Runtime]:
    forget(bash_hosts)
    with runtime(bash_hosts) as where:
        yield where


def test_files_are_read_once_and_what_they_print_is_in_no_log(bash: Runtime, bash_hosts: Hosts) -> None:
    assert [output(bash, f"echo {number}") for number in range(5)] == [f"{number}\n" for number in range(5)]
    assert reads(bash_hosts) == 1


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("echo $EXPORTED", "from the file"),
        ("echo \"$UNEXPORTED\"", "two\nlines of \"it's\" $HOME"),
        ("echo \"${TABLE[a]}|${TABLE[b]}|\"", "1 2|\t|"),
        ("umask; ulimit -S -n", "0027\n512"),
        ("conda activate ml; echo $CONDA_DEFAULT_ENV ${PATH%%:*}", "ml /home/lazy/envs/ml/bin"),
        ("conda other; echo $?", "7"),
        ("nvm use 20; echo $NVM_BIN", "}\n20 of 1 2\n/home/lazy/node/20/bin"),
        ("nvm() { echo mine; }; conda activate x; nvm_version 1 >/dev/null; nvm", "mine"),
        ("ls -l", "wrapped: -l"),
        ("exported x; bash -c 'exported y'", "exported: x\nexported: y"),
        ("export -f nvm nvm_version; bash -c 'nvm use 18'", "}\n18 of"),
        ("pwd", "WORKING_DIR"),
        ("trap; echo $SHLVL; echo ${BASH_ENV-none} $0 $#", "1\nnone /usr/bin/bash 0"),
        ("bash -c 'echo ${BASH_ENV-none}'; env | grep -c LAZYCLUSTER_ORIGINAL", "none\n0"),
        ("[ -n \"$SSH_CLIENT\" ] && [ -n \"$SSH_CONNECTION\" ] && echo both", "both"),
        ("shopt -q extglob && case aab in +(a)b) echo extglob ;; esac", "extglob"),
        ("echo \"$-\"", "hBc"),
    ],
)  # fmt: skip
def test_what_files_set_holds(bash: Runtime, command: str, expected: str) -> None:
    said = output(bash, f"{command} || true")
    assert said.strip() == expected.replace("WORKING_DIR", bash.working_dir)


def test_files_are_read_for_each_command_if_asked_for(bash_hosts: Hosts) -> None:
    forget(bash_hosts)
    with runtime(bash_hosts, startup_files="always") as where:
        before = reads(bash_hosts)
        assert output(where, "echo 1") == "noise on stdout\nnoise on stderr\n1\ntrapped\n"
        output(where, "echo 2")
        assert reads(bash_hosts) == before + 2
    with pytest.raises(ValueError, match="startup_files must be 'once' or 'always', not 'never'"):
        runtime(bash_hosts, startup_files="never")


def test_option_of_the_command_line(bash_hosts: Hosts) -> None:
    forget(bash_hosts)
    arguments = ["run", "--config", str(bash_hosts.config_file), "-w", bash_hosts.names[0], "-N"]
    found = CliRunner().invoke(cli, [*arguments, "--", "conda activate ml; echo $CONDA_DEFAULT_ENV"])
    assert (found.exit_code, found.stdout, reads(bash_hosts)) == (0, "ml\n", 1)
    found = CliRunner().invoke(cli, [*arguments, "--startup-files", "always", "--", "echo 1"])
    assert (found.exit_code, found.stdout, reads(bash_hosts)) == (0, "noise on stdout\n1\ntrapped\n", 3)
    found = CliRunner().invoke(cli, [*arguments, "--startup-files", "never", "--", "echo 1"])
    assert found.exit_code == 2
    assert "'never' is not one of 'once', 'always'" in found.output


def test_what_is_kept_is_private_and_leaves_no_process(bash: Runtime, bash_hosts: Hosts) -> None:
    output(bash, "true")
    directory = bash._connection.agent_info.directory
    found = bash_hosts[0].run(f"cd {directory} && stat -c '%a %n' shell-* shell-*/*").stdout.splitlines()
    modes = {line.split()[1].rpartition("/")[2]: line.split()[0] for line in found}
    assert modes.pop("state") == "600"
    assert set(modes.values()) == {"600", "700"}
    assert "Z" not in bash_hosts[0].run("ps -eo stat= | cut -c1").stdout


def test_file_that_has_changed_is_read_by_the_next_connection(make_hosts: Callable[..., Hosts]) -> None:
    hosts = make_hosts(1, files={".bashrc": "greet() { echo one; }\n"})
    with runtime(hosts) as first:
        assert output(first, "greet") == "one\n"
        hosts[0].path(".bashrc").write_text("greet() { echo two; }\n")
        assert output(first, "greet") == "one\n"
        with runtime(hosts) as second, runtime(hosts, startup_files="always") as always:
            assert output(second, "greet") == output(always, "greet") == "two\n"


@pytest.mark.parametrize("kind", ["BASH_ENV", "SSH_CLIENT"])
def test_own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    file = tmp_path / ".bashrc"
    file.write_text(f"echo run >> {tmp_path}/count\necho noise\nhello() {{ echo hello; }}\nexport FROM_FILE=1\n")
    for name in ("SHLVL", "SSH_CLIENT", "SSH2_CLIENT", "BASH_ENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(kind, str(file))
    with LocalRuntime(shell="bash") as where:
        for _ in range(3):
            assert output(where, "hello; echo $FROM_FILE") == "hello\n1\n"
        assert output(where, f"echo ${kind}").strip() == str(file)
    assert (tmp_path / "count").read_text() == "run\n"


def test_function_that_its_shell_prints_wrongly_leaves_all_as_it_was(make_hosts: Callable[..., Hosts]) -> None:
    # bash prints the name as it stands, and cannot read that.
    hosts = make_hosts(1, files={".bashrc": "echo noise\nfunction a=b { :; }\nhello() { echo hello; }\n"})
    with runtime(hosts) as where:
        assert output(where, "hello").splitlines()[-1] == "hello"


def test_limits_of_a_task_hold_beside_those_of_the_files(bash: Runtime) -> None:
    task = RuntimeTask("t").run_command("ulimit -v; conda activate ml; echo $CONDA_DEFAULT_ENV").limit(memory="300 MB")
    bash.execute_task(task, execute_async=False)
    assert int(task.execution_log[0].split()[0]) <= 300_000
    assert task.execution_log[0].split()[1] == "ml"


def test_variables_of_the_command_win(bash: Runtime, bash_hosts: Hosts) -> None:
    forget(bash_hosts)
    with runtime(bash_hosts, env={"EXPORTED": "mine", "UNEXPORTED": "mine", "BASH_ENV": "/dev/null/x"}) as where:
        assert output(where, "echo $EXPORTED $UNEXPORTED $BASH_ENV; env | grep BASH_ENV; conda activate a") == (
            "mine mine /dev/null/x\nBASH_ENV=/dev/null/x\n"
        )
    assert reads(bash_hosts) == 1


def test_setup_has_the_functions_and_leaves_its_environment(bash_hosts: Hosts) -> None:
    forget(bash_hosts)
    with runtime(bash_hosts, setup="conda activate ml") as where:
        assert output(where, "echo $CONDA_DEFAULT_ENV ${PATH%%:*}; conda activate b; echo ${PATH%%:*}") == (
            "ml /home/lazy/envs/ml/bin\n/home/lazy/envs/b/bin\n"
        )
        assert where.call(_environment, "CONDA_DEFAULT_ENV", "EXPORTED") == ["ml", "from the file"]
    assert reads(bash_hosts) == 1


def _environment(*names: str) -> list[str | None]:
    import os

    return [os.environ.get(name) for name in names]


def test_detached_task_reads_once_for_its_own_session(bash: Runtime, bash_hosts: Hosts) -> None:
    before = reads(bash_hosts)
    task = RuntimeTask("t").run_command("conda activate d; echo $CONDA_DEFAULT_ENV").run_command("echo second")
    handle = bash.execute_task(task, detach=True)
    handle.join()  # type: ignore[union-attr]
    assert handle.log() == "d\nsecond\n"  # type: ignore[union-attr]
    assert reads(bash_hosts) == before + 1
    handle.remove()  # type: ignore[union-attr]


def test_input_and_end_of_a_command_that_waits_for_the_files(make_hosts: Callable[..., Hosts]) -> None:
    # Not the login shell: bash is started once to tell, and waits at a pipe meanwhile.
    # What its files start in the background holds its streams open, and ends with the connection.
    rc = "sleep 1000 & echo run >> ~/count; echo noise; mkfifo ~/gate 2>/dev/null; read -r x < ~/gate\n"
    rc += "umask 027; ulimit -S -n 500\n"
    hosts = make_hosts(1, shell="dash", files={".bashrc": f"{rc}export FROM_RC=1\nhello() {{ echo hello; }}\n"})
    with runtime(hosts, shell="bash") as where:
        first = RuntimeTask("first").run_command("hello; umask; ulimit -S -n; echo $FROM_RC")
        cancelled = RuntimeTask("cancelled").run_command("touch ~/never")
        where.execute_task(first)
        where.execute_task(cancelled)
        cancelled.cancel()
        hosts[0].run("until [ -p /home/lazy/gate ]; do sleep 0.02; done; echo go > /home/lazy/gate", user="lazy")
        first.join()
        assert first.execution_log == ["hello\n0027\n500\n1\n"]
        assert output(where, "echo $FROM_RC; hello") == "1\nhello\n"
        assert reads(hosts) == 1
        assert not hosts[0].path("never").exists()


_HIDING = "".join(f"{name}() {{ :; }}\n" for name in ("declare", "echo", "compgen", "shopt", "alias", "printf"))
_EMPTY = "case $- in *i*) ;; *) return;; esac\necho run >> ~/count\n"


@pytest.mark.parametrize(
    ("files", "command", "expected"),
    [
        ({".bashrc": _EMPTY}, "echo ${BASH_ENV-none} $-", "none hBc\n"),
        ({}, "echo ${BASH_ENV-none}", "none\n"),
        ({".bashrc": "set -u; set -e; set -o pipefail\n"}, "echo $-; false | true; echo no", "ehuBc\n"),
        ({".bashrc": "shopt -s expand_aliases; alias greet='echo hi'\n"}, "greet you", "hi you\n"),
        ({".bashrc": "readonly FIXED=1; IFS=_; echo() { printf '<%s>' $1; }\n"}, "echo 1_$FIXED", "<1><1>"),
        ({".bashrc": f"hi() {{ builtin echo hi; }}\nread() {{ sleep 9; }}\n{_HIDING}"}, "hi; printf no", "hi\n"),
        ({".bashrc": "head -c 500000 /dev/zero | tr '\\0' x; f() { :; }\n"}, "f; echo done", "done\n"),
    ],
)  # fmt: skip
def test_files_of_many_kinds(
    make_hosts: Callable[..., Hosts], files: dict[str, str], command: str, expected: str
) -> None:
    hosts = make_hosts(1, files=files)
    with runtime(hosts) as where:
        task = RuntimeTask("t").run_command(f"{command}")
        with contextlib.suppress(TaskExecutionError):
            where.execute_task(task, execute_async=False)
        assert task.execution_log == [expected]


@pytest.mark.parametrize("files", [{".bashrc": "echo noise; exit 3\n"}, {".bashrc": "echo noise; exec cat\n"}])
def test_shell_is_left_to_itself_where_its_files_end_it(
    make_hosts: Callable[..., Hosts], files: dict[str, str]
) -> None:
    with runtime(make_hosts(1, shell="dash", files=files), shell="bash") as where:
        task = RuntimeTask("t").run_command("echo never")
        with contextlib.suppress(TaskExecutionError):
            where.execute_task(task, execute_async=False)
        assert task.execution_log == ["noise\n"]


_ZSHENV = r"""
echo run >> ~/count
echo noise; echo noise >&2
setopt extended_glob
export EXPORTED="from the file"
UNEXPORTED="two
lines of \"it's\""
typeset -A table=(a "1 2")
fpath+=(~/functions)
autoload -Uz later
alias greet='echo hi'
umask 027
conda() { export CONDA_DEFAULT_ENV=$2; path=(~/envs/$2 $path) }
"""


def test_zsh(make_hosts: Callable[..., Hosts]) -> None:
    hosts = make_hosts(1, shell="zsh", files={".zshenv": _ZSHENV, "functions/later": "echo later $1"})
    with runtime(hosts) as where:
        assert output(where, "echo $EXPORTED; echo $UNEXPORTED; echo $table[a]; umask; greet you; later on") == (
            'from the file\ntwo\nlines of "it\'s"\n1 2\n027\nhi you\nlater on\n'
        )
        assert output(where, "conda activate ml; echo $CONDA_DEFAULT_ENV $path[1]; [[ aab = a#b ]] && echo glob") == (
            "ml /home/lazy/envs/ml\nglob\n"
        )
        assert output(
            where, "echo ${ZDOTDIR-none} $0; zsh -fc 'echo ${ZDOTDIR-none} ${LAZYCLUSTER_ORIGINAL-none}'"
        ) == ("none /usr/bin/zsh\nnone none\n")
        assert reads(hosts) == 1
    with runtime(hosts, startup_files="always") as where:
        assert output(where, "echo 1") == "noise\nnoise\n1\n"


_FISH = """
echo run >> ~/count
echo noise; echo noise >&2
set -gx EXPORTED "from the file"
set -g unexported one 'two three'
umask 027
alias greet 'echo hi'
function conda; set -gx CONDA_DEFAULT_ENV $argv[2]; end
"""


def test_fish(make_hosts: Callable[..., Hosts]) -> None:
    functions = {".config/fish/functions/later.fish": "function later; echo later $argv; end\n"}
    hosts = make_hosts(1, shell="fish", files={".config/fish/config.fish": _FISH, **functions})
    with runtime(hosts) as where:
        for _ in range(3):
            assert output(where, "echo $EXPORTED; echo $unexported[2]; umask; greet you; later on") == (
                "from the file\ntwo three\n0027\nhi you\nlater on\n"
            )
        assert output(where, "conda activate ml; echo $CONDA_DEFAULT_ENV; exit 3; echo no", check=False) == "ml\n"
        assert reads(hosts) == 2  # when connecting, and once to tell of its functions


_TCSHRC = r"""
echo run >> ~/count
echo noise
setenv EXPORTED "from the file"
alias greet echo hi
alias both '(echo "it"\'"'"'"s"; echo \!*)'
alias conda 'setenv CONDA_DEFAULT_ENV \!:2'
umask 027
"""


def test_tcsh(make_hosts: Callable[..., Hosts]) -> None:
    hosts = make_hosts(1, shell="tcsh", files={".tcshrc": _TCSHRC})
    with runtime(hosts) as where:
        for _ in range(3):
            assert output(where, "echo $EXPORTED; umask; greet you; conda activate ml; echo $CONDA_DEFAULT_ENV") == (
                "from the file\n27\nhi you\nml\n"
            )
        assert output(where, "false; echo $status", check=False) == "1\n"
        assert reads(hosts) == 2
