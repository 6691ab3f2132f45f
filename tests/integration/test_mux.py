"""OpenSSH's multiplexing protocol, spoken with a real master."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import tempfile
import time

import pytest

from lazycluster.ssh.config import Settings, ssh_argv, ssh_version
from lazycluster.ssh.mux import Direction, Forward, Mux, MuxError

LOCAL, REMOTE = Direction.LOCAL, Direction.REMOTE


@contextlib.asynccontextmanager
async def master(hosts, name="host1", command="cat >/dev/null"):
    settings = Settings.parse(name, {"config_file": hosts.config_file})
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "m")
        process = await asyncio.create_subprocess_exec(
            *ssh_argv(settings, path, command, ssh_version()), stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            while not os.path.exists(path):
                assert process.returncode is None
                await asyncio.sleep(0.01)
            mux = Mux(path)
            mux.process = process
            yield mux
            await mux.aclose()
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()


@contextlib.asynccontextmanager
async def service(text=b"hello"):
    """A service on the manager that says who it is."""

    def serve(reader, writer):
        writer.write(text)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


async def read(port):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


def on_host(host, port):
    code = f"import socket; s = socket.create_connection(('127.0.0.1', {port}), 5); print(s.recv(99).decode())"
    return host.run(f'python3 -c "{code}"').stdout.strip()


async def nothing_listens(host):
    """Wait until it is so: ssh does not wait until the host has closed a listener."""
    end = time.monotonic() + 5
    while host.listening_ports():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def run(coroutine):
    asyncio.run(asyncio.wait_for(coroutine, 60))


def test_alive_and_terminate(hosts):
    async def main():
        async with master(hosts) as mux:
            assert await mux.check() == mux.process.pid
            await mux.terminate()
            await asyncio.wait_for(mux.process.wait(), 5)
            with pytest.raises(MuxError, match="does not answer") as caught:
                await mux.check()
            assert not caught.value.refused
            await mux.terminate()

    run(main())


def test_forwards_carry_bytes_both_ways_and_can_be_closed(hosts):
    async def main():
        async with master(hosts) as mux, service() as port:
            (far,) = await mux.open_forwards([Forward(REMOTE, 25000, port)])
            assert far == 25000
            assert await asyncio.to_thread(on_host, hosts[0], far) == "hello"
            (here,) = free_ports(1)
            assert await mux.open_forwards([Forward(LOCAL, here, far)]) == [here]
            assert await read(here) == b"hello"
            assert await mux.close_forwards([Forward(LOCAL, here, far), Forward(REMOTE, far, port)]) == [None, None]
            await nothing_listens(hosts[0])
            with pytest.raises(ConnectionRefusedError):
                await read(here)

    run(main())


def test_the_host_chooses_the_port(hosts):
    async def main():
        async with master(hosts) as mux, service() as port:
            (far,) = await mux.open_forwards([Forward(REMOTE, 0, port)])
            assert await asyncio.to_thread(on_host, hosts[0], far) == "hello"
            assert await mux.close_forwards([Forward(REMOTE, 0, port)]) == [None]
            await nothing_listens(hosts[0])

    run(main())


def test_each_refusal_is_its_own(hosts):
    async def main():
        async with master(hosts) as mux:
            free, taken = free_ports(2)
            blocker = socket.create_server(("127.0.0.1", taken))
            wanted = [
                Forward(LOCAL, taken, 1),
                Forward(LOCAL, free, 1),
                Forward(LOCAL, free, 1),
                Forward(REMOTE, 26000, 1),
            ]
            results = await mux.open_forwards(wanted)
            assert [isinstance(result, MuxError) for result in results] == [True, False, True, False]
            assert "already" in str(results[2])
            assert isinstance((await mux.close_forwards([Forward(LOCAL, taken, 1)]))[0], MuxError)
            blocker.close()
            assert await mux.open_forwards([Forward(LOCAL, taken, 1)]) == [taken]

    run(main())


def test_a_port_that_was_refused_once_leads_to_the_right_place_later(hosts):
    """OpenSSH itself would lead it to where the refused request wanted it to go."""
    code = "import socket; s = socket.create_server(('127.0.0.1', 25555)); print(1, flush=True); input()"

    async def main():
        async with master(hosts) as mux, service(b"first") as first, service(b"second") as second:
            blocker = subprocess.Popen(
                ["ssh", "-F", hosts.config_file, "host1", f'exec python3 -c "{code}"'],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert blocker.stdout and await asyncio.to_thread(blocker.stdout.readline) == b"1\n"
            assert isinstance((await mux.open_forwards([Forward(REMOTE, 25555, first)]))[0], MuxError)
            await asyncio.to_thread(blocker.communicate, b"\n")
            for port, text in ((second, "second"), (first, "first"), (second, "second")):
                assert await mux.open_forwards([Forward(REMOTE, 25555, port)]) == [25555]
                assert await asyncio.to_thread(on_host, hosts[0], 25555) == text
                assert await mux.close_forwards([Forward(REMOTE, 25555, port)]) == [None]
            await nothing_listens(hosts[0])

    run(main())


def test_many_at_once(hosts):
    async def main():
        async with master(hosts) as mux, service() as port:
            forwards = [Forward(REMOTE, 20000 + n, port) for n in range(300)]
            forwards += [Forward(LOCAL, here, 20000) for here in free_ports(300)]
            start = time.perf_counter()
            results = await mux.open_forwards(forwards)
            assert results == [forward.listen_port for forward in forwards]
            assert len(hosts[0].listening_ports()) == 300
            assert await read(results[-1]) == b"hello"
            assert set(await mux.close_forwards(forwards)) == {None}
            assert time.perf_counter() - start < 20
            await nothing_listens(hosts[0])

    run(main())


def test_cancelling_leaves_no_listener(hosts):
    async def main():
        async with master(hosts) as mux, service() as port:
            task = asyncio.ensure_future(mux.open_forwards([Forward(REMOTE, 20000 + n, port) for n in range(100)]))
            await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await mux.aclose()
            await nothing_listens(hosts[0])
            assert await mux.open_forwards([Forward(REMOTE, 20000, port)]) == [20000]

    run(main())


def test_sessions(hosts):
    async def main():
        async with master(hosts) as mux:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                descriptor = theirs.fileno()
                session = await mux.new_session("cat; echo oops >&2; exit 7", descriptor, descriptor, descriptor)
                theirs.close()
                ours.sendall(b"bytes\n")
                ours.shutdown(socket.SHUT_WR)
                assert await asyncio.wait_for(session.wait(), 10) == 7
                ours.settimeout(10)
                said = b"".join(iter(lambda: ours.recv(100), b""))
                assert sorted(said.splitlines()) == [b"bytes", b"oops"]

    run(main())


def test_a_session_too_many_is_refused(make_hosts):
    hosts = make_hosts(1, max_sessions=1)

    async def main():
        async with master(hosts) as mux:
            with open(os.devnull, "r+b") as null, pytest.raises(MuxError, match="MaxSessions") as caught:
                await mux.new_session("true", null.fileno(), null.fileno(), null.fileno())
            assert caught.value.refused

    run(main())


def test_a_stream_to_a_port_of_the_host(hosts):
    async def main():
        async with master(hosts) as mux, service() as port:
            (far,) = await mux.open_forwards([Forward(REMOTE, 0, port)])
            ours, theirs = socket.socketpair()
            session = await mux.connect(far, theirs.fileno(), theirs.fileno())
            theirs.close()
            reader, writer = await asyncio.open_connection(sock=ours)
            assert await asyncio.wait_for(reader.read(), 10) == b"hello"
            writer.close()
            session.close()
            a, b = socket.socketpair()
            with a, b, pytest.raises(MuxError):
                await mux.connect(1, a.fileno(), b.fileno())

    run(main())


def test_a_master_that_says_nothing():
    async def main():
        with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as silent:
            silent.bind(os.path.join(directory, "m"))
            silent.listen()
            mux = Mux(os.path.join(directory, "m"), timeout=0.2)
            with pytest.raises(MuxError, match="no answer within"):
                await mux.check()
            results = await mux.open_forwards([Forward(LOCAL, 1, 1)] * 1)
            assert isinstance(results[0], MuxError)
            assert not results[0].refused

    run(main())
