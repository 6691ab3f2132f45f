"""Groups of runtimes for the tests of clusters."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lazycluster.runtimes import LocalRuntime, Runtime


class Group:
    """As much of a `RuntimeGroup` as clusters use."""

    def __init__(self, runtimes: list[Runtime]) -> None:
        self.runtimes = runtimes
        self.printed = 0

    @property
    def runtime_count(self) -> int:
        return len(self.runtimes)

    def print_log(self) -> None:
        self.printed += 1

    def expose_port_to_runtimes(self, port: int) -> None:
        for runtime in self.runtimes:
            runtime.expose_port_to_runtime(port)

    def cleanup(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda runtime: runtime.cleanup(), self.runtimes))


def connect(config_file: str, names: list[str], **options: Any) -> Group:
    options.setdefault("python", sys.executable)
    with ThreadPoolExecutor() as pool:
        kwargs = {"config_file": config_file}
        return Group(list(pool.map(lambda name: Runtime(name, connection_kwargs=kwargs, **options), names)))


@contextlib.contextmanager
def ssh_group(hosts: Any, **options: Any) -> Iterator[Group]:
    group = connect(hosts.config_file, [host.name for host in hosts], **options)
    try:
        yield group
    finally:
        group.cleanup()


@contextlib.contextmanager
def local_group(count: int = 2, **options: Any) -> Iterator[Group]:
    group = Group([LocalRuntime(host=f"local{number}", **options) for number in range(count)])
    try:
        yield group
    finally:
        group.cleanup()
