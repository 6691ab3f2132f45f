"""Search for an interpreter on a host whose ``python3`` is missing or too old: by its shell, which is all there is."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

from lazycluster.agent.interpreters import USUAL_DIRECTORIES

from .agent_program import OLDEST_PYTHON

__all__ = ["NO_PYTHON", "PythonSearch"]

_OLDEST = ".".join(map(str, OLDEST_PYTHON))
_NEWEST_MINOR = 20
_NAMES = (
    "python3",
    *(f"python3.{minor}" for minor in range(_NEWEST_MINOR, OLDEST_PYTHON[1] - 1, -1)),
    "python",
)
NO_PYTHON = f"lazycluster: no Python {_OLDEST} or newer was found on the host"  # how the line begins that says so
_CHECK = f'import sys,zlib;print("%d.%d.%d"%sys.version_info[:3]);sys.exit(sys.version_info<{OLDEST_PYTHON!r})'

# The whole is one compound command, which a shell has read to its end before it runs the first line: so what comes
# after it on standard input is for the interpreter. The set-up lines may hold secrets, and are in no command line.
_SCRIPT = """\
{{
found=
try() {{
  test -f "$1" && test -x "$1" || return
  case "$found" in *", $1 ("*) return;; esac
  version=$("$1" -ISc {check} </dev/null 2>/dev/null) && exec "$1" -ISc {program}
  found="$found, $1 (${{version:-it does not run}})"
}}
{named}
IFS=:
for name in {names}; do
  for directory in $PATH {directories}; do
    try "$directory/$name"
  done
done
{setup}
echo "{none}${{found:+; it has: }}${{found#, }}" >&2
exit 127
}}
"""
_SETUP = """\
shell=sh
command -v bash >/dev/null && shell=bash
IFS='
'
for path in $(printf '%s\\n' {lines} | $shell -c {find}); do
  try "$path"
done
"""
_FIND = """\
exec 9>&1 >&2
lines=$(cat)
exec </dev/null
eval "$lines"
for name in {names}; do
  command -v "$name" >&9
done
"""


@dataclass(frozen=True)
class PythonSearch:
    """The user's settings of a host that may lead to an interpreter.

    Attributes:
        named: Its name or path, as the user gave it; empty if that was not done.
        path: The PATH that the user set; empty if that was not done.
        setup: Lines for a shell, after which there may be an interpreter on the PATH.
    """

    named: str = ""
    path: str = field(default="", repr=False)
    setup: str = field(default="", repr=False)

    def script(self, program: str) -> bytes:
        """Return the script that becomes a new enough interpreter, or tells which ones there are, and ends.

        Args:
            program: What the interpreter is to run.
        """
        is_path = "/" in self.named
        names = " ".join(map(shlex.quote, ([self.named] if self.named and not is_path else []) + [*_NAMES]))
        text = _SCRIPT.format(
            check=shlex.quote(_CHECK),
            program=shlex.quote(program),
            named=f"try {_path(self.named)}" if is_path else "",
            names=names,
            directories=" ".join(map(_pattern, USUAL_DIRECTORIES)),
            setup=self._setup(names),
            none=NO_PYTHON,
        )
        return text.encode("utf-8", "surrogateescape")

    def _setup(self, names: str) -> str:
        lines = [f"PATH={shlex.quote(self.path)}; export PATH"] if self.path else []
        lines += [self.setup] if self.setup else []
        if not lines:
            return ""
        find = _FIND.format(names=names)
        return _SETUP.format(lines=shlex.quote("\n".join(lines)), find=shlex.quote(find))


def _pattern(directory: str) -> str:
    return f'"$HOME"{directory[1:]}' if directory.startswith("~") else directory


def _path(path: str) -> str:
    if path.startswith("~/"):
        return f'"$HOME"/{shlex.quote(path[2:])}'
    return shlex.quote(path)
