"""Secrets are compared in a time that does not tell how much of a guess was right."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lazycluster

_SOURCES = Path(lazycluster.__file__).parent
_SECRET = re.compile(r"secret|token|password|passphrase|nonce|expected|signature|stored_key")


def _names(node: ast.expr) -> set[str]:
    """Return the names that a value is read from; not those of constants, or of what a call is made of."""
    if isinstance(node, ast.Name):
        return {node.id}
    if isinstance(node, ast.Attribute):
        return {node.attr}
    if isinstance(node, ast.Await):
        return _names(node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _names(node.func.value)
    return set()


def _compared(tree: ast.AST) -> list[tuple[int, str]]:
    """Return where something that is called like a secret is compared with another value by ``==`` or ``!=``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and all(isinstance(op, (ast.Eq, ast.NotEq)) for op in node.ops):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Constant) for side in sides):
                continue  # that it is empty, say
            found += [(node.lineno, name) for side in sides for name in _names(side) if _SECRET.search(name)]
    return found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("secret != self._secret", 2),
        ("given.encode() == password", 1),
        ("await read() == expected", 1),
        ("token == ''", 0),
        ("compare_digest(secret, self._secret)", 0),
        ("len(secret) == size", 0),
    ],
)
def test_such_comparisons_are_found(text: str, found: int) -> None:
    assert len(_compared(ast.parse(text))) == found


def test_secrets_are_compared_in_constant_time() -> None:
    found = {
        f"{path.relative_to(_SOURCES)}:{line}: {name}"
        for path in _SOURCES.rglob("*.py")
        for line, name in _compared(ast.parse(path.read_text()))
    }
    assert not found, "use hmac.compare_digest"
