"""Documents as bytes and as Python values, such that both mean the same."""

from __future__ import annotations

from typing import Any

import bson
from bson.codec_options import CodecOptions
from bson.errors import InvalidBSON
from bson.raw_bson import RawBSONDocument

from .errors import CommandError

LARGEST = 16 * 1024 * 1024
_SLACK = 16 * 1024  # what a command may add to the largest document

try:
    from bson.codec_options import DatetimeConversion
except ImportError:  # an older bson, which refuses dates outside Python's range
    _OPTIONS: Any = CodecOptions(tz_aware=False)
else:
    _OPTIONS = CodecOptions(tz_aware=False, datetime_conversion=DatetimeConversion.DATETIME_AUTO)


def decode(data: bytes) -> dict[str, Any]:
    """Return the document in bytes.

    Raises:
        CommandError: If it is none.
    """
    try:
        return bson.decode(data, _OPTIONS)
    except (InvalidBSON, RecursionError, OverflowError) as error:
        raise CommandError(22, f"this is not BSON: {error}") from None


def encode(document: dict[str, Any]) -> bytes:
    """Return a document as bytes."""
    return bson.encode(document, codec_options=_OPTIONS)


def raw(body: bytes) -> RawBSONDocument:
    """Return a document that becomes part of an answer as it is."""
    return RawBSONDocument(body)


def check_size(body: bytes) -> None:
    """Refuse a document that is too large.

    Raises:
        CommandError: If it is.
    """
    if len(body) > LARGEST:
        raise CommandError(10334, f"the document has {len(body)} bytes, more than {LARGEST}")
