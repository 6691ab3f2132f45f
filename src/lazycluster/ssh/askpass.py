"""The program that ssh runs to ask a question (SSH_ASKPASS); it passes the question on to the manager.

It is started as ``python -I -S askpass.py PROMPT`` and talks to :mod:`lazycluster.ssh.prompts` over a unix socket. It
holds no answer of its own: exit status 0 and a line on stdout is an answer, anything else means "declined".

ssh sends an empty password to the host when the question for one is declined, as often as the host lets it, and the
host counts each as an attack. So where nothing can follow from it, the ssh that asks is ended instead.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys

SOCKET = "LAZYCLUSTER_ASKPASS_SOCKET"
TOKEN = "LAZYCLUSTER_ASKPASS_TOKEN"  # noqa: S105  (a variable's name)
TIMEOUT = 600.0


def main() -> int:
    """Ask the manager, and print its answer."""
    with contextlib.suppress(ValueError):  # the hard limit is 0
        # No core dump: 1 byte, since the kernel ignores a limit of 0 where dumps are piped to a program.
        resource.setrlimit(resource.RLIMIT_CORE, (1, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    question = {
        "token": os.environ.get(TOKEN, ""),
        "prompt": " ".join(sys.argv[1:]),
        # ssh says with this that it wants a yes or no ("confirm"), or nothing at all ("none").
        "kind": os.environ.get("SSH_ASKPASS_PROMPT", ""),
        "asker": os.getppid(),
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(TIMEOUT)
        try:
            connection.connect(os.environ[SOCKET])
            connection.sendall(json.dumps(question).encode("ascii") + b"\n")
            reply = b"".join(iter(lambda: connection.recv(4096), b""))
            answer, end = json.loads(reply)
        except (OSError, KeyError, ValueError):
            return 1
    if end and os.getppid() == question["asker"]:
        os.kill(question["asker"], signal.SIGTERM)
    if answer is None:
        return 1
    sys.stdout.buffer.write(answer.encode("utf-8", "surrogateescape") + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
