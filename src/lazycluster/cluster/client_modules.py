"""The user's own modules, in a process that is a client of a cluster in the background."""

from __future__ import annotations

import base64
import logging
from typing import TYPE_CHECKING, Any

from lazycluster.background import state
from lazycluster.core import event_loop
from lazycluster.exceptions import one_line

from .module_sources import ModuleSources

if TYPE_CHECKING:
    from lazycluster.background.client import BackgroundProcess

__all__ = ["ClientModules"]

logger = logging.getLogger("lazycluster")

_NAMED = 3  # modules in a message


class ClientModules:
    """The modules of this process, which the cluster's process sends to its hosts; used as `LocalModules` is.

    Attributes:
        version: The version of what the hosts have.
        announced: The version of which workers were told; what they imported of an earlier one they have forgotten.
    """

    def __init__(self, process: BackgroundProcess) -> None:
        self.version = self.announced = 0
        self._process = process
        self._sources = ModuleSources()
        self._sent: dict[str, str | bytes] = {}
        self._told: set[str] = set()

    def changes(self) -> bool:
        """True if hosts may not have the present modules. For any thread."""
        return self._sources.changed() or self._are_others()

    def _are_others(self) -> bool:
        """True if another program has had modules sent since this one, perhaps of the same names."""
        try:
            present = (self._process.found.path / state.MODULES).read_text("ascii")
        except OSError:
            present = "0"
        return present != str(self.version)

    async def sync_changes(self) -> int:
        """Have what has changed, or was replaced by another program, on all hosts; returns `version`."""
        files = await self._sources.read()
        if self._are_others():
            self._sent.clear()
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
        paths = {name: path for name, path in self._sources.paths.items() if name in files}
        answer = self._process.request("modules", files=written, paths=paths, timeout=None)
        self._tell({paths[name]: path for name, path in answer["replaced"].items()})
        return int(answer["version"])

    def _tell(self, replaced: dict[str, str]) -> None:
        """Warn of modules of another program that those of this one have replaced, of each once."""
        new = [f"{path} instead of {other}" for path, other in replaced.items() if path not in self._told]
        self._told.update(replaced)
        if new:
            logger.warning(
                "on the hosts of %s, modules of this program replace those of another one: %s. If both use the cluster "
                "at the same time, one may run with modules of the other: give them other names, or use two clusters",
                self._process.name,
                one_line(", ".join(new[:_NAMED])),
            )
