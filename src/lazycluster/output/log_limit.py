"""A limit on the messages that a host may cause in the log: what exceeds it within a minute is counted and left out."""

from __future__ import annotations

import asyncio
import logging

__all__ = ["may_log"]

MOST, SPAN = 100, 60.0
"""Lines that one host may cause, and the seconds within which."""

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


def may_log(host: str) -> bool:
    """Count a message that a host causes, and return whether it may be logged. For the event loop's thread.

    The number of those left out is logged when the time is over.

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
