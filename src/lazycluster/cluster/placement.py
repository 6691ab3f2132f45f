"""On which hosts workers are started."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lazycluster.exceptions import LazyclusterError, NoAnswerError

from .exceptions import ClusterError
from .worker_hosts import WorkerHost, usable

__all__ = ["Gpus", "capacity", "round_robin"]

logger = logging.getLogger("lazycluster")

_ANSWER_LIMIT = 30.0


@dataclass(frozen=True)
class Gpus:
    """Share of each worker in the GPUs of its host, for itself.

    Attributes:
        count: How many.
        idle: Whether those are left alone that others use.

    Raises:
        ValueError: If it makes no sense.
    """

    count: int
    idle: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"gpus_per_worker must be an integer of at least 1, not {self.count!r}")


def round_robin(
    places: Sequence[WorkerHost], count: int, present: Mapping[str, int], room: Mapping[str, int] | None = None
) -> list[WorkerHost]:
    """Return the places of some new workers: each where there are the fewest, in the group's order.

    Args:
        places: The hosts.
        count: How many workers there are to be started.
        present: How many each host has already.
        room: How many more each host can have; None: any number.

    Raises:
        ClusterError: If the hosts have no room for so many.
    """
    if room is not None:
        places = [place for place in places if room.get(place.host)]
        if (most := sum(room[place.host] for place in places)) < count:
            told = ", ".join(f"{place.host}: {room[place.host]}" for place in places)
            raise ClusterError(
                f"the GPUs of the hosts suffice for {most} more workers ({told or 'none'}), but {count} are asked for"
            )
    numbers = {place.host: present.get(place.host, 0) for place in places}
    left = dict(room) if room is not None else {}
    chosen = []
    for _ in range(count):
        open_ones = [place for place in places if room is None or left[place.host]]
        place = min(open_ones, key=lambda place: numbers[place.host])
        numbers[place.host] += 1
        if room is not None:
            left[place.host] -= 1
        chosen.append(place)
    return chosen


async def capacity(places: Sequence[WorkerHost], gpus: Gpus, present: Mapping[str, int]) -> dict[str, int]:
    """Return for each host how many more workers its GPUs suffice for. Logs which hosts are left out, and why.

    Args:
        places: The hosts; those with a problem are passed over.
        gpus: What each worker gets.
        present: How many workers each host has already.

    Raises:
        ClusterError: If there is no host with a worker, or room for one.
    """
    asked = usable(places)
    answers = await asyncio.gather(*(_ask(place, gpus) for place in asked))
    found: dict[str, int] = {}
    why: dict[str, str] = {place.host: str(place.problem) for place in places if place.problem is not None}
    for place, answer in zip(asked, answers, strict=True):
        if isinstance(answer, str):
            why[place.host] = answer
            continue
        free = [gpu for gpu in answer["gpus"] if not gpu["owner"] and not (gpus.idle and gpu["busy"])]
        found[place.host] = len(free) // gpus.count
        if not found[place.host] and not present.get(place.host):
            why[place.host] = _why_not(answer, len(free), gpus)
    if not any(found.values()) and not any(present.values()):
        lines = [f"  {host}: {reason}" for host, reason in why.items()]
        raise ClusterError(
            "\n".join(
                [
                    f"each worker is to have {gpus.count} GPU{'s' * (gpus.count > 1)}, but no host has that:",
                    *lines,
                    "  Next step: see what nvidia-smi says there, or leave out gpus_per_worker",
                ]
            )
        )
    for host, reason in why.items():
        logger.warning("%s: gets no worker: %s", host, reason)
    return found


async def _ask(place: WorkerHost, gpus: Gpus) -> dict[str, Any] | str:
    try:
        return await place.connection.request("gpus", within=_ANSWER_LIMIT, env=dict(place.env), idle=gpus.idle)
    except NoAnswerError:
        return f"it did not tell its GPUs within {_ANSWER_LIMIT:g} s"
    except LazyclusterError as error:
        return str(error)


def _why_not(answer: Mapping[str, Any], free: int, gpus: Gpus) -> str:
    if not answer["gpus"]:
        return f"it has no GPU ({answer['problem']})" if answer["problem"] else "it has no GPU"
    taken = [f"{gpu['id']}: {gpu['owner'] or gpu['busy']}" for gpu in answer["gpus"] if gpu["owner"] or gpu["busy"]]
    of = f" ({'; '.join(taken)})" if taken else ""
    return f"{free} of its {len(answer['gpus'])} GPUs can be used{of}, {gpus.count} are needed"
