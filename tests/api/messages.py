"""The texts in the sources that people see: messages of errors, of logs, and all others of more than one word."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "src" / "lazycluster"

_LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
_RAISED = re.compile(r"(Error|Exception|Exit|Warning|Abort|UsageError|BadParameter|ClickException)$")
_FIELD = re.compile(r"\{[^{}]*\}")  # of str.format
_HOLE = "{}"
_WORD = re.compile(r"[^\W\d_]{2}")


def lines() -> list[str]:
    """Return one line for each text: the kind of error or the level of the log, if it has one, and the text."""
    found: set[str] = set()
    for path in sorted(SOURCES.rglob("*.py")):
        found.update(_Texts(ast.parse(path.read_text(encoding="utf-8"))).found())
    return sorted(found)


class _Texts:
    """The texts of a module. What is nested in another text's placeholders counts as a text of its own."""

    def __init__(self, tree: ast.Module) -> None:
        self._tree = tree
        self._skipped = set(_docstrings(tree))

    def found(self) -> Iterator[str]:
        yield from self._visit(self._tree, "", "")

    def _visit(self, node: ast.AST, kind: str, within: str) -> Iterator[str]:
        if id(node) in self._skipped:
            return
        if isinstance(node, ast.ClassDef):
            within = node.name
        text = template(node)
        if text is not None:
            if len(text.split()) > 1 and _WORD.search(text) and not _is_program(text):
                yield f"{kind or 'text'}: {json.dumps(text, ensure_ascii=False)}"
            for part in _inner(node):
                yield from self._visit(part, "", within)
            return
        if isinstance(node, ast.Call):
            kind = _kind(node, within)
        elif not isinstance(node, (ast.IfExp, ast.BinOp, ast.BoolOp, ast.keyword, ast.Starred)):
            kind = ""  # a text that is only a part of an expression belongs to the call that the expression is in
        for child in ast.iter_child_nodes(node):
            yield from self._visit(child, kind, within)


def _is_program(text: str) -> bool:
    """Whether a text is SQL or Python: it is in a file that is sent, and nobody reads it."""
    return text.count("\n") > 3 and ("import " in text or "CREATE TABLE" in text)


def _docstrings(tree: ast.AST) -> Iterator[int]:
    """Yield the docstrings, and the texts that stand alone: they describe attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and template(node.value) is not None:
            yield id(node.value)


def template(node: ast.AST) -> str | None:
    """Return the template that an expression stands for, None if it is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = (str(part.value) if isinstance(part, ast.Constant) else _HOLE for part in node.values)
        return "".join(parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template(node.left), template(node.right)
        if left is not None or right is not None:
            return (_HOLE if left is None else left) + (_HOLE if right is None else right)
    if _is_format(node):
        return _FIELD.sub(_HOLE, node.func.value.value)  # type: ignore[attr-defined]
    return None


def _is_format(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "format"
        and isinstance(node.func.value, ast.Constant)
        and isinstance(node.func.value.value, str)
    )


def _inner(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the expressions in a text's placeholders."""
    if isinstance(node, ast.JoinedStr):
        yield from (part.value for part in node.values if isinstance(part, ast.FormattedValue))
    elif isinstance(node, ast.BinOp):
        for side in (node.left, node.right):
            if template(side) is None:
                yield side
            else:
                yield from _inner(side)
    elif isinstance(node, ast.Call):
        yield from node.args
        yield from (keyword.value for keyword in node.keywords)


def _kind(call: ast.Call, within: str) -> str:
    """Return what the texts among a call's arguments are: an error's class, a log's level, or nothing known."""
    name = _last(call.func)
    if _RAISED.search(name):
        return name
    if name == "__init__" and _RAISED.search(within):
        return within
    if name == "fail" and len(call.args) > 1:
        return "answer"  # of the agent
    if isinstance(call.func, ast.Attribute) and name in _LEVELS and _last(call.func.value).strip("_") in _LOGGERS:
        return f"log {name}"
    return ""


_LOGGERS = {"logger", "log", "logging", "limited_logger", "getLogger"}


def _last(node: ast.AST) -> str:
    if isinstance(node, ast.Call):
        return _last(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
