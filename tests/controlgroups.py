"""Control groups of the kernel's first kind, which limit what the processes of a test host may use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from patience import until


class ControlGroupsUnavailableError(Exception):
    """No control group can be made here."""


@contextlib.contextmanager
def control_group(kind: str, number: int) -> Iterator[Path]:
    """A control group of its own for processes of a host; those that are left are put back.

    Raises:
        ControlGroupsUnavailableError: If none can be made.
    """
    group = Path(f"/sys/fs/cgroup/{kind}/lazycluster-test-{os.getpid()}-{number}")
    try:
        group.mkdir()
    except OSError as error:
        raise ControlGroupsUnavailableError(f"no control group can be made here: {error}") from error

    def emptied() -> bool:
        left = (group / "cgroup.procs").read_text().split()
        move(left, group.parent)
        return not left

    try:
        yield group
    finally:
        until(emptied, "the control group to be empty")
        group.rmdir()


def move(pids: Iterable[int | str], group: Path) -> None:
    """Put processes into a group; those that have ended meanwhile are passed over."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            (group / "cgroup.procs").write_text(str(pid))
