"""What a host says of others in a probe of which hosts reach each other, if it lies."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lazycluster.runtime.reachability import ProbedHost, _Party, _Rounds


class _Connection:
    """A connection that nothing is asked of."""


def parties(*translated: tuple[int, str, str]) -> list[_Party]:
    """Return two hosts that reach each other; the second one says this of addresses."""
    found = []
    for index, address in enumerate(("10.0.0.1", "10.0.0.2")):
        host = ProbedHost(f"host{index}", _Connection(), (25001,))  # type: ignore[arg-type]
        party = _Party(index, host, "00")
        party.addresses, party.own = [address], frozenset((address, f"192.168.0.{index}"))
        found.append(party)

    async def dial(others: Any) -> None:
        found[1].translated = list(translated)

    for party in found:
        party.dial = dial  # type: ignore[method-assign]
    return found


def test_an_address_that_is_translated_to_one_of_the_host_is_listened_at() -> None:
    found = asyncio.run(_Rounds(parties((0, "10.0.0.1", "192.168.0.0"))).run())
    assert found.is_proven
    assert found.addresses["host0"].bind == "192.168.0.0"


@pytest.mark.parametrize("said", ["0.0.0.0", "::", "127.0.0.1", "10.0.0.2", "x\x1b"])
def test_no_host_says_where_another_one_listens(said: str) -> None:
    found = asyncio.run(_Rounds(parties((0, "10.0.0.1", said))).run())
    assert "host0" not in found.addresses
    assert [(one.source, one.target) for one in found.obstacles] == [("host1", "host0")]


@pytest.mark.parametrize("index", [-1, 2, 10**9])
def test_what_is_said_of_no_host_is_ignored(index: int) -> None:
    found = asyncio.run(_Rounds(parties((index, "10.0.0.1", "192.168.0.0"))).run())
    assert found.addresses["host0"].bind == "10.0.0.1"
