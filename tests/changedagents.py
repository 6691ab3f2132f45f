"""Agents that behave otherwise than ours do: lines of their modules are changed before they are sent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from lazycluster.agent import bootstrap
from lazycluster.ssh import agent_program


def read_again() -> None:
    """Forget what this process has read of the agent."""
    for kept in (
        *(agent_program._modules, agent_program._compiled, agent_program.payload),
        *(agent_program.further_modules, agent_program.packed_modules),
    ):
        kept.cache_clear()


@contextmanager
def changed(directory: Path, *changes: tuple[str, str, str]) -> Iterator[None]:
    """Have agents that start meanwhile be other ones.

    Args:
        directory: Where their modules may lie, in a directory ``agent``.
        changes: A module, a text that is there once, and what is there instead.
    """
    agent = directory / "agent"
    shutil.copytree(Path(bootstrap.__file__).parent, agent)
    for name, before, after in changes:
        module = agent / f"{name}.py"
        text = module.read_text()
        assert text.count(before) == 1
        module.write_text(text.replace(before, after))
    told = SimpleNamespace(**{**vars(bootstrap), "__file__": str(agent / "bootstrap.py")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent_program, "bootstrap", told)
        read_again()
        try:
            yield
        finally:
            read_again()
