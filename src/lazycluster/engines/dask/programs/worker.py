"""A worker of a Dask cluster, as a program: a nanny, and the worker process that it watches."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import sys
import tempfile
import threading
from pathlib import Path
from ssl import SSLError
from typing import Any

from ....agent import zygote
from ....cluster.sent import messages
from . import common

_LONGEST_DIRECTORY = 75  # characters, so that the path of a socket in it is short enough
# As distributed has it in nannies. To have an effect it must be set before numpy is imported, which here is early.
_BEFORE_IMPORTS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# The same, for what must be set before the interpreter starts; the manager sets these unless the user has.
BEFORE_START = {"MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONHASHSEED": "6640"}


def main() -> None:
    """Run until asked to end, or until a client ends the cluster."""
    messages.emit_versions(common.PACKAGES)
    # What tasks print is to be in the log when they print it; the worker process gets these streams, too.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for name, value in _BEFORE_IMPORTS.items():
        os.environ.setdefault(name, value)
    # Imported while the scheduler starts; the settings come when it answers.
    from . import worker_process  # noqa: F401

    # Before this process is copied: so each worker process has them from the start.
    forked = serve_forks(safe=not common.import_early() or _survives_fork())
    messages.run(functools.partial(_serve, forked))


def _survives_fork() -> bool:
    try:
        return zygote.threads() == 1
    except OSError:  # this is no Linux
        return False


def serve_forks(safe: bool = True) -> bool:
    """Have multiprocessing's fork server run in a copy of this process, in which everything is imported already.

    The nanny's worker process would otherwise be a new interpreter, which imports all of distributed again: this
    halves the time of a start, and makes a restart of the worker a matter of milliseconds.

    Args:
        safe: Whether nothing is known that does not survive it.

    Returns:
        Whether that can be done; only a process with one thread may be copied.
    """
    from multiprocessing import forkserver, resource_tracker, util

    if not safe or threading.active_count() != 1 or not hasattr(util, "spawnv_passfds"):
        return False
    os.register_at_fork(after_in_child=_reseed)
    # Python before 3.9.16, 3.10.9 and 3.11.1 lets every user of the host connect to the fork server otherwise.
    util.abstract_sockets_supported = False  # type: ignore[misc]
    resource_tracker.ensure_running()
    started = util.spawnv_passfds
    if len(os.environ["LAZYCLUSTER_SCRATCH"]) < _LONGEST_DIRECTORY:
        tempfile.tempdir = os.environ["LAZYCLUSTER_SCRATCH"]  # for the socket; it is removed whatever happens
    # This is how the fork server is started; the only thing that changes is that no new interpreter is.
    util.spawnv_passfds = _fork_instead  # type: ignore[assignment]
    try:
        forkserver.set_forkserver_preload([])
        forkserver.ensure_running()
    finally:
        util.spawnv_passfds = started
        tempfile.tempdir = None
    return True


def _reseed() -> None:
    # The module `random` does this itself. Two workers that draw the same numbers would be a nasty surprise.
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _fork_instead(path: Any, arguments: list[Any], kept: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    tempfile.tempdir = None
    try:
        program = os.fsdecode(arguments[arguments.index("-c") + 1])
        edges = sorted({0, 1, 2, *kept})
        for low, high in zip(edges, [*edges[1:], 1 << 20], strict=True):
            os.closerange(low + 1, high)
        exec(program, {"__name__": "__main__"})
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0
    finally:
        os._exit(status)


async def _serve(forked: bool, settings: dict[str, Any]) -> None:
    import dask

    from . import sent_modules, worker_process
    from .connection_limits import limit_unauthenticated
    from .nanny import WatchedNanny, answers
    from .tls import MemorySecurity

    ports = settings["ports"]
    stop = messages.stop_signal()
    common.configure(settings["configuration"])
    worker_process.configure(forked and not _has_own_environment(settings["configuration"]))
    security = MemorySecurity(**settings["security"])
    limit_unauthenticated()
    # A scheduler that is started again may need longer than a worker, which gives up at the first refusal.
    try:
        await common.first(answers(settings["scheduler"], security), stop.wait())
    except (OSError, ValueError, asyncio.TimeoutError) as error:
        cause = messages.root_of(error)
        other = "another program answers in its place" if isinstance(cause, SSLError) else "it does not answer"
        why = f"{other}: {cause}" if str(cause) else other
        raise SystemExit(f"the scheduler cannot be reached at {settings['scheduler']}: {why}") from None
    if stop.is_set():
        return
    sent_modules.install(settings["modules"])  # for its plugins, and for functions that run in it
    nanny = WatchedNanny(
        settings["scheduler"],
        host=common.listening_host(settings, "nanny"),
        port=ports["nanny"],
        contact_address=common.contact_address(settings, "worker"),
        nanny_address=common.contact_address(settings, "nanny"),
        worker_port=ports["worker"],
        worker_class=worker_process.PagedWorker,
        protocol=settings["protocol"],
        security=security,
        name=settings["name"],
        nthreads=settings["nthreads"] or max(1, _cores() // settings["siblings"]),
        memory_limit=settings["memory_limit"] if settings["memory_limit"] != "auto" else _share(settings["siblings"]),
        resources=settings["resources"],
        local_directory=_scratch(
            settings["local_directory"] or dask.config.get("temporary-directory", default=None), settings["trust_group"]
        ),
        dashboard_address=f"{messages.LOOPBACK}:{ports['dashboard']}",
        dashboard_prefix=settings["prefix"],
        modules=settings["modules"],
        **({"preload": settings["preload"]} if settings["preload"] else {}),
        **settings["options"],
    )
    sent_modules.look(nanny)
    starting = _start(nanny, ports)
    try:
        await common.first(starting, stop.wait())
        if not stop.is_set():
            limit = getattr(nanny.memory_manager, "memory_limit", None)
            messages.emit(
                "ready",
                address=nanny.worker_address,
                nanny=nanny.address,
                name=nanny.name,
                nthreads=nanny.nthreads,
                memory_limit=limit,
            )
            await common.first(nanny.finished(), stop.wait())
    finally:
        await nanny.close(timeout=2)
    if nanny.lost_scheduler and not stop.is_set():
        messages.emit("cut_off")
        raise SystemExit("the connection to the scheduler has ended, though nobody ended the cluster")
    if nanny.failed and not stop.is_set():
        raise SystemExit("the worker process could not be started again")


def _has_own_environment(configuration: dict[str, Any]) -> bool:
    """Tell whether variables are configured that a worker must have before it starts: in a new interpreter only.

    The nanny sets them, unless there are any in its own environment already: so the defaults have to go.
    """
    wanted = configuration.get("distributed", {}).get("nanny", {}).get("pre-spawn-environ")
    if not isinstance(wanted, dict) or not wanted:
        return False
    for name, value in {**_BEFORE_IMPORTS, **BEFORE_START}.items():
        if name in wanted and os.environ.get(name) == value:
            del os.environ[name]
    return True


async def _start(nanny: Any, ports: dict[str, int]) -> None:
    try:
        await nanny
    except Exception as error:
        seen: BaseException | None = error
        while seen is not None:
            if isinstance(seen, messages.PortTakenError):
                raise seen from None
            if isinstance(seen, OSError) and seen.errno == errno.EADDRINUSE:
                raise messages.PortTakenError(ports["worker"]) from None
            seen = seen.__cause__ or seen.__context__
        raise
    if nanny.worker_address is None:
        raise SystemExit("the worker process did not start")


def _scratch(local_directory: str | None, trust_group: bool) -> str:
    """Return where a worker writes what does not fit in memory: it unpickles that, so nobody else may write there."""
    if local_directory is None:
        return os.environ["LAZYCLUSTER_SCRATCH"]
    from ....agent import ownership

    try:
        home = str(Path(local_directory).expanduser())
    except RuntimeError as error:  # there is no such user
        raise SystemExit(f"local_directory {local_directory} cannot be used: {error}") from None
    # distributed takes a name that has this in it as it is; else it would share a directory with other users.
    path = os.path.join(home, f"dask-scratch-space-{os.getuid()}")
    try:
        ownership.make(path, 0o700, trust_group)
    except OSError as error:
        why = f"{error.filename}: {error.strerror}"
        raise SystemExit(f"local_directory {local_directory} cannot be used: {why}") from None
    return path


def _cores() -> int:
    from dask.system import CPU_COUNT

    return int(CPU_COUNT)


def _share(siblings: int) -> float | str:
    """Return this worker's part of the memory, which it shares with the other workers on the host."""
    if siblings == 1:
        return "auto"
    with contextlib.suppress(ImportError):
        from distributed.system import MEMORY_LIMIT

        return float(MEMORY_LIMIT // siblings)
    return "auto"
