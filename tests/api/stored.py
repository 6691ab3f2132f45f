"""Names that stand in what is stored, set or configured outside of the sources: they do not follow renames there."""

from __future__ import annotations

import ast
import base64
import json
import pickletools
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from api.messages import SOURCES, template

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"

# Parts of names in file systems, databases and environments: what has them may be older than the program.
_KEPT = {
    "a host's detached tasks": ("detached", "task.json", "state.json", "outcome-{}"),
    "the manager's records of them": ("detached-tasks",),
    "a host's environments": (
        *("~/.cache/lazycluster", ".lazycluster-environments", "envs", "wheels"),
        *("lazycluster.json", "pylock.lazycluster.toml", ".build", ".use"),
    ),
    "a host's temporary directories": ("lazycluster-", "agent.sock"),
    "a search's database": ("lazycluster-mongo.sqlite", "lazycluster-mongo.lock", "lazycluster-password"),
    "what is in it": ("FMinIter_Domain", "attempts", "lease"),
    "pickled objectives": ("lazycluster objective\n", "lazycluster.agent.localmodules"),
    "connection files": ("scheduler", "security", "mongo_trial_url"),
    "the ssh configuration": (".lazycluster-backup",),
}


def lines() -> list[str]:
    """Return one line for each name."""
    found = _Literals()
    entries = [f"command: {name}" for name in _scripts()]
    entries += [f"python -m {name}" for name in _programs()]
    entries += [f"environment variable: {name}" for name in sorted(found.variables)]
    entries += [f"logger: {name}" for name in sorted(found.loggers)]
    for where, names in _KEPT.items():
        entries += [f"{where}: {name.strip()}{'' if name in found.texts else ' (not there)'}" for name in names]
    return [*entries, *(f"in pickles: {name}" for name in sorted(pickled(FIXTURES)))]


def _scripts() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.scripts]\n")[2].partition("\n[")[0]
    return [line for line in section.splitlines() if line]


def _programs() -> list[str]:
    found = sorted(path.parent.relative_to(SOURCES.parent) for path in SOURCES.rglob("__main__.py"))
    return [".".join(path.parts) for path in found]


class _Literals:
    """The texts in the sources, and what some of them are."""

    def __init__(self) -> None:
        self.texts: set[str] = set()
        self.variables: set[str] = set()
        self.loggers: set[str] = set()
        for path in sorted(SOURCES.rglob("*.py")):
            module = ".".join(path.relative_to(SOURCES.parent).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                self._take(node, module)

    def _take(self, node: ast.AST, module: str) -> None:
        if not isinstance(node, (ast.Constant, ast.JoinedStr, ast.Call)):
            return
        text = template(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, bytes):
            text = node.value.decode("latin-1")
        if text is not None:
            self.texts.add(text)
            if re.fullmatch(r"_?LAZYCLUSTER_[A-Z_]+", text):
                self.variables.add(text)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "getLogger":
            (argument,) = node.args or [None]
            if isinstance(argument, ast.Constant):
                self.loggers.add(str(argument.value))
            elif isinstance(argument, ast.Name) and argument.id == "__name__":
                self.loggers.add(module)


def pickled(folder: Path) -> set[str]:
    """Return the names of ours in all pickles of a directory with fixtures: module and name in it."""
    return {name for data in _pickles(folder) for name in _names(data)}


def _pickles(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.rglob("pickles.json")):
        yield from (base64.b64decode(text) for text in json.loads(path.read_text()).values())
    for path in sorted(folder.rglob("outcome-*")):
        yield path.read_bytes()
    for path in sorted(folder.rglob("lazycluster-mongo.sqlite")):
        sql = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
        bodies = [row[0] for row in sql.execute("SELECT body FROM documents ORDER BY id")]
        sql.close()
        for body in bodies:
            starts = [match.start() for match in re.finditer(rb"\x80\x05\x95", body)]
            yield from (body[start:] for start in starts)


def _names(data: bytes) -> Iterator[str]:
    """Yield "module name" of what a pickle names of ours."""
    stack: list[str] = []
    memo: list[str] = []
    for operation, argument, _ in _operations(data):
        if operation.name == "MEMOIZE":
            memo.append(stack[-1] if stack else "")
            continue
        if operation.name in ("BINGET", "LONG_BINGET") and isinstance(argument, int):
            stack.append(memo[argument] if argument < len(memo) else "")  # of the pickle before it
        elif operation.name == "STACK_GLOBAL":
            module, name = stack[-2:]
            stack.append("")
            if module.partition(".")[0] == "lazycluster":
                yield f"{module} {name}"
        else:
            stack.append(argument if isinstance(argument, str) else "")


def _operations(data: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, object, int | None]]:
    try:
        yield from pickletools.genops(data)
    except ValueError:
        return  # what follows a pickle within a document
