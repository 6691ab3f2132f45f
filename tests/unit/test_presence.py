"""Whether it is the manager that has gone or the link to it, as the agent on a host finds out."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from lazycluster.agent import manager_link, ssh_session
from lazycluster.agent.loop import Loop
from lazycluster.agent.manager_link import ManagerLink
from patience import until


@pytest.fixture(params=["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def connected(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket, int]]:
    """Both ends of a TCP connection, sshd's first, and a process that came by it."""
    address = request.param
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as server:
        try:
            server.bind((address, 0))
        except OSError:
            pytest.skip("no IPv6 here")
        server.listen()
        with socket.create_connection(server.getsockname()[:2]) as client, server.accept()[0] as ours:
            peer, local = (end.getsockname()[:2] for end in (client, ours))
            told = " ".join(f"{host.removeprefix('::ffff:')} {port}" for host, port in (peer, local))
            with subprocess.Popen(["sleep", "600"], env={**os.environ, "SSH_CONNECTION": told}) as process:
                try:
                    yield ours, client, process.pid
                finally:
                    process.kill()


def test_a_connection_stands_until_either_side_closes_it(connected: Any) -> None:
    _, client, pid = connected
    found = ssh_session.tcp_connection(pid)
    assert found is not None and found.stands()
    client.close()
    until(lambda: not found.stands(), "its end to be seen")
    assert ssh_session.tcp_connection(pid) is None


@pytest.mark.parametrize(
    "value", ["", "UNKNOWN 65535 UNKNOWN 65535", "a b c", "1.2.3.4 5 6.7.8.9 10", "::1%lo 1 ::1 2"]
)
def test_a_connection_that_cannot_be_seen_is_none(value: str) -> None:
    with subprocess.Popen(["sleep", "600"], env={**os.environ, "SSH_CONNECTION": value}) as process:
        assert ssh_session.tcp_connection(process.pid) is None
        process.kill()
    assert ssh_session.tcp_connection(process.pid) is None


class _Session:
    """The session as its end is noticed: its input has ended, and nobody takes its output."""

    attached = True

    def __init__(self, agent: _Agent) -> None:
        self._agent = agent

    def mute(self) -> None:
        """Nothing more is read."""

    def out_is_broken(self) -> bool:
        return True

    def detach(self) -> None:
        self._agent.verdict = "the link"
        self._agent.loop.stop()


class _Agent:
    ending = False
    verdict = ""

    def __init__(self) -> None:
        self.loop = Loop()

    def end(self) -> None:
        self.verdict = "the manager"
        self.loop.stop()


@pytest.mark.parametrize(("goes", "verdict"), [("link", "the link"), ("manager", "the manager")])
def test_an_sshd_that_has_lost_its_connection_may_take_its_time_to_end(
    connected: Any, goes: str, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there in both cases, and has let go of the session's streams; only the connection tells."""
    _, client, pid = connected
    monkeypatch.setattr(ssh_session, "_peer", lambda _: pid)
    monkeypatch.setattr(ssh_session, "sshd_above", lambda _: os.getpid())
    monkeypatch.setattr(manager_link, "_SSHD_LIMIT", 0.3)
    agent = _Agent()
    one = ManagerLink(agent, local=False)  # type: ignore[arg-type]
    one._timer.cancel()
    with socket.socket(socket.AF_UNIX) as unused:
        one._line = ssh_session.SshSession(unused)
        one.session = _Session(agent)  # type: ignore[assignment]
        one.grace = 60.0
        if goes == "link":
            client.close()
        one.streams_ended(one.session, None)  # type: ignore[arg-type]
        agent.loop.run()
    assert agent.verdict == verdict
