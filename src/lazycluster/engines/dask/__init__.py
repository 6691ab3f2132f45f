"""Clusters of Dask, https://distributed.dask.org; `programs` has what runs elsewhere."""
