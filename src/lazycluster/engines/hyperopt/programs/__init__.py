"""Programs of Hyperopt clusters, which run elsewhere, where lazycluster is not installed.

They are sent as text: of lazycluster they import nothing but each other and what `engine` names beside them.

`compat` is also used on the manager.
"""

from __future__ import annotations
