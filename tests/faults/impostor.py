"""What somebody does who takes a port that others connect to: ``python -c TEXT_OF_THIS_FILE ACCOUNT PORT < identity``.

He listens as soon as the port is free, says so, and answers each connection in plain or by TLS, with the identity
(certificate and key, as PEM text) that he reads from standard input, as a line of JSON; he ends with it. Each line of
his output says what became of a connection, as JSON: ``told`` is what he was told inside of it, ``refused`` why a
client did not want to talk to him.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import sys
import tempfile
import threading
import time


def answer(connection: socket.socket, context: ssl.SSLContext) -> dict[str, str]:
    connection.settimeout(10)
    if connection.recv(1, socket.MSG_PEEK) != b"\x16":
        return {"told": repr(connection.recv(4096))}
    try:
        with context.wrap_socket(connection, server_side=True) as encrypted:
            return {"told": repr(encrypted.recv(4096))}
    except ssl.SSLError as error:
        return {"refused": str(error)}


def main() -> None:
    account, port = int(sys.argv[1]), int(sys.argv[2])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(json.loads(sys.stdin.readline()))
        file.flush()
        context.load_cert_chain(file.name)
    threading.Thread(target=lambda: os._exit(len(sys.stdin.read())), daemon=True).start()
    os.setgroups([])
    os.setgid(account)
    os.setuid(account)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        while True:
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", port))
                listener.listen(50)
                break
            time.sleep(0.01)
        print("listening", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                print(json.dumps(answer(connection, context)), flush=True)


main()
