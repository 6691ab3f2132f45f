"""Links that cannot be had again without a person, in a process that outlives the login which has started it.

The keys of an ssh agent, Kerberos tickets and security keys may go with the login. Elsewhere a link that is refused is
lost; here it waits until somebody has logged in again.
"""

from __future__ import annotations

import asyncio

__all__ = ["needed", "outlive", "renewed", "try_again"]

_outlives = False
_waiting: dict[str, tuple[str, asyncio.Future[None]]] = {}


def outlive() -> None:
    """Have links wait for a login from now on."""
    global _outlives
    _outlives = True


def needed() -> dict[str, str]:
    """Return the hosts that wait for a login, each with the reason. May be called from any thread."""
    return {host: why for host, (why, _) in list(_waiting.items())}


async def renewed(host: str, why: str) -> bool:
    """Wait until somebody has logged in again.

    Args:
        host: The host.
        why: Why it refuses the login.

    Returns:
        False, at once, if this process does not outlive its login.
    """
    if not _outlives:
        return False
    future = asyncio.get_running_loop().create_future()
    _waiting[host] = why, future
    try:
        await future
    finally:
        if _waiting.get(host, ("", None))[1] is future:
            del _waiting[host]
    return True


async def try_again() -> None:
    """Have all that wait try again; from now on they are not in `needed`, unless they are refused once more."""
    for _, future in list(_waiting.values()):
        if not future.done():
            future.set_result(None)
    _waiting.clear()
