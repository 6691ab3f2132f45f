"""Waiting for file descriptors: `selectors` would take longer to import than the agent's reactor."""

from __future__ import annotations

import select

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, List, Optional, Tuple

READ, WRITE = 1, 2
_IN, _OUT = select.POLLIN, select.POLLOUT


class Poller:
    """Tells which descriptors are ready: by `epoll` where the system has it, else by `poll`."""

    def __init__(self) -> None:
        has_epoll = hasattr(select, "epoll")
        self._poll: Any = select.epoll() if has_epoll else select.poll()
        self._unit = 1 if has_epoll else 1000  # of a time-out, in a second

    def register(self, fd: int, mask: int) -> None:
        """Begin to watch a descriptor."""
        self._poll.register(fd, _events(mask))

    def modify(self, fd: int, mask: int) -> None:
        """Watch it for something else."""
        self._poll.modify(fd, _events(mask))

    def unregister(self, fd: int) -> None:
        """Stop watching it; it may have been closed."""
        try:
            self._poll.unregister(fd)
        except OSError:
            pass

    def wait(self, seconds: Optional[float]) -> List[Tuple[int, int]]:
        """Wait until something is ready.

        Args:
            seconds: How long at most; None: as long as it takes.

        Returns:
            (descriptor, READ, WRITE or both) of each; what is broken is both.
        """
        ready = self._poll.poll(None if seconds is None else seconds * self._unit)
        return [(fd, (READ if events & ~_OUT else 0) | (WRITE if events & ~_IN else 0)) for fd, events in ready]


def _events(mask: int) -> int:
    return (_IN if mask & READ else 0) | (_OUT if mask & WRITE else 0)
