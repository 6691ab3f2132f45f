"""Pickling of code with the name of its file, which tracebacks, logs, warnings and `inspect.getsource` look up.

cloudpickle 3.1.3 writes `<dynamic-code>` in its place. Whoever reads these pickles needs the standard library only.
"""

from __future__ import annotations

import functools
import io
import types
from typing import Any, Callable, Dict, Mapping, Optional


class _UnnamedCode:
    """A code object that is written as the pickling library does, without the name of its file."""

    def __init__(self, code: types.CodeType) -> None:
        self.code = code


class FileNames:
    """A pickler that keeps the file names of code: to be named before `cloudpickle.Pickler` among the base classes."""

    dispatch_table: Mapping[type, Callable[[Any], Any]]

    def reducer_override(self, obj: Any) -> Any:
        """Write code as the library does, and the name of its file beside it."""
        if type(obj) is types.CodeType:
            return self._named(obj.co_filename), (_UnnamedCode(obj.replace(co_filename="")),)
        if type(obj) is _UnnamedCode:
            return self.dispatch_table[types.CodeType](obj.code)
        return super().reducer_override(obj)  # type: ignore[misc]

    def _named(self, name: str) -> Any:
        """Return what gives code the name of a file: one object for each name, so that each is written once."""
        known: Dict[str, Any] = self.__dict__.setdefault("_names_of_files", {})
        if name not in known:
            # A copy, so that the bytes do not depend on who else refers to this very string.
            known[name] = functools.partial(types.CodeType.replace, co_filename="".join(list(name)))
        return known[name]


def dumps(obj: Any, protocol: Optional[int] = None, buffer_callback: Optional[Callable[[Any], Any]] = None) -> bytes:
    """Do what `cloudpickle.dumps` does, and keep the file names of code."""
    with io.BytesIO() as file:
        _pickler()(file, protocol=protocol, buffer_callback=buffer_callback).dump(obj)
        return file.getvalue()


@functools.lru_cache(maxsize=1)
def _pickler() -> Any:
    import cloudpickle

    return type("Pickler", (FileNames, cloudpickle.Pickler), {})
