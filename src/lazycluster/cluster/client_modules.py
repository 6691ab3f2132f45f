"""The user's own modules, in a process that is a client of a cluster in the background."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from lazycluster.core import event_loop

from .module_sources import ModuleSources

if TYPE_CHECKING:
    from lazycluster.background.client import BackgroundProcess

__all__ = ["ClientModules"]


class ClientModules:
    """The modules of this process, which the cluster's process sends to its hosts; used as `LocalModules` is.

    Attributes:
        version: The version of what the hosts have.
    """

    def __init__(self, process: BackgroundProcess) -> None:
        self.version = 0
        self._process = process
        self._sources = ModuleSources()
        self._sent: dict[str, str | bytes] = {}

    def changes(self) -> bool:
        """True if hosts may not have the present modules. For any thread."""
        return self._sources.changed()

    async def sync_changes(self) -> int:
        """Have what has changed on all hosts; returns `version`."""
        files = await self._sources.read()
        changed = {name: text for name, text in files.items() if self._sent.get(name) != text}
        if changed:
            self.version = await event_loop.in_thread(self._send, changed)
            self._sent.update(changed)
        return self.version

    def sync_now(self) -> int:
        """Have what has changed on all hosts before this returns; returns `version`. For a user's thread."""
        return event_loop.run(self.sync_changes())

    def _send(self, files: dict[str, str | bytes]) -> int:
        written: dict[str, Any] = {
            name: ["text", text] if isinstance(text, str) else ["bytes", base64.b64encode(text).decode("ascii")]
            for name, text in files.items()
        }
        return int(self._process.request("modules", files=written, timeout=None))
