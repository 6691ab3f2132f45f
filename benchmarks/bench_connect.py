"""Connecting: 32 hosts at once, directly and behind one bastion, beside plain ssh and tools made for this."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from harness import Row, in_turns, measured, seconds, settings, spread, ssh_hosts

from lazycluster import RuntimeGroup, RuntimeTask

COUNT = 32
PAIRS = 7


def plain_ssh(hosts: Any) -> None:
    command = ["ssh", "-F", str(hosts.config_file)]
    running = [subprocess.Popen([*command, name, "true"]) for name in hosts.names]
    assert [process.wait() for process in running] == [0] * len(running)


def lazycluster(hosts: Any) -> None:
    with RuntimeGroup(hosts=list(hosts.names), connection_kwargs=settings(hosts)) as group:
        group.execute_task(RuntimeTask("true").run_command("true"), broadcast=True)
        group.join()


def clustershell(hosts: Any) -> None:
    from ClusterShell.Task import task_self

    task = task_self()
    task.set_info("fanout", COUNT)
    task.set_info("ssh_options", f"-F {hosts.config_file}")
    worker = task.shell("true", nodes=",".join(hosts.names))
    task.resume()
    assert worker.task.max_retcode() == 0


def fabric(hosts: Any) -> None:
    from fabric import Config, Connection
    from fabric.group import ThreadingGroup

    config = Config(runtime_ssh_path=str(hosts.config_file))
    group = ThreadingGroup.from_connections([Connection(name, config=config) for name in hosts.names])
    with contextlib.closing(group):
        group.run("true", hide=True)


def parallel_ssh(hosts: Any) -> None:
    from pssh.clients import ParallelSSHClient

    key = str(hosts.key_file)
    client = ParallelSSHClient([host.address for host in hosts], user=hosts[0].user, pkey=key, pool_size=COUNT)
    client.join(client.run_command("true"))


def rows() -> Iterator[Row]:
    peers = {"ClusterShell": clustershell, "Fabric ThreadingGroup": fabric, "parallel-ssh": parallel_ssh}
    with ssh_hosts(COUNT) as hosts:
        usable = {}
        for name, work in peers.items():
            try:
                work(hosts)
                usable[name] = work
            except Exception as error:  # noqa: BLE001  (whatever is wrong with a peer, the others go on)
                print(f"   ({name} left out: {type(error).__name__}: {error})")
        contenders = {"ours": lazycluster, "ssh": plain_ssh, **usable}
        medians = in_turns(5, **{name: lambda work=work: work(hosts) for name, work in contenders.items()})
    what = f"connect {COUNT} hosts, run true on each"
    ours, ssh = medians.pop("ours"), medians.pop("ssh")
    yield Row(what, ours, "s", "<= 1.4 x", f"{COUNT} x ssh at once", ssh, ours <= 1.4 * ssh)
    for name, theirs in medians.items():
        yield Row(what, ours, "s", "", name, theirs)
    yield from processor_time()
    with ssh_hosts(COUNT, bastion=True) as hosts:
        took = seconds(lambda: lazycluster(hosts))
    yield Row(f"{COUNT} hosts behind one bastion, MaxStartups default", took, "s", "all connected", met=True)
    yield from whole_program()
    yield importing()


def processor_time() -> Iterator[Row]:
    """Compare what connecting costs with plain ssh, in pairs, so that a noisy moment meets both."""
    with ssh_hosts(COUNT) as hosts, measured(hosts) as cost:
        pairs = [(cost(lambda: lazycluster(hosts)), cost(lambda: plain_ssh(hosts))) for _ in range(PAIRS)]
    what = f"connect {COUNT} hosts, run true on each"
    for name, target in (("wall", 1.4), ("manager", 1.15), ("hosts", None)):
        ours, ssh = ([getattr(one, name) for one in side] for side in zip(*pairs, strict=True))
        ratios = [mine / theirs for mine, theirs in zip(ours, ssh, strict=True)]
        label = "wall" if name == "wall" else f"processor time of the {name}"
        met = None if target is None else statistics.median(ratios) <= target
        aim = "" if target is None else f"<= {target} x"
        note = f"ratio in {PAIRS} pairs: {spread(ratios)}"
        yield Row(
            f"{what}: {label}",
            statistics.median(ours),
            "s",
            aim,
            f"{COUNT} x ssh at once",
            statistics.median(ssh),
            met,
            note,
        )


def whole_program() -> Iterator[Row]:
    """Time a program that connects to one host, from its start to its end."""
    with ssh_hosts(1) as hosts, compiled() as env:
        config = str(hosts.config_file)
        ours = [sys.executable, "-m", "lazycluster", "run", "--config", config, "-w", "host1", "--", "true"]

        def run(command: list[str]) -> None:
            subprocess.run(command, check=True, env=env)

        run(ours)
        times = in_turns(PAIRS, ours=lambda: run(ours), ssh=lambda: run(["ssh", "-F", config, "host1", "true"]))
    yield Row("lazycluster run -w host1 -- true, whole program", times["ours"], "s", "", "ssh host1 true", times["ssh"])


@contextlib.contextmanager
def compiled() -> Iterator[dict[str, str]]:
    """Give an environment for programs that have compiled modules, as an installed package has them."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        yield env


def importing() -> Row:
    """Time the import."""
    with compiled() as env:

        def python(program: str) -> None:
            subprocess.run([sys.executable, "-c", program], check=True, env=env)

        python("import lazycluster")
        times = in_turns(9, ours=lambda: python("import lazycluster"), bare=lambda: python("pass"))
    took = (times["ours"] - times["bare"]) * 1000
    return Row("import lazycluster", took, "ms", "<= 150 ms", met=took <= 150)
