"""From a list of SSH hosts to a running Dask or Hyperopt cluster in a few lines."""

from lazycluster.runtime_mgmt import RuntimeGroup, RuntimeManager
from lazycluster.runtimes import LocalRuntime, Runtime, RuntimeTask
from lazycluster.utils import Environment

__all__ = [
    "Environment",
    "LocalRuntime",
    "Runtime",
    "RuntimeGroup",
    "RuntimeManager",
    "RuntimeTask",
    "__version__",
]

__version__ = "0.1.0"
