"""The socket of a cluster's process: who may ask, and which answer each request gets."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import lazycluster
from lazycluster.background import protocol
from lazycluster.background.protocol import MessageStream
from lazycluster.core import forks, unix
from lazycluster.exceptions import LazyclusterError

if TYPE_CHECKING:
    from .program import Relay
    from .requests import Requests

__all__ = ["RequestServer"]

logger = logging.getLogger("lazycluster")

_MOST = 64  # connections at once
_REQUEST = 10.0  # seconds for a request to come
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED)
_AGAIN = 0.1  # seconds until connections are taken again after one of these


class RequestServer:
    """Serves the requests of other processes of this user, each on a thread of its own.

    Args:
        listener: The socket at which it listens.
        requests: What it can be asked.
        relay: Who takes the answers to questions.
    """

    def __init__(self, listener: socket.socket, requests: Requests, relay: Relay) -> None:
        self._listener = listener
        forks.close_in_children(listener.fileno())
        self._requests = requests
        self._relay = relay
        self._free = threading.Semaphore(_MOST)
        self._threads: set[threading.Thread] = set()

    def start(self) -> None:
        """Begin to serve."""
        threading.Thread(target=self._accept, name="lazycluster server", daemon=True).start()

    def close(self, patience: float) -> None:
        """Stop serving, when the answers that are under way are read.

        Args:
            patience: Seconds for that.
        """
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        end = time.monotonic() + patience
        for thread in list(self._threads):
            thread.join(max(0.0, end - time.monotonic()))

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if error.errno not in _PASSING:
                    return
                time.sleep(_AGAIN)
                continue
            forks.close_in_children(connection.fileno())
            if not unix.is_own_peer(connection) or not self._free.acquire(blocking=False):
                connection.close()
                continue
            thread = threading.Thread(target=self._serve, args=[MessageStream(connection)], daemon=True)
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:  # there are too many
                self._threads.discard(thread)
                self._free.release()
                connection.close()

    def _serve(self, stream: MessageStream) -> None:
        try:
            with stream:
                try:
                    message = stream.receive(_REQUEST)
                except (TimeoutError, ValueError):
                    return
                if message is not None:
                    self._answer(stream, message)
        finally:
            self._threads.discard(threading.current_thread())
            self._free.release()

    def _answer(self, stream: MessageStream, message: dict[str, Any]) -> None:
        command = message.pop("command", None)
        version = message.pop("protocol", None)
        try:
            if command not in protocol.ALWAYS and version != protocol.VERSION:
                raise LazyclusterError(_other_version(self._requests.name))
            stream.send(result=self._requests.do(command, message, stream))
        except Exception as error:
            known = isinstance(error, (LazyclusterError, OSError, ValueError, TypeError, TimeoutError))
            if not known:
                logger.exception("the request %r failed", command)
            text = str(error) if known and str(error) else f"{type(error).__name__}: {error}"
            stream.send(error=text, type=type(error).__name__)


def _other_version(name: str) -> str:
    return (
        f"the cluster {name!r} was started by lazycluster {lazycluster.__version__}, which speaks protocol "
        f"{protocol.VERSION}: this version can only list and end it\n"
        f"  Next step: use it with that version, or end it with lazycluster down {name}, and start it anew"
    )
