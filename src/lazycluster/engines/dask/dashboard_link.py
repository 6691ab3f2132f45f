"""Address of a dashboard, as Dask's configuration says that it is reached."""

from __future__ import annotations

import logging
import os
import re

from lazycluster.cluster.sent.messages import LOOPBACK

__all__ = ["dashboard_link", "plain_link", "shown_link"]

logger = logging.getLogger("lazycluster")

_PLAIN = re.compile(rf"http://{re.escape(LOOPBACK)}:(?P<port>\d+)/(?P<prefix>[\w-]+)/status")


def plain_link(port: int, prefix: str) -> str:
    """Return the address on this machine.

    Args:
        port: The port of the dashboard.
        prefix: The secret first part of its path.
    """
    return f"http://{LOOPBACK}:{port}/{prefix}/status"


def shown_link(link: str) -> str:
    """Return the address under which a user of this process reaches a dashboard, from that on this machine."""
    found = _PLAIN.fullmatch(link)
    return dashboard_link(int(found["port"]), found["prefix"]) if found else link


def dashboard_link(port: int, prefix: str) -> str:
    """Return the address as ``distributed.dashboard.link`` of Dask's configuration says it.

    Args:
        port: The port of the dashboard.
        prefix: The secret first part of its path: in the place of ``{prefix}`` there; by default it is put behind what
            has ``{port}``, where the path of the dashboard begins behind a proxy that takes away what is before it.

    Examples:
        >>> with dask.config.set({"distributed.dashboard.link": "/user/me/proxy/{port}/status"}):     # doctest: +SKIP
        ...     dashboard_link(25001, "secret")
        '/user/me/proxy/25001/secret/status'
    """
    import dask.config
    import distributed.config  # noqa: F401  (which has the default)

    template = str(dask.config.get("distributed.dashboard.link"))
    values = {**os.environ, "scheme": "http", "host": LOOPBACK, "port": port, "prefix": prefix}
    try:
        return _with_prefix(template).format(**values)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        logger.warning(
            "distributed.dashboard.link of Dask's configuration, %r, cannot be used: %s: %s\n"
            "  Next step: use {scheme}, {host}, {port}, {prefix} and variables of the environment that are set",
            template,
            type(error).__name__,
            error,
        )
        return plain_link(port, prefix)


def _with_prefix(template: str) -> str:
    if "{prefix}" in template:
        return template
    before, found, after = template.rpartition("{port}")
    if not found:
        before, _, last = template.rpartition("/")
        return f"{before}/{{prefix}}/{last}"
    rest, _, page = after.partition("/")
    return f"{before}{{port}}{rest}/{{prefix}}/{page or 'status'}"
