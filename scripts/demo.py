"""Brings up hosts, runs the examples on them, and looks at what they left there."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from sshhosts import Hosts

EXAMPLES = [Path(__file__).parent.parent / "examples" / name for name in ("model_search.py", "hyperopt_search.py")]


def main() -> int:
    """Run the demonstration; returns the exit status."""
    start = time.perf_counter()
    print("-- Bring up three SSH hosts with nothing but sshd and Python, behind a bastion", flush=True)
    with Hosts(3, bastion=True) as hosts:
        print(f"   {', '.join(hosts.names)}: {time.perf_counter() - start:.2f} s", flush=True)
        failed = 0
        for example in EXAMPLES:
            print(f"== {example.parent.name}/{example.name}", flush=True)
            failed |= subprocess.run([sys.executable, str(example), str(hosts.config_file)], check=False).returncode
        deadline = time.monotonic() + 5
        while (left := [entry for host in hosts.all for entry in host.leftovers()]) and time.monotonic() < deadline:
            time.sleep(0.05)
    print("-- Look at what is left on the hosts: processes, temporary files, listening ports")
    print("   " + ("\n   ".join(left) or "nothing"))
    print(f"-- All done in {time.perf_counter() - start:.1f} s")
    return 1 if left or failed else 0


if __name__ == "__main__":
    sys.exit(main())
