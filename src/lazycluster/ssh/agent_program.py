"""The agent as text: what is sent to a host, and the one command that its login shell is given."""

from __future__ import annotations

import functools
import marshal
import os
import re
import secrets
import shlex
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

from lazycluster.agent import bootstrap, shell_state
from lazycluster.agent.operations import HANDLERS

OLDEST_PYTHON = (3, 8)
# What each agent imports for its start, its commands and its end; the test of it knows what these import.
_START = (
    *("descriptors", "directories", "guardian", "json_text", "loop", "manager_link", "operations", "poller"),
    *("processes", "server", "session", "ssh_session", "wire", "commands", "oom", "shell_state", "shell_startup"),
    *("deletion", "leftovers", "limits", "ownership", "path_expansion", "paths", "ps", "spool"),
)
_START_TEXTS = frozenset(("limits",))  # of those, what becomes a program of its own
# Modules that are imported or read by their name; the test of it knows where.
_BY_NAME = {
    "detached": ("functions",),
    "services": ("bytecode", "ownership"),
    "zygote_link": (
        *("zygote", "ownership", "bytecode", "descriptors", "localmodules", "filenames", "interpreters", "limits"),
        *("call_process", "pool_protocol", "pool_worker"),
    ),
}
_AS_TEXT = frozenset(("environment_program", "limits", *_BY_NAME["services"], *_BY_NAME["zygote_link"]))
COPIES = "copies"
"""Stands for a request in `further_modules`: copies begin on streams of their own."""

_IMPORT = re.compile(r"^ *from \.(\w*) import (?:\(([^)]*)\)|([^\n(]*))", re.MULTILINE)
_WORD = re.compile(r"\w+")

# Every login shell takes this: no line break, no single quote, no $, ! or \ in it.
_STUB = (
    "import os,sys,zlib,marshal;n=bytes([10]);"
    'os.write(1,n+b"lazy"+b"{marker} %d.%d.%d"%sys.version_info[:3]+b" "+sys.implementation.cache_tag.encode()+n);'
    "i=sys.stdin.buffer;"
    "b,a=marshal.loads(zlib.decompress(i.read(int(i.readline()))));exec(b);main(*a)"
)
# Connects to the agent, also from a session that sees another /tmp than the agent does: through the root of that one's
# file system, if what listens there is this user's.
_FIND = (
    "import os,sys,socket,struct,zlib,marshal;n=bytes([10]);s=socket.socket(1);"
    "k=any(s.connect_ex(p)==0 for p in {paths}) or s.connect_ex({through})==0 and "
    'struct.unpack("3i",s.getsockopt(socket.SOL_SOCKET,socket.SO_PEERCRED,12))[1]==os.getuid();'
)
# The same as the first on a host where an agent of this manager may wait: that one is given the streams.
_REJOIN = (
    _FIND + 'k and s.sendmsg([b"rejoin"],[(1,1,struct.pack("2i",0,1))]);'
    'os.write(1,n+b"lazy"+b"{marker} %d.%d.%d"%sys.version_info[:3]+b" "+sys.implementation.cache_tag.encode()'
    '+(b" kept" if k else b" new")+n);'
    "k and (os.close(0),os.close(1),s.recv(1),os._exit(0));"
    "i=sys.stdin.buffer;"
    "b,a=marshal.loads(zlib.decompress(i.read(int(i.readline()))));exec(b);main(*a)"
)
# True where python3 will start. bash is asked itself, since its exported functions get lost on the way of `_CHOOSE`.
_IS_THERE = (
    "test -x /usr/bin/python3 || "
    'eval \'expr "$SHELL" : ".*/bash" >/dev/null && command -v python3 >/dev/null\' 2>/dev/null'
)
# Starts the first python3 on the PATH; else a shell, which says so and reads a program of its own. What pyenv and the
# like put into directories called "shims" may be there and start nothing. Quoted as `_STUB` must be.
_CHOOSE = (
    'IFS=:; for d in $PATH; do case "$d" in */shims) ;; '
    '*) test -f "$d/python3" && test -x "$d/python3" && exec "$d/python3" -ISc "$0";; esac; done; '
    'echo; echo "lazy""{marker} sh"; exec sh'
)
# What an interpreter that is too old becomes: the same shell.
_TO_SHELL = """\
import os
def main(line):
    os.write(1, line)
    os.execvp("sh", ["sh"])
"""
NO_AGENT = "lazycluster: this session finds no agent"
_BULK = (
    _FIND + 'k or sys.exit("' + NO_AGENT + '");'
    'os.write(1,n+b"lazy"+b"{marker} "+n);'
    's.sendmsg([b"bulk"],[(1,1,struct.pack("2i",0,1))]);'
    "os.close(0);os.close(1);s.recv(1)"
)


def new_marker() -> str:
    """Return what the stub prints when Python has started; nothing else on the host can know it beforehand."""
    return secrets.token_hex(8)


def expected(marker: str) -> bytes:
    """Return what to look for in the output: the stub puts it together, so an echo of the command does not match."""
    return b"\nlazy" + marker.encode() + b" "


def stub(marker: str) -> str:
    """Return the program that reads the agent from its standard input."""
    return _STUB.format(marker=marker)


def rejoining_stub(marker: str, sockets: Sequence[str], pid: int) -> str:
    """Return the program that finds an agent again, or else reads a new one; see `bulk_command`."""
    return _REJOIN.format(marker=marker, **_address(sockets, pid))


def remote_command(python: str, program: str) -> str:
    """Return the line for the login shell; it works in bash, dash, zsh, fish and tcsh.

    Args:
        python: The path of the interpreter.
        program: What it runs, see `stub` and `rejoining_stub`.
    """
    return f"{_told()}exec {shlex.quote(python)} -ISc '{program}'"


def choosing_command(marker: str, program: str, first: str = "") -> str:
    """Return the line for the login shell that starts the ``python3`` on its PATH.

    If there is none, a shell says so with the marker, and reads what it is to run; see `PythonSearch`.

    Args:
        marker: What the shell says that by.
        program: See `remote_command`.
        first: The path of an interpreter that is used instead if it is still there.
    """
    condition = f"test -x {shlex.quote(first)}" if first else _IS_THERE
    otherwise = f"exec sh -c '{_CHOOSE.format(marker=marker)}' '{program}'"
    return f"{_told()}{condition} || {otherwise}; exec {shlex.quote(first or 'python3')} -ISc '{program}'"


def shell_payload(marker: str) -> bytes:
    """Return what the stub reads if its interpreter is too old: it becomes a shell, as with `choosing_command`."""
    line = b"\nlazy%s sh\n" % marker.encode()
    return _packed(marshal.dumps((_TO_SHELL, (line,)), 2))


def bulk_command(python: str, marker: str, sockets: Sequence[str], pid: int) -> str:
    """Return the line by which a further session says that its shell has done, and gives the agent its streams.

    Args:
        python: The interpreter.
        marker: What it says that by.
        sockets: Where the agent listens; the first is in its own directory.
        pid: The agent's process.
    """
    return f"exec {shlex.quote(python)} -ISc '{_BULK.format(marker=marker, **_address(sockets, pid))}'"


def _address(sockets: Sequence[str], pid: int) -> dict[str, str]:
    return {
        "paths": f"[{','.join(map(_literal, sockets))}]",
        "through": _literal(f"/proc/{pid}/root{sockets[0]}"),
    }


def _told() -> str:
    """Return what has the login shell tell the agent what its start-up files have set beside the environment."""
    return shell_state.telling_at_login("state" + secrets.token_hex(8), bootstrap.TOLD_FD)


def _literal(path: str) -> str:
    return f"bytes([{','.join(str(byte) for byte in os.fsencode(path))}])"


@functools.lru_cache(maxsize=4)
def payload(local: bool, cache_tag: str) -> bytes:
    """Return what the stub reads: a line with the length, and the start of the agent's program, compressed.

    Args:
        local: Whether the agent is a plain subprocess of the manager.
        cache_tag: The host's `sys.implementation.cache_tag`. If it is ours, it is sent compiled, which saves the host a
            third of its part.
    """
    modules = {name: _sent(name, cache_tag, name in _START_TEXTS) for name in _START}
    return _packed(_marshalled((_sent("bootstrap", cache_tag, False), (modules, local)), cache_tag))


def _packed(program: bytes) -> bytes:
    packed = zlib.compress(program)
    return b"%d\n%s" % (len(packed), packed)


@functools.lru_cache(maxsize=64)
def further_modules(operation: str) -> frozenset[str]:
    """Return the modules that an agent needs for a request, beside those that it starts with: what is imported."""
    found: set[str] = set()
    module, _ = HANDLERS.get(operation, ("files" if operation == COPIES else "", ""))
    wanted = [module] if module else []
    while wanted:
        name = wanted.pop()
        if name not in found and (name in _AS_TEXT or name not in _START):
            found.add(name)
            wanted += [*_imported(_modules()[name].text), *_BY_NAME.get(name, ())]
    return frozenset(found) - _START_TEXTS


def _imported(text: str) -> Iterator[str]:
    for module, names, more in _IMPORT.findall(text):
        yield from [module] if module else _WORD.findall(names + more)


@functools.lru_cache(maxsize=64)
def packed_modules(names: frozenset[str], cache_tag: str) -> bytes:
    """Return what the request `modules` brings: those modules, compiled if the host's Python is as ours is."""
    modules = {name: _sent(name, cache_tag, name in _AS_TEXT) for name in sorted(names)}
    return zlib.compress(_marshalled(modules, cache_tag))


def _marshalled(value: Any, cache_tag: str) -> bytes:
    # Version 2 is what any Python reads.
    return marshal.dumps(value) if cache_tag == sys.implementation.cache_tag else marshal.dumps(value, 2)


def _sent(module: str, cache_tag: str, as_text: bool) -> str | CodeType:
    is_ours = cache_tag == sys.implementation.cache_tag
    return _compiled(module) if is_ours and not as_text else _modules()[module].text


@dataclass(frozen=True)
class _Module:
    """A module of the agent.

    Attributes:
        path: Where it lies.
        stamp: What tells whether that has been changed since.
        text: Its source.
    """

    path: Path
    stamp: tuple[int, int]
    text: str


@functools.lru_cache(maxsize=1)
def _modules() -> dict[str, _Module]:
    """Return the agent's modules; once, since all agents of a process are of its version."""
    return {
        path.stem: _Module(path, _stamp(path), path.read_text(encoding="utf-8"))
        for path in sorted(Path(bootstrap.__file__).parent.glob("*.py"))
        if path.name != "__init__.py"
    }


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@functools.cache
def _compiled(name: str) -> CodeType:
    """Return a module as code: as Python keeps it beside the source, which is quick, if it is what was read."""
    module, shown = _modules()[name], bootstrap.file_name(name)
    try:
        code = SourceFileLoader(f"{bootstrap.PACKAGE}.{name}", str(module.path)).get_code(f"{bootstrap.PACKAGE}.{name}")
        if code is not None and _stamp(module.path) == module.stamp:
            return _renamed(code, shown)
    except (ImportError, OSError, SyntaxError):  # another version was installed meanwhile, or none
        pass
    return compile(module.text, shown, "exec", dont_inherit=True)


def _renamed(code: CodeType, file: str) -> CodeType:
    """Return code that tells a host nothing of the paths here."""
    constants = tuple(_renamed(one, file) if isinstance(one, CodeType) else one for one in code.co_consts)
    return code.replace(co_filename=file, co_consts=constants)


def read_all() -> None:
    """Read and compile all that may be sent later: another version, or none, may be installed by then."""
    for local in (True, False):
        payload(local, sys.implementation.cache_tag)
    for name in _modules():
        _compiled(name)
