"""Start-up files of shells: read once per connection, and what they set holds for all commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazycluster import Runtime, RuntimeTask
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


def output(where: Runtime, command: str, **more: str) -> str:
    task = RuntimeTask("t").run_command(command, **more)
    return where.execute_task(task, execute_async=False).execution_log[0]  # type: ignore[union-attr,no-any-return]


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
