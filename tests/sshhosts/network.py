"""A network of its own for the process that works with throw-away hosts."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading

_CLONE_NEWNET = 0x40000000


def own_network() -> bool:
    """Move this process to a network namespace of its own; returns whether it may, and has but one thread."""
    if sys.platform != "linux" or os.geteuid() != 0 or threading.active_count() > 1:
        return False
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        return False
    subprocess.run(["ip", "link", "set", "dev", "lo", "up"], check=True)
    return True
