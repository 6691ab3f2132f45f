"""Connections of Dask's parties through tunnels that end before TLS begins."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("distributed")
pytest.importorskip("cryptography")

from distributed.comm.core import CommClosedError
from distributed.comm.tcp import TLSConnector

from lazycluster.cluster.certificates import make_credentials
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.engines.dask import scaling
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


def test_a_scheduler_that_does_not_say_whether_it_is_idle_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def never(**_: Any) -> None:
        await asyncio.get_running_loop().create_future()

    @contextlib.asynccontextmanager
    async def busy(*_: Any) -> AsyncIterator[Any]:
        yield SimpleNamespace(run_function=never)

    monkeypatch.setattr(scaling, "scheduler_at", busy)
    monkeypatch.setattr(scaling, "access", lambda dask, port: ())
    monkeypatch.setattr(scaling, "_ANSWER_LIMIT", 0.01)
    with pytest.raises(ClusterError, match="did not answer within"):
        asyncio.run(scaling.idle_since(None, 1))  # type: ignore[arg-type]
