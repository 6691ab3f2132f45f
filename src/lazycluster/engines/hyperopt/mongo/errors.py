"""Errors of commands, with MongoDB's own codes."""

from __future__ import annotations

from typing import Any

_NAMES = {
    2: "BadValue",
    9: "FailedToParse",
    13: "Unauthorized",
    14: "TypeMismatch",
    18: "AuthenticationFailed",
    20: "IllegalOperation",
    26: "NamespaceNotFound",
    27: "IndexNotFound",
    28: "PathNotViable",
    40: "ConflictingUpdateOperators",
    43: "CursorNotFound",
    52: "DollarPrefixedFieldName",
    53: "InvalidIdField",
    59: "CommandNotFound",
    66: "ImmutableField",
    73: "InvalidNamespace",
    85: "IndexOptionsConflict",
    115: "CommandNotSupported",
    8: "UnknownError",
    334: "MechanismUnavailable",
    10334: "BSONObjectTooLarge",
    11000: "DuplicateKey",
    14031: "OutOfDiskSpace",
    22: "InvalidBSON",
    40415: "UnknownField",
    40324: "UnrecognizedStage",
    171: "CannotIndexParallelArrays",
}


class CommandError(Exception):
    """A command that failed.

    Attributes:
        code: MongoDB's number of the error.
        message: What is wrong.
        fields: Further fields of the answer.
    """

    def __init__(self, code: int, message: str, **fields: Any) -> None:
        self.code = code
        self.message = message
        self.fields = fields
        super().__init__(message)

    def reply(self) -> dict[str, Any]:
        """Return the answer to the command."""
        return {
            "ok": 0.0,
            "errmsg": self.message,
            "code": self.code,
            "codeName": _NAMES.get(self.code, "UnknownError"),
            **self.fields,
        }


def bad_value(message: str) -> CommandError:
    """Return the error for a value that cannot be used."""
    return CommandError(2, message)


def failed_to_parse(message: str) -> CommandError:
    """Return the error for a part of a command that is not understood."""
    return CommandError(9, message)
