"""TLS for the server's connections, in memory: the server reads and writes the sockets itself.

So it counts connections before their handshake is over, which asyncio would hide from it.
"""

from __future__ import annotations

import ssl
import tempfile

from ....cluster.sent.memory_file import in_memory

_READ_SIZE = 256 * 1024


def server_context(certificate: str, key: str) -> ssl.SSLContext:
    """Return what connections are encrypted with.

    Args:
        certificate: The server's certificate, as PEM text.
        key: Its private key, likewise.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    with in_memory(certificate + key) as path:
        if path.startswith("/"):
            context.load_cert_chain(path)
            return context
    with tempfile.NamedTemporaryFile("w") as file:  # no Linux: it can be loaded from a file only
        file.write(certificate + key)
        file.flush()
        context.load_cert_chain(file.name)
    return context


class TlsChannel:
    """One connection's encryption.

    Args:
        context: Certificate and key.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._established = False

    def received(self, data: bytes) -> bytes:
        """Return what is in the bytes that came; answers of TLS itself are in `pending`.

        Raises:
            ssl.SSLError: If it is no TLS, or not to be understood.
        """
        self._incoming.write(data)
        parts = []
        try:
            if not self._established:
                self._object.do_handshake()
                self._established = True
            while self._incoming.pending or self._object.pending():  # asked first: an exception costs more
                part = self._object.read(_READ_SIZE)
                if not part:
                    break
                parts.append(part)
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass  # the rest is to come, or the end of the connection is
        return b"".join(parts)

    def encrypted(self, data: bytes) -> bytes:
        """Return bytes as they are to be sent."""
        self._object.write(data)
        return self._outgoing.read()

    def pending(self) -> bytes:
        """Return what TLS itself wants to have sent."""
        return self._outgoing.read()
