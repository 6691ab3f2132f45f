"""Processes as the program `ps` tells of them: for systems without /proc."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Dict, List

_PARENT, _STARTED = 1, 19  # among the fields of /proc/PID/stat behind the name


def fields(*selection: str) -> Dict[int, List[bytes]]:
    """Return for each process what `processes.stat_fields` returns, as far as it is used: state, parent, start.

    Args:
        *selection: Options of `ps` that select processes.
    """
    environment = dict(os.environ, LC_ALL="C")
    argv = ["ps", *selection, "-o", "pid=,ppid=,stat=,lstart="]
    try:
        ps = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    except OSError:
        return {}
    found: Dict[int, List[bytes]] = {}
    for line in ps.communicate()[0].splitlines():
        words = line.split()
        if len(words) == 8 and int(words[0]) != ps.pid:
            started = time.mktime(time.strptime(b" ".join(words[3:]).decode(), "%a %b %d %H:%M:%S %Y"))
            one = [words[2][:1]] + [b"0"] * _STARTED
            one[_PARENT], one[_STARTED] = words[1], b"%d" % started
            found[int(words[0])] = one
    return found
