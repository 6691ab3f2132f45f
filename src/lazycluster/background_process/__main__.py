"""The program of a cluster's own process; it is told everything on standard input, a socket to whoever starts it."""

import sys

if __name__ == "__main__":
    del sys.path[0]  # the directory of this file, whose modules would hide others

    import json
    import os
    import signal

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    received = b""
    while b"\n" not in received:
        part = os.read(0, 65536)
        if not part:
            sys.exit("whoever has started this process has gone before it said what to do")
        received += part
    line, _, rest = received.partition(b"\n")
    document = json.loads(line)
    sys.path += [path for path in document["path"] if path not in sys.path]

    from lazycluster.background_process.program import main

    sys.exit(main(document, rest))
