"""A client of a Dask cluster whose hosts have the present version of the user's own modules before they need it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distributed import Client

if TYPE_CHECKING:
    from .local_modules import LocalModules

__all__ = ["UpToDateClient", "be_patient"]

_BACK = 30.0  # seconds for a scheduler that is started again; distributed's own default


class UpToDateClient(Client):  # type: ignore[misc]
    """A client that has changed modules sent before it submits work.

    Args:
        address: See `distributed.Client`.
        modules: The user's own modules on the hosts.
        **options: See `distributed.Client`.
    """

    def __init__(self, address: Any, modules: LocalModules, **options: Any) -> None:
        self._local_modules = modules
        self._version = modules.version
        super().__init__(address, **options)
        be_patient(self)

    def _graph_to_futures(self, *arguments: Any, **options: Any) -> Any:
        # What submits work, in whatever way, comes through here. Without this method a change is noticed later.
        version = self._local_modules.sync_now()
        if version != self._version and not self.asynchronous:
            self._version = version
            self._refresh()
        return super()._graph_to_futures(*arguments, **options)

    def _refresh(self) -> None:
        def refresh() -> None:  # in a function, so that it goes by value: the hosts have nothing of this package
            from importlib import import_module

            import_module("lazycluster_dask.sent_modules").refresh()

        self.run(refresh, on_error="ignore")  # what fails has gone, and starts with the present version
        self.run_on_scheduler(refresh)


def be_patient(client: Client) -> None:
    """Have a client wait for a scheduler that is started again, however short the time was to connect at first."""
    client._timeout = max(client._timeout, _BACK)
