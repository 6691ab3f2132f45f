"""What the panel of dask-labextension does: labextension.py CONFIG_FILE HOST[,HOST...]; prints JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import dask.config
from dask_labextension.manager import DaskClusterManager

CONFIG, HOSTS = sys.argv[1], sys.argv[2]


async def steps() -> dict[str, Any]:
    """Make a cluster, scale it, adapt it, list it, and end it."""
    found: dict[str, Any] = {}
    longest, turning = 0.0, True

    async def turn() -> None:
        nonlocal longest
        while turning:
            began = asyncio.get_running_loop().time()
            await asyncio.sleep(0.01)
            longest = max(longest, asyncio.get_running_loop().time() - began)

    turns = asyncio.ensure_future(turn())
    async with DaskClusterManager() as manager:
        model = await manager.start_cluster()
        turning = False
        await turns
        found["made"], found["longest pause of the event loop"] = model, longest
        for _ in range(300):  # the panel asks again and again
            model = manager.get_cluster(model["id"])
            if model["workers"] == 2:
                break
            await asyncio.sleep(0.1)
        found["listed"] = manager.list_clusters()
        found["scaled"] = await manager.scale_cluster(model["id"], 1)
        found["adapted"] = manager.adapt_cluster(model["id"], 1, 2)
        found["ended"] = await manager.close_cluster(model["id"])
    return found


def main() -> None:
    """Do so with a configuration as the documentation shows it."""
    group = {"connection-kwargs": {"config_file": CONFIG}, "python": sys.executable}
    dask.config.set(
        {
            "labextension.factory.module": "lazycluster.cluster.dask_cluster",
            "labextension.factory.class": "ssh_cluster",
            "labextension.factory.args": [HOSTS],
            "labextension.factory.kwargs": {
                "worker-count": 2,
                "nthreads": 1,
                "group": {key.replace("-", "_"): value for key, value in group.items()},
            },
        }
    )
    print(json.dumps(asyncio.run(steps())))


if __name__ == "__main__":
    main()
