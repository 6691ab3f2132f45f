"""JSON as the agent needs it, without the package `json`: importing that takes as long as starting Python.

Used on both sides.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Dict

try:
    _fast: Any = import_module("_json")  # what `json` itself works with
except ImportError:  # not CPython
    _fast = None


def dumps(value: Any) -> bytes:
    """Return a value as JSON without spaces, in ASCII.

    Raises:
        TypeError: It holds something that JSON has no form for.
    """
    if _fast is None:
        import json

        return json.dumps(value, separators=(",", ":")).encode("ascii")
    encode = _fast.make_encoder(None, _refuse, _fast.encode_basestring_ascii, None, ":", ",", False, False, True)
    return "".join(encode(value, 0)).encode("ascii")


def loads(data: bytes) -> Any:
    """Return the value that JSON stands for. Lone surrogates (undecodable file names) survive the round trip.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested too deeply.
    """
    text = data.decode("utf-8", "surrogatepass").strip(" \t\r\n")
    if _fast is None:
        import json

        return json.loads(text)
    try:
        value, end = _fast.make_scanner(_Rules())(text, 0)
    except StopIteration:
        raise ValueError("no value begins there") from None
    if end != len(text):
        raise ValueError("something follows the value, from character {} on".format(end))
    return value


class _Rules:
    """Settings that the scanner asks for: those of `json.loads`."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, float
    memo: Dict[str, str] = {}


def _refuse(value: Any) -> Any:
    raise TypeError("JSON has no form for {!r:.60}".format(value))
