"""The name by which pickles refer to `SearchProgress`."""

from __future__ import annotations

from lazycluster.engines.hyperopt.progress import SearchProgress

__all__ = ["SearchProgress"]
