"""Run the benchmarks side by side with other tools, and print one table.

Usage: python benchmarks/run.py [tasks connect files tunnels dask ...]   (all by default)

Needs root (for throw-away hosts) and what `pip install --group bench` brings. The machine's noise is in all figures:
the ratios of one run say more than the seconds.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main(names: list[str]) -> int:
    known = sorted(path.stem[len("bench_") :] for path in Path(__file__).parent.glob("bench_*.py"))
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)} (there are: {', '.join(known)})")
        return 2
    missed = 0
    for name in names or known:
        print(f"== {name}", flush=True)
        for row in importlib.import_module(f"bench_{name}").rows():
            print(row, flush=True)
            missed += row.met is False
    print(f"{missed} targets missed" if missed else "all targets met")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
