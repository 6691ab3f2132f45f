"""A zygote without an agent, for tests: everything that the agent does for a call, done step by step."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from typing import Any

from lazycluster.agent.zygote_link import STUB, program
from lazycluster.tasks import functions
from lazycluster.tasks.pickling import PickledCall, dump_call

HEAD = struct.Struct("!I")


class DirectZygote:
    def __init__(self, python: str = sys.executable, env: dict[str, str] | None = None) -> None:
        self.control, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [python, "-c", STUB], stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/", env=env
        )
        theirs.close()
        self.number = 0
        self.warmed: list[socket.socket] = []
        with contextlib.suppress(BrokenPipeError):  # an interpreter that gave up: `facts` says why
            self.control.sendall(program())

    def facts(self) -> dict[str, Any]:
        try:
            return self.receive()
        except EOFError:
            return {"error": self.process.stderr.read().decode()}

    def receive(self, control: socket.socket | None = None) -> dict[str, Any]:
        source = control or self.control
        source.settimeout(30)
        (size,) = HEAD.unpack(_exactly(source, HEAD.size))
        return json.loads(_exactly(source, size))

    def tell(self, message: dict[str, Any], fds: list[int] = [], control: socket.socket | None = None) -> None:  # noqa: B006
        data = json.dumps({**message, "fds": len(fds)}).encode()
        socket.send_fds(control or self.control, [HEAD.pack(len(data)) + data], fds)

    def give_library(self) -> dict[str, Any]:
        data = json.dumps({"library": functions._library()[1]}).encode()
        self.control.sendall(HEAD.pack(len(data)) + data)
        return self.receive()

    def run(
        self, call: PickledCall, control: socket.socket | None = None, **request: Any
    ) -> tuple[dict[str, Any], functions.CallOutcome | None, str, str, int]:
        """Return description, outcome, both outputs and the wait status of a call."""
        self.number += 1
        out, their_out = os.pipe()
        err, their_err = os.pipe()
        ours, theirs = socket.socketpair()
        message = {"id": self.number, "kind": "call", "cwd": "/", "task": "", "name": call.name, **request}
        self.tell(message, [their_out, their_err, theirs.fileno()], control)
        for fd in (their_out, their_err):
            os.close(fd)
        theirs.close()
        printed: dict[int, bytes] = {}
        readers = [threading.Thread(target=lambda fd=fd: printed.update({fd: _all(fd)})) for fd in (out, err)]
        for reader in readers:
            reader.start()
        try:
            for part in call.parts:
                ours.sendall(part)
        except OSError:
            pass  # it ended before it had read all
        answer = _all(ours.detach())
        for reader in readers:
            reader.join()
        while (report := self.receive(control)).get("id") != self.number or "status" not in report:
            pass
        description, outcome = {}, None
        if answer:
            (size,) = HEAD.unpack(answer[: HEAD.size])
            description = json.loads(answer[HEAD.size : HEAD.size + size])
            if description["status"] in ("returned", "raised"):
                outcome = asyncio.run(functions.outcome_of(description, [answer[HEAD.size + size :]]))
        return description, outcome, printed[out].decode(), printed[err].decode(), report["status"]

    def call(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Return what a function returns there; raises what it raises."""
        outcome = self.run(dump_call(function, args, kwargs))[1]
        assert outcome is not None
        if outcome.status != "returned":
            raise outcome.exception or AssertionError(outcome.describe("function"))
        return outcome.value

    def warm(self, *modules: str) -> tuple[socket.socket, dict[str, Any]]:
        """Have a warmed zygote made; returns its control socket and what it says."""
        self.number += 1
        ours, theirs = socket.socketpair()
        self.tell({"id": self.number, "warm": list(modules)}, [theirs.fileno()])
        theirs.close()
        self.warmed.append(ours)
        while "pid" not in self.receive():
            pass
        return ours, self.receive(ours)

    def close(self) -> int:
        for warmed in self.warmed:
            warmed.close()
        self.control.close()
        self.process.stderr.close()
        return self.process.wait(timeout=10)

    def __enter__(self) -> DirectZygote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ready_zygote(python: str = sys.executable) -> DirectZygote:
    zygote = DirectZygote(python)
    assert zygote.facts().get("ready")
    assert zygote.give_library() == {"library": True}
    return zygote


def _exactly(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        try:
            part = source.recv(size - len(data))
        except ConnectionResetError:
            part = b""
        if not part:
            raise EOFError
        data += part
    return data


def _all(fd: int) -> bytes:
    data = bytearray()
    try:
        while part := os.read(fd, 1 << 20):
            data += part
    except ConnectionResetError:
        pass  # it ended before it had read all that was sent to it
    os.close(fd)
    return bytes(data)
