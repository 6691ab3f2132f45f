"""Tells the database that a worker lives, as long as it does.

A process of its own, since the one that evaluates may hold its interpreter for hours, and the one that watches it must
have a single thread.
"""

from __future__ import annotations

import time
from typing import Any, NoReturn

from ....cluster.sent import messages
from . import compat, trials

compat.load()
from pymongo import MongoClient  # noqa: E402  (compat says first what is missing)
from pymongo.errors import PyMongoError  # noqa: E402


def beat(settings: dict[str, Any]) -> NoReturn:
    """Renew the leases of a worker's trials for ever: what is counted needs no clocks that agree."""
    login = {"username": settings["user"], "password": settings["password"]} if settings["user"] else {}
    limit = int(1000 * settings["lease"])
    client: Any = MongoClient(
        messages.LOOPBACK,
        settings["port"],
        directConnection=True,
        serverSelectionTimeoutMS=limit,
        socketTimeoutMS=limit,
        **login,
        **compat.tls_options(messages.LOOPBACK, settings["port"]),
    )
    mine = {"state": trials.RUNNING, "owner": settings["name"]}
    while True:
        time.sleep(settings["lease"] / trials.BEATS)
        try:
            client[settings["dbname"]].jobs.update_many(mine, {"$inc": {"lease": 1}})
        except PyMongoError:
            continue  # if that lasts, the leases end
