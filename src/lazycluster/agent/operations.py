"""The requests that an agent takes, and which function of which module handles each."""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Dict, Tuple

# request -> (module, function); modules are imported when they are first needed, which keeps the start short
HANDLERS: Dict[str, Tuple[str, str]] = {
    "run": ("commands", "run"),
    "setup": ("commands", "setup"),
    "call": ("functions", "call"),
    "packages": ("functions", "packages"),
    "interpreters": ("functions", "interpreters"),
    "info": ("host_info", "info"),
    "gpus": ("gpus", "gpus"),
    "ports": ("ports", "free"),
    "nonce": ("ports", "nonce"),
    "exposed": ("ports", "exposed"),
    "reach": ("reachability", "reach"),
    "mkdir": ("paths", "mkdir"),
    "mkdtemp": ("paths", "mkdtemp"),
    "remove": ("paths", "remove"),
    "expand": ("paths", "expanded"),
    "service": ("services", "service"),
    "detach": ("detached", "detach"),
    "detached": ("detached", "detached"),
    "relay": ("relay", "relay"),
    "pool": ("pools", "pool"),
    "environment": ("environment_cache", "environment"),
    "activity": ("host_load", "activity"),
    "tunnels": ("host_load", "tunnels"),
    "usage": ("host_load", "usage"),
    "leftovers": ("leftovers", "leftovers"),
}
