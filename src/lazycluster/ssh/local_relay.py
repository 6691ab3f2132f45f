"""A port of this machine that leads to another one, where there is no ssh to do it."""

from __future__ import annotations

import asyncio
import contextlib

from lazycluster.core import forks

from .mux import LOOPBACK

__all__ = ["LocalRelay"]

_CHUNK = 256 * 1024


class LocalRelay:
    """Carries connections to one loopback port on to another, within the event loop."""

    def __init__(self, connect_port: int) -> None:
        self._connect_port = connect_port
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def listen(self, port: int) -> None:
        """Begin to listen; raises OSError if that is not possible."""
        self._server = await asyncio.start_server(self._carry, LOOPBACK, port)
        forks.not_for_children(*(listener.fileno() for listener in self._server.sockets))

    def stop(self) -> None:
        """Stop listening, and begin to end the connections."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in self._connections:
            connection.cancel()

    async def close(self) -> None:
        """Stop listening, and end the connections."""
        connections = list(self._connections)
        self.stop()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        forks.not_for_children(_fd(writer))
        other: asyncio.StreamWriter | None = None
        try:
            answers, other = await asyncio.open_connection(LOOPBACK, self._connect_port)
            forks.not_for_children(_fd(other))
            await asyncio.gather(_pump(reader, other), _pump(answers, writer))
        except OSError:
            pass  # either end has gone: the other sees its connection end, as with ssh
        except asyncio.CancelledError:
            pass  # by close(), which waits for the end
        finally:
            self._connections.discard(task)
            writer.close()
            if other is not None:
                other.close()


def _fd(writer: asyncio.StreamWriter) -> int:
    return int(writer.get_extra_info("socket").fileno())


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()
