"""Errors about files, in programs that are sent: whose files they are about."""

from __future__ import annotations


def name_host(error: BaseException, host: str) -> None:
    """Have an error about a file, and what it came of, say on which host it looked for it.

    Args:
        error: The error.
        host: The name of this host.
    """
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        seen.append(found)
        if isinstance(found, OSError) and found.filename is not None and isinstance(found.strerror, str):
            mark = f" on {host}"
            if not found.strerror.endswith(mark):
                found.strerror += mark
                found.args = (found.errno, found.strerror)  # which is what it is pickled with
        found = found.__cause__
