"""The programs of a Dask cluster: they run elsewhere, where lazycluster is not installed.

Their modules are sent as text, below a root package of another name: of lazycluster they import nothing but each other
and what `engine` names beside them, and all that by relative imports. They read their settings as one line of JSON
from standard input, never from arguments or files, since these hold the keys of the cluster; and they say how they are
with lines on standard output that start with `MARKER`: see `lazycluster.cluster.sent.messages`.
"""
