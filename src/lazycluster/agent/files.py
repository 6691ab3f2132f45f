"""Copies of files and directories: the process on the host that serves them, and what source and destination mean."""

from __future__ import annotations

import errno
import os
import signal
import stat
from typing import Any, Dict, Mapping, NoReturn, Optional, Tuple

from .partial_files import PartialFiles
from .path_expansion import absolute, expand, home
from .receiver import Receiver
from .sender import Sender, what_is
from .stream import REQUEST, ByteCounter, CopyError, FrameStream, StreamClosedError, raw


def serve(incoming: int, outgoing: int, parts: Optional[PartialFiles] = None, successor: Any = None) -> None:
    """Do the copies that are asked for, one after the other, until the stream ends.

    Unfinished files are removed when it ends in the middle of a copy, and when this process is told to end.

    Args:
        incoming: Descriptor to read from.
        outgoing: Descriptor to write to; may be the same.
        parts: What earlier copies have left unfinished.
        successor: Is given what the copies of this process leave unfinished when the stream ends.
    """
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _end)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    stream = FrameStream(incoming, outgoing)
    stream.tell_busy()
    try:
        while True:
            if stream.header() != REQUEST:
                return
            stream.busy = True
            try:
                handle(stream, stream.message(), parts)
            except CopyError:
                pass  # the manager knows it
    except StreamClosedError:
        if parts is not None and successor is not None:
            parts.send_to(successor)
    finally:
        stream.tell_nothing()


def _end(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def handle(stream: FrameStream, request: Dict[str, Any], parts: Optional[PartialFiles] = None) -> None:
    """Do one copy."""
    env: Mapping[str, str] = request.get("env") or {}
    cwd = raw(request.get("cwd") or "")
    path = None if request.get("path") is None else raw(request["path"])
    if request["op"] == "direct":
        from .direct_copy import Party

        Party(stream, request, lambda name: destination(path, cwd, env, False, name), parts).run()
    elif request["op"] == "send":
        Receiver(stream, lambda folder, name: destination(path, cwd, env, folder, name), ByteCounter(), parts).run()
    else:
        exclude = [raw(pattern) for pattern in request.get("exclude") or ()]
        Sender(stream, lambda: source(path or b"", cwd, env), ByteCounter(), exclude, cwd, env).run()


def source(path: bytes, cwd: bytes, env: Mapping[str, str]) -> Tuple[bytes, bytes]:
    """Return the path of what is to be sent, and its name. What exists as it is written is taken as it is written."""
    directory = os.path.join(home(env), expand(cwd, env))
    found = os.path.join(directory, path)
    if not os.path.lexists(found):
        found = os.path.join(directory, expand(path, env))
    name = os.path.basename(found.rstrip(b"/"))
    if name in (b"", b".", b".."):
        name = os.path.basename(os.path.realpath(found))
    return found, name


def destination(
    path: Optional[bytes], cwd: bytes, env: Mapping[str, str], folder: bool, name: bytes, chosen: bool = False
) -> Tuple[bytes, Optional[bytes], bool]:
    """Make the directory that a copy goes to.

    Args:
        path: As the user wrote it; None: the name of the source, in `cwd`.
        cwd: What it is relative to.
        env: Variables that may stand in it.
        folder: Whether a directory is copied.
        name: The name of the source.
        chosen: Whether it is the other side that has chosen the name: then it must be a new one, and no hidden one.

    Returns:
        The directory; the name that a file gets in it, None for a directory; whether the directory was made.
    """
    whole = absolute(path or b"", cwd, env)
    if not path or whole.endswith(b"/") or (not folder and os.path.isdir(whole)):
        if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
            raise CopyError(name, "is not a name for a copy: give the whole destination", errno.EINVAL)
        whole = os.path.join(whole, name)
        if chosen and (name.startswith(b".") or os.path.lexists(whole)):
            what = "is hidden" if name.startswith(b".") else "exists already"
            text = "{}, and the name is the choice of the other side: give the whole destination".format(what)
            raise CopyError(whole, text, errno.EEXIST)
    if folder:
        return whole, None, make_directories(whole)
    directory, last = os.path.split(whole)
    if last in (b".", b".."):
        raise CopyError(whole, "is not a name for a file", errno.EISDIR)
    make_directories(directory)
    return directory, last, False


def make_directories(path: bytes) -> bool:
    """Make a directory and those above it; return whether it was not there."""
    try:
        os.mkdir(path)
        return True
    except FileNotFoundError:
        above = os.path.dirname(path.rstrip(b"/"))
        if above in (b"", path):
            raise CopyError(path, "does not exist", errno.ENOENT) from None
        make_directories(above)
        return make_directories(path)
    except OSError as error:
        # The system may name other reasons than its existence (read-only, no permission) for one that is there.
        try:
            mode = os.stat(path).st_mode
        except OSError:
            if os.path.islink(path):
                raise CopyError(path, "is a symbolic link to nothing", errno.ENOENT) from error
            raise CopyError.of(path, error) from error
        if not stat.S_ISDIR(mode):
            kind = "a file" if stat.S_ISREG(mode) else what_is(mode)
            raise CopyError(path, "is {}, not a directory".format(kind), errno.ENOTDIR) from error
        return False
