"""The JSON schema of ``cluster.toml``, by which editors complete and check it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lazycluster import engines
from lazycluster.cluster.exceptions import ClusterError

from .keys import HOST_KEYS, TOP_KEYS, Key, Kind, option_key

__all__ = ["schema"]

_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
_TABLE = {"type": "object"}
_KINDS: dict[Kind, dict[str, Any]] = {
    "text": _TEXT,
    "texts": _TEXTS,
    "paths": _TEXTS,
    "jump": _TEXTS,
    "count": {"type": "integer", "minimum": 1},
    "port": {"type": "integer", "minimum": 1, "maximum": 65535},
    "number": {"type": "number", "minimum": 0},
    "duration": {"anyOf": [_TEXT, {"type": "number", "exclusiveMinimum": 0}]},
    "ssh": {"anyOf": [_TABLE, {"type": "array", "items": _TEXT}]},
    "env": {"type": "object", "additionalProperties": {"type": ["string", "number"]}},
    "environment": {"anyOf": [*_TEXTS["anyOf"], {"type": "object", "required": ["source"]}]},
    "groups": {"type": "object", "additionalProperties": _TEXTS},
    "hosts": _TABLE,
    "options": _TABLE,
}


def schema(names: Iterable[str] | None = None) -> dict[str, Any]:
    """Return the schema.

    Args:
        names: The engines that the file may name; by default those that are installed.
    """
    stated = {name: _options_of(name) for name in (engines.known() if names is None else names)}
    document = _object(TOP_KEYS)
    properties = document["properties"]
    properties["engine"] = {**properties["engine"], "enum": list(stated)}
    properties["host"] |= {"additionalProperties": _object(HOST_KEYS)}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A lazycluster cluster",
        **document,
        "required": ["engine", "hosts"],
        "allOf": [
            {
                "if": {"properties": {"engine": {"const": name}}, "required": ["engine"]},
                "then": {"properties": {"options": _object(keys)}},
            }
            for name, keys in stated.items()
            if keys is not None
        ],
    }


def _options_of(name: str) -> list[Key] | None:
    """Return the keys for the options of an engine; None if it cannot be loaded."""
    try:
        return [option_key(option) for option in engines.load(name).engine_class.options]
    except (ClusterError, ImportError):
        return None


def _object(keys: Iterable[Key]) -> dict[str, Any]:
    properties = {key.name: _property(key) for key in keys if key.trust != "never"}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _property(key: Key) -> dict[str, Any]:
    text = key.help
    if key.trust == "needed":
        text += f" Needs --trust, except for {key.safe}." if key.safe else " Needs --trust."
    choices = {"enum": list(key.choices)} if key.choices else {}
    return {**_KINDS[key.kind], **choices, "description": text}
