"""Stands in for `mongod`, which cannot be had everywhere: our own server with mongod's options, and its way of users.

As `mongod --auth` does, it lets who comes from the same machine make the first user, and nobody else do anything then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import ssl
import sys
from pathlib import Path
from typing import Any

from lazycluster.engines.hyperopt.mongo.dispatch import ClientSession, Dispatcher
from lazycluster.engines.hyperopt.mongo.scram import ScramCredentials
from lazycluster.engines.hyperopt.mongo.server import Server
from lazycluster.engines.hyperopt.mongo.store import DocumentStore


class StandIn(Dispatcher):
    def __init__(self, store: DocumentStore, users: Path) -> None:
        self.users = users
        super().__init__(store, self._known())

    def _known(self) -> ScramCredentials:
        known = json.loads(self.users.read_text()) if self.users.exists() else {"user": "", "pwd": ""}
        return ScramCredentials.of(known["user"], known["pwd"])

    def run(self, session: ClientSession, command: dict[str, Any]) -> dict[str, Any]:
        if "createUser" in command and not self.users.exists():
            self.users.write_text(json.dumps({"user": command["createUser"], "pwd": command["pwd"]}))
            self._credentials = self._known()
            return {"ok": 1.0}
        return super().run(session, command)


async def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--dbpath", "--bind_ip", "--port"):
        parser.add_argument(name, required=True)
    parser.add_argument("--auth", action="store_true", required=True)
    parser.add_argument("--nounixsocket", action="store_true")
    parser.add_argument("--tlsMode", choices=["requireTLS"], required=True)
    parser.add_argument("--tlsCertificateKeyFile", required=True)
    parser.add_argument("--tlsCAFile", required=True)
    parser.add_argument("--tlsAllowConnectionsWithoutCertificates", action="store_true", required=True)
    options = parser.parse_args()
    assert options.bind_ip == "127.0.0.1"
    path = Path(options.dbpath)
    if (path / "mongod.lock").exists():
        print("DBPathInUse: Unable to lock the lock file; another mongod instance is running", flush=True)
        sys.exit(100)
    if (path / "of another version").exists():
        print("UPGRADE PROBLEM: Found an invalid featureCompatibilityVersion document", flush=True)
        sys.exit(62)
    if (path / "somebody was faster").exists():
        (path / "somebody was faster").unlink()
        print("Failed to set up listener: SocketException: Address already in use", flush=True)
        sys.exit(48)
    (path / "WiredTiger").touch()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    store = DocumentStore(str(path / "stand-in"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(options.tlsCertificateKeyFile)
    tls.load_verify_locations(options.tlsCAFile)
    server = Server(StandIn(store, path / "users.json"), True, tls)
    await server.listen(int(options.port))
    await stop.wait()
    await server.close()
    store.close()


if __name__ == "__main__":
    asyncio.run(main())
