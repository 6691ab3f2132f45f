"""Connections of Dask's parties through tunnels that end before TLS begins."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("distributed")
pytest.importorskip("cryptography")

from distributed.comm.core import CommClosedError
from distributed.comm.tcp import TLSConnector

from lazycluster.cluster.certificates import make_credentials
from lazycluster.engines.dask.programs import tls


@pytest.mark.parametrize(
    ("said", "kind"), [("IOStream is not idle; cannot convert to SSL", CommClosedError), ("no port", ValueError)]
)
def test_a_tunnel_with_nothing_behind_it_is_tried_again(
    said: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ended(*_: Any, **__: Any) -> None:
        raise ValueError(said)

    monkeypatch.setattr(tls, "_connect", ended)
    with pytest.raises(kind):
        asyncio.run(TLSConnector().connect("127.0.0.1:1"))


def test_who_listens_and_ends_each_connection_costs_time_and_no_more() -> None:
    security = tls.MemorySecurity(**make_credentials().for_role("client"))

    async def connect() -> None:
        async def end(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        server = await asyncio.start_server(end, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            for _ in range(20):  # which of its errors tornado raises is a matter of time
                with pytest.raises(OSError):
                    await TLSConnector().connect(f"127.0.0.1:{port}", **security.get_connection_args("client"))

    asyncio.run(connect())
