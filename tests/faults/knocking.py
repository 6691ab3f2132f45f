"""Sends a stranger somewhere, to try what he can: see ``stranger.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

NOBODY = 65534
_STRANGER = Path(__file__).with_name("stranger.py").read_text()


def loopback(ports: list[int]) -> list[tuple[str, int]]:
    return [("127.0.0.1", port) for port in ports]


def on_host(host: Any, account: str, attempts: str) -> list[str]:
    uid = {"root": 0, "lazy": 1000, "mallory": 1001}[account]
    found = host.run([sys.executable, "-c", _STRANGER, str(uid)], input=attempts, timeout=100)
    return list(json.loads(found.stdout))


def here(uid: int, attempts: str) -> list[str]:
    arguments = [sys.executable, "-c", _STRANGER, str(uid)]
    found = subprocess.run(arguments, input=attempts, timeout=100, check=True, stdout=subprocess.PIPE, text=True)
    return list(json.loads(found.stdout))


def below(folder: Path) -> list[Path]:
    return [folder, *folder.rglob("*")]


def private(host: Any) -> list[str]:
    """All that the library has on a host, as the host names it."""
    root = Path(f"/proc/{host.pid}/root")
    return ["/" + str(path.relative_to(root)) for entry in host.tmp_entries() for path in below(root / entry[1:])]
