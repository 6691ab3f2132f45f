"""Frames: what one side packs, the other gets, however the stream is cut."""

from __future__ import annotations

import random

import pytest

from lazycluster.agent import wire


def test_frames_survive_any_cut() -> None:
    frames = [(1, wire.STDOUT, b"a" * 1000), (7, wire.RESULT, b"{}"), (4_000_000_000, wire.INPUT_END, b"")]
    stream = b"".join(wire.frame(*one) for one in frames)
    dice = random.Random(1)
    for _ in range(50):
        decoder, got, rest = wire.Decoder(), [], stream
        while rest:
            cut = dice.randint(1, len(rest))
            got += list(decoder.feed(rest[:cut]))
            rest = rest[cut:]
        assert got == frames


def test_frames_can_be_taken_one_by_one() -> None:
    """Who stops goes on with the next; who has no room for one passes it over."""
    frames = [(number, wire.STDOUT, bytes([number]) * 100) for number in range(5)]
    decoder = wire.Decoder()
    decoder.put(b"".join(wire.frame(*one) for one in frames) + b"\0\0")
    assert next(decoder.frames()) == frames[0]
    assert next(decoder.frames()) == frames[1]
    assert decoder.skip() == 2
    assert list(decoder.frames()) == frames[3:]
    assert not list(decoder.frames())
    assert decoder.total == 5 * (100 + wire.HEADER.size) + 2


def test_json_keeps_names_that_are_not_utf8() -> None:
    name = b"caf\xe9\n".decode("utf-8", "surrogateescape")
    [(_, _, payload)] = wire.Decoder().feed(wire.json_frame(1, wire.REQUEST, {"path": name}))
    assert wire.loads(payload) == {"path": name}


@pytest.mark.parametrize("noise", [b"Welcome to this host!\r\n", b"\xff" * 20, wire.HEADER.pack(2**31, 1, wire.STDOUT)])
def test_noise_is_an_error(noise: bytes) -> None:
    with pytest.raises(wire.FrameError):
        list(wire.Decoder().feed(noise))


def test_broken_json_is_an_error() -> None:
    with pytest.raises(wire.FrameError, match="not JSON"):
        wire.loads(b"{")
