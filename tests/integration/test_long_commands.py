"""Commands and variables that are longer than a program's argument may be."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from lazycluster import Runtime, RuntimeTask
from lazycluster.core import event_loop
from lazycluster.ssh.ssh_connection import SshConnection

_SIZE = 1 << 20
# Words that do nothing, as long as they like, and what is left of the shell's name, input and exit status.
_POSIX = ": {filler}\necho $0\ncat\n(exit 3)"
_COMMANDS = {
    "bash": _POSIX,
    "dash": _POSIX,
    "zsh": _POSIX,
    "fish": "true {filler}\necho fish\ncat\nsh -c 'exit 3'",
    "tcsh": "true {filler}\necho tcsh\ncat\nsh -c 'exit 3'",
}
_ENDINGS = ("{}", "{}\nexit 4\necho no")


def in_words(size: int) -> str:
    return " ".join(["word" * 10] * (size // 41))


async def run(connection: SshConnection, shell: str, command: str) -> tuple[int | None, str]:
    out = bytearray()
    params = {"command": command, "shell": shell, "input": True, "merge": True}
    channel = connection.channel("run", params, stdout=out.extend)
    await channel.send(b"input\n")
    await channel.send_end()
    return (await channel.result())["exit"], out.decode()


@pytest.fixture
def connection(hosts: Any) -> Iterator[SshConnection]:
    connection = SshConnection("host1", {"config_file": hosts.config_file})
    event_loop.run(connection.open(), 60)
    yield connection
    event_loop.run(connection.close(), 60)


@pytest.mark.parametrize(
    ("shell", "ending"),
    # For tcsh, `exit` in a line of several does not end them.
    [(shell, ending) for shell in _COMMANDS for ending in _ENDINGS if shell != "tcsh" or ending == "{}"],
)
def test_the_shell_sees_no_difference(connection: SshConnection, hosts: Any, shell: str, ending: str) -> None:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not installed")
    size = 100_000 if shell == "tcsh" else _SIZE  # a line of tcsh is limited by itself
    command = ending.format(_COMMANDS[shell].format(filler=in_words(size)))
    short = ending.format(_COMMANDS[shell].format(filler="few words"))

    async def both() -> tuple[Any, Any]:
        return await run(connection, path, command), await run(connection, path, short)

    long, usual = event_loop.run(asyncio.wait_for(both(), 60), 90)
    assert long == usual
    assert long[1].endswith("input\n")
    directory = hosts[0].path(connection.agent_info.directory)
    assert not [name for name in os.listdir(directory) if name.startswith("command-")]


def test_a_long_task_and_set_up(hosts: Any) -> None:
    words = in_words(_SIZE)
    setup = f": {words}\nexport FROM_SETUP=yes"
    with Runtime("host1", connection_kwargs={"config_file": hosts.config_file}, setup=setup) as runtime:
        task = runtime.execute_task(
            RuntimeTask("long").run_command(f"echo $FROM_SETUP\n: {words}"), execute_async=False
        )
        assert task.execution_log == ["yes\n"]


@pytest.mark.parametrize("what", ["argument", "variable", "sum"])
def test_what_no_program_can_get_is_named(connection: SshConnection, what: str) -> None:
    argv, env = ["true"], {}
    if what == "argument":
        argv = ["echo", "y" * 131_072]
    elif what == "variable":
        env = {"LONG": "x" * 131_072}
    else:
        env = {f"V{number}": "x" * 100_000 for number in range(100)}

    async def fails() -> str:
        with pytest.raises(Exception) as caught:
            await connection.channel("run", {"argv": argv, "env": env}).result()
        return str(caught.value)

    message = event_loop.run(fails(), 60)
    expected = {
        "argument": "an argument has 131073 bytes, but a program gets at most 131072",
        "variable": "the environment variable LONG has 131078 bytes",
        "sum": "together longer than a program gets",
    }
    assert expected[what] in message
