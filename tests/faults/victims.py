"""Managers that are to be killed while they work: ``python victims.py WORK SSH_CONFIG FOLDER``.

Each prints a line when it is in the middle of its work, and goes on with it until it is killed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lazycluster import RuntimeGroup, RuntimeTask

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
    import time

    time.sleep(0.2)
    with Path("~/evaluated").expanduser().open("a") as file:
        file.write(f"{x}\n")
    return x


WORKS: dict[str, Callable[[RuntimeGroup, Path], Any]] = {
    work.__name__: work for work in (tasks, send, get, tunnels, start, cluster, search)
}


if __name__ == "__main__":
    work, config_file, directory = sys.argv[1:]
    WORKS[work](connect(config_file), Path(directory))
