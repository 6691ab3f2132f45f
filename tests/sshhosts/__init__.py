"""Throw-away SSH hosts for tests, the demo, the benchmarks, and anyone who wants to try.

Each host is a real OpenSSH server in namespaces of its own: address, loopback, ports, hostname, processes, /tmp, home.

    with Hosts(3) as hosts:
        subprocess.run(["ssh", "-F", hosts.config_file, "host1", "hostname"])
"""

from sshhosts.host import Host
from sshhosts.hosts import LIVE, Hosts, make_keys, remove_stale, require_namespaces
from sshhosts.network import own_network
from sshhosts.options import PASSWORD, HostsFailedError, HostsUnavailableError, Options, find_python

__all__ = [
    "LIVE",
    "PASSWORD",
    "Host",
    "Hosts",
    "HostsFailedError",
    "HostsUnavailableError",
    "Options",
    "find_python",
    "make_keys",
    "own_network",
    "remove_stale",
    "require_namespaces",
]
