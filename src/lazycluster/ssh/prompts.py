"""Answers to what ssh asks.

ssh asks through a program of ours (:mod:`lazycluster.ssh.askpass`), which passes each question on to the event loop of
the manager, over a socket in a private directory. There it is answered from the settings of the connection, asked on
the terminal, or declined; so secrets stay in the manager's memory, nothing ever waits for an answer that cannot come,
and the error of a failed connection can say what would have been asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lazycluster.core import unix

from . import askpass
from .config import Settings, ssh_version
from .terminal import ask_on_terminal

__all__ = ["Prompter"]

_QUESTION_LIMIT = 64 * 1024
_READ_TIMEOUT = 10.0
_PID_TIMEOUT = 5.0
_ASKPASS_REQUIRE_SINCE = (8, 4)

_PASSPHRASE = re.compile(r"enter passphrase for", re.IGNORECASE)
_PASSWORD = re.compile(r"password(?: for [^:]*)?\s*:\s*$", re.IGNORECASE)
# A host that wants another password, or the old one once more to change it, is not answered.
_NOT_PASSWORD = re.compile(r"\b(?:new|current|old|retype|verify|again)\b", re.IGNORECASE)
_PIN = re.compile(r"enter pin\b", re.IGNORECASE)
_YES_NO = re.compile(r"\(yes/no|are you sure|\(y/n\)", re.IGNORECASE)


@dataclass
class _Asker:
    """A connection whose ssh may ask."""

    token: str
    settings: Settings
    ask: bool
    pid: asyncio.Future[int]
    asked: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    password_given: bool = False


class Prompter:
    """Serves the questions of all ssh processes of the manager. To be used on the event loop's thread only."""

    def __init__(self) -> None:
        self._askers: dict[str, _Asker] = {}
        self._server: asyncio.Server | None = None
        self._terminal = asyncio.Lock()
        self._socket = ""
        self._script = ""
        self._conversations: set[asyncio.Task[None]] = set()

    async def start(self, directory: str | os.PathLike[str]) -> None:
        """Begin to serve.

        Args:
            directory: A private directory (0700) of the manager; a script and a socket are made in it.
        """
        base = Path(directory)
        script = base / "askpass"
        program = shlex.join([sys.executable, "-I", "-S", str(Path(askpass.__file__).absolute())])
        descriptor = os.open(script, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o700)
        try:
            os.fchmod(descriptor, 0o700)  # whatever the umask is
            os.write(descriptor, os.fsencode(f'#!/bin/sh\nexec {program} "$@"\n'))
        finally:
            os.close(descriptor)
        self._script = str(script)
        self._socket = str(base / "askpass.sock")
        self._server = await asyncio.start_unix_server(self._converse, self._socket, limit=_QUESTION_LIMIT)
        Path(self._socket).chmod(0o700)

    def register(self, connection_id: str, settings: Settings, ask: bool = False) -> None:
        """Prepare for the questions of a connection, before its ssh is started.

        Args:
            connection_id: Any name for the connection.
            settings: Its settings, which hold the answers.
            ask: Ask a person on the terminal what the settings do not answer.
        """
        pid = asyncio.get_running_loop().create_future()
        self._askers[connection_id] = _Asker(secrets.token_hex(16), settings, ask, pid)

    def env(self, connection_id: str) -> dict[str, str]:
        """Return what the environment of the connection's ssh must hold in addition."""
        env = {
            "SSH_ASKPASS": self._script,
            "SSH_ASKPASS_REQUIRE": "force",
            askpass.SOCKET: self._socket,
            askpass.TOKEN: self._askers[connection_id].token,
        }
        if ssh_version() < _ASKPASS_REQUIRE_SINCE and not os.environ.get("DISPLAY"):
            env["DISPLAY"] = ":0"
        return env

    def started(self, connection_id: str, pid: int) -> None:
        """Say which process the connection's ssh is: only it, and no ssh to a jump host, is told the password."""
        asker = self._askers.get(connection_id)
        if asker is not None and not asker.pid.done():
            asker.pid.set_result(pid)

    def asked(self, connection_id: str) -> list[str]:
        """Return what was asked and not answered, or with "no", in order."""
        asker = self._askers.get(connection_id)
        return list(asker.asked) if asker else []

    def answered(self, connection_id: str) -> list[str]:
        """Return what was asked and answered from the settings, in order."""
        asker = self._askers.get(connection_id)
        return [prompt.strip() for prompt in asker.answered] if asker else []

    def forget(self, connection_id: str) -> None:
        """End with a connection: nothing that it asks is answered any more."""
        asker = self._askers.pop(connection_id, None)
        if asker is not None:
            asker.pid.cancel()

    async def close(self) -> None:
        """Stop serving, and remove the script and the socket."""
        for connection_id in list(self._askers):
            self.forget(connection_id)
        if self._server is not None:
            self._server.close()
            self._server = None
        conversations = list(self._conversations)
        for conversation in conversations:
            conversation.cancel()
        await asyncio.gather(*conversations, return_exceptions=True)
        for path in (self._script, self._socket):
            if path:
                Path(path).unlink(missing_ok=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._conversations.add(task)
        try:
            if not unix.is_own_peer(writer.get_extra_info("socket")):
                return
            question = json.loads(await asyncio.wait_for(reader.readline(), _READ_TIMEOUT))
            answer = await self._answer(question, reader)
            hopeless = answer is None and _goes_to_host(str(question["prompt"]), str(question["kind"]))
            writer.write(json.dumps([answer, hopeless]).encode("ascii"))
            await writer.drain()
        except (OSError, ValueError, KeyError, TypeError, asyncio.TimeoutError):
            pass  # whoever asked has gone or asked nonsense: ssh takes the missing answer for a declined one
        except asyncio.CancelledError:
            pass  # only close() cancels, and waits for the end
        finally:
            self._conversations.discard(task)
            writer.close()

    async def _answer(self, question: dict[str, Any], reader: asyncio.StreamReader) -> str | None:
        token, prompt, kind = str(question["token"]), str(question["prompt"]), str(question["kind"])
        asker = next((a for a in self._askers.values() if secrets.compare_digest(a.token, token)), None)
        if asker is None:
            return None
        answer = await self._from_settings(asker, prompt, kind, int(question["asker"]))
        if answer is None and asker.ask and kind != "none":
            answer = await self._from_terminal(asker, prompt, kind, reader)
        if answer is None or answer.strip().lower() == "no":
            asker.asked.append(prompt.strip())
        return answer

    async def _from_settings(self, asker: _Asker, prompt: str, kind: str, process: int) -> str | None:
        if kind in ("confirm", "none") or prompt in asker.answered or _YES_NO.search(prompt):
            return None
        if _PASSPHRASE.search(prompt):
            if asker.settings.passphrase is not None:
                asker.answered.append(prompt)
            return asker.settings.passphrase
        if asker.settings.password is None or not _PASSWORD.search(prompt) or _NOT_PASSWORD.search(prompt):
            return None
        # The process may ask before whoever started it has said which one it is.
        await asyncio.wait({asker.pid}, timeout=_PID_TIMEOUT)
        own = asker.pid.done() and not asker.pid.cancelled() and asker.pid.result() == process
        if not own or asker.password_given:
            return None
        asker.password_given = True
        asker.answered.append(prompt)
        return asker.settings.password

    async def _from_terminal(self, asker: _Asker, prompt: str, kind: str, reader: asyncio.StreamReader) -> str | None:
        yes_no = kind == "confirm" or _YES_NO.search(prompt) is not None
        async with self._terminal:
            asking = asyncio.ensure_future(ask_on_terminal(f"[{asker.settings.host}] {prompt}", secret=not yes_no))
            # The asker closes its end when ssh gives up: then the question must leave the terminal too.
            gone = asyncio.ensure_future(reader.read())
            try:
                await asyncio.wait({asking, gone}, return_when=asyncio.FIRST_COMPLETED)
                return asking.result() if asking.done() else None
            finally:
                for task in (asking, gone):
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError, OSError):
                        await task


def _goes_to_host(prompt: str, kind: str) -> bool:
    """Return whether the answer would be sent to the host, and not used by ssh itself for a key or a decision."""
    return not kind and not any(local.search(prompt) for local in (_PASSPHRASE, _PIN, _YES_NO))
