"""Paths and patterns of them as people write them, on the host and on the manager."""

from __future__ import annotations

import os

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    import re
    from typing import Iterator, List, Mapping, Sequence

_VARIABLE = rb"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})"


def home(env: Mapping[str, str]) -> bytes:
    """Return the user's home directory."""
    return _raw(env.get("HOME", "")) or os.path.expanduser(b"~")


def expand(path: bytes, env: Mapping[str, str]) -> bytes:
    """Return a path with `~`, `~user`, `$NAME` and `${NAME}` replaced as a shell does.

    A variable that is not set stays as it is, since a dollar sign may stand in a file's name.
    """
    # First the tilde: one that comes out of a variable is a name, as in a shell.
    if path == b"~" or path.startswith(b"~/"):
        return home(env) + _with_variables(path[1:], env)
    if path.startswith(b"~"):
        path = os.path.expanduser(path)
    return _with_variables(path, env)


def _with_variables(path: bytes, env: Mapping[str, str]) -> bytes:
    if b"$" not in path:
        return path
    import re  # here and not above: the start of the agent does not wait for it

    def value(match: "re.Match[bytes]") -> bytes:
        name = (match.group(1) or match.group(2)).decode("ascii")
        return _raw(env[name]) if name in env else os.environb.get(_raw(name), match.group(0))

    return re.sub(_VARIABLE, value, path)


def absolute(path: bytes, cwd: bytes, env: Mapping[str, str]) -> bytes:
    """Return an absolute path: expanded, relative to `cwd`, which is relative to the home directory."""
    return os.path.join(home(env), expand(cwd, env), expand(path, env))


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


# --- what is left out of a directory that is copied --------------------------------------------------
class Pattern:
    """A pattern of names, or with a slash in it of paths: below the directory, or from where the copy was asked for.

    Args:
        written: As it was written.
        root: The directory that is copied.
        cwd: What a relative path is relative to, beside the directory.
        env: Variables that may stand in it.

    Attributes:
        written: As it was written.
        used: Whether something was left out because of it.
    """

    def __init__(self, written: bytes, root: bytes, cwd: bytes, env: Mapping[str, str]) -> None:
        self.written = written
        self.used = False
        stripped = written.rstrip(b"/") or b"/"
        self._is_name = b"/" not in stripped
        if self._is_name:
            self._texts = [stripped]
        else:
            plain = os.path.join(absolute(b"", cwd, env), stripped)
            below = [text for path in {plain, absolute(stripped, cwd, env)} for text in _below(root, path)]
            found = [os.path.normpath(text.lstrip(b"/")) for text in (stripped, *below) if text.strip(b"/")]
            found += [text[3:] for text in found if text.startswith(b"**/")]  # in the directory itself, too
            self._texts = list(dict.fromkeys(found))

    def fits(self, name: bytes) -> bool:
        """Return whether a path below the directory is meant. A ``*`` stands for slashes, too."""
        import fnmatch

        name = os.path.basename(name) if self._is_name else name
        return any(name == text or fnmatch.fnmatchcase(name, text) for text in self._texts)

    def is_below(self, name: bytes) -> bool:
        """Return whether only the contents of a directory are meant."""
        return not self._is_name and any(text.startswith(name + b"/") for text in self._texts)


def _below(root: bytes, path: bytes) -> Iterator[bytes]:
    """Yield what of a path leads on from the directory, by whichever way it gets there."""
    try:
        wanted = os.stat(root)
    except OSError:
        return
    parts = path.split(b"/")
    for count in range(1, len(parts)):
        try:
            if os.path.samestat(os.stat(b"/".join(parts[:count]) or b"/"), wanted):
                yield b"/".join(parts[count:])
        except (OSError, ValueError):
            return  # what leads through it leads nowhere; a pattern, say


class Exclusion:
    """All patterns of a copy."""

    def __init__(self, patterns: Sequence[bytes], root: bytes, cwd: bytes, env: Mapping[str, str]) -> None:
        self._patterns = [Pattern(written, root, cwd, env) for written in patterns]

    def __call__(self, name: bytes) -> bool:
        """Return whether a path below the directory is left out."""
        fitting = [pattern for pattern in self._patterns if pattern.fits(name)]
        if fitting:
            # What is in it is left out as well, for those who have named that.
            for pattern in self._patterns:
                pattern.used = pattern.used or pattern in fitting or pattern.is_below(name)
        return bool(fitting)

    @property
    def unused(self) -> List[bytes]:
        """The patterns that have left nothing out so far."""
        return [pattern.written for pattern in self._patterns if not pattern.used]
