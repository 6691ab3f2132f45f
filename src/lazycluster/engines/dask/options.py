"""Checks of what users say of schedulers and workers, before anything is started."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .configuration import check_size

__all__ = ["check_sizes", "checked_options", "checked_preload", "preloaded_modules"]

_SIZES = "memory_limit", "resources", "local_directory", "nthreads"
_BOTH = {
    **dict.fromkeys(
        ("host", "interface", "contact_address", "listen_address", "nanny_address"),
        "network= of the cluster says at which addresses it listens",
    ),
    **dict.fromkeys(("protocol", "security"), "the cluster has certificates of its own"),
    "http_prefix": "its path is a secret, which dashboard_link has",
    "dashboard": "there is one in any case, and dashboard_link has its address",
    "services": "the cluster starts its own",
}
# What the cluster sets itself, what distributed calls the same elsewhere, and what to use.
_INSTEAD: Mapping[str, Mapping[str, str]] = {
    "worker_options": {
        **_BOTH,
        **{name: f"use {name}= of the cluster" for name in _SIZES},
        **dict.fromkeys(("threads_per_worker", "ncores"), "use nthreads= of the cluster"),
        **dict.fromkeys(("n_workers", "nworkers"), "use worker_count= of start()"),
        **dict.fromkeys(
            ("port", "worker_port", "nanny_port", "dashboard_address", "worker_dashboard_address"),
            "all processes have ports of their own: ports= of the cluster says which may be used",
        ),
        **dict.fromkeys(
            ("scheduler", "scheduler_ip", "scheduler_port", "scheduler_file"), "workers are told the cluster's own"
        ),
        "name": "workers are called by their host and a number, and by their host alone where they are named",
        **dict.fromkeys(("worker_class", "nanny", "modules", "dashboard_prefix"), "the cluster has its own"),
    },
    "scheduler_options": {
        **_BOTH,
        "port": "use master_port= of start()",
        "scheduler_file": "use write_connection_file() of the cluster",
        "dashboard_address": "use dashboard_port= of the cluster",
        "dashboard_port": "use dashboard_port= of the cluster",
    },
}


def checked_options(options: Mapping[str, Any] | None, what: str) -> Mapping[str, Any]:
    """Return further options of distributed's own classes.

    Args:
        options: The options.
        what: The argument that they are: ``worker_options`` or ``scheduler_options``.

    Raises:
        TypeError: If they are no mapping of names.
        ValueError: If the cluster sets one of them itself, or it cannot be sent as JSON, which the processes get once
            they are there.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise TypeError(f"{what} must be a dictionary of names and values, not {options!r}")
    for name, value in options.items():
        if name in _INSTEAD[what]:
            raise ValueError(f"{what}: {name!r} cannot be set there: {_INSTEAD[what][name]}")
        try:
            json.dumps({name: value})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what}: {name!r} cannot be sent, since JSON cannot hold it: {error}") from None
    return options


def check_sizes(memory_limit: object, resources: Mapping[str, object] | None) -> None:
    """Refuse what every worker would stumble over, some seconds later.

    Raises:
        ValueError: If a size is none.
    """
    if isinstance(memory_limit, str) and memory_limit != "auto":
        try:
            check_size(memory_limit)
        except ValueError as error:
            raise ValueError(f"memory_limit: {error}") from None
    for name, amount in (resources or {}).items():
        if isinstance(amount, bool) or not isinstance(amount, (int, float)):
            raise ValueError(f"resources: the amount of {name!r} must be a number, not {amount!r}")


def checked_preload(preload: str | Iterable[str] | None) -> list[str]:
    """Return what workers preload, from a list or a text with commas between.

    Raises:
        ValueError: If something in it is no text.
    """
    given = preload.split(",") if isinstance(preload, str) else list(preload or ())
    for name in given:
        if not isinstance(name, str):
            raise ValueError(f"preload must be names of modules, not {name!r}")
    return [name.strip() for name in given if name.strip()]


def preloaded_modules(preload: Iterable[str]) -> Iterator[str]:
    """Yield the modules among what is preloaded; Dask also takes files and addresses."""
    for one in preload:
        if all(part.isidentifier() for part in one.split(".")) and not one.endswith(".py"):
            yield one
