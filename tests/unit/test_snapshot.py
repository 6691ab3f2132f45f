"""What others rely on is what tests/api/snapshot says: names, signatures, help, messages."""

from __future__ import annotations

import pytest

from api import snapshot


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of packages, when they are imported
@pytest.mark.parametrize("part", snapshot.PARTS)
def test_what_others_rely_on_is_what_it_was(part: str) -> None:
    if part == "names":
        pytest.importorskip("matplotlib")  # a base of what `plot` returns
    if part == "help" and not snapshot.is_pinned_click():
        pytest.skip(f"click {snapshot.click_version()} lays out help in its own way: compared with the pinned one only")
    found = snapshot.difference(part, snapshot.current(part))
    assert not found, (
        f"what others rely on has changed:\n{found}\n\nIf that is meant, and CHANGELOG.md names it: {snapshot.COMMAND}"
    )
