"""The keeper: an agent beside the manager, which another one takes the place of when it is killed."""

from __future__ import annotations

import asyncio
import logging

from lazycluster.agent.deletion import remove_tree
from lazycluster.agent.restart_policy import RestartPolicy
from lazycluster.exceptions import LazyclusterError

from .link import AgentLink
from .local_connection import LocalConnection

__all__ = ["Keeper"]

logger = logging.getLogger("lazycluster")

_MOST = 5  # that may be killed within minutes


class Keeper(LocalConnection):
    """The connection to the keeper, whichever it is at the time.

    One that is killed takes along what runs under it. Meanwhile the connection is interrupted; then it leads to the
    next one, which has been told what `on_renewal` tells.
    """

    def __init__(self) -> None:
        super().__init__("localhost")
        self._agents = RestartPolicy(_MOST)

    def _ended(self, link: AgentLink, error: Exception | None) -> None:
        if self._gone is None:
            super()._ended(link, error)
        else:
            link.lost("the next keeper has ended, too")  # whoever replaces it sees that

    async def _fail(self) -> None:
        why = await self._last_words()
        while (delay := self._agents.next()) is not None:
            logger.warning("the keeper on this machine was lost, and is replaced (%s)", why)
            assert self._link is not None
            self._link.lost(f"the keeper on this machine was lost ({why})")
            remove_tree(self.agent_info.directory)
            await asyncio.sleep(delay)
            try:
                await self._start()
                for renew in list(self.on_renewal):
                    await renew()
            except LazyclusterError as error:
                why = str(error)
            else:
                self._gone = None
                self._opened()
                return
        logger.error("there is no keeper any more: if this process is killed, something may be left: %s", why)
        await self._lost(f"the keeper on this machine was lost too often ({why})")

    async def _close(self) -> None:
        if self._gone is not None and self.state == "interrupted":
            self._gone.cancel()
            await asyncio.wait([self._gone])
            self._gone = None
        await super()._close()
