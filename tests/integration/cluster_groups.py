"""Groups of runtimes for the tests of clusters."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from lazycluster import RuntimeGroup
from lazycluster.runtimes import LocalRuntime


def connect(config_file: str, names: list[str], **options: Any) -> RuntimeGroup:
    options.setdefault("python", sys.executable)
    settings = {"config_file": config_file, **options.pop("connection_kwargs", {})}
    return RuntimeGroup(hosts=names, connection_kwargs=settings, **options)


@contextlib.contextmanager
def ssh_group(hosts: Any, **options: Any) -> Iterator[RuntimeGroup]:
    with connect(hosts.config_file, [host.name for host in hosts], **options) as group:
        yield group


@contextlib.contextmanager
def local_group(count: int = 2, **options: Any) -> Iterator[RuntimeGroup]:
    with RuntimeGroup([LocalRuntime(host=f"local{number}", **options) for number in range(count)]) as group:
        yield group
