"""From a list of SSH hosts to a running Dask or Hyperopt cluster in a few lines."""

__version__ = "0.1.0"
