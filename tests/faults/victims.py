"""Managers that are to be killed while they work: ``python victims.py WORK SSH_CONFIG FOLDER``.

Each prints a line when it is in the middle of its work, and goes on with it until it is killed, or told to end.
"""

from __future__ import annotations

import atexit
import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lazycluster import Runtime, RuntimeGroup, RuntimeTask
from lazycluster.exceptions import LazyclusterError

HOSTS = ["host1", "host2", "host3"]


def connect(config: str) -> RuntimeGroup:
    return RuntimeGroup(hosts=HOSTS, connection_kwargs={"config_file": config}, python=sys.executable)


def say(what: str) -> None:
    print(what, flush=True)


def stubborn() -> None:
    """A function that nothing but SIGKILL ends, nor the daemon that it starts."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    subprocess.run("setsid sh -c 'trap \"\" TERM INT HUP; sleep 7002; sleep 7003' &", shell=True, check=True)
    subprocess.run(["sleep", "7001"], check=True)


def tasks(group: RuntimeGroup, folder: Path) -> None:
    """On every host a command with a daemon of its own, and a function that does not want to end."""
    commands = RuntimeTask("command").run_command("nohup setsid sleep 7004 >/dev/null 2>&1 & sleep 7005")
    group.execute_task(commands, broadcast=True)
    for runtime in group.runtimes:
        runtime.create_tempdir()
        runtime.execute_task(RuntimeTask("function").run_function(stubborn))
    say("working")
    group.join()


def send(group: RuntimeGroup, folder: Path) -> None:
    """A file that is too large to be sent before the end."""
    say("working")
    group.send_file(str(folder / "huge"), "~/copies/huge", execute_async=False)


def get(group: RuntimeGroup, folder: Path) -> None:
    """The same in the other direction."""
    say("working")
    group.runtimes[0].get_file("~/copies/huge", str(folder / "copies/huge"))


def tunnels(group: RuntimeGroup, folder: Path) -> None:
    """Ports exposed in both directions, for others to use."""
    port = int((folder / "port").read_text())
    group.expose_port_to_runtimes(port, 24100)
    group.runtimes[1].expose_port_from_runtime(24100, 24101)
    say("working")
    threading.Event().wait()


def start(group: RuntimeGroup, folder: Path) -> None:
    """A cluster that starts."""
    from lazycluster.cluster.dask_cluster import DaskCluster

    say("working")
    DaskCluster(group).start()
    threading.Event().wait()


def cluster(group: RuntimeGroup, folder: Path) -> None:
    """A cluster whose workers send each other, and the client, all that they can."""
    from lazycluster.cluster.dask_cluster import DaskCluster

    running = DaskCluster(group)
    running.start()
    client = running.get_client(timeout=30)
    names = [worker["name"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]

    def exchange() -> int:
        parts = [client.submit(bytes, 3_000_000, workers=[name], pure=False) for name in names]
        sums = [client.submit(join, *parts, workers=[name], pure=False) for name in names]
        return sum(map(len, client.gather(sums)))

    assert exchange() == len(names) * len(names) * 3_000_000
    say("working")
    while True:
        exchange()


def join(*parts: bytes) -> bytes:
    return b"".join(parts)


def search(group: RuntimeGroup, folder: Path) -> None:
    """A search for the smallest number, which goes on."""
    from hyperopt import fmin, hp, rand

    from lazycluster.cluster.hyperopt_cluster import HyperoptCluster

    running = HyperoptCluster(group, dbpath=str(folder / "db"))
    running.start()
    trials = running.trials("search")

    def tell() -> None:
        while running.progress("search").done < 6:
            threading.Event().wait(0.05)
        say("working")

    threading.Thread(target=tell, daemon=True).start()
    space = hp.uniform("x", 0, 1)
    fmin(noted, space, rand.suggest, 1000, trials=trials, max_queue_len=4, show_progressbar=False)


def noted(x: float) -> float:
    """Evaluate, and note on the host that it was done."""
    time.sleep(0.2)
    with Path("~/evaluated").expanduser().open("a") as file:
        file.write(f"{x}\n")
    return x


def ordered(group: RuntimeGroup, folder: Path) -> None:
    """What `tasks` does, until it is told how to end."""
    commands = RuntimeTask("command").run_command("nohup setsid sleep 7004 >/dev/null 2>&1 & sleep 7005")
    group.execute_task(commands, broadcast=True)
    group.runtimes[0].execute_task(RuntimeTask("function").run_function(stubborn))
    say("working")
    obey(sys.stdin.readline().strip(), group)


def calls(group: RuntimeGroup, folder: Path) -> None:
    """Calls on all hosts, more than there is time for, until it is told how to end."""
    for number in group.map(nap, itertools.count()):
        if number == 20:
            say("working")
        if select.select([sys.stdin], [], [], 0)[0]:
            obey(sys.stdin.readline().strip(), group)
            return


def nap(number: int) -> int:
    """Take a moment."""
    time.sleep(0.05)
    return number


def obey(order: str, group: RuntimeGroup) -> None:
    """End, or do what is dangerous before."""
    if order == "raise":
        raise RuntimeError("the user's own")
    if order == "exit":
        sys.exit(3)
    if order == "thread":
        threading.Thread(target=call_for_ever, args=[group], daemon=True).start()
    if order == "fork":
        child = os.fork()
        if child == 0:
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert group.call(sum, [1]) == dict.fromkeys(HOSTS, 1)
    if order == "finalise":
        late.append(group)
        Late.group = group


late: list[RuntimeGroup] = []


@atexit.register  # before the library has registered its own, so that this runs after that
def use_what_is_gone() -> None:
    """Use hosts when everything was cleaned up."""
    for group in late:
        try:
            group.call(sum, [1])
        except LazyclusterError as error:
            print(f"too late: {error}", file=sys.stderr, flush=True)


class Late:
    """Uses hosts when its module is torn down, and lets nobody know."""

    group: RuntimeGroup | None = None

    def __del__(self) -> None:
        if self.group is not None:
            self.group.call(sum, [1])


last = Late()


def call_for_ever(group: RuntimeGroup) -> None:
    """Use hosts until there are none; this thread is in the middle of a call when the interpreter ends."""
    try:
        while True:
            group.call(sum, [1, 2])
    except LazyclusterError:
        pass


def closing(group: RuntimeGroup, folder: Path) -> None:
    """The end of tasks that do not want to end."""
    for runtime in group.runtimes:
        runtime.execute_task(RuntimeTask("function").run_function(stubborn))
    say("working")
    group.cleanup()


def connecting(group: RuntimeGroup, folder: Path) -> None:
    """A host that takes the connection and says nothing."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        silent = listener.accept()
        say("working")
        silent[0].recv(1 << 20)
        threading.Event().wait()

    threading.Thread(target=accept, daemon=True).start()
    Runtime(f"127.0.0.1:{listener.getsockname()[1]}", connection_kwargs={"timeout": 600})


WORKS: dict[str, Callable[[RuntimeGroup, Path], Any]] = {
    work.__name__: work
    for work in (tasks, send, get, tunnels, start, cluster, search, ordered, calls, closing, connecting)
}


if __name__ == "__main__":
    work, config_file, directory = sys.argv[1:]
    WORKS[work](connect(config_file), Path(directory))
