"""Brings up hosts, runs the examples on them, and looks at what they left there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from sshhosts import Hosts

TOP = Path(__file__).parent.parent
EXAMPLES = [TOP / "examples" / name for name in ("model_search.py", "hyperopt_search.py")]
NEXT = """
== What to type next
   # your own hosts, those of ~/.ssh/config: which can be used, and why not
   {bin}lazycluster list-runtimes -l
   # what one of them lacks for functions and clusters, and how to get it
   {bin}lazycluster doctor HOST
   # the first part of this on all of them
   {bin}python {examples}model_search.py
   # no hosts? three like these, which stay
   {scripts}hosts up 3
   # then read on in docs/tutorials/first-cluster.md"""


def main() -> int:
    """Run the demonstration; returns the exit status."""
    start = time.perf_counter()
    print("-- Bring up three SSH hosts with sshd and Python alone, behind a bastion", flush=True)
    with Hosts(3, bastion=True) as hosts:
        print(f"   {', '.join(hosts.names)}: {time.perf_counter() - start:.2f} s", flush=True)
        failed = 0
        for example in EXAMPLES:
            print(f"\n== {example.parent.name}/{example.name}", flush=True)
            failed |= subprocess.run([sys.executable, str(example), str(hosts.config_file)], check=False).returncode
        deadline = time.monotonic() + 5
        while (left := [entry for host in hosts.all for entry in host.leftovers()]) and time.monotonic() < deadline:
            time.sleep(0.05)
    print("\n== What is left on the hosts: processes, temporary files, listening ports")
    print("   " + ("\n   ".join(left) or "nothing"))
    print("\n== About the times")
    cores = len(os.sched_getaffinity(0))
    print(f"   The hosts are all this machine, and share its {cores} cores: but for chance they")
    print("   cannot be faster than it is alone, and each worker first imports scikit-learn.")
    print("   Each host of your own adds its cores.")
    if not (left or failed):
        print(
            NEXT.format(
                bin=below(Path(sys.prefix, "bin")), examples=below(TOP / "examples"), scripts=below(TOP / "scripts")
            )
        )
    print(f"\n== All done in {time.perf_counter() - start:.1f} s")
    return 1 if left or failed else 0


def below(folder: Path) -> str:
    """Return how a folder is written from where this was started."""
    here = Path.cwd()
    return f"{folder.relative_to(here) if folder.is_relative_to(here) else folder}/"


if __name__ == "__main__":
    sys.exit(main())
