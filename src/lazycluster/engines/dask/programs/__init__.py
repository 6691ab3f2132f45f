"""The programs of a Dask cluster: they run elsewhere, where lazycluster is not installed.

Their modules are sent as text and import nothing of lazycluster but each other. They read their settings as one line
of JSON from standard input, never from arguments or files, since these hold the keys of the cluster; and they say how
they are with lines on standard output that start with `common.MARKER`.
"""
