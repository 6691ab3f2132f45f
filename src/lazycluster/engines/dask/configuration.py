"""The manager's Dask configuration, as the scheduler and the workers of a cluster are told it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["KeptConfiguration", "check_size", "configuration"]

logger = logging.getLogger("lazycluster")

# What means something on the manager only: where its configuration is, what its own computations use, where its
# scheduler is (the cluster says so itself), and certificates in its files (the cluster has its own).
_HERE = (
    *("config", "root-config", "internal-inherit-config"),
    *("scheduler", "pool", "shuffle", "scheduler-address", "scheduler-file"),
    *(f"distributed.comm.tls.{name}" for name in ("ca-file", "scheduler", "worker", "client")),
    "distributed.scheduler.dashboard.tls",
)
# Of other ways to get a cluster: hosts have no use for them, and there are tokens and passwords among them.
_OF_OTHERS = ("cloudprovider", "coiled", "gateway", "jobqueue", "kubernetes", "yarn")


def check_size(text: str) -> None:
    """Check a size of memory as Dask reads it.

    Raises:
        ValueError: If it is none.
    """
    from dask.utils import parse_bytes

    try:
        is_size = parse_bytes(text) >= 0
    except ValueError:
        is_size = False
    if not is_size:
        raise ValueError(f"{text!r} is not a size such as '500 MB' or '4 GiB'")


def configuration() -> dict[str, Any]:
    """Return what the manager's Dask configuration has that is not Dask's default: files, environment, and ``set()``.

    Defaults are left to the hosts, which may have a configuration of their own. Values that JSON cannot hold are named
    in a warning.
    """
    import dask.config
    import distributed.config  # noqa: F401  (which has most of the defaults)

    found: dict[str, Any] = {}
    lost = []
    with dask.config.config_lock:  # other threads may use `set()`
        changes = list(_changes(dask.config.config, dask.config.merge(*dask.config.defaults)))
    for key, value in changes:
        name = ".".join(key)
        if key[0] in _OF_OTHERS or any(name == own or name.startswith(own + ".") for own in _HERE):
            continue
        if not _is_plain(value) or key[-1] == "logging-file-config":  # that one is a file of the manager
            lost.append(f"{name} ({type(value).__name__})")
            continue
        place = found
        for part in key[:-1]:
            place = place.setdefault(part, {})
        place[key[-1]] = value
    if lost:
        logger.warning(
            "Dask's configuration here has values that cannot be sent to the scheduler and the workers: %s\n"
            "  Next step: set them there, e.g. with distributed.worker.preload, or as text, numbers and lists",
            ", ".join(sorted(lost)),
        )
    return found


class KeptConfiguration:
    """The manager's Dask configuration, as it is when it is first needed; importing Dask takes a second."""

    def __init__(self) -> None:
        self._found: dict[str, Any] | None = None

    def get(self) -> dict[str, Any]:
        """Return it."""
        if self._found is None:
            self._found = configuration()
        return self._found


def _changes(
    present: Mapping[Any, Any], defaults: Mapping[Any, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield path and value of what is not as in the defaults."""
    for key, value in present.items():
        name = str(key).replace("_", "-") if str(key).replace("_", "-") in defaults else key
        default = defaults.get(name)
        if isinstance(value, Mapping) and value and all(isinstance(inner, str) for inner in value):
            yield from _changes(value, default if isinstance(default, Mapping) else {}, (*above, str(name)))
        elif name not in defaults or type(value) is not type(default) or value != default:
            yield (*above, str(name)), value


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))
