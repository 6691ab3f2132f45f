"""A program in the place of a host's Python that says what it likes: it answers every request with an attack.

It is started with what an interpreter is given: ``-ISc PROGRAM``. Beside it is ``settings.json`` with the ``lie``, the
directory that it would make on the manager if it could (``harm``), and what it says at the start in place of the truth
(``hello``, ``line``). It tells the truth until it is asked to print ``lie``, so that a connection can be made to it;
then there is a file ``lies`` beside it.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from typing import Any

from lazycluster.agent import stream, wire
from lazycluster.ssh import agent_replies

_NONE = type(None)
_HIDDEN = "x\x1b]0;t\x07\udcff\n../../\0y"  # may be a name
_TEXT = "x\x1b[2J\u202e\n../../\0" + "y" * 5000


class Attack:
    """What makes a directory where it is unpickled."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._path,)


# --- answers of all shapes --------------------------------------------------------------------------
def made(shape: Any, leaf: Callable[[Any], Any], length: int) -> Any:
    """Return something of a shape of `lazycluster.ssh.agent_replies`."""
    if isinstance(shape, list):
        return [made(shape[0], leaf, length) for _ in range(length)]
    if isinstance(shape, dict):
        names = [f"n{number}" for number in range(length)] if ... in shape else list(shape)
        return {name.removesuffix("?"): made(shape.get(name, shape.get(...)), leaf, length) for name in names}
    if isinstance(shape, tuple):
        return made(shape[0], leaf, length)
    return leaf(shape)


def lowest(shape: Any) -> Any:
    """Return the least that is allowed."""
    if isinstance(shape, range):
        return shape.start
    if isinstance(shape, agent_replies._Between):
        return shape.low
    if isinstance(shape, re.Pattern):
        return "" if shape.fullmatch("") else "0" * 16
    return {bool: False, int: -(2**63), dict: {}, list: [], str: ""}.get(shape, "")


def highest(shape: Any) -> Any:
    """Return the most that is allowed."""
    if isinstance(shape, range):
        return shape[-1]
    if isinstance(shape, agent_replies._Between):
        return shape.high
    if isinstance(shape, re.Pattern):
        return "f" * 16
    anything = {"pid": -1, "event": [[]], "name": {"a": _HIDDEN}}
    return {bool: True, int: 2**64 - 1, dict: anything, list: [anything], str: _TEXT}.get(shape, _HIDDEN)


def wrong(shape: Any) -> Any:
    """Return something of another type."""
    if isinstance(shape, (range, agent_replies._Between)) or shape in (int, bool):
        return "1"
    return 7


def too_large(shape: Any) -> Any:
    """Return a number that is out of range, or a text that is none."""
    if isinstance(shape, range):
        return shape.start - 1
    if isinstance(shape, agent_replies._Between):
        return shape.high * 2
    return 10**400 if shape in (int, bool) else "\ud800"


LIES: dict[str, Callable[[Any], Any]] = {
    "lowest": lambda shape: made(shape, lowest, 1),
    "highest": lambda shape: made(shape, highest, 2),
    "nothing": lambda shape: made(shape, lowest, 0),
    "wrong": lambda shape: made(shape, wrong, 1),
    "too-large": lambda shape: made(shape, too_large, 1),
    "infinite": lambda shape: made(shape, lambda _: float("inf"), 1),
    "digits": lambda shape: made(shape, lambda _: "DIGITS", 1),
    "deep": lambda shape: made(shape, lambda _: json.loads("[" * 300 + "]" * 300), 1),
    "bare": lambda shape: {},
}


def encoded(message: Any) -> bytes:
    """Return a message; a number of it may have more digits than Python reads."""
    text = json.dumps(message, separators=(",", ":"))
    return text.replace('"DIGITS"', "1" * 5000).encode()


# --- the agent ------------------------------------------------------------------------------------
class Liar:
    """Talks to a manager.

    Args:
        program: The program that it was given to run.
    """

    def __init__(self, program: str) -> None:
        self._folder = os.path.dirname(os.path.abspath(__file__))
        with open(os.path.join(self._folder, "settings.json")) as file:
            self._settings = json.load(file)
        self._lie = LIES[self._settings["lie"]]
        self._harm = pickle.dumps(Attack(self._settings["harm"]))
        self._program = program
        self._flag = os.path.join(self._folder, "lies")

    def run(self) -> None:
        """Do whatever the program would have done."""
        marker = re.search("[0-9a-f]{16}", self._program)
        assert marker is not None
        start = f"\nlazy{marker[0]} "
        if 'b"bulk"' in self._program:
            self._write(start.encode() + b"\n")
            self._copy()
            return
        new = " new" if 'b"rejoin"' in self._program else ""
        version = ".".join(map(str, sys.version_info[:3]))
        line = f"{version} {sys.implementation.cache_tag}{new}"
        if self._settings["line"] is not None:
            line = self._settings["line"]
        self._write(f"{start}{line}\n".encode("utf-8", "surrogateescape"))
        with os.fdopen(0, "rb", buffering=0, closefd=False) as incoming:
            size = int(b"".join(iter(lambda: incoming.read(1).strip(), b"")))
            while size:
                size -= len(incoming.read(size))
        self._say(0, wire.EVENT, encoded(self._hello()))
        decoder = wire.Decoder()
        while data := os.read(0, 65536):
            for number, kind, payload in decoder.feed(data):
                if kind == wire.REQUEST:
                    self._answer(number, json.loads(payload))

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(1, data) :]

    def _say(self, number: int, kind: int, payload: bytes) -> None:
        self._write(wire.frame(number, kind, payload))

    def _hello(self) -> dict[str, Any]:
        home = os.path.expanduser("~")
        texts = dict.fromkeys(
            ("user", "shell", "identity", "platform", "boot_id", "machine_id", "network", "path"), "x"
        )
        own = os.path.join(self._folder, "python3")
        places = {"executable": own, "home": home, "directory": home, "hostname": "liar"}
        numbers = {"python": list(sys.version_info[:3]), "pid": os.getpid(), "uid": 0, "booted": 1}
        return {**texts, **places, **numbers, **(self._settings["hello"] or {})}

    def _answer(self, number: int, request: dict[str, Any]) -> None:
        if not os.path.exists(self._flag):
            self._answer_truly(number, request)
            return
        op = " ".join(str(request[key]) for key in ("op", "do", "action") if key in request)
        for kind in (wire.STDOUT, wire.STDERR, wire.OUTPUT):
            self._say(number, kind, self._harm)
        if op in ("run", "call", "relay", "pool", "service", "environment build"):
            self._say(number, wire.EVENT, encoded({"pid": -1, "state": 7, "event": [], "ready": [], "done": {}}))
        lie = {"ok": True, "status": "returned", **self._lie(agent_replies._SHAPES.get(op, {}))}
        for task in [*lie.get("tasks", []), lie.get("task")]:
            # What is done, and was a function, would be fetched and unpickled.
            if isinstance(task, dict) and isinstance(task.get("steps"), list):
                task.update(state="done", steps=[{"ok": True, "status": "returned"}, {"ok": True, "status": "raised"}])
        self._say(number, wire.RESULT, encoded(lie))

    def _answer_truly(self, number: int, request: dict[str, Any]) -> None:
        home = os.path.expanduser("~")
        shape = agent_replies._SHAPES.get(request["op"], {})
        truth = {"ok": True, **made(shape, lowest, 0), "path": home, "exit": 0, "signal": None, "grace": 0}
        if request["op"] == "run":
            said = request.get("argv", [""])[-1]
            self._say(number, wire.STDOUT, said.encode())
            if said == "lie":
                with open(self._flag, "w"):
                    pass
        self._say(number, wire.RESULT, encoded(truth))

    # --- copies -----------------------------------------------------------------------------------
    def _copy(self) -> None:
        other = stream.FrameStream(0, 1)
        other.header()
        request = other.message()
        kinds = (stream.START, stream.ENTRIES) if request["op"] == "get" else (stream.READY, stream.NEED)
        shapes = (
            {"now": int, "folder": bool, "name": agent_replies.NAME, "identity": [int]},
            [[str, agent_replies.NAME, int, int]],
        )
        for kind, shape in zip(kinds, shapes, strict=True):
            payload = encoded(self._lie(shape))
            other.put(kind, payload)
        other.put(stream.DATA, self._harm)
        other.flush()


if __name__ == "__main__":
    Liar(sys.argv[-1]).run()
