"""The answers to ssh's questions, through the very program that ssh would run."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lazycluster.ssh import askpass
from lazycluster.ssh.config import Settings
from lazycluster.ssh.prompts import Prompter

KEY = "Enter passphrase for key '/k':"
PASSWORD = "me@host's password: "


def serve(kwargs, conversation, ask=False):
    """Run `conversation(question)`, which asks as ssh would."""

    async def main():
        with tempfile.TemporaryDirectory() as directory:
            os.chmod(directory, 0o700)
            prompter = Prompter()
            await prompter.start(directory)
            prompter.register("c", Settings.parse("host", kwargs), ask)
            env = {**os.environ, **prompter.env("c")}

            async def question(text, *, own=True, **more):
                # A stand-in for ssh: it runs the program, passes its answer on, and survives if it may.
                asker = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", asker, env["SSH_ASKPASS"], text, env={**env, **more},
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )  # fmt: skip
                prompter.started("c", process.pid if own else os.getpid())
                said, errors = await process.communicate()
                assert errors == b""
                return process.returncode, said.decode().rstrip("\n")

            try:
                await conversation(question, prompter, Path(directory))
            finally:
                await prompter.close()
            assert os.listdir(directory) == []

    asyncio.run(main())


def test_the_password_is_given_once_to_the_host_itself():
    async def conversation(question, prompter, directory):
        assert await question(PASSWORD) == (0, "sésame 'x'")
        assert (await question(PASSWORD))[0] == -signal.SIGTERM
        assert prompter.answered("c") == [PASSWORD.strip()]
        assert prompter.asked("c") == [PASSWORD.strip()]

    serve({"password": "sésame 'x'"}, conversation)


def test_the_password_is_not_for_jump_hosts():
    async def conversation(question, prompter, directory):
        assert (await question("me@gate's password: ", own=False))[0] == -signal.SIGTERM
        assert prompter.asked("c") == ["me@gate's password:"]

    serve({"password": "sesame"}, conversation)


@pytest.mark.parametrize("text", ["(me@host) New password: ", "(me@host) Verification code: ", "Retype new password: "])
def test_other_questions_of_the_host_are_not_told_the_password(text):
    async def conversation(question, prompter, directory):
        assert (await question(text))[0] == -signal.SIGTERM

    serve({"password": "sesame"}, conversation)


def test_the_passphrase_is_for_keys_wherever_they_are_used():
    async def conversation(question, prompter, directory):
        assert await question(KEY, own=False) == (0, "mellon")
        assert (await question(KEY))[0] == 1
        assert await question("Enter passphrase for key '/other':") == (0, "mellon")
        assert (await question(PASSWORD))[0] == -signal.SIGTERM

    serve({"passphrase": "mellon"}, conversation)


def test_host_keys_and_confirmations_are_declined():
    text = "The authenticity of host 'h' can't be established.\nAre you sure (yes/no/[fingerprint])? "

    async def conversation(question, prompter, directory):
        assert await question(text) == (1, "")
        assert await question("Allow use of key?", SSH_ASKPASS_PROMPT="confirm") == (1, "")
        assert await question("Confirm user presence for key", SSH_ASKPASS_PROMPT="none") == (1, "")
        assert [line.split()[0] for line in prompter.asked("c")] == ["The", "Allow", "Confirm"]

    serve({"password": "sesame", "passphrase": "mellon"}, conversation)


def test_who_has_no_token_is_told_nothing():
    async def conversation(question, prompter, directory):
        status, said = await question(PASSWORD, LAZYCLUSTER_ASKPASS_TOKEN="guess")
        assert (status, said) == (-signal.SIGTERM, "")
        assert prompter.asked("c") == []
        reader, writer = await asyncio.open_unix_connection(str(directory / "askpass.sock"))
        writer.write(b"nonsense\n")
        assert await reader.read() == b""
        writer.close()

    serve({"password": "sesame"}, conversation)


def test_no_secret_is_in_a_file_or_the_environment():
    async def conversation(question, prompter, directory):
        script = directory / "askpass"
        assert stat.S_IMODE(script.stat().st_mode) == 0o700
        assert "sesame" not in script.read_text() + str(prompter.env("c")) + repr(prompter.__dict__)

    serve({"password": "sesame"}, conversation)


def test_nothing_is_answered_after_the_end():
    async def conversation(question, prompter, directory):
        prompter.forget("c")
        prompter.started("c", 1)
        assert prompter.asked("c") == prompter.answered("c") == []

    serve({"password": "sesame"}, conversation)


def test_no_core_dump_is_made_of_who_is_told_a_password(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        env = {askpass.SOCKET: str(tmp_path / "s"), askpass.TOKEN: "t"}
        with subprocess.Popen([sys.executable, "-I", "-S", askpass.__file__, "?"], env=env, stdout=-1) as asking:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                limits = Path(f"/proc/{asking.pid}/limits").read_text().splitlines()
                connection.sendall(b'["secret", false]')
            assert asking.communicate()[0] == b"secret\n"
    assert [line[26:].split()[0] for line in limits if line.startswith("Max core file size")] == ["1"]
