"""`LocalRuntime`: the manager's own machine as a runtime."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lazycluster.core import event_loop

from .runtime import Runtime
from .session import HostSpec, connect

__all__ = ["LocalRuntime"]


class LocalRuntime(Runtime):
    """This very machine as a runtime, without ssh: for those who have no host yet, and for tests.

    Args:
        working_dir: See :class:`Runtime`.
        python: See :class:`Runtime`; by default the manager's own interpreter.
        setup: See :class:`Runtime`.
        env: See :class:`Runtime`.
        shell: See :class:`Runtime`.
        host: The name that it goes by.
        environment: See :class:`Runtime`.
        startup_files: See :class:`Runtime`.
        address: See :class:`Runtime`.

    Examples:
        >>> with LocalRuntime() as runtime:        # doctest: +SKIP
        ...     print(runtime.call(sum, [1, 2, 3]))
        6
    """

    def __init__(
        self,
        working_dir: str | None = None,
        *,
        python: str | None = None,
        setup: str | None = None,
        env: Mapping[str, Any] | None = None,
        shell: str | None = None,
        host: str = "localhost",
        environment: Any = None,
        startup_files: str = "once",
        address: str | None = None,
    ) -> None:
        own = sys.executable if python is None and setup is None else python
        more = {"environment": environment, "startup_files": startup_files, "address": address}
        spec = HostSpec(host, working_dir, None, own, setup, env or {}, shell, True, **more)
        self._begin(event_loop.run(connect(spec)))
