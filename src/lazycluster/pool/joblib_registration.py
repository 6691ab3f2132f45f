"""Registration of joblib's backend "lazycluster", whichever of the two is imported first; without importing joblib."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["announce"]

_WHERE = "joblib.parallel"


def announce() -> None:
    """Register the backend, now or when joblib is imported."""
    loaded = sys.modules.get(_WHERE)
    if loaded is not None and hasattr(loaded, "register_parallel_backend"):
        _register(loaded)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register(module: Any) -> None:
    def register() -> None:
        module.register_parallel_backend("lazycluster", _backend)

    # Among the backends that joblib registers when they are named, as its own one for Dask, where it knows of such.
    external = getattr(module, "EXTERNAL_BACKENDS", None)
    if isinstance(external, dict):
        external["lazycluster"] = register
    else:
        register()


def _backend(**options: Any) -> Any:
    from .joblib_backend import LazyclusterBackend

    return LazyclusterBackend(**options)


class _Watcher:
    """Finds one module as the others do, and registers the backend when it has been run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find `joblib.parallel`."""
        if name != _WHERE:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                self._watch(spec.loader)
                return spec
        return None

    @staticmethod
    def _watch(loader: Any) -> None:
        run = loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            _register(module)

        loader.exec_module = exec_module
