"""Pickling of functions by distributed, with the names of their files. Also used on the manager."""

from __future__ import annotations

import types
from collections.abc import Callable

import cloudpickle
from distributed.protocol import pickle


def keep_file_names(dumps: Callable[..., bytes]) -> None:
    """Have distributed keep the names of files in functions that it pickles, for the tracebacks that clients show.

    Args:
        dumps: What does so in place of `cloudpickle.dumps`.
    """
    pickle.cloudpickle = types.SimpleNamespace(**{**vars(cloudpickle), "dumps": dumps})
