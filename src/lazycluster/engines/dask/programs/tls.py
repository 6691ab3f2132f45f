"""TLS whose private keys are in no file, however briefly: nothing can be left of them."""

from __future__ import annotations

import contextlib
from typing import Any

from distributed import Security
from distributed.comm.core import CommClosedError
from distributed.comm.tcp import TLSConnector

from ....cluster.sent.memory_file import in_memory

_connect = TLSConnector.connect


async def _connect_to_tunnel(self: TLSConnector, address: str, *arguments: Any, **options: Any) -> Any:
    """Connect, or raise what has distributed try again, where a tunnel listens with nothing behind it.

    Such a tunnel accepts a connection, and ends it. If that is before TLS begins, tornado takes it for a mistake of
    whoever called it, and a client that loses its scheduler for a moment would never connect again.
    """
    try:
        return await _connect(self, address, *arguments, **options)
    except ValueError as error:
        if "not idle" not in str(error):
            raise
        raise CommClosedError(f"what listens at {address} has ended the connection") from None


TLSConnector.connect = _connect_to_tunnel


class MemorySecurity(Security):  # type: ignore[misc]
    """TLS settings for distributed, whose own class writes the key that it was given into a temporary file, to load it.

    Pickled it is distributed's own again: this class may not be where it is unpickled.

    Examples:
        >>> security = MemorySecurity.of(Security(tls_client_key="-----BEGIN ..."))        # doctest: +SKIP
    """

    @classmethod
    def of(cls, security: Security) -> MemorySecurity:
        """Return the same as one of this class."""
        same = cls.__new__(cls)
        for name in Security.__slots__:
            setattr(same, name, getattr(security, name))
        return same

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = super().__reduce_ex__(2)[2]
        return Security, (), state

    def _get_tls_context(self, tls: dict[str, Any], purpose: Any) -> Any:
        with contextlib.ExitStack() as files:
            given = {name: tls[name] for name in ("cert", "key") if "\n" in str(tls.get(name))}
            paths = {name: files.enter_context(in_memory(text)) for name, text in given.items()}
            return super()._get_tls_context({**tls, **paths}, purpose)
