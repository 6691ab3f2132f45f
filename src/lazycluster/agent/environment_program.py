"""Program for the interpreter of an environment: says what is in it, and compiles its modules.

This module stands alone: its text is given to that interpreter, whichever version that is.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Dict, Iterator, List, Sequence, Tuple

MANIFEST = "lazycluster.json"
_NOT_COMPILED = ("__pycache__", "tests", "test")  # tests are a third of all modules, and nobody imports them
_INFO = (".dist-info", ".egg-info")


def source() -> str:
    """Return the text of this module, from wherever it was imported."""
    import importlib.util

    spec: Any = importlib.util.find_spec(__name__)
    return str(spec.loader.get_source(__name__))


def command(python: str, action: str, prefix: str, *arguments: object) -> List[str]:
    """Return the command by which an interpreter does something for its environment.

    Args:
        python: The interpreter.
        action: ``check``: print what is there, see `check`; ``compile``: see `compile_modules`.
        prefix: The environment.
        arguments: What the action wants to know beside.
    """
    line = "\nsys.exit(_main(*sys.argv[1:]))"
    return [python, "-Ic", source() + line, action, prefix, *map(str, arguments)]


def _main(action: str, prefix: str, *arguments: str) -> int:
    if action == "check":
        sys.stdout.write(json.dumps(check(prefix)) + "\n")
        return 0
    return compile_modules(prefix, int(arguments[0]), int(arguments[1]))


# --- what is there -------------------------------------------------------------------------------
def check(prefix: str) -> Dict[str, Any]:
    """Return the packages of an environment with their versions, and the bytes that it takes on the disk."""
    packages: Dict[str, str] = {}
    for folder in _libraries(prefix):
        for entry in os.listdir(folder):
            name, kind = os.path.splitext(entry)
            if kind in _INFO:
                packages.setdefault(*_named(os.path.join(folder, entry), name))
    return {"packages": packages, "size": size_of(prefix)}


def _named(path: str, stem: str) -> Tuple[str, str]:
    """Return name and version of a distribution: as its metadata write the name, else as its directory does."""
    name, _, version = stem.partition("-")
    try:
        with open(os.path.join(path, "METADATA"), encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip():
                    break
                if line.startswith("Name:"):
                    name = line[5:].strip()
    except OSError:
        pass
    return name, version


def _libraries(prefix: str) -> Iterator[str]:
    lib = os.path.join(prefix, "lib")
    for name in sorted(os.listdir(lib)) if os.path.isdir(lib) else ():
        folder = os.path.join(lib, name, "site-packages")
        if os.path.isdir(folder):
            yield folder


def size_of(*paths: str) -> int:
    """Return the bytes that directories take on the disk; what has several names is counted once."""
    total = 0
    seen = set()
    for path in _files(paths):
        try:
            inode = os.lstat(path)
        except OSError:
            continue
        if inode.st_ino not in seen:
            seen.add(inode.st_ino)
            total += inode.st_blocks * 512
    return total


def _files(paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        for folder, _, names in os.walk(path):
            yield from (os.path.join(folder, name) for name in names)


# --- compiling -----------------------------------------------------------------------------------
def compile_modules(prefix: str, count: int, lock: int) -> int:
    """Compile the modules of an environment, so that no first import has to, and note that in its manifest.

    Everybody else comes first. What is compiled already is passed over, so it may be interrupted at any time. Python
    renames each file when it is complete: who imports meanwhile finds all of it, or compiles that module as ever.

    Args:
        prefix: The environment.
        count: How many processes do it.
        lock: A descriptor that says as long as it is open that this is being done.
    """
    _step_back()
    files = sorted(_modules(prefix), key=lambda path: path.count("/"))  # the upper ones are imported first
    pids = [_compiler(files[number::count]) for number in range(count)]
    failed = [pid for pid in pids if os.waitpid(pid, 0)[1] != 0]
    if not failed:
        _note(prefix)
    os.close(lock)
    return 1 if failed else 0


def _step_back() -> None:
    """Let everybody else on the machine go first."""
    os.nice(19)
    try:
        with open("/proc/self/autogroup", "w") as file:  # where sessions share the processors, it is theirs that counts
            file.write("19")
    except OSError:
        pass


def _modules(prefix: str) -> Iterator[str]:
    for library in _libraries(prefix):
        for folder, folders, names in os.walk(library):
            if "__pycache__" in folders:
                _remove_unfinished(os.path.join(folder, "__pycache__"))
            folders[:] = [name for name in folders if name not in _NOT_COMPILED]
            yield from (os.path.join(folder, name) for name in names if name.endswith(".py"))


def _remove_unfinished(folder: str) -> None:
    """Remove what was being written when somebody who compiled was killed; Python has no other use for such files."""
    for name in os.listdir(folder) if not os.path.islink(folder) else ():
        if re.search(r"\.pyc\.\d+$", name):
            try:
                os.unlink(os.path.join(folder, name))
            except OSError:
                pass  # it was renamed just now


def _compiler(files: List[str]) -> int:
    """Start a process that compiles files; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        import compileall

        for path in files:
            # False: it is no Python of this version, or cannot be written. Importing it will tell.
            compileall.compile_file(path, quiet=2)
        status = 0
    finally:
        os._exit(status)


def _note(prefix: str) -> None:
    path = os.path.join(prefix, MANIFEST)
    with open(path, encoding="utf-8") as file:
        manifest = json.load(file)
    manifest.update(compiled=True, size=size_of(prefix))
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(path + ".new", path)


def wants_compiling(prefix: str, manifest: Dict[str, Any]) -> int:
    """Return a descriptor for `compile_modules` if the modules should be compiled now, and nobody does it; else -1."""
    if manifest.get("compiled") or os.environ.get("PYTHONDONTWRITEBYTECODE") or not os.access(prefix, os.W_OK):
        return -1
    try:
        fd = os.open(os.path.join(prefix, MANIFEST), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return -1
    return fd
