"""The agent as text: what is sent to a host, and the one command that its login shell is given."""

from __future__ import annotations

import functools
import marshal
import os
import secrets
import shlex
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import CodeType

from lazycluster.agent import bootstrap, shell_state

OLDEST_PYTHON = (3, 8)
# What each agent imports for its start, its commands and its end; the test of it knows what these import.
_START = (
    *("descriptors", "directories", "guardian", "json_text", "loop", "manager_link", "poller", "processes", "server"),
    *("session", "ssh_session", "wire", "commands", "oom", "shell_state", "shell_startup"),
    *("deletion", "leftovers", "limits", "ownership", "path_expansion", "paths", "ps", "spool"),
)
_AS_TEXT = ("limits",)  # of those, what becomes a program of its own
START_OPERATIONS = frozenset(
    (
        *("at_manager_end", "expand", "leftovers", "listen", "mkdir", "mkdtemp", "ping", "remove", "run", "session"),
        *("setup", "stop"),
    )
)
"""Requests for which an agent needs no more modules than it starts with."""

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
    sources = _sources()
    modules: dict[str, str | CodeType] = {name: sources[name] for name in _START}
    if cache_tag == sys.implementation.cache_tag:
        modules.update((name, _compiled(name, sources[name])) for name in _START if name not in _AS_TEXT)
        program = marshal.dumps((_compiled("bootstrap", sources["bootstrap"]), (modules, local)))
    else:
        program = marshal.dumps((sources["bootstrap"], (modules, local)), 2)  # version 2: any Python reads it
    return _packed(program)


def _packed(program: bytes) -> bytes:
    packed = zlib.compress(program, 9)
    return b"%d\n%s" % (len(packed), packed)


@functools.lru_cache(maxsize=1)
def all_modules() -> bytes:
    """Return what the request `modules` brings: the sources of all modules, compressed."""
    sources = dict(_sources())
    del sources["bootstrap"]
    return zlib.compress(marshal.dumps(sources, 2), 9)


@functools.lru_cache(maxsize=1)
def _sources() -> dict[str, str]:
    """Return the agent's modules; once, since all agents of a process are of its version."""
    return {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted(Path(bootstrap.__file__).parent.glob("*.py"))
        if path.name != "__init__.py"
    }


def _compiled(module: str, source: str) -> CodeType:
    # Without docstrings, which nobody reads there.
    return compile(source, bootstrap.file_name(module), "exec", dont_inherit=True, optimize=2)
