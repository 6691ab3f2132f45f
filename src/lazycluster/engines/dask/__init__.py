"""Dask: https://distributed.dask.org."""
