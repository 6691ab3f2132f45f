"""Runtimes: hosts on which tasks are executed."""

from .runtime.local import LocalRuntime
from .runtime.runtime import Runtime
from .tasks.task import RuntimeTask

__all__ = ["LocalRuntime", "Runtime", "RuntimeTask"]
