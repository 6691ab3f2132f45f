"""Process of one function call, forked from the zygote.

The call arrives as several pickles in one stream: the sources of local modules; the function and its arguments; then
what the function's modules hold, in portions, until `None`. The outcome goes back over the same socket: a description
(JSON) and a pickle.
"""

from __future__ import annotations

import builtins
import gc
import inspect
import io
import json
import os
import pickle
import socket
import struct
import sys
import threading
import traceback
import types
from typing import IO, Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

from . import filenames, interpreters, limits, localmodules

HEAD = struct.Struct("!I")  # before the outcome's description: its length
TASK_MARKER = "LAZYCLUSTER_TASK"
_OOM_SCORE = "400"  # when memory runs out, the system shall take the function, not the agent or sshd
_STANDARD = os.path.dirname(os.__file__) + os.sep
_INSTALLED = {"site-packages", "dist-packages"}
_MOST_MODULES = 4000
_OURS = (__name__, __name__.rpartition(".")[0] + ".pool_worker")


class Chunks:
    """A file that keeps what is written; large parts as they are, without a copy."""

    _LARGE = 65536

    def __init__(self) -> None:
        self.parts: List[Any] = []
        self.size = 0

    def write(self, data: Any) -> int:
        """Take a part."""
        view = data.raw() if isinstance(data, pickle.PickleBuffer) else memoryview(data)
        self.parts.append(view if view.nbytes > self._LARGE else bytes(view))
        self.size += view.nbytes
        return view.nbytes


class _CallUnpickler(pickle.Unpickler):
    """Finds our own modules without importing the package that they are of on the manager, which no host has."""

    def find_class(self, module: str, name: str) -> Any:
        if module == localmodules.__name__:
            return getattr(localmodules, name)
        return super().find_class(module, name)


# --- the call and its outcome ---------------------------------------------------------------------
def load_call(file: IO[bytes]) -> Tuple[Callable[..., Any], Sequence[Any], Dict[str, Any]]:
    """Read a call from its stream of pickles."""
    localmodules.install(pickle.load(file))  # noqa: S301
    unpickler = _CallUnpickler(file)
    function, args, kwargs = unpickler.load()
    for portion in iter(unpickler.load, None):
        localmodules.fill(portion)
    return function, args, kwargs


def dump_result(value: Any, known: Dict[Any, str]) -> Chunks:
    """Pickle what a function returned; classes that came from the manager become its own again.

    Args:
        value: The result.
        known: The classes that the manager sent, with their identities.
    """
    from cloudpickle import cloudpickle

    class ResultPickler(filenames.FileNames, cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, type) and obj in known:
                return localmodules.tracked_class, (known[obj],)
            if isinstance(obj, BaseException):
                return localmodules.reduced_error(obj)
            return super().reducer_override(obj)

    file = Chunks()
    with localmodules.found_by_name():
        ResultPickler(file, protocol=5).dump(value)
    return file


def describe_error(error: BaseException, known: Dict[Any, str]) -> Dict[str, Any]:
    """Return what can be told of an exception; it is itself pickled apart, since that may fail."""
    try:
        text = str(error)
    except Exception as failure:  # noqa: BLE001  (the user's own code)
        text = "<its str() raised {}>".format(type(failure).__name__)
    try:
        pickled: Optional[bytes] = b"".join(bytes(part) for part in dump_result(error, known).parts)
    except Exception:  # noqa: BLE001  (the text has to do then)
        pickled = None
    kind = type(error)
    plain = kind.__module__ in ("builtins", "__main__")
    name = kind.__qualname__ if plain else kind.__module__ + "." + kind.__qualname__
    hint = localmodules.missing_part(error)
    return {"type": name, "message": text, "hint": hint, "traceback": format_error(error), "exception": pickled}


def format_error(error: BaseException) -> str:
    """Return the traceback without our own frames."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_globals.get("__name__") in _OURS:
        frame = frame.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, frame))
    except Exception:  # noqa: BLE001  (its __str__ may raise anything)
        return "".join(traceback.format_tb(frame)) + type(error).__qualname__


def run_call(file: Any) -> Tuple[Dict[str, Any], Chunks]:
    """Run a pickled call.

    Returns:
        The description of the outcome (`status` is "returned" or "raised"; `phase` is where), and the pickled result
        or error.

    Raises:
        SystemExit: If the function exits.
    """
    known: Dict[Any, str] = {}
    phase = "load"
    value: Any = None
    try:
        function, args, kwargs = load_call(file)
        known.update(sys.modules["cloudpickle.cloudpickle"]._DYNAMIC_CLASS_TRACKER_BY_CLASS)
        phase = "run"
        value = function(*args, **kwargs)
        if inspect.iscoroutine(value):
            import asyncio

            value = asyncio.run(value)
        phase = "result"
        return {"status": "returned"}, dump_result(value, known)
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001  (also what does not derive from Exception is the manager's to know)
        description = describe_error(error, known)
        if phase == "result":
            description["result_type"] = type(value).__module__ + "." + type(value).__qualname__
        chunks = Chunks()
        pickle.dump(description, chunks, protocol=4)
        return {"status": "raised", "phase": phase}, chunks


# --- the process ----------------------------------------------------------------------------------
def main(fd: int, request: Dict[str, Any]) -> int:
    """Be the process of one call; returns its exit status.

    Args:
        fd: A socket: the pickled call comes in, the outcome goes out.
        request: What else the agent says: `kind`, `task`, `cwd`, `name`.
    """
    connection = socket.socket(fileno=fd)
    if request["kind"] != "call":
        _send(connection, {"status": "answered", "fields": interpreters.answer(request)}, Chunks())
        return 0
    before = set(sys.modules)
    try:
        prepare(request)
    except OSError as error:
        text = "the working directory {} cannot be used: {}".format(error.filename, error.strerror)
        _send(connection, {"status": "failed", "message": text, "path": error.filename}, Chunks())
        return 1
    status = 0
    try:
        with connection.makefile("rb", 256 * 1024) as file:
            description, chunks = run_call(file)
        description["imported"] = _imported(before)
        _flush()  # what it printed comes before what it returned
        _send(connection, description, chunks)
    except SystemExit as error:
        status = _exit_status(error)
    connection.close()
    finish()
    for target in (1, 2):
        os.close(target)  # the agent need not wait until the memory is given back, too
    return status


def prepare(request: Dict[str, Any]) -> None:
    """Make this process look like one that was started for the function."""
    gc.enable()
    main_module = types.ModuleType("__main__")
    main_module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main_module
    sys.argv = [request.get("name") or "function"]
    _open_streams()
    if request.get("task"):
        os.environ[TASK_MARKER] = request["task"]
    os.chdir(request["cwd"])
    os.environ["PWD"] = request["cwd"]
    sys.path.append(request["cwd"])  # at the end: a file there never hides an installed module
    if "numpy.random" in sys.modules:
        # It was imported before the fork: without this all calls would draw the same numbers.
        sys.modules["numpy.random"].seed()
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(_OOM_SCORE)
    except OSError:
        pass  # no Linux, or forbidden in this container
    if request.get("limits"):
        # What the interpreter has mapped before the call is not the call's.
        limits.apply(request["limits"], limits.address_space())


def _open_streams() -> None:
    for target, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        raw: Any = open(target, mode + "b", closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=mode == "w")
        setattr(sys, name, stream)
        setattr(sys, "__{}__".format(name), stream)


def _send(connection: socket.socket, description: Dict[str, Any], chunks: Chunks) -> None:
    description["size"] = chunks.size
    head = json.dumps(description).encode("ascii")
    try:
        connection.sendall(HEAD.pack(len(head)) + head)
        for part in chunks.parts:
            connection.sendall(part)
    except OSError:
        pass  # nobody listens any more; the process ends in any case


def _imported(before: Set[str]) -> List[str]:
    """Return what this call imported that a later one may find imported already."""
    found = []
    for name, module in list(sys.modules.items()):
        if name in before or name.startswith("lazycluster.") or localmodules.is_local(name):
            continue
        origin = getattr(getattr(module, "__spec__", None), "origin", None) or ""
        if origin in ("built-in", "frozen") or origin.startswith(_STANDARD) or _INSTALLED & set(origin.split("/")):
            found.append(name)
    return found[:_MOST_MODULES]


def _exit_status(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return int(error.code or 0) & 0xFF
    sys.stderr.write("{}\n".format(error.code))
    return 1


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue  # closed or replaced by the function


def finish() -> None:
    """Do what an interpreter does at its end: wait for threads, run exit handlers, flush."""
    import atexit

    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:  # noqa: BLE001  (as at an interpreter's end, where it is printed)
        traceback.print_exc()
    _flush()
