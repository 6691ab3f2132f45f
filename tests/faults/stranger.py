"""What somebody tries who has no business in a cluster: ``python -c TEXT_OF_THIS_FILE ACCOUNT < attempts``.

Standard input holds JSON: ``addresses`` ([host, port] each), ``identities`` (by name: authority, certificate and key as
text, or None for TLS without any), ``paths`` to get at, ``secrets`` to look for, ``ways`` if not all are. The answer is
JSON, too: all that worked. An address is asked in plain, by HTTP, and in Dask's own language with each
identity; with the way ``mongo`` as a database that shows any certificate, ``mongo USER PASSWORD`` with a login;
``mongo-plain`` is the same without TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import sys
import tempfile
from pathlib import Path
from typing import Any

import pymongo
from distributed.comm import connect, listen, parse_host_port
from pymongo.errors import PyMongoError

LIMIT = 30.0  # seconds for an answer
PATIENCE = 5.0  # seconds for one in Dask's language: a dashboard waits for the end of what is no HTTP
PAGES = ("", "status", "metrics", "json/identity.json")


def context(identity: dict[str, str] | None) -> ssl.SSLContext:
    """Somebody who does not care whom he talks to."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    if identity is not None:
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(identity["key"] + identity["certificate"])
            file.flush()
            made.load_cert_chain(file.name)
    return made


async def ask_dask(host: str, port: int, protocol: str, **arguments: Any) -> str:
    comm = await asyncio.wait_for(connect(f"{protocol}://{host}:{port}", timeout=2, **arguments), PATIENCE)
    try:
        await comm.write({"op": "identity", "reply": True})
        return repr(await asyncio.wait_for(comm.read(), PATIENCE))
    finally:
        comm.abort()


async def ask_raw(host: str, port: int, text: bytes) -> str:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(text)
        await writer.drain()
        answer = await asyncio.wait_for(reader.read(4096), LIMIT)
    finally:
        writer.close()
    refused = not answer or answer.startswith((b"\x15\x03", b"HTTP/1.1 404", b"HTTP/1.1 400"))
    return "" if refused else repr(answer)


def ask_mongo(host: str, port: int, way: str, *login: str) -> str:
    """Try to read, write and rule a database; returns what could be done."""
    options: dict[str, Any] = dict(zip(("username", "password"), login, strict=False))
    if way == "mongo":
        options |= {"tls": True, "tlsAllowInvalidCertificates": True}
    done = []
    with pymongo.MongoClient(host, port, serverSelectionTimeoutMS=2000, directConnection=True, **options) as client:
        database = client["strange"]
        for what, work in (
            ("list", client.list_database_names),
            ("read", database.jobs.find_one),
            ("write", lambda: database.jobs.insert_one({})),
            ("delete", lambda: client.drop_database("strange")),
            ("add a user", lambda: client.admin.command("createUser", "strange", pwd="x", roles=["root"])),
            ("end", lambda: client.admin.command("shutdown")),
        ):
            with contextlib.suppress(PyMongoError):
                work()
                done.append(what)
    return ", ".join(done)


async def attempt(host: str, port: int, way: str, identities: dict[str, Any]) -> str:
    if way == "connect":
        _, writer = await asyncio.open_connection(host, port)
        writer.close()
        return "is open"
    if way.startswith("mongo"):
        return await asyncio.to_thread(ask_mongo, host, port, *way.split())
    if way == "plain":
        return await ask_dask(host, port, "tcp")
    if way in identities:
        return await ask_dask(host, port, "tls", ssl_context=context(identities[way]))
    return await ask_raw(host, port, f"GET /{way} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())


async def knock(wanted: dict[str, Any]) -> list[str]:
    """Try every way at every address; returns what got an answer."""
    ways = wanted.get("ways") or ["plain", *wanted["identities"], *PAGES]
    found: list[str] = []
    turns = asyncio.Semaphore(64)

    async def one(host: str, port: int, way: str) -> None:
        async with turns:
            with contextlib.suppress(OSError, asyncio.TimeoutError):  # distributed's own errors are OSErrors
                answer = await attempt(host, port, way, wanted["identities"])
                if answer:
                    found.append(f"{host}:{port} {way}: {answer[:300]}")

    await asyncio.gather(*(one(host, port, way) for host, port in wanted["addresses"] for way in ways))
    return found


def reach(paths: list[str]) -> list[str]:
    """What of some files, directories and sockets can be got at."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            os.stat(path)
            found.append(f"{path} can be seen")
            if os.path.isdir(path):
                os.listdir(path)
                found.append(f"{path} can be listed")
        with contextlib.suppress(OSError), open(path, "rb"):
            found.append(f"{path} can be read")
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            found.append(f"{path} can be connected to")
    return found


def see(secrets: list[str]) -> list[str]:
    """Where secrets can be read in what the system tells of processes."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                content = Path("/proc", pid, name).read_bytes()
                found += [f"/proc/{pid}/{name} has a secret" for secret in secrets if secret.encode() in content]
    return found


async def rehearse() -> None:
    """Talk to ourselves in Dask's language, so that everything is imported that is imported on the way."""

    async def answer(comm: Any) -> None:
        await comm.write(await comm.read())
        await comm.close()

    async with listen("tcp://127.0.0.1:0", answer) as listener:
        await ask_dask(*parse_host_port(listener.contact_address), "tcp")
    import pymongo.synchronous.auth  # noqa: F401  (as soon as it logs in)

    context(None)


def main() -> None:
    account = int(sys.argv[1])
    if account != os.getuid():
        asyncio.run(rehearse())  # the account may not be allowed to read what Python is made of
        os.setgroups([])
        os.setgid(account)
        os.setuid(account)
    wanted = json.load(sys.stdin)
    found = asyncio.run(knock(wanted))
    found += reach(wanted.get("paths", [])) + see(wanted.get("secrets", []))
    print(json.dumps(found))


main()
