"""An extension of griffe: roles such as :class:`Runtime` in docstrings become links."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(class|meth|attr|func|mod|exc|data):`(~?)([\w.]+)`")
_PUBLIC = {
    name: f"lazycluster.{module}.{name}"
    for module, names in {
        "runtimes": ("Runtime", "LocalRuntime", "RuntimeTask"),
        "runtime_mgmt": ("RuntimeGroup", "RuntimeManager"),
        "utils": ("Environment",),
    }.items()
    for name in names
}


class Roles(griffe.Extension):
    """Replaces roles by links where there is a target, else by the plain name."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object once it is made."""
        if obj.docstring is not None:
            owner = obj.name if obj.is_class else obj.parent.name if obj.parent is not None else ""
            obj.docstring.value = _ROLE.sub(lambda found: _link(found, owner), obj.docstring.value)


def _link(found: re.Match[str], owner: str) -> str:
    kind, short, path = found[1], found[2], found[3]
    shown = path.rsplit(".", 1)[-1] if short else path
    if kind == "meth":
        shown += "()"
    parts = path.removeprefix("lazycluster.").split(".")
    if len(parts) == 1 and kind in ("meth", "attr"):
        parts = [owner, *parts]
    target = ".".join([_PUBLIC.get(parts[0], parts[0]), *parts[1:]])
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'
