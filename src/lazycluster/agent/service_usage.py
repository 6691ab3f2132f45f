"""What the services of this agent use of the host, cheap enough to be asked every second."""

from __future__ import annotations

import os
import time

from . import services
from .processes import family, start_time, stat_fields

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional

    from .session import RequestChannel

_KEPT = 0.5  # seconds for which an answer is good, at least: a shorter time tells little of processors
_SHARE = 0.01  # of a processor is spent on this at most: what took long is kept for longer

_answer: Dict[str, Any] = {}
_good_until = 0.0


def usage(channel: RequestChannel) -> None:
    """Handle the request `usage`: what each service of this agent, with all that it has started, uses of the host.

    Nothing is asked for by number: an agent tells of no process but those that its own manager has had started. The
    answer has for each service the ticks of the processors since it began, and the bytes of memory.
    """
    global _answer, _good_until
    now = time.monotonic()
    if now >= _good_until:
        began = time.process_time()
        found = {str(pid): measured(pid, started) for pid, started in services.running.items()}
        _answer = {"services": found, "time": now, "hertz": os.sysconf("SC_CLK_TCK")}
        _good_until = now + max(_KEPT, (time.process_time() - began) / _SHARE)
    channel.result(**_answer)


def measured(pid: int, started: Optional[int]) -> List[int]:
    """Return the ticks of the processors and the bytes of memory that a process and its descendants have used.

    The ticks of descendants that have ended are in them, once their parents know of it.

    Args:
        pid: The process.
        started: When it started: if the number belongs to another one by now, there is nothing to tell.
    """
    ticks = pages = 0
    if started is not None and start_time(pid) == started:
        for one in family(pid):
            fields = stat_fields(one)
            if fields:
                ticks += sum(int(number) for number in fields[11:15])
                pages += int(fields[21])
    return [ticks, pages * os.sysconf("SC_PAGE_SIZE")]
