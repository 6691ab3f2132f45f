"""How much a host may have logged: what it causes more often within a minute is counted, and left out."""

from __future__ import annotations

import asyncio
import logging

__all__ = ["may_say"]

MOST, SPAN = 100, 60.0
"""How many lines one host may cause within how many seconds."""

logger = logging.getLogger("lazycluster")


class _Account:
    def __init__(self) -> None:
        self.since = -SPAN
        self.count = 0
        self.left_out = 0

    def tell(self, host: str) -> None:
        logger.warning(
            "%s: %d more messages of this host were left out, of those that came within %g s", host, self.left_out, SPAN
        )
        self.left_out = 0


_accounts: dict[str, _Account] = {}


def may_say(host: str) -> bool:
    """Count something that a host says or does; returns whether it is to be told. For the event loop's thread.

    How many were left out is told when the time is over.

    Args:
        host: The host.
    """
    loop = asyncio.get_running_loop()
    account = _accounts.setdefault(host, _Account())
    if loop.time() - account.since >= SPAN:
        account.since, account.count = loop.time(), 0
    account.count += 1
    if account.count <= MOST:
        return True
    if not account.left_out:
        loop.call_at(account.since + SPAN, account.tell, host)
    account.left_out += 1
    return False
