"""Programs of Hyperopt clusters, which run elsewhere: they are sent as text, so they import nothing else of ours.

`compat` is also used on the manager.
"""

from __future__ import annotations
